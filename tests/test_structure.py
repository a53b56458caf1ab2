"""The layers of the package, its public names, and that importing it loads no framework."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FRAMEWORKS

import fed_learn as fl

pytestmark = pytest.mark.quick

SOURCE = Path(__file__).parents[1] / "src" / "fed_learn"

# A module imports only from layers above its own. Within a layer: only where the layer says so.
LAYERS = (
    ("errors", "limits"),
    ("arguments", "environment", "disk", "npy", "weights", "values", "contribution", "events"),
    ("kernels", "adapters", "model_meta", "numproto", "protos"),
    ("aggregation",),
    ("handlers", "components", "server", "client"),
    ("pictures", "integrations", "simulation", "benchmark", "cli"),
)
SEPARATE = {"kernels", "adapters", "model_meta"}
"""Never import one another, although they share a layer."""


NOT_LOADED = (*FRAMEWORKS, "sklearn", "matplotlib", "rich", "typer", "numba", "numexpr")


def layer_of(part: str) -> int:
    for number, parts in enumerate(LAYERS):
        if part in parts:
            return number
    raise AssertionError(f"fed_learn.{part} is in no layer")


def imports_of(path: Path) -> set[str]:
    """The parts of the package that a module imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "fed_learn" else [f"fed_learn.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("fed_learn.")}
    return found


MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_from_layers_above_its_own(path: Path) -> None:
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for other in imports_of(path) - {part, "__version__"}:
        assert layer_of(other) <= layer_of(part), f"fed_learn.{part} imports fed_learn.{other} from below"
        assert not {part, other} <= SEPARATE, f"fed_learn.{part} imports fed_learn.{other} beside it"


def test_importing_the_package_loads_no_framework() -> None:
    code = f"import sys, fed_learn; print([m for m in {NOT_LOADED!r} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_every_public_name_exists_and_is_documented() -> None:
    assert sorted(fl.__all__) == fl.__all__
    for name in fl.__all__:
        assert getattr(fl, name).__doc__, name


def test_every_error_class_is_public_and_inherits_a_builtin() -> None:
    errors = importlib.import_module("fed_learn.errors")
    classes = [
        c
        for c in vars(errors).values()
        if isinstance(c, type) and issubclass(c, fl.FedLearnError) and c is not fl.FedLearnError
    ]
    builtin = (ValueError, TypeError, KeyError, RuntimeError, OverflowError, ExceptionGroup)
    assert len(classes) >= 20
    for cls in classes:
        assert getattr(fl, cls.__name__) is cls
        assert issubclass(cls, builtin) or cls is fl.ContributionError


def test_the_import_paths_of_the_reference_page_work() -> None:
    for module, name in (
        ("fed_learn.handlers", "Handler"),
        ("fed_learn.handlers", "fire_event"),
        ("fed_learn.handlers", "ModelSelectionHandler"),
        ("fed_learn.handlers", "ServerValidationHandler"),
        ("fed_learn.handlers.handler", "Handler"),
        ("fed_learn.handlers.handler", "fire_event"),
        ("fed_learn.model_meta", "FLContext"),
        ("fed_learn.components.model_evaluator", "ModelEvaluator"),
    ):
        assert getattr(importlib.import_module(module), name) is getattr(fl, name)
