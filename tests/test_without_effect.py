"""Handlers that could have no effect in a job: an error when it starts, or after its first round, that says why."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import AddingLearner, NormEvaluator, by_value, clients_of, initial_weights, two_clients

import fed_learn as fl
from fed_learn.handlers import (
    CheckpointHandler,
    EarlyStoppingHandler,
    JsonLinesHandler,
    ModelSelectionHandler,
    ProgressHandler,
    RoundLogHandler,
    ServerValidationHandler,
)
from fed_learn.simulation.update_norms import UpdateNormHandler

Event, Key = fl.EventType, fl.ContextKey


class Measuring(AddingLearner):
    """Measures more than the accuracy."""

    def __init__(self, **more: Any) -> None:
        super().__init__(1)
        self.more = more

    def validate(self, weights: Any, ctx: fl.FLContext) -> Any:
        return {**super().validate(weights, ctx), **self.more}


def run(handlers: list[Any], num_rounds: int = 3, learner: fl.Learner | None = None, **arguments: Any) -> fl.JobResult:
    server = fl.FederatedServer(initial_weights(), num_rounds=num_rounds, handlers=handlers, **arguments)
    return server.run(clients_of({"a": learner or Measuring(loss=0.5)}))


def failure(handlers: list[Any], learner: fl.Learner | None = None) -> tuple[str, int | None, str]:
    """Event, round and message of the error that ends the job."""
    with pytest.raises(fl.HandlerError) as caught:
        run(handlers, learner=learner)
    (found,) = caught.value.failures
    return found.event, found.round, str(found.exception)


# EarlyStoppingHandler


@pytest.mark.parametrize(
    "before",
    [
        [],
        [RoundLogHandler(), UpdateNormHandler()],
        [ModelSelectionHandler(best_key="_mine")],
        [ServerValidationHandler(NormEvaluator(), 1, best_key="_mine")],
    ],
    ids=["nothing", "handlers that do not score", "a best model elsewhere", "a validation elsewhere"],
)
def test_early_stopping_with_nothing_that_selects_models_is_an_error_at_startup(before: list[fl.Handler]) -> None:
    event, _, message = failure([*before, EarlyStoppingHandler(1)])
    assert event == Event.STARTUP
    assert (
        "can have no effect: nothing before it in the handlers selects models; add ModelSelectionHandler()" in message
    )


@pytest.mark.parametrize(
    "after", [ModelSelectionHandler(), ServerValidationHandler(NormEvaluator(), 1)], ids=["selection", "validation"]
)
@pytest.mark.parametrize("before", [[], [ModelSelectionHandler(best_key="_mine")]], ids=["first", "second"])
def test_early_stopping_before_what_selects_models_is_an_error_that_says_to_put_it_after(
    before: list[fl.Handler], after: fl.Handler
) -> None:
    event, _, message = failure([*before, EarlyStoppingHandler(1), after])
    assert event == Event.STARTUP
    assert f"EarlyStoppingHandler comes before {type(after).__name__}" in message
    assert "put it after" in message


class Watching(fl.Handler):
    """One's own, which might select models and does not."""


class Selecting(fl.Handler):
    """One's own, which selects the model of the second round, and no other."""

    def before_aggregation(self, ctx: fl.FLContext) -> None:
        if ctx[Key.ROUND] == 0:
            assert ctx.model is not None
            ctx.set_prop(Key.BEST_RECEIVED, fl.BestModel(0, 1.0, "own", ctx.model.weights))  # type: ignore[arg-type]


class Publishing(fl.Handler):
    """One's own, which scores models and may select them later."""

    def before_aggregation(self, ctx: fl.FLContext) -> None:
        ctx.publish_metric("own", 0.5)


def test_early_stopping_behind_handlers_of_ones_own_that_select_nothing_is_an_error_after_the_first_round() -> None:
    event, number, message = failure([Watching(), EarlyStoppingHandler(1)])
    assert (event, number) == (Event.END_ROUND, 0)
    assert "no handler bound a best model in round 1" in message
    assert "the clients sent 'initial_validation_metric', 'initial_loss', 'initial_accuracy'" in message


def test_early_stopping_behind_a_handler_of_ones_own_that_selects_works() -> None:
    result = run([Selecting(), EarlyStoppingHandler(1)], num_rounds=9)
    assert len(result.reports) == 2
    assert result.stop_reason == "no better model than that of round 1 (own 1) for 1 round"


def test_early_stopping_behind_a_score_that_may_select_later_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert len(run([Publishing(), EarlyStoppingHandler(1)]).reports) == 3
    assert caplog.text.count("EarlyStoppingHandler can have no effect") == 1


def test_early_stopping_with_an_aggregator_of_ones_own_waits_for_what_it_calls_its_best() -> None:
    from fed_learn.server.model_aggregator import ModelAggregator

    class Own(ModelAggregator):
        pass

    server = fl.FederatedServer(
        {"w": np.zeros(2)}, num_rounds=2, handlers=[EarlyStoppingHandler(1)], aggregator=Own(), kind=fl.Kind.DIFF
    )
    with pytest.raises(fl.HandlerError, match="no handler bound a best model in round 1"):
        server.run([fl.FederatedClient("a", AddingLearner(1), kind=fl.Kind.DIFF)])


def test_early_stopping_driven_by_hand_is_not_checked_and_stops() -> None:
    handler, ctx = EarlyStoppingHandler(2), fl.FLContext()
    fl.fire_event(Event.STARTUP, [handler], ctx)
    assert Key.STOP not in ctx
    ctx.set_prop(Key.BEST_RECEIVED, fl.BestModel(0, 0.5, "own", {}))  # type: ignore[arg-type]
    reasons = []
    for number in range(3):
        ctx.set_props({Key.ROUND: number, Key.REPORT: fl.RoundReport(number, ("a",))})
        for event in (Event.BEFORE_AGGREGATION, Event.END_AGGREGATION, Event.END_ROUND):
            fl.fire_event(event, [handler], ctx)
        reasons.append(ctx.get_prop(Key.STOP))
    assert reasons == [None, None, "no better model than that of round 1 (own 0.5) for 2 rounds"]


# ModelSelectionHandler


def test_a_metric_that_nobody_sends_is_an_error_in_the_first_round_that_lists_what_is_sent() -> None:
    event, number, message = failure([ModelSelectionHandler(validation_metric_name="auc")], Measuring(auc=0.5))
    assert (event, number) == (Event.BEFORE_AGGREGATION, 0)
    assert "no client sent the metric 'auc'" in message
    assert "they sent 'initial_auc', 'initial_accuracy', 'initial_validation_metric'" in message


def test_a_metric_that_is_sent_as_no_number_is_an_error_that_shows_it() -> None:
    handler = ModelSelectionHandler(validation_metric_name="initial_auc")
    _, number, message = failure([handler], Measuring(auc="high"))
    assert number == 0
    assert message == "'initial_auc' is no number: a sent 'high'; no model could be selected"


def test_iterations_that_nobody_sends_are_an_error_where_they_are_needed() -> None:
    learner = AddingLearner(1, n_iter=None)
    event, number, message = failure([ModelSelectionHandler(weigh_by_local_iter=True)], learner)
    assert (event, number) == (Event.BEFORE_AGGREGATION, 0)
    assert "no client sent its local iterations (n_iter)" in message


def contributions(*metrics: Mapping[str, float]) -> tuple[fl.Contribution, ...]:
    return tuple(fl.Contribution(f"site-{i}", None, 1, metrics=m) for i, m in enumerate(metrics))


def select(handler: ModelSelectionHandler, ctx: fl.FLContext, *metrics: Mapping[str, float]) -> None:
    ctx.set_prop(Key.CONTRIBUTIONS, contributions(*metrics))
    fl.fire_event(Event.BEFORE_AGGREGATION, [handler], ctx)


def started(handler: fl.Handler, **props: Any) -> fl.FLContext:
    ctx = fl.FLContext({Key.ROUND: 0, **props}, model=fl.ModelData({"w": np.zeros(1)}))
    fl.fire_event(Event.STARTUP, [handler], ctx)
    return ctx


def test_a_metric_that_only_some_send_or_that_is_nan_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    handler = ModelSelectionHandler()
    ctx = started(handler)
    select(handler, ctx, {"loss": 1.0}, {"initial_validation_metric": math.nan})
    assert Key.BEST_RECEIVED not in ctx
    assert "selection" not in ctx.get_prop(Key.METRICS, {})
    assert [record.getMessage() for record in caplog.records] == [
        "site-0 is left out of model selection: its 'initial_validation_metric' is None",
        "site-1 is left out of model selection: its 'initial_validation_metric' is nan",
        "round 1: no client sent a usable 'initial_validation_metric', so its model has no score",
    ]
    select(handler, ctx, {"loss": 1.0}, {"initial_validation_metric": 0.25})
    assert (ctx[Key.BEST_RECEIVED].metric, ctx[Key.METRICS]["selection"]) == (0.25, 0.25)


def test_a_round_without_contributions_says_nothing_of_the_metric() -> None:
    handler = ModelSelectionHandler()
    ctx = started(handler)
    select(handler, ctx)
    with pytest.raises(fl.HandlerError, match="no client sent the metric"):
        select(handler, ctx, {"loss": 1.0})


def test_a_metric_that_was_sent_once_may_be_missing_later() -> None:
    handler = ModelSelectionHandler()
    ctx = started(handler)
    select(handler, ctx, {"initial_validation_metric": 0.5})
    select(handler, ctx, {"loss": 1.0})
    assert ctx[Key.BEST_RECEIVED].metric == 0.5


def test_scores_that_come_late_are_waited_for() -> None:
    handler = ModelSelectionHandler()
    ctx = started(handler, **{Key.SCORES_LATE: True})
    select(handler, ctx, {"loss": 1.0})
    select(handler, ctx, {"initial_validation_metric": 0.5})
    assert ctx[Key.BEST_RECEIVED].metric == 0.5


def test_a_client_that_is_left_out_is_warned_of_once_in_a_job(caplog: pytest.LogCaptureFixture) -> None:
    handler = ModelSelectionHandler()
    for _ in range(2):
        caplog.clear()
        ctx = started(handler)
        for _ in range(3):
            select(handler, ctx, {"initial_validation_metric": 0.5}, {}, {"initial_validation_metric": math.inf})
        warned = [r.getMessage().split()[0] for r in caplog.records if r.levelno == logging.WARNING]
        assert warned == ["site-1", "site-2"]


def test_weights_of_model_selection_that_name_nobody_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    run([ModelSelectionHandler(aggregation_weights={"site_1": 2.0})])
    assert caplog.text.count("aggregation_weights of model selection name no client of this round: 'site_1'") == 1
    caplog.clear()
    run([ModelSelectionHandler()])
    run([ModelSelectionHandler(aggregation_weights={"a": 2.0, "z": 2.0})])
    assert "aggregation_weights" not in caplog.text


# Several of a kind


def test_two_selectors_and_two_validators_publish_under_names_of_their_own() -> None:
    handlers = [
        ModelSelectionHandler(),
        ModelSelectionHandler(validation_metric_name="initial_loss", best_key="_byLoss"),
        ServerValidationHandler(NormEvaluator(), 1),
        ServerValidationHandler(NormEvaluator(-1.0), 2, best_key="_other"),
    ]
    result = run(handlers, num_rounds=2)
    first, second = ({**report.metrics} for report in result.reports)
    assert first == {"selection": 0.5, "selection/_byLoss": 0.5, "server_validation": 1.0}
    assert second == {**first, "server_validation": 2.0, "server_validation/_other": -2.0}


@pytest.mark.parametrize(
    "handlers",
    [
        [ModelSelectionHandler(), ModelSelectionHandler(validation_metric_name="initial_loss")],
        [ServerValidationHandler(NormEvaluator(), 1), ServerValidationHandler(NormEvaluator(), 2)],
        [ModelSelectionHandler(best_key="_mine"), ServerValidationHandler(NormEvaluator(), 2, best_key="_mine")],
        [ModelSelectionHandler()] * 2,
    ],
    ids=["selectors", "validators", "one of each", "one twice"],
)
def test_two_handlers_that_bind_the_same_key_are_an_error_that_says_how_to_give_another(handlers: list[Any]) -> None:
    event, _, message = failure(handlers)
    assert event == Event.STARTUP
    assert " and ".join(type(handler).__name__ for handler in handlers) in message
    assert "best_key='_otherBest'" in message


def test_a_validation_more_seldom_than_there_are_rounds_validates_the_last() -> None:
    result = run([ServerValidationHandler(NormEvaluator(), 100)], num_rounds=2)
    assert [dict(report.metrics) for report in result.reports] == [{}, {"server_validation": 2.0}]


# On a client


@pytest.mark.parametrize(
    "make",
    [
        lambda path: CheckpointHandler(path),
        lambda path: JsonLinesHandler(path / "job.jsonl"),
        lambda path: EarlyStoppingHandler(1),
        lambda path: ModelSelectionHandler(),
        lambda path: ProgressHandler(),
        lambda path: RoundLogHandler(),
        lambda path: ServerValidationHandler(NormEvaluator(), 1),
        lambda path: UpdateNormHandler(),
    ],
)
def test_a_handler_of_servers_on_a_client_is_an_error_when_it_starts(make: Any, tmp_path: Path) -> None:
    handler = make(tmp_path)
    client = fl.FederatedClient("site-7", AddingLearner(), handlers=[handler])
    with pytest.raises(
        fl.HandlerError, match="the client 'site-7' does not have: it belongs into the handlers= of the"
    ):
        client.start(1)
    assert list(tmp_path.iterdir()) == []


def test_a_handler_of_servers_that_was_made_to_act_on_a_client_may() -> None:
    seen = []

    class Logging(RoundLogHandler):
        def receive_model(self, ctx: fl.FLContext) -> None:
            seen.append(ctx[Key.ROUND])

    fl.FederatedServer(initial_weights(), num_rounds=2).run(two_clients([Logging()]))
    assert sorted(seen) == [0, 0, 1, 1]


# A job that ends by an error


class FailingLate(fl.Handler):
    """Raises at one event of one round."""

    def __init__(self, event: str, number: int) -> None:
        self.event = event
        self.number = number

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        if event == self.event and ctx[Key.ROUND] == self.number:
            raise OSError("disk full")


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    ("event", "aggregated"),
    [(Event.START_ROUND, 2), (Event.BEFORE_AGGREGATION, 2), (Event.END_AGGREGATION, 3), (Event.END_ROUND, 3)],
)
def test_a_handler_that_fails_in_a_late_round_loses_nothing(
    event: str, aggregated: int, place: str, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    keeping: list[fl.Handler] = [ModelSelectionHandler(), CheckpointHandler(tmp_path)]
    failing = FailingLate(event, 2)
    server = fl.FederatedServer(
        initial_weights(), num_rounds=9, handlers=[failing, *keeping] if place == "before" else [*keeping, failing]
    )
    with pytest.raises(fl.HandlerError, match=f"at {event} of round 3: OSError: disk full") as caught:
        server.run(clients_of({"a": AddingLearner(1, score=by_value)}))
    result = caught.value.result
    assert by_value(result.weights) == aggregated
    assert [report.round for report in result.reports] == [0, 1, 2]
    assert [len(report.handler_failures) for report in result.reports] == [0, 0, 1]
    best = 1 if event == Event.START_ROUND else 2
    assert (result.best.round, result.best.metric) == (best, best)
    assert by_value(load_file(tmp_path / "global.safetensors")) == aggregated
    assert by_value(load_file(tmp_path / "best.safetensors")) == best


def test_every_error_of_the_library_that_ends_a_job_carries_what_there_is_so_far() -> None:
    def leave(ctx: fl.FLContext) -> None:
        if ctx[Key.ROUND] == 2:
            raise RuntimeError("out of memory")

    with pytest.raises(fl.TooFewContributionsError) as caught:
        run([ModelSelectionHandler()], num_rounds=9, learner=AddingLearner(1, during=leave))
    result = caught.value.result
    assert by_value(result.weights) == 2
    assert [report.round for report in result.reports] == [0, 1, 2]
    assert result.quits[0].cause == "RuntimeError"


def test_a_job_that_ends_while_others_models_are_validated_ends_with_its_own_on_disk(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    class Late(fl.Handler):
        def receive_validation_results(self, ctx: fl.FLContext) -> None:
            if ctx[Key.VALIDATION_RESULTS][-1].model != "final":
                raise OSError("disk full")

    with pytest.raises(fl.HandlerError, match="at _receiveValidationResults: OSError") as caught:
        run([ModelSelectionHandler(), CheckpointHandler(tmp_path), Late()], num_rounds=2)
    assert by_value(caught.value.result.weights) == by_value(load_file(tmp_path / "global.safetensors")) == 2
