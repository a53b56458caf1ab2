"""`WithLocalVariables`: a learner of the demo with variables that stay with its client."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fed_learn.components import Learner, TrainingResult
from fed_learn.model_meta import FLContext
from fed_learn.weights import WeightDict


class WithLocalVariables(Learner):
    """Adds to each model that a learner gets the variables that it lacks, as they were trained here last.

    For learners that know a model by nothing but the weights they get; others have them in a model of their own.

    Args:
        learner: The learner; its `train` gives a `TrainingResult`.
        initial: All variables, as they are before the first training.
    """

    def __init__(self, learner: Learner, initial: WeightDict) -> None:
        self.learner = learner
        self.initial = initial
        self.validation_metric = learner.validation_metric
        self.mode = learner.mode
        self._own = dict(initial)

    def train(self, weights: WeightDict, ctx: FLContext) -> TrainingResult:
        """Trains the whole model, and gives the part of it that came."""
        result: TrainingResult = self.learner.train({**self._own, **weights}, ctx)
        self._own.update(result.weights)
        return replace(result, weights={name: result.weights[name] for name in weights})

    def get_state(self) -> dict[str, Any]:
        """The variables, as they were trained last; and what the learner needs."""
        return {"own": self._own, "learner": self.learner.get_state()}

    def set_state(self, state: Any) -> None:
        """Goes on with them."""
        self._own = dict(state["own"])
        if state["learner"] is not None:
            self.learner.set_state(state["learner"])

    def validate(self, weights: WeightDict, ctx: FLContext) -> Mapping[str, float]:
        """Scores the whole model."""
        scores: Mapping[str, float] = self.learner.validate({**self._own, **weights}, ctx)
        return scores
