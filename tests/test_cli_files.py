"""`fed-learn simulate` and the files in its folder: of earlier jobs, of two at a time, of one that is interrupted."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from fed_learn.cli.interrupts import handled

# A shell has what runs in its background ignore Ctrl-C, and so would all that is started from there.
START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import fed_learn.cli as c; c.main()"
COMMAND = [sys.executable, "-c", START, "simulate", "--clients", "2", "--local-epochs", "1"]
PARTS = """
import os, sys, time
import fed_learn as fl

class Waiting(fl.Handler):
    def start_round(self, ctx):
        print("started", flush=True)
        sys.stdin.read()

class Stopping(fl.Handler):
    def __init__(self, number, shut_down):
        self.number, self.shut_down = number, shut_down

    def end_round(self, ctx):
        if ctx[fl.ContextKey.ROUND] == 1:
            os.kill(os.getpid(), self.number)

    def shutdown(self, ctx):
        open(self.shut_down, "w").close()

class StoppingClient:
    stopped = []

    def __init__(self, number, seconds=0):
        self.number, self.seconds = number, seconds

    def apply(self, model_diff, train_ctx=None):
        if train_ctx.global_round == 1 and not self.stopped:
            self.stopped.append(True)
            os.kill(os.getpid(), self.number)
            time.sleep(self.seconds)
        return model_diff

class Failing(fl.Handler):
    def startup(self, ctx):
        raise RuntimeError("not today")
"""


def run(out: Path | str, *arguments: str, cwd: Path | None = None, **environment: str) -> Any:
    command = [*COMMAND, "--out", str(out), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **environment}
    )


def config_of(folder: Path, **config: Any) -> str:
    (folder / "parts_of_a_job.py").write_text(PARTS)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder, and in that of a job's state."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def apart_from_the_state(folder: Path) -> list[str]:
    return sorted(name for name in contents(folder) if not name.startswith("state/"))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a job leaves in its folder."""
    out = tmp_path_factory.mktemp("earlier") / "out"
    done = run(out, "--rounds", "1")
    assert (done.returncode, done.stderr) == (0, "")
    return contents(out)


@pytest.fixture
def out(earlier: dict[str, bytes], tmp_path: Path) -> Path:
    """A folder with the files of an earlier job, and one of somebody else's."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name, data in earlier.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_second_job_in_the_folder_of_another_is_wrong_use_and_changes_nothing(out: Path) -> None:
    before = contents(out)
    done = run(out, "--rounds", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"fed-learn: Invalid value for --out: {out} holds a job: go on with it by --resume, name another folder, or "
        "replace it with --overwrite\n"
    )
    assert contents(out) == before


def test_one_file_of_an_earlier_job_is_enough(tmp_path: Path) -> None:
    (tmp_path / "best.safetensors").write_bytes(b"the only one")
    done = run(tmp_path, "--rounds", "1")
    assert done.returncode == 2
    assert "(best.safetensors)" in done.stderr
    assert contents(tmp_path) == {"best.safetensors": b"the only one"}


def test_files_of_an_earlier_job_are_replaced_where_that_is_asked_for(out: Path, earlier: dict[str, bytes]) -> None:
    done = run(out, "--rounds", "2", "--overwrite")
    assert (done.returncode, done.stderr) == (0, "")
    after = contents(out)
    assert apart_from_the_state(out) == sorted([*(n for n in earlier if not n.startswith("state/")), "notes.txt"])
    assert after.pop("notes.txt") == b"mine"
    assert all(after[name] != data for name, data in earlier.items() if not name.startswith("state/"))
    assert sorted(n for n in after if n.endswith("json") and n.startswith("state/")) == [
        "state/state-00000001.json",
        "state/state-00000002.json",
    ]


@pytest.mark.parametrize(
    "handler",
    [
        {"path": "parts_of_a_job.Failing"},
        {"name": "JsonLinesHandler", "args": {"path": "/proc/nowhere/job.jsonl"}},
    ],
    ids=["failing", "nowhere"],
)
def test_a_job_that_cannot_start_leaves_what_it_was_to_replace(handler: Any, out: Path, tmp_path: Path) -> None:
    before = contents(out)
    done = run(out, "--overwrite", "--config", config_of(tmp_path, handlers=[handler]))
    assert done.returncode == 1
    assert "at _startup" in done.stderr
    assert contents(out) == before


def test_of_two_jobs_in_one_folder_at_a_time_the_second_is_refused(tmp_path: Path) -> None:
    out, config = tmp_path / "out", config_of(tmp_path, handlers=[{"path": "parts_of_a_job.Waiting"}])
    command = [*COMMAND, "--rounds", "1", "--json", "--out", str(out), "--config", config]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "started\n"
        second = run(out, "--rounds", "1", "--overwrite")
        printed, said = first.communicate()
    assert (second.returncode, second.stdout) == (1, "")
    who = f"process {first.pid} on {os.uname().nodename}"
    assert second.stderr == (
        f"fed-learn: {out}/summary.json is being written by another job ({who}): let it end, or write elsewhere\n"
    )
    assert first.returncode == 0, said
    summary = json.loads(printed)
    assert sorted(summary["files"]) == apart_from_the_state(out), "nothing but the files of the first, and no lock"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("waiting", [False, True], ids=["in a handler", "while clients train"])
def test_an_interrupt_shuts_the_job_down_and_says_what_was_kept(
    waiting: bool, number: int, code: int, tmp_path: Path
) -> None:
    out, shut_down = tmp_path / "out", tmp_path / "shut down"
    args = {"number": int(number) if not waiting else 0, "shut_down": str(shut_down)}
    handlers = [{"path": "parts_of_a_job.Stopping", "args": args}]
    filters = [{"path": "parts_of_a_job.StoppingClient", "args": {"number": int(number)}}] if waiting else []
    done = run(out, "--rounds", "3", "--config", config_of(tmp_path, handlers=handlers, filters=filters))
    assert done.returncode == code
    assert done.stderr == (
        f"fed-learn: interrupted in round 2 of 3; kept in {out}: metrics.jsonl, global.safetensors, state. To go on: "
        f"fed-learn simulate --out {out} --resume\n"
    )
    assert shut_down.exists()
    assert apart_from_the_state(out) == ["global.safetensors", "metrics.jsonl"]
    assert [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [0]
    with safe_open(out / "global.safetensors", "np") as file:
        # The round that was interrupted at its end has made a model, which is not lost.
        assert json.loads(file.metadata()["fed_learn"]) == {"round": 0 if waiting else 1}


@pytest.mark.parametrize("twice", [True, False], ids=["a second signal", "after its patience"])
def test_a_learner_that_hangs_does_not_keep_the_process(twice: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hanging = {"path": "parts_of_a_job.StoppingClient", "args": {"number": int(signal.SIGTERM), "seconds": 3600}}
    config = config_of(tmp_path, filters=[hanging])
    patience = "" if twice else "from fed_learn.cli import interrupts; interrupts.PATIENCE = 3.0\n"
    command = [sys.executable, "-c", f"{patience}from fed_learn.cli import main; main()", *COMMAND[3:]]
    arguments = ["--rounds", "3", "--config", config, "--out", str(out)]
    with subprocess.Popen(
        [*command, *arguments], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as job:
        assert job.stderr is not None
        waits = job.stderr.readline().decode()
        assert waits.startswith("fed-learn: interrupted, and waits for what is being done")
        if twice:
            job.send_signal(signal.SIGTERM)
        said = job.stderr.read().decode()
    assert job.returncode == 143
    how = "ended at once" if twice else "ended after 3 s, for what was being done did not end"
    assert said == (
        f"fed-learn: interrupted in round 2 of 3; kept in {out}: metrics.jsonl, global.safetensors, best.safetensors, "
        f"state. To go on: fed-learn simulate --out {out} --resume ({how})\n"
    )


def test_an_interrupt_before_the_first_round_leaves_the_files_of_an_earlier_job(out: Path, tmp_path: Path) -> None:
    before = contents(out)
    parts = tmp_path / "interrupted_early.py"
    parts.write_text(
        "import os, signal\nimport fed_learn as fl\n"
        "class Early(fl.Handler):\n    def startup(self, ctx): os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    config = config_of(tmp_path, handlers=[{"path": "interrupted_early.Early"}])
    done = run(out, "--overwrite", "--config", config)
    assert (done.returncode, done.stderr) == (143, "fed-learn: interrupted; nothing was written: run it again\n")
    assert contents(out) == before


def test_a_job_that_is_done_is_not_said_to_be_lost_where_only_its_plot_is_interrupted(tmp_path: Path) -> None:
    interrupted = (
        "import os, signal, sys\nfrom fed_learn.cli import main\nfrom fed_learn.simulation import plot\n"
        "plot.plot_job = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\nmain(sys.argv[1:])"
    )
    command = [sys.executable, "-c", interrupted, *COMMAND[3:], "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        143,
        f"fed-learn: interrupted when the job was done; only the plot may be missing in {tmp_path}: metrics.jsonl, "
        "global.safetensors, best.safetensors, summary.json, times.json\n",
    )


def test_a_process_that_is_to_ignore_sigterm_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with handled() as interrupts:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert interrupts.came is None
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(KeyboardInterrupt), handled() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
    assert (interrupts.came, interrupts.exit_code) == (signal.SIGTERM, 143)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_in_another_thread_than_the_main_one_leaves_signals_as_they_are() -> None:
    handlers: list[object] = []

    def command() -> None:
        with handled():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]


def test_a_plot_that_cannot_be_drawn_is_a_warning_and_the_rest_is_there(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('it is not here')")
    out = tmp_path / "out"
    done = run(out, "--rounds", "1", "--json", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert done.returncode == 0
    (warning,) = (line for line in done.stderr.splitlines() if line.startswith("WARNING"))
    assert warning.startswith("WARNING: there is no plot: ImportError: ")
    summary = json.loads(done.stdout)
    seconds = summary.pop("seconds")
    assert seconds == json.loads((out / "times.json").read_text())["seconds"]
    files = summary.pop("files")
    assert {**summary, "files": list(files)} == json.loads((out / "summary.json").read_text())
    assert sorted(files) == apart_from_the_state(out)
    assert "metrics.png" not in files


def test_a_folder_without_a_name_is_wrong_use_and_the_current_one_is_none(tmp_path: Path) -> None:
    done = run("", "--rounds", "1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "fed-learn: Invalid value for '--out': the folder has no name\n")
    assert contents(tmp_path) == {}
    assert run(".", "--rounds", "1", cwd=tmp_path).returncode == 0
    assert "summary.json" in contents(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    done = run(tmp_path / "out", "--rounds", "1")
    assert done.returncode == 2
    assert f"{tmp_path / 'out'} is a file, not a folder" in done.stderr
    assert contents(tmp_path) == {"out": b"mine"}
