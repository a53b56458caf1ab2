"""What a machine without network needs of this project: wheels, made where there is a network and installed there."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = "3.12"
"""Of the machine that has the GPU. The project's own wheel serves all from 3.11 on; the one of cffi does not."""
BUILT_FROM = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "src")


def make(folder: Path) -> None:
    """Puts the wheels of this project, cffi and pycparser into a folder, and says how large it is."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        # Not in the checkout, where a build leaves its files.
        for name in BUILT_FROM:
            source = ROOT / name
            if source.is_dir():
                unwanted = shutil.ignore_patterns("*.so", "_native.c", "__pycache__", "*.egg-info")
                shutil.copytree(source, Path(temporary, name), ignore=unwanted)
            else:
                shutil.copy(source, temporary)
        _pip("wheel", "--no-deps", "--wheel-dir", str(folder), temporary, FED_LEARN_REQUIRE_NATIVE="1")
    tags = [f"{tag}_{platform.machine()}" for tag in ("manylinux2014", "manylinux_2_17", "manylinux_2_28")]
    platforms = [argument for tag in tags for argument in ("--platform", tag)]
    chosen = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, *platforms]
    _pip("download", *chosen, "--dest", str(folder), "cffi", "pycparser")
    files = sorted(folder.glob("*.whl"))
    for file in files:
        print(f"{file.stat().st_size / 2**20:6.2f} MiB  {file.name}")
    print(f"{sum(file.stat().st_size for file in files) / 2**20:6.2f} MiB  in {folder}")


def install(folder: Path, target: Path) -> None:
    """Installs the wheels of a folder where this process, and those that it starts, find them first.

    Raises:
        FileNotFoundError: There are none.
        ValueError: They are not those of this checkout, whose tests would not fit.
    """
    files = sorted(map(str, folder.glob("*.whl")))
    if not files:
        raise FileNotFoundError(f"no wheels in {folder}; --make-wheels makes them, where there is a network")
    _pip("install", "--quiet", "--no-index", "--no-deps", "--target", str(target), *files)
    source = ROOT / "src"
    names = [path.relative_to(source) for path in source.rglob("*.py")]
    others = [str(name) for name in names if not _same(source / name, target / name)]
    if others:
        some = ", ".join(others[:5])
        raise ValueError(f"the wheels are of another state than the checkout, make them again; others are: {some}")
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.read_bytes() == other.read_bytes()


def _pip(*arguments: str, **environment: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, env=os.environ | environment)
