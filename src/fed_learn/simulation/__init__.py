"""A whole federation in one process, on real data: the demo's data sets, models and jobs."""

from fed_learn.simulation.datasets import Dataset, Part, Split, load_split
from fed_learn.simulation.demo import Demo, build_demo
from fed_learn.simulation.frameworks import Framework
from fed_learn.simulation.mlp import Perceptron, PerceptronEvaluator, PerceptronLearner
from fed_learn.simulation.update_norms import UpdateNormHandler

__all__ = [
    "Dataset",
    "Demo",
    "Framework",
    "Part",
    "Perceptron",
    "PerceptronEvaluator",
    "PerceptronLearner",
    "Split",
    "UpdateNormHandler",
    "build_demo",
    "load_split",
]
