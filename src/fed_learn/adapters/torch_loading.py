"""What modules of torch do beside copying when a `state_dict` is loaded: they derive what they keep, and grow buffers.

Copying alone is what most modules do. Others have a `_load_from_state_dict` of their own, as observers of quantization
whose buffers have no shape before the first batch, or hooks around loading: these are called as torch calls them, and
only where something in their reach was loaded. Which variables there are, and copying, is left to
`fed_learn.adapters.torch`.
"""

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fed_learn.errors import ModelError, text_of
from fed_learn.weights import shape_error

COMPILED = "_orig_mod."
"""What `torch.compile` adds to the paths of a module."""


def plain_name(path: str) -> str:
    """The name of a variable at a path of a `state_dict`.

    Example:
        >>> plain_name("0._orig_mod.weight")
        '0.weight'
    """
    return path.replace(COMPILED, "")


def loads_itself(module: Any) -> bool:
    """Whether loading such a module is more than copying, leaving its parts aside.

    Example:
        >>> import torch
        >>> loads_itself(torch.nn.BatchNorm1d(2)), loads_itself(torch.ao.quantization.FakeQuantize())
        (False, True)
    """
    # Modules of torch.nn have one of their own for files of old versions alone.
    own = type(module)._load_from_state_dict
    return bool(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or "_load_from_state_dict" in module.__dict__
        or not own.__module__.startswith("torch.nn.modules.")
    )


def growing(module: Any, names: Collection[str]) -> frozenset[str]:
    """The names of variables that may get another shape as the module is loaded.

    Args:
        module: A module, without wrappers.
        names: Those of its variables.
    """
    reach = {plain_name(path) for path, _ in _loading_themselves(module)}
    return frozenset(name for name in names if _reached(name, reach)) if reach else frozenset()


def derives(module: Any, names: Collection[str]) -> bool:
    """Whether to load these variables is more than to copy them.

    Args:
        module: A module, without wrappers.
        names: The variables that are loaded.
    """
    if _whole_of_its_own(module):
        return True
    reach = {plain_name(path) for path, _ in _loading_themselves(module)}
    return any(_reached(name, reach) for name in names)


def _reached(name: str, reach: Collection[str]) -> bool:
    return any(name.startswith(f"{path}.") or not path for path in reach)


def _loading_themselves(module: Any) -> Iterator[tuple[str, Any]]:
    for path, part in module.named_modules(remove_duplicate=False):
        if loads_itself(part):
            yield path, part


def _whole_of_its_own(module: Any) -> bool:
    """Whether the outermost module, which torch asks for it alone, has a `load_state_dict` of its own."""
    own = type(module).load_state_dict
    return own is not sys.modules["torch"].nn.Module.load_state_dict or "load_state_dict" in module.__dict__


def load_as_torch_does(module: Any, names: Collection[str], grown: Mapping[str, Any]) -> None:
    """Lets modules do what they do when a `state_dict` is loaded, with the values that they have by now.

    Args:
        module: A module, without wrappers; all variables that keep their shape have their new values.
        names: The variables that are loaded.
        grown: By name new tensors for those that are to get another shape.

    Raises:
        ShapeError: A variable did not take its other shape.
        ModelError: A module refuses what it is given.
    """
    state, kind = module.state_dict(keep_vars=True), type(module).__qualname__
    before = {plain_name(path): tensor for path, tensor in state.items()}
    for name in grown:  # what an array shares cannot be resized, as modules will try
        before[name].data = before[name].detach().clone()
    state = module.state_dict()
    for path in [path for path in state if plain_name(path) in grown]:
        state[path] = grown[plain_name(path)]
    errors: list[str] = []
    try:
        if _whole_of_its_own(module):
            module.load_state_dict(state)
        else:
            _load(module, "", state, frozenset(names), errors)
    except Exception as error:
        raise ModelError(f"model: {kind} refuses its weights as it loads them: {text_of(error)}") from error
    for path, tensor in module.state_dict(keep_vars=True).items():
        name = plain_name(path)
        if name in grown and tensor.shape != grown[name].shape:
            raise shape_error(name, grown[name], tuple(tensor.shape), "weights")
    if errors:
        raise ModelError(f"model: {kind} refuses its weights as it loads them: {errors[0]}")


def _load(module: Any, prefix: str, state: Any, names: frozenset[str], errors: list[str]) -> None:
    """What `Module.load_state_dict` does of a module and then of its parts, but not where it is copying alone."""
    if not any(name.startswith(plain_name(prefix)) for name in names):
        return
    metadata = getattr(state, "_metadata", {}).get(prefix[:-1], {})
    missing: list[str] = []
    unexpected: list[str] = []
    if loads_itself(module):
        # Beside what is loaded, its own variables alone: some refuse what else they wrote into the state themselves.
        own = {*dict(module.named_parameters()), *dict(module.named_buffers())}
        inside = {
            path: value
            for path, value in state.items()
            if path.startswith(prefix) and (plain_name(path) in names or path.removeprefix(prefix) in own)
        }
        module._load_from_state_dict(inside, prefix, metadata, True, missing, unexpected, errors)
    for name, part in module._modules.items():
        if part is not None:
            _load(part, f"{prefix}{name}.", state, names, errors)
    keys = sys.modules["torch"].nn.modules.module._IncompatibleKeys(missing, unexpected)
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, keys)


@contextmanager
def undone_on_failure(module: Any) -> Iterator[None]:
    """Gives all modules and tensors back what they had, if what is done inside raises."""
    torch = sys.modules["torch"]
    held = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    tensors = {id(t): t for _, *both in held for kind in both for t in kind.values() if t is not None}
    before = [(tensor, tensor.data, tensor.detach().clone()) for tensor in tensors.values()]
    try:
        yield
    except BaseException:
        for part, parameters, buffers in held:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
        for tensor, memory, values in before:
            tensor.data = memory
            with torch.inference_mode(tensor.is_inference()):
                tensor.detach().copy_(values)
        raise
