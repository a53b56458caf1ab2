"""Flower's `ArrayRecord`s as weight dicts, and back.

A record holds an `.npy` file per variable. Reading makes read-only views of those bytes; writing lets the arrays be
filled in where the bytes of the new record will be. Neither copies a model.

bfloat16 has no name in `.npy`: numpy writes two-byte voids (`|V2`). Here `Array.dtype`, which travels beside the bytes,
says `"bfloat16"`; where it does not, the global model's dtype decides.
"""

import math
import struct
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord

from fed_learn.errors import DtypeError, WeightsTypeError, brief, text_of
from fed_learn.weights import BFLOAT16, FrozenWeights, Schema, WeightDict, as_weight_dict, native_dtype
from fed_learn.weights import Array as NumpyArray

NPY = "numpy.ndarray"
"""`Array.stype` of what this module reads and writes."""
VOID = np.dtype("V2")
"""What `.npy` makes of bfloat16."""
LONGEST_HEADER = 10_000
"""Bytes; as in `numpy.load`. Headers come from outside."""

Header: TypeAlias = tuple[np.dtype[Any], bool, tuple[int, ...]]
"""Dtype, whether in Fortran order, shape."""


def to_weights(
    record: Mapping[str, Array], *, like: WeightDict | Schema | None = None, contributor: str | None = None
) -> FrozenWeights:
    """The weight dict of a record: read-only views of its bytes.

    Args:
        record: An `ArrayRecord`. It may come from anywhere: nothing in it is ever unpickled.
        like: A weight dict, or its `Schema`, that tells which variables are bfloat16 where the record does not.
        contributor: Who sent it, for errors.

    Raises:
        WeightsTypeError: The bytes are no `.npy` file, or hold more or less than their header says.
        DtypeError: An array of Python objects.

    Example:
        >>> record = to_record({"w": np.float32([1, 2])})
        >>> to_weights(record)["w"]
        array([1., 2.], dtype=float32)
    """
    schema = like if like is None or isinstance(like, Schema) else Schema.of(like)
    weights: dict[str, NumpyArray] = {}
    for name, array in record.items():
        expected = None if schema is None else schema.get(name)
        try:
            view = None if expected is None else _view_as(array, *expected)
            if view is None:
                view = _view(array)
        except Exception as error:  # numpy and struct have many for bytes that are no file
            who = f"{contributor}: " if contributor is not None else ""
            kind = DtypeError if isinstance(error, _ObjectsError) else WeightsTypeError
            raise kind(
                f"{who}{name!r} cannot be read: {text_of(error)}",
                contributor=contributor,
                name=name,
                dtype=object,
                expected=None,
            ) from error
        if view.dtype == VOID and (
            array.dtype == "bfloat16" or (schema is not None and schema.get(name, ((), None))[1] == BFLOAT16)
        ):
            view = view.view(BFLOAT16.newbyteorder(">") if array.dtype.startswith(">") else BFLOAT16)
        weights[name] = view
    frozen = FrozenWeights({})
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


class _ObjectsError(ValueError):
    """An array of Python objects, which would have to be unpickled."""


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
        raise ValueError(f"serialized as {brief(array.stype)}, not as {NPY!r}")
    data = array.data
    if data[:6] != b"\x93NUMPY" or data[6:7] not in (b"\1", b"\2"):
        raise ValueError("no .npy file of version 1 or 2")
    length, start = (
        (struct.unpack_from("<H", data, 8)[0], 10) if data[6] == 1 else (*struct.unpack_from("<I", data, 8), 12)
    )
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    dtype, fortran_order, shape = _read_header(data[6], data[8 : start + length])
    start += length
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(data) - start} bytes of data for shape {shape} of {dtype}")
    found: NumpyArray = np.ndarray(shape, dtype, data, start, order="F" if fortran_order else "C")
    # Bytes again, and these are aligned.
    return (
        found
        if found.flags.aligned
        else np.ndarray(shape, dtype, found.tobytes("A"), order="F" if fortran_order else "C")
    )


@lru_cache(4096)  # parsing takes longer than averaging a small layer, and all clients send the same headers
def _read_header(version: int, header: bytes) -> Header:
    try:
        read = np.lib.format.read_array_header_1_0 if version == 1 else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(BytesIO(header), max_header_size=LONGEST_HEADER)
    except Exception as error:  # a tokenizer and a parser of Python read what a client sent
        raise ValueError(f"a header that is no header: {text_of(error)}") from error
    if dtype.hasobject:
        raise _ObjectsError("an array of Python objects, which would have to be unpickled")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {shape}")
    return dtype, fortran_order, shape


@lru_cache(4096)
def _written_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    file = BytesIO()
    descr = "<V2" if native_dtype(dtype) == BFLOAT16 else dtype.str
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()
