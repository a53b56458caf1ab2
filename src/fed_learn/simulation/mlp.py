"""The demo's model: a two-layer perceptron in numpy, its training and its evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fed_learn.components import Learner, ModelEvaluator, TrainingResult
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.simulation.datasets import Part
from fed_learn.weights import Array, WeightDict

Float32Array: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Perceptron:
    """Features → hidden layer with ReLU → classes with softmax, float32; the weights are a weight dict.

    Args:
        num_features: Size of an example.
        num_classes: Number of classes.
        num_hidden: Units of the hidden layer.

    Example:
        >>> weights = Perceptron(64, 10).init(seed=0)
        >>> {name: array.shape for name, array in weights.items()}
        {'hidden.weight': (64, 128), 'hidden.bias': (128,), 'output.weight': (128, 10), 'output.bias': (10,)}
    """

    num_features: int
    num_classes: int
    num_hidden: int = 128

    def init(self, seed: int) -> dict[str, Array]:
        """Initial weights (He et al., 2015)."""
        rng = np.random.default_rng([seed, 1])

        def layer(fan_in: int, fan_out: int) -> Array:
            return rng.normal(0.0, np.sqrt(2.0 / fan_in), (fan_in, fan_out)).astype(np.float32)

        return {
            "hidden.weight": layer(self.num_features, self.num_hidden),
            "hidden.bias": np.zeros(self.num_hidden, np.float32),
            "output.weight": layer(self.num_hidden, self.num_classes),
            "output.bias": np.zeros(self.num_classes, np.float32),
        }

    @staticmethod
    def forward(weights: WeightDict, x: Float32Array) -> tuple[Float32Array, Float32Array]:
        """Activations of the hidden layer, and log-probabilities of the classes."""
        hidden = np.maximum(x @ weights["hidden.weight"] + weights["hidden.bias"], np.float32(0))
        logits = hidden @ weights["output.weight"] + weights["output.bias"]
        logits -= logits.max(axis=1, keepdims=True)
        return hidden, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    @classmethod
    def gradients(
        cls, weights: WeightDict, x: Float32Array, y: npt.NDArray[np.int64]
    ) -> tuple[dict[str, Array], float]:
        """Gradients of the mean cross-entropy of a batch, and that loss."""
        hidden, log_p = cls.forward(weights, x)
        picked = (np.arange(len(y)), y)
        delta = np.exp(log_p)
        delta[picked] -= 1
        delta /= np.float32(len(y))
        back = (delta @ weights["output.weight"].T) * (hidden > 0)
        gradients = {
            "hidden.weight": x.T @ back,
            "hidden.bias": back.sum(axis=0),
            "output.weight": hidden.T @ delta,
            "output.bias": delta.sum(axis=0),
        }
        return gradients, float(-log_p[picked].mean())

    @classmethod
    def score(cls, weights: WeightDict, part: Part) -> dict[str, float]:
        """Accuracy (0 to 1) and mean cross-entropy (nats) on some examples."""
        _, log_p = cls.forward(weights, part.x)
        return {
            "accuracy": float((log_p.argmax(axis=1) == part.y).mean()),
            "loss": float(-log_p[np.arange(len(part)), part.y].mean()),
        }


class PerceptronLearner(Learner):
    """Trains a `Perceptron` by mini-batch gradient descent with momentum.

    The order of the examples depends on the seed and the round alone, so a client that misses a round trains in the
    next as if it had not.

    Args:
        training_part: Examples to train on.
        selection_part: Examples to select models by.
        local_epochs: Passes over the training part in a round.
        learning_rate: Step size.
        momentum: Share of the last step that is kept.
        batch_size: Examples in a step.
        seed: Of the order of the examples; give each client its own.
    """

    mode = "max"

    def __init__(
        self,
        training_part: Part,
        selection_part: Part,
        *,
        local_epochs: int = 5,
        learning_rate: float = 0.05,
        momentum: float = 0.9,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.training_part = training_part
        self.selection_part = selection_part
        self.local_epochs = local_epochs
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.batch_size = batch_size
        self.seed = seed

    def train(self, weights: WeightDict, ctx: FLContext) -> TrainingResult:
        """Trains from `weights`. The aggregation weight is the number of examples."""
        rng = np.random.default_rng([self.seed, ctx[ContextKey.ROUND]])
        part, rate, momentum = self.training_part, np.float32(self.learning_rate), np.float32(self.momentum)
        trained = {name: array.copy() for name, array in weights.items()}
        velocity = {name: np.zeros_like(array) for name, array in weights.items()}
        losses: list[float] = []
        for _ in range(self.local_epochs):
            order = rng.permutation(len(part))
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                gradients, loss = Perceptron.gradients(trained, part.x[batch], part.y[batch])
                losses.append(loss)
                for name, gradient in gradients.items():
                    velocity[name] = momentum * velocity[name] - rate * gradient
                    trained[name] += velocity[name]
        return TrainingResult(trained, len(part), len(losses), {"train_loss": float(np.mean(losses))})

    def validate(self, weights: WeightDict, ctx: FLContext) -> Mapping[str, float]:
        """Accuracy and loss of `weights` on the selection part."""
        return Perceptron.score(weights, self.selection_part)


class PerceptronEvaluator(ModelEvaluator):
    """Scores a `Perceptron` on the server's validation part.

    Args:
        part: The examples.
    """

    metric_name = "accuracy"
    mode = "max"

    def __init__(self, part: Part) -> None:
        self.part = part
        self._metric = float("nan")

    def evaluate(self, ctx: FLContext) -> None:
        """Scores the model of the context and keeps its accuracy."""
        if ctx.model is None or ctx.model.weights is None:
            raise ValueError("the context holds no model to evaluate")
        self._metric = Perceptron.score(ctx.model.weights, self.part)[self.metric_name]

    def get_metric(self) -> float:
        """The accuracy."""
        return self._metric
