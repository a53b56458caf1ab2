"""Where arrays lie in memory, and the C extension, if it was built."""

import importlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fed_learn.weights import BFLOAT16, Array

EXTENSION: Any = None
"""The module with the C kernels; None where it cannot be loaded, and then `PROBLEM` says why."""
PROBLEM: ImportError | None = None
try:
    EXTENSION = importlib.import_module("fed_learn.kernels._native")
except ImportError as error:
    PROBLEM = error

Addresses: TypeAlias = npt.NDArray[np.uintp]


def addresses(arrays: Sequence[Array]) -> Addresses:
    """The addresses of C-contiguous arrays, which the caller keeps alive.

    By way of buffers where there is the extension: they take a tenth of the time of `__array_interface__`.

    Raises:
        ValueError: An array is not C-contiguous.
    """
    if EXTENSION is None:
        if not all(array.flags.c_contiguous for array in arrays):
            raise ValueError("an array is not C-contiguous")
        return np.array([array.__array_interface__["data"][0] for array in arrays], np.uintp)
    ffi = EXTENSION.ffi
    try:
        buffers = [ffi.from_buffer(array) for array in arrays]
    except ValueError:  # numpy gives no buffer of a dtype that is not its own
        buffers = [ffi.from_buffer(a.view(np.uint16) if a.dtype == BFLOAT16 else a) for a in arrays]
    return np.frombuffer(ffi.buffer(ffi.new("void *[]", buffers)), np.uintp)
