"""From checked weight dicts to what a kernel takes: flat inputs, and outputs that share memory with none of them."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from fed_learn.errors import OutputError
from fed_learn.weights import Array, Schema, WeightDict, as_weight_dict, native_dtype


def flat(array: Array) -> Array:
    """The array flat, contiguous, aligned and in native byte order: a view where it is so already, else a copy."""
    return np.require(array, native_dtype(array.dtype), ["C", "A"]).reshape(-1)


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
        flat: A flat array per name for the kernel to write to.
    """

    def __init__(self, schema: Schema, out: WeightDict | None, inputs: Iterable[Array] = ()) -> None:
        if out is None:
            self.weights: WeightDict = {n: np.empty(shape, dtype) for n, (shape, dtype) in schema.items()}
        else:
            arrays = as_weight_dict(out, "out")
            schema.check(arrays, "out")
            for name, array in arrays.items():
                if not isinstance(out[name], np.ndarray):
                    raise OutputError(f"out: {name!r} is a scalar, not an array", name=name)
                if not array.flags.writeable:
                    raise OutputError(f"out: {name!r} is read-only", name=name)
            _refuse_overlap(arrays, inputs)
            self.weights = out
        # What a kernel cannot write to in place is filled by way of a flat copy.
        self.flat = {name: flat(self.weights[name]) for name in schema}

    def finish(self) -> WeightDict:
        """The result, once the flat arrays have been written."""
        for name, array in self.weights.items():
            if not np.may_share_memory(array, self.flat[name]):
                array[...] = self.flat[name].reshape(array.shape)
        return self.weights


def _refuse_overlap(out: WeightDict, inputs: Iterable[Array]) -> None:
    outputs = [(*np.lib.array_utils.byte_bounds(array), name) for name, array in out.items() if array.size]
    outputs.sort()
    for (_, stop, first), (start, _, second) in pairwise(outputs):
        if start < stop:
            raise OutputError(f"out: {first!r} and {second!r} overlap in memory", name=first)
    starts = np.array([start for start, _, _ in outputs])
    for array in inputs:
        if not array.size or not outputs:
            continue
        low, high = np.lib.array_utils.byte_bounds(array)
        # The last output that begins before the input ends is the one that could reach into it.
        nearest = int(np.searchsorted(starts, high)) - 1
        if nearest >= 0 and outputs[nearest][1] > low:
            name = outputs[nearest][2]
            raise OutputError(f"out: {name!r} overlaps an input in memory, and inputs are never changed", name=name)
