"""Keeps the best of the models that the clients received, by the clients' own validation metrics."""

import difflib
import heapq
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fed_learn.contribution import FINAL_MODEL, INITIAL_VALIDATION_METRIC, BestModel, Contribution, ValidationResult
from fed_learn.errors import MetricError, brief
from fed_learn.handlers.handler import ServerHandler
from fed_learn.handlers.scoring import check_best_key, check_mode, chosen_mode, declared_mode, is_better
from fed_learn.limits import MOST_METRICS
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.values import RunningMean
from fed_learn.weights import FrozenWeights, listed

logger = logging.getLogger(__name__)

SELECTION_METRIC = "selection"
"""The name under which the score of each round is published."""


class ModelSelectionHandler(ServerHandler):
    """Selects the best global model by what the clients measured on it before they trained.

    At BEFORE_AGGREGATION the model that the clients received this round scores `Σ m·n·w / Σ n·w` over the accepted
    contributions: m their validation metric, n their `n_iter` if `weigh_by_local_iter` (else 1), w this handler's
    `aggregation_weights.get(contributor, 1.0)`. A contribution without a finite m, or without n where it is needed,
    is left out, and logged once in a job. After the last round the final model is scored in the same way from the
    clients' validation results, so the best is never one round late. The best is bound to `ContextKey.BEST_RECEIVED`;
    the score of each round is published as the metric `"selection"`, that of a handler with another `best_key` as
    `"selection/<best_key>"`.

    Args:
        weigh_by_local_iter: Weigh clients by their local iterations.
        validation_metric_name: Name of the metric in the contributions.
        aggregation_weights: Contributor → w; those that are not named count 1.
        mode: `"max"`, or `"min"` for losses. None: as the clients declare of the metric by which they select
            (`Learner.mode`), else by the metric's name (see `fed_learn.components.direction.mode_of`).
        min_delta: By how much a score must be better to win.
        best_key: Where the best model is bound; give a second handler in one job another key.

    Raises:
        ValueError: For another `mode`, a bad `min_delta` or a negative or non-finite weight; at STARTUP if `mode`
            contradicts what is declared, or another handler has the same `best_key`.
        MetricError: In the first round that has contributions, where none of them has the metric, or `n_iter` if that
            is needed: nothing could ever be selected. Where scores come late (`ContextKey.SCORES_LATE`) an error in
            the log says so at the end.

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
        mode: str | None = None,
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
        self._mode: str | None = None  # the one that is followed in this job
        self._warned: set[str] = set()
        self._any_round = False
        self._seen: set[str] | None = None  # metrics that clients sent, as long as no model was scored
        self._before_final: BestModel | None = None
        self._final_scored = False
        self._final_mean: RunningMean | None = None  # of the results so far
        self._final_count = 0
        self._scored: tuple[int, list[int]] | None = None  # the round, and where its model lies
        self._entries: dict[str, Contribution] = {}
        self._before_round: BestModel | None = None
        for contributor, weight in self.aggregation_weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"aggregation weight of {contributor!r} must be finite and not negative, is {weight}")

    def startup(self, fl_ctx: FLContext) -> None:
        """A job begins: forgets the best of an earlier one."""
        super().startup(fl_ctx)
        check_best_key(self, self.best_key, fl_ctx)
        # Where scores come late, those who send them may still declare which direction is better.
        open_ = fl_ctx.get_prop(ContextKey.SCORES_LATE, False) and self.mode is None
        undeclared = open_ and declared_mode(self.validation_metric_name, fl_ctx) is None
        self._mode = None if undeclared else chosen_mode(self, self.validation_metric_name, self.mode, fl_ctx)
        self._warned, self._any_round, self._seen = set(), False, set()
        fl_ctx.pop(self.best_key, None)
        self._before_final, self._final_scored = None, False
        self._final_mean, self._final_count = None, 0
        self._scored = None

    def rollback(self, fl_ctx: FLContext) -> None:
        """Nothing to undo: what matters is in the context."""

    def before_aggregation(self, fl_ctx: FLContext) -> None:
        """Scores the model that the clients received this round."""
        contributions = fl_ctx.get_prop(ContextKey.CONTRIBUTIONS, ())
        if contributions and not self._any_round:
            self._any_round = True
            if not fl_ctx.get_prop(ContextKey.SCORES_LATE, False):
                self._check_any(contributions)
            self._warn_of_strangers(contributions)
        if self._seen is not None:
            room = len(self._seen) < MOST_METRICS  # clients may make up new ones in each round
            sent = {metric for c in contributions for metric in c.metrics}
            self._seen |= sent if room else sent & {self.validation_metric_name}
            if self.validation_metric_name not in self._seen and fl_ctx.get_prop(ContextKey.SCORES_LATE, False):
                return  # they are still to come
        self._select(fl_ctx, self._score(self._of_round(fl_ctx, contributions)), self._before_round)

    def receive_validation_results(self, fl_ctx: FLContext) -> None:
        """Scores the final model from the results so far; the last client's completes the score."""
        results = fl_ctx.get_prop(ContextKey.VALIDATION_RESULTS, ())
        if not results or results[-1].model != FINAL_MODEL:
            return
        # The final model may win on one client's result and lose on all: each time it meets the best before it.
        if len(results) == 1 or not self._final_scored:
            self._before_final = fl_ctx.get_prop(self.best_key)
        self._final_scored = True
        if self._final_mean is None or len(results) != self._final_count + 1:
            self._final_mean, self._final_count = RunningMean(), 0
        for result in results[self._final_count :]:
            self._count(result, self._final_mean)
        self._final_count = len(results)
        self._select(fl_ctx, self._final_mean.value(), self._before_final)

    def get_state(self) -> dict[str, Any]:
        """What has been seen and said so far; the best model is in the context."""
        seen = None if self._seen is None else sorted(self._seen)
        return {"mode": self._mode, "any_round": self._any_round, "seen": seen, "warned": sorted(self._warned)}

    def set_state(self, state: Any) -> None:
        """Goes on with it."""
        self._mode = state["mode"] if self._mode is None else self._mode
        self._any_round = state["any_round"]
        self._seen = None if state["seen"] is None else set(state["seen"])
        self._warned = set(state["warned"])

    def shutdown(self, fl_ctx: FLContext) -> None:
        """Says so if no model could be selected in the whole job."""
        if self._any_round and self._seen is not None:
            name = self.validation_metric_name
            logger.error(
                "no model was selected: no client sent a usable %r; they sent %s", name, by_likeness(name, self._seen)
            )

    def _of_round(self, ctx: FLContext, contributions: Sequence[Contribution]) -> Sequence[Contribution]:
        """All contributions of a round whose model is scored, which may be aggregated in several parts."""
        model = ctx.get_model()
        arrays = [] if model is None or model.weights is None else list(model.weights.values())
        scored = ctx.get_prop(ContextKey.ROUND, -1), [array.__array_interface__["data"][0] for array in arrays]
        if scored != self._scored:
            self._scored, self._entries, self._before_round = scored, {}, ctx.get_prop(self.best_key)
        self._entries |= {one.contributor: one.without_weights() for one in contributions}
        return tuple(self._entries.values())

    def _check_any(self, contributions: Sequence[Contribution]) -> None:
        """Refuses a round in which nobody sent what selection goes by."""
        seen, self._seen = self._seen, None  # an error needs no second one at the end
        name = self.validation_metric_name
        if all(name not in c.metrics for c in contributions):
            as_info = [f"{c.contributor} sent {brief(c.info[name])}" for c in contributions if name in c.info]
            if as_info:
                raise MetricError(f"{name!r} is no number: {as_info[0]}; no model could be selected", metric=name)
            sent = by_likeness(name, {metric for c in contributions for metric in c.metrics})
            raise MetricError(
                f"no client sent the metric {name!r}, so no model could be selected; they sent {sent}: pass one of "
                "them as validation_metric_name",
                metric=name,
            )
        if self.weigh_by_local_iter and all(c.n_iter is None for c in contributions):
            raise MetricError(
                "no client sent its local iterations (n_iter), so no model could be selected with weigh_by_local_iter",
                metric="n_iter",
            )
        self._seen = seen

    def _warn_of_strangers(self, contributions: Sequence[Contribution]) -> None:
        weighed = {name for name, weight in self.aggregation_weights.items() if weight != 1.0}
        if weighed and not any(c.contributor in weighed for c in contributions):
            names = ", ".join(sorted(map(repr, weighed)))
            logger.warning("aggregation_weights of model selection name no client of this round: %s", names)

    def _select(self, ctx: FLContext, metric: float | None, best: BestModel | None) -> None:
        if metric is None or not math.isfinite(metric):
            number = ctx[ContextKey.ROUND] + 1
            self._warn_once(
                "",
                f"round {number}: no client sent a usable {self.validation_metric_name!r}, so its model has no score",
            )
            return
        self._seen = None
        own = self.best_key == ContextKey.BEST_RECEIVED
        ctx.publish_metric(SELECTION_METRIC if own else f"{SELECTION_METRIC}/{self.best_key}", metric)
        if self._mode is None:  # driven by hand, without STARTUP, or not declared until now
            self._mode = chosen_mode(self, self.validation_metric_name, self.mode, ctx)
        if is_better(metric, best, self._mode, self.min_delta):
            model = ctx.get_model()
            if model is None or model.weights is None:
                raise ValueError("the context holds no model that could be selected")
            if model.weights:  # of an empty one nothing could be kept
                best = BestModel(
                    ctx[ContextKey.ROUND], metric, self.validation_metric_name, FrozenWeights(model.weights)
                )
        if best is not None:
            ctx.set_prop(self.best_key, best)

    def _score(self, entries: Sequence[Contribution | ValidationResult]) -> float | None:
        mean = RunningMean()
        for entry in entries:
            self._count(entry, mean)
        return mean.value()

    def _count(self, entry: Contribution | ValidationResult, mean: RunningMean) -> None:
        """Takes an entry into a score, or says why not."""
        metric = entry.metrics.get(self.validation_metric_name)
        n = entry.n_iter if self.weigh_by_local_iter else 1
        w = self.aggregation_weights.get(entry.contributor, 1.0)
        if metric is None or not math.isfinite(metric):
            problem = f"its {self.validation_metric_name!r} is {metric}"
        elif n is None or n <= 0:
            problem = f"its n_iter is {n}"
        else:
            mean.add(metric, n * w)
            return
        self._warn_once(entry.contributor, f"{entry.contributor} is left out of model selection: {problem}")

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            logger.warning("%s", text)


def by_likeness(name: str, names: Iterable[str]) -> str:
    """Names for a message, the one that is most like `name` first. Clients make them up: only short ones are compared.

    Example:
        >>> by_likeness("auc", ["loss", "initial_auc"]), by_likeness("auc", [])
        ("'initial_auc', 'loss'", 'no metrics')
    """
    shortest = heapq.nsmallest(100, names, key=len)
    likeness = {other: difflib.SequenceMatcher(None, name, other[:100]).ratio() for other in shortest}
    return listed(sorted(shortest, key=lambda other: (-likeness[other], other)), most=10) or "no metrics"
