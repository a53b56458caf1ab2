"""What handlers may do to the context of a job, and that all else is their own failure, by name, and undone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from federation import (
    ROUND_EVENTS,
    AddingLearner,
    At,
    Recorder,
    clients_of,
    initial_weights,
    server_of,
    two_clients,
    values,
)

import fed_learn as fl
from fed_learn.model_meta import JobContext
from fed_learn.server.model_aggregator import ModelAggregator

Event = fl.EventType
Key = fl.ContextKey
Change = Callable[[Any], object]


class InRounds(At):
    """Does something at one event of a round, and nothing while the final model is scored."""

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        if Key.REPORT in ctx:
            super().handle_event(event, ctx)


def reporting(ctx: fl.FLContext, **changes: Any) -> None:
    ctx[Key.REPORT] = replace(ctx[Key.REPORT], **changes)


ABUSES: dict[str, Change] = {
    "clears it": lambda ctx: ctx.clear(),
    "takes the round": lambda ctx: ctx.pop(Key.ROUND),
    "deletes the report": lambda ctx: ctx.__delitem__(Key.REPORT),
    "takes the handlers": lambda ctx: ctx.pop(Key.HANDLERS),
    "restores nothing": lambda ctx: ctx.restore(({}, dict(ctx.__dict__), {})),
    "restores what is none": lambda ctx: ctx.restore((None, None, None)),
    "empties its attributes": lambda ctx: ctx.__dict__.clear(),
    "another round": lambda ctx: ctx.set_prop(Key.ROUND, ctx[Key.ROUND] + 1),
    "a round that is text": lambda ctx: ctx.set_prop(Key.ROUND, "x"),
    "a round that only looks like it": lambda ctx: ctx.set_prop(Key.ROUND, float(ctx[Key.ROUND])),
    "the number of rounds": lambda ctx: ctx.set_prop(Key.NUM_ROUNDS, 10**6),
    "a report that is text": lambda ctx: ctx.set_prop(Key.REPORT, "all well"),
    "another report": lambda ctx: ctx.set_prop(Key.REPORT, fl.RoundReport(0)),
    "a report of its own making": lambda ctx: reporting(ctx, absent=("a",)),
    "a report with scores that are text": lambda ctx: reporting(ctx, metrics={"accuracy": "good"}),
    "no contributions": lambda ctx: ctx.set_prop(Key.CONTRIBUTIONS, None),
    "contributions that are none": lambda ctx: ctx.set_prop(Key.CONTRIBUTIONS, ["a", "b"]),
    "an iterator over contributions": lambda ctx: ctx.set_prop(Key.CONTRIBUTIONS, iter(ctx[Key.CONTRIBUTIONS])),
    "scores that are text": lambda ctx: ctx.set_prop(Key.METRICS, "good"),
    "a score that is text": lambda ctx: ctx.set_prop(Key.METRICS, {"accuracy": "good"}),
    "a best model that is a number": lambda ctx: ctx.set_prop(Key.BEST_RECEIVED, 0.9),
    "a best model without weights": lambda ctx: ctx.set_prop(Key.BEST_AGGREGATED, fl.BestModel(0, 1, "m", None)),  # type: ignore[arg-type]
    "a reason that is none": lambda ctx: ctx.set_prop(Key.STOP, True),
    "a model that is an array": lambda ctx: ctx.set_model(np.zeros(3)),
    "no model": lambda ctx: ctx.set_model(None),
    "a model of lists": lambda ctx: ctx.set_model(fl.ModelData({"w": [1, 2]})),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("event", ROUND_EVENTS)
@pytest.mark.parametrize("abuse", ABUSES)
def test_what_a_handler_may_not_do_is_its_failure_and_a_job_that_logs_goes_on_with_right_values(
    abuse: str, event: str
) -> None:
    others = Recorder()
    server = server_of(handlers=[InRounds(event, ABUSES[abuse]), others], on_handler_error="log")
    result = server.run(two_clients())
    assert values(result.weights) == (5.0, 5.0, 4.0)
    assert [report.accepted for report in result.reports] == [("a", "b")] * 2
    assert {(f.event, f.handler, f.round) for f in result.handler_failures} == {
        (event, "test_job_context.InRounds", number) for number in range(2)
    }
    assert len(result.handler_failures) == len([ctx for ctx in others.at(event) if Key.REPORT in ctx])
    assert [ctx[Key.ROUND] for ctx in others.at(Event.END_ROUND)] == [0, 1]


@pytest.mark.parametrize("abuse", ABUSES)
def test_what_a_handler_may_not_do_ends_a_job_by_its_name_otherwise(abuse: str) -> None:
    with pytest.raises(
        fl.HandlerError, match=r"^1 handler\(s\) failed: federation.At at _beforeAggregation of round 1: "
    ):
        server_of(handlers=[At(Event.BEFORE_AGGREGATION, ABUSES[abuse])]).run(two_clients())


def test_the_error_names_the_key() -> None:
    failures = (
        server_of(1, handlers=[At(Event.END_ROUND, ABUSES["another round"])], on_handler_error="log")
        .run(two_clients())
        .handler_failures
    )
    error = failures[0].exception
    assert isinstance(error, fl.ContextError)
    assert error.key == Key.ROUND
    assert str(error) == "a handler cannot bind _round to 1 in the context of a job"


def test_the_error_says_what_can_be_bound_to_a_key_that_handlers_may_bind() -> None:
    with pytest.raises(
        fl.HandlerError, match=r"cannot bind _stop to True in the context of a job; it can bind a reason"
    ):
        server_of(1, handlers=[At(Event.END_ROUND, ABUSES["a reason that is none"])]).run(two_clients())


def test_a_key_to_which_the_job_has_bound_none_cannot_be_taken_either() -> None:
    takes = At(Event.RECEIVE_CONTRIBUTION, lambda ctx: ctx.pop(Key.REJECTION))
    recorder = Recorder()
    result = server_of(1, handlers=[takes, recorder], on_handler_error="log").run(two_clients())
    assert [str(failure.exception) for failure in result.handler_failures] == [
        "a handler cannot take _rejection out of the context of a job"
    ] * 2
    assert [ctx[Key.REJECTION] for ctx in recorder.at(Event.RECEIVE_CONTRIBUTION)] == [None, None]


def test_a_handler_that_fails_so_is_rolled_back() -> None:
    class Tidy(fl.Handler):
        rolled_back = 0

        def end_round(self, ctx: fl.FLContext) -> None:
            ctx.clear()

        def rollback(self, ctx: fl.FLContext) -> None:
            self.rolled_back += 1

    tidy = Tidy()
    server_of(2, handlers=[tidy], on_handler_error="log").run(two_clients())
    assert tidy.rolled_back == 2


CHOICES: dict[str, Change] = {
    "a key of its own": lambda ctx: ctx.set_prop("mine", object()),
    "all keys bound anew": lambda ctx: ctx.update(ctx.clone()),
    "the same round": lambda ctx: ctx.set_prop(Key.ROUND, int(str(ctx[Key.ROUND]))),
    "contributions in a list": lambda ctx: ctx.set_prop(Key.CONTRIBUTIONS, list(ctx[Key.CONTRIBUTIONS])),
    "contributions of a dict": lambda ctx: ctx.set_prop(
        Key.CONTRIBUTIONS, {c.contributor: c for c in ctx[Key.CONTRIBUTIONS]}.values()
    ),
    "a set of contributions": lambda ctx: ctx.set_prop(Key.CONTRIBUTIONS, set(ctx[Key.CONTRIBUTIONS])),
    "contributions in an array": lambda ctx: ctx.set_prop(
        Key.CONTRIBUTIONS, np.array(ctx[Key.CONTRIBUTIONS], dtype=object)
    ),
    "a score": lambda ctx: ctx.publish_metric("size", np.float32(2)),
    "scores of its own": lambda ctx: ctx.set_prop(Key.METRICS, {"size": 2}),
    "a best model": lambda ctx: ctx.set_prop(
        Key.BEST_RECEIVED, fl.BestModel(0, 1.0, "m", fl.FederatedServer(initial_weights(), num_rounds=1).weights)
    ),
    "no best model": lambda ctx: ctx.set_prop(Key.BEST_AGGREGATED, None),
    "metadata": lambda ctx: ctx.add_metadata("a", 1),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_a_handler_may_do_is_no_failure(choice: str) -> None:
    result = server_of(handlers=[InRounds(event, CHOICES[choice]) for event in ROUND_EVENTS]).run(two_clients())
    assert values(result.weights) == (5.0, 5.0, 4.0)
    assert result.handler_failures == ()


def test_rounds_beyond_those_that_python_keeps_one_object_of_may_be_bound_anew() -> None:
    ctx = JobContext({Key.ROUND: 100_000})
    before = ctx.snapshot()
    ctx[Key.ROUND] = int("100000")
    ctx.check(before)
    assert ctx[Key.ROUND] == 100_000


def test_a_handler_may_tidy_up_when_the_job_is_over() -> None:
    server = server_of(handlers=[fl.ModelSelectionHandler(), At(Event.SHUTDOWN, lambda ctx: ctx.clear())])
    result = server.run(two_clients())
    assert values(result.weights) == (5.0, 5.0, 4.0)
    assert result.best is not None
    assert server.ctx[Key.NUM_ROUNDS] == 2


def test_what_handlers_bind_when_the_job_is_over_is_there_to_be_read() -> None:
    binds: Change = lambda ctx: ctx.update({"mine": 1, Key.STOP: "tired", Key.NUM_ROUNDS: "none"})  # noqa: E731
    server = server_of(handlers=[At(Event.SHUTDOWN, binds), At(Event.SHUTDOWN, lambda ctx: ctx.set_model(None))])
    result = server.run(two_clients())
    assert (server.ctx["mine"], server.ctx[Key.STOP], server.ctx[Key.NUM_ROUNDS]) == (1, "tired", 2)
    assert server.ctx.model is not None
    assert server.ctx.model.weights is result.weights


@pytest.mark.parametrize("abuse", ["clears it", "takes the handlers", "no model", "a model of lists"])
def test_a_clients_handler_that_garbles_its_context_costs_that_client_alone(abuse: str) -> None:
    clients = [
        *two_clients(),
        fl.FederatedClient("c", AddingLearner(9), handlers=[At(Event.RECEIVE_MODEL, ABUSES[abuse])]),
    ]
    result = server_of(min_contributions=2).run(clients)
    assert values(result.weights) == (5.0, 5.0, 4.0)
    assert [quit.contributor for quit in result.quits] == ["c"]
    assert {f.handler for f in result.handler_failures} == {"federation.At"}


def test_an_aggregator_that_garbles_the_context_fails_its_round_and_nothing_else() -> None:
    class Tidy(ModelAggregator):
        def process(self, accumulator: Any, fl_ctx: fl.FLContext) -> bool:
            done = super().process(accumulator, fl_ctx)
            if fl_ctx[Key.ROUND] == 0:
                fl_ctx.clear()
            return done

    server = server_of(3, aggregator=Tidy(), kind=fl.Kind.DIFF)
    result = server.run(clients_of({"a": AddingLearner(1)}, kind=fl.Kind.DIFF))
    assert values(result.weights) == (2.0, 2.0, 2.0)
    assert [type(report.error) for report in result.reports] == [fl.AggregatorError, type(None), type(None)]
    assert "a handler cannot" in str(result.reports[0].error)


def test_in_a_context_that_is_driven_by_hand_handlers_bind_what_they_like() -> None:
    ctx = fl.FLContext({Key.ROUND: 0, Key.HANDLERS: (), Key.REPORT: fl.RoundReport(0)}, model=fl.ModelData({}))
    for abuse in ("another round", "a report that is text", "a reason that is none", "no model", "clears it"):
        fl.fire_event(Event.END_ROUND, [At(Event.END_ROUND, ABUSES[abuse])], ctx)
    assert ctx == {}
    assert ctx.model is None
