"""`ClientMod` around a `ClientApp`: what it adds to replies, and the client's events."""

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import message_size_mod

import fed_learn as fl
from fed_learn.integrations.flower import ClientMod, LocalGrid, to_record, to_weights
from fed_learn.integrations.flower.mod import FLOWER_CONTEXT

E = fl.EventType


class Log(fl.Handler):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.contexts: list[dict[str, Any]] = []

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        self.events.append(event)
        self.contexts.append(dict(ctx))


def validate(weights: Any, context: Context) -> dict[str, float]:
    return {"accuracy": float(weights["w"].sum()), "loss": 0.5}


def answer(mod: Any, kind: str = "train", group: str = "3", config: Any = None, others: Any = ()) -> Message:
    """The reply of an app with this mod to one message, which brings ones."""
    app = ClientApp(mods=[*others, mod])
    app.evaluate()(mod.evaluate)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        weights = to_weights(message.content.array_records["arrays"])["w"] * 3
        content = RecordDict({"arrays": to_record({"w": weights}), "metrics": MetricRecord({"num-examples": 7})})
        return Message(content, reply_to=message)

    @app.train("fails")
    def fail(message: Message, context: Context) -> Message:
        return Message(Error(5, "no disk"), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict({"config": ConfigRecord({"there": True})}), reply_to=message)

    grid = LocalGrid(app, 2)
    content = RecordDict(
        {"arrays": to_record({"w": np.array([1, 1], np.float32)}), "config": ConfigRecord(config or {})}
    )
    (reply,) = grid.send_and_receive([Message(content, 3, kind, group_id=group)])
    assert isinstance(reply, Message)
    return reply


def test_a_reply_says_who_sent_it_for_which_round_and_what_the_received_model_scored() -> None:
    content = answer(ClientMod(validate=validate)).content
    assert dict(content.config_records["fed_learn"]) == {"contributor": "partition-1", "round": 2, "kind": "full"}
    assert dict(content.metric_records["metrics"]) == {
        "num-examples": 7,
        "initial_accuracy": 2.0,
        "initial_loss": 0.5,
        "initial_validation_metric": 2.0,
    }
    assert to_weights(content.array_records["arrays"])["w"].tolist() == [3, 3]


def test_the_round_of_flowers_own_strategies_is_in_the_configuration() -> None:
    content = answer(ClientMod(), group="", config={"server-round": 5}).content
    assert content.config_records["fed_learn"]["round"] == 4
    assert "round" not in answer(ClientMod(), group="").content.config_records["fed_learn"]


def test_a_node_may_have_a_name_of_its_own() -> None:
    content = answer(ClientMod(name=lambda context: f"hospital-{context.node_config['partition-id']}")).content
    assert content.config_records["fed_learn"]["contributor"] == "hospital-1"


def test_the_difference_is_sent_in_the_place_of_the_weights() -> None:
    content = answer(ClientMod(kind=fl.Kind.DIFF)).content
    assert to_weights(content.array_records["arrays"])["w"].tolist() == [2, 2]
    assert content.config_records["fed_learn"]["kind"] == "diff"


def test_handlers_see_training_with_its_context() -> None:
    log = Log()
    answer(ClientMod(handlers=[log]))
    assert log.events == [E.STARTUP, E.GET_MODEL, E.RECEIVE_MODEL, E.SHUTDOWN]
    ctx = log.contexts[2]
    assert (ctx[fl.ContextKey.CONTRIBUTOR], ctx[fl.ContextKey.ROUND]) == ("partition-1", 2)
    assert ctx[FLOWER_CONTEXT].node_id == 3


def test_handlers_see_an_evaluation_and_its_result() -> None:
    log = Log()
    reply = answer(ClientMod(handlers=[log], validate=validate), kind="evaluate")
    assert log.events == [E.STARTUP, E.RECEIVE_VALIDATION_MODEL, E.SEND_VALIDATION_RESULTS, E.SHUTDOWN]
    (result,) = log.contexts[2][fl.ContextKey.VALIDATION_RESULTS]
    assert (result.contributor, result.metrics["initial_validation_metric"]) == ("partition-1", 2.0)
    assert reply.content.metric_records["metrics"]["initial_validation_metric"] == 2.0
    assert reply.content.config_records["fed_learn"]["contributor"] == "partition-1"


def test_a_handler_replaces_the_model_that_is_trained() -> None:
    class Tens(fl.Handler):
        def receive_model(self, ctx: fl.FLContext) -> None:
            ctx.set_model(fl.ModelData({"w": np.array([10, 10], np.float32)}))

    content = answer(ClientMod(handlers=[Tens()], validate=validate)).content
    assert to_weights(content.array_records["arrays"])["w"].tolist() == [30, 30]
    assert content.metric_records["metrics"]["initial_accuracy"] == 20


def test_a_handler_that_raises_is_an_error_of_the_reply_and_the_others_are_shut_down() -> None:
    class Failing(fl.Handler):
        def receive_model(self, ctx: fl.FLContext) -> None:
            raise RuntimeError("boom")

    log = Log()
    reply = answer(ClientMod(handlers=[log, Failing()]))
    assert reply.has_error()
    assert "boom" in (reply.error.reason or "")
    assert log.events[-1] == E.SHUTDOWN


def test_an_error_of_the_app_passes_as_it_is() -> None:
    reply = answer(ClientMod(validate=validate), kind="train.fails")
    assert (reply.error.code, reply.error.reason) == (5, "no disk")


def test_messages_without_a_model_pass_as_they_are() -> None:
    log = Log()
    assert answer(ClientMod(handlers=[log]), kind="query").content.config_records["config"]["there"] is True
    assert log.events == []


def test_a_validation_without_the_metric_to_select_by_is_an_error() -> None:
    reply = answer(ClientMod(validate=lambda weights, context: {"loss": 1.0}))
    assert "no 'accuracy' to select by" in (reply.error.reason or "")


def test_other_mods_go_beside_it() -> None:
    content = answer(ClientMod(validate=validate), others=[message_size_mod]).content
    assert content.metric_records["metrics"]["initial_accuracy"] == 2.0


def test_what_is_no_handler_is_refused() -> None:
    with pytest.raises(TypeError, match="no handler"):
        ClientMod(handlers=[Log])  # type: ignore[list-item]


def test_an_app_without_metrics_gets_a_record_of_its_own() -> None:
    mod = ClientMod(validate=validate)

    def bare(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord()}), reply_to=message)

    content = RecordDict({"arrays": to_record({"w": np.array([1, 1], np.float32)})})
    app = ClientApp(mods=[mod])
    app.train()(bare)
    (reply,) = LocalGrid(app, 1).send_and_receive([Message(content, 2, "train")])
    assert reply.content.metric_records["metrics"]["initial_validation_metric"] == 2.0
