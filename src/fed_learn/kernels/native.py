"""The native kernel: the C extension, called once per thread for a whole model, without the GIL."""

import os
from collections.abc import Callable, Iterator, Sequence
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
class _Share:
    """What one thread does: pieces, which are runs of the elements of some rows of arrays.

    Attributes:
        arrays: Only keep the memory behind the addresses alive, even when an interrupt ends the wait for the thread.
        first: The row of the first piece; the others follow.
        addresses: A row per piece, an address per array.
        counts: Elements per piece.
        codes: The code of its dtype per piece.
        flags: What the kernel says of each piece.
    """

    arrays: Sequence[Sequence[Array]]
    first: int
    addresses: Addresses
    counts: Addresses
    codes: npt.NDArray[np.int32]
    flags: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.counts)

    def arguments(self) -> tuple[object, object, object]:
        return _address(self.addresses), _address(self.counts, "size_t *"), _address(self.codes, "int32_t *")


def _address(array: Array, kind: str = "uintptr_t *") -> object:
    return ffi.cast(kind, ffi.from_buffer(array))


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

    def weighted_mean(self, segments: Sequence[Segment], aggregation_weights: Float64Array, total: float) -> list[bool]:
        """See `Kernel.weighted_mean`."""
        chosen = SETS[current_set()]
        a = np.ascontiguousarray(aggregation_weights, dtype=np.float64)

        def call(share: _Share) -> None:
            flags = _address(share.flags, "uint8_t *")
            arguments = share.arguments()
            _check(lib.fl_weighted_mean(chosen, len(share), a.size, *arguments, _address(a, "double *"), total, flags))

        return _run(call, [(segment.output, *segment.inputs) for segment in segments])

    def accumulate(
        self,
        sums: Sequence[Float64Array],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
        *,
        start: bool = False,
    ) -> None:
        """See `Kernel.accumulate`."""
        chosen = SETS[current_set()]
        a = np.ascontiguousarray(aggregation_weights, dtype=np.float64)

        def call(share: _Share) -> None:
            arguments = share.arguments()
            _check(lib.fl_accumulate(chosen, len(share), a.size, *arguments, _address(a, "double *"), start))

        _run(call, [(acc, *column) for acc, column in zip(sums, inputs, strict=True)])

    def divide(self, sums: Sequence[Float64Array], total: float, outputs: Sequence[Array]) -> list[bool]:
        """See `Kernel.divide`."""
        chosen = SETS[current_set()]

        def call(share: _Share) -> None:
            flags = _address(share.flags, "uint8_t *")
            _check(lib.fl_divide(chosen, len(share), *share.arguments(), total, flags))

        return _run(call, list(zip(outputs, sums, strict=True)), dtype_of=0)

    def not_finite(self, arrays: Sequence[Array]) -> list[bool]:
        """See `Kernel.not_finite`."""
        chosen = SETS[current_set()]

        def call(share: _Share) -> None:
            _check(lib.fl_find_not_finite(chosen, len(share), *share.arguments(), _address(share.flags, "uint8_t *")))

        return _run(call, [(array,) for array in arrays])


def read(arrays: Sequence[Array]) -> int:
    """Reads every byte once, on the kernels' threads, and does nothing with it: the limit of any kernel.

    Args:
        arrays: Flat and contiguous.

    Returns:
        The sum of their 64-bit words, modulo 2**64: something that depends on every byte.
    """
    chosen = SETS[current_set()]
    sums: list[int] = []

    def call(share: _Share) -> None:
        sums.append(lib.fl_read(chosen, len(share), _address(share.addresses), _address(share.counts, "size_t *")))

    _run(call, [(array.view(np.uint8),) for array in arrays])
    return sum(sums) % 2**64


def _check(status: int) -> None:
    if status != lib.FL_OK:
        raise RuntimeError(f"the native kernel refused its arguments (status {status}); please report this")


def _run(call: Callable[[_Share], None], rows: Sequence[Sequence[Array]], dtype_of: int = -1) -> list[bool]:
    """Calls the kernel on rows of equally long flat arrays, a share of about equal bytes per thread.

    Elements are split, never contributions, so the bits do not depend on the number of threads.

    Args:
        call: Makes the C call.
        rows: One per variable; the arrays after the first are of one dtype.
        dtype_of: Which array of a row has the dtype that the kernel is to know.

    Returns:
        Whether the kernel flagged anything in a row.
    """
    filled = [i for i, row in enumerate(rows) if row[0].size]
    shares = _split([rows[i] for i in filled], dtype_of) if filled else []
    threads.run(call, shares)
    flagged = [False] * len(rows)
    for share in shares:
        for piece in np.flatnonzero(share.flags).tolist():
            flagged[filled[share.first + piece]] = True
    return flagged


def _split(rows: Sequence[Sequence[Array]], dtype_of: int) -> list[_Share]:
    addresses = _addresses(rows)
    itemsizes = np.array([[row[0].itemsize, row[-1].itemsize] for row in rows], dtype=np.uintp)
    counts = np.array([row[0].size for row in rows], dtype=np.uintp)
    codes = np.array([CODES[row[dtype_of].dtype] for row in rows], dtype=np.int32)
    others = addresses.shape[1] - 1
    ends = np.cumsum(counts * (itemsizes[:, 0] + np.uintp(others) * itemsizes[:, 1]))
    number = threads.threads_for(int(ends[-1]))
    shares: list[_Share] = []
    for (first, start), (last, stop) in pairwise(_cuts(ends, counts, number)):
        if (first, start) == (last, stop):
            continue
        here = slice(first, last + 1 if stop else last)
        own = addresses[here].copy()
        own[0, 0] += np.uintp(start) * itemsizes[first, 0]
        own[0, 1:] += np.uintp(start) * itemsizes[first, 1]
        own_counts = counts[here].copy()
        if stop:
            own_counts[-1] = stop
        own_counts[0] -= np.uintp(start)
        flags = np.zeros(len(own_counts), np.uint8)
        shares.append(_Share(rows, first, own, own_counts, codes[here].copy(), flags))
    return shares


def _addresses(rows: Sequence[Sequence[Array]]) -> Addresses:
    """By way of buffers, which take a tenth of the time of `__array_interface__`."""
    from_buffer = ffi.from_buffer
    buffers = []
    for row in rows:
        for array in row:
            # numpy gives no buffer of a dtype that is not its own
            buffers.append(from_buffer(array.view(np.uint16) if array.dtype == BFLOAT16 else array))
    pointers = np.frombuffer(ffi.buffer(ffi.new("void *[]", buffers)), np.uintp)
    return pointers.reshape(len(rows), -1)


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
