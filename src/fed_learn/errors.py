"""Every error that fed_learn raises on purpose.

One class per cause. Each is a `FedLearnError` and also the builtin that a caller would catch anyway
(`ValueError`, `TypeError`, `KeyError`, `RuntimeError`, `OverflowError`), and carries who and what it is
about as attributes, so that nobody has to parse a message.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self


class FedLearnError(Exception):
    """Base of all errors of this package.

    Args:
        message: The one line that is printed.
        contributor: The client that the error is about, if any.
        name: The variable (entry of a weight dict) that the error is about, if any.
        **values: What else is known (`shape=`, `expected=`, `index=` …); each becomes an attribute.

    Example:
        >>> error = FedLearnError("no such thing", contributor="site-1", name="fc.weight", index=(0, 3))
        >>> error.contributor, error.name, error.index
        ('site-1', 'fc.weight', (0, 3))
    """

    contributor: str | None = None
    name: str | None = None
    result: Any = None
    """The `JobResult` so far, where the error ended a job; else None."""

    def __init__(self, message: str, *, contributor: str | None = None, name: str | None = None, **values: Any) -> None:
        # What a client sent must not be able to begin a new line in a log.
        super().__init__(" ".join(message.splitlines()))
        self.contributor = contributor
        self.name = name
        self.__dict__.update(values)

    def __str__(self) -> str:
        # KeyError would print the repr of its message.
        return str(self.args[0]) if self.args else ""

    def __getattr__(self, attribute: str) -> Any:
        # Only reached for what is not there; declared so that type checkers accept error.index and the like.
        raise AttributeError(f"{type(self).__name__!r} carries no {attribute!r}")


class ContributionError(FedLearnError):
    """A contribution was refused. The aggregate is as if it had never come."""


class WeightsTypeError(ContributionError, TypeError):
    """The weights are not a mapping from `str` to `numpy.ndarray`."""


class NamesError(ContributionError, KeyError):
    """Variables are missing or extra. Attributes: `missing`, `extra` (tuples of names)."""

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


class ShapeError(ContributionError, ValueError):
    """A variable has another shape than the schema. Attributes: `shape`, `expected`."""


class DtypeError(ContributionError, TypeError):
    """A variable has another dtype than the schema, or one that cannot be averaged.

    Attributes: `dtype`, `expected` (None when the dtype is refused whatever the schema says).
    """


class NonFiniteError(ContributionError, ValueError):
    """A variable holds NaN or infinity. Attributes: `index` (tuple), `value`."""


class IntegerRangeError(ContributionError, ValueError):
    """An integer so large that a float64 sum, or the dtype of a difference, could not hold it to the unit.

    Attributes: `index`, `value` (None where they are not known).
    """

    index: tuple[int, ...] | None = None
    value: int | None = None


class AggregationWeightError(ContributionError, ValueError):
    """The aggregation weight is missing, not a number, not finite, negative or out of range. Attribute: `value`."""

    value: Any = None


class RoundError(ContributionError, ValueError):
    """The contribution belongs to another round. Attributes: `round`, `expected`."""


class KindError(ContributionError, ValueError):
    """Full weights where a difference is expected, or the reverse. Attributes: `kind`, `expected`."""


class MetricError(ContributionError, ValueError):
    """A metric is not a number, or the one that is asked for is missing. Attribute: `metric`."""


class DuplicateContributionError(ContributionError, ValueError):
    """The contributor already contributed to this aggregate."""


class TiedVariablesError(ContributionError, ValueError):
    """Names that a model has for one variable come with different values. Attribute: `names`."""


class UnknownContributorError(ContributionError, ValueError):
    """The contributor's name is none, or not that of the client that sent the contribution."""


class EmptyAggregationError(FedLearnError, ValueError):
    """There is nothing to average: no contribution, or none that counts by more than 0."""


class FloatingPointEnvironmentError(FedLearnError, RuntimeError):
    """The process rounds in another way than to nearest, or flushes subnormals, where that would change bits."""


class BrokenAccumulatorError(FedLearnError, RuntimeError):
    """An accumulator was interrupted while it was adding: its sums hold part of a contribution."""


class MergeError(FedLearnError, ValueError):
    """Two accumulators cannot be merged: one sums exactly and the other does not, or they are the same."""


class OutputError(FedLearnError, ValueError):
    """`out=` cannot take the result: an array is no array, read-only, or overlaps an input or another in memory."""


class SumOverflowError(FedLearnError, OverflowError):
    """A streaming sum in float64 left the range of float64 although every input was finite."""


class ExactDomainError(FedLearnError, OverflowError):
    """An `exact=True` sum left the domain on which its promise holds."""


class TooFewContributionsError(FedLearnError, RuntimeError):
    """Fewer contributions than `min_contributions`. Attributes: `count`, `required`, `round`."""


class NothingAggregatedError(FedLearnError, RuntimeError):
    """A job is over and no round of it made a new global model: what it ends with is the initial one.

    Attributes: `cause` (the commonest class of error, or "absent"), `count` (how often it was), `rounds`, and `result`,
    what the job left behind.
    """

    cause: str = ""
    count: int = 0
    rounds: int = 0
    result: Any = None


class OutOfTurnError(FedLearnError, RuntimeError):
    """A method of a job was called at a moment at which it has no meaning; the message says what comes first."""


class ClientQuitError(FedLearnError, RuntimeError):
    """A client leaves the job of its own will."""


class AggregatorError(FedLearnError, RuntimeError):
    """An aggregator raised, or left no model of the job's schema. The cause is its `__cause__`."""


class FilterError(FedLearnError, RuntimeError):
    """A filter raised: the client leaves the job, and nothing unfiltered is sent. The cause is its `__cause__`."""


class KernelNameError(FedLearnError, ValueError):
    """No kernel has this name. Attribute: `valid` (tuple of names)."""


class KernelUnavailableError(FedLearnError, RuntimeError):
    """The kernel exists but cannot run here. Attribute: `reason`."""


class ModelError(FedLearnError, TypeError):
    """No adapter knows the model, or it is in a state in which it has no weights to read or load."""


class LayoutError(FedLearnError, ValueError):
    """Two models do not correspond, so that no map between their weights exists, or none can be told for sure.

    Attributes: `source_layer`, `target_layer` (where they are in their models; None on the side that has no such
    layer), `reason`.
    """

    source_layer: str | None = None
    target_layer: str | None = None
    reason: str = ""


class FileInUseError(FedLearnError, RuntimeError):
    """Another job is writing the file that this one is to write. Attribute: `path`."""


class ConfigError(FedLearnError, ValueError):
    """A configuration file or a component's `{"path" | "name", "args"}` entry cannot be used."""


def brief(value: object) -> str:
    """A short description of anything, for a message; never raises, whatever a client sent.

    Example:
        >>> brief("x" * 100), brief(10**5000)
        ("'xxxxxxxxxxxx...xxxxxxxxxxxxx'", 'an int')
    """
    try:
        return reprlib.repr(value)
    except Exception:  # noqa: BLE001 - a repr may raise anything; an int of too many digits does
        return a_type(type(value))


def a_type(kind: type, *, module: bool = False) -> str:
    """The name of a type with its article, for a message.

    Args:
        kind: The type.
        module: With the module in which it is defined.

    Example:
        >>> a_type(int), a_type(list), a_type(int, module=True)
        ('an int', 'a list', 'a builtins.int')
    """
    name = f"{kind.__module__}.{kind.__name__}" if module else kind.__name__
    # n, d: spoken as letters
    return f"an {name}" if name[:1].lower() in tuple("aeio") or name == "ndarray" else f"a {name}"


def without_tracebacks(error: Exception) -> Exception:
    """The error, stripped of all tracebacks: kept, their frames would keep a client's weights alive."""
    seen: set[int] = set()
    left: list[BaseException] = [error]
    while left:
        one = left.pop()
        if id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            left += [other for other in (one.__cause__, one.__context__) if other is not None]
            left += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
    return error


@dataclass(frozen=True, eq=False)
class HandlerFailure:
    """One handler that raised at one event.

    Attributes:
        event: The event that was fired.
        handler: `module.Class` of the handler.
        exception: What it raised.
        rollback_exception: What its `rollback` raised on top of that, if anything.
        round: In which round, from 0; None: in none.
    """

    event: str
    handler: str
    exception: Exception
    rollback_exception: Exception | None = None
    round: int | None = None

    def __str__(self) -> str:
        where = self.event if self.round is None else f"{self.event} of round {self.round + 1}"
        text = f"{self.handler} at {where}: {type(self.exception).__name__}: {self.exception}"
        if self.rollback_exception is not None:
            rollback = self.rollback_exception
            text += f" (its rollback raised {type(rollback).__name__}: {rollback})"
        return text


class HandlerError(ExceptionGroup[Exception], FedLearnError):
    """One or more handlers raised. An `ExceptionGroup` of the original exceptions, so `except*` works.

    Attributes:
        failures: A tuple of `HandlerFailure`, in the order in which they happened.
        result: The `JobResult` of the job that this ended, as far as it got; else None.
    """

    failures: tuple[HandlerFailure, ...]

    def __new__(cls, failures: Sequence[HandlerFailure]) -> Self:
        """Builds the group from the record of failures."""
        message = f"{len(failures)} handler(s) failed: " + "; ".join(map(str, failures))
        return super().__new__(cls, message, [failure.exception for failure in failures])

    def __init__(self, failures: Sequence[HandlerFailure]) -> None:
        FedLearnError.__init__(self, self.message)
        self.failures = tuple(failures)

    def __str__(self) -> str:
        return self.message

    def derive(self, excs: Sequence[Exception]) -> "HandlerError":  # type: ignore[override]
        """Keeps the type and the matching records when `except*` splits the group."""
        known = {id(failure.exception): failure for failure in self.failures}
        # A part of a group that a handler raised has no record of its own.
        return HandlerError([known.get(id(e), HandlerFailure("?", "?", e)) for e in excs])

    def __reduce__(self) -> tuple[Any, ...]:
        return HandlerError, (self.failures,)
