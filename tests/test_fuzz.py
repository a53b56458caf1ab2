"""A short fuzz of all that reads bytes or names of others; `python tests/fuzz.py` runs it for as long as one asks."""

import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")
pytest.importorskip("nvflare")

from fuzz_inputs import Endless
from fuzz_targets import TARGETS

import fed_learn as fl
from fed_learn.aggregation.round import Round
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.npy import viewed

EXECUTIONS = dict.fromkeys(("npy", "flower records", "clara messages"), 1500) | {"flower strategy": 60}


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_sent_gives_the_right_value_or_a_declared_error(name: str) -> None:
    target = TARGETS[name]
    values = 0
    for number in range(EXECUTIONS.get(name, 300)):
        sent = target.make(target.rng(number))
        outcome = target.outcome(sent)
        try:
            target.check(sent, outcome)
        except AssertionError as error:
            raise AssertionError(f"python tests/fuzz.py --target {name!r} --number {number}") from error
        values += not isinstance(outcome, Exception)
    assert values > 0  # else the fuzz would prove little


class Counted(str):
    """A name that counts how often it is compared or hashed."""

    calls = 0
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        Counted.calls += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        Counted.calls += 1
        return str.__hash__(self)


def calls_of_a_round(count: int, settings: dict[str, Any]) -> int:
    names = [Counted(f"layer.{i}") for i in range(count)]
    known = settings.pop("known")
    model: dict[str, Any] | None = {name: np.zeros(1) for name in names} if known else None
    this = Round(AggregationSettings(**settings), number=0, model=model)
    Counted.calls = 0
    for k, part in enumerate((names, names, names[::2], [Counted(f"other.{i}") for i in range(count)])):
        values: dict[str, Any] = {
            name: np.full(1, np.inf if not known and k == 1 and i % 2 else 1.0) for i, name in enumerate(part)
        }
        try:
            this.receive(fl.Contribution(f"site-{k}", values, 1))
        except fl.NamesError:
            assert known
    this.close()
    this.combine()
    return Counted.calls


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("settings", [{"partial": "same"}, {"partial": "average"}, {"stream": True}], ids=str)
def test_the_work_of_a_round_grows_with_the_number_of_variables_and_no_faster(
    settings: dict[str, Any], known: bool
) -> None:
    few, many = (calls_of_a_round(count, {**settings, "known": known}) for count in (500, 2000))
    assert few > 500
    assert many < 4.5 * few


def lines_of(data: bytes) -> int:
    """Lines of Python that reading takes."""
    lines = 0

    def trace(*_: Any) -> Any:
        nonlocal lines
        lines += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        viewed(data)
    except fl.WeightsTypeError:
        pass
    finally:
        sys.settrace(before)
    return lines


def test_a_header_of_spaces_takes_no_more_work_than_a_valid_one() -> None:
    def file(header: bytes) -> bytes:
        return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header

    spaces = [file(b"x" + b" " * (size - 2) + b"$") for size in (1000, 2000, 4000, 60_000)]
    assert max(map(lines_of, spaces)) < 100


def test_a_mapping_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fed_learn.weights.MOST_VARIABLES", 10_000)  # a million takes seconds to make
    with pytest.raises(fl.NamesError, match="site-1: more than 10000 variables"):
        Round(model={"w": np.zeros(2)}).receive(fl.Contribution("site-1", Endless(), 1))
