"""Where, and by which operations, the torch kernel is compared: a GPU, the pretended device, the CPU."""

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from interpreted import interpreted, no_triton
from pretended import Pretended

import fed_learn as fl
from fed_learn.adapters.torch_tensors import TorchTensors
from fed_learn.kernels import torch as kernel
from fed_learn.kernels import unfused
from fed_learn.weights import Array

FRAMEWORK = TorchTensors()
GPU = "cuda:0"
USED: Counter[str] = Counter()
"""How often the operations of each place were used."""
SMALL = {"TILE": 1 << 13, "TILE_ON_CPU": 1 << 12, "ALONE": 1 << 11, "ALONE_ON_CPU": 1 << 10}
"""Sizes of `unfused` for quick runs: the same seams, in small models."""


@dataclass(frozen=True)
class Place:
    """A device, and the module whose operations are used there.

    Attributes:
        name: What tables call it.
        device: As torch names it.
        operations: `unfused`, `fused`, or an interpreted copy of the latter.
        pretended: Whether the device is not there.
        small: Whether inputs are to be small.
    """

    name: str
    device: str
    operations: ModuleType
    pretended: bool = False
    small: bool = False

    @property
    def fused(self) -> bool:
        """Whether the operations are those of `fused`."""
        return self.operations is not unfused

    @property
    def real(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == GPU and not self.pretended

    @property
    def interpreted(self) -> bool:
        """Whether the operations run in Triton's interpreter."""
        return self.fused and not self.real

    @contextmanager
    def entered(self) -> Iterator[Pretended | None]:
        """Within it tensors on the device are averaged there by these operations."""
        kind = torch.device(self.device).type

        def arithmetic(device: torch.device) -> ModuleType:
            if device.type != kind:
                return unfused
            USED[self.name] += 1
            return self.operations

        with ExitStack() as stack:
            # `torch` is given other operations than it would choose, so that both kinds can be compared.
            stack.enter_context(mock.patch.object(kernel, "arithmetic", arithmetic))
            if self.small:
                for name, size in SMALL.items():
                    stack.enter_context(mock.patch.object(unfused, name, size))
            if kind == "cpu":
                stack.enter_context(fl.kernels.use("torch"))
            if self.interpreted:
                stack.enter_context(np.errstate(all="ignore"))  # of the interpreter
            yield stack.enter_context(Pretended()) if self.pretended else None

    def tensor(self, array: Array) -> torch.Tensor:
        """A copy of an array on the device."""
        tensor: torch.Tensor = FRAMEWORK.tensor(np.array(array), self.device)
        return tensor

    def model(self, arrays: Mapping[str, Array]) -> Any:
        """Copies of arrays on the device."""
        return {name: self.tensor(array) for name, array in arrays.items()}


def array_of(value: Any) -> Array:
    """A tensor, or an array, as an array in the memory of the host."""
    return FRAMEWORK.view(value) if isinstance(value, torch.Tensor) else value


def plain_places(*, quick: bool) -> list[Place]:
    """Where plain operations are compared on this machine."""
    if torch.cuda.is_available():
        return [Place("unfused", GPU, unfused, small=quick)]
    return [
        Place("unfused, CPU", "cpu", unfused, small=quick),
        Place("unfused, pretended device", GPU, unfused, pretended=True, small=quick),
    ]


def fused_places(*, quick: bool) -> tuple[list[Place], str | None]:
    """Where fused operations are compared on this machine; if nowhere, why."""
    if torch.cuda.is_available():
        problem = kernel.not_fused(torch.device(GPU))
        if problem is not None:
            return [], problem
        import fed_learn.kernels.fused as fused  # where there is no Triton, it cannot be imported

        return [Place("fused", GPU, fused, small=quick)], None
    problem = no_triton()
    if problem is not None:
        return [], problem
    importlib.import_module("triton")  # before the copy is made: Triton itself is not to be interpreted
    return [Place("fused, interpreted", "cpu", interpreted(), small=True)], None
