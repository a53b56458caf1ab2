"""The page of deliberate differences: it is what runs now, and each line says how to get the stack's behaviour."""

from pathlib import Path

import pytest

pytest.importorskip("flwr")
pytest.importorskip("nvflare")

import differences

PAGE = Path(__file__).parents[1] / "docs" / "differences.md"


@pytest.mark.filterwarnings("ignore")
def test_the_page_is_what_runs_now() -> None:
    assert PAGE.read_text(encoding="utf-8") == differences.document()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stack", differences.DIFFERENCES)
def test_each_line_is_a_difference_with_a_reason(stack: str) -> None:
    for difference in differences.DIFFERENCES[stack]:
        row = difference.run()
        assert str(row.stock) != str(row.ours), row.case
        assert difference.why
        assert difference.back


def test_what_the_page_says_of_jobs_is_what_they_end_with() -> None:
    rows = {
        run.__name__: run() for run in (differences.all_refused, differences.part_of_the_model, differences.other_names)
    }
    assert type(rows["all_refused"].ours.error).__name__ == "NothingAggregatedError"
    assert type(rows["other_names"].ours.error).__name__ == "NothingAggregatedError"
    assert "an empty initial record takes the model as the clients send it" in str(rows["other_names"].ours.error)
    part = rows["part_of_the_model"]
    assert part.stock.weights is not None
    assert part.ours.weights is not None
    assert {name: array.tolist() for name, array in part.stock.weights.items()} == {"fc": [2.0]}
    assert {name: array.tolist() for name, array in part.ours.weights.items()} == {"fc": [2.0], "bn": [7.0]}


@pytest.mark.filterwarnings("ignore")
def test_what_the_page_says_of_nvflares_jobs_and_metrics_is_what_comes_out() -> None:
    for case in (
        differences.all_refused_in_nvflare,
        differences.no_steps_in_nvflare,
        differences.other_names_in_nvflare,
        differences.begun_as_integers_in_nvflare,
    ):
        row = case()
        assert row.stock.error is None
        assert row.stock.weights is not None
        assert str(row.ours) == "ends the run"
    metrics = (differences.nan_metric, differences.array_metric, differences.no_metrics)
    assert [(str(row.stock), str(row.ours)) for row in (case() for case in metrics)] == [
        ("loss = nan", "loss = 0.75"),
        ("loss = 0.5, recall = [0.5 1. ]", "loss = 0.5"),
        ("no metrics", "loss = 0.75"),
    ]
