"""`ClientMod` around a `ClientApp`: what it adds to replies, the client's events, and the score of the final model."""

import logging
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import message_size_mod

import fed_learn as fl
from fed_learn.integrations.flower import ClientMod, FedAvg, LocalGrid, to_record, to_weights
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
    expected = {"contributor": "partition-1", "round": 2, "kind": "full", "scores": True, "metric": "accuracy"}
    assert dict(content.config_records["fed_learn"]) == expected
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


@pytest.mark.parametrize("error", [SystemExit, GeneratorExit, ValueError])
def test_a_handler_that_leaves_when_it_is_shut_down_costs_no_reply(error: type[BaseException]) -> None:
    class Leaving(fl.Handler):
        def shutdown(self, ctx: fl.FLContext) -> None:
            raise error("bye")

    log = Log()
    content = answer(ClientMod(handlers=[log, Leaving()])).content
    assert to_weights(content.array_records["arrays"])["w"].tolist() == [3, 3]
    assert log.events[-1] == E.SHUTDOWN


@pytest.mark.parametrize("event", [E.GET_MODEL, E.RECEIVE_MODEL])
@pytest.mark.parametrize("error", [SystemExit, GeneratorExit, ValueError])
def test_an_app_that_leaves_is_an_error_of_its_reply(error: type[BaseException], event: str) -> None:
    class Leaving(fl.Handler):
        def handle_event(self, fired: str, ctx: fl.FLContext) -> None:
            if fired == event:
                raise error("bye")

    log = Log()
    reply = answer(ClientMod(handlers=[log, Leaving()]))
    assert reply.has_error()
    assert f"{error.__name__}: bye" in (reply.error.reason or "")
    assert log.events[-1] == E.SHUTDOWN


def test_a_handler_that_garbles_the_clients_context_is_an_error_of_the_reply() -> None:
    class Tidy(fl.Handler):
        def receive_model(self, ctx: fl.FLContext) -> None:
            ctx.clear()

    reply = answer(ClientMod(handlers=[Tidy()]))
    assert "ContextError" in (reply.error.reason or "")


def test_an_error_of_the_app_passes_as_it_is() -> None:
    reply = answer(ClientMod(validate=validate), kind="train.fails")
    assert (reply.error.code, reply.error.reason) == (5, "no disk")


def test_messages_without_a_model_pass_as_they_are() -> None:
    log = Log()
    assert answer(ClientMod(handlers=[log]), kind="query").content.config_records["config"]["there"] is True
    assert log.events == []


@pytest.mark.parametrize(
    "score",
    [
        0.25,
        np.float32(0.25),
        np.array(0.25),
        torch.tensor(0.25),
        torch.ones((), requires_grad=True) / 4,
        Fraction(1, 4),
    ],
)
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_a_validation_gives_numbers_of_any_kind_by_name_or_one_alone(score: Any, by_name: bool) -> None:
    given = {"auc": score, "n": np.int64(3)} if by_name else score
    content = answer(ClientMod(validate=lambda weights, context: given, validation_metric="auc")).content
    metrics = {k: v for k, v in content.metric_records["metrics"].items() if k != "num-examples"}
    others = {"initial_n": 3.0} if by_name else {}
    assert metrics == {"initial_auc": 0.25, "initial_validation_metric": 0.25, **others}


def test_what_is_no_number_among_the_scores_is_left_out_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    given = {"accuracy": 0.5, "site": "north", "converged": np.bool_(True), "per class": [0.1, 0.9], "w": np.ones(2)}
    mod = ClientMod(validate=lambda weights, context: given)
    for _ in range(2):
        metrics = answer(mod).content.metric_records["metrics"]
        assert set(metrics) == {"num-examples", "initial_accuracy", "initial_validation_metric"}
    told = [record.getMessage() for record in caplog.records if "is no number and is left out" in record.getMessage()]
    assert len(told) == 4
    assert told[0] == "ClientMod: 'site' of validate is no number and is left out: 'north'"


@pytest.mark.parametrize(
    "given", [{"loss": 1.0}, {"accuracy": True}, {"accuracy": "0.9"}, {"accuracy": [0.9]}, (0.3, 0.9), None, "0.9", {}]
)
def test_a_validation_without_the_metric_to_select_by_is_an_error_that_names_the_form(given: Any) -> None:
    reason = answer(ClientMod(validate=lambda weights, context: given)).error.reason or ""
    wanted = "it must return a dict such as {'accuracy': 0.9}, or that number"
    missing = "to select by; ClientMod(validation_metric=) names that score"
    assert "ClientMod: validate returned" in reason
    assert wanted in reason or missing in reason or "no number; ClientMod(validation_metric=)" in reason


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


def app_of(mod: ClientMod | None, counted: list[str], **registered: Callable[[Message, Context], Message]) -> ClientApp:
    """An app that adds 1 and notes what it is called for; with `evaluate=`, one that has an evaluation."""
    app = ClientApp(mods=[] if mod is None else [mod])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        counted.append("train")
        weights = {"w": to_weights(message.content.array_records["arrays"])["w"] + 1}
        content = RecordDict({"arrays": to_record(weights), "metrics": MetricRecord({"num-examples": 7})})
        return Message(content, reply_to=message)

    for category, function in registered.items():
        getattr(app, category)()(function)
    return app


def trained(app: Any, **arguments: Any) -> Any:
    """The job's result after two rounds with two nodes; the weights begin at zero and grow by 1 a round."""
    strategy = FedAvg(handlers=[fl.ModelSelectionHandler()], **arguments)
    return strategy.start(LocalGrid(app, 2), to_record({"w": np.zeros(2, np.float32)}), num_rounds=2)


def scored(job: Any) -> dict[str, float]:
    return {result.contributor: result.metrics["initial_validation_metric"] for result in job.validation_results}


def test_the_final_model_is_scored_by_the_mod_of_an_app_without_an_evaluation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    log, counted = Log(), list[str]()
    result = trained(app_of(ClientMod(validate=validate, handlers=[log]), counted), fraction_evaluate=0.0)
    assert scored(result.job) == {"partition-0": 4.0, "partition-1": 4.0}
    assert (result.job.best.round, result.job.best.metric) == (2, 4.0)
    assert counted == ["train"] * 4
    assert log.events[-4:] == [E.STARTUP, E.RECEIVE_VALIDATION_MODEL, E.SEND_VALIDATION_RESULTS, E.SHUTDOWN]
    assert log.contexts[-2][fl.ContextKey.ROUND] == 1
    assert result.evaluate_metrics_clientapp == {}
    loud = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert loud == ["fraction_evaluate is set to 0.0. Federated evaluation will be skipped."]


def test_what_aggregates_the_metrics_of_evaluations_is_not_called_for_the_score_of_the_final_model() -> None:
    def fails(contents: list[RecordDict], key: str) -> MetricRecord:
        raise KeyError("eval_loss")

    app = app_of(ClientMod(validate=validate), [])
    result = trained(app, fraction_evaluate=0.0, evaluate_metrics_aggr_fn=fails)
    assert scored(result.job) == {"partition-0": 4.0, "partition-1": 4.0}


def test_only_nodes_with_a_mod_that_scores_are_asked_for_the_final_model() -> None:
    counted: list[str] = []
    scoring, plain = app_of(ClientMod(validate=validate), []), app_of(None, counted)

    def app(message: Message, context: Context) -> Message:
        return (scoring if context.node_config["partition-id"] == 1 else plain)(message, context)

    assert scored(trained(app, fraction_evaluate=0.0).job) == {"partition-1": 4.0}
    assert counted == ["train"] * 2


@pytest.mark.parametrize("mod", [None, ClientMod()])
def test_where_no_client_scores_the_log_says_how_the_final_model_would_be_scored(
    mod: ClientMod | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    counted: list[str] = []
    assert scored(trained(app_of(mod, counted), fraction_evaluate=0.0).job) == {}
    assert counted == ["train"] * 4
    told = [message for record in caplog.records if "final model" in (message := record.getMessage())]
    assert len(told) == 1
    assert "ClientMod(validate=...)" in told[0]


def test_a_mod_of_the_training_function_alone_scores_the_final_model_too() -> None:
    app = ClientApp()

    @app.train(mods=[ClientMod(validate=validate)])
    def train(message: Message, context: Context) -> Message:
        content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 7})})
        return Message(content, reply_to=message)

    assert scored(trained(app, fraction_evaluate=0.0).job) == {"partition-0": 0.0, "partition-1": 0.0}


def test_an_evaluation_of_the_app_is_what_scores_the_final_model_where_flower_sends_one() -> None:
    def evaluate(message: Message, context: Context) -> Message:
        w = to_weights(message.content.array_records["arrays"])["w"]
        metrics = MetricRecord({"num-examples": 1, "accuracy": float(w[0]) / 10})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    result = trained(app_of(None, [], evaluate=evaluate), validation_metric="accuracy")
    assert scored(result.job) == {"node-2": 0.2, "node-3": 0.2}
    assert (result.job.best.round, result.job.best.metric) == (2, pytest.approx(0.2))
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == pytest.approx(0.2)
