"""What follows the last round: the clients score the final model, then each other's best and the job's best."""

import logging

from fed_learn.aggregation.tensors import without_tensors
from fed_learn.contribution import (
    FINAL_MODEL,
    GLOBAL_BEST,
    INITIAL_VALIDATION_METRIC,
    ValidationResult,
    checked_metrics,
    checked_n_iter,
)
from fed_learn.errors import ContributionError, MetricError
from fed_learn.events import EventType
from fed_learn.model_meta import ContextKey, ModelData
from fed_learn.server.job import Job
from fed_learn.weights import FrozenDict, FrozenWeights, as_weight_dict, check_finite

logger = logging.getLogger(__name__)


def score_final_model(job: Job) -> list[ValidationResult]:
    """SEND_MODEL and RECEIVE_VALIDATION_RESULTS per client, for the model of the last round.

    The round in the context is the one in which clients would have received that model: the number of rounds run.
    """
    job.ctx.set_props({ContextKey.ROUND: len(job.reports), ContextKey.METRICS: FrozenDict()})
    for key in (ContextKey.CONTRIBUTION, ContextKey.CONTRIBUTIONS, ContextKey.REJECTION, ContextKey.REPORT):
        job.ctx.pop(key, None)
    # Clients offer their local bests first: they are asked for before anything is validated.
    job.local_bests = _collect_local_bests(job)
    for name in job.roster:
        job.fire(EventType.SEND_MODEL, name)
    return _validate_everywhere(job, FINAL_MODEL, job.weights)


def cross_validate(job: Job) -> tuple[dict[str, dict[str, float]], list[ValidationResult]]:
    """RECEIVE_VALIDATION_RESULTS per model and client: the clients' bests and the job's, on every client's data.

    Returns:
        The matrix, model → client → validation metric, and all results.
    """
    models = dict(job.local_bests)
    best = job.ctx.best_model
    if best is not None:
        models[GLOBAL_BEST] = best.weights
    results = [result for name, weights in models.items() for result in _validate_everywhere(job, name, weights)]
    job.ctx.set_model(ModelData(job.weights))
    matrix: dict[str, dict[str, float]] = {name: {} for name in models}
    for result in results:
        matrix[result.model][result.contributor] = float(result.metrics[INITIAL_VALIDATION_METRIC])
    return matrix, results


def _collect_local_bests(job: Job) -> dict[str, FrozenWeights]:
    bests: dict[str, FrozenWeights] = {}
    for name, answer in job.roster.ask(lambda client: client.submit_best_model()):
        if isinstance(answer, Exception):
            job.quit(name, answer)
            continue
        if answer is None:
            continue
        try:
            weights = as_weight_dict(without_tensors(answer, name), name)
            job.server.schema.check(weights, name)
            frozen = FrozenWeights(weights)  # what is checked below is what is kept
            check_finite(frozen, name)
        except ContributionError as error:
            logger.error("the best model of %s is left out of the cross-site validation: %s", name, error)
            continue
        bests[name] = frozen
    return bests


def _validate_everywhere(job: Job, model: str, weights: FrozenWeights) -> list[ValidationResult]:
    results: list[ValidationResult] = []
    job.ctx.set_model(ModelData(weights))
    for name, answer in job.roster.ask(lambda client: client.validate_model(model, weights)):
        if isinstance(answer, Exception):
            job.quit(name, answer)
            continue
        try:
            result = _checked_result(name, model, answer)
        except Exception as error:  # noqa: BLE001 - whatever a client sent must not end the job
            reason = error if isinstance(error, MetricError) else f"{name}: {type(error).__name__}: {error}"
            logger.error("a validation result is left out: %s", reason)
            continue
        results.append(result)
        job.ctx.set_prop(ContextKey.VALIDATION_RESULTS, tuple(results))
        job.fire(EventType.RECEIVE_VALIDATION_RESULTS, name)
    return results


def _checked_result(name: str, model: str, result: object) -> ValidationResult:
    """The result with plain numbers."""
    if not isinstance(result, ValidationResult) or (result.contributor, result.model) != (name, model):
        raise MetricError(f"{name}: sent no result of its own on {model!r}", contributor=name, metric=None)
    metrics, n_iter = checked_metrics(result.metrics, name), checked_n_iter(result.n_iter, name)
    if INITIAL_VALIDATION_METRIC not in metrics:
        raise MetricError(
            f"{name}: no {INITIAL_VALIDATION_METRIC!r}", contributor=name, metric=INITIAL_VALIDATION_METRIC
        )
    return ValidationResult(name, model, metrics, n_iter)
