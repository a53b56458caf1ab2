"""The demo's network in TensorFlow, by way of Keras."""

from typing import Any

import keras
import numpy as np

from fed_learn.adapters import set_weights
from fed_learn.adapters.layout import align
from fed_learn.integrations.keras import KerasEvaluator, KerasLearner
from fed_learn.simulation.datasets import Part
from fed_learn.simulation.model_network import ModelNetwork
from fed_learn.simulation.network import CHANNELS, DECAY, EPSILON, LEARNING_RATE, MOMENTUM, UNITS, Architecture
from fed_learn.weights import Array

if keras.backend.backend() != "tensorflow":
    raise ImportError(f"Keras is set to the back end {keras.backend.backend()!r}: set KERAS_BACKEND=tensorflow")


class KerasNetwork(ModelNetwork):
    """The demo's network in Keras.

    Nothing is done to compute on one thread: TensorFlow's are set for good when it starts, and do not change results.

    Args:
        architecture: What the network takes and gives.
        seed: Of the initial weights.
        global_model: A model of another framework that is the global one; None: this one.
    """

    framework = "tensorflow"
    evaluator_type = KerasEvaluator
    learner_type = KerasLearner

    def __init__(self, architecture: Architecture, seed: int, global_model: object = None) -> None:
        super().__init__(architecture, seed)
        self.layout = None if global_model is None else align(global_model, self.model())

    def model(self) -> Any:
        """A new compiled model with the initial weights."""
        model = keras.Sequential(_layers(self.architecture), name="net")
        kernels = self.architecture.initial_kernels(self.seed)
        set_weights(model, {f"net/{name}/kernel": kernel for name, kernel in kernels.items()}, strict=False)
        model.compile(
            optimizer=keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        return model

    def data(self, part: Part) -> tuple[Array, Array]:
        return np.ascontiguousarray(self.architecture.shaped(part)), part.y


def _layers(architecture: Architecture) -> list[Any]:
    layers = keras.layers

    def norm(name: str) -> Any:
        return layers.BatchNormalization(momentum=DECAY, epsilon=EPSILON, name=name)

    output = layers.Dense(architecture.num_classes, name="output")
    if architecture.image_size is None:
        return [
            keras.Input((architecture.num_features,)),
            layers.Dense(UNITS[0], use_bias=False, name="dense1"),
            norm("norm1"),
            layers.ReLU(),
            layers.Dense(UNITS[1], use_bias=False, name="dense2"),
            norm("norm2"),
            layers.ReLU(),
            output,
        ]
    return [
        keras.Input((*architecture.image_size, 1)),
        layers.Conv2D(CHANNELS[0], 3, padding="same", use_bias=False, name="conv1"),
        norm("norm1"),
        layers.ReLU(),
        layers.ZeroPadding2D(1),  # as torch pads; "same" with strides would pad the right and lower edge alone
        layers.Conv2D(CHANNELS[1], 3, strides=2, use_bias=False, name="conv2"),
        norm("norm2"),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dense(UNITS[0], name="dense1"),
        layers.ReLU(),
        output,
    ]
