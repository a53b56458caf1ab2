"""Integers so large that float64 sums would not hold them to the unit.

The float64 mean of n integers is right to within a unit as long as |x|·(n + 2) ≤ 2**52, which every counter satisfies.
It is also rounded half to even if aggregation weights a are whole and Σ a·|x| < 2**53. Elements beyond the first bound
are summed exactly in a batch, in digits (see `fed_learn.kernels.digits`), and refused in a stream. With `exact=True`
all integers and booleans are summed exactly.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fed_learn.kernels.base import Kernel
from fed_learn.kernels.digits import DIGIT_BITS, MOST_TERMS, Digits, Int64Array, as_float64, carried, digit_range
from fed_learn.weights import Array

TILE = 1 << 14
"""Elements at a time: bounds the memory of intermediate arrays."""
BAND = 8
"""One call adds aggregation weights that are less than 2**(44·8) apart, so that no product under- or overflows."""

Scaled: TypeAlias = tuple[float, int]
"""A number f·2**(44·j) as (f, j)."""


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
    """Whether the arrays of one variable hold integers so large that their float64 mean could be off by a unit."""
    dtype, count = column[0].dtype, len(column)
    if dtype.kind not in "iu" or fits(np.iinfo(dtype).max, count):
        return False
    return not fits(max(map(magnitude, column)), count)


def large_integer_mean(
    kernel: Kernel, column: Sequence[Array], aggregation_weights: Sequence[float], output: Array
) -> None:
    """Replaces the elements of a float64 mean of integers that could be off by a unit by exact means.

    Only these elements are summed again: one large integer does not cost another sum of the whole variable.
    """
    bound = 2**52 // (len(column) + 2)
    large = np.zeros(output.shape, bool)
    for x in column:
        large |= (x > bound) | (x < -bound)
    means = np.empty(np.count_nonzero(large), output.dtype)
    integer_mean(kernel, [x[large] for x in column], aggregation_weights, means)
    output[large] = means


def integer_mean(kernel: Kernel, column: Sequence[Array], aggregation_weights: Sequence[float], output: Array) -> None:
    """The weighted mean of integers or booleans, exact, rounded half to even.

    Args:
        kernel: The kernel that adds.
        column: One array per contribution.
        aggregation_weights: One per contribution, however far apart.
        output: Where the mean goes, of the same dtype and shape; C-contiguous.

    Example:
        >>> from fed_learn.kernels import resolve
        >>> output = np.zeros(1, np.int64)
        >>> integer_mean(resolve(), [np.array([2**62]), np.array([2**62 - 2])], [1.0, 3.0], output)
        >>> int(output[0]) == 2**62 - 2  # the exact mean is 2**62 - 1.5
        True
    """
    total = sum(map(Fraction, aggregation_weights), Fraction())
    scaled = list(map(_scaled, aggregation_weights))
    inputs, means = [x.reshape(-1) for x in column], output.reshape(-1)
    for start in range(0, means.size, TILE):
        here = slice(start, start + TILE)
        sums = Digits(0, [np.zeros(means[here].size, np.int64)])
        for first in range(0, len(inputs), MOST_TERMS // 2):
            some = slice(first, first + MOST_TERMS // 2)
            sums = _added(kernel, sums, [x[here] for x in inputs[some]], scaled[some])
        round_quotients(kernel, sums, total, means[here])


def round_quotients(kernel: Kernel, sums: Digits, total: Fraction, output: Array) -> None:
    """Writes exact sums divided by `total`, rounded half to even, to an array of integers or booleans.

    The float64 quotient is only near the right one. The sum minus quotient · total is exact again, and gives the rest
    of the quotient. What is left after that is compared with half of the total.

    Args:
        kernel: The kernel that adds.
        sums: One for each element of the output, whose dtype can hold the quotient.
        total: Positive, a whole multiple of a power of two.
        output: One-dimensional.
    """
    divisor = _parts(total)
    highest = max(j for _, j in divisor)
    # Fractions of the highest digit, so that nothing overflows.
    approximate_total = sum(math.ldexp(part, DIGIT_BITS * (j - highest)) for part, j in divisor)

    def approximate(digits: Digits) -> npt.NDArray[np.float64]:
        """The float64 quotients of these sums and the total."""
        quotients: npt.NDArray[np.float64] = as_float64(Digits(digits.top - highest, digits.rows)) / approximate_total
        return quotients

    def plus(digits: Digits, array: Array, sign: int) -> Digits:
        """The digits with `array` times the total added to them (`sign` 1) or taken away (`sign` -1)."""
        return _added(kernel, digits, [array] * len(divisor), [(sign * part, j) for part, j in divisor])

    wide = np.dtype(np.uint64 if output.dtype == np.uint64 else np.int64)
    bounds = np.iinfo(wide)
    most = np.nextafter(np.float64(bounds.max), 0)  # the largest float64 that is no more than the largest integer
    quotient = np.clip(np.rint(approximate(sums)), float(bounds.min), most).astype(wide)
    rest = plus(sums, quotient, -1)
    step = np.rint(approximate(rest)).astype(np.int64)
    quotient = (quotient.view(np.int64) + step).view(wide)
    rest = plus(rest, step, -1)
    # At most half of the total is left, up to the error of float64: near a half it is decided exactly.
    near_half = np.flatnonzero(np.abs(approximate(rest)) > 0.499)
    if near_half.size:
        twice = carried(Digits(rest.top, [2 * row[near_half] for row in rest.rows]))
        one = np.ones(near_half.size, np.int8)
        above, below = _signs(plus(twice, one, -1)), _signs(plus(twice, one, 1))
        odd = (quotient[near_half] & wide.type(1)).astype(bool)
        up, down = (above > 0) | ((above == 0) & odd), (below < 0) | ((below == 0) & odd)
        quotient[near_half] = (quotient[near_half].view(np.int64) + up - down).view(wide)
    output[...] = quotient.astype(output.dtype)


def _scaled(aggregation_weight: float) -> Scaled:
    """The number as f·2**(44·j), with the same j for weights that are near to one another."""
    j = BAND * (math.frexp(aggregation_weight)[1] // (BAND * DIGIT_BITS))
    return math.ldexp(aggregation_weight, -DIGIT_BITS * j), j


def _parts(number: Fraction) -> list[Scaled]:
    """Numbers of 44 bits whose sum is `number`."""
    lowest = -(-(number.denominator.bit_length() - 1) // DIGIT_BITS)
    whole = int(number * Fraction(2) ** (DIGIT_BITS * lowest))
    parts: list[Scaled] = []
    for j in range(-lowest, -lowest + whole.bit_length() // DIGIT_BITS + 1):
        whole, part = divmod(whole, 1 << DIGIT_BITS)
        parts += [(float(part), j)] if part else []
    return parts


def _added(kernel: Kernel, digits: Digits, arrays: Sequence[Array], factors: Iterable[Scaled]) -> Digits:
    """The digits with the products of arrays and factors added to them, carried."""
    rows = {digits.top - b: row.copy() for b, row in enumerate(digits.rows)}
    terms: dict[int, list[tuple[float, Array]]] = {}
    for array, (factor, j) in zip(arrays, factors, strict=True):
        group = terms.setdefault(j, [])
        if array.dtype.itemsize == 8:  # more bits than float64 has
            group += [(factor * 2.0**32, array >> 32), (factor, array & array.dtype.type(2**32 - 1))]
        else:
            group.append((factor, array))
    for j, group in terms.items():
        numbers = np.array([factor for factor, _ in group])
        top, bottom = digit_range({group[0][1].dtype}, numbers)
        for i in range(bottom, top + 1):
            rows.setdefault(i + j, np.zeros(digits.rows[0].size, np.int64))
        kernel.deposit(
            Digits(top, [rows[i + j] for i in range(top, bottom - 1, -1)]), [0], [[x for _, x in group]], numbers
        )
    top, bottom = max(rows), min(rows)
    zeros = np.zeros(digits.rows[0].size, np.int64)
    sums = carried(Digits(top, [rows.get(i, zeros) for i in range(top, bottom - 1, -1)]))
    empty = next((b for b, row in enumerate(sums.rows[:-1]) if row.any()), len(sums.rows) - 1)
    return Digits(sums.top - empty, sums.rows[empty:])


def _signs(digits: Digits) -> Int64Array:
    """-1, 0 or 1 for each sum: the sign of its highest digit that is not 0."""
    signs = np.zeros(digits.rows[0].size, np.int64)
    for row in digits.rows:
        signs = np.where(signs == 0, np.sign(row), signs)
    return signs
