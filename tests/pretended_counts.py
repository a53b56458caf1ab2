"""What happens on the pretended device (`pretended`), as it is logged, and what of each operation is counted."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_leaves

Lists: TypeAlias = Sequence[Sequence[Tensor]]

OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "uniform_", "normal_", "random_"}
OVERWRITES |= {"bernoulli_", "exponential_"}
FOREACH_AT_ONCE, CAT_AT_ONCE = 100, 128


class Launch(NamedTuple):
    """An operation that a device runs, the bytes that it reads and writes, and the stream that it is put on."""

    name: str
    read: int
    written: int
    stream: str


class Transfer(NamedTuple):
    """A copy of tensors between host and device; reading one number (`item`) is none, but a synchronisation."""

    name: str
    to: str
    bytes: int
    stream: str


@dataclass
class Log:
    """What has happened since the log was begun or cleared.

    Attributes:
        launches: Operations on tensors of a device that are no views and no mere allocations.
        synchronisations: Names of what made the host wait.
        transfers: Copies between host and device.
        races: Launches and transfers that touched what another stream had written, without waiting for it.
        streams: `("record", event, stream)`, `("wait", event, stream)`, `("record_stream", address, stream)`.
    """

    launches: list[Launch] = field(default_factory=list)
    synchronisations: list[str] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    races: list[Launch | Transfer] = field(default_factory=list)
    streams: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def bytes_moved(self) -> int:
        return sum(launch.read + launch.written for launch in self.launches)

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]


@functools.cache
def _arguments(func: Any) -> list[tuple[str, bool, bool]]:
    """Name of each argument, whether it is read, whether it is written."""
    overwrites = func.overloadpacket.__name__ in OVERWRITES
    found = []
    for argument in func._schema.arguments:
        write = argument.alias_info is not None and argument.alias_info.is_write
        found.append((argument.name, not write or not (argument.is_out or overwrites), write))
    return found


def reads_and_writes(func: Any, args: Any, kwargs: Any) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Lists of the tensors in each argument that an operation reads, and in each that it writes."""
    reads, writes = [], []
    values = {name: value for (name, *_), value in zip(_arguments(func), args, strict=False)} | kwargs
    for name, read, write in _arguments(func):
        tensors = [leaf for leaf in tree_leaves(values.get(name)) if isinstance(leaf, Tensor)]
        if tensors and read:
            reads.append(tensors)
        if tensors and write:
            writes.append(tensors)
    return reads, writes


def parts(name: str, reads: Lists, writes: Lists) -> Iterator[tuple[list[Tensor], list[Tensor], int]]:
    """What each launch of an operation reads and writes, and how many bytes it writes.

    CUDA takes lists together (`_foreach_`, `cat`) where their tensors agree, and else one tensor after the other.
    """
    if name.startswith("_foreach_"):
        number = max(map(len, (*reads, *writes)))
        reads, writes = ([column for column in group if len(column) == number] for group in (reads, writes))
        step = FOREACH_AT_ONCE if _agree([*reads, *writes]) else 1
        for start in range(0, number, step):
            read, written = ([t for column in g for t in column[start : start + step]] for g in (reads, writes))
            yield read, written, size_of(written)
    elif name in ("cat", "stack"):
        inputs, output = [tensor for tensor in reads[0] if tensor.numel()], writes[0][0]
        step = CAT_AT_ONCE if len({tensor.dtype for tensor in (*inputs, output)}) == 1 else 1
        for start in range(0, len(inputs), step):
            part = inputs[start : start + step]
            yield part, [output], sum(tensor.numel() for tensor in part) * output.element_size()
    else:
        read, written = ([tensor for column in group for tensor in column] for group in (reads, writes))
        yield read, written, size_of(written)


def _agree(columns: Lists) -> bool:
    """Whether `_foreach_` operations take lists at once: one dtype, the same shapes and strides, no gaps."""
    return len({tensor.dtype for column in columns for tensor in column}) == 1 and all(
        len({(tensor.shape, tensor.stride()) for tensor in row}) == 1 and _dense(row[0])
        for row in zip(*columns, strict=True)
    )


def _dense(tensor: Tensor) -> bool:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return not tensor.numel() or 1 + sum((size - 1) * step for size, step in steps) == tensor.numel()


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; one that is given twice, or broadcast, has its elements counted once."""
    found = {}
    for tensor in tensors:
        size = tensor.element_size() if tensor.numel() else 0
        for length, step in zip(tensor.shape, tensor.stride(), strict=True):
            size *= length if step else 1
        found[tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype] = size
    return sum(found.values())
