"""Arrays and models of JAX. Nothing here imports JAX or Flax: they are there when there are arrays."""

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import numpy as np

from fed_learn.adapters.base import Adapter, Framework, Variable, checked, given, not_averageable
from fed_learn.adapters.trees import NUMBERS, leaf_dtype, loaded_leaf, told_by_name
from fed_learn.errors import FedLearnError, ModelError, WeightsTypeError
from fed_learn.policies import Role, random_state
from fed_learn.ties import twins
from fed_learn.weights import SUPPORTED_DTYPES, Array, native_dtype


class JaxTensors(Framework):
    """`Framework` for JAX: concrete arrays, also those that are sharded over several devices of this process.

    Arrays on one CPU device share their memory with numpy's, both ways; of all others numpy gets a copy. Nobody can
    change them, so they are never written to. A result lies where the array of the first contribution does, on the
    same devices with the same sharding, and is committed to them if that was. Its dtype is kept, also a 64-bit one
    without `jax_enable_x64`.

    Example:
        >>> import jax.numpy as jnp
        >>> tensors = JaxTensors()
        >>> tensors.view(jnp.ones(2))
        array([1., 1.], dtype=float32)
        >>> tensors.tensor(np.float32([3]))
        Array([3.], dtype=float32)
    """

    name = "jax"
    resident = None

    def tensor_type(self) -> tuple[type, ...] | None:
        jax = sys.modules.get("jax")
        # While JAX is being imported, it is in sys.modules without its names.
        array, tracer = getattr(jax, "Array", None), getattr(getattr(jax, "core", None), "Tracer", None)
        struct = getattr(jax, "ShapeDtypeStruct", None)
        return None if array is None or tracer is None or struct is None else (array, tracer, struct)

    def check(self, tensor: Any, contributor: str, name: str) -> np.dtype[Any]:
        problem = None
        if isinstance(tensor, _jax().ShapeDtypeStruct):
            problem = "has no values: it is what eval_shape tells of an array"
        elif isinstance(tensor, _jax().core.Tracer):
            problem = (
                "has no values inside of a function that JAX traces (jit, grad, vmap); read and average outside of it"
            )
        elif tensor.is_deleted():
            problem = "has no values any more: it was donated or deleted"
        elif tensor.dtype not in SUPPORTED_DTYPES:
            raise not_averageable(tensor.dtype, contributor, name)
        elif not tensor.is_fully_addressable:
            problem = "lies partly in other processes"
        if problem is not None:
            raise WeightsTypeError(f"{contributor}: {name!r} {problem}", contributor=contributor, name=name)
        dtype: np.dtype[Any] = tensor.dtype
        return dtype

    def dtype(self, tensor: Any) -> np.dtype[Any] | None:
        return tensor.dtype if tensor.dtype in SUPPORTED_DTYPES else None

    def device(self, tensor: Any) -> str:
        return "cpu"

    def placement(self, tensor: Any) -> Any:
        """Its sharding; or its device, if JAX may move the array away from there."""
        return tensor.sharding if tensor.committed else tensor.device

    def view(self, tensor: Any, contributor: str | None = None, name: str | None = None) -> Array:
        shared = _on_cpu(tensor)
        if shared is not None:
            return shared
        gathered: Array = np.empty(tensor.shape, tensor.dtype)
        for shard in tensor.addressable_shards:  # the array as a whole would keep its copy for as long as it lives
            if shard.replica_id == 0:
                gathered[shard.index] = np.asarray(shard.data)
        gathered.flags.writeable = False
        return gathered

    def tensor(self, array: Array, placement: Any = None) -> Any:
        jax, movable = _jax(), None
        if isinstance(placement, jax.Device):
            movable, placement = placement, None
        with ExitStack() as settings:
            if array.dtype.itemsize == 8:  # JAX would make a shorter one of it
                settings.enter_context(_x64())
            if movable is not None:
                settings.enter_context(jax.default_device(movable))
            return jax.device_put(array, placement)

    def code(self, tensor: Any) -> str | None:
        jax = _jax()
        if isinstance(tensor, jax.core.Tracer):  # which has no values, whatever it is
            return None
        if jax.dtypes.issubdtype(tensor.dtype, jax.dtypes.prng_key):
            return "a random key"
        raw = str(tensor.dtype) == "uint32" and tuple(tensor.shape[-1:]) in ((2,), (4,))
        return "a random key, as it seems" if raw else None

    def alike(self, one: Any, other: Any) -> bool:
        jax = _jax()
        if one.dtype != other.dtype:
            return False
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        return super().alike(one, other)

    def unwritable(self, tensor: Any) -> str | None:
        return "is a JAX array, which cannot be changed; use what is returned"

    def write(self, target: Any, source: Any) -> None:
        """Raises a TypeError, since no JAX array can be written to."""
        raise TypeError(self.unwritable(target))


class Held(NamedTuple):
    """A variable as it is held in a pytree: its place among the leaves, its path, and the box of Flax it is in."""

    place: int
    path: tuple[Any, ...]
    leaf: Any
    box: Any


class JaxModels(Adapter):
    """`Adapter` for JAX pytrees: dicts, Flax linen and nnx, Equinox, optax; by their key paths.

    Variables are the arrays, also numpy's, and Python's numbers in a tree that `jit` takes and gives back with arrays
    in their place, as in a `TrainState` before its first step: its names do not depend on that. Numbers are settings,
    and left out, in a module of Equinox, and in a tree that also holds functions or text. Left out as well are typed
    random keys and the `RngState` of nnx. Arrays can not be changed: `load` returns a new tree. It shares with the old
    one what is not loaded.
    """

    name = "jax"
    models = "a pytree with a jax.Array in it (a dict, Flax, Equinox, optax)"

    def __init__(self) -> None:
        self._tensors = JaxTensors()

    def accepts(self, model: object) -> bool:
        jax = sys.modules.get("jax")
        tree, array = getattr(jax, "tree_util", None), getattr(jax, "Array", None)
        if tree is None or array is None:  # not imported, or not yet whole
            return False
        if isinstance(model, _flax("nnx", "Module")):
            return True
        try:
            leaves = tree.tree_leaves(model)
        except (TypeError, ValueError):  # a dict whose keys have no order is no pytree
            return False
        kinds = (array, _jax().ShapeDtypeStruct)
        if any(isinstance(leaf, kinds) for leaf in leaves if leaf is not model):
            return True
        # One of numpy's arrays alone, as a state that was restored from a file; not any list of arrays.
        held = type(model) not in (list, tuple) and all(isinstance(leaf, (np.ndarray, *NUMBERS)) for leaf in leaves)
        return held and any(isinstance(leaf, np.ndarray) for leaf in leaves if leaf is not model)

    def variables(self, model: Any) -> list[Variable]:
        tree, _ = _opened(model)
        found = []
        for name, held in _held(tree).items():
            dtype, problem = self._dtype(name, held.leaf)
            trainable, role = _role(tree, name, held, dtype)
            shape = tuple(np.shape(held.leaf))
            is_key = isinstance(held.leaf, _jax().Array) and self._tensors.code(held.leaf) is not None
            if is_key or random_state(name, shape, dtype) is not None:
                role = "code"
            found.append(Variable(name, shape, dtype, held.leaf, trainable, role, name, problem))
        return found

    def views(self, model: Any, chosen: Callable[[str], object] | None) -> dict[str, Array] | None:
        """What `get` gives without a copy, by name; None for a model in which anything is out of the ordinary."""
        held = _held(_opened(model)[0])
        kinds, views = (np.ndarray, _jax().Array), dict[str, Array]()
        tied = twins({name: one.leaf for name, one in held.items() if chosen is None or chosen(name)})
        for name in held if chosen is None else filter(chosen, held):
            leaf = held[name].leaf
            if not isinstance(leaf, kinds) or leaf.dtype not in SUPPORTED_DTYPES:
                return None
            try:
                shared = leaf if isinstance(leaf, np.ndarray) else _on_cpu(leaf)
            except (RuntimeError, TypeError):  # deleted; a tracer
                return None
            if shared is None:
                return None
            views[name] = views[tied[name]] if name in tied else given(shared, copy=False)
        return views

    def get(self, variable: Variable, *, copy: bool) -> Array:
        """The value of a variable, as a read-only view or a copy.

        A view has the memory of the array, which JAX neither changes nor donates. An array that is not on one CPU
        device is copied in any case.
        """
        leaf = variable.tensor
        if isinstance(leaf, (np.ndarray, *NUMBERS)):
            return given(np.asarray(leaf, variable.dtype), copy=copy)
        return given(self._tensors.view(leaf, "model", variable.name), copy=copy)

    def load(self, model: Any, values: Mapping[str, tuple[Variable, Any]]) -> Any:
        tree, closed = _opened(model)
        leaves, structure = _jax().tree_util.tree_flatten(tree)
        held = _held(tree)
        for name, (variable, value) in values.items():
            leaves[held[name].place] = copied_like(variable.tensor, value)
        return closed(_jax().tree_util.tree_unflatten(structure, leaves))

    def _dtype(self, name: str, leaf: Any) -> tuple[np.dtype[Any], FedLearnError | None]:
        """Its dtype, and why it cannot be read or averaged."""
        jax = _jax()
        if isinstance(leaf, (np.ndarray, *NUMBERS)):
            return leaf_dtype(leaf, name)
        if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            return checked(self._tensors, leaf, name)
        message = f"model: {name!r} is a Ref, which can change; freeze it first"
        return np.dtype(np.void), WeightsTypeError(message, contributor="model", name=name)


def _opened(model: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The pytree of a model, and what makes a model of such a tree again."""
    if isinstance(model, _flax("nnx", "Module")):
        # As a pytree, a layer that is used in two places would become two.
        nnx = sys.modules["flax.nnx"]
        definition, state = nnx.split(model)
        return state, lambda new: nnx.merge(definition, new)
    return model, lambda new: new


def _leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any, Any]]:
    """Path, leaf and the box of Flax that it is in, as the pytree has them; boxes leave no trace in the path."""
    flatten = _jax().tree_util.tree_flatten_with_path
    boxes = (*_flax("nnx", "Variable"), *_flax("core.meta", "AxisMetadata"))
    if not boxes:
        return [(path, leaf, None) for path, leaf in flatten(tree)[0]]
    found: list[tuple[tuple[Any, ...], Any, Any]] = []
    for path, node in flatten(tree, is_leaf=lambda node: isinstance(node, boxes))[0]:
        if isinstance(node, boxes):
            found += [((*path, *inner[1:]), leaf, node) for inner, leaf in flatten(node)[0]]
        else:
            found.append((path, node, None))
    return found


def _held(tree: Any) -> dict[str, Held]:
    """The variables by name."""
    keystr = _jax().tree_util.keystr
    held: dict[str, Held] = {}
    leaves = _leaves(tree)
    numbers = _traced_numbers(tree, leaves)
    for place, (path, leaf, box) in enumerate(leaves):
        if place in numbers or _is_variable(leaf, box):
            name = keystr(path, simple=True, separator="/")
            if name in held:
                raise ModelError(f"model: two variables have the path {name!r}", name=name)
            held[name] = Held(place, path, leaf, box)
    return held


def _is_variable(leaf: Any, box: Any) -> bool:
    jax = _jax()
    if box is not None and isinstance(box, _flax("nnx", "RngState")):
        return False
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return isinstance(leaf.dtype, np.dtype) or not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return isinstance(leaf, (np.ndarray, getattr(jax, "Ref", ())))


def _traced_numbers(tree: Any, leaves: list[tuple[tuple[Any, ...], Any, Any]]) -> set[int]:
    """The places of the numbers that are arrays once the tree has been through `jit`."""
    state = _flax("nnx", "RngState")
    numbers = {
        place for place, (_, leaf, box) in enumerate(leaves) if isinstance(leaf, NUMBERS) and not isinstance(box, state)
    }
    if not numbers:
        return numbers
    known = (np.ndarray, *NUMBERS, _jax().Array, _jax().ShapeDtypeStruct)
    if not all(isinstance(leaf, known) for _, leaf, _ in leaves):  # jit does not take such a tree
        return set()
    module = getattr(sys.modules.get("equinox"), "Module", None)
    if module is None:
        return numbers
    nodes = _jax().tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, module))[0]
    settings = [path for path, node in nodes if isinstance(node, module)]
    return {place for place in numbers if not any(leaves[place][0][: len(path)] == path for path in settings)}


def _role(tree: Any, name: str, held: Held, dtype: np.dtype[Any]) -> tuple[bool | None, Role | None]:
    """Whether it is trained, and its role, where nnx or a name tells it."""
    if isinstance(held.box, _flax("nnx", "Param")):
        return True, "trained"
    if isinstance(held.box, _flax("nnx", "BatchStat")):
        return False, "statistic"
    collections = "params" in tree if isinstance(tree, Mapping) else hasattr(tree, "params")
    return told_by_name(name, tuple(np.shape(held.leaf)), dtype, collections=collections)


def _on_cpu(leaf: Any) -> Array | None:
    """The memory of an array that lies on one CPU device; None for any other."""
    try:  # which only such an array allows, and which takes half of the time of looking at its devices
        return np.asarray(memoryview(leaf))
    except BufferError:  # nor does bfloat16, which Python's buffers do not know
        devices = leaf.sharding.device_set
    return np.asarray(leaf) if len(devices) == 1 and next(iter(devices)).platform == "cpu" else None


def copied_like(leaf: Any, value: Any) -> Any:
    """A copy of the value where and as the leaf is."""
    if isinstance(leaf, (np.ndarray, *NUMBERS)):
        return loaded_leaf(leaf, np.asarray(value))
    jax = _jax()
    with _x64() if leaf.dtype.itemsize == 8 else nullcontext():  # JAX would make a shorter one of it
        if isinstance(value, np.ndarray):
            # JAX may go on to use the memory of an array, and copies it after it has returned: it gets one of its own.
            own = jax.numpy.asarray(np.array(value, native_dtype(value.dtype), order="C"))
        else:
            own = jax.numpy.array(value, copy=True)
        # To be committed to a device matters to what may be computed with what.
        return own if not leaf.committed and own.sharding == leaf.sharding else jax.device_put(own, leaf.sharding)


def _flax(module: str, kind: str) -> tuple[type, ...]:
    """A class of Flax, for `isinstance`; none where Flax is not imported."""
    found = getattr(sys.modules.get(f"flax.{module}"), kind, None)
    return () if found is None else (found,)


def _x64() -> Any:
    """A context in which JAX makes arrays of 64-bit dtypes."""
    there = getattr(_jax(), "enable_x64", None)  # in earlier versions, a submodule has it
    return there(True) if there is not None else importlib.import_module("jax.experimental").enable_x64()


def _jax() -> Any:
    # Imported already wherever there is an array; not where an accumulator of arrays has just been unpickled.
    return sys.modules.get("jax") or importlib.import_module("jax")
