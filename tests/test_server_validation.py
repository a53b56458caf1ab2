"""`ServerValidationHandler`: when it evaluates, what it keeps, and that it shares nothing with model selection."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import AddingLearner, At, NormEvaluator, TamperingClient, clients_of, initial_weights

import fed_learn as fl
from fed_learn.handlers import EarlyStoppingHandler, JsonLinesHandler, ModelSelectionHandler, ServerValidationHandler
from fed_learn.weights import FrozenWeights

LOGGER = "fed_learn.handlers.server_validation"


class Scripted(fl.ModelEvaluator):
    """Gives the scores of a list, one after the other; an exception in it is raised."""

    metric_name = "scripted"

    def __init__(self, *scores: float | BaseException) -> None:
        self.scores = list(scores)
        self.rounds: list[int] = []

    def evaluate(self, ctx: fl.FLContext) -> None:
        self.rounds.append(ctx[fl.ContextKey.ROUND])
        score = self.scores.pop(0)
        if isinstance(score, BaseException):
            raise score
        self.score = score

    def get_metric(self) -> float:
        return self.score


def run_rounds(handler: fl.Handler, numbers: range, *, num_rounds: int | None = None) -> fl.FLContext:
    """END_AGGREGATION of each round; the model that was aggregated has its round as its one weight."""
    ctx = fl.FLContext()
    if num_rounds is not None:
        ctx[fl.ContextKey.NUM_ROUNDS] = num_rounds
    for number in numbers:
        run_round(handler, ctx, number)
    return ctx


def run_round(handler: fl.Handler, ctx: fl.FLContext, number: int) -> None:
    ctx[fl.ContextKey.ROUND] = number
    ctx.set_model(fl.ModelData({"w": np.array([float(number)])}))
    fl.fire_event(fl.EventType.END_AGGREGATION, [handler], ctx)


def summary(ctx: fl.FLContext, key: str = fl.ContextKey.BEST_AGGREGATED) -> tuple[int, float, float]:
    """Round, metric and the one weight of the best model."""
    best = ctx[key]
    assert isinstance(best, fl.BestModel)
    return best.round, best.metric, float(best.weights["w"][0])


# When


@pytest.mark.parametrize(
    ("every", "num_rounds", "expected"),
    [
        (1, 4, [0, 1, 2, 3]),
        (2, 4, [1, 3]),
        (3, 7, [2, 5, 6]),
        (3, 6, [2, 5]),
        (10, 4, [3]),
        (2, 1, [0]),
        (3, None, [2, 5]),
    ],
)
def test_it_evaluates_every_so_many_rounds_and_after_the_last(
    every: int, num_rounds: int | None, expected: list[int]
) -> None:
    evaluator = Scripted(*range(10))
    run_rounds(ServerValidationHandler(evaluator, every), range(num_rounds or 7), num_rounds=num_rounds)
    assert evaluator.rounds == expected


def test_it_evaluates_in_the_round_that_is_made_the_last() -> None:
    evaluator = Scripted(0.5)
    handler = ServerValidationHandler(evaluator, 5)
    ctx = run_rounds(handler, range(1), num_rounds=10)
    ctx[fl.ContextKey.STOP] = "enough"
    run_round(handler, ctx, 1)
    assert evaluator.rounds == [1]
    assert summary(ctx) == (1, 0.5, 1.0)


def test_it_does_nothing_at_other_events() -> None:
    evaluator = Scripted()
    handler = ServerValidationHandler(evaluator, 1)
    ctx = fl.FLContext({fl.ContextKey.ROUND: 0, fl.ContextKey.NUM_ROUNDS: 1}, model=fl.ModelData({"w": np.ones(1)}))
    for event in set(fl.EventType) - {fl.EventType.END_AGGREGATION}:
        fl.fire_event(event, [handler], ctx)
    assert evaluator.rounds == []
    assert ctx == {fl.ContextKey.ROUND: 0, fl.ContextKey.NUM_ROUNDS: 1, fl.ContextKey.BEST_AGGREGATED: None}


# What is kept


def test_the_best_is_the_model_just_aggregated_in_an_own_read_only_copy() -> None:
    ctx = fl.FLContext({fl.ContextKey.ROUND: 4})
    aggregated = {"w": np.array([3.0], np.float32)}
    ctx.set_model(fl.ModelData(aggregated))
    fl.fire_event(fl.EventType.END_AGGREGATION, [ServerValidationHandler(NormEvaluator(), 1)], ctx)
    aggregated["w"][0] = 7
    best = ctx[fl.ContextKey.BEST_AGGREGATED]
    assert (best.round, best.metric, best.metric_name) == (4, 3.0, "first_element")
    assert type(best.weights) is FrozenWeights
    assert best.weights["w"].tolist() == [3.0]
    assert best.weights["w"].dtype == np.float32
    assert not best.weights["w"].flags.writeable


def test_only_a_strictly_better_score_wins() -> None:
    ctx = run_rounds(ServerValidationHandler(Scripted(0.5, 0.5, 0.75, 0.75, 0.25), 1), range(5))
    assert summary(ctx) == (2, 0.75, 2.0)


def test_mode_min_keeps_the_smallest() -> None:
    ctx = run_rounds(ServerValidationHandler(Scripted(3.0, 1e300, 2.0, 2.0, 2.5), 1, mode="min"), range(5))
    assert summary(ctx) == (2, 2.0, 2.0)


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_min_delta_must_be_exceeded(mode: str, sign: int) -> None:
    scores = [sign * gain for gain in (0.0, 0.25, 0.2, 0.375, 0.5)]
    ctx = run_rounds(ServerValidationHandler(Scripted(*scores), 1, mode=mode, min_delta=0.25), range(5))
    assert summary(ctx) == (3, sign * 0.375, 3.0)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf], ids=str)
def test_a_score_that_is_not_finite_never_wins_and_is_logged(
    score: float, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    handler = ServerValidationHandler(Scripted(score, 0.5, score), 1, mode=mode)
    ctx = run_rounds(handler, range(1))
    assert ctx.get_prop(fl.ContextKey.BEST_AGGREGATED) is None
    assert fl.ContextKey.METRICS not in ctx
    run_round(handler, ctx, 1)
    run_round(handler, ctx, 2)
    assert summary(ctx) == (1, 0.5, 1.0)
    assert [(r.name, r.levelno) for r in caplog.records] == [(LOGGER, logging.WARNING)] * 2
    assert "round 1" in caplog.records[0].getMessage()
    assert "scripted" in caplog.records[0].getMessage()


def test_each_score_is_published_as_a_plain_float() -> None:
    ctx = run_rounds(ServerValidationHandler(Scripted(0.75, np.float64(0.25)), 1), range(2))
    assert ctx[fl.ContextKey.METRICS] == {"server_validation": 0.25}
    assert type(ctx[fl.ContextKey.METRICS]["server_validation"]) is float
    assert type(ctx[fl.ContextKey.BEST_AGGREGATED].metric) is float


def test_startup_forgets_the_best_of_an_earlier_job_and_leaves_other_keys() -> None:
    handler = ServerValidationHandler(Scripted(0.9, 0.1), 1)
    ctx = run_rounds(handler, range(1))
    ctx[fl.ContextKey.BEST_RECEIVED] = "another's"
    fl.fire_event(fl.EventType.STARTUP, [handler], ctx)
    assert ctx.get_prop(fl.ContextKey.BEST_AGGREGATED) is None
    assert ctx[fl.ContextKey.BEST_RECEIVED] == "another's"
    run_round(handler, ctx, 0)
    assert summary(ctx) == (0, 0.1, 0.0)


def test_two_handlers_with_keys_of_their_own_do_not_meet() -> None:
    ctx = fl.FLContext()
    chain = [
        ServerValidationHandler(Scripted(0.5, 0.25), 1),
        ServerValidationHandler(Scripted(0.5, 0.25), 1, mode="min", best_key="bestByLoss"),
    ]
    for number in range(2):
        ctx[fl.ContextKey.ROUND] = number
        ctx.set_model(fl.ModelData({"w": np.array([float(number)])}))
        fl.fire_event(fl.EventType.END_AGGREGATION, chain, ctx)
    assert summary(ctx) == (0, 0.5, 0.0)
    assert summary(ctx, "bestByLoss") == (1, 0.25, 1.0)


# Failures


def test_an_evaluator_that_raises_leaves_the_best_so_far_and_no_trace_of_the_round() -> None:
    error = RuntimeError("no data")
    handler = ServerValidationHandler(Scripted(0.5, error, 0.75), 1)
    ctx = run_rounds(handler, range(1))
    before = ctx[fl.ContextKey.BEST_AGGREGATED]
    with pytest.raises(fl.HandlerError) as caught:
        run_round(handler, ctx, 1)
    assert caught.value.exceptions == (error,)
    assert caught.value.failures[0].handler == f"{LOGGER}.ServerValidationHandler"
    assert ctx[fl.ContextKey.BEST_AGGREGATED] is before
    assert ctx[fl.ContextKey.METRICS] == {"server_validation": 0.5}
    run_round(handler, ctx, 2)
    assert summary(ctx) == (2, 0.75, 2.0)


def test_what_an_evaluator_did_to_the_context_before_it_raised_is_undone() -> None:
    class Meddling(NormEvaluator):
        def evaluate(self, ctx: fl.FLContext) -> None:
            ctx.clear()
            ctx.set_model(None)
            ctx.add_metadata("half", "done")
            raise OSError("no data")

    model = fl.ModelData({"w": np.ones(1)})
    ctx = fl.FLContext({fl.ContextKey.ROUND: 0}, model=model)
    with pytest.raises(fl.HandlerError):
        fl.fire_event(fl.EventType.END_AGGREGATION, [ServerValidationHandler(Meddling(), 1)], ctx)
    assert ctx == {fl.ContextKey.ROUND: 0}
    assert ctx.get_model() is model
    assert ctx.get_all_metadata() == {}


def test_a_metric_that_is_no_number_is_a_failure_of_the_handler() -> None:
    ctx = fl.FLContext()
    with pytest.raises(
        fl.HandlerError, match=r"Scripted.get_metric\(\) returned 'high'; it must return one number"
    ) as caught:
        run_round(ServerValidationHandler(Scripted("high"), 1), ctx, 0)  # type: ignore[arg-type]
    assert isinstance(caught.value.exceptions[0], TypeError)
    assert ctx.get_prop(fl.ContextKey.BEST_AGGREGATED) is None


def test_an_interrupted_evaluation_leaves_the_context_as_it_was() -> None:
    handler = ServerValidationHandler(Scripted(0.5, KeyboardInterrupt()), 1)
    ctx = run_rounds(handler, range(1))
    with pytest.raises(KeyboardInterrupt):
        run_round(handler, ctx, 1)
    assert summary(ctx) == (0, 0.5, 0.0)


# Arguments


def test_the_page_can_be_called_by_position_and_by_name() -> None:
    evaluator = NormEvaluator()
    for handler in (
        ServerValidationHandler(evaluator, 3),
        ServerValidationHandler(evaluator=evaluator, num_rounds_per_valid=3),
    ):
        assert handler.evaluator is evaluator
        assert handler.num_rounds_per_valid == 3


def test_an_evaluator_needs_no_base_class() -> None:
    class Duck:
        def evaluate(self, ctx: fl.FLContext) -> None:
            pass

        def get_metric(self) -> float:
            return 0.5

    ctx = run_rounds(ServerValidationHandler(Duck(), 1), range(1))  # type: ignore[arg-type]
    assert ctx[fl.ContextKey.BEST_AGGREGATED].metric == 0.5
    assert ctx[fl.ContextKey.BEST_AGGREGATED].metric_name == "server_validation_metric"


@pytest.mark.parametrize(
    "evaluator", [None, object(), "evaluator", lambda ctx: 0.5], ids=["None", "object", "str", "function"]
)
def test_what_cannot_evaluate_is_refused(evaluator: Any) -> None:
    with pytest.raises(TypeError, match="evaluate"):
        ServerValidationHandler(evaluator, 1)


@pytest.mark.parametrize("every", [0, -1])
def test_a_cadence_below_one_is_refused(every: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ServerValidationHandler(NormEvaluator(), every)


@pytest.mark.parametrize("every", [True, 2.0, "2", None])
def test_a_cadence_that_is_no_int_is_refused(every: Any) -> None:
    with pytest.raises(TypeError, match="must be an int"):
        ServerValidationHandler(NormEvaluator(), every)


@pytest.mark.parametrize("arguments", [{"mode": "best"}, {"min_delta": -1.0}, {"min_delta": math.nan}], ids=str)
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ServerValidationHandler(NormEvaluator(), 1, **arguments)


def test_a_metric_that_looks_like_a_loss_warns_unless_the_smallest_is_asked_for() -> None:
    class Loss(NormEvaluator):
        metric_name = "validation_loss"

    with pytest.warns(UserWarning, match="'validation_loss' looks like a loss") as caught:
        ServerValidationHandler(Loss(), 1, mode="max")
    assert caught[0].filename == __file__
    assert ServerValidationHandler(Loss(), 1, mode="min").mode == "min"  # warnings are errors


# In a job


def by_value(weights: Any) -> float:
    return float(weights["b"][0])


class FirstOfB(NormEvaluator):
    """Scores a model by the first element of its variable `b`."""

    def evaluate(self, ctx: fl.FLContext) -> None:
        assert ctx.model is not None
        assert ctx.model.weights is not None
        self.metric = self.scale * by_value(ctx.model.weights)


def test_selection_and_validation_keep_models_of_their_own() -> None:
    # The clients like large models, the server small ones: 0, 1, 2 are received, 1, 2, 3 aggregated.
    chain = [ModelSelectionHandler(), ServerValidationHandler(FirstOfB(-1.0), 1)]
    server = fl.FederatedServer(initial_weights(), num_rounds=3, handlers=chain)
    result = server.run(clients_of({"a": AddingLearner(1, score=by_value)}))
    received, aggregated = server.ctx[fl.ContextKey.BEST_RECEIVED], server.ctx[fl.ContextKey.BEST_AGGREGATED]
    assert (received.round, received.metric, by_value(received.weights)) == (3, 3.0, 3.0)
    assert (aggregated.round, aggregated.metric, by_value(aggregated.weights)) == (0, -1.0, 1.0)
    assert result.best is aggregated
    assert [dict(report.metrics) for report in result.reports] == [
        {"selection": 0.0, "server_validation": -1.0},
        {"selection": 1.0, "server_validation": -2.0},
        {"selection": 2.0, "server_validation": -3.0},
    ]


def test_the_order_of_the_two_handlers_does_not_matter() -> None:
    results = []
    for order in (1, -1):
        chain = [ModelSelectionHandler(), ServerValidationHandler(FirstOfB(-1.0), 1)][::order]
        server = fl.FederatedServer(initial_weights(), num_rounds=3, handlers=chain)
        server.run(clients_of({"a": AddingLearner(1, score=by_value)}))
        ctx = server.ctx
        results.append([(ctx[k].round, ctx[k].metric) for k in ("_bestReceived", "_bestAggregated")])
    assert results == [[(3, 3.0), (0, -1.0)]] * 2


def test_a_job_that_stops_early_has_its_last_model_validated() -> None:
    stop = At(fl.EventType.BEFORE_AGGREGATION, lambda ctx: ctx.set_prop(fl.ContextKey.STOP, "enough"))
    server = fl.FederatedServer(
        initial_weights(), num_rounds=9, handlers=[stop, ServerValidationHandler(FirstOfB(), 5)]
    )
    result = server.run(clients_of({"a": AddingLearner(1)}))
    assert len(result.reports) == 1
    assert result.best is not None
    assert (result.best.round, result.best.metric) == (0, 1.0)


def test_a_last_round_that_fails_does_not_leave_the_job_without_a_validated_model() -> None:
    # Rounds 0 and 1 aggregate, the last has no contribution, and every third is validated.
    server = fl.FederatedServer(
        initial_weights(), num_rounds=3, handlers=[ServerValidationHandler(FirstOfB(), 3)], min_contributions=1
    )
    result = server.run(clients_of({"a": AddingLearner(1, absent=[2])}))
    assert result.reports[2].error is not None
    assert by_value(result.weights) == 2.0
    assert result.best is not None
    assert (result.best.metric, by_value(result.best.weights)) == (2.0, 2.0)


def test_the_score_of_a_last_round_that_fails_is_in_its_report_and_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    server = fl.FederatedServer(
        initial_weights(),
        num_rounds=3,
        handlers=[ServerValidationHandler(FirstOfB(), 3), JsonLinesHandler(path)],
        min_contributions=1,
    )
    result = server.run(clients_of({"a": AddingLearner(1, absent=[2])}))
    expected = [{}, {}, {"server_validation": 2.0}]
    assert [dict(report.metrics) for report in result.reports] == expected
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["metrics"] for line in lines if line["type"] == "round"] == expected
    assert result.best is not None
    assert (result.best.round, result.best.metric) == (1, 2.0)


def test_a_metric_that_any_handler_publishes_at_the_end_of_a_round_is_in_the_report() -> None:
    publish = At(fl.EventType.END_ROUND, lambda ctx: ctx.publish_metric("late", ctx[fl.ContextKey.ROUND]))
    result = fl.FederatedServer(initial_weights(), num_rounds=2, handlers=[publish]).run(
        clients_of({"a": AddingLearner(1)})
    )
    assert [dict(report.metrics) for report in result.reports] == [{"late": 0.0}, {"late": 1.0}]


def test_a_round_that_fails_is_not_validated_again() -> None:
    evaluator = Scripted(0.5, 0.25, 0.125)
    server = fl.FederatedServer(
        initial_weights(), num_rounds=3, handlers=[ServerValidationHandler(evaluator, 1)], min_contributions=1
    )
    result = server.run(clients_of({"a": AddingLearner(1, absent=[1])}))
    assert evaluator.rounds == [0, 2]
    assert [dict(report.metrics) for report in result.reports] == [
        {"server_validation": 0.5},
        {},
        {"server_validation": 0.25},
    ]


def test_a_server_told_to_log_goes_on_when_the_evaluator_raises() -> None:
    handler = ServerValidationHandler(Scripted(0.5, OSError("no data"), 0.75), 1)
    server = fl.FederatedServer(initial_weights(), num_rounds=3, handlers=[handler], on_handler_error="log")
    result = server.run(clients_of({"a": AddingLearner(1)}))
    assert [len(report.handler_failures) for report in result.reports] == [0, 1, 0]
    assert [str(failure.exception) for failure in result.handler_failures] == ["no data"]
    assert result.best is not None
    assert (result.best.round, result.best.metric) == (2, 0.75)


def test_a_refused_contribution_has_no_part_in_the_model_that_is_validated() -> None:
    def poison(contribution: fl.Contribution) -> fl.Contribution:
        bad = {name: array * np.nan if array.dtype.kind == "f" else array for name, array in initial_weights().items()}
        return fl.Contribution(contribution.contributor, bad, 1, round=contribution.round)

    server = fl.FederatedServer(
        initial_weights(),
        num_rounds=2,
        handlers=[ServerValidationHandler(FirstOfB(), 1), EarlyStoppingHandler(5)],
        min_contributions=1,
        on_bad_contribution="reject",
    )
    clients = [*clients_of({"a": AddingLearner(1)}), TamperingClient("b", AddingLearner(9), tamper=poison, rounds=[0])]
    result = server.run(clients)
    assert [report.metrics["server_validation"] for report in result.reports] == [1.0, 6.0]
