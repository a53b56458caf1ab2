"""The option that chooses the sizes."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="models of the usual size, about a gigabyte per case")
