"""What handlers share: which direction of a score is better, which of two scores is, and checks of what says so."""

import logging
import math
import warnings

from fed_learn.arguments import check_choice, check_not_negative
from fed_learn.components.direction import MODES, mode_of
from fed_learn.contribution import INITIAL_VALIDATION_METRIC, BestModel
from fed_learn.model_meta import ContextKey, FLContext

logger = logging.getLogger(__name__)


def check_mode(mode: str | None, min_delta: float, metric_name: str) -> None:
    """Checks the arguments that say what is better.

    Raises:
        ValueError: `mode` is not "max", "min" or None, or `min_delta` is not a finite number ≥ 0.

    Warns:
        UserWarning: The metric's name looks like a loss and more of it would win.
    """
    if mode is not None:
        check_choice("mode", mode, MODES)
    check_not_negative("min_delta", min_delta)
    if mode == "max" and mode_of(metric_name) == "min":
        warnings.warn(
            f"{metric_name!r} looks like a loss, and mode='max' keeps the model with the largest; "
            "pass mode='min' for the smallest",
            stacklevel=3,
        )


def declared_mode(metric_name: str, ctx: FLContext) -> str | None:
    """What the job's clients declared to be better of this metric; None where they say nothing of it."""
    own = ctx.get_prop(ContextKey.SCORE_METRIC)
    if metric_name not in (INITIAL_VALIDATION_METRIC, own, f"initial_{own}"):
        return None
    mode: str | None = ctx.get_prop(ContextKey.SCORE_MODE)
    return mode


def chosen_mode(
    handler: object, metric_name: str, mode: str | None, ctx: FLContext, declared: str | None = None
) -> str:
    """Which direction of a score is better in a job: as a handler was told, as was declared, or by the name.

    Args:
        handler: What asks, for messages.
        metric_name: The name of the score.
        mode: What the handler was told: `"max"`, `"min"`, or None to follow what is declared.
        ctx: The context of the job, which holds what its clients declared.
        declared: What the source of the score itself declares, if it does.

    Raises:
        ValueError: Two of them contradict each other.

    Warns:
        UserWarning: The name looks like a loss, and more of it would win.

    Example:
        >>> ctx = FLContext({ContextKey.SCORE_METRIC: "loss", ContextKey.SCORE_MODE: "min"})
        >>> chosen_mode(None, "initial_validation_metric", None, ctx)
        'min'
    """
    own = ctx.get_prop(ContextKey.SCORE_METRIC)
    told = (
        (f"{type(handler).__name__} was told", mode),
        (f"what measures {metric_name!r} declares", declared),
        (f"the clients declare of {own!r}", declared_mode(metric_name, ctx)),
    )
    stated = [(who, which) for who, which in told if which is not None]
    for who, which in stated[1:]:
        if which != stated[0][1]:
            raise ValueError(
                f"{stated[0][0]} mode={stated[0][1]!r}, but {who} mode={which!r}: the worst model would be kept; "
                "leave mode= out to follow what is declared"
            )
    name = own if own is not None and metric_name == INITIAL_VALIDATION_METRIC else metric_name
    if not stated:
        by_name = mode_of(name)
        word = "largest" if by_name == "max" else "smallest"
        logger.info("the best model is the one with the %s %r, by its name: nobody declared a mode", word, name)
        return by_name
    if len(stated) == 1 and mode is not None:
        check_mode(mode, 0.0, name)
    return stated[0][1]


def check_best_key(handler: object, best_key: str, ctx: FLContext) -> None:
    """Refuses handlers that would bind their best models to one key, each in the place of the other's.

    Raises:
        ValueError: There is another.
    """
    others = [one for one in ctx.get_prop(ContextKey.HANDLERS, ()) if getattr(one, "best_key", None) == best_key]
    if len(others) > 1:
        names = " and ".join(type(one).__name__ for one in others)
        raise ValueError(
            f"{names} would each bind the best model to {str(best_key)!r}: give all but one a key of its own, such as "
            f"{type(handler).__name__}(..., best_key='_otherBest')"
        )


def is_better(metric: float, best: BestModel | None, mode: str, min_delta: float) -> bool:
    """Whether a score is strictly better, by more than `min_delta`; NaN and infinities never are.

    Example:
        >>> is_better(0.5, None, "max", 0.0), is_better(float("nan"), None, "min", 0.0)
        (True, False)
    """
    if not math.isfinite(metric):
        return False
    if best is None:
        return True
    gain = metric - best.metric if mode == "max" else best.metric - metric
    return gain > min_delta
