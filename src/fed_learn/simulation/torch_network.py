"""The demo's network in torch."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fed_learn.adapters import get_weights, set_weights
from fed_learn.integrations.torch import TorchEvaluator, TorchLearner
from fed_learn.simulation.datasets import Part
from fed_learn.simulation.model_network import ModelNetwork
from fed_learn.simulation.network import CHANNELS, DECAY, EPSILON, LEARNING_RATE, MOMENTUM, UNITS, Architecture
from fed_learn.weights import Array


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a round."""
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)


class TorchNetwork(ModelNetwork):
    """The demo's network in torch.

    The global model leaves out `num_batches_tracked`, which other frameworks do not have: it stays with each client.
    """

    framework = "torch"
    evaluator_type = TorchEvaluator
    learner_type = TorchLearner
    learner_options: ClassVar = {"optimizer": sgd}

    def model(self) -> nn.Sequential:
        model = nn.Sequential(_layers(self.architecture))
        kernels = self.architecture.initial_kernels(self.seed)
        weights = {name: np.zeros_like(bias) for name, bias in get_weights(model, only=r"(dense|output).*bias").items()}
        weights |= {f"{name}.weight": self._torch_layout(name, kernel) for name, kernel in kernels.items()}
        return set_weights(model, weights, strict=False)

    def init(self) -> dict[str, Array]:
        return get_weights(self.model(), only=lambda name: not name.endswith("num_batches_tracked"))

    def data(self, part: Part) -> TensorDataset:
        x = torch.from_numpy(self.architecture.shaped(part))
        return TensorDataset(x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x, torch.from_numpy(part.y))

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _torch_layout(self, name: str, kernel: Array) -> Array:
        if kernel.ndim == 4:
            return kernel.transpose(3, 2, 0, 1)
        if name == "dense1" and self.architecture.image_size is not None:
            # Its inputs are a flattened feature map, whose channels come first in torch.
            by_place = kernel.reshape(*self.architecture.map_size, CHANNELS[1], -1)
            return by_place.transpose(3, 2, 0, 1).reshape(kernel.shape[1], -1)
        return kernel.T


def _layers(architecture: Architecture) -> "OrderedDict[str, nn.Module]":
    def norm(kind: type[nn.BatchNorm1d | nn.BatchNorm2d], size: int) -> nn.Module:
        return kind(size, eps=EPSILON, momentum=1 - DECAY)

    first, second = CHANNELS if architecture.image_size is not None else UNITS
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if architecture.image_size is not None:
        height, width = architecture.map_size
        layers["conv1"] = nn.Conv2d(1, first, 3, padding=1, bias=False)
        layers["norm1"] = norm(nn.BatchNorm2d, first)
        layers["relu1"] = nn.ReLU()
        layers["conv2"] = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        layers["norm2"] = norm(nn.BatchNorm2d, second)
        layers["relu2"] = nn.ReLU()
        layers["flatten"] = nn.Flatten()
        layers["dense1"] = nn.Linear(height * width * second, UNITS[0])
        layers["relu3"] = nn.ReLU()
        layers["output"] = nn.Linear(UNITS[0], architecture.num_classes)
    else:
        layers["dense1"] = nn.Linear(architecture.num_features, first, bias=False)
        layers["norm1"] = norm(nn.BatchNorm1d, first)
        layers["relu1"] = nn.ReLU()
        layers["dense2"] = nn.Linear(first, second, bias=False)
        layers["norm2"] = norm(nn.BatchNorm1d, second)
        layers["relu2"] = nn.ReLU()
        layers["output"] = nn.Linear(second, architecture.num_classes)
    return layers
