"""`fed-learn info`: what this installation can do on this machine."""

import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from fed_learn.errors import described

FRAMEWORKS = {
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton", "triton-windows"),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-gpu"),
    "keras": ("keras",),
    "jax": ("jax",),
    "flower": ("flwr",),
    "nvflare": ("nvflare",),
}
"""Framework → the distributions that bring it."""

INSTRUCTION_SETS = ("sse2", "avx", "avx2", "f16c", "fma", "avx512f", "neon", "asimd", "sve")


def info(
    devices: Annotated[
        bool, typer.Option("--devices", help="Import torch, and tell how tensors on each device are averaged.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Show version, kernels, instruction sets, threads and the frameworks found (none is imported)."""
    facts = collect(devices=devices)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("fed-learn", f"{facts['version']}, Python {facts['python']}, {facts['platform']}")
    for name, kernel in facts["kernels"].items():
        state = "available" if kernel["available"] else f"not available: {kernel['reason']}"
        table.add_row(f"kernel {name}", state + (" (current)" if name == facts["kernel"] else ""))
    if facts["native_variants"]:
        table.add_row("native variants", ", ".join(facts["native_variants"]) + f" (current: {facts['native_variant']})")
    table.add_row("processor", " ".join(facts["instruction_sets"]) or "unknown")
    table.add_row("threads", f"{facts['threads'] or 'unknown, out'} of {facts['processors']} processors")
    for device in facts["devices"] or ():
        table.add_row(f"device {device['device']}", f"{device['name']}: averaged {device['averaged']}")
    if facts["devices"] == []:
        table.add_row("devices", "torch finds none but the CPU")
    for problem in facts["problems"]:
        table.add_row("problem", Text(problem, "red"))
    for name, version in facts["dependencies"].items():
        table.add_row(name, version)
    for name, version in facts["frameworks"].items():
        table.add_row(name, version or "not installed")
    for name, (meaning, value) in facts["environment"].items():
        table.add_row(name, Text(f"{value or 'not set'} ({meaning})"))
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def collect(*, devices: bool = False) -> dict[str, Any]:
    """The facts, as `--json` prints them; with `devices`, those of which torch tells as well."""
    from fed_learn import __version__, kernels

    problems: list[str] = []
    found = _devices(problems) if devices else None
    reasons = kernels.unavailable()

    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (ValueError, RuntimeError) as error:  # a bad setting is what this command is asked about
            problems.append(str(error))
            return None

    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "kernel": ask(kernels.current),
        "kernels": {name: {"available": name not in reasons, "reason": reasons.get(name)} for name in kernels.NAMES},
        "native_variants": [] if "native" in reasons else list(kernels.instruction_sets()),
        "native_variant": None if "native" in reasons else ask(kernels.current_instruction_set),
        "instruction_sets": _instruction_sets(),
        "threads": ask(kernels.get_num_threads),
        "processors": os.cpu_count(),
        "devices": found,
        "problems": problems,
        "dependencies": {name: metadata.version(name) for name in ("numpy", "cffi", "ml-dtypes")},
        "frameworks": {name: _version(name, distributions) for name, distributions in FRAMEWORKS.items()},
        "environment": {
            "FED_LEARN_KERNEL": ("the kernel to use", os.environ.get("FED_LEARN_KERNEL")),
            "FED_LEARN_INSTRUCTION_SET": (
                "the variant of the native kernel",
                os.environ.get("FED_LEARN_INSTRUCTION_SET"),
            ),
            "FED_LEARN_NUM_THREADS": ("threads of a kernel", os.environ.get("FED_LEARN_NUM_THREADS")),
            "FED_LEARN_FUSED": ("fused operations on CUDA devices: 0, 1 or auto", os.environ.get("FED_LEARN_FUSED")),
        },
    }


def _devices(problems: list[str]) -> list[dict[str, str]] | None:
    """The devices that torch finds beside the CPU, and how tensors on them are averaged; None: it does not tell."""
    try:
        import torch

        found = [(kind, i) for kind in ("cuda", "xpu", "mps") for i in range(getattr(torch, kind).device_count())]
    except Exception as error:  # noqa: BLE001 - of libraries and drivers, which are what this is asked about
        problems.append(f"--devices: torch does not tell: {described(error)}")
        return None
    told = []
    for kind, i in found:
        facts = {"device": f"{kind}:{i}", "name": kind, "averaged": "unknown"}
        try:
            facts |= _device(kind, i)
        except Exception as error:  # noqa: BLE001 - as above
            problems.append(f"--devices: {kind}:{i}: {described(error)}")
        told.append(facts)
    return told


def _device(kind: str, index: int) -> dict[str, str]:
    """What a device is called, and how tensors on it are averaged."""
    import torch

    from fed_learn.adapters.torch_tensors import without_float64
    from fed_learn.kernels.torch import not_fused

    device = torch.device(kind, index)
    name = "Metal" if kind == "mps" else str(getattr(torch, kind).get_device_name(device))
    if without_float64(device):
        return {"name": name, "averaged": "by way of copies on the host, since it has no float64"}
    problem = not_fused(device)
    return {"name": name, "averaged": "there, fused" if problem is None else f"there, not fused: {problem}"}


def _version(module: str, distributions: tuple[str, ...]) -> str | None:
    """The version from the installed metadata: importing a framework takes seconds."""
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "installed, version unknown" if find_spec(module) is not None else None


def _instruction_sets() -> list[str]:
    """Those of the processor that matter to kernels, as far as the system tells."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    flags: set[str] = set()
    for entry in cpuinfo.splitlines():
        key, _, value = entry.partition(":")
        if key.strip().lower() in ("flags", "features"):
            flags |= set(value.split())
    return [name for name in INSTRUCTION_SETS if name in flags]
