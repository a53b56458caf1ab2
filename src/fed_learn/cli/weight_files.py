"""The variables in files of weights and models, for `fed-learn describe`. Nothing is ever unpickled,
and nothing in a file is run.

Of `.safetensors` the header is enough. Files of a framework need that framework, which is imported here; the variables
are those that its adapter tells.
"""

import importlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from fed_learn.adapters.base import Variable, averageable, role_of_any
from fed_learn.adapters.models import adapter_of
from fed_learn.errors import ConfigError, WeightsTypeError, text_of
from fed_learn.weights import BFLOAT16, listed

Found = tuple[list[Variable], list[str]]
"""The variables, and what else a reader should know, a sentence each."""

SAFETENSORS = {
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "BOOL": "bool",
}
"""What the header of a `.safetensors` file calls the dtypes that can be averaged."""
LONGEST_HEADER = 100_000_000
"""Bytes of a `.safetensors` header, by its specification."""
SAFE_KERAS = (3, 11, 3)
"""The first version of Keras whose safe mode lets no file run a program."""


def read_variables(path: Path, key: str | None = None) -> Found:
    """The variables in a file, and remarks.

    Args:
        path: The file; its ending says what it is.
        key: The entry of a torch checkpoint in which the weights are, with dots for entries of entries; None: the
            only one that can be it.

    Raises:
        ConfigError: No such kind of file is known, its framework is not installed, or there is no such entry.
        WeightsTypeError: The file is damaged, or holds no weights.
    """
    kind = path.suffix.lower()
    if key is not None and kind not in TORCH:
        raise ConfigError(f"--key is for checkpoints of torch ({', '.join(TORCH)}), not for {path.name}")
    if kind in TORCH:
        return _torch(path, key)
    if kind not in READERS:
        known = ", ".join((*READERS, *TORCH))
        raise ConfigError(f"{path.name}: no such file is known; known are {known}")
    return READERS[kind](path)


def _safetensors(path: Path) -> Found:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise WeightsTypeError(f"{path.name} is no .safetensors file: its header would have {length} bytes")
        try:
            header = json.loads(file.read(length))
            entries = {name: (e["dtype"], tuple(map(int, e["shape"]))) for name, e in header.items() if name != META}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsTypeError(f"{path.name} is no .safetensors file: {text_of(error)}") from error
    variables = [_of_header(name, shape, SAFETENSORS.get(code, code)) for name, (code, shape) in entries.items()]
    return variables, []


def _numpy(path: Path) -> Found:
    try:
        held = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix.lower() == ".npy" else None)
        if isinstance(held, np.ndarray):
            weights = {path.stem: held}
        else:
            with held:
                weights = dict(held)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise WeightsTypeError(
            f"{path.name} is no {path.suffix} file of arrays, or holds Python objects, which would have to be unpickled"
        ) from error
    remarks = []
    halves = [name for name, array in weights.items() if array.dtype == "V2"]
    if halves:
        remarks.append(f"{listed(halves)}: two-byte values without a dtype, taken for bfloat16")
        weights |= {name: weights[name].view(BFLOAT16) for name in halves}
    return _of_model(weights, path), remarks


def _keras(path: Path) -> Found:
    keras = _imported("keras", path)
    if tuple(map(int, re.findall(r"\d+", keras.__version__)[:3])) < SAFE_KERAS:
        raise ConfigError(
            f"{path.name} is not loaded by Keras {keras.__version__}, whose safe mode lets files run programs: install "
            f"Keras {'.'.join(map(str, SAFE_KERAS))} or later, or give what model.save_weights('x.weights.h5') writes"
        )
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, OSError, KeyError) as error:  # a class of the user's own, or no such file
        raise WeightsTypeError(
            f"{path.name} cannot be read: {text_of(error)} (of a model in Python, fl.describe(model) tells the same)"
        ) from error
    return _of_model(model, path), []


def _hdf5(path: Path) -> Found:
    """The arrays of weights in a file of Keras, by their names there; a whole model in it is not loaded."""
    h5py, found = _imported("h5py", path), []

    def visit(name: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset):
            found.append(_of_header(name, tuple(entry.shape), str(entry.dtype)))

    try:
        with h5py.File(path) as file:
            whole = file.get("model_weights")  # beside it are the settings and the optimizer of a whole model
            (file if whole is None else whole).visititems(visit)
    except (OSError, AttributeError) as error:
        raise WeightsTypeError(f"{path.name} cannot be read: {text_of(error)}") from error
    if not found:
        raise WeightsTypeError(f"{path.name} holds no arrays")
    remark = "Names are those in the file. fl.get_weights has other names, which only the model knows: variable.path."
    return found, [remark]


def _torch(path: Path, key: str | None) -> Found:
    torch = _imported("torch", path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise WeightsTypeError(
            f"{path.name} is damaged, or holds more than tensors, as after torch.save(model), and is not unpickled, "
            "since that may run any program: save model.state_dict() instead"
        ) from error
    except EOFError as error:
        raise WeightsTypeError(f"{path.name} is cut off, or empty") from error
    except (RuntimeError, ValueError, KeyError) as error:
        if "TorchScript" in text_of(error):
            raise WeightsTypeError(
                f"{path.name} is a TorchScript archive, which holds a program: save model.state_dict() instead"
            ) from error
        raise WeightsTypeError(f"{path.name} is damaged: {type(error).__name__}: {text_of(error)}") from error
    return _entry(checkpoint, path, key, torch.Tensor)


def _entry(checkpoint: Any, path: Path, key: str | None, tensor: type) -> Found:
    """The variables of the one `state_dict` in a checkpoint, or of the one that is asked for."""
    if key is None and isinstance(checkpoint, dict) and {*checkpoint} == {"state", "param_groups"}:
        return _of_model(checkpoint, path), ["This is the state of an optimizer."]
    entries = dict(_state_dicts(checkpoint, "", tensor))
    if key is not None:
        if key not in entries:
            raise ConfigError(f"--key {key}: {path.name} has weights in {listed(filter(None, entries)) or 'no entry'}")
        return _of_model(entries[key], path), []
    if not entries:
        kind = type(checkpoint).__name__
        raise WeightsTypeError(f"{path.name} holds no state_dict: it is a {kind}")
    if len(entries) > 1:
        raise ConfigError(f"{path.name} has weights in several entries: {listed(entries)}; choose one with --key")
    ((name, weights),) = entries.items()
    remarks = [f"Entry {name!r} of the checkpoint, which has {listed(map(str, checkpoint))}."] if name else []
    return _of_model(weights, path), remarks


def _state_dicts(value: Any, name: str, tensor: type) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parts of a checkpoint that are a `state_dict` each, by the names of the entries that lead to them."""
    if not isinstance(value, Mapping) or "param_groups" in value:  # which only an optimizer has
        return
    if value and any(isinstance(part, tensor) for part in value.values()):
        yield name, value
        return
    for key, part in value.items():
        yield from _state_dicts(part, f"{name}.{key}" if name else str(key), tensor)


def _of_header(name: str, shape: tuple[int, ...], kind: str) -> Variable:
    """A variable of which a file tells the name, the shape and the dtype alone."""
    dtype, problem = averageable(kind, name)
    role = None if problem else role_of_any(re.split("[./]", name)[-1], shape, dtype, trained=False)
    return Variable(name, shape, dtype, None, None, role, name, problem)


def _of_model(model: Any, path: Path) -> list[Variable]:
    if isinstance(model, Mapping) and not model:
        raise WeightsTypeError(f"{path.name} holds no arrays")
    found = adapter_of(model).variables(model)
    if isinstance(model, Mapping) and all(variable.name in model for variable in found):  # in the order of the file
        order = {name: place for place, name in enumerate(model)}
        found.sort(key=lambda variable: order[variable.name])
    return found


def _imported(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{path.name} can be read only where {module} is installed: {text_of(error)}") from error


META = "__metadata__"
READERS = {".safetensors": _safetensors, ".npz": _numpy, ".npy": _numpy, ".keras": _keras, ".h5": _hdf5}
"""By the ending of the file."""
TORCH = (".pt", ".pth", ".bin", ".ckpt")
