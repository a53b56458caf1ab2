"""The weighted mean of a batch of contributions."""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from fed_learn import kernels
from fed_learn.aggregation.arrays import Outputs, flat
from fed_learn.aggregation.exact import ExactSum, check_domain
from fed_learn.contribution import Contribution, check_aggregation_weight, check_contribution
from fed_learn.errors import AggregationWeightError, EmptyAggregationError, WeightsTypeError
from fed_learn.kernels.base import Float64Array, Segment
from fed_learn.weights import Array, Schema, WeightDict, as_weight_dict


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

    Sums are kept in float64 and rounded once, to the dtype of the variable; integers and booleans half to even. The
    bits do not depend on the kernel, the number of threads or, for `Contribution`s, the order of the list: they are
    summed in the order of their contributors' names. Bare weight dicts are summed in list order.

    Args:
        contributions: Weight dicts, or `Contribution`s, all of one kind and round.
        aggregation_weights: One positive number per weight dict; None: they count equally. `Contribution`s bring
            their own.
        like: The global model: sets names, shapes, dtypes and the order of the result. None: the first one does.
        out: A weight dict of the same schema to write the result to; its content is undefined after an error.
        exact: Sum exactly, so that the bits do not depend on the list order of bare weight dicts either, and agree
            with those of `Accumulator(exact=True)`. Domain: see `fed_learn.aggregation.exact`.
        kernel: Name of the kernel; None: the current one.

    Returns:
        A new dict in the order of `like`, arrays in native byte order; or `out`.

    Raises:
        ContributionError: Something is wrong with one of them; the class says what, the attributes who and where.
        EmptyAggregationError: There are no contributions.
        OutputError: `out` cannot be written to.
        ExactDomainError: With `exact`, a value or weight outside of the domain.

    Example:
        >>> hospital_a, hospital_b = {"w": np.float32([0, 1])}, {"w": np.float32([4, 1])}
        >>> weighted_average([hospital_a, hospital_b], [300, 100])
        {'w': array([1., 1.], dtype=float32)}
    """
    chosen = kernels.resolve(kernel)
    batch = list(contributions)
    if not batch:
        raise EmptyAggregationError("no contributions to average")
    schema = None if like is None else Schema.of(as_weight_dict(like, "like"), "like")
    if all(isinstance(item, Contribution) for item in batch):
        if aggregation_weights is not None:
            raise AggregationWeightError(
                "aggregation_weights= is for bare weight dicts; Contributions bring their own"
            )
        schema, weights, factors = _checked_contributions(batch, schema)  # type: ignore[arg-type]
    else:
        schema, weights, factors = _checked_weight_dicts(batch, aggregation_weights, schema)
    outputs = Outputs(schema, out, (array for one in weights for array in one.values()))
    columns = {name: [flat(one[name]) for one in weights] for name in schema}
    if exact:
        for one, factor, item in zip(weights, factors, batch, strict=True):
            check_domain(one, factor, getattr(item, "contributor", None))
        total = float(sum(map(Fraction, factors)))
        sums = [_exact_sum(column, factors) for column in columns.values()]
        chosen.divide(sums, total, list(outputs.flat().values()))
    else:
        scaled, total = _scaled(factors)
        chosen.weighted_mean(
            [Segment(column, outputs.flat()[name]) for name, column in columns.items()], scaled, total
        )
    return outputs.finish()


def _checked_contributions(
    batch: list[Contribution], schema: Schema | None
) -> tuple[Schema, list[dict[str, Array]], list[float]]:
    rounds = [c.round for c in batch if isinstance(c.round, int)]
    newest = max(rounds, default=None)
    seen: dict[str, tuple[dict[str, Array], float]] = {}
    for contribution in batch:
        weights, factor = check_contribution(
            contribution, schema, kind=batch[0].kind, round=newest, contributors=seen
        )
        schema = Schema.of(weights) if schema is None else schema
        seen[contribution.contributor] = weights, factor
    assert schema is not None
    ordered = [seen[contributor] for contributor in sorted(seen)]
    return schema, [weights for weights, _ in ordered], [factor for _, factor in ordered]


def _checked_weight_dicts(
    batch: Sequence[object], factors: Sequence[float] | None, schema: Schema | None
) -> tuple[Schema, list[dict[str, Array]], list[float]]:
    if factors is None:
        factors = [1.0] * len(batch)
    elif len(factors) != len(batch):
        raise AggregationWeightError(f"{len(factors)} aggregation weights for {len(batch)} weight dicts")
    checked: list[tuple[dict[str, Array], float]] = []
    for i, (item, factor) in enumerate(zip(batch, factors, strict=True)):
        label = f"contributions[{i}]"
        if isinstance(item, Contribution):
            raise WeightsTypeError(f"{label} is a Contribution among bare weight dicts", contributor=label)
        checked.append(check_contribution(Contribution(label, item, factor), schema))  # type: ignore[arg-type]
        schema = Schema.of(checked[0][0]) if schema is None else schema
    assert schema is not None
    return schema, [weights for weights, _ in checked], [factor for _, factor in checked]


def _scaled(factors: Sequence[float]) -> tuple[Float64Array, float]:
    """The weights times a power of two that makes their sum at most one half, and that sum.

    The scaling is exact and cancels in the division. With it no partial sum leaves float64 where the mean is finite.
    """
    exponent = math.frexp(max(factors))[1] + len(factors).bit_length() + 1
    scaled = [math.ldexp(factor, -exponent) for factor in factors]
    total = scaled[0]
    for factor in scaled[1:]:
        total += factor
    return np.array(scaled), total


def _exact_sum(column: Sequence[Array], factors: Sequence[float]) -> Float64Array:
    exact = ExactSum(column[0].size)
    for x, factor in zip(column, factors, strict=True):
        exact.add(x, factor)
    return exact.value()
