"""Aggregators and small jobs that the tests of Clara Train's API share."""

from collections.abc import Callable
from typing import Any

import numpy as np
from federation import AddingLearner, clients_of, initial_weights

import fed_learn as fl
from fed_learn.model_meta import FLContext
from fed_learn.numproto import ndarray_to_proto, proto_to_ndarray
from fed_learn.protos.federated_pb2 import ModelData
from fed_learn.server.model_aggregator import Aggregator, ModelAggregator


class CustomModelAggregator(Aggregator):
    """As the documentation of Clara Train describes one: the mean of the differences, weighed by local iterations."""

    def process(self, accumulator: list[FLContext], fl_ctx: FLContext) -> bool:
        model: Any = fl_ctx.get_model()
        names = set.union(*[set(params_of(item)) for item in accumulator])
        for name in names:
            weights, terms = [], []
            for item in accumulator:
                sent: Any = item.get_model()
                if name not in sent.params:
                    continue
                weights.append(np.float64(item.get_prop("_contribution").n_iter))
                terms.append(proto_to_ndarray(sent.params[name]) * weights[-1])
            new = np.sum(terms, axis=0) / np.sum(weights)
            new += proto_to_ndarray(model.params[name])
            model.params[name].CopyFrom(ndarray_to_proto(new))
        return False


class Doing(Aggregator):
    """Averages by hand, then does as it is told in the rounds that `rounds` names."""

    def __init__(self, then: Callable[[list[FLContext], Any], Any], rounds: tuple[int, ...] = (0, 1, 2)) -> None:
        self.then = then
        self.rounds = rounds

    def process(self, accumulator: list[FLContext], fl_ctx: FLContext) -> bool:
        ModelAggregator().process(accumulator, fl_ctx)
        params = {name: ndarray_to_proto(a) for name, a in params_of(fl_ctx).items()}
        fl_ctx.model = ModelData(params)  # type: ignore[assignment]
        if fl_ctx.get_prop(fl.ContextKey.ROUND) in self.rounds:
            return bool(self.then(accumulator, fl_ctx))
        return False


def params_of(ctx: Any) -> Any:
    """The messages of the model in a context."""
    return ctx.get_model().params


def server_with(aggregator: Any, num_rounds: int = 3, **arguments: Any) -> fl.FederatedServer:
    weights = arguments.pop("weights", initial_weights())
    return fl.FederatedServer(weights, num_rounds=num_rounds, kind=fl.Kind.DIFF, aggregator=aggregator, **arguments)


def two_clients(**arguments: Any) -> list[fl.FederatedClient]:
    """A round adds 2.5: 1 with one iteration, 3 with three."""
    learners = {"a": AddingLearner(1, n_iter=1), "b": AddingLearner(3, aggregation_weight=3, n_iter=3)}
    return clients_of(learners, kind=fl.Kind.DIFF, **arguments)
