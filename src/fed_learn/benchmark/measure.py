"""Measures a case: checks every side, then runs the limit and all sides in turn."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fed_learn import kernels
from fed_learn.benchmark.cases import Case, Sizes
from fed_learn.benchmark.check import OUR_BOUND, Expected, bound_of_peers, largest_error, reference
from fed_learn.benchmark.inputs import Inputs
from fed_learn.benchmark.memory import Peak, release
from fed_learn.benchmark.sides import Run, Side

SHORTEST_SAMPLE = 0.003
"""Seconds; what is faster is called several times per sample, so that the clock's steps do not matter."""
SLOW = 8
"""A side has so many times the first run of ours per turn; if it takes longer, it rests until that has added up."""
GLANCE, LONGEST_WAIT, IDLE = 0.002, 0.5, 0.1
"""Before a sample: seconds in which to see whether any thread of the process still computes, seconds to wait for all of
them at most, and the share of a processor below which none does. Threads of OpenBLAS go on waiting actively for a tenth
of a second, those of OpenMP for a while, and double the time of whoever comes next."""

Progress = Callable[[str], None]


@dataclass(eq=False)
class SideResult:
    """What was found out about a side.

    Attributes:
        name: The side's.
        ours: Whether it is this package.
        error: Its largest error in units of the last place; None: it has no result.
        bound: What the error may be.
        dtype: Of its result; None: it has no result.
        peak: Bytes of memory at the peak of its first run beyond the inputs, its result included; None: unknown.
        calls: Calls per sample.
        samples: Turn → seconds per unit of work (a batch, or one contribution of a stream).
    """

    name: str
    ours: bool
    error: float | None = None
    bound: float = math.inf
    dtype: str | None = None
    peak: int | None = None
    calls: int = 1
    samples: dict[int, float] = field(default_factory=dict)

    @property
    def wrong(self) -> bool:
        """Whether the error exceeds the bound."""
        return self.error is not None and not self.error <= self.bound

    @property
    def seconds(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples.values())

    def ratio_to(self, other: "SideResult") -> float:
        """The median over the turns of both of this side's time by the other's in the same turn."""
        return statistics.median(s / other.samples[turn] for turn, s in self.samples.items() if turn in other.samples)


@dataclass(eq=False)
class CaseResult:
    """What was found out about a case. All figures are for a unit of work: a batch, or one contribution of a stream.

    Attributes:
        case: The case.
        tensors: Number of arrays per model.
        elements: Elements read.
        nbytes: Bytes read.
        limit: The bare read.
        factor: What a batch has to move at least, as a multiple of what it reads: for n inputs, one output is written.
        sides: This package's and the peers', in the order of the case.
        base: Name of the side to which the others are compared.
        repetitions: Number of turns.
        missing: Peer → why it did not take part.
    """

    case: Case
    tensors: int
    elements: int
    nbytes: int
    limit: SideResult
    factor: float
    sides: list[SideResult]
    base: str
    repetitions: int
    missing: dict[str, str]

    def side(self, name: str) -> SideResult:
        """The side of this name."""
        return next(side for side in self.sides if side.name == name)

    def to_limit(self, side: SideResult) -> float:
        """The side's time as a multiple of the limit."""
        return side.ratio_to(self.limit) / self.factor

    def to_base(self, side: SideResult) -> float:
        """The side's time as a multiple of the base's."""
        return side.ratio_to(self.side(self.base))

    @property
    def subject(self) -> SideResult:
        """The side that the case is about: the first of this package's."""
        return self.sides[0]

    def best_peer(self) -> SideResult | None:
        """The fastest side with a right result that is not this package."""
        right = [side for side in self.sides if not side.ours and side.error is not None and not side.wrong]
        return min(right, key=self.to_base, default=None)


def measure(
    case: Case,
    sizes: Sizes,
    repetitions: int,
    *,
    ours: Sequence[Side] | None = None,
    others: Sequence[Side] | None = None,
    missing: Mapping[str, str] | None = None,
    progress: Progress = lambda text: None,
) -> CaseResult:
    """Measures a case. What a peer raises is noted; what this package raises is raised.

    Args:
        case: The case.
        sizes: How large its models are.
        repetitions: Number of turns.
        ours: This package's sides; None: those of the case.
        others: The peers; None: those of the case that can run here.
        missing: Why peers that are not among `others` do not take part, to be reported.
        progress: Told what is being done.
    """
    progress("making the inputs")
    inputs = case.inputs(sizes)
    limit_side = case.limit()  # before any side changes the number of threads
    ours = case.ours() if ours is None else ours
    peers, absent = case.others() if others is None else (others, missing or {})
    absent = dict(absent)
    threads = kernels.get_num_threads()
    try:
        measured = _prepare_all(case, inputs, [*ours, *peers], absent, progress)
        limit = _Measured(SideResult(limit_side.name, False), limit_side.prepare(inputs))
        limit.choose_calls()
        base = case.base(ours)
        compared_with = [limit, next(m for m in measured if m.result.name == base)]
        parts = case.clients if case.streams else 1
        failed = _take_turns([limit, *measured], repetitions, compared_with, parts, progress)
    finally:
        kernels.set_num_threads(None)
        if kernels.get_num_threads() != threads:
            kernels.set_num_threads(threads)
    absent |= failed
    result = CaseResult(
        case=case,
        tensors=len(inputs.clients[0]),
        elements=inputs.size // parts,
        nbytes=inputs.nbytes // parts,
        limit=limit.result,
        factor=1.0 if case.streams else (case.clients + 1) / case.clients,
        sides=[m.result for m in measured if m.result.name not in failed],
        base=base,
        repetitions=repetitions,
        missing=absent,
    )
    del inputs, measured, limit
    release()
    return result


class _Measured:
    """A side at work: its run, and what is found out about it."""

    def __init__(self, result: SideResult, run: Run, first: float = 0.0) -> None:
        self.result = result
        self.run = run
        self.first = first
        self.spent = 0.0

    def time(self, calls: int) -> float:
        self.run.before()
        _wait_for_threads()
        started = time.perf_counter()
        if calls == 1:
            kept = self.run.call()
            elapsed = time.perf_counter() - started
            del kept  # freed when the clock has stopped
            return elapsed
        for _ in range(calls):
            self.run.call()
        return (time.perf_counter() - started) / calls

    def choose_calls(self) -> None:
        """So many that a sample is long enough; also the warm-up."""
        calls = 1
        while (elapsed := self.time(calls) * calls) < SHORTEST_SAMPLE:
            calls = math.ceil(calls * min(10.0, 1.2 * SHORTEST_SAMPLE / max(elapsed, 1e-9)))
        self.result.calls = calls


def _prepare_all(
    case: Case, inputs: Inputs, sides: Sequence[Side], missing: dict[str, str], progress: Progress
) -> list[_Measured]:
    progress("making the reference")
    expected = reference(inputs, exact="exact" in case.variant)
    release()
    prepared = []
    for side in sides:
        progress(f"checking {side.name}")
        try:
            prepared.append(_prepare(side, case, inputs, expected))
        except Exception as error:
            if side.ours:
                raise
            missing[side.name] = _what_it_raised(error)
            release()  # what its traceback held
    return prepared


def _what_it_raised(error: Exception) -> str:
    return f"raised {type(error).__name__}: {error}"


def _prepare(side: Side, case: Case, inputs: Inputs, expected: dict[str, Expected]) -> _Measured:
    """Checks a side, measures its memory, and makes it ready."""
    result = SideResult(side.name, side.ours)
    side.prepare(_tiny(inputs)).call()  # imports and compilation are no part of what is measured
    peak = Peak()
    run = side.prepare(inputs)
    run.before()
    _wait_for_threads()
    started = time.perf_counter()
    returned = run.call()
    first = time.perf_counter() - started
    result.peak = peak.beyond()
    if run.result is not None:
        values = run.result(returned)
        result.error = largest_error(values, expected)
        result.bound = OUR_BOUND if side.ours else bound_of_peers(case.clients, case.dtype)
        dtypes = {np.asarray(value).dtype.name for value in values.values()}
        result.dtype = dtypes.pop() if len(dtypes) == 1 else "mixed"
        del values
    del returned
    measured = _Measured(result, run, first)
    if case.streams:
        measured.time(1)  # a peer that has given its result makes new sums, which is not to be timed
    if first < SHORTEST_SAMPLE:
        measured.choose_calls()
    return measured


def _wait_for_threads() -> None:
    """Waits until no thread of the process computes."""
    give_up = time.perf_counter() + LONGEST_WAIT
    while time.perf_counter() < give_up:
        started, used = time.perf_counter(), time.process_time()
        time.sleep(GLANCE)
        if time.process_time() - used < IDLE * (time.perf_counter() - started):
            return


def _tiny(inputs: Inputs) -> Inputs:
    """The first few elements of every array."""
    clients = [{name: array.reshape(-1)[:64] for name, array in client.items()} for client in inputs.clients]
    return Inputs(clients, inputs.aggregation_weights, inputs.reuse)


def _take_turns(
    sides: Sequence[_Measured], repetitions: int, always: Sequence[_Measured], parts: int, progress: Progress
) -> dict[str, str]:
    """All sides once per turn, but for those that have to rest.

    Each turn begins with the next of them, and every other one goes backwards, so that nobody always comes after the
    same one.

    Args:
        sides: The limit and all others.
        repetitions: Number of turns.
        always: The limit and the base, with which the others are compared in every turn.
        parts: Units of work in what a side does.
        progress: Told what is being done.

    Returns:
        The peers that failed, and how.
    """
    slow = SLOW * always[-1].first
    failed: dict[str, str] = {}
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(repetitions):
            for at in range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides))):
                measured = sides[(turn + at) % len(sides)]
                name = measured.result.name
                if name in failed or (measured.spent > slow * turn and measured not in always):
                    continue
                progress(f"turn {turn + 1} of {repetitions}: {name}")
                try:
                    seconds = measured.time(measured.result.calls)
                except Exception as error:
                    if measured.result.ours or measured in always:
                        raise
                    failed[name] = _what_it_raised(error)
                    continue
                measured.result.samples[turn] = seconds / parts
                measured.spent += seconds
    finally:
        if collects:
            gc.enable()
    return failed


def as_json(result: CaseResult) -> dict[str, Any]:
    """A result as plain numbers, strings, lists and dicts; infinite errors as None beside `wrong`."""
    case = result.case
    return {
        "name": case.name,
        "about": case.about,
        "clients": case.clients,
        "dtype": case.dtype.name,
        "layout": case.layout,
        "unit": "contribution" if case.streams else "batch",
        "tensors": result.tensors,
        "elements": result.elements,
        "bytes": result.nbytes,
        "repetitions": result.repetitions,
        "limit": {
            "name": result.limit.name,
            "factor": result.factor,
            "calls_per_sample": result.limit.calls,
            "samples": list(result.limit.samples.values()),
        },
        "base": result.base,
        "sides": [_side_as_json(result, side) for side in result.sides],
        "missing": result.missing,
    }


def _side_as_json(result: CaseResult, side: SideResult) -> dict[str, Any]:
    error = side.error if side.error is not None and math.isfinite(side.error) else None
    return {
        "name": side.name,
        "ours": side.ours,
        "times_limit": result.to_limit(side),
        "times_base": result.to_base(side),
        "seconds": side.seconds,
        "gigabytes_per_second": result.nbytes / side.seconds / 1e9,
        "picoseconds_per_element": side.seconds / result.elements * 1e12,
        "peak_bytes": side.peak,
        "error_ulp": error,
        "bound_ulp": None if side.error is None else side.bound,
        "wrong": side.wrong,
        "result_dtype": side.dtype,
        "calls_per_sample": side.calls,
        "turns": list(side.samples),
        "samples": list(side.samples.values()),
    }
