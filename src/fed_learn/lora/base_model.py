"""The base model of adapters, to whose weights is added what an average of adapters leaves out."""

import numpy as np

from fed_learn.aggregation.low_rank import Layer
from fed_learn.aggregation.tensors import opened
from fed_learn.errors import DtypeError, NamesError, NonFiniteError, ShapeError
from fed_learn.prefixes import PEFT
from fed_learn.weights import FLOATS, Array, WeightDict, as_weight_dict, fitted, native_dtype


class Base:
    """The weights of a base model, to which layers give what their adapters leave out.

    Args:
        weights: The weights. They are not changed.
    """

    def __init__(self, weights: WeightDict) -> None:
        self._held = opened(weights, "base")
        self._arrays = as_weight_dict(self._held.on_host(), "base")
        self._changed: dict[str, Array] = {}

    def add(self, layer: Layer, left: Array, *, transposed: bool) -> None:
        """Adds to the weight of a layer.

        Raises:
            NamesError, ShapeError, DtypeError: The base has none that it could be added to.
            NonFiniteError: The sum leaves the range of the dtype.
        """
        name = self._name_of(layer.module)
        weight = self._arrays[name]
        dtype = native_dtype(weight.dtype)
        if dtype not in FLOATS:
            raise DtypeError(
                f"base: {name!r} has dtype {dtype}, to which nothing can be added: pass it dequantized, or use "
                "method='svd' or 'stack', which leave the base alone",
                name=name,
                dtype=dtype,
                expected=None,
            )
        left = left.T if transposed else left
        if left.shape != weight.shape:
            raise ShapeError(
                f"base: {name!r} has shape {weight.shape}, and its adapter {left.shape}; fan_in_fan_out= of the config "
                "says which of the two sizes is the inputs'",
                name=name,
                shape=weight.shape,
                expected=left.shape,
            )
        moved = fitted(weight.astype(np.float64) + left, dtype)
        if moved is None:
            raise NonFiniteError(f"base: {name!r} leaves the range of {dtype}", name=name, index=(), value=np.inf)
        self._changed[name] = moved

    def finish(self) -> WeightDict:
        """A new weight dict of the same kind; what no layer has changed is in it as it was given."""
        held = self._held.replaced({**self._held.weights, **self._changed})
        return {**held.weights, **held.tensors}

    def _name_of(self, module: str) -> str:
        plain = module.removeprefix(PEFT)
        names = [f"{prefix}{plain}.{end}" for prefix in ("", PEFT) for end in ("weight", "base_layer.weight")]
        name = next((name for name in names if name in self._arrays), None)
        if name is None:
            raise NamesError(
                f"base: has no {names[0]!r}, nor {names[-1]!r}, to which its adapter could add: pass the weights of "
                "the model that the adapters belong to",
                name=names[0],
                missing=(names[0],),
            )
        return name
