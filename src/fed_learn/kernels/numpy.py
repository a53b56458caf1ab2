"""The numpy kernel: the readable reference of the arithmetic, and the one that works everywhere."""

from collections.abc import Sequence

import numpy as np

from fed_learn.environment import check_environment
from fed_learn.kernels.base import Float64Array, Segment
from fed_learn.weights import Array

TILE = 1 << 16
"""Elements at a time: bounds the memory of the intermediate float64 arrays."""
LARGEST = float(np.finfo(np.float64).max)


class NumpyKernel:
    """`Kernel` in plain numpy, on one thread.

    Raises:
        FloatingPointEnvironmentError: From every operation, where the process does not compute as numbers are
            defined.
    """

    name = "numpy"

    def weighted_mean(self, segments: Sequence[Segment], aggregation_weights: Float64Array, total: float) -> None:
        """See `Kernel.weighted_mean`."""
        check_environment()
        for segment in segments:
            for start in range(0, segment.output.size, TILE):
                tile = slice(start, start + TILE)
                with np.errstate(all="ignore"):
                    acc = aggregation_weights[0] * segment.inputs[0][tile].astype(np.float64)
                    for a, x in zip(aggregation_weights[1:], segment.inputs[1:], strict=True):
                        acc += a * x[tile].astype(np.float64)
                _finish(acc, total, segment.output[tile])

    def accumulate(self, sums: Sequence[Float64Array], inputs: Sequence[Array], aggregation_weight: float) -> None:
        """See `Kernel.accumulate`."""
        check_environment()
        for acc, x in zip(sums, inputs, strict=True):
            for start in range(0, acc.size, TILE):
                tile = slice(start, start + TILE)
                with np.errstate(all="ignore"):
                    acc[tile] += aggregation_weight * x[tile].astype(np.float64)

    def divide(self, sums: Sequence[Float64Array], total: float, outputs: Sequence[Array]) -> None:
        """See `Kernel.divide`."""
        check_environment()
        for acc, output in zip(sums, outputs, strict=True):
            for start in range(0, acc.size, TILE):
                tile = slice(start, start + TILE)
                _finish(acc[tile], total, output[tile])


def _finish(acc: Float64Array, total: float, output: Array) -> None:
    with np.errstate(all="ignore"):
        # The mean of finite values is finite; only its rounding could leave the range.
        mean = np.clip(acc / total, -LARGEST, LARGEST)
        if output.dtype.kind in "iub":
            output[...] = np.rint(mean).astype(output.dtype)
        elif output.dtype.itemsize == 2:
            output[...] = mean.astype(np.float32).astype(output.dtype)
        else:
            output[...] = mean.astype(output.dtype)
