"""Test vectors of the arithmetic: inputs by seed, and the SHA-256 of what the library makes of them.

    python tests/make_vectors.py --write tests/vectors/kernels.json

They were made by the numpy kernel. `test_vectors.py` compares every kernel and instruction set with them, so that the
bits stay the same from release to release and not only within one run. They are made anew only where the arithmetic is
meant to change. Nothing here depends on numpy's random numbers, which may change with its versions.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

import fed_learn as fl
from fed_learn.aggregation.differences import add_difference, difference

Array: TypeAlias = npt.NDArray[Any]
Models: TypeAlias = list[dict[str, Array]]
Vectors: TypeAlias = dict[str, dict[str, dict[str, str]]]
"""Operation → dtype → size and number of inputs → SHA-256 of the output in little-endian byte order."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype("float16"), BFLOAT16, np.dtype("float32"), np.dtype("float64"))
SIGNED = tuple(np.dtype(f"int{bits}") for bits in (8, 16, 32, 64))
OTHERS = (*(np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)), np.dtype(bool))

SIZES = (1, 15, 1025, 16387)
"""Below, around and above the widths of vectors and of tiles."""
COUNTS = (1, 3, 11)
"""The last one is more than the C kernels read at once."""


def random_bits(seed: str, count: int) -> npt.NDArray[np.uint64]:
    """SplitMix64."""
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        z = np.uint64(start) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def random_values(seed: str, dtype: np.dtype[Any], size: int) -> Array:
    """Values of which neither the mean, nor the sum of two, leaves the range of the dtype or of exact sums."""
    bits = random_bits(seed, size)
    if dtype.kind == "b":
        return (bits & np.uint64(1)).astype(bool)
    if dtype.kind in "iu":
        spare = 25 if dtype.itemsize == 8 else 65 - 8 * dtype.itemsize  # half of the range
        return (bits.view(f"{dtype.kind}8") >> spare).astype(dtype)
    if dtype == np.float64:  # from 2**-300 to 2**300
        exponents = np.uint64(1023 - 300) + (bits >> np.uint64(52) & np.uint64(0x7FF)) % np.uint64(600)
        fractions_and_signs = bits & np.uint64(0x800FFFFFFFFFFFFF)
        return (fractions_and_signs | exponents << np.uint64(52)).view(np.float64)
    width, fraction = {"float16": (16, 10), "bfloat16": (16, 7), "float32": (32, 23)}[dtype.name]
    patterns = bits & np.uint64(2**width - 1)
    most = 2 ** (width - 1 - fraction) - 1
    large = (patterns >> np.uint64(fraction) & np.uint64(most)) >= most - 1
    patterns[large] &= ~np.uint64(1 << (width - 2))
    return patterns.astype(f"u{width // 8}").view(dtype)


def random_weights(seed: str, count: int) -> list[float]:
    """Aggregation weights with fractions, in any order of magnitude from 1 to 1000."""
    return [1 + int(bits % np.uint64(7000)) / 7 for bits in random_bits(seed, count)]


def stream(models: Models, weights: list[float], exact: bool) -> Array:
    accumulator = fl.Accumulator(exact=exact)
    for model, weight in zip(models, weights, strict=True):
        accumulator.add(model, weight)
    return accumulator.result()["w"]


Operation: TypeAlias = Callable[[Models, list[float]], Array]
OPERATIONS: dict[str, tuple[Operation, tuple[np.dtype[Any], ...], tuple[int, ...]]] = {
    "weighted_average": (
        lambda models, weights: fl.weighted_average(models, weights)["w"],
        (*FLOATS, *SIGNED, *OTHERS),
        COUNTS,
    ),
    "exact weighted_average": (
        lambda models, weights: fl.weighted_average(models, weights, exact=True)["w"],
        (*FLOATS, *SIGNED, *OTHERS),
        COUNTS,
    ),
    "Accumulator": (lambda models, weights: stream(models, weights, False), (*FLOATS, *SIGNED, *OTHERS), COUNTS),
    "exact Accumulator": (lambda models, weights: stream(models, weights, True), (*FLOATS, *SIGNED, *OTHERS), COUNTS),
    "add_difference": (lambda models, _: add_difference(*models)["w"], (*FLOATS, *SIGNED), (2,)),
    "difference": (lambda models, _: difference(*models)["w"], (*FLOATS, *SIGNED), (2,)),
}
"""Name → what is done, with which dtypes, and for how many inputs."""


def digest_of(output: Array) -> str:
    """The same on machines of either byte order."""
    raw = output.view(f"u{output.dtype.itemsize}")
    return hashlib.sha256(raw.astype(raw.dtype.newbyteorder("<")).tobytes()).hexdigest()


def digests(operation: str, dtype: np.dtype[Any]) -> Iterator[tuple[str, str]]:
    """What the current kernel makes of the inputs, by size and number of inputs."""
    run, _, counts = OPERATIONS[operation]
    for size in SIZES:
        for count in counts:
            seed = f"{dtype.name} {size} {count}"
            models = [{"w": random_values(f"{seed} {k}", dtype, size)} for k in range(count)]
            yield f"{size} x {count}", digest_of(run(models, random_weights(seed, count)))


def vectors() -> Vectors:
    """All of them, by the numpy kernel."""
    with fl.kernels.use("numpy"):
        return {
            name: {dtype.name: dict(digests(name, dtype)) for dtype in dtypes}
            for name, (_, dtypes, _) in OPERATIONS.items()
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes the test vectors of the arithmetic.")
    parser.add_argument("--write", type=Path, required=True, metavar="FILE")
    parser.parse_args().write.write_text(json.dumps(vectors(), indent=1) + "\n", encoding="utf-8")
