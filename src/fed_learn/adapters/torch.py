"""Tensors of torch. Those on the CPU share their memory with arrays, both ways; bfloat16 by reinterpretation.

Nothing here imports torch: it is there when there are tensors.
"""

import functools
import importlib
import sys
from typing import Any

import numpy as np

from fed_learn.errors import DtypeError, WeightsTypeError
from fed_learn.weights import BFLOAT16, SUPPORTED_DTYPES, Array

DTYPES = {f"torch.{dtype.name}": dtype for dtype in SUPPORTED_DTYPES}
LARGEST = float(np.finfo(np.float64).max)


class TorchTensors:
    """`Framework` for torch.

    Example:
        >>> import torch
        >>> weight, torch_tensors = torch.zeros(2, requires_grad=True), TorchTensors()
        >>> torch_tensors.view(weight)[:] = 7
        >>> weight
        tensor([7., 7.], requires_grad=True)
    """

    name = "torch"

    def tensor_type(self) -> type | None:
        """See `Framework.tensor_type`."""
        # While torch is being imported, it is in sys.modules without its names.
        return getattr(sys.modules.get("torch"), "Tensor", None)

    def check(self, tensor: Any, contributor: str, name: str) -> np.dtype[Any]:
        """See `Framework.check`."""
        problem, dtype = None, _dtype(tensor.dtype)
        if tensor.layout is not _torch().strided or tensor.is_nested:
            problem = f"is a {'nested' if tensor.is_nested else str(tensor.layout)} tensor, not a dense one"
        elif tensor.is_meta:
            problem = "is a tensor on the meta device, which has no values"
        elif dtype is not None and tensor.is_neg():
            problem = "is a tensor whose values are negated lazily; resolve_neg() makes them real"
        if problem is not None:
            raise WeightsTypeError(f"{contributor}: {name!r} {problem}", contributor=contributor, name=name)
        if dtype is None:
            raise DtypeError(
                f"{contributor}: {name!r} has dtype {tensor.dtype}, which cannot be averaged",
                contributor=contributor,
                name=name,
                dtype=tensor.dtype,
                expected=None,
            )
        return dtype

    def device(self, tensor: Any) -> str:
        """See `Framework.device`."""
        return "cpu" if tensor.is_cpu else str(tensor.device)

    def view(self, tensor: Any, contributor: str | None = None, name: str | None = None) -> Array:
        """See `Framework.view`."""
        torch = _torch()
        try:
            plain = tensor.detach().cpu()
            if plain.dtype == torch.bfloat16:  # which numpy does not know
                bits: Array = plain.view(torch.int16).numpy()
                return bits.view(BFLOAT16)
            array: Array = plain.numpy()
        except (RuntimeError, TypeError) as error:  # a subclass without memory of its own
            raise WeightsTypeError(
                f"{contributor}: {name!r} is a {type(tensor).__name__} that cannot be read as an array: {error}",
                contributor=contributor,
                name=name,
            ) from error
        return array

    def tensor(self, array: Array, device: str = "cpu") -> Any:
        """See `Framework.tensor`."""
        torch = _torch()
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
        return torch.from_numpy(array).to(device)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> Any:
        """See `Framework.empty`."""
        torch = _torch()
        return torch.empty(shape, dtype=getattr(torch, dtype.name), device=device)

    def contiguous(self, tensor: Any) -> Any:
        """See `Framework.contiguous`."""
        return tensor.detach().contiguous()

    def write(self, target: Any, source: Any) -> None:
        """See `Framework.write`."""
        target.detach().copy_(self.tensor(source) if isinstance(source, np.ndarray) else source)

    def overlaps_itself(self, tensor: Any) -> bool:
        """See `Framework.overlaps_itself`."""
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        return bool(tensor.numel()) and any(step == 0 and size > 1 for size, step in steps)

    def span(self, tensor: Any) -> tuple[int, int]:
        """See `Framework.span`."""
        start = int(tensor.data_ptr())
        if not tensor.numel():
            return start, start
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        return start, start + (last + 1) * int(tensor.element_size())

    def first_not_finite(self, tensor: Any) -> tuple[tuple[int, ...], float] | None:
        """See `Framework.first_not_finite`."""
        if not tensor.is_floating_point():
            return None
        flat = tensor.detach().reshape(-1)
        bad = ~flat.isfinite()
        if not bool(bad.any()):
            return None
        first = int(bad.byte().argmax())  # the first of the largest
        return tuple(int(i) for i in np.unravel_index(first, tuple(tensor.shape))), float(flat[first])

    def magnitude(self, tensor: Any) -> int:
        """See `Framework.magnitude`."""
        if tensor.is_floating_point() or str(tensor.dtype) == "torch.bool" or not tensor.numel():
            return 0
        # Operations on the longer unsigned integers are few, so those are looked at on the host.
        numbers = self.view(tensor) if str(tensor.dtype).startswith("torch.uint") else tensor
        return max(-int(numbers.min()), int(numbers.max()))

    def overflowed(self, tensor: Any) -> Any:
        """See `Framework.overflowed`."""
        doubtful = ~tensor.isfinite()
        if tensor.element_size() == 8:
            doubtful |= tensor.abs() == LARGEST
        return doubtful


@functools.cache
def _dtype(dtype: Any) -> np.dtype[Any] | None:
    return DTYPES.get(str(dtype))


def _torch() -> Any:
    # Imported already wherever there is a tensor; not where an accumulator of tensors has just been unpickled.
    return sys.modules.get("torch") or importlib.import_module("torch")
