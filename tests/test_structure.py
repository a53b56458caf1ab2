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

# A module imports only from its own part and from layers above: parts of one layer never import one another.
LAYERS = (
    ("limits",),
    ("errors",),
    ("prefixes", "ties"),
    ("hints",),
    ("arguments", "environment", "disk", "weights", "events"),
    ("npy", "values", "policies"),
    ("contribution",),
    ("kernels", "adapters", "model_meta", "protos"),
    ("numproto", "durable"),
    ("aggregation",),
    ("lora", "components"),
    ("handlers",),
    ("client",),
    ("server",),
    ("pictures", "integrations"),
    ("simulation", "benchmark"),
    ("cli",),
)

NOT_LOADED = (*FRAMEWORKS, "sklearn", "matplotlib", "rich", "typer", "numba", "numexpr")


def layer_of(part: str) -> int:
    for number, parts in enumerate(LAYERS):
        if part in parts:
            return number
    raise AssertionError(f"fed_learn.{part} is in no layer")


MODULES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
"""Name → file of every module of the package."""


def imports_of(name: str) -> set[str]:
    """The modules of the package that one imports, wherever in the file, and be it for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fed_learn":
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {module if module in MODULES else str(node.module) for module in modules}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found - {name}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "fed_learn"])
def test_a_module_imports_only_from_layers_above_its_own(name: str) -> None:
    part = name.split(".")[1]
    for other in {module.split(".")[1] for module in imports_of(name) if module != "fed_learn"} - {part}:
        assert layer_of(other) < layer_of(part), f"{name} imports fed_learn.{other} from beside or below it"


def test_the_page_on_the_design_has_the_same_layers() -> None:
    page = (SOURCE.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    assert " · ".join(", ".join(parts) for parts in LAYERS) in " ".join(page.split())


def test_every_part_of_a_layer_is_there() -> None:
    assert {part for parts in LAYERS for part in parts} == {
        name.split(".")[1] for name in MODULES if name != "fed_learn"
    }


def test_no_modules_import_one_another_in_a_circle() -> None:
    left = {name: imports_of(name) for name in MODULES}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"each of these imports another of them: {sorted(left)}"


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
    builtin = (ValueError, TypeError, KeyError, RuntimeError, OverflowError, OSError, ExceptionGroup)
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
