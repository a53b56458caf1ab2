"""Implementations of the arithmetic, and which one is used.

`auto` takes `native` where the extension was built, else `numpy`; for tensors that are not on the CPU it takes `torch`,
the only one that can. All kernels give the same bits, so the choice is one of speed. It is made by, in this order: the
`kernel=` argument of a call, `use(name)`, `FED_LEARN_KERNEL`, auto. Nothing falls back silently: a kernel that is named
and cannot run is an error.

Example:
    >>> import fed_learn as fl
    >>> with fl.kernels.use("numpy"):
    ...     fl.kernels.current()
    'numpy'
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

from fed_learn.errors import KernelNameError, KernelUnavailableError
from fed_learn.kernels.base import Kernel, Segment
from fed_learn.kernels.threads import get_num_threads, set_num_threads

__all__ = [
    "NAMES",
    "Kernel",
    "Segment",
    "available",
    "current",
    "current_instruction_set",
    "get_num_threads",
    "instruction_sets",
    "requested",
    "resolve",
    "set_num_threads",
    "unavailable",
    "use",
    "use_instruction_set",
]

_forced: ContextVar[str | None] = ContextVar("fed_learn_kernel", default=None)


def _load_native() -> Kernel:
    try:
        from fed_learn.kernels.native import NativeKernel
    except ImportError as error:
        # Without --no-cache-dir pip takes the wheel that it built before, and asks for no compiler.
        reason = (
            f"the C extension was not built when fed-learn was installed ({error}), most likely for want of a C "
            "compiler. With one, install again from where it came from; in a checkout: FED_LEARN_REQUIRE_NATIVE=1 "
            "pip install --no-cache-dir --force-reinstall --no-deps . (builds the extension, or says why it cannot)"
        )
        raise KernelUnavailableError(f"kernel 'native' is not available: {reason}", reason=reason) from error
    return NativeKernel()


def _load_numpy() -> Kernel:
    from fed_learn.kernels.numpy import NumpyKernel

    return NumpyKernel()


def _load_torch() -> Kernel:
    from fed_learn.kernels.torch import TorchKernel

    return TorchKernel()


# In the order of preference.
_LOADERS: dict[str, Callable[[], Kernel]] = {"native": _load_native, "numpy": _load_numpy, "torch": _load_torch}

NAMES = tuple(_LOADERS)
"""All kernels there are, whether they can run here or not."""


@functools.cache
def _attempt(name: str) -> Kernel | KernelUnavailableError:
    try:
        return _LOADERS[name]()
    except KernelUnavailableError as error:
        return error


def _load(name: str) -> Kernel:
    if name == "torch" and "torch" not in sys.modules:  # which may change
        missing = find_spec("torch") is None
        reason = "torch is not installed" if missing else "it is there once torch has been imported"
        raise KernelUnavailableError(f"kernel 'torch' is not available: {reason}", reason=reason)
    found = _attempt(name)
    if isinstance(found, KernelUnavailableError):
        raise found.with_traceback(None)
    return found


def unavailable() -> dict[str, str]:
    """The kernels that cannot run here, with the reason."""
    reasons = {}
    for name in _LOADERS:
        try:
            _load(name)
        except KernelUnavailableError as error:
            reasons[name] = str(error.reason)
    return reasons


def available() -> tuple[str, ...]:
    """Names of the kernels that can run here, the preferred one first.

    Example:
        >>> "numpy" in available()
        True
    """
    missing = unavailable()
    return tuple(name for name in _LOADERS if name not in missing)


def _preferred() -> Kernel:
    """The first kernel that can run here: `available` asks for all of them, which takes as long as a small mean."""
    for name in _LOADERS:
        found = _attempt(name)
        if not isinstance(found, KernelUnavailableError):
            return found
    raise AssertionError("numpy is always there")


def requested(kernel: str | None = None) -> str:
    """The name that is asked for, maybe `"auto"`: that of the argument, else of `use`, else of `FED_LEARN_KERNEL`.

    Raises:
        KernelNameError: No kernel has this name; says which have.
    """
    source, name = "kernel", kernel
    if name is None:
        name = _forced.get()
    if name is None:
        source, name = "FED_LEARN_KERNEL", os.environ.get("FED_LEARN_KERNEL") or "auto"
    valid = ("auto", *_LOADERS)
    if name not in valid:
        raise KernelNameError(f"{source} {name!r} is unknown; valid are {', '.join(valid)}", valid=valid)
    return name


def resolve(kernel: str | None = None, *, device: str = "cpu") -> Kernel:
    """The kernel to use: the one named, else the one set by `use`, else by `FED_LEARN_KERNEL`, else auto.

    Args:
        kernel: A name, `"auto"` or None.
        device: Where the numbers are.

    Raises:
        KernelNameError: No kernel has this name; says which have.
        KernelUnavailableError: It cannot run here, or not on that device; says why.
    """
    name = requested(kernel)
    if device == "cpu":
        return _preferred() if name == "auto" else _load(name)
    if name not in ("auto", "torch"):
        reason = f"it runs on the CPU, and the tensors are on {device}; valid are auto, torch"
        raise KernelUnavailableError(f"kernel {name!r} cannot be used: {reason}", reason=reason)
    return _load("torch")


def current() -> str:
    """The name of the kernel that a call without `kernel=` uses now.

    Raises:
        KernelNameError, KernelUnavailableError: `FED_LEARN_KERNEL` names one that cannot be used.
    """
    return resolve().name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Makes calls within the `with` block use a kernel.

    The choice belongs to the current thread or task and is looked up once at each call, in the caller, so the
    threads that a call starts follow it.

    Args:
        name: A kernel's name, or `"auto"`.

    Raises:
        KernelNameError: No kernel has this name.
        KernelUnavailableError: It cannot run here.
    """
    resolve(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def instruction_sets() -> tuple[str, ...]:
    """The variants of the native kernel that this machine can run, the widest first; the first one is used.

    `FED_LEARN_INSTRUCTION_SET` or `use_instruction_set` chooses another; all give the same bits.

    Raises:
        KernelUnavailableError: There is no native kernel here.
    """
    _load("native")
    from fed_learn.kernels.native import SETS

    return tuple(SETS)


def current_instruction_set() -> str:
    """The variant of the native kernel that is used now.

    Raises:
        KernelNameError: `FED_LEARN_INSTRUCTION_SET` names one that is not usable here.
        KernelUnavailableError: There is no native kernel here.
    """
    _load("native")
    from fed_learn.kernels.native import current_set

    return current_set()


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Makes the native kernel use a variant within the `with` block, as `use` does for kernels.

    Args:
        name: One of `instruction_sets()`.

    Raises:
        KernelNameError: This machine or build has no such variant.
        KernelUnavailableError: There is no native kernel here.
    """
    _load("native")
    from fed_learn.kernels.native import use_set

    with use_set(name):
        yield
