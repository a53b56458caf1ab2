"""Sums whose bits do not depend on the order of the terms: what `exact=True` means.

Each sum is kept exactly, as digits on a fixed grid of powers of 2**36 ("bins": float64 arrays that hold integers times
their unit), so addition is associative and any order and any tree of merges end in the same value. A term a·x
is cut into products that float64 holds exactly, and those into slices that are multiples of a bin's unit; every step
is exact, so nothing is estimated and nothing needs a proof beyond counting bits. Bins are made where terms have
bits, which for a trained float32 model are three to five: 24 to 40 bytes an element.

The slicing is that of Demmel & Nguyen, "Parallel Reproducible Summation" (IEEE Trans. Computers, 2015); here no bin is
ever dropped, so the sum is not merely reproducible but exact.

Domain: aggregation weights from 2**-100 to 2**100; float64 values that are 0 or from 2**-700 to 2**700 in magnitude;
all values of the other dtypes. `check_domain` raises outside of it, before anything is added.

This part is numpy whichever kernel is chosen; the final division is the kernel's.
"""

from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from fed_learn.aggregation.integers import rounded_quotient
from fed_learn.contribution import LARGEST_WEIGHT, SMALLEST_WEIGHT
from fed_learn.environment import check_environment
from fed_learn.errors import ExactDomainError
from fed_learn.kernels.base import Float64Array
from fed_learn.weights import Array, WeightDict, native_dtype

BIN_BITS = 36
VALUE_LIMIT = 2.0**700
TILE = 1 << 14
"""Elements at a time, so that what is cut into slices stays in the cache."""
CARRY_AFTER = 1 << 14
"""Terms after which bins are carried: each adds up to four slices of 2**36 units, and 2**53 units are exact."""


def check_domain(weights: WeightDict, aggregation_weight: float, contributor: str | None = None) -> None:
    """Refuses what an exact sum cannot hold.

    Raises:
        ExactDomainError: Names the contributor and the variable.
        FloatingPointEnvironmentError: The process does not compute as numbers are defined.
    """
    who = f"{contributor}: " if contributor is not None else ""
    check_environment()
    if not SMALLEST_WEIGHT <= aggregation_weight <= LARGEST_WEIGHT:
        raise ExactDomainError(
            f"{who}aggregation weight {aggregation_weight} is outside of 2**-100 to 2**100, where sums are exact",
            contributor=contributor,
        )
    for name, array in weights.items():
        if native_dtype(array.dtype) != np.float64 or not array.size:
            continue
        magnitude = np.abs(array)
        smallest = np.min(magnitude, where=magnitude > 0, initial=np.inf)
        if magnitude.max() > VALUE_LIMIT or smallest < 1 / VALUE_LIMIT:
            raise ExactDomainError(
                f"{who}{name!r} has float64 values outside of 2**-700 to 2**700, where sums are exact",
                contributor=contributor,
                name=name,
            )


class ExactSum:
    """Exact sums of a·x, one per element of a flat array.

    Args:
        size: Number of elements.

    Example:
        >>> total = ExactSum(1)
        >>> for term in (2.0**60, 1.0, 2.0**-60, -(2.0**60), -1.0):
        ...     total.add(np.array([term]), 1.0)
        >>> float(total.value()[0]) == 2.0**-60
        True
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._bins: dict[int, Float64Array] = {}
        self._terms = 0

    def add(self, x: Array, aggregation_weight: float) -> None:
        """Adds `aggregation_weight · x`, exactly. Both lie in the domain."""
        for start in range(0, self.size, TILE):
            tile = slice(start, start + TILE)
            for part in _exact_products(x[tile], aggregation_weight):
                self._deposit(part, tile)
        self._count(1)

    def merge(self, other: "ExactSum") -> None:
        """Adds the sums of `other`, which stays as it is."""
        for j, digits in other._bins.items():
            self._bin(j)[...] += digits
        self._count(other._terms)

    def value(self) -> Float64Array:
        """The sums as float64, within a few units of the last place: a function of the exact values alone."""
        # Canonical digits: of the magnitude, each in [0, 2**36), so that equal sums have equal digits.
        bins = {j: digits.copy() for j, digits in self._bins.items()}
        if not bins:
            return np.zeros(self.size)
        _carry(bins)
        sign = np.where(bins[max(bins)] < 0, -1.0, 1.0)
        for digits in bins.values():
            digits *= sign
        _carry(bins)
        total = np.zeros(self.size)
        for j in sorted(bins):
            total += bins[j]
        return np.asarray(total * sign)

    def integer_mean(self, total: Fraction, output: Array) -> None:
        """The sums divided by `total`, rounded half to even, exactly: for integers and booleans."""
        lowest = min(self._bins, default=0)
        unit = Fraction(2) ** (BIN_BITS * lowest)
        sums = np.zeros(self.size, object)
        for j, digits in self._bins.items():
            units = (digits / np.ldexp(1.0, BIN_BITS * j)).astype(np.int64)  # exact: integers below 2**53
            sums += units.astype(object) << (BIN_BITS * (j - lowest))
        ratio = unit / total
        output[...] = rounded_quotient(sums * ratio.numerator, ratio.denominator).astype(output.dtype)

    def _bin(self, j: int) -> Float64Array:
        if j not in self._bins:
            self._bins[j] = np.zeros(self.size)
        return self._bins[j]

    def _deposit(self, terms: Float64Array, tile: slice) -> None:
        largest = float(np.abs(terms).max(initial=0.0))
        j = int(np.frexp(largest)[1]) // BIN_BITS
        while terms.any():
            # Adding and taking away 1.5·2**52 units rounds to a multiple of the unit; the rest is exact.
            shift = np.ldexp(1.5, 52 + BIN_BITS * j)
            slices = terms + shift
            slices -= shift
            self._bin(j)[tile] += slices
            terms -= slices
            j -= 1

    def _count(self, terms: int) -> None:
        self._terms += terms
        if self._terms >= CARRY_AFTER:
            _carry(self._bins)
            self._terms = 1


def _exact_products(x: Array, aggregation_weight: float) -> Iterable[Float64Array]:
    """Arrays that sum to `aggregation_weight · x` exactly: products of halves of at most 26 bits."""
    wide = x.astype(np.float64)
    a_high, a_low = (float(half) for half in _halves(np.float64(aggregation_weight)))
    # 24 bits times 26 fit; longer values need to be halved as well.
    long = x.dtype.itemsize == 8 or (x.dtype.kind in "iu" and x.dtype.itemsize == 4)
    values = _halves(wide) if long else (wide,)
    for value in values:
        yield a_high * value
        if a_low:
            yield a_low * value


def _halves(x: Float64Array | np.float64) -> tuple[Float64Array, Float64Array]:
    """Veltkamp's splitting: x = high + low, each of at most 26 bits."""
    scaled = x * 134217729.0  # 2**27 + 1
    high = scaled - (scaled - x)
    return np.asarray(high), np.asarray(x - high)


def _carry(bins: dict[int, Float64Array]) -> None:
    """Makes the digits of every bin but the top one lie in [0, 2**36), and the top one's in ±2**36."""
    j = min(bins, default=0)
    while bins:
        unit_above = np.ldexp(1.0, BIN_BITS * (j + 1))
        carried = np.floor(bins[j] / unit_above) * unit_above
        if j + 1 not in bins:
            if j >= max(bins) and bool((np.abs(bins[j]) < unit_above).all()):
                return
            bins[j + 1] = np.zeros_like(carried)
        bins[j] -= carried
        bins[j + 1] += carried
        j += 1
