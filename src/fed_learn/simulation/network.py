"""The demo's network: what clients and server need of it, its layers, and the same initial weights in every framework.

Images: convolution 3 × 3 (16) → BatchNorm → ReLU → convolution 3 × 3, stride 2 (32) → BatchNorm → ReLU → dense (64) →
ReLU → dense (classes). Other features: dense (64) → BatchNorm → ReLU → dense (32) → BatchNorm → ReLU → dense (classes).
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fed_learn.components import Learner, ModelEvaluator
from fed_learn.simulation.datasets import Part
from fed_learn.weights import Array, WeightDict

EPSILON = 1e-3
"""Of the normalizations."""
DECAY = 0.9
"""By which running statistics are kept at each step; torch counts from the other end, `momentum=1 - DECAY`."""
LEARNING_RATE = 0.05
MOMENTUM = 0.9
BATCH_SIZE = 32
CHANNELS = 16, 32
UNITS = 64, 32


class Network(Protocol):
    """The demo's network in one framework, as clients and server need it."""

    framework: str

    def init(self) -> dict[str, Array]:
        """The initial global weights."""

    def learner(self, train: Part, selection: Part, *, local_epochs: int, seed: int) -> Learner:
        """A client's learner, with a model of its own."""

    def evaluator(self, part: Part) -> ModelEvaluator:
        """The server's evaluator."""

    def score(self, weights: WeightDict, part: Part) -> dict[str, float]:
        """Accuracy (0 to 1) and mean cross-entropy (nats) of global weights on some examples."""

    def one_thread(self) -> AbstractContextManager[Any]:
        """Within the `with` block the framework computes on one thread per client, so that clients do not wait for
        one another.
        """


@dataclass(frozen=True)
class Architecture:
    """What the network takes and gives.

    Attributes:
        num_features: Size of an example.
        num_classes: Number of classes.
        image_size: Height and width, where the features are the pixels of an image; else None.
    """

    num_features: int
    num_classes: int
    image_size: tuple[int, int] | None = None

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width of the last feature map."""
        height, width = self.image_size or (1, 1)
        return (height + 1) // 2, (width + 1) // 2

    def shaped(self, part: Part) -> Array:
        """The inputs of examples: features, or images `(examples, height, width, 1)`."""
        return part.x if self.image_size is None else part.x.reshape(len(part), *self.image_size, 1)

    def initial_kernels(self, seed: int) -> dict[str, Array]:
        """Initial kernels by layer (He et al., 2015), `(height, width, in, out)` or `(in, out)`.

        Biases begin at 0, scales at 1, running means at 0 and variances at 1.

        Example:
            >>> {name: kernel.shape for name, kernel in Architecture(64, 10, (8, 8)).initial_kernels(seed=0).items()}
            {'conv1': (3, 3, 1, 16), 'conv2': (3, 3, 16, 32), 'dense1': (512, 64), 'output': (64, 10)}
        """
        if self.image_size is not None:
            height, width = self.map_size
            shapes: dict[str, tuple[int, ...]] = {
                "conv1": (3, 3, 1, CHANNELS[0]),
                "conv2": (3, 3, *CHANNELS),
                "dense1": (height * width * CHANNELS[1], UNITS[0]),
                "output": (UNITS[0], self.num_classes),
            }
        else:
            shapes = {
                "dense1": (self.num_features, UNITS[0]),
                "dense2": UNITS,
                "output": (UNITS[1], self.num_classes),
            }
        rng = np.random.default_rng([seed, 1])
        return {
            name: rng.normal(0.0, np.sqrt(2.0 / np.prod(shape[:-1])), shape).astype(np.float32)
            for name, shape in shapes.items()
        }
