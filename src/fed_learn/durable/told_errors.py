"""What is kept of an exception: its class by name, its text, who and what it names."""

import builtins
from typing import Any

from fed_learn import errors
from fed_learn.errors import FedLearnError, text_of

_KEPT = ("contributor", "name")


def told_of(error: Exception) -> tuple[str, str, dict[str, Any]]:
    """The name of an exception's class, its text, and the client and the variable that it names.

    Example:
        >>> told_of(errors.NonFiniteError("site-1: w is NaN", contributor="site-1", name="w"))
        ('NonFiniteError', 'site-1: w is NaN', {'contributor': 'site-1', 'name': 'w'})
    """
    named = {key: getattr(error, key, None) for key in _KEPT}
    return type(error).__name__, text_of(error), {key: one for key, one in named.items() if type(one) is str}


def error_of(cause: str, text: str, named: dict[str, Any]) -> Exception:
    """An exception of which is told the same. Where its class is not known here, it is a `FedLearnError` of its name.

    Args:
        cause: The name of its class.
        text: Its text.
        named: The client and the variable that it names.

    Example:
        >>> error_of("NonFiniteError", "site-1: w is NaN", {"contributor": "site-1"})
        NonFiniteError('site-1: w is NaN')
        >>> error_of("CudaError", "out of memory", {})
        CudaError('out of memory')
    """
    if type(cause) is not str or type(text) is not str or not cause.isidentifier():
        raise TypeError("no error is told like this")
    kind: Any = getattr(errors, cause, None) or getattr(builtins, cause, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception) or issubclass(kind, ExceptionGroup):
        kind = type(cause, (FedLearnError,), {})
    error = _made(kind, text)
    if text_of(error) != text:  # KeyError shows the repr of what it has
        error = _made(type(cause, (FedLearnError, kind), {}), text)
    for key in _KEPT:
        if type(named.get(key)) is str:
            setattr(error, key, named[key])
    return error


def _made(kind: Any, text: str) -> Exception:
    error: Exception = kind.__new__(kind)
    error.args = (text,)
    return error
