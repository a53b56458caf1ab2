"""Integers so large that float64 sums would not hold them to the unit.

A mean of n integers by way of float64 is off by less than half a unit as long as |x|·(n + 2) ≤ 2**52, which every
counter satisfies. Beyond that a batch is averaged in Python's integers, slowly and exactly, and a stream is refused.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from fed_learn.weights import Array


def magnitude(array: Array) -> int:
    """The largest absolute value; 0 for an empty array and for anything but integers.

    Example:
        >>> magnitude(np.array([3, -5], np.int8))
        5
    """
    if array.dtype.kind not in "iu" or not array.size:
        return 0
    return max(-int(array.min()), int(array.max()))


def fits(largest: int, count: int) -> bool:
    """Whether a float64 mean of `count` integers up to `largest` is right to the unit."""
    return largest * (count + 2) <= 2**52


def needs_integers(column: Sequence[Array]) -> bool:
    """Whether the arrays of one variable hold integers that are too large for float64 sums."""
    dtype, count = column[0].dtype, len(column)
    if dtype.kind not in "iu" or fits(np.iinfo(dtype).max, count):
        return False
    return not fits(max(map(magnitude, column)), count)


def integer_mean(column: Sequence[Array], factors: Sequence[float], output: Array) -> None:
    """The weighted mean of integers, exact, rounded half to even.

    Args:
        column: One flat array per contribution.
        factors: The aggregation weights.
        output: Where the mean goes: flat, of the same dtype.

    Example:
        >>> output = np.zeros(1, np.int64)
        >>> integer_mean([np.array([2**62]), np.array([2**62 - 2])], [1.0, 3.0], output)
        >>> int(output[0]) == 2**62 - 2  # the exact mean is 2**62 - 1.5
        True
    """
    fractions = [Fraction(factor) for factor in factors]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    weights = [int(fraction * scale) for fraction in fractions]
    total = sum(weights)
    numerator = sum((x.astype(object) * w for x, w in zip(column, weights, strict=True)), np.zeros(output.size, object))
    quotient = numerator // total
    twice = (numerator - quotient * total) * 2
    up = (twice > total) | ((twice == total) & (quotient % 2 == 1))
    output[...] = (quotient + up.astype(object)).astype(output.dtype)
