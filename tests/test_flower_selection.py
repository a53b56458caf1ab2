"""The score that a `ClientMod` sends says of which metric it is and what is better of it, and the server follows."""

import logging
from typing import Any

import numpy as np
import pytest
from flower_parts import record
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import fed_learn as fl
from fed_learn.integrations.flower import ClientMod, FedAvg, LocalGrid


def train(message: Message, context: Context) -> Message:
    """A node that adds one."""
    arrays: Any = message.content["arrays"]
    made = record(w=arrays["w"].numpy() + 1)
    return Message(RecordDict({"arrays": made, "metrics": MetricRecord({"num-examples": 10})}), reply_to=message)


def app_of(*mods: ClientMod) -> Any:
    """Nodes that train alike, each with the mod of its partition."""
    apps = []
    for mod in mods:
        apps.append(ClientApp(mods=[mod]))
        apps[-1].train()(train)
    return lambda message, context: apps[int(context.node_config["partition-id"]) % len(apps)](message, context)


def first_element(weights: Any, context: Context) -> float:
    """0 for the first model, 1 for the next, and so on."""
    return float(weights["w"][0])


def run(app: Any, nodes: int = 3, rounds: int = 3, handler: Any = None, **settings: Any) -> Any:
    strategy = FedAvg(handlers=[handler or fl.ModelSelectionHandler()], fraction_evaluate=0.0, **settings)
    return strategy.start(LocalGrid(app, nodes), record(w=np.zeros(2)), num_rounds=rounds).job


def left_out(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "left out of the selection" in r.getMessage()]


# Metric, mode of the mod → the round of the best model and its score.
STATED = [
    ("loss", None, 0, 0.0),
    ("badness", "min", 0, 0.0),
    ("badness", None, 3, 3.0),
    ("loss", "max", 3, 3.0),
    ("accuracy", None, 3, 3.0),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("metric", "mode", "number", "score"), STATED)
def test_a_server_that_is_told_nothing_follows_the_clients(
    metric: str, mode: Any, number: int, score: float, stream: bool
) -> None:
    mod = ClientMod(validate=first_element, validation_metric=metric, validation_mode=mode)
    job = run(app_of(mod), stream=stream)
    assert (job.best.round, job.best.metric) == (number, score)
    assert job.best.weights["w"].tolist() == [score, score]


def test_the_log_and_the_context_name_what_is_followed() -> None:
    seen = []

    class Look(fl.Handler):
        def receive_contribution(self, fl_ctx: fl.FLContext) -> None:
            seen.append((fl_ctx[fl.ContextKey.SCORE_METRIC], fl_ctx[fl.ContextKey.SCORE_MODE]))

    run(app_of(ClientMod(validate=first_element, validation_metric="loss")), rounds=1, handler=Look())
    assert seen == [("loss", "min")] * 3


def test_a_score_of_another_metric_than_the_servers_is_left_out_and_the_work_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mods = [ClientMod(validate=first_element, validation_metric=m) for m in ("loss", "accuracy", "accuracy")]
    job = run(app_of(*mods), validation_metric="accuracy")
    assert [report.accepted for report in job.reports] == [("partition-0", "partition-1", "partition-2")] * 3
    assert (job.best.round, job.best.metric) == (3, 3.0)
    (line,) = left_out(caplog)
    assert line == (
        "partition-0: its score is left out of the selection of models: its ClientMod selects by 'loss' (mode='min'), "
        "and the server by 'accuracy' (mode='max'); give both the same validation_metric and validation_mode"
    )


def test_a_score_of_another_direction_than_the_servers_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    mods = [ClientMod(validate=first_element, validation_metric="badness", validation_mode=m) for m in ("min", "max")]
    for told in ({"validation_mode": "max"}, {"handler": fl.ModelSelectionHandler(mode="max")}):
        caplog.clear()
        job = run(app_of(*mods), nodes=2, **told)
        assert (job.best.round, job.best.metric) == (3, 3.0)
        (line,) = left_out(caplog)
        assert "partition-0: " in line
        assert "selects by 'badness' (mode='min')" in line


def test_of_clients_that_disagree_the_most_are_followed_whoever_answers_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mods = [ClientMod(validate=first_element, validation_metric=m) for m in ("accuracy", "loss", "loss")]
    job = run(app_of(*mods))
    assert (job.best.round, job.best.metric) == (0, 0.0)
    (line,) = left_out(caplog)
    assert line.startswith("partition-0: its score")
    assert "selects by 'accuracy' (mode='max'), and the other clients by 'loss' (mode='min')" in line


def test_of_several_scores_the_one_by_which_the_server_selects_counts(caplog: pytest.LogCaptureFixture) -> None:
    mod = ClientMod(validate=lambda weights, _: {"accuracy": 1.0, "loss": float(weights["w"][0]) + 2})
    job = run(app_of(mod), validation_metric="loss")
    assert (job.best.round, job.best.metric) == (0, 2.0)
    assert not left_out(caplog)


def test_what_the_server_is_told_of_a_metric_with_the_name_of_a_loss_is_followed_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = run(app_of(ClientMod(validate=first_element, validation_metric="loss")), validation_mode="max")
    assert (job.best.round, job.best.metric) == (3, 3.0)
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "other way round" in r.message]
    assert len(told) == 1


def test_scores_without_a_name_come_first_and_the_direction_stays(caplog: pytest.LogCaptureFixture) -> None:
    def unnamed(message: Message, context: Context) -> Message:
        number = int(message.metadata.group_id)
        if context.node_config["partition-id"] == 0 and number > 1:
            return app_of(ClientMod(validate=first_element, validation_metric="loss"))(message, context)  # type: ignore[no-any-return]
        reply = train(message, context)
        metrics, arrays = reply.content.metric_records["metrics"], message.content.array_records["arrays"]
        metrics["initial_validation_metric"] = first_element({"w": arrays["w"].numpy()}, context)
        return reply

    job = run(unnamed, nodes=2, rounds=2)
    assert (job.best.round, job.best.metric) == (1, 1.0)
    (line,) = left_out(caplog)
    assert "selects by 'loss' (mode='min'), and the server by a score without a name (mode='max')" in line


def test_another_direction_is_refused_by_the_mod() -> None:
    with pytest.raises(ValueError, match="validation_mode must be 'max' or 'min', not 'least'"):
        ClientMod(validation_mode="least")
