"""The arithmetic of the torch kernel in plain operations of torch: the reference for `fused`, and what runs without it.

Few operations for many variables: those of one dtype and device are taken together, as tiles of one long row of
elements. What lies in one piece of memory is taken as it is; the rest is put together by one operation per
contribution and tile. Products and sums are separate operations: `add(alpha=)`, `addcmul`, `lerp` and their like fuse
them, on the CPU as well. A total divides as a tensor, since division by a number may become a product. Nothing here
waits for a device: what is found is returned as tensors, `Flags`.

Which variables go together, and reading the flags, is left to `torch`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from fed_learn.kernels.digits import Float64Array

Tensor: TypeAlias = torch.Tensor
Column: TypeAlias = Sequence[Tensor]
"""One variable of all contributions: flat tensors of one dtype."""

TILE = 1 << 22
"""Elements at a time on a device: few operations for a model, and a few times 32 MiB for what they need."""
ALONE = 1 << 20
"""Elements of a variable from which on it is not put together with others: that would move more bytes, and save few
operations."""
TILE_ON_CPU, ALONE_ON_CPU = 1 << 18, 1 << 14
"""The same on the CPU, where operations cost little and caches are small."""
LARGEST = float(np.finfo(np.float64).max)
LONG = (torch.int64, torch.uint64)
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their bytes the integers as which elements are copied."""


class Flags(NamedTuple):
    """What an operation found, on the device: one flag for the variables of each tile.

    Attributes:
        values: Booleans or integers, not 0 where something was found.
        variables: For each of them the positions of the variables it is about.
    """

    values: Tensor
    variables: Sequence[Sequence[int]]


class Piece(NamedTuple):
    """A part of a variable: the elements from `start` to `stop`; `whole` if that is all of it."""

    variable: int
    start: int
    stop: int
    whole: bool

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The part of one of some tensors."""
        tensor = tensors[self.variable]
        return tensor if self.whole else tensor[self.start : self.stop]


Tile: TypeAlias = list[Piece]


def mean(columns: Sequence[Column], outputs: Column, aggregation_weights: Float64Array, total: float) -> Flags:
    """Writes `round(Σ aₖ·xₖ / total)`; see `Kernel.weighted_mean`.

    Args:
        columns: Of each variable a flat tensor per contribution, all of one dtype on one device.
        outputs: Flat tensors of the same.
        aggregation_weights: One per contribution.
        total: Their sum.
    """
    scalars = on_device([*aggregation_weights, total], outputs)
    rows, tiles = _rows(columns), _tiles(outputs)
    extremes, large = [], []
    for tile in tiles:
        acc = torch.empty(_size(tile), dtype=torch.float64, device=outputs[0].device)
        ends: list[Tensor] = []
        _sum(acc, _inputs(rows, tile, ends), scalars, start=True)
        _divide(acc, scalars[-1:], outputs, tile)
        extremes.append(torch.aminmax(acc))
        if ends:
            large.append(_beyond(ends, outputs[0].dtype, 2**52 // (len(rows) + 2)))
    return Flags(_not_finite(extremes, large), _variables(tiles))


def accumulate(sums: Column, columns: Sequence[Column], aggregation_weights: Float64Array, *, start: bool) -> None:
    """Adds `Σ aₖ·xₖ` to float64 sums, or starts them from the first product; see `Kernel.accumulate`."""
    scalars, rows = on_device(aggregation_weights, sums), _rows(columns)
    for tile in _tiles(sums):
        acc = _target(sums, tile) if start else _gathered(sums, tile)
        _sum(acc, _inputs(rows, tile), scalars, start=start)
        _scatter(acc, sums, tile)


def divide(sums: Column, total: float, outputs: Column) -> Flags:
    """Writes `round(sums / total)`; see `Kernel.divide`."""
    divisor, tiles, extremes = on_device([total], outputs), _tiles(outputs), []
    for tile in tiles:
        acc = _gathered(sums, tile)
        _divide(acc, divisor, outputs, tile)
        extremes.append(torch.aminmax(acc))
    return Flags(_not_finite(extremes), _variables(tiles))


def write_quotients(sums: Tensor, total: float, output: Tensor) -> None:
    """Writes `round(sums / total)` of one variable, of which nothing is to be found out."""
    _round_quotients(sums, on_device([total], [output]), output)


def add(bases: Column, differences: Column, outputs: Column) -> Flags:
    """Writes `bases + differences`; see `Kernel.add`."""
    return _combine(torch.add, bases, differences, outputs)


def subtract(weights: Column, bases: Column, outputs: Column) -> Flags:
    """Writes `weights − bases`; see `Kernel.subtract`."""
    return _combine(torch.sub, weights, bases, outputs)


def not_finite(tensors: Column) -> Flags:
    """Looks for NaN and infinity in floating-point tensors."""
    tiles = _tiles(tensors)
    return Flags(_not_finite([torch.aminmax(_gathered(tensors, tile)) for tile in tiles]), _variables(tiles))


def copy(tensors: Column, copies: Column) -> Flags | None:
    """Copies tensors, and looks for NaN and infinity in the copies of floating-point ones."""
    _copy(list(copies), list(tensors))
    return not_finite(copies) if copies[0].is_floating_point() else None


def on_device(numbers: Sequence[float] | Float64Array, beside: Column) -> Tensor:
    """Numbers as float64 beside tensors, in one transfer, for which nobody waits on CUDA."""
    device = beside[0].device
    # CUDA has read what lies in ordinary memory of the host when this returns; others may read it later.
    return torch.from_numpy(np.array(numbers, np.float64)).to(device, non_blocking=device.type == "cuda")


def _rows(columns: Sequence[Column]) -> list[Column]:
    """For each contribution its variables."""
    return list(zip(*columns, strict=True))


def _tiles(tensors: Column) -> list[Tile]:
    """Cuts the elements of all variables, in a row, into parts of at most `TILE`; those of large ones by themselves."""
    most, alone = (TILE_ON_CPU, ALONE_ON_CPU) if tensors[0].is_cpu else (TILE, ALONE)
    sizes = [(i, tensor.numel()) for i, tensor in enumerate(tensors)]
    large = [tile for i, size in sizes if size >= alone for tile in _cut([(i, size)], most)]
    return [*large, *_cut([(i, size) for i, size in sizes if size < alone], most)]


def _cut(sizes: Iterable[tuple[int, int]], most: int) -> Iterator[Tile]:
    """The tiles of some variables, each given by its position and its size."""
    tile: Tile = []
    room = most
    for variable, size in sizes:
        start = 0
        while start < size:
            stop = min(size, start + room)
            tile.append(Piece(variable, start, stop, stop - start == size))
            room -= stop - start
            start = stop
            if not room:
                yield tile
                tile, room = [], most
    if tile:
        yield tile


def _size(tile: Tile) -> int:
    return sum(piece.stop - piece.start for piece in tile)


def _in_one_piece(tensors: Sequence[Tensor], tile: Tile) -> Tensor | None:
    """The elements of a tile as a view, where they lie one after the other in memory."""
    first, last = tile[0].of(tensors), tile[-1].of(tensors)
    if len(tile) == 1:
        return first
    size, address = first.element_size(), first.data_ptr()
    count = _size(tile)
    if last.data_ptr() + last.numel() * size != address + count * size:
        return None
    for piece in tile:
        if tensors[piece.variable].data_ptr() + piece.start * size != address:
            return None
        address += (piece.stop - piece.start) * size
    storage = first.untyped_storage()
    if storage.data_ptr() + storage.nbytes() < address:  # neighbours by chance, each with memory of its own
        return None
    return first.as_strided((count,), (1,))


def _gathered(tensors: Sequence[Tensor], tile: Tile) -> Tensor:
    """The elements of a tile: a view where they lie in one piece, else a copy."""
    view = _in_one_piece(tensors, tile)
    return torch.cat([piece.of(tensors) for piece in tile]) if view is None else view


def _target(tensors: Sequence[Tensor], tile: Tile) -> Tensor:
    """Where to write what `_scatter` then puts in its place: there already, if it lies in one piece."""
    view = _in_one_piece(tensors, tile)
    return torch.empty(_size(tile), dtype=tensors[0].dtype, device=tensors[0].device) if view is None else view


def _scatter(values: Tensor, tensors: Sequence[Tensor], tile: Tile) -> None:
    """Writes the elements of a tile to where they belong, unless they lie there."""
    pieces = [piece.of(tensors) for piece in tile]
    if pieces[0].data_ptr() != values.data_ptr():
        _copy(pieces, list(torch.split(values, [piece.numel() for piece in pieces])))


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies tensors of one dtype, many small ones by one operation.

    It takes them as signed integers: there is none for unsigned ones on CUDA, and the bits of a NaN stay as they are.
    """
    word = WORDS[targets[0].element_size()]
    pairs = [(target.view(word), source.view(word)) for target, source in zip(targets, sources, strict=True)]
    small = [pair for pair in pairs if pair[0].numel() < ALONE]
    for target, source in pairs:
        if target.numel() >= ALONE:
            target.copy_(source)
    if small:
        torch._foreach_copy_([target for target, _ in small], [source for _, source in small])


def _inputs(rows: Sequence[Column], tile: Tile, ends: list[Tensor] | None = None) -> Iterator[Tensor]:
    """The elements of a tile of each contribution, one after the other; `ends` takes those of 64-bit integers."""
    for row in rows:
        x = _gathered(row, tile)
        if ends is not None and x.dtype in LONG:
            ends += torch.aminmax(x.view(torch.int64))
        yield x


def _sum(acc: Tensor, inputs: Iterable[Tensor], scalars: Tensor, *, start: bool) -> None:
    """`acc += Σ aₖ·xₖ` in order; with `start` the first product starts it, whatever it holds."""
    product = None
    for k, x in enumerate(inputs):
        # Of one dimension like the tensor, a float64 scalar makes the product float64, in one operation.
        scalar = scalars[k : k + 1]
        if start and not k:
            torch.mul(x, scalar, out=acc)
            continue
        product = torch.empty_like(acc) if product is None else product
        torch.mul(x, scalar, out=product)
        acc.add_(product)


def _divide(sums: Tensor, divisor: Tensor, outputs: Column, tile: Tile) -> None:
    """Writes the means of a tile."""
    values = _target(outputs, tile)
    _round_quotients(sums, divisor, values)
    _scatter(values, outputs, tile)


def _round_quotients(sums: Tensor, divisor: Tensor, values: Tensor) -> None:
    """`values = round(sums / divisor)`."""
    dtype = values.dtype
    if not dtype.is_floating_point:
        values.copy_(torch.div(sums, divisor).round_())  # half to even
    elif dtype.itemsize == 2:  # by way of float32
        values.copy_(torch.div(sums, divisor, out=torch.empty_like(sums, dtype=torch.float32)))
    else:  # rounding to float32 is the division's own
        torch.div(sums, divisor, out=values)
        if dtype == torch.float64:
            # The mean of finite values is finite; only its rounding could leave the range.
            values.clamp_(-LARGEST, LARGEST)


def _not_finite(extremes: Sequence[tuple[Tensor, Tensor]], or_else: Sequence[Tensor] = ()) -> Tensor:
    """For each tile whether its smallest or largest number is not finite, as they are if one is, or something else."""
    ends = torch.stack([end for pair in extremes for end in pair]).view(-1, 2)
    found: Tensor = ~ends.isfinite().all(dim=1)
    return found | torch.stack(list(or_else)) if or_else else found


def _beyond(ends: Sequence[Tensor], dtype: torch.dtype, largest: int) -> Tensor:
    """Whether a 64-bit integer is larger than this in magnitude.

    Args:
        ends: The smallest and the largest of them, seen as signed ones: unsigned ones that are too large for these are
            negative.
        dtype: What they are.
        largest: Positive.
    """
    found = torch.stack(list(ends))
    return ((found < (0 if dtype == torch.uint64 else -largest)) | (found > largest)).any()


def _combine(operation: Callable[[Tensor, Tensor], Tensor], ones: Column, others: Column, outputs: Column) -> Flags:
    """Writes sums or differences, and finds what is not finite or out of range."""
    dtype, tiles = outputs[0].dtype, _tiles(outputs)
    extremes, found = [], []
    for tile in tiles:
        x, y = _gathered(ones, tile), _gathered(others, tile)
        if dtype.is_floating_point:
            wide = operation(x.to(torch.float64), y.to(torch.float64))
            values = (wide.to(torch.float32) if dtype.itemsize == 2 else wide).to(dtype)
            extremes.append(torch.aminmax(values))
        else:
            wide = operation(x.to(torch.int64), y.to(torch.int64))
            values = wide.to(dtype)
            found.append((values != wide).any())
        if dtype == torch.int64:
            # The sum of two that are not beyond 2**62 wraps around at 2**63 alone.
            wrapped = ((values == torch.iinfo(torch.int64).min) & (x > 0)).any()
            found[-1] = found[-1] | wrapped | _beyond([*torch.aminmax(x), *torch.aminmax(y)], dtype, 2**62)
        _scatter(values, outputs, tile)
    return Flags(_not_finite(extremes) if extremes else torch.stack(found), _variables(tiles))


def _variables(tiles: Sequence[Tile]) -> list[list[int]]:
    """The variables of each tile."""
    return [sorted({piece.variable for piece in tile}) for tile in tiles]
