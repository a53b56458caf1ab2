"""Keeps the best of the models that the clients received, by the clients' own validation metrics."""

import logging
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from fed_learn.contribution import FINAL_MODEL, INITIAL_VALIDATION_METRIC, BestModel, Contribution, ValidationResult
from fed_learn.handlers.handler import Handler
from fed_learn.handlers.scoring import check_mode, is_better
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.weights import FrozenWeights

logger = logging.getLogger(__name__)

SELECTION_METRIC = "selection"
"""The name under which the score of each round is published."""


class ModelSelectionHandler(Handler):
    """Selects the best global model by what the clients measured on it before they trained.

    At BEFORE_AGGREGATION the model that the clients received this round scores `Σ m·n·w / Σ n·w` over the accepted
    contributions: m their validation metric, n their `n_iter` if `weigh_by_local_iter` (else 1), w this handler's
    `aggregation_weights.get(contributor, 1.0)`. A contribution without a finite m, or without n where it is needed,
    is left out and logged. After the last round the final model is scored in the same way from the clients'
    validation results, so the best is never one round late. The best is bound to `ContextKey.BEST_RECEIVED`; the
    score of each round is published as the metric `"selection"`.

    Args:
        weigh_by_local_iter: Weigh clients by their local iterations.
        validation_metric_name: Name of the metric in the contributions.
        aggregation_weights: Contributor → w; those that are not named count 1.
        mode: `"max"`, or `"min"` for losses.
        min_delta: By how much a score must be better to win.
        best_key: Where the best model is bound; give a second handler in one job another key.

    Raises:
        ValueError: For another `mode`, a bad `min_delta` or a negative or non-finite weight.

    Warns:
        UserWarning: The metric's name looks like a loss under `mode="max"`.

    Example:
        >>> import numpy as np, fed_learn as fl
        >>> handler = ModelSelectionHandler()
        >>> ctx = fl.FLContext({fl.ContextKey.ROUND: 0}, model=fl.ModelData({"w": np.zeros(2)}))
        >>> ctx[fl.ContextKey.CONTRIBUTIONS] = tuple(
        ...     fl.Contribution(name, None, 1, metrics={"initial_validation_metric": m})
        ...     for name, m in [("site-1", 0.5), ("site-2", 0.7)])
        >>> fl.fire_event(fl.EventType.BEFORE_AGGREGATION, [handler], ctx)
        >>> ctx[fl.ContextKey.BEST_RECEIVED].round, round(ctx[fl.ContextKey.BEST_RECEIVED].metric, 6)
        (0, 0.6)
    """

    def __init__(
        self,
        weigh_by_local_iter: bool = False,
        validation_metric_name: str = INITIAL_VALIDATION_METRIC,
        # Read-only, so instances cannot share a change; each makes its own dict of it.
        aggregation_weights: Mapping[str, float] = MappingProxyType({"1": 1.0, "2": 1.0}),
        *,
        mode: str = "max",
        min_delta: float = 0.0,
        best_key: str = ContextKey.BEST_RECEIVED,
    ) -> None:
        check_mode(mode, min_delta, validation_metric_name)
        self.weigh_by_local_iter = weigh_by_local_iter
        self.validation_metric_name = validation_metric_name
        self.aggregation_weights = dict(aggregation_weights or {})
        self.mode = mode
        self.min_delta = min_delta
        self.best_key = best_key
        self._before_final: BestModel | None = None
        self._final_scored = False
        for contributor, weight in self.aggregation_weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"aggregation weight of {contributor!r} must be finite and not negative, is {weight}")

    def startup(self, fl_ctx: FLContext) -> None:
        """A job begins: forgets the best of an earlier one."""
        fl_ctx.pop(self.best_key, None)
        self._before_final, self._final_scored = None, False

    def rollback(self, fl_ctx: FLContext) -> None:
        """Nothing to undo: what matters is in the context."""

    def before_aggregation(self, fl_ctx: FLContext) -> None:
        """Scores the model that the clients received this round."""
        self._select(fl_ctx, fl_ctx.get_prop(ContextKey.CONTRIBUTIONS, ()), fl_ctx.get_prop(self.best_key))

    def receive_validation_results(self, fl_ctx: FLContext) -> None:
        """Scores the final model from the results so far; the last client's completes the score."""
        results = fl_ctx.get_prop(ContextKey.VALIDATION_RESULTS, ())
        if not results or results[-1].model != FINAL_MODEL:
            return
        # The final model may win on one client's result and lose on all: each time it meets the best before it.
        if len(results) == 1 or not self._final_scored:
            self._before_final = fl_ctx.get_prop(self.best_key)
        self._final_scored = True
        self._select(fl_ctx, results, self._before_final, newest_only=True)

    def _select(
        self,
        ctx: FLContext,
        entries: Sequence[Contribution | ValidationResult],
        best: BestModel | None,
        newest_only: bool = False,
    ) -> None:
        metric = self._score(entries, entries[-1:] if newest_only else entries)
        if metric is None or not math.isfinite(metric):
            logger.warning("no usable %r (%s): no model is selected", self.validation_metric_name, metric)
            return
        ctx.publish_metric(SELECTION_METRIC, metric)
        if is_better(metric, best, self.mode, self.min_delta):
            model = ctx.get_model()
            if model is None or model.weights is None:
                raise ValueError("the context holds no model that could be selected")
            best = BestModel(ctx[ContextKey.ROUND], metric, self.validation_metric_name, FrozenWeights(model.weights))
        if best is not None:
            ctx.set_prop(self.best_key, best)

    def _score(
        self,
        entries: Sequence[Contribution | ValidationResult],
        warn_of: Sequence[Contribution | ValidationResult],
    ) -> float | None:
        terms: list[float] = []
        weights: list[float] = []
        for entry in entries:
            metric = _number(entry.metrics.get(self.validation_metric_name))
            n = entry.n_iter if self.weigh_by_local_iter else 1
            w = self.aggregation_weights.get(entry.contributor, 1.0)
            if metric is None or not math.isfinite(metric):
                problem = f"its {self.validation_metric_name!r} is {metric}"
            elif n is None or n <= 0:
                problem = f"its n_iter is {n}"
            else:
                terms.append(metric * n * w)
                weights.append(n * w)
                continue
            if entry in warn_of:  # the others have been warned of before
                logger.warning("%s is left out of model selection: %s", entry.contributor, problem)
        # fsum: equal scores must stay equal whatever the order of the clients.
        try:
            return math.fsum(terms) / math.fsum(weights) if any(weights) else None
        except OverflowError:
            return math.inf


def _number(value: float | None) -> float | None:
    try:
        return None if value is None else float(value)
    except OverflowError:
        return math.inf
