"""Exact references that the arithmetic tests compare with, and the lists of sizes, dtypes and kernels they run over.

Everything here is `fractions.Fraction` or integer arithmetic, elementwise and slow; nothing is taken from the
library but the list of its kernels. What is under test never computes what it is compared with.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

import fed_learn as fl
from fed_learn.kernels import threads

with suppress(ImportError):  # there is a kernel of its own once torch has been imported; quick tests do without
    import torch  # noqa: F401

Array: TypeAlias = npt.NDArray[Any]
WeightDict: TypeAlias = Mapping[str, Array]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NARROW_FLOATS = (np.dtype("float16"), BFLOAT16, np.dtype("float32"))
FLOATS = (*NARROW_FLOATS, np.dtype("float64"))
INTEGERS = tuple(np.dtype(f"{sign}int{size}") for sign in ("", "u") for size in (8, 16, 32, 64))
COUNTS = (*INTEGERS, np.dtype(bool))
DTYPES = (*FLOATS, *COUNTS)

SIZES = (0, 1, 2, 3, 5, 7, 9, 15, 16, 17, 31, 33, 63, 65, 127, 255, 1023, 1024, 1025)
"""Around the widths of vectors and of tiles, where loops have their seams."""

KERNELS = fl.kernels.available()

# Bits of the significand with the hidden one, and the exponent of the smallest normal number.
_FORMATS = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126), "float64": (53, -1022)}


def fractions(array: Array) -> list[Fraction]:
    """The elements, flat, as exact rationals."""
    return [Fraction(value) for value in array.reshape(-1).tolist()]


def exact_sum(arrays: Sequence[Array], weights: Sequence[float]) -> list[Fraction]:
    """`Σ aₖ·xₖ` for each element."""
    sums = [Fraction()] * arrays[0].size
    for array, weight in zip(arrays, weights, strict=True):
        a = Fraction(weight)
        sums = [acc + a * x for acc, x in zip(sums, fractions(array), strict=True)]
    return sums


def exact_mean(arrays: Sequence[Array], weights: Sequence[float]) -> list[Fraction]:
    """`Σ aₖ·xₖ / Σ aₖ` for each element."""
    total = sum(map(Fraction, weights))
    return [value / total for value in exact_sum(arrays, weights)]


def exact_magnitude(arrays: Sequence[Array], weights: Sequence[float]) -> list[Fraction]:
    """`Σ |aₖ·xₖ| / Σ aₖ` for each element: what an error is measured against where terms cancel."""
    total = sum(map(Fraction, weights))
    sums = [Fraction()] * arrays[0].size
    for array, weight in zip(arrays, weights, strict=True):
        a = abs(Fraction(weight))
        sums = [acc + a * abs(x) for acc, x in zip(sums, fractions(array), strict=True)]
    return [value / total for value in sums]


def ulp(value: Fraction, dtype: np.dtype[Any]) -> Fraction:
    """The distance of neighbouring numbers of `dtype` at `value`."""
    precision, smallest = _FORMATS[dtype.name]
    return Fraction(2) ** (max(_exponent(value), smallest) - precision + 1)


def _exponent(value: Fraction) -> int:
    """The largest e with `2**e <= |value|`; a very small number for zero."""
    if not value:
        return -(10**6)
    value = abs(value)
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def largest_error(result: Array, arrays: Sequence[Array], weights: Sequence[float]) -> float:
    """The largest error of a mean, in ulps of `Σ|aₖ·xₖ|/Σaₖ`, from the exact rational mean."""
    triples = zip(fractions(result), exact_mean(arrays, weights), exact_magnitude(arrays, weights), strict=True)
    dtype = result.dtype
    return max((float(abs(value - mean) / ulp(size, dtype)) for value, mean, size in triples), default=0.0)


def largest_own_error(result: Array, expected: Sequence[Fraction]) -> float:
    """The largest error in ulps of the expected value itself, however much its terms cancel."""
    pairs = zip(fractions(result), expected, strict=True)
    return max((float(abs(value - mean) / ulp(mean, result.dtype)) for value, mean in pairs), default=0.0)


def rounded_mean(arrays: Sequence[Array], weights: Sequence[float]) -> list[int]:
    """The exact mean of integers or booleans, rounded half to even."""
    return [round(mean) for mean in exact_mean(arrays, weights)]


def values(rng: np.random.Generator, dtype: np.dtype[Any], shape: int | tuple[int, ...]) -> Array:
    """Random values as models hold them: floats of many magnitudes, integers whose sums float64 holds exactly."""
    if dtype.kind == "b":
        return np.asarray(values(rng, np.dtype("int8"), shape) > 0, dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        low, high = max(limits.min, -(2**38)), min(limits.max, 2**38)
        return np.asarray(rng.integers(low, high, shape, dtype=dtype, endpoint=True))
    spread = {"float16": 6, "bfloat16": 60, "float32": 60, "float64": 300}[dtype.name]
    numbers: Array = np.asarray(np.ldexp(rng.standard_normal(shape), rng.integers(-spread, spread, shape)))
    return numbers.astype(dtype)


def finite_patterns(rng: np.random.Generator, dtype: np.dtype[Any], size: int) -> Array:
    """Random bit patterns that are finite numbers: subnormals, zeros and the largest are all among them."""
    patterns: Array = np.frombuffer(rng.bytes(4 * size * dtype.itemsize + 64 * dtype.itemsize), dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        finite: Array = patterns[np.isfinite(patterns)][:size].copy()
    assert finite.size == size
    return finite


def in_all_layouts(array: Array) -> dict[str, Array]:
    """The same values as arrays that differ in strides, byte order, alignment and writability."""
    spaced = np.zeros((*array.shape, 3), array.dtype)
    spaced[..., 1] = array
    framed: Array = np.zeros(tuple(length + 2 for length in array.shape), array.dtype)
    for axis in range(array.ndim):
        framed = framed.swapaxes(0, axis)[1:-1].swapaxes(0, axis)
    framed[...] = array
    read_only = array.copy()
    read_only.flags.writeable = False
    layouts = {
        "contiguous": array.copy(),
        "Fortran order": np.array(array, order="F"),
        "every third element": spaced[..., 1],
        "inside a frame": framed,
        "reversed": np.asarray(np.flip(np.flip(array).copy())),
        "read-only": read_only,
        "byte-swapped": array.astype(array.dtype.newbyteorder("S")),
    }
    # Offsets 4 and 20 keep the elements of a float32 aligned but not its vectors, 1 and 3 not even those.
    for offset in (1, 3, 4, 20):
        buffer = bytes(offset) + array.tobytes()
        layouts[f"bytes at offset {offset}"] = np.frombuffer(buffer, array.dtype, offset=offset).reshape(array.shape)
    return layouts


def bits(weights: WeightDict) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Everything about a weight dict that can be compared exactly: the dtype, shape and bytes of each variable."""
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in weights.items()}


def differing_bytes(first: WeightDict, second: WeightDict) -> int:
    """How many bytes differ between two weight dicts of the same schema."""
    assert list(first) == list(second)
    pairs = [(first[name], second[name]) for name in first]
    assert [(a.dtype, a.shape) for a, _ in pairs] == [(b.dtype, b.shape) for _, b in pairs]
    return sum(
        sum(x != y for x, y in zip(a.tobytes(), b.tobytes(), strict=True))
        for a, b in pairs
        if a.tobytes() != b.tobytes()
    )


def largest(dtype: np.dtype[Any]) -> float:
    """The largest finite value of a float dtype."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


@contextmanager
def num_threads(count: int, smallest_share: int = 64) -> Iterator[None]:
    """Makes kernels split even small work over `count` threads."""
    before = threads.SMALLEST_SHARE
    threads.SMALLEST_SHARE = smallest_share
    fl.kernels.set_num_threads(count)
    try:
        yield
    finally:
        fl.kernels.set_num_threads(None)
        threads.SMALLEST_SHARE = before
