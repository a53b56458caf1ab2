"""What learners and evaluators of a user's own return: taken in any form that has one meaning, else refused by name.

It is checked where it is returned, so that the error says who returned what, and what is wanted.
"""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from fed_learn.components.direction import mode_of
from fed_learn.components.learner import DEFAULT_METRIC, Learner, TrainingResult
from fed_learn.components.model_evaluator import ModelEvaluator
from fed_learn.errors import MetricError, a_type, brief
from fed_learn.values import number_of, split_metrics
from fed_learn.weights import size_text

WANTED = (
    "fl.TrainingResult(weights, aggregation_weight), a tuple (weights, aggregation_weight) or "
    "(weights, aggregation_weight, metrics), where aggregation_weight is the number of examples, or None"
)


def check_learner(learner: object, client: str) -> None:
    """Checks that something can be the local work of a client: it has `train` and `validate`.

    Raises:
        TypeError: It has not, or is a class.
    """
    if isinstance(learner, type):
        name = learner.__name__
        raise TypeError(f"{client}: the learner is the class {name}: pass an instance, {name}(...)")
    for method in ("train", "validate"):
        if not callable(getattr(learner, method, None)):
            raise TypeError(
                f"{client}: the learner {brief(learner)} has no method {method}(weights, ctx): derive from fl.Learner, "
                "or write a class with train and validate"
            )


def metric_and_mode(learner: Learner) -> tuple[str, str | None]:
    """The metric by which a learner has models selected, and what it declares to be better of it, if it does."""
    return getattr(learner, "validation_metric", DEFAULT_METRIC), getattr(learner, "mode", None)


def mode_followed(learner: Learner) -> str:
    """What is better of that metric: as declared, else by its name."""
    metric, mode = metric_and_mode(learner)
    return mode if mode is not None else mode_of(metric)


def training_result(returned: object, client: str) -> TrainingResult | None:
    """What `Learner.train` returned.

    Args:
        returned: A `TrainingResult`; `(weights, aggregation_weight)` or `(weights, aggregation_weight, metrics)`; None.
            Numbers may be of any kind.
        client: The client's name.

    Returns:
        With plain numbers where they are numbers: what is none is left for the server to refuse. None: the learner sits
        the round out.

    Raises:
        TypeError: It is something else.

    Example:
        >>> import numpy as np
        >>> training_result(({"w": np.zeros(2)}, np.int64(120), {"loss": np.float32(0.5)}), "site-1")
        TrainingResult(1 variable, 16 B, aggregation_weight=120, metrics={'loss': 0.5})
    """
    if returned is None:
        return None
    if isinstance(returned, tuple) and len(returned) in (2, 3):
        weights, aggregation_weight, *rest = returned
        metrics = rest[0] if rest and rest[0] is not None else {}
        returned = TrainingResult(weights, aggregation_weight, metrics=metrics)
    if not isinstance(returned, TrainingResult):
        what = a_type(type(returned))
        if isinstance(returned, Mapping):
            what += f" of {size_text(returned)}, without the number of examples"
        elif isinstance(returned, tuple):
            what += f" of {len(returned)}"
        raise TypeError(f"{client}: train returned {what}; it must return {WANTED}")
    if not isinstance(returned.metrics, Mapping):
        raise TypeError(
            f"{client}: train returned metrics {brief(returned.metrics)}; they must be a dict of names to numbers"
        )
    n_iter = _plain(returned.n_iter)
    if isinstance(n_iter, float) and n_iter.is_integer():
        n_iter = int(n_iter)
    return TrainingResult(returned.weights, _plain(returned.aggregation_weight), n_iter, returned.metrics)


def scores(returned: object, learner: Learner, client: str) -> tuple[dict[str, float], dict[str, Any]]:
    """What `Learner.validate` returned: the scores, the one to select by among them, and what else it tells.

    Args:
        returned: A mapping from names to numbers of any kind, beside which there may be anything else; or one number,
            which is the metric to select by.
        learner: Whose it is.
        client: The client's name.

    Raises:
        TypeError: It is something else.
        MetricError: The metric to select by is missing, or no number.
    """
    metric, _ = metric_and_mode(learner)
    return scores_of(returned, metric, f"{client}: validate", "the validation_metric of the learner", client)


def scores_of(
    returned: object, metric: str, who: str, declared: str, client: str | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores as any function returned them; see `scores`.

    Args:
        returned: What it returned.
        metric: Name of the score to select by.
        who: Which function, for messages.
        declared: What names that score, for messages.
        client: The client's name.
    """
    number = number_of(returned)
    if number is not None:
        return {metric: number}, {}
    if not isinstance(returned, Mapping):
        raise TypeError(
            f"{who} returned {_what(returned)}; it must return a dict such as {{{metric!r}: 0.9}}, or that number"
        )
    numbers, info = split_metrics(returned, metric)
    if metric not in numbers:
        found = f"{metric!r} is {brief(info[metric])}, no number" if metric in info else f"no {metric!r} to select by"
        raise MetricError(
            f"{who} returned {', '.join(map(brief, returned)) or 'nothing'}: {found}; {declared} names that score",
            contributor=client,
            metric=metric,
        )
    return numbers, info


def returned_metric(evaluator: ModelEvaluator) -> float:
    """The score of an evaluator as a float.

    Raises:
        TypeError: It is no number.
    """
    value = evaluator.get_metric()
    number = number_of(value)
    if number is None:
        raise TypeError(
            f"{type(evaluator).__name__}.get_metric() returned {_what(value)}; it must return one number, the score of "
            "the last evaluation"
        )
    return number


def _what(value: object) -> str:
    """What it is, without the numbers of an array."""
    if value is None or isinstance(value, str | bool | Mapping):
        return brief(value)
    shape = getattr(value, "shape", None)
    return a_type(type(value)) + ("" if shape is None else f" of shape {tuple(shape)}")


def _plain(number: Any) -> Any:
    """A plain int where it is one of Python or numpy; a float where it is another number; else as it is."""
    found = number_of(number)
    if found is None:
        return number
    return int(number) if isinstance(number, Integral) else found
