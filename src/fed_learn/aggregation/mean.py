"""The weighted mean of checked contributions, `Σ aₖ·xₖ / Σ aₖ`, over arrays or over tensors where they lie.

`mean` chooses one of three ways: over arrays and over tensors that stay on their devices (`_mean`), by exact sums
(`_exact_mean`), or, where aggregation weights are so far apart that products would lose bits, in two parts
(`_mean_far_apart`). The last two are over arrays alone, copies of what is on a device. A kernel reports in which
variables something is not finite or may be too large; only these are looked at again.

How contributions are opened and checked is left to `batch`, where results go to `outputs`, and sums that stream in to
`accumulator`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import compress
from typing import Any

import numpy as np

from fed_learn import kernels
from fed_learn.aggregation.arrays import ARRAYS, Columns
from fed_learn.aggregation.batch import Checked
from fed_learn.aggregation.exact import ExactSums, check_domain
from fed_learn.aggregation.integers import integer_mean, large_integer_mean, too_large
from fed_learn.aggregation.outputs import ArrayOutputs, Output, outputs_for
from fed_learn.aggregation.tensors import Place, check_devices, look_at
from fed_learn.contribution import LARGEST_WEIGHT, SMALLEST_WEIGHT
from fed_learn.environment import sum_in_order
from fed_learn.errors import EmptyAggregationError
from fed_learn.kernels.base import Kernel, Segment, Segments
from fed_learn.kernels.digits import MOST_TERMS, DigitsError
from fed_learn.kernels.memory import Table
from fed_learn.weights import Schema, WeightDict, not_finite_error

LIFT = 100
"""Aggregation weights are multiplied by 2**100 (see `usual_scale`)."""
FARTHEST = 2.0**-800
"""Of the largest aggregation weight, what others may be so that no product with any value loses bits to underflow."""


def mean(
    rows: Sequence[Checked],
    schema: Schema,
    *,
    out: WeightDict | None = None,
    output: Callable[[Schema], Output] | None = None,
    exact: bool = False,
    kernel: str | None = None,
    table: Table | None = None,
    first: Checked | None = None,
) -> WeightDict:
    """The mean of contributions, in the order in which they are given.

    Args:
        rows: At least one; all of the variables of the schema.
        schema: Names, shapes and dtypes of the result.
        out: A weight dict to write to, arrays or tensors.
        output: Makes what is written to in its place: arrays that share no memory with anything.
        exact: Sum exactly.
        kernel: Name of the kernel; None: the current one.
        table: Where the arrays of all rows lie, if that is known.
        first: The contribution whose tensors say where the result lies; None: the first row.

    Returns:
        A new dict, of tensors where the first contribution has them; or `out`, or what `output` made.

    Raises:
        EmptyAggregationError: None counts by more than 0.
        NonFiniteError: A value is not finite.
        OutputError: `out` cannot be written to.
        WeightsTypeError: Contributions lie on several devices.
        ExactDomainError: With `exact`, a value or weight outside of the domain.
    """
    held = (rows[0] if first is None else first).held
    for row in rows:
        check_devices(row.held.devices, held.devices, row.contributor)
    place, inputs = held.place, [tensor for row in rows for tensor in row.held.tensors.values()]
    chosen = kernels.resolve(kernel, device=held.device)
    counted = counting(rows, kernel)
    scalars = [row.aggregation_weight for row in counted]
    far = far_apart(scalars)
    if place is not None and place.resident is not None and output is None and not exact and not far:
        return _mean_on_devices(chosen, schema, place, counted, out, inputs)
    if held.devices:  # what no kernel does on a device goes by way of copies on the host
        counted, chosen = [row.on_host() for row in counted], kernels.resolve(kernel)
    columns = Columns(schema, [row.arrays for row in counted], table if counted is rows else None)
    outputs = outputs_for(schema, place, out, columns=columns, inputs=inputs) if output is None else output(schema)
    if exact:
        _exact_mean(chosen, counted, dict(columns), outputs.arrays)
    elif far:
        _mean_far_apart(chosen, schema, counted, columns, outputs.arrays)
    else:
        known = isinstance(outputs, ArrayOutputs) or columns.table.gather([dict(outputs.arrays)], 0)
        _mean(chosen, counted, columns, outputs.arrays, columns.table if known else None)
    return outputs.finish()


def _mean_on_devices(
    kernel: Kernel, schema: Schema, place: Place, rows: Sequence[Checked], out: Any, inputs: Sequence[Any]
) -> WeightDict:
    """The mean over tensors where they lie, and over arrays of the variables that are on the CPU."""
    names = [name for name in schema if name not in place.devices]
    beside = Schema({name: schema[name] for name in names})
    host = Columns(beside, [{name: row.arrays[name] for name in names} for row in rows])
    outputs = outputs_for(schema, place, out, on_devices=True, columns=host, inputs=inputs)
    columns = {
        name: [row.held.tensors[name] for row in rows] if name in place.devices else host[name] for name in schema
    }
    _mean(kernel, rows, columns, outputs.arrays)
    return outputs.finish()


def usual_scale(aggregation_weights: Sequence[float]) -> int:
    """The power of two, as an exponent, by which aggregation weights are multiplied before products are taken.

    It lifts weights of the usual range so far above 1 that no product loses bits to underflow, not even with subnormal
    values, and cancels in the division. Unusual weights are lifted as far as float32 values can bear, so that the
    smallest of them count as well.
    """
    if min(aggregation_weights) >= SMALLEST_WEIGHT and max(aggregation_weights) <= LARGEST_WEIGHT:
        return LIFT
    return 880 - math.frexp(max(aggregation_weights))[1]


def far_apart(aggregation_weights: Sequence[float]) -> bool:
    """Whether aggregation weights are so far apart that products with the smallest of them could lose bits."""
    return min(aggregation_weights) < FARTHEST * max(aggregation_weights)


def counting(rows: Sequence[Checked], kernel: str | None = None) -> Sequence[Checked]:
    """Those that count by more than 0; the result will not show what is wrong with the others.

    Args:
        rows: All of them.
        kernel: Name of the kernel that looks at the others; None: the current one.

    Raises:
        NonFiniteError: One that counts by 0 holds what is not finite.
        EmptyAggregationError: All count by 0.
    """
    idle = [row for row in rows if not row.aggregation_weight]
    if not idle:
        return rows
    for row in idle:
        if not row.scanned:
            values, names = row.held.values, row.held.not_finite(kernels.resolve(kernel))
            refuse_not_finite({name: values[name] for name in names}, row.contributor)
    if len(idle) == len(rows):
        raise EmptyAggregationError("no contribution counts by more than 0: all aggregation weights are 0")
    return [row for row in rows if row.aggregation_weight]


def refuse_not_finite(values: Mapping[str, Any], who: str) -> None:
    """Refuses NaN and infinity.

    Args:
        values: Arrays, or tensors where they lie.
        who: Whose they are.

    Raises:
        NonFiniteError: Says which value of which variable is not finite.
    """
    for name, value in values.items():
        first = look_at(value).first_not_finite(value)
        if first is not None:
            raise not_finite_error(who, name, *first)


def _mean(
    kernel: Kernel,
    rows: Sequence[Checked],
    columns: Mapping[str, Sequence[Any]],
    results: Mapping[str, Any],
    table: Table | None = None,
) -> None:
    """Writes the mean, and looks after what a kernel reports: integers too large, sums that are not finite.

    Args:
        kernel: What computes it.
        rows: Whose the columns are.
        columns: Of each variable an array per contribution, or a tensor.
        results: Where it goes, an array or tensor for each.
        table: See `Kernel.weighted_mean`.

    Raises:
        NonFiniteError: An input is not finite.
    """
    scalars = [row.aggregation_weight for row in rows]
    overflowed = []
    for name in _sums(kernel, columns, scalars, usual_scale(scalars), results, table):
        if rows[0].arrays[name].dtype.kind in "biu":
            _large_integer_mean(kernel, columns[name], scalars, results[name])
            continue
        for row, value in zip(rows, columns[name], strict=True):
            refuse_not_finite({name: value}, row.contributor)
        overflowed.append(name)
    for name in overflowed:
        _mean_again(kernel, rows, name, columns[name], results[name])


def _large_integer_mean(kernel: Kernel, column: Sequence[Any], scalars: Sequence[float], result: Any) -> None:
    """Replaces the mean of integers that are as large as reported by the exact one; of tensors, by way of copies."""
    look = look_at(result)
    host = list(map(look.view, column))
    if not too_large(host):
        return
    if look is ARRAYS:
        large_integer_mean(kernel, host, scalars, result)
    else:
        whole = np.array(look.view(result), order="C")
        large_integer_mean(kernels.resolve(device="cpu"), host, scalars, whole)
        look.write(result, whole)


def _mean_again(kernel: Kernel, rows: Sequence[Checked], name: str, column: Sequence[Any], result: Any) -> None:
    """Replaces elements whose sums are not finite, although the inputs are: by sums so small that they cannot overflow.

    Of copies, since the inputs may have been something else when they were summed, and may be again.

    Raises:
        NonFiniteError: The inputs are not finite after all.
    """
    scalars, look = [row.aggregation_weight for row in rows], look_at(result)
    small = -math.frexp(max(scalars))[1] - len(scalars).bit_length() - 1
    doubtful = look.overflowed(result)
    copies = [value[doubtful] for value in column]
    for row, copied in zip(rows, copies, strict=True):
        first = look.first_not_finite(copied)
        if first is not None:
            (position,), value = first
            index = tuple(map(int, np.argwhere(look.view(doubtful))[position]))
            raise not_finite_error(row.contributor, name, index, value)
    again = copies[0] * 0
    _sums(kernel, {name: copies}, scalars, small, {name: again})
    look.put(result, doubtful, again)


def _sums(
    kernel: Kernel,
    columns: Mapping[str, Sequence[Any]],
    aggregation_weights: Sequence[float],
    scale: int,
    results: Mapping[str, Any],
    table: Table | None = None,
) -> list[str]:
    """The mean of some variables with all aggregation weights multiplied by 2**scale.

    Returns:
        The variables that the kernel reports.
    """
    scaled = [math.ldexp(a, scale) for a in aggregation_weights]
    flags = kernel.weighted_mean(Segments(columns, results), np.array(scaled), sum_in_order(scaled), table)
    return list(compress(columns, flags))


def _mean_far_apart(
    kernel: Kernel,
    schema: Schema,
    rows: Sequence[Checked],
    columns: Mapping[str, Sequence[Any]],
    results: Mapping[str, Any],
) -> None:
    """The mean of those whose aggregation weights are near to the largest, and what the others add to it.

    They add something only to float64 values that are 0, or nearly so, in the weights of all that count by far more,
    and may decide on a tie of large integers, which are summed exactly.
    """
    rows = [row.on_host() for row in rows]
    for row in rows:
        refuse_not_finite(row.arrays, row.contributor)
    scalars = [row.aggregation_weight for row in rows]
    least = FARTHEST * max(scalars)
    near = [row for row in rows if row.aggregation_weight >= least]
    far = [row for row in rows if row.aggregation_weight < least]
    wide = Schema({name: form for name, form in schema.items() if form[1] == np.float64})
    of_near = mean(near, schema, kernel=kernel.name)
    of_far = mean([row.only(list(wide)) for row in far], wide, kernel=kernel.name)
    total, small = (sum((Fraction(row.aggregation_weight) for row in some), Fraction()) for some in (rows, far))
    share = small / total
    exponent = share.numerator.bit_length() - share.denominator.bit_length() + 1
    factor = float(share / Fraction(2) ** exponent)
    for name, result in results.items():
        result[...] = of_near[name]
        if name in of_far:
            with np.errstate(all="ignore"):
                result += np.ldexp(of_far[name] * factor, exponent)
        elif too_large(columns[name]):
            large_integer_mean(kernel, columns[name], scalars, result)


def _exact_mean(
    kernel: Kernel, rows: Sequence[Checked], columns: Mapping[str, Sequence[Any]], results: Mapping[str, Any]
) -> None:
    """Writes the mean by exact sums, of values that have been looked at: all are finite and within the domain.

    Raises:
        NonFiniteError, ExactDomainError: A value is not.
    """
    for k, row in enumerate(rows):
        if not row.scanned:
            flags = kernel.not_finite([column[k] for column in columns.values()])
            flagged = [name for name, flag in zip(columns, flags, strict=True) if flag]
            refuse_not_finite({name: row.arrays[name] for name in flagged}, row.contributor)
            check_domain(row.arrays, row.aggregation_weight, row.contributor)
    try:
        _exact_sums(kernel, columns, [row.aggregation_weight for row in rows], results)
    except DigitsError:  # a value has changed since: what copies hold, nobody else can change
        owned = [row.owned() for row in rows]
        columns = {name: [row.arrays[name] for row in owned] for name in results}
        _exact_mean(kernel, owned, columns, results)


def _exact_sums(
    kernel: Kernel,
    columns: Mapping[str, Sequence[Any]],
    aggregation_weights: Sequence[float],
    results: Mapping[str, Any],
) -> None:
    """Writes the mean by exact sums: of floating-point numbers as digits, of integers as integers."""
    numbers = []
    for name, result in results.items():
        if result.dtype.kind in "biu":
            integer_mean(kernel, columns[name], aggregation_weights, result)
        else:
            numbers.append(name)
    outputs = [results[name] for name in numbers]
    total = sum(map(Fraction, aggregation_weights), Fraction())
    if len(aggregation_weights) < MOST_TERMS:
        segments = [Segment(columns[name], results[name]) for name in numbers]
        kernel.exact_mean(segments, np.array(aggregation_weights), float(total))
        return
    sums = ExactSums([output.size for output in outputs])
    for start in range(0, len(aggregation_weights), MOST_TERMS // 2):
        some = slice(start, start + MOST_TERMS // 2)
        sums.add(kernel, [columns[name][some] for name in numbers], aggregation_weights[some])
    sums.divide(kernel, range(len(outputs)), total, outputs)
