"""Installing from a clean copy of the project: the README's command, wheels, and machines without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from flower_network import local_superlink

ROOT = Path(__file__).parents[1]
ADVICE = "FED_LEARN_REQUIRE_NATIVE=1 pip install --no-cache-dir --force-reinstall --no-deps ."
"""What the error message and `fed-learn info` say where the extension was not built."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that belong to the project, without anything that a build left behind."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(
        ".git",
        ".nox",
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


def test_the_commands_of_the_flower_page_run_the_app_in_a_fresh_environment(checkout: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "flower.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```sh\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)[0]
    assert commands.splitlines()[-1] == "flwr run examples/flower --stream"
    pinned = commands.replace("pip install", "pip install -c tests/constraints.txt")
    with local_superlink(tmp_path / "flwr") as settings:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # its python3 makes the environment
        done = subprocess.run(
            ["bash", "-euc", pinned],
            cwd=checkout,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **settings, "PATH": path, "PYTHONPATH": "", "FLWR_TELEMETRY_ENABLED": "0"},
        )
    assert done.returncode == 0, done.stdout + done.stderr
    scores = re.findall(r"^round (\d): 2 nodes, accuracy (0\.\d{3})$", done.stdout, flags=re.MULTILINE)
    assert [int(number) for number, _ in scores] == [1, 2, 3, 4, 5], done.stdout
    (best,) = re.findall(r"^best model: of round (\d), accuracy (0\.\d{3})$", done.stdout, flags=re.MULTILINE)
    assert best in scores
    assert best[1] == max(accuracy for _, accuracy in scores)
    assert float(best[1]) > 0.9
    assert f"\nfiles: {checkout / 'digits-job'}\n" in done.stdout
    assert "Traceback" not in done.stdout
    with np.load(checkout / "digits-job" / "best.npz") as kept:
        assert kept["hidden.weight"].shape == (64, 32)


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
    assert wheel.name.endswith("-py3-none-any.whl"), "under a native tag it would stand in for a native one"
    with zipfile.ZipFile(wheel) as archive:
        (about,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
        assert b"Root-Is-Purelib: true\nTag: py3-none-any\n" in archive.read(about)
        archive.extractall(tmp_path / "site")
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
    assert ADVICE in printed[3]
    assert ADVICE in printed[4]


def test_the_advice_for_a_missing_extension_works_although_pip_has_cached_a_wheel_without_it(
    checkout: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    sdist = "import os, setuptools.build_meta as b; os.makedirs('dist'); b.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", sdist], cwd=checkout, check=True, capture_output=True)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    source = f"'fed-learn @ {archive.as_uri()}'"  # by name, as from an index: only then pip looks into its cache

    def pip(command: str, **settings: str) -> subprocess.CompletedProcess[str]:
        path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        known = {**os.environ, "PIP_CACHE_DIR": str(tmp_path / "cache"), "PATH": path, "PYTHONPATH": "", **settings}
        return subprocess.run(command, shell=True, cwd=checkout, env=known, capture_output=True, text=True, check=False)

    def native() -> bool:
        return any(environment.glob("lib/*/site-packages/fed_learn/kernels/_native.abi3.*"))

    broken = {"CC": "/nonexistent/cc"}
    done = pip(f"pip install --no-deps {source}", FED_LEARN_REQUIRE_NATIVE="0", **broken)
    assert done.returncode == 0, done.stderr
    assert "fed_learn-0.1.0-py3-none-any.whl" in pip("pip cache list").stdout
    assert pip(f"pip install --no-deps --force-reinstall {source}").returncode == 0
    assert not native(), "a compiler alone does not help: it is the cached wheel again"
    advised = ADVICE.removesuffix(".") + source
    failed = pip(advised, **broken)
    assert failed.returncode != 0
    assert "/nonexistent/cc" in failed.stdout + failed.stderr, "it says why"
    done = pip(advised)
    assert done.returncode == 0, done.stderr
    assert native()


def test_a_failed_build_is_an_error_where_the_extension_is_required(checkout: Path, tmp_path: Path) -> None:
    done = wheel_of(checkout, tmp_path / "wheels", CC="/nonexistent/cc", FED_LEARN_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "/nonexistent/cc" in done.stdout + done.stderr


def test_the_switch_for_requiring_the_extension_takes_0_and_1_only(checkout: Path, tmp_path: Path) -> None:
    done = wheel_of(checkout, tmp_path / "wheels", FED_LEARN_REQUIRE_NATIVE="yes")
    assert done.returncode != 0
    assert "FED_LEARN_REQUIRE_NATIVE must be 0 or 1, not 'yes'" in done.stdout + done.stderr
