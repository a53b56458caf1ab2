"""An empty initial record: the replies of the first round tell what the model is, by names and shapes."""

from typing import Any

import numpy as np
import pytest
from flower_parts import record
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

import fed_learn as fl
from fed_learn.integrations.flower import FedAvg, LocalGrid, to_record, to_weights

BF16 = fl.weights.BFLOAT16


def app(make: Any) -> Any:
    """Nodes that send what `make` says for them, and add one to what they receive later."""

    def run(message: Message, context: Context) -> Message:
        node: Any = context.node_config["partition-id"]
        received = to_weights(message.content.array_records["arrays"])
        made = {name: array + received[name] if name in received else array for name, array in make(node).items()}
        made = {name: np.asarray(array).astype(make(node)[name].dtype) for name, array in made.items()}
        metrics = MetricRecord({"num-examples": 1, "partition-id": node})
        return Message(RecordDict({"arrays": to_record(made), "metrics": metrics}), reply_to=message)

    return run


def run(make: Any, rounds: int = 2, nodes: int = 3, **settings: Any) -> Any:
    strategy = FedAvg(fraction_evaluate=0.0, **settings)
    return strategy.start(LocalGrid(app(make), nodes), ArrayRecord(), num_rounds=rounds)


# Dtype of each node → that of the model.
WIDEST: Any = [
    (("float16", "float32", "float32"), "float32"),
    (("float32", "float16", "float16"), "float32"),
    (("float32", "float64", "float16"), "float64"),
    (("float16", BF16, BF16), "float32"),
    ((BF16, BF16, BF16), BF16),
]


@pytest.mark.parametrize("partial", ["same", "average"])
@pytest.mark.parametrize(("dtypes", "expected"), WIDEST)
def test_of_several_precisions_the_widest_is_that_of_the_model(
    dtypes: Any, expected: Any, partial: str, caplog: pytest.LogCaptureFixture
) -> None:
    result = run(lambda node: {"w": np.full(2, 1.0 + node).astype(dtypes[node])}, partial=partial)
    w = to_weights(result.arrays)["w"]
    assert w.dtype == np.dtype(expected)
    assert w.astype(float).tolist() == [4.0, 4.0]
    everyone = ("partition-0", "partition-1", "partition-2")
    assert [report.accepted for report in result.job.reports] == [everyone] * 2
    widened = [r.getMessage() for r in caplog.records if "is taken as" in r.getMessage()]
    narrow = [k for k in range(3) if np.dtype(dtypes[k]) != w.dtype]
    assert sorted(widened) == [
        f"partition-{k}: 'w' came as {np.dtype(dtypes[k])} and is taken as {w.dtype}, as others send it" for k in narrow
    ]


def test_each_variable_is_averaged_over_those_who_sent_it_from_the_first_round_on() -> None:
    def make(node: int) -> Any:
        return {"w": np.full(2, 1.0 + node), **({"z": np.ones(1, np.float32)} if node == 0 else {})}

    result = run(make, partial="average")
    assert {n: a.tolist() for n, a in to_weights(result.arrays).items()} == {"w": [4.0, 4.0], "z": [2.0]}
    assert [len(report.accepted) for report in result.job.reports] == [3, 3]


@pytest.mark.parametrize("partial", ["same", "average"])
def test_another_shape_or_dtype_is_refused_with_the_variables_name(partial: str) -> None:
    def shapes(node: int) -> Any:
        return {"w": np.ones(2 if node else 3)}

    def dtypes(node: int) -> Any:
        return {"v": np.ones(1), "w": np.ones(2, np.int64 if node else np.float64)}

    for make, error, text in (
        (shapes, fl.ShapeError, "partition-0: 'w' has shape (3,), and (2,) in 2 of the round's contributions"),
        (dtypes, fl.DtypeError, "partition-0: 'w' has dtype float64, and int64 in 2 of the round's contributions"),
    ):
        result = run(make, rounds=1, partial=partial)
        (refused,) = result.job.reports[0].rejected
        assert isinstance(refused.error, error)
        assert str(refused.error) == text
        assert refused.error.name == "w"
        assert result.job.reports[0].accepted == ("partition-1", "partition-2")


@pytest.mark.parametrize("change", [{"m": np.full(1, -np.inf)}, {"m": np.zeros(1)}], ids=["another", "numbers"])
def test_constants_of_parts_in_our_own_server(change: Any) -> None:
    sent = {
        "a": {"w": np.ones(1), "m": np.full(1, np.inf)},
        "b": {"w": np.full(1, 3.0), "m": np.full(1, np.inf)},
        "c": {"w": np.full(1, 5.0)},
        "d": {"w": np.full(1, 7.0), "z": np.ones(2)},
        "e": {"w": np.full(1, 9.0), **change},
    }
    server = fl.FederatedServer({}, num_rounds=1, partial="average", on_bad_contribution="reject", min_contributions=1)
    with server.begin() as job:
        job.start_round(0)
        for name, weights in sent.items():
            job.send_model(name)
            job.receive(name, fl.Contribution(name, weights, 1, round=0))
        assert job.aggregate()
        report = job.end_round()
    assert {name: array.tolist() for name, array in job.weights.items()} == {"w": [4.0], "m": [np.inf], "z": [1.0, 1.0]}
    assert report.accepted == ("a", "b", "c", "d")
    assert [(f.contributor, f.cause) for f in report.rejected] == [("e", "NonFiniteError")]


def test_a_loop_of_ones_own_without_a_first_model() -> None:
    strategy = FedAvg(fraction_evaluate=0.0)
    grid = LocalGrid(app(lambda node: {"w": np.full(2, node).astype("float32" if node else "float16")}), 2)
    messages = [Message(RecordDict({"arrays": record(x=np.ones(1))}), node, "train") for node in grid.get_node_ids()]
    arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
    assert arrays is not None
    assert to_weights(arrays)["w"].dtype == np.float32
    assert to_weights(arrays)["w"].tolist() == [0.5, 0.5]
