"""The arithmetic of the torch kernel in Triton, for tensors on CUDA devices: one launch for a whole model.

A program works on one block of one variable and finds which in a table, so that a launch does not grow with the number
of variables. What changes from call to call (addresses, aggregation weights, their total) goes to the device in one
upload: aggregation weights as float64 bits, because Triton would take a Python float for a float32. Nothing is read
back: flags stay on the device.

The bits are those of `numpy.py`: Triton is told not to fuse products and sums, and `problem` checks on the device that
it did not. Whoever imports this module has checked that torch and triton are there, and that all tensors of one call
are flat, contiguous and detached, have one dtype, and lie on one device. Exact sums, splitting by dtype and device, and
what flags mean for the caller are left to `torch.py`.
"""

import functools
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from fed_learn.errors import as_failure, described

Tensor: TypeAlias = torch.Tensor
Float64Array: TypeAlias = npt.NDArray[np.float64]
Int64Array: TypeAlias = npt.NDArray[np.int64]

BLOCK = 1024
"""Elements of one program: 8 for each of its 128 threads, two loads of 16 bytes for float32, one for the halves."""
ALIGNMENT = 16
"""Bytes that one thread can load at once."""
OLDEST = (7, 0)
"""The compute capability from which on Triton supports devices."""

_LARGEST = tl.constexpr(float(np.finfo(np.float64).max))

# The type as which elements are loaded and stored, and the type that they are. Where these differ the conversion is
# done here: of bfloat16 by its bits, so that it is the same on all devices, of booleans by comparison with zero.
_TYPES: dict[torch.dtype, tuple[tl.dtype, tl.dtype]] = {
    torch.float16: (tl.float16, tl.float16),
    torch.bfloat16: (tl.uint16, tl.bfloat16),
    torch.float32: (tl.float32, tl.float32),
    torch.float64: (tl.float64, tl.float64),
    torch.bool: (tl.uint8, tl.int1),
    torch.int8: (tl.int8, tl.int8),
    torch.int16: (tl.int16, tl.int16),
    torch.int32: (tl.int32, tl.int32),
    torch.int64: (tl.int64, tl.int64),
    torch.uint8: (tl.uint8, tl.uint8),
    torch.uint16: (tl.uint16, tl.uint16),
    torch.uint32: (tl.uint32, tl.uint32),
    torch.uint64: (tl.uint64, tl.uint64),
}

# The bits of the exponent, all of them set in what is not finite.
_EXPONENTS = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


# On the device.


@triton.jit
def _pointer(addresses, i, type: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(addresses + i).to(tl.pointer_type(type))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, at, count, full: tl.constexpr):
    # A mask of unknown length would make the loads of full blocks narrow.
    return tl.load(pointer + at) if full else tl.load(pointer + at, mask=at < count, other=0)


@triton.jit
def _store(pointer, at, count, values, full: tl.constexpr):
    if full:
        tl.store(pointer + at, values)
    else:
        tl.store(pointer + at, values, mask=at < count)


@triton.jit
def _flag(flag, marks):
    # All that store here store the same, and hardly ever does one: cheaper than a reduction, which would wait.
    tl.store(tl.broadcast_to(flag, marks.shape), 1, mask=marks)


@triton.jit
def _as_float64(x, kind: tl.constexpr):
    if kind == tl.bfloat16:
        wide = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
    elif kind == tl.int1:
        wide = (x != 0).to(tl.float64)
    else:
        wide = x.to(tl.float64)
    return wide


@triton.jit
def _rounded(wide, loaded: tl.constexpr, kind: tl.constexpr):
    if kind == tl.float64:
        values = wide
    elif kind == tl.float32:
        values = wide.to(tl.float32)
    elif kind == tl.float16:
        values = wide.to(tl.float32).to(tl.float16)
    elif kind == tl.bfloat16:
        narrow = wide.to(tl.float32)
        bits = narrow.to(tl.uint32, bitcast=True)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        values = tl.where(narrow == narrow, nearest_even, 0x7FC0).to(tl.uint16)
    else:
        below = tl.floor(wide)
        rest = wide - below  # exact, but between -0.5 and 0, where it is large enough
        odd = tl.floor(below * 0.5) * 2.0 != below
        whole = tl.where((rest > 0.5) | ((rest == 0.5) & odd), below + 1.0, below)
        values = (whole != 0.0).to(loaded) if kind == tl.int1 else whole.to(loaded)
    return values


@triton.jit
def _mean_of_block(
    weights,
    addresses,
    flag,
    total,
    largest,
    first,
    count,
    contributions,
    full: tl.constexpr,
    loaded: tl.constexpr,
    kind: tl.constexpr,
    reads: tl.constexpr,
    divides: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.arange(0, block)
    limited: tl.constexpr = divides and not reads and (kind == tl.int64 or kind == tl.uint64)
    start = 0
    if reads:
        acc = _load(_pointer(addresses, 0, tl.float64, aligned) + first, at, count, full)
    else:
        x = _load(_pointer(addresses, 2, loaded, aligned) + first, at, count, full)
        acc = tl.load(weights).to(tl.float64, bitcast=True) * _as_float64(x, kind)
        start = 1
    marks = at < 0
    if limited:
        marks = marks | _beyond(x, largest, kind)
    if not (reads and divides):
        for k in tl.range(start, contributions, loop_unroll_factor=4):
            x = _load(_pointer(addresses, 2 + k, loaded, aligned) + first, at, count, full)
            acc += tl.load(weights + k).to(tl.float64, bitcast=True) * _as_float64(x, kind)
            if limited:
                marks = marks | _beyond(x, largest, kind)
    if divides:
        _flag(flag, marks | ((tl.abs(acc) <= _LARGEST) == 0))
        mean = acc / total
        # Not by minimum and maximum, which would lose a NaN.
        bound = tl.full((block,), _LARGEST, tl.float64)
        mean = tl.where(mean > bound, bound, mean)
        mean = tl.where(mean < -bound, -bound, mean)
        out = _pointer(addresses, 1, loaded, aligned) + first
        _store(out, at, count, _rounded(mean, loaded, kind), full)
    else:
        _store(_pointer(addresses, 0, tl.float64, aligned) + first, at, count, acc, full)


@triton.jit
def _beyond(x, largest, kind: tl.constexpr):
    return x > largest.to(tl.uint64) if kind == tl.uint64 else (x > largest) | (x < -largest)


@triton.jit(do_not_specialize=["call", "table", "flags", "blocks", "contributions"])
def mean_kernel(
    call,
    table,
    flags,
    blocks,
    contributions,
    loaded: tl.constexpr,
    kind: tl.constexpr,
    reads: tl.constexpr,
    divides: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """Sums products, onto sums that are there if it `reads`, and `divides` or leaves the sums as they are.

    If it does both, it adds nothing: the sums that it reads are complete.
    """
    program = tl.program_id(0)
    variable = tl.load(table + program).to(tl.int64)
    first = tl.load(table + blocks + program).to(tl.int64) * block
    count = tl.load(table + blocks + blocks + program)
    total = tl.load(call).to(tl.float64, bitcast=True)
    largest = tl.load(call + 1)
    weights = call + 2
    addresses = weights + contributions + variable * (contributions + 2)
    flag = flags + variable
    if count == block:
        _mean_of_block(
            weights, addresses, flag, total, largest, first, count, contributions,
            True, loaded, kind, reads, divides, aligned, block,
        )  # fmt: skip
    else:
        _mean_of_block(
            weights, addresses, flag, total, largest, first, count, contributions,
            False, loaded, kind, reads, divides, aligned, block,
        )  # fmt: skip


@triton.jit
def _combination_of_block(
    addresses,
    flag,
    first,
    count,
    full: tl.constexpr,
    loaded: tl.constexpr,
    kind: tl.constexpr,
    subtracts: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.arange(0, block)
    x = _load(_pointer(addresses, 0, loaded, aligned) + first, at, count, full)
    y = _load(_pointer(addresses, 1, loaded, aligned) + first, at, count, full)
    out = _pointer(addresses, 2, loaded, aligned) + first
    if kind == tl.float16 or kind == tl.bfloat16 or kind == tl.float32 or kind == tl.float64:
        # The compiler may add in float32, or in float16. That gives the same bits: float64 has more than twice the bits
        # of float32, and float32 those of float16, so that of a sum of two the second rounding alone counts.
        one = _as_float64(x, kind)
        other = _as_float64(y, kind)
        wide = one - other if subtracts else one + other
        values = _rounded(wide, loaded, kind)
        marks = (tl.abs(_as_float64(values, kind)) <= _LARGEST) == 0
    else:
        one = x.to(tl.int64)
        other = y.to(tl.int64)
        wide = one - other if subtracts else one + other
        values = wide.to(loaded)
        marks = values.to(tl.int64) != wide
        if kind == tl.int64:
            # The sum of two that are not beyond 2**62 wraps around at 2**63 alone.
            half: tl.constexpr = 2**62
            marks = (x > half) | (x < -half) | (y > half) | (y < -half) | ((wide == -half - half) & (x > 0))
    _flag(flag, marks)
    _store(out, at, count, values, full)


@triton.jit(do_not_specialize=["call", "table", "flags", "blocks"])
def combination_kernel(
    call,
    table,
    flags,
    blocks,
    loaded: tl.constexpr,
    kind: tl.constexpr,
    subtracts: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """Adds or subtracts, in float64 or int64."""
    program = tl.program_id(0)
    variable = tl.load(table + program).to(tl.int64)
    first = tl.load(table + blocks + program).to(tl.int64) * block
    count = tl.load(table + blocks + blocks + program)
    addresses = call + variable * 3
    flag = flags + variable
    if count == block:
        _combination_of_block(addresses, flag, first, count, True, loaded, kind, subtracts, aligned, block)
    else:
        _combination_of_block(addresses, flag, first, count, False, loaded, kind, subtracts, aligned, block)


@triton.jit
def _scan_of_block(
    addresses,
    flag,
    first,
    count,
    full: tl.constexpr,
    word: tl.constexpr,
    exponent: tl.constexpr,
    copies: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.arange(0, block)
    # As integers, because a conversion could change the bits of a NaN.
    bits = _load(_pointer(addresses, 0, word, aligned) + first, at, count, full)
    if exponent != 0:
        _flag(flag, (bits & exponent) == exponent)
    if copies:
        _store(_pointer(addresses, 1, word, aligned) + first, at, count, bits, full)


@triton.jit(do_not_specialize=["call", "table", "flags", "blocks"])
def scan_kernel(
    call,
    table,
    flags,
    blocks,
    word: tl.constexpr,
    exponent: tl.constexpr,
    copies: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """Looks for what is not finite, which integers (an `exponent` of 0) are not, and `copies` what it has seen."""
    program = tl.program_id(0)
    variable = tl.load(table + program).to(tl.int64)
    first = tl.load(table + blocks + program).to(tl.int64) * block
    count = tl.load(table + blocks + blocks + program)
    addresses = call + variable * 2
    flag = flags + variable
    if count == block:
        _scan_of_block(addresses, flag, first, count, True, word, exponent, copies, aligned, block)
    else:
        _scan_of_block(addresses, flag, first, count, False, word, exponent, copies, aligned, block)


# On the host.


class _Call(NamedTuple):
    """What one launch works on.

    Attributes:
        numbers: Header and addresses, on the device.
        table: Which block of which variable a program works on, see `_table`.
        flags: One per variable, zero.
        aligned: Whether all addresses are multiples of `ALIGNMENT`.
    """

    numbers: Tensor
    table: Tensor
    flags: Tensor
    aligned: bool

    def launch(self, kernel: Any, *runtime: int, **constants: Any) -> Tensor:
        blocks = self.table.numel() // 3
        if blocks:
            # Triton launches on the current device, whatever the tensors are on.
            device = self.table.device
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                kernel[(blocks,)](
                    self.numbers,
                    self.table,
                    self.flags,
                    blocks,
                    *runtime,
                    **constants,
                    aligned=self.aligned,
                    block=BLOCK,
                    num_warps=4,
                    enable_fp_fusion=False,
                )
        return self.flags


@functools.lru_cache(maxsize=32)
def _table(sizes: tuple[int, ...], device: torch.device, stream: object) -> Tensor:
    """One column per block: its variable, how many blocks of the variable come before it, and its elements.

    Args:
        sizes: The elements of each variable.
        device: Where the table goes.
        stream: The current one, on which the copy is ordered before its uses and these before the end of its memory.
    """
    lengths = np.array(sizes, np.int64)
    counts = -(-lengths // BLOCK)
    variables = np.repeat(np.arange(len(sizes)), counts)
    numbers = np.arange(len(variables)) - np.repeat(np.cumsum(counts) - counts, counts)
    elements = np.minimum(lengths[variables] - numbers * BLOCK, BLOCK)
    table = np.stack([variables, numbers, elements]).astype(np.int32).reshape(-1)
    return torch.from_numpy(table).to(device, non_blocking=True)


def _stream(device: torch.device) -> object:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _call(rows: Iterable[Sequence[Tensor]], like: Sequence[Tensor], header: Int64Array) -> _Call:
    """Uploads the addresses of each variable's tensors, all rows of one length, behind a header.

    Args:
        rows: For each variable its tensors; any, where the kernel asks for none.
        like: A tensor of each variable's size, on the device.
        header: What comes before the addresses.
    """
    if not like:
        nothing = torch.zeros(0, dtype=torch.int32)
        return _Call(nothing, nothing, nothing, aligned=True)
    device = like[0].device
    # Thousands of tensors: a loop would take longer than the launch does.
    addresses = np.fromiter(map(Tensor.data_ptr, chain.from_iterable(rows)), np.uint64)
    flags = np.zeros((len(like) + 1) // 2, np.int64)
    numbers = torch.from_numpy(np.concatenate([header, addresses.view(np.int64), flags]))
    numbers = numbers.to(device, non_blocking=True)
    return _Call(
        numbers,
        _table(tuple(x.numel() for x in like), device, _stream(device)),
        numbers[len(header) + len(addresses) :].view(torch.int32)[: len(like)],
        aligned=not (addresses % ALIGNMENT).any(),
    )


def _header(total: float, aggregation_weights: Float64Array) -> Int64Array:
    """As `mean_kernel` expects it: the total, the largest 64-bit integer of which a mean is exact, the weights."""
    number = len(aggregation_weights)
    header = np.empty(2 + number, np.int64)
    header.view(np.float64)[0] = total
    header[1] = 2**52 // (number + 2)
    header.view(np.float64)[2:] = aggregation_weights
    return header


def mean(
    columns: Sequence[Sequence[Tensor]],
    outputs: Sequence[Tensor],
    aggregation_weights: Float64Array,
    total: float,
) -> Tensor:
    """`outputs[i] = round(Σ aggregation_weights[k] · columns[i][k] / total)`.

    Args:
        columns: For each variable one tensor per contribution, of which there is at least one.
        outputs: For each variable where the mean goes.
        aggregation_weights: One float64 per contribution.
        total: Their sum.

    Returns:
        An int32 per variable, on the device: not 0 where a sum is not finite, or a 64-bit integer is beyond
        2**52 // (number of contributions + 2) in magnitude.
    """
    rows = ((output, output, *column) for output, column in zip(outputs, columns, strict=True))
    call = _call(rows, outputs, _header(total, aggregation_weights))
    return _launch_mean(call, outputs, len(aggregation_weights), reads=False, divides=True)


def accumulate(
    sums: Sequence[Tensor],
    columns: Sequence[Sequence[Tensor]],
    aggregation_weights: Float64Array,
    *,
    start: bool,
) -> None:
    """`sums[i] += Σ aggregation_weights[k] · columns[i][k]` in place, term by term in order.

    Args:
        sums: Float64 tensors.
        columns: For each of them one tensor per contribution, of which there is at least one.
        aggregation_weights: One float64 per contribution.
        start: Start the sums from the first product, whatever they hold.
    """
    rows = ((acc, acc, *column) for acc, column in zip(sums, columns, strict=True))
    call = _call(rows, sums, _header(1.0, aggregation_weights))
    inputs = [column[0] for column in columns]
    _launch_mean(call, inputs, len(aggregation_weights), reads=not start, divides=False)


def divide(sums: Sequence[Tensor], total: float, outputs: Sequence[Tensor]) -> Tensor:
    """`outputs[i] = round(sums[i] / total)`.

    Args:
        sums: Float64 tensors.
        total: The sum of the aggregation weights.
        outputs: For each of them where the mean goes.

    Returns:
        An int32 per variable, on the device: not 0 where a sum is not finite.
    """
    call = _call(zip(sums, outputs, strict=True), outputs, _header(total, np.empty(0)))
    return _launch_mean(call, outputs, 0, reads=True, divides=True)


def _launch_mean(call: _Call, like: Sequence[Tensor], contributions: int, *, reads: bool, divides: bool) -> Tensor:
    if not like:
        return call.flags
    loaded, kind = _TYPES[like[0].dtype]
    return call.launch(mean_kernel, contributions, loaded=loaded, kind=kind, reads=reads, divides=divides)


def add(bases: Sequence[Tensor], differences: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """`outputs[i] = bases[i] + differences[i]`, in float64 and rounded to the dtype once; integers exactly.

    Args:
        bases: Tensors of floating-point numbers or of signed integers.
        differences: One for each of them.
        outputs: Another one.

    Returns:
        An int32 per variable, on the device: not 0 where an output is not finite; of integers, where one left the range
        of the dtype or comes of 64-bit integers beyond 2**62 in magnitude.
    """
    return _combine(bases, differences, outputs, subtracts=False)


def subtract(weights: Sequence[Tensor], bases: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """`outputs[i] = weights[i] - bases[i]`, as `add` does it."""
    return _combine(weights, bases, outputs, subtracts=True)


def _combine(ones: Sequence[Tensor], others: Sequence[Tensor], outputs: Sequence[Tensor], *, subtracts: bool) -> Tensor:
    call = _call(zip(ones, others, outputs, strict=True), outputs, np.empty(0, np.int64))
    if not outputs:
        return call.flags
    loaded, kind = _TYPES[outputs[0].dtype]
    return call.launch(combination_kernel, loaded=loaded, kind=kind, subtracts=subtracts)


def not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """An int32 per tensor, on the device: not 0 where it holds a NaN or an infinity."""
    if tensors and tensors[0].dtype not in _EXPONENTS:
        return torch.zeros(len(tensors), dtype=torch.int32, device=tensors[0].device)
    return _scan(zip(tensors, tensors, strict=True), tensors, copies=False)


def copy(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> Tensor:
    """`copies[i] = tensors[i]`, bit for bit in one pass.

    Returns:
        An int32 per tensor, on the device: not 0 where the copy holds a NaN or an infinity.
    """
    return _scan(zip(tensors, copies, strict=True), copies, copies=True)


def _scan(rows: Iterable[Sequence[Tensor]], like: Sequence[Tensor], *, copies: bool) -> Tensor:
    call = _call(rows, like, np.empty(0, np.int64))
    if not like:
        return call.flags
    word, exponent = _WORDS[like[0].element_size()], _EXPONENTS.get(like[0].dtype, 0)
    return call.launch(scan_kernel, word=word, exponent=exponent, copies=copies)


# Where it can be used.


@functools.cache
def problem(device: torch.device) -> str | None:
    """Why the fused kernels cannot be used on a device, in one line; None: they can.

    The first call for a device compiles a kernel, runs it, and waits for the result.
    """
    if torch.version.hip is not None:
        return "that the bits are the same on ROCm has not been tested"
    if device.type != "cuda":
        return f"they run on CUDA devices, and this is {device}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"they need compute capability {OLDEST[0]}.{OLDEST[1]}, and {device} has {capability[0]}.{capability[1]}"
    try:
        same = has_the_bits_of_separate_operations(device)
    except BaseException as error:  # noqa: BLE001 - a compiler or driver that fails in any way is an answer
        return f"Triton cannot compile for {device} or run there: {' '.join(described(as_failure(error)).split())}"
    return None if same else f"on {device} they give other bits than separate operations of torch"


def has_the_bits_of_separate_operations(device: torch.device) -> bool:
    """Whether a mean of awkward float32 values has the bits that `mul`, `add_` and `div` give. Waits for the result."""
    # Subnormals, both zeros, the largest, and neighbours in all binades, of which products and sums are inexact.
    patterns = np.arange(3 * 300, dtype=np.uint64).reshape(3, -1) * 0x9E37_79B9_7F4A_7C15 >> np.uint64(32)
    numbers = patterns.astype(np.uint32).view(np.float32)
    numbers[~np.isfinite(numbers)] = -0.0
    numbers[:, :8] = np.array([1e-45, -1e-45, 1e-38, -0.0, 0.0, 3.4028235e38, -3.4028235e38, 1.0], np.float32)
    columns = list(torch.from_numpy(numbers).to(device))
    weights = np.array([1 / 3, 0.1, 1e3 / 7])
    total = float(weights.sum())
    output = torch.empty_like(columns[0])
    flags = mean([columns], [output], weights, total)
    acc = torch.mul(columns[0].to(torch.float64), weights[0])
    for x, a in zip(columns[1:], weights[1:], strict=True):
        acc.add_(torch.mul(x.to(torch.float64), a))
    expected = torch.div(acc, torch.tensor(total, dtype=torch.float64, device=device)).to(torch.float32)
    return torch.equal(output.view(torch.int32), expected.view(torch.int32)) and not bool(flags.any())
