"""`Learner`, the local work of a client: training and validation on its own data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from fed_learn.model_meta import FLContext
from fed_learn.weights import WeightDict


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What training made of the weights.

    Attributes:
        weights: The whole trained weights, whatever the kind of contribution; they are copied at once.
        aggregation_weight: By how much they count: the number of examples, usually.
        n_iter: Iterations done.
        metrics: Further numbers for the server, such as the training loss.
    """

    weights: WeightDict
    aggregation_weight: float
    n_iter: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Learner(ABC):
    """Trains and validates weights on one client's data.

    Each call gets the weights to start from (read-only) and the client's context, with `ContextKey.ROUND`; it keeps
    nothing of them. Whatever is drawn at random should be seeded by the client and the round.

    Attributes:
        validation_metric: Which entry of the result of `validate` the models are selected by.
        mode: `"max"` if more of it is better, `"min"` for losses.
    """

    validation_metric: str = "accuracy"
    mode: str = "max"

    @abstractmethod
    def train(self, weights: WeightDict, ctx: FLContext) -> TrainingResult | None:
        """Trains from `weights`; None sits the round out."""

    @abstractmethod
    def validate(self, weights: WeightDict, ctx: FLContext) -> Mapping[str, float]:
        """Scores `weights` on data that is not trained on, `validation_metric` among the scores."""
