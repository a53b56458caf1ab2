"""One round of a job: send, receive, check, average."""

import logging
import time
from collections.abc import Sequence

from fed_learn.aggregation import weighted_average
from fed_learn.aggregation.exact import check_domain
from fed_learn.contribution import ClientFailure, Contribution, Kind, RoundReport, check_contribution
from fed_learn.errors import (
    ContributionError,
    ExactDomainError,
    TooFewContributionsError,
    UnknownContributorError,
)
from fed_learn.events import EventType
from fed_learn.model_meta import ContextKey
from fed_learn.server.job import Job
from fed_learn.weights import FrozenDict, FrozenWeights, add_difference

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
        if isinstance(answer, Exception):
            job.quit(name, answer)
        elif answer is None:
            job.update_report(absent=(*job.report.absent, name))
        else:
            # Clients send one contribution; what a faulty one sends on top is received and refused.
            for contribution in answer if isinstance(answer, list | tuple) else (answer,):
                _receive(job, name, number, contribution)
    if _enough(job, number):
        job.fire(EventType.BEFORE_AGGREGATION)
        _aggregate(job)
        job.fire_and_adopt(EventType.END_AGGREGATION)
    job.update_report(metrics=job.ctx[ContextKey.METRICS], seconds=time.perf_counter() - started)
    job.fire_and_adopt(EventType.END_ROUND)
    job.reports.append(job.report)
    job.check_enough_clients()


def _receive(job: Job, name: str, number: int, contribution: Contribution) -> None:
    """Accepts or refuses a contribution, and tells the handlers."""
    accepted: tuple[Contribution, ...] = job.ctx[ContextKey.CONTRIBUTIONS]
    refusal: ContributionError | ExactDomainError | None = None
    try:
        _check(job, name, number, contribution, accepted)
        contribution = contribution.frozen()
        accepted = tuple(sorted((*accepted, contribution), key=lambda c: c.contributor))
    except (ContributionError, ExactDomainError) as error:
        refusal = error.with_traceback(None)
        if isinstance(contribution, Contribution):
            contribution = contribution.without_weights()
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


def _check(job: Job, name: str, number: int, contribution: object, accepted: Sequence[Contribution]) -> None:
    if not isinstance(contribution, Contribution):
        raise ContributionError(f"{name}: sent a {type(contribution).__name__}", contributor=name)
    if contribution.contributor != name:
        raise UnknownContributorError(
            f"{name}: sent a contribution in the name of {contribution.contributor!r}", contributor=name
        )
    weights, aggregation_weight = check_contribution(
        contribution,
        job.server.schema,
        kind=job.server.kind,
        round=number,
        contributors={c.contributor for c in accepted},
    )
    if job.server.exact:
        check_domain(weights, aggregation_weight, name)


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


def _aggregate(job: Job) -> None:
    contributions: tuple[Contribution, ...] = job.ctx[ContextKey.CONTRIBUTIONS]
    started = time.perf_counter()
    mean = weighted_average(contributions, like=job.weights, exact=job.server.exact, kernel=job.server.kernel)
    if job.server.kind is Kind.DIFF:
        mean = add_difference(job.weights, mean)
    seconds = time.perf_counter() - started
    job.set_weights(FrozenWeights.adopt(mean))
    job.update_report(
        accepted=tuple(c.contributor for c in contributions),
        total_weight=float(sum(c.aggregation_weight for c in contributions)),
        aggregation_seconds=seconds,
        aggregation_bytes=sum(a.nbytes for c in contributions for a in (c.weights or {}).values()),
    )
