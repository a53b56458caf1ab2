"""`Learner`, the local work of a client: training and validation on its own data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fed_learn.errors import brief
from fed_learn.model_meta import FLContext
from fed_learn.values import split_metrics
from fed_learn.weights import WeightDict, size_text

DEFAULT_METRIC = "accuracy"
"""By which models are selected where a learner does not say."""


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What training made of the weights.

    Attributes:
        weights: The whole trained weights, whatever the kind of contribution; they are copied at once, so
            `fl.get_weights(model, copy=False)` will do, which also tells what is tied (see `fed_learn.ties`).
        aggregation_weight: By how much they count: the number of examples, usually.
        n_iter: Iterations done.
        metrics: Further numbers for the server, such as the training loss. What is no number among them reaches it as
            `Contribution.info`.
    """

    weights: WeightDict
    aggregation_weight: float
    n_iter: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        parts = [size_text(self.weights), f"aggregation_weight={brief(self.aggregation_weight)}"]
        parts += [f"n_iter={brief(self.n_iter)}"] if self.n_iter is not None else []
        numbers, _ = split_metrics(self.metrics if isinstance(self.metrics, Mapping) else {})
        parts += [f"metrics={brief(numbers)}"] if numbers else []
        return f"TrainingResult({', '.join(parts)})"


class Learner(ABC):
    """Trains and validates weights on one client's data.

    Each call gets the weights to start from (read-only) and the client's context, with `ContextKey.ROUND`; it keeps
    nothing of them. Whatever is drawn at random should be seeded by the client and the round. A class need not derive
    from this one: two methods `train` and `validate` are enough. What a learner keeps from round to round it hands over
    by `get_state`, if the job is to be durable.

    Attributes:
        validation_metric: Which entry of the result of `validate` the models are selected by.
        mode: `"max"` if more of it is better, `"min"` for losses: whatever selects models in the job follows it. None:
            the name of the metric decides, `"min"` where it is that of a loss.
    """

    validation_metric: str = DEFAULT_METRIC
    mode: str | None = None

    @abstractmethod
    def train(self, weights: WeightDict, ctx: FLContext) -> Any:
        """Trains from `weights`; None sits the round out.

        Returns:
            A `TrainingResult`, or `(weights, aggregation_weight)`, or `(weights, aggregation_weight, metrics)`. Numbers
            may be of any kind: of Python, of numpy, or a tensor that holds one.
        """

    @abstractmethod
    def validate(self, weights: WeightDict, ctx: FLContext) -> Any:
        """Scores `weights` on data that is not trained on, `validation_metric` among the scores.

        Returns:
            The scores by name, numbers of any kind; what is no number among them is information. Or one number: the
            `validation_metric`.
        """

    def get_state(self) -> Any:
        """What this learner needs to go on in another process, asked for after each round of a durable job.

        Returns:
            None: nothing. Else what `fed_learn.durable.values` can store: numbers, text, bytes, arrays, lists, tuples
            and dicts of these, such as `fl.get_weights` gives.
        """
        return None

    def set_state(self, state: Any) -> None:
        """Takes back what `get_state` gave, in a job that goes on, before anything else."""
        raise NotImplementedError(f"{type(self).__name__} has get_state, and no set_state")
