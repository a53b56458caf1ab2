"""Compiles the fused kernels for all dtypes, in several processes, which leave them in Triton's cache for the others.

Compiling takes the time of a hundred runs, and each kernel is compiled for a dtype at a time.
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

from benchmarks.cuda_parts.course import Course

FLOATS = ("float16", "bfloat16", "float32", "float64")
SIGNED = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64", "bool")


def compile_all(course: Course) -> None:
    began = time.perf_counter()
    names = (*FLOATS, *SIGNED, *UNSIGNED)
    with course.step("fused kernels are compiled"):
        workers = min(len(names), len(os.sched_getaffinity(0)))
        # A forked process cannot use the GPU.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(compile_for, names, timeout=course.left() / 2))
        course.facts["compile_s"] = round(time.perf_counter() - began, 1)
        course.say(f"compiled in {course.facts['compile_s']} s by {workers} processes")


def compile_for(name: str) -> None:
    """Runs each operation on a few elements of a dtype, at addresses that are multiples of 16 and others."""
    import numpy as np
    import torch

    from fed_learn.kernels import fused

    dtype = getattr(torch, name)
    for offset in (0, 1):
        x, y, out = (torch.zeros(64, dtype=dtype, device="cuda")[offset : offset + 9] for _ in range(3))
        sums = torch.zeros(64, dtype=torch.float64, device="cuda")[offset : offset + 9]
        fused.mean([[x, y]], [out], np.ones(2), 2.0)
        fused.accumulate([sums], [[x, y]], np.ones(2), start=True)
        fused.accumulate([sums], [[x, y]], np.ones(2), start=False)
        fused.divide([sums], 2.0, [out])
        fused.copy([x], [out])
        fused.not_finite([x])
        if name in (*FLOATS, *SIGNED):
            fused.add([x], [y], [out])
            fused.subtract([x], [y], [out])
    torch.cuda.synchronize()
