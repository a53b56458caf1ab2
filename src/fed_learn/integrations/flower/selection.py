"""Which of the clients' scores a job of Flower's selects models by: all of one metric, and of one direction of it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fed_learn.aggregation.told import Told
from fed_learn.components.direction import MODES, mode_of
from fed_learn.contribution import INITIAL_VALIDATION_METRIC
from fed_learn.server.job_events import JobEvents
from fed_learn.values import number_of

LONGEST_METRIC = 200
"""Characters of a metric's name."""


@dataclass(frozen=True)
class Stated:
    """What a `ClientMod` says of the score in its reply.

    Attributes:
        metric: Its name.
        mode: What is better of it; None: its name says so.
    """

    metric: str
    mode: str | None = None

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> "Stated | None":
        """What the entries of a reply say; None if they name no metric.

        Example:
            >>> Stated.of({"metric": "loss"}), Stated.of({"metric": 3})
            (Stated(metric='loss', mode=None), None)
        """
        metric, mode = entries.get("metric"), entries.get("mode")
        if not isinstance(metric, str) or not 0 < len(metric) <= LONGEST_METRIC:
            return None
        return cls(metric, mode if mode in MODES else None)

    @property
    def best(self) -> str:
        """`"max"` or `"min"`: as stated, or else by the name."""
        return self.mode or mode_of(self.metric)


class Selection:
    """By which score models are selected in a job: as the server's user says, or else as the clients state.

    Args:
        job: The job, whose handlers are told what the clients state.
        told: Says things once in the job.
        metric: What the server's user says: a metric, `INITIAL_VALIDATION_METRIC` for none in particular.
        mode: What the server's user says to be better of it; None: nothing.

    Attributes:
        scores: What clients measured, by their names, on the global model that they receive in the next round.
    """

    def __init__(self, job: JobEvents, told: Told, metric: str | None, mode: str | None) -> None:
        self._job = job
        self._told = told
        self._metric = None if metric == INITIAL_VALIDATION_METRIC else metric
        modes = [mode] + [
            handler.mode  # type: ignore[attr-defined] # of the handlers that select by a score
            for handler in job.handlers
            if getattr(handler, "validation_metric_name", None) == INITIAL_VALIDATION_METRIC
        ]
        self._mode = next((one for one in modes if one is not None), None)
        self._by_server = "the server" if self._mode is not None else None
        self._who = "the server"
        self.scores: dict[str, float] = {}

    def expect(self, stated: Iterable[Stated | None]) -> None:
        """Follows the commonest of what the replies of a round state, so that it does not depend on who is first."""
        counts = Counter(one for one in stated if one is not None and self._contradiction(one) is None)
        if counts:
            self._follow(min(counts, key=lambda one: (-counts[one], one.metric, one.best)))

    def kept(
        self, who: str, metrics: Mapping[str, Any], stated: Stated | None, others: Sequence[str] = ()
    ) -> dict[str, Any]:
        """A client's metrics, without a score that is of another metric or direction than the job's.

        Args:
            who: The client.
            metrics: What it sent.
            stated: What it says of the score in them.
            others: Names under which the metric of the job may be found in place of such a score.
        """
        kept = dict(metrics)
        if stated is None or INITIAL_VALIDATION_METRIC not in kept:
            return kept
        why = self._contradiction(stated)
        if why is None:
            self._follow(stated)
            return kept
        del kept[INITIAL_VALIDATION_METRIC]
        if self._metric is not None and stated.metric != self._metric:
            found = [name for name in (f"initial_{self._metric}", *others) if name in metrics]
            if found:  # `validate` gives several scores, this one among them
                return {**kept, INITIAL_VALIDATION_METRIC: metrics[found[0]]}
        self._told.once(("score", who), f"{who}: its score is left out of the selection of models: {why}")
        return kept

    def with_score(self, name: str, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        """The metrics of a contribution, with what its client measured on the global model before the round."""
        score = self.scores.get(name)
        if score is None or number_of(metrics.get(INITIAL_VALIDATION_METRIC)) is not None:
            return metrics
        return {**metrics, INITIAL_VALIDATION_METRIC: score}

    def fix(self) -> None:
        """A model has been scored: which direction is better stays as it is."""
        self._mode = self._mode or mode_of(self._metric or INITIAL_VALIDATION_METRIC)

    def _follow(self, stated: Stated) -> None:
        if self._by_server is not None and stated.mode is None and stated.best != self._mode:
            word = "largest" if self._mode == "max" else "smallest"
            self._told.once(
                ("direction", stated.metric),
                f"clients score models by {stated.metric!r}, and the best is the one with the {word}, as the server is "
                f"told (mode={self._mode!r}); by the name it would be the other way round",
            )
        if self._metric is not None and self._mode is not None:
            return
        self._who = self._who if self._metric is not None else "the other clients"
        self._metric, self._mode = stated.metric, self._mode or stated.best
        self._job.declare_score(self._metric, self._mode)

    def _contradiction(self, stated: Stated) -> str | None:
        """How what a client states differs from what the job goes by; None if it does not."""
        other_metric = self._metric not in (None, stated.metric)
        by = stated.mode if self._by_server is not None else stated.best
        if not other_metric and (self._mode is None or by in (None, self._mode)):
            return None
        own = f"by {self._metric!r}" if self._metric is not None else "by a score without a name"
        return (
            f"its ClientMod selects by {stated.metric!r} (mode={stated.best!r}), and {self._who} {own} "
            f"(mode={self._mode or mode_of(self._metric or '')!r}); give both the same validation_metric and "
            "validation_mode"
        )
