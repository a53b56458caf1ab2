"""What sides average: models by their shapes, random values, and how the arrays of the clients lie in memory."""

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fed_learn.weights import Array

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Buffer: TypeAlias = npt.NDArray[np.uint8]
Models: TypeAlias = list[dict[str, Array]]

LINE = 64
"""Bytes of a cache line, and the alignment that arrays have where nothing else is said."""
WAY = 1 << 16
"""Arrays at distances of this many bytes fall into the same sets of most first- and second-level caches."""
PAGE = mmap.PAGESIZE
LARGEST_INTEGER = 1_000_000
"""Like a counter of batches; the mean of such values is right to the unit by way of float64."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The models of some clients.

    Attributes:
        clients: One weight dict per client.
        aggregation_weights: Counts of examples, as floats.
        reuse: Whether there is memory for the result already, as `out=`.
        keep: What must not be freed while the arrays are used.
    """

    clients: Models
    aggregation_weights: list[float]
    reuse: bool = True
    keep: object = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of all arrays."""
        return next(iter(self.clients[0].values())).dtype

    @property
    def arrays(self) -> list[Array]:
        """All arrays of all clients, flat."""
        return [array.reshape(-1) for client in self.clients for array in client.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def size(self) -> int:
        """Elements of all arrays."""
        return sum(array.size for array in self.arrays)


def resnet50(width: int = 64) -> Shapes:
    """Parameters and running statistics of a ResNet-50: 267 tensors, 25.6 M elements at the usual width of 64.

    Example:
        >>> len(resnet50()), sum(map(math.prod, resnet50().values()))
        (267, 25610152)
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_bn(name: str, out: int, into: int, size: int) -> None:
        shapes[f"{name}.conv.weight"] = (out, into, size, size)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (out,)

    conv_bn("stem", width, 3, 7)
    channels = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = width << stage
        for block in range(blocks):
            prefix = f"layer{stage + 1}.{block}"
            conv_bn(f"{prefix}.1", inner, channels, 1)
            conv_bn(f"{prefix}.2", inner, inner, 3)
            conv_bn(f"{prefix}.3", inner * 4, inner, 1)
            if block == 0:
                conv_bn(f"{prefix}.downsample", inner * 4, channels, 1)
            channels = inner * 4
    shapes["fc.weight"], shapes["fc.bias"] = (1000, channels), (1000,)
    return shapes


def transformer(blocks: int, width: int) -> Shapes:
    """The blocks of a transformer with an MLP of four times its width: 12 tensors each, 7.1 M elements at width 768.

    Example:
        >>> len(transformer(2, 768)), sum(map(math.prod, transformer(1, 768).values()))
        (24, 7087872)
    """
    block = {
        "norm_1.weight": (width,),
        "norm_1.bias": (width,),
        "qkv.weight": (3 * width, width),
        "qkv.bias": (3 * width,),
        "proj.weight": (width, width),
        "proj.bias": (width,),
        "norm_2.weight": (width,),
        "norm_2.bias": (width,),
        "mlp.up.weight": (4 * width, width),
        "mlp.up.bias": (4 * width,),
        "mlp.down.weight": (width, 4 * width),
        "mlp.down.bias": (width,),
    }
    return {f"block{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}


def make_inputs(
    shapes: Shapes, dtype: npt.DTypeLike, count: int, *, layout: str = "plain", reuse: bool = True, seed: int = 0
) -> Inputs:
    """Random weights for some clients; the values depend on the seed alone, not on the layout.

    Args:
        shapes: Of one client's weight dict.
        dtype: Of every array.
        count: The number of clients.
        layout: A key of `LAYOUTS`.
        reuse: Whether sides may write into memory that they have.
        seed: Of values and aggregation weights.
    """
    clients, keep = LAYOUTS[layout](shapes, np.dtype(dtype), count)
    streams = np.random.SeedSequence(seed).spawn(count + 1)
    with ThreadPoolExecutor() as pool:
        list(pool.map(_fill, clients, map(np.random.default_rng, streams[1:])))
    aggregation_weights = np.random.default_rng(streams[0]).integers(100, 1000, count, endpoint=True)
    return Inputs(clients, aggregation_weights.astype(float).tolist(), reuse, keep)


def _fill(client: dict[str, Array], rng: np.random.Generator) -> None:
    for array in client.values():
        values = array.reshape(-1)
        if array.dtype == np.float32:
            rng.standard_normal(out=values, dtype=np.float32)
        elif array.dtype.kind in "iu":
            limits = np.iinfo(array.dtype)
            low, high = max(limits.min, -LARGEST_INTEGER), min(limits.max, LARGEST_INTEGER)
            values[...] = rng.integers(low, high, values.size, array.dtype, endpoint=True)
        else:
            for start in range(0, values.size, 1 << 20):
                tile = values[start : start + (1 << 20)]
                tile[...] = rng.standard_normal(tile.size, dtype=np.float32)


def _plain(shapes: Shapes, dtype: np.dtype[Any], count: int) -> tuple[Models, object]:
    """Every array for itself, as numpy allocates it."""
    return [{name: np.empty(shape, dtype) for name, shape in shapes.items()} for _ in range(count)], None


def _used_heap(shapes: Shapes, dtype: np.dtype[Any], count: int) -> tuple[Models, object]:
    """Small pages that lie anywhere in physical memory, as in a process that has run for long.

    Their first touch, which is when the system finds memory for them, comes in random order over all clients and
    between small allocations. Arrays begin 16 bytes past a line, where malloc's own header leaves them.
    """
    size = -(-_room(shapes, dtype, 16) // PAGE) * PAGE
    buffers = []
    for _ in range(count):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # a system without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        buffers.append(np.frombuffer(memory, np.uint8))
    rng = np.random.default_rng(0)
    pages = size // PAGE
    between = []
    for some in np.array_split(rng.permutation(count * pages), 256):
        for k, buffer in enumerate(buffers):
            buffer[(some[some // pages == k] % pages) * PAGE] = 0
        between.append([bytearray(n) for n in rng.integers(16, 2048, 16).tolist()])
    return [_carve(buffer, shapes, dtype, 16) for buffer in buffers], between


def _multiples_of_64k(shapes: Shapes, dtype: np.dtype[Any], count: int) -> tuple[Models, object]:
    """The arrays of one variable lie at distances of multiples of 64 KiB, so that they compete for the same sets."""
    stride = -(-_room(shapes, dtype, 0) // WAY) * WAY
    slab = np.empty((count + 1) * stride, np.uint8)
    start = -slab.ctypes.data % WAY
    return [_carve(slab[start + k * stride :][:stride], shapes, dtype, 0) for k in range(count)], None


def _message(past: int) -> Callable[[Shapes, np.dtype[Any], int], tuple[Models, object]]:
    """Arrays are views of one received message per client, behind headers of some bytes."""

    def allocate(shapes: Shapes, dtype: np.dtype[Any], count: int) -> tuple[Models, object]:
        messages = [bytearray(_room(shapes, dtype, past)) for _ in range(count)]
        return [_carve(np.frombuffer(message, np.uint8), shapes, dtype, past) for message in messages], None

    return allocate


LAYOUTS: dict[str, Callable[[Shapes, np.dtype[Any], int], tuple[Models, object]]] = {
    "plain": _plain,
    "used-heap": _used_heap,
    "64k": _multiples_of_64k,
    "off4": _message(4),
    "off20": _message(20),
}
"""Name → how the arrays of some clients lie in memory: a function that allocates them."""


def _room(shapes: Shapes, dtype: np.dtype[Any], past: int) -> int:
    """Bytes in which `_carve` finds place, wherever they begin."""
    return LINE + sum(_stride(shape, dtype, past) for shape in shapes.values())


def _stride(shape: Sequence[int], dtype: np.dtype[Any], past: int) -> int:
    return -(-(math.prod(shape) * dtype.itemsize + past) // LINE) * LINE


def _carve(buffer: Buffer, shapes: Shapes, dtype: np.dtype[Any], past: int) -> dict[str, Array]:
    """Arrays out of a buffer, each beginning `past` bytes behind the start of a line."""
    at = -buffer.ctypes.data % LINE
    arrays = {}
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        arrays[name] = buffer[at + past :][:nbytes].view(dtype).reshape(shape)
        at += _stride(shape, dtype, past)
    return arrays
