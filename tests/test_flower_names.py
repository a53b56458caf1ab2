"""Names that several nodes have, and the advice and the refusals that follow."""

from typing import Any

import numpy as np
import pytest
from flower_parts import record
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

import fed_learn as fl
from fed_learn.integrations.flower import ClientMod, FedAvg, LocalGrid, WithHandlers


def train(message: Message, context: Context) -> Message:
    """Node k adds k + 1."""
    node: Any = context.node_config["partition-id"]
    arrays: Any = message.content["arrays"]
    made = record(w=arrays["w"].numpy() + 1 + node)
    return Message(RecordDict({"arrays": made, "metrics": MetricRecord({"num-examples": 10})}), reply_to=message)


def app(name: Any) -> Any:
    made = ClientApp(mods=[ClientMod(name=name)])
    made.train()(train)
    return made


def run(name: Any, nodes: int = 3, rounds: int = 3, **settings: Any) -> Any:
    strategy = FedAvg(fraction_evaluate=0.0, **settings)
    return strategy.start(LocalGrid(app(name), nodes), record(w=np.zeros(1)), num_rounds=rounds).job


def shared(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "several nodes are called" in r.getMessage()]


def by_node(context: Context) -> int:
    return int(context.node_config["partition-id"])


def test_nodes_of_one_name_count_each_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    job = run(lambda context: "same" if by_node(context) else "other")
    assert [r.accepted for r in job.reports] == [("other", "same@node-3", "same@node-4")] * 3
    assert [r.rejected for r in job.reports] == [()] * 3
    assert job.weights["w"].tolist() == [6.0]
    assert shared(caplog) == [
        "several nodes are called 'same': each counts for itself, as 'same@node-<id>', which is another name in every "
        "run; let ClientMod(name=...) give each node a name of its own"
    ]


def test_in_a_stream_the_first_keeps_the_name_and_none_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    job = run(lambda _: "same", nodes=2, stream=True)
    assert job.weights["w"].tolist() == [4.5]
    names = set(job.reports[0].accepted)
    assert names in ({"same", "same@node-3"}, {"same", "same@node-2"})
    assert [set(r.accepted) for r in job.reports] == [names] * 3
    assert len(shared(caplog)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_name_of_a_node_that_takes_part_stays_its_own(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    rounds: list[int] = []

    def name(context: Context) -> str:
        if by_node(context) == 0:
            return "hospital-a"
        return "hospital-b" if by_node(context) == 1 else "hospital-a"

    class Late(FedAvg):
        """Asks the third node from the second round on, and that one first."""

        def configure_train(self, server_round: int, *others: Any) -> Any:
            rounds.append(server_round)
            messages = sorted(super().configure_train(server_round, *others), key=lambda m: -m.metadata.dst_node_id)
            return messages if server_round > 1 else messages[1:]

    strategy = Late(fraction_evaluate=0.0, stream=stream)
    job: Any = strategy.start(LocalGrid(app(name), 3), record(w=np.zeros(1)), num_rounds=3).job
    assert [r.accepted for r in job.reports] == [("hospital-a", "hospital-b")] * 3
    assert [[(f.contributor, f.cause) for f in r.rejected] for r in job.reports] == [
        [],
        *[[("node-4", "UnknownContributorError")]] * 2,
    ]
    assert job.weights["w"].tolist() == [4.5]
    assert not shared(caplog)


@pytest.mark.parametrize("claim", ["x@node-2", "node-2"])
def test_the_name_that_tells_another_node_apart_is_refused(claim: str) -> None:
    job = run(lambda context: claim if by_node(context) else "x", rounds=1, nodes=2)
    assert job.reports[0].accepted == ("x",)
    assert [f.cause for f in job.reports[0].rejected] == ["UnknownContributorError"]


# What is said where nothing was aggregated


def in_vain(strategy: Any, make: Any, initial: ArrayRecord) -> str:
    def run(message: Message, context: Context) -> Message:
        content = {"arrays": make(), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    with pytest.raises(fl.NothingAggregatedError) as caught:
        strategy.start(LocalGrid(run, 2), initial, num_rounds=1)
    return str(caught.value)


ADVICE = "(an empty initial record takes the model as the clients send it)"


def test_an_empty_record_is_advised_only_where_clients_were_refused_for_their_form() -> None:
    class Wrong(FlowerFedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return record(w=np.array(["text"])), None

    start = record(w=np.zeros(1))
    off: Any = {"fraction_evaluate": 0.0}
    assert ADVICE in in_vain(FedAvg(**off), lambda: record(v=np.zeros(1)), start)
    assert ADVICE not in in_vain(WithHandlers(Wrong(**off)), lambda: record(w=np.zeros(1)), start)
    assert ADVICE not in in_vain(FedAvg(**off), lambda: record(w=np.array(["text"])), ArrayRecord())
