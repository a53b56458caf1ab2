"""`FLContext`, the job context that handlers share, with its keys, and `ModelData`, which holds a weight dict."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from fed_learn.contribution import BestModel
from fed_learn.weights import FrozenDict, WeightDict, size_text


class ContextKey(enum.StrEnum):
    """Keys of the props that the library sets in a context."""

    ROUND = "_round"
    """The current round, from 0. While the final model is scored: the number of rounds that were run."""
    NUM_ROUNDS = "_numRounds"
    """How many rounds the job has."""
    CONTRIBUTOR = "_contributor"
    """Server: the client that the event is about. Client: its own name."""
    CONTRIBUTION = "_contribution"
    """The `Contribution` at hand."""
    CONTRIBUTIONS = "_contributions"
    """The accepted contributions of the round so far: a tuple; in BEFORE_AGGREGATION by contributor name."""
    REJECTION = "_rejection"
    """Why the contribution at hand was refused (an exception), or None."""
    VALIDATION_RESULTS = "_validationResults"
    """`ValidationResult`s so far of the model being validated: a tuple, the one at hand last."""
    METRICS = "_metrics"
    """Scores that handlers published in this round: a read-only mapping (see `FLContext.publish_metric`)."""
    REPORT = "_report"
    """The `RoundReport` of the round so far."""
    BEST_RECEIVED = "_bestReceived"
    """`BestModel` among those the clients received; set by ModelSelectionHandler."""
    BEST_AGGREGATED = "_bestAggregated"
    """`BestModel` among those just aggregated; set by ServerValidationHandler, None until it found one."""
    STOP = "_stop"
    """Set to a reason (a str) before END_AGGREGATION to make this round the last."""
    SCORE_METRIC = "_scoreMetric"
    """Name of the metric by which clients' models are selected, which contributions hold as
    `initial_validation_metric`; absent where nobody declared it."""
    SCORE_MODE = "_scoreMode"
    """`"max"` or `"min"`: what is better of that metric; absent where nobody declared it."""
    SCORES_LATE = "_scoresLate"
    """True where the clients' scores come otherwise than with their contributions: a round without says nothing."""
    HANDLERS = "_handlers"
    """The handlers of the job: a tuple; absent where events are fired by hand."""
    AGGREGATOR = "_aggregator"
    """What makes the global model in the place of the weighted mean; absent where that does."""


@dataclass(frozen=True, eq=False)
class ModelData:
    """Holds a weight dict.

    Attributes:
        weights: The weight dict, or None.

    Example:
        >>> import numpy as np
        >>> ModelData({"w": np.zeros(2)}).params["w"]
        array([0., 0.])
    """

    weights: WeightDict | None = None

    def __repr__(self) -> str:
        return f"ModelData({size_text(self.weights)})"

    @property
    def params(self) -> WeightDict | None:
        """`weights`, by the name that Clara's readers use."""
        return self.weights


class FLContext(dict[str, Any]):
    """The context of a federated job: a dict whose items are its props, with a model and metadata beside them.

    Args:
        props: Initial props.
        model: Initial model.

    Example:
        >>> ctx = FLContext({ContextKey.ROUND: 3})
        >>> ctx.get_prop(ContextKey.ROUND), ctx["_round"], ctx.get_prop("other", "default")
        (3, 3, 'default')
    """

    def __init__(self, props: Mapping[str, Any] | None = None, *, model: ModelData | None = None) -> None:
        super().__init__(props or {})
        self._model = model
        self._metadata: dict[str, Any] = {}

    def get_prop(self, key: str, default: Any = None) -> Any:
        """The prop, or `default`."""
        return self.get(key, default)

    def set_prop(self, key: str, value: Any) -> None:
        """Binds a prop."""
        self[key] = value

    def set_props(self, props: Mapping[str, Any]) -> None:
        """Binds several props; others stay."""
        self.update(props)

    @property
    def model(self) -> ModelData | None:
        """The model at hand: on the server the global model, on a client the one it received."""
        return self._model

    @model.setter
    def model(self, model: ModelData | None) -> None:
        self._model = model

    def get_model(self) -> ModelData | None:
        """The same as `model`."""
        return self._model

    def set_model(self, model: ModelData | None) -> None:
        """Replaces the model. On the server, a handler replaces the global model so."""
        self._model = model

    def add_metadata(self, key: str, value: Any) -> None:
        """Adds or replaces one entry of the metadata."""
        self._metadata[key] = value

    def set_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Replaces all metadata by a copy of `metadata`."""
        self._metadata = dict(metadata)

    def get_metadata(self, key: str, default: Any = None) -> Any:
        """One entry of the metadata, or `default`."""
        return self._metadata.get(key, default)

    def get_all_metadata(self) -> dict[str, Any]:
        """A copy of the metadata."""
        return dict(self._metadata)

    def publish_metric(self, name: str, value: float) -> None:
        """Adds a score of this round to `ContextKey.METRICS`, and to the report, where logs find it."""
        metrics = FrozenDict({**self.get(ContextKey.METRICS, {}), name: float(value)})
        self[ContextKey.METRICS] = metrics
        report = self.get(ContextKey.REPORT)
        if report is not None:
            self[ContextKey.REPORT] = replace(report, metrics=metrics)

    @property
    def best_model(self) -> BestModel | None:
        """The job's best model: `BEST_AGGREGATED` where there is one, else `BEST_RECEIVED`, else None."""
        best: BestModel | None = self.get(ContextKey.BEST_AGGREGATED) or self.get(ContextKey.BEST_RECEIVED)
        return best

    def clone(self) -> Self:
        """A shallow copy: the same values under the same keys, the same model, the metadata copied."""
        copy = type(self).__new__(type(self))
        copy.restore(self.snapshot())
        return copy

    __copy__ = clone

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The bindings as they are: props, attributes (the model among them), metadata. For `restore`."""
        return dict(self), dict(self.__dict__), dict(self._metadata)

    def restore(self, snapshot: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
        """Puts the bindings back as they were at `snapshot`, the order of the props included."""
        props, attributes, metadata = snapshot
        dict.clear(self)
        dict.update(self, props)
        self.__dict__.clear()
        self.__dict__.update(attributes)
        self._metadata = dict(metadata)
