"""Lists of contributions, as averages take them: checked strictly against `like`, or against the first of them.

The check of a single contribution is left to `batch`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from fed_learn import kernels
from fed_learn.aggregation.batch import Checked, Terms, not_finite
from fed_learn.aggregation.exact import check_domain
from fed_learn.aggregation.plan import Parts, Plan
from fed_learn.aggregation.tensors import OpenedWeights, label_of, opened, schema_of, without_tensors
from fed_learn.contribution import Contribution, Kind, check_aggregation_weight, listed_weights
from fed_learn.errors import AggregationWeightError, EmptyAggregationError, KindError, RoundError, WeightsTypeError
from fed_learn.kernels.memory import Table
from fed_learn.values import whole_number_of
from fed_learn.weights import PLAIN, Array, Schema, WeightDict, as_weight_dict, finite_elements, same_values


def checked_batch(
    batch: Sequence[Any],
    aggregation_weights: Sequence[float] | None,
    like: WeightDict | None,
    device: str | None = None,
    plan: Plan | None = None,
) -> tuple[Schema, list[Checked], Table | None]:
    """Checks a batch, strictly. Whether values are finite is not checked: the sums show that.

    Args:
        batch: Weight dicts, or `Contribution`s of one kind and round.
        aggregation_weights: One number ≥ 0 per weight dict; None: they count equally.
        like: Sets names, shapes and dtypes; None: the first one does.
        device: Where to move weights that lie elsewhere; None: they stay where they are.
        plan: Which variables are not averaged, that `like` is without; None: all are.

    Returns:
        The schema of what is averaged; the contributions in the order in which they are summed: by name, or as listed
        where they are bare weight dicts; and the addresses of their arrays, if the check has found them.

    Raises:
        ContributionError: Something is wrong with one of them.
        EmptyAggregationError: There are none.
    """
    if not batch:
        raise EmptyAggregationError("no contributions to average")
    if plan is not None:
        return _checked_apart(batch, aggregation_weights, like, device, plan)
    schema = None if like is None else schema_of(like, "like")
    if not all(isinstance(item, Contribution) for item in batch):
        return _checked_weight_dicts(batch, aggregation_weights, schema, device)
    if aggregation_weights is not None:
        raise AggregationWeightError(
            "aggregation_weights= is for bare weight dicts; Contributions bring their own", value=aggregation_weights
        )
    return *_checked_contributions(batch, schema, device), None


def _checked_apart(
    batch: Sequence[Any],
    aggregation_weights: Sequence[float] | None,
    like: WeightDict | None,
    device: str | None,
    plan: Plan,
) -> tuple[Schema, list[Checked], Table | None]:
    """The same with what is not averaged beside the rest of each contribution."""
    averaged: list[Any] = []
    parts: dict[int | str, Parts | None] = {}
    for label, item in zip(_labels(len(batch)), batch, strict=True):
        if isinstance(item, Contribution):
            given, apart = plan.apply(item.weights, label_of(item.contributor))
            averaged.append(item.settled(weights=given))
            parts[id(averaged[-1])] = apart
        else:
            given, parts[label] = plan.apply(item, label)
            averaged.append(given)
    schema, rows, table = checked_batch(averaged, aggregation_weights, like, device)
    own = [parts[row.contributor if row.contribution is None else id(row.contribution)] for row in rows]
    return schema, [replace(row, apart=apart) for row, apart in zip(rows, own, strict=True)], table


def _checked_contributions(
    batch: Sequence[Contribution], schema: Schema | None, device: str | None
) -> tuple[Schema, list[Checked]]:
    """The schema, and the contributions in the order of their names."""
    rounds: Counter[Any] = Counter(number for c in batch if (number := whole_number_of(c.round)) is not None)
    kinds: Counter[Any] = Counter(c.kind for c in batch if isinstance(c.kind, Kind))
    # Of equally common rounds the newer is taken, since late contributions are common; of kinds that of the first.
    number = max(rounds, key=lambda number: (rounds[number], number), default=None)
    kind = max(kinds, key=kinds.__getitem__, default=None)
    terms = Terms(schema, kind, number, device=device)
    rows: dict[str, Checked] = {}
    for contribution in batch:
        try:
            row = terms.check(contribution, rows)
        except (RoundError, KindError) as error:
            of_round = isinstance(error, RoundError)
            stated, counts = (whole_number_of(contribution.round), rounds) if of_round else (contribution.kind, kinds)
            if isinstance(stated, int | Kind) and counts[stated] == max(counts.values(), default=1):
                error.args = (f"{error} (as many contributions of this call state it as state the expected one)",)
            raise
        if terms.schema is None:
            terms = replace(terms, schema=Schema.of(row.arrays))
        rows[row.contributor] = row
    assert terms.schema is not None
    return terms.schema, [rows[contributor] for contributor in sorted(rows)]


def _checked_weight_dicts(
    batch: Sequence[Any], aggregation_weights: Sequence[float] | None, schema: Schema | None, device: str | None
) -> tuple[Schema, list[Checked], Table | None]:
    """The schema, the weight dicts in the order of the list, and the addresses of their arrays."""
    numbers = listed_weights(aggregation_weights, len(batch))
    labels = _labels(len(batch))
    plain = {*map(type, batch)} <= {*PLAIN}
    for label, item in () if plain else zip(labels, batch, strict=True):
        if isinstance(item, Contribution):
            raise WeightsTypeError(f"{label} is a Contribution among bare weight dicts", contributor=label)
    if schema is None:
        schema = Schema.of(as_weight_dict(opened(batch[0], labels[0]).weights, labels[0]), labels[0])
    scalars = list(map(check_aggregation_weight, numbers, labels))
    if plain and device is None:  # the usual case, checked in one pass
        own, table = [dict(item) for item in batch], Table(schema, len(batch))
        if table.gather(own, 1):
            nothing: dict[str, Any] = {}
            held = [OpenedWeights(weights, nothing, nothing) for weights in own]
            return schema, list(map(Checked, labels, scalars, held)), table
    terms = Terms(schema, device=device)
    return schema, [terms.check_weights(*row) for row in zip(batch, scalars, labels, strict=True)], None


@lru_cache(maxsize=1)
def _labels(count: int) -> tuple[str, ...]:
    """What bare weight dicts are called in errors."""
    return tuple(f"contributions[{i}]" for i in range(count))


def scanned(row: Checked, kernel: str | None = None, *, exact: bool = False) -> Checked:
    """The same contribution, once there is no NaN and no infinity in it.

    Args:
        row: What may hold them.
        kernel: Name of the kernel that looks for them; None: the current one.
        exact: Whether values have to lie in the domain of exact sums.

    Raises:
        NonFiniteError: Says which value of which variable is not finite.
        ExactDomainError: With `exact`, a value or weight is outside of the domain.
    """
    on_host = row.on_host()
    for name in on_host.held.not_finite(kernels.resolve(kernel)):
        raise not_finite(name, on_host.arrays[name], row.contributor)
    if exact:
        check_domain(on_host.arrays, row.aggregation_weight or 1.0, row.contributor)
    return replace(row, scanned=True)


def masks_of(rows: Sequence[Checked], like: WeightDict | None) -> dict[str, Array] | None:
    """Variables with values that are not finite, all of them the same in all contributions: masks of −inf.

    NaN, which is what a training that has failed leaves too, has to be in the global model as well; and so has all of a
    single contribution.

    Args:
        rows: Contributions to differ in nothing.
        like: The global model, as far as it is known and has values.

    Returns:
        By name what holds them; None: some are not the same.
    """
    found: dict[str, Array] = {}
    kernel = kernels.resolve()
    flagged = {name: None for row in rows for name in row.on_host().held.not_finite(kernel)}
    for name in flagged:
        arrays = [row.only([name]).on_host().arrays[name] for row in rows]
        base, place = arrays[0], ~finite_elements(arrays[0])
        known = None if like is None or name not in like else without_tensors({name: like[name]}, "like")[name]
        sure = isinstance(known, np.ndarray) and known.shape == base.shape
        with np.errstate(invalid="ignore"):  # of signalling NaNs
            doubtful = len(rows) == 1 or bool(np.isnan(base).any())
        if doubtful and not (sure and same_values(np.asarray(known)[place], base[place])):
            return None
        for array in arrays[1:]:
            if not np.array_equal(~finite_elements(array), place) or not same_values(array[place], base[place]):
                return None
        found[name] = base
    return found or None
