"""What handlers share: checks of their arguments, and which of two scores is better."""

import math
import re
import warnings
from collections.abc import Sequence

from fed_learn.contribution import BestModel

LOSSES = frozenset(("loss", "error", "mse", "mae", "rmse", "nll", "entropy", "perplexity", "divergence"))


def check_count(name: str, value: object) -> None:
    """Checks an argument that counts something.

    Raises:
        TypeError: It is not an int.
        ValueError: It is smaller than 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Checks an argument that is one of a few words.

    Raises:
        ValueError: It is another.
    """
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")


def check_mode(mode: str, min_delta: float, metric_name: str) -> None:
    """Checks the arguments that say what is better.

    Raises:
        ValueError: `mode` is not "max" or "min", or `min_delta` is not a finite number ≥ 0.

    Warns:
        UserWarning: The metric's name looks like a loss and more of it would win.
    """
    check_choice("mode", mode, ("max", "min"))
    if not (math.isfinite(min_delta) and min_delta >= 0):
        raise ValueError(f"min_delta must be a finite number of at least 0, not {min_delta!r}")
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", metric_name)
    if mode == "max" and not LOSSES.isdisjoint(word.lower() for word in words):
        warnings.warn(
            f"{metric_name!r} looks like a loss, and mode='max' keeps the model with the largest; "
            "pass mode='min' for the smallest",
            stacklevel=3,
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
