"""The digits with numpy alone."""

import numpy as np
import numpy.typing as npt

from fed_learn.simulation import Part, Perceptron

from .tasks import BATCH_SIZE, Weights


def initial() -> Weights:
    """The weights of a network with one hidden layer."""
    return Perceptron(64, 10, num_hidden=32).init(seed=0)


def train(weights: Weights, part: Part, order: npt.NDArray[np.intp]) -> tuple[Weights, float]:
    """One pass of SGD."""
    trained = {name: array.copy() for name, array in weights.items()}
    losses = []
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        gradients, loss = Perceptron.gradients(trained, part.x[batch], part.y[batch])
        for name, gradient in gradients.items():
            trained[name] -= np.float32(0.5) * gradient
        losses.append(loss)
    return trained, float(np.mean(losses))


def accuracy(weights: Weights, part: Part) -> float:
    """The share of right answers."""
    return Perceptron.score(weights, part)["accuracy"]
