"""What to do next, for the errors about what is no weight dict, or one of other names than expected.

Each function looks at what came and gives words to put into a message, empty where there is nothing to advise. It never
raises, whatever it looks at, and decides nothing: the checks are those of `fed_learn.weights`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from os import PathLike, fspath
from typing import Any, ParamSpec

import numpy as np

from fed_learn.errors import a_type, as_failure, brief
from fed_learn.prefixes import BESIDE, PEFT, WITHIN, WRAPPERS, stripped

P = ParamSpec("P")

READERS = {
    ".safetensors": "safetensors.numpy.load_file(path)",
    ".npz": "numpy.load(path)",
    ".pt": "torch.load(path, weights_only=True)",
    ".pth": "torch.load(path, weights_only=True)",
    ".bin": "torch.load(path, weights_only=True)",
    ".keras": "fl.get_weights(keras.saving.load_model(path))",
    ".h5": "fl.get_weights(model) after model.load_weights(path)",
}
"""What to pass in the place of a path, by its end."""
MOMENTA = ", or fl.get_weights(optimizer) to average what it remembers"
"""What else may be meant by an optimizer."""
MODELS = ("flax", "equinox")
"""Packages whose classes, and those derived from them, are models."""
OF_PEFT = ("base_layer", "modules_to_save", "original_module")
"""What PEFT puts into the names of a model that it wraps, beside the names of adapters."""
CLEARED = "call keras.utils.clear_session() before the model is made, or map with fl.align"
"""What helps where layers of Keras 3 got numbers as names."""
BEFORE_PACKING = "Average the model before torch.ao.quantization.convert() or quantize_dynamic()"
"""What to do where torch has packed weights."""
PACKED = re.compile(r"(^|\.)(_packed_params|_all_weight_values)\.")
"""Entries of a quantized model of torch in its `state_dict`."""
NUMBER = re.compile(r"_\d+(?=/|$)")


def _never_raising(look: Callable[P, str]) -> Callable[P, str]:
    """The function, but without words where the object from outside cannot even be looked at."""

    @wraps(look)
    def safe(*args: P.args, **kwargs: P.kwargs) -> str:
        try:
            return look(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - an object from outside may raise anything while it is looked at
            as_failure(error)
            return ""

    return safe


@_never_raising
def of_weights(weights: object) -> str:
    """What was passed in the place of a weight dict, and what to pass instead."""
    kind = a_type(type(weights))
    if isinstance(weights, type):
        return f"the class {weights.__name__} (pass fl.get_weights() of a model that you made of it)"
    if hasattr(weights, "param_groups"):
        return (
            f"an optimizer ({type(weights).__name__}; pass fl.get_weights(model) of the model that it trains{MOMENTA})"
        )
    if _is_model(weights):
        return f"a model ({type(weights).__name__}; pass fl.get_weights(model))"
    if isinstance(weights, list | tuple) and weights:
        if all(isinstance(one, Mapping) for one in weights):
            return f"{kind} of {len(weights)} dicts (pass one at a time, or all of them to fl.weighted_average)"
        if all(hasattr(one, "shape") for one in weights):
            return (
                f"{kind} of {len(weights)} arrays without names (pass fl.get_weights(model), or dict(zip(names, "
                "them)); fl.weighted_average, fl.aggregate and fl.Accumulator take them in the order of like=)"
            )
    if hasattr(weights, "weights"):  # a JobResult, a Contribution, a ModelData
        return f"{kind} (pass its .weights)"
    if isinstance(weights, str | PathLike):
        path = str(fspath(weights))
        reader = next((call for end, call in READERS.items() if path.endswith(end)), "")
        return f"{kind} (load what it names, and pass that" + (f": {reader})" if reader else ")")
    if hasattr(weights, "tensors") and hasattr(weights, "tensor_type"):  # Flower's Parameters
        return f"{kind} (pass flwr.common.parameters_to_ndarrays(parameters), together with like=)"
    if isinstance(weights, np.ndarray):
        return f"{kind} (give it a name: {{'w': array}})"
    if isinstance(weights, Iterator):  # such as model.parameters()
        return f"{kind} (pass fl.get_weights(model))"
    return kind


def _is_model(value: object) -> bool:
    packages = (base.__module__.partition(".")[0] for base in type(value).__mro__)
    return (
        callable(getattr(value, "state_dict", None))
        or hasattr(value, "trainable_variables")
        or any(package in MODELS for package in packages)
    )


@_never_raising
def of_entry(name: str, value: object, weights: Mapping[Any, Any]) -> str:
    """What to do about an entry that is no array.

    Args:
        name: Its name.
        value: What it is.
        weights: All entries; what is beside it tells what the whole is.
    """
    if "param_groups" in weights and "state" in weights:
        return "; this is the state of an optimizer: pass fl.get_weights(model) of the model that it trains" + MOMENTA
    checkpoint = _entries_with_weights(weights)
    if checkpoint:
        return f"; this looks like a checkpoint: pass {checkpoint}"
    if PACKED.search(name):
        return (
            f"; weights that torch has quantized are packed, and have no mean. {BEFORE_PACKING}, or average the "
            "tensors beside them: fl.get_weights(state_dict)"
        )
    if callable(getattr(value, "state_dict", None)):
        return f"; pass fl.get_weights() of what is under {name!r}"
    if isinstance(value, Mapping):
        return _of_nested(value)
    if type(value).__module__.partition(".")[0] == "flwr":  # an ArrayRecord holds arrays of Flower's own
        return "; fed_learn.integrations.flower.to_weights(record) gives arrays"
    if hasattr(value, "shape") and not isinstance(value, np.ndarray):
        return "; get_weights() of its model gives arrays"
    if isinstance(value, list | tuple) and value and all(hasattr(one, "shape") for one in value):
        return f"; its {len(value)} arrays need names: pass dict(zip(names, weights[{name!r}]))"
    if isinstance(value, int | float | list):
        return "; leave it out, or make it an array by np.asarray if it is to be averaged"
    return ""


@_never_raising
def of_checkpoint(weights: Mapping[Any, Any]) -> str:
    """Which entries of a dict could be meant, where it is none of arrays."""
    entries = _entries_with_weights(weights)
    return f": it looks like a checkpoint; pass {entries}" if entries else ""


def _entries_with_weights(weights: Mapping[Any, Any]) -> str:
    held = [key for key, one in weights.items() if isinstance(key, str) and _holds_arrays(one)]
    return " or ".join(f"checkpoint[{key!r}]" for key in held[:3])


def _holds_arrays(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(hasattr(one, "shape") for one in value.values())


def _of_nested(value: object) -> str:
    """Advice on a tree of dicts with arrays at its ends."""
    while isinstance(value, Mapping) and value:
        value = next(iter(value.values()))
    if isinstance(value, np.ndarray) or type(value).__module__.partition(".")[0] in ("jax", "jaxlib"):
        return "; fl.get_weights(weights) gives each array of a nested dict a name, its path"
    return ""


@_never_raising
def of_names(missing: Sequence[str], extra: Sequence[str]) -> str:
    """What to do about names that differ by what is in front of all of them, or by the numbers that Keras gives."""
    averaged = BESIDE in extra and BESIDE not in missing
    longer = [name for name in extra if name != BESIDE] if averaged else extra
    prefix = _prefix_of(longer, missing)
    if prefix:
        whose = "torch.optim.swa_utils.AveragedModel" if averaged and prefix == "module." else WRAPPERS.get(prefix)
        return (
            f". All that is added has {brief(prefix)} in front{f', as {whose} has it' if whose else ''}: "
            f"fl.without_prefix(weights, {prefix!r}) makes them the same"
        )
    for within in WITHIN:
        if missing and Counter(stripped(name, within) for name in extra) == Counter(missing):
            return (
                f". All that is added has {within!r} in it, as {WRAPPERS[within]} has it: "
                f"fl.without_prefix(weights, {within!r}) makes them the same"
            )
    prefix = _prefix_of(missing, extra)
    if prefix:
        whose = f", as {WRAPPERS[prefix]} has it" if prefix in WRAPPERS else ""
        return (
            f". All that is missed has {brief(prefix)} in front{whose}: "
            f"{{{prefix!r} + name: array for name, array in weights.items()}} makes them the same"
        )
    numbers = of_numbers(missing, extra)
    return f". {numbers}" if numbers else _of_peft(missing, extra)


def _of_peft(missing: Sequence[str], extra: Sequence[str]) -> str:
    """What to do about names of PEFT, which has others in a model than in a file, and others than the model inside."""
    if not any(mark in name for name in (*missing, *extra) for mark in ("lora_", *OF_PEFT)):
        return ""
    if not extra or not {*map(_without_peft, extra)} <= {*map(_without_peft, missing)}:
        return ""
    return (
        ". PEFT has other names in a model than in a file or in the model that it wraps: "
        "peft.set_peft_model_state_dict(model, weights) loads what peft.get_peft_model_state_dict gives; "
        "fl.get_weights(model, only=...) of the same PEFT model gives names that fl.set_weights takes"
    )


def _without_peft(name: str) -> str:
    """The name that a variable has without PEFT.

    Example:
        >>> _without_peft("base_model.model.fc.base_layer.weight"), _without_peft("fc.lora_A.default.weight")
        ('fc.weight', 'fc.lora_A.weight')
    """
    parts = name.removeprefix(PEFT).split(".")
    return ".".join(part for part in parts if part not in (*OF_PEFT, "default"))


@_never_raising
def of_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """What to do about an adapter of LoRA that has another rank.

    Example:
        >>> of_shape("q.lora_A.weight", (2, 4), (1, 4))
        '; adapters of several ranks are for fl.lora.average'
    """
    half = re.search(r"(^|\.)lora_(embedding_)?([AB])($|\.)", name)
    if half is None or not len(shape) == len(expected) >= 2:
        return ""
    place = "AB".index(half[3])
    same = shape[:place] + shape[place + 1 :] == expected[:place] + expected[place + 1 :]
    return "; adapters of several ranks are for fl.lora.average" if same else ""


def of_numbers(missing: Sequence[str], extra: Sequence[str], remedy: str = CLEARED) -> str:
    """What to do about paths of Keras that differ in the numbers alone that it gives to layers.

    Args:
        missing: The names that are expected and did not come.
        extra: The names that came instead.
        remedy: What helps beside names for the layers.

    Example:
        >>> of_numbers(["dense/kernel"], ["dense_3/kernel"])[:41]
        'What is added differs in the numbers that'
    """
    if not extra or not all("/" in name for name in extra):
        return ""
    added, lacking = (Counter(NUMBER.sub("", name) for name in names) for names in (extra, missing))
    if not added <= lacking:
        return ""
    return (
        "What is added differs in the numbers that Keras gives to layers without a name, as the process makes "
        f"them: name the layers, {remedy}"
    )


def _prefix_of(longer: Sequence[str], shorter: Sequence[str]) -> str:
    """What makes the longer names of shorter ones, if that is one prefix for all; else nothing.

    Example:
        >>> _prefix_of(["module.fc.weight"], ["fc.weight", "fc.bias"]), _prefix_of(["a.w", "b.w"], ["w"])
        ('module.', '')
    """
    ends = [name for name in shorter if longer and longer[0].endswith(f".{name}")]
    prefix = longer[0].removesuffix(max(ends, key=len)) if ends else ""
    known = set(shorter)
    fits = prefix and all(name.startswith(prefix) and name.removeprefix(prefix) in known for name in longer)
    return prefix if fits else ""
