"""The checks of the project, each by one command in an environment of its own: `pipx run nox -s quick`.

Nox is no dependency of the package. With `--no-venv` a session runs in the active environment, and installs nothing.
"""

from pathlib import Path

import nox

nox.options.sessions = ["quick"]

CONSTRAINTS = ("-c", "tests/constraints.txt")


def install(session: nox.Session, *what: str) -> None:
    """Installs with the pinned versions, and fails where the C extension cannot be built."""
    if session.virtualenv.is_sandboxed:
        session.install(*CONSTRAINTS, *what, env={"FED_LEARN_REQUIRE_NATIVE": "1"})


@nox.session
def quick(session: nox.Session) -> None:
    """The quick tests: no framework, less than a minute."""
    install(session, ".[cli,files]", "pytest", "hypothesis")
    session.run("pytest", "-m", "quick", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, as the README runs them: a few gigabytes."""
    install(session, ".[test]")
    session.run("pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, clang-format and mypy. Mypy reads the types of the frameworks, so it needs what the tests need."""
    install(session, ".[test]", "clang-format")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("clang-format", "--dry-run", "-Werror", *map(str, sorted(Path("csrc").glob("*.[chi]*"))))
    session.run("mypy")


@nox.session
def fuzz(session: nox.Session) -> None:
    """The fuzz, for as many minutes as are given: `nox -s fuzz -- 60`."""
    install(session, ".[test]")
    minutes = session.posargs or ["1"]
    session.run("python", "tests/fuzz.py", "--minutes", *minutes)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmark of averaging, on small models."""
    install(session, ".[bench]")
    session.run("fed-learn", "bench", "--quick", *session.posargs)
