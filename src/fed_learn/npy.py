"""Reads arrays from bytes in the `.npy` format that others have sent, without a copy.

numpy's own readers leave a header to Python's parser, and for old files to its tokenizer: a few kilobytes of spaces
keep that busy for minutes. Here a header is matched whole against the one form that writers of arrays give it. Nothing
is ever unpickled, and nothing is allocated that the bytes do not hold.
"""

import math
import re
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from fed_learn.errors import DtypeError, WeightsTypeError, brief
from fed_learn.limits import LONGEST_HEADER
from fed_learn.weights import Array

Header: TypeAlias = tuple[np.dtype[Any], bool, tuple[int, ...]]
"""Dtype, whether in Fortran order, shape."""

MAGIC = b"\x93NUMPY"
LENGTH_BYTES = {b"\x01\x00": 2, b"\x02\x00": 4}
"""Version → bytes of the header's length. Version 3 only serves names in structured dtypes."""

DTYPES = {
    f"{order}{code}".encode(): np.dtype(f"{order}{code}")
    for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", "V2")
    for order in ("<", ">", "|", "=", "")
}
"""How `.npy` names dtypes. Complex ones are read for whoever wants them; `V2` is what becomes of bfloat16."""

# A size has at most 18 digits, so that each fits into 64 bits; numpy knows at most 64 dimensions. All repetitions are
# possessive or have one way to match: the cost is that of the header's length.
_SIZE = rb"(?:0|[1-9][0-9]{0,17}+)"
_SHAPE = rb"(?:" + _SIZE + rb" *+,(?: *+" + _SIZE + rb" *+,){0,63}+(?: *+" + _SIZE + rb")?+)?+ *+"
_HEADER = re.compile(
    rb"\{ *+'descr' *+: *+(?P<descr>'[^'\n]{0,30}+'|\[[^\n]*?\]) *+, *+"
    rb"'fortran_order' *+: *+(?P<fortran>True|False) *+, *+"
    rb"'shape' *+: *+\( *+(?P<shape>" + _SHAPE + rb")\) *+(?:, *+)?+\}[ \n]*+"
)


def viewed(data: bytes) -> Array:
    """The array in the bytes of an `.npy` file: a read-only view of them, or a copy where they are not aligned.

    Args:
        data: They may come from anywhere.

    Raises:
        WeightsTypeError: They are no such file of version 1 or 2, or hold more or less than its header says.
        DtypeError: The array is of Python objects, or of another dtype that nothing averages, such as text.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> np.save(file, np.float32([1, 2]))
        >>> viewed(file.getvalue())
        array([1., 2.], dtype=float32)
    """
    if data[:6] != MAGIC or data[6:8] not in LENGTH_BYTES:
        raise WeightsTypeError("no .npy file of version 1 or 2")
    start = 8 + LENGTH_BYTES[data[6:8]]
    length = int.from_bytes(data[8:start], "little")
    if length > LONGEST_HEADER:
        raise WeightsTypeError(f"a header of {length} bytes, at most {LONGEST_HEADER} are taken")
    dtype, fortran_order, shape = _read_header(data[start : start + length])
    start += length
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise WeightsTypeError(f"{max(len(data) - start, 0)} bytes of data for shape {shape} of {dtype}")
    order: Any = "F" if fortran_order else "C"
    try:
        found: Array = np.ndarray(shape, dtype, data, start, order=order)
    except ValueError as error:  # an empty array, with other sizes beyond what numpy counts
        raise WeightsTypeError(f"shape {shape}: {error}") from error
    return found if found.flags.aligned else np.ndarray(shape, dtype, found.tobytes("A"), order=order)


@lru_cache(4096)  # parsing takes longer than averaging a small layer, and all clients send the same headers
def _read_header(header: bytes) -> Header:
    match = _HEADER.fullmatch(header)
    if match is None:
        raise WeightsTypeError(f"a header that is no header: {brief(header.decode('latin-1'))}")
    descr, shape = match["descr"], tuple(int(size) for size in match["shape"].split(b",") if size.strip())
    dtype = DTYPES.get(descr[1:-1])
    if dtype is None:
        if b"'|O" in descr:
            problem = "an array of Python objects, which would have to be unpickled"
        else:
            problem = f"an array of dtype {brief(descr.decode('latin-1'))}, which cannot be averaged"
        raise DtypeError(problem, dtype=descr.decode("latin-1"), expected=None)
    return dtype, match["fortran"] == b"True", shape
