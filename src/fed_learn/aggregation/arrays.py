"""From checked weight dicts to what a kernel takes: contiguous inputs, and outputs that share no memory with them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from operator import is_not
from typing import Any

import numpy as np
import numpy.typing as npt

from fed_learn.adapters.overlaps import overlaps_itself
from fed_learn.aggregation.integers import magnitude
from fed_learn.errors import OutputError
from fed_learn.kernels.memory import Addresses, Table, addresses
from fed_learn.weights import Array, Schema, WeightDict, as_weight_dict, finite_elements, first_of, native_dtype

ALIGNMENT = 64
"""Bytes of a cache line, at which the arrays of a slab begin."""
SMALLEST_SLAB = 1 << 20
"""Bytes of a model from which on its new arrays share a slab."""


def contiguous(array: Array) -> Array:
    """The array contiguous, aligned and in native byte order: itself where it is so already, else a copy."""
    flags = array.flags
    if flags.c_contiguous and flags.aligned and array.dtype.isnative:
        return array
    return np.require(array, native_dtype(array.dtype), ["C", "A"])


def is_frozen(array: Array) -> bool:
    """Whether nobody can change what an array holds: it is a view of bytes, or read-only like all that it is a view of.

    Whoever made an array can make it writeable again; `FrozenWeights` and files that were read are not treated so.

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
    """What `fed_learn.adapters.base.Resident` tells of tensors, of arrays."""

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


ARRAYS = _Arrays()


class Columns(Mapping[str, Sequence[Array]]):
    """Name → the arrays of all contributions, contiguous and aligned as a kernel takes them; listed when asked for.

    Args:
        schema: Of all contributions.
        rows: Weights that were checked: in the order of the schema, in native byte order.
        table: With the addresses of their arrays as inputs, if it is known already.

    Attributes:
        given: All weights as they came.
        table: Where the arrays lie.
        copied: Whether any of them is not the one that came.

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
                taken = [{name: contiguous(array) for name, array in row.items()} for row in rows]
                arrays = [array for row in taken for array in row.values()]
                table.addresses[:, 1:] = addresses(arrays).reshape(len(rows), -1).T
                self.copied = any(map(is_not, arrays, [array for row in rows for array in row.values()]))
        self.table = table
        self._taken = taken

    def __getitem__(self, name: str) -> list[Array]:
        return [row[name] for row in self._taken]

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken[0])

    def __len__(self) -> int:
        return len(self._taken[0])

    def bounds(self, sizes: Addresses) -> tuple[Addresses, Addresses]:
        """The addresses at which the memory begins and ends that the caller gave.

        Args:
            sizes: Bytes of each variable.
        """
        if self.copied:
            return _bounds([array for row in self.given for array in row.values()])
        starts = self.table.addresses[:, 1:]
        return starts.ravel(), (starts + sizes[:, None]).ravel()


class Outputs:
    """Where results go: fresh arrays, or those of `out=`.

    Args:
        schema: Names, shapes and dtypes of the result.
        out: A weight dict to write to, or None.
        inputs: What must not be written to.

    Raises:
        ContributionError: `out` has other names, shapes or dtypes (one of its children).
        OutputError: An array of `out` cannot be written to, or shares memory with an input, another or itself.

    Attributes:
        weights: The result, in the order of the schema; `out` itself where it was given.
        arrays: A contiguous array per name for the kernel to write to.
        table: Where those lie, and the inputs.
    """

    def __init__(self, schema: Schema, out: WeightDict | None, inputs: Columns | None = None) -> None:
        self.weights: WeightDict = new_arrays(schema) if out is None else out
        self.table = Table(schema, 0) if inputs is None else inputs.table
        own = dict(self.weights) if type(self.weights) is dict else {}  # holds the arrays, whatever becomes of `out`
        usual = self.table.gather([own], 0) and all(array.flags.writeable for array in own.values())
        self.arrays: WeightDict = own if usual else self._checked(schema)
        if not usual:
            self.table.addresses[:, 0] = addresses(list(self.arrays.values()))
        self._in_place = usual or all(self.weights[name] is array for name, array in self.arrays.items())
        if out is not None:
            self._refuse_overlap(inputs)

    def _checked(self, schema: Schema) -> WeightDict:
        schema.check(as_weight_dict(self.weights, "out"), "out")
        for name, array in self.weights.items():
            if not isinstance(array, np.ndarray):
                raise OutputError(f"out: {name!r} is a scalar, not an array", name=name)
            if not array.flags.writeable:
                raise OutputError(f"out: {name!r} is read-only", name=name)
            if overlaps_itself(array.shape, array.strides, array.itemsize):
                raise OutputError(f"out: {name!r} overlaps itself: its elements share memory", name=name)
        # What a kernel cannot write to in place is filled by way of a copy.
        return {name: contiguous(self.weights[name]) for name in schema}

    def finish(self) -> WeightDict:
        """The result, once the arrays have been written."""
        for name, array in () if self._in_place else self.arrays.items():
            if array is not self.weights[name]:
                self.weights[name][...] = array
        return self.weights

    def _refuse_overlap(self, inputs: Columns | None) -> None:
        copied = inputs is not None and inputs.copied
        if self._in_place and not copied and not self.table.may_overlap():
            return
        names = list(self.arrays)
        sizes = np.array([array.nbytes for array in self.arrays.values()], np.uintp)
        if self._in_place:
            starts, stops = self.table.addresses[:, 0], self.table.addresses[:, 0] + sizes
        else:
            starts, stops = _bounds([self.weights[name] for name in names])
        order = np.argsort(starts)
        order = order[stops[order] > starts[order]]
        starts, stops = starts[order], stops[order]
        for i in np.flatnonzero(stops[:-1] > starts[1:]):
            one, other = names[order[i]], names[order[i + 1]]
            raise OutputError(f"out: {one!r} and {other!r} overlap in memory or interleave", name=one)
        if inputs is None or not order.size:
            return
        lows, highs = inputs.bounds(sizes)
        # The last output that begins before the input ends is the one that could reach into it.
        nearest = np.searchsorted(starts, highs) - 1
        for i in np.flatnonzero((nearest >= 0) & (stops[nearest] > lows) & (highs > lows)):
            name = names[order[nearest[i]]]
            raise OutputError(
                f"out: {name!r} overlaps an input in memory or interleaves with it, and inputs are never changed",
                name=name,
            )


def new_arrays(schema: Schema) -> dict[str, Array]:
    """New arrays. Large models lie in one piece of memory: many arrays would cost several times its page faults."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in schema.items()}
    if sum(sizes.values()) < SMALLEST_SLAB:
        return {name: np.empty(shape, dtype) for name, (shape, dtype) in schema.items()}
    ends = list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()))
    slab = np.empty(ends[-1] + ALIGNMENT, np.uint8)
    slab = slab[-slab.ctypes.data % ALIGNMENT :]
    return {
        name: slab[start : start + sizes[name]].view(dtype).reshape(shape)
        for start, (name, (shape, dtype)) in zip([0, *ends], schema.items(), strict=False)
    }


def _bounds(arrays: Sequence[Array]) -> tuple[Addresses, Addresses]:
    """The addresses at which the memory of arrays begins and ends, contiguous or not."""
    pairs = [np.lib.array_utils.byte_bounds(array) if array.size else (0, 0) for array in arrays]
    bounds = np.array(pairs, np.uintp).reshape(-1, 2)
    return bounds[:, 0], bounds[:, 1]
