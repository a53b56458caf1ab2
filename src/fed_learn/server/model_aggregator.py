"""Aggregators by Clara Train's API: the base of a user's own, `ModelAggregator`, and how a server runs one."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fed_learn.aggregation import weighted_average
from fed_learn.aggregation.differences import add_difference
from fed_learn.contribution import BestModel, Contribution, Kind, check_aggregation_weight, check_factor
from fed_learn.errors import AggregatorError, EmptyAggregationError, FedLearnError, MetricError, described, text_of
from fed_learn.model_meta import ContextKey, FLContext, ModelData
from fed_learn.numproto import model_arrays, model_to_weights, to_dtypes, weights_to_model
from fed_learn.weights import FrozenDict, FrozenWeights, Schema, WeightDict

logger = logging.getLogger(__name__)

CALLED_BEST = "called_best_by_aggregator"
"""`BestModel.metric_name` of a model that an aggregator called the best so far; the metric counts how often it did."""


class Aggregator(ABC):
    """Makes the next global model from the contributions; a server's `aggregator=`.

    Example:
        >>> import numpy as np
        >>> from fed_learn.numproto import ndarray_to_proto, proto_to_ndarray
        >>> class Median(Aggregator):
        ...     def process(self, accumulator, fl_ctx):
        ...         model = fl_ctx.get_model()
        ...         for name in model.params:
        ...             diffs = [proto_to_ndarray(item.get_model().params[name]) for item in accumulator]
        ...             new = proto_to_ndarray(model.params[name]) + np.median(diffs, axis=0)
        ...             model.params[name].CopyFrom(ndarray_to_proto(new))
        ...         return False
        >>> base = FrozenWeights({"w": np.zeros(1)})
        >>> sent = [Contribution(f"site-{x}", {"w": np.array([x])}, 1, kind="diff") for x in (1.0, 2.0, 9.0)]
        >>> run_aggregator(Median(), sent, base, FLContext())["w"]
        array([2.])
    """

    def check(self, contribution: Contribution) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuses a contribution that this aggregator could not use, before it counts; here none.

        Raises:
            ContributionError: Says who and why.
        """

    @abstractmethod
    def process(self, accumulator: list[FLContext], fl_ctx: FLContext) -> bool:
        """Aggregates.

        Args:
            accumulator: A context per contribution, in the order of the contributors' names: `get_model().params` has
                the differences to the global model, `get_prop("_contribution")` the contribution, with `n_iter` and
                `client.uid`.
            fl_ctx: The server's context. `get_model().params` has the global model, as messages of
                `fed_learn.protos.federated_pb2`: change it with `CopyFrom`, or set another model.

        Returns:
            True: the new model is the best so far.
        """


class ModelAggregator(Aggregator):
    """Adds the mean of the differences to the global model, each weighed by its iterations.

    The weight of a contribution is `n_iter` times that of its contributor; the arithmetic that of
    `fed_learn.weighted_average`.

    Args:
        exclude_vars: A regular expression; variables with a match anywhere in their names stay as they are.
        aggregation_weights: Contributor → factor, positive; 1 where there is none.
        exact: Average with exact sums.

    Raises:
        ValueError: `exclude_vars` is no regular expression, or a factor is not positive and finite.
    """

    def __init__(
        self,
        exclude_vars: str | None = None,
        aggregation_weights: Mapping[str, float] | None = None,
        *,
        exact: bool = False,
    ) -> None:
        try:
            self._excluded = re.compile(exclude_vars) if exclude_vars else None
        except re.error as error:
            raise ValueError(f"exclude_vars {exclude_vars!r} is no regular expression: {error}") from error
        for contributor, factor in (aggregation_weights or {}).items():
            check_factor(factor, contributor)
        self.exclude_vars = exclude_vars
        self.aggregation_weights = FrozenDict(aggregation_weights or {})
        self.exact = exact

    def check(self, contribution: Contribution) -> None:
        """Refuses one without `n_iter`.

        Raises:
            MetricError: By it contributions are weighed.
        """
        who, n_iter = contribution.contributor, contribution.n_iter
        if n_iter is None or n_iter < 0:
            problem = "no n_iter" if n_iter is None else f"n_iter is {n_iter}"
            raise MetricError(f"{who}: {problem}, by which contributions are weighed", contributor=who, metric="n_iter")

    def process(self, accumulator: list[FLContext], fl_ctx: FLContext) -> bool:
        """Aggregates; never calls a model the best.

        Raises:
            MetricError: A contribution has no `n_iter`.
            ContributionError: One is bad in another way, or the new model leaves the range of a dtype.
            EmptyAggregationError: `exclude_vars` leaves nothing to aggregate.
        """
        base = model_arrays(fl_ctx.get_model(), "global model")
        excluded = {name for name in base if self._excluded is not None and self._excluded.search(name)}
        averaged = {name: array for name, array in base.items() if name not in excluded}
        new = {name: array.copy() for name, array in base.items() if name in excluded}
        if not averaged:
            raise EmptyAggregationError(f"exclude_vars {self.exclude_vars!r} matches all variables of the global model")
        schema = Schema.of(averaged, "global model")
        sent = [self._weighed(item, schema) for item in accumulator]
        new |= add_difference(averaged, weighted_average(sent, like=averaged, exact=self.exact))
        fl_ctx.set_model(ModelData(FrozenWeights.adopt({name: new[name] for name in base})))
        return False

    def _weighed(self, item: FLContext, schema: Schema) -> Contribution:
        """The contribution of what is averaged in it, by the weight that it has here."""
        contribution: Contribution = item.get_prop(ContextKey.CONTRIBUTION)
        self.check(contribution)
        who = contribution.contributor
        arrays = model_arrays(item.get_model(), who)
        weights = {name: arrays[name] for name in schema if name in arrays}
        return Contribution(
            who,
            weights if schema.describes(weights) else to_dtypes(weights, schema, who),
            check_aggregation_weight(contribution.n_iter, who) * self.aggregation_weights.get(who, 1.0),
            kind=Kind.DIFF,
        )


@dataclass(frozen=True)
class Client:
    """Who sent a contribution, by Clara's name for it.

    Attributes:
        uid: The contributor.
    """

    uid: str


class ReceivedContribution(Contribution):
    """A contribution as an aggregator gets it."""

    @property
    def client(self) -> Client:
        """Who sent it."""
        return Client(self.contributor)


def check_aggregator(aggregator: object) -> Any:
    """Checks that something can aggregate.

    Raises:
        TypeError: It has no method `process`, or is a class.
    """
    if isinstance(aggregator, type) or not callable(getattr(aggregator, "process", None)):
        raise TypeError(f"{aggregator!r} is no aggregator: derive from {Aggregator.__module__}.Aggregator")
    return aggregator


def run_aggregator(
    aggregator: Any, contributions: Sequence[Contribution], weights: FrozenWeights, ctx: FLContext
) -> FrozenWeights:
    """The global model that an aggregator makes of differences; it copies none of them to do so.

    An aggregator is a transaction on the context, as handlers are: one that fails leaves no trace in it. If it calls
    its model the best so far, that is bound to `ContextKey.BEST_AGGREGATED`, unless a handler decides what is there.

    Args:
        aggregator: Has `process`.
        contributions: Of kind `DIFF`, checked.
        weights: The global model.
        ctx: The server's context.

    Raises:
        AggregatorError: It raised, left the global model untouched, or left names, shapes or values that the global
            model cannot have.
    """
    who = f"aggregator {type(aggregator).__name__}"
    accumulator = [_item(contribution, ctx) for contribution in contributions]
    before, model = ctx.snapshot(), ctx.get_model()
    ctx.set_model(_message(weights))
    try:
        is_best = bool(aggregator.process(accumulator, ctx))
        new = _frozen(ctx.get_model(), weights, who)
        ctx.set_model(model)
        ctx.check(before)
    except Exception as error:
        ctx.restore(before)
        logger.debug("%s failed", who, exc_info=error)
        raise AggregatorError(f"{who}: {_cause(error).removeprefix(f'{who}: ')}") from error
    except BaseException:
        ctx.restore(before)
        raise
    if is_best:
        _call_best(ctx, new)
    return new


def _cause(error: Exception) -> str:
    return text_of(error) if isinstance(error, FedLearnError) else described(error)


def _item(contribution: Contribution, ctx: FLContext) -> FLContext:
    values = {field.name: getattr(contribution, field.name) for field in fields(Contribution)}
    props: dict[str, Any] = {
        ContextKey.CONTRIBUTION: ReceivedContribution(**values),
        ContextKey.CONTRIBUTOR: contribution.contributor,
        ContextKey.ROUND: ctx.get_prop(ContextKey.ROUND, contribution.round),
    }
    return FLContext(props, model=_message(contribution.weights or {}))


def _message(weights: WeightDict) -> Any:
    """A message in the place of a `fed_learn.ModelData`."""
    return weights_to_model(weights)


def _frozen(model: object, before: FrozenWeights, who: str) -> FrozenWeights:
    arrays = model_to_weights(model, Schema.of(before), who)
    untouched = [np.may_share_memory(array, before[name]) for name, array in arrays.items() if array.size]
    if untouched and all(untouched):
        raise EmptyAggregationError("put no variable into the global model, so no contribution is in it")
    given = model.weights if isinstance(model, ModelData) else None
    if isinstance(given, FrozenWeights) and all(given[name] is array for name, array in arrays.items()):
        return FrozenWeights.adopt(arrays)  # nobody can change them, so they need no copy
    return FrozenWeights(arrays)


def _call_best(ctx: FLContext, weights: FrozenWeights) -> None:
    undecided = BestModel(0, 0.0, CALLED_BEST, FrozenWeights({}))
    best = ctx.get_prop(ContextKey.BEST_AGGREGATED, undecided)
    if isinstance(best, BestModel) and best.metric_name == CALLED_BEST:
        number = ctx.get_prop(ContextKey.ROUND, 0)
        ctx.set_prop(ContextKey.BEST_AGGREGATED, BestModel(number, best.metric + 1, CALLED_BEST, weights))
