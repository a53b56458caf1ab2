"""Checks of plain arguments, counts, words and numbers, with errors that name the argument.

What a client sends is not checked here: `contribution` and `weights` do that. A check that only one place needs stands
there.
"""

import enum
import math
import operator
from collections.abc import Sequence


def check_count(name: str, value: object) -> int:
    """An argument that counts something, as a plain int.

    Raises:
        TypeError: It is not an integer of any kind.
        ValueError: It is smaller than 1.

    Example:
        >>> import numpy as np
        >>> check_count("num_rounds", np.int64(3))
        3
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type] # what is no integer of any kind raises
    except (TypeError, AttributeError):  # AttributeError: of TensorFlow's tensors
        raise TypeError(f"{name} must be an int, not {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, not {number}")
    return number


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Checks an argument that is one of a few words.

    Raises:
        ValueError: It is another.

    Example:
        >>> check_choice("mode", "most", ("max", "min"))
        Traceback (most recent call last):
        ValueError: mode must be 'max' or 'min', not 'most'
    """
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")


def check_member(name: str, value: object, members: type[enum.StrEnum]) -> None:
    """Checks an argument that is a member of an enumeration, or the word of one.

    Raises:
        ValueError: It is none.
    """
    if value not in tuple(members):
        raise ValueError(f"{name} must be one of {', '.join(members)}, not {value!r}")


def check_positive(name: str, value: float) -> float:
    """A number above 0, as it was given.

    Raises:
        ValueError: It is 0, negative, infinite or NaN.
    """
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive, finite number, not {value!r}")
    return value


def check_not_negative(name: str, value: float) -> float:
    """A number of at least 0, as it was given.

    Raises:
        ValueError: It is negative, infinite or NaN.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")
    return value
