"""FedBN and FedPer: what is local stays at each client, in our server and in Flower, and it pays on real data."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from reference import Array

import fed_learn as fl
from fed_learn.weights import WeightDict

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

SCRIPT = Path(__file__).parents[1] / "examples" / "personalization.py"
FEDBN = {"bn": "local"}
SEED = 3
ROUNDS = 3
CLIENTS = 3


@pytest.fixture(scope="module")
def example() -> Any:
    """The example, whose clients and data these tests share."""
    spec = importlib.util.spec_from_file_location("example_of_personalization", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def accuracy(example: Any, split: str, method: str, seed: int, rounds: int) -> float:
    """The mean test accuracy of the clients."""
    learners = example.learners_of(example.SPLITS[split](seed), seed)
    example.federate(learners, example.METHODS[method], seed, rounds)
    return fmean(learner.tested() for learner in learners)


def gain(example: Any, split: str, method: str, rounds: int, seeds: Sequence[int] = (0, 1)) -> float:
    """By how much a method is better than FedAvg, in the mean over seeds."""
    found = [[accuracy(example, split, one, seed, rounds) for one in (method, "FedAvg")] for seed in seeds]
    return fmean(of_method - of_fedavg for of_method, of_fedavg in found)


def test_fedbn_beats_fedavg_where_images_look_different(example: Any) -> None:
    assert gain(example, "looks", "FedBN", rounds=20) > 0.1


def test_fedper_beats_fedavg_where_clients_know_two_labels(example: Any) -> None:
    assert gain(example, "two digits", "FedPer", rounds=10) > 0.02


@pytest.mark.parametrize(("split", "policies"), [("looks", FEDBN), ("two digits", {"head": "local"})])
def test_a_run_repeated_gives_the_same_bits(example: Any, split: str, policies: Mapping[str, str]) -> None:
    found = []
    for _ in range(2):
        learners = example.learners_of(example.SPLITS[split](SEED), SEED)
        result = example.federate(learners, policies, SEED, ROUNDS)
        models = [bits(fl.get_weights(learner.model)) for learner in learners]
        found.append((bits(result.weights), models, [learner.tested() for learner in learners]))
    assert found[0] == found[1]


@pytest.mark.parametrize("split", ["looks", "two digits", "Dirichlet"])
def test_a_client_trains_selects_and_is_tested_on_different_images(example: Any, split: str) -> None:
    parts = example.SPLITS[split](SEED)
    assert sum(len(part) for one in parts for part in (one.train, one.selection, one.test)) == 1797
    for one in parts:
        of_parts = [{x.numpy().tobytes() for x, _ in part} for part in (one.train, one.selection, one.test)]
        # Two of the images in the data set are the same but for their place in it.
        assert len(set().union(*of_parts)) >= sum(map(len, of_parts)) - 1
        assert sum(map(len, of_parts)) >= 50
    if split == "two digits":
        assert [len({int(y) for part in (p.train, p.selection, p.test) for _, y in part}) for p in parts] == [2] * 10


# What stays at the clients


def bits(weights: WeightDict) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in weights.items()}


def of_bn(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if name.startswith("bn")}


def shared(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if not name.startswith("bn")}


def three_learners(example: Any) -> list[Any]:
    return list(example.learners_of(example.SPLITS["looks"](SEED)[:CLIENTS], SEED))


def initial_of_server(example: Any) -> dict[str, Array]:
    """The weights that clients begin with, but for BatchNorm, whose variables are 7 here."""
    weights = fl.get_weights(three_learners(example)[0].model)
    return {name: np.full_like(array, 7) if name.startswith("bn") else array for name, array in weights.items()}


def by_hand(example: Any) -> tuple[dict[str, bytes], list[dict[str, bytes]]]:
    """FedBN without a server: the shared weights after the last round, and BatchNorm of each client."""
    learners = three_learners(example)
    weights: WeightDict = shared(initial_of_server(example))
    for number in range(ROUNDS):
        results = [learner.train(weights, fl.FLContext({fl.ContextKey.ROUND: number})) for learner in learners]
        weights = fl.weighted_average([r.weights for r in results], [r.aggregation_weight for r in results])
    return bits(weights), [bits(of_bn(fl.get_weights(learner.model))) for learner in learners]


class Look(fl.Handler):
    """Notes the names of the variables that each accepted contribution has."""

    def __init__(self) -> None:
        self.names: list[set[str]] = []

    def before_aggregation(self, ctx: fl.FLContext) -> None:
        self.names += [set(contribution.weights) for contribution in ctx[fl.ContextKey.CONTRIBUTIONS]]


class Received(fl.Handler):
    """Notes the names of the variables that a client receives, to train and to validate."""

    def __init__(self) -> None:
        self.names: list[set[str]] = []

    def receive_model(self, ctx: fl.FLContext) -> None:
        assert ctx.model is not None
        assert ctx.model.weights is not None
        self.names.append(set(ctx.model.weights))

    receive_validation_models = receive_model


@pytest.mark.parametrize("kind", [fl.Kind.FULL, fl.Kind.DIFF])
def test_batchnorm_never_leaves_a_client(example: Any, kind: fl.Kind) -> None:
    learners, look, received = three_learners(example), Look(), Received()
    initial = initial_of_server(example)
    server = fl.FederatedServer(initial, num_rounds=ROUNDS, policies=FEDBN, handlers=[look], kind=kind)
    clients = [
        fl.FederatedClient(f"site-{k}", learner, handlers=[received], kind=kind) for k, learner in enumerate(learners)
    ]
    result = server.run(clients, max_workers=1)

    expected, own = by_hand(example)
    assert list(result.weights) == list(initial)
    assert bits(of_bn(result.weights)) == bits(of_bn(initial))
    assert look.names == [set(shared(initial))] * CLIENTS * ROUNDS
    assert len(received.names) >= CLIENTS * ROUNDS
    assert all(names == set(shared(initial)) for names in received.names)
    if kind is fl.Kind.FULL:
        assert bits(shared(result.weights)) == expected
        assert [bits(of_bn(fl.get_weights(learner.model))) for learner in learners] == own
    found = [of_bn(fl.get_weights(learner.model)) for learner in learners]
    assert len({array["bn1.running_mean"].tobytes() for array in found}) == CLIENTS
    steps = [ROUNDS * learner.epochs * math.ceil(len(learner.data) / learner.batch_size) for learner in learners]
    assert [int(array["bn1.num_batches_tracked"]) for array in found] == steps


@pytest.mark.parametrize("sends", ["all", "shared"])
@pytest.mark.parametrize("stream", [False, True])
def test_batchnorm_never_leaves_a_node_of_flower(example: Any, sends: str, stream: bool) -> None:
    pytest.importorskip("flwr")
    from flwr.app import Context, Message, MetricRecord, RecordDict

    from fed_learn.integrations.flower import FedAvg, LocalGrid, to_record, to_weights

    learners, received = three_learners(example), []

    def train(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"])
        record: Any = message.content["arrays"]
        received.append(set(record))
        learners[k].model.load_state_dict(record.to_torch_state_dict(), strict=False)
        config: Any = message.content["config"]
        number = config["server-round"] - 1
        result = learners[k].train(to_weights(record), fl.FLContext({fl.ContextKey.ROUND: number}))
        weights = fl.get_weights(learners[k].model) if sends == "all" else result.weights
        metrics = MetricRecord({"num-examples": result.aggregation_weight, "partition-id": k})
        return Message(RecordDict({"arrays": to_record(weights), "metrics": metrics}), reply_to=message)

    initial = initial_of_server(example)
    strategy = FedAvg(fraction_evaluate=0.0, policies=FEDBN, stream=stream)
    result = strategy.start(LocalGrid(train, CLIENTS), to_record(initial), num_rounds=ROUNDS)

    weights = to_weights(result.arrays)
    expected, own = by_hand(example)
    assert list(weights) == list(initial)
    assert bits(of_bn(weights)) == bits(of_bn(initial))
    assert received == [set(shared(initial))] * CLIENTS * ROUNDS
    assert [bits(of_bn(fl.get_weights(learner.model))) for learner in learners] == own
    assert bits(shared(weights)) == expected
