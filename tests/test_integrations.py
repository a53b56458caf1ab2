"""Evaluators and learners of torch and Keras models: what they score, train and send, on data of every kind."""

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from reference import bits
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fed_learn as fl
from fed_learn.adapters.layout import align
from fed_learn.integrations.batches import shuffled
from fed_learn.integrations.keras import KerasEvaluator, KerasLearner
from fed_learn.integrations.torch import TorchEvaluator, TorchLearner

RNG = np.random.default_rng(5)
X = RNG.normal(size=(10, 3)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
BATCHES = [(X[:6], Y[:6]), (X[6:8], Y[6:8]), (X[8:], Y[8:])]
"""Of different sizes, so that a mean over batches is another than over examples."""


def context(weights: Any = None, round: int = 0) -> fl.FLContext:
    return fl.FLContext({fl.ContextKey.ROUND: round}, model=None if weights is None else fl.ModelData(weights))


# Models, and what they should score


def torch_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, eps=1e-3), torch.nn.ReLU(), torch.nn.Linear(4, 2)
    )


def keras_model() -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.Dense(2),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def linear(weights: Any) -> tuple[Any, Any]:
    """Scores of a plain linear classifier, in float64."""
    logits = X.astype(np.float64) @ weights
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits.argmax(axis=1) == Y, -log_p[np.arange(10), Y]


HEAD = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)


class Examples(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


class Batches(keras.utils.PyDataset):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.epochs = 0

    def __len__(self) -> int:
        return len(BATCHES)

    def __getitem__(self, index: int) -> Any:
        return BATCHES[index]

    def on_epoch_end(self) -> None:
        self.epochs += 1


def tensors() -> TensorDataset:
    return TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))


TORCH_DATA: dict[str, Callable[[], Any]] = {
    "tensors": tensors,
    "dataset": Examples,
    "iterable dataset": Stream,
    "loader": lambda: DataLoader(tensors(), batch_size=7),
    "batches": lambda: [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in BATCHES],
}
KERAS_DATA: dict[str, Callable[[], Any]] = {
    "arrays": lambda: (X, Y),
    "tf.data": lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(7),
    "PyDataset": Batches,
    "batches": lambda: list(BATCHES),
}
SIDES = [("torch", name) for name in TORCH_DATA] + [("keras", name) for name in KERAS_DATA]


def evaluator_of(side: str, data: Any, metric: Any = "accuracy", **arguments: Any) -> tuple[Any, Any]:
    """An evaluator of a linear classifier, and the weights HEAD for it."""
    if side == "torch":
        return TorchEvaluator(torch.nn.Linear(3, 2, bias=False), data, metric, **arguments), {"weight": HEAD.T}
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, use_bias=False)])
    if metric == "loss":
        arguments.setdefault("loss", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return KerasEvaluator(model, data, metric, **arguments), {model.weights[0].path: HEAD}


def data_of(side: str, name: str) -> Any:
    return (TORCH_DATA if side == "torch" else KERAS_DATA)[name]()


# Evaluators


class Once:
    """Batches that can be read once only: an iterator."""

    def __iter__(self) -> "Once":
        return self

    def __next__(self) -> Any:
        raise StopIteration

    def __repr__(self) -> str:
        return "once"


@pytest.mark.parametrize(("side", "name"), SIDES, ids=str)
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_score_is_the_mean_over_examples_of_any_kind_of_data(side: str, name: str, metric: str) -> None:
    evaluator, weights = evaluator_of(side, data_of(side, name), metric)
    assert evaluator.metric_name == metric
    assert np.isnan(evaluator.get_metric())
    for _ in range(2):  # data are read again each time
        evaluator.evaluate(context(weights))
        hits, losses = linear(HEAD)
        assert evaluator.get_metric() == pytest.approx(
            float((hits if metric == "accuracy" else losses).mean()), abs=1e-6
        )


@pytest.mark.parametrize("side", ["torch", "keras"])
@pytest.mark.parametrize("per_example", [True, False])
def test_a_function_is_a_metric_whether_it_gives_one_number_or_one_for_each_example(
    side: str, per_example: bool
) -> None:
    def first_logit(one: Any, other: Any) -> Any:
        outputs = one if side == "torch" else other  # torch: outputs and targets; Keras: targets and outputs
        column = outputs[:, 0]
        return column if per_example else (column.mean() if side == "torch" else keras.ops.mean(column))

    evaluator, weights = evaluator_of(side, data_of(side, "batches"), first_logit)
    evaluator.evaluate(context(weights))
    assert evaluator.get_metric() == pytest.approx(float((X @ HEAD)[:, 0].mean()), abs=1e-6)
    assert evaluator.metric_name == "first_logit"


def test_metrics_that_keep_state_see_all_batches_and_begin_anew() -> None:
    class Largest:
        def reset(self) -> None:
            self.value = -np.inf

        def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
            self.value = max(self.value, float(outputs.max()))

        def compute(self) -> torch.Tensor:
            return torch.tensor(self.value)

    evaluator, weights = evaluator_of("torch", data_of("torch", "batches"), Largest())
    evaluator.evaluate(context({"weight": HEAD.T * np.float32(9)}))
    evaluator.evaluate(context(weights))
    assert evaluator.get_metric() == pytest.approx(float((X @ HEAD).max()), rel=1e-6)
    assert evaluator.metric_name == "Largest"

    evaluator, weights = evaluator_of("keras", data_of("keras", "batches"), keras.metrics.SparseCategoricalAccuracy())
    for _ in range(2):
        evaluator.evaluate(context(weights))
        assert evaluator.get_metric() == pytest.approx(linear(HEAD)[0].mean())
    assert evaluator.metric_name == "sparse_categorical_accuracy"


def test_evaluating_changes_neither_modes_nor_statistics_nor_gradients() -> None:
    model = torch_model()
    model[1].eval()  # a frozen normalization in a model that trains
    weights = fl.get_weights(model)
    evaluator = TorchEvaluator(model, tensors())
    evaluator.evaluate(context(weights))
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert bits(fl.get_weights(model)) == bits(weights)
    assert all(parameter.grad is None for parameter in model.parameters())
    other = keras_model()
    weights = fl.get_weights(other)
    KerasEvaluator(other, (X, Y)).evaluate(context(weights))
    assert bits(fl.get_weights(other)) == bits(weights)


def test_modes_are_put_back_when_the_evaluation_fails() -> None:
    model = torch_model()
    evaluator = TorchEvaluator(model, [(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))])
    with pytest.raises(RuntimeError):
        evaluator.evaluate(context(fl.get_weights(model)))
    assert all(module.training for module in model.modules())


def test_what_the_global_model_lacks_stays_local() -> None:
    model = torch_model()
    model[1].get_buffer("num_batches_tracked").fill_(7)
    weights = fl.get_weights(model, only=lambda name: not name.endswith("num_batches_tracked"))
    TorchEvaluator(model, tensors()).evaluate(context({name: array * 0 for name, array in weights.items()}))
    assert model[1].get_buffer("num_batches_tracked") == 7
    assert not fl.get_weights(model)["0.weight"].any()


@pytest.mark.parametrize("side", ["torch", "keras"])
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(side: str) -> None:
    evaluator, weights = evaluator_of(side, data_of(side, "batches"))
    before = fl.get_weights(evaluator.model)
    name = next(iter(weights))
    with pytest.raises(fl.NamesError, match="other"):
        evaluator.evaluate(context({**weights, "other": np.zeros(1, np.float32)}))
    with pytest.raises(fl.ShapeError):
        evaluator.evaluate(context({name: np.zeros((9, 9), np.float32)}))
    with pytest.raises(fl.ModelError, match="no model"):
        evaluator.evaluate(context())
    assert bits(fl.get_weights(evaluator.model)) == bits(before)


@pytest.mark.parametrize("side", ["torch", "keras"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metric": "f1"}, ValueError, "'f1'"),
        ({"metric": 3}, ValueError, "not 3"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"data": Once()}, TypeError, "once only"),
        ({"data": 3}, TypeError, "yields no batches"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_refused(side: str, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluator_of(side, **{"data": data_of(side, "batches"), **arguments})


@pytest.mark.parametrize("side", ["torch", "keras"])
@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "no examples"),
        ([(X, Y, Y)], TypeError, "a tuple of 3"),
        ([{"x": X}], TypeError, "a dict"),
        ([(X, Y.astype(np.float32))], ValueError, "'accuracy'"),
        ([(X, np.eye(2)[Y])], ValueError, "'accuracy'"),
    ],
    ids=["nothing", "three", "dict", "float targets", "one-hot targets"],
)
def test_data_that_cannot_be_scored_are_refused(side: str, batches: Any, error: type[Exception], message: str) -> None:
    def tensor(value: Any) -> Any:
        return torch.from_numpy(value) if side == "torch" and isinstance(value, np.ndarray) else value

    data = [tuple(map(tensor, batch)) if isinstance(batch, tuple) else batch for batch in batches]
    evaluator, weights = evaluator_of(side, data)
    with pytest.raises(error, match=message):
        evaluator.evaluate(context(weights))


def test_a_keras_loss_must_come_from_somewhere() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="'loss' needs one"):
        KerasEvaluator(model, (X, Y), "loss")
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    evaluator = KerasEvaluator(model, (X, Y), "loss")
    evaluator.evaluate(context(fl.get_weights(model)))
    assert evaluator.get_metric() > 0
    with pytest.raises(ValueError, match=r"not equally many: \(9, 3\) and \(10,\)"):
        KerasEvaluator(model, (X[:9], Y))


def test_torch_models_of_several_inputs_get_them_as_arguments() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 2, bias=False)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.head(left + right))

    half, y = torch.from_numpy(X) / 2, torch.from_numpy(Y)
    for x in ((half, half), [half, half], {"right": half, "left": half}):
        evaluator = TorchEvaluator(Two(), [(x, y)])
        evaluator.evaluate(context({"head.weight": HEAD.T}))
        assert evaluator.get_metric() == pytest.approx(linear(HEAD)[0].mean())


def test_server_validation_is_three_lines() -> None:
    data, model = tensors(), torch_model()
    learner = TorchLearner(torch_model(), data, data)

    evaluator = TorchEvaluator(model, DataLoader(data, batch_size=256))
    handlers = [fl.ServerValidationHandler(evaluator, num_rounds_per_valid=1)]
    server = fl.FederatedServer(fl.get_weights(model), num_rounds=2, handlers=handlers)

    result = server.run([fl.FederatedClient("site-1", learner)])
    assert result.best is not None
    assert result.best.metric_name == "accuracy"
    assert [report.metrics["server_validation"] for report in result.reports][result.best.round] == result.best.metric


# Learners


def learner_of(side: str, data: Any = None, **arguments: Any) -> Any:
    if side == "torch":
        arguments.setdefault("optimizer", torch_sgd)
        return TorchLearner(torch_model(), tensors() if data is None else data, tensors(), **arguments)
    return KerasLearner(keras_model(), (X, Y) if data is None else data, (X, Y), **arguments)


def torch_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("side", ["torch", "keras"])
def test_training_depends_on_seed_and_round_alone_and_leaves_its_input_as_it_is(side: str) -> None:
    learner = learner_of(side, batch_size=4, epochs=2, seed=3)
    weights = fl.get_weights(learner.model)
    before = bits(weights)
    first = learner.train(weights, context(round=1))
    kept = bits(first.weights)
    learner.train(weights, context(round=2))  # nothing of it stays, in the optimizer neither
    again = learner.train(weights, context(round=1))
    assert bits(weights) == before
    assert bits(first.weights) == bits(again.weights) == kept != before
    other_round = learner.train(weights, context(round=2))
    learner.seed = 4
    other_seed = learner.train(weights, context(round=1))
    assert len({str(bits(result.weights)) for result in (first, other_round, other_seed)}) == 3


@pytest.mark.parametrize(("side", "name"), SIDES, ids=str)
def test_training_on_any_kind_of_data_lowers_the_loss_and_counts(side: str, name: str) -> None:
    data = data_of(side, name)
    learner = learner_of(side, data, epochs=20, batch_size=7)
    weights = fl.get_weights(learner.model)
    result = learner.train(weights, context())
    assert result.aggregation_weight == 10
    assert result.n_iter == 20 * (3 if name in ("batches", "PyDataset") else 2)
    assert list(result.metrics) == ["train_loss"]
    before, after = (learner.validate(w, context()) for w in (weights, result.weights))
    assert after["loss"] < before["loss"]
    assert list(after) == ["accuracy", "loss"]
    if name == "PyDataset":
        assert data.epochs == 20


def test_a_keras_model_that_is_compiled_anew_trains_with_its_new_optimizer() -> None:
    learner = learner_of("keras")
    weights = fl.get_weights(learner.model)
    trained = learner.train(weights, context()).weights
    learner.model.compile(keras.optimizers.SGD(0.0), learner.model.loss)
    kernels = [name for name in weights if name.endswith("kernel")]
    still = learner.train(weights, context()).weights
    assert all(bits(still)[name] == bits(weights)[name] != bits(trained)[name] for name in kernels)


def test_a_lone_last_example_joins_the_batch_before_it() -> None:
    rng = np.random.default_rng(0)
    assert [len(batch) for batch in shuffled(9, 4, rng)] == [4, 5]
    assert [len(batch) for batch in shuffled(10, 4, rng)] == [4, 4, 2]
    assert [len(batch) for batch in shuffled(1, 4, rng)] == [1]
    assert [len(batch) for batch in shuffled(3, 1, rng)] == [1, 1, 1]
    assert sorted(np.concatenate(shuffled(9, 4, rng)).tolist()) == list(range(9))
    learner = learner_of("torch", batch_size=9)  # BatchNorm1d refuses to be trained on one
    assert learner.train(fl.get_weights(learner.model), context()).n_iter == 1


@pytest.mark.parametrize("side", ["torch", "keras"])
def test_a_contribution_has_the_variables_of_the_global_model_and_frozen_ones_stay(side: str) -> None:
    learner = learner_of(side, epochs=2)
    if side == "torch":
        learner.model[0].requires_grad_(False)
        chosen, frozen = ["3.weight", "0.weight"], "0.weight"
    else:
        learner.model.layers[0].trainable = False
        learner.model.compile(keras.optimizers.SGD(0.1), learner.model.loss)
        first, last = learner.model.layers[0].kernel.path, learner.model.layers[3].kernel.path
        chosen, frozen = [last, first], first
    everything = fl.get_weights(learner.model)
    weights = {name: everything[name] for name in chosen}
    result = learner.train(weights, context())
    assert list(result.weights) == chosen
    assert bits(result.weights)[frozen] == bits(weights)[frozen]
    assert bits(result.weights)[chosen[0]] != bits(weights)[chosen[0]]


@pytest.mark.parametrize("side", ["torch", "keras"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"data": Once()}, TypeError, "once only"),
        ({"metrics": ["accuracy", "auc"]}, ValueError, "'auc'"),
        ({"validation_metric": "dice"}, ValueError, "'dice'"),
    ],
    ids=str,
)
def test_a_learner_that_cannot_be_is_refused(side: str, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        learner_of(side, **arguments)


def test_a_keras_model_must_be_compiled_and_data_must_not_be_empty() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"compile\(\)"):
        KerasLearner(model, (X, Y), (X, Y))
    for side in ("torch", "keras"):
        learner = learner_of(side, [])
        with pytest.raises(ValueError, match="no examples"):
            learner.train(fl.get_weights(learner.model), context())


@pytest.mark.parametrize("side", ["torch", "keras"])
def test_models_are_selected_by_any_metric(side: str) -> None:
    def confidence(one: Any, other: Any) -> Any:
        outputs = np.asarray(one if side == "torch" else other)
        return torch.tensor(float(outputs.max())) if side == "torch" else float(outputs.max())

    metrics = {"confidence": confidence, "loss": "loss"}
    learner = learner_of(side, metrics=metrics, validation_metric="loss", mode="min")
    client = fl.FederatedClient("site-1", learner)
    weights = fl.get_weights(learner.model)
    contribution = client.train_round(0, lambda: weights)
    assert contribution is not None
    assert {"initial_confidence", "initial_loss", "train_loss"} <= set(contribution.metrics)
    assert contribution.metrics["initial_validation_metric"] == contribution.metrics["initial_loss"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras warns itself as it saves
@pytest.mark.parametrize("side", ["torch", "keras"])
def test_arguments_are_kept_and_everything_can_be_pickled(side: str) -> None:
    learner = learner_of(side, epochs=2, batch_size=4, seed=9)
    assert (learner.epochs, learner.batch_size, learner.seed, learner.metrics) == (2, 4, 9, ("accuracy", "loss"))
    assert (learner.validation_metric, learner.mode, learner.layout) == ("accuracy", "max", None)
    weights = fl.get_weights(learner.model)
    trained = learner.train(weights, context())  # what is pickled has been in use
    scored = learner_of(side).model  # whose optimizer is built, else Keras warns
    evaluator = TorchEvaluator(scored, tensors()) if side == "torch" else KerasEvaluator(scored, (X, Y))
    assert (evaluator.metric, evaluator.batch_size, evaluator.layout) == ("accuracy", 256, None)
    other, scorer = pickle.loads(pickle.dumps((learner, evaluator)))
    same = other.train(weights, context())
    assert bits(same.weights) == bits(trained.weights)
    theirs = dict(zip(fl.get_weights(scored), weights.values(), strict=True))  # Keras names another model otherwise
    for each in (evaluator, scorer):
        each.evaluate(context(theirs))
    assert scorer.get_metric() == evaluator.get_metric() == learner.validate(weights, context())["accuracy"]


# Both in one federation


def test_clients_of_both_frameworks_train_alike_through_a_map() -> None:
    reference = torch_model()
    weights = fl.get_weights(reference, only=lambda name: not name.endswith("num_batches_tracked"))
    weights = {name: array + np.float32(0.1) for name, array in weights.items()}
    model = keras_model()
    layout = align(reference, model)
    by_keras = KerasLearner(model, (X, Y), (X, Y), epochs=3, batch_size=5, layout=layout)
    by_torch = learner_of("torch", epochs=3, batch_size=5)
    one, other = (learner.train(weights, context()) for learner in (by_torch, by_keras))
    assert list(one.weights) == list(other.weights) == list(weights)
    for name in weights:
        # torch keeps the running variance unbiased
        tolerance = 0.1 if name.endswith("running_var") else 1e-4
        np.testing.assert_allclose(one.weights[name], other.weights[name], atol=tolerance)
        if name != "0.bias":  # a normalization takes it out again
            assert np.abs(one.weights[name] - weights[name]).max() > 1e-3
    assert by_torch.validate(weights, context()) == pytest.approx(by_keras.validate(weights, context()), abs=1e-5)
    evaluator = KerasEvaluator(keras_model(), (X, Y), "loss", layout=align(reference, keras_model()))
    assert evaluator.layout is not None


def test_variables_of_the_global_model_that_the_local_one_lacks_come_back_as_they_were() -> None:
    reference = torch_model()
    weights = fl.get_weights(reference)
    weights["1.num_batches_tracked"] = np.array(5)
    model = keras_model()
    learner = KerasLearner(model, (X, Y), (X, Y), layout=align(reference, model))
    trained = learner.train(weights, context()).weights
    assert list(trained) == list(weights)
    assert trained["1.num_batches_tracked"] == 5


def test_learners_side_by_side_give_the_bits_of_learners_in_turn() -> None:
    learners = [learner_of(side, epochs=5, batch_size=4, seed=seed) for seed in (1, 2) for side in ("torch", "keras")]
    starts = [fl.get_weights(learner.model) for learner in learners]

    def train(pair: Any) -> Any:
        return bits(pair[0].train(pair[1], context()).weights)

    in_turn = list(map(train, zip(learners, starts, strict=True)))
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(train, zip(learners, starts, strict=True))) == in_turn
