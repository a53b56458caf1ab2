"""The C kernels by themselves: without fault under sanitizers, and the same bits from every compiler and architecture.

`tests/c/test_kernels.c` compares each function of `csrc/fl_kernels.h` with a reference of its own and prints a hash of
all results per instruction set. Here it is built in several ways and run.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "csrc").glob("fl_*.c")), ROOT / "tests" / "c" / "test_kernels.c"]
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-Wno-psabi")  # of csrc/build_kernels.py
WARNINGS = ("-Wall", "-Wextra", "-Werror")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the program needs posix_memalign")


@dataclass(frozen=True)
class Build:
    """How the program is built and run.

    Attributes:
        compiler: The command.
        options: Added to those of every build, and stronger.
        emulators: Commands that run the program, of which one is enough; none where it runs by itself.
    """

    compiler: str
    options: tuple[str, ...] = ()
    emulators: tuple[str, ...] = ()


BUILDS = {
    "gcc": Build("gcc"),
    "sanitizers": Build("gcc", ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")),
    # As for compilers without vector extensions.
    "plain numbers": Build("gcc", ("-DFL_SCALAR=1",)),
    "clang": Build("clang"),
    "aarch64": Build("aarch64-linux-gnu-gcc", ("-static",), ("qemu-aarch64", "qemu-aarch64-static")),
}

Hashes: TypeAlias = dict[str, str]
"""By instruction set."""


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def build_and_run(build: Build, sources: list[Path], options: tuple[str, ...], directory: Path) -> str:
    emulator = [found for command in build.emulators if (found := shutil.which(command))][:1]
    program = str(directory / "program")
    compiling = [build.compiler, *options, *build.options, f"-I{ROOT / 'csrc'}"]
    objects = [str(directory / f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source, out: run([*compiling, "-c", str(source), "-o", out]), sources, objects))
    run([build.compiler, *build.options, *objects, "-o", program, "-lm"])
    return run([*emulator, program])


def missing(build: Build, directory: Path) -> str | None:
    """What this machine lacks for a build, if anything: a compiler, an emulator, a run-time library of a sanitizer."""
    if shutil.which(build.compiler) is None:
        return f"{build.compiler} is not installed"
    if build.emulators and not any(map(shutil.which, build.emulators)):
        return f"none of {', '.join(build.emulators)} is installed"
    nothing = directory / "nothing.c"
    nothing.write_text("int main(void) { return 0; }\n")
    try:
        build_and_run(build, [nothing], (), directory)
    except AssertionError as error:
        return f"{build.compiler} {' '.join(build.options)} does not even build an empty program: {error}"
    return None


@pytest.fixture(scope="module")
def hashes_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Hashes]:
    """What the program prints as built under a name, or a skip; it is built and run once."""

    @functools.cache
    def hashes(name: str) -> Hashes:
        build = BUILDS[name]
        directory = tmp_path_factory.mktemp(name.replace(" ", "-"))
        if reason := missing(build, directory):
            # What CI asked for and cannot be found fails.
            if build.emulators and os.environ.get("FED_LEARN_REQUIRE_CROSS") == "1":
                pytest.fail(reason)
            pytest.skip(reason)
        printed = build_and_run(build, SOURCES, (*FLAGS, *WARNINGS), directory)
        return dict(line.rsplit(maxsplit=1) for line in printed.splitlines())

    return hashes


@pytest.mark.parametrize("name", BUILDS)
def test_every_function_is_right_on_every_instruction_set(name: str, hashes_of: Callable[[str], Hashes]) -> None:
    assert hashes_of(name)


def test_every_build_gives_the_same_bits(hashes_of: Callable[[str], Hashes]) -> None:
    found = {}
    for name in BUILDS:
        try:
            found[name] = hashes_of(name)
        except pytest.skip.Exception:
            continue
    if len(found) < 2:
        pytest.skip("there is but one build to compare")
    assert len({bits for hashes in found.values() for bits in hashes.values()}) == 1, found


def test_sanitizers_see_every_instruction_set(hashes_of: Callable[[str], Hashes]) -> None:
    assert hashes_of("sanitizers").keys() == hashes_of("gcc").keys()


def test_the_options_are_those_of_the_extension() -> None:
    builder = (ROOT / "csrc" / "build_kernels.py").read_text(encoding="utf-8")
    assert ", ".join(f'"{flag}"' for flag in FLAGS) in builder
