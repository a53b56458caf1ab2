"""Models of torch, and plain `state_dict`s of them. Nothing here imports torch: it is there when there are models.

What their tensors are as arrays is left to `fed_learn.adapters.torch_tensors`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fed_learn.adapters.base import ONLY, Adapter, Variable, checked, given, role_of_any, role_of_buffer
from fed_learn.adapters.overlaps import Blocks, Placed, Span, refuse_contradictions, span_of
from fed_learn.adapters.torch_loading import derives, growing, load_as_torch_does, plain_name, undone_on_failure
from fed_learn.adapters.torch_tensors import TorchTensors, is_uninitialized, plain_views
from fed_learn.errors import ModelError, NotSameError, ShapeError, a_type
from fed_learn.hints import BEFORE_PACKING
from fed_learn.policies import Role, codes_in
from fed_learn.weights import Array, Schema, native_dtype, same_bits

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")
"""Packages with the layers that `torch.ao.quantization.convert` and `quantize_dynamic` put in the place of others."""


class TorchModels(Adapter):
    """`Adapter` for `torch.nn.Module`s and plain `state_dict`s.

    Buffers that are not persistent are not in a `state_dict`, nor here; neither is "extra state" that is no tensor.
    Parametrized weights are read by what they store, as `parametrizations.weight.original`: their mean is that of the
    originals, not of the weights made of them. Of an orthogonal weight it is orthogonal, if all began from one model.
    """

    name = "torch"
    models = "torch.nn.Module, a state_dict"

    def __init__(self) -> None:
        self._tensors = TorchTensors()

    def accepts(self, model: object) -> bool:
        tensor = self._tensors.tensor_type()
        if tensor is None:
            return False
        if isinstance(model, Mapping):
            return any(isinstance(value, tensor) for value in model.values())
        module = getattr(getattr(sys.modules["torch"], "nn", None), "Module", None)
        return module is not None and isinstance(model, module)

    def variables(self, model: Any) -> list[Variable]:
        found, foreign, _ = _held(model)
        parameters = None if isinstance(model, Mapping) else set(map(id, model.parameters()))
        variables = [self._variable(name, tensor, parameters) for name, tensor in found.items()]
        grows = growing(unwrapped(model), found) if parameters is not None else frozenset()
        variables = [replace(v, grows=True) if v.name in grows else v for v in variables]
        known = Schema((v.name, (v.shape, v.dtype)) for v in variables if v.problem is None)
        codes = codes_in(known) | {v.name: why for v in variables if (why := self._tensors.code(v.tensor)) is not None}
        variables = [replace(v, role="code") if v.name in codes else v for v in variables]
        barred = {v.name for v in variables if v.name in foreign and v.name not in codes}
        advice = _advice(model, alone=len(barred) == len(variables)) if barred else ""
        return [replace(v, problem=_is_foreign(v.name, advice)) if v.name in barred else v for v in variables]

    def _variable(self, name: str, tensor: Any, parameters: set[int] | None) -> Variable:
        dtype, problem = checked(self._tensors, tensor, name)
        if problem is not None and is_uninitialized(tensor):
            problem = ModelError(f"model: {name!r} is not initialized; run a batch through the model first", name=name)
        identity: object = id(tensor)
        if problem is None and tensor.numel() and tensor.data_ptr():  # else it has no address of its own
            identity = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        return Variable(
            name,
            () if problem else tuple(tensor.shape),  # nested tensors have none
            dtype,
            tensor,
            trainable=None if parameters is None else bool(tensor.requires_grad),
            role=None if problem else self._role(name.rpartition(".")[2], tensor, dtype, parameters),
            identity=identity,
            problem=problem,
        )

    def _role(self, name: str, tensor: Any, dtype: np.dtype[Any], parameters: set[int] | None) -> Role | None:
        shape = tuple(tensor.shape)
        if parameters is None or id(tensor) in parameters:
            return role_of_any(name, shape, dtype, trained=parameters is not None)
        return role_of_buffer(name, shape, dtype, lambda: bool(tensor.isfinite().all()))

    def views(self, model: Any, chosen: Callable[[str], object] | None) -> dict[str, Array] | None:
        """What `get` gives without a copy, by name; None for a model in which anything is out of the ordinary."""
        held, foreign, left = _held(model)
        taken = held if chosen is None else {name: held[name] for name in held if chosen(name)}
        return plain_views(taken) if not left and foreign.isdisjoint(taken) else None

    def left(self, model: Any, chosen: Callable[[str], object] | None) -> list[str]:
        """What a `state_dict` has beside tensors, such as extra state; not what is empty, or a mere dtype."""
        found = _held(model)[2] if not isinstance(model, Mapping) else {}
        return [
            f"{name!r} ({a_type(type(value))} in its state_dict)"
            for name, value in found.items()
            if chosen is None or chosen(name)
        ]

    def trained(self, model: Any) -> dict[str, bool]:
        """Whether training changes each parameter, by name; of a `state_dict` nothing is known."""
        if isinstance(model, Mapping):
            return {}
        named = unwrapped(model).named_parameters()
        return {plain_name(path): bool(parameter.requires_grad) for path, parameter in named}

    def get(self, variable: Variable, *, copy: bool) -> Array:
        """The value of a variable, as an array; as a tensor where it is not on the CPU, and it stays there."""
        tensor = variable.tensor.detach()
        if not tensor.is_cpu:
            there: Array = tensor.clone() if copy else tensor
            return there
        return given(self._tensors.view(tensor, "model", variable.name), copy=copy)

    def load(self, model: Any, values: Mapping[str, tuple[Variable, Any]]) -> Any:
        values = self._without_codes(model, values)
        for name, (variable, _) in values.items():
            if self._tensors.overlaps_itself(variable.tensor):
                raise ModelError(f"model: {name!r} is expanded: its elements share memory", name=name)
        module = None if model is None or isinstance(model, Mapping) else unwrapped(model)
        if module is None or not derives(module, values):
            self._copy(values)
            return model
        grown = {n: self._made(v, value) for n, (v, value) in values.items() if tuple(value.shape) != v.shape}
        kept = {name: both for name, both in values.items() if name not in grown}
        try:
            with undone_on_failure(module):
                self._copy(kept)
                load_as_torch_does(module, values, grown)
        except (ModelError, ShapeError):
            load_as_torch_does(module, values, {})  # what modules derived before one of them refused
            raise
        return model

    def _made(self, variable: Variable, value: Any) -> Any:
        """A new tensor where the variable lies, which shares no memory."""
        if isinstance(value, np.ndarray):
            value = self._tensors.tensor(np.array(value, native_dtype(value.dtype), order="C"))
        return value.detach().to(variable.tensor.device, copy=True)

    def _copy(self, values: Mapping[str, tuple[Variable, Any]]) -> None:
        """Copies values into variables of their shapes, whatever shares memory with what.

        Raises:
            TiedVariablesError: Variables share elements, and their values differ there; nothing has been written.
        """
        once: dict[object, tuple[Variable, Any]] = {}  # tied variables come with one value
        for variable, value in values.values():
            once.setdefault(variable.identity, (variable, value))
        for variable, value in self._apart(list(once.values())):
            self._write(variable.tensor, value, variable.name)

    def _without_codes(
        self, model: Any, values: Mapping[str, tuple[Variable, Any]]
    ) -> Mapping[str, tuple[Variable, Any]]:
        """Without the codes that can only be written by what made them, if they are what the model has.

        Raises:
            NotSameError: They are not. A random state that is a buffer of its own is loaded as any other is.
        """
        if not any(variable.role == "code" for variable, _ in values.values()):
            return values
        foreign = _held(model)[1]
        left = dict(values)
        for name, (variable, value) in values.items():
            if variable.role != "code" or not (name in foreign or self._tensors.code(variable.tensor) is not None):
                continue
            given = value if isinstance(value, np.ndarray) else self._tensors.view(value, "weights", name)
            if not same_bits(self._tensors.view(variable.tensor, "model", name), given):
                raise NotSameError(
                    f"weights: {name!r} differs from the model's own, and is not loaded: what it holds are codes or "
                    "the state of a module, not numbers. Give every client the same, or leave it out with only=",
                    contributor="weights",
                    name=name,
                )
            del left[name]
        return left

    def _apart(self, values: list[tuple[Variable, Any]]) -> list[tuple[Variable, Any]]:
        """The same, but copies of what lies in the memory of the variables: one might be written before it is read.

        Raises:
            TiedVariablesError: Variables share elements, and their values differ there.
        """
        blocks = Blocks({variable.name: self._span(variable.tensor) for variable, _ in values})
        for block in blocks.shared:
            tried = [self._placed(variable, value) for variable, value in values if variable.name in block.names]
            refuse_contradictions(block, tried)
        apart = []
        for variable, value in values:
            reached = blocks.reached(self._span(value))
            if reached and not (reached == (variable.name,) and _same_memory(value, variable.tensor)):
                value = np.array(value) if isinstance(value, np.ndarray) else value.detach().clone()
            apart.append((variable, value))
        return apart

    def _span(self, value: Any) -> Span:
        if isinstance(value, np.ndarray):
            return span_of(value)
        # What other devices call an address need not be one.
        return self._tensors.span(value) if value.is_cpu or value.is_cuda else (0, 0)

    def _placed(self, variable: Variable, value: Any) -> Placed:
        """Where the value of a variable is to be."""
        tensor = variable.tensor
        array = value if isinstance(value, np.ndarray) else self._tensors.view(value, "weights", variable.name)
        steps = tuple(step * tensor.element_size() for step in tensor.stride())
        return Placed(variable.name, array, self._tensors.span(tensor)[0], steps)

    def _write(self, tensor: Any, value: Any, name: str) -> None:
        torch = sys.modules["torch"]
        if tensor.is_cpu and isinstance(value, np.ndarray):
            # Takes any strides and byte order, and is no matter for autograd but for the count of changes.
            np.copyto(self._tensors.view(tensor, "model", name), value)
            self._tensors.changed(tensor)
            return
        if isinstance(value, np.ndarray):
            source = self._tensors.tensor(np.array(value, native_dtype(value.dtype), order="C"))
        else:
            source = value.detach()
        with torch.inference_mode(tensor.is_inference()):
            tensor.detach().copy_(source)


def unwrapped(model: Any) -> Any:
    """The module inside of `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> unwrapped(torch.compile(torch.nn.DataParallel(model), backend="eager")) is model
        True
    """
    parallel = sys.modules["torch"].nn.parallel
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    while True:
        if isinstance(model, compiled):
            model = model._orig_mod
        elif isinstance(model, parallel.DataParallel | parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _held(model: Any) -> tuple[dict[str, Any], frozenset[str], dict[str, Any]]:
    """The tensors of a model by name, as in its `state_dict`; the names of those that are not its own; other state."""
    tensor = sys.modules["torch"].Tensor
    if isinstance(model, Mapping):
        return {name: value for name, value in model.items() if isinstance(value, tensor)}, frozenset(), {}
    module = unwrapped(model)
    held: dict[str, Any] = {}
    if _collect(module, "", held):
        return held, frozenset(), {}
    own = {*map(id, module.parameters()), *map(id, module.buffers())}
    state = {plain_name(path): value for path, value in module.state_dict(keep_vars=True).items()}
    held = {name: value for name, value in state.items() if isinstance(value, tensor)}
    left = {name: value for name, value in state.items() if name not in held and _says_something(value)}
    return held, frozenset(name for name, value in held.items() if id(value) not in own), left


def _says_something(value: object) -> bool:
    """Whether what is no tensor in a `state_dict` can differ between models of one architecture."""
    if value is None or isinstance(value, sys.modules["torch"].dtype):
        return False
    try:
        return len(value) > 0  # type: ignore[arg-type]  # what has no length raises
    except (TypeError, NotImplementedError):
        return True


def _is_foreign(name: str, advice: str) -> ModelError:
    what = f"model: {name!r} of its state_dict is not one of its parameters or buffers"
    return ModelError(f"{what}, and cannot be loaded{advice}", name=name)


def _advice(model: Any, *, alone: bool) -> str:
    """What to do about a model with variables that are not its own, which are all that it has, or some of them."""
    others = "" if alone else ONLY
    if any(type(part).__module__.startswith(QUANTIZED) for part in model.modules()):
        return f": its weights are packed, as torch quantizes them, and have no mean. {BEFORE_PACKING}{others}"
    return others


def _collect(module: Any, prefix: str, held: dict[str, Any]) -> bool:
    """Collects what `state_dict` has of a module, which is then its own; false if it may have something else."""
    kind, base = type(module), sys.modules["torch"].nn.Module
    if (
        kind.state_dict is not base.state_dict
        or kind._save_to_state_dict is not base._save_to_state_dict
        or kind.get_extra_state is not base.get_extra_state
        or module._state_dict_hooks
        or module._state_dict_pre_hooks
        or not module.__dict__.keys().isdisjoint(("state_dict", "_save_to_state_dict"))
    ):
        return False
    for name, tensor in module._parameters.items():
        if tensor is not None:
            held[prefix + name] = tensor
    for name, tensor in module._buffers.items():
        if tensor is not None and name not in module._non_persistent_buffers_set:
            held[prefix + name] = tensor
    for name, part in module._modules.items():
        if part is not None and (name == "_orig_mod" or not _collect(part, f"{prefix}{name}.", held)):
            return False
    return True


def _same_memory(value: Any, tensor: Any) -> bool:
    """Whether a value that lies in the memory of its own variable can be written to it all the same."""
    if isinstance(value, np.ndarray):  # numpy reads before it writes
        return True
    return bool(value.data_ptr() == tensor.data_ptr() and value.stride() == tensor.stride())
