"""Names that several nodes have, and the advice and the refusals that follow."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from flower_parts import record
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

import fed_learn as fl
from fed_learn.integrations.flower import ClientMod, FedAvg, LocalGrid, WithHandlers
from fed_learn.integrations.flower.replies import checked_name, node_name


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


# A name is its node's as long as the stack has that node


STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["kept", "stream"])


class Nodes(LocalGrid):
    """Nodes that say whatever `claims` has for them; those in `away` are not connected."""

    def __init__(self, claims: Mapping[int, Any], nodes: int = 3) -> None:
        super().__init__(self._answer_of, nodes)
        self.claims = claims
        self.away: set[int] = set()

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if node not in self.away]

    def _answer_of(self, message: Message, context: Context) -> Message:
        weights = record(w=np.full(1, float(context.node_id)))
        content = RecordDict({"a": weights, "m": MetricRecord({"num-examples": 1})})
        claim = self.claims.get(context.node_id)
        if claim is not None:
            content["fed_learn"] = ConfigRecord({"contributor": claim})
        return Message(content, reply_to=message)


class Sampling(FedAvg):
    """Asks the nodes that `asked` lists by round, in that order, as a user's own sampling does."""

    def __init__(self, asked: Mapping[int, tuple[int, ...]], away: Mapping[int, set[int]] | None = None, **more: Any):
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1, **more)
        self.asked, self.away = asked, away or {}

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        grid.away = self.away.get(server_round, set())
        messages = {m.metadata.dst_node_id: m for m in super().configure_train(server_round, arrays, config, grid)}
        return [messages[node] for node in self.asked[server_round]]


def outcomes(strategy: Any, grid: LocalGrid) -> list[tuple[tuple[str, ...], list[str]]]:
    """Who was accepted in each round, and who was refused."""
    result = strategy.start(grid, record(w=np.zeros(1)), num_rounds=len(strategy.asked))
    return [(report.accepted, [f.contributor for f in report.rejected]) for report in result.job.reports]


@STREAMS
def test_a_node_that_is_not_asked_in_a_round_keeps_its_name(stream: bool) -> None:
    strategy = Sampling({1: (2, 3), 2: (3, 4), 3: (4, 2), 4: (2, 3)}, stream=stream)
    assert outcomes(strategy, Nodes({2: "hospital-a", 3: "hospital-b", 4: "hospital-a"})) == [
        (("hospital-a", "hospital-b"), []),
        (("hospital-b",), ["node-4"]),
        (("hospital-a",), ["node-4"]),
        (("hospital-a", "hospital-b"), []),
    ]


@STREAMS
def test_two_that_claim_the_name_of_one_that_is_not_asked_do_not_take_it_from_it(stream: bool) -> None:
    strategy = Sampling({1: (2, 3), 2: (4, 5), 3: (5, 2, 4)}, stream=stream)
    grid = Nodes({2: "hospital-a", 3: "hospital-b", 4: "hospital-a", 5: "hospital-a"}, nodes=4)
    assert outcomes(strategy, grid) == [
        (("hospital-a", "hospital-b"), []),
        ((), ["node-4", "node-5"]),
        (("hospital-a",), ["node-5", "node-4"]),
    ]


def test_a_subclass_that_replaces_the_list_of_nodes_frees_no_name() -> None:
    class Some(Sampling):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            grid.get_node_ids = lambda: list(self.asked[server_round])
            return super().configure_train(server_round, arrays, config, grid)

    assert outcomes(Some({1: (2, 3), 2: (3, 4), 3: (2, 4)}), Nodes({2: "a", 3: "b", 4: "a"})) == [
        (("a", "b"), []),
        (("b",), ["node-4"]),
        (("a",), ["node-4"]),
    ]


@STREAMS
def test_a_name_whose_node_is_gone_goes_over_and_is_its_own_again_when_it_comes_back(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {1: (2, 3), 2: (4, 3), 3: (4, 3), 4: (4, 2), 5: (3, 4)}
    strategy = Sampling(asked, {2: {2}, 3: {2}}, stream=stream)
    assert outcomes(strategy, Nodes({2: "a", 3: "b", 4: "a"})) == [
        (("a", "b"), []),
        (("a", "b"), []),  # a node that was started anew has another number
        (("a", "b"), []),
        (("a",), ["node-4"]),
        (("b",), ["node-4"]),
    ]
    told = [r.getMessage() for r in caplog.records if "no longer connected" in r.getMessage()]
    assert told == ["node-4 is called 'a' from now on: node-2, which was, is no longer connected"]


def test_where_the_stack_does_not_say_who_is_there_no_name_is_freed(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Sampling):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            grid.down = False
            messages = super().configure_train(server_round, arrays, config, grid)
            grid.down = True
            return messages

    class Down(Nodes):
        down = False

        def get_node_ids(self) -> Iterable[int]:
            if self.down:
                raise ConnectionError("the SuperLink is gone")
            return super().get_node_ids()

    strategy = Broken({1: (2, 3), 2: (3, 4)})
    assert outcomes(strategy, Down({2: "a", 3: "b", 4: "a"})) == [(("a", "b"), []), (("b",), ["node-4"])]
    assert "it is not known which nodes are connected: ConnectionError: the SuperLink is gone" in caplog.text


# The user's registry


REGISTRIES: Any = [{2: "a", 3: "b"}, {"2": "a", "3": "b"}, {2: "a", 3: "b"}.get]


@STREAMS
@pytest.mark.parametrize("registry", REGISTRIES, ids=["numbers", "text", "function"])
def test_the_registry_says_whose_a_name_is_also_in_the_first_round(registry: Any, stream: bool) -> None:
    strategy = Sampling({1: (4, 2, 3), 2: (4, 3), 3: (4, 2)}, node_names=registry, stream=stream)
    assert outcomes(strategy, Nodes({2: "partition-7", 4: "a"})) == [
        (("a", "b"), ["node-4"]),
        (("b",), ["node-4"]),
        (("a",), ["node-4"]),
    ]


def test_a_claim_that_the_registry_contradicts_is_refused_by_the_name_that_it_gives() -> None:
    strategy = Sampling({1: (2, 3)}, node_names={2: "a", 3: "b"})
    result: Any = strategy.start(Nodes({2: "b", 3: "b"}), record(w=np.zeros(1)), num_rounds=1)
    (failure,) = result.job.reports[0].rejected
    assert (result.job.reports[0].accepted, failure.contributor, failure.cause) == (
        ("b",),
        "a",
        "UnknownContributorError",
    )
    assert str(failure.error) == "a: node-2 claims to be 'b', and node_names says that it is 'a'"


def test_nodes_that_share_a_claim_do_not_get_at_a_name_of_the_registry() -> None:
    strategy = Sampling({1: (3, 4, 5), 2: (2, 4)}, node_names={2: "a"})
    assert outcomes(strategy, Nodes({3: "b", 4: "a", 5: "a"}, nodes=4)) == [
        (("b",), ["node-4", "node-5"]),
        (("a",), ["node-4"]),
    ]


def test_a_registry_that_raises_or_gives_no_name_costs_that_node_alone() -> None:
    def registry(node: int) -> str:
        return {3: "b", 4: "a\nb"}[node]

    result: Any = Sampling({1: (2, 3, 4)}, node_names=registry).start(Nodes({}), record(w=np.zeros(1)), num_rounds=1)
    assert result.job.reports[0].accepted == ("b",)
    assert [str(f.error) for f in result.job.reports[0].rejected] == [
        "node-2: node_names raised KeyError: 2",
        r"contributor 'a\nb' is not a name: '\n' is not printable",
    ]


def test_a_registry_that_holds_no_names_is_refused_before_the_job() -> None:
    with pytest.raises(ValueError, match="is not a name"):
        FedAvg(node_names={2: "a/b"})
    with pytest.raises(TypeError, match="node_names"):
        FedAvg(node_names=["a", "b"])  # type: ignore[arg-type]


# Names are text of others


HOSTILE = [
    "site\nERROR fed_learn: all is lost\x1b[2K",
    "x" * 201,
    "../../etc",
    "",
    " a",
    "final",
    "global_best",
    b"a",
    7,
]


@pytest.mark.parametrize("claim", HOSTILE, ids=range(len(HOSTILE)))
def test_a_claim_that_is_no_name_is_refused_by_its_node_in_one_printable_line(
    claim: Any, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = Sampling({1: (2, 3), 2: (2, 3)})
    with caplog.at_level(logging.INFO):
        assert outcomes(strategy, Nodes({2: claim, 3: "b"})) == [(("b",), ["node-2"])] * 2
    refused = [r.getMessage() for r in caplog.records if "Refused" in r.getMessage()]
    assert len(refused) == 2
    assert all(line.startswith("\t> Refused: UnknownContributorError: node-2: ") for line in refused)
    assert all(line[1:].isprintable() and len(line) < 300 for line in refused)


def test_a_node_may_claim_the_name_that_it_shares_whatever_its_client_id_holds() -> None:
    shared = f"hospital@{node_name('10.0.0.1:80/a')}"
    assert checked_name(shared, "10.0.0.1:80/a") == shared
    with pytest.raises(fl.UnknownContributorError, match="the name of another node"):
        checked_name(shared, "10.0.0.1:80/b")


def test_what_a_client_says_of_its_error_is_one_printable_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def fails(message: Message, context: Context) -> Message:
        if context.node_id == 2:
            raise RuntimeError("no room\nERROR fed_learn: all is lost\x1b[2K")
        return Nodes({})._answer_of(message, context)

    for strategy in (FedAvg(), FedAvg(stream=True), WithHandlers(FlowerFedAvg(fraction_evaluate=0.0))):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            strategy.start(LocalGrid(fails, 2), record(w=np.zeros(1)), num_rounds=1)
        lines = [r.getMessage().strip() for r in caplog.records if "all is lost" in r.getMessage()]
        assert lines
        assert all(line.isprintable() for line in lines)


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
