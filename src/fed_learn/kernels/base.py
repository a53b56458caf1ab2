"""What a kernel is: a few operations on arrays that do all the arithmetic of aggregation.

The arithmetic is pinned, so that every kernel gives the same bits (see `numpy.py`, the readable reference):

- sums are kept in float64, whatever the dtype; they start from the first product and add the others in order,
  each product and each sum rounded to nearest, never fused unless the product is exact;
- one float64 division by the total at the end, held within ±the largest float64;
- with exact sums, digits that hold them (see `digits.py`) and their float64 value in place of the sums;
- one rounding to the output dtype: float32 nearest-even, float16 and bfloat16 by way of float32, integers and
  booleans half to even (of the float64 mean: with aggregation weights that are no whole numbers a tie may not be one);
- differences and their sums with a base are taken in float64 and rounded in the same way, integers in int64.

All arrays are C-contiguous, aligned and in native byte order; those that belong together have the same number of
elements, whatever their shapes. A kernel checks nothing: its caller has done so. It reports where numbers are not
finite, and where 64-bit integers are so large that a mean of n could be off: |x|·(n + 2) > 2**52. Of shorter integers
it would take two million contributions.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, overload

from fed_learn.kernels.digits import Digits, Float64Array
from fed_learn.kernels.memory import Table
from fed_learn.weights import Array


class Segment(NamedTuple):
    """One variable over all contributions.

    Attributes:
        inputs: One array per contribution, all of one dtype.
        output: Where the mean goes, of the same dtype.
    """

    inputs: Sequence[Array]
    output: Array


class Segments(Sequence[Segment]):
    """The variables of a model, each looked up when it is asked for. A kernel that is given a table asks for none.

    Args:
        columns: Name → an array per contribution.
        outputs: Name → where the mean goes, in the same order.
    """

    def __init__(self, columns: Mapping[str, Sequence[Array]], outputs: Mapping[str, Array]) -> None:
        self._columns, self._outputs, self._names = columns, outputs, list(columns)

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, i: int) -> Segment: ...
    @overload
    def __getitem__(self, i: slice) -> list[Segment]: ...

    def __getitem__(self, i: int | slice) -> Segment | list[Segment]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return Segment(self._columns[self._names[i]], self._outputs[self._names[i]])


class Kernel(Protocol):
    """An implementation of the arithmetic."""

    name: str

    def weighted_mean(
        self,
        segments: Sequence[Segment],
        aggregation_weights: Float64Array,
        total: float,
        table: Table | None = None,
    ) -> list[bool]:
        """`output = round(Σ aggregation_weights[k] · inputs[k] / total)` for each segment.

        Args:
            segments: The variables of a model.
            aggregation_weights: One float64 per contribution, scaled by a common power of two.
            total: Their sum.
            table: The addresses of outputs and inputs in the memory of the host; None: not known.

        Returns:
            Which segments have a sum that is not finite, because an input is not or because it overflowed, or 64-bit
            integers that are too large; the latter may be reported from half of that size on.
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
            sums: float64 arrays.
            inputs: For each of them one array per contribution, all of one supported dtype.
            aggregation_weights: One float64 per contribution.
            start: Start the sums from the first product, whatever they hold.
        """

    def divide(self, sums: Sequence[Float64Array], total: float, outputs: Sequence[Array]) -> list[bool]:
        """`outputs[i] = round(sums[i] / total)`.

        Args:
            sums: float64 arrays.
            total: The sum of the aggregation weights.
            outputs: One array for each of them, of any supported dtype.

        Returns:
            Which sums hold something that is not finite.
        """

    def deposit(
        self,
        digits: Digits,
        starts: Sequence[int],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
    ) -> list[bool]:
        """Adds `Σ aggregation_weights[k] · inputs[i][k]` to the digits from `starts[i]` on, exactly.

        Args:
            digits: Reach from the highest to the lowest of `digit_range`. They are changed in place.
            starts: For each variable, where its elements begin in the rows.
            inputs: For each variable one array per contribution, all of one supported dtype; all finite.
            aggregation_weights: One float64 per contribution, at most `MOST_TERMS` between two calls of `carried`.

        Returns:
            Which rows were changed.

        Raises:
            DigitsError: A value is not finite, or outside of the domain.
        """

    def exact_divide(self, digits: Digits, starts: Sequence[int], total: float, outputs: Sequence[Array]) -> None:
        """`outputs[i] = round(digits / total)`, of the elements from `starts[i]` on.

        Args:
            digits: Exact sums.
            starts: For each output, where its elements begin in the rows.
            total: The sum of the aggregation weights.
            outputs: Arrays of floating-point dtypes.
        """

    def exact_mean(self, segments: Sequence[Segment], aggregation_weights: Float64Array, total: float) -> None:
        """The same as `deposit` on no digits and `exact_divide`, for a batch of at most `MOST_TERMS` contributions.

        Raises:
            DigitsError: A value is not finite, or outside of the domain.
        """

    def add(self, bases: Sequence[Array], differences: Sequence[Array], outputs: Sequence[Array]) -> list[bool]:
        """`outputs[i] = bases[i] + differences[i]`, in float64 and rounded to the dtype once; integers exactly.

        Args:
            bases: Arrays of floating-point numbers or of signed integers.
            differences: One array of the same dtype for each of them.
            outputs: Another one.

        Returns:
            Which outputs hold something that is not finite; of integers, which left the range of the dtype or come of
            64-bit integers beyond 2**62 in magnitude.
        """

    def subtract(self, weights: Sequence[Array], bases: Sequence[Array], outputs: Sequence[Array]) -> list[bool]:
        """`outputs[i] = weights[i] - bases[i]`, as `add` does it."""

    def not_finite(self, arrays: Sequence[Array]) -> list[bool]:
        """Which arrays hold a NaN or an infinity.

        Args:
            arrays: Arrays of any supported dtype.
        """

    def copy(self, arrays: Sequence[Array], copies: Sequence[Array]) -> list[bool]:
        """`copies[i] = arrays[i]`, and which of the copies hold a NaN or an infinity.

        The arrays may change meanwhile; the answer is about the copies.

        Args:
            arrays: Arrays of any supported dtype.
            copies: One of the same dtype for each of them.
        """
