"""The digits with Keras."""

import keras
import numpy as np
import numpy.typing as npt

from fed_learn.simulation import Part

from .tasks import BATCH_SIZE, Weights, weights_of, with_weights


def network() -> keras.Model:
    """A small network with batch normalisation."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(32, name="hidden"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.ReLU(),
        keras.layers.Dense(10, name="output"),
    ]
    made = keras.Sequential([keras.Input((64,)), *layers], name="digits")
    made.compile(
        keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True
    )
    return made


def initial() -> Weights:
    """The weights of a new network."""
    return weights_of(network())


def train(weights: Weights, part: Part, order: npt.NDArray[np.intp]) -> tuple[Weights, float]:
    """One pass of SGD."""
    model = with_weights(network(), weights)
    history = model.fit(part.x[order], part.y[order], batch_size=BATCH_SIZE, shuffle=False, verbose=0)
    return weights_of(model), float(history.history["loss"][-1])


def accuracy(weights: Weights, part: Part) -> float:
    """The share of right answers."""
    answers = np.asarray(with_weights(network(), weights)(part.x, training=False)).argmax(axis=1)
    return float((answers == part.y).mean())
