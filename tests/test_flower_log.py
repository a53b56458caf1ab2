"""The log of a run in Flower: that of Flower's own strategies, line by line, and what only ours has to say."""

import difflib
import logging
import re
from typing import Any

import numpy as np
import pytest
from flower_parts import adding, record
from flwr.app import Array, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import FedMedian

import fed_learn as fl
from fed_learn.integrations.flower import FedAvg, LocalGrid, WithHandlers


def lines(strategy: Any, caplog: pytest.LogCaptureFixture, app: Any = adding, **more: Any) -> list[str]:
    """What a run logs, whoever logs it; times and names of classes made alike."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    strategy.start(LocalGrid(app, 4), record(w=np.zeros(2)), num_rounds=2, **more)
    said = "\n".join(record.getMessage() for record in caplog.records)
    said = re.sub(r"finished in \d+\.\d+s", "finished in 0.00s", said)
    return re.sub(r"Starting \w+ strategy", "Starting the strategy", said).split("\n")


def differences(left: list[str], right: list[str]) -> list[str]:
    return [line for line in difflib.ndiff(left, right) if line[0] in "+-"]


def evaluated(number: int, arrays: Any) -> MetricRecord | None:
    return MetricRecord({"seen": float(number)}) if number != 1 else None


@pytest.mark.parametrize("make", [FedAvg, lambda: FedAvg(stream=True), lambda: WithHandlers(FlowerFedAvg())])
def test_a_run_without_failures_says_word_for_word_what_flower_says(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    more: dict[str, Any] = {"evaluate_fn": evaluated, "train_config": ConfigRecord({"lr": 0.5})}
    theirs = lines(FlowerFedAvg(), caplog, **more)
    assert "Initial global evaluation results: {'seen': 0.0}" in theirs
    assert "\t└──> MetricRecord: None" in theirs
    more["train_config"] = ConfigRecord({"lr": 0.5})
    assert differences(theirs, lines(make(), caplog, **more)) == []


def failing(message: Message, context: Context) -> Message:
    """Node 3 fails in the second round, and in its evaluation."""
    if context.node_config["partition-id"] == 1 and message.content["config"]["server-round"] == 2:
        raise RuntimeError("out of memory")
    return adding(message, context)


@pytest.mark.parametrize("make", [FedAvg, lambda: FedAvg(stream=True), lambda: WithHandlers(FedMedian())])
@pytest.mark.parametrize("handlers", [False, True])
def test_a_node_that_fails_is_told_once_and_in_flowers_words(
    make: Any, handlers: bool, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = lines(FlowerFedAvg(), caplog, failing)
    assert theirs.count("\t> Received error in reply from node 3: RuntimeError: out of memory") == 2
    strategy = make()
    strategy.handlers = (fl.Handler(),) * handlers
    assert differences(theirs, lines(strategy, caplog, failing)) == []


def test_a_failure_of_all_nodes_is_told_though_the_strategy_inside_is_not_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def none(message: Message, context: Context) -> Message:
        if message.content["config"]["server-round"] == 2:
            raise RuntimeError("out of memory")
        return adding(message, context)

    theirs = lines(FlowerFedAvg(), caplog, none)
    ours = lines(WithHandlers(FlowerFedAvg()), caplog, none)
    (more,) = differences(sorted(theirs), sorted(ours))  # nodes are sampled in no order
    assert more == "+ round 2: 0 accepted contributions, 1 required; the global model stands"


def test_what_only_ours_has_to_say(caplog: pytest.LogCaptureFixture) -> None:
    def app(message: Message, context: Context) -> Message | None:
        node, number = context.node_config["partition-id"], message.content["config"]["server-round"]
        training = message.metadata.message_type == "train"
        if (node, number, training) == (3, 2, True):
            return None
        reply: Any = adding(message, context)
        if (node, number, training) == (2, 2, True):
            reply.content["a"]["w"] = Array(np.array([np.inf, 0]))
        return reply  # type: ignore[no-any-return]

    class Raises(fl.Handler):
        def end_round(self, ctx: fl.FLContext) -> None:
            if ctx[fl.ContextKey.ROUND] == 1:
                raise ValueError("on purpose")

    theirs = lines(FlowerFedAvg(), caplog, adding)
    strategy = FedAvg(handlers=[Raises()], on_handler_error="log", validation_metric="f1")
    ours = lines(strategy, caplog, app, timeout=0.0)
    ours = [re.sub("from node-.*", "from four nodes", line) if "'f1'" in line else line for line in ours]
    assert differences(theirs, ours) == [
        "+ no reply to the evaluation holds validation_metric='f1'; they hold 'accuracy', 'num-examples'",
        "- aggregate_train: Received 4 results and 0 failures",
        "+ aggregate_train: Received 3 results and 0 failures",
        "+ \t> No reply from node-5",
        "+ \t> Refused: NonFiniteError: node-4: 'w' at index (0,): inf is not finite",
        "+ handler failed: test_flower_log.test_what_only_ours_has_to_say.<locals>.Raises at _endRound of round 2: "
        "ValueError: on purpose",
        "+ \t> No 'f1' of the final model from four nodes",
    ]


def test_many_missing_nodes_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    strategy = FedAvg(fraction_evaluate=0.0)
    grid = LocalGrid(adding, 15)
    messages = list(strategy.configure_train(1, record(w=np.zeros(2)), ConfigRecord(), grid))
    strategy.aggregate_train(1, grid.send_and_receive(messages[:2]))
    (said,) = [r.getMessage() for r in caplog.records if "Not among" in r.getMessage()]
    assert said.endswith(" and 3 more")
    assert said.count("node-") == 10


def test_rounds_count_from_one_in_what_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Nothing(FlowerFedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return (None, None) if server_round == 2 else super().aggregate_train(server_round, replies)

    ours = lines(WithHandlers(Nothing(fraction_evaluate=0.0)), caplog)
    assert "round 2: Nothing aggregated nothing; the global model stands" in ours


def test_the_log_says_that_a_handler_ended_the_job(caplog: pytest.LogCaptureFixture) -> None:
    class Stops(fl.Handler):
        def end_round(self, fl_ctx: fl.FLContext) -> None:
            if fl_ctx[fl.ContextKey.ROUND] == 1:
                fl_ctx[fl.ContextKey.STOP] = "good enough"

    caplog.set_level(logging.INFO)
    for rounds, told in ((4, 1), (2, 0)):
        caplog.clear()
        FedAvg(handlers=[Stops()]).start(LocalGrid(adding, 2), record(w=np.zeros(2)), num_rounds=rounds)
        said = [r.getMessage() for r in caplog.records if "ends the job" in r.getMessage()]
        assert said == ["A handler ends the job after round 2 of 4: good enough"] * told


def test_an_evaluation_without_examples_is_told_once_and_its_score_counts(caplog: pytest.LogCaptureFixture) -> None:
    def bare(message: Message, context: Context) -> Message:
        reply = adding(message, context)
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] == 0:
            reply.content["m"] = MetricRecord({"accuracy": 9.0})
        return reply

    strategy = FedAvg(handlers=[fl.ModelSelectionHandler()], validation_metric="accuracy")
    result = strategy.start(LocalGrid(bare, 2), record(w=np.zeros(2)), num_rounds=3)
    assert [dict(result.evaluate_metrics_clientapp[n]) for n in (1, 2, 3)] == [
        {"accuracy": float(n)} for n in (1, 2, 3)
    ]
    assert result.job is not None
    assert result.job.best is not None
    assert (result.job.best.round, result.job.best.metric) == (3, 6.0)
    said = [r.getMessage() for r in caplog.records if "num-examples" in r.getMessage() and r.levelname == "WARNING"]
    assert said == [
        "no number 'num-examples' in the evaluation of node-2: it is not counted in the aggregated metrics; its score "
        "counts where models are selected"
    ]
