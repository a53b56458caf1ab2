"""Where it is measured: processor, memory, threads and versions."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from fed_learn import __version__, kernels

DISTRIBUTIONS = ("numpy", "ml-dtypes", "torch", "flwr", "nvflare", "numexpr", "numba")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def facts() -> dict[str, Any]:
    """What a reader needs to know to compare figures; None where the system does not tell.

    Raises:
        ValueError: A setting of the kernels in the environment is not valid.
    """
    native = "native" in kernels.available()
    return {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_bytes": _memory(),
        "transparent_huge_pages": _huge_pages(),
        "load": _load(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": kernels.get_num_threads(),
        "kernels": list(kernels.available()),
        "instruction_set": kernels.current_instruction_set() if native else None,
        "versions": {
            "fed-learn": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in DISTRIBUTIONS},
        },
    }


def _processor() -> str | None:
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _huge_pages() -> str | None:
    """One of always, madvise, never."""
    try:
        chosen = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())
    except OSError:
        return None
    return chosen[1] if chosen else None


def _load() -> float | None:
    """How many processes wanted to run in the last minute, on average."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):  # another system
        return None


def _version(distribution: str) -> str | None:
    """From the installed metadata, so that nothing is imported."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
