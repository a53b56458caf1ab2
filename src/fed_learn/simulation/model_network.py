"""The demo's network in frameworks whose models have an evaluator and a learner in `fed_learn.integrations`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from fed_learn.adapters import get_weights
from fed_learn.adapters.layout import LayoutMap
from fed_learn.components import Learner, ModelEvaluator
from fed_learn.integrations.components import FrameworkEvaluator, FrameworkLearner
from fed_learn.integrations.loading import load
from fed_learn.simulation.datasets import Part
from fed_learn.simulation.network import BATCH_SIZE, Architecture, Network
from fed_learn.weights import Array, WeightDict


class ModelNetwork(Network, ABC):
    """The demo's network in a framework whose models have an evaluator and a learner.

    Args:
        architecture: What the network takes and gives.
        seed: Of the initial weights.
    """

    framework: str
    evaluator_type: ClassVar[Callable[..., FrameworkEvaluator]]
    learner_type: ClassVar[Callable[..., FrameworkLearner]]
    learner_options: ClassVar[Mapping[str, Any]] = {}
    """What the learner needs beside what all take."""
    layout: LayoutMap | None = None
    """From the global weights to those of the model, where they are not alike."""

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self.architecture = architecture
        self.seed = seed

    @abstractmethod
    def model(self) -> Any:
        """A new model with the initial weights."""

    @abstractmethod
    def data(self, part: Part) -> Any:
        """Examples as the evaluator and the learner take them."""

    def init(self) -> dict[str, Array]:
        return get_weights(self.model())

    def learner(self, train: Part, selection: Part, *, local_epochs: int, seed: int) -> Learner:
        return self.learner_type(
            self.model(),
            self.data(train),
            self.data(selection),
            epochs=local_epochs,
            batch_size=BATCH_SIZE,
            layout=self.layout,
            seed=seed,
            **self.learner_options,
        )

    def evaluator(self, part: Part) -> ModelEvaluator:
        return self.evaluator_type(self.model(), self.data(part), layout=self.layout)

    def score(self, weights: WeightDict, part: Part) -> dict[str, float]:
        evaluator = self.evaluator_type(self.model(), self.data(part))
        load(evaluator.model, weights, self.layout)
        return evaluator.score({"accuracy": "accuracy", "loss": "loss"})

    def one_thread(self) -> AbstractContextManager[Any]:
        return nullcontext()
