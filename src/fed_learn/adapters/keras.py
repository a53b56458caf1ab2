"""Models of Keras 3, on whichever back end. Nothing here imports Keras: it is there when there is a model."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fed_learn.adapters.base import (
    DTYPES,
    ONLY,
    Adapter,
    Framework,
    Variable,
    averageable,
    checked,
    given,
    role_of_any,
    role_of_buffer,
)
from fed_learn.adapters.jax import JaxTensors, copied_like
from fed_learn.adapters.keras_layers import built_layers, derived_anew, left_in, left_of, own_variables
from fed_learn.adapters.tensorflow import TensorFlowTensors
from fed_learn.adapters.torch import TorchModels
from fed_learn.adapters.torch_tensors import TorchTensors, plain_views
from fed_learn.errors import DtypeError, ModelError
from fed_learn.hints import of_numbers
from fed_learn.policies import Role
from fed_learn.weights import SUPPORTED_DTYPES, Array, finite_elements, native_dtype

TENSORS: dict[str, Framework] = {"tensorflow": TensorFlowTensors(), "jax": JaxTensors(), "torch": TorchTensors()}
"""By back end."""


class KerasModels(Adapter):
    """`Adapter` for `keras.Model`, `keras.Layer` and lists of `keras.Variable`, by `variable.path`.

    What `model.weights` has: not the state of metrics, random seeds and optimizers. In mixed precision values have the
    dtype in which they are stored, not the one in which layers compute.
    """

    name = "keras"
    models = "keras.Model, keras.Layer, a list of keras.Variable"

    def __init__(self) -> None:
        self._torch = TorchModels()

    def accepts(self, model: object) -> bool:
        keras = sys.modules.get("keras")
        layer, variable = getattr(keras, "Layer", None), getattr(keras, "Variable", None)
        if layer is None or variable is None:  # not imported, or not yet whole
            return False
        if isinstance(model, list | tuple):
            return bool(model) and all(isinstance(one, variable) for one in model)
        return isinstance(model, layer)

    def variables(self, model: Any) -> list[Variable]:
        if isinstance(model, list | tuple):
            found = [_variable(one, one.trainable, None) for one in model]
        else:
            found = _of_layer(model)
        paths: dict[str, Variable] = {}
        for variable in found:
            if paths.setdefault(variable.name, variable).identity != variable.identity:
                raise ModelError(
                    f"model: two variables have the path {variable.name!r}; give the layers names of their own",
                    name=variable.name,
                )
        return list(paths.values())

    def views(self, model: Any, chosen: Callable[[str], object] | None) -> dict[str, Array] | None:
        """What `get` gives without a copy, by name; None for a model in which anything is out of the ordinary."""
        if isinstance(model, list | tuple):
            weights = model
        else:
            layers = _built(model)
            if any(map(_has_codes, layers)) or any(map(left_of, layers)):
                return None
            weights = model.weights
        named = {variable.path: variable for variable in weights}
        if len(named) != len(weights):
            return None
        taken = named if chosen is None else {name: named[name] for name in named if chosen(name)}
        backend = _backend()
        if backend == "torch":
            return plain_views({name: variable.value for name, variable in taken.items()})
        try:
            views = {name: given(_view(variable, backend), copy=False) for name, variable in taken.items()}
        except (RuntimeError, TypeError):  # deleted; inside of a function that is traced
            return None
        return views if all(view.dtype in SUPPORTED_DTYPES for view in views.values()) else None

    def trained(self, model: Any) -> dict[str, bool]:
        """Whether training changes each parameter, by path; of a list of variables nothing is known."""
        if isinstance(model, list | tuple):
            return {}
        changed = {id(variable) for variable in model.trainable_weights}
        parameters = [variable for layer in model._flatten_layers() for variable in layer._trainable_variables]
        return {variable.path: id(variable) in changed for variable in parameters}

    def left(self, model: Any, _: Callable[[str], object] | None) -> list[str]:
        """Vocabularies, boundaries and other state of layers that is in none of their variables."""
        return [] if isinstance(model, list | tuple) else left_in(model)

    def get(self, variable: Variable, *, copy: bool) -> Array:
        """The value of a variable, as a read-only view or a copy.

        A view does not change with the model: a variable that is assigned to takes other memory. On the torch back end
        it does, as in `TorchModels`.
        """
        backend = _backend()
        if backend == "torch":
            return self._torch.get(replace(variable, tensor=variable.tensor.value), copy=copy)
        return given(_view(variable.tensor, backend), copy=copy)

    def load(self, model: Any, values: Mapping[str, tuple[Variable, Any]]) -> Any:
        backend, written = _backend(), {id(variable.tensor) for variable, _ in values.values()}
        with derived_anew(model, written, lambda variable: _view(variable, backend)):
            if backend == "torch":
                inner = {name: (replace(v, tensor=v.tensor.value), value) for name, (v, value) in values.items()}
                self._torch.load({}, inner)
                return model
            for variable, value in values.values():
                if backend == "jax":  # which might go on to use the memory of an array
                    variable.tensor.assign(copied_like(variable.tensor.value, value))
                else:
                    variable.tensor.assign(value.astype(native_dtype(value.dtype), copy=False))
        return model

    def hint(self, missing: Sequence[str], extra: Sequence[str]) -> str:
        """What to do when these names are missing and too many, in a sentence; empty where there is nothing to say.

        Example:
            >>> KerasModels().hint(["dense/kernel"], ["net/dense/kernel"])[:44]
            'What is added differs in a name in front tha'
            >>> KerasModels().hint(["dense/kernel"], ["dense/bias"])
            ''
        """
        if not extra:
            return ""
        numbers = of_numbers(missing, extra)
        if numbers:
            return numbers
        if all(any(_ends_with(name, other) or _ends_with(other, name) for other in missing) for name in extra):
            return (
                "What is added differs in a name in front that Keras drops when it saves, loads, pickles or clones a "
                "model: begin with the weights of a model that was loaded too, or map with fl.align"
            )
        return ""


def _view(variable: Any, backend: str) -> Array:
    tensors = TENSORS.get(backend)
    if tensors is not None:
        return tensors.view(variable.value, "model", variable.path)
    return np.asarray(variable.value)


def _ends_with(name: str, end: str) -> bool:
    return name.endswith(f"/{end}")


def _built(model: Any) -> list[Any]:
    """The layers of a model, none of which may still be without its variables."""
    keras = sys.modules["keras"]
    return built_layers(model, (keras.Layer.build, keras.Model.build))


def _has_codes(layer: Any) -> bool:
    return getattr(layer, "quantization_mode", None) not in (None, "float8")


def _of_layer(model: Any) -> list[Variable]:
    # Keras tells in no public way which variables were made to be trained, once a layer is frozen.
    layers = _built(model)
    trained = {id(variable) for variable in model.trainable_weights}
    roles: dict[int, Role] = {id(variable): "trained" for layer in layers for variable in layer._trainable_variables}
    quantized: dict[int, Any] = {}
    for layer in filter(_has_codes, layers):  # what such a layer makes beside the codes tells what they stand for
        quantized |= {id(v): layer for v in own_variables(layer) if v.dtype.startswith(("int", "uint"))}
        roles |= dict.fromkeys(map(id, layer._non_trainable_variables), "code")
    return [
        _variable(v, id(v) in trained, roles.get(id(v)) or _role_beside(v), quantized.get(id(v))) for v in model.weights
    ]


def _role_beside(variable: Any) -> Role:
    """The role of a variable that is not trained."""
    dtype = np.dtype(DTYPES.get(sys.modules["keras"].backend.standardize_dtype(variable.dtype), np.void))
    tensors = TENSORS.get(_backend())

    def finite() -> bool:
        value = np.asarray(variable.value) if tensors is None else tensors.view(variable.value, "model", variable.path)
        return bool(finite_elements(value).all())

    return role_of_buffer(variable.name, tuple(variable.shape), dtype, finite)


def _variable(variable: Any, trainable: bool, role: Role | None, quantized: Any = None) -> Variable:
    # Its own dtype may be one that the back end does not have: JAX makes shorter ones of 64 bits.
    name, value, framework = variable.path, variable.value, TENSORS.get(_backend())
    if framework is not None:
        dtype, problem = checked(framework, value, name)
    else:
        dtype, problem = averageable(sys.modules["keras"].backend.standardize_dtype(value.dtype), name)
    if role is None:
        role = role_of_any(variable.name, tuple(variable.shape), dtype, trained=bool(variable.trainable))
    if getattr(variable, "overwrite_with_gradient", False):  # scales of float8, which no optimizer changes
        role = "statistic"
    if quantized is not None:
        problem = DtypeError(
            f"model: {name!r} has the codes of a layer quantized to {quantized.quantization_mode}, "
            f"which cannot be averaged{ONLY}, as only='lora_'",
            contributor="model",
            name=name,
            dtype=dtype,
            expected=None,
        )
    return Variable(name, tuple(variable.shape), dtype, variable, bool(trainable), role, id(variable), problem)


def _backend() -> str:
    backend: str = sys.modules["keras"].config.backend()
    return backend
