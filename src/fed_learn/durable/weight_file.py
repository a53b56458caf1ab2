"""A weight dict as a safetensors file, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed_learn.disk import written_beside
from fed_learn.errors import StateError
from fed_learn.weights import FrozenWeights, WeightDict


def check_installed() -> None:
    """Raises if files cannot be written.

    Raises:
        ImportError: safetensors is not installed (extra `files`).
    """
    import safetensors  # noqa: F401


def serialized(weights: WeightDict, about: Mapping[str, object]) -> bytes:
    """A weight dict in the format of safetensors.

    Args:
        weights: A weight dict.
        about: What to tell about it: JSON in the file's metadata, under `fed_learn`.

    Raises:
        ValueError: A variable has the name that the format reserves.
    """
    from safetensors.numpy import save as serialize

    # One key of metadata only: the order of several would differ from run to run, and the bytes with it.
    if "__metadata__" in weights:
        raise ValueError("a variable named '__metadata__' cannot be stored: safetensors keeps that name for itself")
    # It writes the buffer as it lies: frozen weights are contiguous and in native byte order.
    data: bytes = serialize(dict(FrozenWeights(weights)), {"fed_learn": json.dumps(about, sort_keys=True)})
    return data


def write_weights(path: Path, weights: WeightDict) -> None:
    """Writes a weight dict to a file, which is there whole or as it was, whatever happens in between.

    Raises:
        OSError: It cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    about = {"fed_learn": json.dumps({"names": list(weights)})}
    with written_beside(path) as temporary:
        try:
            save_file(dict(FrozenWeights(weights)), temporary, about)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def read_weights(path: Path) -> FrozenWeights:
    """The weight dict of a file, in memory of its own, read-only, in the order in which it was given.

    Raises:
        StateError: It is no whole safetensors file.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path.stat()  # a file that is not there is an error of the system, with its name
    try:
        with safe_open(path, "np") as file:
            names: list[str] = json.loads((file.metadata() or {})["fed_learn"])["names"]
            arrays: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if sorted(arrays) != sorted(names):
                raise ValueError("its names are not those that it says")
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateError(f"{path} is damaged: {error}", path=str(path)) from error
    return FrozenWeights.adopt({name: arrays[name] for name in names})
