"""What goes wrong in Flower and what becomes of it here: the rows of examples/failures/flower_failures.py."""

from typing import Any

import flower_failures as cases
import numpy as np
import pytest

# Case → what Flower makes of it: a value and a dtype, or the class of an error; what we do; who is refused, and why.
EXPECTED: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "int64_counter": ((31 / 3, "float64"), (10, "int64"), {}),
    "legacy_int64_counter": ((0, "int64"), (1000, "int64"), {}),
    "legacy_float16": (([np.nan, np.nan], "float16"), ([1, 1], "float16"), {}),
    "bfloat16": ("UFuncTypeError", ([3, -3], "bfloat16"), {}),
    "one_nan": (([1, np.nan], "float32"), ([1, 1], "float32"), {"partition-1": "NonFiniteError"}),
    "one_infinity": (([1, np.inf], "float32"), ([0.5, 0.5], "float32"), {"partition-2": "NonFiniteError"}),
    "zero_total": ("ZeroDivisionError", None, {}),
    "negative_weight": (([-2], "float32"), ([1], "float32"), {"partition-2": "AggregationWeightError"}),
    "wrong_shape": (([[1, 2, 3]] * 3, "float32"), (np.zeros((3, 3)), "float32"), {"partition-2": "ShapeError"}),
    "wrong_dtype": ("UFuncTypeError", ([1], "float32"), {"partition-2": "DtypeError"}),
    "missing_variable": ("InconsistentMessageReplies", ([1], "float32"), {"partition-2": "NamesError"}),
    "stale": (([2], "float32"), ([1], "float32"), {"partition-2": "RoundError"}),
    "duplicate": (([2.5], "float32"), ([2], "float32"), {"partition-2": "DuplicateContributionError"}),
    "other_metrics": ("InconsistentMessageReplies", ([2], "float32"), {}),
}


def check(outcome: Any, expected: Any) -> None:
    if expected is None:
        assert outcome.weights is None
    elif isinstance(expected, str):
        assert type(outcome.error).__name__ == expected
    else:
        values, dtype = expected
        array = next(iter(outcome.weights.values()))
        assert str(array.dtype) == dtype
        np.testing.assert_allclose(array.astype(float), values, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPECTED)
def test_what_flower_gets_wrong_is_right_or_refused_here(name: str) -> None:
    flower, ours, refused = EXPECTED[name]
    row = getattr(cases, name)()
    check(row.stock, flower)
    check(row.ours, ours)
    assert dict(row.ours.refused) == refused


def test_the_order_of_arrival_changes_flowers_mean_and_not_ours() -> None:
    row: Any = cases.order_of_arrival()
    assert row.stock.weights["elements that differ"] > 1000
    assert row.ours.weights["elements that differ"] == 0


@pytest.mark.filterwarnings("ignore")
def test_the_table_has_every_case() -> None:
    assert [case.__name__ for case in cases.CASES] == [*EXPECTED, "order_of_arrival"]
    assert all(row.case and str(row.stock) and str(row.ours) for row in cases.rows())
