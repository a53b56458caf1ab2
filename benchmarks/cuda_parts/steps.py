"""The steps of a run in their order, its first line and its last."""

import json
import platform
from pathlib import Path

import torch
from benchmarks.cuda_parts.bits import compare
from benchmarks.cuda_parts.compiled import compile_all
from benchmarks.cuda_parts.counts import count
from benchmarks.cuda_parts.course import Course
from benchmarks.cuda_parts.places import Place, fused_places, plain_places
from benchmarks.cuda_parts.suite import Suite
from benchmarks.cuda_parts.table import tables
from benchmarks.cuda_parts.times import measure

import fed_learn as fl


def run(seconds: float, *, quick: bool, json_file: Path | None) -> int:
    """Runs all steps, and returns the exit code."""
    course = Course(seconds, quick)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    if device is None:
        torch.set_num_threads(1)  # nothing is timed, and for small inputs more threads only wait for one another
    course.facts |= {
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "fed_learn": f"{fl.__version__} from {fl.__file__}",
    }
    where = device or "no GPU: CPU tensors and the pretended device, no times"
    course.say(f"{where}; {course.facts}")
    if "native" in fl.kernels.available():
        _steps(course)
    else:
        course.fail(f"there is nothing to compare with: {fl.kernels.unavailable()['native']}")
    print(f"\n{tables(course.facts)}\n")
    reasons = course.wrong + [f"left out: {what}" for what in course.left_out]
    facts = course.facts | {"passed": not reasons, "wrong": course.wrong, "left_out": course.left_out}
    facts["seconds"] = round(course.seconds - course.left(), 1)
    if json_file:
        json_file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    told = f"{'quick, ' if quick else ''}{device or 'no GPU: nothing of this has run on one'}"
    most = [*reasons[:8], f"and {len(reasons) - 8} more"] if len(reasons) > 8 else reasons
    print(f"failed ({told}): {'; '.join(most)}" if reasons else f"passed ({told})", flush=True)
    return 1 if reasons else 0


def _steps(course: Course) -> None:
    suite = Suite(course)
    gpu = torch.cuda.is_available()
    plain = plain_places(quick=course.quick)
    fused: list[Place] = []
    with course.step("fused operations"):
        fused, why_not = fused_places(quick=course.quick)
        course.facts["not_fused"] = why_not
        if why_not is not None:
            course.say(f"not fused: {why_not}")
            if gpu:
                course.fail(f"fused operations cannot be used: {why_not}")
    if gpu and fused:
        compile_all(course)
    # Plain operations come first: after an invalid access of the others nothing runs on a GPU any more.
    for places in (plain, fused):
        for place in places:
            compare(place, course)
            count(place, course)
        if gpu:
            if places is plain:
                suite.collect(course.left() / 2)  # what is timed is to be alone
            measure(places, course)
    if not gpu:
        suite.collect(course.left())
