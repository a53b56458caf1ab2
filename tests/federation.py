"""Small federations for the tests of whole jobs: learners without a model, clients that misbehave, handlers that watch.

Everything here is deterministic and takes microseconds.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

import fed_learn as fl

Array: TypeAlias = npt.NDArray[Any]
WeightDict: TypeAlias = Mapping[str, Array]

SERVER_EVENTS = (
    fl.EventType.STARTUP,
    fl.EventType.CLIENT_REGISTER,
    fl.EventType.START_ROUND,
    fl.EventType.SEND_MODEL,
    fl.EventType.RECEIVE_CONTRIBUTION,
    fl.EventType.BEFORE_AGGREGATION,
    fl.EventType.END_AGGREGATION,
    fl.EventType.END_ROUND,
    fl.EventType.RECEIVE_VALIDATION_RESULTS,
    fl.EventType.CLIENT_QUIT,
    fl.EventType.SHUTDOWN,
)
ROUND_EVENTS = SERVER_EVENTS[2:8]
"""Those that belong to a round."""
CLIENT_EVENTS = (
    fl.EventType.STARTUP,
    fl.EventType.GET_MODEL,
    fl.EventType.RECEIVE_MODEL,
    fl.EventType.SUBMIT_LOCAL_BEST_MODEL,
    fl.EventType.SEND_BEST_MODEL,
    fl.EventType.RECEIVE_VALIDATION_MODEL,
    fl.EventType.SEND_VALIDATION_RESULTS,
    fl.EventType.SHUTDOWN,
)


def initial_weights() -> dict[str, Array]:
    """A global model with a matrix, a vector and a counter, all zero."""
    return {
        "w": np.zeros((2, 3), np.float32),
        "b": np.zeros(3, np.float64),
        "steps": np.zeros((), np.int64),
    }


def noise(seed: int) -> dict[str, Array]:
    """A weight dict with the schema of `initial_weights` whose every bit matters."""
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(2, 3)).astype(np.float32),
        "b": rng.normal(size=3),
        "steps": np.array(rng.integers(1000), np.int64),
    }


Score: TypeAlias = Callable[[WeightDict], float]


class AddingLearner(fl.Learner):
    """Trains by adding `step` to every element.

    Args:
        step: What training adds; a weight dict adds to each variable its own.
        aggregation_weight: By how much the result counts.
        n_iter: Iterations that it reports.
        score: The accuracy that validation reports: a number, or a function of the weights.
        absent: Rounds that it sits out.
        during: Called with the context whenever it trains; may raise.
    """

    def __init__(
        self,
        step: float | WeightDict = 1.0,
        *,
        aggregation_weight: float = 1,
        n_iter: int | None = 1,
        score: float | Score = 0.5,
        absent: Container[int] = (),
        during: Callable[[fl.FLContext], object] | None = None,
    ) -> None:
        self.step = step
        self.aggregation_weight = aggregation_weight
        self.n_iter = n_iter
        self.score = score
        self.absent = absent
        self.during = during

    def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
        if self.during is not None:
            self.during(ctx)
        if ctx[fl.ContextKey.ROUND] in self.absent:
            return None
        trained = {}
        for name, array in weights.items():
            step = self.step[name] if isinstance(self.step, Mapping) else self.step
            trained[name] = np.asarray(array + step).astype(array.dtype)
        return fl.TrainingResult(trained, self.aggregation_weight, self.n_iter)

    def validate(self, weights: WeightDict, ctx: fl.FLContext) -> Mapping[str, float]:
        return {"accuracy": self.score(weights) if callable(self.score) else self.score}


class TamperingClient(fl.FederatedClient):
    """Sends something else than it trained, in the rounds that `rounds` names."""

    def __init__(
        self,
        name: str,
        learner: fl.Learner,
        *,
        tamper: Callable[[fl.Contribution], Any],
        rounds: Container[int],
        kind: fl.Kind = fl.Kind.FULL,
    ) -> None:
        super().__init__(name, learner, kind=kind)
        self.tamper = tamper
        self.rounds = rounds

    def train_round(self, number: int, request_model: Callable[[], WeightDict]) -> fl.Contribution | None:
        contribution = super().train_round(number, request_model)
        if contribution is None or number not in self.rounds:
            return contribution
        sent: fl.Contribution = self.tamper(contribution)
        return sent


class Recorder(fl.Handler):
    """Keeps each event it got and the context as it was then."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.contexts: list[fl.FLContext] = []

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        self.events.append(event)
        self.contexts.append(ctx.clone())

    def at(self, event: str) -> list[fl.FLContext]:
        """The contexts of one event."""
        return [ctx for seen, ctx in zip(self.events, self.contexts, strict=True) if seen == event]

    def with_contributors(self) -> list[tuple[str, str | None]]:
        """Each event with the client it was about."""
        return [
            (event, ctx.get_prop(fl.ContextKey.CONTRIBUTOR))
            for event, ctx in zip(self.events, self.contexts, strict=True)
        ]


class At(fl.Handler):
    """Does something at one event: calls `action` with the context."""

    def __init__(self, event: str, action: Callable[[fl.FLContext], object]) -> None:
        self.event = event
        self.action = action

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        if event == self.event:
            self.action(ctx)


class Lifecycle(fl.Handler):
    """Counts how often it was started and shut down."""

    def __init__(self) -> None:
        self.started = 0
        self.shut_down = 0

    def startup(self, ctx: fl.FLContext) -> None:
        self.started += 1

    def shutdown(self, ctx: fl.FLContext) -> None:
        self.shut_down += 1


class NormEvaluator(fl.ModelEvaluator):
    """Scores a model by one element of it, times `scale`."""

    metric_name = "first_element"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.metric = 0.0

    def evaluate(self, ctx: fl.FLContext) -> None:
        assert ctx.model is not None
        assert ctx.model.weights is not None
        self.metric = self.scale * float(next(iter(ctx.model.weights.values())).reshape(-1)[0])

    def get_metric(self) -> float:
        return self.metric


def raising(error: BaseException) -> Callable[[fl.FLContext], object]:
    """An action that raises `error`."""

    def action(ctx: fl.FLContext) -> object:
        raise error

    return action


def clients_of(learners: Mapping[str, fl.Learner], **arguments: Any) -> list[fl.FederatedClient]:
    """A client for each name and learner."""
    return [fl.FederatedClient(name, learner, **arguments) for name, learner in learners.items()]


def two_clients(handlers: Sequence[fl.Handler] = ()) -> list[fl.FederatedClient]:
    """`a` adds 1 and counts once, `b` adds 3 and counts three times: a round adds 2.5, exactly."""
    return clients_of({"a": AddingLearner(1), "b": AddingLearner(3, aggregation_weight=3)}, handlers=handlers)


def by_value(weights: WeightDict) -> float:
    """For `AddingLearner(score=)`: the first element of `b`."""
    return float(weights["b"][0])


def server_of(num_rounds: int = 2, **arguments: Any) -> fl.FederatedServer:
    """A server that starts from `initial_weights`."""
    return fl.FederatedServer(initial_weights(), num_rounds=num_rounds, **arguments)


def values(weights: WeightDict) -> tuple[float, float, float]:
    """One element of each variable, after a check that the others are the same."""
    for array in weights.values():
        assert np.all(array == array.reshape(-1)[0])
    w, b, steps = (float(weights[name].reshape(-1)[0]) for name in ("w", "b", "steps"))
    return w, b, steps


def failing(*rounds: int, error: BaseException | None = None) -> Callable[[fl.FLContext], object]:
    """For `AddingLearner(during=)`: raises in these rounds."""

    def during(ctx: fl.FLContext) -> object:
        if ctx[fl.ContextKey.ROUND] in rounds:
            raise error or RuntimeError("out of memory")
        return None

    return during


def shifted(weights: WeightDict, by: float) -> dict[str, Array]:
    """The weights with `by` more in every element."""
    return {name: np.asarray(array + by).astype(array.dtype) for name, array in weights.items()}


def replacing(by: float) -> Callable[[fl.FLContext], object]:
    """An action that replaces the model of the context by one with `by` more in every element."""

    def action(ctx: fl.FLContext) -> None:
        assert ctx.model is not None
        assert ctx.model.weights is not None
        ctx.set_model(fl.ModelData(shifted(ctx.model.weights, by)))

    return action


class Watched:
    """A job whose handlers count their starts and shutdowns; one of them may act up in between."""

    def __init__(self) -> None:
        self.counters: dict[str, list[Lifecycle]] = {}

    def chain(self, name: str, *between: fl.Handler) -> list[fl.Handler]:
        self.counters[name] = [Lifecycle(), Lifecycle()]
        return [self.counters[name][0], *between, self.counters[name][1]]

    def unbalanced(self) -> dict[str, list[tuple[int, int]]]:
        """Whoever was started and shut down unequally often, or twice."""
        counts = {name: [(h.started, h.shut_down) for h in chain] for name, chain in self.counters.items()}
        return {name: pairs for name, pairs in counts.items() if not set(pairs) <= {(0, 0), (1, 1)}}

    def started(self, name: str) -> list[int]:
        return [handler.started for handler in self.counters[name]]


def watched_job(
    on_server: Sequence[fl.Handler] = (),
    on_client: Sequence[fl.Handler] = (),
    learner: fl.Learner | None = None,
    client_class: Callable[..., fl.FederatedClient] = fl.FederatedClient,
    **arguments: Any,
) -> tuple[Watched, fl.FederatedServer, list[fl.FederatedClient]]:
    """Three clients; the one in the middle has `on_client` and `learner`."""
    watched = Watched()
    server = server_of(handlers=watched.chain("server", *on_server), **arguments)
    clients = [
        fl.FederatedClient("a", AddingLearner(), handlers=watched.chain("a")),
        client_class("b", learner or AddingLearner(), handlers=watched.chain("b", *on_client)),
        fl.FederatedClient("c", AddingLearner(), handlers=watched.chain("c")),
    ]
    return watched, server, clients
