"""Evaluators by Clara Train's API: `evaluate` takes no argument there."""

from typing import Any

import pytest
from clara_parts import server_with, two_clients
from federation import NormEvaluator

import fed_learn as fl
from fed_learn.server.model_aggregator import ModelAggregator


@pytest.mark.parametrize("style", ["a context", "no argument", "an optional argument"])
def test_an_evaluator_may_take_a_context_or_nothing(style: str) -> None:
    class Evaluator(NormEvaluator):
        pass

    def without(self: Any) -> None:
        self.metric = 0.25

    def optional(self: Any, ctx: Any = None) -> None:
        assert ctx is not None
        self.metric = 0.25

    if style != "a context":
        Evaluator.evaluate = without if style == "no argument" else optional  # type: ignore[method-assign,assignment]
    result = server_with(ModelAggregator(), handlers=[fl.ServerValidationHandler(Evaluator(), 2)]).run(two_clients())
    assert result.best is not None
    assert result.best.metric == (7.5 if style == "a context" else 0.25)


def test_an_evaluator_that_needs_more_is_refused_before_the_job() -> None:
    class Evaluator:
        def evaluate(self, ctx: Any, data: Any) -> None: ...

        def get_metric(self) -> float:
            return 0.0

    with pytest.raises(TypeError, match=r"evaluator Evaluator: evaluate\(ctx: Any, data: Any\) -> None takes neither"):
        fl.ServerValidationHandler(Evaluator(), 1)  # type: ignore[arg-type]
