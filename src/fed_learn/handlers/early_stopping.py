"""Ends a job whose best model has not improved for a while."""

import logging
from collections.abc import Sequence
from typing import Any

from fed_learn.arguments import check_count
from fed_learn.contribution import BestModel, Contribution
from fed_learn.errors import MetricError
from fed_learn.handlers.handler import ServerHandler
from fed_learn.handlers.model_selection import SELECTION_METRIC, ModelSelectionHandler, by_likeness
from fed_learn.handlers.server_validation import SERVER_VALIDATION_METRIC
from fed_learn.model_meta import ContextKey, FLContext

logger = logging.getLogger(__name__)

WATCHED = (ContextKey.BEST_RECEIVED, ContextKey.BEST_AGGREGATED)


class EarlyStoppingHandler(ServerHandler):
    """Makes the round in hand the last once the job's best model is `patience` rounds older than the last one scored.

    Put it after the handlers that select models: it decides as soon as they have scored a model, at END_AGGREGATION
    where the server validates, else at BEFORE_AGGREGATION, so that handlers that act on the last round know that this
    is the one. What counts as an improvement is their `mode` and `min_delta`.

    Args:
        patience: Rounds without a better model, at least 1.

    Raises:
        ValueError: `patience` is smaller than 1; or, at STARTUP, nothing before it in the list selects models. Before
            those that do, it would decide by the scores of the round before, and stop a job that improves.
        TypeError: `patience` is not an int.
        MetricError: After the first round that was aggregated, where handlers of one's own might have selected models,
            and none did.

    Example:
        >>> import fed_learn as fl
        >>> best = fl.BestModel(2, 0.9, "accuracy", None)
        >>> ctx = fl.FLContext({fl.ContextKey.ROUND: 5, fl.ContextKey.BEST_RECEIVED: best})
        >>> fl.fire_event(fl.EventType.BEFORE_AGGREGATION, [EarlyStoppingHandler(patience=3)], ctx)
        >>> ctx[fl.ContextKey.STOP]
        'no better model than that of round 3 (accuracy 0.9) for 3 rounds'
    """

    def __init__(self, patience: int) -> None:
        self.patience = check_count("patience", patience)
        self._unsure = False  # whether anything selects models is yet to be seen

    def startup(self, ctx: FLContext) -> None:
        """A job begins: looks for what selects models in it."""
        super().startup(ctx)
        self._unsure = False
        if ContextKey.HANDLERS not in ctx:
            return
        handlers = ctx[ContextKey.HANDLERS]
        place = next((i for i, handler in enumerate(handlers) if handler is self), len(handlers))
        before, after = handlers[:place], handlers[place + 1 :]
        aggregator = ctx.get_prop(ContextKey.AGGREGATOR)
        if any(map(_selects, before)) and not any(map(_selects, after)):
            return
        if any(map(_selects, after)):
            late = next(type(handler).__name__ for handler in after if _selects(handler))
            raise ValueError(
                f"EarlyStoppingHandler comes before {late}, and would decide by the scores of the round before: put it "
                "after the handlers that select models"
            )
        if not any(map(_is_foreign, before)) and not (aggregator is not None and _is_foreign(aggregator)):
            raise ValueError(
                "EarlyStoppingHandler can have no effect: nothing before it in the handlers selects models; add "
                "ModelSelectionHandler() or ServerValidationHandler(evaluator, num_rounds_per_valid=1), with the "
                "best_key that they have by themselves, before it"
            )
        self._unsure = True

    def before_aggregation(self, ctx: FLContext) -> None:
        """Decides by the model that the clients received this round."""
        scores = ctx.get_prop(ContextKey.METRICS, {})
        silent = any(map(_publishes, ctx.get_prop(ContextKey.HANDLERS, ()))) and SELECTION_METRIC not in scores
        if ContextKey.BEST_AGGREGATED not in ctx and not silent:  # a round without a score says nothing
            self._decide(ctx, ctx.get_prop(ContextKey.BEST_RECEIVED))

    def after_aggregation(self, ctx: FLContext) -> None:
        """Decides by the model just aggregated, if the server validated it."""
        if SERVER_VALIDATION_METRIC in ctx.get_prop(ContextKey.METRICS, {}):
            self._decide(ctx, ctx.get_prop(ContextKey.BEST_AGGREGATED))

    def end_round(self, ctx: FLContext) -> None:
        """After the first round that was aggregated: refuses a job in which nothing selects models after all."""
        report = ctx.get_prop(ContextKey.REPORT)
        if not self._unsure or report is None or report.error is not None or not report.accepted:
            return
        self._unsure = False
        if ctx.best_model is not None or ctx.get_prop(ContextKey.SCORES_LATE, False):
            return
        contributions: Sequence[Contribution] = ctx.get_prop(ContextKey.CONTRIBUTIONS, ())
        sent = by_likeness("initial_validation_metric", {name for c in contributions for name in c.metrics})
        text = (
            f"EarlyStoppingHandler can have no effect: no handler bound a best model in round {report.round + 1}; the "
            f"clients sent {sent}: add ModelSelectionHandler(validation_metric_name=...) before it"
        )
        if not ctx.get_prop(ContextKey.METRICS):
            raise MetricError(text, metric=None)
        logger.warning("%s", text)  # a score is there, and may become a best model later

    def get_state(self) -> dict[str, Any]:
        """Whether anything selects models is yet to be seen; patience is counted from the best model's round."""
        return {"unsure": self._unsure}

    def set_state(self, state: Any) -> None:
        """Goes on with it."""
        self._unsure = self._unsure and state["unsure"]

    def _decide(self, ctx: FLContext, best: BestModel | None) -> None:
        if best is not None and ctx[ContextKey.ROUND] - best.round >= self.patience:
            ctx.set_prop(
                ContextKey.STOP,
                f"no better model than that of round {best.round + 1} ({best.metric_name} {best.metric:.6g}) "
                f"for {self.patience} round{'s' * (self.patience != 1)}",
            )


def _selects(handler: object) -> bool:
    """Whether it is known to bind a best model where this handler looks."""
    return getattr(handler, "best_key", None) in WATCHED


def _publishes(handler: object) -> bool:
    """Whether it is known to publish the score of each round in which it has one, beside the best model."""
    return isinstance(handler, ModelSelectionHandler) and handler.best_key == ContextKey.BEST_RECEIVED


def _is_foreign(part: object) -> bool:
    """Whether it is not the library's, so that what it does is not known here."""
    return type(part).__module__.partition(".")[0] != "fed_learn"
