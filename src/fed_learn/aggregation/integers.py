"""Integers so large that float64 sums would not hold them to the unit.

The float64 mean of n integers is right to within a unit as long as |x|·(n + 2) ≤ 2**52, which every counter satisfies;
and rounded half to even, with whole aggregation weights a, as long as Σ a·|x| < 2**53. Beyond the former a batch is
averaged in Python's integers, slowly and exactly, and a stream is refused. With `exact=True` all integers and booleans
are.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

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


def too_large(column: Sequence[Array]) -> bool:
    """Whether a float64 mean of the arrays of one variable could be off by a unit, because they hold such integers."""
    dtype, count = column[0].dtype, len(column)
    if dtype.kind not in "iu" or fits(np.iinfo(dtype).max, count):
        return False
    return not fits(max(map(magnitude, column)), count)


def integer_mean(column: Sequence[Array], aggregation_weights: Sequence[float], output: Array) -> None:
    """The weighted mean of integers, exact, rounded half to even.

    Args:
        column: One array per contribution.
        aggregation_weights: One per contribution.
        output: Where the mean goes, of the same dtype and shape.

    Example:
        >>> output = np.zeros(1, np.int64)
        >>> integer_mean([np.array([2**62]), np.array([2**62 - 2])], [1.0, 3.0], output)
        >>> int(output[0]) == 2**62 - 2  # the exact mean is 2**62 - 1.5
        True
    """
    fractions = [Fraction(a) for a in aggregation_weights]
    scale = lcm(*(a.denominator for a in fractions))
    whole = [int(a * scale) for a in fractions]
    sums = sum((x.astype(object) * a for x, a in zip(column, whole, strict=True)), np.zeros(output.shape, object))
    output[...] = rounded_quotient(sums, sum(whole)).astype(output.dtype)


def rounded_quotient(numerators: npt.NDArray[np.object_], denominator: int) -> npt.NDArray[np.object_]:
    """`numerators / denominator` of Python integers, rounded half to even.

    Example:
        >>> rounded_quotient(np.array([1, 3, 5, -1, -3, 7], object), 2).tolist()
        [0, 2, 2, 0, -2, 4]
    """
    quotient = numerators // denominator
    twice = (numerators - quotient * denominator) * 2
    up = (twice > denominator) | ((twice == denominator) & (quotient % 2 == 1))
    return np.asarray(quotient + up, object)  # operations on 0-d arrays of objects yield scalars
