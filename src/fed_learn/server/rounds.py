"""One round of a job: send, receive, check, average."""

import logging
import time
from collections.abc import Sequence

from fed_learn.aggregation import weighted_average
from fed_learn.aggregation.exact import check_domain
from fed_learn.aggregation.tensors import opened_contribution
from fed_learn.contribution import (
    ClientFailure,
    Contribution,
    Kind,
    RoundReport,
    check_contribution,
    checked_metrics,
    checked_n_iter,
)
from fed_learn.errors import (
    ContributionError,
    ExactDomainError,
    IntegerRangeError,
    MetricError,
    NonFiniteError,
    TooFewContributionsError,
    UnknownContributorError,
    WeightsTypeError,
    brief,
    without_tracebacks,
)
from fed_learn.events import EventType
from fed_learn.model_meta import ContextKey
from fed_learn.server.job import Job
from fed_learn.weights import FrozenDict, FrozenWeights, add_difference, check_finite

logger = logging.getLogger(__name__)


def run_round(job: Job, number: int) -> None:
    """START_ROUND … END_ROUND.

    Raises:
        ContributionError: A contribution was refused, with `on_bad_contribution="raise"`.
        HandlerError: A handler raised, with `on_handler_error="raise"`.
        TooFewContributionsError: Too few clients are left for another round.
    """
    started = time.perf_counter()
    for key in (ContextKey.CONTRIBUTION, ContextKey.REJECTION):
        job.ctx.pop(key, None)
    job.ctx.set_props(
        {
            ContextKey.ROUND: number,
            ContextKey.CONTRIBUTIONS: (),
            ContextKey.METRICS: FrozenDict(),
            ContextKey.REPORT: RoundReport(number, kernel=job.server.kernel),
        }
    )
    job.fire_and_adopt(EventType.START_ROUND)
    weights = job.weights
    for name in job.roster:
        job.fire(EventType.SEND_MODEL, name)
    for name, answer in job.roster.ask(lambda client: client.train_round(number, lambda: weights)):
        _take(job, name, number, answer)
    if _enough(job, number):
        job.fire(EventType.BEFORE_AGGREGATION)
        # A handler may have taken contributions out.
        if _enough(job, number) and _aggregate(job):
            job.fire_and_adopt(EventType.END_AGGREGATION)
    job.update_report(seconds=time.perf_counter() - started)
    job.fire_and_adopt(EventType.END_ROUND)
    job.reports.append(job.report)
    job.check_enough_clients()


def _take(job: Job, name: str, number: int, answer: object) -> None:
    """Sorts out what came of asking a client to train."""
    if isinstance(answer, ContributionError) and not isinstance(answer, MetricError):
        _receive(job, name, number, answer)  # it could not make a contribution of what it trained
    elif isinstance(answer, Exception):
        job.quit(name, answer)
    elif answer is None or (isinstance(answer, list | tuple) and not answer):
        job.update_report(absent=(*job.report.absent, name))
    else:
        # Clients send one contribution; what a faulty one sends on top is received and refused.
        for contribution in answer if isinstance(answer, list | tuple) else (answer,):
            _receive(job, name, number, contribution)


def _receive(job: Job, name: str, number: int, sent: object) -> None:
    """Accepts or refuses a contribution, and tells the handlers."""
    accepted: tuple[Contribution, ...] = job.ctx[ContextKey.CONTRIBUTIONS]
    contribution: Contribution | None = None
    refusal: ContributionError | ExactDomainError | None = None
    try:
        # What handlers see of a refused contribution: everything but its weights.
        contribution = sent.without_weights() if isinstance(sent, Contribution) else None
        contribution = _checked(job, name, number, sent, accepted)
        accepted = tuple(sorted((*accepted, contribution), key=lambda c: c.contributor))
    except Exception as error:
        if isinstance(error, ContributionError | ExactDomainError):
            refusal = error
        else:
            refusal = WeightsTypeError(
                f"{name}: sent something unreadable: {type(error).__name__}: {error}", contributor=name
            )
            refusal.__cause__ = error
            logger.error("%s", refusal, exc_info=error)
        without_tracebacks(refusal)
        job.update_report(rejected=(*job.report.rejected, ClientFailure(name, refusal)))
    job.ctx.set_props(
        {
            ContextKey.CONTRIBUTION: contribution,
            ContextKey.CONTRIBUTIONS: accepted,
            ContextKey.REJECTION: refusal,
        }
    )
    job.update_report(accepted=tuple(c.contributor for c in accepted))
    job.fire(EventType.RECEIVE_CONTRIBUTION, name)
    if refusal is not None and job.server.on_bad_contribution == "raise":
        raise refusal


def _checked(job: Job, name: str, number: int, sent: object, accepted: Sequence[Contribution]) -> Contribution:
    """The contribution with an own copy of its weights, which is what has been checked."""
    if isinstance(sent, ContributionError):
        raise sent
    if not isinstance(sent, Contribution):
        raise WeightsTypeError(f"{name}: sent a {type(sent).__name__}, not a Contribution", contributor=name)
    if not isinstance(sent.contributor, str) or sent.contributor != name:
        raise UnknownContributorError(
            f"{name}: sent a contribution in the name of {brief(sent.contributor)}", contributor=name
        )
    sent, _ = opened_contribution(sent, None, on_host=True)
    weights, aggregation_weight = check_contribution(
        sent,
        job.server.schema,
        kind=job.server.kind,
        round=number,
        contributors={c.contributor for c in accepted},
        scan=False,
    )
    # Shapes are known to be right, so the copy is no larger than the model.
    frozen = FrozenWeights(weights)
    check_finite(frozen, name)
    if job.server.exact:
        check_domain(frozen, aggregation_weight, name)
    return Contribution(
        name,
        frozen,
        aggregation_weight,
        n_iter=checked_n_iter(sent.n_iter, name),
        round=number,
        kind=sent.kind,
        metrics=checked_metrics(sent.metrics, name),
    )


def _enough(job: Job, number: int) -> bool:
    count = len(job.ctx[ContextKey.CONTRIBUTIONS])
    if count >= job.required:
        return True
    error = TooFewContributionsError(
        f"round {number}: {count} accepted contributions, {job.required} required; the global model stands",
        count=count,
        required=job.required,
        round=number,
    )
    logger.error("%s", error)
    job.update_report(error=error)
    return False


def _aggregate(job: Job) -> bool:
    """Averages the contributions in the context into the global model; False if that left the range of a dtype."""
    contributions: tuple[Contribution, ...] = job.ctx[ContextKey.CONTRIBUTIONS]
    started = time.perf_counter()
    mean = weighted_average(contributions, like=job.weights, exact=job.server.exact, kernel=job.server.kernel)
    if job.server.kind is Kind.DIFF:
        try:
            mean = add_difference(job.weights, mean)
        except (NonFiniteError, IntegerRangeError) as error:
            logger.error("round %d: %s: the global model stands", job.report.round, error)
            job.update_report(error=without_tracebacks(error))
            return False
    seconds = time.perf_counter() - started
    job.set_weights(FrozenWeights.adopt(mean))
    job.update_report(
        accepted=tuple(c.contributor for c in contributions),
        total_weight=float(sum(c.aggregation_weight for c in contributions)),
        aggregation_seconds=seconds,
        aggregation_bytes=sum(a.nbytes for c in contributions for a in (c.weights or {}).values()),
    )
    return True
