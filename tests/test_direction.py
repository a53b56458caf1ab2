"""Which direction of a score is better: declared once, followed by whatever selects models, or told by the name."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from federation import NormEvaluator

import fed_learn as fl
from fed_learn.components.direction import mode_of
from fed_learn.handlers import EarlyStoppingHandler, ModelSelectionHandler, ServerValidationHandler

Key = fl.ContextKey


class Halving(fl.Learner):
    """Halves the one weight of its model, which is also its score."""

    def __init__(self, metric: str, mode: str | None = None) -> None:
        self.validation_metric = metric
        self.mode = mode

    def train(self, weights: Any, ctx: fl.FLContext) -> fl.TrainingResult:
        return fl.TrainingResult({"w": weights["w"] / 2}, 1)

    def validate(self, weights: Any, ctx: fl.FLContext) -> Mapping[str, float]:
        return {self.validation_metric: float(weights["w"][0])}


class ByWeight(NormEvaluator):
    """Scores a model by its one weight."""

    def __init__(self, metric_name: str, mode: str | None = None) -> None:
        super().__init__()
        self.metric_name = metric_name
        self.mode = mode


def run(
    *learners: fl.Learner, handlers: list[fl.Handler], num_rounds: int = 5, max_workers: int | None = None
) -> fl.JobResult:
    clients = [fl.FederatedClient(f"site-{i}", learner) for i, learner in enumerate(learners)]
    return fl.FederatedServer({"w": np.ones(1)}, num_rounds=num_rounds, handlers=handlers).run(clients)


def best_metric(result: fl.JobResult) -> float:
    assert result.best is not None
    return result.best.metric


LOSSES = (
    "loss val_loss valLoss BCEWithLogitsLoss MSELoss crossentropy categorical_crossentropy cross_entropy brier "
    "brier_score error_rate wer cer initial_wer fid bpb bits_per_byte mape MeanAbsolutePercentageError perplexity "
    "logloss log_loss negative_log_likelihood nll KLDivergence hausdorff95 HD95 ece false_negative_rate rmse "
    "FrechetInceptionDistance val/loss mean-squared-error test_error"
)
SCORES = (
    "accuracy dice mean_iou f1 auc initial_validation_metric server_validation_metric r2 bleu glossiness lossless "
    "neg_mean_squared_error neg_log_loss log_likelihood kappa mirror negative_predictive_value precision per_class"
)


@pytest.mark.parametrize("name", LOSSES.split())
def test_a_name_with_the_words_of_a_loss_means_that_less_is_better(name: str) -> None:
    assert mode_of(name) == "min"


@pytest.mark.parametrize("name", SCORES.split())
def test_any_other_name_means_that_more_is_better(name: str) -> None:
    assert mode_of(name) == "max"


@pytest.mark.parametrize(("metric", "mode"), [("loss", "min"), ("loss", None), ("badness", "min"), ("wer", None)])
def test_selection_follows_what_the_learner_declares_or_its_metric_is_called(metric: str, mode: str | None) -> None:
    result = run(Halving(metric, mode), handlers=[ModelSelectionHandler()])
    assert best_metric(result) == 0.03125
    assert result.best is not None
    assert result.best.round == 5


@pytest.mark.parametrize(("metric", "mode"), [("accuracy", None), ("goodness", "max"), ("goodness", None)])
def test_selection_keeps_the_largest_where_more_is_better(metric: str, mode: str | None) -> None:
    assert best_metric(run(Halving(metric, mode), handlers=[ModelSelectionHandler()])) == 1.0


@pytest.mark.parametrize("name", ["initial_validation_metric", "initial_badness"])
def test_the_declared_direction_holds_for_every_name_of_the_metric(name: str) -> None:
    assert best_metric(run(Halving("badness", "min"), handlers=[ModelSelectionHandler(False, name)])) == 0.03125


def test_another_metrics_direction_comes_from_its_own_name() -> None:
    class Both(Halving):
        def validate(self, weights: Any, ctx: fl.FLContext) -> Mapping[str, float]:
            return {**super().validate(weights, ctx), "quality": -float(weights["w"][0])}

    result = run(Both("badness", "min"), handlers=[ModelSelectionHandler(False, "initial_quality")])
    assert best_metric(result) == -0.03125


@pytest.mark.parametrize(("declared", "told"), [("min", "max"), ("max", "min")])
def test_a_selector_that_is_told_otherwise_is_an_error_when_the_job_starts(declared: str, told: str) -> None:
    with pytest.raises(
        fl.HandlerError,
        match=f"ModelSelectionHandler was told mode='{told}', but the clients declare of 'badness' mode=",
    ) as caught:
        run(Halving("badness", declared), handlers=[ModelSelectionHandler(mode=told)])
    assert caught.value.failures[0].event == fl.EventType.STARTUP


@pytest.mark.parametrize("told", ["min", "max"])
def test_a_selector_that_is_told_what_is_declared_is_right(told: str) -> None:
    result = run(Halving("badness", told), handlers=[ModelSelectionHandler(mode=told)])
    assert best_metric(result) == (0.03125 if told == "min" else 1.0)


def test_a_selector_that_keeps_the_largest_loss_is_warned_of_when_the_name_is_known() -> None:
    with pytest.warns(UserWarning, match="'loss' looks like a loss"):
        run(Halving("loss"), handlers=[ModelSelectionHandler(mode="max")])


@pytest.mark.parametrize(
    ("name", "declared", "expected"),
    [("loss", None, 0.03125), ("badness", "min", 0.03125), ("accuracy", None, 0.5), ("loss_like", "max", 0.5)],
)
def test_the_servers_validation_follows_its_evaluator(name: str, declared: str | None, expected: float) -> None:
    handlers: list[fl.Handler] = [ServerValidationHandler(ByWeight(name, declared), 1)]
    assert best_metric(run(Halving("accuracy"), handlers=handlers)) == expected


def test_the_servers_validation_follows_the_clients_where_it_measures_the_same() -> None:
    handlers: list[fl.Handler] = [ServerValidationHandler(ByWeight("badness"), 1)]
    assert best_metric(run(Halving("badness", "min"), handlers=handlers)) == 0.03125


@pytest.mark.parametrize(
    ("evaluator", "told", "says"),
    [
        (ByWeight("badness", "min"), "max", "was told mode='max', but what measures 'badness' declares mode='min'"),
        (ByWeight("goodness", "max"), None, "what measures 'goodness' declares mode='max', but the clients declare"),
        (ByWeight("score", "down"), None, "mode of ByWeight must be 'max' or 'min', not 'down'"),
    ],
    ids=["handler", "clients", "unknown"],
)
def test_an_evaluator_that_is_contradicted_is_an_error_when_the_job_starts(
    evaluator: fl.ModelEvaluator, told: str | None, says: str
) -> None:
    with pytest.raises(fl.HandlerError, match=says) as caught:
        run(Halving("goodness", "min"), handlers=[ServerValidationHandler(evaluator, 1, mode=told)])
    assert caught.value.failures[0].event == fl.EventType.STARTUP


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Halving("loss"), Halving("accuracy")),
        (Halving("badness", "min"), Halving("badness", "max")),
        (Halving("badness", "min"), Halving("badness")),
    ],
    ids=["metric", "mode", "one does not say"],
)
def test_clients_that_disagree_are_an_error_that_names_both(first: fl.Learner, second: fl.Learner) -> None:
    with pytest.raises(ValueError, match=r"site-0 selects models by .*, and site-1 by "):
        run(first, second, handlers=[])


def test_clients_of_which_one_declares_what_the_others_mean_agree() -> None:
    result = run(Halving("loss"), Halving("loss", "min"), handlers=[ModelSelectionHandler()])
    assert best_metric(result) == 0.03125


def test_a_client_offers_its_best_model_in_the_direction_that_is_followed() -> None:
    client = fl.FederatedClient("a", Halving("val_loss"))
    client.start(2)
    client.train_round(0, lambda: {"w": np.ones(1)})
    client.train_round(1, lambda: {"w": np.full(1, 8.0)})
    best = client.submit_best_model()
    assert best is not None
    assert best["w"].tolist() == [0.5]


def test_a_job_that_improves_by_a_loss_is_not_stopped_early() -> None:
    result = run(Halving("loss"), handlers=[ModelSelectionHandler(), EarlyStoppingHandler(1)])
    assert (len(result.reports), result.stop_reason) == (5, None)


def test_a_choice_by_name_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fed_learn.handlers.scoring")
    run(Halving("loss"), handlers=[ModelSelectionHandler()])
    assert [r.getMessage() for r in caplog.records if r.name == "fed_learn.handlers.scoring"] == [
        "the best model is the one with the smallest 'loss', by its name: nobody declared a mode"
    ]
    caplog.clear()
    run(Halving("loss", "min"), handlers=[ModelSelectionHandler()])
    assert [r for r in caplog.records if r.name == "fed_learn.handlers.scoring"] == []


def test_the_context_says_by_what_clients_select_before_handlers_start() -> None:
    seen: list[dict[str, Any]] = []

    class Looking(fl.Handler):
        def startup(self, ctx: fl.FLContext) -> None:
            seen.append({key: ctx.get_prop(key) for key in (Key.SCORE_METRIC, Key.SCORE_MODE, Key.HANDLERS)})

    handler = Looking()
    run(Halving("loss"), handlers=[handler], num_rounds=1)
    run(Halving("badness", "min"), handlers=[handler], num_rounds=1)
    assert seen == [
        {Key.SCORE_METRIC: "loss", Key.SCORE_MODE: None, Key.HANDLERS: (handler,)},
        {Key.SCORE_METRIC: "badness", Key.SCORE_MODE: "min", Key.HANDLERS: (handler,)},
    ]


# Evaluators and learners of frameworks


def worst_case(outputs: Any, targets: Any) -> Any:
    return abs(outputs - targets)


def mean_error(outputs: Any, targets: Any) -> Any:
    return abs(outputs - targets)


class Metric:
    """As one of torchmetrics."""

    def __init__(self, higher_is_better: bool | None) -> None:
        self.higher_is_better = higher_is_better

    def reset(self) -> None: ...

    def update(self, outputs: Any, targets: Any) -> None: ...

    def compute(self) -> float:
        return 0.0


def torch_parts(metric: Any, mode: str | None) -> tuple[Any, Any]:
    torch = pytest.importorskip("torch")
    from fed_learn.integrations.torch import TorchEvaluator, TorchLearner

    data = torch.utils.data.TensorDataset(torch.zeros(2, 1), torch.zeros(2).long())
    model = torch.nn.Linear(1, 2)
    learner = TorchLearner(model, data, data, metrics={"m": metric}, validation_metric="m", mode=mode)
    return TorchEvaluator(model, data, metric, mode=mode), learner


def keras_parts(metric: Any, mode: str | None) -> tuple[Any, Any]:
    keras = pytest.importorskip("keras")
    from fed_learn.integrations.keras import KerasEvaluator, KerasLearner

    data = np.zeros((2, 1), np.float32), np.zeros(2, np.int64)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)])
    model.compile("sgd", "sparse_categorical_crossentropy")
    learner = KerasLearner(model, data, data, metrics={"m": metric}, validation_metric="m", mode=mode)
    return KerasEvaluator(model, data, metric, mode=mode), learner


@pytest.mark.parametrize("parts", [torch_parts, keras_parts])
@pytest.mark.parametrize(
    ("metric", "mode", "declared"),
    [
        ("accuracy", None, "max"),
        ("loss", None, "min"),
        (worst_case, None, None),
        (worst_case, "min", "min"),
    ],
    ids=["accuracy", "loss", "function", "mode"],
)
def test_what_scores_a_frameworks_model_declares_the_direction_of_what_it_knows(
    parts: Callable[[Any, str | None], tuple[Any, Any]], metric: Any, mode: str | None, declared: str | None
) -> None:
    evaluator, learner = parts(metric, mode)
    assert (evaluator.mode, learner.mode) == (declared, declared)


@pytest.mark.parametrize(("higher", "declared"), [(True, "max"), (False, "min"), (None, None)])
def test_a_metric_that_says_itself_which_direction_is_better_is_believed(
    higher: bool | None, declared: str | None
) -> None:
    evaluator, learner = torch_parts(Metric(higher), None)
    assert (evaluator.mode, learner.mode) == (declared, declared)


def test_a_frameworks_score_by_a_function_follows_its_name() -> None:
    evaluator, _ = torch_parts(mean_error, None)
    assert (evaluator.metric_name, evaluator.mode, mode_of(evaluator.metric_name)) == ("mean_error", None, "min")
    with pytest.warns(UserWarning, match="'mean_error' looks like a loss"):
        torch_parts(mean_error, "max")


def test_an_optimizer_in_the_place_of_what_makes_one_is_refused_and_shown() -> None:
    torch = pytest.importorskip("torch")
    from fed_learn.integrations.torch import TorchLearner

    data = torch.utils.data.TensorDataset(torch.zeros(2, 1), torch.zeros(2).long())
    model = torch.nn.Linear(1, 2)
    wrong: tuple[tuple[Any, str], ...] = (
        (torch.optim.Adam(model.parameters(), lr=0.5), "Adam(parameters, lr=0.5)"),
        ("sgd", "SGD("),
    )
    for optimizer, shown in wrong:
        with pytest.raises(TypeError) as caught:
            TorchLearner(model, data, data, optimizer=optimizer)
        assert f"pass optimizer=lambda parameters: torch.optim.{shown}" in str(caught.value)
    assert TorchLearner(model, data, data, optimizer=torch.optim.SGD).optimizer is torch.optim.SGD
