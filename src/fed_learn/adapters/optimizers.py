"""The states of optimizers as weight dicts, for those who average momenta too.

What an optimizer counts and remembers of each parameter is here; its hyperparameters, such as the learning rate, are
each client's own. States of optax are pytrees, and go by way of `jax`.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fed_learn.adapters.base import ONLY, Adapter, Variable, given
from fed_learn.adapters.keras import KerasModels
from fed_learn.adapters.torch import TorchModels
from fed_learn.adapters.trees import NUMBERS, leaf_dtype, loaded_leaf
from fed_learn.errors import ModelError, WeightsTypeError, a_type
from fed_learn.weights import Array


class TorchOptimizers(Adapter):
    """`Adapter` for `torch.optim.Optimizer`s and their `state_dict()`: `state.<parameter>.exp_avg` and the like.

    A parameter is called as it was when the optimizer was made of `model.named_parameters()`, else by its index in
    `state_dict()`. What is empty (None) is left out.
    """

    name = "torch"
    models = "a torch.optim.Optimizer that has made a step"

    def __init__(self) -> None:
        self._torch = TorchModels()

    def accepts(self, model: object) -> bool:
        if type(model) is dict:
            return "torch" in sys.modules and {*model} == {"state", "param_groups"}
        optimizer = getattr(getattr(sys.modules.get("torch"), "optim", None), "Optimizer", None)
        return optimizer is not None and isinstance(model, optimizer)

    def variables(self, model: Any) -> list[Variable]:
        tensor = sys.modules["torch"].Tensor
        held = {name: of[key] for name, (of, key) in _places(model).items() if of[key] is not None}
        if not held:
            raise ModelError(
                f"model: {a_type(type(model))} has no state yet: it makes it in its first step(), if it keeps any, as "
                "SGD without momentum does not. Make a step before, or send the model's weights alone; its own "
                "load_state_dict loads a state into a new optimizer"
            )
        known = self._torch.variables({name: value for name, value in held.items() if isinstance(value, tensor)})
        found = {variable.name: variable for variable in known}
        for name, value in held.items():
            if name not in found:
                found[name] = _other(name, value)
        return [
            found[name]
            if found[name].role == "code"
            else replace(found[name], trainable=False, role="counter" if name.endswith(".step") else "statistic")
            for name in held
        ]

    def get(self, variable: Variable, *, copy: bool) -> Array:
        """The value of a variable, as `TorchModels` gives it; numbers of Python as arrays."""
        if isinstance(variable.tensor, NUMBERS):
            return given(np.asarray(variable.tensor, variable.dtype), copy=copy)
        return self._torch.get(variable, copy=copy)

    def load(self, model: Any, values: Mapping[str, tuple[Variable, Any]]) -> Any:
        numbers = {name: one for name, one in values.items() if isinstance(one[0].tensor, NUMBERS)}
        self._torch.load({}, {name: one for name, one in values.items() if name not in numbers})
        places = _places(model)
        for name, (variable, value) in numbers.items():
            of, key = places[name]
            of[key] = loaded_leaf(variable.tensor, np.asarray(value))
        return model


class KerasOptimizers(Adapter):
    """`Adapter` for `keras.optimizers.Optimizer`s, by `variable.path`, without the learning rate."""

    name = "keras"
    models = "a built keras.optimizers.Optimizer"

    def __init__(self) -> None:
        self._keras = KerasModels()

    def accepts(self, model: object) -> bool:
        optimizer = getattr(getattr(sys.modules.get("keras"), "optimizers", None), "Optimizer", None)
        return optimizer is not None and isinstance(model, optimizer)

    def variables(self, model: Any) -> list[Variable]:
        if not model.built:
            raise ModelError(
                f"model: {a_type(type(model))} has no state yet; call its build(model.trainable_variables), or train "
                "on a batch, first"
            )
        found = self._keras.variables([variable for variable in model.variables if variable.name != "learning_rate"])
        return [
            replace(variable, trainable=False, role="counter" if variable.role == "counter" else "statistic")
            for variable in found
        ]

    def get(self, variable: Variable, *, copy: bool) -> Array:
        """The value of a variable, as `KerasModels` gives it."""
        return self._keras.get(variable, copy=copy)

    def load(self, model: Any, values: Mapping[str, tuple[Variable, Any]]) -> Any:
        self._keras.load([variable.tensor for variable, _ in values.values()], values)
        return model


def _places(optimizer: Any) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each part of the state is: the dict and the key in it, by the name of the part."""
    if isinstance(optimizer, dict):
        groups, state = optimizer["param_groups"], optimizer["state"]
    else:
        groups, state = optimizer.param_groups, optimizer.state
    return {
        f"state.{parameter}.{key}": (state[held], key)
        for parameter, held in _parameters(groups)
        if held in state
        for key in state[held]
    }


def _parameters(groups: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What each parameter is called, and what the state has it under."""
    index = 0
    for group in groups:
        names = group.get("param_names")
        for place, parameter in enumerate(group["params"]):
            yield str(index) if names is None else names[place], parameter
            index += 1


def _other(name: str, value: Any) -> Variable:
    """A part of a state that is no tensor."""
    if isinstance(value, NUMBERS):
        dtype, problem = leaf_dtype(value, name)
    else:
        message = f"model: {name!r} is {a_type(type(value))}, not a tensor{ONLY}"
        dtype, problem = np.dtype(np.void), WeightsTypeError(message, contributor="model", name=name)
    return Variable(name, (), dtype, value, False, None, name, problem)
