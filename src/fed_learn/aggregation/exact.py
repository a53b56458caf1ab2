"""Sums whose bits do not depend on the order of the terms: what `exact=True` means.

Each sum is kept exactly, as digits (see `fed_learn.kernels.digits`), so addition is associative and any order and any
tree of merges end in the same value. A digit is kept only where terms have bits: for a trained float32 model that
makes three or four digits, or 24 to 32 bytes per element, while contributions stream in. A batch keeps none.

Domain: aggregation weights from 2**-100 to 2**100; float64 values that are 0 or from 2**-700 to 2**700 in magnitude;
all values of the other dtypes. `check_domain` raises outside of it, before anything is added.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

from fed_learn.aggregation.integers import TILE, round_quotients
from fed_learn.contribution import LARGEST_WEIGHT, SMALLEST_WEIGHT
from fed_learn.environment import check_environment
from fed_learn.errors import ExactDomainError
from fed_learn.kernels.base import Kernel
from fed_learn.kernels.digits import (
    MOST_TERMS,
    VALUE_EXPONENT,
    Digits,
    Int64Array,
    carried,
    digit_range,
)
from fed_learn.weights import Array, WeightDict, about, native_dtype

VALUE_LIMIT = 2.0**VALUE_EXPONENT


def check_domain(weights: WeightDict, aggregation_weight: float, contributor: str | None = None) -> None:
    """Refuses values and aggregation weights that an exact sum cannot hold.

    Raises:
        ExactDomainError: Names the contributor and the variable.
        FloatingPointEnvironmentError: The process does not compute as numbers are defined.
    """
    check_environment()
    if not SMALLEST_WEIGHT <= aggregation_weight <= LARGEST_WEIGHT:
        raise ExactDomainError(
            f"{about(contributor)}aggregation weight {aggregation_weight} is outside of 2**-100 to 2**100, "
            "where sums are exact",
            contributor=contributor,
        )
    for name, array in weights.items():
        if native_dtype(array.dtype) != np.float64 or not array.size:
            continue
        magnitude = np.abs(array)
        smallest = np.min(magnitude, where=magnitude > 0, initial=np.inf)
        if magnitude.max() > VALUE_LIMIT or smallest < 1 / VALUE_LIMIT:
            raise ExactDomainError(
                f"{about(contributor, name)}has float64 values outside of 2**-700 to 2**700, where sums are exact",
                contributor=contributor,
                name=name,
            )


class ExactSums:
    """Exact sums of a·x for the variables of a model.

    Args:
        sizes: Elements of each variable.

    Example:
        >>> from fed_learn.kernels import resolve
        >>> total, mean = ExactSums([1]), np.zeros(1)
        >>> for term in (2.0**60, 1.0, 2.0**-60, -(2.0**60), -1.0):
        ...     total.add(resolve(), [[np.array([term])]], [1.0])
        >>> total.divide(resolve(), [0], Fraction(1), [mean])
        >>> float(mean[0]) == 2.0**-60
        True
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = list(sizes)
        self._starts = [0, *accumulate(sizes)]
        self._rows: dict[int, Int64Array] = {}
        self._terms = 0

    def add(self, kernel: Kernel, columns: Sequence[Sequence[Array]], aggregation_weights: Sequence[float]) -> None:
        """Adds `Σ aggregation_weights[k] · columns[i][k]` to the sums of variable i. All lie in the domain.

        Args:
            kernel: The kernel that adds.
            columns: For each variable one array per contribution.
            aggregation_weights: One per contribution; at most `MOST_TERMS - 1`.
        """
        self._count(len(aggregation_weights))
        a = np.array(aggregation_weights, np.float64)
        top, bottom = digit_range({column[0].dtype for column in columns}, a)
        # New rows are memory that the system only provides where it is written to; most are never touched.
        missing = {j: np.zeros(self._starts[-1], np.int64) for j in range(bottom, top + 1) if j not in self._rows}
        rows = self._rows | missing
        digits = Digits(top, [rows[j] for j in range(top, bottom - 1, -1)])
        touched = kernel.deposit(digits, self._starts[:-1], columns, a)
        for b, changed in enumerate(touched):
            if changed:
                self._rows[top - b] = digits.rows[b]

    def merge(self, other: "ExactSums") -> None:
        """Adds the sums of `other`, which stays as it is."""
        self._count(max(1, other._terms))
        for j, row in other._rows.items():
            if j in self._rows:
                self._rows[j] += row
            else:
                self._rows[j] = row.copy()

    def divide(self, kernel: Kernel, variables: Sequence[int], total: Fraction, outputs: Sequence[Array]) -> None:
        """Writes the sums of some variables, divided by `total`, to outputs of floating-point dtypes."""
        kernel.exact_divide(self._digits(), [self._starts[i] for i in variables], float(total), outputs)

    def integer_mean(self, kernel: Kernel, variable: int, total: Fraction, output: Array) -> None:
        """The sums of a variable divided by `total`, rounded half to even, exactly: for integers and booleans."""
        digits = self._digits()
        flat = output.reshape(-1)
        for start in range(0, flat.size, TILE):
            tile = flat[start : start + TILE]
            here = slice(self._starts[variable] + start, self._starts[variable] + start + tile.size)
            round_quotients(kernel, carried(Digits(digits.top, [row[here] for row in digits.rows])), total, tile)

    def _digits(self) -> Digits:
        """All digits from the highest to the lowest that was touched, with zeros for untouched ones between them."""
        top, bottom = max(self._rows, default=0), min(self._rows, default=0)
        missing = {j: np.zeros(self._starts[-1], np.int64) for j in range(bottom, top + 1) if j not in self._rows}
        rows = self._rows | missing
        return Digits(top, [rows[j] for j in range(top, bottom - 1, -1)])

    def _count(self, terms: int) -> None:
        """Counts terms, and carries the digits before they could overflow."""
        if self._terms + terms < MOST_TERMS:
            self._terms += terms
            return
        digits = self._digits()
        top = np.zeros(self._starts[-1], np.int64)
        for start in range(0, self._starts[-1], TILE):
            here = slice(start, start + TILE)
            high, *others = carried(Digits(digits.top, [row[here] for row in digits.rows])).rows
            top[here] = high
            for row, digit in zip(digits.rows, others, strict=True):
                row[here] = digit
        self._rows = {digits.top - b: row for b, row in enumerate(digits.rows)}
        if top.any():
            self._rows[digits.top + 1] = top
        self._terms = 1 + terms
