"""The native kernel: the C extension, called once per thread for a whole model, without the GIL."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fed_learn.errors import KernelNameError
from fed_learn.kernels import threads
from fed_learn.kernels.base import Kernel, Segment
from fed_learn.kernels.digits import Digits, DigitsError, Float64Array, digit_range, halves
from fed_learn.kernels.memory import CODES, EXTENSION, PROBLEM, Addresses, Table, addresses
from fed_learn.weights import Array

if PROBLEM is not None:
    raise PROBLEM
ffi, lib = EXTENSION.ffi, EXTENSION.lib

SETS = {
    ffi.string(lib.fl_set_name(code)).decode(): code for code in reversed(range(lib.FL_SETS)) if lib.fl_set_usable(code)
}
"""Instruction sets that this build has and this machine can run, the widest first, with their codes."""

_forced_set: ContextVar[str | None] = ContextVar("fed_learn_instruction_set", default=None)


@dataclass(slots=True, eq=False)
class _Share:
    """The work of one thread: pieces, each a run of the elements of one row of arrays.

    Attributes:
        held: Keeps the memory behind the addresses alive, even when an interrupt ends the wait for the thread.
        rows: The row of each piece.
        skipped: Elements of the first row that another share has.
        addresses: A row per piece, an address per array.
        counts: Elements per piece.
        codes: The code of its dtype per piece.
        flags: The kernel's answer for each piece.
    """

    held: object
    rows: Sequence[int]
    skipped: int
    addresses: Addresses
    counts: Addresses
    codes: npt.NDArray[np.int32]
    flags: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.counts)

    def positions(self, starts: Sequence[int]) -> Addresses:
        """Where the pieces begin in memory in which the rows begin at `starts`, in elements."""
        own = np.array([starts[row] for row in self.rows], dtype=np.uintp)
        own[0] += np.uintp(self.skipped)
        return own

    def arguments(self) -> tuple[object, object, object]:
        return _address(self.addresses), _address(self.counts, "size_t *"), _address(self.codes, "int32_t *")


def _address(array: Array, kind: str = "uintptr_t *") -> object:
    """A pointer to the memory of an array, which it keeps alive."""
    return ffi.from_buffer(kind, array)


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
    """Within the `with` block the kernel uses this instruction set; one that is not usable is a KernelNameError."""
    token = _forced_set.set(name)
    try:
        current_set()
        yield
    finally:
        _forced_set.reset(token)


class NativeKernel(Kernel):
    """`Kernel` in C, in variants for several instruction sets that give the same bits."""

    name = "native"

    def weighted_mean(
        self,
        segments: Sequence[Segment],
        aggregation_weights: Float64Array,
        total: float,
        table: Table | None = None,
    ) -> list[bool]:
        chosen = SETS[current_set()]
        a = np.ascontiguousarray(aggregation_weights, dtype=np.float64)

        def call(share: _Share) -> None:
            flags = _address(share.flags, "uint8_t *")
            scratch = np.empty(lib.FL_TILE if a.size > lib.FL_GROUP else 0)
            sums, numbers = _address(scratch, "double *"), _address(a, "double *")
            _check(lib.fl_weighted_mean(chosen, len(share), a.size, *share.arguments(), numbers, total, sums, flags))

        rows = [(segment.output, *segment.inputs) for segment in segments] if table is None else segments
        return _run(call, rows, table=table)

    def accumulate(
        self,
        sums: Sequence[Float64Array],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
        *,
        start: bool = False,
    ) -> None:
        chosen = SETS[current_set()]
        a = np.ascontiguousarray(aggregation_weights, dtype=np.float64)

        def call(share: _Share) -> None:
            arguments = share.arguments()
            _check(lib.fl_accumulate(chosen, len(share), a.size, *arguments, _address(a, "double *"), start))

        _run(call, [(acc, *column) for acc, column in zip(sums, inputs, strict=True)])

    def divide(self, sums: Sequence[Float64Array], total: float, outputs: Sequence[Array]) -> list[bool]:
        chosen = SETS[current_set()]

        def call(share: _Share) -> None:
            flags = _address(share.flags, "uint8_t *")
            _check(lib.fl_divide(chosen, len(share), *share.arguments(), total, flags))

        return _run(call, list(zip(outputs, sums, strict=True)), dtype_of=0)

    def deposit(
        self,
        digits: Digits,
        starts: Sequence[int],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
    ) -> list[bool]:
        chosen = SETS[current_set()]
        high, low = (np.ascontiguousarray(half) for half in halves(aggregation_weights))
        rows = addresses(digits.rows)
        touched: list[npt.NDArray[np.uint8]] = []

        def call(share: _Share) -> None:
            own, positions = np.zeros(len(rows), np.uint8), share.positions(starts)
            touched.append(own)
            _check(
                lib.fl_deposit(
                    chosen,
                    len(share),
                    high.size,
                    *share.arguments(),
                    _address(positions, "size_t *"),
                    digits.top,
                    len(rows),
                    _address(rows),
                    _address(high, "double *"),
                    _address(low, "double *"),
                    _address(own, "uint8_t *"),
                )
            )

        _run(call, inputs)
        return [any(flags[b] for flags in touched) for b in range(len(rows))]

    def exact_divide(self, digits: Digits, starts: Sequence[int], total: float, outputs: Sequence[Array]) -> None:
        chosen = SETS[current_set()]
        rows = addresses(digits.rows)

        def call(share: _Share) -> None:
            positions = share.positions(starts)
            _check(
                lib.fl_exact_divide(
                    chosen,
                    len(share),
                    *share.arguments(),
                    _address(positions, "size_t *"),
                    digits.top,
                    len(rows),
                    _address(rows),
                    total,
                )
            )

        _run(call, [(output,) for output in outputs])

    def exact_mean(self, segments: Sequence[Segment], aggregation_weights: Float64Array, total: float) -> None:
        chosen = SETS[current_set()]
        high, low = (np.ascontiguousarray(half) for half in halves(aggregation_weights))
        top, bottom = digit_range({segment.output.dtype for segment in segments}, aggregation_weights)
        n_digits = top - bottom + 1

        def call(share: _Share) -> None:
            scratch = np.zeros(n_digits * lib.FL_EXACT_TILE, np.int64)
            _check(
                lib.fl_exact_mean(
                    chosen,
                    len(share),
                    high.size,
                    *share.arguments(),
                    top,
                    n_digits,
                    _address(scratch, "int64_t *"),
                    _address(high, "double *"),
                    _address(low, "double *"),
                    total,
                )
            )

        _run(call, [(segment.output, *segment.inputs) for segment in segments])

    def add(self, bases: Sequence[Array], differences: Sequence[Array], outputs: Sequence[Array]) -> list[bool]:
        chosen = SETS[current_set()]

        def call(share: _Share) -> None:
            _check(lib.fl_add(chosen, len(share), *share.arguments(), _address(share.flags, "uint8_t *")))

        return _run(call, list(zip(outputs, bases, differences, strict=True)))

    def subtract(self, weights: Sequence[Array], bases: Sequence[Array], outputs: Sequence[Array]) -> list[bool]:
        chosen = SETS[current_set()]

        def call(share: _Share) -> None:
            _check(lib.fl_subtract(chosen, len(share), *share.arguments(), _address(share.flags, "uint8_t *")))

        return _run(call, list(zip(outputs, weights, bases, strict=True)))

    def not_finite(self, arrays: Sequence[Array]) -> list[bool]:
        chosen = SETS[current_set()]

        def call(share: _Share) -> None:
            _check(lib.fl_find_not_finite(chosen, len(share), *share.arguments(), _address(share.flags, "uint8_t *")))

        return _run(call, [(array,) for array in arrays])

    def copy(self, arrays: Sequence[Array], copies: Sequence[Array]) -> list[bool]:
        chosen = SETS[current_set()]

        def call(share: _Share) -> None:
            _check(lib.fl_copy(chosen, len(share), *share.arguments(), _address(share.flags, "uint8_t *")))

        return _run(call, list(zip(copies, arrays, strict=True)))


def read(arrays: Sequence[Array]) -> int:
    """Reads every byte once, on the kernels' threads, and does nothing with it: the limit of any kernel.

    Args:
        arrays: C-contiguous.

    Returns:
        The sum of their 64-bit words, modulo 2**64: something that depends on every byte.
    """
    chosen = SETS[current_set()]
    sums: list[int] = []

    def call(share: _Share) -> None:
        sums.append(lib.fl_read(chosen, len(share), _address(share.addresses), _address(share.counts, "size_t *")))

    _run(call, [(array.reshape(-1).view(np.uint8),) for array in arrays])
    return sum(sums) % 2**64


def _check(status: int) -> None:
    if status == lib.FL_BAD_RANGE:
        raise DigitsError
    if status != lib.FL_OK:
        raise RuntimeError(f"the native kernel refused its arguments (status {status}); please report this")


def _run(
    call: Callable[[_Share], None], rows: Sequence[Sequence[Any]], dtype_of: int = -1, table: Table | None = None
) -> list[bool]:
    """Calls the kernel on rows of arrays of the same number of elements, a share of about equal bytes per thread.

    Elements are split, never contributions, so the bits do not depend on the number of threads.

    Args:
        call: Makes the C call.
        rows: One per variable; the arrays after the first are of one dtype.
        dtype_of: Which array of a row has the dtype that the kernel is to know.
        table: The addresses, if they are known: each row is of one dtype then, and `rows` only keep the arrays alive.

    Returns:
        Whether the kernel flagged anything in a row.
    """
    shares = _split(rows, dtype_of, table) if rows else []
    threads.run(call, shares)
    flagged = [False] * len(rows)
    for share in shares:
        for piece in share.flags.nonzero()[0].tolist():
            flagged[share.rows[piece]] = True
    return flagged


def _split(rows: Sequence[Sequence[Any]], dtype_of: int, table: Table | None) -> list[_Share]:
    if table is not None and threads.threads_for(table.nbytes) == 1:
        flags = np.zeros(len(rows), np.uint8)
        return [_Share(rows, range(len(rows)), 0, table.addresses, table.counts, table.codes, flags)]
    if table is None:
        lying = addresses([array for row in rows for array in row]).reshape(len(rows), -1)
        others = lying.shape[1] - 1
        sizes = np.array([row[0].nbytes + others * row[-1].nbytes for row in rows], np.uintp)
        counts = np.array([row[0].size for row in rows], np.uintp)
        codes = np.array([CODES[row[dtype_of].dtype] for row in rows], np.int32)
    else:
        lying, counts, codes = table.addresses, table.counts, table.codes
        sizes = table.sizes * np.uintp(lying.shape[1])
    filled: Sequence[int] = range(len(rows))
    if not counts.all():
        filled = counts.nonzero()[0].tolist()
        lying, sizes, counts, codes = lying[filled], sizes[filled], counts[filled], codes[filled]
    number = threads.threads_for(int(sizes.sum()))
    if number == 1:
        return [_Share(rows, filled, 0, lying, counts, codes, np.zeros(len(filled), np.uint8))] if filled else []
    shares: list[_Share] = []
    for (first, start), (last, stop) in pairwise(_cuts(np.cumsum(sizes), counts, number)):
        if (first, start) == (last, stop):
            continue
        here = slice(first, last + 1 if stop else last)
        own, own_counts = lying[here].copy(), counts[here].copy()
        row = rows[filled[first]]
        own[0, 0] += np.uintp(start * row[0 if table is None else -1].itemsize)
        own[0, 1:] += np.uintp(start * row[-1].itemsize)
        if stop:
            own_counts[-1] = stop
        own_counts[0] -= np.uintp(start)
        flags = np.zeros(len(own), np.uint8)
        shares.append(_Share(rows, filled[here], start, own, own_counts, codes[here].copy(), flags))
    return shares


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
