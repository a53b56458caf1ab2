"""Memory that the variables of a model share: with the values that are to be loaded, and with one another.

Only addresses and bytes: whose they are is left to the adapters.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fed_learn.errors import TiedVariablesError
from fed_learn.weights import Array, native_dtype

Span = tuple[int, int]
"""The addresses at which memory begins and ends."""


class Block(NamedTuple):
    """A stretch of memory and the variables in it: several, if their spans overlap."""

    start: int
    stop: int
    names: tuple[str, ...]


class Blocks:
    """The memory of some variables.

    Args:
        spans: By name; those without memory do not count.

    Example:
        >>> blocks = Blocks({"a": (0, 8), "b": (8, 16), "c": (12, 20)})
        >>> [block.names for block in blocks.shared]
        [('b', 'c')]
        >>> blocks.reached((4, 8)), blocks.reached((4, 9)), blocks.reached((20, 30))
        (('a',), ('a', 'b', 'c'), ())
    """

    def __init__(self, spans: Mapping[str, Span]) -> None:
        self._blocks: list[Block] = []
        reach = 0
        for (start, stop), name in sorted((span, name) for name, span in spans.items()):
            if start == stop:
                continue
            if start < reach:
                last = self._blocks.pop()
                self._blocks.append(Block(last.start, max(reach, stop), (*last.names, name)))
            else:
                self._blocks.append(Block(start, stop, (name,)))
            reach = max(reach, stop)
        self._starts = [block.start for block in self._blocks]

    @property
    def shared(self) -> list[Block]:
        """Those of several variables."""
        return [block for block in self._blocks if len(block.names) > 1]

    def reached(self, span: Span) -> tuple[str, ...]:
        """The variables in the blocks that this memory overlaps."""
        start, stop = span
        names: tuple[str, ...] = ()
        last = bisect_left(self._starts, stop) - 1  # the last that begins before it ends
        while last >= 0 and self._blocks[last].stop > start:
            names = (*self._blocks[last].names, *names)
            last -= 1
        return names


def span_of(array: Array) -> Span:
    """The addresses at which the memory of an array begins and ends, contiguous or not."""
    if array.flags.c_contiguous:
        start = array.__array_interface__["data"][0]
        return start, start + array.nbytes
    start, stop = np.lib.array_utils.byte_bounds(array)
    return int(start), int(stop)


def overlaps_itself(shape: Sequence[int], steps: Sequence[int], size: int = 1) -> bool:
    """Whether elements of one array share memory with one another, so that it cannot hold values of its own.

    Args:
        shape: The array's.
        steps: From one element to the next, by dimension.
        size: Of an element, in what the steps are counted in.

    Example:
        >>> overlaps_itself((3,), (0,)), overlaps_itself((2, 3), (8, 8), 8), overlaps_itself((2, 3), (8, 16), 8)
        (True, True, False)
    """
    longer = sorted((abs(step), n) for n, step in zip(shape, steps, strict=True) if n > 1)
    if 0 in shape or not longer:
        return False
    reach, nested = size, True
    for step, n in longer:
        nested &= step >= reach
        reach += step * (n - 1)
    if nested or math.prod(shape) * size > reach:
        return not nested
    offsets = np.zeros(1, np.int64)
    for step, n in longer:
        offsets = np.add.outer(offsets, step * np.arange(n)).ravel()
    return bool((np.diff(np.sort(offsets)) < size).any())


@dataclass(frozen=True, eq=False)
class Placed:
    """A value, and where in memory it is to be.

    Attributes:
        name: Of the variable.
        value: Its new value.
        address: Where its first element is to be.
        steps: Bytes from one element to the next, by dimension.
    """

    name: str
    value: Array
    address: int
    steps: tuple[int, ...]


def refuse_contradictions(block: Block, values: Iterable[Placed]) -> None:
    """Refuses values that variables which share elements cannot have at the same time: tried on memory of its own.

    Raises:
        TiedVariablesError: Names two of them.

    Example:
        >>> block, ones = Block(0, 12, ("a", "b")), np.ones(2, np.float32)
        >>> refuse_contradictions(block, [Placed("a", ones, 0, (4,)), Placed("b", ones, 4, (4,))])
        >>> refuse_contradictions(block, [Placed("a", ones, 0, (4,)), Placed("b", 2 * ones, 4, (4,))])
        Traceback (most recent call last):
        ...
        fed_learn.errors.TiedVariablesError: weights: 'a' and 'b' share memory in the model, and differ there
    """
    memory = np.zeros(block.stop - block.start, np.uint8)
    tried: list[tuple[Placed, Array]] = []
    for one in values:
        dtype = native_dtype(one.value.dtype)
        there: Array = np.ndarray(one.value.shape, dtype, memory, one.address - block.start, one.steps)
        np.copyto(there, one.value)
        tried.append((one, there))
    for i, (one, there) in enumerate(tried):
        if there.tobytes() != one.value.astype(there.dtype, copy=False).tobytes():
            over = next(later for later, other in reversed(tried[i + 1 :]) if np.may_share_memory(there, other))
            raise TiedVariablesError(
                f"weights: {one.name!r} and {over.name!r} share memory in the model, and differ there",
                name=over.name,
                names=(one.name, over.name),
            )
