"""The quick route: `pytest -m quick` reads no file that imports a framework, and none of its tests can import one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FRAMEWORKS

TESTS = Path(__file__).parent
COLLECTING = ["-m", "quick", "--collect-only", "-q", "-p", "no:cacheprovider", str(TESTS)]


@pytest.mark.quick
def test_collecting_the_quick_tests_imports_no_framework_and_their_run_cannot() -> None:
    code = f"""
import importlib, sys, pytest
assert pytest.main({COLLECTING!r}) == 0
print([name for name in {FRAMEWORKS!r} if name in sys.modules])
for name in {FRAMEWORKS!r}:
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    print(name, "can be imported")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = done.stdout.splitlines()
    assert collected[-1] == "[]"
    for subject in ("weighted_average", "kernels", "accumulator", "exact", "events", "structure"):
        assert any(f"test_{subject}.py::" in line for line in collected), subject


def test_the_frameworks_are_installed() -> None:
    # Otherwise the test above would prove nothing.
    for name in FRAMEWORKS:
        assert importlib.util.find_spec(name) is not None
