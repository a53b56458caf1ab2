"""A copy of the fused kernels that Triton interprets on the CPU, where they can be compared without a GPU.

Triton decides when a module is imported whether its kernels are interpreted, so the module is loaded a second time.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np

import fed_learn


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
    path = Path(fed_learn.__file__).parent / "kernels" / "fused.py"
    spec = importlib.util.spec_from_file_location("fused_interpreted", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        spec.loader.exec_module(module)
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    return module


@contextmanager
def fused_on_devices() -> Iterator[ModuleType]:
    """Within this context the torch kernel takes the interpreted kernels on CUDA devices, real or pretended."""
    import fed_learn.kernels.torch as torch_kernel

    module, before = interpreted(), torch_kernel._arithmetic
    torch_kernel._arithmetic = lambda device: (module, None)  # type: ignore[assignment]
    try:
        with np.errstate(all="ignore"):  # of the interpreter
            yield module
    finally:
        torch_kernel._arithmetic = before
