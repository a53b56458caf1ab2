"""The quick route, `pytest -m quick`: the files that have no quick test are not read, and no framework is imported.

A file says that its tests are quick, by `pytestmark`, and which of them are not, by `not_quick`.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import pytest

FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "flwr", "nvflare")


class NoFramework(MetaPathFinder, Loader):
    """Finds a framework where it is installed, and refuses to load it: a quick test that needs it fails."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in FRAMEWORKS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(f"a quick test does without {module.__name__}")


def is_quick(config: pytest.Config) -> bool:
    return bool(config.option.markexpr == "quick")


def pytest_configure(config: pytest.Config) -> None:
    if is_quick(config):
        sys.meta_path.insert(0, NoFramework())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out files by their text: pytest would import each of them, and what it imports, to find its marks."""
    if not is_quick(config) or collection_path.suffix != ".py":
        return None
    return "pytest.mark.quick" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_quick(config):
        left_out = [item for item in items if item.get_closest_marker("not_quick")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("not_quick")]
