"""Ends a job whose best model has not improved for a while."""

from fed_learn.contribution import BestModel
from fed_learn.handlers.handler import Handler
from fed_learn.handlers.scoring import check_count
from fed_learn.handlers.server_validation import SERVER_VALIDATION_METRIC
from fed_learn.model_meta import ContextKey, FLContext


class EarlyStoppingHandler(Handler):
    """Makes the round in hand the last once the job's best model is `patience` rounds older than the last one scored.

    Put it after the handlers that select models: it decides as soon as they have scored a model, at END_AGGREGATION
    where the server validates, else at BEFORE_AGGREGATION, so that handlers that act on the last round know that this
    is the one. What counts as an improvement is their `mode` and `min_delta`.

    Args:
        patience: Rounds without a better model, at least 1.

    Raises:
        ValueError: `patience` is smaller than 1.
        TypeError: `patience` is not an int.

    Example:
        >>> import fed_learn as fl
        >>> best = fl.BestModel(2, 0.9, "accuracy", None)
        >>> ctx = fl.FLContext({fl.ContextKey.ROUND: 5, fl.ContextKey.BEST_RECEIVED: best})
        >>> fl.fire_event(fl.EventType.BEFORE_AGGREGATION, [EarlyStoppingHandler(patience=3)], ctx)
        >>> ctx[fl.ContextKey.STOP]
        'no better model than that of round 2 (accuracy 0.9) for 3 rounds'
    """

    def __init__(self, patience: int) -> None:
        check_count("patience", patience)
        self.patience = patience

    def before_aggregation(self, ctx: FLContext) -> None:
        """Decides by the model that the clients received this round."""
        if ContextKey.BEST_AGGREGATED not in ctx:
            self._decide(ctx, ctx.get_prop(ContextKey.BEST_RECEIVED))

    def after_aggregation(self, ctx: FLContext) -> None:
        """Decides by the model just aggregated, if the server validated it."""
        if SERVER_VALIDATION_METRIC in ctx.get_prop(ContextKey.METRICS, {}):
            self._decide(ctx, ctx.get_prop(ContextKey.BEST_AGGREGATED))

    def _decide(self, ctx: FLContext, best: BestModel | None) -> None:
        if best is not None and ctx[ContextKey.ROUND] - best.round >= self.patience:
            ctx.set_prop(
                ContextKey.STOP,
                f"no better model than that of round {best.round} ({best.metric_name} {best.metric:.6g}) "
                f"for {self.patience} rounds",
            )
