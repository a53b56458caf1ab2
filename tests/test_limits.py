"""How much a client may send: every limit is stated in the docs, enforced first, and named in what enforces it."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fed_learn as fl
from fed_learn import limits
from fed_learn.aggregation.round import Round
from fed_learn.aggregation.told import Told
from fed_learn.contribution import INITIAL_VALIDATION_METRIC
from fed_learn.errors import brief
from fed_learn.limits import (
    DEEPEST,
    LEFT_OUT,
    LONGEST_HEADER,
    LONGEST_INFO,
    LONGEST_MESSAGE,
    LONGEST_NAME,
    MOST_INFO,
    MOST_METRICS,
    MOST_NAMED,
    MOST_TOLD,
    MOST_VARIABLES,
)
from fed_learn.npy import viewed
from fed_learn.weights import check_names

pytestmark = pytest.mark.quick

MODEL: dict[str, Any] = {"w": np.zeros(2)}


def received(**fields: Any) -> fl.Contribution:
    return Round(model=MODEL).receive(fl.Contribution("site-1", {"w": np.ones(2)}, 1, **fields))


def test_the_docs_have_the_table_of_limits_with_their_numbers() -> None:
    assert limits.__doc__ is not None
    rows = [line for line in limits.__doc__.splitlines() if line.startswith("|")]
    told = [re.sub(r"`([A-Z_]+)`", lambda found: f"{getattr(limits, found[1]):,}".replace(",", " "), r) for r in rows]
    page = (Path(__file__).parents[1] / "docs" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(told) in page
    stated = set(re.findall(r"`([A-Z_]+)`", limits.__doc__))
    assert stated == {name for name in vars(limits) if name.isupper()}


@pytest.mark.parametrize("weights", [{}, {"w": np.ones(2)}], ids=["another variable", "one more"])
def test_a_variable_with_too_long_a_name_is_refused_and_its_name_told_nowhere(weights: dict[str, Any]) -> None:
    with pytest.raises(fl.NamesError) as caught:
        Round(model=MODEL).receive(fl.Contribution("site-1", weights | {"x" * (LONGEST_NAME + 1): np.ones(2)}, 1))
    assert str(caught.value) == "site-1: a variable's name has 1001 characters, at most 1000 are taken"
    assert caught.value.extra == ()
    longest = {"w": np.ones(2), "x" * LONGEST_NAME: np.ones(1)}
    assert list(fl.weighted_average([longest])) == list(longest)


def test_too_many_variables_are_refused() -> None:
    with pytest.raises(fl.NamesError, match=rf"^site-1: more than {MOST_VARIABLES} variables, which is the most"):
        check_names(range(MOST_VARIABLES + 1), "site-1")
    check_names(range(MOST_VARIABLES), "site-1")


def test_of_names_that_a_client_made_up_an_error_keeps_a_hundred() -> None:
    made_up = {f"{i} {'x' * 900}": np.zeros(1) for i in range(5000)}
    with pytest.raises(fl.NamesError, match="and 4995 more") as caught:
        Round(model=MODEL).receive(fl.Contribution("site-1", {"w": np.ones(2), **made_up}, 1))
    assert caught.value.extra == tuple(made_up)[:MOST_NAMED]
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("place", [0, MOST_METRICS - 1, MOST_METRICS, MOST_METRICS + 499])
def test_the_score_to_select_by_is_taken_wherever_it_stands_among_too_many_metrics(place: int) -> None:
    names = [f"m{i}" for i in range(MOST_METRICS + 499)]
    names.insert(place, INITIAL_VALIDATION_METRIC)
    taken = received(metrics=dict(zip(names, range(MOST_METRICS + 500), strict=True)))
    assert taken.metrics[INITIAL_VALIDATION_METRIC] == place
    assert len(taken.metrics) == MOST_METRICS
    assert taken.info == {LEFT_OUT: "all entries but the first 1000"}


def test_the_text_of_an_error_is_bounded() -> None:
    error = fl.FedLearnError("x" * 10**6)
    assert str(error) == "x" * LONGEST_MESSAGE + "…"


def test_metrics_that_are_too_many_are_left_out_and_the_weights_count(caplog: pytest.LogCaptureFixture) -> None:
    taken = received(metrics={f"m{i}": float(i) for i in range(MOST_METRICS + 500)})
    assert dict(taken.metrics) == {f"m{i}": float(i) for i in range(MOST_METRICS)}
    assert dict(taken.info) == {LEFT_OUT: "all entries but the first 1000"}
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == "site-1: of its metrics and info are left out: all entries but the first 1000"


def test_a_metric_with_too_long_a_name_is_left_out() -> None:
    taken = received(metrics={"x" * 10**5: 1.0, "y" * LONGEST_NAME: 2.0, "z" * 10**5: "text"})
    assert dict(taken.metrics) == {"y" * LONGEST_NAME: 2.0}
    assert dict(taken.info) == {LEFT_OUT: "a metric with a name of 100000 characters"}


def test_long_texts_in_info_are_shortened() -> None:
    info = {"log": "x" * (LONGEST_INFO + 1), "note": "y" * LONGEST_INFO, "k" * (LONGEST_NAME + 1): 1}
    assert dict(received(info=info).info) == {
        "log": brief("x" * 100),
        "note": "y" * LONGEST_INFO,
        brief("k" * 100): 1,
    }


def test_what_holds_more_entries_than_there_is_room_for_is_described_and_the_rest_is_kept() -> None:
    info = {"histogram": [0] * (MOST_INFO + 1), "table": [[1] * 100] * 200, "host": "a100", "two": [1, 2]}
    kept = received(info=info).info
    assert kept["histogram"] == "[0, 0, 0, 0, 0, 0, ...]"
    assert isinstance(kept["table"], str)
    assert kept["host"] == "a100"
    assert LEFT_OUT not in kept


def test_too_many_entries_of_info_are_left_out() -> None:
    kept = received(info={f"k{i}": [i] for i in range(2 * MOST_INFO)}).info
    assert len(kept) == MOST_INFO + 1
    assert kept[LEFT_OUT] == f"all entries but the first {MOST_INFO}"


def entries(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(entries, value.values()))
    return len(value) + sum(map(entries, value)) if isinstance(value, tuple) else 0


def test_lists_that_hold_one_another_do_not_multiply() -> None:
    shared: Any = [0.5]
    for _ in range(40):
        shared = [shared] * 10
    kept = received(info={"shared": shared, "again": {"and": shared}}, metrics={"too": shared}).info
    assert entries(kept) <= MOST_INFO
    assert len(json.dumps(kept)) < 10**6


def test_what_was_bounded_stays_as_it_is() -> None:
    once = fl.Contribution(
        "site-1", None, 1, metrics={f"m{i}": i for i in range(3000)}, info={"deep": [[[[[[[[[[1]]]]]]]]]]}
    )
    again = once.without_weights().without_weights()
    assert (again.metrics, again.info) == (once.metrics, once.info)
    deepest: Any = once.info["deep"]
    for _ in range(DEEPEST - 1):
        (deepest,) = deepest
    assert deepest == ("a list",)


def test_metrics_that_cannot_be_read_cost_no_weights() -> None:
    class Broken(dict[str, float]):
        def items(self) -> Any:
            raise OSError("gone")

    taken = received(metrics=Broken(loss=1.0))
    assert (dict(taken.metrics), dict(taken.info)) == ({}, {LEFT_OUT: "what cannot be read: OSError: gone"})


def test_sentences_that_clients_could_make_up_end(caplog: pytest.LogCaptureFixture) -> None:
    told = Told(logging.getLogger("test"))
    for number in range(2 * MOST_TOLD):
        told.once(number, f"about {number}")
    assert len(caplog.records) == MOST_TOLD + 1
    assert caplog.records[-1].getMessage() == f"about {MOST_TOLD}; no more is told of what clients send"


def file_of(header: bytes) -> bytes:
    return b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header


def test_a_header_may_be_as_long_as_the_limit() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }"
    assert viewed(file_of(header.ljust(LONGEST_HEADER - 1) + b"\n")).shape == (0,)
    with pytest.raises(fl.WeightsTypeError, match=r"^a header of 2001 bytes, at most 2000 are taken$"):
        viewed(file_of(header.ljust(LONGEST_HEADER) + b"\n"))
