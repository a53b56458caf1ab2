"""The weighted mean of a batch of contributions."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import compress
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fed_learn import kernels
from fed_learn.adapters.tensors import hold_tensors
from fed_learn.aggregation.arrays import Columns, Outputs
from fed_learn.aggregation.exact import ExactSums, check_domain
from fed_learn.aggregation.integers import integer_mean, large_integer_mean, too_large
from fed_learn.contribution import (
    LARGEST_WEIGHT,
    SMALLEST_WEIGHT,
    Contribution,
    Kind,
    check_aggregation_weight,
    check_contribution,
)
from fed_learn.environment import sum_in_order
from fed_learn.errors import (
    AggregationWeightError,
    EmptyAggregationError,
    KindError,
    RoundError,
    WeightsTypeError,
)
from fed_learn.kernels.base import Kernel, Segment, Segments
from fed_learn.kernels.digits import MOST_TERMS, DigitsError
from fed_learn.kernels.memory import Table, hold_only_arrays
from fed_learn.values import whole_number_of
from fed_learn.weights import (
    PLAIN,
    Array,
    Schema,
    WeightDict,
    as_weight_dict,
    check_finite,
    check_weights,
    finite_elements,
)

LIFT = 100
"""Aggregation weights are multiplied by 2**100 (see `usual_scale`)."""

Rows: TypeAlias = list[tuple[str, dict[str, Array], float]]
"""Contributor, weights and aggregation weight of what passed the checks, in the order of the sums."""


def weighted_average(
    contributions: Iterable[WeightDict] | Iterable[Contribution],
    aggregation_weights: Sequence[float] | None = None,
    *,
    like: WeightDict | None = None,
    out: WeightDict | None = None,
    exact: bool = False,
    kernel: str | None = None,
) -> WeightDict:
    """The mean of contributions, `Σ aₖ·xₖ / Σ aₖ` for each variable.

    Sums are kept in float64 and rounded once, to the dtype of the variable; integers and booleans half to even, and
    integers too large for that are summed exactly. The bits do not depend on the kernel, the number of threads or, for
    `Contribution`s, the order of the list: they are summed in the order of their contributors' names. Bare weight
    dicts are summed in list order.

    Weights may be tensors of torch, as `state_dict()` gives them, TensorFlow tensors and variables, or JAX arrays: see
    `fed_learn.aggregation.tensors`.

    Args:
        contributions: Weight dicts, or `Contribution`s, all of one kind and round: those that most of them state; of
            equally common ones the newer round, and the kind of the first. One that states no round passes.
        aggregation_weights: One number ≥ 0 per weight dict; None: they count equally. `Contribution`s bring their own.
            What counts by 0 is checked, and adds nothing.
        like: The global model: sets names, shapes, dtypes and the order of the result. None: the first one does, so
            give it where contributions are not to be trusted, or the wrong one may be refused.
        out: A weight dict of the same schema to write the result to; its content is undefined after an error.
        exact: Sum exactly, so that the bits do not depend on the list order of bare weight dicts either, and agree
            with those of `Accumulator(exact=True)`. Domain: see `fed_learn.aggregation.exact`.
        kernel: Name of the kernel; None: the current one.

    Returns:
        A new dict in the order of `like`, arrays in native byte order, or tensors where the first contribution has
        them; or `out`.

    Raises:
        ContributionError: Something is wrong with one of them; the class says what, the attributes who and where.
        EmptyAggregationError: There are no contributions, or none counts by more than 0.
        OutputError: `out` cannot be written to.
        ExactDomainError: With `exact`, a value or weight outside of the domain.
        FloatingPointEnvironmentError: The process does not compute as numbers are defined, and that would matter.

    Example:
        >>> hospital_a, hospital_b = {"w": np.float32([0, 1])}, {"w": np.float32([4, 1])}
        >>> weighted_average([hospital_a, hospital_b], [300, 100])
        {'w': array([1., 1.], dtype=float32)}
    """
    chosen = kernels.resolve(kernel)
    batch = list(contributions)
    if not hold_only_arrays([like, out, *batch]) and hold_tensors(
        like, out, *(item.weights if isinstance(item, Contribution) else item for item in batch)
    ):
        from fed_learn.aggregation.average_tensors import average_tensors  # which builds upon this module

        return average_tensors(batch, aggregation_weights, like=like, out=out, exact=exact, kernel=kernel)
    schema, passed, table = checked_batch(batch, aggregation_weights, like)
    checked = counting(passed, lambda who, weights: check_finite(weights, who))
    inputs = Columns(schema, [weights for _, weights, _ in checked], table if checked is passed else None)
    outputs = Outputs(schema, out, inputs)
    scalars = [a for _, _, a in checked]
    if exact:
        _exact_average(chosen, schema, checked, dict(inputs), outputs.arrays)
        return outputs.finish()
    if far_apart(scalars):
        _average_far_apart(chosen, checked, inputs, outputs.arrays)
        return outputs.finish()
    flagged = _average(chosen, inputs, scalars, usual_scale(scalars), outputs.arrays, outputs.table)
    results = {}
    for name in flagged:
        if schema[name][1].kind not in "biu":
            results[name] = outputs.arrays[name]
        elif too_large(inputs[name]):
            large_integer_mean(chosen, inputs[name], scalars, outputs.arrays[name])
    for name, doubtful in _refuse_non_finite(results, checked).items():
        _average_again(chosen, checked, name, results[name], doubtful)
    return outputs.finish()


def usual_scale(aggregation_weights: Sequence[float]) -> int:
    """The power of two by which aggregation weights are multiplied, exactly, before products are taken.

    It lifts weights of the usual range so far above 1 that no product loses bits to underflow, not even with subnormal
    values, and cancels in the division. Unusual weights are lifted as far as float32 values can bear, so that the
    smallest of them count as well.
    """
    if min(aggregation_weights) >= SMALLEST_WEIGHT and max(aggregation_weights) <= LARGEST_WEIGHT:
        return LIFT
    return 880 - math.frexp(max(aggregation_weights))[1]


FARTHEST = 2.0**-800
"""Of the largest aggregation weight, what others may be so that no product with any value loses bits to underflow."""


def far_apart(aggregation_weights: Sequence[float]) -> bool:
    """Whether aggregation weights are so far apart that products with the smallest of them could lose bits."""
    return min(aggregation_weights) < FARTHEST * max(aggregation_weights)


def _average_far_apart(
    kernel: Kernel, checked: Rows, columns: Mapping[str, Sequence[Array]], results: WeightDict
) -> None:
    """The mean of those whose aggregation weights are near to the largest, and what the others add to it.

    They add something only to float64 values that are 0, or nearly so, in the weights of all that count by far more,
    and may decide on a tie of large integers, which are summed exactly.
    """
    for who, weights, _ in checked:
        check_finite(weights, who)
    least = FARTHEST * max(a for _, _, a in checked)
    near, far = [row for row in checked if row[2] >= least], [row for row in checked if row[2] < least]
    mean = weighted_average([weights for _, weights, _ in near], [a for _, _, a in near], kernel=kernel.name)
    names = [name for name, result in results.items() if result.dtype == np.float64]
    added = weighted_average([{n: w[n] for n in names} for _, w, _ in far], [a for _, _, a in far], kernel=kernel.name)
    total, of_far = (sum((Fraction(a) for _, _, a in rows), Fraction()) for rows in (checked, far))
    share = of_far / total
    exponent = share.numerator.bit_length() - share.denominator.bit_length() + 1
    factor = float(share / Fraction(2) ** exponent)
    for name, result in results.items():
        result[...] = mean[name]
        if name in added:
            with np.errstate(all="ignore"):
                result += np.ldexp(added[name] * factor, exponent)
        elif too_large(columns[name]):
            large_integer_mean(kernel, columns[name], [a for _, _, a in checked], result)


def _average(
    kernel: Kernel,
    columns: Mapping[str, Sequence[Array]],
    aggregation_weights: Sequence[float],
    scale: int,
    results: WeightDict,
    table: Table | None = None,
) -> list[str]:
    """The mean of some variables with all aggregation weights multiplied by 2**scale.

    Args:
        kernel: What computes it.
        columns: An array per contribution of each variable.
        aggregation_weights: One per contribution.
        scale: See above.
        results: Where it goes.
        table: See `Kernel.weighted_mean`.

    Returns:
        The variables that the kernel reports.
    """
    scaled = [math.ldexp(a, scale) for a in aggregation_weights]
    flags = kernel.weighted_mean(Segments(columns, results), np.array(scaled), sum_in_order(scaled), table)
    return list(compress(columns, flags))


def _average_again(kernel: Kernel, checked: Rows, name: str, result: Array, doubtful: npt.NDArray[np.bool_]) -> None:
    """Replaces elements whose sums are not finite, although the inputs are: by sums so small that they cannot overflow.

    Of copies, since the inputs may have been something else when they were summed, and may be again.

    Raises:
        NonFiniteError: The inputs are not finite after all.
    """
    scalars = [a for _, _, a in checked]
    small = -math.frexp(max(scalars))[1] - len(scalars).bit_length() - 1
    copies = []
    for contributor, weights, _ in checked:
        copies.append(weights[name][doubtful])
        if not finite_elements(copies[-1]).all():
            whole = np.zeros(result.shape, result.dtype)
            whole[doubtful] = copies[-1]
            check_finite({name: whole}, contributor)
    again = np.empty_like(copies[0])
    _average(kernel, {name: copies}, scalars, small, {name: again})
    result[doubtful] = again


def checked_batch(
    batch: list[Any], aggregation_weights: Sequence[float] | None, like: WeightDict | None
) -> tuple[Schema, Rows, Table | None]:
    """Checks all but whether values are finite.

    Returns:
        The schema, the contributions in the order of the sums, and where their arrays lie, if the check has shown that.
    """
    if not batch:
        raise EmptyAggregationError("no contributions to average")
    schema = None if like is None else Schema.of(as_weight_dict(like, "like"), "like")
    if not all(isinstance(item, Contribution) for item in batch):
        return _checked_weight_dicts(batch, aggregation_weights, schema)
    if aggregation_weights is not None:
        raise AggregationWeightError(
            "aggregation_weights= is for bare weight dicts; Contributions bring their own", value=aggregation_weights
        )
    return *_checked_contributions(batch, schema), None


def counting(checked: Rows, check: Callable[[str, dict[str, Array]], None]) -> Rows:
    """Those that count by more than 0; the sums will not show what is wrong with the others.

    Args:
        checked: All of them.
        check: Looks for NaN and infinity in weights, of which it is told whose they are.

    Raises:
        NonFiniteError: One that counts by 0 holds them.
        EmptyAggregationError: All count by 0.
    """
    idle = [(who, weights) for who, weights, a in checked if not a]
    if not idle:
        return checked
    for who, weights in idle:
        check(who, weights)
    if len(idle) == len(checked):
        raise EmptyAggregationError("no contribution counts by more than 0: all aggregation weights are 0")
    return [row for row in checked if row[2]]


def _checked_contributions(batch: list[Contribution], schema: Schema | None) -> tuple[Schema, Rows]:
    """In the order of the contributors' names."""
    rounds: Counter[Any] = Counter(number for c in batch if (number := whole_number_of(c.round)) is not None)
    kinds: Counter[Any] = Counter(c.kind for c in batch if isinstance(c.kind, Kind))
    # Of equally common ones: the newer round, since late contributions are common, and the first's kind.
    number = max(rounds, key=lambda number: (rounds[number], number), default=None)
    kind = max(kinds, key=kinds.__getitem__, default=None)
    seen: dict[str, tuple[dict[str, Array], float]] = {}
    for contribution in batch:
        try:
            weights, a = check_contribution(
                contribution, schema, kind=kind, round=number, contributors=seen, scan=False
            )
        except (RoundError, KindError) as error:
            of_round = isinstance(error, RoundError)
            stated, counts = (whole_number_of(contribution.round), rounds) if of_round else (contribution.kind, kinds)
            if isinstance(stated, int | Kind) and counts[stated] == max(counts.values(), default=1):
                error.args = (f"{error} (as many contributions of this call state it as state the expected one)",)
            raise
        schema = Schema.of(weights) if schema is None else schema
        seen[contribution.contributor] = weights, a
    assert schema is not None
    return schema, [(contributor, *seen[contributor]) for contributor in sorted(seen)]


@functools.lru_cache(maxsize=1)
def _labels(count: int) -> tuple[str, ...]:
    """What bare weight dicts are called in errors."""
    return tuple(f"contributions[{i}]" for i in range(count))


def _checked_weight_dicts(
    batch: Sequence[Any], aggregation_weights: Sequence[float] | None, schema: Schema | None
) -> tuple[Schema, Rows, Table | None]:
    """In the order of the list."""
    if aggregation_weights is None:
        aggregation_weights = [1.0] * len(batch)
    elif len(aggregation_weights) != len(batch):
        raise AggregationWeightError(
            f"{len(aggregation_weights)} aggregation weights for {len(batch)} weight dicts", value=aggregation_weights
        )
    labels = _labels(len(batch))
    plain = {*map(type, batch)} <= {*PLAIN}
    for label, item in [] if plain else zip(labels, batch, strict=True):
        if isinstance(item, Contribution):
            raise WeightsTypeError(f"{label} is a Contribution among bare weight dicts", contributor=label)
    schema = Schema.of(as_weight_dict(batch[0], labels[0]), labels[0]) if schema is None else schema
    scalars = [check_aggregation_weight(a, label) for a, label in zip(aggregation_weights, labels, strict=True)]
    rows = [dict(item) for item in batch] if plain else []
    table = Table(schema, len(batch)) if plain else None
    if table is None or not table.gather(rows, 1):  # the usual case is soon told
        table = None
        rows = [check_weights(item, schema, label, scan=False) for item, label in zip(batch, labels, strict=True)]
    return schema, list(zip(labels, rows, scalars, strict=True)), table


def _refuse_non_finite(results: WeightDict, checked: Rows) -> dict[str, npt.NDArray[np.bool_]]:
    """Refuses NaN and infinity in the inputs of variables with a sum that is not finite.

    Returns:
        If the inputs are finite, and so a sum overflowed: which elements of which variables look like it.
    """
    doubtful = {}
    for name, result in results.items():
        for contributor, weights, _ in checked:
            check_finite({name: weights[name]}, contributor)
        # Kernels hold a mean within the range of float64, so there the largest value may hide an infinity.
        doubtful[name] = ~np.isfinite(result)
        if result.dtype == np.float64:
            doubtful[name] |= np.abs(result) == np.finfo(np.float64).max
    return doubtful


def _exact_average(
    kernel: Kernel, schema: Schema, checked: Rows, columns: Mapping[str, Sequence[Array]], results: WeightDict
) -> None:
    for row, (contributor, weights, a) in enumerate(checked):
        flags = kernel.not_finite([column[row] for column in columns.values()])
        check_finite({name: weights[name] for name, flag in zip(schema, flags, strict=True) if flag}, contributor)
        check_domain(weights, a, contributor)
    try:
        _exact_means(kernel, columns, [a for _, _, a in checked], results)
    except DigitsError:  # a value has changed since: what copies hold, nobody else can change
        checked = [(who, {name: array.copy() for name, array in weights.items()}, a) for who, weights, a in checked]
        _exact_average(kernel, schema, checked, dict(Columns(schema, [weights for _, weights, _ in checked])), results)


def _exact_means(
    kernel: Kernel, columns: Mapping[str, Sequence[Array]], aggregation_weights: Sequence[float], results: WeightDict
) -> None:
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
