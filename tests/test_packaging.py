"""Installing from a clean copy of the project: the README's command, wheels, and machines without a compiler."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that belong to the project, without anything that a build left behind."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(
        ".git",
        "*.so",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
        ".hypothesis",
        ".benchmarks",
        "_native.c",
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


def wheel_of(checkout: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(out)],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_command_of_the_readme_installs_and_runs_in_a_fresh_environment(checkout: Path, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = "pip install '.[demo]' && fed-learn simulate"
    assert f"```sh\n{command}\n```" in readme
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path, "FED_LEARN_REQUIRE_NATIVE": "1", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "Best model" in done.stdout
    assert "native" in done.stdout
    assert (checkout / "fed-learn-job" / "best.safetensors").stat().st_size > 30_000


def test_the_wheel_serves_python_3_11_and_all_after_it(checkout: Path, tmp_path: Path) -> None:
    done = wheel_of(checkout, tmp_path / "wheels", FED_LEARN_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("fed_learn/kernels/_native.abi3") for name in names)
    assert "fed_learn/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} <= {"fed_learn"}


def test_without_a_compiler_it_installs_and_works_on_numpy_and_says_why(checkout: Path, tmp_path: Path) -> None:
    done = wheel_of(checkout, tmp_path / "wheels", CC="/nonexistent/cc", FED_LEARN_REQUIRE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import fed_learn as fl, numpy as np; print(fl.__file__); print(fl.kernels.available());"
        "print(fl.weighted_average([{'w': np.ones(2)}, {'w': np.zeros(2)}])); print(fl.kernels.unavailable())\n"
        "try:\n    fl.kernels.resolve('native')\nexcept fl.KernelUnavailableError as error:\n    print(error)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    ).stdout.splitlines()
    assert printed[0].startswith(str(tmp_path / "site"))
    assert printed[1:3] == ["('numpy',)", "{'w': array([0.5, 0.5])}"]
    assert "the C extension was not built" in printed[3]
    assert "FED_LEARN_REQUIRE_NATIVE=1" in printed[4]


def test_a_failed_build_is_an_error_where_the_extension_is_required(checkout: Path, tmp_path: Path) -> None:
    done = wheel_of(checkout, tmp_path / "wheels", CC="/nonexistent/cc", FED_LEARN_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "/nonexistent/cc" in done.stdout + done.stderr


def test_the_switch_for_requiring_the_extension_takes_0_and_1_only(checkout: Path, tmp_path: Path) -> None:
    done = wheel_of(checkout, tmp_path / "wheels", FED_LEARN_REQUIRE_NATIVE="yes")
    assert done.returncode != 0
    assert "FED_LEARN_REQUIRE_NATIVE must be 0 or 1, not 'yes'" in done.stdout + done.stderr
