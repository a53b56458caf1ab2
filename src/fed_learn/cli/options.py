"""What several commands do with their options."""

from collections.abc import Callable
from typing import TypeVar

import typer

from fed_learn.errors import ConfigError

T = TypeVar("T")


def policies_of(given: list[str]) -> dict[str, str]:
    """Policies as commands take them: a regular expression, the last equals sign, and the policy.

    Example:
        >>> policies_of(["bn=local", "(?=a)b=same"])
        {'bn': 'local', '(?=a)b': 'same'}
    """
    found = {}
    for one in given:
        pattern, equals, policy = one.rpartition("=")
        if not equals:
            raise typer.BadParameter(f"{one!r} is not REGEX=POLICY, as in bn=local", param_hint="--policy")
        found[pattern] = policy
    return found


def as_wrong_use(function: Callable[[], T]) -> T:
    """Calls it; a value out of range is the user's mistake."""
    try:
        return function()
    except ConfigError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
