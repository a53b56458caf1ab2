"""A `Job` whose global model is written where the bytes of the next message are."""

from collections.abc import Callable, Sequence

from fed_learn.aggregation.round import UNUSABLE
from fed_learn.contribution import Contribution, Kind
from fed_learn.errors import ClientQuitError, FedLearnError
from fed_learn.integrations.flower.records import RecordWriter
from fed_learn.server.job import Job
from fed_learn.server.settings import JobSettings
from fed_learn.weights import FrozenWeights, WeightDict


class RecordJob(Job):
    """A job behind a strategy of Flower's, which says in Flower's words which clients failed.

    Args:
        settings: What it is told.
        weights: The initial global model.
        note_sent: Is told which variables the clients of a round have sent.
        aggregate: Makes the new global model of the accepted contributions; None: the rule does.
    """

    def __init__(
        self,
        settings: JobSettings,
        weights: WeightDict,
        note_sent: Callable[[Sequence[str]], None],
        aggregate: Callable[[Sequence[Contribution]], FrozenWeights] | None,
    ) -> None:
        super().__init__(settings, weights)
        self._note_sent = note_sent
        self._aggregate_by = aggregate
        self._output = RecordWriter if settings.aggregation.kind is Kind.FULL else None
        self._foresees = aggregate is None

    def averaged(self, contributions: Sequence[Contribution]) -> frozenset[str]:
        """Names of the variables of contributions that are averaged; see `Round.averaged`."""
        return self._round.averaged(contributions)

    def foresee(self, sent: Sequence[Contribution | Exception]) -> None:
        """Is told all that the round will receive, where it is at hand; see `Round.foresee`."""
        if self._foresees:
            contributions = [one for one in sent if isinstance(one, Contribution)]
            self._foresees = self._round.foresee(contributions, self._output)

    def _combined(self, contributions: Sequence[Contribution]) -> FrozenWeights | Exception:
        if self._aggregate_by is not None:
            self._note_sent(self._round.sent(contributions))
            try:
                return self._aggregate_by(contributions)
            except FedLearnError as error:
                return error
        try:
            combined = self._round.combine(contributions, output=self._output, ctx=self.ctx)
            self._note_sent(combined.sent)
            return combined.applied_to(self.weights, RecordWriter)
        except UNUSABLE as error:
            return error

    def log_failure(self, name: str, error: Exception, what: str) -> None:
        """Logs that a client failed, unless a reply of Flower's has said so, which is in the log already."""
        if not isinstance(error, ClientQuitError):
            super().log_failure(name, error, what)
