"""A job of ours behind a strategy of Flower's: which node is which contributor, and when which event is due."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord

from fed_learn.aggregation import weighted_average
from fed_learn.contribution import (
    FINAL_MODEL,
    INITIAL_VALIDATION_METRIC,
    ClientFailure,
    Contribution,
    Kind,
    ValidationResult,
)
from fed_learn.errors import (
    ClientQuitError,
    ExactDomainError,
    HandlerError,
    IntegerRangeError,
    NonFiniteError,
    UnknownContributorError,
    without_tracebacks,
)
from fed_learn.integrations.flower.records import RecordWriter, recorded, to_record
from fed_learn.integrations.flower.replies import node_name
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.server import FederatedServer
from fed_learn.server.job import Job
from fed_learn.server.receiving import Receiver, Refusal
from fed_learn.weights import FrozenWeights, WeightDict

logger = logging.getLogger("flwr")

Aggregate = Callable[[Sequence[Contribution], FrozenWeights], FrozenWeights]
"""Accepted contributions and the global model → the new global model."""


class Session:
    """One job, which `job.start()` begins, and the nodes that take part in it.

    Args:
        weights: The initial global model.
        record: The same as a record, if there is one.
        num_rounds: How many rounds there will be; None: nobody knows.
        handlers: The server's.
        aggregate: What aggregates; None: the weighted mean, written where the next record's bytes are.
        settings: Further arguments of `FederatedServer`.

    Attributes:
        job: The job.
        num_rounds: As given.
        number: The round that is under way, from 0; None between rounds.
        heard: Nodes that answered in this round.
        contributed: Nodes that contributed in this round, accepted or not, and have not left.
        clients_score: Whether any contribution came with a score of the received model.
    """

    def __init__(
        self,
        weights: WeightDict,
        record: ArrayRecord | None = None,
        *,
        num_rounds: int | None,
        handlers: Sequence[Any] = (),
        aggregate: Aggregate | None = None,
        **settings: Any,
    ) -> None:
        server = FederatedServer(weights, num_rounds=num_rounds or 1, handlers=handlers, **settings)
        self.job = Job(server, receiver=_FlowerReceiver(server, aggregate))
        self.job.ctx.set_prop(ContextKey.SCORES_LATE, True)  # with the evaluation after a round
        if num_rounds is None:
            self.job.ctx.pop(ContextKey.NUM_ROUNDS)
        self.num_rounds = num_rounds
        self.number: int | None = None
        self.heard: dict[Hashable, None] = {}
        self.contributed: dict[Hashable, None] = {}
        self._asked: dict[Hashable, None] = {}
        self._names: dict[Hashable, str] = {}
        self._record = (self.job.weights, record)
        self._n_iter: dict[str, int | None] = {}
        self._scores: dict[str, float] = {}
        self._scored: FrozenWeights | None = None
        self.clients_score = False

    @property
    def record(self) -> ArrayRecord:
        """The global model as Flower sends it; written once."""
        weights, record = self._record
        if weights is not self.job.weights or record is None:
            record = to_record(self.job.weights)
            self._record = self.job.weights, record
        return record

    def is_over(self, server_round: int) -> bool:
        """Whether rounds count from 1 again, after others: another job begins."""
        return server_round == 1 and bool(self.job.reports)

    def start_round(self, number: int, weights: WeightDict | None = None) -> None:
        """START_ROUND.

        Args:
            number: From 0.
            weights: Replaces the global model, before any handler sees it.
        """
        self._asked, self.heard, self.contributed = {}, {}, {}
        self.number = number
        self.job.start_round(number, weights)
        if self._scored is not self.job.weights:
            self._scores = {}

    def ask(self, node: Hashable) -> None:
        """SEND_MODEL, unless this node has been asked in this round."""
        if node not in self._asked:
            self._asked[node] = None
            self.job.send_model(self._names.get(node, node_name(node)))

    def receive(
        self, node: Hashable, claim: Callable[[], str | None], read: Callable[[str], Contribution]
    ) -> Contribution | None:
        """RECEIVE_CONTRIBUTION, or CLIENT_QUIT if reading raises anything but a `ContributionError`.

        Args:
            node: Who sent it.
            claim: Tells the name that it contributes under; None: none.
            read: Makes the contribution of that name.

        Returns:
            The contribution if it was accepted.
        """
        sent: Contribution | Exception
        try:
            name = self._register(node, claim())
            sent = read(name)
            if INITIAL_VALIDATION_METRIC in sent.metrics:
                self.clients_score = True
            elif name in self._scores:
                sent = replace(sent, metrics={**sent.metrics, INITIAL_VALIDATION_METRIC: self._scores[name]})
        except HandlerError:
            raise  # of CLIENT_REGISTER: no failure of the client
        except Exception as error:  # noqa: BLE001 - the job says what becomes of it
            # That a client failed is not this code's failure: where it was noticed would tell nothing.
            sent = without_tracebacks(error) if isinstance(error, ClientQuitError) else error
            name = self._register(node, None)
        contribution = self.job.receive(name, sent)
        if contribution is not None:
            self._n_iter[name] = contribution.n_iter
        if name in self.job.clients:
            self.contributed[node] = None
        return contribution

    def close_round(self, *, error: Exception | None = None) -> bool:
        """Notes who is missing; aggregates, if enough is there; END_ROUND.

        Args:
            error: Why the round fails, and leaves the global model as it is.

        Returns:
            Whether there is a new global model.
        """
        for node in self._asked:
            if node not in self.heard:
                self.job.absent(self._names.get(node, node_name(node)))
        before = self.job.weights
        if error is not None:
            self.job.update_report(error=error)
        aggregated = error is None and self.job.aggregate()
        self._log(self.job.end_round())
        self.number = None
        return aggregated or self.job.weights is not before

    def note_score(self, node: Hashable, claim: Callable[[], str | None], metric: float) -> None:
        """Notes what a client measured on the global model, which it will receive in the next round."""
        if self._scored is not self.job.weights:
            self._scored, self._scores = self.job.weights, {}
        try:
            self._scores[self._register(node, claim())] = metric
        except UnknownContributorError as error:
            logger.warning("\t> a score is left out: %s", error)

    def begin_final(self, weights: FrozenWeights | None = None) -> None:
        """The final model is about to be scored by clients.

        Args:
            weights: What they are sent, if it is not the job's global model.
        """
        self._asked, self.heard = {}, {}
        self.job.begin_validation(FINAL_MODEL, weights)

    def receive_final(
        self, node: Hashable, claim: Callable[[], str | None], read: Callable[[], Mapping[str, Any]]
    ) -> None:
        """RECEIVE_VALIDATION_RESULTS of the final model."""
        name = self._names.get(node, node_name(node))
        result: ValidationResult | Exception
        try:
            name = self._register(node, claim())
            result = ValidationResult(name, FINAL_MODEL, read(), self._n_iter.get(name))
        except HandlerError:
            raise  # of CLIENT_REGISTER: no failure of the client
        except Exception as error:  # noqa: BLE001 - the job says what becomes of it
            result = error
        self.job.receive_validation_result(name, result)

    def finish(self) -> None:
        """CLIENT_QUIT of every client; what is left is SHUTDOWN."""
        self.job.finish()
        for name in tuple(self.job.clients):
            self.job.quit(name)

    def _register(self, node: Hashable, claim: str | None) -> str:
        """The name of a node; CLIENT_REGISTER if it is new.

        Raises:
            UnknownContributorError: It claims another name than before, or that of another node that takes part.
        """
        own = node_name(node)
        known = self._names.get(node)
        name = claim or known or own
        if known not in (None, own, name):
            raise UnknownContributorError(
                f"{known}: {own} has contributed under this name, and now claims to be {name!r}", contributor=known
            )
        other = next((other for other, taken in self._names.items() if taken == name and other != node), None)
        if other is not None:
            if other in self._asked or other in self.heard:
                raise UnknownContributorError(
                    f"{own}: claims to be {name!r}, which is {node_name(other)}", contributor=own
                )
            del self._names[other]  # a node that was started anew has another id
        self._names[node] = name
        self.heard[node] = None
        if name not in self.job.clients:
            self.job.register(name)
        return name

    def _log(self, report: Any) -> None:
        logger.info(
            "round %d: %d contributions accepted, %d refused, %d missing, %d clients failed",
            report.round + 1,
            len(report.accepted),
            len(report.rejected),
            len(report.absent),
            len(report.quits),
        )
        failures: Sequence[ClientFailure] = (*report.rejected, *report.quits)
        for failure in failures:
            logger.warning("\t> %s: %s", failure.cause, failure.error)


class _FlowerReceiver(Receiver):
    """Writes the mean where the bytes of the next message are, or leaves the aggregation to another strategy."""

    def __init__(self, server: FederatedServer, aggregate: Aggregate | None) -> None:
        super().__init__(server)
        self._aggregate = aggregate

    def aggregate(self, contributions: Sequence[Contribution], weights: FrozenWeights, ctx: FLContext) -> FrozenWeights:
        """See `Receiver.aggregate`."""
        if self._aggregate is not None:
            return self._aggregate(contributions, weights)
        if self._stream is not None or self.server.kind is Kind.DIFF:
            return recorded(super().aggregate(contributions, weights, ctx))
        writer = RecordWriter(self.server.schema)
        try:
            weighted_average(
                contributions, like=weights, out=writer.arrays, exact=self.server.exact, kernel=self.server.kernel
            )
        except (NonFiniteError, IntegerRangeError, ExactDomainError) as error:
            raise Refusal(error) from error
        return writer.finish()
