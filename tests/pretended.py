"""A pretended device: CPU tensors that behave in tests as if they lay on `cuda:0`, `mps:0`, …, where there is no GPU.

Tensors stay plain `torch.Tensor`s in the memory of the CPU. Which of them lie on a device is kept by storage, so views
lie where their base does. A function mode rewrites what names a device; a dispatch mode sees the operations below
composite ones and below autograd, as a real backend does: it raises where host and device mix, and counts. The function
mode is in `pretended_functions`, streams and events in `pretended_streams`, what is logged in `pretended_counts`.

Counts follow what CUDA does with large contiguous tensors. Left out: other threads (modes of torch are of one thread),
sparse tensors, gradients that cross devices, how the allocator reuses memory, and the time that anything takes.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import pytest
import torch
import torch.utils._device
from pretended_counts import Launch, Lists, Log, Transfer, parts, reads_and_writes, size_of
from pretended_functions import CPU, HOST, Device, Functions
from pretended_streams import Streams
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = {"empty", "empty_strided", "empty_like", "empty_permuted", "new_empty", "new_empty_strided", "_unsafe_view"}
FREE |= {"lift", "is_pinned", "_local_scalar_dense"}
COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
WAITING |= {"bincount", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
TAKES_HOST_SCALARS = {"fill", "fill_", "masked_fill", "masked_fill_", "floor_divide", "floor_divide_"}


@dataclass
class Block:
    """What is known of a storage. The weak reference keeps its address from being used for another one."""

    storage: StorageWeakRef
    device: Device
    pinned: bool = False
    written: tuple[str, int] | None = None


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every operation below autograd to the pretended device."""

    def __init__(self, owner: "Pretended") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunction():
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
                with self:  # in inference mode composite operations come as they are
                    return func.decompose(*args, **kwargs)
            return self.owner.operation(func, args, kwargs)


class Pretended:
    """Within this context, tensors can be made on and moved to devices that are not there.

    Attributes:
        log: What has happened on them.
    """

    def __init__(self) -> None:
        self.log = Log()
        self.streams = Streams(self)
        self._blocks: dict[int, Block] = {}
        self._purge_at = 1000
        self.functions = Functions(self)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        before = torch.utils._device.CURRENT_DEVICE
        self._stack.callback(self._restore, before)
        self.streams.install(self._stack)
        self._stack.enter_context(Operations(self))
        self._stack.enter_context(self.functions)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    @staticmethod
    def _restore(device: Device | None) -> None:
        if device != torch.utils._device.CURRENT_DEVICE:
            torch.set_default_device(device)

    @contextmanager
    def counting(self) -> Iterator[Log]:
        """A log of what happens in the block alone; the log before is continued after it."""
        before, self.log = self.log, Log()
        try:
            yield self.log
        finally:
            self.log = before

    def races(self) -> list[Launch | Transfer]:
        """What touched a storage last written on another stream, without an event between that it waited for."""
        return list(self.log.races)

    def device(self, given: Any) -> Device:
        """The device of this description, with its index."""
        device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
        if device.type in HOST or device.index is not None:
            return device
        return torch.device(device.type, self.streams.index if device.type == "cuda" else 0)

    def place(self, tensor: Tensor) -> Device:
        """The device on which a tensor is said to lie."""
        with torch._C.DisableTorchFunction():
            block = self.block(tensor)
            return tensor.device if block is None else block.device

    def block(self, tensor: Tensor) -> Block | None:
        return None if tensor.layout is not torch.strided else self._blocks.get(tensor.untyped_storage()._cdata)

    def mark(self, tensor: Tensor, device: Device, pinned: bool = False) -> None:
        if device.type == "mps" and tensor.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                "Please use float32 instead."
            )
        storage = tensor.untyped_storage()
        if storage._cdata not in self._blocks:
            self._blocks[storage._cdata] = Block(StorageWeakRef(storage), device, pinned)  # type: ignore[no-untyped-call]
        if len(self._blocks) > self._purge_at:
            living = {key: block for key, block in self._blocks.items() if not block.storage.expired()}  # type: ignore[no-untyped-call]
            self._blocks = living
            self._purge_at = 1000 + 2 * len(self._blocks)

    # What is done on a device: operations.

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {place: None for place in map(self.place, inputs) if place.type not in HOST}
        if not devices and (self.functions.asked is None or self.functions.asked.type in HOST):
            return func(*args, **kwargs)
        reads, writes = reads_and_writes(func, args, kwargs)
        if name in COPIES:
            return self._copied(func, name, args, kwargs)
        reads_nothing = name.startswith("new_") or name.endswith("_like")
        if reads_nothing or not devices:
            there = self.functions.asked or self.place(inputs[0])
            reads = []
        else:
            there = self._common(func, name, args, inputs, writes, list(devices))
        if name in INDEXING:
            self._index(name, args, there)
        if name == "_local_scalar_dense":
            self._touch(Launch(name, args[0].element_size(), 0, self.streams.current(there).name), [args[0]], [])
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (tuple, list)) else [result]
        for output in outputs:
            if isinstance(output, Tensor) and there.type not in HOST:
                self.mark(output, there)
        written = {id(tensor) for group in writes for tensor in group}
        fresh = [output for output in outputs if isinstance(output, Tensor) and id(output) not in written]
        free = func.is_view or torch.Tag.inplace_view in func.tags or name in FREE or there.type in HOST
        if not free and (fresh or writes or name in WAITING):
            self._launches(name, there, reads, [*writes, fresh] if fresh else writes)
        if name in WAITING:
            self._wait(name, there)
        return result

    def _common(
        self, func: Any, name: str, args: Any, inputs: list[Tensor], writes: list[list[Tensor]], devices: list[Device]
    ) -> Device:
        """The device of all inputs; host tensors may be among them where torch takes them.

        Raises:
            RuntimeError: Host and device, or two devices, mix.
        """
        written = {id(tensor) for group in writes for tensor in group}
        scalars = torch.Tag.pointwise in func.tags or name in TAKES_HOST_SCALARS or name.startswith("_foreach_")
        scalars |= "index_put" in name
        indices = {id(index) for index in args[1]} if name in INDEXING else set()
        places = dict.fromkeys(devices)
        for tensor in inputs:
            scalar = scalars and tensor.dim() == 0 and id(tensor) not in written
            if not scalar and id(tensor) not in indices:
                places[self.place(tensor)] = None
        if len(places) > 1:
            one, other, *_ = places
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{one} and {other}! (when checking the arguments of {name})"
            )
        return devices[0]

    def _index(self, name: str, args: Any, device: Device) -> None:
        """Indices from the host are sent to the device; the positions in a mask are counted, which the host awaits."""
        indices = [index for index in args[1] if index is not None]
        number = "put" in name and args[2].numel() == 1 and self.place(args[2]).type in HOST
        if number and len(indices) == 1 and indices[0].dtype == torch.bool and self.place(indices[0]) == device:
            return  # masked_fill_
        for index in indices:
            mask = index.dtype in (torch.bool, torch.uint8)
            if self.place(index).type in HOST:
                size = int(index.count_nonzero()) * index.dim() * 8 if mask else index.nbytes
                self._sent(name, device, device, size, [], [])
                self._wait(name, device)
            elif mask:
                self._wait(name, device)

    def _copied(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "_foreach_copy_":
            places = {self.place(tensor) for tensors in args[:2] for tensor in tensors}
            if len(places) > 1:  # one by one
                for target, source in zip(*args[:2], strict=True):
                    self._copied(torch.ops.aten.copy_.default, "copy_", (target, source), {})
                return None
        source = args[0] if name == "_to_copy" else args[1]
        result = func(*args, **kwargs)
        if name == "_foreach_copy_":
            self._launches(name, next(iter(places)), [source], [args[0]])
            return result
        here, there = self.place(source), self.place(result)
        if name == "_to_copy":
            there = self.functions.asked or here
            if there.type not in HOST:
                self.mark(result, there)
        if not result.numel():
            return result
        if self.functions.filling and source.dim() == 0 and here == CPU:
            self._launches("fill_", there, [], [[result]])
        elif here.type not in HOST and there.type not in HOST:
            self._launches(name, here, [[source]], [[result]])
        elif there.type in HOST:
            if source.dtype != result.dtype or not source.is_contiguous():  # made ready on the device first
                self._launch(name, here, [source], [], result.nbytes)
            self._sent(name, here, there, result.nbytes, [source], [])
            self._wait(name, here)
        else:
            self._sent(name, there, there, result.nbytes, [], [result])
            if not result.is_contiguous():
                self._launch(name, there, [result], [result], result.nbytes)
            if not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))):
                self._wait(name, there)
        return result

    # What is counted.

    def _sent(
        self, name: str, device: Device, to: Device, size: int, reads: list[Tensor], writes: list[Tensor]
    ) -> None:
        transfer = Transfer(name, str(to), size, self.streams.current(device).name)
        self.log.transfers.append(transfer)
        self._touch(transfer, reads, writes)

    def _wait(self, name: str, device: Device) -> None:
        self.log.synchronisations.append(name)
        self.streams.host_waits([self.streams.current(device)])

    def _launches(self, name: str, device: Device, reads: Lists, writes: Lists) -> None:
        for read, written, size in parts(name, reads, writes):
            self._launch(name, device, read, written, size)

    def _launch(self, name: str, device: Device, reads: list[Tensor], writes: list[Tensor], size: int) -> None:
        if writes and not any(tensor.numel() for tensor in writes):
            return  # nothing is launched where there is nothing to do
        reads = [tensor for tensor in reads if self.place(tensor).type not in HOST]
        launch = Launch(name, size_of(reads), size, self.streams.current(device).name)
        self.log.launches.append(launch)
        self._touch(launch, reads, writes)

    def _touch(self, what: Launch | Transfer, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        clock = self.streams.tick(what.stream)
        read, written = ([block for t in group if (block := self.block(t))] for group in (reads, writes))
        stamps = [block.written for block in (*read, *written) if block.written is not None]
        if any(clock.get(stream, 0) < count for stream, count in stamps):
            self.log.races.append(what)
        for block in written:
            block.written = (what.stream, clock[what.stream])


@pytest.fixture(name="pretended")
def pretended_device() -> Iterator[Pretended]:
    """Within a test, devices that are not there."""
    with Pretended() as active:
        yield active
