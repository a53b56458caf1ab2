"""The numpy kernel: the readable reference of the arithmetic, and the one that works everywhere."""

from collections.abc import Iterable, Sequence

import numpy as np

from fed_learn.environment import check_environment
from fed_learn.kernels.base import Kernel, Segment
from fed_learn.kernels.digits import DIGIT_BITS, Digits, DigitsError, Float64Array, as_float64, digit_range, halves
from fed_learn.kernels.memory import Table
from fed_learn.weights import Array, rounded

TILE = 1 << 16
"""Elements at a time: bounds the memory of the intermediate float64 arrays."""
LARGEST = float(np.finfo(np.float64).max)


class NumpyKernel(Kernel):
    """`Kernel` in plain numpy, on one thread.

    Raises:
        FloatingPointEnvironmentError: From every operation, where the process does not compute as numbers are
            defined.
    """

    name = "numpy"

    def weighted_mean(
        self,
        segments: Sequence[Segment],
        aggregation_weights: Float64Array,
        total: float,
        table: Table | None = None,
    ) -> list[bool]:
        check_environment()
        flagged = []
        for segment in segments:
            inputs, output = [x.reshape(-1) for x in segment.inputs], segment.output.reshape(-1)
            finite = True
            for start in range(0, output.size, TILE):
                tile = slice(start, start + TILE)
                with np.errstate(all="ignore"):
                    acc = aggregation_weights[0] * inputs[0][tile].astype(np.float64)
                    for a, x in zip(aggregation_weights[1:], inputs[1:], strict=True):
                        acc += a * x[tile].astype(np.float64)
                finite &= _finish(acc, total, output[tile])
                if output.dtype.kind in "iu" and output.dtype.itemsize == 8:
                    largest = 2**52 // (len(inputs) + 2)
                    finite &= all(int(x[tile].max()) <= largest and int(x[tile].min()) >= -largest for x in inputs)
            flagged.append(not finite)
        return flagged

    def accumulate(
        self,
        sums: Sequence[Float64Array],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
        *,
        start: bool = False,
    ) -> None:
        check_environment()
        for acc, column in zip((acc.reshape(-1) for acc in sums), inputs, strict=True):
            if start:
                acc[...] = -0.0  # the neutral element: what follows has the bits of sums that start from a product
            for a, x in zip(aggregation_weights, (x.reshape(-1) for x in column), strict=True):
                for begin in range(0, acc.size, TILE):
                    tile = slice(begin, begin + TILE)
                    with np.errstate(all="ignore"):
                        acc[tile] += a * x[tile].astype(np.float64)

    def divide(self, sums: Sequence[Float64Array], total: float, outputs: Sequence[Array]) -> list[bool]:
        check_environment()
        flagged = []
        for acc, output in zip(sums, outputs, strict=True):
            finite = True
            for start in range(0, acc.size, TILE):
                tile = slice(start, start + TILE)
                finite &= _finish(acc.reshape(-1)[tile], total, output.reshape(-1)[tile])
            flagged.append(not finite)
        return flagged

    def deposit(
        self,
        digits: Digits,
        starts: Sequence[int],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
    ) -> list[bool]:
        check_environment()
        touched = [False] * len(digits.rows)
        for first, column in zip(starts, inputs, strict=True):
            for a, x in zip(aggregation_weights, (x.reshape(-1) for x in column), strict=True):
                for start in range(0, x.size, TILE):
                    tile = x[start : start + TILE]
                    here = slice(first + start, first + start + tile.size)
                    for products in _exact_products(tile, a):
                        _deposit(products, digits, here, touched)
        return touched

    def exact_divide(self, digits: Digits, starts: Sequence[int], total: float, outputs: Sequence[Array]) -> None:
        check_environment()
        for first, output in zip(starts, (output.reshape(-1) for output in outputs), strict=True):
            for start in range(0, output.size, TILE):
                tile = output[start : start + TILE]
                here = slice(first + start, first + start + tile.size)
                _finish(as_float64(Digits(digits.top, [row[here] for row in digits.rows])), total, tile)

    def exact_mean(self, segments: Sequence[Segment], aggregation_weights: Float64Array, total: float) -> None:
        for segment in segments:
            top, bottom = digit_range([segment.output.dtype], aggregation_weights)
            inputs, output = [x.reshape(-1) for x in segment.inputs], segment.output.reshape(-1)
            for start in range(0, output.size, TILE):
                tile = slice(start, start + TILE)
                digits = Digits(top, list(np.zeros((top - bottom + 1, output[tile].size), np.int64)))
                self.deposit(digits, [0], [[x[tile] for x in inputs]], aggregation_weights)
                self.exact_divide(digits, [0], total, [output[tile]])

    def add(self, bases: Sequence[Array], differences: Sequence[Array], outputs: Sequence[Array]) -> list[bool]:
        check_environment()
        return [_combine(np.add, *arrays) for arrays in zip(bases, differences, outputs, strict=True)]

    def subtract(self, weights: Sequence[Array], bases: Sequence[Array], outputs: Sequence[Array]) -> list[bool]:
        check_environment()
        return [_combine(np.subtract, *arrays) for arrays in zip(weights, bases, outputs, strict=True)]

    def not_finite(self, arrays: Sequence[Array]) -> list[bool]:
        check_environment()
        with np.errstate(invalid="ignore"):  # a signalling NaN
            return [array.dtype.kind not in "biu" and not bool(np.isfinite(array).all()) for array in arrays]

    def copy(self, arrays: Sequence[Array], copies: Sequence[Array]) -> list[bool]:
        for array, copied in zip(arrays, copies, strict=True):
            copied[...] = array
        return self.not_finite(copies)


def _finish(acc: Float64Array, total: float, output: Array) -> bool:
    """Writes means and says whether the sums are finite."""
    with np.errstate(all="ignore"):
        # The mean of finite values is finite; only its rounding could leave the range.
        output[...] = rounded(np.clip(acc / total, -LARGEST, LARGEST), output.dtype)
    return bool(np.isfinite(acc).all())


def _combine(operation: np.ufunc, one: Array, other: Array, output: Array) -> bool:
    """Writes the sum or difference of two arrays, and says whether it is not finite or out of range."""
    integers = output.dtype.kind == "i"
    wide_dtype = np.dtype(np.int64 if integers else np.float64)
    flagged = False
    for start in range(0, output.size, TILE):
        x, y, out = (array.reshape(-1)[start : start + TILE] for array in (one, other, output))
        with np.errstate(all="ignore"):
            wide = operation(x.astype(wide_dtype), y.astype(wide_dtype))
            out[...] = wide.astype(out.dtype) if integers else rounded(wide, out.dtype)
            flagged |= not (np.array_equal(out, wide) if integers else np.isfinite(out).all())
        if out.dtype == np.int64:
            # The sum of two that are not beyond 2**62 wraps around at 2**63 alone.
            beyond = any(int(array.min()) < -(2**62) or int(array.max()) > 2**62 for array in (x, y))
            flagged |= beyond or bool(((out == np.iinfo(np.int64).min) & (x > 0)).any())
    return bool(flagged)


def _exact_products(x: Array, aggregation_weight: float) -> Iterable[Float64Array]:
    """Arrays that sum to `aggregation_weight · x` exactly: products of halves."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        wide = x.astype(np.float64)
    # 24 bits times 26 fit; longer values need to be halved as well.
    long = x.dtype.itemsize == 8 or (x.dtype.kind in "iu" and x.dtype.itemsize == 4)
    for half in map(float, halves(aggregation_weight)):
        if half:
            for part in halves(wide) if long else (wide,):
                with np.errstate(all="ignore"):
                    products = half * part
                yield products


def _deposit(products: Float64Array, digits: Digits, here: slice, touched: list[bool]) -> None:
    """Adds products to digits, exactly. `touched` has True for each row that was changed.

    Raises:
        DigitsError: The digits do not reach as far as a product.
    """
    rest = products
    for b, (row, unit) in enumerate(zip(digits.rows, digits.units(), strict=True)):
        if not rest.any():
            return
        shift = np.float64(1.5 * 2.0**52 * unit)
        # Adding and taking away 1.5·2**52 units rounds to a multiple of the unit; what is left is exact.
        with np.errstate(all="ignore"):  # of numbers that are not finite, which are left over in the end
            rounded = rest + shift
            counts = rounded.view(np.int64) - shift.view(np.int64)
            rest = rest - (rounded - shift)
        if counts.any():
            if b == 0 and max(int(counts.max()), -int(counts.min())) > 1 << DIGIT_BITS:  # beyond the highest digit
                raise DigitsError
            row[here] += counts
            touched[b] = True
    if rest.any():
        raise DigitsError
