"""How exact sums are kept, alike in every kernel: as digits on a grid of powers of 2**44.

Digit j of an element is a 64-bit integer that counts multiples of 2**(44·j). A term a·x is cut into products that
float64 holds exactly, and those into digits; every step is exact, and adding integers does not depend on the order.
The slicing is that of Demmel & Nguyen, "Parallel Reproducible Summation" (IEEE Trans. Computers, 2015); here no digit
is ever dropped, so a sum is not merely reproducible but exact.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fed_learn.weights import BFLOAT16

Float64Array: TypeAlias = npt.NDArray[np.float64]
Int64Array: TypeAlias = npt.NDArray[np.int64]

DIGIT_BITS = 44
MOST_TERMS = 1 << 15
"""Contributions that can be added before digits must be carried: each adds up to four times 2**44 to a digit."""
VALUE_EXPONENT = 700
"""float64 values are 0 or from 2**-700 to 2**700 in magnitude, so that no product of halves under- or overflows."""

# Powers of two above all values of a dtype and at or below their last bits.
_EXPONENTS: dict[np.dtype[Any], tuple[int, int]] = {
    np.dtype(np.float16): (16, -24),
    BFLOAT16: (128, -133),
    np.dtype(np.float32): (128, -149),
    np.dtype(np.float64): (VALUE_EXPONENT + 1, -VALUE_EXPONENT - 52),
}
_INTEGERS = (64, 0)


class Digits(NamedTuple):
    """The digits of many elements.

    Attributes:
        top: The highest digit, j of its unit 2**(44·j).
        rows: One array per digit, from the highest to the lowest, each with an entry for every element.
    """

    top: int
    rows: Sequence[Int64Array]

    def units(self) -> list[float]:
        """What each digit counts."""
        return [math.ldexp(1.0, DIGIT_BITS * (self.top - b)) for b in range(len(self.rows))]


class DigitsError(ArithmeticError):
    """The digits do not reach as far as a product. They hold only a part of the sum now.

    Callers have checked all values before, so this means that a value has changed since.
    """

    def __init__(self) -> None:
        super().__init__("the digits do not reach far enough")


def digit_range(dtypes: Iterable[np.dtype[Any]], aggregation_weights: Float64Array) -> tuple[int, int]:
    """The highest and the lowest digit that products of such values and weights can touch.

    Example:
        >>> digit_range([np.dtype(np.float32)], np.array([100.0]))
        (3, -5)
    """
    exponents = [_EXPONENTS.get(dtype, _INTEGERS) for dtype in dtypes] or [_INTEGERS]
    scales = np.frexp(aggregation_weights)[1]
    highest = max(high for high, _ in exponents) + int(scales.max())
    lowest = min(low for _, low in exponents) + int(scales.min()) - 53
    return highest // DIGIT_BITS, lowest // DIGIT_BITS


def halves(x: npt.ArrayLike) -> tuple[Float64Array, Float64Array]:
    """Veltkamp's splitting: x = high + low, each of at most 26 bits, so that products of halves are exact."""
    whole = np.asarray(x, np.float64)
    with np.errstate(all="ignore"):  # of numbers that are not finite, whose halves are not either
        scaled = whole * 134217729.0  # 2**27 + 1
        high = scaled - (scaled - whole)
        return high, whole - high


def carried(digits: Digits) -> Digits:
    """The same sums in new rows, with every digit from -2**43 to 2**43 - 1: the one representation of that form."""
    rows = [np.zeros_like(digits.rows[0])]
    carry = rows[0]
    for row in reversed(digits.rows):
        digit = row + carry
        carry = (digit + (1 << (DIGIT_BITS - 1))) >> DIGIT_BITS
        rows.append(digit - (carry << DIGIT_BITS))
    rows[0] = carry
    return Digits(digits.top + 1, [carry, *reversed(rows[1:])])


def as_float64(digits: Digits) -> Float64Array:
    """The sums as float64, to two units in the last place: a function of the exact sums alone."""
    canonical = carried(digits)
    total = np.zeros(len(digits.rows[0]))
    for row, unit in zip(reversed(canonical.rows), reversed(canonical.units()), strict=True):
        total += row.astype(np.float64) * unit
    return total
