"""Where arrays lie in memory, and the C extension, if it was built."""

import importlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fed_learn.weights import BFLOAT16, SUPPORTED_DTYPES, Array, Schema

EXTENSION: Any = None
"""The module with the C kernels; None where it cannot be loaded, and then `PROBLEM` says why."""
PROBLEM: ImportError | None = None
try:
    EXTENSION = importlib.import_module("fed_learn.kernels._native")
except ImportError as error:
    PROBLEM = error

Addresses: TypeAlias = npt.NDArray[np.uintp]

CODES: dict[np.dtype[Any], int] = {}
"""The codes of dtypes in C; empty without the extension."""
if EXTENSION is not None:
    CODES = {
        dtype: getattr(EXTENSION.lib, "FL_" + ("BFLOAT16" if dtype == BFLOAT16 else dtype.name.upper()))
        for dtype in SUPPORTED_DTYPES
    }


class Table:
    """Where the outputs and inputs of some variables lie: what a kernel in C needs to know of them.

    It is filled in C, in one pass that makes no object per array; without the extension nothing is found.

    Args:
        schema: The variables.
        n_inputs: Inputs of each.

    Attributes:
        addresses: A row per variable: the address of the output, then those of the inputs.
        counts: Elements of each variable.
        sizes: Bytes of each variable.
        codes: The code of the dtype of each variable.
        nbytes: Bytes of all outputs and inputs.

    Example:
        >>> w = np.zeros((2, 3))
        >>> table = Table(Schema.of({"w": w}), 2)
        >>> table.gather([{"w": w}, {"w": w.T}], 1)
        False
    """

    __slots__ = ("_schema", "addresses", "codes", "counts", "nbytes", "sizes")

    def __init__(self, schema: Schema, n_inputs: int) -> None:
        self._schema = schema
        n, n_columns = len(schema), n_inputs + 1
        self.addresses: Addresses = np.empty((n, n_columns), np.uintp)
        self.counts: Addresses = np.empty(n, np.uintp)
        self.sizes: Addresses = np.empty(n, np.uintp)
        self.codes: npt.NDArray[np.int32] = np.empty(n, np.int32)
        self.nbytes = 0
        if EXTENSION is not None:
            counts, sizes = _pointer(self.counts, "size_t[]"), _pointer(self.sizes, "size_t[]")
            codes = _pointer(self.codes, "int32_t[]")
            self.nbytes = n_columns * EXTENSION.lib.fl_measure(id(schema), id(CODES), counts, sizes, codes)

    def gather(self, rows: list[dict[str, Array]], first: int) -> bool:
        """Fills in the addresses of weight dicts, if each is as a kernel takes it.

        Args:
            rows: Weight dicts that nobody else changes. The caller keeps them alive.
            first: Their first column; 0 for that of the outputs, which have to be writeable.

        Returns:
            Whether all hold plain arrays, C-contiguous and aligned, of just the names, shapes and dtypes of the schema
            in its order. If not, these addresses are undefined.
        """
        if EXTENSION is None:
            return False
        at, n_columns = _pointer(self.addresses) + first, self.addresses.shape[1]
        return bool(EXTENSION.lib.fl_gather(id(self._schema), id(rows), id(np.ndarray), first == 0, n_columns, at))

    def may_overlap(self) -> bool:
        """Whether outputs share memory with one another or with an input; without the extension they may."""
        if EXTENSION is None:
            return True
        n, n_columns = self.addresses.shape
        sizes, spans = _pointer(self.sizes, "size_t[]"), np.empty(2 * n, np.uintp)
        return bool(EXTENSION.lib.fl_overlap(n, n_columns - 1, _pointer(self.addresses), sizes, _pointer(spans)))


def addresses(arrays: Sequence[Array]) -> Addresses:
    """The addresses of C-contiguous arrays, which the caller keeps alive.

    Raises:
        ValueError: An array is not C-contiguous.
    """
    if EXTENSION is None:
        contiguous = all(array.flags.c_contiguous for array in arrays)
        found = np.array([array.__array_interface__["data"][0] for array in arrays], np.uintp)
    else:
        held, found = list(arrays), np.empty(len(arrays), np.uintp)
        contiguous = EXTENSION.lib.fl_addresses(id(held), _pointer(found))
    if not contiguous:
        raise ValueError("an array is not C-contiguous")
    return found


def _pointer(array: npt.NDArray[Any], kind: str = "uintptr_t[]") -> Any:
    """A pointer to the memory of a contiguous array, which it keeps alive."""
    return EXTENSION.ffi.from_buffer(kind, array)
