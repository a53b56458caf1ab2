"""What evaluators and learners have in common, whatever the framework of the model that they hold.

A framework adds how its data come in batches, what its metrics are, and how a model is scored and trained.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np

from fed_learn.adapters import set_weights
from fed_learn.adapters.layout import LayoutMap
from fed_learn.arguments import check_count
from fed_learn.components import Learner, ModelEvaluator, TrainingResult
from fed_learn.handlers.scoring import check_mode
from fed_learn.integrations.batches import Mean, count_of, form_of, score_name, tensors_in
from fed_learn.integrations.loading import load, own_variables, read, weights_in
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.weights import Array, WeightDict

Step: TypeAlias = Callable[[Any], tuple[float, int]]
"""Trains on a batch; gives the mean loss over its examples, and how many they are."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch, and what the model makes of it.

    Attributes:
        inputs: What the model got.
        targets: What it should give.
        outputs: What it gave.
    """

    inputs: Any
    targets: Any
    outputs: Any

    @cached_property
    def size(self) -> int:
        """How many examples there are; see `count_of`."""
        return count_of(self.inputs, self.targets)


class Score(Protocol):
    """A metric that is being computed, batch by batch."""

    def add(self, batch: Batch, /) -> object:
        """Takes in a batch."""

    def value(self) -> float:
        """The score over all batches."""


class MeanScore(Score):
    """`Score` of a function: its mean over all examples.

    Args:
        name: Of the metric, for messages.
        function: Of a batch; a number for each example, or their mean.
        array_of: What it gives, as an array.

    Example:
        >>> score = MeanScore("hits", lambda batch: batch.outputs == batch.targets, np.asarray)
        >>> score.add(Batch(None, np.array([1, 2, 0]), np.array([1, 2, 3])))
        >>> score.add(Batch(None, np.array([1]), np.array([1])))
        >>> score.value()
        0.75
    """

    def __init__(self, name: str, function: Callable[[Batch], Any], array_of: Callable[[Any], Array]) -> None:
        self.name = name
        self.function = function
        self.array_of = array_of
        self._mean = Mean()

    def add(self, batch: Batch) -> None:
        """Takes in a batch.

        Raises:
            ValueError: The function gives what has not the shape of one number, or of numbers for each example.
        """
        values = self.array_of(self.function(batch))
        if values.size != 1 and not _is_by_example(values.shape, batch):
            # (n, 1) against (n,), say, which frameworks broadcast to (n, n)
            raise ValueError(
                f"the metric {self.name!r} gives an array of shape {values.shape} for outputs {form_of(batch.outputs)} "
                f"and targets {form_of(batch.targets)}; it must give a number for each example, or their mean"
            )
        self._mean.add(float(values.astype(np.float64).mean()), batch.size)

    def value(self) -> float:
        return self._mean.value()


def _is_by_example(shape: tuple[int, ...], batch: Batch) -> bool:
    """Whether it is that of examples, perhaps with more dimensions of targets or outputs, as of places in an image."""
    forms = [(batch.size,), *(tuple(t.shape) for t in tensors_in([batch.targets, batch.outputs]))]
    return shape[:1] == (batch.size,) and any(shape == form[: len(shape)] for form in forms)


@dataclass(frozen=True)
class KeptScore:
    """`Score` of a metric that itself keeps what it has seen.

    Attributes:
        add: Takes in a batch.
        value: The score over all batches.
    """

    add: Callable[[Batch], object]
    value: Callable[[], float]


def score_batches(scores: Mapping[str, Score], batches: Iterable[Batch]) -> dict[str, float]:
    """The scores over batches.

    Raises:
        ValueError: There are no examples, or a score cannot be told of them.
    """
    examples = 0
    for batch in batches:
        examples += batch.size
        for score in scores.values():
            score.add(batch)
    if not examples:
        raise ValueError("there are no examples in the data")
    return {name: score.value() for name, score in scores.items()}


def declared_direction(metric: Any) -> str | None:
    """What a metric itself declares to be better: `"max"`, `"min"`, or None where it does not say.

    Example:
        >>> declared_direction("accuracy"), declared_direction("loss"), declared_direction(len)
        ('max', 'min', None)
    """
    if isinstance(metric, str):
        return {"accuracy": "max", "loss": "min"}.get(metric)
    higher = getattr(metric, "higher_is_better", None)  # as those of torchmetrics say
    return ("max" if higher else "min") if isinstance(higher, bool) else None


class FrameworkEvaluator(ModelEvaluator):
    """Loads the global model into a model of a framework, and scores that. Arguments: see the subclasses."""

    def __init__(
        self,
        model: Any,
        data: Any,
        metric: Any,
        *,
        loss: Any,
        batch_size: int,
        layout: LayoutMap | None,
        mode: str | None,
    ) -> None:
        self.model = model
        self.data = data
        self.metric = metric
        self.loss = loss
        self.batch_size = check_count("batch_size", batch_size)
        self.layout = layout
        self.metric_name = score_name(metric)
        self.mode = mode if mode is not None else declared_direction(metric)
        check_mode(self.mode, 0.0, self.metric_name)
        self._score = float("nan")

    @abstractmethod
    def score(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Scores the model as it is, by the name of each metric."""

    def evaluate(self, ctx: FLContext) -> None:
        """Scores the model of the context and keeps the result for `get_metric`.

        Raises:
            ModelError: The context holds no model.
            NamesError, ShapeError, DtypeError: The global model does not fit the model.
        """
        load(self.model, weights_in(ctx), self.layout)
        self._score = self.score({self.metric_name: self.metric})[self.metric_name]

    def get_metric(self) -> float:
        """The score of the last evaluation; NaN before the first."""
        return self._score


class FrameworkLearner(Learner):
    """Trains and validates a model of a framework, as the work of a client. Arguments: see the subclasses."""

    def __init__(
        self,
        model: Any,
        data: Any,
        validation_data: Any,
        *,
        epochs: int,
        batch_size: int,
        metrics: Sequence[str] | Mapping[str, Any],
        validation_metric: str,
        mode: str | None,
        layout: LayoutMap | None,
        seed: int,
    ) -> None:
        self.model = model
        self.data = data
        self.validation_data = validation_data
        self.epochs = check_count("epochs", epochs)
        self.batch_size = check_count("batch_size", batch_size)
        self.metrics = metrics
        self.validation_metric = validation_metric
        self.layout = layout
        self.seed = seed
        self._global: frozenset[str] = frozenset()  # names of the variables of the global model
        if validation_metric not in self.named_metrics:
            raise ValueError(
                f"validation_metric {validation_metric!r} is not one of the metrics: {sorted(self.named_metrics)}"
            )
        self.mode = mode if mode is not None else declared_direction(self.named_metrics[validation_metric])
        check_mode(self.mode, 0.0, validation_metric)

    @property
    def named_metrics(self) -> Mapping[str, Any]:
        """The metrics by name."""
        return self.metrics if isinstance(self.metrics, Mapping) else {name: name for name in self.metrics}

    @abstractmethod
    def score(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Scores the model as it is on the validation data, by the name of each metric."""

    @abstractmethod
    def begin(self) -> Step:
        """Gets ready to train in a round, from the global weights, which the model has."""

    @abstractmethod
    def epoch(self, rng: np.random.Generator) -> Iterable[Any]:
        """The batches of an epoch, in an order that `rng` draws where the data leave it open."""

    def train(self, weights: WeightDict, ctx: FLContext) -> TrainingResult:
        """Trains from `weights`. The aggregation weight is the number of examples; `train_loss` is their mean loss.

        Raises:
            NamesError, ShapeError, DtypeError: The global model does not fit the model.
            ValueError: There are no examples.
        """
        load(self.model, weights, self.layout)
        self._global = frozenset(weights)
        step = self.begin()
        rng = np.random.default_rng([self.seed, ctx[ContextKey.ROUND]])
        losses, steps = Mean(), 0
        for _ in range(self.epochs):
            for batch in self.epoch(rng):
                losses.add(*step(batch))
                steps += 1
        train_loss = losses.value()
        trained = read(self.model, weights, self.layout)
        return TrainingResult(trained, losses.count / self.epochs, steps, {"train_loss": train_loss})

    def get_state(self) -> Any:
        """The model's own variables, which the global model lacks, such as counters of steps or a local part."""
        own = own_variables(self.model, self._global, self.layout) if self._global else {}
        return {"own": own} if own else None

    def set_state(self, state: Any) -> None:
        """Goes on with them."""
        set_weights(self.model, state["own"], strict=False)

    def validate(self, weights: WeightDict, ctx: FLContext) -> Mapping[str, float]:
        """Scores `weights`: each metric over the validation data."""
        load(self.model, weights, self.layout)
        return self.score(self.named_metrics)
