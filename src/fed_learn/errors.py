"""Every error that fed_learn raises on purpose.

One class per cause. Each is a `FedLearnError` and also the builtin that a caller would catch anyway
(`ValueError`, `TypeError`, `KeyError`, `RuntimeError`, `OverflowError`), and carries who and what it is
about as attributes, so that nobody has to parse a message.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from traceback import walk_tb
from typing import Any, Self, TypeGuard

from fed_learn.limits import LONGEST_MESSAGE


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
        # What a client sent must not be able to write a line of its own into a log, or to move a terminal's cursor.
        super().__init__(printable(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…"))
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
    """Variables are missing, extra or too many, or have too long a name.

    Attributes: `missing`, `extra`: tuples of names; of extra ones the first `fed_learn.limits.MOST_NAMED`.
    """

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


class NotSameError(ContributionError, ValueError):
    """A variable that has to be equal everywhere differs, as codes that cannot be averaged. Attribute: `expected`."""


class TiedVariablesError(ContributionError, ValueError):
    """Names that a model has for one variable come with different values. Attribute: `names`."""


class UnknownContributorError(ContributionError, ValueError):
    """The contributor's name is missing or invalid, or is another's than the client's that sent the contribution."""


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


class ContextError(FedLearnError, TypeError):
    """A handler took a key of the library out of a job's context, or bound something else to it. Attribute: `key`."""

    key: str = ""


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


class StateError(FedLearnError, ValueError):
    """The state of a job cannot be kept, or is damaged, or is none. Attribute: `path`."""


class StateExistsError(FedLearnError, FileExistsError):
    """A folder holds the state of another job, which is left alone. Attribute: `path`."""


class LedgerError(FedLearnError, ValueError):
    """The ledger of a job was changed, or does not agree with what it tells of. Attributes: `path`, `entry`."""


class ConfigError(FedLearnError, ValueError):
    """A configuration file or a component's `{"path" | "name", "args"}` entry cannot be used."""


def printable(text: str) -> str:
    r"""Text for one line of a log: lines are joined, and what is not printable is shown as its escape.

    Example:
        >>> printable("site\nERROR all is lost\x1b[2K")
        'site ERROR all is lost\\x1b[2K'
    """
    if text.isprintable():  # the usual case
        return text
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


LONGEST_TEXT = 2000
"""Characters of an exception's text that are shown."""


def text_of(error: BaseException) -> str:
    """The text of an exception: printable, of one line, bounded. Never raises, whatever its `__str__` does.

    This is how the library makes text of an exception that it has not raised itself; `described` adds the class.

    Example:
        >>> text_of(ValueError("disk full")), text_of(KeyError("w"))
        ('disk full', "'w'")
    """
    try:
        text = str.__str__(str(error))  # of a class of one's own it would do as it likes
        return printable(text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…")
    except BaseException as second:  # noqa: BLE001 - code of others, which may do anything
        as_failure(second)
        return f"its text cannot be read ({type(second).__name__})"


def as_failure(error: BaseException) -> Exception:
    """What code of others raised, as a failure of theirs; what interrupts the process is raised again.

    Clients, and the objects that they send, may raise anything while they run or are looked at, `SystemExit` and
    `GeneratorExit` among it. Wherever the library runs their code, it takes what comes out of it by
    `except BaseException` and this.

    Raises:
        BaseException: The error itself, if it is meant for the process: see `is_interrupt`.

    Returns:
        The error itself; one that describes it where it is no `Exception`, which most code would not catch.

    Example:
        >>> as_failure(ValueError("no data")), as_failure(SystemExit("no GPU"))
        (ValueError('no data'), FedLearnError('SystemExit: no GPU'))
    """
    if isinstance(error, Exception):
        return error
    if is_interrupt(error):
        raise error
    failure = FedLearnError(described(error))
    failure.__cause__ = error
    return failure


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception is meant for the process: `KeyboardInterrupt`, and what the handler of a signal raises.

    Servers end in order on SIGTERM by a handler that raises `SystemExit`; Flower's do on Ctrl-C too. Python calls it
    wherever the main thread is just then, so it may be in the middle of an object from outside. The handler is known by
    its arguments: one of them is the frame that it interrupts, which comes before its own in the traceback.

    Example:
        >>> is_interrupt(KeyboardInterrupt()), is_interrupt(SystemExit("no GPU"))
        (True, False)
    """
    if isinstance(error, Exception | KeyboardInterrupt):
        return isinstance(error, KeyboardInterrupt)
    for (before, _), (frame, _) in pairwise(walk_tb(error.__traceback__)):
        for value in frame.f_locals.values():
            if value is before or (type(value) is tuple and any(one is before for one in value)):
                return True
    return False


def is_error(value: object) -> TypeGuard[BaseException]:
    """Whether what came from outside is an exception: by its type, for `isinstance` asks the object, which may raise.

    Example:
        >>> is_error(ValueError()), is_error(ValueError)
        (True, False)
    """
    return issubclass(type(value), BaseException)


def described(error: BaseException) -> str:
    """The class and the text of an exception, as Python prints them; see `text_of`.

    Example:
        >>> described(OSError("disk full")), described(ValueError())
        ('OSError: disk full', 'ValueError')
    """
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


LONGEST_BRIEF = 30
"""Bytes of which `brief` makes text, as many as `reprlib` shows characters."""
CONTAINERS = (dict, list, tuple, set, frozenset)
"""What `reprlib` shows the beginning of, for just these types; of others it makes text of all that they hold."""


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2  # with the usual 6, lists of lists make text of tens of thousands of values


def brief(value: object) -> str:
    """A short description of anything, for a message; never raises, whatever a client sent.

    Example:
        >>> brief("x" * 100), brief(10**5000)
        ("'xxxxxxxxxxxx...xxxxxxxxxxxxx'", 'an int')
    """
    kind = type(value)
    try:
        if kind in (bytes, bytearray):
            value = value[:LONGEST_BRIEF]  # type: ignore[index] # reprlib would first make text of all of it
        elif isinstance(value, CONTAINERS) and kind not in CONTAINERS:
            return a_type(kind)
        return printable(str.__str__(_SHORT.repr(value)))
    except BaseException as error:  # noqa: BLE001 - a repr may raise anything; an int of too many digits does
        as_failure(error)
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
    """The error as it can be kept: without tracebacks, whose frames would keep all weights of a round alive.

    Nor does it keep arrays that it holds as arguments or attributes: short descriptions take their places. So it is
    with all errors behind it.
    """
    seen: set[int] = set()
    left: list[BaseException] = [error]
    while left:
        one = left.pop()
        if id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            left += [other for other in (one.__cause__, one.__context__) if other is not None]
            left += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
            if any(map(_is_large, one.args)):
                one.args = tuple(brief(value) if _is_large(value) else value for value in one.args)
            for name in [name for name, value in vars(one).items() if _is_large(value)]:
                vars(one)[name] = brief(vars(one)[name])
    return error


LARGEST_VALUE = 1000
"""Bytes of an array that an error may keep as an argument or attribute."""


def _is_large(value: object, depth: int = 3) -> bool:
    """Whether a value of an error is, or holds, an array or a tensor of more bytes than are worth keeping."""
    try:
        if isinstance(value, Mapping):
            value = tuple(value.values())
        if isinstance(value, list | tuple):
            return depth == 0 or any(_is_large(one, depth - 1) for one in value)
        if hasattr(value, "weights"):  # a contribution, a model
            return depth == 0 or _is_large(value.weights, depth - 1)
        return bool(getattr(value, "nbytes", 0) > LARGEST_VALUE)
    except BaseException as error:  # noqa: BLE001 - an object from outside may raise anything while it is looked at
        as_failure(error)
        return True


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

    def without_tracebacks(self) -> Self:
        """The same as it can be kept: see `fed_learn.errors.without_tracebacks`. The log has the tracebacks."""
        without_tracebacks(self.exception)
        if self.rollback_exception is not None:
            without_tracebacks(self.rollback_exception)
        return self

    def __str__(self) -> str:
        where = self.event if self.round is None else f"{self.event} of round {self.round + 1}"
        text = f"{self.handler} at {where}: {described(self.exception)}"
        if self.rollback_exception is not None:
            text += f" (its rollback raised {described(self.rollback_exception)})"
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
