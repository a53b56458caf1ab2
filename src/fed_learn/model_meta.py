"""`FLContext`, the job context that handlers share, with its keys, and `ModelData`, which holds a weight dict."""

import enum
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from itertools import compress, repeat
from numbers import Real
from operator import is_not
from typing import Any, Self

from fed_learn.contribution import BestModel, Contribution, RoundReport
from fed_learn.errors import ContextError, brief
from fed_learn.weights import FrozenDict, FrozenWeights, WeightDict, size_text


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

    def check(self, snapshot: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
        """Raises if, since `snapshot`, a handler has bound what it may not. Here it may bind anything."""

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


def frozen_model(model: ModelData) -> ModelData:
    """The model with weights that nobody can change.

    Raises:
        WeightsTypeError: They are no weight dict.
    """
    return model if type(model.weights) is FrozenWeights else ModelData(FrozenWeights(model.weights or {}))


class JobContext(FLContext):
    """The context of a job that the library runs: after each handler it checks what the handler did to it.

    Handlers share the context, and rely on what the library puts there. A handler may choose among the contributions,
    publish scores, name a best model, stop the job and replace the model; it may bind any key of its own. A handler
    that takes away another key of the library or binds something else to it has failed, at that moment and by its name.

    Attributes:
        adopt: Checks a model that a handler has put into the context, and gives the one that is kept.

    Example:
        >>> ctx = JobContext({ContextKey.ROUND: 3})
        >>> before = ctx.snapshot()
        >>> ctx[ContextKey.ROUND] = "x"
        >>> ctx.check(before)
        Traceback (most recent call last):
        ...
        fed_learn.errors.ContextError: a handler cannot bind _round to 'x' in the context of a job
    """

    adopt: Callable[[ModelData], ModelData] = staticmethod(frozen_model)

    def check(self, snapshot: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
        """Refuses what a handler did to the keys of the library, and to the model, since `snapshot`.

        Raises:
            ContextError: It took one of them away, or bound what does not belong there.
            ContributionError: It put a model into the context that is none of the job's.
        """
        before, attributes, _ = snapshot
        for key in self._garbled(before):
            value = self.get(key, _NOTHING)
            done = f"take {key} out of" if value is _NOTHING else f"bind {key} to {brief(value)} in"
            wanted = f"; it can bind {_WANTED[key]}" if key in _WANTED else ""
            raise ContextError(f"a handler cannot {done} the context of a job{wanted}", key=key)
        model = self._model
        if model is not attributes["_model"]:
            if model is None or not isinstance(getattr(model, "weights", None), Mapping):
                raise ContextError(
                    f"a handler cannot make {brief(model)} the model of a job; it can set a ModelData", key="model"
                )
            self._model = self.adopt(model)

    def mend(self, snapshot: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
        """Puts the model back, and the keys of the library that handlers took away or garbled since `snapshot`."""
        before, attributes, _ = snapshot
        for key in {*self._garbled(before), *(before.keys() & set(_KEYS)) - self.keys()}:
            self[key] = before[key]
        self._model = attributes["_model"]

    def _garbled(self, before: Mapping[str, Any]) -> list[str]:
        """Keys of the library to which is bound what does not belong there, or nothing any more."""
        bound, were_bound = map(self.get, _KEYS, repeat(_NOTHING)), map(before.get, _KEYS, repeat(_NOTHING))
        changed = compress(_KEYS, map(is_not, bound, were_bound))  # most handlers bind none of them
        return [
            key
            for key in changed
            if not _BOUND_BY_HANDLERS.get(key, _is_as_it_was)(self.get(key, _NOTHING), before.get(key, _NOTHING))
        ]


_NOTHING: Any = object()
"""In the place of what is bound to a key that is not bound."""


def _is_as_it_was(value: object, own: object) -> bool:
    """Whether the job has bound nothing, or the same: Python has but one object of a number only where it is small."""
    return own is _NOTHING or (type(value) is type(own) is int and value == own)


def _are_contributions(value: object, _: object) -> bool:
    return isinstance(value, Collection) and all(isinstance(one, Contribution) for one in value)


def _are_scores(value: object, _: object = None) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(score, Real) for name, score in value.items()
    )


def _is_report_with_scores(value: object, own: object) -> bool:
    """Whether a report is that of the job but for scores that handlers have added."""
    if not isinstance(value, RoundReport) or not isinstance(own, RoundReport):
        return False
    return _are_scores(value.metrics) and all(
        getattr(value, field.name) is getattr(own, field.name) for field in fields(own) if field.name != "metrics"
    )


def _is_reason(value: object, _: object) -> bool:
    return value is None or value is _NOTHING or isinstance(value, str)


def _is_best(value: object, _: object) -> bool:
    return value is None or value is _NOTHING or (isinstance(value, BestModel) and isinstance(value.weights, Mapping))


_BOUND_BY_HANDLERS: dict[str, Callable[[object, object], bool]] = {
    ContextKey.CONTRIBUTIONS: _are_contributions,
    ContextKey.METRICS: _are_scores,
    ContextKey.REPORT: _is_report_with_scores,
    ContextKey.STOP: _is_reason,
    ContextKey.BEST_RECEIVED: _is_best,
    ContextKey.BEST_AGGREGATED: _is_best,
}
"""What a handler may bind to which key of the library, given what was there. The others are the job's own."""
_WANTED: dict[str, str] = {
    ContextKey.CONTRIBUTIONS: "some of the contributions, in a list",
    ContextKey.METRICS: "a dict of names to numbers",
    ContextKey.REPORT: "the report of the job with other metrics",
    ContextKey.STOP: "a reason, as text",
    ContextKey.BEST_RECEIVED: "a BestModel",
    ContextKey.BEST_AGGREGATED: "a BestModel",
}
_KEYS = tuple(ContextKey)
