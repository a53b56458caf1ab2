"""Ends a job whose best model has not improved for a while."""

from fed_learn.handlers.handler import Handler
from fed_learn.model_meta import ContextKey, FLContext


class EarlyStoppingHandler(Handler):
    """Makes the round in hand the last once the job's best model is `patience` rounds old.

    It decides at BEFORE_AGGREGATION, so that handlers that act on the last round know that this is the one; put it
    after the handlers that select models. What counts as an improvement is their `mode` and `min_delta`.

    Args:
        patience: Rounds without a better model, at least 1.

    Raises:
        ValueError: `patience` is smaller than 1.

    Example:
        >>> import fed_learn as fl
        >>> best = fl.BestModel(2, 0.9, "accuracy", None)
        >>> ctx = fl.FLContext({fl.ContextKey.ROUND: 5, fl.ContextKey.BEST_AGGREGATED: best})
        >>> fl.fire_event(fl.EventType.BEFORE_AGGREGATION, [EarlyStoppingHandler(patience=3)], ctx)
        >>> ctx[fl.ContextKey.STOP]
        'no better model than that of round 2 (accuracy 0.9) for 3 rounds'
    """

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, not {patience}")
        self.patience = patience

    def before_aggregation(self, ctx: FLContext) -> None:
        """Asks for the end when the best model is old."""
        best = ctx.best_model
        if best is not None and ctx[ContextKey.ROUND] - best.round >= self.patience:
            ctx.set_prop(
                ContextKey.STOP,
                f"no better model than that of round {best.round} ({best.metric_name} {best.metric:.6g}) "
                f"for {self.patience} rounds",
            )
