"""`JobResult`: what a job has made, and what happened in it."""

from collections.abc import Mapping
from dataclasses import dataclass

from fed_learn.contribution import BestModel, ClientFailure, RoundReport, ValidationResult
from fed_learn.errors import HandlerFailure
from fed_learn.weights import FrozenWeights, size_text


@dataclass(frozen=True, eq=False)
class JobResult:
    """The result of a job.

    Attributes:
        weights: The global model after the last round.
        best: The job's best model: the best aggregated one where the server validated, else the best received one;
            None where no handler selected any.
        reports: One report per round.
        metrics: Scores that handlers published on the final model.
        cross_site: Model → client → that client's validation metric on the model. The models are the clients' local
            bests, by client name, and the job's best as `global_best`.
        validation_results: All results behind `cross_site`, and those on the final model.
        quits: Clients that left before the end, and why.
        handler_failures: Every handler that raised, in order.
        stop_reason: Why the job ended before its last round, or None.
    """

    weights: FrozenWeights
    best: BestModel | None
    reports: tuple[RoundReport, ...]
    metrics: Mapping[str, float]
    cross_site: Mapping[str, Mapping[str, float]]
    validation_results: tuple[ValidationResult, ...]
    quits: tuple[ClientFailure, ...]
    handler_failures: tuple[HandlerFailure, ...]
    stop_reason: str | None

    def __repr__(self) -> str:
        parts = [f"{len(self.reports)} round{'s' * (len(self.reports) != 1)}", size_text(self.weights)]
        parts += [f"best={self.best!r}"] if self.best is not None else []
        parts += [f"{name}={value:.6g}" for name, value in self.metrics.items()]
        counts = {"clients left": self.quits, "handlers failed": self.handler_failures}
        parts += [f"{len(found)} {what}" for what, found in counts.items() if found]
        parts += [f"stop_reason={self.stop_reason!r}"] if self.stop_reason is not None else []
        return f"JobResult({', '.join(parts)})"
