"""Tensors of TensorFlow, JAX and Keras for tests of the averages: how they are made, and what comes back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch

import fed_learn as fl
from fed_learn.adapters.tensors import plain

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

KERNELS = (None, *ref.KERNELS)
Arrays = dict[str, ref.Array]


def on_jax(array: ref.Array) -> Any:
    with jax.enable_x64(True):
        return jnp.array(array)


@dataclass(frozen=True)
class Kind:
    """What goes in, and the class of what comes out."""

    name: str
    make: Callable[[ref.Array], Any]
    result: Any

    def of(self, arrays: ref.WeightDict) -> Any:
        return {name: self.make(array) for name, array in arrays.items()}


KINDS = {
    kind.name: kind
    for kind in (
        Kind("tf.Tensor", tf.constant, type(tf.constant(0))),
        Kind("tf.Variable", lambda array: tf.Variable(array), type(tf.constant(0))),
        Kind("jax.Array", on_jax, type(jnp.zeros(()))),
        Kind("keras.Variable", lambda array: keras.Variable(array, dtype=array.dtype.name), None),
    )
}
if keras.backend.backend() != "tensorflow":  # what comes out is what the back end has
    del KINDS["keras.Variable"]
else:
    KINDS["keras.Variable"] = Kind("keras.Variable", KINDS["keras.Variable"].make, KINDS["tf.Tensor"].result)


def of(**variables: Any) -> Any:
    """A dict of tensors, which type checkers do not take for a weight dict."""
    return variables


def host(value: Any) -> ref.Array:
    """An independent copy."""
    value = plain(value)
    return np.array(value.numpy() if isinstance(value, tf.Variable | tf.Tensor | torch.Tensor) else value)


def bits(weights: Any) -> Any:
    return ref.bits({name: host(value) for name, value in weights.items()})


def models(seed: int, count: int = 3, dtypes: tuple[Any, ...] = ref.DTYPES, sizes: Any = (0, 1, 5, 65)) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    shapes: list[Any] = [*sizes, (), (2, 0), (3, 5)]
    return [
        {f"{dtype.name} {shape}": ref.values(rng, dtype, shape) for dtype in dtypes for shape in shapes}
        for _ in range(count)
    ]


def streamed(clients: list[Any], weights: list[float], **options: Any) -> fl.Accumulator:
    borrow = options.pop("borrow", False)
    stream = fl.Accumulator(**options)
    for i, (client, weight) in enumerate(zip(clients, weights, strict=True)):
        stream.add(client, weight, f"site-{i}", borrow=borrow)
    return stream
