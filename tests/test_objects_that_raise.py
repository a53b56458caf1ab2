"""Objects and exceptions that raise while they are looked at: their sender's failure, by name, and nobody else's."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from federation import AddingLearner, At, Recorder, WeightDict, clients_of, initial_weights, server_of, values

import fed_learn as fl
from fed_learn.errors import as_failure, brief, described, text_of
from fed_learn.handlers import JsonLinesHandler, RoundLogHandler
from fed_learn.values import number_of, split_metrics, whole_number_of
from fed_learn.weights import as_weight_dict, size_text

Event = fl.EventType


class OwnExit(BaseException):
    """No `Exception`, and no interrupt."""


LEAVING = (AttributeError, OwnExit, SystemExit, GeneratorExit, asyncio.CancelledError)


def odd_error(leaving: type[BaseException]) -> Exception:
    """An exception that cannot even be printed."""

    class OddError(Exception):
        def __str__(self) -> str:
            raise leaving("no text")

        __repr__ = __str__

    return OddError()


def odd(leaving: type[BaseException]) -> Any:
    """An object that raises whatever is asked of it."""

    class Odd:
        def fail(self, *_: object) -> Any:
            raise leaving("not to be looked at")

        shape = dtype = nbytes = weights = state_dict = property(fail)
        __repr__ = __str__ = __len__ = __bool__ = __iter__ = __eq__ = __float__ = __index__ = fail
        __hash__ = object.__hash__

    return Odd()


def odd_mapping(leaving: type[BaseException]) -> Any:
    class Odd(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise leaving("not to be looked at")

        def __iter__(self) -> Iterator[str]:
            raise leaving("not to be looked at")

        def __len__(self) -> int:
            raise leaving("not to be looked at")

    return Odd()


def unasked(leaving: type[BaseException]) -> Any:
    """An object that raises where it is asked for its class."""

    class Odd:
        @property  # type: ignore[misc]
        def __class__(self) -> type:
            raise leaving("not to be looked at")

    return Odd()


@pytest.mark.parametrize("leaving", LEAVING)
def test_text_is_made_of_any_exception_and_of_any_object(leaving: type[BaseException]) -> None:
    assert text_of(odd_error(leaving)) == f"its text cannot be read ({leaving.__name__})"
    assert described(odd_error(leaving)) == f"OddError: its text cannot be read ({leaving.__name__})"
    assert brief(odd(leaving)) in ("an Odd", "<Odd instance>") or brief(odd(leaving)).startswith("<Odd instance at")
    assert size_text(odd_mapping(leaving)) == "an Odd in the place of weights"
    assert number_of(odd(leaving)) is None
    assert whole_number_of(odd(leaving)) is None
    assert split_metrics({"a": odd(leaving), "b": 1})[0] == {"b": 1.0}


def test_a_text_of_a_class_of_its_own_is_plain() -> None:
    class Loud(str):
        __slots__ = ()

        def __format__(self, _: str) -> str:
            raise SystemExit

        def isprintable(self) -> bool:
            return True

        def __len__(self) -> int:
            return 0

    class OddError(Exception):
        def __str__(self) -> str:
            return Loud("a\nb")

    assert type(text_of(OddError())) is str
    assert text_of(OddError()) == "a b"


def test_what_code_of_others_raises_is_a_failure_of_theirs_unless_it_is_an_interrupt() -> None:
    error = ValueError("a")
    assert as_failure(error) is error
    assert as_failure(OwnExit("b")).__cause__.args == ("b",)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        as_failure(KeyboardInterrupt())


class Leave:
    """Signal handlers of a server's own script, which ends in order."""

    def method(self, number: int, frame: object) -> None:
        raise SystemExit(number)

    __call__ = method


def leave(error: type[BaseException], number: int, frame: object) -> None:
    raise error(number)


class Struck(Mapping[str, Any]):
    """Weights during whose reading the process is told to end."""

    def __getitem__(self, name: str) -> Any:
        signal.raise_signal(signal.SIGTERM)

    def __iter__(self) -> Iterator[str]:
        return iter("w")

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("handler", "leaving"),
    [
        (lambda number, frame: leave(SystemExit, number, frame), SystemExit),
        (partial(leave, SystemExit), SystemExit),
        (partial(leave, OwnExit), OwnExit),
        (Leave().method, SystemExit),
        (Leave(), SystemExit),
    ],
    ids=["function", "partial", "own exception", "method", "object"],
)
def test_what_a_signal_handler_raises_ends_the_process_and_is_no_failure_of_the_client_at_hand(
    handler: Any, leaving: type[BaseException]
) -> None:
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with server_of(1, on_bad_contribution="reject").begin(2) as job:
            job.start_round(0)
            with pytest.raises(leaving) as caught:
                job.receive("s", fl.Contribution("s", Struck(), 1, round=0))
            assert caught.value.args == (signal.SIGTERM,)
            with pytest.raises(leaving):
                fl.Contribution("s", {}, 1, metrics=Struck())
            assert job.report.rejected == job.report.quits == ()
            job.break_off_round()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_a_signal_handler_raises_while_a_client_stops_comes_out_after_all_its_handlers_had_their_shutdown() -> (
    None
):
    recorder = Recorder()
    strikes = At(Event.SHUTDOWN, lambda ctx: signal.raise_signal(signal.SIGTERM))
    client = fl.FederatedClient("s", AddingLearner(1), handlers=[recorder, strikes])
    client.start(1)
    before = signal.signal(signal.SIGTERM, Leave())
    try:
        with pytest.raises(SystemExit):
            client.stop()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(recorder.at(Event.SHUTDOWN)) == 1


@pytest.mark.parametrize("leaving", LEAVING)
@pytest.mark.parametrize("make", [odd, odd_mapping], ids=["object", "mapping"])
def test_weights_that_raise_are_refused_by_name(make: Callable[..., Any], leaving: type[BaseException]) -> None:
    with pytest.raises(fl.WeightsTypeError, match="site-1: weights"):
        as_weight_dict(make(leaving), "site-1")
    with pytest.raises(fl.WeightsTypeError, match="site-1: 'w' is a"):
        as_weight_dict({"w": odd(leaving)}, "site-1")
    with pytest.raises(fl.WeightsTypeError, match=r"site-1: variable name .* is an Odd"):
        as_weight_dict({odd(leaving): np.zeros(1)}, "site-1")


SENT: dict[str, Callable[[type[BaseException]], Any]] = {
    "an object": odd,
    "a mapping": odd_mapping,
    "an object without a class": unasked,
    "weights": lambda leaving: fl.Contribution("s", odd(leaving), 1, round=0),
    "weights that are a mapping": lambda leaving: fl.Contribution("s", odd_mapping(leaving), 1, round=0),
    "a variable": lambda leaving: fl.Contribution("s", {**initial_weights(), "w": odd(leaving)}, 1, round=0),
    "an aggregation weight": lambda leaving: fl.Contribution("s", initial_weights(), odd(leaving), round=0),
    "iterations": lambda leaving: fl.Contribution("s", initial_weights(), 1, n_iter=odd(leaving), round=0),
    "a round": lambda leaving: fl.Contribution("s", initial_weights(), 1, round=odd(leaving)),
    "a kind": lambda leaving: fl.Contribution("s", initial_weights(), 1, round=0, kind=odd(leaving)),
    "a contributor": lambda leaving: fl.Contribution(odd(leaving), initial_weights(), 1, round=0),
}


@pytest.mark.parametrize("leaving", LEAVING)
@pytest.mark.parametrize("sent", SENT)
def test_what_a_client_sends_that_raises_is_refused_by_its_name_and_the_round_goes_on(
    sent: str, leaving: type[BaseException]
) -> None:
    with server_of(1, on_bad_contribution="reject").begin(1) as job:
        job.start_round(0)
        assert job.receive("s", SENT[sent](leaving)) is None
        good = {name: array + 1 for name, array in initial_weights().items()}
        job.receive("t", fl.Contribution("t", good, 1, round=0))
        assert job.aggregate()
        report = job.end_round()
    assert [failure.contributor for failure in report.rejected] == ["s"]
    assert "s" in report.rejected[0].as_dict()["message"].partition(":")[0]
    assert values(job.weights)[0] == 1.0


@pytest.mark.parametrize("leaving", LEAVING)
def test_metrics_that_raise_cost_the_client_these_metrics(leaving: type[BaseException]) -> None:
    class OddDict(dict[str, Any]):
        def items(self) -> Any:
            raise leaving("not to be looked at")

    sent = fl.Contribution(
        "s", {}, 1, metrics={"a": 1, "b": odd(leaving)}, info={"c": OddDict(x=1), "d": [odd(leaving)]}
    )
    assert sent.metrics == {"a": 1.0}
    assert sorted(sent.info) == ["b", "c", "d"]
    assert all(isinstance(text, str) for text in (sent.info["b"], *sent.info["d"]))
    assert sent.info["c"] == {"x": 1}  # nothing of its class is called


@pytest.mark.parametrize("leaving", LEAVING)
def test_a_handlers_exception_without_text_is_logged_recorded_and_the_others_run(
    leaving: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(ctx: fl.FLContext) -> None:
        raise odd_error(leaving)

    seen: list[int] = []
    handlers = [At(Event.END_ROUND, fail), At(Event.END_ROUND, lambda ctx: seen.append(ctx[fl.ContextKey.ROUND]))]
    result = server_of(handlers=handlers, on_handler_error="log").run(clients_of({"a": AddingLearner(1)}))
    assert seen == [0, 1]
    assert [str(f) for f in result.handler_failures] == [
        f"federation.At at _endRound of round {number}: OddError: its text cannot be read ({leaving.__name__})"
        for number in (1, 2)
    ]
    assert str(result.handler_failures[0]) in caplog.text


class Failing(AddingLearner):
    """Fails where it is told to, in a way of its own."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.where = where
        self.error = error

    def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
        if self.where == "train":
            raise self.error
        return super().train(weights, ctx)

    def validate(self, weights: WeightDict, ctx: fl.FLContext) -> Mapping[str, float]:
        if self.where == "validate":
            raise self.error
        return super().validate(weights, ctx)


@pytest.mark.parametrize("leaving", LEAVING)
@pytest.mark.parametrize("where", ["train", "validate"])
@pytest.mark.parametrize("with_text", [True, False], ids=["text", "no text"])
def test_a_client_that_fails_in_any_way_costs_itself_only_and_every_log_tells_of_it(
    where: str, leaving: type[BaseException], with_text: bool, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    error = leaving("no data") if with_text else odd_error(leaving)
    handlers = [JsonLinesHandler(tmp_path / "log.jsonl"), RoundLogHandler()]
    clients = clients_of({"a": AddingLearner(1), "b": Failing(where, error)})
    with caplog.at_level(logging.INFO):
        result = server_of(handlers=handlers, min_contributions=1).run(clients)
    assert values(result.weights) == (2.0, 2.0, 2.0)
    assert [quit.contributor for quit in result.quits] == ["b"]
    told = f"{leaving.__name__}: no data" if with_text else f"its text cannot be read ({leaving.__name__})"
    assert any(told in message and message.startswith("b leaves the job: ") for message in caplog.messages)
    assert leaving.__name__ in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize("leaving", LEAVING)
def test_a_refusal_without_text_is_logged_and_written(
    leaving: type[BaseException], tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(fl.ContributionError):
        def __str__(self) -> str:
            raise leaving("no text")

    handlers = [JsonLinesHandler(tmp_path / "log.jsonl"), RoundLogHandler()]
    with server_of(1, handlers=handlers, on_bad_contribution="reject").begin(1) as job:
        job.start_round(0)
        job.receive("s", Odd("bad"))
        job.receive("t", fl.Contribution("t", initial_weights(), 1, round=0))
        job.aggregate()
        report = job.end_round()
    assert [failure.contributor for failure in report.rejected] == ["s"]
    told = f"its text cannot be read ({leaving.__name__})"
    assert f"round 1: rejected, Odd: {told}" in caplog.messages
    assert told in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize("leaving", LEAVING)
def test_a_validation_result_or_a_best_model_that_raises_is_left_out(
    leaving: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(fl.FederatedClient):
        def submit_best_model(self) -> Any:
            return odd_mapping(leaving)

        def validate_model(self, model: str, weights: WeightDict) -> Any:
            return odd(leaving)

    clients = [*clients_of({"a": AddingLearner(1)}), Odd("b", AddingLearner(1))]
    result = server_of(handlers=[fl.ModelSelectionHandler()]).run(clients)
    assert values(result.weights) == (2.0, 2.0, 2.0)
    assert {result.contributor for result in result.validation_results} == {"a"}
    assert any("the best model of b is left out" in message for message in caplog.messages)
    assert any("a validation result is left out: b" in message for message in caplog.messages)


@pytest.mark.parametrize("handler", [lambda number, frame: sys.exit(143), lambda *_: sys.exit(143)])
@pytest.mark.parametrize("of_metrics", [False, True])
def test_what_a_signal_handler_raises_ends_the_job_and_is_no_failure_of_the_client_that_is_looked_at(
    handler: Callable[..., Any], of_metrics: bool
) -> None:
    class Interrupted(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise KeyError(name)

        def __iter__(self) -> Iterator[str]:
            if next(once, False):
                os.kill(os.getpid(), signal.SIGTERM)
            return iter(())

        def __len__(self) -> int:
            return 1

    def run() -> None:
        with server_of(handlers=[At(Event.SHUTDOWN, shut_down.append)]).begin() as job:
            job.start_round(0)
            if of_metrics:
                fl.Contribution("a", initial_weights(), 1, metrics=Interrupted())
            job.receive("a", fl.Contribution("a", Interrupted(), 1, round=0))

    once, shut_down = iter([True]), list[fl.FLContext]()
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit) as caught:
            run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 143
    assert len(shut_down) == 1
