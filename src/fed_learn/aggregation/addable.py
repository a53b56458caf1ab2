"""What can be added to sums as they stream in, so that the mean is right: finite values, weights and integers in range.

The mean of a batch takes more, since all of it is known before the sums begin: there unusual weights are scaled, and
large integers are summed exactly.
"""

from collections.abc import Mapping
from typing import Any

from fed_learn.aggregation.batch import Checked
from fed_learn.aggregation.exact import check_domain
from fed_learn.aggregation.integers import fits
from fed_learn.aggregation.mean import refuse_not_finite
from fed_learn.aggregation.tensors import look_at, magnitudes
from fed_learn.contribution import LARGEST_WEIGHT, SMALLEST_WEIGHT
from fed_learn.errors import AggregationWeightError, IntegerRangeError
from fed_learn.kernels.base import Kernel
from fed_learn.weights import WeightDict, first_of


def finite_values(kernel: Kernel, row: Checked, copies: dict[str, Any] | None, *, on_devices: bool) -> dict[str, Any]:
    """The values of a contribution as a kernel adds them, once it has found no NaN and no infinity among them.

    Args:
        kernel: Looks for them.
        row: The contribution.
        copies: Where to copy the values, so that what was found stays true whoever else holds them; None: they stay as
            they are, somebody has promised.
        on_devices: Whether the kernel takes tensors that are not on the CPU where they lie.

    Raises:
        NonFiniteError: Says which value of which variable is not finite.
    """
    given = row.held.values if on_devices else row.arrays
    values = {name: look_at(value).contiguous(value) for name, value in given.items()}
    if copies is not None:
        flags = kernel.copy(list(values.values()), [copies[name] for name in values])
        values = {name: copies[name] for name in values}
    elif row.scanned:
        return values
    else:
        flags = kernel.not_finite(list(values.values()))
    refuse_not_finite({name: values[name] for name, flag in zip(values, flags, strict=True) if flag}, row.contributor)
    return values


def largest_integers(row: Checked, values: dict[str, Any]) -> dict[str, int]:
    """The largest magnitude in each variable of integers."""
    return magnitudes({name: values[name] for name, array in row.arrays.items() if array.dtype.kind in "iu"})


def check_addable(row: Checked, values: dict[str, Any], *, exact: bool) -> None:
    """Refuses a contribution by whose weight sums could under- or overflow, or that exact sums do not take.

    Args:
        row: The contribution.
        values: As a kernel adds them.
        exact: Whether sums are exact.

    Raises:
        AggregationWeightError: The weight is outside of 2**-100 to 2**100.
        ExactDomainError: With `exact`, a value or the weight is outside of the domain.
    """
    who, a = row.contributor, row.aggregation_weight
    if not exact and not SMALLEST_WEIGHT <= a <= LARGEST_WEIGHT:
        raise AggregationWeightError(
            f"{who}: aggregation weight {a} is outside of 2**-100 to 2**100, and sums as they stream in could "
            "under- or overflow; weighted_average can take it",
            contributor=who,
            value=a,
        )
    if exact and not row.scanned:
        check_domain(values, a, who)


def check_integers(
    largest: Mapping[str, int],
    before: Mapping[str, int],
    count: int,
    exact: bool,
    contributor: str | None = None,
    arrays: WeightDict | None = None,
) -> None:
    """Refuses integers so large that their mean would not be right to the unit.

    Args:
        largest: The largest magnitudes among those that are to be added.
        before: Those of what has been added.
        count: How many contributions there are with these.
        exact: Whether sums are exact.
        contributor: Whose they are, if they are one's.
        arrays: Where they are, arrays or tensors.

    Raises:
        IntegerRangeError: Names the variable.
    """
    for name, size in largest.items():
        if size <= 2**53 if exact else fits(max(size, before.get(name, 0)), count):
            continue
        who = f"{contributor}: " if contributor is not None else ""
        index = None
        if arrays is not None:
            array = look_at(arrays[name]).view(arrays[name])
            index, _ = first_of((array == size) | (array == -size), array)
        raise IntegerRangeError(
            f"{who}{name!r} holds integers up to {size}, too large to be averaged to the unit as they stream in; "
            "weighted_average can take them",
            contributor=contributor,
            name=name,
            index=index,
            value=size,
        )
