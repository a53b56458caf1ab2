"""Names of one variable: in a weight dict, tied variables are names that hold the very same array, the same object.

Only a model knows which of its variables are tied, and a weight dict of names and numbers cannot say it. So what reads
a model for a contribution (`fed_learn.get_weights(model, copy=False)`, the learners of `fed_learn.integrations`) gives
all names of a variable one array, and whatever copies weights or computes with them within this process
(`FrozenWeights`, `difference`, `add_difference`, the filters of a client) keeps it so. Noise, norms and clipping then
meet the variable once. Equal values prove nothing: two variables may be equal by chance, and what is tied must not
depend on the data. Messages between processes forget it: they carry numbers, which are equal under all names, and
whoever loads them into a model ties them again.

Here is only what tells such names from others; what to make of them is left to those who ask.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def twins(values: Mapping[str, Any]) -> dict[str, str]:
    """The names whose object an earlier name holds as well, and that earlier name, the first of its variable.

    Example:
        >>> import numpy as np
        >>> table, bias = np.ones((3, 2)), np.zeros(3)
        >>> twins({"embedding": table, "bias": bias, "head": table})
        {'head': 'embedding'}
        >>> twins({"embedding": table, "head": table.copy()})
        {}
    """
    if len(set(map(id, values.values()))) == len(values):  # the usual case
        return {}
    first: dict[int, str] = {}
    named = {name: first.setdefault(id(value), name) for name, value in values.items()}
    return {name: one for name, one in named.items() if name != one}


def once(values: Mapping[str, T], tied: Mapping[str, str]) -> dict[str, T]:
    """The values without those of further names; see `twins`.

    Example:
        >>> once({"embedding": 1, "head": 1}, {"head": "embedding"})
        {'embedding': 1}
    """
    return {name: value for name, value in values.items() if name not in tied}


def under_all_names(values: Mapping[str, T], tied: Mapping[str, str], names: Mapping[str, Any]) -> dict[str, T]:
    """The reverse of `once`, in the order of `names`.

    Example:
        >>> under_all_names({"embedding": 2}, {"head": "embedding"}, {"embedding": 1, "head": 1})
        {'embedding': 2, 'head': 2}
    """
    return {name: values[tied.get(name, name)] for name in names}


def one_array_for_one_memory(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, but where several lie in the same place with the same form, the first of them for all.

    So it is with views of one tensor, as a torch `state_dict` holds for each name of a parameter.

    Example:
        >>> import numpy as np
        >>> memory = np.zeros(4)
        >>> twins(one_array_for_one_memory({"a": memory[:2], "b": memory[2:], "c": memory[:2]}))
        {'c': 'a'}
    """
    first: dict[Any, Any] = {}
    return {name: array if not array.size else first.setdefault(_place(array), array) for name, array in arrays.items()}


def _place(array: Any) -> tuple[Any, ...]:
    return array.__array_interface__["data"][0], array.shape, array.strides, array.dtype
