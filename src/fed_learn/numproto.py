"""Between Clara Train's messages and arrays: one array, or a whole model and its weight dict."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fed_learn.errors import DtypeError, FedLearnError, IntegerRangeError, WeightsTypeError, a_type
from fed_learn.protos.federated_pb2 import ModelData, NDArray
from fed_learn.weights import Array, Schema, WeightDict, as_weight_dict, check_finite


def ndarray_to_proto(nda: npt.ArrayLike) -> NDArray:
    """A message with a copy of the array.

    Raises:
        DtypeError: It holds Python objects.

    Example:
        >>> proto_to_ndarray(ndarray_to_proto([1.0, 2.0]))
        array([1., 2.])
    """
    array = np.array(nda)
    if array.dtype.hasobject:
        raise DtypeError("an array of Python objects cannot be sent", dtype=array.dtype, expected=None)
    array.flags.writeable = False
    return NDArray.view(array)


def proto_to_ndarray(nda_proto: NDArray | Array) -> Array:
    """The array in a message: the caller's own, writeable.

    Handlers find arrays where Clara's had messages: an array gives a copy of itself.

    Raises:
        WeightsTypeError: The message holds other bytes than an array in the `.npy` format, or one of objects.

    Example:
        >>> proto_to_ndarray(NDArray(ndarray=b"secret"))
        Traceback (most recent call last):
        ...
        fed_learn.errors.WeightsTypeError: 6 bytes that are no array in the .npy format: no .npy file of version 1 or 2
    """
    return np.array(nda_proto if isinstance(nda_proto, np.ndarray) else _viewed(nda_proto))


def weights_to_model(weights: WeightDict) -> ModelData:
    """A message that shares the arrays of a weight dict, which nobody may change from now on."""
    return ModelData({name: NDArray.view(array) for name, array in weights.items()})


def model_to_weights(model: object, schema: Schema, who: str) -> dict[str, Array]:
    """The weights of a model that came from a component of the user, in the dtypes of `schema`.

    Components compute in float64; each variable is rounded to its own dtype here, to integers half to even.

    Args:
        model: A `ModelData`, of `fed_learn.protos.federated_pb2` or of `fed_learn`.
        schema: What the model must have.
        who: Where it came from, for the error.

    Returns:
        A new dict; arrays that need no rounding are shared.

    Raises:
        WeightsTypeError, NamesError, ShapeError, DtypeError, NonFiniteError: It is not such a model.
        IntegerRangeError: A number leaves the range of an integer variable.

    Example:
        >>> message = ModelData({"w": ndarray_to_proto(np.float64([0.1]))})
        >>> model_to_weights(message, Schema.of({"w": np.zeros(1, np.float32)}), "aggregator")
        {'w': array([0.1], dtype=float32)}
    """
    return to_dtypes(model_arrays(model, who), schema, who)


def model_arrays(model: object, who: str) -> dict[Any, Any]:
    """The arrays of a model, shared and unchecked.

    Raises:
        WeightsTypeError: It is no model, or holds bytes that are no array.
    """
    params = getattr(model, "params", None)
    if not isinstance(params, Mapping):
        raise WeightsTypeError(f"{who}: the model is {a_type(type(model))}, not a ModelData", contributor=who)
    return {name: _named(name, value, who) for name, value in params.items()}


def to_dtypes(weights: object, schema: Schema, who: str) -> dict[str, Array]:
    """The weights rounded to the dtypes of `schema`, else like `model_to_weights`."""
    arrays = as_weight_dict(weights, who)
    given = Schema.of(arrays, who)  # refuses what is no number
    changed = {name for name in arrays if name in schema and given[name][1] != schema[name][1]}
    check_finite({name: arrays[name] for name in changed}, who)
    arrays |= {name: _rounded(arrays[name], schema[name][1], name, who) for name in changed}
    schema.check(arrays, who)
    check_finite(arrays, who)
    return {name: arrays[name] for name in schema}


def _rounded(array: Array, dtype: np.dtype[Any], name: str, who: str) -> Array:
    with np.errstate(all="ignore"):  # what overflows is found below, or by the caller
        if dtype.kind not in "biu":
            return array.astype(dtype)
        whole = array if array.dtype.kind in "biu" else np.rint(array.astype(np.float64))
        narrow = whole.astype(dtype)
    if not np.array_equal(narrow, whole):
        raise IntegerRangeError(f"{who}: {name!r} leaves the range of {dtype}", contributor=who, name=name)
    return narrow


def _named(name: object, value: object, who: str) -> object:
    if not isinstance(value, NDArray):
        return value
    try:
        return _viewed(value)
    except FedLearnError as error:
        raise WeightsTypeError(f"{who}: {name!r} holds {error}", contributor=who, name=str(name)) from error


def _viewed(message: NDArray) -> Array:
    if not isinstance(message, NDArray):
        raise WeightsTypeError(f"{a_type(type(message))} is no NDArray")
    return message.array
