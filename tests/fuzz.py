"""Runs the fuzz for as long as one asks, and says what was slowest: `python tests/fuzz.py --minutes 60`.

Each target runs in a process of its own. An input is made of the target's name and a number, so that
`python tests/fuzz.py --target npy --number 212` runs that one again and shows it. The slowest inputs are timed again at
the end, as is a valid input of the same size; the difference should be below 50 ms.
"""

import argparse
import heapq
import logging
import multiprocessing
import pickle
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

SLOWEST = 5


def best(target: Any, make: Any) -> float:
    """Seconds of the fastest of five runs, each on a new input."""
    times = []
    for _ in range(5):
        sent = make()
        started = time.perf_counter()
        target.outcome(sent)
        times.append(time.perf_counter() - started)
    return min(times)


def fuzz(name: str, seconds: float, first: int) -> None:
    """Runs one target for some time and prints its row of the table; failures beneath."""
    from fuzz_targets import TARGETS

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("error")
    target = TARGETS[name]
    target.outcome(target.valid(100_000))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest: list[tuple[float, int]] = []
    failures: dict[str, tuple[int, str]] = {}
    kinds: Counter[str] = Counter()
    number, end = first, time.monotonic() + seconds
    while time.monotonic() < end:
        sent = target.make(target.rng(number))
        started = time.perf_counter()
        try:
            outcome = target.outcome(sent)
            heapq.heappush(slowest, (time.perf_counter() - started, number))
            kinds[type(outcome).__name__ if isinstance(outcome, Exception) else "a value"] += 1
            target.check(sent, outcome)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - reported
            cause = error.__cause__ or error
            where = [
                f
                for f in traceback.extract_tb(cause.__traceback__)
                if "fed_learn" in f.filename or "fuzz" in f.filename
            ]
            last = f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else ""
            failures.setdefault(f"{type(cause).__name__} at {last}", (number, ascii(str(error) or str(cause))[:200]))
        if len(slowest) > SLOWEST:
            heapq.heappop(slowest)
        number += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    again = []
    for _, slow in slowest:
        size = target.size(target.make(target.rng(slow)))
        time_of_it = best(target, lambda slow=slow: target.make(target.rng(slow)))
        again.append((time_of_it - best(target, lambda size=size: target.valid(size)), time_of_it, slow, size))
    above, took, slow, size = max(again)
    print(
        f"| {name} | {number - first:,} | {kinds.pop('a value', 0):,} | {len(kinds)} | {1e3 * took:.1f} "
        f"(number {slow}, {size:,} B) | {1e3 * above:+.1f} | {(peak - memory) / 1024:.0f} | {len(failures)} |",
        flush=True,
    )
    for what, (failed, said) in failures.items():
        print(f"    FAILED: number {failed}: {what}: {said}", flush=True)
    if failures:
        raise SystemExit(1)


def show(name: str, number: int) -> None:
    """Runs one input again, and shows it."""
    from fuzz_targets import TARGETS

    target = TARGETS[name]
    sent = target.make(target.rng(number))
    print(sent.hex() if isinstance(sent, bytes) else _shown(sent))
    outcome = target.outcome(sent)
    if isinstance(outcome, Exception):
        traceback.print_exception(outcome)
    else:
        print(_shown(outcome))
    target.check(sent, outcome)


def _shown(value: object) -> str:
    try:
        return ascii(value)[:10_000]
    except Exception:  # noqa: BLE001 - inputs are made to raise
        try:
            return f"pickled: {pickle.dumps(value).hex()[:10_000]}"
        except Exception as error:  # noqa: BLE001
            return f"{type(value)} that cannot be shown: {type(error).__name__}"


def main() -> int:
    """The command."""
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for all targets together")
    parser.add_argument(
        "--target", choices=sorted(TARGETS), action="append", help="one of them; more than once for some"
    )
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--number", type=int, help="run and show this input alone")
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    if options.number is not None:
        show(names[0], options.number)
        return 0
    print("| target | executions | values | kinds of error | slowest, ms | above a valid one | memory, MB | failures |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    failed = False
    for name in names:
        seconds = 60 * options.minutes / len(names)
        process = multiprocessing.get_context("spawn").Process(target=fuzz, args=(name, seconds, options.first))
        process.start()
        process.join()
        failed |= process.exitcode != 0
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
