"""`fire_event`: the order of handlers, handlers as transactions on the context, and what comes of their failures."""

import asyncio
import contextlib
import copy
import logging
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from federation import At, Lifecycle, raising
from hypothesis import given, settings
from hypothesis import strategies as st

import fed_learn as fl
from fed_learn.errors import HandlerFailure
from fed_learn.events import shut_down

pytestmark = pytest.mark.quick

Mutation = Callable[[fl.FLContext], object]

INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)


class Named(fl.Handler):
    """Writes its name and the event into a list, then perhaps raises."""

    def __init__(self, name: str, log: list[str], errors: dict[str, BaseException] | None = None) -> None:
        self.name = name
        self.log = log
        self.errors = errors or {}

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        self.log.append(f"{self.name} {event}")
        if event in self.errors:
            raise self.errors[event]

    def rollback(self, ctx: fl.FLContext) -> None:
        self.log.append(f"{self.name} rollback")


class Undoing(fl.Handler):
    """Changes the context, then raises; what its rollback does is given, too."""

    def __init__(self, change: Mutation, error: BaseException, rollback: Mutation | None = None) -> None:
        self.change = change
        self.error = error
        self.on_rollback = rollback

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        self.change(ctx)
        raise self.error

    def rollback(self, ctx: fl.FLContext) -> None:
        if self.on_rollback is not None:
            self.on_rollback(ctx)


class Subject(fl.FLContext):
    """A context of a user's own, with an attribute."""

    note: str = "of the class"


def filled_context() -> Subject:
    ctx = Subject({"first": 1, "second": [2], "third": (3,)}, model=fl.ModelData({"w": np.zeros(2)}))
    ctx.publish_metric("accuracy", 0.5)
    ctx.add_metadata("site", "one")
    ctx.add_metadata("study", ["two"])
    ctx.note = "of the instance"
    return ctx


def observed(ctx: fl.FLContext) -> tuple[Any, ...]:
    """Every binding, by the identity of its value; props and metadata in their order."""
    attributes = {name: id(value) for name, value in vars(ctx).items() if name != "_metadata"}
    metadata = [(name, id(value)) for name, value in ctx.get_all_metadata().items()]
    return [(key, id(value)) for key, value in ctx.items()], metadata, id(ctx.get_model()), attributes


def same(value: object) -> Mutation:
    """Leaves the context alone."""
    return lambda ctx: value


MUTATIONS: dict[str, Mutation] = {
    "nothing": same(None),
    "a value replaced": lambda ctx: ctx.set_prop("first", 9),
    "several values replaced": lambda ctx: ctx.set_props({"first": 9, "new": 9}),
    "a key deleted": lambda ctx: ctx.pop("first"),
    "the last key deleted": lambda ctx: ctx.popitem(),
    "all keys deleted": lambda ctx: ctx.clear(),
    "a key deleted and set again, which moves it": lambda ctx: ctx.set_prop("first", ctx.pop("first")),
    "a key added": lambda ctx: ctx.set_prop("new", 9),
    "a default set": lambda ctx: ctx.setdefault("new", 9),
    "an update": lambda ctx: ctx.update(second=9, new=9),
    "an update in place": lambda ctx: ctx.__ior__({"second": 9, "new": 9}),
    "a metric published": lambda ctx: ctx.publish_metric("accuracy", 0.9),
    "metadata added": lambda ctx: ctx.add_metadata("new", 9),
    "metadata replaced": lambda ctx: ctx.add_metadata("site", 9),
    "all metadata replaced": lambda ctx: ctx.set_metadata({"other": 9}),
    "all metadata deleted": lambda ctx: ctx.set_metadata({}),
    "metadata in another order": lambda ctx: ctx.set_metadata(dict(reversed(ctx.get_all_metadata().items()))),
    "the model replaced": lambda ctx: ctx.set_model(fl.ModelData({"w": np.ones(2)})),
    "the model replaced by assignment": lambda ctx: setattr(ctx, "model", fl.ModelData()),
    "the model taken away": lambda ctx: ctx.set_model(None),
    "an attribute added": lambda ctx: setattr(ctx, "new", 9),
    "an attribute replaced": lambda ctx: setattr(ctx, "note", "another"),
    "an attribute deleted": lambda ctx: delattr(ctx, "note"),
}


# Order


def test_handlers_run_in_list_order() -> None:
    log: list[str] = []
    fl.fire_event(fl.EventType.START_ROUND, [Named(name, log) for name in "abc"], fl.FLContext())
    assert log == ["a _startRound", "b _startRound", "c _startRound"]


def test_shutdown_runs_in_reverse_order() -> None:
    log: list[str] = []
    fl.fire_event(fl.EventType.SHUTDOWN, [Named(name, log) for name in "abc"], fl.FLContext())
    assert log == ["c _shutdown", "b _shutdown", "a _shutdown"]


def test_startup_runs_in_list_order() -> None:
    log: list[str] = []
    fl.fire_event(fl.EventType.STARTUP, tuple(Named(name, log) for name in "ab"), fl.FLContext())
    assert log == ["a _startup", "b _startup"]


def test_later_handlers_see_what_earlier_ones_did() -> None:
    ctx = fl.FLContext({"count": 1})
    double = At("e", lambda ctx: ctx.set_prop("count", ctx["count"] * 2))
    add = At("e", lambda ctx: ctx.set_prop("count", ctx["count"] + 1))
    fl.fire_event("e", [double, add], ctx)
    assert ctx == {"count": 3}


def test_no_handlers_at_all_is_fine() -> None:
    ctx = fl.FLContext({"a": 1})
    fl.fire_event(fl.EventType.STARTUP, [], ctx)
    fl.fire_event(fl.EventType.SHUTDOWN, (), ctx)
    assert ctx == {"a": 1}


def test_a_handler_that_changes_the_list_does_not_change_who_gets_this_event() -> None:
    log: list[str] = []
    chain: list[fl.Handler] = []
    chain += [At("e", lambda ctx: chain.clear()), Named("b", log)]
    fl.fire_event("e", chain, fl.FLContext())
    assert log == ["b e"]
    assert chain == []


@pytest.mark.parametrize("event", [*fl.EventType, "_custom"])
def test_handlers_get_the_callers_own_context_and_get_it_positionally(event: str) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Spy:
        def handle_event(self, *args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))
            raise RuntimeError

        def rollback(self, *args: Any, **kwargs: Any) -> None:
            calls.append((args, kwargs))

    ctx = filled_context()
    with pytest.raises(fl.HandlerError):
        fl.fire_event(event, [Spy()], ctx)
    (handled, rolled_back) = calls
    assert handled == ((event, ctx), {})
    assert handled[0][1] is ctx
    assert rolled_back == ((ctx,), {})
    assert rolled_back[0][0] is ctx


# Transactions


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_handler_that_raises_leaves_no_trace_in_the_context(mutation: Mutation) -> None:
    ctx = filled_context()
    before = observed(ctx)
    with pytest.raises(fl.HandlerError):
        fl.fire_event("e", [Undoing(mutation, RuntimeError("no"))], ctx)
    assert observed(ctx) == before


@pytest.mark.parametrize("interrupt", INTERRUPTS)
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_an_interrupted_handler_leaves_no_trace_in_the_context(
    mutation: Mutation, interrupt: type[BaseException]
) -> None:
    ctx = filled_context()
    before = observed(ctx)
    with pytest.raises(interrupt):
        fl.fire_event("e", [Undoing(mutation, interrupt())], ctx)
    assert observed(ctx) == before


@pytest.mark.parametrize("mutation", [pair for pair in MUTATIONS.items() if pair[0] != "nothing"], ids=lambda p: p[0])
def test_a_handler_that_succeeds_keeps_its_changes(mutation: tuple[str, Mutation]) -> None:
    ctx = filled_context()
    before = observed(ctx)
    fl.fire_event("e", [At("e", mutation[1])], ctx)
    assert observed(ctx) != before


@settings(deadline=None)
@given(names=st.lists(st.sampled_from(sorted(MUTATIONS)), max_size=12), split=st.integers(0, 12))
def test_any_sequence_of_changes_is_undone(names: list[str], split: int) -> None:
    # The first part happens in the handler, the rest in its rollback: both are undone.
    def run(chosen: list[str]) -> Mutation:
        def mutate(ctx: fl.FLContext) -> None:
            for name in chosen:
                with contextlib.suppress(KeyError, AttributeError):  # deleted by an earlier one
                    MUTATIONS[name](ctx)

        return mutate

    ctx = filled_context()
    before = observed(ctx)
    with pytest.raises(fl.HandlerError) as caught:
        fl.fire_event("e", [Undoing(run(names[:split]), ValueError("no"), run(names[split:]))], ctx)
    assert observed(ctx) == before
    assert caught.value.failures[0].rollback_exception is None


def test_what_earlier_handlers_did_survives_the_failure_of_a_later_one() -> None:
    ctx = fl.FLContext({"value": "initial"})
    first = At("e", lambda ctx: ctx.set_prop("value", "first"))
    with pytest.raises(fl.HandlerError):
        fl.fire_event("e", [first, Undoing(lambda ctx: ctx.set_prop("value", "second"), OSError())], ctx)
    assert ctx == {"value": "first"}


def test_the_other_handlers_still_run_and_see_the_restored_context() -> None:
    ctx = fl.FLContext({"value": "initial"})
    seen: list[str] = []
    last = At("e", lambda ctx: seen.append(ctx["value"]))
    with pytest.raises(fl.HandlerError):
        fl.fire_event("e", [Undoing(lambda ctx: ctx.set_prop("value", "half"), OSError()), last], ctx)
    assert seen == ["initial"]


def test_rollback_is_called_on_the_context_as_the_handler_left_it() -> None:
    ctx = fl.FLContext({"value": "initial"})
    seen: list[str] = []
    handler = Undoing(lambda ctx: ctx.set_prop("value", "half"), OSError(), lambda ctx: seen.append(ctx["value"]))
    with pytest.raises(fl.HandlerError):
        fl.fire_event("e", [handler], ctx)
    assert seen == ["half"]
    assert ctx == {"value": "initial"}


def test_rollback_is_called_on_the_handler_that_failed_and_no_other() -> None:
    log: list[str] = []
    chain = [Named("a", log), Named("b", log, {"e": OSError()}), Named("c", log)]
    with pytest.raises(fl.HandlerError):
        fl.fire_event("e", chain, fl.FLContext())
    assert log == ["a e", "b e", "b rollback", "c e"]


def test_a_rollback_that_raises_joins_the_record_and_the_context_is_restored_all_the_same() -> None:
    ctx = filled_context()
    before = observed(ctx)
    first, second = OSError("first"), RuntimeError("second")

    def half_a_rollback(ctx: fl.FLContext) -> None:
        ctx.clear()
        ctx.set_model(None)
        raise second

    with pytest.raises(fl.HandlerError) as caught:
        fl.fire_event("e", [Undoing(lambda ctx: ctx.set_prop("new", 1), first, half_a_rollback)], ctx)
    (failure,) = caught.value.failures
    assert (failure.exception, failure.rollback_exception) == (first, second)
    assert caught.value.exceptions == (first,)
    assert "its rollback raised RuntimeError: second" in str(caught.value)
    assert observed(ctx) == before


def test_a_rollback_that_is_interrupted_restores_the_context_and_the_interrupt_goes_on() -> None:
    ctx = filled_context()
    before = observed(ctx)
    handler = Undoing(lambda ctx: ctx.clear(), OSError(), lambda ctx: raising(KeyboardInterrupt())(ctx))
    with pytest.raises(KeyboardInterrupt):
        fl.fire_event("e", [handler], ctx)
    assert observed(ctx) == before


def test_a_handler_without_a_rollback_is_restored_too() -> None:
    class Bare:
        def handle_event(self, event: str, ctx: fl.FLContext) -> None:
            ctx.clear()
            raise OSError("bare")

    ctx = fl.FLContext({"a": 1})
    with pytest.raises(fl.HandlerError) as caught:
        fl.fire_event("e", [Bare()], ctx)  # type: ignore[list-item]
    assert ctx == {"a": 1}
    assert isinstance(caught.value.failures[0].rollback_exception, AttributeError)


# HandlerError


def two_failures() -> tuple[fl.HandlerError, OSError, ValueError]:
    first, second = OSError("disk full"), ValueError("no number")
    chain = [Undoing(same(0), first), At("other", same(0)), Named("n", [], {"e": second})]
    with pytest.raises(fl.HandlerError) as caught:
        fl.fire_event("e", chain, fl.FLContext())
    return caught.value, first, second


def test_one_error_holds_the_original_exceptions_in_order() -> None:
    error, first, second = two_failures()
    assert isinstance(error, ExceptionGroup)
    assert isinstance(error, fl.FedLearnError)
    assert error.exceptions == (first, second)
    assert error.exceptions[0] is first
    assert error.exceptions[1] is second


def test_the_record_names_event_handler_and_exception() -> None:
    error, first, second = two_failures()
    here = __name__
    assert [(f.event, f.handler, f.exception, f.rollback_exception) for f in error.failures] == [
        ("e", f"{here}.Undoing", first, None),
        ("e", f"{here}.Named", second, None),
    ]
    assert str(error) == (
        f"2 handler(s) failed: {here}.Undoing at e: OSError: disk full; {here}.Named at e: ValueError: no number"
    )


def test_the_event_in_the_record_is_its_plain_value() -> None:
    with pytest.raises(fl.HandlerError) as caught:
        fl.fire_event(fl.EventType.END_ROUND, [Undoing(same(0), OSError())], fl.FLContext())
    assert caught.value.failures[0].event == "_endRound"
    assert str(caught.value.failures[0]) == f"{__name__}.Undoing at _endRound: OSError"


def test_except_star_catches_each_kind_by_itself() -> None:
    error, first, second = two_failures()
    caught: list[tuple[str, tuple[Exception, ...], type[BaseException]]] = []
    try:
        raise error
    except* OSError as group:
        caught.append(("os", group.exceptions, type(group)))
    except* ValueError as group:
        caught.append(("value", group.exceptions, type(group)))
    assert caught == [("os", (first,), fl.HandlerError), ("value", (second,), fl.HandlerError)]


def test_what_except_star_leaves_over_goes_on() -> None:
    error, _, second = two_failures()

    def catch_one_kind() -> None:
        try:
            raise error
        except* OSError:
            pass

    with pytest.raises(fl.HandlerError) as caught:
        catch_one_kind()
    assert caught.value.exceptions == (second,)


def test_split_keeps_the_records_that_belong_to_each_part() -> None:
    error, first, second = two_failures()
    matching, rest = error.split(OSError)
    assert isinstance(matching, fl.HandlerError)
    assert isinstance(rest, fl.HandlerError)
    assert matching.exceptions == (first,)
    assert matching.failures == error.failures[:1]
    assert rest.exceptions == (second,)
    assert rest.failures == error.failures[1:]


def test_subgroup_and_derive_keep_type_and_records() -> None:
    error, _, second = two_failures()
    part = error.subgroup(ValueError)
    assert isinstance(part, fl.HandlerError)
    assert part.failures == error.failures[1:]
    derived = error.derive([second])
    assert type(derived) is fl.HandlerError
    assert derived.failures == error.failures[1:]
    assert error.subgroup(KeyError) is None


def test_a_group_that_a_handler_raises_can_be_split_too() -> None:
    inner = ExceptionGroup("inner", [KeyError("a"), ValueError("b")])
    with pytest.raises(fl.HandlerError) as caught:
        fl.fire_event("e", [Undoing(same(0), inner)], fl.FLContext())
    assert caught.value.failures[0].exception is inner
    matching, rest = caught.value.split(KeyError)
    assert isinstance(matching, fl.HandlerError)
    assert isinstance(rest, fl.HandlerError)
    assert [type(e) for e in leaves(matching)] == [KeyError]
    assert [type(e) for e in leaves(rest)] == [ValueError]


def leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [leaf for e in group.exceptions for leaf in (leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]


def test_a_group_with_an_interrupt_in_it_counts_as_an_interrupt() -> None:
    ctx = fl.FLContext({"a": 1})
    group = BaseExceptionGroup("g", [KeyboardInterrupt(), ValueError()])
    with pytest.raises(BaseExceptionGroup) as caught:
        fl.fire_event("e", [Undoing(lambda ctx: ctx.clear(), group)], ctx)
    assert caught.value is group
    assert ctx == {"a": 1}


@pytest.mark.parametrize("duplicate", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy])
def test_the_error_survives_pickling_and_copying(duplicate: Callable[[fl.HandlerError], fl.HandlerError]) -> None:
    cause = fl.NonFiniteError("site-1: 'w' is NaN", contributor="site-1", name="w", index=(0,), value=float("nan"))
    with pytest.raises(fl.HandlerError) as caught:
        fl.fire_event("e", [Undoing(same(0), cause, raising(OSError("and this")))], fl.FLContext())
    second = duplicate(caught.value)
    assert type(second) is fl.HandlerError
    assert str(second) == str(caught.value)
    (failure,) = second.failures
    assert isinstance(failure, HandlerFailure)
    assert (failure.event, failure.handler) == ("e", f"{__name__}.Undoing")
    assert isinstance(failure.exception, fl.NonFiniteError)
    assert failure.exception.contributor == "site-1"
    assert failure.exception.index == (0,)
    assert str(failure.rollback_exception) == "and this"
    assert second.exceptions[0] is failure.exception


def test_the_traceback_of_each_original_leads_to_the_handlers_line() -> None:
    error, first, _ = two_failures()
    text = "".join(traceback.format_exception(error))
    assert "raise self.error" in text
    assert "OSError: disk full" in text
    assert "ValueError: no number" in text
    assert first.__traceback__ is not None


# Log


def test_a_failure_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    two_failures()
    first, second = caplog.records
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.ERROR]
    assert [record.name for record in caplog.records] == ["fed_learn.events", "fed_learn.events"]
    assert first.getMessage() == f"handler failed: {__name__}.Undoing at e: OSError: disk full"
    assert "Named at e: ValueError: no number" in second.getMessage()
    assert first.exc_info is not None
    assert isinstance(first.exc_info[1], OSError)
    assert "raise self.error" in caplog.text


def test_a_failing_rollback_is_logged_with_both_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    handler = Undoing(same(0), OSError("first"), raising(RuntimeError("second")))
    with pytest.raises(fl.HandlerError):
        fl.fire_event("e", [handler], fl.FLContext())
    assert "raise self.error" in caplog.text
    assert "OSError: first" in caplog.text
    assert "in rollback" in caplog.text
    assert "RuntimeError: second" in caplog.text


def test_handlers_that_succeed_log_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    fl.fire_event(fl.EventType.END_ROUND, [Named("a", [])], fl.FLContext())
    assert caplog.records == []


# Interrupts


@pytest.mark.parametrize("interrupt", INTERRUPTS)
def test_an_interrupt_is_raised_at_once_and_as_it_is(interrupt: type[BaseException]) -> None:
    log: list[str] = []
    error = interrupt("now")
    chain = [Named("a", log, {"e": OSError()}), Named("b", log, {"e": error}), Named("c", log)]
    with pytest.raises(interrupt) as caught:
        fl.fire_event("e", chain, fl.FLContext())
    assert caught.value is error
    assert log == ["a e", "a rollback", "b e"]


# STARTUP and SHUTDOWN


def test_startup_stops_at_the_first_failure_and_shuts_those_before_it_down_in_reverse() -> None:
    log: list[str] = []
    error = OSError("no")
    chain = [Named("a", log), Named("b", log), Named("c", log, {"_startup": error}), Named("d", log)]
    with pytest.raises(fl.HandlerError) as caught:
        fl.fire_event(fl.EventType.STARTUP, chain, fl.FLContext())
    assert log == ["a _startup", "b _startup", "c _startup", "c rollback", "b _shutdown", "a _shutdown"]
    assert caught.value.exceptions == (error,)


def test_a_shutdown_that_fails_after_a_failed_startup_joins_the_error() -> None:
    log: list[str] = []
    first, second = OSError("startup"), ValueError("shutdown")
    chain = [Named("a", log), Named("b", log, {"_shutdown": second}), Named("c", log, {"_startup": first})]
    with pytest.raises(fl.HandlerError) as caught:
        fl.fire_event(fl.EventType.STARTUP, chain, fl.FLContext())
    assert caught.value.exceptions == (first, second)
    assert [failure.event for failure in caught.value.failures] == ["_startup", "_shutdown"]
    assert log == ["a _startup", "b _startup", "c _startup", "c rollback", "b _shutdown", "b rollback", "a _shutdown"]


@pytest.mark.parametrize("interrupt", INTERRUPTS)
def test_an_interrupted_startup_shuts_those_down_that_had_started(interrupt: type[BaseException]) -> None:
    log: list[str] = []
    chain = [Named("a", log), Named("b", log), Named("c", log, {"_startup": interrupt()}), Named("d", log)]
    with pytest.raises(interrupt):
        fl.fire_event(fl.EventType.STARTUP, chain, fl.FLContext())
    assert log == ["a _startup", "b _startup", "c _startup", "b _shutdown", "a _shutdown"]


def test_an_interrupted_startup_logs_what_fails_in_the_shutdown(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    chain = [
        Named("a", log),
        Named("b", log, {"_shutdown": OSError("stuck")}),
        Named("c", log, {"_startup": KeyboardInterrupt()}),
    ]
    with pytest.raises(KeyboardInterrupt):
        fl.fire_event(fl.EventType.STARTUP, chain, fl.FLContext())
    assert log[-3:] == ["b _shutdown", "b rollback", "a _shutdown"]
    assert [record.getMessage() for record in caplog.records] == [
        f"handler failed: {__name__}.Named at _shutdown: OSError: stuck"
    ]


def test_what_the_failed_startup_bound_is_gone_and_what_started_handlers_bound_is_there_in_their_shutdown() -> None:
    ctx = fl.FLContext()
    seen: list[dict[str, Any]] = []

    class First(fl.Handler):
        def startup(self, ctx: fl.FLContext) -> None:
            ctx.set_prop("first", 1)

        def shutdown(self, ctx: fl.FLContext) -> None:
            seen.append(dict(ctx))

    with pytest.raises(fl.HandlerError):
        fl.fire_event(fl.EventType.STARTUP, [First(), Undoing(lambda ctx: ctx.set_prop("second", 2), OSError())], ctx)
    assert seen == [{"first": 1}]


def test_fired_shutdown_goes_on_after_a_failure_and_raises_at_the_end() -> None:
    log: list[str] = []
    error = OSError("stuck")
    chain = [Named("a", log), Named("b", log, {"_shutdown": error}), Named("c", log)]
    with pytest.raises(fl.HandlerError) as caught:
        fl.fire_event(fl.EventType.SHUTDOWN, chain, fl.FLContext())
    assert log == ["c _shutdown", "b _shutdown", "b rollback", "a _shutdown"]
    assert caught.value.exceptions == (error,)


def test_shut_down_reaches_every_handler_and_returns_what_failed() -> None:
    log: list[str] = []
    errors = [OSError("a"), ValueError("c")]
    chain = [Named("a", log, {"_shutdown": errors[0]}), Named("b", log), Named("c", log, {"_shutdown": errors[1]})]
    failures = shut_down(chain, fl.FLContext())
    assert log == ["c _shutdown", "c rollback", "b _shutdown", "a _shutdown", "a rollback"]
    assert [failure.exception for failure in failures] == [errors[1], errors[0]]


@pytest.mark.parametrize("interrupt", INTERRUPTS)
def test_shut_down_reaches_every_handler_even_when_it_is_interrupted(interrupt: type[BaseException]) -> None:
    log: list[str] = []
    chain = [Named("a", log), Named("b", log, {"_shutdown": OSError()}), Named("c", log, {"_shutdown": interrupt()})]
    with pytest.raises(interrupt):
        shut_down(chain, fl.FLContext())
    assert log == ["c _shutdown", "b _shutdown", "b rollback", "a _shutdown"]


def test_shut_down_of_nothing_fails_nowhere() -> None:
    assert shut_down([], fl.FLContext()) == ()


# Events and methods


def test_an_unknown_event_does_nothing() -> None:
    ctx = filled_context()
    before = observed(ctx)
    handler = Lifecycle()
    fl.fire_event("_nobodyKnowsThis", [handler], ctx)
    assert observed(ctx) == before
    assert (handler.started, handler.shut_down) == (0, 0)


def test_a_plain_string_is_as_good_as_the_constant() -> None:
    handler = Lifecycle()
    fl.fire_event("_startup", [handler], fl.FLContext())
    fl.fire_event("_shutdown", [handler], fl.FLContext())
    assert (handler.started, handler.shut_down) == (1, 1)


def test_plain_string_shutdown_runs_in_reverse_too() -> None:
    log: list[str] = []
    fl.fire_event("_shutdown", [Named("a", log), Named("b", log)], fl.FLContext())
    assert log == ["b _shutdown", "a _shutdown"]


def test_a_subclass_that_overrides_handle_event_gets_every_event() -> None:
    seen: list[str] = []

    class Everything(Lifecycle):
        def handle_event(self, event: str, ctx: fl.FLContext) -> None:
            seen.append(event)
            super().handle_event(event, ctx)

    handler = Everything()
    for event in [*fl.EventType, "_custom"]:
        fl.fire_event(event, [handler], fl.FLContext())
    assert seen == [*fl.EventType, "_custom"]
    assert (handler.started, handler.shut_down) == (1, 1)
