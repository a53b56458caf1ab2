"""Models and tensors of other frameworks as arrays, and back.

`models` turns whole models into weight dicts, `tensors` finds the framework of a single tensor, `layout` maps between
the weight dicts of models of two frameworks, `describe` shows what a model has; there is one module per framework.
"""

from fed_learn.adapters.base import Adapter, Framework, Variable
from fed_learn.adapters.describe import DescribedVariable, Description, describe
from fed_learn.adapters.models import (
    ADAPTERS,
    adapter_of,
    get_weights,
    register,
    set_weights,
    unregister,
    variables,
)
from fed_learn.adapters.tensors import FRAMEWORKS, framework_of, hold_tensors

__all__ = [
    "ADAPTERS",
    "FRAMEWORKS",
    "Adapter",
    "DescribedVariable",
    "Description",
    "Framework",
    "Variable",
    "adapter_of",
    "describe",
    "framework_of",
    "get_weights",
    "hold_tensors",
    "register",
    "set_weights",
    "unregister",
    "variables",
]
