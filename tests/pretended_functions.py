"""The functions of torch that name a device, rewritten for the pretended device (`pretended`): they run on the CPU.

What lies where, and what is counted, is left to the operations that these functions are made of.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.utils._device
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from pretended import Pretended

Device: TypeAlias = torch.device
HOST = ("cpu", "meta")
CPU = torch.device("cpu")


class Functions(TorchFunctionMode):
    """The function mode.

    Attributes:
        asked: The device that the running function was given.
        filling: Whether a Python number is being assigned to elements.
    """

    def __init__(self, owner: "Pretended") -> None:
        super().__init__()
        self.owner = owner
        self.asked: Device | None = None
        self.filling = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, *args, **kwargs)
        device = kwargs.get("device")
        if device is None and func in torch.utils._device._device_constructors():
            device = torch.utils._device.CURRENT_DEVICE
        pinned = bool(kwargs.pop("pin_memory", False))
        asked = None
        if device is not None and func is not torch.device:
            asked = self.owner.device(device)
            kwargs["device"] = asked if asked.type in HOST else CPU
        result = self._run(func, args, kwargs, asked)
        if pinned:
            self.owner.mark(result, CPU, pinned=True)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any, asked: Device | None) -> Any:
        before, self.asked = self.asked, asked
        try:
            return func(*args, **kwargs)
        finally:
            self.asked = before

    def _property(self, func: Any, tensor: Tensor) -> Any:
        place, name = self.owner.place(tensor), func.__self__.__name__
        if place.type in HOST:
            return func(tensor)
        return place if name == "device" else name == f"is_{place.type}"

    def _get_device(self, func: Any, tensor: Tensor) -> int:
        index = self.owner.place(tensor).index
        return -1 if index is None else index

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        names: tuple[str, ...] = ("device", "dtype", "non_blocking", "copy")
        other = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
        if other is not None:
            args = (self.owner.place(other), other.dtype, *args[1:])
        elif args and isinstance(args[0], torch.dtype):
            names = names[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        here, device = self.owner.place(tensor), given.pop("device", None)
        there = here if device is None else self.owner.device(device)
        given["copy"] = bool(given.get("copy")) or there != here
        given["device"] = there if there.type in HOST else CPU
        return self._run(Tensor.to, (tensor,), given, there)

    def _cpu(self, func: Any, tensor: Tensor, **kwargs: Any) -> Any:
        return self._to(func, tensor, "cpu", **kwargs)

    def _to_own(self, func: Any, tensor: Tensor, device: Any = None, **kwargs: Any) -> Any:
        return self._to(func, tensor, func.__name__ if device is None else device, **kwargs)

    def _numpy(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = self.owner.place(tensor)
        if place.type not in HOST:
            if not kwargs.get("force"):
                raise TypeError(
                    f"can't convert {place} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                    "memory first."
                )
            tensor = self._cpu(func, tensor.detach())
        return func(tensor, *args, **kwargs)

    def _dlpack(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = self.owner.place(tensor)
        if place.type not in HOST:
            raise BufferError(f"a pretended tensor on {place} cannot be exported")
        return func(tensor, *args, **kwargs)

    def _tolist(self, func: Any, tensor: Tensor) -> Any:
        return func(self._cpu(func, tensor.detach()))

    def _repr(self, func: Any, tensor: Tensor, **kwargs: Any) -> str:
        place, text = self.owner.place(tensor), str(func(tensor, **kwargs))
        return text if place.type in HOST else f"{text[:-1]}, device='{place}')"

    def _tensor(self, func: Any, *args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        """`torch.tensor`, `as_tensor`, `asarray`, `Tensor.new_tensor`: made on the host, and sent where it is to be."""
        *own, data = args[:2] if func is Tensor.new_tensor else args[:1] if args else [kwargs.pop("data")]
        rest = args[len(own) + 1 :]
        kwargs |= dict(zip(("dtype", "device"), rest, strict=False))
        device = kwargs.pop("device", device)
        here = self.owner.place(data) if isinstance(data, Tensor) else CPU
        if device is None:
            default = torch.utils._device.CURRENT_DEVICE
            device = self.owner.place(own[0]) if own else default if default and here == CPU else here
        there = self.owner.device(device)
        if there.type == "meta":
            return func(*own, data, device=there, **kwargs)
        made = self._run(func, (*own, data), kwargs | {"device": CPU}, here)
        if pin_memory:
            self.owner.mark(made, CPU, pinned=True)
        if there == here:
            return made
        if func in (torch.as_tensor, torch.asarray):
            return self._to(func, made, there)
        return self._to(func, made.detach(), there).requires_grad_(made.requires_grad)

    def _pin_memory(self, func: Any, tensor: Tensor, device: Any = None) -> Tensor:
        place = self.owner.place(tensor)
        if place.type != "cpu":
            raise RuntimeError(f"cannot pin a tensor on {place}: only dense CPU tensors can be pinned")
        if self._is_pinned(func, tensor):
            return tensor
        copied = tensor.clone()
        self.owner.mark(copied, CPU, pinned=True)
        return copied

    def _is_pinned(self, func: Any, tensor: Tensor, device: Any = None) -> bool:
        block = self.owner.block(tensor)
        return block is not None and block.pinned

    def _setitem(self, func: Any, tensor: Tensor, index: Any, value: Any) -> None:
        self.filling = not isinstance(value, Tensor)
        try:
            func(tensor, index, value)
        finally:
            self.filling = False

    def _deepcopy(self, func: Any, tensor: Tensor, memo: dict[int, Any]) -> Any:
        if self.owner.place(tensor).type in HOST:
            return func(tensor, memo)
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]


HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.get_device: Functions._get_device,
    Tensor.to: Functions._to,
    Tensor.type_as: Functions._to,
    Tensor.cpu: Functions._cpu,
    Tensor.cuda: Functions._to_own,
    Tensor.xpu: Functions._to_own,
    Tensor.numpy: Functions._numpy,
    Tensor.__array__: Functions._numpy,
    Tensor.__dlpack__: Functions._dlpack,
    Tensor.tolist: Functions._tolist,
    Tensor.__repr__: Functions._repr,
    Tensor.new_tensor: Functions._tensor,
    torch.tensor: Functions._tensor,
    torch.as_tensor: Functions._tensor,
    torch.asarray: Functions._tensor,
    Tensor.pin_memory: Functions._pin_memory,
    Tensor.is_pinned: Functions._is_pinned,
    Tensor.__setitem__: Functions._setitem,
    Tensor.__deepcopy__: Functions._deepcopy,
}
HANDLERS |= {
    getattr(Tensor, name).__get__: Functions._property for name in ("device", "is_cpu", "is_cuda", "is_mps", "is_xpu")
}
