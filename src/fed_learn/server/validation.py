"""The check of what clients measure on a model that they are sent for validation."""

from collections.abc import Container

from fed_learn.contribution import INITIAL_VALIDATION_METRIC, ValidationResult, check_contributor, checked_n_iter
from fed_learn.errors import MetricError
from fed_learn.values import split_metrics


def checked_result(name: str, model: str, result: object, heard: Container[str] = ()) -> ValidationResult:
    """The result of a validation, checked, with plain numbers.

    Raises:
        UnknownContributorError: That cannot be the name of a client.
        MetricError: It is no result of this client on this model, or lacks the metric to select by; or the client is
            among those that have been heard already.
    """
    check_contributor(name)
    if not isinstance(result, ValidationResult) or (result.contributor, result.model) != (name, model):
        raise MetricError(f"{name}: sent no result of its own on {model!r}", contributor=name, metric=None)
    if name in heard:
        raise MetricError(f"{name}: sent a result on {model!r} already", contributor=name, metric=None)
    (metrics, _), n_iter = split_metrics(result.metrics, INITIAL_VALIDATION_METRIC), checked_n_iter(result.n_iter, name)
    if INITIAL_VALIDATION_METRIC not in metrics:
        raise MetricError(
            f"{name}: no {INITIAL_VALIDATION_METRIC!r}", contributor=name, metric=INITIAL_VALIDATION_METRIC
        )
    return ValidationResult(name, model, metrics, n_iter)
