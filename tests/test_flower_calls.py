"""Subclasses that aggregate a round in several calls, ask fewer nodes than were sampled, or put replies aside."""

# mypy: disable-error-code="misc"
# Classes are derived from Flower's strategy and from ours in turn.

import logging
from typing import Any

import numpy as np
import pytest
from flower_parts import record
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

import fed_learn as fl
from fed_learn.integrations.flower import ClientMod, FedAvg, LocalGrid, WithHandlers

BOTH = pytest.mark.parametrize("base", [FlowerFedAvg, FedAvg])


def scaled(message: Message, context: Context) -> Message:
    """Node k adds k + 1 and weighs 10 + k."""
    node: Any = context.node_config["partition-id"]
    arrays: Any = message.content["arrays"]
    made = record(**{name: array.numpy() + 1 + node for name, array in arrays.items()})
    metrics = MetricRecord({"num-examples": 10 + node, "partition-id": node})
    return Message(RecordDict({"arrays": made, "metrics": metrics}), reply_to=message)


def values(arrays: Any) -> dict[str, Any]:
    return {name: array.numpy().tolist() for name, array in arrays.items()}


def run(strategy: Any, app: Any = scaled, nodes: int = 3, rounds: int = 3) -> Any:
    return strategy.start(LocalGrid(app, nodes), record(w=np.zeros(2), b=np.full(1, 7.0)), num_rounds=rounds)


def clustered(base: Any, split: Any, **settings: Any) -> Any:
    """The mean of the means of two groups of replies."""

    class Clustered(base):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            ordered = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
            left, right = split(ordered)
            (one, _), (other, metrics) = (
                super(Clustered, self).aggregate_train(server_round, r) for r in (left, right)
            )
            assert one is not None
            assert other is not None
            mean = {n: Array((one[n].numpy() + other[n].numpy()) / 2) for n in one}
            return ArrayRecord(mean), metrics

    return Clustered(fraction_evaluate=0.0, **settings)


SPLITS = pytest.mark.parametrize(
    "split", [lambda r: (r[:2], r[1:]), lambda r: (r[:1], r[1:]), lambda r: (r, r)], ids=["overlap", "apart", "twice"]
)


@SPLITS
def test_each_call_aggregates_its_own_replies(split: Any) -> None:
    theirs, ours = (values(run(clustered(base, split)).arrays) for base in (FlowerFedAvg, FedAvg))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-12)


def test_a_call_after_one_in_which_all_differences_were_added_meets_the_model_that_was_sent() -> None:
    def difference(message: Message, context: Context) -> Message:
        reply = scaled(message, context)
        node: Any = context.node_config["partition-id"]
        reply.content["arrays"] = record(w=np.full(2, 1.0 + node), b=np.zeros(1))
        return reply

    result = run(clustered(FedAvg, lambda r: (r[:1], r[1:]), kind=fl.Kind.DIFF), difference, rounds=1)
    expected = (1 + (2 * 11 + 3 * 12) / 23) / 2
    np.testing.assert_allclose(values(result.arrays)["w"], [expected] * 2, rtol=1e-12)
    assert values(result.arrays)["b"] == [7.0]


def test_one_report_and_one_number_for_a_round_of_several_calls(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    class Look(fl.Handler):
        def before_aggregation(self, fl_ctx: fl.FLContext) -> None:
            scores = [c.metrics["initial_validation_metric"] for c in fl_ctx[fl.ContextKey.CONTRIBUTIONS]]
            model: Any = fl_ctx.get_model()
            seen.append((fl_ctx[fl.ContextKey.ROUND], float(model.weights["w"][0]), scores))

    mod = ClientMod(validate=lambda weights, _: float(weights["w"][0]))
    strategy = clustered(FedAvg, lambda r: (r[:1], r[1:]), handlers=[Look(), fl.ModelSelectionHandler()])
    job = run(strategy, lambda message, context: mod(message, context, scaled), rounds=2).job
    assert [(report.round, report.accepted, report.absent) for report in job.reports] == [
        (number, ("partition-0", "partition-1", "partition-2"), ()) for number in range(2)
    ]
    assert [report.total_weight for report in job.reports] == [33.0, 33.0]
    after = (1 + (2 * 11 + 3 * 12) / 23) / 2
    assert seen == [(0, 0.0, [0.0]), (0, 0.0, [0.0, 0.0]), (1, after, [after]), (1, after, [after, after])]
    assert (job.best.round, job.best.metric) == (2, pytest.approx(2 * after))
    assert "No reply" not in caplog.text


# Who was asked, and who answered


class Sent(fl.Handler):
    def __init__(self) -> None:
        self.names: list[str] = []

    def send_global_model(self, fl_ctx: fl.FLContext) -> None:
        self.names.append(fl_ctx[fl.ContextKey.CONTRIBUTOR])


def test_a_node_that_a_subclass_does_not_ask_is_not_missing(caplog: pytest.LogCaptureFixture) -> None:
    class Fewer(FedAvg):
        def configure_train(self, *arguments: Any) -> Any:
            return [m for m in super().configure_train(*arguments) if m.metadata.dst_node_id != 4]

    sent = Sent()
    job = run(Fewer(fraction_evaluate=0.0, handlers=[sent]), rounds=1).job
    assert sorted(sent.names) == ["node-2", "node-3"]
    assert job.reports[0].absent == ()
    assert "No reply" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_a_subclass_puts_aside_is_not_missing(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Choosy(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            kept = (reply for reply in replies if reply.metadata.src_node_id != 2)
            return super().aggregate_train(server_round, kept)

    job = run(Choosy(fraction_evaluate=0.0, stream=stream), rounds=2).job
    assert [(r.accepted, r.absent) for r in job.reports] == [(("partition-1", "partition-2"), ())] * 2
    assert "No reply" not in caplog.text


@pytest.mark.parametrize("make", [FedAvg, lambda **more: WithHandlers(FlowerFedAvg(**more))], ids=["own", "around"])
def test_a_node_that_does_not_answer_is_missing(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    def app(message: Message, context: Context) -> Message | None:
        return None if context.node_config["partition-id"] == 1 else scaled(message, context)

    job = make(fraction_evaluate=0.0).start(LocalGrid(app, 3), record(w=np.zeros(2)), num_rounds=1, timeout=0.1).job
    assert job.reports[0].absent == ("node-3",)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "reply" in r.getMessage()]
    assert said == ["\t> No reply from node-3"]


def test_in_a_loop_of_ones_own_the_log_says_what_is_known(caplog: pytest.LogCaptureFixture) -> None:
    strategy = FedAvg(fraction_evaluate=0.0)
    grid = LocalGrid(scaled, 3)
    messages = strategy.configure_train(1, record(w=np.zeros(2)), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    strategy.aggregate_train(1, [reply for reply in replies if reply.metadata.src_node_id != 2])
    assert "Not among the replies: node-2" in caplog.text


class InGroups(FedAvg):
    """Aggregates three nodes and one, and goes on with the group that can be aggregated."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        ordered = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        made = []
        for group in (ordered[:3], ordered[3:]):
            try:
                arrays, metrics = super().aggregate_train(server_round, group)
            except fl.NonFiniteError:
                continue
            if arrays is not None:
                made.append((arrays, metrics))
        return made[0]


def test_the_report_counts_nobody_of_a_call_with_too_few() -> None:
    strategy = InGroups(fraction_evaluate=0.0, min_contributions=2)
    result = run(strategy, nodes=4)
    assert [(len(report.accepted), report.error) for report in result.job.reports] == [(3, None)] * 3
    assert [report.total_weight for report in result.job.reports] == [33.0] * 3


def test_the_report_of_a_call_stays_where_the_next_one_raises() -> None:
    def fourth_is_nan(message: Message, context: Context) -> Message:
        reply = scaled(message, context)
        if context.node_config["partition-id"] == 3:
            reply.content["arrays"] = record(w=np.full(2, np.nan), b=np.zeros(1))
        return reply

    strategy = InGroups(fraction_evaluate=0.0, on_bad_contribution="raise")
    result = run(strategy, fourth_is_nan, nodes=4)
    assert [(report.round, len(report.accepted)) for report in result.job.reports] == [(0, 3), (1, 3), (2, 3)]


def test_models_are_selected_by_the_scores_of_all_calls() -> None:
    by_model = {0: [0.9, 0.9, 0.1, 0.1], 1: [0.6] * 4, 2: [0.7] * 4}

    def accuracy(weights: Any, context: Context) -> dict[str, float]:
        node: Any = context.node_config["partition-id"]
        return {"accuracy": by_model[round(float(weights["w"][0]))][node]}

    apps = ClientApp(mods=[ClientMod(validate=accuracy)])

    @apps.train()
    def train(message: Message, context: Context) -> Message:
        arrays: Any = message.content["arrays"]
        made = record(**{name: array.numpy() + 1 for name, array in arrays.items()})
        return Message(RecordDict({"arrays": made, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    selection = fl.ModelSelectionHandler()
    strategy = clustered(FedAvg, lambda replies: (replies[:2], replies[2:]), handlers=[selection])
    result = run(strategy, apps, nodes=4)
    assert (result.job.best.round, result.job.best.metric) == (2, pytest.approx(0.7))
    assert result.job.reports[0].metrics["selection"] == pytest.approx(0.5)


@pytest.mark.parametrize("base", [FedAvg, FlowerFedAvg], ids=["sub", "inside"])
def test_what_a_strategy_leaves_away_stays_the_clients_own(base: Any) -> None:
    own: dict[Any, dict[str, Any]] = {}

    def app(message: Message, context: Context) -> Message:
        node: Any = context.node_config["partition-id"]
        arrays: Any = message.content["arrays"]
        mine = own.setdefault(node, {})
        mine.update({name: array.numpy() for name, array in arrays.items()})
        mine["b"] = mine["b"] + node + 1
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": record(**mine), "metrics": metrics}), reply_to=message)

    class WithoutB(base):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            return ArrayRecord({"w": arrays["w"]}), metrics

    strategy = WithoutB(fraction_evaluate=0.0)
    run(strategy if base is FedAvg else WithHandlers(strategy), app)
    assert {node: mine["b"].tolist() for node, mine in sorted(own.items())} == {0: [10.0], 1: [13.0], 2: [16.0]}


def test_who_alone_holds_a_variable_and_misses_the_first_round_is_sent_it_later() -> None:
    def app(message: Message, context: Context) -> Message:
        node: Any = context.node_config["partition-id"]
        if node == 2 and message.content["config"]["server-round"] == 1:
            raise RuntimeError("the network is down")
        arrays: Any = message.content["arrays"]
        names = ["w", "b"] if node == 2 else ["w"]
        made = record(**{name: arrays[name].numpy() + 1 for name in names})
        return Message(RecordDict({"arrays": made, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    result = run(FedAvg(fraction_evaluate=0.0, partial="average"), app)
    assert values(result.arrays) == {"w": [3.0, 3.0], "b": [9.0]}
    assert [len(report.accepted) for report in result.job.reports] == [2, 3, 3]
