"""What nodes and server do with the digits: the same functions for numpy, torch and Keras, over weight dicts."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import fed_learn as fl
from fed_learn.simulation import Part, Split, load_split

Weights = Mapping[str, npt.NDArray[Any]]
BATCH_SIZE = 32
FRAMEWORKS = ("numpy", "torch", "keras")


class Task(Protocol):
    """A framework's part: `digits.numpy_task`, `digits.torch_task` or `digits.keras_task`."""

    def initial(self) -> Weights:
        """The weights of a new model, the same each time."""

    def train(self, weights: Weights, part: Part, order: npt.NDArray[np.intp]) -> tuple[Weights, float]:
        """The weights after one pass in that order, in batches of `BATCH_SIZE`; and the mean loss."""

    def accuracy(self, weights: Weights, part: Part) -> float:
        """The share of right answers."""


def task(framework: str) -> Task:
    """The module of a framework, which is imported only now."""
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework must be one of {', '.join(FRAMEWORKS)}, not {framework!r}")
    found: Any = import_module(f"{__package__}.{framework}_task")
    return found  # type: ignore[no-any-return]


def weights_of(model: Any) -> Weights:
    """What nodes exchange: all but torch's counters of batches, which Flower's own FedAvg would turn into float64."""
    return fl.get_weights(model, only=lambda name: not name.endswith("num_batches_tracked"))


def with_weights(model: Any, weights: Weights) -> Any:
    """The model, with these weights."""
    return fl.set_weights(model, weights, strict=False)


@cache
def data(num_nodes: int) -> Split:
    """The digits, split over nodes that see different classes; the server's examples are the same for any number."""
    return load_split("digits", num_nodes, alpha=1.0, seed=0)


def order_of(part: Part, node: int, server_round: int) -> npt.NDArray[np.intp]:
    """The order of a node's examples: the same in every run."""
    return np.random.default_rng([node, server_round]).permutation(len(part))
