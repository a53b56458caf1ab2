"""The frameworks in which the demo trains. Nothing of a framework is imported before it is asked for."""

import enum
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fed_learn.arguments import check_member
from fed_learn.components import Learner, ModelEvaluator
from fed_learn.simulation.datasets import Dataset, Part, Split
from fed_learn.simulation.mlp import Perceptron, PerceptronEvaluator, PerceptronLearner
from fed_learn.simulation.network import Architecture, Network
from fed_learn.weights import Array, WeightDict


class Framework(enum.StrEnum):
    """The framework in which the clients train."""

    NUMPY = "numpy"
    TORCH = "torch"
    TENSORFLOW = "tensorflow"
    JAX = "jax"
    MIXED = "mixed"
    """Clients with torch and with TensorFlow in turn; the global model has torch's names and layouts."""


class PerceptronNetwork(Network):
    """`Network` of the perceptron in numpy."""

    framework = "numpy"

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self.architecture = architecture
        self.seed = seed

    def init(self) -> dict[str, Array]:
        return Perceptron(self.architecture.num_features, self.architecture.num_classes).init(self.seed)

    def learner(self, train: Part, selection: Part, *, local_epochs: int, seed: int) -> Learner:
        return PerceptronLearner(train, selection, local_epochs=local_epochs, seed=seed)

    def evaluator(self, part: Part) -> ModelEvaluator:
        return PerceptronEvaluator(part)

    def score(self, weights: WeightDict, part: Part) -> dict[str, float]:
        return Perceptron.score(weights, part)

    def one_thread(self) -> AbstractContextManager[Any]:
        """Does nothing: numpy's threads are up to its BLAS library."""
        return nullcontext()


def networks(framework: str, dataset: str, split: Split, seed: int) -> tuple[Network, ...]:
    """The networks of a job: clients take them in turn, and the first is also the server's.

    Args:
        framework: One of `Framework`.
        dataset: One of `Dataset`.
        split: The data.
        seed: Of the initial weights.

    Raises:
        ImportError: The framework is not installed; names the extra.
        ValueError: It is not one of `Framework`.

    Example:
        >>> from fed_learn.simulation import load_split
        >>> [network.framework for network in networks("numpy", "digits", load_split("digits", 2, 1.0, 0), seed=0)]
        ['numpy']
    """
    check_member("framework", framework, Framework)
    image_size = (8, 8) if dataset == Dataset.DIGITS else None
    architecture = Architecture(split.test.x.shape[1], split.num_classes, image_size)
    if framework == Framework.NUMPY:
        return (PerceptronNetwork(architecture, seed),)
    if framework != Framework.MIXED:
        return (_network(Framework(framework), architecture, seed),)
    torch = _network(Framework.TORCH, architecture, seed)
    return torch, _network(Framework.TENSORFLOW, architecture, seed, weights_of=torch)


def _network(framework: Framework, architecture: Architecture, seed: int, weights_of: Any = None) -> Network:
    """A network, whose global weights may be those of another."""
    try:
        if framework == Framework.TORCH:
            from fed_learn.simulation.torch_network import TorchNetwork

            return TorchNetwork(architecture, seed)
        if framework == Framework.TENSORFLOW:
            from fed_learn.simulation.keras_network import KerasNetwork

            return KerasNetwork(architecture, seed, None if weights_of is None else weights_of.model())
        from fed_learn.simulation.jax_network import JaxNetwork

        return JaxNetwork(architecture, seed)
    except ImportError as error:
        raise ImportError(f"{framework} cannot be imported ({error}): pip install 'fed-learn[{framework}]'") from error
