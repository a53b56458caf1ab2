"""fed_learn: the layer between a training framework and a federated-learning stack.

Handlers act on the events of a federated job; contributions are averaged in float64 and rounded once, to the same bits
everywhere.

Example:
    >>> import numpy as np, fed_learn as fl
    >>> hospital_a, hospital_b = {"w": np.float32([0, 1])}, {"w": np.float32([4, 1])}
    >>> fl.weighted_average([hospital_a, hospital_b], [300, 100])
    {'w': array([1., 1.], dtype=float32)}
"""

from fed_learn import kernels, lora
from fed_learn.adapters import Description, describe, get_weights, set_weights
from fed_learn.adapters.layout import LayoutMap, align
from fed_learn.aggregation import Accumulator, aggregate, rules, weighted_average
from fed_learn.client import FederatedClient
from fed_learn.components import Learner, ModelEvaluator, TrainingResult
from fed_learn.contribution import BestModel, Contribution, Kind, RoundReport, ValidationResult
from fed_learn.errors import (
    AggregationWeightError,
    AggregatorError,
    BrokenAccumulatorError,
    ClientQuitError,
    ConfigError,
    ContextError,
    ContributionError,
    DtypeError,
    DuplicateContributionError,
    EmptyAggregationError,
    ExactDomainError,
    FedLearnError,
    FileInUseError,
    FilterError,
    FloatingPointEnvironmentError,
    HandlerError,
    IntegerRangeError,
    KernelNameError,
    KernelUnavailableError,
    KindError,
    LayoutError,
    LedgerError,
    MergeError,
    MetricError,
    ModelError,
    NamesError,
    NonFiniteError,
    NothingAggregatedError,
    NotSameError,
    OutOfTurnError,
    OutputError,
    RoundError,
    ShapeError,
    StateError,
    StateExistsError,
    SumOverflowError,
    TiedVariablesError,
    TooFewContributionsError,
    UnknownContributorError,
    WeightsTypeError,
)
from fed_learn.events import EventType, fire_event
from fed_learn.handlers import Handler, ModelSelectionHandler, ServerValidationHandler
from fed_learn.model_meta import ContextKey, FLContext, ModelData
from fed_learn.prefixes import without_prefix
from fed_learn.server import FederatedServer, Job, JobResult

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "AggregationWeightError",
    "AggregatorError",
    "BestModel",
    "BrokenAccumulatorError",
    "ClientQuitError",
    "ConfigError",
    "ContextError",
    "ContextKey",
    "Contribution",
    "ContributionError",
    "Description",
    "DtypeError",
    "DuplicateContributionError",
    "EmptyAggregationError",
    "EventType",
    "ExactDomainError",
    "FLContext",
    "FedLearnError",
    "FederatedClient",
    "FederatedServer",
    "FileInUseError",
    "FilterError",
    "FloatingPointEnvironmentError",
    "Handler",
    "HandlerError",
    "IntegerRangeError",
    "Job",
    "JobResult",
    "KernelNameError",
    "KernelUnavailableError",
    "Kind",
    "KindError",
    "LayoutError",
    "LayoutMap",
    "Learner",
    "LedgerError",
    "MergeError",
    "MetricError",
    "ModelData",
    "ModelError",
    "ModelEvaluator",
    "ModelSelectionHandler",
    "NamesError",
    "NonFiniteError",
    "NotSameError",
    "NothingAggregatedError",
    "OutOfTurnError",
    "OutputError",
    "RoundError",
    "RoundReport",
    "ServerValidationHandler",
    "ShapeError",
    "StateError",
    "StateExistsError",
    "SumOverflowError",
    "TiedVariablesError",
    "TooFewContributionsError",
    "TrainingResult",
    "UnknownContributorError",
    "ValidationResult",
    "WeightsTypeError",
    "aggregate",
    "align",
    "describe",
    "fire_event",
    "get_weights",
    "kernels",
    "lora",
    "rules",
    "set_weights",
    "weighted_average",
    "without_prefix",
]
