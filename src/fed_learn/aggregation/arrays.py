"""From checked weight dicts to what a kernel takes: contiguous inputs, and outputs that share no memory with them."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np

from fed_learn.errors import OutputError
from fed_learn.kernels.memory import Addresses, addresses
from fed_learn.weights import Array, Schema, WeightDict, as_weight_dict, native_dtype

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


class Outputs:
    """Where results go: fresh arrays, or those of `out=`.

    Args:
        schema: Names, shapes and dtypes of the result.
        out: A weight dict to write to, or None.
        inputs: Arrays that must not be written to.

    Raises:
        ContributionError: `out` has other names, shapes or dtypes (one of its children).
        OutputError: An array of `out` cannot be written to, or shares memory with an input or another.

    Attributes:
        weights: The result, in the order of the schema; `out` itself where it was given.
        arrays: A contiguous array per name for the kernel to write to.
    """

    def __init__(self, schema: Schema, out: WeightDict | None, inputs: Iterable[Array] = ()) -> None:
        if out is None:
            self.weights: WeightDict = _new(schema)
        else:
            arrays = as_weight_dict(out, "out")
            if not schema.describes(arrays):
                schema.check(arrays, "out")
            for name, array in arrays.items():
                if not isinstance(out[name], np.ndarray):
                    raise OutputError(f"out: {name!r} is a scalar, not an array", name=name)
                if not array.flags.writeable:
                    raise OutputError(f"out: {name!r} is read-only", name=name)
            _refuse_overlap(arrays, inputs)
            self.weights = out
        # What a kernel cannot write to in place is filled by way of a copy.
        self.arrays = {name: contiguous(self.weights[name]) for name in schema}

    def finish(self) -> WeightDict:
        """The result, once the arrays have been written."""
        for name, array in self.arrays.items():
            if array is not self.weights[name]:
                self.weights[name][...] = array
        return self.weights


def _new(schema: Schema) -> dict[str, Array]:
    """New arrays. Large models lie in one piece of memory: many arrays would cost several times its page faults."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in schema.items()}
    if sum(sizes.values()) < SMALLEST_SLAB:
        return {name: np.empty(shape, dtype) for name, (shape, dtype) in schema.items()}
    ends = list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()))
    slab = np.empty(ends[-1], np.uint8)
    return {
        name: slab[start : start + sizes[name]].view(dtype).reshape(shape)
        for start, (name, (shape, dtype)) in zip([0, *ends], schema.items(), strict=False)
    }


def _refuse_overlap(out: WeightDict, inputs: Iterable[Array]) -> None:
    inputs = list(inputs)
    if _own_their_memory(out, inputs):
        return
    names = [name for name, array in out.items() if array.size]
    if not names:
        return
    starts, stops = _bounds([out[name] for name in names])
    order = np.argsort(starts)
    starts, stops, names = starts[order], stops[order], [names[i] for i in order]
    for i in np.flatnonzero(stops[:-1] > starts[1:]):
        raise OutputError(f"out: {names[i]!r} and {names[i + 1]!r} overlap in memory or interleave", name=names[i])
    lows, highs = _bounds([array for array in inputs if array.size])
    # The last output that begins before the input ends is the one that could reach into it.
    nearest = np.searchsorted(starts, highs) - 1
    for i in np.flatnonzero((nearest >= 0) & (stops[nearest] > lows)):
        name = names[nearest[i]]
        raise OutputError(
            f"out: {name!r} overlaps an input in memory or interleaves with it, and inputs are never changed", name=name
        )


def _own_their_memory(out: WeightDict, inputs: Sequence[Array]) -> bool:
    """Whether each is an array for itself, with memory that numpy allocated for it alone: the usual case, soon told."""
    own = {id(array) for array in out.values() if array.base is None and array.flags.owndata}
    return len(own) == len(out) and all(array.base is None and id(array) not in own for array in inputs)


def _bounds(arrays: Sequence[Array]) -> tuple[Addresses, Addresses]:
    """The addresses at which the memory of arrays begins and ends."""
    try:
        starts = addresses(arrays)
    except ValueError:  # not all of them are contiguous
        bounds = np.array([np.lib.array_utils.byte_bounds(array) for array in arrays], np.uintp)
        return bounds[:, 0], bounds[:, 1]
    return starts, starts + np.array([array.nbytes for array in arrays], np.uintp)
