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

    def weighted_mean(self, segments: Sequence[Segment], aggregation_weights: Float64Array, total: float) -> list[bool]:
        """See `Kernel.weighted_mean`."""
        check_environment()
        flagged = []
        for segment in segments:
            finite = True
            for start in range(0, segment.output.size, TILE):
                tile = slice(start, start + TILE)
                with np.errstate(all="ignore"):
                    acc = aggregation_weights[0] * segment.inputs[0][tile].astype(np.float64)
                    for a, x in zip(aggregation_weights[1:], segment.inputs[1:], strict=True):
                        acc += a * x[tile].astype(np.float64)
                finite &= _finish(acc, total, segment.output[tile])
            flagged.append(not finite)
        return flagged

    def accumulate(
        self,
        sums: Sequence[Float64Array],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
        *,
        start: bool = False,
    ) -> None:
        """See `Kernel.accumulate`."""
        check_environment()
        for acc, column in zip(sums, inputs, strict=True):
            if start:
                acc[...] = -0.0  # the neutral element: what follows has the bits of sums that start from a product
            for a, x in zip(aggregation_weights, column, strict=True):
                for begin in range(0, acc.size, TILE):
                    tile = slice(begin, begin + TILE)
                    with np.errstate(all="ignore"):
                        acc[tile] += a * x[tile].astype(np.float64)

    def divide(self, sums: Sequence[Float64Array], total: float, outputs: Sequence[Array]) -> list[bool]:
        """See `Kernel.divide`."""
        check_environment()
        flagged = []
        for acc, output in zip(sums, outputs, strict=True):
            finite = True
            for start in range(0, acc.size, TILE):
                tile = slice(start, start + TILE)
                finite &= _finish(acc[tile], total, output[tile])
            flagged.append(not finite)
        return flagged

    def not_finite(self, arrays: Sequence[Array]) -> list[bool]:
        """See `Kernel.not_finite`."""
        with np.errstate(invalid="ignore"):  # a signalling NaN
            return [array.dtype.kind not in "biu" and not bool(np.isfinite(array).all()) for array in arrays]


def _finish(acc: Float64Array, total: float, output: Array) -> bool:
    """Writes means and says whether the sums are finite."""
    with np.errstate(all="ignore"):
        # The mean of finite values is finite; only its rounding could leave the range.
        mean = np.clip(acc / total, -LARGEST, LARGEST)
        if output.dtype.kind in "iub":
            output[...] = np.rint(mean).astype(output.dtype)
        elif output.dtype.itemsize == 2:
            output[...] = mean.astype(np.float32).astype(output.dtype)
        else:
            output[...] = mean.astype(output.dtype)
    return bool(np.isfinite(acc).all())
