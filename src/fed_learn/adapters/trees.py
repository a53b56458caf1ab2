"""Nested dicts of numpy arrays: weights as `flax.serialization` and `msgpack` give them, and weight dicts themselves.

They are read and loaded as JAX would, by the same names in the same order, whether or not JAX has been imported.
"""

import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fed_learn.adapters.base import Adapter, Variable, averageable, given, role_of_any
from fed_learn.errors import FedLearnError, ModelError, WeightsTypeError
from fed_learn.policies import Role
from fed_learn.weights import Array, FrozenDict

COUNTERS = ("step", "count", "mini_step", "gradient_step")
"""What Flax and optax call the numbers of their steps."""
NUMBERS = (bool, int, float, complex, np.generic)
"""What JAX makes an array of when it traces a function."""


class TreeModels(Adapter):
    """`Adapter` for dicts and named tuples of numpy arrays, nested to any depth, lists and tuples inside of them.

    All that they hold are arrays and numbers (and None, which is nothing). `load` returns a new tree.
    """

    name = "numpy"
    models = "a dict of numpy arrays, also nested"

    def accepts(self, model: object) -> bool:
        if not (_is_dict(model) or _is_named_tuple(model)):
            return False
        try:
            leaves = [leaf for _, leaf in _leaves(model, ())]
        except (TypeError, RecursionError):  # keys without an order; a dict in itself
            return False
        known = all(isinstance(leaf, (np.ndarray, *NUMBERS)) for leaf in leaves)
        return known and any(isinstance(leaf, np.ndarray) for leaf in leaves)

    def variables(self, model: Any) -> list[Variable]:
        found: dict[str, Variable] = {}
        for path, leaf in _leaves(model, ()):
            name = "/".join(path)
            if name in found:
                raise ModelError(f"model: two variables have the path {name!r}", name=name)
            dtype, problem = leaf_dtype(leaf, name)
            shape = tuple(np.shape(leaf))
            trainable, role = told_by_name(name, shape, dtype, collections=_has_collections(model))
            found[name] = Variable(name, shape, dtype, leaf, trainable, role, name, problem)
        return list(found.values())

    def get(self, variable: Variable, *, copy: bool) -> Array:
        """The value of a variable, as a read-only view or a copy."""
        return given(np.asarray(variable.tensor, variable.dtype), copy=copy)

    def load(self, model: Any, values: Mapping[str, tuple[Variable, Any]]) -> Any:
        return _rebuilt(model, (), values)


def leaf_dtype(leaf: Any, name: str) -> tuple[np.dtype[Any], FedLearnError | None]:
    """The dtype of an array or a number of a tree, as JAX would trace it, and why it cannot be averaged.

    Args:
        leaf: An array of numpy, or a number.
        name: What it is called in the model.

    Example:
        >>> leaf_dtype(3, "step"), leaf_dtype(0.5, "rate")
        ((dtype('int32'), None), (dtype('float32'), None))
    """
    if isinstance(leaf, np.ndarray | np.generic):
        return averageable(leaf.dtype.name, name)
    wide = getattr(getattr(sys.modules.get("jax"), "config", None), "jax_enable_x64", False)
    kind = next(kind for kind in (bool, int, float, complex) if isinstance(leaf, kind))
    dtype = {bool: "bool", int: "int64" if wide else "int32", float: "float64" if wide else "float32"}.get(kind)
    if dtype is None:
        return averageable("complex128" if wide else "complex64", name)
    try:
        np.asarray(leaf, dtype)
    except OverflowError as error:
        message = f"model: {name!r} is {leaf}, which is no {dtype}; make it an array of another dtype"
        overflow = WeightsTypeError(message, contributor="model", name=name)
        overflow.__cause__ = error
        return np.dtype(dtype), overflow
    return np.dtype(dtype), None


def told_by_name(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, collections: bool
) -> tuple[bool | None, Role | None]:
    """Whether a variable is trained, and its role, where Flax and optax have a name for such, or its name tells it.

    Args:
        name: Its path.
        shape: Its shape.
        dtype: Its dtype.
        collections: Whether the tree has a part "params" at its top, as all variables of Flax and a `TrainState` have.

    Example:
        >>> told_by_name("params/Dense_0/kernel", (4, 2), np.dtype("float32"), collections=True)
        (True, 'trained')
        >>> told_by_name("opt_state/0/count", (), np.dtype("int32"), collections=True)
        (False, 'counter')
    """
    first, last = name.partition("/")[0], re.split("[./]", name)[-1]
    if collections and first == "params":
        return True, "trained"
    if last in COUNTERS and not shape and dtype.kind in "iu":
        return False, "counter"
    if collections and first in ("batch_stats", "opt_state"):
        return False, "statistic"
    return None, role_of_any(last, shape, dtype, trained=False)


def loaded_leaf(leaf: Any, value: Array) -> Any:
    """A value as the leaf that it replaces is: an array of its own, or a number.

    A number of Python that has not changed is returned as it was, without what its dtype would have rounded away.

    Example:
        >>> loaded_leaf(0.1, np.float32(0.1)), loaded_leaf(7, np.array(8))
        (0.1, 8)
    """
    if isinstance(leaf, np.ndarray):
        return np.array(value, dtype=leaf.dtype)
    if isinstance(leaf, np.generic):
        return leaf.dtype.type(value)
    same = np.asarray(leaf, value.dtype) == value
    return leaf if same else value.item()


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and leaf, in the order of JAX: the keys of dicts sorted."""
    parts = _parts(tree)
    if parts is None:
        yield path, tree
        return
    for key, part in parts:
        yield from _leaves(part, (*path, key))


def _parts(tree: Any) -> list[tuple[str, Any]] | None:
    """The parts of a node, by the names that JAX gives to them; None of a leaf."""
    if tree is None:
        return []
    if _is_dict(tree):
        keys = tree if type(tree) is OrderedDict else sorted(tree)
        return [(str(key), tree[key]) for key in keys]
    if _is_named_tuple(tree):
        return list(zip(tree._fields, tree, strict=True))
    if type(tree) in (list, tuple):
        return [(str(index), part) for index, part in enumerate(tree)]
    return None


def _rebuilt(tree: Any, path: tuple[str, ...], values: Mapping[str, tuple[Variable, Any]]) -> Any:
    """The same tree with other values; what gets none is shared."""
    parts = _parts(tree)
    if parts is None:
        held = values.get("/".join(path))
        return tree if held is None else loaded_leaf(tree, held[1])
    new = [_rebuilt(part, (*path, key), values) for key, part in parts]
    if tree is None:
        return None
    if isinstance(tree, dict):
        keys = tree if type(tree) is OrderedDict else sorted(tree)
        by_key = dict(zip(keys, new, strict=True))
        kind = OrderedDict if type(tree) is OrderedDict else dict
        return kind((key, by_key[key]) for key in tree)
    return type(tree)(*new) if _is_named_tuple(tree) else type(tree)(new)


def _has_collections(model: Any) -> bool:
    return "params" in (model if _is_dict(model) else model._fields)


def _is_dict(tree: object) -> bool:
    return type(tree) in (dict, OrderedDict) or isinstance(tree, FrozenDict)


def _is_named_tuple(tree: object) -> bool:
    return isinstance(tree, tuple) and hasattr(tree, "_fields")
