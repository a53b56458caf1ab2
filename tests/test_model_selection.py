"""`ModelSelectionHandler`: how the models that clients received are scored, and which one is kept.

Most tests drive the handler by hand, with a context and no server.
"""

import logging
import math
import pickle
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from federation import AddingLearner, At, TamperingClient, clients_of, initial_weights, raising
from hypothesis import given
from hypothesis import strategies as st

import fed_learn as fl
from fed_learn.contribution import FINAL_MODEL, GLOBAL_BEST
from fed_learn.handlers import ModelSelectionHandler
from fed_learn.values import RunningMean, mean_of
from fed_learn.weights import FrozenWeights

pytestmark = pytest.mark.quick

METRIC = "initial_validation_metric"
LOGGER = "fed_learn.handlers.model_selection"


def contribution(
    contributor: str,
    metric: float | None,
    n_iter: int | None = None,
    *,
    aggregation_weight: float = 1,
    name: str = METRIC,
) -> fl.Contribution:
    metrics = {} if metric is None else {name: metric}
    return fl.Contribution(contributor, None, aggregation_weight, n_iter=n_iter, metrics=metrics)


def context(number: int = 0, value: float = 0.0) -> fl.FLContext:
    """The server's context in a round, with a model whose one weight is `value`."""
    return fl.FLContext({fl.ContextKey.ROUND: number}, model=fl.ModelData({"w": np.array([value])}))


def run_round(
    handler: fl.Handler, ctx: fl.FLContext, number: int, contributions: Sequence[fl.Contribution], value: float = 0.0
) -> None:
    """BEFORE_AGGREGATION of a round, in which the clients received a model with the one weight `value`."""
    ctx.set_props({fl.ContextKey.ROUND: number, fl.ContextKey.CONTRIBUTIONS: tuple(contributions)})
    ctx.set_model(fl.ModelData({"w": np.array([value])}))
    fl.fire_event(fl.EventType.BEFORE_AGGREGATION, [handler], ctx)


def receive_results(
    handler: fl.Handler,
    ctx: fl.FLContext,
    metrics: Mapping[str, float],
    *,
    model: str = FINAL_MODEL,
    number: int = 5,
    value: float = 99.0,
    n_iter: Mapping[str, int] | None = None,
) -> list[fl.BestModel | None]:
    """RECEIVE_VALIDATION_RESULTS for each client; the best model after each."""
    ctx.set_prop(fl.ContextKey.ROUND, number)
    ctx.set_model(fl.ModelData({"w": np.array([value])}))
    results: tuple[fl.ValidationResult, ...] = ()
    bests = []
    for contributor, metric in metrics.items():
        n = (n_iter or {}).get(contributor)
        results = (*results, fl.ValidationResult(contributor, model, {METRIC: metric}, n))
        ctx.set_prop(fl.ContextKey.VALIDATION_RESULTS, results)
        fl.fire_event(fl.EventType.RECEIVE_VALIDATION_RESULTS, [handler], ctx)
        bests.append(ctx.get_prop(fl.ContextKey.BEST_RECEIVED))
    return bests


def best_of(ctx: fl.FLContext) -> fl.BestModel:
    best = ctx[fl.ContextKey.BEST_RECEIVED]
    assert isinstance(best, fl.BestModel)
    return best


def summary(ctx: fl.FLContext) -> tuple[int, float, float]:
    """Round, metric and the one weight of the best model."""
    best = best_of(ctx)
    return best.round, best.metric, float(best.weights["w"][0])


# The formula


def test_the_score_is_the_plain_mean_by_default() -> None:
    ctx = context()
    run_round(ModelSelectionHandler(), ctx, 0, [contribution("a", 0.5, 10), contribution("b", 0.75, 30)])
    assert best_of(ctx).metric == 0.625
    assert best_of(ctx).metric_name == METRIC


def test_the_aggregation_weight_of_a_contribution_does_not_matter() -> None:
    ctx = context()
    heavy = contribution("b", 0.75, aggregation_weight=1000)
    run_round(ModelSelectionHandler(), ctx, 0, [contribution("a", 0.5), heavy])
    assert best_of(ctx).metric == 0.625


def test_the_handlers_own_weights_count_and_those_it_does_not_name_count_one() -> None:
    ctx = context()
    handler = ModelSelectionHandler(aggregation_weights={"a": 2.0, "b": 0.0})
    run_round(handler, ctx, 0, [contribution("a", 0.25), contribution("b", 100.0), contribution("c", 1.0)])
    assert best_of(ctx).metric == (2 * 0.25 + 1 * 1.0) / 3


def test_local_iterations_weigh_when_asked_for() -> None:
    ctx = context()
    handler = ModelSelectionHandler(weigh_by_local_iter=True)
    run_round(handler, ctx, 0, [contribution("a", 0.5, 1), contribution("b", 0.75, 3)])
    assert best_of(ctx).metric == 0.6875


def test_iterations_and_weights_multiply() -> None:
    ctx = context()
    handler = ModelSelectionHandler(True, METRIC, {"a": 3.0, "b": 0.5})
    entries = [contribution("a", 0.5, 2), contribution("b", 0.25, 4), contribution("c", 0.75, 8)]
    run_round(handler, ctx, 0, entries)
    assert best_of(ctx).metric == (0.5 * 2 * 3 + 0.25 * 4 * 0.5 + 0.75 * 8) / (2 * 3 + 4 * 0.5 + 8)


def test_the_metric_is_found_by_its_name() -> None:
    ctx = context()
    entry = fl.Contribution("a", None, 1, metrics={METRIC: 0.1, "dice": 0.9})
    run_round(ModelSelectionHandler(False, "dice"), ctx, 0, [entry])
    assert (best_of(ctx).metric, best_of(ctx).metric_name) == (0.9, "dice")


def test_the_score_of_each_round_is_published() -> None:
    ctx = context()
    handler = ModelSelectionHandler()
    run_round(handler, ctx, 0, [contribution("a", 0.5)])
    assert ctx[fl.ContextKey.METRICS] == {"selection": 0.5}
    run_round(handler, ctx, 1, [contribution("a", 0.25)])
    assert ctx[fl.ContextKey.METRICS] == {"selection": 0.25}
    assert best_of(ctx).round == 0


# What is left out


@pytest.mark.parametrize("metric", [None, math.nan, math.inf, -math.inf], ids=str)
def test_a_missing_or_non_finite_metric_is_left_out_and_logged_by_name(
    metric: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    ctx = context()
    entries = [contribution("site-7", metric), contribution("b", 0.5), contribution("c", 0.25)]
    run_round(ModelSelectionHandler(), ctx, 0, entries)
    assert best_of(ctx).metric == 0.375
    assert [(r.name, r.levelno) for r in caplog.records] == [(LOGGER, logging.WARNING)]
    assert "site-7" in caplog.text
    assert METRIC in caplog.text


@pytest.mark.parametrize("n_iter", [None, 0, -3])
def test_missing_iterations_are_left_out_and_logged_where_they_are_needed(
    n_iter: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    entries = [contribution("site-7", 1.0, n_iter), contribution("b", 0.5, 4)]
    ctx = context()
    run_round(ModelSelectionHandler(weigh_by_local_iter=True), ctx, 0, entries)
    assert best_of(ctx).metric == 0.5
    assert "site-7" in caplog.text
    assert "n_iter" in caplog.text


@pytest.mark.parametrize("n_iter", [None, 0, -3])
def test_missing_iterations_do_not_matter_where_they_are_not_needed(
    n_iter: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    ctx = context()
    run_round(ModelSelectionHandler(), ctx, 0, [contribution("a", 1.0, n_iter), contribution("b", 0.5, 4)])
    assert best_of(ctx).metric == 0.75
    assert caplog.records == []


def test_a_round_that_is_aggregated_in_parts_is_scored_with_all_of_them() -> None:
    ctx = context()
    handler = ModelSelectionHandler()
    run_round(handler, ctx, 0, [contribution("a", 0.9), contribution("b", 0.9)])
    assert best_of(ctx).metric == 0.9
    ctx[fl.ContextKey.CONTRIBUTIONS] = (contribution("c", 0.1), contribution("d", 0.1))
    fl.fire_event(fl.EventType.BEFORE_AGGREGATION, [handler], ctx)
    assert (best_of(ctx).round, best_of(ctx).metric) == (0, 0.5)
    run_round(handler, ctx, 1, [contribution("a", 0.6), contribution("b", 0.6)])
    assert (best_of(ctx).round, best_of(ctx).metric) == (1, 0.6)


def test_a_model_without_variables_is_not_selected() -> None:
    ctx = fl.FLContext({fl.ContextKey.ROUND: 0}, model=fl.ModelData({}))
    ctx[fl.ContextKey.CONTRIBUTIONS] = (contribution("a", 1.0),)
    fl.fire_event(fl.EventType.BEFORE_AGGREGATION, [ModelSelectionHandler()], ctx)
    assert ctx[fl.ContextKey.METRICS] == {"selection": 1.0}
    assert fl.ContextKey.BEST_RECEIVED not in ctx


def test_a_round_in_which_nobody_has_a_metric_selects_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    ctx = context()
    handler = ModelSelectionHandler()
    run_round(handler, ctx, 0, [contribution("a", None), contribution("b", math.nan)])
    assert fl.ContextKey.BEST_RECEIVED not in ctx
    assert fl.ContextKey.METRICS not in ctx
    text = "round 1: no client sent a usable 'initial_validation_metric', so its model has no score"
    assert caplog.messages.count(text) == 1
    run_round(handler, ctx, 1, [contribution("a", -5.0)])
    assert summary(ctx) == (1, -5.0, 0.0)


def test_a_round_without_contributions_or_with_weight_zero_alone_selects_nothing() -> None:
    ctx = context()
    run_round(ModelSelectionHandler(), ctx, 0, [])
    run_round(ModelSelectionHandler(aggregation_weights={"a": 0.0}), ctx, 1, [contribution("a", 0.5)])
    assert fl.ContextKey.BEST_RECEIVED not in ctx


def test_a_number_too_large_for_a_float_is_left_out_like_an_infinity(caplog: pytest.LogCaptureFixture) -> None:
    ctx = context()
    entries = [contribution("site-7", 10**400), contribution("b", 0.5)]
    run_round(ModelSelectionHandler(), ctx, 0, entries)
    assert best_of(ctx).metric == 0.5
    assert "site-7" in caplog.text


# What is better


def test_only_a_strictly_better_score_wins() -> None:
    ctx = context()
    handler = ModelSelectionHandler()
    for number, metric in enumerate([0.5, 0.5, 0.75, 0.25, 0.75]):
        run_round(handler, ctx, number, [contribution("a", metric)], value=number)
    assert summary(ctx) == (2, 0.75, 2.0)


def test_the_best_starts_below_everything() -> None:
    ctx = context()
    run_round(ModelSelectionHandler(), ctx, 0, [contribution("a", -1e300)])
    assert best_of(ctx).metric == -1e300


def test_mode_min_keeps_the_smallest() -> None:
    ctx = context()
    handler = ModelSelectionHandler(validation_metric_name="initial_loss", mode="min")
    for number, metric in enumerate([3.0, 1e300, 2.0, 2.0, 2.5]):
        run_round(handler, ctx, number, [contribution("a", metric, name="initial_loss")], value=number)
    assert summary(ctx) == (2, 2.0, 2.0)


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_min_delta_must_be_exceeded(mode: str, sign: int) -> None:
    ctx = context()
    handler = ModelSelectionHandler(mode=mode, min_delta=0.25)
    for number, gain in enumerate([0.0, 0.25, 0.2, 0.375, 0.5]):
        run_round(handler, ctx, number, [contribution("a", sign * gain)], value=number)
    assert summary(ctx) == (3, sign * 0.375, 3.0)


def context_with_an_overflow() -> fl.FLContext:
    ctx = context()
    handler = ModelSelectionHandler()
    run_round(handler, ctx, 0, [contribution("a", 0.5)])
    run_round(handler, ctx, 1, [contribution("a", 1.5e308), contribution("b", 1.5e308)])
    return ctx


def test_a_sum_that_overflows_is_not_kept_as_an_infinity() -> None:
    assert best_of(context_with_an_overflow()).metric in (0.5, 1.5e308)


def test_a_sum_that_overflows_is_not_published_as_an_infinity() -> None:
    assert math.isfinite(context_with_an_overflow()[fl.ContextKey.METRICS]["selection"])


# Arguments


@pytest.mark.parametrize(
    "name",
    [
        "loss",
        "val_loss",
        "initial_validation_loss",
        "Loss",
        "mean-squared-error",
        "RMSE",
        "test_perplexity",
        "val/loss",
        "valLoss",
        "cross_entropy",
        "nll",
    ],
)
def test_a_name_that_looks_like_a_loss_warns_unless_the_smallest_is_asked_for(name: str) -> None:
    with pytest.warns(UserWarning, match=f"'{name}' looks like a loss"):
        ModelSelectionHandler(validation_metric_name=name, mode="max")
    handler = ModelSelectionHandler(validation_metric_name=name, mode="min")  # warnings are errors
    assert handler.validation_metric_name == name


@pytest.mark.parametrize("name", ["accuracy", "glossiness", "dice", "initial_validation_metric", "mean_iou"])
def test_other_names_do_not_warn(name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ModelSelectionHandler(validation_metric_name=name, mode="max")
    assert caught == []


def test_the_warning_points_at_the_line_that_built_the_handler() -> None:
    with pytest.warns(UserWarning, match="loss") as caught:
        ModelSelectionHandler(validation_metric_name="loss", mode="max")
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "maximum"},
        {"mode": ""},
        {"min_delta": -0.1},
        {"min_delta": math.nan},
        {"min_delta": math.inf},
        {"aggregation_weights": {"a": -1.0}},
        {"aggregation_weights": {"a": math.nan}},
        {"aggregation_weights": {"a": math.inf}},
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ModelSelectionHandler(**arguments)


def test_the_page_can_be_called_by_position_and_by_name() -> None:
    by_position = ModelSelectionHandler(True, "dice", {"1": 2.0})
    by_name = ModelSelectionHandler(
        weigh_by_local_iter=True, validation_metric_name="dice", aggregation_weights={"1": 2.0}
    )
    for handler in (by_position, by_name):
        assert handler.weigh_by_local_iter is True
        assert handler.validation_metric_name == "dice"
        assert handler.aggregation_weights == {"1": 2.0}


# What is kept


def test_the_best_holds_what_was_received_in_an_own_read_only_copy() -> None:
    received = {"w": np.array([1.0, 2.0], np.float32), "n": np.array(3)}
    ctx = fl.FLContext({fl.ContextKey.ROUND: 4}, model=fl.ModelData(received))
    ctx[fl.ContextKey.CONTRIBUTIONS] = (contribution("a", 0.5),)
    fl.fire_event(fl.EventType.BEFORE_AGGREGATION, [ModelSelectionHandler()], ctx)
    ctx.set_model(fl.ModelData({"w": np.array([9.0, 9.0], np.float32), "n": np.array(9)}))  # the aggregate
    received["w"][:] = 7
    best = best_of(ctx)
    assert best.round == 4
    assert type(best.weights) is FrozenWeights
    assert best.weights["w"].tolist() == [1.0, 2.0]
    assert best.weights["w"].dtype == np.float32
    assert best.weights["n"] == 3
    assert [array.flags.writeable for array in best.weights.values()] == [False, False]
    with pytest.raises(AttributeError):
        best.metric = 1.0  # type: ignore[misc]


def test_the_best_can_be_bound_to_another_key_and_two_handlers_do_not_meet() -> None:
    ctx = context()
    chain = [
        ModelSelectionHandler(),
        ModelSelectionHandler(False, "initial_loss", mode="min", best_key="bestByLoss"),
    ]
    scores = [(0.5, 0.1), (0.75, 0.2)]
    for number, (metric, loss) in enumerate(scores):
        ctx[fl.ContextKey.ROUND] = number
        ctx[fl.ContextKey.CONTRIBUTIONS] = (
            fl.Contribution("a", None, 1, metrics={METRIC: metric, "initial_loss": loss}),
        )
        fl.fire_event(fl.EventType.BEFORE_AGGREGATION, chain, ctx)
    assert (best_of(ctx).round, best_of(ctx).metric) == (1, 0.75)
    assert (ctx["bestByLoss"].round, ctx["bestByLoss"].metric) == (0, 0.1)


def test_startup_forgets_the_best_of_an_earlier_job_and_leaves_other_keys() -> None:
    ctx = context()
    handler = ModelSelectionHandler()
    run_round(handler, ctx, 0, [contribution("a", 0.9)])
    ctx[fl.ContextKey.BEST_AGGREGATED] = "another's"
    fl.fire_event(fl.EventType.STARTUP, [handler], ctx)
    assert fl.ContextKey.BEST_RECEIVED not in ctx
    assert ctx[fl.ContextKey.BEST_AGGREGATED] == "another's"
    run_round(handler, ctx, 0, [contribution("a", 0.1)])
    assert best_of(ctx).metric == 0.1


def test_a_handler_that_has_been_pickled_goes_on_where_it_was() -> None:
    ctx = context()
    handler = ModelSelectionHandler(aggregation_weights={"a": 2.0})
    run_round(handler, ctx, 0, [contribution("a", 0.5), contribution("b", 0.5)])
    handler, ctx = pickle.loads(pickle.dumps((handler, ctx)))
    run_round(handler, ctx, 1, [contribution("a", 0.25), contribution("b", 1.0)])
    assert summary(ctx) == (0, 0.5, 0.0)
    run_round(handler, ctx, 2, [contribution("a", 1.0), contribution("b", 0.25)])
    assert summary(ctx) == (2, 0.75, 0.0)


def test_without_a_model_it_fails_and_leaves_no_trace() -> None:
    ctx = fl.FLContext({fl.ContextKey.ROUND: 0, fl.ContextKey.CONTRIBUTIONS: (contribution("a", 0.5),)})
    before = dict(ctx)
    with pytest.raises(fl.HandlerError, match="no model"):
        fl.fire_event(fl.EventType.BEFORE_AGGREGATION, [ModelSelectionHandler()], ctx)
    assert ctx == before


# The final model


def test_the_final_model_is_scored_from_all_results_and_wins_if_it_is_better() -> None:
    ctx = context()
    handler = ModelSelectionHandler()
    run_round(handler, ctx, 4, [contribution("a", 0.5)], value=4)
    receive_results(handler, ctx, {"a": 0.5, "b": 1.0}, number=5, value=5)
    assert summary(ctx) == (5, 0.75, 5.0)
    assert ctx[fl.ContextKey.METRICS]["selection"] == 0.75


def test_a_final_model_that_wins_with_the_first_client_and_loses_with_all_does_not_win() -> None:
    ctx = context()
    handler = ModelSelectionHandler()
    run_round(handler, ctx, 0, [contribution("a", 0.5), contribution("b", 0.5)], value=0)
    bests = receive_results(handler, ctx, {"a": 0.75, "b": 0.0}, value=5)
    assert [(best.round, best.metric) for best in bests if best is not None] == [(5, 0.75), (0, 0.5)]
    assert summary(ctx) == (0, 0.5, 0.0)


def test_a_final_model_that_loses_with_the_first_client_and_wins_with_all_wins() -> None:
    ctx = context()
    handler = ModelSelectionHandler()
    run_round(handler, ctx, 0, [contribution("a", 0.5), contribution("b", 0.5)], value=0)
    bests = receive_results(handler, ctx, {"a": 0.25, "b": 1.0}, value=5)
    assert [(best.round, best.metric) for best in bests if best is not None] == [(0, 0.5), (5, 0.625)]
    assert summary(ctx) == (5, 0.625, 5.0)


def test_its_score_falls_with_later_results_even_if_it_stays_the_best() -> None:
    ctx = context()
    handler = ModelSelectionHandler()
    run_round(handler, ctx, 0, [contribution("a", 0.25)], value=0)
    receive_results(handler, ctx, {"a": 1.0, "b": 0.5, "c": 0.75}, value=5)
    assert summary(ctx) == (5, 0.75, 5.0)


def test_the_final_model_may_be_the_only_one() -> None:
    ctx = context()
    receive_results(ModelSelectionHandler(), ctx, {"a": 1.0, "b": 0.0}, value=5)
    assert summary(ctx) == (5, 0.5, 5.0)


def test_the_final_model_is_scored_by_the_same_formula(caplog: pytest.LogCaptureFixture) -> None:
    ctx = context()
    handler = ModelSelectionHandler(True, METRIC, {"a": 3.0})
    metrics = {"a": 0.5, "b": 0.25, "site-7": math.nan, "site-8": 0.75}
    receive_results(handler, ctx, metrics, n_iter={"a": 2, "b": 6, "site-7": 1})
    assert best_of(ctx).metric == (0.5 * 2 * 3 + 0.25 * 6) / (2 * 3 + 6)
    assert "site-7" in caplog.text
    assert "site-8" in caplog.text


@pytest.mark.parametrize("usable", [True, False], ids=["some are usable", "none is usable"])
def test_each_client_without_a_usable_metric_is_warned_of_once_while_final_results_come_in(
    usable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ctx = context()
    metrics = {"a": math.nan, "b": 0.5 if usable else math.inf, "c": math.nan, "d": 0.25 if usable else -math.inf}
    receive_results(ModelSelectionHandler(), ctx, metrics)
    warned = [record.getMessage().split()[0] for record in caplog.records if "is left out" in record.getMessage()]
    assert warned == (["a", "c"] if usable else ["a", "b", "c", "d"])
    caplog.clear()
    receive_results(ModelSelectionHandler(True), ctx, dict.fromkeys("abc", 0.5), n_iter={"b": 3})
    warned = [record.getMessage().split()[0] for record in caplog.records if "is left out" in record.getMessage()]
    assert warned == ["a", "c"]


def test_the_final_model_obeys_mode_and_min_delta() -> None:
    ctx = context()
    handler = ModelSelectionHandler(mode="min", min_delta=0.25)
    run_round(handler, ctx, 0, [contribution("a", 1.0)])
    receive_results(handler, ctx, {"a": 0.5, "b": 1.0})
    assert summary(ctx) == (0, 1.0, 0.0)
    receive_results(handler, ctx, {"a": 0.5, "b": 0.75})
    assert summary(ctx) == (5, 0.625, 99.0)


@pytest.mark.parametrize("model", ["site-1", GLOBAL_BEST])
def test_cross_site_results_are_ignored(model: str) -> None:
    ctx = context()
    handler = ModelSelectionHandler()
    run_round(handler, ctx, 0, [contribution("a", 0.5)], value=0)
    receive_results(handler, ctx, {"a": 0.25, "b": 0.25}, value=5)
    before = dict(ctx)
    receive_results(handler, ctx, {"a": 1.0, "b": 1.0}, model=model, value=6)
    assert summary(ctx) == (0, 0.5, 0.0)
    assert ctx[fl.ContextKey.METRICS] == before[fl.ContextKey.METRICS] == {"selection": 0.25}


def test_the_final_model_of_a_second_job_meets_the_best_of_that_job() -> None:
    ctx = context()
    handler = ModelSelectionHandler()
    run_round(handler, ctx, 0, [contribution("a", 0.9)], value=0)
    receive_results(handler, ctx, {"a": 0.1})
    fl.fire_event(fl.EventType.STARTUP, [handler], ctx)
    run_round(handler, ctx, 0, [contribution("a", 0.25)], value=0)
    receive_results(handler, ctx, {"a": 0.5}, number=1, value=1)
    assert summary(ctx) == (1, 0.5, 1.0)


def test_an_event_without_results_is_ignored() -> None:
    ctx = context()
    fl.fire_event(fl.EventType.RECEIVE_VALIDATION_RESULTS, [ModelSelectionHandler()], ctx)
    assert list(ctx) == [fl.ContextKey.ROUND]


# In a job


def by_value(weights: Mapping[str, Any]) -> float:
    return float(weights["b"][0])


def test_each_model_is_scored_in_the_round_in_which_it_was_received() -> None:
    # Models 0, 1, 2, 3 (the final one) score 0, 1, 2, 3: the clients' metric is the model's value.
    server = fl.FederatedServer(initial_weights(), num_rounds=3, handlers=[ModelSelectionHandler()])
    result = server.run(clients_of({"a": AddingLearner(1, score=by_value)}))
    assert [report.metrics["selection"] for report in result.reports] == [0.0, 1.0, 2.0]
    assert result.metrics["selection"] == 3.0


def test_the_model_of_the_last_round_is_scored_which_nvflare_never_did() -> None:
    server = fl.FederatedServer(initial_weights(), num_rounds=3, handlers=[ModelSelectionHandler()])
    result = server.run(clients_of({name: AddingLearner(1, score=by_value) for name in "ab"}))
    assert result.best is not None
    assert (result.best.round, result.best.metric) == (3, 3.0)
    assert result.best.weights["b"].tolist() == result.weights["b"].tolist() == [3.0, 3.0, 3.0]


def test_a_metric_like_a_loss_does_not_pick_the_worst_model_which_it_did_in_nvflare() -> None:
    # The models 0, 1, 2, 3 have losses 1, 0, 1, 4.
    handler = ModelSelectionHandler(mode="min")
    server = fl.FederatedServer(initial_weights(), num_rounds=3, handlers=[handler])
    learner = AddingLearner(1, score=lambda weights: (by_value(weights) - 1) ** 2)
    result = server.run(clients_of({"a": learner}))
    assert result.best is not None
    assert (result.best.round, result.best.metric, by_value(result.best.weights)) == (1, 0.0, 1.0)
    with pytest.warns(UserWarning, match="looks like a loss"):
        ModelSelectionHandler(validation_metric_name="initial_loss", mode="max")


def test_a_handler_that_raises_is_not_swallowed_and_selection_goes_on_which_it_did_not_in_nvflare() -> None:
    error = OSError("disk full")
    broken = At(fl.EventType.BEFORE_AGGREGATION, raising(error))
    clients = clients_of({"a": AddingLearner(1, score=by_value)})
    strict = fl.FederatedServer(initial_weights(), num_rounds=2, handlers=[broken, ModelSelectionHandler()])
    with pytest.raises(fl.HandlerError, match="disk full") as caught:
        strict.run(clients)
    assert caught.value.exceptions == (error,)
    tolerant = fl.FederatedServer(
        initial_weights(), num_rounds=2, handlers=[broken, ModelSelectionHandler()], on_handler_error="log"
    )
    result = tolerant.run(clients)
    assert [failure.exception for failure in result.handler_failures] == [error, error]
    assert [len(report.handler_failures) for report in result.reports] == [1, 1]
    assert result.best is not None
    assert (result.best.round, result.best.metric) == (2, 2.0)


def test_models_that_all_score_the_same_leave_the_first_one_in_whatever_order_the_clients_came() -> None:
    # Rounding depends on the order of a sum: 0.1 + 0.2 + 0.3 > 0.3 + 0.2 + 0.1 in floating point.
    learners = {name: AddingLearner(1, score=score) for name, score in [("a", 0.3), ("b", 0.2), ("c", 0.1)]}
    metrics = []
    for order in ("abc", "cba", "bca"):
        server = fl.FederatedServer(initial_weights(), num_rounds=2, handlers=[ModelSelectionHandler()])
        result = server.run(clients_of({name: learners[name] for name in order}))
        assert result.best is not None
        assert result.best.round == 0
        metrics.append(result.metrics["selection"])
    assert len(set(metrics)) == 1


def test_the_best_holds_what_clients_received_even_if_a_handler_rebinds_the_model_while_it_is_sent() -> None:
    meddler = At(fl.EventType.SEND_MODEL, lambda ctx: ctx.set_model(fl.ModelData(FrozenWeights({"b": np.ones(1)}))))
    server = fl.FederatedServer(initial_weights(), num_rounds=1, handlers=[meddler, ModelSelectionHandler(mode="min")])
    result = server.run(clients_of({"a": AddingLearner(1, score=by_value)}))
    assert result.best is not None
    assert result.best.round == 0
    assert list(result.best.weights) == ["w", "b", "steps"]
    assert result.best.weights["b"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("metric", "n_iter"), [(10**400, 1), (0.5, 10**400)], ids=["metric", "n_iter"])
def test_no_number_that_a_client_sends_can_end_the_job_or_reach_the_score(metric: float, n_iter: int) -> None:
    def tamper(sent: fl.Contribution) -> fl.Contribution:
        return fl.Contribution("b", sent.weights, 1, round=sent.round, n_iter=n_iter, metrics={METRIC: metric})

    server = fl.FederatedServer(
        initial_weights(),
        num_rounds=2,
        min_contributions=1,
        on_bad_contribution="reject",
        handlers=[ModelSelectionHandler(weigh_by_local_iter=True)],
    )
    clients = [
        *clients_of({"a": AddingLearner(1, score=by_value)}),
        TamperingClient("b", AddingLearner(1, score=by_value), tamper=tamper, rounds=[0]),
    ]
    result = server.run(clients)
    assert math.isfinite(result.reports[0].metrics["selection"])
    assert result.reports[1].metrics["selection"] == 1.0
    assert result.best is not None
    assert (result.best.round, result.best.metric) == (2, 2.0)


@pytest.mark.parametrize("weights", [(1.0, 2.0**-930), (1e300, 1e-300), (1.7e308, 2.0**-1074), (0.0, 1.0)])
@pytest.mark.parametrize("numbers", [(0.0, 3e307), (-0.5, 1.5), (1.7e308, 1e-300)])
def test_the_mean_of_numbers_is_right_however_far_apart_their_weights_are(
    weights: tuple[float, ...], numbers: tuple[float, ...]
) -> None:
    exact = sum(Fraction(a) * Fraction(x) for a, x in zip(weights, numbers, strict=True)) / sum(map(Fraction, weights))
    assert mean_of(numbers, weights) == float(exact)


@pytest.mark.parametrize("number", [1.7976931348623157e308, -1.7976931348623157e308, 0.1, 5e-324, 0.0])
def test_the_mean_of_equal_numbers_is_that_number_whatever_their_weights(number: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 8))
        assert mean_of([number] * count, list(rng.random(count) + 1e-9)) == number


def test_a_mean_lies_within_the_range_of_the_numbers() -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        numbers = list(0.1 + rng.integers(0, 2, 5) * math.ulp(0.1))
        assert min(numbers) <= mean_of(numbers, list(rng.random(5))) <= max(numbers)


@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=False, allow_infinity=False) | st.floats(-1, 1),
            st.just(0.0) | st.floats(1e-9, 1e6) | st.floats(5e-324, 1e300),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_a_mean_of_numbers_that_come_one_by_one_has_the_bits_of_one_of_all_of_them(
    pairs: list[tuple[float, float]],
) -> None:
    mean = RunningMean()
    for count, (number, weight) in enumerate(pairs, 1):
        mean.add(number, weight)
        numbers, weights = map(list, zip(*pairs[:count], strict=True))
        expected = mean_of(numbers, weights) if any(weights) else None
        found = mean.value()
        assert found == expected
        assert found is None or math.copysign(1, found) == math.copysign(1, expected or found)
