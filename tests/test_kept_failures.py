"""What is recorded of failures keeps nothing alive: no frame, hence no weights of a round, and no large value."""

import gc
import logging
import tracemalloc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from federation import AddingLearner, At, Recorder, WeightDict, clients_of, raising, server_of, two_clients

import fed_learn as fl
from fed_learn.errors import HandlerFailure, without_tracebacks

Event = fl.EventType
Key = fl.ContextKey
SIZE = 50_000


@pytest.fixture(autouse=True)
def _nothing_else_keeps_log_records() -> Iterator[None]:
    # pytest's own handler keeps them, and with them the tracebacks; so may a handler of the user's.
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def deep_in_code(ctx: fl.FLContext) -> None:
    """Fails with the weights of the round among its local variables, on top of another failure."""
    held = [c.weights for c in ctx.get_prop(Key.CONTRIBUTIONS, ())], ctx.model
    try:
        raise KeyError(len(held))
    except KeyError as error:
        raise ValueError("disk full") from error


class Failing(fl.Handler):
    """Fails at one event and in its rollback too."""

    def __init__(self, event: str) -> None:
        self.event = event

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        if event == self.event:
            deep_in_code(ctx)

    def rollback(self, ctx: fl.FLContext) -> None:
        deep_in_code(ctx)


def run_round(job: Any, number: int) -> list[weakref.ref[Any]]:
    """One round of two clients; gives references to the weights that it had."""
    job.start_round(number)
    for name in ("a", "b"):
        job.send_model(name)
        job.receive(name, fl.Contribution(name, {"w": np.full(SIZE, float(number))}, 1, round=number))
    arrays = [c.weights["w"] for c in job.ctx[Key.CONTRIBUTIONS]] + [job.weights["w"]]
    references = [weakref.ref(array) for array in arrays]
    del arrays
    job.aggregate()
    job.end_round()
    return references


@pytest.mark.parametrize(
    "event",
    [Event.START_ROUND, Event.RECEIVE_CONTRIBUTION, Event.BEFORE_AGGREGATION, Event.END_AGGREGATION, Event.END_ROUND],
)
def test_the_weights_of_a_round_in_which_a_handler_failed_are_gone_with_it(event: str) -> None:
    server = fl.FederatedServer({"w": np.zeros(SIZE)}, num_rounds=2, handlers=[Failing(event)], on_handler_error="log")
    with server.begin(num_clients=2) as job:
        references = run_round(job, 0)
        run_round(job, 1)
        assert [reference() is None for reference in references[:2]] == [True, True]
        failures = job.handler_failures
        assert len(failures) == (4 if event == Event.RECEIVE_CONTRIBUTION else 2)
        for failure in failures:
            for error in (failure.exception, failure.rollback_exception):
                assert str(error) == "disk full"
                assert error is not None
                assert error.__traceback__ is None
                assert isinstance(error.__cause__, KeyError)
                assert error.__cause__.__traceback__ is None


def test_a_job_whose_handlers_fail_all_the_time_takes_no_more_memory_from_round_to_round() -> None:
    server = fl.FederatedServer(
        {"w": np.zeros(SIZE)}, num_rounds=12, handlers=[Failing(Event.END_ROUND)], on_handler_error="log"
    )
    held = []
    tracemalloc.start()
    try:
        with server.begin(num_clients=2) as job:
            for number in range(12):
                run_round(job, number)
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[-1] - held[2] < SIZE * 8  # less than one model in nine rounds


def test_the_handlers_error_that_ends_a_job_still_says_where_it_happened() -> None:
    with pytest.raises(fl.HandlerError) as caught:
        server_of(handlers=[Failing(Event.END_ROUND)]).run(two_clients())
    traceback = caught.value.exceptions[0].__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    assert traceback is not None
    assert traceback.tb_frame.f_code.co_name == "deep_in_code"


def test_the_log_has_the_traceback_of_a_failure_that_is_recorded_without(caplog: pytest.LogCaptureFixture) -> None:
    logging.disable(logging.NOTSET)
    server_of(1, handlers=[Failing(Event.END_ROUND)], on_handler_error="log").run(two_clients())
    assert "in deep_in_code" in caplog.text


def test_what_is_recorded_of_clients_that_failed_holds_no_traceback() -> None:
    class Leaving(AddingLearner):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
            raise SystemExit("no GPU")

    clients = clients_of({"a": AddingLearner(1), "b": Leaving()}) + clients_of(
        {"c": AddingLearner(1)}, handlers=[At(Event.RECEIVE_MODEL, deep_in_code)]
    )
    clients += clients_of({"d": AddingLearner(1)}, handlers=[At(Event.SHUTDOWN, raising(ValueError("stuck")))])
    recorder = Recorder()
    result = server_of(min_contributions=1, handlers=[recorder], on_handler_error="log").run(clients)
    assert [quit.contributor for quit in result.quits] == ["b", "c"]
    errors: list[BaseException | None] = [quit.error for quit in result.quits]
    errors += [failure.exception for failure in result.handler_failures]
    assert len(errors) == 4
    while errors:
        error = errors.pop()
        if error is not None:
            assert error.__traceback__ is None
            errors += [error.__cause__, error.__context__]
            errors += error.exceptions if isinstance(error, BaseExceptionGroup) else ()


def test_an_error_that_is_kept_has_descriptions_in_the_place_of_arrays() -> None:
    array = np.zeros(SIZE)
    reference = weakref.ref(array)
    error = fl.AggregationWeightError("a: bad", contributor="a", value=array)
    error.__cause__ = ValueError("shape", 3, {"w": [array]}, fl.ModelData({"w": array}))
    group = ExceptionGroup("several", [error])
    del array
    assert without_tracebacks(group) is group
    assert reference() is None
    assert error.contributor == "a"
    assert isinstance(error.value, str)
    assert error.__cause__.args[:2] == ("shape", 3)
    assert [type(value) for value in error.__cause__.args[2:]] == [str, str]


def test_an_error_that_is_kept_has_its_small_values_as_they_were() -> None:
    error = fl.NonFiniteError("a: 'w' is NaN", contributor="a", name="w", index=(0, 1), value=np.float32("nan"))
    before = dict(vars(error))
    without_tracebacks(error)
    assert vars(error) == before
    assert error.args == ("a: 'w' is NaN",)


def test_an_error_whose_values_cannot_be_looked_at_is_kept_without_them() -> None:
    class Odd:
        @property
        def nbytes(self) -> int:
            raise SystemExit

    error = ValueError(Odd())
    HandlerFailure("e", "h", error).without_tracebacks()
    assert [type(value) for value in error.args] == [str]
