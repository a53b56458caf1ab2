"""The frameworks whose tensors can be averaged: found by the type of a tensor.

A framework is looked for in `sys.modules`: nothing is imported that the caller has not imported. What tensors are
averaged with is left to `fed_learn.aggregation.tensors`, and whole models to `fed_learn.adapters.models`.
"""

import sys
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np

from fed_learn.adapters.base import Framework
from fed_learn.adapters.jax import JaxTensors
from fed_learn.adapters.tensorflow import TensorFlowTensors
from fed_learn.adapters.torch_tensors import TorchTensors
from fed_learn.errors import as_failure
from fed_learn.limits import MOST_VARIABLES

FRAMEWORKS: tuple[Framework, ...] = (TorchTensors(), TensorFlowTensors(), JaxTensors())


def framework_of(kind: type) -> Framework | None:
    """The framework whose tensors are of this type; None where none is.

    Example:
        >>> framework_of(np.ndarray) is None
        True
    """
    if kind is np.ndarray:  # the usual case
        return None
    for framework in FRAMEWORKS:
        tensor = framework.tensor_type()
        if tensor is not None and issubclass(kind, tensor):
            return framework
    return None


def plain(value: Any) -> Any:
    """Of a Keras variable what its back end holds: a tensor or variable; anything else as it is.

    Example:
        >>> plain(3)
        3
    """
    return value.value if _is_keras(type(value)) else value


def _is_keras(kind: type) -> bool:
    variable = getattr(sys.modules.get("keras"), "Variable", None)
    return variable is not None and issubclass(kind, variable)


def hold_tensors(*weights: object) -> bool:
    """Whether there is a tensor of a framework in any of these weight dicts. Fast, and false for what is no dict.

    Variables of Keras count as tensors, and so does what stands for a tensor without values.

    Example:
        >>> hold_tensors({"w": np.zeros(2)}, None)
        False
    """
    kinds: set[type] = set()
    for one in weights:
        try:
            if isinstance(one, (dict, Mapping)):  # which is soon told of a dict
                kinds.update(map(type, islice(one.values(), MOST_VARIABLES)))
        except BaseException as error:  # noqa: BLE001 - from outside; the checks say what is wrong with it
            as_failure(error)
    kinds.discard(np.ndarray)
    return bool(kinds) and any(framework_of(kind) is not None or _is_keras(kind) for kind in kinds)
