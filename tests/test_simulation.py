"""The demo: its data, its model, its jobs, and handlers that come from a configuration."""

import importlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import bits, num_threads
from sklearn.datasets import load_breast_cancer, load_digits
from threadpoolctl import threadpool_limits

import fed_learn as fl
from fed_learn.components.config import build_component, read_config
from fed_learn.handlers import EarlyStoppingHandler, ModelSelectionHandler, RoundLogHandler, ServerValidationHandler
from fed_learn.simulation import (
    Dataset,
    Demo,
    Part,
    Perceptron,
    PerceptronEvaluator,
    PerceptronLearner,
    Split,
    build_demo,
    load_split,
)

# Data

LABELS = {"digits": load_digits().target, "breast-cancer": load_breast_cancer().target}


def all_parts(split: Split) -> list[Part]:
    return [*split.train, *split.selection, split.server, split.test]


def raw(part: Part) -> bytes:
    return part.x.tobytes() + part.y.tobytes()


@pytest.mark.parametrize("dataset", Dataset)
@pytest.mark.parametrize(("num_clients", "alpha"), [(1, 1.0), (4, 0.5), (10, 0.05)])
def test_the_parts_are_disjoint_and_cover_the_data(dataset: str, num_clients: int, alpha: float) -> None:
    parts = all_parts(load_split(dataset, num_clients, alpha, seed=3))
    x = np.concatenate([part.x for part in parts])
    y = np.concatenate([part.y for part in parts])
    # No example occurs twice in these data sets, so neither may a row here.
    assert len(np.unique(x, axis=0)) == len(x) == len(LABELS[dataset])
    assert np.array_equal(np.bincount(y), np.bincount(LABELS[dataset]))


@pytest.mark.parametrize("dataset", Dataset)
def test_an_example_keeps_its_class(dataset: str) -> None:
    # Where the scaling is undone, each row must be found in the data set, with its class.
    data = load_digits() if dataset == "digits" else load_breast_cancer()
    classes = {row.tobytes(): label for row, label in zip(ranks(data.data), data.target, strict=True)}
    split = load_split(dataset, 3, 0.5, seed=1)
    parts = all_parts(split)
    x = np.concatenate([part.x for part in parts])
    y = np.concatenate([part.y for part in parts])
    found = [classes[row.tobytes()] for row in ranks(x)]
    assert found == y.tolist()


def ranks(x: Any) -> Any:
    """Each value's rank among the different ones of its feature: the same before and after scaling."""
    return np.stack([np.unique(column.astype(np.float32), return_inverse=True)[1] for column in x.T], axis=1)


@pytest.mark.parametrize("dataset", Dataset)
def test_examples_are_scaled_by_what_the_training_parts_show_and_nothing_else(dataset: str) -> None:
    split = load_split(dataset, 4, 0.5, seed=2)
    trained = np.concatenate([part.x for part in split.train]).astype(np.float64)
    assert np.abs(trained.mean(axis=0)).max() < 1e-6
    if dataset == "digits":
        assert trained.std() == pytest.approx(1, abs=1e-6)
    else:
        assert trained.std(axis=0) == pytest.approx(np.ones(30), abs=1e-6)
    rest = np.concatenate([part.x for part in (*split.selection, split.server, split.test)]).astype(np.float64)
    assert np.abs(rest.mean(axis=0)).max() > 1e-3


@pytest.mark.parametrize("dataset", Dataset)
def test_the_parts_have_the_shares_types_and_classes_that_are_promised(dataset: str) -> None:
    split = load_split(dataset, 4, 0.5, seed=0)
    total = len(LABELS[dataset])
    assert (len(split.test), len(split.server)) == (round(total * 0.2), round(total * 0.1))
    assert split.num_classes == len(np.unique(LABELS[dataset]))
    for train, selection in zip(split.train, split.selection, strict=True):
        assert len(selection) == max(1, round((len(train) + len(selection)) * 0.2))
    for part in all_parts(split):
        assert part.x.dtype == np.float32
        assert part.y.dtype == np.int64
        assert part.x.shape == (len(part), 64 if dataset == "digits" else 30)
        assert np.isfinite(part.x).all()


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    first, second, other = (load_split("digits", 4, 0.5, seed) for seed in (1, 1, 2))
    assert [raw(part) for part in all_parts(first)] == [raw(part) for part in all_parts(second)]
    assert raw(first.test) != raw(other.test)


@pytest.mark.parametrize("dataset", Dataset)
@pytest.mark.parametrize("alpha", [1e-12, 0.01, 1.0, 1e9])
def test_every_client_has_something_to_train_on_and_something_to_select_by(dataset: str, alpha: float) -> None:
    largest = sum(map(len, load_split(dataset, 1, 1.0, 0).train + load_split(dataset, 1, 1.0, 0).selection)) // 20
    for num_clients in (2, largest):
        split = load_split(dataset, num_clients, alpha, seed=0)
        assert len(split.train) == len(split.selection) == num_clients
        assert all(len(t) + len(s) >= 10 for t, s in zip(split.train, split.selection, strict=True))
        assert all(len(part) >= 1 for part in all_parts(split))


def test_the_smaller_alpha_the_more_the_clients_differ() -> None:
    def most_common_share(alpha: float) -> float:
        split = load_split("digits", 4, alpha, seed=0)
        return float(np.mean([np.bincount(part.y).max() / len(part) for part in split.train]))

    assert most_common_share(0.05) > most_common_share(0.5) > most_common_share(100.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cats", 2, 0.5, 0), "'cats'"),
        (("digits", 0, 0.5, 0), "at least 1 client"),
        (("digits", -1, 0.5, 0), "at least 1 client"),
        (("digits", 2, 0.0, 0), "alpha"),
        (("digits", 2, -1.0, 0), "alpha"),
        (("digits", 2, float("nan"), 0), "alpha"),
        (("digits", 2, float("inf"), 0), "alpha"),
        (("digits", 63, 0.5, 0), "too few for 63 clients"),
        (("breast-cancer", 1000, 0.5, 0), "too few for 1000 clients"),
    ],
    ids=str,
)
def test_a_split_that_cannot_be_is_refused(arguments: tuple[str, int, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_split(*arguments)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*fed-learn\[demo\]"):
        load_split("digits", 2, 0.5, 0)


# The model


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gradients_agree_with_finite_differences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = Perceptron(5, 3, 4)
    weights: Any = {name: array.astype(np.float64) for name, array in model.init(seed).items()}
    weights["hidden.bias"] += rng.normal(size=4) * 0.1
    weights["output.bias"] += rng.normal(size=3) * 0.1
    x: Any = rng.normal(size=(7, 5))
    y = rng.integers(0, 3, 7)

    gradients, loss = Perceptron.gradients(weights, x, y)
    assert set(gradients) == set(weights)
    assert all(gradient.dtype == np.float64 for gradient in gradients.values())
    step = 1e-6
    for name, array in weights.items():
        numeric = np.empty_like(array)
        for index in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = {**weights, name: array.copy()}
                moved[name][index] += sign * step
                ends.append(Perceptron.gradients(moved, x, y)[1])
            numeric[index] = (ends[0] - ends[1]) / (2 * step)
        assert gradients[name].shape == array.shape
        np.testing.assert_allclose(gradients[name], numeric, rtol=1e-6, atol=1e-8)
    _, log_p = Perceptron.forward(weights, x)
    assert loss == pytest.approx(float(-log_p[np.arange(7), y].mean()), rel=1e-12)
    np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1, rtol=1e-12)


def test_the_forward_pass_survives_large_logits() -> None:
    weights = Perceptron(2, 3, 4).init(0)
    huge = {name: array * np.float32(1e6) for name, array in weights.items()}
    hidden, log_p = Perceptron.forward(huge, np.full((2, 2), 100, np.float32))
    assert hidden.shape == (2, 4)
    assert np.isfinite(log_p).all()


def test_the_score_is_accuracy_and_mean_cross_entropy() -> None:
    # One hidden unit that passes x on, and two classes: the logits are (x, 0).
    weights = {
        "hidden.weight": np.array([[1.0]], np.float32),
        "hidden.bias": np.zeros(1, np.float32),
        "output.weight": np.array([[1.0, 0.0]], np.float32),
        "output.bias": np.zeros(2, np.float32),
    }
    part = Part(np.array([[1.0], [2.0], [3.0]], np.float32), np.array([0, 0, 1]))
    scores = Perceptron.score(weights, part)
    losses = [np.log1p(np.exp(-1.0)), np.log1p(np.exp(-2.0)), np.log1p(np.exp(3.0))]
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-6)


def test_initial_weights_come_from_the_seed_in_float32() -> None:
    model = Perceptron(64, 10)
    assert bits(model.init(1)) == bits(model.init(1))
    assert bits(model.init(1)) != bits(model.init(2))
    assert {array.dtype for array in model.init(1).values()} == {np.dtype(np.float32)}


def one_part(seed: int, size: int = 40) -> Part:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 5)).astype(np.float32)
    return Part(x, (x[:, 0] > 0).astype(np.int64))


def round_context(number: int) -> fl.FLContext:
    return fl.FLContext({fl.ContextKey.ROUND: number})


def test_training_depends_on_seed_and_round_alone_and_leaves_its_input_as_it_is() -> None:
    weights = Perceptron(5, 2, 8).init(0)
    before = bits(weights)
    learner = PerceptronLearner(one_part(1), one_part(2), seed=7)
    first = learner.train(weights, round_context(3))
    learner.train(weights, round_context(4))
    again = learner.train(weights, round_context(3))
    assert bits(weights) == before
    assert bits(first.weights) == bits(again.weights)
    assert bits(first.weights) != before
    other_round = learner.train(weights, round_context(5))
    other_seed = PerceptronLearner(one_part(1), one_part(2), seed=8).train(weights, round_context(3))
    assert len({str(bits(result.weights)) for result in (first, other_round, other_seed)}) == 3
    assert {array.dtype for array in first.weights.values()} == {np.dtype(np.float32)}


def test_training_reports_examples_iterations_and_loss() -> None:
    learner = PerceptronLearner(one_part(1, 40), one_part(2), local_epochs=3, batch_size=32)
    result = learner.train(Perceptron(5, 2, 8).init(0), round_context(0))
    assert result.aggregation_weight == 40
    assert result.n_iter == 3 * 2
    assert list(result.metrics) == ["train_loss"]
    assert 0 < result.metrics["train_loss"] < 2


def test_training_lowers_the_loss() -> None:
    learner = PerceptronLearner(one_part(1), one_part(2), local_epochs=20)
    weights = Perceptron(5, 2, 8).init(0)
    trained = learner.train(weights, round_context(0)).weights
    assert Perceptron.score(trained, one_part(1))["loss"] < Perceptron.score(weights, one_part(1))["loss"] / 2
    assert learner.validate(trained, round_context(0))["accuracy"] > 0.8


def test_learner_and_evaluator_keep_their_arguments_and_can_be_pickled() -> None:
    train, select = one_part(1), one_part(2)
    arguments: dict[str, Any] = {
        "training_part": train,
        "selection_part": select,
        "local_epochs": 2,
        "learning_rate": 0.125,
        "momentum": 0.5,
        "batch_size": 8,
        "seed": 9,
    }
    learner = PerceptronLearner(**arguments)
    evaluator = PerceptronEvaluator(select)
    assert {name: getattr(learner, name) for name in arguments} == arguments
    assert evaluator.part is select
    second, other = pickle.loads(pickle.dumps((learner, evaluator)))
    weights = Perceptron(5, 2, 8).init(0)
    ctx = round_context(1)
    assert bits(second.train(weights, ctx).weights) == bits(learner.train(weights, ctx).weights)
    ctx.set_model(fl.ModelData(weights))
    for one in (evaluator, other):
        one.evaluate(ctx)
    assert evaluator.get_metric() == other.get_metric() == Perceptron.score(weights, select)["accuracy"]


@pytest.mark.parametrize("model", [None, fl.ModelData()], ids=["no model", "no weights"])
def test_an_evaluator_without_a_model_says_so(model: fl.ModelData | None) -> None:
    with pytest.raises(ValueError, match="no model"):
        PerceptronEvaluator(one_part(1)).evaluate(fl.FLContext(model=model))


# Jobs


def small_demo(**arguments: Any) -> Demo:
    return build_demo(**{"num_clients": 3, "num_rounds": 3, "seed": 1, "local_epochs": 1, **arguments})


def test_the_demo_reaches_95_percent_on_test_data_that_nothing_else_has_seen() -> None:
    demo = build_demo("digits", num_clients=4, num_rounds=20, alpha=0.5, seed=1)
    result = demo.run()
    assert demo.test(result.weights)["accuracy"] >= 0.95
    assert result.best is not None
    assert result.best.metric_name == "accuracy"
    assert demo.test(result.best.weights)["accuracy"] >= 0.95
    first, last = result.reports[0].metrics, result.reports[-1].metrics
    assert last["server_validation"] > first["server_validation"]
    assert last["selection"] > first["selection"]
    assert len(result.reports) == 20
    assert all(report.accepted == ("site-1", "site-2", "site-3", "site-4") for report in result.reports)
    assert set(result.cross_site) == {"site-1", "site-2", "site-3", "site-4", "global_best"}
    assert result.quits == ()
    assert result.handler_failures == ()


def test_the_best_model_of_the_demo_is_the_one_that_scored_best_on_the_servers_data() -> None:
    demo = small_demo(num_rounds=5)
    result = demo.run()
    scores = [report.metrics["server_validation"] for report in result.reports]
    assert result.best is not None
    assert result.best.round == scores.index(max(scores))
    assert result.best.metric == max(scores)
    assert Perceptron.score(result.best.weights, demo.split.server)["accuracy"] == max(scores)


def test_the_weight_of_a_client_is_the_number_of_its_training_examples() -> None:
    demo = small_demo()
    result = demo.run()
    assert result.reports[0].total_weight == sum(len(part) for part in demo.split.train)


@pytest.mark.parametrize("kind", list(fl.Kind))
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(kind: fl.Kind) -> None:
    first, second, other = (small_demo(kind=kind, seed=seed).run() for seed in (1, 1, 2))
    assert bits(first.weights) == bits(second.weights)
    assert first.cross_site == second.cross_site
    assert [report.metrics for report in first.reports] == [report.metrics for report in second.reports]
    assert bits(first.weights) != bits(other.weights)


@pytest.mark.parametrize("kernel", fl.kernels.available())
def test_every_kernel_gives_the_same_bytes(kernel: str) -> None:
    result = small_demo(kernel=kernel).run()
    assert {report.kernel for report in result.reports} == {kernel}
    assert bits(result.weights) == bits(small_demo().run().weights)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bytes(threads: int) -> None:
    expected = bits(small_demo().run().weights)
    with num_threads(threads):
        assert bits(small_demo().run().weights) == expected


@pytest.mark.parametrize("max_workers", [1, 2, 3])
def test_any_number_of_workers_and_any_order_of_clients_gives_the_same_bytes(max_workers: int) -> None:
    demo = small_demo()
    with threadpool_limits(1, user_api="blas"):
        result = demo.server.run(demo.clients[::-1], max_workers=max_workers)
    assert bits(result.weights) == bits(small_demo().run().weights)


def test_exact_sums_give_the_demo_the_same_accuracy() -> None:
    demo = small_demo(exact=True)
    accuracy = demo.test(demo.run().weights)["accuracy"]
    assert accuracy == pytest.approx(demo.test(small_demo().run().weights)["accuracy"], abs=0.02)


def test_differences_train_as_well_as_full_weights() -> None:
    demo = build_demo("digits", num_rounds=10, seed=1, kind=fl.Kind.DIFF)
    result = demo.run()
    assert demo.test(result.weights)["accuracy"] >= 0.95
    assert all(len(report.accepted) == 4 for report in result.reports)


def test_the_breast_cancer_data_work_too() -> None:
    demo = build_demo("breast-cancer", num_clients=3, num_rounds=10, seed=1)
    result = demo.run()
    assert demo.server.weights["output.bias"].shape == (2,)
    assert demo.test(result.weights)["accuracy"] >= 0.93


def test_one_client_is_a_federation_too() -> None:
    demo = build_demo(num_clients=1, num_rounds=2, seed=1)
    result = demo.run()
    assert [report.accepted for report in result.reports] == [("site-1",)] * 2


def test_arguments_of_the_server_and_handlers_are_passed_on() -> None:
    handlers = {f"site-{i}": [RoundLogHandler(f"client.{i}")] for i in (1, 2, 3)}
    reporter = RoundLogHandler("server")
    demo = small_demo(
        handlers=[EarlyStoppingHandler(9)],
        reporters=[reporter],
        client_handlers=lambda name: handlers[name],
        min_contributions=2,
        on_bad_contribution="reject",
    )
    assert [type(handler) for handler in demo.server.settings.handlers] == [EarlyStoppingHandler, RoundLogHandler]
    assert demo.server.settings.handlers[-1] is reporter
    aggregation = demo.server.settings.aggregation
    assert (aggregation.min_contributions, aggregation.on_bad_contribution) == (2, "reject")
    assert [client.handlers for client in demo.clients] == [tuple(chain) for chain in handlers.values()]
    assert [client.name for client in demo.clients] == list(handlers)
    assert [type(handler) for handler in small_demo(handlers=[]).server.settings.handlers] == []


# Configuration

KNOWN: dict[str, type] = {
    "ModelSelectionHandler": ModelSelectionHandler,
    "ServerValidationHandler": ServerValidationHandler,
}


class Wrapper:
    """A component with a component in it."""

    def __init__(self, inner: object, plain: dict[str, int], evaluator: object = None) -> None:
        self.inner = inner
        self.plain = plain
        self.evaluator = evaluator


class Picky:
    """A component that refuses its argument."""

    def __init__(self, value: int) -> None:
        raise ValueError(f"{value} will not do")


class Broken:
    """A component whose constructor has a mistake."""

    def __init__(self) -> None:
        raise KeyError("forgotten")


def test_a_component_is_built_by_its_name() -> None:
    handler = build_component({"name": "ModelSelectionHandler", "args": {"min_delta": 0.25}}, KNOWN)
    assert type(handler) is ModelSelectionHandler
    assert handler.min_delta == 0.25
    assert type(build_component({"name": "ModelSelectionHandler"}, KNOWN)) is ModelSelectionHandler


def test_a_component_is_built_by_its_path() -> None:
    entry = {"path": "fed_learn.handlers.model_selection.ModelSelectionHandler", "args": {"mode": "min"}}
    handler = build_component(entry, {})
    assert type(handler) is ModelSelectionHandler
    assert handler.mode == "min"


def test_components_nest_and_plain_objects_stay_plain() -> None:
    entry = {
        "path": f"{__name__}.Wrapper",
        "args": {"inner": {"name": "ModelSelectionHandler", "args": {}}, "plain": {"a": 1, "b": 2}},
    }
    wrapper = build_component(entry, KNOWN)
    assert type(wrapper.inner) is ModelSelectionHandler
    assert wrapper.plain == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "plain",
    [
        {"name": "adam"},
        {"name": "adam", "args": {"lr": 0.1}},
        {"name": ["ModelSelectionHandler"]},
        {"name": None},
        {"args": {"lr": 0.1}},
        {"name": "ModelSelectionHandler", "lr": 0.1},
        {"path": "somewhere/model.pt", "format": "pt"},
        {},
    ],
    ids=str,
)
def test_an_argument_that_only_looks_like_a_component_stays_a_dict(plain: dict[str, Any]) -> None:
    entry = {"path": f"{__name__}.Wrapper", "args": {"inner": [plain], "plain": plain}}
    wrapper = build_component(json.loads(json.dumps(entry)), KNOWN)
    assert wrapper.plain == plain
    assert wrapper.inner == [plain]


def test_components_in_lists_are_built_and_the_rest_of_the_lists_stays() -> None:
    selection = {"name": "ModelSelectionHandler", "args": {"mode": "min"}}
    wrapped = {"path": f"{__name__}.Wrapper", "args": {"inner": [selection], "plain": {}}}
    entry = {"path": f"{__name__}.Wrapper", "args": {"inner": [1, selection, [wrapped, "x"], []], "plain": {}}}
    evaluator = object()
    number, handler, (wrapper, text), empty = build_component(entry, KNOWN, {"evaluator": evaluator}).inner
    assert (number, text, empty) == (1, "x", [])
    assert type(wrapper) is Wrapper
    assert wrapper.evaluator is evaluator
    assert isinstance(wrapper.inner, list)
    assert [(type(built), built.mode) for built in (handler, *wrapper.inner)] == [(ModelSelectionHandler, "min")] * 2


def test_what_the_job_supplies_goes_where_it_is_taken_and_not_given() -> None:
    evaluator, other = object(), {"given": 1}
    supplies = {"evaluator": evaluator, "nobody takes this": 1}
    entry: dict[str, Any] = {"path": f"{__name__}.Wrapper", "args": {"inner": 0, "plain": {}}}
    assert build_component(entry, {}, supplies).evaluator is evaluator
    entry["args"]["evaluator"] = other
    assert build_component(entry, {}, supplies).evaluator == other
    nested = {"path": f"{__name__}.Wrapper", "args": {"inner": entry, "plain": {}}}
    entry["args"].pop("evaluator")
    assert build_component(nested, {}, supplies).inner.evaluator is evaluator
    assert type(build_component({"name": "ModelSelectionHandler"}, KNOWN, supplies)) is ModelSelectionHandler


def test_a_demo_takes_its_handlers_from_a_configuration_and_supplies_the_evaluator() -> None:
    demo = small_demo(
        configured_handlers=[
            {"name": "ServerValidationHandler", "args": {"num_rounds_per_valid": 2}},
            {"path": "fed_learn.handlers.ModelSelectionHandler", "args": {"weigh_by_local_iter": True}},
        ]
    )
    validation, selection = demo.server.settings.handlers
    assert isinstance(validation, ServerValidationHandler)
    assert isinstance(validation.evaluator, PerceptronEvaluator)
    assert validation.evaluator.part is demo.split.server
    assert isinstance(selection, ModelSelectionHandler)
    result = demo.run()
    assert ["server_validation" in report.metrics for report in result.reports] == [False, True, True]
    assert result.best is not None


def test_a_configured_handler_gives_the_same_job_as_one_built_in_code() -> None:
    configured = small_demo(
        configured_handlers=[
            {"name": "ModelSelectionHandler"},
            {"name": "ServerValidationHandler", "args": {"num_rounds_per_valid": 1}},
        ]
    ).run()
    built = small_demo().run()
    assert configured.best is not None
    assert built.best is not None
    assert bits(configured.best.weights) == bits(built.best.weights)
    assert configured.best.metric == built.best.metric


BAD_ENTRIES: dict[str, tuple[Any, str]] = {
    "no object": ("ModelSelectionHandler", "needs either"),
    "null": (None, "needs either"),
    "a list": ([], "needs either"),
    "neither name nor path": ({"args": {}}, "needs either"),
    "both name and path": ({"name": "ModelSelectionHandler", "path": "a.B"}, "needs either"),
    "another key": ({"name": "ModelSelectionHandler", "arg": {}}, "'arg'"),
    "an unknown name": ({"name": "Modelselection"}, "known are ModelSelectionHandler, ServerValidationHandler"),
    "a name that is a list": ({"name": ["ModelSelectionHandler"]}, "name"),
    "a name that is an object": ({"name": {}}, "name"),
    "a path without a module": ({"path": "Handler"}, "package.module.Class"),
    "a path that is no str": ({"path": 3}, "package.module.Class"),
    "a relative path": ({"path": "..handlers.Handler"}, "path"),
    "an unknown module": ({"path": "no_such_module.Handler"}, "no_such_module"),
    "an unknown class": ({"path": "fed_learn.handlers.NoSuchHandler"}, "NoSuchHandler"),
    "no class": ({"path": "fed_learn.handlers.fire_event"}, "is no class"),
    "a class without a signature": ({"path": "builtins.dict"}, "dict"),
    "args that are a list": ({"name": "ModelSelectionHandler", "args": [1]}, "keyword arguments"),
    "args that are null": ({"name": "ModelSelectionHandler", "args": None}, "keyword arguments"),
    "an unknown argument": ({"name": "ModelSelectionHandler", "args": {"metric": "dice"}}, "metric"),
    "a missing argument": ({"name": "ServerValidationHandler", "args": {}}, "evaluator"),
    "a bad argument": ({"name": "ModelSelectionHandler", "args": {"mode": "best"}}, "mode must be"),
    "an argument that a user's class refuses": ({"path": f"{__name__}.Picky", "args": {"value": 3}}, "3 will not do"),
    "a class whose constructor has a mistake": ({"path": f"{__name__}.Broken"}, "Broken cannot be built: KeyError"),
    "a class in a list whose constructor has a mistake": (
        {"path": f"{__name__}.Wrapper", "args": {"inner": [{"path": f"{__name__}.Broken"}], "plain": {}}},
        "Broken cannot be built: KeyError: 'forgotten'",
    ),
    "an abstract class": ({"path": "fed_learn.components.ModelEvaluator"}, "abstract"),
    "a nested one that is bad": (
        {"name": "ServerValidationHandler", "args": {"evaluator": {"path": "a.B"}, "num_rounds_per_valid": 1}},
        "a.B",
    ),
}


@pytest.mark.parametrize(("entry", "message"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_an_entry_that_cannot_be_built_is_a_configuration_error(entry: Any, message: str) -> None:
    with pytest.raises(fl.ConfigError, match=message):
        build_component(entry, KNOWN)


def test_a_configured_component_that_is_no_handler_is_refused() -> None:
    with pytest.raises(fl.ConfigError, match="Fraction is no handler"):
        small_demo(configured_handlers=[{"path": "fractions.Fraction"}])


@pytest.fixture
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.mark.usefixtures("_own_path")
def test_a_configuration_file_can_name_classes_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "handlers_beside_the_config.py").write_text(
        "from fed_learn.handlers import RoundLogHandler\n\n\nclass Mine(RoundLogHandler):\n    pass\n", encoding="utf-8"
    )
    path = tmp_path / "config.json"
    entry = {"path": "handlers_beside_the_config.Mine", "args": {"logger_name": "mine"}}
    path.write_text(json.dumps({"handlers": [entry]}), encoding="utf-8")
    importlib.invalidate_caches()
    for _ in range(2):
        config = read_config(path)
    assert sys.path.count(str(tmp_path.resolve())) == 1
    assert config == {"handlers": [entry]}
    handler = build_component(config["handlers"][0], {})
    monkeypatch.delitem(sys.modules, "handlers_beside_the_config")
    assert isinstance(handler, RoundLogHandler)
    assert (type(handler).__name__, handler.logger_name) == ("Mine", "mine")


@pytest.mark.usefixtures("_own_path")
@pytest.mark.parametrize(
    ("source", "cause"),
    [("class Mine(:\n", SyntaxError), ("import no_such_module\n", ImportError), ("{}['key']\n", KeyError)],
    ids=["syntax error", "import error", "key error"],
)
def test_a_module_that_cannot_be_imported_is_a_configuration_error(
    source: str, cause: type[Exception], tmp_path: Path
) -> None:
    (tmp_path / "module_with_a_mistake.py").write_text(source, encoding="utf-8")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"handlers": [{"path": "module_with_a_mistake.Mine"}]}), encoding="utf-8")
    importlib.invalidate_caches()
    with pytest.raises(fl.ConfigError, match=r"path 'module_with_a_mistake\.Mine'") as caught:
        build_component(read_config(path)["handlers"][0], {})
    assert isinstance(caught.value.__cause__, cause)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_own_path")
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"{", "Expecting"), (b"[1]", "JSON list, not an object"), (b"\xff\xfe{}", "config.json")],
    ids=["missing", "no JSON", "no object", "no UTF-8"],
)
def test_a_configuration_file_that_cannot_be_used_is_a_configuration_error(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(fl.ConfigError, match=message) as caught:
        read_config(path)
    assert "config.json" in str(caught.value)
