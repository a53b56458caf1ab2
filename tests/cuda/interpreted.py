"""A copy of the fused kernels that Triton interprets on the CPU, where they can be compared without a GPU.

Triton decides when a module is imported whether its kernels are interpreted, so the module is loaded a second time.
"""

import functools
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import fed_learn
import fed_learn.kernels.torch as torch_kernel
import fed_learn.kernels.unfused as unfused


def no_triton() -> str | None:
    """Why Triton cannot be imported here; None: it can, or has been."""
    if "triton" in sys.modules:
        return None
    if "tensorflow" in sys.modules:
        return "Triton cannot be imported after TensorFlow: the process would crash"
    return "Triton is not installed" if find_spec("triton") is None else None


@functools.cache
def interpreted() -> ModuleType:
    """The module `fed_learn.kernels.fused` with interpreted kernels."""
    import triton  # noqa: F401 - which cannot be imported while its kernels are to be interpreted

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(sys.modules, "fed_learn.kernels.fused_kernels", _copy_of("fused_kernels"))
        return _copy_of("fused")


def _copy_of(name: str) -> ModuleType:
    path = Path(fed_learn.__file__).parent / "kernels" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_interpreted", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def fused_on_devices() -> Iterator[ModuleType]:
    """Within this context the torch kernel takes the interpreted operations on CUDA devices, real or pretended."""
    module = interpreted()
    with np.errstate(all="ignore"), _chosen(module):  # of the interpreter
        yield module


@contextmanager
def unfused_on_devices() -> Iterator[None]:
    """Within this context the torch kernel takes plain operations on CUDA devices, and finds out nothing about them."""
    with _chosen(unfused):
        yield


@contextmanager
def _chosen(module: ModuleType) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_kernel, "_arithmetic", lambda device: (module, None))
        yield
