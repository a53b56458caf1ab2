"""Kills jobs at random moments, resumes them, and compares what they leave with a job that was never killed.

    python tests/kill_and_resume.py --kills 100
    python tests/kill_and_resume.py --kills 10 -- --framework torch

Every job is run by `fed-learn simulate` in a process of its own, which SIGKILL ends: at a moment drawn from the whole
time that the job takes, several times in one job. It is then resumed, until it ends by itself. All files that it leaves
have to be those of the job that was never killed, byte for byte, but for the measured times.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COMMAND = (sys.executable, "-c", "from fed_learn.cli import main; main()", "simulate")
SMALL = ("--clients", "3", "--rounds", "6", "--local-epochs", "1")
APART = {"times.json"}
"""Files in which two jobs differ that were both left alone."""


@dataclass
class Outcome:
    """What came of some jobs that were killed."""

    kills: int = 0
    jobs: int = 0
    begun_again: int = 0
    resumed: int = 0


def contents(out: Path) -> dict[str, bytes]:
    """The files of a job, but for measured times; of its state the newest, which is all that is looked at."""
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name not in APART}
    return {name: data for name, data in files.items() if not name.startswith(".")}


def run(options: Sequence[str], out: Path, delay: float | None = None) -> bool:
    """Runs a job, or goes on with it, and kills it after so many seconds; whether it ended by itself."""
    has_state = (out / "state").is_dir() and any((out / "state").glob("state-*.json"))
    command = [*COMMAND, *(("--resume",) if has_state else options), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            _, said = process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return False
    if process.returncode != 0:
        raise AssertionError(f"{' '.join(command[3:])} ended with {process.returncode}: {said.decode()}")
    return True


def kill_and_resume(kills: int, options: Sequence[str], seed: int, *, at_most: int = 4) -> Outcome:
    """Kills jobs so many times in all, and compares each with one that was never killed.

    Args:
        kills: Kills in all.
        options: Options of `fed-learn simulate`.
        seed: Of the moments.
        at_most: Kills of one job.

    Raises:
        AssertionError: A job could not be resumed, or left other bytes.
    """
    rng, outcome = random.Random(seed), Outcome()
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        assert run(options, Path(folder, "never"))
        whole, expected = time.monotonic() - started, contents(Path(folder, "never"))
        while outcome.kills < kills:
            outcome.jobs += 1
            out = Path(folder, f"job-{outcome.jobs}")
            moments = []
            for _ in range(min(at_most, kills - outcome.kills)):
                moments.append(rng.uniform(0.1, whole))
                if run(options, out, moments[-1]):
                    break
                outcome.kills += 1
                if any((out / "state").glob("state-*.json")):
                    outcome.resumed += 1
                else:
                    outcome.begun_again += 1
            run(options, out)
            left = contents(out)
            differing = [name for name in sorted(expected | left) if expected.get(name) != left.get(name)]
            assert not differing, f"killed after {moments} s, the job left another {', '.join(differing)}"
    return outcome


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="options of fed-learn simulate, after --")
    given = parser.parse_args()
    outcome = kill_and_resume(given.kills, [*SMALL, *given.options], given.seed)
    print(
        f"{outcome.kills} kills in {outcome.jobs} jobs, {outcome.resumed} of them after the first state was written "
        f"and {outcome.begun_again} before: every job left the bytes of one that was never killed"
    )


if __name__ == "__main__":
    main()
