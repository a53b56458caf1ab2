"""Handlers that fail in a job, and that every handler that was started is shut down once."""

import _thread
import asyncio
import logging
import signal
import threading
from collections.abc import Callable

import pytest
from federation import (
    CLIENT_EVENTS,
    ROUND_EVENTS,
    SERVER_EVENTS,
    AddingLearner,
    At,
    Lifecycle,
    NormEvaluator,
    Recorder,
    WeightDict,
    clients_of,
    failing,
    raising,
    server_of,
    two_clients,
    values,
    watched_job,
)

import fed_learn as fl
from fed_learn.errors import HandlerFailure

Event = fl.EventType
Key = fl.ContextKey


# Handlers that fail


def broken(event: str, error: Exception) -> At:
    return At(event, raising(error))


@pytest.mark.parametrize("event", [event for event in SERVER_EVENTS if event != Event.SHUTDOWN])
def test_a_handler_that_raises_ends_the_job_by_default(event: str) -> None:
    error, before, after = OSError("disk full"), Lifecycle(), Lifecycle()
    server = server_of(handlers=[before, broken(event, error), after])
    with pytest.raises(fl.HandlerError, match="disk full") as caught:
        server.run(two_clients())
    assert caught.value.exceptions == (error,)
    assert caught.value.failures[0].event == event
    assert (before.started, before.shut_down) == (1, 1)
    assert (after.started, after.shut_down) == ((0, 0) if event == Event.STARTUP else (1, 1))


def test_a_failing_shutdown_is_raised_after_all_is_shut_down() -> None:
    error, before, after, of_client = OSError("stuck"), Lifecycle(), Lifecycle(), Lifecycle()
    server = server_of(handlers=[before, broken(Event.SHUTDOWN, error), after])
    with pytest.raises(fl.HandlerError) as caught:
        server.run(clients_of({"a": AddingLearner()}, handlers=[of_client]))
    assert caught.value.exceptions == (error,)
    assert [(h.started, h.shut_down) for h in (before, after, of_client)] == [(1, 1)] * 3


@pytest.mark.parametrize("event", [Event.CLIENT_QUIT, Event.SHUTDOWN])
def test_an_error_of_a_job_that_was_over_holds_its_result(event: str) -> None:
    error = OSError("disk full")
    with pytest.raises(fl.HandlerError) as caught:
        server_of(handlers=[fl.ModelSelectionHandler(), broken(event, error)]).run(two_clients())
    result = caught.value.result
    assert isinstance(result, fl.JobResult)
    expected = server_of(handlers=[fl.ModelSelectionHandler()]).run(two_clients())
    assert values(result.weights) == values(expected.weights) == (5.0, 5.0, 4.0)
    assert [report.accepted for report in result.reports] == [("a", "b"), ("a", "b")]
    assert result.cross_site == expected.cross_site
    assert result.best is not None
    assert result.best.round == 0
    assert [(failure.event, failure.exception) for failure in result.handler_failures] == [(event, error)]


def test_the_result_in_an_error_has_the_failures_of_the_shutdown_too() -> None:
    first, second = OSError("disk full"), ValueError("stuck")
    with pytest.raises(fl.HandlerError) as caught:
        server_of(handlers=[broken(Event.SHUTDOWN, second), broken(Event.CLIENT_QUIT, first)]).run(two_clients())
    assert caught.value.exceptions == (first,)
    assert [failure.exception for failure in caught.value.result.handler_failures] == [first, second]


@pytest.mark.parametrize("event", [Event.STARTUP, Event.END_ROUND, Event.RECEIVE_VALIDATION_RESULTS])
def test_an_error_that_ends_a_job_before_its_end_holds_what_there_is_so_far(event: str) -> None:
    with pytest.raises(fl.HandlerError) as caught:
        server_of(handlers=[fl.ModelSelectionHandler(), broken(event, OSError("disk full"))]).run(two_clients())
    rounds = {str(Event.STARTUP): 0, str(Event.END_ROUND): 1, str(Event.RECEIVE_VALIDATION_RESULTS): 2}[event]
    result = caught.value.result
    assert values(result.weights) == (2.5 * rounds, 2.5 * rounds, 2.0 * rounds)
    assert [report.round for report in result.reports] == list(range(rounds))
    assert (result.best is None) == (rounds == 0)


def test_an_error_when_a_client_leaves_early_holds_what_there_is_so_far() -> None:
    clients = clients_of({"a": AddingLearner(1), "b": AddingLearner(during=failing(0))})
    server = server_of(handlers=[broken(Event.CLIENT_QUIT, OSError("disk full"))], min_contributions=1)
    with pytest.raises(fl.HandlerError) as caught:
        server.run(clients)
    assert [quit.contributor for quit in caught.value.result.quits] == ["b"]
    assert [report.round for report in caught.value.result.reports] == [0]


def count_of(event: str) -> int:
    """How often a job of two clients and two rounds fires it."""
    recorder = Recorder()
    server_of(handlers=[recorder]).run(two_clients())
    return recorder.events.count(event)


@pytest.mark.parametrize("event", [event for event in SERVER_EVENTS if event != Event.STARTUP])
def test_a_server_told_to_log_goes_on_and_records_every_failure(event: str, caplog: pytest.LogCaptureFixture) -> None:
    error = OSError("disk full")
    result = server_of(handlers=[broken(event, error)], on_handler_error="log").run(two_clients())
    assert values(result.weights) == (5.0, 5.0, 4.0)
    assert [failure.event for failure in result.handler_failures] == [event] * count_of(event)
    assert all(failure.exception is error for failure in result.handler_failures)
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == count_of(event)


@pytest.mark.parametrize("event", ROUND_EVENTS)
def test_a_failure_in_a_round_is_in_its_report(event: str) -> None:
    def in_second_round(ctx: fl.FLContext) -> None:
        if ctx[Key.ROUND] == 1:
            raise OSError("disk full")

    result = server_of(3, handlers=[At(event, in_second_round)], on_handler_error="log").run(
        clients_of({"a": AddingLearner()})
    )
    assert [[(f.event, f.handler) for f in report.handler_failures] for report in result.reports] == [
        [],
        [(event, "federation.At")],
        [],
    ]
    assert result.handler_failures == result.reports[1].handler_failures
    assert isinstance(result.handler_failures[0], HandlerFailure)


def test_a_server_that_logs_still_does_not_start_with_a_handler_that_cannot() -> None:
    client = Lifecycle()
    with pytest.raises(fl.HandlerError, match="disk full"):
        server_of(handlers=[broken(Event.STARTUP, OSError("disk full"))], on_handler_error="log").run(
            clients_of({"a": AddingLearner()}, handlers=[client])
        )
    assert client.started == 0


def test_a_failure_that_ends_the_job_is_in_the_report_that_the_context_still_has() -> None:
    error = OSError("disk full")
    server = server_of(handlers=[broken(Event.BEFORE_AGGREGATION, error)])
    with pytest.raises(fl.HandlerError):
        server.run(two_clients())
    report = server.ctx[Key.REPORT]
    assert [(f.event, f.exception) for f in report.handler_failures] == [(Event.BEFORE_AGGREGATION, error)]
    assert report.accepted == ("a", "b")


def test_failures_during_an_abnormal_end_are_notes_on_the_error_that_ended_the_job() -> None:
    first, second = OSError("disk full"), ValueError("stuck")
    server = server_of(handlers=[broken(Event.SHUTDOWN, second), broken(Event.END_ROUND, first)])
    with pytest.raises(fl.HandlerError) as caught:
        server.run(two_clients())
    assert caught.value.exceptions == (first,)
    assert caught.value.__notes__ == ["during shutdown: federation.At at _shutdown of round 1: ValueError: stuck"]


def test_a_clients_handler_that_fails_in_shutdown_is_recorded() -> None:
    error = OSError("stuck")
    clients = clients_of({"a": AddingLearner()}, handlers=[broken(Event.SHUTDOWN, error)])
    result = server_of(on_handler_error="log").run(clients)
    assert [failure.exception for failure in result.handler_failures] == [error]


# Every started handler is shut down once


def test_after_a_job_every_handler_has_been_shut_down_once() -> None:
    watched, server, clients = watched_job()
    server.run(clients)
    assert watched.unbalanced() == {}
    assert [watched.started(name) for name in ("server", "a", "b", "c")] == [[1, 1]] * 4


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("event", SERVER_EVENTS)
def test_every_started_handler_is_shut_down_once_when_one_of_the_server_raises(
    event: str, error: type[BaseException]
) -> None:
    watched, server, clients = watched_job(on_server=[At(event, raising(error()))])
    with pytest.raises(fl.HandlerError if error is OSError else error):
        server.run(clients)
    assert watched.unbalanced() == {}
    assert watched.started("server") == ([1, 0] if event == Event.STARTUP else [1, 1])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("event", CLIENT_EVENTS)
def test_every_started_handler_is_shut_down_once_when_one_of_a_client_raises(
    event: str, error: type[BaseException]
) -> None:
    watched, server, clients = watched_job(on_client=[At(event, raising(error()))], min_contributions=1)
    at_the_end = event == Event.SHUTDOWN
    if error is KeyboardInterrupt:
        with pytest.raises(error):
            server.run(clients)
    else:  # sys.exit in a client ends that client
        result = server.run(clients)
        assert [f.contributor for f in result.quits] == ([] if at_the_end else ["b"])
        assert len(result.handler_failures) == (1 if at_the_end or error is OSError else 0)
    assert watched.unbalanced() == {}
    assert watched.started("server") == [1, 1]


@pytest.mark.parametrize(
    "error", [SystemExit, GeneratorExit, asyncio.CancelledError, type("Own", (BaseException,), {})]
)
def test_whatever_a_clients_handler_leaves_by_in_shutdown_is_recorded_and_the_result_is_there(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    leaves = At(Event.SHUTDOWN, raising(error("bye")))
    clients = [*two_clients(), fl.FederatedClient("c", AddingLearner(2.5), handlers=[leaves])]
    result = server_of(on_handler_error="log").run(clients)
    assert values(result.weights) == (5.0, 5.0, 4.0)
    assert [(f.handler, f.event) for f in result.handler_failures] == [("federation.At", Event.SHUTDOWN)]
    assert error.__name__ in str(result.handler_failures[0])
    assert f"federation.At leaves at _shutdown by {error.__name__}: bye" in caplog.messages


def test_a_client_whose_own_stop_leaves_does_not_keep_the_others_from_being_stopped() -> None:
    class Leaving(fl.FederatedClient):
        def stop(self) -> tuple[HandlerFailure, ...]:
            super().stop()
            raise SystemExit("bye")

    watched, server, clients = watched_job(client_class=Leaving, on_handler_error="log")
    failures = server.run(clients).handler_failures
    assert [str(failure).split(": ", 1)[1] for failure in failures] == ["FedLearnError: SystemExit: bye"]
    assert watched.unbalanced() == {}


@pytest.mark.parametrize("event", [event for event in SERVER_EVENTS if event != Event.STARTUP])
def test_what_a_job_has_is_in_the_exit_by_which_a_handler_of_the_server_ends_it(
    event: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SystemExit) as left:
        server_of(handlers=[At(event, raising(SystemExit("bye")))]).run(two_clients())
    result: fl.JobResult = left.value.result  # type: ignore[attr-defined]
    rounds = len([report for report in result.reports if report.seconds])
    assert values(result.weights)[:2] in {(2.5 * rounds,) * 2, (2.5 * (rounds + 1),) * 2}
    assert f"federation.At leaves at {event} by SystemExit: bye" in caplog.messages
    assert any("the job ends by SystemExit: bye" in message for message in caplog.messages)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["train", "validate"])
def test_every_started_handler_is_shut_down_once_when_a_learner_raises(where: str, error: type[BaseException]) -> None:
    class Failing(AddingLearner):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
            if where == "train":
                raise error
            return super().train(weights, ctx)

        def validate(self, weights: WeightDict, ctx: fl.FLContext) -> dict[str, float]:
            if where == "validate":
                raise error
            return {"accuracy": 0.5}

    watched, server, clients = watched_job(learner=Failing(), min_contributions=1)
    if error is KeyboardInterrupt:
        with pytest.raises(error):
            server.run(clients)
    else:  # sys.exit in a learner ends its client
        assert [f.contributor for f in server.run(clients).quits] == ["b"]
    assert watched.unbalanced() == {}


def test_every_started_handler_is_shut_down_once_when_an_evaluator_is_interrupted() -> None:
    class Interrupted(NormEvaluator):
        def evaluate(self, ctx: fl.FLContext) -> None:
            raise KeyboardInterrupt

    watched, server, clients = watched_job(on_server=[fl.ServerValidationHandler(Interrupted(), 1)])
    with pytest.raises(KeyboardInterrupt):
        server.run(clients)
    assert watched.unbalanced() == {}


def test_every_started_handler_is_shut_down_once_after_a_bad_contribution() -> None:
    class Bad(fl.FederatedClient):
        def train_round(self, number: int, request_model: Callable[[], WeightDict]) -> fl.Contribution | None:
            super().train_round(number, request_model)
            return "bad"  # type: ignore[return-value]

    watched, server, clients = watched_job(client_class=Bad)
    with pytest.raises(fl.ContributionError):
        server.run(clients)
    assert watched.unbalanced() == {}


def test_every_started_handler_is_shut_down_once_when_too_few_clients_are_left() -> None:
    watched, server, clients = watched_job(learner=AddingLearner(during=failing(0)))
    with pytest.raises(fl.TooFewContributionsError):
        server.run(clients)
    assert watched.unbalanced() == {}


def test_an_interrupt_in_one_clients_shutdown_does_not_keep_the_others_from_theirs() -> None:
    # The job ends by an error, so that all clients are shut down in one go.
    watched, server, clients = watched_job(
        on_server=[broken(Event.END_ROUND, OSError("disk full"))],
        on_client=[At(Event.SHUTDOWN, raising(KeyboardInterrupt()))],
    )
    with pytest.raises(KeyboardInterrupt):
        server.run(clients)
    assert watched.unbalanced() == {}


def test_every_started_handler_is_shut_down_once_when_the_user_interrupts_while_clients_work() -> None:
    # As Ctrl-C does: the interrupt reaches the main thread, which waits for the clients. A process that was started in
    # the background ignores it.
    watched, server, clients = watched_job(learner=AddingLearner(during=lambda ctx: _thread.interrupt_main()))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            server.run(clients)
    finally:
        signal.signal(signal.SIGINT, before)
    assert watched.unbalanced() == {}
    assert [watched.started(name) for name in ("server", "a", "b", "c")] == [[1, 1]] * 4


@pytest.mark.parametrize("error", [None, OSError, KeyboardInterrupt])
def test_no_thread_of_a_job_outlives_it(error: type[BaseException] | None) -> None:
    seen: list[str] = []

    def look(ctx: fl.FLContext) -> None:
        seen.append(threading.current_thread().name)
        if error is not None:
            raise error

    server, clients = server_of(1), clients_of({"a": AddingLearner(during=look), "b": AddingLearner()})
    if error is None:
        server.run(clients)
    else:
        with pytest.raises(fl.TooFewContributionsError if error is OSError else error):
            server.run(clients)
    assert seen[0].startswith("fed_learn-client")
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("fed_learn-client")] == []


def test_an_interrupted_job_can_be_run_again() -> None:
    interrupts = iter([KeyboardInterrupt()])

    def interrupt_once(ctx: fl.FLContext) -> None:
        for error in interrupts:
            raise error

    watched, server, clients = watched_job(on_server=[At(Event.END_AGGREGATION, interrupt_once)])
    with pytest.raises(KeyboardInterrupt):
        server.run(clients)
    result = server.run(clients)
    assert values(result.weights) == (2.0, 2.0, 2.0)
    assert [watched.started(name) for name in ("server", "a", "b", "c")] == [[2, 2]] * 4
    assert all(h.shut_down == 2 for chain in watched.counters.values() for h in chain)
