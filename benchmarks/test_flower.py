"""What the server pays per round in Flower: our `FedAvg` beside Flower's, in turn, with the same replies.

    pytest benchmarks/test_flower.py

The models have the shapes of a ResNet-50, float32. Results are checked first. What is held to a bound is the ratio of
times, medians of turns in one process, and the memory beyond what was there.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

import fed_learn as fl
from fed_learn.benchmark.inputs import Inputs, make_inputs, resnet50
from fed_learn.benchmark.memory import Peak, release
from fed_learn.integrations.flower import FedAvg, LocalGrid, to_record, to_weights

CLIENTS, TURNS = 10, 7
MIB = 1 << 20


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(resnet50(), np.float32, CLIENTS)


@pytest.fixture(scope="module")
def replies(inputs: Inputs) -> list[Message]:
    def train(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": inputs.aggregation_weights[k], "partition-id": k})
        return Message(RecordDict({"arrays": to_record(inputs.clients[k]), "metrics": metrics}), reply_to=message)

    grid = LocalGrid(train, CLIENTS)
    return list(grid.send_and_receive(FlowerFedAvg().configure_train(1, ArrayRecord(), ConfigRecord(), grid)))


def strategies(inputs: Inputs) -> tuple[FedAvg, FlowerFedAvg]:
    """Ours, which knows the global model, and Flower's."""
    ours = FedAvg(handlers=[fl.Handler()])
    grid = LocalGrid(lambda message, context: None, CLIENTS)
    ours.configure_train(1, to_record(inputs.clients[0]), ConfigRecord(), grid)
    return ours, FlowerFedAvg()


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    kept = run()
    taken = time.perf_counter() - start
    del kept
    return taken


def test_a_round_costs_a_quarter_of_the_time_and_no_more_than_the_new_model(
    inputs: Inputs, replies: list[Message], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, stock = strategies(inputs)
    made, expected = ours.aggregate_train(1, replies)[0], stock.aggregate_train(1, replies)[0]
    assert made is not None
    assert expected is not None
    assert list(made) == list(expected)
    exact = fl.weighted_average(inputs.clients, inputs.aggregation_weights)
    for name, array in to_weights(made).items():
        assert np.array_equal(array, exact[name])
        np.testing.assert_allclose(expected[name].numpy(), array, rtol=1e-5, atol=1e-6)
    del made, expected, exact

    rounds = iter(range(2, 1000))
    times = []
    for _ in range(TURNS):
        replies_of_round(replies, number := next(rounds))
        times.append(
            (seconds(lambda: ours.aggregate_train(number, replies)), seconds(lambda: stock.aggregate_train(1, replies)))
        )
    ratio = statistics.median(theirs / mine for mine, theirs in times)

    beyond = {}
    model = sum(array.nbytes for array in inputs.clients[0].values())
    replies_of_round(replies, number := next(rounds))
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours.aggregate_train(number, replies),
        "Flower's": lambda: stock.aggregate_train(1, replies),
    }
    for name, run in sides.items():
        release()
        peak = Peak()
        kept = run()
        beyond[name] = peak.beyond()
        del kept
    ours.close()
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    with capsys.disabled():
        print(f"\naggregate_train: ours {mine * 1e3:.0f} ms, Flower's {theirs * 1e3:.0f} ms, ratio {ratio:.2f}")
        print("memory in models: " + ", ".join(f"{k} {(v or 0) / model:.2f}" for k, v in beyond.items()))
    assert ratio >= 4
    assert beyond["ours"] is None or beyond["ours"] <= 1.5 * model


def replies_of_round(replies: list[Message], number: int) -> None:
    """Has the replies state another round, for a stale one would be refused."""
    for reply in replies:
        reply.metadata.group_id = str(number)


def test_streaming_takes_the_same_memory_for_ten_clients_and_for_two_hundred(
    inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    initial = to_record(inputs.clients[0])
    model = sum(array.nbytes for array in inputs.clients[0].values())

    def train(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": 1 + k % 7, "partition-id": k})
        return Message(RecordDict({"arrays": to_record(inputs.clients[k % 10]), "metrics": metrics}), reply_to=message)

    beyond: dict[int, int | None] = {}
    for count in (10, 200):
        release()
        peak = Peak()
        strategy = FedAvg(fraction_evaluate=0.0, stream=True)
        result = strategy.start(LocalGrid(train, count), initial, num_rounds=1)
        beyond[count] = peak.beyond()
        assert result.job is not None
        assert len(result.job.reports[0].accepted) == count
        weights = np.array([sum(1 + k % 7 for k in range(count) if k % 10 == i) for i in range(10)], float)
        name = "fc.bias"
        expected = np.average([client[name].astype(float) for client in inputs.clients], axis=0, weights=weights)
        np.testing.assert_allclose(to_weights(result.arrays)[name], expected, rtol=1e-6, atol=1e-7)
        del result, strategy
    with capsys.disabled():
        print(
            "\nstreaming, memory in models: "
            + ", ".join(f"{n} clients {(b or 0) / model:.2f}" for n, b in beyond.items())
        )
    few, many = beyond[10], beyond[200]
    assert few is None or many is None or many <= few + model
