"""The torch kernel: the same arithmetic on tensors, wherever they are. It is there once torch has been imported.

Products and sums are separate operations, and the total divides as a tensor: division by a Python number may become a
product with its reciprocal. That the bits are those of the other kernels is tested on the CPU; on other devices it is
to be expected of IEEE arithmetic, and claimed where the tests have run.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from fed_learn.environment import check_environment
from fed_learn.errors import FloatingPointEnvironmentError
from fed_learn.kernels.base import Kernel, Segment
from fed_learn.kernels.digits import DIGIT_BITS, Digits, DigitsError, Float64Array, digit_range, halves
from fed_learn.kernels.memory import Table
from fed_learn.weights import BFLOAT16, Array

TILE = 1 << 20
"""Elements at a time: bounds the memory of the intermediate float64 tensors to a few times 8 MiB."""
PARALLEL = 1 << 15
"""Elements for which torch starts another thread."""
LARGEST = float(np.finfo(np.float64).max)

Tensor: TypeAlias = torch.Tensor
Rows: TypeAlias = list[Tensor]


class TorchKernel(Kernel):
    """`Kernel` in torch. Takes arrays, which it views as tensors, and tensors, which stay on their device.

    Raises:
        FloatingPointEnvironmentError: From every operation, where the process does not compute as numbers are
            defined (`torch.set_flush_denormal`).
    """

    name = "torch"

    def weighted_mean(
        self,
        segments: Sequence[Segment],
        aggregation_weights: Float64Array,
        total: float,
        table: Table | None = None,
    ) -> list[bool]:
        _check_environment()
        flagged = []
        for segment in segments:
            inputs, output = list(map(_tensor, segment.inputs)), _tensor(segment.output)
            bad = False
            for start in range(0, output.numel(), TILE):
                tile = slice(start, start + TILE)
                acc = _sum(None, [x[tile] for x in inputs], aggregation_weights)
                bad |= _finish(acc, total, output[tile])
                if output.dtype in (torch.int64, torch.uint64):
                    bad |= any(_beyond(x[tile], 2**52 // (len(inputs) + 2)) for x in inputs)
            flagged.append(bad)
        return flagged

    def accumulate(
        self,
        sums: Sequence[Float64Array],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
        *,
        start: bool = False,
    ) -> None:
        _check_environment()
        for acc, column in zip(map(_tensor, sums), inputs, strict=True):
            tensors = list(map(_tensor, column))
            for begin in range(0, acc.numel(), TILE):
                tile = slice(begin, begin + TILE)
                acc[tile] = _sum(None if start else acc[tile], [x[tile] for x in tensors], aggregation_weights)

    def divide(self, sums: Sequence[Float64Array], total: float, outputs: Sequence[Array]) -> list[bool]:
        _check_environment()
        flagged = []
        for acc, output in zip(map(_tensor, sums), map(_tensor, outputs), strict=True):
            bad = False
            for start in range(0, output.numel(), TILE):
                tile = slice(start, start + TILE)
                bad |= _finish(acc[tile], total, output[tile])
            flagged.append(bad)
        return flagged

    def deposit(
        self,
        digits: Digits,
        starts: Sequence[int],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
    ) -> list[bool]:
        _check_environment()
        touched = [False] * len(digits.rows)
        rows = list(map(_tensor, digits.rows))
        for first, column in zip(starts, inputs, strict=True):
            for a, x in zip(aggregation_weights, map(_tensor, column), strict=True):
                for start in range(0, x.numel(), TILE):
                    tile = x[start : start + TILE]
                    here = slice(first + start, first + start + tile.numel())
                    for products in _exact_products(tile, a):
                        _deposit(products, [row[here] for row in rows], digits.units(), touched)
        return touched

    def exact_divide(self, digits: Digits, starts: Sequence[int], total: float, outputs: Sequence[Array]) -> None:
        _check_environment()
        rows = list(map(_tensor, digits.rows))
        for first, output in zip(starts, map(_tensor, outputs), strict=True):
            for start in range(0, output.numel(), TILE):
                tile = output[start : start + TILE]
                here = slice(first + start, first + start + tile.numel())
                _finish(_as_float64([row[here] for row in rows], digits.units()), total, tile)

    def exact_mean(self, segments: Sequence[Segment], aggregation_weights: Float64Array, total: float) -> None:
        _check_environment()
        for segment in segments:
            top, bottom = digit_range([segment.output.dtype], aggregation_weights)
            inputs, output = list(map(_tensor, segment.inputs)), _tensor(segment.output)
            units = Digits(top, [np.zeros(0, np.int64)] * (top - bottom + 1)).units()
            for start in range(0, output.numel(), TILE):
                tile = output[start : start + TILE]
                rows = list(torch.zeros((len(units), tile.numel()), dtype=torch.int64, device=tile.device))
                touched = [False] * len(rows)
                for a, x in zip(aggregation_weights, inputs, strict=True):
                    for products in _exact_products(x[start : start + TILE], a):
                        _deposit(products, rows, units, touched)
                _finish(_as_float64(rows, units), total, tile)

    def add(self, bases: Sequence[Array], differences: Sequence[Array], outputs: Sequence[Array]) -> list[bool]:
        _check_environment()
        return [_combine(torch.add, *arrays) for arrays in zip(bases, differences, outputs, strict=True)]

    def subtract(self, weights: Sequence[Array], bases: Sequence[Array], outputs: Sequence[Array]) -> list[bool]:
        _check_environment()
        return [_combine(torch.sub, *arrays) for arrays in zip(weights, bases, outputs, strict=True)]

    def not_finite(self, arrays: Sequence[Array]) -> list[bool]:
        _check_environment()
        tensors = list(map(_tensor, arrays))
        return [x.is_floating_point() and not bool(torch.isfinite(x).all()) for x in tensors]

    def copy(self, arrays: Sequence[Array], copies: Sequence[Array]) -> list[bool]:
        for array, copied in zip(arrays, copies, strict=True):
            _tensor(copied).copy_(_tensor(array))
        return self.not_finite(copies)


def _check_environment() -> None:
    """Checks how this thread computes, and torch's threads on the CPU, which keep the mode that they were made in."""
    check_environment()
    tiny = torch.full((PARALLEL * torch.get_num_threads(),), 2.0**-1040, dtype=torch.float64)
    if not bool(torch.mul(tiny, 1.0).all()):
        raise FloatingPointEnvironmentError(
            "threads of torch flush subnormal numbers to zero (torch.set_flush_denormal when they were made?), so "
            "torch would give other bits; the native kernel does not mind"
        )


class _Writeable:
    """The memory of a read-only array, shown as writeable: torch would warn of it otherwise."""

    def __init__(self, array: Array) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}
        self._array = array


def _tensor(array: Any) -> Tensor:
    """A flat view."""
    if isinstance(array, Tensor):
        return array.detach().reshape(-1)
    flat = array.reshape(-1)
    if flat.dtype == BFLOAT16:
        return _tensor(flat.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(flat if flat.flags.writeable else np.asarray(_Writeable(flat)))


def _sum(acc: Tensor | None, inputs: Iterable[Tensor], aggregation_weights: Float64Array) -> Tensor:
    """`acc + Σ a·x` in order; without `acc` the first product starts it. May change `acc`."""
    for a, x in zip(aggregation_weights.tolist(), inputs, strict=True):
        product = torch.mul(x.to(torch.float64), a)
        acc = product if acc is None else acc.add_(product)
    assert acc is not None
    return acc


def _finish(acc: Tensor, total: float, output: Tensor) -> bool:
    """Writes means and says whether a sum is not finite."""
    # The mean of finite values is finite; only its rounding could leave the range.
    divisor = torch.tensor(total, dtype=torch.float64, device=acc.device)
    mean = torch.div(acc, divisor).clamp_(-LARGEST, LARGEST)
    if not output.is_floating_point():
        mean.round_()  # half to even
    elif output.element_size() == 2:
        mean = mean.to(torch.float32)
    output.copy_(mean)
    return not bool(torch.isfinite(acc).all())


def _combine(operation: Callable[[Tensor, Tensor], Tensor], one: Array, other: Array, output: Array) -> bool:
    """Writes the sum or difference of two arrays, and says whether it is not finite or out of range."""
    flagged = False
    tensors = list(map(_tensor, (one, other, output)))
    for start in range(0, tensors[2].numel(), TILE):
        x, y, out = (tensor[start : start + TILE] for tensor in tensors)
        if out.is_floating_point():
            wide = operation(x.to(torch.float64), y.to(torch.float64))
            out.copy_(wide.to(torch.float32) if out.element_size() == 2 else wide)
            flagged |= not bool(torch.isfinite(out).all())
        else:
            wide = operation(x.to(torch.int64), y.to(torch.int64))
            out.copy_(wide)
            flagged |= not torch.equal(out.to(torch.int64), wide)
        if out.dtype == torch.int64:
            # The sum of two that are not beyond 2**62 wraps around at 2**63 alone.
            beyond = _beyond(x, 2**62) or _beyond(y, 2**62)
            flagged |= beyond or bool(((out == torch.iinfo(torch.int64).min) & (x > 0)).any())
    return flagged


def _beyond(x: Tensor, largest: int) -> bool:
    """Whether an integer is larger than this in magnitude."""
    if x.dtype == torch.uint64:  # for which torch has no comparison
        x = x.view(torch.int64)
        return bool(((x < 0) | (x > largest)).any())
    return bool(((x < -largest) | (x > largest)).any())


def _exact_products(x: Tensor, aggregation_weight: float) -> Iterable[Tensor]:
    """Tensors that sum to `aggregation_weight · x` exactly: products of halves."""
    wide = x.to(torch.float64)
    parts = [wide]
    # 24 bits times 26 fit; longer values need to be halved as well.
    if x.element_size() == 8 or (x.element_size() == 4 and not x.is_floating_point()):
        scaled = torch.mul(wide, 134217729.0)  # Veltkamp's splitting, see `digits.halves`
        high = scaled - (scaled - wide)
        parts = [high, wide - high]
    for half in map(float, halves(aggregation_weight)):
        if half:
            yield from (torch.mul(part, half) for part in parts)


def _deposit(products: Tensor, rows: Rows, units: Sequence[float], touched: list[bool]) -> None:
    """Adds products to digits, exactly. `touched` has True for each row that was changed.

    Raises:
        DigitsError: The digits do not reach as far as a product.
    """
    rest = products
    for b, (row, unit) in enumerate(zip(rows, units, strict=True)):
        if not bool(rest.any()):
            return
        shift = torch.tensor(1.5 * 2.0**52 * unit, dtype=torch.float64, device=rest.device)
        rounded = rest + shift
        counts = rounded.view(torch.int64) - shift.view(torch.int64)
        rest = rest - (rounded - shift)
        if bool(counts.any()):
            if b == 0 and max(int(counts.max()), -int(counts.min())) > 1 << DIGIT_BITS:
                raise DigitsError
            row.add_(counts)
            touched[b] = True
    if bool(rest.any()):
        raise DigitsError


def _as_float64(rows: Rows, units: Sequence[float]) -> Tensor:
    """The sums as float64; see `digits.carried` and `digits.as_float64`."""
    carry = torch.zeros_like(rows[0])
    total = torch.zeros(rows[0].shape, dtype=torch.float64, device=rows[0].device)
    for row, unit in zip(reversed(rows), reversed(units), strict=True):
        digit = row + carry
        carry = (digit + (1 << (DIGIT_BITS - 1))) >> DIGIT_BITS
        total.add_((digit - (carry << DIGIT_BITS)).to(torch.float64) * unit)
    return total.add_(carry.to(torch.float64) * (units[0] * 2.0**DIGIT_BITS))
