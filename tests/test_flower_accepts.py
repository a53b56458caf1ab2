"""What Flower's FedAvg would have used is used here too: whole runs of both, on the same apps, and their models."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

import fed_learn as fl

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedMedian
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fed_learn.integrations.flower import FedAvg, LegacyFedAvg, LocalGrid, WithHandlers, to_record, to_weights
from fed_learn.weights import Array

Weights = Mapping[str, Array]
App = Callable[[Message, Context], Message]
BOTH = (FlowerFedAvg, FedAvg)
INF = np.inf


def app(
    make: Callable[[Weights, int], Mapping[str, Any]],
    examples: Callable[[int], float] = lambda k: 10 + k,
    received: list[tuple[str, ...]] | None = None,
) -> App:
    """An app whose node k sends what it makes of what it received."""

    def run(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"])
        sent: Any = message.content["arrays"]
        weights = {name: array.numpy() for name, array in sent.items()}
        if received is not None:
            received.append(tuple(weights))
        made = {name: np.asarray(value) for name, value in make(weights, k).items()}
        metrics = MetricRecord({"num-examples": examples(k), "partition-id": k})
        return Message(RecordDict({"arrays": to_record(made), "metrics": metrics}), reply_to=message)

    return run


def run(strategy: Any, client: App, initial: Any, rounds: int = 3, nodes: int = 3, **more: Any) -> dict[str, Array]:
    record = initial if isinstance(initial, ArrayRecord) else to_record(initial)
    result = strategy.start(LocalGrid(client, nodes), record, num_rounds=rounds, **more)
    return {name: array.numpy() for name, array in result.arrays.items()}


def assert_close(found: Weights, expected: Weights) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].astype(float), array.astype(float), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
@pytest.mark.parametrize("stream", [False, True])
def test_replies_in_another_width_of_floats_train_and_the_models_dtype_stays(
    dtype: Any, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    client = app(lambda w, k: {"w": (w["w"] + 0.5 + k).astype(dtype)})
    initial = {"w": np.zeros(4, np.float32)}
    theirs = run(FlowerFedAvg(fraction_evaluate=0.0), client, initial)
    ours = run(FedAvg(fraction_evaluate=0.0, stream=stream), client, initial)
    assert ours["w"].dtype == np.float32
    np.testing.assert_allclose(ours["w"], theirs["w"], rtol=5e-3 if dtype == np.float16 else 1e-6)
    told = [record.getMessage() for record in caplog.records if "is rounded to float32" in record.getMessage()]
    assert sorted(text.split(":")[0] for text in told) == ["partition-0", "partition-1", "partition-2"]


def test_flowers_differential_privacy_around_ours_is_as_around_flowers_own() -> None:
    """It answers in float64, batch counters too."""
    initial = {"w": np.zeros((4, 3), np.float32), "count": np.array(0)}
    client = app(lambda w, k: {"w": w["w"] + np.float32(1 + k), "count": w["count"] + 4}, lambda k: 10)
    models = []
    for base in BOTH:
        np.random.seed(7)  # noqa: NPY002 - where Flower draws its noise
        private = DifferentialPrivacyServerSideFixedClipping(base(fraction_evaluate=0.0), 0.01, 2.0, 3)
        models.append(run(private, client, initial))
    theirs, ours = models
    np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-4, atol=1e-5)
    assert np.abs(ours["w"]).max() > 0.1
    assert abs(float(ours["count"]) - float(theirs["count"])) < 1


PART = {"fc.weight": np.zeros(2, np.float32), "bn.weight": np.full(1, 7, np.float32), "fc.bias": np.zeros(1)}


def without_bn(weights: Weights, k: int) -> Weights:
    return {name: array + (1 + k) for name, array in weights.items() if "bn" not in name}


@pytest.mark.parametrize("stream", [False, True])
def test_a_part_of_the_model_trains_and_clients_receive_what_they_receive_from_flower(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    models, seen = [], []
    for base, more in ((FlowerFedAvg, {}), (FedAvg, {"stream": stream})):
        received: list[tuple[str, ...]] = []
        models.append(run(base(fraction_evaluate=0.0, **more), app(without_bn, received=received), PART))  # type: ignore[arg-type]
        seen.append(received)
    theirs, ours = models
    assert seen[0] == seen[1] == [tuple(PART)] * 3 + [("fc.weight", "fc.bias")] * 6
    assert list(ours) == list(PART)  # the rest of the global model is kept, where Flower's result lacks it
    assert ours["bn.weight"].tolist() == [7.0]
    assert_close({name: ours[name] for name in theirs}, theirs)
    (told,) = [r.getMessage() for r in caplog.records if "clients send 2 of" in r.getMessage()]
    assert told.endswith("the rest is kept as it is: 'bn.weight'")


def test_the_server_evaluates_the_whole_model_and_a_subclass_gets_the_part() -> None:
    evaluated, aggregated = [], []

    class Doubling(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert arrays is not None
            aggregated.append(tuple(arrays))
            return to_record({name: array * 2 for name, array in to_weights(arrays).items()}), metrics

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        evaluated.append(tuple(arrays))
        return MetricRecord({"bn": float(arrays["bn.weight"].numpy()[0])})

    client = app(lambda w, k: {name: array + 1 for name, array in w.items() if "bn" not in name})
    ours = run(Doubling(fraction_evaluate=0.0), client, PART, rounds=2, evaluate_fn=evaluate)
    assert evaluated == [tuple(PART)] * 3
    assert aggregated == [("fc.weight", "fc.bias")] * 2
    assert {name: array.tolist() for name, array in ours.items()} == {
        "fc.weight": [6.0, 6.0],
        "bn.weight": [7.0],
        "fc.bias": [6.0],
    }


def test_another_strategy_with_handlers_keeps_the_rest_of_a_model_of_which_clients_send_a_part() -> None:
    theirs = run(FedMedian(fraction_evaluate=0.0), app(without_bn), PART)
    ours = run(WithHandlers(FedMedian(fraction_evaluate=0.0)), app(without_bn), PART)
    assert ours["bn.weight"].tolist() == [7.0]
    assert_close({name: ours[name] for name in theirs}, theirs)


def test_a_client_that_leaves_a_variable_out_is_refused_and_parts_can_be_averaged() -> None:
    def make(weights: Weights, k: int) -> Weights:
        full = {name: array + (1 + k) for name, array in weights.items()}
        return {name: array for name, array in full.items() if k < 2 or name != "fc.bias"}

    strategy = FedAvg(fraction_evaluate=0.0)
    ours = run(strategy, app(make, lambda k: 1), PART, rounds=1)
    assert ours["fc.weight"].tolist() == [1.5, 1.5]
    assert strategy.job is not None
    (refused,) = strategy.job.reports[0].rejected
    assert (refused.contributor, refused.cause) == ("partition-2", "NamesError")
    ours = run(FedAvg(fraction_evaluate=0.0, partial="average"), app(make, lambda k: 1), PART, rounds=1)
    assert (ours["fc.weight"].tolist(), ours["fc.bias"].tolist()) == ([2.0, 2.0], [1.5])


@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_initial_record_is_what_clients_make_of_it(stream: bool) -> None:
    client = app(lambda w, k: {"a": w.get("a", np.zeros(2)) + 1 + k, "b": np.ones(1)})
    theirs = run(FlowerFedAvg(fraction_evaluate=0.0), client, ArrayRecord())
    ours = run(FedAvg(fraction_evaluate=0.0, stream=stream), client, ArrayRecord())
    assert_close(ours, theirs)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("base", [FedAvg, lambda **more: WithHandlers(FlowerFedAvg(**more))], ids=["FedAvg", "around"])
def test_a_mask_of_minus_infinity_stays(base: Any, stream: bool) -> None:
    class Net(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
            self.register_buffer("low", torch.tensor(float("inf")))

    initial = ArrayRecord(Net().state_dict())
    client = app(lambda w, k: {**w, "weight": w["weight"] + np.float32(1 + k)})
    theirs = run(FlowerFedAvg(fraction_evaluate=0.0), client, initial)
    more = {"stream": stream} if base is FedAvg else {}
    ours = run(base(fraction_evaluate=0.0, **more), client, initial)
    assert ours["mask"].tobytes() == initial["mask"].numpy().tobytes()
    assert ours["low"] == INF
    assert_close(ours, theirs)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_without_examples_adds_nothing(stream: bool) -> None:
    client = app(lambda w, k: {"w": w["w"] + 1 + k}, lambda k: 10 * k)
    theirs = run(FlowerFedAvg(fraction_evaluate=0.0), client, {"w": np.zeros(2)})
    strategy = FedAvg(fraction_evaluate=0.0, stream=stream)
    assert_close(run(strategy, client, {"w": np.zeros(2)}), theirs)
    assert strategy.job is not None
    assert [len(report.accepted) for report in strategy.job.reports] == [3, 3, 3]


def test_a_typo_in_the_name_of_the_weight_ends_the_run_with_that_name(caplog: pytest.LogCaptureFixture) -> None:
    client = app(lambda w, k: {"w": w["w"] + 1})
    strategy = FedAvg(fraction_evaluate=0.0, weighted_by_key="num_examples")
    with caplog.at_level(logging.ERROR), pytest.raises(fl.NothingAggregatedError) as caught:
        run(strategy, client, {"w": np.zeros(2)})
    error = caught.value
    assert (error.cause, error.count, error.rounds) == ("AggregationWeightError", 9, 3)
    assert "the reply has no number 'num_examples' to be weighted by" in str(error)
    assert to_weights(error.handled.arrays)["w"].tolist() == [0.0, 0.0]


def test_a_run_that_only_evaluates_ends_well() -> None:
    def client(message: Message, context: Context) -> Message:
        return Message(RecordDict({"m": MetricRecord({"num-examples": 1, "accuracy": 0.5})}), reply_to=message)

    strategy = FedAvg(fraction_train=0.0)
    result = strategy.start(LocalGrid(client, 2), to_record({"w": np.ones(1)}), num_rounds=2)
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == 0.5
    assert to_weights(result.arrays)["w"].tolist() == [1.0]


def results(*weights: list[Array], examples: int = 10) -> Any:
    """Of clients of the older interface."""

    class Client(ClientProxy):
        get_properties = get_parameters = fit = evaluate = reconnect = None  # type: ignore[assignment]

    return [
        (Client(str(k)), FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), examples, {}))
        for k, arrays in enumerate(weights)
    ]


def test_the_older_interface_takes_the_beginning_of_the_list_and_sends_that() -> None:
    initial = [np.zeros(2, np.float32), np.zeros(3, np.float32), np.full(1, 7, np.float32)]
    answers = results(*([np.full(2, v), np.full(3, v)] for v in (1.0, 3.0)))
    manager = SimpleClientManager()
    for client, _ in answers:
        manager.register(client)
    strategy = LegacyFedAvg()
    assert len(strategy.configure_fit(1, ndarrays_to_parameters(initial), manager)) == 2
    made, _ = strategy.aggregate_fit(1, answers, [])
    assert made is not None
    assert [array.tolist() for array in parameters_to_ndarrays(made)] == [[2.0, 2.0], [2.0, 2.0, 2.0]]
    sent = [len(instruction.parameters.tensors) for _, instruction in strategy.configure_fit(2, made, manager)]
    assert sent == [2, 2]
    assert strategy.job is not None
    assert [array.tolist() for array in strategy.job.weights.values()] == [[2.0, 2.0], [2.0, 2.0, 2.0], [7.0]]


def test_messages_without_metrics_of_ours_pass_whatever_they_are_called() -> None:
    def client(message: Message, context: Context) -> Message:
        reply = app(lambda w, k: {"w": w["w"] + 1})(message, context)
        reply.content["config"] = ConfigRecord({"contributor": "x", "round": 99})
        return reply

    assert run(FedAvg(fraction_evaluate=0.0), client, {"w": np.zeros(1)})["w"].tolist() == [3.0]
