"""The native kernel: the C extension, called once per thread for a whole model, without the GIL."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fed_learn.errors import KernelNameError
from fed_learn.kernels import threads
from fed_learn.kernels._native import ffi, lib
from fed_learn.kernels.base import Float64Array, Segment
from fed_learn.weights import BFLOAT16, SUPPORTED_DTYPES, Array

CODES = {
    dtype: int(getattr(lib, "FL_" + ("BFLOAT16" if dtype == BFLOAT16 else dtype.name.upper())))
    for dtype in SUPPORTED_DTYPES
}

SETS = {
    ffi.string(lib.fl_set_name(code)).decode(): code for code in reversed(range(lib.FL_SETS)) if lib.fl_set_usable(code)
}
"""Instruction sets that this build has and this machine can run, the widest first, with their codes."""

_forced_set: ContextVar[str | None] = ContextVar("fed_learn_instruction_set", default=None)

Addresses: TypeAlias = npt.NDArray[np.uintp]


@dataclass(frozen=True, eq=False)
class _Pieces:
    """The work of one C call: for each piece its addresses (a row), elements and dtype code.

    `arrays` only keeps the memory behind the addresses alive, even when an interrupt ends the wait for the thread.
    """

    arrays: Sequence[Sequence[Array]]
    addresses: Addresses
    counts: Addresses
    codes: npt.NDArray[np.int32]

    def arguments(self) -> tuple[object, object, object]:
        return (
            ffi.cast("uintptr_t *", self.addresses.ctypes.data),
            ffi.cast("size_t *", self.counts.ctypes.data),
            ffi.cast("int32_t *", self.codes.ctypes.data),
        )


def current_set() -> str:
    """The instruction set that is used: the one set by `use_set`, else by `FED_LEARN_INSTRUCTION_SET`, else the widest.

    Raises:
        KernelNameError: It is not among `SETS`; says which are.
    """
    source, name = "instruction set", _forced_set.get()
    if name is None:
        source, name = "FED_LEARN_INSTRUCTION_SET", os.environ.get("FED_LEARN_INSTRUCTION_SET") or next(iter(SETS))
    if name not in SETS:
        raise KernelNameError(f"{source} {name!r} is not usable here; usable are {', '.join(SETS)}", valid=tuple(SETS))
    return name


@contextmanager
def use_set(name: str) -> Iterator[None]:
    """See `fed_learn.kernels.use_instruction_set`."""
    token = _forced_set.set(name)
    try:
        current_set()
        yield
    finally:
        _forced_set.reset(token)


class NativeKernel:
    """`Kernel` in C, in variants for several instruction sets that give the same bits."""

    name = "native"

    def weighted_mean(self, segments: Sequence[Segment], aggregation_weights: Float64Array, total: float) -> None:
        """See `Kernel.weighted_mean`."""
        chosen = SETS[current_set()]
        a = np.ascontiguousarray(aggregation_weights, dtype=np.float64)
        pointer = ffi.cast("double *", a.ctypes.data)

        def call(pieces: _Pieces) -> None:
            _check(lib.fl_weighted_mean(chosen, len(pieces.counts), a.size, *pieces.arguments(), pointer, total))

        threads.run(call, _split([(s.output, *s.inputs) for s in segments]))

    def accumulate(self, sums: Sequence[Float64Array], inputs: Sequence[Array], aggregation_weight: float) -> None:
        """See `Kernel.accumulate`."""
        chosen = SETS[current_set()]

        def call(pieces: _Pieces) -> None:
            _check(lib.fl_accumulate(chosen, len(pieces.counts), *pieces.arguments(), aggregation_weight))

        # The dtype of a piece is that of its last array here, of its first in the other two.
        threads.run(call, _split(list(zip(sums, inputs, strict=True)), dtype_of=1))

    def divide(self, sums: Sequence[Float64Array], total: float, outputs: Sequence[Array]) -> None:
        """See `Kernel.divide`."""
        chosen = SETS[current_set()]

        def call(pieces: _Pieces) -> None:
            _check(lib.fl_divide(chosen, len(pieces.counts), *pieces.arguments(), total))

        threads.run(call, _split(list(zip(outputs, sums, strict=True))))


def _check(status: int) -> None:
    if status != lib.FL_OK:
        raise RuntimeError(f"the native kernel refused its arguments (status {status}); please report this")


def _split(rows: Sequence[Sequence[Array]], dtype_of: int = 0) -> list[_Pieces]:
    """Cuts rows of equally long flat arrays into one list of pieces per thread, of about equal bytes.

    Elements are split, never contributions, so the bits do not depend on the number of threads.
    """
    rows = [row for row in rows if row[0].size]
    if not rows:
        return []
    addresses = np.array([[array.__array_interface__["data"][0] for array in row] for row in rows], dtype=np.uintp)
    itemsizes = np.array([[array.itemsize for array in row] for row in rows], dtype=np.uintp)
    counts = np.array([row[0].size for row in rows], dtype=np.uintp)
    codes = np.array([CODES[row[dtype_of].dtype] for row in rows], dtype=np.int32)
    ends = np.cumsum(counts * itemsizes.sum(axis=1))
    shares = threads.threads_for(int(ends[-1]))
    if shares == 1:
        return [_Pieces(rows, addresses, counts, codes)]
    pieces: list[_Pieces] = []
    cuts = _cuts(ends, counts, shares)
    for (first, start), (last, stop) in pairwise(cuts):
        if (first, start) == (last, stop):
            continue
        rows_here = slice(first, last + 1 if stop else last)
        own = addresses[rows_here].copy()
        own[0] += np.uintp(start) * itemsizes[first]
        own_counts = counts[rows_here].copy()
        if stop:
            own_counts[-1] = stop
        own_counts[0] -= np.uintp(start)
        pieces.append(_Pieces(rows, own, own_counts, codes[rows_here].copy()))
    return pieces


def _cuts(ends: Addresses, counts: Addresses, shares: int) -> list[tuple[int, int]]:
    """Where each share begins, as (row, element); the last entry is the end."""
    cuts = [(0, 0)]
    total = int(ends[-1])
    for share in range(1, shares):
        target = total * share // shares
        row = int(np.searchsorted(ends, target, side="right"))
        before = int(ends[row - 1]) if row else 0
        bytes_per_element = (int(ends[row]) - before) // int(counts[row])
        cuts.append((row, (target - before) // bytes_per_element))
    return [*cuts, (len(counts), 0)]
