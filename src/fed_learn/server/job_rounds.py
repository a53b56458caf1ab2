"""`JobRounds`: the global model and the rounds of a job.

Either the job itself receives contributions (`receive`) and averages them (`aggregate`), or another stack does, and
tells the job at each moment what has happened: `note`, `refuse`, `before_aggregation`, `note_aggregation`,
`end_aggregation`. `receive` and `aggregate` call these methods too. How contributions are checked and combined is left
to `Round`; clients and handlers to `JobEvents`; what comes before the first round and after the last to `Job`.
"""

import logging
import time
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fed_learn.aggregation.round import UNUSABLE, Round
from fed_learn.aggregation.rules import ClaraRule
from fed_learn.aggregation.told import Told
from fed_learn.contribution import ClientFailure, Contribution, RoundReport
from fed_learn.errors import (
    AggregatorError,
    BrokenAccumulatorError,
    ContributionError,
    ExactDomainError,
    FloatingPointEnvironmentError,
    MetricError,
    OutOfTurnError,
    UnknownContributorError,
    WeightsTypeError,
    a_type,
    as_failure,
    brief,
    described,
    is_error,
    without_tracebacks,
)
from fed_learn.events import EventType
from fed_learn.model_meta import ContextKey
from fed_learn.server.job_events import JobEvents
from fed_learn.server.settings import JobSettings, checked_model, initial_model
from fed_learn.weights import FrozenDict, FrozenWeights, Schema, WeightDict

logger = logging.getLogger(__name__)


class JobRounds(JobEvents):
    """The global model, the contributions of the round, and a report of each round.

    Args:
        settings: The settings of the job.
        weights: The initial global model: see `initial_model`.
        num_clients: How many contributions a round needs if the settings say nothing; None: one of each client that
            was sent the model.

    Attributes:
        settings: As given.
        aggregated_elsewhere: Whether another stack has aggregated a round in the place of this job.
    """

    def __init__(self, settings: JobSettings, weights: WeightDict, num_clients: int | None = None) -> None:
        model = initial_model(weights, settings.aggregation.kind, settings.aggregation.policies)
        super().__init__(settings.handlers, settings.on_handler_error, model)
        self.settings = settings
        if settings.num_rounds is not None:
            self.ctx.set_prop(ContextKey.NUM_ROUNDS, settings.num_rounds)
        if isinstance(settings.aggregation.rule, ClaraRule):
            self.ctx.set_prop(ContextKey.AGGREGATOR, settings.aggregation.rule.aggregator)
        self.aggregated_elsewhere = False
        self._num_clients = num_clients
        self._told = Told()
        self._asked: dict[str, None] = {}
        self._accepted: list[Contribution] = []
        self._names: list[str] = []  # theirs
        self._listed: tuple[Contribution, ...] = ()  # what the context lists, unless a handler has bound others
        self._sorted: tuple[Contribution, ...] = ()  # the same in the order of names, unless a handler has another
        self._round_started = 0.0
        self._in_round = False
        self._aggregated = False
        self._unanswered = 0  # contributions accepted since the last attempt to aggregate
        self._begin(None)

    @property
    def in_round(self) -> bool:
        """Whether a round has begun and not ended."""
        return self._in_round

    @property
    def required(self) -> int:
        """How many accepted contributions a round needs."""
        if self.settings.aggregation.min_contributions is not None:
            return self.settings.aggregation.min_contributions
        return self._num_clients if self._num_clients is not None else max(1, len(self._asked))

    @property
    def local(self) -> frozenset[str]:
        """Names of the variables that clients keep to themselves: they are not sent, and theirs are not taken."""
        policies = self.settings.aggregation.policies
        return frozenset(filter(self.is_local, self.schema)) if policies else frozenset()

    def is_not_sent(self, name: str) -> bool:
        """Whether clients need not send a variable of this name: it is local to each of them, or kept as it is here."""
        return self.settings.aggregation.policies.of(name) in ("local", "keep")

    def is_local(self, name: str) -> bool:
        """Whether clients keep a variable of this name to themselves, be it one that the global model lacks."""
        return self.settings.aggregation.policies.of(name) == "local"

    def sent(self, weights: FrozenWeights | None = None) -> FrozenWeights:
        """What clients are sent of a model: all but what is local to each of them.

        Args:
            weights: The model; None: the global model.
        """
        whole, local = self._weights if weights is None else weights, self.local
        return whole if not local else FrozenWeights.adopt({n: whole[n] for n in whole if n not in local})

    def start_round(self, number: int, weights: WeightDict | None = None) -> None:
        """START_ROUND; a handler may replace the global model.

        Args:
            number: The round, from 0.
            weights: Replaces the global model, before a handler sees it. Copied, unless they are frozen.

        Raises:
            ContributionError: These are no model of the job's schema.
            HandlerError: A handler raised, or set what is no model, with `on_handler_error="raise"`.
            OutOfTurnError: The round before is not over, and contributions to it would be lost.
        """
        self._check_answered("start_round")
        self._round_started = time.perf_counter()
        self._in_round, self._aggregated, self._unanswered = True, False, 0
        if weights is not None:
            before = self._weights if Schema.of(self._weights) == self.schema else None
            self._adopt(checked_model(weights, self.schema, "global model", constants=before))
        self._asked.clear()
        report = self._begin(number)
        for key in (ContextKey.CONTRIBUTION, ContextKey.REJECTION):
            self.ctx.pop(key, None)
        self._list(())
        self.ctx.set_props(
            {
                ContextKey.ROUND: number,
                ContextKey.METRICS: FrozenDict(),
                ContextKey.REPORT: report,
            }
        )
        self._fire_and_adopt(EventType.START_ROUND)

    def send_model(self, name: str) -> None:
        """SEND_MODEL: the client is about to be sent the global model, or the model that it is to validate."""
        self._asked[name] = None
        self.fire(EventType.SEND_MODEL, name)

    def receive(self, name: str, sent: object) -> Contribution | None:
        """RECEIVE_CONTRIBUTION: checks what a client sent, whole, and accepts or refuses it.

        Args:
            name: The client that was asked.
            sent: A `Contribution`. Or an exception: a `ContributionError` means that the client could not make a
                contribution, and is a refusal; a `MetricError` or any other exception means that the client failed,
                and it leaves the job (CLIENT_QUIT). Anything else is refused. A streaming server needs the weights no
                more when this returns.

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
        self.note(name, contribution, refusal)
        if refusal is None:
            return contribution
        if self.settings.aggregation.on_bad_contribution == "raise":
            raise refusal
        return None

    def note(self, name: str, contribution: Contribution | None, refusal: Exception | None = None) -> None:
        """RECEIVE_CONTRIBUTION: what a client sent has been accepted, or refused.

        Args:
            name: The client.
            contribution: What it sent; None if that was no contribution.
            refusal: Why it is refused; None: it is accepted.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        accepted, report = self._contributions(), self.report
        rejected = report.rejected
        if refusal is not None:
            rejected = (*rejected, ClientFailure(name, without_tracebacks(refusal)))
        elif contribution is not None:
            if accepted is not self._sorted:  # a handler's order holds until the next one comes
                self._list(sorted(accepted, key=lambda one: one.contributor))
            place = bisect(self._names, contribution.contributor)
            self._names.insert(place, contribution.contributor)
            self._accepted.insert(place, contribution)
            accepted = self._sorted = tuple(self._accepted)
        self._listed = accepted
        self.ctx.set_props(
            {
                ContextKey.CONTRIBUTION: contribution,
                ContextKey.REJECTION: refusal,
                ContextKey.CONTRIBUTIONS: accepted,
                ContextKey.REPORT: replace(report, accepted=tuple(self._names), rejected=rejected),
            }
        )
        self.fire(EventType.RECEIVE_CONTRIBUTION, name)

    def refuse(self, name: str, refusal: Exception, sent: Contribution | None = None) -> None:
        """RECEIVE_CONTRIBUTION once more, for a contribution that is refused after all, now that all are in.

        Args:
            name: Its client.
            refusal: Why.
            sent: What it sent; None: what the context lists under its name.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        listed = self._contributions()
        refused = sent or next((one for one in listed if one.contributor == name), None)
        self._list([one for one in listed if one.contributor != name])
        self.note(name, None if refused is None else refused.without_weights(), refusal)

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

        In BEFORE_AGGREGATION handlers may take contributions out of the context, except where the server streams; in
        END_AGGREGATION they may replace the global model. With too few contributions, or if the new model left the
        range of a dtype, the global model stands, and log and report say why.

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

    def before_aggregation(self) -> tuple[Contribution, ...]:
        """BEFORE_AGGREGATION, in which handlers choose among the contributions; returns those that are left.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        self.fire(EventType.BEFORE_AGGREGATION)
        return tuple(self.ctx[ContextKey.CONTRIBUTIONS])

    def note_aggregation(self, report: RoundReport) -> None:
        """Copies into the report what another report says of the aggregation: contributors, cost, error."""
        self.update_report(
            accepted=report.accepted,
            total_weight=report.total_weight,
            aggregation_seconds=report.aggregation_seconds,
            aggregation_bytes=report.aggregation_bytes,
            kernel=report.kernel,
            error=report.error,
        )

    def end_aggregation(self, weights: FrozenWeights) -> None:
        """END_AGGREGATION: there is a new global model, which a handler may replace.

        Raises:
            HandlerError: A handler raised, or set what is no model, with `on_handler_error="raise"`.
        """
        self._aggregated = True
        self._adopt(weights)
        self._fire_and_adopt(EventType.END_AGGREGATION)

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
        self._drop_weights()
        self.reports.append(self.report)
        return self.report

    def fail_round(self, error: Exception) -> None:
        """Records why the round fails. The global model stands, and `end_round` follows.

        Raises:
            OutOfTurnError: No round has begun, or it is aggregated already.
        """
        self._check_in_round("fail_round")
        self._check_not_aggregated("fail_round")
        self.update_report(error=without_tracebacks(error))
        self._unanswered = 0

    def break_off_round(self) -> None:
        """Drops a round, and all that it received, after an error. `start_round` begins it again, or another."""
        self._in_round, self._unanswered = False, 0

    def _judged(self, name: str, sent: object) -> tuple[Contribution | None, Exception | None]:
        """The contribution, without its weights where it is refused or folded in; and why it is refused."""
        refusal: Exception
        try:
            return self._round.receive(_from_client(name, sent)), None
        except (AggregatorError, BrokenAccumulatorError, FloatingPointEnvironmentError):
            raise  # not the client's doing
        except (ContributionError, ExactDomainError) as error:
            refusal = without_tracebacks(error)
        except BaseException as error:
            unreadable = WeightsTypeError(f"{name}: sent something unreadable: {described(error)}", contributor=name)
            unreadable.__cause__ = as_failure(error)
            logger.error("%s", unreadable, exc_info=error)
            refusal = without_tracebacks(unreadable)
        # Handlers see everything of it but its weights.
        return _without_weights(sent), refusal

    def _aggregate(self) -> bool:
        self._settle()
        accepted = self._contributions()
        if not self._enough(len(accepted)):
            return False
        chosen = self.before_aggregation()
        if not self._enough(len(chosen), taken=len(accepted) - len(chosen)):
            return False
        made = self._combined(chosen)
        if isinstance(made, Exception):
            logger.error("round %d: %s; the global model stands", self.report.round + 1, made)
            self.update_report(error=without_tracebacks(made))
            return False
        read = len(chosen) * sum([array.nbytes for array in made.values()])
        names = tuple([one.contributor for one in chosen])
        weight = float(sum([one.aggregation_weight for one in chosen]))
        report = replace(self._round.report, accepted=names, total_weight=weight, aggregation_bytes=read)
        self.note_aggregation(report)
        self.end_aggregation(made)
        return True

    def _settle(self) -> None:
        """Refuses what cannot be averaged with the others, now that all contributions are known."""
        refused = self._round.close()
        for contribution, error in refused:
            self.refuse(contribution.contributor, error, contribution)
        if refused and self.settings.aggregation.on_bad_contribution == "raise":
            raise refused[0][1]

    def _enough(self, count: int, taken: int = 0) -> bool:
        """Whether a round has enough contributions, after handlers took some out; logs and records if it has not."""
        error = self._round.too_few(count, self.required, max(0, taken))
        if error is None:
            return True
        logger.error("%s", error)
        self.update_report(error=error)
        return False

    def _begin(self, number: int | None) -> RoundReport:
        """Makes a new `Round` with the global model as it is, and returns its report."""
        self._round = Round(self.settings.aggregation, number=number, model=self._weights, told=self._told)
        return self._round.report

    def _combined(self, contributions: Sequence[Contribution]) -> FrozenWeights | Exception:
        """The new global model, or why there is none. A stack that makes it in its own way overrides this."""
        try:
            return self._round.combine(contributions, ctx=self.ctx).applied_to(self._weights)
        except UNUSABLE as error:
            return error

    def _contributions(self) -> tuple[Contribution, ...]:
        """The contributions so far, in the order of their names; if a handler has bound others, those in its order."""
        bound: Iterable[Contribution] = self.ctx[ContextKey.CONTRIBUTIONS]
        if bound is not self._listed:
            self._list(bound)
        return self._listed

    def _list(self, contributions: Iterable[Contribution]) -> None:
        """Shows contributions in the context. Lists of them and of their names are kept: each new one is put in."""
        self._accepted = list(contributions)
        self._names = [one.contributor for one in self._accepted]
        self._listed = tuple(self._accepted)
        self.ctx.set_prop(ContextKey.CONTRIBUTIONS, self._listed)

    def _drop_weights(self) -> None:
        """Lists the contributions of the round without their weights, which would take memory until the next one."""
        listed, last = self._contributions(), self.ctx.get_prop(ContextKey.CONTRIBUTION)
        light = {id(one): one.without_weights() for one in (*listed, last) if one is not None}
        if last is not None:
            self.ctx.set_prop(ContextKey.CONTRIBUTION, light[id(last)])
        self._list([light[id(one)] for one in listed])
        self._sorted = self._listed

    def _check_in_round(self, what: str) -> None:
        if not self._in_round:
            last = f", for that of round {len(self.reports)} is over" if self.reports else ""
            raise OutOfTurnError(f"{what}: start_round comes first{last}")

    def _check_not_aggregated(self, what: str) -> None:
        if self._aggregated:
            raise OutOfTurnError(f"{what}: round {self.report.round + 1} is aggregated already")

    def _check_answered(self, what: str) -> None:
        """Raises if contributions have been accepted, and nobody has tried to aggregate them."""
        if self._unanswered and not self.aggregated_elsewhere:
            raise OutOfTurnError(
                f"{what}: aggregate comes first, for contributions to round {self.report.round + 1} have been accepted"
            )


def _without_weights(sent: object) -> Contribution | None:
    """What a client sent, without its weights; None if it was no contribution, or cannot be read."""
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
