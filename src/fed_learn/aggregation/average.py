"""`weighted_average` and `aggregate`: what a batch of contributions makes together, by the mean or by any rule."""

from collections.abc import Iterable, Sequence

from fed_learn import kernels
from fed_learn.aggregation.batch import checked_batch, scanned
from fed_learn.aggregation.mean import counting, mean
from fed_learn.aggregation.rules import Given, Rule, combined, find
from fed_learn.aggregation.tensors import device_named
from fed_learn.contribution import Contribution, Kind
from fed_learn.weights import WeightDict


def weighted_average(
    contributions: Iterable[WeightDict] | Iterable[Contribution],
    aggregation_weights: Sequence[float] | None = None,
    *,
    like: WeightDict | None = None,
    out: WeightDict | None = None,
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
        ValueError: There is no such device here.

    Example:
        >>> import numpy as np
        >>> hospital_a, hospital_b = {"w": np.float32([0, 1])}, {"w": np.float32([4, 1])}
        >>> weighted_average([hospital_a, hospital_b], [300, 100])
        {'w': array([1., 1.], dtype=float32)}
    """
    if kernel is not None:
        kernels.requested(kernel)  # what is wrong with it is said before anything is looked at
    batch = list(contributions)
    schema, rows, table = checked_batch(batch, aggregation_weights, like, device_named(device))
    first = next((row for row in rows if row.contribution is batch[0]), rows[0])
    return mean(rows, schema, out=out, exact=exact, kernel=kernel, table=table, first=first)


def aggregate(
    contributions: Iterable[WeightDict] | Iterable[Contribution],
    aggregation_weights: Sequence[float] | None = None,
    *,
    rule: str | Rule = "mean",
    like: WeightDict | None = None,
    out: WeightDict | None = None,
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
            device.

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
    schema, rows, _ = checked_batch(list(contributions), aggregation_weights, like, device_named(device))
    kind = next((row.contribution.kind for row in rows if row.contribution is not None), Kind.FULL)
    how.check_settings(kind=kind, partial="refuse", exact=exact, stream=False)
    if not how._shows_not_finite:
        rows = [scanned(row, kernel, exact=exact) for row in rows]
    for row in rows:
        if row.contribution is not None:
            how.check(row.contribution)
    return combined(how, Given(counting(rows), schema, exact=exact, kernel=kernel, out=out))
