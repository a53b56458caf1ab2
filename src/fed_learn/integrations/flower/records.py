"""Flower's `ArrayRecord`s as weight dicts, and back.

A record holds an `.npy` file per variable. Reading makes read-only views of those bytes; writing lets the arrays be
filled in where the bytes of the new record will be. Neither copies a model.

bfloat16 has no name in `.npy`: numpy writes two-byte voids (`|V2`). Here `Array.dtype`, which travels beside the bytes,
says `"bfloat16"`; where it does not, the global model's dtype decides.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fed_learn.errors import DtypeError, WeightsTypeError, as_failure, brief, text_of
from fed_learn.npy import viewed
from fed_learn.weights import (
    BFLOAT16,
    FrozenWeights,
    Schema,
    WeightDict,
    about,
    as_weight_dict,
    check_names,
    native_dtype,
)
from fed_learn.weights import Array as NumpyArray

NPY = "numpy.ndarray"
"""`Array.stype` of what this module reads and writes."""
VOID = np.dtype("V2")
"""What `.npy` makes of bfloat16."""


def to_weights(
    record: Mapping[str, Array], *, like: WeightDict | Schema | None = None, contributor: str | None = None
) -> FrozenWeights:
    """The weight dict of a record: read-only views of its bytes.

    Args:
        record: An `ArrayRecord`. It may come from anywhere: nothing in it is ever unpickled.
        like: A weight dict, or its `Schema`, that tells which variables are bfloat16 where the record does not.
        contributor: Who sent it, for errors.

    Raises:
        NamesError: There are more variables, or longer names, than any model has.
        WeightsTypeError: The bytes are no `.npy` file, or hold more or less than their header says.
        DtypeError: An array of Python objects, or of another dtype that nothing averages.

    Example:
        >>> record = to_record({"w": np.float32([1, 2])})
        >>> to_weights(record)["w"]
        array([1., 2.], dtype=float32)
    """
    schema = like if like is None or isinstance(like, Schema) else Schema.of(like)
    check_names(record, contributor)
    weights: dict[str, NumpyArray] = {}
    for name, array in record.items():
        expected = None if schema is None else schema.get(name)
        try:
            view = None if expected is None else _view_as(array, *expected)
            if view is None:
                view = _view(array)
            if view.dtype == VOID and (array.dtype == "bfloat16" or (expected is not None and expected[1] == BFLOAT16)):
                view = view.view(BFLOAT16.newbyteorder(">") if array.dtype.startswith(">") else BFLOAT16)
        except BaseException as error:  # what stands in for an `Array` may be anything
            as_failure(error)
            kind = DtypeError if isinstance(error, DtypeError) else WeightsTypeError
            raise kind(
                f"{about(contributor, name)}cannot be read: {text_of(error)}",
                contributor=contributor,
                name=name,
                dtype=getattr(error, "dtype", None),
                expected=None,
            ) from error
        weights[name] = view
    frozen = FrozenWeights.__new__(FrozenWeights)
    dict.update(frozen, weights)  # views of bytes: nobody can make them writeable
    return frozen


def to_record(weights: WeightDict) -> ArrayRecord:
    """A new record with a copy of a weight dict, which Flower and its clients can read.

    Args:
        weights: Names to arrays, bfloat16 among them; `fed_learn.get_weights(model)` gives them.

    Raises:
        WeightsTypeError, DtypeError: It is no weight dict, or holds a dtype that cannot be averaged.
    """
    return recorded(weights).record


def recorded(weights: WeightDict) -> "RecordWeights":
    """The weights together with their record; see `to_record`."""
    if isinstance(weights, RecordWeights):
        return weights
    arrays = as_weight_dict(weights)
    writer = RecordWriter(Schema.of(arrays))
    for name, array in arrays.items():
        writer.arrays[name][...] = array
    return writer.finish()


def copy_of(record: ArrayRecord) -> ArrayRecord:
    """Another record with the same bytes: what becomes of it, the first does not notice."""
    copied = ArrayRecord()
    for name, array in record.items():
        copied[name] = Array(array.dtype, array.shape, array.stype, array.data)
    return copied


def same_bytes(left: ArrayRecord, right: ArrayRecord) -> bool:
    """Whether two records hold the same objects of bytes, under the same names in one order."""
    return list(left) == list(right) and all(left[name].data is right[name].data for name in left)


def same_memory(left: WeightDict, right: WeightDict) -> bool:
    """Whether two weight dicts hold arrays at the same addresses, under the same names."""
    return len(left) == len(right) and all(
        name in right and array.__array_interface__["data"] == right[name].__array_interface__["data"]
        for name, array in left.items()
    )


def record_bytes(record: ArrayRecord) -> int:
    """How many bytes the arrays of a record take."""
    return sum(len(array.data) for array in record.values())


class RecordWeights(FrozenWeights):
    """The weights of a record that was written here: views of its bytes.

    Attributes:
        record: The `ArrayRecord`.
    """

    record: ArrayRecord

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenWeights, (dict(self),)


class RecordWriter:
    """Writes a record without a second copy: `arrays` lie where the record's bytes will be.

    Args:
        schema: Names, shapes and dtypes.

    Attributes:
        arrays: To be filled in, each element.

    Example:
        >>> writer = RecordWriter(Schema.of({"w": np.zeros(2, np.float32)}))
        >>> writer.arrays["w"][:] = 1
        >>> writer.finish()["w"]
        array([1., 1.], dtype=float32)
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._files: dict[str, BytesIO] = {}
        self.arrays: dict[str, NumpyArray] = {}
        for name, (shape, dtype) in schema.items():
            header = _written_header(shape, dtype)
            # BytesIO takes these bytes as they are, lets them be written to, and gives them back: nothing is copied.
            file = BytesIO(bytes(len(header) + math.prod(shape) * dtype.itemsize))
            with file.getbuffer() as buffer:
                buffer[: len(header)] = header
            self._files[name] = file
            self.arrays[name] = np.frombuffer(file.getbuffer(), dtype, offset=len(header)).reshape(shape)

    def finish(self) -> RecordWeights:
        """The weights, in their record. The writer is used up."""
        self.arrays.clear()
        record = ArrayRecord()
        for name, (shape, dtype) in self._schema.items():
            record[name] = Array(str(dtype), shape, NPY, self._files.pop(name).getvalue())
        weights = RecordWeights.adopt(to_weights(record, like=self._schema))
        weights.record = record
        return weights


def _view_as(array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NumpyArray | None:
    """`_view` in a third of the time, for the usual file of this shape and dtype; None for any other."""
    header, data = _written_header(shape, dtype), array.data
    size = len(header) + math.prod(shape) * dtype.itemsize
    if dtype == BFLOAT16 or array.stype != NPY or len(data) != size or not data.startswith(header):
        return None
    found: NumpyArray = np.ndarray(shape, dtype, data, len(header))
    return found if found.flags.aligned else None


def _view(array: Array) -> NumpyArray:
    """The array in the bytes of an `Array`."""
    if array.stype != NPY:
        raise WeightsTypeError(f"serialized as {brief(array.stype)}, not as {NPY!r}")
    return viewed(array.data)


@lru_cache(4096)
def _written_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    file = BytesIO()
    descr = "<V2" if native_dtype(dtype) == BFLOAT16 else dtype.str
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()
