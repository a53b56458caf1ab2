"""The rule for adapters of LoRA: by hand, in a job of our own server, in Flower and in NVFlare."""

import logging
from typing import Any

import numpy as np
import pytest

import fed_learn as fl
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.weights import Array

pytestmark = pytest.mark.quick

A, B, HEAD = "q.lora_A.default.weight", "q.lora_B.default.weight", "head.modules_to_save.default.bias"


def weights_of(seed: int, rank: int = 2) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    shapes = {A: (rank, 6), B: (5, rank), HEAD: (3,)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def product(weights: Any) -> Array:
    a, b = (np.asarray(weights[name], np.float64) for name in (A, B))
    whole: Array = b @ a
    return whole


def best(matrix: Any, rank: int = 2) -> Any:
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


CLIENTS = {f"site-{k}": weights_of(k) for k in (1, 2, 3)}
COUNTS = {"site-1": 10, "site-2": 20, "site-3": 70}
MEAN = sum(COUNTS[who] / 100 * product(weights) for who, weights in CLIENTS.items())


def check(found: Any) -> None:
    assert np.asarray(found[A]).dtype == np.float32
    assert np.linalg.norm(product(found) - best(MEAN)) < 1e-6 * np.linalg.norm(MEAN)
    mean = fl.weighted_average(list(CLIENTS.values()), list(COUNTS.values()))
    assert np.asarray(found[HEAD]).tobytes() == mean[HEAD].tobytes()


def sent(**fields: Any) -> list[fl.Contribution]:
    return [fl.Contribution(who, weights, COUNTS[who], **fields) for who, weights in CLIENTS.items()]


def test_the_rule_averages_products_and_all_else_by_the_mean(caplog: pytest.LogCaptureFixture) -> None:
    assert "lora" in fl.rules.available()
    with caplog.at_level(logging.INFO, "fed_learn"):
        found = fl.aggregate(sent(), rule="lora")
    check(found)
    assert "rule 'lora': the factors of 1 layers leave out at most 0." in caplog.text
    other = fl.aggregate(sent()[::-1], rule="lora")
    assert {name: array.tobytes() for name, array in other.items()} == {n: a.tobytes() for n, a in found.items()}
    memory = weights_of(9)
    assert fl.aggregate(sent(), rule="lora", out=memory) is memory
    check(memory)
    same = fl.lora.average(sent()).weights
    assert same[A].tobytes() == found[A].tobytes()


@pytest.mark.parametrize("kind", list(fl.Kind))
def test_a_job_of_our_server_averages_products_of_full_weights_and_of_differences(kind: fl.Kind) -> None:
    start = weights_of(0)
    server = fl.FederatedServer(start, num_rounds=1, kind=kind, rule="lora")
    with server.begin() as job:
        job.start_round(0)
        for who, weights in CLIENTS.items():
            job.send_model(who)
            if kind is fl.Kind.DIFF:
                weights = {name: array - start[name] for name, array in weights.items()}
            job.receive(who, fl.Contribution(who, weights, COUNTS[who], round=0, kind=kind))
        assert job.aggregate()
        assert job.end_round().error is None
    assert np.linalg.norm(product(job.weights) - best(MEAN)) < 1e-5 * np.linalg.norm(MEAN)
    mean = fl.weighted_average(list(CLIENTS.values()), list(COUNTS.values()))
    assert job.weights[HEAD] == pytest.approx(mean[HEAD], rel=1e-6)


def test_a_round_refuses_a_client_with_half_an_adapter_and_goes_on_with_the_others() -> None:
    server = fl.FederatedServer(weights_of(0), num_rounds=1, rule="lora", on_bad_contribution="reject")
    with server.begin() as job:
        job.start_round(0)
        for who, weights in CLIENTS.items():
            job.receive(who, fl.Contribution(who, weights, COUNTS[who], round=0))
        half = {name: array for name, array in weights_of(4).items() if name != B}
        job.receive("site-4", fl.Contribution("site-4", half, 1, round=0))
        assert job.aggregate()
        report = job.end_round()
    check(job.weights)
    assert report.accepted == tuple(CLIENTS)
    (refused,) = report.rejected
    assert refused.contributor == "site-4"
    assert f"'{A}' comes without '{B}'" in str(refused.error)


def test_what_the_rule_cannot_do_is_refused_with_a_way_out() -> None:
    for arguments, text in (
        ({"exact": True}, "rule 'lora' has no exact sums"),
        ({"stream": True}, "rule 'lora' needs all contributions of a round at once"),
        ({"partial": "average"}, "rule 'lora' needs both factors of each layer"),
    ):
        with pytest.raises(ValueError, match=text):
            AggregationSettings(rule="lora", **arguments)
    with pytest.raises(fl.AggregatorError, match=r"send full weights \(kind=Kind.FULL\)"):
        fl.aggregate(sent(kind="diff"), rule="lora")
    for wrong, error, text in (
        ({"w": np.zeros(2)}, fl.NamesError, "site-1: no variable is a factor of LoRA"),
        ({**weights_of(1), A: np.zeros((3, 6))}, fl.ShapeError, f"site-1: '{B}' has shape .*makes no product"),
    ):
        with pytest.raises(error, match=text):
            fl.aggregate([fl.Contribution("site-1", wrong, 1)], rule="lora")
    text = r"site-2: '.*' has shape \(3, 6\), expected \(2, 6\); adapters of several ranks are for fl.lora.average"
    with pytest.raises(fl.ShapeError, match=text):
        fl.aggregate(
            [fl.Contribution("site-1", weights_of(1), 1), fl.Contribution("site-2", weights_of(2, 3), 1)], rule="lora"
        )


def test_a_round_refuses_a_client_of_another_rank_and_says_what_takes_it() -> None:
    server = fl.FederatedServer(weights_of(0), num_rounds=1, rule="lora", on_bad_contribution="reject")
    with server.begin() as job:
        job.start_round(0)
        for who, weights in {"site-1": weights_of(1), "site-2": weights_of(2, 3)}.items():
            job.receive(who, fl.Contribution(who, weights, 1, round=0))
        assert job.aggregate()
        (refused,) = job.end_round().rejected
    assert str(refused.error).endswith("; adapters of several ranks are for fl.lora.average")
    other = {**weights_of(1), A: np.zeros((2, 7), np.float32)}
    with pytest.raises(fl.ShapeError, match=r"expected \(2, 6\)$"):
        fl.aggregate([weights_of(1), other], rule="lora")


def test_several_adapters_of_one_layer_are_averaged_each_by_itself() -> None:
    def both(seed: int) -> dict[str, Array]:
        other = weights_of(seed + 10)
        return weights_of(seed) | {name.replace("default", "other"): array for name, array in other.items()}

    found = fl.aggregate([both(1), both(2)], rule="lora")
    second = {name: found[name.replace("default", "other")] for name in (A, B)}
    for made, seeds in ((found, (1, 2)), (second, (11, 12))):
        mean = sum(product(weights_of(seed)) for seed in seeds) / 2
        assert np.linalg.norm(product(made) - best(mean)) < 1e-6 * np.linalg.norm(mean)


@pytest.mark.not_quick
@pytest.mark.parametrize("rule", ["lora", fl.rules.LoraRule()])
def test_flowers_older_strategy_has_no_names_by_which_factors_could_be_found(rule: Any) -> None:
    pytest.importorskip("flwr")
    from fed_learn.integrations.flower import LegacyFedAvg

    with pytest.raises(ValueError, match=r"parameters have none here: use fed_learn\.integrations\.flower\.FedAvg"):
        LegacyFedAvg(rule=rule)


def test_codes_of_a_quantized_base_stay_as_they_are_beside_the_adapters() -> None:
    base = {"q.base_layer.weight": np.arange(8, dtype=np.uint8)}
    base["q.base_layer.weight.quant_state.bitsandbytes__nf4"] = np.zeros(9, np.uint8)
    whole = [{**base, **weights} for weights in CLIENTS.values()]
    for found in (
        fl.aggregate(whole, list(COUNTS.values()), rule="lora"),
        fl.lora.average(whole, [10, 20, 70]).weights,
    ):
        check(found)
        assert {name: found[name].tobytes() for name in base} == {n: a.tobytes() for n, a in base.items()}
    whole[1] = {**whole[1], "q.base_layer.weight": np.zeros(8, np.uint8)}
    with pytest.raises(fl.NotSameError, match=r"'q.base_layer.weight'"):
        fl.aggregate(whole, rule="lora")


@pytest.mark.not_quick
@pytest.mark.parametrize("tensors", [False, True])
def test_nvflares_aggregator_averages_products(tensors: bool) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("nvflare")
    from nvflare.app_common.abstract.fl_model import FLModel

    from fed_learn.integrations.nvflare import WeightedAverageAggregator

    aggregator = WeightedAverageAggregator(rule="lora")
    for who, weights in CLIENTS.items():
        params: Any = {name: torch.tensor(array) for name, array in weights.items()} if tensors else weights
        meta = {"client_name": who, "NUM_STEPS_CURRENT_ROUND": COUNTS[who]}
        aggregator.accept_model(FLModel(params=params, meta=meta, current_round=0))
    made = aggregator.aggregate_model().params
    assert all(isinstance(value, torch.Tensor) is tensors for value in made.values())
    check(made)


@pytest.mark.not_quick
def test_flowers_strategy_averages_products() -> None:
    pytest.importorskip("flwr")
    from flwr.app import Context, Message, MetricRecord, RecordDict

    from fed_learn.integrations.flower import FedAvg, LocalGrid, to_record, to_weights

    def train(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"]) + 1
        metrics = MetricRecord({"num-examples": COUNTS[f"site-{k}"], "partition-id": k})
        return Message(RecordDict({"arrays": to_record(CLIENTS[f"site-{k}"]), "metrics": metrics}), reply_to=message)

    strategy = FedAvg(fraction_evaluate=0.0, rule="lora")
    result = strategy.start(LocalGrid(train, 3), to_record(weights_of(0)), num_rounds=1)
    check(to_weights(result.arrays))


@pytest.mark.not_quick
def test_tensors_of_torch_come_back_as_such() -> None:
    torch = pytest.importorskip("torch")
    tensors: Any = [{name: torch.tensor(array) for name, array in weights.items()} for weights in CLIENTS.values()]
    made = fl.aggregate(tensors, list(COUNTS.values()), rule="lora")
    assert all(type(value) is torch.Tensor for value in made.values())
    check(made)
