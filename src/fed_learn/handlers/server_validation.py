"""Keeps the best of the models that the server aggregated, by an evaluation on the server's own data."""

import inspect
import logging
import math
from typing import Any

from fed_learn.arguments import check_choice, check_count
from fed_learn.components.direction import MODES
from fed_learn.components.model_evaluator import ModelEvaluator
from fed_learn.components.returned import returned_metric
from fed_learn.contribution import BestModel
from fed_learn.durable.parts import give_back, state_of
from fed_learn.handlers.handler import ServerHandler
from fed_learn.handlers.scoring import check_best_key, check_mode, chosen_mode, is_better
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.weights import FrozenWeights

logger = logging.getLogger(__name__)

SERVER_VALIDATION_METRIC = "server_validation"
"""The name under which the score of each validated round is published."""


class ServerValidationHandler(ServerHandler):
    """Evaluates the model just aggregated every few rounds, and after the last, and keeps the best.

    Runs at END_AGGREGATION when `(round + 1) % num_rounds_per_valid == 0`, in the last round, and in the round that
    `ContextKey.STOP` made the last. The best is bound to `ContextKey.BEST_AGGREGATED`, each score published as the
    metric `"server_validation"`; of a handler with another `best_key` as `"server_validation/<best_key>"`. A score that
    is not finite never wins and is logged.

    Args:
        evaluator: What scores the model in the context. Its `evaluate` may take no argument, as in Clara Train: it then
            has to find the model by itself.
        num_rounds_per_valid: Rounds from one validation to the next, at least 1.
        mode: `"max"`, or `"min"` for losses. None: as the evaluator's `mode` declares, else as the clients do where
            they select by a metric of this name, else by the name (see `fed_learn.components.direction.mode_of`).
        min_delta: By how much a score must be better to win.
        best_key: Where the best model is bound; give a second handler in one job another key.

    Raises:
        ValueError: For another `mode`, a bad `min_delta` or a bad `num_rounds_per_valid`; at STARTUP if `mode`
            contradicts what is declared, or another handler has the same `best_key`.
        TypeError: `evaluator` has no `evaluate` and `get_metric`, or `evaluate` needs more than a context.

    Warns:
        UserWarning: The metric's name looks like a loss under `mode="max"`.
    """

    def __init__(
        self,
        evaluator: ModelEvaluator,
        num_rounds_per_valid: int,
        *,
        mode: str | None = None,
        min_delta: float = 0.0,
        best_key: str = ContextKey.BEST_AGGREGATED,
    ) -> None:
        for method in ("evaluate", "get_metric"):
            if not callable(getattr(evaluator, method, None)):
                raise TypeError(f"evaluator {type(evaluator).__name__} has no method {method}()")
        _arguments(evaluator, FLContext())
        self.evaluator = evaluator
        self.num_rounds_per_valid = check_count("num_rounds_per_valid", num_rounds_per_valid)
        self.mode = mode
        self.min_delta = min_delta
        self.best_key = best_key
        self._mode: str | None = None  # the one that is followed in this job
        self._skipped: int | None = None  # the round whose model has not been validated
        check_mode(mode, min_delta, self._metric_name)

    @property
    def _metric_name(self) -> str:
        return str(getattr(self.evaluator, "metric_name", ModelEvaluator.metric_name))

    def startup(self, fl_ctx: FLContext) -> None:
        """A job begins: no best model yet, but it is this handler that will say which."""
        super().startup(fl_ctx)
        check_best_key(self, self.best_key, fl_ctx)
        self._mode = self._chosen_mode(fl_ctx)
        fl_ctx.set_prop(self.best_key, None)
        self._skipped = None

    def rollback(self, fl_ctx: FLContext) -> None:
        """Nothing to undo: the best model is in the context."""

    def after_aggregation(self, fl_ctx: FLContext) -> None:
        """Validates the new global model when it is time to."""
        number = fl_ctx[ContextKey.ROUND]
        if self._is_last(fl_ctx) or (number + 1) % self.num_rounds_per_valid == 0:
            self._skipped = None
            self._validate(fl_ctx, number)
        else:
            self._skipped = number

    def end_round(self, fl_ctx: FLContext) -> None:
        """Validates the model that the job ends with, if nothing was aggregated in its last round."""
        if self._skipped is not None and self._is_last(fl_ctx):
            number, self._skipped = self._skipped, None
            self._validate(fl_ctx, number)

    def get_state(self) -> dict[str, Any]:
        """Which model is still to be validated, and what the evaluator needs."""
        return {"skipped": self._skipped, "evaluator": state_of(self.evaluator)}

    def set_state(self, state: Any) -> None:
        """Goes on with it."""
        self._skipped = state["skipped"]
        give_back(self.evaluator, state["evaluator"], "the state of ServerValidationHandler")

    def _chosen_mode(self, ctx: FLContext) -> str:
        declared = getattr(self.evaluator, "mode", None)
        if declared is not None:
            check_choice(f"mode of {type(self.evaluator).__name__}", declared, MODES)
        return chosen_mode(self, self._metric_name, self.mode, ctx, declared)

    def _is_last(self, ctx: FLContext) -> bool:
        stops = ctx.get_prop(ContextKey.STOP) is not None
        return stops or bool(ctx[ContextKey.ROUND] + 1 == ctx.get_prop(ContextKey.NUM_ROUNDS))

    def _validate(self, ctx: FLContext, number: int) -> None:
        self.evaluator.evaluate(*_arguments(self.evaluator, ctx))
        metric = returned_metric(self.evaluator)
        if not math.isfinite(metric):
            logger.warning("round %d: the server's %s is %s: not selected", number + 1, self._metric_name, metric)
            return
        own = self.best_key == ContextKey.BEST_AGGREGATED
        ctx.publish_metric(SERVER_VALIDATION_METRIC if own else f"{SERVER_VALIDATION_METRIC}/{self.best_key}", metric)
        if self._mode is None:  # driven by hand, without STARTUP
            self._mode = self._chosen_mode(ctx)
        if is_better(metric, ctx.get_prop(self.best_key), self._mode, self.min_delta):
            model = ctx.get_model()
            if model is None or model.weights is None:
                raise ValueError("the context holds no model that could be selected")
            best = BestModel(number, metric, self._metric_name, FrozenWeights(model.weights))
            ctx.set_prop(self.best_key, best)


def _arguments(evaluator: ModelEvaluator, ctx: FLContext) -> tuple[FLContext, ...]:
    """What its `evaluate` is called with: the context where it takes one.

    Raises:
        TypeError: It can be called neither way.
    """
    try:
        signature = inspect.signature(evaluator.evaluate)
    except ValueError:  # compiled without a signature
        return (ctx,)
    for arguments in ((ctx,), ()):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return arguments
    raise TypeError(f"evaluator {type(evaluator).__name__}: evaluate{signature} takes neither a context nor nothing")
