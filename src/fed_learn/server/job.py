"""`Job`: one run of a server, event by event, whatever carries the messages."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from fed_learn.aggregation.round import UNUSABLE, Round
from fed_learn.aggregation.rules import ClaraRule
from fed_learn.aggregation.told import Told
from fed_learn.contribution import (
    FINAL_MODEL,
    INITIAL_VALIDATION_METRIC,
    ClientFailure,
    Contribution,
    RoundReport,
    ValidationResult,
    check_contributor,
)
from fed_learn.errors import (
    BrokenAccumulatorError,
    ContributionError,
    ExactDomainError,
    FedLearnError,
    FloatingPointEnvironmentError,
    HandlerError,
    HandlerFailure,
    MetricError,
    OutOfTurnError,
    TooFewContributionsError,
    UnknownContributorError,
    WeightsTypeError,
    a_type,
    as_failure,
    brief,
    described,
    is_error,
    printable,
    text_of,
    without_tracebacks,
)
from fed_learn.events import EventType, fire_event, shut_down
from fed_learn.model_meta import ContextKey, ModelData
from fed_learn.server.job_events import JobEvents, checked_model, nothing_aggregated
from fed_learn.server.result import JobResult
from fed_learn.server.settings import JobSettings, initial_model
from fed_learn.server.validation import checked_result
from fed_learn.weights import FrozenDict, FrozenWeights, Schema, WeightDict

logger = logging.getLogger(__name__)


class Job(JobEvents):
    """One run of a server: the context, the global model, the contributions of the round, and the record of it all.

    `FederatedServer.begin` makes one. Who carries the messages calls its methods at the moments they are named
    after, and each fires the event of that moment. As a context manager it shuts the handlers down, whatever fails.

    Args:
        settings: What it is told.
        weights: The initial global model: see `initial_model`.
        num_clients: How many contributions a round needs if the settings say nothing; None: one of each client that
            was sent the model.

    Attributes:
        settings: As given.
        quits: Clients that left, and why.
        clients: Names of the clients that have registered and not quit.
        aggregated_elsewhere: Whether a round was aggregated by something else than this job.

    Example:
        >>> import numpy as np, fed_learn as fl
        >>> server = fl.FederatedServer({"w": np.zeros(1)}, num_rounds=1)
        >>> with server.begin() as job:
        ...     job.start_round(0)
        ...     for name, w in {"site-1": 1.0, "site-2": 3.0}.items():
        ...         job.send_model(name)
        ...         accepted = job.receive(name, fl.Contribution(name, {"w": np.array([w])}, 10, round=0))
        ...     averaged, report = job.aggregate(), job.end_round()
        >>> averaged, report.accepted, job.weights["w"]
        (True, ('site-1', 'site-2'), array([2.]))
    """

    def __init__(self, settings: JobSettings, weights: WeightDict, num_clients: int | None = None) -> None:
        super().__init__(settings.handlers, settings.on_handler_error)
        self.settings = settings
        if settings.num_rounds is not None:
            self.ctx.set_prop(ContextKey.NUM_ROUNDS, settings.num_rounds)
        if isinstance(settings.aggregation.rule, ClaraRule):
            self.ctx.set_prop(ContextKey.AGGREGATOR, settings.aggregation.rule.aggregator)
        self.quits: list[ClientFailure] = []
        self.cross_site: dict[str, dict[str, float]] = {}
        self.validation_results: list[ValidationResult] = []
        self.clients: dict[str, None] = {}
        self._num_clients = num_clients
        self._told = Told()
        self._asked: set[str] = set()
        self._round_started = 0.0
        self._validated: str | None = None
        self._final_metrics = FrozenDict()
        self._result: JobResult | None = None
        self._late: list[HandlerFailure] = []
        self._over = False
        self._finished = False
        self.aggregated_elsewhere = False
        self._in_round = False
        self._aggregated = False
        self._unanswered = 0  # contributions of the round that no attempt to aggregate has met
        model = initial_model(weights, settings.aggregation.kind)
        self._schema = Schema.of(model)
        self._adopt(model)
        self._begin(None)

    @property
    def weights(self) -> FrozenWeights:
        """The global model."""
        return self._weights

    @property
    def schema(self) -> Schema:
        """Names, shapes and dtypes of the global model; empty until they are known."""
        return self._schema

    @property
    def required(self) -> int:
        """How many accepted contributions a round needs."""
        if self.settings.aggregation.min_contributions is not None:
            return self.settings.aggregation.min_contributions
        return self._num_clients if self._num_clients is not None else max(1, len(self._asked))

    def start(self) -> None:
        """STARTUP.

        Raises:
            HandlerError: A handler could not start; those before it have been shut down.
        """
        try:
            fire_event(EventType.STARTUP, self.handlers, self.ctx)
        except HandlerError as error:
            error.result = self.result()
            raise

    def register(self, name: str) -> None:
        """CLIENT_REGISTER: a client takes part from now on.

        Raises:
            UnknownContributorError: That cannot be the name of a client.
            HandlerError: With `on_handler_error="raise"`, here and in all that follow.
        """
        self.clients[check_contributor(name)] = None
        self.fire(EventType.CLIENT_REGISTER, name)

    def start_round(self, number: int, weights: WeightDict | None = None) -> None:
        """START_ROUND; a handler may replace the global model.

        Args:
            number: The round, from 0.
            weights: Replaces the global model, before a handler sees it. Copied, unless they are frozen.

        Raises:
            ContributionError: These are no model of the job's schema.
            HandlerError: A handler raised, or set what is none, with `on_handler_error="raise"`.
            OutOfTurnError: The round before is not over, and contributions to it would be lost.
        """
        self._check_answered("start_round")
        self._round_started = time.perf_counter()
        self._in_round, self._aggregated, self._unanswered = True, False, 0
        self._end_validation()
        if weights is not None:
            before = self._weights if Schema.of(self._weights) == self.schema else None
            self._adopt(checked_model(weights, self.schema, "global model", constants=before))
        self._asked.clear()
        self._begin(number)
        for key in (ContextKey.CONTRIBUTION, ContextKey.REJECTION):
            self.ctx.pop(key, None)
        self.ctx.set_props(
            {
                ContextKey.ROUND: number,
                ContextKey.CONTRIBUTIONS: (),
                ContextKey.METRICS: FrozenDict(),
                ContextKey.REPORT: self._round.report,
            }
        )
        self._fire_and_adopt(EventType.START_ROUND)

    def send_model(self, name: str) -> None:
        """SEND_MODEL: the client is about to be sent the global model (or that which is to be validated)."""
        self._asked.add(name)
        self.fire(EventType.SEND_MODEL, name)

    def receive(self, name: str, sent: object) -> Contribution | None:
        """RECEIVE_CONTRIBUTION: checks what a client sent, whole, and accepts or refuses it.

        Args:
            name: The client that was asked.
            sent: A `Contribution`; or what went wrong: a `ContributionError` means that it could not make one, and is
                a refusal; a `MetricError` or any other exception, that the client failed: it leaves the job
                (CLIENT_QUIT). Anything else
                is refused. A streaming server has used the weights when this returns.

        Returns:
            The contribution as accepted, or None.

        Raises:
            ContributionError: It is refused, with `on_bad_contribution="raise"`.
            OutOfTurnError: No round has begun, or it is aggregated already.
        """
        self._check_in_round("receive")
        self._check_not_aggregated("receive")
        if is_error(sent) and (isinstance(sent, MetricError) or not isinstance(sent, ContributionError)):
            self.quit(name, as_failure(sent))
            return None
        contribution, refusal = self._judged(name, sent)
        self._unanswered += refusal is None
        self.fire_contribution(name, contribution, refusal)
        if refusal is None:
            return contribution
        if self.settings.aggregation.on_bad_contribution == "raise":
            raise refusal
        return None

    def _judged(self, name: str, sent: object) -> tuple[Contribution | None, Exception | None]:
        """The contribution, without its weights where it is refused or folded in; and why it is refused."""
        refusal: Exception
        try:
            return self._round.receive(_from_client(name, sent)), None
        except (BrokenAccumulatorError, FloatingPointEnvironmentError):
            raise  # not the client's doing
        except (ContributionError, ExactDomainError) as error:
            refusal = without_tracebacks(error)
        except BaseException as error:
            unreadable = WeightsTypeError(f"{name}: sent something unreadable: {described(error)}", contributor=name)
            unreadable.__cause__ = as_failure(error)
            logger.error("%s", unreadable, exc_info=error)
            refusal = without_tracebacks(unreadable)
        # What handlers see of it: everything but its weights.
        return _without_weights(sent), refusal

    def absent(self, name: str) -> None:
        """Notes in the report that a client sits the round out, or did not answer in time.

        Raises:
            OutOfTurnError: No round has begun.
        """
        self._check_in_round("absent")
        self.update_report(absent=(*self.report.absent, name))

    def aggregate(self) -> bool:
        """BEFORE_AGGREGATION, the average into the global model, END_AGGREGATION.

        Where clients sent different parts of the model, it is decided first which of them count; for a contribution
        that is refused now, RECEIVE_CONTRIBUTION is fired once more, with the reason.

        Handlers may take contributions out of the context before, except where the server streams, and replace the
        global model after. With too few contributions, or if the new model left the range of a dtype, the global
        model stands, and log and report say why.

        Returns:
            Whether there is a new global model.

        Raises:
            ContributionError: A part of the model is refused, with `on_bad_contribution="raise"`; or a handler put a
                bad contribution into the context.
            HandlerError: A handler raised, or put a bad model into the context, with `on_handler_error="raise"`.
            ValueError: A handler changed which contributions are averaged, and the server streams.
            OutOfTurnError: No round has begun, or it is aggregated already.
        """
        self._check_in_round("aggregate")
        self._check_not_aggregated("aggregate")
        aggregated = self._aggregate()
        self._unanswered = 0
        return aggregated

    def _aggregate(self) -> bool:
        self._settle()
        if not self._enough():
            return False
        count = len(self.ctx[ContextKey.CONTRIBUTIONS])
        self.fire(EventType.BEFORE_AGGREGATION)
        if not self._enough(count):
            return False
        contributions: tuple[Contribution, ...] = self.ctx[ContextKey.CONTRIBUTIONS]
        made = self._combined(contributions)
        if isinstance(made, Exception):
            logger.error("round %d: %s; the global model stands", self.report.round + 1, made)
            self.update_report(error=without_tracebacks(made))
            return False
        self._adopt(made)
        self._aggregated = True
        self.update_report(
            error=None,  # of an attempt before, with fewer
            accepted=tuple(c.contributor for c in contributions),
            total_weight=self._round.report.total_weight,
            aggregation_seconds=self._round.report.aggregation_seconds,
            aggregation_bytes=len(contributions) * sum(array.nbytes for array in self._weights.values()),
        )
        self._fire_and_adopt(EventType.END_AGGREGATION)
        return True

    def end_round(self) -> RoundReport:
        """END_ROUND; returns the report of the round. The weights of its contributions are not kept.

        Raises:
            OutOfTurnError: No round has begun, or its contributions have not been aggregated.
        """
        self._check_in_round("end_round")
        self._check_answered("end_round")
        self.update_report(seconds=time.perf_counter() - self._round_started)
        self._fire_and_adopt(EventType.END_ROUND)
        self._in_round = False
        self._begin(None)
        self.drop_weights()
        self.reports.append(self.report)
        return self.report

    def fail_round(self, error: Exception) -> None:
        """Says why nothing is made of what the round has received; the global model stands, and `end_round` follows.

        Raises:
            OutOfTurnError: No round has begun, or it is aggregated already.
        """
        self._check_in_round("fail_round")
        self._check_not_aggregated("fail_round")
        self.update_report(error=without_tracebacks(error))
        self._unanswered = 0

    def break_off_round(self) -> None:
        """Gives up a round that an error has ended, with what was received; `start_round` begins it, or another."""
        self._in_round, self._unanswered = False, 0

    @property
    def stopped(self) -> bool:
        """Whether a handler made this round the last (`ContextKey.STOP`)."""
        return self.ctx.get_prop(ContextKey.STOP) is not None

    def begin_validation(self, model: str = FINAL_MODEL, weights: FrozenWeights | None = None) -> None:
        """From now on results on this model come in; the model in the context is the one that is validated.

        Args:
            model: `FINAL_MODEL`, the first one: the global model after the last round. The round in the context is
                then the one in which clients would have received it: the number of rounds run. Or a client's name,
                for its local best, or `GLOBAL_BEST`.
            weights: Its weights; None: the global model's.

        Raises:
            OutOfTurnError: A round is not over, and contributions to it would be lost.
        """
        self._check_answered("begin_validation")
        if model == FINAL_MODEL:
            self.ctx.set_props({ContextKey.ROUND: len(self.reports), ContextKey.METRICS: FrozenDict()})
            for key in (ContextKey.CONTRIBUTION, ContextKey.CONTRIBUTIONS, ContextKey.REJECTION, ContextKey.REPORT):
                self.ctx.pop(key, None)
        else:
            if self._validated == FINAL_MODEL:
                self._final_metrics = self.ctx[ContextKey.METRICS]
            self.cross_site.setdefault(model, {})
        self.ctx.pop(ContextKey.VALIDATION_RESULTS, None)
        self._validated = model
        self.ctx.set_model(self._model if weights is None else ModelData(weights))

    def receive_validation_result(self, name: str, result: object) -> ValidationResult | None:
        """RECEIVE_VALIDATION_RESULTS: one client's numbers on the model of `begin_validation`.

        Args:
            name: The client.
            result: A `ValidationResult`; an exception means that the client failed, and leaves the job. A bad result is
                left out, and logged.

        Raises:
            OutOfTurnError: No model is being validated.
        """
        if is_error(result):
            self.quit(name, as_failure(result))
            return None
        if self._validated is None:
            raise OutOfTurnError("receive_validation_result: begin_validation comes first")
        results: tuple[ValidationResult, ...] = self.ctx.get_prop(ContextKey.VALIDATION_RESULTS, ())
        try:
            checked = checked_result(name, self._validated, result, results)
        except BaseException as error:  # noqa: BLE001 - whatever a client sent must not end the job
            named = isinstance(as_failure(error), MetricError)
            reason = text_of(error) if named else f"{printable(name)}: {described(error)}"
            logger.error("a validation result is left out: %s", reason)
            return None
        self.validation_results.append(checked)
        self.ctx.set_prop(ContextKey.VALIDATION_RESULTS, (*results, checked))
        self.fire(EventType.RECEIVE_VALIDATION_RESULTS, name)
        if self._validated != FINAL_MODEL:
            self.cross_site[self._validated][name] = checked.metrics[INITIAL_VALIDATION_METRIC]
        return checked

    def quit(self, name: str, error: Exception | None = None) -> None:
        """CLIENT_QUIT: a client leaves, because it is done (no error) or because it failed."""
        if error is not None:
            self.note_failure(name, error, "leaves the job")
        self.clients.pop(name, None)
        self.fire(EventType.CLIENT_QUIT, name)

    def note_failure(self, name: str, error: Exception, what: str) -> None:
        """Logs and records that a client failed, without an event."""
        self.log_failure(name, error, what)
        failure = ClientFailure(name, without_tracebacks(error))
        self.quits.append(failure)
        if ContextKey.REPORT in self.ctx:
            self.update_report(quits=(*self.report.quits, failure))
        if isinstance(error, HandlerError):
            self.record(error.failures)

    def log_failure(self, name: str, error: Exception, what: str) -> None:
        """Logs that a client failed. A stack that has said so in its own words overrides this."""
        logger.error("%s %s: %s", printable(name), what, described(error), exc_info=error)

    def record_late(self, failures: Sequence[HandlerFailure]) -> None:
        """Keeps failures of handlers while a job shuts down: they do not stop it from doing so."""
        self._late += failures

    def finish(self) -> None:
        """The work is done: what handlers put into the context from here on is not in the result.

        Raises:
            NothingAggregatedError: Rounds were run, and none of them made a new global model.
            OutOfTurnError: A round is not over, and contributions to it would be lost.
        """
        self._check_answered("finish")
        self.ctx.set_model(self._model)
        self._result = self._so_far()
        self._refuse_untrained()

    def result(self) -> JobResult:
        """What the job leaves behind, or has so far."""
        return replace(
            self._so_far() if self._result is None else self._result,
            handler_failures=(*self.handler_failures, *self._late),
        )

    def shut_down(self) -> tuple[HandlerFailure, ...]:
        """SHUTDOWN of every handler, once; returns what failed, which has been logged."""
        if self._over:
            return ()
        self._over = True
        self.ctx.pop(ContextKey.CONTRIBUTOR, None)
        self.ctx.set_model(self._model)  # while others' models are validated, it is one of theirs
        at_the_end = self.ctx.snapshot()
        try:
            failures = shut_down(self.handlers, self.ctx)
        finally:
            self.ctx.mend(at_the_end)  # handlers may have tidied up, and the result is still to be read from it
        self.record_late(failures)
        return failures

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.shut_down()
        except BaseException as leaving:
            self._leave_result(leaving)
            raise
        if error is None:
            self._check_answered("the end of the job")
            self._refuse_untrained()
        if error is not None:
            for failure in self._late:
                error.add_note(f"during shutdown: {failure}")
            self._leave_result(error)
        elif self._late and self.on_handler_error == "raise":
            late = HandlerError(tuple(self._late))
            late.result = self.result()
            raise late

    def _leave_result(self, error: BaseException) -> None:
        """Puts what there is so far into the error that ends the job, `SystemExit` of a handler of its own included."""
        if not isinstance(error, FedLearnError) and isinstance(error, Exception):
            return  # of the caller's own loop
        ended: Any = error
        ended.result = self._result_of_broken_job()
        if isinstance(error, SystemExit):
            logger.error(
                "the job ends by %s after %d rounds; what it has so far is the result of this exception",
                described(error),
                len(self.reports),
            )

    def _result_of_broken_job(self) -> JobResult:
        """What there is so far, with the report of a round that did not come to its end."""
        result, under_way = self.result(), self.ctx.get_prop(ContextKey.REPORT)
        if under_way is None or any(report.round == under_way.round for report in result.reports):
            return result
        return replace(result, reports=(*result.reports, under_way))

    def check_enough_clients(self) -> None:
        """Ends the job once too many clients have left.

        Raises:
            TooFewContributionsError: Fewer are left than are required.
        """
        if len(self.clients) < self.required:
            left = "; ".join(f"{quit.contributor} left ({described(quit.error)})" for quit in self.quits)
            raise TooFewContributionsError(
                f"{len(self.clients)} clients are left, {self.required} required: {left}",
                count=len(self.clients),
                required=self.required,
                round=self.ctx.get_prop(ContextKey.ROUND),
            )

    def _check_in_round(self, what: str) -> None:
        if not self._in_round:
            last = f", for that of round {len(self.reports)} is over" if self.reports else ""
            raise OutOfTurnError(f"{what}: start_round comes first{last}")

    def _check_not_aggregated(self, what: str) -> None:
        if self._aggregated:
            raise OutOfTurnError(f"{what}: round {self.report.round + 1} is aggregated already")

    def _check_answered(self, what: str) -> None:
        """Raises if contributions have been accepted that nothing was made of, and no error says why."""
        if self._unanswered and not self.aggregated_elsewhere:
            raise OutOfTurnError(
                f"{what}: aggregate comes first, for contributions to round {self.report.round + 1} have been accepted"
            )

    def _end_validation(self) -> None:
        """The model in the context is the global one again, whatever was validated."""
        if self._validated == FINAL_MODEL:
            self._final_metrics = self.ctx[ContextKey.METRICS]
        self._validated = None
        self.ctx.set_model(self._model)

    def change_schema(self, schema: Schema) -> None:
        """From the next round on the global model, which `start_round` is given, has other names, shapes or dtypes."""
        self._schema = schema

    def _refuse_untrained(self) -> None:
        """Raises, once, if no round of the job was aggregated although clients were asked to train."""
        error = None if self._finished or self.aggregated_elsewhere else nothing_aggregated(self.reports)
        self._finished = True
        if error is not None:
            error.result = self.result()
            raise error

    def _adopt(self, weights: FrozenWeights) -> None:
        """Replaces the global model, in the context too."""
        self._schema = self._schema or Schema.of(weights)
        self._weights = weights
        self._model = ModelData(weights)
        self.ctx.set_model(self._model)

    def _fire_and_adopt(self, event: str) -> None:
        """Fires an event in which a handler may replace the global model; keeps what it put there."""
        replaced = self.fire_for_model(event, self.schema, self._weights)
        if replaced is not None:
            self._adopt(replaced)

    def _settle(self) -> None:
        """Refuses what cannot be averaged with the others, now that all contributions are known."""
        refused = [(contribution, without_tracebacks(error)) for contribution, error in self._round.close()]
        for contribution, error in refused:
            others = tuple(c for c in self.ctx[ContextKey.CONTRIBUTIONS] if c.contributor != contribution.contributor)
            self.ctx.set_prop(ContextKey.CONTRIBUTIONS, others)
            self.fire_contribution(contribution.contributor, contribution.without_weights(), error)
        if refused and self.settings.aggregation.on_bad_contribution == "raise":
            raise refused[0][1]

    def _enough(self, before: int = 0) -> bool:
        """Whether the contributions are enough for a round, of which there were so many before handlers chose."""
        count = len(self.ctx[ContextKey.CONTRIBUTIONS])
        error = self._round.too_few(count, self.required, max(0, before - count))
        if error is None:
            return True
        logger.error("%s", error)
        self.update_report(error=error)
        return False

    def _begin(self, number: int | None) -> None:
        """Another round, of the global model as it is."""
        self._round = Round(self.settings.aggregation, number=number, model=self._weights, told=self._told)

    def _combined(self, contributions: Sequence[Contribution]) -> FrozenWeights | Exception:
        """The new global model, or why there is none. A stack that makes it in its own way overrides this."""
        try:
            return self._round.combine(contributions, ctx=self.ctx).applied_to(self._weights)
        except UNUSABLE as error:
            return error

    def _so_far(self) -> JobResult:
        # Handlers still score the final model while it is the one that is validated.
        final: Any = self.ctx[ContextKey.METRICS] if self._validated == FINAL_MODEL else self._final_metrics
        return JobResult(
            weights=self._weights,
            best=self.ctx.best_model,
            reports=tuple(self.reports),
            metrics=final,
            cross_site=self.cross_site,
            validation_results=tuple(self.validation_results),
            quits=tuple(self.quits),
            handler_failures=(),
            stop_reason=self.ctx.get_prop(ContextKey.STOP),
        )


def _without_weights(sent: object) -> Contribution | None:
    """What a client sent but for its weights; None if it was none, or cannot be looked at."""
    try:
        return sent.without_weights() if isinstance(sent, Contribution) else None
    except BaseException as error:  # noqa: BLE001 - from outside; the refusal says what is wrong with it
        as_failure(error)
        return None


def _from_client(name: str, sent: object) -> Contribution:
    """What a client sent, if it is a contribution in its own name."""
    if isinstance(sent, ContributionError):
        raise sent
    if not isinstance(sent, Contribution):
        raise WeightsTypeError(f"{name}: sent {a_type(type(sent))}, not a Contribution", contributor=name)
    if not isinstance(sent.contributor, str) or sent.contributor != name:
        raise UnknownContributorError(
            f"{name}: sent a contribution in the name of {brief(sent.contributor)}", contributor=name
        )
    return sent
