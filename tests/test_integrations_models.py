"""Evaluators and learners of torch and Keras: batches, inputs, modes, names after pickling, and maps of parts."""

import copy
import pickle
import re
from typing import Any

import keras
import numpy as np
import pytest
import torch
from reference import bits
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import fed_learn as fl
from fed_learn.integrations.keras import KerasEvaluator, KerasLearner
from fed_learn.integrations.keras import evaluate as evaluate_keras
from fed_learn.integrations.torch import TorchEvaluator, TorchLearner

RNG = np.random.default_rng(8)
X = RNG.normal(size=(33, 4)).astype(np.float32)
LABELS = (X[:, 0] > 0).astype(np.int64)
BOXES = RNG.normal(size=(33, 2)).astype(np.float32)
CE, MSE = "sparse_categorical_crossentropy", "mse"


def context(weights: Any = None) -> fl.FLContext:
    return fl.FLContext({fl.ContextKey.ROUND: 0}, model=None if weights is None else fl.ModelData(weights))


def tensors() -> TensorDataset:
    return TensorDataset(torch.from_numpy(X), torch.from_numpy(LABELS))


def torch_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def one_unit(loss: Any, **arguments: Any) -> Any:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid", **arguments)])
    model.compile(keras.optimizers.SGD(0.0), loss, run_eagerly=True)
    return model


# Batches


class Volumes(Dataset[Any]):
    """Of several sizes, which no batch of more than one can hold."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return torch.full((1, 4 + index, 4, 4), float(index)), torch.tensor(index % 2)


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.conv(x).mean((2, 3, 4)))


def test_batches_of_one_are_of_one_in_training_and_validation() -> None:
    learner = TorchLearner(Segmenter(), Volumes(), Volumes(), batch_size=1)
    weights = fl.get_weights(learner.model)
    result = learner.train(weights, context())
    assert (result.n_iter, result.aggregation_weight) == (5, 5)
    model = Segmenter()
    fl.set_weights(model, weights)
    with torch.no_grad():
        hits = [float(model(x[None]).argmax(1) == y) for x, y in (Volumes()[i] for i in range(5))]
    assert learner.validate(weights, context())["accuracy"] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("side", ["torch", "keras"])
@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_validation_has_batches_of_batch_size(side: str, batch_size: int) -> None:
    seen: list[int] = []

    def largest(outputs: Any, targets: Any) -> Any:
        seen.append(len(targets))
        return torch.zeros(()) if side == "torch" else 0.0

    arguments: Any = {"batch_size": batch_size, "metrics": {"largest": largest}, "validation_metric": "largest"}
    if side == "torch":
        data: Any = tensors()
        learner: Any = TorchLearner(nn.Linear(4, 2), data, data, **arguments)
    else:
        learner = KerasLearner(one_unit("mse"), (X, LABELS), (X, LABELS), **arguments)
    learner.validate(fl.get_weights(learner.model), context())
    assert sum(seen) == 33
    assert seen[0] == min(batch_size, 33)


def test_keras_arrays_may_be_several_inputs_or_outputs() -> None:
    a, b = keras.Input((3,), name="a"), keras.Input((1,), name="b")
    joined = keras.layers.Concatenate()([a, b])
    targets = {"labels": LABELS, "boxes": BOXES}
    heads = [
        keras.layers.Dense(2, activation="softmax", name="labels")(joined),
        keras.layers.Dense(2, name="boxes")(joined),
    ]
    for outputs, losses, y in ((heads[0], CE, LABELS), (heads, [CE, MSE], targets)):
        model = keras.Model([a, b], outputs)
        model.compile(keras.optimizers.SGD(0.0), losses, run_eagerly=True)
        weights = fl.get_weights(model)
        expected = model.evaluate([X[:, :3], X[:, 3:]], y, batch_size=8, verbose=0, return_dict=True)["loss"]
        for x in ([X[:, :3], X[:, 3:]], (X[:, :3], X[:, 3:]), {"a": X[:, :3], "b": X[:, 3:]}):
            if not (isinstance(y, dict) and not isinstance(x, dict)):
                assert evaluate_keras(model, [x, y], {"l": "loss"}, batch_size=8)["l"] == pytest.approx(
                    expected, rel=1e-6
                )
            learner = KerasLearner(
                model, (x, y), (x, y), batch_size=8, metrics=["loss"], validation_metric="loss", mode="min"
            )
            result = learner.train(weights, context())
            assert (result.n_iter, result.aggregation_weight) == (4, 33)
            assert result.metrics["train_loss"] == pytest.approx(expected, rel=1e-5)
            assert learner.validate(weights, context())["loss"] == pytest.approx(expected, rel=1e-6)


def test_arrays_that_might_be_two_batches_are_refused_and_lists_of_batches_are_not() -> None:
    pair = X, X
    with pytest.raises(ValueError, match=r"arrays \(x, y\) or two batches: \[\(33, 4\), \(33, 4\)\] and"):
        KerasLearner(one_unit("mse"), (pair, pair), (X, X))
    with pytest.raises(ValueError, match=r"not equally many: \[\(33, 4\), \(32, 4\)\] and \(33,\)"):
        KerasEvaluator(one_unit("mse"), ([X, X[1:]], LABELS))
    batches = [(X[:20], LABELS[:20]), (X[20:], LABELS[20:])]
    model = one_unit("mse")
    expected = model.evaluate(X, LABELS, batch_size=33, verbose=0)
    assert evaluate_keras(model, batches, {"l": "loss"})["l"] == pytest.approx(expected, rel=1e-6)


# Modes of torch


def frozen_in_the_middle() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[1].eval()
    return model


def test_parts_in_eval_mode_stay_in_it_in_training() -> None:
    data = tensors()
    learner = TorchLearner(frozen_in_the_middle(), data, data, batch_size=33, optimizer=torch_sgd, epochs=2)
    weights = fl.get_weights(learner.model)
    for _ in range(2):
        trained = learner.train(weights, context()).weights
        assert learner.validate(trained, context())["loss"] > 0
    plain = frozen_in_the_middle()
    order = np.random.default_rng([0, 0])
    optimizer = torch_sgd(plain.parameters())
    for _ in range(2):
        chosen = torch.from_numpy(order.permutation(33))
        optimizer.zero_grad()
        loss: Any = functional.cross_entropy(plain(data.tensors[0][chosen]), data.tensors[1][chosen])
        loss.backward()
        optimizer.step()
    assert bits(trained) == bits(fl.get_weights(plain))
    assert bits(trained)["1.running_mean"] == bits(weights)["1.running_mean"]
    assert bits(trained)["3.running_mean"] != bits(weights)["3.running_mean"]


def test_a_model_in_eval_mode_as_a_whole_is_trained_and_its_own_train_method_is_heard() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self[3].eval()
            return self

    data = tensors()
    model = Frozen(*frozen_in_the_middle()).eval()
    learner = TorchLearner(model, data, data)
    weights = fl.get_weights(model)
    trained = bits(learner.train(weights, context()).weights)
    assert trained["1.running_mean"] != bits(weights)["1.running_mean"]
    assert trained["3.running_mean"] == bits(weights)["3.running_mean"]


# Names of Keras, which change as a model is saved


@keras.saving.register_keras_serializable("test_integrations_models")
class Subclassed(keras.Model):  # type: ignore[misc, unused-ignore]
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.first, self.inner = keras.layers.Dense(4, name="first"), sequential()

    def call(self, x: Any) -> Any:
        return self.inner(self.first(x))


def sequential() -> Any:
    layers = [keras.Input((4,)), keras.layers.Dense(3, name="d"), keras.layers.BatchNormalization(name="bn")]
    return keras.Sequential([*layers, keras.layers.Dense(2, activation="softmax", name="out")], name="net")


def nested() -> Any:
    x = keras.Input((4,))
    return keras.Model(x, sequential()(keras.layers.Dense(4, name="first")(x)), name="outer")


def subclassed() -> Any:
    model = Subclassed(name="sub")
    model(X)
    return model


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras warns itself as it saves
@pytest.mark.parametrize("make", [sequential, nested, subclassed])
@pytest.mark.parametrize("again", [lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_pickled_learners_and_evaluators_take_the_names_of_the_job(make: Any, again: Any) -> None:
    model = make()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.5), CE, run_eagerly=True)
    weights = fl.get_weights(model)
    learner = KerasLearner(model, (X, LABELS), (X, LABELS), epochs=2)
    trained, scores = learner.train(weights, context()), learner.validate(weights, context())
    evaluator = KerasEvaluator(model, (X, LABELS))
    loaded, scorer = again(again((learner, evaluator)))
    assert list(fl.get_weights(loaded.model)) == list(weights) == list(fl.get_weights(scorer.model))
    result = loaded.train(weights, context())
    assert bits(result.weights) == bits(trained.weights) != bits(weights)
    assert loaded.validate(weights, context()) == pytest.approx(scores, rel=1e-6)
    scorer.evaluate(context(weights))
    assert scorer.get_metric() == pytest.approx(scores["accuracy"])


@keras.saving.register_keras_serializable("test_integrations_models")
class Unbuilt(keras.Model):  # type: ignore[misc, unused-ignore]
    """Tells Keras nothing by which it could make the variables as it loads one."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.head = keras.layers.Dense(2, name="head")

    def build(self, input_shape: Any) -> None:
        self.head.build(input_shape)
        self.built = True

    def get_build_config(self) -> None:
        return None

    def call(self, x: Any) -> Any:
        return self.head(x)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras warns itself as it saves
def test_a_model_that_comes_back_from_pickle_without_variables_is_refused_by_name() -> None:
    model = Unbuilt(name="unbuilt")
    model(X)
    pickled = pickle.dumps(KerasEvaluator(model, (X, LABELS)))
    with pytest.raises(fl.ModelError, match=r"'unbuilt' came back from pickle with 0 of its 2 variables"):
        pickle.loads(pickled)


# Maps, and global models that are a part


@pytest.mark.parametrize("global_side", ["torch", "keras"])
def test_through_a_map_a_part_of_the_global_model_is_loaded_and_sent(global_side: str) -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    other = sequential()
    other.compile(keras.optimizers.SGD(0.1), CE, run_eagerly=True)
    data = tensors()
    if global_side == "torch":
        learner: Any = KerasLearner(other, (X, LABELS), (X, LABELS), layout=fl.align(one, other, strict=False))
        whole, part, local = fl.get_weights(one), "^2[.]", "d/kernel"
    else:
        learner = TorchLearner(one, data, data, layout=fl.align(other, one, strict=False))
        whole, part, local = fl.get_weights(other), "out/", "0.weight"
    local_name = next(name for name in fl.get_weights(learner.model) if name.endswith(local))
    weights = {name: array + 1 for name, array in whole.items() if re.search(part, name)}
    assert len(weights) == 2
    before = fl.get_weights(learner.model)
    learner.validate(weights, context())
    loaded = fl.get_weights(learner.model)
    changed = [name for name in before if bits(before)[name] != bits(loaded)[name]]
    assert changed == (["net/out/kernel", "net/out/bias"] if global_side == "torch" else ["2.weight", "2.bias"])
    back = learner.layout.inverse(loaded, base={**whole, **weights})
    assert {name: bits(back)[name] for name in weights} == bits(weights)
    result = learner.train(weights, context())
    assert list(result.weights) == list(weights)
    assert bits(result.weights) != bits(weights)
    assert bits(fl.get_weights(learner.model))[local_name] != bits(before)[local_name]  # trained here, and stays
    with pytest.raises(fl.NamesError, match="other"):
        learner.validate({**weights, "other": np.zeros(1, np.float32)}, context())


# What a learner cannot be


@pytest.mark.parametrize("side", ["torch", "keras"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 1.5}, TypeError, "epochs must be an int, not 1.5"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an int"),
        ({"mode": "maximum"}, ValueError, "mode must be 'max' or 'min', not 'maximum'"),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_kind_are_refused_at_once(side: str, arguments: Any, error: Any, message: str) -> None:
    if side == "torch":
        with pytest.raises(error, match=message):
            TorchLearner(nn.Linear(4, 2), tensors(), tensors(), **arguments)
    else:
        model = one_unit("mse")
        with pytest.raises(error, match=message):
            KerasLearner(model, (X, LABELS), (X, LABELS), **arguments)


def test_evaluators_refuse_batches_of_no_size() -> None:
    with pytest.raises(TypeError, match=r"batch_size must be an int, not 2\.5"):
        TorchEvaluator(nn.Linear(4, 2), tensors(), batch_size=2.5)  # type: ignore[arg-type]
