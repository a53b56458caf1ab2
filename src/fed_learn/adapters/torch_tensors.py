"""Tensors of torch. What is on the CPU shares its memory with arrays, both ways; bfloat16 by reinterpretation.

Nothing here imports torch: it is there when there are tensors. Its models are left to `fed_learn.adapters.torch`.
"""

import copy
import functools
import importlib
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Self

import numpy as np

from fed_learn.adapters.base import Form, Resident, not_averageable
from fed_learn.adapters.overlaps import overlaps_itself
from fed_learn.errors import WeightsTypeError, a_type, text_of
from fed_learn.ties import one_array_for_one_memory
from fed_learn.weights import BFLOAT16, SUPPORTED_DTYPES, Array, native_dtype

DTYPES = {f"torch.{dtype.name}": dtype for dtype in SUPPORTED_DTYPES}
LARGEST = float(np.finfo(np.float64).max)
SMALL = 64 << 10
"""Bytes of a tensor up to which it is copied to the host to look at its values, as counters are."""
LARGE = 64 << 20
"""Bytes of a tensor above which it is copied from a device alone: a copy of it on the device would take memory."""
MOST_AT_ONCE = 256 << 20
"""Bytes of the tensors that are copied from a device at once."""


class TorchTensors(Resident):
    """`Framework` and `Resident` for torch.

    Example:
        >>> import torch
        >>> weight, torch_tensors = torch.zeros(2, requires_grad=True), TorchTensors()
        >>> torch_tensors.view(weight)[:] = 7
        >>> weight
        tensor([7., 7.], requires_grad=True)
    """

    name = "torch"

    @property
    def resident(self) -> Self:
        return self

    def tensor_type(self) -> type | None:
        # While torch is being imported, it is in sys.modules without its names.
        return getattr(sys.modules.get("torch"), "Tensor", None)

    def check(self, tensor: Any, contributor: str, name: str) -> np.dtype[Any]:
        dtype, plain = _dtype(tensor.dtype), type(tensor) in _plain_kinds()
        usual = plain and not (tensor.is_nested or tensor.is_meta or tensor.is_neg()) and tensor.layout is _strided()
        if not usual:
            self._refuse(tensor, contributor, name, plain=plain, dtype=dtype)
        if dtype is None:
            raise not_averageable(tensor.dtype, contributor, name)
        return dtype

    def _refuse(self, tensor: Any, contributor: str, name: str, *, plain: bool, dtype: np.dtype[Any] | None) -> None:
        """Raises: a tensor is no dense block of memory with values; returns if it is one after all."""
        problem = None
        if not plain and is_uninitialized(tensor):  # which answers hardly any question
            problem = "is not initialized yet: run one batch through its lazy module first"
        elif tensor.layout is not _strided() or tensor.is_nested:
            problem = f"is a {'nested' if tensor.is_nested else str(tensor.layout)} tensor, not a dense one"
        elif tensor.is_meta:
            problem = "is a tensor on the meta device, which has no values"
        elif dtype is not None and tensor.is_neg():
            problem = "is a tensor whose values are negated lazily; resolve_neg() makes them real"
        elif not plain and not _has_memory(tensor):
            problem = f"is {a_type(type(tensor))}, which has no memory of its own"
            if hasattr(tensor, "full_tensor"):
                problem = f"is {a_type(type(tensor))}, sharded over processes; full_tensor() gathers it"
        if problem is not None:
            raise WeightsTypeError(f"{contributor}: {name!r} {problem}", contributor=contributor, name=name)

    def dtype(self, tensor: Any) -> np.dtype[Any] | None:
        return _dtype(tensor.dtype)

    def device(self, tensor: Any) -> str:
        return "cpu" if tensor.is_cpu else _averaged_on(tensor.device)

    def placement(self, tensor: Any) -> str:
        return str(tensor.device)

    def view(self, tensor: Any, contributor: str | None = None, name: str | None = None) -> Array:
        try:
            plain = tensor.detach()  # what the array keeps alive, whatever becomes of the tensor
            shared = plain.is_cpu
            plain = plain if shared else plain.cpu()
            short = plain.dtype is _bfloat16()  # which numpy does not know
            array: Array = plain.view(_torch().int16).numpy().view(BFLOAT16) if short else plain.numpy()
            if not shared:  # what is written to a copy would be lost
                array.setflags(write=False)
        except (RuntimeError, TypeError) as error:  # a subclass without memory of its own
            raise WeightsTypeError(
                f"{contributor}: {name!r} is {a_type(type(tensor))} that cannot be read as an array: {text_of(error)}",
                contributor=contributor,
                name=name,
            ) from error
        return array

    def tensor(self, array: Array, placement: Any = None) -> Any:
        torch, device = _torch(), placement or "cpu"
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # a result is to be a tensor like any other
                return self.tensor(array, placement)
        plain = array.view(np.int16) if array.dtype == BFLOAT16 else array
        if not plain.flags.writeable and device != "cpu":  # torch would warn of it, and it is read only
            plain = plain.copy()
        made = torch.from_numpy(plain)
        made = made.view(torch.bfloat16) if array.dtype == BFLOAT16 else made
        # CUDA has read what lies in ordinary memory of the host when this returns; others may read it later.
        return made.to(device, non_blocking=str(device).startswith("cuda"))

    def code(self, tensor: Any) -> str | None:
        if tensor.dtype in _quantized_dtypes():
            return "quantized numbers of torch"
        kind = type(tensor)
        if kind.__module__.startswith("bitsandbytes.") and str(tensor.dtype) in ("torch.uint8", "torch.int8"):
            return f"{4 if kind.__name__ == 'Params4bit' else 8}-bit codes of bitsandbytes"
        return None

    def alike(self, one: Any, other: Any) -> bool:
        torch = _torch()
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        if one.dtype in _quantized_dtypes():
            return bool(torch.equal(one, other))
        states = [state for tensor in (one, other) if (state := getattr(tensor, "quant_state", None)) is not None]
        if len(states) == 2:  # what 4-bit codes stand for
            mine, theirs = (state.as_dict(packed=True) for state in states)
            if mine.keys() != theirs.keys() or not all(self.alike(mine[name], theirs[name]) for name in mine):
                return False
        flat = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
        return bool(torch.equal(*flat))

    def copied(self, tensor: Any) -> Any:
        return tensor.detach().clone() if type(tensor) in _plain_kinds() else copy.deepcopy(tensor)

    def unwritable(self, tensor: Any) -> str | None:
        return "overlaps itself: its elements share memory" if self.overlaps_itself(tensor) else None

    def empty(self, forms: Mapping[str, Form], devices: Mapping[str, str]) -> dict[str, Any]:
        torch, made = _torch(), {}
        dtypes = {dtype: getattr(torch, dtype.name) for dtype in {dtype for _, dtype in forms.values()}}
        with torch.inference_mode(False):  # a result is to be a tensor like any other
            for name, (shape, dtype) in forms.items():
                made[name] = torch.empty(shape, dtype=dtypes[dtype], device=devices[name])
        return made

    def empty_slab(self, forms: Mapping[str, Form], device: str) -> dict[str, Any]:
        torch, made = _torch(), dict.fromkeys(forms)
        with torch.inference_mode(False):
            for dtype in dict.fromkeys(dtype for _, dtype in forms.values()):
                # Those that keep the next one aligned come first, so that one of odd size does not cost the others.
                names = [name for name, form in forms.items() if form[1] == dtype]
                names.sort(key=lambda name: math.prod(forms[name][0]) % 16 > 0)
                sizes = [math.prod(forms[name][0]) for name in names]
                slab = torch.empty(sum(sizes), dtype=getattr(torch, dtype.name), device=device)
                parts = zip(names, torch.split(slab, sizes), strict=True)
                made |= {name: part.view(forms[name][0]) for name, part in parts}
        return made

    def contiguous(self, tensor: Any) -> Any:
        return tensor.detach().contiguous()

    def changed(self, tensor: Any) -> None:
        if not tensor.is_inference():
            _torch().autograd.graph.increment_version(tensor)

    def write(self, target: Any, source: Any) -> None:
        with _torch().inference_mode():  # takes also what was made in it
            target.detach().copy_(self.tensor(source) if isinstance(source, np.ndarray) else source)

    def on_host(self, tensors: Mapping[str, Any]) -> dict[str, Array]:
        torch = _torch()
        arrays: dict[str, Array] = {}
        together: dict[Any, list[str]] = {}
        sizes: dict[Any, int] = {}
        for name, tensor in tensors.items():
            if tensor.is_cpu or tensor.nbytes > LARGE or not tensor.numel():
                arrays[name] = self.view(tensor)
                continue
            sizes[tensor.device] = sizes.get(tensor.device, 0) + tensor.nbytes
            together.setdefault((tensor.device, sizes[tensor.device] // MOST_AT_ONCE), []).append(name)
        with torch.inference_mode():
            for names in together.values():
                # The longest elements come first, so that each array is aligned.
                names.sort(key=lambda name: -tensors[name].element_size())
                pieces = [tensors[name].detach().contiguous().view(-1).view(torch.uint8) for name in names]
                ends = np.cumsum([piece.numel() for piece in pieces])
                memory: Array = torch.cat(pieces).cpu().numpy()
                memory.setflags(write=False)
                for name, part in zip(names, np.split(memory, ends[:-1]), strict=True):
                    dtype: Any = _dtype(tensors[name].dtype)
                    arrays[name] = part.view(dtype).reshape(tuple(tensors[name].shape))
        return {name: arrays[name] for name in tensors}

    def moved(self, value: Any, device: str) -> Any:
        if isinstance(value, np.ndarray):
            return self.tensor(np.array(value, native_dtype(value.dtype), order="C"), device)
        return value.detach().to(device)

    def lacks(self, device: str) -> str | None:
        torch = _torch()
        try:
            torch.empty(0, device=device)
            if torch.device(device).type == "meta":
                return "what lies there has no values"
        except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # what a build without it raises
            return text_of(error).splitlines()[0]
        return "it has no float64, in which sums are kept" if without_float64(torch.device(device)) else None

    def mark(self, devices: Iterable[str]) -> Any:
        marks = []
        for device in dict.fromkeys(devices):
            module = _streams(device)
            if module is not None:
                stream = module.current_stream(device)
                marks.append((device, stream, stream.record_event()))
        return marks

    def wait(self, mark: Any, tensors: Collection[Any]) -> None:
        for device, stream, event in mark or ():
            current = _streams(device).current_stream(device)
            if current == stream:
                continue
            current.wait_event(event)
            for tensor in tensors:
                if not tensor.is_cpu and str(tensor.device) == device:
                    tensor.record_stream(current)

    def overlaps_itself(self, tensor: Any) -> bool:
        """Whether several elements share memory, so that it cannot be written to."""
        return not tensor.is_contiguous() and overlaps_itself(tensor.shape, tensor.stride())

    def span(self, tensor: Any) -> tuple[int, int]:
        start = int(tensor.data_ptr())
        if not (tensor.is_cpu or tensor.is_cuda):  # what other devices call an address need not be one
            start = (int(tensor.untyped_storage().data_ptr()) << 64) + tensor.storage_offset() * tensor.element_size()
        if tensor.is_contiguous() or not tensor.numel():
            return start, start + int(tensor.nbytes)
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        return start, start + (last + 1) * int(tensor.element_size())

    def first_not_finite(self, tensor: Any) -> tuple[tuple[int, ...], float] | None:
        if not tensor.is_floating_point():
            return None
        flat = tensor.detach().reshape(-1)
        bad = ~flat.isfinite()
        if not bool(bad.any()):
            return None
        first = int(bad.byte().argmax())  # the first of the largest
        return tuple(int(i) for i in np.unravel_index(first, tuple(tensor.shape))), float(flat[first])

    def magnitude(self, tensor: Any) -> int:
        if tensor.is_floating_point() or str(tensor.dtype) == "torch.bool" or not tensor.numel():
            return 0
        # Operations on the longer unsigned integers are few, so those are looked at on the host.
        numbers = self.view(tensor) if str(tensor.dtype).startswith("torch.uint") else tensor
        return max(-int(numbers.min()), int(numbers.max()))

    def magnitudes(self, tensors: Mapping[str, Any]) -> dict[str, int]:
        arrays = self.on_host({name: tensor for name, tensor in tensors.items() if tensor.nbytes <= SMALL})
        found = {
            name: 0 if not array.size else max(-int(array.min()), int(array.max())) for name, array in arrays.items()
        }
        return {name: found[name] if name in found else self.magnitude(tensor) for name, tensor in tensors.items()}

    def overflowed(self, tensor: Any) -> Any:
        doubtful = ~tensor.isfinite()
        if tensor.element_size() == 8:  # kernels hold a mean within the range of float64
            doubtful |= tensor.abs() == LARGEST
        return doubtful

    def put(self, tensor: Any, mask: Any, values: Any) -> None:
        with _torch().inference_mode():  # takes also what was made in it
            tensor[mask] = values


def plain_views(tensors: Mapping[str, Any]) -> dict[str, Array] | None:
    """Read-only views of plain tensors on the CPU whose dtypes can be averaged; None if there is any other tensor.

    Tensors in one place, as the names of a tied parameter have them, have one view.

    Example:
        >>> import torch
        >>> plain_views({"w": torch.ones(2)}), plain_views({"w": torch.ones(2, device="meta")})
        ({'w': array([1., 1.], dtype=float32)}, None)
    """
    torch = _torch()
    kinds, views, addresses = _plain_kinds(), dict[str, Array](), set[int]()
    try:
        for name, tensor in tensors.items():
            dtype = _dtype(tensor.dtype)
            if type(tensor) not in kinds or dtype is None:
                return None
            if dtype is BFLOAT16:  # which numpy does not know
                view: Array = tensor.detach().view(torch.int16).numpy().view(BFLOAT16)
            else:
                view = tensor.detach().numpy()
            view.setflags(write=False)
            views[name] = view
            addresses.add(tensor.data_ptr())
    except (RuntimeError, TypeError):  # on a device, sparse, without values, …
        return None
    return views if len(addresses) == len(views) else one_array_for_one_memory(views)


def is_uninitialized(tensor: Any) -> bool:
    """Whether it is a parameter or buffer of a lazy module that has not seen a batch yet.

    Example:
        >>> import torch
        >>> is_uninitialized(torch.nn.LazyLinear(2).weight), is_uninitialized(torch.nn.Linear(2, 2).weight)
        (True, False)
    """
    return isinstance(tensor, _torch().nn.parameter.UninitializedTensorMixin)


def _has_memory(tensor: Any) -> bool:
    """Whether a tensor holds values itself: not those that stand for others, sharded, packed or imagined."""
    try:
        storage = tensor.untyped_storage()
        return storage.device.type != "meta" and (not storage.nbytes() or bool(storage.data_ptr()))
    except RuntimeError:  # it has none at all
        return False


@functools.cache
def _averaged_on(device: Any) -> str:
    """The device itself; `"cpu"` for one that has no float64, whose tensors are averaged as copies on the host."""
    return "cpu" if without_float64(device) else str(device)


def without_float64(device: Any) -> bool:
    """Whether a device of torch cannot compute in float64, in which sums are kept: Apple's, and some of Intel's.

    Example:
        >>> import torch
        >>> without_float64(torch.device("mps")), without_float64(torch.device("cuda"))
        (True, False)
    """
    if device.type == "xpu":
        return not getattr(_torch().xpu.get_device_properties(device), "has_fp64", False)
    return bool(device.type == "mps")


def _streams(device: str) -> Any:
    """The module of torch with the streams of a device; None where it has none."""
    module = getattr(_torch(), device.partition(":")[0], None)
    return module if hasattr(module, "current_stream") and device != "cpu" else None


@functools.cache
def _plain_kinds() -> tuple[type, type]:
    return _torch().Tensor, _torch().nn.Parameter


@functools.cache
def _quantized_dtypes() -> frozenset[Any]:
    names = ("quint8", "qint8", "qint32", "quint4x2", "quint2x4")
    return frozenset(getattr(_torch(), name) for name in names if hasattr(_torch(), name))


@functools.cache
def _strided() -> Any:
    return _torch().strided


@functools.cache
def _bfloat16() -> Any:
    return _torch().bfloat16


@functools.cache
def _dtype(dtype: Any) -> np.dtype[Any] | None:
    return DTYPES.get(str(dtype))


def _torch() -> Any:
    # Imported already wherever there is a tensor; not where an accumulator of tensors has just been unpickled.
    return sys.modules.get("torch") or importlib.import_module("torch")
