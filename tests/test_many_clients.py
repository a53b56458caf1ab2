"""Jobs with many clients: work that nobody asked for is not done, and memory does not grow with their number."""

import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fed_learn as fl
from fed_learn.weights import WeightDict

pytestmark = pytest.mark.quick


class Learner(fl.Learner):
    """Adds 1, and counts what it was asked to do."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def train(self, weights: WeightDict, ctx: fl.FLContext) -> Any:
        self.asked["train"] += 1
        return {name: array + 1 for name, array in weights.items()}, 1

    def validate(self, weights: WeightDict, ctx: fl.FLContext) -> float:
        self.asked["validate"] += 1
        return 0.5


def run(
    count: int, size: int = 1, rounds: int = 2, cross_site: Any = True, **options: Any
) -> tuple[Any, list[Learner]]:
    learners = [Learner() for _ in range(count)]
    clients = [fl.FederatedClient(f"site-{i:04d}", learner) for i, learner in enumerate(learners)]
    handlers = [fl.ModelSelectionHandler()]
    server = fl.FederatedServer({"w": np.zeros(size)}, num_rounds=rounds, handlers=handlers, **options)
    return server.run(clients, max_workers=1, cross_site=cross_site), learners


@pytest.mark.parametrize(
    ("cross_site", "models", "validations"),
    # In each round the model that came, and with local bests what was trained; at the end the final model, and these.
    [(True, 4, 2 * 2 + 1 + 4), ("best", 1, 2 + 1 + 1), (False, 0, 2 + 1)],
)
def test_what_nobody_asks_for_is_not_done(cross_site: Any, models: int, validations: int) -> None:
    result, learners = run(3, cross_site=cross_site)
    assert len(result.cross_site) == models
    assert [learner.asked for learner in learners] == [{"train": 2, "validate": validations}] * 3
    assert result.best is not None
    assert result.metrics["selection"] == 0.5
    assert result.weights["w"].tolist() == [2]


def test_cross_site_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="cross_site must be True, False or 'best', not 'all'"):
        run(2, cross_site="all")


def test_the_memory_of_a_stream_does_not_grow_with_the_clients() -> None:
    size = 250_000  # 2 MB a model

    def peak(count: int) -> int:
        tracemalloc.start()
        result, _ = run(count, size, rounds=1, cross_site=False, stream=True)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert result.weights["w"][0] == 1
        return most

    few, many = peak(5), peak(40)
    assert many < few + 2 * 8 * size, "not a model more for each client"


def test_calls_for_each_client_do_not_grow_with_their_number(tmp_path: Path) -> None:
    import sys

    def calls(count: int) -> float:
        made = 0

        def note(frame: Any, event: str, argument: Any) -> None:
            nonlocal made
            made += event == "call" and "fed_learn" in frame.f_code.co_filename

        sys.setprofile(note)
        try:
            run(count, rounds=1, cross_site=False)
        finally:
            sys.setprofile(None)
        return made / count

    assert calls(400) < 1.1 * calls(100)


def test_answers_are_taken_as_they_are_needed_and_in_the_order_of_the_clients() -> None:
    result, learners = run(50, rounds=3, cross_site=False)
    assert [report.accepted for report in result.reports] == [tuple(f"site-{i:04d}" for i in range(50))] * 3
    assert all(learner.asked["train"] == 3 for learner in learners)
