"""The cases whose launches and times are counted: their shapes, and tensors of these on a device."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from models_of_frameworks import resnet50_shapes

import fed_learn as fl

CONTRIBUTIONS = 10
WEIGHTS = [float(k) + 0.5 for k in range(CONTRIBUTIONS)]
RESNET, ONE_TENSOR = "10 × ResNet-50", "10 × one tensor of 32 Mi float32"
Models = list[dict[str, torch.Tensor]]


def shapes_of(case: str) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    return resnet50_shapes() if case == RESNET else {"w": ((1 << 25,), np.dtype(np.float32))}


def size_of(case: str) -> tuple[int, int]:
    """Elements and bytes of one model."""
    sizes = [(int(np.prod(shape)), dtype.itemsize) for shape, dtype in shapes_of(case).values()]
    return sum(count for count, _ in sizes), sum(count * size for count, size in sizes)


def contributions(case: str, device: str, seed: int = 0) -> Models:
    """Models of random values, made on the device."""
    torch.manual_seed(seed)
    return [
        {
            name: torch.randn(shape, device=device)
            if dtype == np.float32
            else torch.full(shape, k, dtype=torch.int64, device=device)
            for name, (shape, dtype) in shapes_of(case).items()
        }
        for k in range(CONTRIBUTIONS)
    ]


def averaged(models: Models) -> Any:
    return fl.weighted_average(models, WEIGHTS)  # type: ignore[arg-type]


def streamed(*, borrow: bool) -> Callable[[Models], Any]:
    def call(models: Models) -> Any:
        stream = fl.Accumulator()
        for model, weight in zip(models, WEIGHTS, strict=True):
            stream.add(model, weight, borrow=borrow)  # type: ignore[arg-type]
        return stream.result()

    return call
