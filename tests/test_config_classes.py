"""Which classes a configuration may have called: each is checked before it is, and before its arguments are built."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fed_learn as fl
from fed_learn.components.config import build_component
from fed_learn.server.config import ServerConfig
from fed_learn.simulation.demo import build_demo

KNOWN: dict[str, type] = {"ServerValidationHandler": fl.ServerValidationHandler}
Build = Callable[[dict[str, Any]], Any]


class Plain:
    """A class of the user's own, which is nothing in particular."""

    def __init__(self, inner: Any = None) -> None:
        self.inner = inner


class Quacking:
    """What a handler, an aggregator and a filter need, derived from nothing."""

    def handle_event(self, event: str, ctx: Any) -> None:
        pass

    def rollback(self, ctx: Any) -> None:
        pass

    def process(self, accumulator: Any, fl_ctx: Any) -> bool:
        return False


def a_handler(entry: dict[str, Any]) -> Any:
    return build_demo(num_clients=2, num_rounds=1, configured_handlers=[entry]).server.settings.handlers[0]


def an_aggregator(entry: dict[str, Any]) -> Any:
    return ServerConfig.of({"aggregator": entry}).build_aggregator()


def a_filter(entry: dict[str, Any]) -> Any:
    return ServerConfig.of({"filters": [entry]}).build_filters()[0]


def an_argument(entry: dict[str, Any]) -> Any:
    arguments = {"evaluator": entry, "num_rounds_per_valid": 1}
    return build_component({"name": "ServerValidationHandler", "args": arguments}, KNOWN)


def an_argument_in_a_list(entry: dict[str, Any]) -> Any:
    return build_component({"path": f"{__name__}.Plain", "args": {"inner": [[entry]]}}, KNOWN).inner[0][0]


ROLES = [a_handler, an_aggregator, a_filter]
NESTED = [an_argument, an_argument_in_a_list]


@pytest.fixture(scope="module")
def started() -> list[object]:
    """The programs that this process starts from now on, by whatever class or function."""
    found: list[object] = []
    sys.addaudithook(lambda event, args: found.append(args[0]) if event == "subprocess.Popen" else None)
    return found


def name_of(value: object) -> str:
    return str(getattr(value, "__name__", value))


@pytest.mark.parametrize("build", [*ROLES, *NESTED], ids=name_of)
@pytest.mark.parametrize("program", ["subprocess.Popen", "psutil.Popen"])
def test_no_entry_of_a_configuration_starts_a_program(program: str, build: Build, started: list[object]) -> None:
    pytest.importorskip(program.partition(".")[0])
    entry = {"path": program, "args": {"args": [sys.executable, "--version"]}}
    before = len(started)
    with pytest.raises(fl.ConfigError, match=r"\.Popen is "):
        build(entry)
    assert len(started) == before
    subprocess.run([sys.executable, "--version"], check=True, capture_output=True)
    assert len(started) == before + 1, "a program that is started is seen"


@pytest.mark.parametrize("build", ROLES, ids=name_of)
def test_the_arguments_of_what_has_not_its_role_are_not_built(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []

    class Noting(Plain):
        def __init__(self) -> None:
            built.append(self)

    monkeypatch.setattr(sys.modules[__name__], "Noting", Noting, raising=False)
    noting = {"path": f"{__name__}.Noting"}
    with pytest.raises(fl.ConfigError, match=r"Plain is no (handler|aggregator|filter): it lacks "):
        build({"path": f"{__name__}.Plain", "args": {"inner": noting}})
    assert built == []
    assert isinstance(build_component({"path": f"{__name__}.Plain", "args": {"inner": noting}}, {}).inner, Noting)
    assert len(built) == 1


def test_what_a_role_needs_is_said() -> None:
    for build, needed in zip(ROLES, ("handle_event and rollback", "process", "apply, or process"), strict=True):
        with pytest.raises(fl.ConfigError, match=rf"\.Plain is no \w+: it lacks {needed}$"):
            build({"path": f"{__name__}.Plain"})


@pytest.mark.parametrize("build", ROLES, ids=name_of)
def test_a_class_of_ones_own_that_derives_from_nothing_is_taken_for_what_its_methods_say(build: Build) -> None:
    assert type(build({"path": f"{__name__}.Quacking"})) is Quacking


def test_a_class_of_python_that_happens_to_have_the_methods_is_refused() -> None:
    # Its method `apply` has nothing to do with a filter's, and to make one starts processes.
    with pytest.raises(fl.ConfigError, match=r"multiprocessing\.pool\.Pool is not called for a configuration"):
        a_filter({"path": "multiprocessing.pool.Pool"})


@pytest.mark.parametrize("path", ["fractions.Fraction", "safetensors.safe_open", "numpy.random.RandomState"])
def test_an_argument_of_an_installed_package_is_refused_with_the_way_out(path: str) -> None:
    with pytest.raises(fl.ConfigError, match=r"neither .* nor of your own code; .*derive a class from it in a module"):
        an_argument_in_a_list({"path": path})


def test_a_class_that_derives_from_one_of_an_installed_package_in_ones_own_module_is_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_numbers.py").write_text(
        "from fractions import Fraction\nclass Mine(Fraction):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    built = an_argument_in_a_list({"path": "my_own_numbers.Mine", "args": {"numerator": 3}})
    assert built == 3
    with pytest.raises(fl.ConfigError, match=r"^fractions\.Fraction is not called"):  # by whatever name
        an_argument_in_a_list({"path": "my_own_numbers.Fraction"})
    monkeypatch.delitem(sys.modules, "my_own_numbers")


@pytest.mark.parametrize("path", ["fed_learn.handlers.RoundLogHandler", "fed_learn.client.fed_privacy.SVTProtocol"])
def test_what_the_library_brings_may_stand_in_an_argument(path: str) -> None:
    assert type(an_argument_in_a_list({"path": path})).__name__ == path.rpartition(".")[2]


def test_a_component_of_an_installed_package_may_stand_in_an_argument_where_it_derives_from_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "an_installed_package.py").write_text(
        "import fed_learn as fl\nclass Score(fl.ModelEvaluator):\n"
        "    def evaluate(self, ctx): pass\n    def get_metric(self): return 1.0\n"
        "class Other:\n    pass\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path)])
    assert an_argument({"path": "an_installed_package.Score"}).evaluator.get_metric() == 1.0
    with pytest.raises(fl.ConfigError, match=r"^an_installed_package\.Other is not called"):
        an_argument_in_a_list({"path": "an_installed_package.Other"})
    monkeypatch.delitem(sys.modules, "an_installed_package")


def test_the_command_refuses_a_program_in_one_line_and_makes_no_folder(tmp_path: Path) -> None:
    entry = {"path": "subprocess.Popen", "args": {"args": ["touch", str(tmp_path / "ran")]}}
    (tmp_path / "config.json").write_text(json.dumps({"handlers": [entry]}))
    command = [str(Path(sys.executable).parent / "fed-learn"), "simulate", "--config", str(tmp_path / "config.json")]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    said = "fed-learn: subprocess.Popen is no handler: it lacks handle_event and rollback\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, said, "")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
