"""`NDArray` and `ModelData`: Clara Train's messages, as far as components of its users touch them.

A message may hold an array as it is; bytes are made only for whoever asks for them. `fed_learn.numproto` converts.
The bytes are those of protobuf for

    message NDArray { bytes ndarray = 1; }                  // an array in the .npy format
    message ModelData { map<string, NDArray> params = 1; }
"""

import io
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fed_learn.errors import DtypeError, WeightsTypeError, a_type
from fed_learn.npy import viewed
from fed_learn.weights import BFLOAT16, native_dtype

LENGTH_DELIMITED = 2
"""The wire type of everything in these messages."""


class NDArray:
    """One array.

    Args:
        ndarray: Its bytes in the `.npy` format, or, as encrypting components use it, any bytes.

    Example:
        >>> message = NDArray(ndarray=b"secret")
        >>> message.ndarray, message.ByteSize()
        (b'secret', 8)
    """

    __slots__ = ("_value",)

    def __init__(self, ndarray: bytes = b"") -> None:
        self.ndarray = ndarray

    @classmethod
    def view(cls, array: npt.NDArray[Any]) -> Self:
        """A message that shares the array, which nobody may change from now on."""
        message = cls()
        message._value = array
        return message

    @property
    def array(self) -> npt.NDArray[Any]:
        """The array, shared and not to be changed.

        Raises:
            WeightsTypeError: The message holds other bytes than an array in the `.npy` format, or one of objects.
        """
        if not isinstance(self._value, bytes):
            return self._value
        try:
            return viewed(self._value)
        except (DtypeError, WeightsTypeError) as error:
            raise WeightsTypeError(f"{len(self._value)} bytes that are no array in the .npy format: {error}") from error

    @property
    def ndarray(self) -> bytes:
        """The bytes.

        Raises:
            DtypeError: The array is of bfloat16, which the `.npy` format does not know.
        """
        if isinstance(self._value, bytes):
            return self._value
        if native_dtype(self._value.dtype) == BFLOAT16:
            raise DtypeError("bfloat16 has no form in bytes of the .npy format", dtype=self._value.dtype, expected=None)
        buffer = io.BytesIO()
        np.save(buffer, self._value, allow_pickle=False)
        return buffer.getvalue()

    @ndarray.setter
    def ndarray(self, value: bytes) -> None:
        if not isinstance(value, bytes):
            raise TypeError(f"ndarray must be bytes, not {a_type(type(value))}: see fed_learn.numproto")
        self._value: bytes | npt.NDArray[Any] = value

    def CopyFrom(self, other: "NDArray") -> None:  # noqa: N802 - protobuf's name
        """Takes over the content of another message."""
        if not isinstance(other, NDArray):
            raise TypeError(f"CopyFrom needs an NDArray, not {a_type(type(other))}: see fed_learn.numproto")
        self._value = other._value

    def SerializeToString(self) -> bytes:  # noqa: N802
        """The message in protobuf's wire format."""
        content = self.ndarray
        return _field(1, content) if content else b""

    def ByteSize(self) -> int:  # noqa: N802
        """The length of `SerializeToString()`."""
        return len(self.SerializeToString())


class _Params(dict[str, NDArray]):
    """A protobuf map of messages: looking up a name that is not there adds an empty message."""

    def __missing__(self, name: str) -> NDArray:
        self[name] = NDArray()
        return self[name]


class ModelData:
    """A model: its variables by name.

    Args:
        params: Initial variables.

    Example:
        >>> from fed_learn.numproto import ndarray_to_proto, proto_to_ndarray
        >>> model = ModelData()
        >>> model.params["w"].CopyFrom(ndarray_to_proto(np.ones(2)))
        >>> proto_to_ndarray(model.params["w"])
        array([1., 1.])
    """

    def __init__(self, params: Mapping[str, NDArray] | None = None) -> None:
        self._params = _Params(params or {})

    @property
    def params(self) -> dict[str, NDArray]:
        """The variables; `params[name].CopyFrom(…)` also adds a new one."""
        return self._params

    @property
    def weights(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays by name, shared: what a `fed_learn.ModelData` calls so."""
        return {name: message.array for name, message in self.params.items()}

    def CopyFrom(self, other: "ModelData") -> None:  # noqa: N802
        """Takes over the content of another message."""
        copies = _Params()
        for name, message in other.params.items():
            copies[name].CopyFrom(message)
        self._params = copies

    def SerializeToString(self) -> bytes:  # noqa: N802
        """The message in protobuf's wire format."""
        entries = (_field(1, name.encode()) + _field(2, a.SerializeToString()) for name, a in self.params.items())
        return b"".join(_field(1, entry) for entry in entries)

    def ByteSize(self) -> int:  # noqa: N802
        """The length of `SerializeToString()`, computed one variable at a time."""
        sizes = (_size(len(name.encode())) + _size(a.ByteSize()) for name, a in self.params.items())
        return sum(map(_size, sizes))


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | LENGTH_DELIMITED]) + _varint(len(content)) + content


def _size(length: int) -> int:
    """The size of a field with content of this length."""
    return 1 + len(_varint(length)) + length


def _varint(number: int) -> bytes:
    """Seven bits to a byte, the lowest first; the top bit says that more follow."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])
