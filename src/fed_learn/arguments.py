"""Checks of the arguments that users give: what is wrong with one is said with its name."""

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
    """
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")
