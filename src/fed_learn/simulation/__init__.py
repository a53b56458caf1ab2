"""A whole federation in one process, on real data: the demo's data sets, models and jobs."""

from fed_learn.simulation.datasets import Dataset, Part, Split, load_split
from fed_learn.simulation.demo import Demo, build_demo
from fed_learn.simulation.mlp import Perceptron, PerceptronEvaluator, PerceptronLearner

__all__ = [
    "Dataset",
    "Demo",
    "Part",
    "Perceptron",
    "PerceptronEvaluator",
    "PerceptronLearner",
    "Split",
    "build_demo",
    "load_split",
]
