"""The named moments of a federated job, and `fire_event`, which lets handlers act on one.

Handlers are transactions on the context: one that raises leaves no trace in it. This module knows handlers and
contexts only by the methods it calls; `fed_learn.handlers.Handler` and `fed_learn.model_meta.FLContext` are those
of the library.
"""

import enum
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from fed_learn.errors import HandlerError, HandlerFailure, as_failure, brief, described, is_interrupt

logger = logging.getLogger(__name__)


class EventType(enum.StrEnum):
    """Events of a federated job; the values are those of Clara Train 3.1.

    Example:
        >>> EventType.START_ROUND == "_startRound"
        True
    """

    BEFORE_AGGREGATION = "_beforeAggregation"
    END_AGGREGATION = "_endAggregation"
    START_ROUND = "_startRound"
    END_ROUND = "_endRound"
    CLIENT_REGISTER = "_clientRegister"
    CLIENT_QUIT = "_clientQuit"
    GET_MODEL = "_getModel"
    SEND_MODEL = "_sendModel"
    RECEIVE_MODEL = "_receiveModel"
    RECEIVE_CONTRIBUTION = "_receiveContribution"
    SEND_BEST_MODEL = "_sendBestModel"
    SUBMIT_LOCAL_BEST_MODEL = "_submitLocalBestModel"
    RECEIVE_VALIDATION_MODEL = "_receiveValidationModel"
    SEND_VALIDATION_RESULTS = "_sendValidationResults"
    RECEIVE_VALIDATION_RESULTS = "_receiveValidationResults"
    STARTUP = "_startup"
    SHUTDOWN = "_shutdown"


class EventHandler(Protocol):
    """What `fire_event` asks of a handler."""

    def handle_event(self, event: str, ctx: Any) -> None:
        """Acts on the event."""

    def rollback(self, ctx: Any) -> None:
        """Undoes what the handler did beyond the bindings of the context."""


class Transactional(Protocol):
    """What `fire_event` asks of a context."""

    def snapshot(self) -> Any:
        """The bindings as they are."""

    def restore(self, snapshot: Any) -> None:
        """Puts them back."""

    def check(self, snapshot: Any) -> None:
        """Raises if a handler has bound, since `snapshot`, what it may not: the handler has failed."""


def check_handlers(handlers: Sequence[EventHandler]) -> tuple[EventHandler, ...]:
    """The handlers as a tuple.

    Raises:
        TypeError: They are no sequence, or one of them could not take part in `fire_event`; better to hear of it before
            a job than in it.
    """
    if not isinstance(handlers, Iterable):
        name = handlers.__name__ if isinstance(handlers, type) else type(handlers).__name__
        listed = f": pass handlers=[{name}(...)]" if hasattr(handlers, "handle_event") else ""
        raise TypeError(f"handlers must be a list of handlers, not {brief(handlers)}{listed}")
    chain = tuple(handlers)  # once: a generator gives them no second time
    for handler in chain:
        for method in ("handle_event", "rollback"):
            if isinstance(handler, type) or not callable(getattr(handler, method, None)):
                raise TypeError(f"{brief(handler)} is no handler: derive from fed_learn.Handler, and pass an instance")
    return chain


def fire_event(event: str, handlers: Sequence[EventHandler], ctx: Transactional) -> None:
    """Lets each handler act on an event, in list order (SHUTDOWN: in reverse).

    A handler that raises an `Exception`, or that garbles what the library has put into the context of a job (see
    `fed_learn.model_meta.JobContext`), is rolled back: its `rollback(ctx)` is called on the context as it is,
    then every binding of the context, its model and its metadata are put back as they were before that
    handler ran. The others still run. `KeyboardInterrupt` and its like restore the context and are raised at
    once. At STARTUP the first failure ends it: the handlers that had started are shut down in reverse.

    Args:
        event: One of `EventType`, or any other string, which handlers ignore unless they know it.
        handlers: The chain of handlers.
        ctx: The context, passed to each handler as it is.

    Raises:
        HandlerError: Some handler raised; holds every original exception.

    Example:
        >>> from fed_learn import FLContext, Handler
        >>> class Greeter(Handler):
        ...     def start_round(self, ctx):
        ...         ctx.set_prop("greeting", "hello")
        >>> ctx = FLContext()
        >>> fire_event(EventType.START_ROUND, [Greeter()], ctx)
        >>> ctx.get_prop("greeting")
        'hello'
    """
    chain = list(handlers)
    if event == EventType.SHUTDOWN:
        chain.reverse()
    failures: list[HandlerFailure] = []
    started: list[EventHandler] = []
    try:
        for handler in chain:
            failure = _run(event, handler, ctx)
            if failure is None:
                started.append(handler)
                continue
            failures.append(failure)
            if event == EventType.STARTUP:
                break
    except BaseException:
        if event == EventType.STARTUP:
            shut_down(started, ctx)  # logs what fails; the interrupt matters more
        raise
    if failures and event == EventType.STARTUP:
        failures += shut_down(started, ctx)
    if failures:
        raise HandlerError(failures)


def shut_down(
    handlers: Sequence[EventHandler], ctx: Transactional, *, of_client: bool = False
) -> tuple[HandlerFailure, ...]:
    """Fires SHUTDOWN so that every handler gets it, in reverse order, whatever happens in between.

    Args:
        handlers: In the order in which they started.
        ctx: The context.
        of_client: They are a client's, which may fail but not end the job of the others: `SystemExit` and the like are
            among what is returned. Only interrupts of the process are raised; see `fed_learn.errors.is_interrupt`.

    Returns:
        What failed; it has been logged, and is as it can be kept, without tracebacks.

    Raises:
        BaseException: The last interrupt that struck, after all handlers had their SHUTDOWN.
    """
    failures: list[HandlerFailure] = []
    interrupt: BaseException | None = None
    for handler in reversed(handlers):
        try:
            failure = _run(EventType.SHUTDOWN, handler, ctx)
        except BaseException as error:  # noqa: BLE001 - raised below, once all are shut down
            if not of_client or is_interrupt(error):
                interrupt = error
                continue
            failure = HandlerFailure(EventType.SHUTDOWN, _name_of(handler), as_failure(error))
        failures += [failure.without_tracebacks()] if failure is not None else []
    if interrupt is not None:
        raise interrupt
    return tuple(failures)


def _run(event: str, handler: EventHandler, ctx: Transactional) -> HandlerFailure | None:
    """Runs one handler as a transaction on the context."""
    before = ctx.snapshot()
    try:
        handler.handle_event(event, ctx)
        if event != EventType.SHUTDOWN:  # the job is over, and handlers may tidy up
            ctx.check(before)
        return None
    except Exception as error:
        rollback_error = None
        try:
            handler.rollback(ctx)
        except Exception as second:  # noqa: BLE001 - recorded
            rollback_error = second
        except BaseException:
            ctx.restore(before)
            raise
        ctx.restore(before)
        failure = HandlerFailure(str(event), _name_of(handler), error, rollback_error, _round_of(event, ctx))
        logger.error("handler failed: %s", failure, exc_info=rollback_error or error)
        return failure
    except BaseException as error:
        ctx.restore(before)
        if not is_interrupt(error):  # whoever sees it next will not know where it comes from
            logger.error("%s leaves at %s by %s", _name_of(handler), event, described(error))
        raise


def _name_of(handler: EventHandler) -> str:
    return f"{type(handler).__module__}.{type(handler).__qualname__}"


def _round_of(event: str, ctx: Transactional) -> int | None:
    """The round of an event, from 0; None where the event belongs to none, or the context does not say."""
    get = getattr(ctx, "get_prop", None)
    on_client = event in (EventType.GET_MODEL, EventType.RECEIVE_MODEL)
    # The keys are those of ContextKey; on a server there is a report while there is a round.
    if get is None or not (on_client or get("_report") is not None):
        return None
    number = get("_round")
    return number if isinstance(number, int) else None
