"""Times on a GPU, by its own events, against the limit: a copy on the device of as many bytes as must be moved.

The bytes that a mean needs are those of all contributions and of the result; a copy of B bytes moves 2 B. Inputs are
taken from several sets in turn, each many times as large as the cache. No numbers come from anything but a GPU.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from benchmarks.cuda_parts.course import Course
from benchmarks.cuda_parts.models import (
    CONTRIBUTIONS,
    ONE_TENSOR,
    RESNET,
    WEIGHTS,
    Models,
    averaged,
    contributions,
    size_of,
    streamed,
)
from benchmarks.cuda_parts.places import GPU, Place

import fed_learn as fl

SETS = 3
RUNS = (5, 30)
SECONDS = 1.5
"""For the runs of one side, unless the least number of them takes longer."""


class Side(NamedTuple):
    """A way to make the mean of the contributions of a set."""

    name: str
    call: Callable[[Models], Any]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


def foreach(models: Models) -> list[torch.Tensor]:
    """Float32 sums by operations on lists, with no check; counters are left out."""
    total = sum(WEIGHTS)
    rows = [[x for x in model.values() if x.is_floating_point()] for model in models]
    sums = torch._foreach_mul(rows[0], WEIGHTS[0] / total)
    for row, weight in zip(rows[1:], WEIGHTS[1:], strict=True):
        torch._foreach_add_(sums, row, alpha=weight / total)
    return list(sums)


def by_way_of_the_host(models: Models) -> Any:
    mean: Any = fl.weighted_average(models, WEIGHTS, device="cpu", kernel="native")  # type: ignore[arg-type]
    return {name: tensor.to(GPU) for name, tensor in mean.items()}


def copying(case: str) -> Side:
    """A copy that moves the bytes that a mean needs."""
    source, target = torch.zeros(2, bytes_needed(case) // 8, dtype=torch.int32, device=GPU)
    return Side("copy on the device: the limit", lambda _: target.copy_(source))


def bytes_needed(case: str) -> int:
    return (CONTRIBUTIONS + 1) * size_of(case)[1]


def sides(case: str, places: Sequence[Place]) -> Iterator[Side]:
    yield copying(case)
    for place in places:
        yield Side(f"weighted_average, {place.name}", averaged, replace(place, small=False).entered)
    for place in places if case == RESNET else ():
        within = replace(place, small=False).entered
        yield Side(f"Accumulator, {place.name}", streamed(borrow=False), within)
        yield Side(f"Accumulator, borrow=True, {place.name}", streamed(borrow=True), within)
    if any(not place.fused for place in places):
        yield Side("torch._foreach_*, float32 sums", foreach)
        yield Side("to the host, native kernel, and back", by_way_of_the_host)


def measure(places: Sequence[Place], course: Course) -> None:
    """Times all sides with the operations of these places; those of others first, if they may break the device."""
    for case in (RESNET, ONE_TENSOR):
        if not course.has(15, f"times, {case}"):
            continue
        with course.step(f"times, {case}"):
            sets = [contributions(case, GPU, seed) for seed in range(SETS)]
            for side in sides(case, places):
                if course.has(8, f"times, {case}: {side.name}"):
                    with course.step(f"times, {case}: {side.name}"):
                        _measured(case, side, sets, course)


def _measured(case: str, side: Side, sets: list[Models], course: Course) -> None:
    with side.within():
        for models in sets:
            side.call(models)
        times = timed(side.call, sets)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.call(sets[0])
        peak = torch.cuda.max_memory_allocated() - before
    milliseconds = statistics.median(times)
    row = {
        "case": case,
        "side": side.name,
        "ms": round(milliseconds, 3),
        "fastest_ms": round(min(times), 3),
        "runs": len(times),
        "gb_per_s": round(bytes_needed(case) / milliseconds / 1e6, 1),
        "peak_mib": round(peak / 2**20, 1),
    }
    course.facts.setdefault("times", []).append(row)
    course.say(f"{row}")


def timed(call: Callable[[Models], Any], sets: Sequence[Models]) -> list[float]:
    """Milliseconds of each run, from before the host begins to after the device has ended."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < RUNS[1] and (len(times) < RUNS[0] or time.perf_counter() - began < SECONDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        returned = call(sets[len(times) % len(sets)])
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        del returned
    return times
