"""Tensors and models of TensorFlow. Nothing here imports TensorFlow: it is there when there are tensors."""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fed_learn.adapters.base import (
    DTYPES,
    Adapter,
    Framework,
    Variable,
    checked,
    given,
    not_averageable,
    role_of_any,
)
from fed_learn.adapters.keras_layers import built_layers, derived_anew, keras2_layer, left_in
from fed_learn.errors import ModelError, WeightsTypeError, a_type, text_of
from fed_learn.hints import of_numbers
from fed_learn.weights import BFLOAT16, Array, native_dtype, same_bits

MEMORY_ALIGNMENT = 64
"""Bytes at which memory must begin that TensorFlow is to use: its operations end the process over any other."""


class TensorFlowTensors(Framework):
    """`Framework` for TensorFlow: eager tensors, and `tf.Variable`s, which are read as they are at the moment.

    What comes back is an eager tensor, which `variable.assign` takes. Tensors on the CPU share their memory with
    arrays, and so does what was read of a variable: a later change of it takes other memory. Variables of a
    `tf.distribute.Strategy` have the value that TensorFlow tells: where replicas differ until they are read, the mean
    or sum of them, as it was asked for.

    Example:
        >>> import tensorflow as tf
        >>> tensors, weight = TensorFlowTensors(), tf.Variable([1.0, 2.0])
        >>> tensors.view(weight)
        array([1., 2.], dtype=float32)
        >>> tensors.tensor(np.float32([3])).numpy()
        array([3.], dtype=float32)
    """

    name = "tensorflow"
    resident = None

    def tensor_type(self) -> tuple[type, ...] | None:
        tensorflow = sys.modules.get("tensorflow")
        # While TensorFlow is being imported, it is in sys.modules without its names.
        kinds = [getattr(tensorflow, kind, None) for kind in ("Tensor", "Variable", "TensorSpec")]
        return None if None in kinds else (*filter(None, kinds),)

    def check(self, tensor: Any, contributor: str, name: str) -> np.dtype[Any]:
        problem = None
        if isinstance(tensor, _tensorflow().TensorSpec):
            problem = "is a TensorSpec, which has no values"
        elif not _tensorflow().executing_eagerly() or not hasattr(tensor, "numpy"):
            problem = "has no values inside of a tf.function or graph; read and average outside of it"
        if problem is not None:
            raise WeightsTypeError(f"{contributor}: {name!r} {problem}", contributor=contributor, name=name)
        dtype = _dtype(tensor.dtype)
        if dtype is None:
            raise not_averageable(tensor.dtype.name, contributor, name)
        return dtype

    def dtype(self, tensor: Any) -> np.dtype[Any] | None:
        return _dtype(tensor.dtype)

    def device(self, tensor: Any) -> str:
        return "cpu"

    def placement(self, tensor: Any) -> str | None:
        device = str(tensor.device)
        return None if device.endswith("device:CPU:0") else device

    def view(self, tensor: Any, contributor: str | None = None, name: str | None = None) -> Array:
        tensorflow = _tensorflow()
        value = tensor
        kind: Any = type(tensor)
        try:
            if _is_plain(kind):  # a third of the time of read_value()
                value = tensorflow.raw_ops.ReadVariableOp(resource=tensor.handle, dtype=tensor.dtype)
            elif isinstance(tensor, tensorflow.Variable):  # of several replicas, which may have to be reduced
                value = tensor.read_value()
            try:
                array = np.asarray(value)
            except ValueError:  # a single bfloat16, which comes as a scalar
                array = np.asarray(value.numpy())
        # A variable that is gone, that has no handle, or whose replicas cannot be reduced.
        except (AttributeError, ValueError, tensorflow.errors.OpError) as error:
            raise WeightsTypeError(
                f"{contributor}: {name!r} is {a_type(kind)} that cannot be read: {text_of(error)}",
                contributor=contributor,
                name=name,
            ) from error
        array.setflags(write=False)
        return array

    def tensor(self, array: Array, placement: Any = None) -> Any:
        tensorflow = _tensorflow()
        with tensorflow.device("CPU:0"):  # where there is a GPU, it would take what it is not kept from
            if array.ctypes.data % MEMORY_ALIGNMENT or not array.size:
                tensor = tensorflow.constant(array)
            else:
                known = array.view(np.int16) if array.dtype == BFLOAT16 else array  # what DLPack knows
                tensor = tensorflow.experimental.dlpack.from_dlpack(known.__dlpack__())
                if known is not array:
                    tensor = tensorflow.bitcast(tensor, tensorflow.bfloat16)
        if placement is None:
            return tensor
        with tensorflow.device(placement):
            return tensorflow.identity(tensor)

    def alike(self, one: Any, other: Any) -> bool:
        return bool(one.dtype == other.dtype) and same_bits(np.asarray(one), np.asarray(other))

    def copied(self, tensor: Any) -> Any:
        return _tensorflow().identity(tensor)

    def unwritable(self, tensor: Any) -> str | None:
        if isinstance(tensor, _tensorflow().Variable):
            return None
        return "is a TensorFlow tensor, which cannot be changed, as a tf.Variable can"

    def write(self, target: Any, source: Any) -> None:
        target.assign(self.tensor(source) if isinstance(source, np.ndarray) else source, read_value=False)


class TensorFlowModels(Adapter):
    """`Adapter` for `tf.Module`s, by the paths of their attributes, and lists of `tf.Variable`, by index and name.

    Layers and models of Keras 2 (`tf_keras`), which are `tf.Module`s too, have the names that it gives their weights.
    """

    name = "tensorflow"
    models = "tf.Module, a tf_keras model, a list of tf.Variable"

    def __init__(self) -> None:
        self._tensors = TensorFlowTensors()

    def accepts(self, model: object) -> bool:
        tensorflow = sys.modules.get("tensorflow")
        module, variable = getattr(tensorflow, "Module", None), getattr(tensorflow, "Variable", None)
        if module is None or variable is None:  # not imported, or not yet whole
            return False
        if isinstance(model, list | tuple):
            return bool(model) and all(isinstance(one, variable) for one in model)
        return isinstance(model, module)

    def variables(self, model: Any) -> list[Variable]:
        if isinstance(model, list | tuple):
            named = {f"{index}/{one.name.removesuffix(':0')}": one for index, one in enumerate(model)}
        elif isinstance(model, keras2_layer()):
            named = _weights_of_keras2(model)
        else:
            named = _attributes(model)
        if not isinstance(model, keras2_layer()):
            return [self._variable(name, variable, bool(variable.trainable)) for name, variable in named.items()]
        trained = set(map(id, model.trainable_weights))  # without those of frozen layers
        return [self._variable(name, variable, id(variable) in trained) for name, variable in named.items()]

    def left(self, model: Any, _: Callable[[str], object] | None) -> list[str]:
        """Vocabularies and other state of layers of Keras 2 that is in none of their variables."""
        return left_in(model) if isinstance(model, keras2_layer()) else []

    def _variable(self, name: str, variable: Any, trainable: bool) -> Variable:
        dtype, problem = checked(self._tensors, variable, name)
        shape = variable.shape
        if problem is None and not shape.is_fully_defined():  # some variables may change their shape
            shape = self._tensors.view(variable, "model", name).shape
        known = tuple(shape) if problem is None else ()
        role = role_of_any(name.rpartition("/")[2], known, dtype, trained=bool(variable.trainable))
        return Variable(name, known, dtype, variable, trainable, role, id(variable), problem)

    def get(self, variable: Variable, *, copy: bool) -> Array:
        """The value of a variable, as a read-only view or a copy.

        A view does not change with the model: a variable that is assigned to takes other memory.
        """
        return given(self._tensors.view(variable.tensor, "model", variable.name), copy=copy)

    def load(self, model: Any, values: Mapping[str, tuple[Variable, Any]]) -> Any:
        # A tensor would be shared with the variable, and may have the memory of somebody's array.
        arrays = [
            (v.tensor, value if isinstance(value, np.ndarray) else self._tensors.view(value, "weights", v.name))
            for v, value in values.values()
        ]
        layered = model if isinstance(model, keras2_layer()) else []
        with derived_anew(layered, {id(variable) for variable, _ in arrays}, self._tensors.view):
            for variable, array in arrays:
                variable.assign(array.astype(native_dtype(array.dtype), copy=False), read_value=False)
        return model

    def hint(self, missing: Sequence[str], extra: Sequence[str]) -> str:
        """What to do when these names are missing and too many, in a sentence; empty where there is nothing to say.

        Example:
            >>> TensorFlowModels().hint(["dense/kernel"], ["dense_1/kernel"])[-82:]
            'name the layers, or call tf_keras.backend.clear_session() before the model is made'
        """
        return of_numbers(missing, extra, "or call tf_keras.backend.clear_session() before the model is made")


def _weights_of_keras2(model: Any) -> dict[str, Any]:
    """The weights of a layer or model of Keras 2 by their names: as a `tf.Module` it would have only some of them."""
    built_layers(model, (keras2_layer().build, sys.modules["tf_keras"].Model.build))
    named: dict[str, Any] = {}
    for variable in model.weights:
        if not isinstance(variable, sys.modules["tensorflow"].Variable):  # what stands for a vocabulary in a file
            continue
        name = variable.name.removesuffix(":0")
        if named.setdefault(name, variable) is not variable:
            raise ModelError(
                f"model: two variables have the name {name!r}; name the layers of each part as no other part has them",
                name=name,
            )
    return named


def _attributes(module: Any) -> dict[str, Any]:
    """The variables of a `tf.Module` by path. TensorFlow has no public function that tells the paths."""
    kinds = [getattr(sys.modules.get("keras"), kind, ()) for kind in ("Layer", "Variable")]
    named: dict[str, Any] = {}
    wanted = (sys.modules["tensorflow"].Variable, *(kind for kind in kinds if kind != ()))
    for path, leaf in module._flatten(predicate=lambda leaf: isinstance(leaf, wanted), with_path=True):
        name = "/".join(map(str, path))
        if not isinstance(leaf, wanted[0]):
            raise ModelError(
                f"model: {name!r} is {a_type(type(leaf))} of Keras, whose variables are not those of a tf.Module; "
                "make the whole a keras.Model, or give a list of its variables",
                name=name,
            )
        if named.setdefault(name, leaf) is not leaf:
            raise ModelError(f"model: two variables have the path {name!r}", name=name)
    return named


@functools.cache
def _is_plain(kind: Any) -> bool:
    """Whether it is a variable that lies in one place, and is read as it lies there."""
    # TensorFlow has no public name for this class.
    base = getattr(sys.modules.get("tensorflow.python.ops.resource_variable_ops"), "BaseResourceVariable", None)
    return base is not None and issubclass(kind, base) and bool(kind.read_value is base.read_value)


@functools.cache
def _dtype(dtype: Any) -> np.dtype[Any] | None:
    return DTYPES.get(dtype.name)


def _tensorflow() -> Any:
    # Imported already wherever there is a tensor; not where an accumulator of tensors has just been unpickled.
    return sys.modules.get("tensorflow") or importlib.import_module("tensorflow")
