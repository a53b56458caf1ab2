"""What NVFlare's FedAvg gets wrong, with its own averaging and with ours: the cases of `examples/failures`."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("nvflare")


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    import nvflare_failures

    return dict(zip([case.__name__ for case in nvflare_failures.CASES], nvflare_failures.rows(), strict=True))


def is_array(found: Any, values: Any, dtype: Any) -> bool:
    return found.dtype == dtype and np.array_equal(found, np.array(values, dtype), equal_nan=found.dtype.kind == "f")


BAD: dict[str, tuple[str, Any, Any]] = {
    # case: cause, NVFlare's w, ours
    "broadcast": ("ShapeError", np.full((3, 3), np.float32(2 / 3)), [[0.5]] * 3),
    "one_nan": ("NonFiniteError", [1, np.nan], [1, 1]),
    "one_infinity": ("NonFiniteError", [1, np.inf], [0.5, 0.5]),
    "nan_steps": ("AggregationWeightError", [1020 / 21], [1]),
    "missing_variable": ("NamesError", [2], [1]),
    "duplicate": ("DuplicateContributionError", [2.5], [2]),
    "stale": ("RoundError", [2], [1]),
    "wrong_kind": ("KindError", [2 / 3], [1]),
}


@pytest.mark.parametrize("case", BAD)
def test_nvflare_averages_what_we_refuse_by_name(rows: dict[str, Any], case: str) -> None:
    cause, theirs, ours = BAD[case]
    row = rows[case]
    assert row.stock.refused == ()
    found = row.stock.weights["w"]
    assert found.dtype == np.float32
    assert found.shape == np.shape(theirs)
    assert np.allclose(found, np.array(theirs), rtol=1e-6, equal_nan=True)
    who = "site-2" if case == "one_nan" else "site-3"
    assert row.ours.refused == ((who, cause),)
    assert is_array(row.ours.weights["w"], ours, np.float32)


def test_no_steps_add_nothing_and_no_number_of_steps_counts_by_1_as_in_nvflare(rows: dict[str, Any]) -> None:
    for case, ours in (("zero_steps", 1), ("missing_steps", 1020 / 21)):
        assert np.allclose(rows[case].stock.weights["w"], 1020 / 21)
        assert rows[case].ours.refused == ()
        assert is_array(rows[case].ours.weights["w"], [ours], np.float32)


def test_integers_stay_integers(rows: dict[str, Any]) -> None:
    assert rows["int64_counters"].stock.weights["n"].dtype == np.float64
    assert is_array(rows["int64_counters"].ours.weights["n"], 10, np.int64)


def test_float16_does_not_overflow(rows: dict[str, Any]) -> None:
    assert is_array(rows["float16_many_steps"].stock.weights["w"], [np.inf, np.inf], np.float16)
    assert is_array(rows["float16_many_steps"].ours.weights["w"], [1, 1], np.float16)


def test_bfloat16_stays_bfloat16(rows: dict[str, Any]) -> None:
    assert rows["bfloat16"].stock.weights["w"].dtype == np.float32
    assert is_array(rows["bfloat16"].ours.weights["w"], [3, -3], ml_dtypes.bfloat16)


def test_a_dtype_that_is_none_of_ours_is_refused(rows: dict[str, Any]) -> None:
    assert rows["wrong_dtype"].stock.weights["w"].dtype == np.complex64
    assert rows["wrong_dtype"].ours.refused == (("site-3", "DtypeError"),)
    assert is_array(rows["wrong_dtype"].ours.weights["w"], [1], np.float32)


def test_the_global_model_stands_where_there_is_nothing_to_average(rows: dict[str, Any]) -> None:
    assert rows["nothing"].stock.weights == {}
    assert is_array(rows["nothing"].ours.weights["w"], [1], np.float32)


def test_the_order_of_arrival_does_not_matter(rows: dict[str, Any]) -> None:
    assert rows["order_of_arrival"].stock.weights["elements that differ"] > 1000
    assert rows["order_of_arrival"].ours.weights["elements that differ"] == 0


def test_a_handler_that_raises_is_not_swallowed(rows: dict[str, Any]) -> None:
    assert rows["handler_raises"].stock.note == "logged; the run goes on without it"
    assert rows["handler_raises"].ours.note == "ends the run"


def test_the_table_has_a_line_for_each_case(rows: dict[str, Any]) -> None:
    assert len({row.case for row in rows.values()}) == len(rows) == 17
    assert all(str(row.stock) and str(row.ours) for row in rows.values())
