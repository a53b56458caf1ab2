"""A job of ours behind a strategy of Flower's: which node is which contributor, and when which event is due."""

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from flwr.app import ArrayRecord, Message, RecordDict

from fed_learn.aggregation.round import UNUSABLE
from fed_learn.aggregation.told import Told
from fed_learn.contribution import (
    FINAL_MODEL,
    INITIAL_VALIDATION_METRIC,
    Contribution,
    Kind,
    RoundReport,
    ValidationResult,
)
from fed_learn.errors import (
    ClientQuitError,
    ContributionError,
    DtypeError,
    FedLearnError,
    HandlerError,
    NamesError,
    NothingAggregatedError,
    ShapeError,
    UnknownContributorError,
    as_failure,
    text_of,
    without_tracebacks,
)
from fed_learn.integrations.flower.names import Names, NodeNames, in_one_line
from fed_learn.integrations.flower.records import RecordWriter, copy_of, same_bytes, to_record, to_weights
from fed_learn.integrations.flower.selection import Selection
from fed_learn.integrations.flower.widths import Widths
from fed_learn.model_meta import ContextKey
from fed_learn.server.job import Job
from fed_learn.server.settings import JobSettings
from fed_learn.values import number_of
from fed_learn.weights import FrozenDict, FrozenWeights, Schema, WeightDict, listed

logger = logging.getLogger("flwr")

Aggregate: TypeAlias = Callable[["Session", Sequence[Contribution]], FrozenWeights]
"""A job and its accepted contributions → the new global model."""


@dataclass(frozen=True)
class Accepted:
    """What is kept of a reply whose contribution was accepted, until its round is over.

    Attributes:
        content: What the client sent, without the arrays if the server streams.
        contribution: As it was accepted.
        message: The reply itself; None if the server streams.
    """

    content: RecordDict
    contribution: Contribution
    message: Message | None


class Session:
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
        num_rounds: How many rounds there will be; None: nobody knows.
        guessed: As given.
        states_round: Whether the messages state the round as their group.
        final: Whether the evaluation that is under way scores the final model.
        accepted: What is kept of the replies of this round, by contributor.
        failed: The replies of this round that carry an error.
        number: The round that is under way, from 0; None between rounds.
        heard: Nodes that answered in this round.
        arrived: Nodes whose replies reached the server in this round; None: the user's own loop fetches them.
        report: The report of the last replies that were aggregated, the only ones of their round or not.
        contributed: Nodes that contributed in this round, accepted or not, and have not left.
        told: What has been said of clients in this job.
        selection: By which score models are selected.
        widths: The floating-point dtypes of a round whose replies tell what the model is.
        scorers: Nodes whose `ClientMod` scores the models that it receives, and the type of the messages that reach it.
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
        self.job = _FlowerJob(
            settings, weights, self.note_sent, None if aggregate is None else partial(aggregate, self)
        )
        self.job.declare_score(validation_metric, validation_mode)
        self.job.ctx.set_prop(ContextKey.SCORES_LATE, True)  # with the evaluation after a round
        self.num_rounds = settings.num_rounds
        self.guessed = guessed
        self.states_round = not guessed
        self.final = False
        self.accepted: dict[str, Accepted] = {}
        self.failed: list[Message] = []
        self.number: int | None = None
        self.heard: dict[Hashable, None] = {}
        self.contributed: dict[Hashable, None] = {}
        self._asked: dict[Hashable, None] = {}
        self._missed: dict[Hashable, None] = {}
        self.arrived: dict[Hashable, None] | None = None
        self.report: RoundReport | None = None
        self._before: RoundReport | None = None
        self._record = (self.job.weights, record)
        self._part: tuple[str, ...] | None = None
        self._ever: dict[str, None] = {}
        self._narrow = False
        self._n_iter: dict[str, int | None] = {}
        self._scores: dict[str, float] = {}
        self._begun: tuple[FrozenWeights, dict[str, float], tuple[str, ...] | None] = (self.job.weights, {}, None)
        self.scorers: dict[Hashable, str] = {}
        self.told = Told(logger)
        self._names = Names(self.told, lambda node: node in self._asked or node in self.heard, node_names)
        self.widths = Widths(self.told)
        self._advise_empty = bool(record)
        self.selection = Selection(self.job, self.told, validation_metric, validation_mode)

    @property
    def record(self) -> ArrayRecord:
        """The global model as Flower sends it: a record of the caller's own, who may change it.

        Of a model of which clients send a part it has that part, as with Flower, once a round has shown it: they may
        keep the rest of it for themselves, and would take over what they receive.
        """
        return copy_of(self._own_record)

    def whole(self, arrays: ArrayRecord) -> ArrayRecord:
        """The whole global model; with what a subclass has made of it, if `arrays` are not what `record` gave.

        Raises:
            ContributionError: `arrays` cannot be read.
        """
        if self.holds(arrays):
            return arrays if self._part is None else to_record(self.job.weights)
        return to_record(self.completed(to_weights(arrays, like=self.job.schema)))

    def completed(self, weights: FrozenWeights) -> FrozenWeights:
        """A model that comes from outside, with the rest of the global model where it has a part of that.

        Raises:
            DtypeError: A variable of the part is not as the global model has it.
        """
        schema = self.job.schema
        if not weights or not weights.keys() < schema.keys():
            return weights
        if any(array.shape != schema[name][0] for name, array in weights.items()):
            return weights  # another model
        fit, _ = schema.fit(weights, "global model")
        return FrozenWeights.adopt({name: fit.get(name, array) for name, array in self.job.weights.items()})

    def holds(self, arrays: ArrayRecord) -> bool:
        """Whether a record is the global model, unchanged."""
        return same_bytes(arrays, self._own_record)

    @property
    def _own_record(self) -> ArrayRecord:
        weights, record = self._record
        if weights is not self.job.weights or record is None:
            weights = self.job.weights
            record = to_record(weights if self._part is None else {name: weights[name] for name in self._part})
            self._record = self.job.weights, record
        return record

    def note_sent(self, names: Sequence[str]) -> None:
        """Notes which variables the clients have sent in a round: messages carry these from now on.

        Where each may send other ones (`partial="average"`), they carry all that anyone ever sent, and the whole model
        until a round in which everyone answered.
        """
        if self.job.settings.aggregation.partial == "average":
            self._ever |= dict.fromkeys(names)
            self._narrow = self._narrow or set(self._asked) <= set(self.contributed)
            names = [name for name in self.job.schema if name in self._ever or not self._narrow]
        self.note_part(names)

    def note_part(self, names: Sequence[str]) -> None:
        """Notes which variables messages carry from now on."""
        part = None if len(names) == len(self.job.schema) or not self.job.schema else tuple(names)
        if part != self._part:
            self._part, self._record = part, (self.job.weights, None)

    def take_part(self, made: WeightDict, who: str) -> None:
        """Messages are to carry just the variables that a strategy returns, as with Flower, if the model has them.

        Args:
            made: What it returns.
            who: The strategy, for the log.
        """
        schema = self.job.schema
        if not made or any(name not in schema or array.shape != schema[name][0] for name, array in made.items()):
            return
        dropped = [name for name in schema if name in self.sent and name not in made]
        if dropped:
            self.told.once(
                ("fewer", frozenset(dropped)),
                f"{who} returns {len(made)} of the global model's {len(schema)} variables: clients are sent these, and "
                f"the rest is kept as it is: {listed(dropped)}",
            )
        self.note_part([name for name in schema if name in made])

    @property
    def sent(self) -> frozenset[str]:
        """Names of the variables that messages carry."""
        return frozenset(self.job.schema if self._part is None else self._part)

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

    def averaged(self, contributions: Sequence[Contribution]) -> frozenset[str]:
        """Names of the variables of contributions that are averaged; see `Round.averaged`."""
        return self.job.averaged(contributions)

    def change_model(self, schema: Schema, who: str) -> None:
        """From the next round on the model has other names, shapes or dtypes.

        Args:
            schema: These.
            who: What has changed them.
        """
        before = self.job.schema
        other = [name for name in before if name in schema and schema[name] != before[name]]
        added, dropped = (
            [name for name in schema if name not in before],
            [name for name in before if name not in schema],
        )
        parts = [
            f"{what} {listed(names)}"
            for what, names in (("adds", added), ("drops", dropped), ("changes the shape or dtype of", other))
            if names
        ]
        logger.warning(
            "\t> the global model is another one from now on: %s %s", who, " and ".join(parts) or "reorders it"
        )
        self.job.change_schema(schema)
        self._part = None

    def start_round(self, number: int, weights: WeightDict | None = None) -> None:
        """START_ROUND.

        Args:
            number: From 0.
            weights: Replaces the global model, before any handler sees it.

        Raises:
            ContributionError: These, or what a handler put in their place, are no model of the job's.
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        self._asked, self.heard, self.contributed, self._missed, self.arrived = {}, {}, {}, {}, None
        self._names.begin_round(forget=self.guessed)  # nothing says that the nodes are those of the call before
        self.number = number
        self.widths.forget()
        before = self.job.weights if weights is None else weights
        self.job.start_round(number, weights)
        if not _same_memory(before, self.job.weights):  # a handler replaced what the clients had scored
            self._scores = {}
        self._begun = self.job.weights, dict(self._scores), self._part

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
        weights, self._scores, part = self._begun
        if Schema.of(weights) != self.job.schema:
            self.job.change_schema(Schema.of(weights))
        self.number, self._before = number, self.job.reports.pop()
        self.job.start_round(number, weights)
        self._part = part

    def ask(self, node: Hashable) -> None:
        """SEND_MODEL, unless this node has been asked in this round.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        if node not in self._asked:
            self._asked[node] = None
            self.job.send_model(self.called(node))

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
            name = self._names.name(node, claim())
            return name, self.widths.widened(read(name))
        except BaseException as error:  # noqa: BLE001 - the job says what becomes of it
            # That a client failed is not this code's failure: where it was noticed would tell nothing.
            failure = without_tracebacks(error) if isinstance(error, ClientQuitError) else as_failure(error)
            return self.called(node), failure

    def foresee(self, sent: Iterable[Contribution | Exception]) -> None:
        """See `Round.foresee`: all that a round will receive is at hand."""
        self.job.foresee([one for one in sent if isinstance(one, Contribution)])

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
            self.contributed[node] = None
        return contribution

    def with_score(self, name: str, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        """The metrics of a contribution, with what its client measured on the global model before the round."""
        score = self._scores.get(name)
        if score is None or number_of(metrics.get(INITIAL_VALIDATION_METRIC)) is not None:
            return metrics
        return {**metrics, INITIAL_VALIDATION_METRIC: score}

    def lose(self, errors: Sequence[ClientQuitError]) -> None:
        """Notes failures that name no client: of the nodes that have not answered, where that is certain.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        silent = [node for node in self._asked if node not in self.heard]
        if len(silent) == len(errors) and len(set(map(str, errors))) == 1:
            for node, error in zip(silent, errors, strict=True):
                self.fail(node, error)
            return
        for error in errors:
            self.job.note_failure("a client", error, "failed")
        if len(silent) <= len(errors):  # each of them is one of the failures, which have been told
            self._missed |= dict.fromkeys(silent)

    def fail(self, node: Hashable, error: ClientQuitError) -> None:
        """CLIENT_QUIT of a node that failed.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        self.receive(node, self.called(node), without_tracebacks(error))

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
        # A reply that arrived and is not here was put aside by the user's own code.
        came = self.heard if self.arrived is None else {**self.heard, **self.arrived}
        absent = [node for node in self._asked if node not in came and node not in self._missed]
        self._missed |= dict.fromkeys(absent)
        for node in absent:
            self.job.absent(self.called(node))
        if absent:
            what = (
                "No reply from" if self.arrived is not None or self.num_rounds is not None else "Not among the replies:"
            )
            logger.warning("\t> %s %s", what, in_one_line([self.called(node) for node in absent]))
        before = self.job.weights
        if error is not None:
            self.job.fail_round(error)
        # Where nobody was asked and nobody answered, there is nothing that could be missing.
        expected = bool(self._asked or self.heard)
        try:
            aggregated = error is None and expected and self.job.aggregate()
        finally:
            for failure in self.job.report.rejected:
                logger.warning("\t> Refused: %s: %s", failure.cause, text_of(failure.error))
        if any(INITIAL_VALIDATION_METRIC in one.metrics for one in self.job.ctx.get_prop(ContextKey.CONTRIBUTIONS, ())):
            self.selection.fix()
        self.end_round()
        if self.job.weights is not before:
            self._scores = {}
        return aggregated or self.job.weights is not before

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
            self.job.reports[-1], self._before = _both(self._before, self.report), None
        self.forget_round()

    def forget_round(self) -> None:
        """Keeps nothing of a round that ended, or was broken off: if it comes again, it begins anew."""
        if self._before is not None:  # of replies that were aggregated before those that broke off
            self.job.reports.append(self._before)
        self.number, self.accepted, self.failed, self._before = None, {}, [], None
        self.job.break_off_round()

    def called(self, node: Hashable) -> str:
        """What a node is called, as far as is known."""
        return self._names.called(node)

    def note_score(self, node: Hashable, claim: Callable[[], str | None], metric: float) -> None:
        """Notes what a client measured on the global model, which it will receive in the next round.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        try:
            self._scores[self._register(node, self._names.name(node, claim()))] = metric
        except UnknownContributorError as error:
            logger.warning("\t> a score is left out: %s", error)

    def begin_final(self, weights: FrozenWeights | None = None) -> None:
        """The final model is about to be scored by clients.

        Args:
            weights: What they are sent, if it is not the job's global model.
        """
        self._asked, self.heard, self.final = {}, {}, True
        self._names.begin_round(forget=False)
        self.job.begin_validation(FINAL_MODEL, weights)

    def receive_final(
        self, node: Hashable, claim: Callable[[], str | None], read: Callable[[], Mapping[str, Any]]
    ) -> None:
        """RECEIVE_VALIDATION_RESULTS of the final model.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        name = self.called(node)
        result: ValidationResult | Exception
        try:
            name = self._register(node, self._names.name(node, claim()))
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

    def connect(self, connected: Callable[[], Iterable[Hashable]] | None) -> None:
        """Is told how to ask the stack which nodes are connected to it; None: there is no way."""
        self._names.connected = connected

    def expect(self, claims: Iterable[tuple[Hashable, str | None]]) -> None:
        """See `Names.expect`."""
        self._names.expect(claims)

    def _register(self, node: Hashable, name: str) -> str:
        """Notes that a node answered; CLIENT_REGISTER if its name is new. Returns the name."""
        self.heard[node] = None
        if name not in self.job.clients:
            self.job.register(name)
        return name


class _FlowerJob(Job):
    """A job that writes the mean where the bytes of the next message are, and leaves it to Flower's words who failed.

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
        self._full = settings.aggregation.kind is Kind.FULL
        self._foresees = True

    def averaged(self, contributions: Sequence[Contribution]) -> frozenset[str]:
        """See `Round.averaged`."""
        return self._round.averaged(contributions)

    def foresee(self, sent: Sequence[Contribution]) -> None:
        """See `Round.foresee`."""
        if self._aggregate_by is None and self._foresees:
            self._foresees = self._round.foresee(sent, RecordWriter if self._full else None)

    def _combined(self, contributions: Sequence[Contribution]) -> FrozenWeights | Exception:
        if self._aggregate_by is not None:
            self._note_sent(self._round.sent(contributions))
            try:
                return self._aggregate_by(contributions)
            except FedLearnError as error:
                return error
        try:
            combined = self._round.combine(contributions, output=RecordWriter if self._full else None, ctx=self.ctx)
            self._note_sent(combined.sent)
            return combined.applied_to(self.weights, RecordWriter)
        except UNUSABLE as error:
            return error

    def log_failure(self, name: str, error: Exception, what: str) -> None:
        """See `Job.log_failure`."""
        if not isinstance(error, ClientQuitError):
            super().log_failure(name, error, what)


def _both(first: RoundReport, second: RoundReport) -> RoundReport:
    """One report of a round whose replies were aggregated in two parts: accepted is who counted in either."""
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


def _schema_of(weights: WeightDict) -> Schema | None:
    """None for what cannot be averaged."""
    try:
        return Schema.of(weights)
    except ContributionError:
        return None


def _same_memory(left: WeightDict, right: WeightDict) -> bool:
    return len(left) == len(right) and all(
        name in right and array.__array_interface__["data"] == right[name].__array_interface__["data"]
        for name, array in left.items()
    )
