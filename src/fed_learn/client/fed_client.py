"""`FederatedClient`: one client's side of a job, step by step, with its own context and handlers."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fed_learn.aggregation.differences import add_difference, difference
from fed_learn.aggregation.tensors import without_tensors
from fed_learn.client.fed_privacy import PrivacyProtocol, TrainContext
from fed_learn.client.filters import apply_filters, check_filters
from fed_learn.components.data_processor import DataProcessor
from fed_learn.components.learner import Learner
from fed_learn.components.returned import check_learner, metric_and_mode, mode_followed, scores, training_result
from fed_learn.contribution import (
    INITIAL_VALIDATION_METRIC,
    BestModel,
    Contribution,
    Kind,
    ValidationResult,
    check_contributor,
)
from fed_learn.durable.parts import give_all_back, states_of
from fed_learn.errors import (
    ClientQuitError,
    ContributionError,
    HandlerFailure,
    StateError,
    WeightsTypeError,
    described,
    text_of,
)
from fed_learn.events import EventHandler, EventType, check_handlers, fire_event, shut_down
from fed_learn.handlers.scoring import check_mode, is_better
from fed_learn.model_meta import ContextKey, JobContext, ModelData
from fed_learn.values import numbers_as_arrays, split_metrics
from fed_learn.weights import FrozenWeights, Schema, WeightDict, as_weight_dict, same_bits

logger = logging.getLogger(__name__)


class FederatedClient:
    """One client: asks for the global model, validates it, trains, contributes; later validates others' models.

    `FederatedServer.run` calls these methods; your own loop may call them as well. Each fires the client's events
    (GET_MODEL, RECEIVE_MODEL, …) on the client's own context, to the client's own handlers.

    Args:
        name: The contributor name. It must be stable from round to round and job to job: sums are taken in the
            order of names.
        learner: The local work: a `Learner`, or anything that has its `train` and `validate`.
        handlers: The client's handlers.
        kind: Contribute full weights, or the difference to the global model.
        filters: What the difference to the received model goes through, in this order, before anything of it leaves the
            client, whatever the kind: privacy protocols and data processors. The best local model that is offered is
            then one that was filtered. A variable with several names goes through them once, where the learner returns
            one array for all of them, as `fl.get_weights(model, copy=False)` does; see `fed_learn.ties`.

    Attributes:
        ctx: The client's context.
        is_not_sent: Whether a variable of some name is not to be sent, by the policies of the job, which sets it:
            `"local"` or `"keep"`. What the learner returns of them goes nowhere, and no filter sees it.
        keeps_best: Whether the best of its own models is looked for, by one more validation in each round, and kept to
            be offered at the end; the job sets it.

    Raises:
        UnknownContributorError: `name` cannot be one; see `fed_learn.contribution.check_contributor`.
        ValueError: The learner's `mode` is unknown.
        TypeError: The learner lacks `train` or `validate`, a handler `handle_event` or `rollback`, or a filter
            `apply` or `process`.
    """

    def __init__(
        self,
        name: str,
        learner: Learner,
        *,
        handlers: Sequence[EventHandler] = (),
        kind: Kind = Kind.FULL,
        filters: Sequence[PrivacyProtocol | DataProcessor] = (),
    ) -> None:
        self.name = name = check_contributor(name)
        self.learner = learner
        check_learner(learner, name)
        metric, mode = metric_and_mode(learner)
        check_mode(mode, 0.0, metric)
        self.handlers = check_handlers(handlers)
        self.kind = Kind(kind)
        self.filters = check_filters(filters)
        self.ctx = JobContext({ContextKey.CONTRIBUTOR: name, ContextKey.HANDLERS: self.handlers})
        self.is_not_sent: Callable[[str], bool] = lambda name: False
        self.keeps_best = True
        self._best: BestModel | None = None
        self._n_iter: int | None = None
        self._running = False
        self._quit_reason: str | None = None

    def start(self, num_rounds: int) -> None:
        """STARTUP.

        Raises:
            HandlerError: A handler could not start; those before it have been shut down.
        """
        metric, mode = metric_and_mode(self.learner)
        self.ctx = JobContext(
            {
                ContextKey.CONTRIBUTOR: self.name,
                ContextKey.NUM_ROUNDS: num_rounds,
                ContextKey.HANDLERS: self.handlers,
                ContextKey.SCORE_METRIC: metric,
                **({} if mode is None else {ContextKey.SCORE_MODE: mode}),
            }
        )
        self._best = None
        self._n_iter = None
        fire_event(EventType.STARTUP, self.handlers, self.ctx)
        self._running = True

    def get_state(self) -> dict[str, Any]:
        """What must outlive the process for this client to go on: also of its learner, its handlers and its filters.

        Raises:
            StateError: One of these could not hand over its state.
        """
        return {
            "best": self._best,
            "n_iter": self._n_iter,
            "learner": states_of([self.learner]),
            "handlers": states_of(self.handlers),
            "filters": states_of(self.filters),
        }

    def set_state(self, state: Mapping[str, Any] | None) -> None:
        """Goes on, after `start`, with what `get_state` gave; None: with nothing.

        Raises:
            StateError: It is no state of a client like this.
        """
        if state is None:
            return
        where = f"the state of {self.name}"
        try:
            self._best, self._n_iter = state["best"], state["n_iter"]
            give_all_back([self.learner], state["learner"], where)
            give_all_back(self.handlers, state["handlers"], where)
            give_all_back(self.filters, state["filters"], where)
        except (KeyError, TypeError) as error:
            raise StateError(f"{where} is none: {described(error)}", contributor=self.name) from error

    def quit(self, reason: str = "quit") -> None:
        """Makes the client leave the job at the next thing the server asks of it."""
        self._quit_reason = reason

    def train_round(self, number: int, request_model: Callable[[], WeightDict]) -> Contribution | None:
        """One round: GET_MODEL, RECEIVE_MODEL, validate what was received, train, contribute.

        What was trained is validated too: the best of these models is the one that `submit_best_model` offers.

        Args:
            number: The round, from 0.
            request_model: Gives the global weights.

        Returns:
            The contribution, its weights an own copy; None if the learner sits the round out. Its metrics hold the
            scores of the received model as `initial_<name>`, the one to select by also as
            `initial_validation_metric`, and those of training. What the learner gave among them that is no number is in
            its `info`.

        Raises:
            ClientQuitError: `quit` was called.
            ContributionError: What the learner or a filter returned is no weight dict, or has no difference to what it
                got.
            FilterError: A filter raised.
            HandlerError: A handler raised.
            TypeError: The learner returned something else than `Learner` says.
            MetricError: Validation did not give the metric to select by.
            Exception: Whatever the learner raises.
        """
        self._check_quit()
        self.ctx.set_prop(ContextKey.ROUND, number)
        fire_event(EventType.GET_MODEL, self.handlers, self.ctx)
        received = FrozenWeights(request_model())
        model = self._with_model(received, EventType.RECEIVE_MODEL)
        metrics, info = self._validate(model)
        result = training_result(self.learner.train(model, self.ctx), self.name)
        if result is None:
            return None
        trained = self._trained(result.weights, received)
        self._n_iter = result.n_iter
        diff = self._difference(trained, received) if self.filters or self.kind is Kind.DIFF else None
        if self.filters and diff is not None:
            diff = self._filtered(diff, TrainContext(result.n_iter, number))
            still = {name: received[name] for name in trained if name not in diff}  # what no difference can say
            trained = FrozenWeights.adopt({**still, **self._moved(received, diff)})
        if self.keeps_best:
            self._keep_best(number, FrozenWeights.adopt({**received, **trained}))
        weights = trained if self.kind is Kind.FULL or diff is None else diff
        of_training, told = split_metrics(result.metrics)
        return Contribution(
            self.name,
            weights,
            result.aggregation_weight,
            n_iter=result.n_iter,
            round=number,
            kind=self.kind,
            metrics={**metrics, **of_training},
            info={**info, **told},
        )

    def submit_best_model(self) -> FrozenWeights | None:
        """SUBMIT_LOCAL_BEST_MODEL, SEND_BEST_MODEL: this client's best local model, None if it never trained.

        Raises:
            ClientQuitError, HandlerError: As in `train_round`.
        """
        self._check_quit()
        if self._best is None:
            return None
        best = self._with_model(self._best.weights, EventType.SUBMIT_LOCAL_BEST_MODEL)
        return self._with_model(best, EventType.SEND_BEST_MODEL)

    def validate_model(self, model: str, weights: WeightDict) -> ValidationResult:
        """RECEIVE_VALIDATION_MODEL, validate, SEND_VALIDATION_RESULTS.

        Args:
            model: Which model it is (see `ValidationResult.model`).
            weights: Its weights.

        Raises:
            ClientQuitError, HandlerError, Exception: As in `train_round`.
        """
        self._check_quit()
        received = self._with_model(FrozenWeights(weights), EventType.RECEIVE_VALIDATION_MODEL)
        metrics, _ = self._validate(received)
        result = ValidationResult(self.name, model, metrics, self._n_iter)
        self.ctx.set_prop(ContextKey.VALIDATION_RESULTS, (result,))
        fire_event(EventType.SEND_VALIDATION_RESULTS, self.handlers, self.ctx)
        return result

    def stop(self) -> tuple[HandlerFailure, ...]:
        """SHUTDOWN of every handler that started, once; returns what failed, which has been logged."""
        self._quit_reason = None
        if not self._running:
            return ()
        self._running = False
        return shut_down(self.handlers, self.ctx, of_client=True)

    def _check_quit(self) -> None:
        if self._quit_reason is not None:
            raise ClientQuitError(f"{self.name}: {self._quit_reason}", contributor=self.name)

    def _trained(self, weights: Any, received: FrozenWeights) -> FrozenWeights:
        """What was trained, as a weight dict: all or a part of what was received, and nothing that stays here."""
        if isinstance(weights, Mapping):
            weights = {n: v for n, v in weights.items() if type(n) is not str or not self.is_not_sent(n)}
        given = numbers_as_arrays(without_tensors(weights, self.name), Schema.of(received))
        arrays = as_weight_dict(given, self.name)
        if not arrays and received:
            raise WeightsTypeError(f"{self.name}: train returned weights without a variable", contributor=self.name)
        return FrozenWeights(arrays)

    def _difference(self, trained: FrozenWeights, received: FrozenWeights) -> FrozenWeights:
        """The difference, without the variables whose dtype can hold none, as codes have it, if they are unchanged."""
        still = {
            name
            for name, array in trained.items()
            if array.dtype.kind in "bu" and name in received and same_bits(array, received[name])
        }
        moved = {name: array for name, array in trained.items() if name not in still} if still else trained
        with self._named_in_errors():
            return FrozenWeights.adopt(difference(moved, received))

    def _filtered(self, diff: FrozenWeights, train_ctx: TrainContext) -> FrozenWeights:
        return FrozenWeights(apply_filters(self.filters, diff, train_ctx, self.ctx, self.name))

    def _moved(self, received: FrozenWeights, diff: FrozenWeights) -> FrozenWeights:
        with self._named_in_errors():
            return FrozenWeights.adopt(add_difference(received, diff))

    @contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except ContributionError as error:
            error.contributor = self.name
            error.args = (f"{self.name}: {text_of(error)}",)
            raise

    def _with_model(self, weights: FrozenWeights, event: str) -> FrozenWeights:
        """Binds the model, fires the event, and gives the weights as the handlers left them."""
        self.ctx.set_model(ModelData(weights))
        fire_event(event, self.handlers, self.ctx)
        model: Any = self.ctx.get_model()
        return FrozenWeights(model.weights)

    def _validate(self, weights: FrozenWeights) -> tuple[dict[str, float], dict[str, Any]]:
        """The scores of a model and what else is told of it, under the names of a contribution."""
        found, told = self._scores(weights)
        metric, _ = metric_and_mode(self.learner)
        named = {f"initial_{name}": value for name, value in found.items()}
        info = {f"initial_{name}": value for name, value in told.items()}
        return {INITIAL_VALIDATION_METRIC: found[metric], **named}, info

    def _scores(self, weights: FrozenWeights) -> tuple[dict[str, float], dict[str, Any]]:
        return scores(self.learner.validate(weights, self.ctx), self.learner, self.name)

    def _keep_best(self, number: int, trained: FrozenWeights) -> None:
        metric, _ = metric_and_mode(self.learner)
        found, _ = self._scores(trained)
        if is_better(found[metric], self._best, mode_followed(self.learner), 0.0):
            self._best = BestModel(number, found[metric], metric, trained)

    def __repr__(self) -> str:
        names = ", ".join(type(handler).__name__ for handler in self.handlers)
        with_handlers = f", handlers=[{names}]" if names else ""
        return f"FederatedClient({self.name!r}, {type(self.learner).__name__}, kind={str(self.kind)!r}{with_handlers})"
