"""The code is typed and clean, and the examples in its docstrings run."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fed_learn

ROOT = Path(__file__).parents[1]
MODULES = [
    "fed_learn",
    *(m.name for m in pkgutil.walk_packages(fed_learn.__path__, "fed_learn.") if "_native" not in m.name),
]
for needs_triton in ("fed_learn.kernels.fused", "fed_learn.kernels.fused_kernels"):
    MODULES.remove(needs_triton)  # which cannot be imported after TensorFlow


@pytest.mark.parametrize(
    "command",
    [
        ["mypy"],
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
    ],
    ids=" ".join,
)
def test_checker_finds_nothing(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_methods_have_a_docstring_of_their_own_or_inherit_one(name: str) -> None:
    module = importlib.import_module(name)
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == name]
    for cls in (c for c in classes if not c.__name__.startswith("_")):
        for method, found in vars(cls).items():
            own = isinstance(found, property) or (inspect.isfunction(found) and found.__name__ == method)
            assert method.startswith("_") or not own or inspect.getdoc(getattr(cls, method)), f"{cls}.{method}"


def test_there_are_examples_in_docstrings() -> None:
    finder = doctest.DocTestFinder()
    examples = sum(bool(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert examples >= 25
