"""The arithmetic of the torch kernel in Triton, for tensors on CUDA devices: one launch for a whole model.

This is the side of the host; what is compiled is in `fused_kernels.py`. What changes from call to call (addresses,
aggregation weights, their total) goes to the device in one upload: aggregation weights as float64 bits, because Triton
would take a Python float for a float32. Nothing is read back: flags stay on the device.

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
import torch
import triton.language as tl

import fed_learn.kernels.unfused as unfused
from fed_learn.errors import as_failure, described
from fed_learn.kernels.digits import Float64Array, Int64Array
from fed_learn.kernels.fused_kernels import combination_kernel, mean_kernel, scan_kernel

Tensor: TypeAlias = torch.Tensor

BLOCK = 1024
"""Elements of one program: 8 for each of its 128 threads, two loads of 16 bytes for float32, one for the halves."""
ALIGNMENT = 16
"""Bytes that one thread can load at once."""
MOST_KEPT = 1 << 28
"""Elements of a model whose table of blocks is kept."""
OLDEST = (7, 0)
"""The compute capability from which on Triton supports devices."""

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


def _table(sizes: tuple[int, ...], device: torch.device, stream: object) -> Tensor:
    """One column per block: its variable, how many blocks of the variable come before it, and its elements.

    Those of usual models are kept on the device; they take a hundredth of a byte per element.

    Args:
        sizes: The elements of each variable.
        device: Where the table goes.
        stream: The current one: a table is copied and used on one stream, so that its memory is not reused too early.
    """
    make = _kept_table if sum(sizes) <= MOST_KEPT else _new_table
    return make(sizes, device, stream)


def _new_table(sizes: tuple[int, ...], device: torch.device, stream: object) -> Tensor:
    lengths = np.array(sizes, np.int64)
    counts = -(-lengths // BLOCK)
    variables = np.repeat(np.arange(len(sizes)), counts)
    numbers = np.arange(len(variables)) - np.repeat(np.cumsum(counts) - counts, counts)
    elements = np.minimum(lengths[variables] - numbers * BLOCK, BLOCK)
    table = np.stack([variables, numbers, elements]).astype(np.int32).reshape(-1)
    return torch.from_numpy(table).to(device, non_blocking=True)


_kept_table = functools.lru_cache(maxsize=16)(_new_table)


def _stream(device: torch.device) -> object:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _call(rows: Iterable[Sequence[Tensor]], like: Sequence[Tensor], header: Int64Array) -> _Call:
    """Uploads the addresses of each variable's tensors, all rows of one length, behind a header.

    Args:
        rows: For each variable its tensors; any, where the kernel asks for none.
        like: A tensor of each variable's size, on the device.
        header: What comes before the addresses.
    """
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
    loaded, kind = _TYPES[outputs[0].dtype]
    return call.launch(combination_kernel, loaded=loaded, kind=kind, subtracts=subtracts)


def not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """An int32 per tensor of floating-point numbers, on the device: not 0 where it holds a NaN or an infinity."""
    return _scan(zip(tensors, tensors, strict=True), tensors, copies=False)


def copy(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> Tensor:
    """`copies[i] = tensors[i]`, bit for bit in one pass.

    Returns:
        An int32 per tensor, on the device: not 0 where the copy holds a NaN or an infinity.
    """
    return _scan(zip(tensors, copies, strict=True), copies, copies=True)


def _scan(rows: Iterable[Sequence[Tensor]], like: Sequence[Tensor], *, copies: bool) -> Tensor:
    call = _call(rows, like, np.empty(0, np.int64))
    word, exponent = _WORDS[like[0].element_size()], _EXPONENTS.get(like[0].dtype, 0)
    return call.launch(scan_kernel, word=word, exponent=exponent, copies=copies)


# Where it can be used.


def problem(device: torch.device) -> str | None:
    """Why the fused operations cannot be used on a CUDA device, in one line; None: they can.

    That is found out by compiling some of them, and by comparing what they give. Waits for the result.

    Raises:
        torch.OutOfMemoryError: There is no memory for that now.
    """
    if torch.version.hip is not None:
        return "that the bits are the same on ROCm has not been tested"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"they need compute capability {OLDEST[0]}.{OLDEST[1]}, and {device} has {capability[0]}.{capability[1]}"
    try:
        same = has_the_bits_of_separate_operations(device)
    except torch.OutOfMemoryError:
        raise
    except BaseException as error:  # noqa: BLE001 - a compiler or driver that fails in any way is an answer
        return f"Triton cannot compile for {device} or run there: {' '.join(described(as_failure(error)).split())}"
    return None if same else f"on {device} they give other bits than separate operations of torch"


def has_the_bits_of_separate_operations(device: torch.device) -> bool:
    """Whether means and sums of awkward float32 values have the bits that `unfused` gives them.

    Other dtypes are compiled when they first come, from the same source. Waits for the result.
    """
    # Subnormals, both zeros, the largest, and neighbours in all binades, of which products and sums are inexact; of a
    # whole block and a part of one.
    patterns = np.arange(3 * (BLOCK + 300), dtype=np.uint64).reshape(3, -1) * 0x9E37_79B9_7F4A_7C15 >> np.uint64(32)
    numbers = patterns.astype(np.uint32).view(np.float32)
    numbers[~np.isfinite(numbers)] = -0.0
    numbers[:, :8] = np.array([1e-45, -1e-45, 1e-38, -0.0, 0.0, 3.4028235e38, -3.4028235e38, 1.0], np.float32)
    column = list(torch.from_numpy(numbers).to(device))
    weights = np.array([1 / 3, 0.1, 1e3 / 7])
    total = float(weights.sum())

    def results(mean: Any, accumulate: Any, divide: Any) -> list[Tensor]:
        means, quotients = torch.empty_like(column[0]), torch.empty_like(column[0])
        sums = torch.empty_like(column[0], dtype=torch.float64)
        mean([column], [means], weights, total)
        accumulate([sums], [column], weights, start=True)
        accumulate([sums], [column], weights, start=False)
        divide([sums], total, [quotients])
        return [means.view(torch.int32), sums.view(torch.int64), quotients.view(torch.int32)]

    own = results(mean, accumulate, divide)
    return all(map(torch.equal, own, results(unfused.mean, unfused.accumulate, unfused.divide)))
