"""What becomes of a round's contributions in Flower: the mean, or what another strategy makes of them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from fed_learn.aggregation.round import UNUSABLE
from fed_learn.contribution import Contribution, Kind
from fed_learn.integrations.flower.records import RecordWriter
from fed_learn.model_meta import FLContext
from fed_learn.server import FederatedServer
from fed_learn.server.receiving import Receiver, Refusal, moved
from fed_learn.weights import FrozenWeights, Schema, WeightDict


class FlowerReceiver(Receiver):
    """Writes the mean where the bytes of the next message are, or leaves the aggregation to another strategy.

    Args:
        server: The settings.
        note_sent: Is told which variables the clients of a round have sent.
        aggregate: Makes the new global model of the accepted contributions; None: the weighted mean.
    """

    def __init__(
        self,
        server: FederatedServer,
        note_sent: Callable[[Sequence[str]], None],
        aggregate: Callable[[Sequence[Contribution]], FrozenWeights] | None,
    ) -> None:
        super().__init__(server)
        self._note_sent = note_sent
        self._aggregate = aggregate

    def averaged(self, contributions: Sequence[Contribution]) -> frozenset[str]:
        """See `Round.averaged`."""
        return self._round.averaged(contributions)

    def aggregate(self, contributions: Sequence[Contribution], weights: FrozenWeights, ctx: FLContext) -> FrozenWeights:
        """See `Receiver.aggregate`."""
        if self._aggregate is not None:
            self._note_sent(self._round.sent(contributions))
            return self._aggregate(contributions)
        writers: list[RecordWriter] = []

        def written(schema: Schema) -> WeightDict:
            writers.append(RecordWriter(schema))
            return writers[0].arrays

        try:
            combined = self._round.combine(contributions, None if self.server.kind is Kind.DIFF else written)
            self._note_sent(combined.sent)
            if not writers:
                return moved(weights, combined, self.server.kind)
            names = tuple(combined.mean)  # the arrays are those of the writer, which lets go of them now
            mean = writers[0].finish()
            if mean.keys() == weights.keys() and len(names) == len(weights):
                return mean
            return moved(weights, replace(combined, mean={name: mean[name] for name in names}), Kind.FULL)
        except UNUSABLE as error:
            raise Refusal(error) from error
