"""From checked weight dicts to what a kernel takes: contiguous inputs, and outputs that share no memory with them."""

from collections.abc import Iterator, Mapping, Sequence
from operator import is_not
from typing import Any

import numpy as np
import numpy.typing as npt

from fed_learn.aggregation.integers import magnitude
from fed_learn.kernels.memory import Addresses, Table, addresses
from fed_learn.weights import Array, Schema, finite_elements, first_of, native_dtype


def contiguous(array: Array) -> Array:
    """The array contiguous, aligned and in native byte order: itself where it is so already, else a copy."""
    flags = array.flags
    if flags.c_contiguous and flags.aligned and array.dtype.isnative:
        return array
    return np.require(array, native_dtype(array.dtype), ["C", "A"])


def is_frozen(array: Array) -> bool:
    """Whether nobody can change what an array holds: it is a view of bytes, or read-only like all that it is a view of.

    The owner of an array could make it writeable again; nobody does so with `FrozenWeights` or files that were read.

    Example:
        >>> is_frozen(np.frombuffer(b"abcd", np.uint8)), is_frozen(np.zeros(1)[:])
        (True, False)
    """
    held: Any = array
    while isinstance(held, np.ndarray):
        if held.flags.writeable:
            return False
        held = held.base
    if isinstance(held, memoryview):
        held = held.obj
    return held is None or isinstance(held, bytes)


class _Arrays:
    """Methods of `fed_learn.adapters.base.Resident` for arrays, so that a mean treats arrays and tensors alike."""

    def first_not_finite(self, array: Array) -> tuple[tuple[int, ...], float] | None:
        """Index and value of the first NaN or infinity, if there is one."""
        if array.dtype.kind in "biu":
            return None
        finite = finite_elements(array)
        return None if finite.all() else first_of(~finite, array)

    def magnitude(self, array: Array) -> int:
        """The largest absolute value of integers; 0 for an empty array and for anything else."""
        return magnitude(array)

    def overflowed(self, array: Array) -> npt.NDArray[np.bool_]:
        """Which elements look like the mean of a sum that overflowed: not finite, or the largest float64.

        Kernels hold a mean within the range of float64, so there the largest value may hide an infinity.
        """
        found = ~np.isfinite(array)
        return found | (np.abs(array) == np.finfo(np.float64).max) if array.dtype == np.float64 else found

    def view(self, array: Array) -> Array:
        """The array."""
        return array

    def put(self, array: Array, mask: npt.NDArray[np.bool_], values: Array) -> None:
        """Replaces some elements."""
        array[mask] = values

    def contiguous(self, array: Array) -> Array:
        """The array as a kernel takes it."""
        return contiguous(array)


ARRAYS = _Arrays()


class Columns(Mapping[str, Sequence[Array]]):
    """Name → the arrays of all contributions, contiguous and aligned as a kernel takes them, listed when asked for.

    Args:
        schema: Of all contributions.
        rows: Weights that were checked: in the order of the schema, in native byte order.
        table: Holds the addresses of their arrays as inputs; None: they are looked up.

    Attributes:
        given: All weights as they came.
        table: Where the arrays lie.
        copied: Whether any array had to be copied.

    Example:
        >>> w = np.zeros(2)
        >>> columns = Columns(Schema.of({"w": w}), [{"w": w}, {"w": np.ones(2)}])
        >>> columns["w"]
        [array([0., 0.]), array([1., 1.])]
    """

    def __init__(self, schema: Schema, rows: list[dict[str, Array]], table: Table | None = None) -> None:
        self.given = taken = rows
        self.copied = False
        if table is None:
            table = Table(schema, len(rows))
            if not table.gather(rows, 1):
                for row in rows:
                    schema.check(row)  # for what is not as it should be, the kernels would read beyond its memory
                taken = [{name: contiguous(row[name]) for name in schema} for row in rows]
                arrays = [array for row in taken for array in row.values()]
                table.addresses[:, 1:] = addresses(arrays).reshape(len(rows), -1).T
                self.copied = any(map(is_not, arrays, [row[name] for row in rows for name in schema]))
        self.table = table
        self._taken = taken

    def __getitem__(self, name: str) -> list[Array]:
        return [row[name] for row in self._taken]

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken[0])

    def __len__(self) -> int:
        return len(self._taken[0])

    def bounds(self, sizes: Addresses) -> tuple[Addresses, Addresses]:
        """The addresses at which each array that the caller gave begins and ends.

        Args:
            sizes: Bytes of each variable.
        """
        if self.copied:
            return bounds_of([array for row in self.given for array in row.values()])
        starts = self.table.addresses[:, 1:]
        return starts.ravel(), (starts + sizes[:, None]).ravel()


def bounds_of(arrays: Sequence[Array]) -> tuple[Addresses, Addresses]:
    """The addresses at which the memory of arrays begins and ends, contiguous or not."""
    pairs = [np.lib.array_utils.byte_bounds(array) if array.size else (0, 0) for array in arrays]
    bounds = np.array(pairs, np.uintp).reshape(-1, 2)
    return bounds[:, 0], bounds[:, 1]
