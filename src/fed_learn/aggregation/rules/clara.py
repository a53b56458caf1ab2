"""Aggregators by Clara Train's API as a rule: a user's own code makes the new global model from differences."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fed_learn import kernels
from fed_learn.aggregation.rules.base import Given, Rule
from fed_learn.contribution import BestModel, Contribution, Kind
from fed_learn.errors import AggregatorError, EmptyAggregationError, FedLearnError, described, text_of
from fed_learn.model_meta import ContextKey, FLContext, ModelData
from fed_learn.numproto import model_to_weights, weights_to_model
from fed_learn.weights import FrozenWeights, Schema, WeightDict

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


class ClaraRule(Rule):
    """A rule by which an aggregator makes the new global model from the differences.

    Args:
        aggregator: Has a method `process`, as `Aggregator` has.

    Raises:
        TypeError: The aggregator has no such method, or is a class.
    """

    name = "clara"
    makes_model = True
    _of_this_package = True

    def __init__(self, aggregator: Any) -> None:
        self.aggregator = check_aggregator(aggregator)

    def check_settings(self, *, kind: Kind, partial: str, exact: bool, stream: bool) -> None:
        """Refuses all but whole differences."""
        if kind is not Kind.DIFF:
            raise ValueError("an aggregator works on differences: pass kind=Kind.DIFF, to the clients too")
        if exact or stream:
            raise ValueError("exact and stream belong to the weighted mean, which an aggregator replaces")
        if partial == "average":
            raise ValueError("partial='average' belongs to the weighted mean, which an aggregator replaces")

    def check(self, contribution: Contribution) -> None:
        """Refuses what the aggregator itself refuses."""
        if isinstance(self.aggregator, Aggregator):
            self.aggregator.check(contribution)

    def combine(self, given: Given) -> WeightDict:
        """The new global model.

        Raises:
            AggregatorError: The aggregator failed, or made no model.
        """
        weights, ctx = given.model, given.ctx
        if weights is None or ctx is None:
            raise AggregatorError("an aggregator makes the new global model of a job, and needs its model and context")
        with kernels.use(kernels.resolve(given.kernel).name):
            whole = [row.completed(weights) for row in given.rows]
            return run_aggregator(self.aggregator, whole, weights, ctx)


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
        raise TypeError(f"{aggregator!r} is no aggregator: derive from fed_learn.server.model_aggregator.Aggregator")
    return aggregator


def run_aggregator(
    aggregator: Any, contributions: Sequence[Contribution], weights: FrozenWeights, ctx: FLContext
) -> FrozenWeights:
    """The global model that an aggregator makes of differences. The differences are not copied.

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
