"""How many operations a device is given for a mean of large models, and how often the host waits for it."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from benchmarks.cuda_parts.course import Course
from benchmarks.cuda_parts.models import RESNET, WEIGHTS, averaged, contributions, shapes_of, size_of
from benchmarks.cuda_parts.places import Place, array_of
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

import fed_learn as fl

MOST_LAUNCHES, MOST_WAITS = 400, 3


@dataclass
class Counts:
    """What one call gave to a device.

    Attributes:
        launches: Kernels.
        synchronisations: How often the host waited.
        bytes_per_element: What was read and written, by the pretended device's own log.
        kernel_ms: How long the kernels ran, on a GPU.
    """

    launches: int
    synchronisations: int
    bytes_per_element: float | None = None
    kernel_ms: float | None = None


def count(place: Place, course: Course) -> None:
    """Counts for one mean of 10 × ResNet-50, and compares its bits with those of the native kernel."""
    if place.device == "cpu" or not course.has(15, f"counts, {place.name}"):
        return
    with course.step(f"counts, {place.name}: one mean of {RESNET}"), replace(place, small=False).entered() as pretended:
        models = contributions(RESNET, place.device)
        if pretended is None:
            counts, mean = counted_on_gpu(lambda: averaged(models))
        else:
            with pretended.counting() as log:
                mean = averaged(models)
            moved = log.bytes_moved / size_of(RESNET)[0]
            counts = Counts(len(log.launches), len(log.synchronisations), round(moved, 1))
        differing = _differing_bytes(mean, models)
        course.facts.setdefault("counts", {})[place.name] = asdict(counts) | {"differing": differing}
        course.say(f"counts, {place.name}: {counts}; {differing} bytes differ")
        if differing:
            course.fail(f"{place.name}: {differing} bytes of the mean of {RESNET} differ")
        if not 0 < counts.launches <= MOST_LAUNCHES:
            course.fail(f"{place.name}: {counts.launches} launches for {RESNET}, not 1 to {MOST_LAUNCHES}")
        if not 0 < counts.synchronisations <= MOST_WAITS:
            course.fail(f"{place.name}: {counts.synchronisations} waits for {RESNET}, not 1 to {MOST_WAITS}")


def counted_on_gpu(call: Callable[[], Any]) -> tuple[Counts, Any]:
    """What a call does on a GPU, by torch's own means, and what it returns; it is run three times."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            returned = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() or () if event.device_type == DeviceType.CUDA]
    kernels = [event for event in events if not event.name.startswith(("Memcpy", "Memset"))]
    milliseconds = sum(event.time_range.elapsed_us() for event in kernels) / 1000
    return Counts(len(kernels), len(waits), kernel_ms=round(milliseconds, 3)), returned


def _differing_bytes(mean: Any, models: Any) -> int:
    arrays = [{name: array_of(tensor) for name, tensor in model.items()} for model in models]
    expected = fl.weighted_average(arrays, WEIGHTS, kernel="native")
    pairs = ((array_of(mean[name]), expected[name]) for name in shapes_of(RESNET))
    words = ((x.reshape(-1).view(np.uint8), y.reshape(-1).view(np.uint8)) for x, y in pairs)
    return sum(int(np.count_nonzero(x != y)) for x, y in words)
