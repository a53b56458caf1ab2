"""Parts of a job that a configuration names by path and arguments: evaluators, learners."""

from fed_learn.components.learner import Learner, TrainingResult
from fed_learn.components.model_evaluator import ModelEvaluator

__all__ = ["Learner", "ModelEvaluator", "TrainingResult"]
