"""`FollowedJob`: a `Job` that NVFlare runs and aggregates. Knows nothing of NVFlare's own types."""

import logging
from collections.abc import Sequence
from typing import Any

from fed_learn.aggregation.tensors import as_tensors, opened, without_tensors
from fed_learn.contribution import FINAL_MODEL, Contribution, RoundReport, ValidationResult
from fed_learn.errors import FedLearnError, HandlerError, HandlerFailure
from fed_learn.events import EventHandler, EventType
from fed_learn.model_meta import ContextKey
from fed_learn.server.job import Job
from fed_learn.server.settings import JobSettings
from fed_learn.weights import FrozenWeights, Schema, WeightDict, as_weight_dict

logger = logging.getLogger(__name__)


class FollowedJob(Job):
    """A job whose contributions NVFlare aggregates. It is told of them, without their weights.

    The global model is NVFlare's, whatever its names and shapes: the context holds a copy, and nothing while it is not
    known. What a handler replaces it by is written into NVFlare's own dict.

    Args:
        handlers: The handlers.
        on_handler_error: `"raise"` or `"log"`; both log and record.
    """

    def __init__(self, handlers: Sequence[EventHandler], on_handler_error: str = "raise") -> None:
        self._theirs: Any = None
        self._n_iter: dict[str, int | None] = {}
        super().__init__(JobSettings(handlers=handlers, on_handler_error=on_handler_error), {})
        self.aggregated_elsewhere = True

    def register(self, name: str) -> None:
        """CLIENT_REGISTER, once for each client. Names are not checked: NVFlare has given them."""
        if name not in self.clients:
            self.clients[name] = None
            self.fire(EventType.CLIENT_REGISTER, name)

    def quit(self, name: str, error: Exception | None = None) -> None:
        """CLIENT_QUIT, once for each client: it is done, or has disconnected."""
        if name in self.clients:
            super().quit(name, error)

    def log_failure(self, name: str, error: Exception, what: str) -> None:
        """Logs nothing: NVFlare has done so."""

    def start_round(self, number: int, weights: WeightDict | None = None, *, num_rounds: int | None = None) -> None:
        """START_ROUND.

        Args:
            number: The round.
            weights: NVFlare's own dict of the global weights; None if they are not known yet.
            num_rounds: How many the job has, if that is known; the last is `num_rounds - 1`.

        Raises:
            HandlerError: A handler raised, or set what is no model, with `on_handler_error="raise"`.
            FedLearnError: A handler replaced the global model, and there is no dict to write it to.
        """
        self.ctx.pop(ContextKey.VALIDATION_RESULTS, None)
        self.ctx.set_prop(ContextKey.NUM_ROUNDS, num_rounds)
        self._theirs = weights
        self.show(weights)
        super().start_round(number)

    def show(self, weights: WeightDict | None) -> None:
        """Takes a copy of these weights, arrays or tensors, as the global model; None: it is not known."""
        self._adopt(_copied(weights))

    def note(self, name: str, contribution: Contribution | None, refusal: Exception | None = None) -> None:
        """RECEIVE_CONTRIBUTION: what NVFlare's aggregator has accepted, or refused."""
        if refusal is None and contribution is not None:
            self._n_iter[name] = contribution.n_iter
        self._asked.pop(name, None)
        super().note(name, contribution, refusal)

    def before_aggregation(self) -> tuple[Contribution, ...]:
        """BEFORE_AGGREGATION, unless there are no contributions; returns those that handlers have left.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
            FedLearnError: A handler did more than take some out; it changed a weight, for example.
        """
        self.update_report(absent=tuple(self._asked))
        before = self._contributions()
        chosen = super().before_aggregation() if before else ()
        left = {id(one) for one in chosen}
        kept = tuple(one for one in before if id(one) in left)
        if len(kept) < len(chosen):
            raise FedLearnError("a handler changed or added contributions, of which it can only take some out here")
        self.update_report(accepted=tuple(one.contributor for one in kept))
        return kept

    def end_aggregation(self, weights: WeightDict | None) -> None:
        """END_AGGREGATION, unless the round failed.

        Args:
            weights: NVFlare's own dict of the new global weights.

        Raises:
            HandlerError, FedLearnError: As in `start_round`.
        """
        self._theirs = weights
        if self.report.error is None and self.report.accepted:
            super().end_aggregation(_copied(weights))

    def end_round(self) -> RoundReport:
        """END_ROUND; returns the report of the round.

        Raises:
            HandlerError, FedLearnError: As in `start_round`.
        """
        report = super().end_round()
        self._theirs = None
        return report

    def begin_final(self, weights: WeightDict | None) -> None:
        """Begins the validation of the final model; its round is the one after the last that was run."""
        self.show(weights)
        self.begin_validation()
        self.ctx.set_prop(ContextKey.ROUND, self.reports[-1].round + 1 if self.reports else 0)

    def receive_result(self, name: str, metrics: dict[str, float], model: str = FINAL_MODEL) -> None:
        """RECEIVE_VALIDATION_RESULTS: a client's numbers on a model, which the context shows if it is the final one."""
        held = self.ctx.get_model()
        if model != FINAL_MODEL:
            self.ctx.set_model(None)
        self.note_validation_result(ValidationResult(name, model, metrics, self._n_iter.get(name)))
        self.ctx.set_model(held)

    def shut_down(self) -> tuple[HandlerFailure, ...]:
        """CLIENT_QUIT for each client that is left, and SHUTDOWN of every handler, once; returns what failed.

        Raises:
            HandlerError: With `on_handler_error="raise"`, when all is done.
        """
        failed: list[HandlerFailure] = []
        for name in tuple(self.clients):
            try:
                self.quit(name)
            except HandlerError as error:
                failed += error.failures
        failed += super().shut_down()
        if failed and self.on_handler_error == "raise":
            raise HandlerError(failed)
        return tuple(failed)

    def _begin(self, number: int | None) -> RoundReport:
        super()._begin(number)
        return RoundReport(-1 if number is None else number)  # the aggregator's report says by which kernel

    def _adopt(self, weights: FrozenWeights) -> None:
        self._schema = Schema.of(weights)
        super()._adopt(weights)
        if not weights:
            self._model = None
            self.ctx.set_model(None)

    def _fire_and_adopt(self, event: str) -> None:
        before = self.weights
        super()._fire_and_adopt(event)
        if self.weights is not before:
            _write(self.weights, self._theirs)

    def _fire(self, event: str) -> None:
        super()._fire(event)
        if self.stopped:
            reason = self.ctx.pop(ContextKey.STOP)
            message = f"a handler asked to end the job ({reason}), which the workflow does not offer"
            logger.error("%s", message)
            if self.on_handler_error == "raise":
                raise FedLearnError(message)


def _copied(weights: WeightDict | None) -> FrozenWeights:
    return FrozenWeights(as_weight_dict(without_tensors(weights or {}, "global model")))


def _write(weights: FrozenWeights, theirs: dict[str, Any] | None) -> None:
    """Writes a model that a handler put in the place of the global one into NVFlare's own dict, as arrays or tensors.

    Raises:
        FedLearnError: There is none.
    """
    if theirs is None:
        raise FedLearnError("a handler replaced the global model, which NVFlare does not hold where it could be put")
    place = opened(theirs, "global model").place
    arrays = {name: array.copy() for name, array in weights.items()}
    theirs.update(arrays if place is None else as_tensors(arrays, place))
