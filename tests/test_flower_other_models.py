"""Strategies that return fewer, more or other variables than the global model has, beside Flower's own."""

# mypy: disable-error-code="misc"
# Classes are derived from Flower's strategy and from ours in turn.

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flower_parts import record
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fed_learn.integrations.flower import FedAvg, LocalGrid, WithHandlers

Received = list[list[str]]


def clients(received: Received, only: Iterable[str] = ()) -> Any:
    """Nodes that add one to what they receive, or to these variables of it alone."""

    def app(message: Message, context: Context) -> Message:
        arrays: Any = message.content["arrays"]
        received.append(list(arrays))
        made = record(**{name: arrays[name].numpy() + 1 for name in only or arrays})
        return Message(RecordDict({"arrays": made, "metrics": MetricRecord({"num-examples": 10})}), reply_to=message)

    return app


def returning(base: Any, change: Any) -> Any:
    class Mine(base):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            return change(arrays, server_round), metrics

    return Mine(fraction_evaluate=0.0)


def around(base: Any, change: Any) -> Any:
    return WithHandlers(returning(base, change))


OURS = pytest.mark.parametrize(
    "make", [lambda change: returning(FedAvg, change), lambda change: around(FlowerFedAvg, change)], ids=["sub", "in"]
)
ALL = pytest.mark.parametrize(
    "make",
    [
        lambda change: returning(FlowerFedAvg, change),
        lambda change: returning(FedAvg, change),
        lambda change: around(FlowerFedAvg, change),
    ],
    ids=["flower", "sub", "in"],
)


def run(strategy: Any, app: Any, rounds: int = 3) -> dict[str, Any]:
    result = strategy.start(LocalGrid(app, 2), record(w=np.zeros(2), b=np.full(1, 7.0)), num_rounds=rounds)
    return {name: array.numpy().tolist() for name, array in result.arrays.items()}


def lines(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage().strip() for record in caplog.records if part in record.getMessage()]


@OURS
def test_of_fewer_variables_the_rest_is_kept(make: Any) -> None:
    received: Received = []
    strategy = make(lambda arrays, _: ArrayRecord({"w": arrays["w"]}))
    b = 7.0 if isinstance(strategy, WithHandlers) else 8.0  # there `super()` has averaged it in the first round
    assert run(strategy, clients(received)) == {"w": [3.0, 3.0], "b": [b]}
    assert received == [["w", "b"]] * 2 + [["w"]] * 4  # as with Flower: clients keep their own b


def test_what_a_strategy_inside_leaves_away_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    run(around(FlowerFedAvg, lambda arrays, _: ArrayRecord({"w": arrays["w"]})), clients([]))
    expected = (
        "Mine returns 1 of the global model's 2 variables: clients are sent these, and the rest is kept as it is: 'b'"
    )
    assert lines(caplog, "returns 1 of") == [expected]


def with_extra(arrays: Any, server_round: int) -> Any:
    return ArrayRecord({**arrays, "srv": Array(np.full(1, float(server_round)))})


@ALL
@pytest.mark.parametrize("only", [(), ("w", "b")], ids=["all", "part"])
def test_more_variables_are_in_the_model_from_then_on(
    make: Any, only: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    received: Received = []
    strategy = make(with_extra)
    assert run(strategy, clients(received, only)) == {"w": [3.0, 3.0], "b": [10.0], "srv": [3.0]}
    assert received == [["w", "b"]] * 2 + [["w", "b", "srv"]] * 4
    if hasattr(strategy, "handlers"):
        expected = "> the global model is another one from now on: Mine adds 'srv'"
        assert lines(caplog, "another one") == [expected]


def renamed(arrays: Any, _: int) -> Any:
    return ArrayRecord({name.removesuffix("_") + "_": array for name, array in arrays.items()})


def reshaped(arrays: Any, _: int) -> Any:
    return ArrayRecord({**arrays, "b": Array(np.full(2, 5.0))})


@ALL
def test_other_variables_take_the_place_of_the_model(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    strategy = make(renamed)
    assert run(strategy, clients([])) == {"w_": [3.0, 3.0], "b_": [10.0]}
    if hasattr(strategy, "handlers"):
        (line,) = lines(caplog, "another one")
        assert line == "> the global model is another one from now on: Mine adds 'w_', 'b_' and drops 'w', 'b'"


@ALL
def test_a_variable_may_get_another_shape(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    strategy = make(reshaped)
    assert run(strategy, clients([])) == {"w": [3.0, 3.0], "b": [5.0, 5.0]}
    if hasattr(strategy, "handlers"):
        (line,) = lines(caplog, "another one")
        assert line == "> the global model is another one from now on: Mine changes the shape or dtype of 'b'"


def test_an_empty_record_is_nothing_aggregated() -> None:
    strategy = around(FlowerFedAvg, lambda arrays, number: ArrayRecord() if number == 2 else arrays)
    assert run(strategy, clients([])) == {"w": [2.0, 2.0], "b": [9.0]}
    assert str(strategy.job.reports[1].error) == "Mine aggregated nothing"
