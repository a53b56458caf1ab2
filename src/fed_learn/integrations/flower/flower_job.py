"""`FlowerJob`: a job of ours in Flower's terms, whose clients are nodes and whose replies come in rounds from 1.

It says which node is which contributor, and fires each event when it is due. Reading messages is left to the
strategies, what messages carry of the global model to `sent_model`, who answered to `answers`, the names of nodes to
`names`, by which score models are selected to `selection`.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from flwr.app import ArrayRecord, Message

from fed_learn.aggregation.told import Told
from fed_learn.contribution import FINAL_MODEL, INITIAL_VALIDATION_METRIC, Contribution, RoundReport, ValidationResult
from fed_learn.errors import (
    ClientQuitError,
    ContributionError,
    DtypeError,
    HandlerError,
    NamesError,
    NothingAggregatedError,
    ShapeError,
    UnknownContributorError,
    as_failure,
    text_of,
    without_tracebacks,
)
from fed_learn.integrations.flower.answers import Accepted, Answers
from fed_learn.integrations.flower.names import Names, NodeNames, in_one_line
from fed_learn.integrations.flower.record_job import RecordJob
from fed_learn.integrations.flower.records import same_memory
from fed_learn.integrations.flower.round_parts import RoundStart, joined
from fed_learn.integrations.flower.selection import Selection
from fed_learn.integrations.flower.sent_model import SentModel
from fed_learn.integrations.flower.widths import Widths
from fed_learn.model_meta import ContextKey
from fed_learn.server.settings import JobSettings
from fed_learn.weights import FrozenWeights, Schema, WeightDict

logger = logging.getLogger("flwr")

Aggregate: TypeAlias = Callable[["FlowerJob", Sequence[Contribution]], FrozenWeights]
"""A job and its accepted contributions → the new global model."""


class FlowerJob:
    """One job, which `job.start()` begins, and the nodes that take part in it.

    Args:
        settings: What it is told.
        weights: The initial global model.
        record: The same as a record, if there is one.
        aggregate: What aggregates; None: the rule, which writes to where the next record's bytes are.
        guessed: There is no global model, and the replies of the first round tell what it is. Such a job states nothing
            beyond a round: it goes on only as long as `takes` says.
        validation_metric: By which models are selected.
        validation_mode: What is better of it.
        node_names: Which node is which contributor, as far as the user says.

    Raises:
        ValueError: One is out of its range.

    Attributes:
        job: The job.
        model: What messages carry of its global model.
        names: Which node is which contributor.
        answers: Who was asked in the round that began last, and who answered.
        selection: By which score models are selected.
        widths: The floating-point dtypes of a round whose replies tell what the model is.
        told: What has been said of clients in this job.
        validation_metric: As given.
        num_rounds: How many rounds there will be; None: nobody knows.
        guessed: As given.
        states_round: Whether the messages state the round as their group.
        number: The round that is under way, from 0; None between rounds.
        accepted: What is kept of the replies of this round, by contributor.
        failed: The replies of this round that carry an error.
        report: The report of the last replies that were aggregated, the only ones of their round or not.
        scorers: Nodes whose `ClientMod` scores the models that it receives, and the type of the messages that reach it.
        final: Whether the evaluation that is under way scores the final model.
    """

    def __init__(
        self,
        settings: JobSettings,
        weights: WeightDict,
        record: ArrayRecord | None = None,
        *,
        aggregate: Aggregate | None = None,
        guessed: bool = False,
        validation_metric: str | None = None,
        validation_mode: str | None = None,
        node_names: NodeNames | None = None,
    ) -> None:
        self.job = RecordJob(
            settings, weights, self._note_sent, None if aggregate is None else partial(aggregate, self)
        )
        self.job.declare_score(validation_metric, validation_mode)
        self.job.ctx.set_prop(ContextKey.SCORES_LATE, True)  # with the evaluation after a round
        self.told = Told(logger)
        self.model = SentModel(self.job, self.told, record)
        self.names = Names(self.told, lambda node: node in self.answers.asked or node in self.answers.heard, node_names)
        self.answers = Answers()
        self.selection = Selection(self.job, self.told, validation_metric, validation_mode)
        self.widths = Widths(self.told)
        self.validation_metric = validation_metric
        self.num_rounds = settings.num_rounds
        self.guessed = guessed
        self.states_round = not guessed
        self.number: int | None = None
        self.accepted: dict[str, Accepted] = {}
        self.failed: list[Message] = []
        self.report: RoundReport | None = None
        self.scorers: dict[Hashable, str] = {}
        self.final = False
        self._n_iter: dict[str, int | None] = {}
        self._start = RoundStart(self.job.weights, {}, None)
        self._before: RoundReport | None = None  # of replies to this round that were aggregated before
        self._advise_empty = bool(record)

    def is_over(self, server_round: int) -> bool:
        """Whether rounds count from 1 again, after others: another job begins."""
        return server_round == 1 and bool(self.job.reports)

    def takes(self, server_round: int, replies: Iterable[WeightDict]) -> bool:
        """Whether replies that no message asked for may belong to this job.

        In a guessed one it takes a later round, and a reply that has the names, shapes and dtypes of the global model.
        """
        if not self.guessed:
            return True
        if not self.job.schema:  # nothing has come so far
            return True
        later = not self.job.reports or server_round - 1 > self.job.reports[-1].round
        return later and any(_schema_of(weights) == self.job.schema for weights in replies)

    def start_round(self, number: int, weights: WeightDict | None = None) -> None:
        """START_ROUND.

        Args:
            number: From 0.
            weights: Replaces the global model, before any handler sees it.

        Raises:
            ContributionError: These, or what a handler put in their place, are no model of the job's.
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        self.answers = Answers()
        self.names.begin_round(forget=self.guessed)  # nothing says that the nodes are those of the call before
        self.number = number
        self.widths.forget()
        before = self.job.weights if weights is None else weights
        self.job.start_round(number, weights)
        if not same_memory(before, self.job.weights):  # a handler replaced what the clients had scored
            self.selection.scores = {}
        self._start = RoundStart(self.job.weights, dict(self.selection.scores), self.model.part)

    def enter(self, number: int) -> None:
        """The round whose replies come now: the one that is under way, or another, which begins.

        A subclass may aggregate the replies of one round in several calls, such as one for each cluster of nodes. Each
        of them meets the model that this round's nodes received, and handlers see START_ROUND to END_ROUND of it.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        if self.number == number:
            return
        if self.guessed or not self.job.reports or self.job.reports[-1].round != number:
            self.start_round(number)
            return
        start = self._start
        self.selection.scores = start.scores
        if Schema.of(start.weights) != self.job.schema:
            self.job.change_schema(Schema.of(start.weights))
        self.number, self._before = number, self.job.reports.pop()
        self.job.start_round(number, start.weights)
        self.model.part = start.part

    def ask(self, node: Hashable) -> None:
        """SEND_MODEL, unless this node has been asked in this round.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        if node not in self.answers.asked:
            self.answers.asked[node] = None
            self.job.send_model(self.names.called(node))

    def read(
        self, node: Hashable, claim: Callable[[], str | None], read: Callable[[str], Contribution]
    ) -> tuple[str, Contribution | Exception]:
        """What a node sent, before any event tells of it: its name, and a contribution, or what reading it raised.

        Args:
            node: Who sent it.
            claim: Tells the name that it contributes under; None: none.
            read: Makes the contribution of that name.
        """
        try:
            name = self.names.name(node, claim())
            return name, self.widths.widened(read(name))
        except BaseException as error:  # noqa: BLE001 - the job says what becomes of it
            # That a client failed is not this code's failure: where it was noticed would tell nothing.
            failure = without_tracebacks(error) if isinstance(error, ClientQuitError) else as_failure(error)
            return self.names.called(node), failure

    def receive(self, node: Hashable, name: str, sent: Contribution | Exception) -> Contribution | None:
        """RECEIVE_CONTRIBUTION, or CLIENT_QUIT if reading raised anything but a `ContributionError`.

        Args:
            node: Who sent it.
            name: Its name; see `read`.
            sent: What it sent.

        Returns:
            The contribution if it was accepted.

        Raises:
            ContributionError: It is refused, with `on_bad_contribution="raise"`.
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        contribution = self.job.receive(self._register(node, name), sent)
        if contribution is not None:
            self._n_iter[name] = contribution.n_iter
        if name in self.job.clients:
            self.answers.contributed[node] = None
        return contribution

    def lose(self, errors: Sequence[ClientQuitError]) -> None:
        """Notes failures that name no client: of the nodes that have not answered, where that is certain.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        silent = self.answers.silent
        if len(silent) == len(errors) and len(set(map(str, errors))) == 1:
            for node, error in zip(silent, errors, strict=True):
                self.fail(node, error)
            return
        for error in errors:
            self.job.note_failure("a client", error, "failed")
        if len(silent) <= len(errors):  # each of them is one of the failures, which have been told
            self.answers.missed |= dict.fromkeys(silent)

    def fail(self, node: Hashable, error: ClientQuitError) -> None:
        """CLIENT_QUIT of a node that failed.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        self.receive(node, self.names.called(node), without_tracebacks(error))

    def close_round(self, *, error: Exception | None = None) -> bool:
        """Notes who is missing; aggregates, if enough is there; END_ROUND.

        Args:
            error: Why the round fails, and leaves the global model as it is.

        Returns:
            Whether there is a new global model.

        Raises:
            ContributionError: A part of the model is refused, with `on_bad_contribution="raise"`; or a handler put a
                bad contribution or a bad model into the context.
            ValueError: A handler changed contributions that are added up already, or that another strategy aggregates.
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        self._note_absent()
        before = self.job.weights
        if error is not None:
            self.job.fail_round(error)
        # Where nobody was asked and nobody answered, there is nothing that could be missing.
        expected = bool(self.answers.asked or self.answers.heard)
        try:
            aggregated = error is None and expected and self.job.aggregate()
        finally:
            for failure in self.job.report.rejected:
                logger.warning("\t> Refused: %s: %s", failure.cause, text_of(failure.error))
        for one in self.job.ctx.get(ContextKey.CONTRIBUTIONS, ()):
            if INITIAL_VALIDATION_METRIC in one.metrics:
                self.selection.fix()
                break
        self.end_round()
        if self.job.weights is not before:
            self.selection.scores = {}
        return aggregated or self.job.weights is not before

    def _note_absent(self) -> None:
        """Notes, and says, from which nodes nothing came."""
        absent = list(map(self.names.called, self.answers.absent()))
        for name in absent:
            self.job.absent(name)
        if absent:
            fetched = self.answers.arrived is not None or self.num_rounds is not None
            what = "No reply from" if fetched else "Not among the replies:"
            logger.warning("\t> %s %s", what, in_one_line(absent))

    def end_round(self, *, aggregated_elsewhere: bool = False) -> None:
        """END_ROUND.

        Args:
            aggregated_elsewhere: A subclass has made the new global model by itself.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        self.job.aggregated_elsewhere |= aggregated_elsewhere
        self.report = self.job.end_round()
        if self._before is not None:
            self.job.reports[-1], self._before = joined(self._before, self.report), None
        self.forget_round()

    def forget_round(self) -> None:
        """Keeps nothing of a round that ended, or was broken off: if it comes again, it begins anew."""
        if self._before is not None:  # of replies that were aggregated before those that broke off
            self.job.reports.append(self._before)
        self.number, self.accepted, self.failed, self._before = None, {}, [], None
        self.job.break_off_round()

    def note_score(self, node: Hashable, claim: Callable[[], str | None], metric: float) -> None:
        """Notes what a client measured on the global model, which it will receive in the next round.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        try:
            self.selection.scores[self._register(node, self.names.name(node, claim()))] = metric
        except UnknownContributorError as error:
            logger.warning("\t> a score is left out: %s", error)

    def begin_final(self, weights: FrozenWeights | None = None) -> None:
        """The final model is about to be scored by clients.

        Args:
            weights: What they are sent, if it is not the job's global model.
        """
        self.answers, self.final = Answers(), True
        self.names.begin_round(forget=False)
        self.job.begin_validation(FINAL_MODEL, weights)

    def receive_final(
        self, node: Hashable, claim: Callable[[], str | None], read: Callable[[], Mapping[str, Any]]
    ) -> None:
        """RECEIVE_VALIDATION_RESULTS of the final model.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        name = self.names.called(node)
        result: ValidationResult | Exception
        try:
            name = self._register(node, self.names.name(node, claim()))
            result = ValidationResult(name, FINAL_MODEL, read(), self._n_iter.get(name))
        except HandlerError:
            raise  # of CLIENT_REGISTER: no failure of the client
        except BaseException as error:  # noqa: BLE001 - the job says what becomes of it
            result = as_failure(error)
        self.job.receive_validation_result(name, result)

    def finish(self) -> None:
        """CLIENT_QUIT of every client; what is left is SHUTDOWN.

        Raises:
            NothingAggregatedError: No round made a new global model.
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        try:
            self.job.finish()
        except NothingAggregatedError as error:
            refused = {failure.cause for report in self.job.reports for failure in report.rejected}
            of_form = {NamesError.__name__, ShapeError.__name__, DtypeError.__name__}
            if self._advise_empty and error.cause in refused & of_form:
                error.args = (f"{error} (an empty initial record takes the model as the clients send it)",)
            raise
        finally:
            for name in tuple(self.job.clients):
                self.job.quit(name)

    def _note_sent(self, names: Sequence[str]) -> None:
        self.model.note_sent(names, self.answers)

    def _register(self, node: Hashable, name: str) -> str:
        """Notes that a node answered; CLIENT_REGISTER if its name is new. Returns the name."""
        self.answers.heard[node] = None
        if name not in self.job.clients:
            self.job.register(name)
        return name


def _schema_of(weights: WeightDict) -> Schema | None:
    """None for what cannot be averaged."""
    try:
        return Schema.of(weights)
    except ContributionError:
        return None
