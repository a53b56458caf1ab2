"""An aggregator by Clara Train 3.1's API, named in `config_fed_server.json`: a mean on a leash."""

from typing import Any

import numpy as np

from fed_learn.model_meta import FLContext
from fed_learn.numproto import ndarray_to_proto, proto_to_ndarray
from fed_learn.server.model_aggregator import Aggregator


class TrustRegionAggregator(Aggregator):
    """Adds the mean of the differences, weighed by iterations, but moves no variable further than `radius` a round.

    Args:
        radius: The largest Euclidean norm of a variable's step.
    """

    def __init__(self, radius: float = 1.0) -> None:
        self.radius = radius

    def process(self, accumulator: list[FLContext], fl_ctx: FLContext) -> bool:
        """Changes the model in `fl_ctx`; calls none the best."""
        model: Any = fl_ctx.get_model()
        models: list[Any] = [item.get_model() for item in accumulator]
        iterations = [float(item.get_prop("_contribution").n_iter) for item in accumulator]
        for name in model.params:
            diffs = [proto_to_ndarray(sent.params[name]) for sent in models]
            step = np.average(np.array(diffs, np.float64), axis=0, weights=iterations)
            length = np.linalg.norm(step)
            if length > self.radius:
                step *= self.radius / length
            model.params[name].CopyFrom(ndarray_to_proto(proto_to_ndarray(model.params[name]) + step))
        return False
