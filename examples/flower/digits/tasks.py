"""What a node does with a model: the same functions for torch and for Keras."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

import fed_learn as fl
from fed_learn.simulation.datasets import Part, Split, load_split

Weights = Mapping[str, npt.NDArray[Any]]
BATCH_SIZE = 32


class Task(Protocol):
    """A framework's part: `digits.torch_task` or `digits.keras_task`."""

    def model(self) -> Any:
        """A new model with the same initial weights each time."""

    def train(self, model: Any, part: Part, order: npt.NDArray[np.intp]) -> float:
        """One pass in that order, in batches of `BATCH_SIZE`; gives the mean loss."""

    def accuracy(self, model: Any, part: Part) -> float:
        """The share of right answers."""


def task(framework: str) -> Task:
    """The module of a framework, which is imported only now."""
    if framework not in ("torch", "keras"):
        raise ValueError(f"framework must be 'torch' or 'keras', not {framework!r}")
    found: Any = import_module(f"{__package__}.{framework}_task")
    return found  # type: ignore[no-any-return]


def weights_of(model: Any) -> dict[str, npt.NDArray[Any]]:
    """What nodes exchange: all but torch's counters of batches, which Flower's own FedAvg would turn into float64."""
    return fl.get_weights(model, only=lambda name: not name.endswith("num_batches_tracked"))


def model_of(chosen: Task, weights: Weights) -> Any:
    """A model with these weights."""
    return fl.set_weights(chosen.model(), weights, strict=False)


def data(num_nodes: int) -> Split:
    """The digits, split over nodes that see different classes."""
    return load_split("digits", num_nodes, alpha=1.0, seed=0)


def order_of(part: Part, node: int, server_round: int) -> npt.NDArray[np.intp]:
    """The order of a node's examples: the same in every run."""
    return np.random.default_rng([node, server_round]).permutation(len(part))
