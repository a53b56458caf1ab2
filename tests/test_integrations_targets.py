"""Evaluators and learners of torch and Keras on targets and outputs of every form, by what the frameworks report."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from reference import bits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import fed_learn as fl
from fed_learn.integrations.batches import count_of
from fed_learn.integrations.keras import KerasEvaluator, KerasLearner
from fed_learn.integrations.keras import evaluate as evaluate_keras
from fed_learn.integrations.torch import TorchLearner
from fed_learn.integrations.torch import evaluate as evaluate_torch

RNG = np.random.default_rng(8)
X = RNG.normal(size=(33, 4)).astype(np.float32)
LABELS = (X[:, 0] > 0).astype(np.int64)
BOXES = RNG.normal(size=(33, 2)).astype(np.float32)
CE, MSE = "sparse_categorical_crossentropy", "mse"
BATCH_SIZE = 8
"""The last batch of 33 has one example: a mean over batches is another than over examples."""


def context(weights: Any = None) -> fl.FLContext:
    return fl.FLContext({fl.ContextKey.ROUND: 0}, model=None if weights is None else fl.ModelData(weights))


def slices() -> Iterator[slice]:
    return (slice(start, start + BATCH_SIZE) for start in range(0, len(X), BATCH_SIZE))


# How many examples there are


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (np.zeros(8), 8),
        (torch.zeros(8, 2), 8),
        (tf.zeros((8, 1)), 8),
        ((np.zeros(8), np.zeros((8, 4))), 8),
        ([np.zeros(8), {"a": np.zeros((8, 4)), "b": (np.zeros((8, 1)),)}], 8),
        ({"y": torch.zeros(8)}, 8),
        ((np.zeros(8), np.float32(0.5), 3, None, ["name"] * 8), 8),
        ([{"boxes": np.zeros((n, 4))} for n in (5, 7)], 2),
        (({"boxes": torch.zeros(5, 4)}, {"boxes": torch.zeros(5, 4)}), 2),
        ([torch.tensor(1), torch.tensor(0)], 2),
        (["a", "b", "c"], 3),
        ([[1, 0], [0, 1], [1, 1]], 3),
        (None, 6),
        ((), 6),
        ({"a": None}, 6),
        (3.0, 6),
    ],
)
def test_examples_are_counted_in_targets_of_any_form_and_else_in_the_inputs(targets: Any, count: int) -> None:
    assert count_of(np.zeros((6, 3)), targets) == count


def test_targets_that_disagree_are_refused_and_so_is_nothing() -> None:
    with pytest.raises(ValueError, match=r"targets .* disagree .* 7 or 8: \[\(8,\), \(7, 4\)\]"):
        count_of(np.zeros((8, 3)), (np.zeros(8), np.zeros((7, 4))))
    with pytest.raises(ValueError, match=r"inputs .* disagree .* 6 or 8"):
        count_of([np.zeros(8), np.zeros(6)], None)
    with pytest.raises(ValueError, match="nothing to count"):
        count_of("text", None)


# Several targets


class Linear(nn.Module):
    """Two heads on four features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.labels, self.boxes = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.labels(x), self.boxes(x)


class Items(Dataset[Any]):
    """A data set whose loader makes a list of a tuple of targets."""

    def __init__(self, put: Callable[[Any, Any], Any]) -> None:
        self.put = put

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return X[index], self.put(LABELS[index], BOXES[index])


PUT: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda labels, boxes: (labels, boxes),
    "dict": lambda labels, boxes: {"labels": labels, "boxes": boxes},
    "nested": lambda labels, boxes: {"both": (labels, {"boxes": boxes})},
}


def torch_data(kind: str, put: Callable[[Any, Any], Any]) -> Any:
    if kind == "dataset":
        return Items(put)
    if kind == "loader":
        return DataLoader(Items(put), batch_size=BATCH_SIZE)
    return [(torch.from_numpy(X[c]), put(torch.from_numpy(LABELS[c]), torch.from_numpy(BOXES[c]))) for c in slices()]


def joint_loss(outputs: Any, targets: Any) -> Any:
    labels, boxes = parts_of(targets)
    return functional.cross_entropy(outputs[0], labels) + functional.mse_loss(outputs[1], boxes)


def parts_of(targets: Any) -> Any:
    if isinstance(targets, dict):
        if "both" in targets:
            return targets["both"][0], targets["both"][1]["boxes"]
        return targets["labels"], targets["boxes"]
    return targets


def right(outputs: Any, targets: Any) -> Any:
    return outputs[0].argmax(1) == parts_of(targets)[0]


@pytest.mark.parametrize("kind", ["dataset", "loader", "batches"])
@pytest.mark.parametrize("form", PUT)
def test_torch_targets_of_several_tensors_count_and_score_as_in_a_plain_loop(kind: str, form: str) -> None:
    data = torch_data(kind, PUT[form])
    arguments: Any = {"metrics": {"right": right, "loss": "loss"}, "validation_metric": "right"}
    learner = TorchLearner(
        Linear(), data, data, loss=joint_loss, batch_size=BATCH_SIZE, optimizer=torch_sgd, epochs=2, **arguments
    )
    weights = fl.get_weights(learner.model)
    scores = learner.validate(weights, context())
    plain, x = Linear(), torch.from_numpy(X)
    labels, boxes = torch.from_numpy(LABELS), torch.from_numpy(BOXES)
    with torch.no_grad():
        outputs = plain(x)
    assert scores["right"] == pytest.approx(float((outputs[0].argmax(1) == labels).float().mean()))
    assert scores["loss"] == pytest.approx(float(joint_loss(outputs, (labels, boxes))), rel=1e-6)
    result = learner.train(weights, context())
    assert result.aggregation_weight == 33
    if kind == "dataset":  # in an order of its own
        assert result.n_iter == 8
        return
    assert result.n_iter == 10
    optimizer, total = torch_sgd(plain.parameters()), 0.0
    for _ in range(2):
        for c in slices():
            optimizer.zero_grad()
            loss = joint_loss(plain(x[c]), (labels[c], boxes[c]))
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(x[c])
    assert result.metrics["train_loss"] == pytest.approx(total / 66, rel=1e-12)
    assert bits(result.weights) == bits(fl.get_weights(plain))


def torch_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_a_list_of_dicts_has_one_for_each_example() -> None:
    boxes = [torch.zeros(n, 4) for n in (5, 0, 7)]
    data = [(torch.from_numpy(X[:3]), [{"boxes": b} for b in boxes]), (torch.from_numpy(X[3:4]), [{"boxes": boxes[0]}])]

    def mean_number(outputs: Any, targets: Any) -> Any:
        return torch.tensor([float(len(target["boxes"])) for target in targets])

    assert evaluate_torch(Linear(), data, {"boxes": mean_number})["boxes"] == pytest.approx((5 + 0 + 7 + 5) / 4)


def two_heads(losses: Any, **arguments: Any) -> Any:
    keras.utils.set_random_seed(0)
    x = keras.Input((4,), name="x")
    heads = [keras.layers.Dense(2, activation="softmax", name="labels")(x), keras.layers.Dense(2, name="boxes")(x)]
    model = keras.Model(x, heads)
    model.compile(keras.optimizers.SGD(0.0), losses, run_eagerly=True, **arguments)
    return model


@pytest.mark.parametrize("weighted", [{}, {"loss_weights": [0.5, 2.0]}], ids=["", "weighted"])
@pytest.mark.parametrize("losses", [[CE, MSE], {"labels": CE, "boxes": MSE}], ids=["list", "dict"])
@pytest.mark.parametrize("kind", ["arrays", "tf.data", "batches"])
def test_keras_models_of_several_outputs_have_the_losses_that_keras_reports(
    losses: Any, kind: str, weighted: Any
) -> None:
    if weighted and isinstance(losses, dict):
        weighted = {"loss_weights": {"labels": 0.5, "boxes": 2.0}}
    targets = {"labels": LABELS, "boxes": BOXES}
    data: Any = X, targets
    if kind == "tf.data":
        data = tf.data.Dataset.from_tensor_slices(data).batch(BATCH_SIZE)
    elif kind == "batches":
        data = [(X[c], [LABELS[c], BOXES[c]]) for c in slices()]
    model = two_heads(losses, **weighted)
    learner = KerasLearner(
        model, data, data, batch_size=BATCH_SIZE, metrics=["loss"], validation_metric="loss", mode="min"
    )
    expected = two_heads(losses, **weighted).evaluate(X, targets, batch_size=BATCH_SIZE, verbose=0, return_dict=True)
    weights = fl.get_weights(model)
    assert learner.validate(weights, context())["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    result = learner.train(weights, context())
    assert result.aggregation_weight == 33
    assert result.metrics["train_loss"] == pytest.approx(expected["loss"], rel=1e-6)  # at a learning rate of 0
    if not weighted:  # given to an evaluator, and not to the model
        evaluator = KerasEvaluator(model, data, "loss", loss=losses, batch_size=BATCH_SIZE)
        evaluator.evaluate(context(weights))
        assert evaluator.get_metric() == pytest.approx(expected["loss"], rel=1e-6)


# Losses and metrics of Keras by their names


def one_unit(loss: Any, **arguments: Any) -> Any:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid", **arguments)])
    model.compile(keras.optimizers.SGD(0.0), loss, run_eagerly=True)
    return model


BINARY = [
    *(
        "binary_crossentropy",
        "crossentropy",
        "binary_focal_crossentropy",
        "hinge",
        "squared_hinge",
        "categorical_hinge",
    ),
    *("mse", "mae", "mape", "msle", "log_cosh", "huber", "poisson", "kl_divergence", "cosine_similarity", "tversky"),
    "dice",
]


@pytest.mark.parametrize("y_shape", [(33,), (33, 1)], ids=str)
@pytest.mark.parametrize("loss", [*BINARY, keras.losses.hinge, keras.losses.BinaryCrossentropy(label_smoothing=0.1)])
def test_every_loss_of_a_model_with_one_output_is_what_keras_reports(loss: Any, y_shape: Any) -> None:
    y = LABELS.astype(np.float32).reshape(y_shape)
    model = one_unit(loss)
    expected = model.evaluate(X, y, batch_size=BATCH_SIZE, verbose=0)
    weights = fl.get_weights(model)
    arguments: Any = {"metrics": ["loss"], "validation_metric": "loss", "mode": "min"}
    learner = KerasLearner(model, (X, y), (X, y), batch_size=BATCH_SIZE, **arguments)
    assert learner.validate(weights, context())["loss"] == pytest.approx(expected, rel=1e-6)
    evaluator = KerasEvaluator(model, (X, y), "loss", loss=loss, batch_size=BATCH_SIZE)
    evaluator.evaluate(context(weights))
    assert evaluator.get_metric() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        ("sparse_categorical_crossentropy", LABELS),
        ("sparse_categorical_crossentropy", LABELS[:, None]),
        ("categorical_crossentropy", np.eye(2, dtype=np.float32)[LABELS]),
        ("categorical_focal_crossentropy", np.eye(2, dtype=np.float32)[LABELS]),
        ("crossentropy", LABELS),
        ("mse", BOXES),
    ],
    ids=str,
)
def test_every_loss_of_classes_is_what_keras_reports(loss: str, y: Any) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activation="softmax")])
    model.compile(loss=loss, run_eagerly=True)
    expected = model.evaluate(X, y, batch_size=BATCH_SIZE, verbose=0)
    assert evaluate_keras(model, (X, y), {"l": "loss"}, batch_size=BATCH_SIZE)["l"] == pytest.approx(expected, rel=1e-6)


def test_a_compiled_loss_has_what_layers_add_in_validation_as_in_training() -> None:
    y = LABELS.astype(np.float32)
    model = one_unit("mse", kernel_regularizer=keras.regularizers.L2(0.3), activity_regularizer="l2")
    arguments: Any = {"metrics": ["loss"], "validation_metric": "loss", "mode": "min"}
    learner = KerasLearner(model, (X, y), (X, y), batch_size=33, **arguments)
    weights = fl.get_weights(model)
    expected = model.evaluate(X, y, batch_size=33, verbose=0)
    assert learner.validate(weights, context())["loss"] == pytest.approx(expected, rel=1e-6)
    assert learner.train(weights, context()).metrics["train_loss"] == pytest.approx(expected, rel=1e-6)
    bare = evaluate_keras(model, (X, y), {"l": "loss"}, loss="mse")["l"]  # that of the call alone
    assert bare == pytest.approx(float(np.square(np.asarray(model(X))[:, 0] - y).mean()), rel=1e-6)
    assert bare < expected - 0.01


@pytest.mark.parametrize("loss", ["huberr", ["mse", "huberr"], {"a": "huberr"}], ids=str)
def test_a_loss_that_is_not_known_is_refused_at_once(loss: Any) -> None:
    with pytest.raises(ValueError, match="huberr"):
        KerasEvaluator(one_unit("mse"), (X, LABELS), "loss", loss=loss)


def test_functions_of_keras_take_targets_of_one_output_as_losses_do() -> None:
    y, model = LABELS.astype(np.float32), one_unit("mse")
    p = np.asarray(model(X))[:, 0].astype(np.float64)
    metrics = {
        "hinge": keras.losses.hinge,
        "accuracy": keras.metrics.binary_accuracy,
        "mae": keras.losses.MeanAbsoluteError(),
    }
    scores = evaluate_keras(model, (X, y), metrics, batch_size=BATCH_SIZE)
    assert scores["hinge"] == pytest.approx(np.maximum(1 - (2 * y - 1) * p, 0).mean(), rel=1e-6)
    assert scores["accuracy"] == pytest.approx(((p > 0.5) == y).mean(), rel=1e-6)
    assert scores["mae"] == pytest.approx(np.abs(p - y).mean(), rel=1e-6)


# Metrics of one's own


def score(side: str, outputs: Any, targets: Any, metric: Any, **arguments: Any) -> float:
    """Of a model that gives its inputs."""
    if side == "torch":
        data = [(torch.as_tensor(outputs), torch.as_tensor(targets))]
        return evaluate_torch(nn.Identity(), data, {"mine": metric}, **arguments)["mine"]
    x = keras.Input(outputs.shape[1:])
    return evaluate_keras(keras.Model(x, keras.layers.Identity()(x)), [(outputs, targets)], {"mine": metric})["mine"]


def squared(one: Any, other: Any) -> Any:
    return (one - other) ** 2


OUTPUT = np.array([[1], [2], [4]], np.float32)


@pytest.mark.parametrize("side", ["torch", "keras"])
def test_a_metric_that_broadcasts_examples_against_each_other_is_refused(side: str) -> None:
    targets = np.array([0, 0, 1], np.float32)
    message = r"'mine' gives an array of shape \(3, 3\) for outputs \(3, 1\) and targets \(3,\)"
    with pytest.raises(ValueError, match=message):
        score(side, OUTPUT, targets, squared)
    assert score(side, OUTPUT, targets[:, None], squared) == pytest.approx((1 + 4 + 9) / 3)
    assert score(side, OUTPUT[:, 0], targets, squared) == pytest.approx((1 + 4 + 9) / 3)
    if side == "torch":
        with pytest.raises(ValueError, match=message):
            score(side, OUTPUT, targets, "loss", loss=squared)


@pytest.mark.parametrize("side", ["torch", "keras"])
def test_a_metric_may_give_a_number_for_each_place_of_targets_or_outputs(side: str) -> None:
    outputs, targets = RNG.normal(size=(3, 5, 2)).astype(np.float32), RNG.normal(size=(3, 5, 2)).astype(np.float32)
    expected = float(squared(outputs, targets).mean())
    assert score(side, outputs, targets, squared) == pytest.approx(expected, rel=1e-6)
    for axes in (-1, (-1, -2), (0, 1, 2)):
        assert score(side, outputs, targets, lambda a, b, axes=axes: mean_over(a, b, axes)) == pytest.approx(
            expected, rel=1e-6
        )
    with pytest.raises(ValueError, match=r"shape \(5, 2\)"):
        score(side, outputs, targets, lambda a, b: mean_over(a, b, 0))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        score(side, outputs, targets, lambda a, b: mean_over(a, b, (0, 1)))


def mean_over(a: Any, b: Any, axes: Any) -> Any:
    mean = squared(np.asarray(a), np.asarray(b)).mean(axis=axes)
    return torch.as_tensor(mean) if isinstance(a, torch.Tensor) else mean


@pytest.mark.parametrize(
    ("side", "outputs", "targets"),
    [
        ("torch", (4, 5, 1), (4, 5)),
        ("torch", (4, 2, 6), (4, 5)),
        ("torch", (4, 2, 1), (4, 5)),
        ("torch", (4, 2, 5), (4, 1)),
        ("torch", (4, 2), (1,)),
        ("keras", (4, 7, 3), (4, 1)),
        ("keras", (4, 1, 3), (4, 7)),
        ("keras", (4, 3), (1,)),
        ("keras", (4, 1), (4,)),
    ],
    ids=str,
)
def test_accuracy_of_classes_never_broadcasts(side: str, outputs: Any, targets: Any) -> None:
    with pytest.raises(ValueError, match=f"'accuracy' is that of .* not of .*{outputs[-1]}.* and .*{targets[-1]}"):
        score(side, np.zeros(outputs, np.float32), np.zeros(targets, np.int64), "accuracy")


def test_accuracy_of_places_is_theirs() -> None:
    outputs, targets = RNG.normal(size=(4, 3, 5)).astype(np.float32), RNG.integers(3, size=(4, 5))
    expected = float((outputs.argmax(1) == targets).mean())
    assert score("torch", outputs, targets, "accuracy") == pytest.approx(expected)
    assert score("keras", outputs.transpose(0, 2, 1).copy(), targets, "accuracy") == pytest.approx(expected)


def test_accuracy_of_several_targets_is_refused() -> None:
    with pytest.raises(ValueError, match="'accuracy' is that of"):
        evaluate_torch(Linear(), torch_data("batches", PUT["dict"]), {"a": "accuracy"})
    with pytest.raises(ValueError, match="'accuracy' is that of"):
        evaluate_keras(two_heads([CE, MSE]), [(X, [LABELS, BOXES])], {"a": "accuracy"})
