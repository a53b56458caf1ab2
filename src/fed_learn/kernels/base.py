"""What a kernel is: three operations on flat arrays that do all the arithmetic of aggregation.

The arithmetic is pinned, so that every kernel gives the same bits (see `numpy.py`, the readable reference):

- sums are kept in float64, whatever the dtype; they start from the first product and add the others in order,
  each product and each sum rounded to nearest, never fused;
- one float64 division by the total at the end, held within ±the largest float64;
- one rounding to the output dtype: float32 nearest-even, float16 and bfloat16 by way of float32, integers and
  booleans half to even.

A kernel checks nothing: names, shapes, dtypes and values have been checked by its caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fed_learn.weights import Array

Float64Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Segment:
    """One variable over all contributions.

    Attributes:
        inputs: One flat, contiguous array in native byte order per contribution, all of one dtype and size.
        output: Where the mean goes: flat, contiguous, of the same dtype and size.
    """

    inputs: Sequence[Array]
    output: Array


def flushes_subnormals() -> bool:
    """Whether the processor takes subnormal numbers for zero in this thread, as some frameworks can make it."""
    with np.errstate(all="ignore"):
        return bool(np.float32(2.0**-140) * np.float32(1.0) == 0 or np.float64(2.0**-1040) * np.float64(1.0) == 0)


class Kernel(Protocol):
    """An implementation of the arithmetic."""

    name: str

    def weighted_mean(self, segments: Sequence[Segment], weights: Float64Array, total: float) -> None:
        """`output = round(Σ weights[k] · inputs[k] / total)` for each segment.

        Args:
            segments: The variables of a model.
            weights: One float64 per contribution, scaled so that no sum can overflow.
            total: The sum of `weights`.
        """

    def accumulate(self, sums: Sequence[Float64Array], inputs: Sequence[Array], weight: float) -> None:
        """`sums[i] += weight · inputs[i]` in place.

        Sums that start from -0.0 give the bits of sums that start from the first product.

        Args:
            sums: Flat float64 arrays.
            inputs: Flat, contiguous arrays of the same sizes, of any supported dtype.
            weight: The aggregation weight.
        """

    def divide(self, sums: Sequence[Float64Array], total: float, outputs: Sequence[Array]) -> None:
        """`outputs[i] = round(sums[i] / total)`.

        Args:
            sums: Flat float64 arrays.
            total: The sum of the aggregation weights.
            outputs: Flat, contiguous arrays of the same sizes, of any supported dtype.
        """
