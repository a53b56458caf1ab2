"""What a kernel is: a few operations on flat arrays that do all the arithmetic of aggregation.

The arithmetic is pinned, so that every kernel gives the same bits (see `numpy.py`, the readable reference):

- sums are kept in float64, whatever the dtype; they start from the first product and add the others in order,
  each product and each sum rounded to nearest, never fused;
- one float64 division by the total at the end, held within ±the largest float64;
- one rounding to the output dtype: float32 nearest-even, float16 and bfloat16 by way of float32, integers and
  booleans half to even (of the float64 mean: with aggregation weights that are no whole numbers a tie may not be one).

A kernel checks nothing: names, shapes and dtypes have been checked by its caller. It says where numbers are not finite.
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


class Kernel(Protocol):
    """An implementation of the arithmetic."""

    name: str

    def weighted_mean(self, segments: Sequence[Segment], aggregation_weights: Float64Array, total: float) -> list[bool]:
        """`output = round(Σ aggregation_weights[k] · inputs[k] / total)` for each segment.

        Args:
            segments: The variables of a model.
            aggregation_weights: One float64 per contribution, scaled by a common power of two.
            total: Their sum.

        Returns:
            Which segments have a sum that is not finite, because an input is not or because it overflowed.
        """

    def accumulate(
        self,
        sums: Sequence[Float64Array],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
        *,
        start: bool = False,
    ) -> None:
        """`sums[i] += Σ aggregation_weights[k] · inputs[i][k]` in place, term by term in order.

        Args:
            sums: Flat float64 arrays.
            inputs: For each of them one flat, contiguous array of its size and of one supported dtype per contribution.
            aggregation_weights: One float64 per contribution.
            start: Start the sums from the first product, whatever they hold.
        """

    def divide(self, sums: Sequence[Float64Array], total: float, outputs: Sequence[Array]) -> list[bool]:
        """`outputs[i] = round(sums[i] / total)`.

        Args:
            sums: Flat float64 arrays.
            total: The sum of the aggregation weights.
            outputs: Flat, contiguous arrays of the same sizes, of any supported dtype.

        Returns:
            Which sums hold something that is not finite.
        """

    def not_finite(self, arrays: Sequence[Array]) -> list[bool]:
        """Which arrays hold a NaN or an infinity.

        Args:
            arrays: Flat, contiguous arrays of any supported dtype.
        """
