"""A round whose replies are aggregated in several calls, such as one for each cluster of nodes."""

from dataclasses import dataclass, replace

from fed_learn.contribution import RoundReport
from fed_learn.weights import FrozenDict, FrozenWeights


@dataclass(frozen=True)
class RoundStart:
    """How a round began: each call that aggregates replies of it meets just this.

    Attributes:
        weights: The global model.
        scores: What clients had measured on it; see `Selection.scores`.
        part: What messages carried of it; see `SentModel`.
    """

    weights: FrozenWeights
    scores: dict[str, float]
    part: tuple[str, ...] | None


def joined(first: RoundReport, second: RoundReport) -> RoundReport:
    """One report of two parts of a round: accepted is who counted in either."""
    parts = [one for one in (first, second) if one.error is None] or [first, second]
    accepted = {name for one in parts for name in one.accepted}
    came = {*first.accepted, *second.accepted, *(failure.contributor for failure in second.rejected)}
    return replace(
        second,
        accepted=tuple(sorted(accepted)),
        rejected=(*first.rejected, *second.rejected),
        absent=tuple(name for name in dict.fromkeys((*first.absent, *second.absent)) if name not in came),
        quits=(*first.quits, *second.quits),
        handler_failures=(*first.handler_failures, *second.handler_failures),
        metrics=FrozenDict({**first.metrics, **second.metrics}),
        total_weight=first.total_weight + second.total_weight,
        aggregation_seconds=first.aggregation_seconds + second.aggregation_seconds,
        aggregation_bytes=first.aggregation_bytes + second.aggregation_bytes,
        seconds=first.seconds + second.seconds,
        error=second.error if first.error is not None else None,
    )
