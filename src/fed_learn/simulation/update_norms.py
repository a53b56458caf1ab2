"""How far each client moves the global model, round by round."""

import re

import numpy as np

from fed_learn.contribution import Kind
from fed_learn.handlers.handler import ServerHandler
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.ties import once, twins

PREFIX = "update_norm/"
STATISTICS = r"(running|moving)_|num_batches_tracked|seed_generator"


class UpdateNormHandler(ServerHandler):
    """Publishes for each contribution its distance to the global model it started from, ‖contribution − global‖₂.

    Runs at BEFORE_AGGREGATION; the metric is `update_norm/<contributor>`. Only floating variables count, and one with
    several names counts once, where the contribution holds one array for all of them (see `fed_learn.ties`). Put it
    before the handlers that write metrics down.

    Args:
        without: A regular expression: variables in whose names it is found do not count. The default leaves out what is
            not trained: the running statistics of normalizations.

    Example:
        >>> from fed_learn import Contribution, ModelData
        >>> ctx = FLContext(model=ModelData({"w": np.zeros(2)}))
        >>> ctx.set_prop(ContextKey.CONTRIBUTIONS, (Contribution("site-1", {"w": np.array([3.0, 4.0])}, 1),))
        >>> UpdateNormHandler().before_aggregation(ctx)
        >>> dict(ctx[ContextKey.METRICS])
        {'update_norm/site-1': 5.0}
    """

    def __init__(self, without: str = STATISTICS) -> None:
        self.without = without
        re.compile(without)

    def before_aggregation(self, ctx: FLContext) -> None:
        """Measures the contributions of the round. One whose weights are gone is left out."""
        received = ctx.model.weights if ctx.model is not None else None
        for contribution in ctx[ContextKey.CONTRIBUTIONS]:
            if contribution.weights is None or received is None:
                continue
            total, tied = 0.0, twins(contribution.weights)
            for name, array in once(contribution.weights, tied).items():
                if array.dtype.kind in "biu" or re.search(self.without, name):
                    continue
                moved = array.astype(np.float64)
                if contribution.kind is not Kind.DIFF:
                    moved -= received[name].astype(np.float64)
                total += float(np.vdot(moved, moved))
            ctx.publish_metric(PREFIX + contribution.contributor, total**0.5)
