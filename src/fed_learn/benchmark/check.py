"""Whether a side is right: a reference for some of the elements, and the largest error against it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fed_learn.benchmark.inputs import Inputs
from fed_learn.weights import Array

OUR_BOUND = 0.51
"""Units of the last place by which this package's results may be off, for integers of the value 1 itself."""
SAMPLE = 1 << 16
"""Elements that are checked, about."""
EXACT_SAMPLE = 1 << 9
"""The same for sums of fractions, which are slow."""


@dataclass(frozen=True, eq=False)
class Expected:
    """The mean of some elements of one variable.

    Attributes:
        elements: Which, in the flat array; the last of them is its last one.
        mean: To the precision of longdouble.
        ulp: What one unit of the last place of Σ|aₖxₖ|/Σaₖ is, in the dtype of the inputs.
    """

    elements: npt.NDArray[np.intp]
    mean: npt.NDArray[np.longdouble]
    ulp: npt.NDArray[np.longdouble]


def bound_of_peers(clients: int, dtype: np.dtype[Any]) -> float:
    """Units of the last place by which a running sum in the dtype of its terms can be off; more than that is wrong.

    Each of n scaled weights, n products, n - 1 sums and two scalings of the result rounds by at most half a unit of
    what it rounds, no partial sum is larger than Σ|aₖxₖ|, and its unit is at most two of the mean's when scaled. Means
    of integers may be cut off instead of rounded, after sums that are off by a little.
    """
    return 1.001 if dtype.kind in "biu" else 3.0 * clients + 1.0


def reference(inputs: Inputs, *, exact: bool = False) -> dict[str, Expected]:
    """The mean of every so many elements, of the first and of the last ones of each variable.

    Args:
        inputs: The models.
        exact: With fractions, for fewer elements; else in longdouble, where that is more than float64.
    """
    models, weights = inputs.clients, inputs.aggregation_weights
    every = max(1, inputs.size // len(models) // (EXACT_SAMPLE if exact else SAMPLE)) | 1
    found = {}
    for name, first in models[0].items():
        elements = np.unique([*range(0, first.size, every), *range(max(0, first.size - 3), first.size)]).astype(np.intp)
        columns = [model[name].reshape(-1)[elements] for model in models]
        wide = [_longdouble(column) for column in columns]
        total = np.longdouble(sum(weights))
        size = sum(np.longdouble(a) * np.abs(x) for a, x in zip(weights, wide, strict=True)) / total
        if exact:
            mean = _by_fractions(columns, weights)
        else:
            mean = np.asarray(sum(np.longdouble(a) * x for a, x in zip(weights, wide, strict=True)) / total)
        found[name] = Expected(elements, mean, _ulp(np.asarray(size), first.dtype))
    return found


def largest_error(result: Mapping[str, Any], expected: Mapping[str, Expected]) -> float:
    """The largest error in units of the last place.

    Infinite where a value is not finite, or variables or values are missing or too many.
    """
    worst = 0.0
    if set(result) != set(expected):
        return float("inf")
    for name, right in expected.items():
        values = np.asarray(result[name]).reshape(-1)
        if values.size != (right.elements[-1] + 1 if right.elements.size else 0):
            return float("inf")
        with np.errstate(invalid="ignore"):
            errors = np.abs(_longdouble(values[right.elements]) - right.mean) / right.ulp
        worst = max(worst, float(np.where(np.isfinite(errors), errors, np.inf).max(initial=0.0)))
    return worst


def _longdouble(values: Array) -> npt.NDArray[np.longdouble]:
    # ml_dtypes has no direct way; integers below 2**53 and all floats pass through float64 unchanged.
    return values.astype(np.float64).astype(np.longdouble)


def _ulp(size: npt.NDArray[np.longdouble], dtype: np.dtype[Any]) -> npt.NDArray[np.longdouble]:
    if dtype.kind in "biu":
        return np.ones_like(size)
    limits: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    exponent = np.frexp(size)[1] - 1
    exponent = np.where(size > 0, np.maximum(exponent, int(limits.minexp)), int(limits.minexp))
    return np.asarray(np.ldexp(np.longdouble(1), exponent - int(limits.nmant)))


def _by_fractions(columns: Iterable[Array], weights: list[float]) -> npt.NDArray[np.longdouble]:
    total = sum(map(Fraction, weights))
    scalars = [Fraction(a) / total for a in weights]
    rows = zip(*(column.astype(np.float64).tolist() for column in columns), strict=True)
    means = [sum((a * Fraction(x) for a, x in zip(scalars, row, strict=True)), Fraction()) for row in rows]
    high = [float(mean) for mean in means]
    low = [float(mean - Fraction(part)) for mean, part in zip(means, high, strict=True)]
    return np.array(high, np.longdouble) + np.array(low, np.longdouble)
