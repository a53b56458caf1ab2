"""`weighted_average` and `aggregate`: what a batch of contributions makes together, by the mean or by any rule."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fed_learn import kernels
from fed_learn.aggregation.apart import Apart, assembled, copied, held_by, no_difference, part_of
from fed_learn.aggregation.batch import Checked
from fed_learn.aggregation.mean import counting, mean
from fed_learn.aggregation.plan import Plan, check_fitting, not_kept, planned
from fed_learn.aggregation.rules import Given, Rule, combined, find
from fed_learn.aggregation.strict import checked_batch, masks_of, scanned
from fed_learn.aggregation.tensors import as_tensors, device_named, label_of, opened
from fed_learn.contribution import Contribution, Kind, listed_contributions
from fed_learn.errors import EmptyAggregationError, NonFiniteError
from fed_learn.weights import Schema, WeightDict, finite_elements


def weighted_average(
    contributions: Iterable[WeightDict] | Iterable[Contribution],
    aggregation_weights: Sequence[float] | None = None,
    *,
    like: WeightDict | None = None,
    out: WeightDict | None = None,
    policies: Mapping[str, str] | None = None,
    exact: bool = False,
    kernel: str | None = None,
    device: object = None,
) -> WeightDict:
    """The mean of contributions, `Σ aₖ·xₖ / Σ aₖ` for each variable.

    Sums are kept in float64 and rounded once, to the dtype of the variable; integers and booleans half to even, and
    integers too large for that are summed exactly. The bits do not depend on the kernel, the number of threads or, for
    `Contribution`s, the order of the list: they are summed in the order of their contributors' names. Bare weight
    dicts are summed in list order.

    Weights may be tensors of torch, as `state_dict()` gives them, TensorFlow tensors and variables, or JAX arrays: see
    `fed_learn.aggregation.tensors`.

    Args:
        contributions: Weight dicts or `Contribution`s, all of one kind and round: those that most of them state; of
            equally common ones the newer round, and the kind of the first. One that states no round passes.
        aggregation_weights: One number ≥ 0 per weight dict; None: they count equally. `Contribution`s bring their own.
            What counts by 0 is checked, and adds nothing.
        like: The global model: sets names, shapes, dtypes and the order of the result, also of weights that come as a
            list of arrays (`keras.Model.get_weights()`). None: the first one does, so give it where contributions are
            not to be trusted, or the wrong one may be refused.
        out: A weight dict of the same schema to write the result to; its content is undefined after an error.
        policies: What becomes of variables by regular expressions of their names, the first that is found deciding:
            `{"bn": "local", "steps": "max"}`; see `fed_learn.policies.Policy`. All others are averaged, but for codes
            (4- and 8-bit weights, extra states, random keys), which have to be the same everywhere. `"keep"` takes the
            variable from `like`, or no difference where contributions are differences; `"local"` ones are left out.
        exact: Sum exactly, so that the bits do not depend on the list order of bare weight dicts either, and agree
            with those of `Accumulator(exact=True)`. Domain: see `fed_learn.aggregation.exact`.
        kernel: Name of the kernel; None: the current one.
        device: Where to average, `"cuda:0"` or a `torch.device`: arrays and tensors that lie elsewhere are moved there,
            and the result lies there. None: each variable stays where the first contribution has it.

    Returns:
        A new dict in the order of `like`, arrays in native byte order, or tensors where the first contribution has
        them; or `out`.

    Raises:
        ContributionError: Something is wrong with one of them; the class says what, the attributes who and where.
        EmptyAggregationError: There are no contributions, or none counts by more than 0.
        OutputError: `out` cannot be written to.
        ExactDomainError: With `exact`, a value or weight outside of the domain.
        FloatingPointEnvironmentError: The process does not compute as numbers are defined, and that would matter.
        ValueError: There is no such device here, or a policy is none, or fits no variable.

    Example:
        >>> import numpy as np
        >>> hospital_a, hospital_b = {"w": np.float32([0, 1])}, {"w": np.float32([4, 1])}
        >>> weighted_average([hospital_a, hospital_b], [300, 100])
        {'w': array([1., 1.], dtype=float32)}
    """
    if kernel is not None:
        kernels.requested(kernel)  # what is wrong with it is said before anything is looked at
    batch = listed_contributions(contributions, like)
    plan = plan_of(batch, like, policies)
    if plan is not None:
        how = find("mean")
        return _combined_by(plan, how, batch, aggregation_weights, like, out, exact, kernel, device_named(device))
    schema, rows, table = checked_batch(batch, aggregation_weights, like, device_named(device))
    first = next((k for k, row in enumerate(rows) if row.contribution is batch[0]), 0)

    def combine(given: list[Checked]) -> WeightDict:
        known = table if given is rows else None
        return mean(given, schema, out=out, exact=exact, kernel=kernel, table=known, first=given[first])

    return _but_for_masks(combine, rows, like, out)


def aggregate(
    contributions: Iterable[WeightDict] | Iterable[Contribution],
    aggregation_weights: Sequence[float] | None = None,
    *,
    rule: str | Rule = "mean",
    like: WeightDict | None = None,
    out: WeightDict | None = None,
    policies: Mapping[str, str] | None = None,
    exact: bool = False,
    kernel: str | None = None,
    device: object = None,
) -> WeightDict:
    """What a rule makes of contributions. `weighted_average` says more of all arguments but `rule`.

    Args:
        contributions: Weight dicts, or `Contribution`s.
        aggregation_weights: One number ≥ 0 per weight dict; None: they count equally.
        rule: The name of a rule, one of `fed_learn.rules.available()`, or a `fed_learn.rules.Rule`.
        like: The global model: sets names, shapes, dtypes and the order of the result. None: the first one does.
        out: A weight dict of the same schema to write the result to.
        policies: What becomes of variables by regular expressions of their names; the rule combines those that are
            `"mean"`.
        exact: Sum exactly.
        kernel: Name of the kernel; None: the current one.
        device: Where to average; None: where the weights lie.

    Returns:
        A new dict in the order of `like`, or `out`.

    Raises:
        ContributionError: Something is wrong with one of them; the class says what, the attributes who and where.
        EmptyAggregationError: There are no contributions, or none counts by more than 0.
        AggregatorError: A rule of a user's own failed.
        OutputError: `out` cannot be written to.
        ExactDomainError: With `exact`, a value or weight outside of the domain.
        ValueError: There is no such rule, it cannot sum exactly, or it makes a model by the state of a job; or no such
            device; or a policy is none, or fits no variable.

    Example:
        >>> import numpy as np
        >>> aggregate([{"w": np.float32([0, 1])}, {"w": np.float32([4, 1])}], [300, 100], rule="mean")
        {'w': array([1., 1.], dtype=float32)}
    """
    how = find(rule)
    if how.makes_model:
        raise ValueError(f"rule {how.name!r} makes the new global model of a job, and needs one")
    if kernel is not None:
        kernels.requested(kernel)
    batch = listed_contributions(contributions, like)
    plan = plan_of(batch, like, policies)
    if plan is not None:
        return _combined_by(plan, how, batch, aggregation_weights, like, out, exact, kernel, device_named(device))
    schema, rows, _ = checked_batch(batch, aggregation_weights, like, device_named(device))
    return _combined(how, rows, schema, like, out, exact, kernel)


def _combined(
    how: Rule,
    rows: list[Checked],
    schema: Schema,
    like: WeightDict | None,
    out: WeightDict | None,
    exact: bool,
    kernel: str | None,
) -> WeightDict:
    kind = next((row.contribution.kind for row in rows if row.contribution is not None), Kind.FULL)
    how.check_settings(kind=kind, partial="refuse", exact=exact, stream=False)
    for row in rows:
        if row.contribution is not None:
            how.check(row.contribution)

    def combine(given: list[Checked]) -> WeightDict:
        if not how._shows_not_finite:
            given = [scanned(row, kernel, exact=exact) for row in given]
        return combined(how, Given(counting(given), schema, exact=exact, kernel=kernel, out=out))

    return _but_for_masks(combine, rows, like, out)


def plan_of(batch: Sequence[Any], like: WeightDict | None, policies: Mapping[str, str] | None) -> Plan | None:
    """Which variables of a batch are not averaged; None: all are."""
    who, decides = "like", like
    if like is None and batch:
        first = batch[0]
        named = isinstance(first, Contribution)
        who, decides = (label_of(first.contributor), first.weights) if named else ("contributions[0]", first)
    plan = planned(policies, decides, who)
    check_fitting(policies, decides)
    return plan


def _combined_by(
    plan: Plan,
    how: Rule,
    batch: list[Any],
    aggregation_weights: Sequence[float] | None,
    like: WeightDict | None,
    out: Any,
    exact: bool,
    kernel: str | None,
    device: str | None,
) -> WeightDict:
    """What a rule makes of contributions of which some variables are not averaged."""
    averaged, _ = plan.apply(like, "like")
    schema, rows, _ = checked_batch(batch, aggregation_weights, averaged, device, plan)
    kind = next((row.contribution.kind for row in rows if row.contribution is not None), Kind.FULL)
    apart = Apart(plan, None if like is None else held_by(plan, like), kind)
    for row in rows:
        assert row.apart is not None
        plan.check_names(row.apart, row.contributor)
        apart.take(apart.check(row.apart, row.contributor), row.contributor, counts=bool(row.aggregation_weight))
    first: Any = like if like is not None else batch[0].weights if isinstance(batch[0], Contribution) else batch[0]
    order = [name for name in first if plan.of.get(name) != "local"]
    if not order:
        raise ValueError("policies: all variables are local, so nothing is left to be averaged")
    if not any(row.aggregation_weight for row in rows):
        raise EmptyAggregationError("no contribution counts by more than 0")
    kept = _kept(plan, like, rows)
    into = None if out is None else part_of(out, order, schema)
    made = _combined(how, rows, schema, averaged, into, exact, kernel) if schema else {}
    return assembled(order, made, kept | apart.values(), out)


def _kept(plan: Plan, like: Any, rows: Sequence[Checked]) -> dict[str, Any]:
    """The variables that stay as they are in the global model: its own, or no difference to them.

    Raises:
        ValueError: The global model is not given.
    """
    names = plan.names("keep")
    if not names:
        return {}
    if like is None:
        raise not_kept(names)
    kept = {name: copied(like[name]) for name in names}
    if rows[0].contribution is None or rows[0].contribution.kind is Kind.FULL:
        return kept
    return no_difference(kept)


def _but_for_masks(
    combine: Callable[[list[Checked]], WeightDict], rows: list[Checked], like: WeightDict | None, out: Any
) -> WeightDict:
    """What contributions make together, but for infinities that are the same in all of them, which stay as they are.

    Raises:
        NonFiniteError: They are not the same; or there is only one contribution, and none in `like` either.
    """
    try:
        return combine(rows)
    except NonFiniteError:
        masks = masks_of(rows, like)
        if masks is None:
            raise
    filled = []
    for row in rows:
        arrays = row.only(list(masks)).on_host().arrays
        zeros = {n: np.where(finite_elements(arrays[n]), arrays[n], arrays[n].dtype.type(0)) for n in masks}
        filled.append(replace(row, filled=zeros, scanned=False).only(list(row.arrays)))
    made = combine(filled)
    held = opened({name: made[name] for name in masks}, "mean")
    arrays = {name: np.array(array) for name, array in held.on_host().items()}
    for name, mask in masks.items():
        place = ~finite_elements(mask)
        arrays[name][place] = mask[place]
    if out is not None:
        return assembled(list(made), {}, arrays, out)
    tensors = {} if held.place is None else as_tensors({name: arrays[name] for name in held.owners}, held.place)
    return {**made, **arrays, **tensors}
