"""Our context of a job that NVFlare runs, and the events on it. Knows nothing of NVFlare's own types."""

import logging
import time
from collections.abc import Sequence

from fed_learn.aggregation.tensors import without_tensors
from fed_learn.contribution import (
    FINAL_MODEL,
    BestModel,
    ClientFailure,
    Contribution,
    RoundReport,
    ValidationResult,
)
from fed_learn.errors import FedLearnError, HandlerError, HandlerFailure, without_tracebacks
from fed_learn.events import EventHandler, EventType, fire_event, shut_down
from fed_learn.model_meta import ContextKey, ModelData
from fed_learn.server.job_events import JobEvents
from fed_learn.weights import FrozenDict, FrozenWeights, Schema, WeightDict, as_weight_dict

logger = logging.getLogger(__name__)


class Mirror(JobEvents):
    """Fires our events, in our order and on our context, as a job that something else runs goes on.

    What `fed_learn.server.Job` is to a job whose contributions it averages itself, this is to one that is averaged
    elsewhere: it only follows. Contributions come without their weights.

    Args:
        handlers: The handlers.
        on_handler_error: `"raise"` or `"log"`; both log and record.
    """

    def __init__(self, handlers: Sequence[EventHandler], on_handler_error: str = "raise") -> None:
        super().__init__(handlers, on_handler_error)
        self._clients: dict[str, None] = {}
        self._asked: dict[str, None] = {}
        self._n_iter: dict[str, int | None] = {}
        self._in_round = False
        self._round_started = 0.0
        self._up = False

    @property
    def in_round(self) -> bool:
        """Whether a round has begun and not ended."""
        return self._in_round

    @property
    def best(self) -> BestModel | None:
        """The best model so far, as the handlers found it."""
        return self.ctx.best_model

    def start(self) -> None:
        """STARTUP.

        Raises:
            HandlerError: A handler could not start; those before it have been shut down.
        """
        try:
            fire_event(EventType.STARTUP, self.handlers, self.ctx)
        except HandlerError as error:
            self.record(error.failures)
            raise
        self._up = True

    def register(self, name: str) -> None:
        """CLIENT_REGISTER, once for each client.

        Raises:
            HandlerError: With `on_handler_error="raise"`, here and in all that follow.
        """
        if name not in self._clients:
            self._clients[name] = None
            self.fire(EventType.CLIENT_REGISTER, name)

    def quit(self, name: str, error: Exception | None = None) -> None:
        """CLIENT_QUIT: a client is done, or is gone."""
        if name not in self._clients:
            return
        del self._clients[name]
        if error is not None and self._in_round:
            self.update_report(quits=(*self.report.quits, ClientFailure(name, without_tracebacks(error))))
        self.fire(EventType.CLIENT_QUIT, name)

    def start_round(self, number: int, num_rounds: int | None, weights: WeightDict | None) -> FrozenWeights | None:
        """START_ROUND.

        Args:
            number: The round.
            num_rounds: How many the job has; the last is `num_rounds - 1`.
            weights: The global model, None if it is not known yet.

        Returns:
            A global model with which a handler replaced it, if one did.
        """
        self._in_round, self._round_started = True, time.perf_counter()
        self._asked.clear()
        for key in (ContextKey.CONTRIBUTION, ContextKey.REJECTION, ContextKey.VALIDATION_RESULTS):
            self.ctx.pop(key, None)
        self.ctx.set_props(
            {
                ContextKey.ROUND: number,
                ContextKey.NUM_ROUNDS: num_rounds,
                ContextKey.CONTRIBUTIONS: (),
                ContextKey.METRICS: FrozenDict(),
                ContextKey.REPORT: RoundReport(number),
            }
        )
        self.show(weights)
        return self._fire_and_adopt(EventType.START_ROUND)

    def show(self, weights: WeightDict | None) -> None:
        """Makes a copy of the weights the model in the context."""
        held = None if weights is None else FrozenWeights(as_weight_dict(without_tensors(weights, "global model")))
        self.ctx.set_model(None if held is None else ModelData(held))

    def send_model(self, name: str) -> None:
        """SEND_MODEL."""
        self._asked[name] = None
        self.fire(EventType.SEND_MODEL, name)

    def receive(self, name: str, contribution: Contribution | None, refusal: Exception | None) -> None:
        """RECEIVE_CONTRIBUTION: what has been accepted, or refused."""
        if refusal is None and contribution is not None:
            self._n_iter[name] = contribution.n_iter
        self._asked.pop(name, None)
        self.fire_contribution(name, contribution, None if refusal is None else without_tracebacks(refusal))

    def refuse(self, name: str, refusal: Exception) -> None:
        """RECEIVE_CONTRIBUTION once more, for one that is refused now that all contributions of the round are in."""
        listed: tuple[Contribution, ...] = self.ctx[ContextKey.CONTRIBUTIONS]
        refused = next((c for c in listed if c.contributor == name), None)
        self.ctx.set_prop(ContextKey.CONTRIBUTIONS, tuple(c for c in listed if c.contributor != name))
        self.fire_contribution(name, refused, without_tracebacks(refusal))

    def before_aggregation(self) -> tuple[str, ...] | None:
        """BEFORE_AGGREGATION.

        Returns:
            Names of the contributions to be averaged, if a handler took some out; None for all.

        Raises:
            FedLearnError: A handler did more than that, such as to weigh one anew.
        """
        self.update_report(absent=tuple(self._asked))
        before: tuple[Contribution, ...] = self.ctx[ContextKey.CONTRIBUTIONS]
        if before:
            self.fire(EventType.BEFORE_AGGREGATION)
        left = {id(c) for c in self.ctx[ContextKey.CONTRIBUTIONS]}
        kept = [c for c in before if id(c) in left]
        if len(kept) < len(self.ctx[ContextKey.CONTRIBUTIONS]):
            raise FedLearnError("a handler changed or added contributions, of which it can only take some out here")
        names = tuple(c.contributor for c in kept)
        self.update_report(accepted=names)
        return None if len(kept) == len(before) else names

    def note_aggregation(self, report: RoundReport) -> None:
        """Takes over what the aggregator reports of the average."""
        self.update_report(
            accepted=report.accepted,
            total_weight=report.total_weight,
            aggregation_seconds=report.aggregation_seconds,
            aggregation_bytes=report.aggregation_bytes,
            kernel=report.kernel,
            error=report.error,
        )

    def end_aggregation(self, weights: WeightDict | None) -> FrozenWeights | None:
        """END_AGGREGATION, unless the round failed; returns what `start_round` does.

        Args:
            weights: The new global model.
        """
        if self.report.error is not None or not self.report.accepted:
            return None
        self.show(weights)
        return self._fire_and_adopt(EventType.END_AGGREGATION)

    def end_round(self) -> FrozenWeights | None:
        """END_ROUND; returns what `start_round` does."""
        self.update_report(seconds=time.perf_counter() - self._round_started)
        replaced = self._fire_and_adopt(EventType.END_ROUND)
        self._in_round = False
        self.reports.append(self.report)
        return replaced

    def begin_final(self, weights: WeightDict | None) -> None:
        """From now on results on the final model come in; its round is the number of rounds that were run."""
        number = self.reports[-1].round + 1 if self.reports else 0
        for key in (
            ContextKey.CONTRIBUTION,
            ContextKey.CONTRIBUTIONS,
            ContextKey.REJECTION,
            ContextKey.REPORT,
            ContextKey.VALIDATION_RESULTS,
        ):
            self.ctx.pop(key, None)
        self.ctx.set_props({ContextKey.ROUND: number, ContextKey.METRICS: FrozenDict()})
        self.show(weights)

    def receive_result(self, name: str, metrics: dict[str, float], model: str = FINAL_MODEL) -> None:
        """RECEIVE_VALIDATION_RESULTS: a client's numbers on a model. The context holds the final model alone."""
        result = ValidationResult(name, model, metrics, self._n_iter.get(name))
        earlier = [r for r in self.ctx.get_prop(ContextKey.VALIDATION_RESULTS, ()) if r.model == model]
        self.ctx.set_prop(ContextKey.VALIDATION_RESULTS, (*earlier, result))
        held = self.ctx.get_model()
        if model != FINAL_MODEL:
            self.ctx.set_model(None)
        self.fire(EventType.RECEIVE_VALIDATION_RESULTS, name)
        self.ctx.set_model(held)

    def shut_down(self) -> None:
        """CLIENT_QUIT for each client that is left, and SHUTDOWN, once.

        Raises:
            HandlerError: With `on_handler_error="raise"`, when all is done.
        """
        if not self._up:
            return
        self._up = False
        failed: list[HandlerFailure] = []
        for name in tuple(self._clients):
            try:
                self.quit(name)
            except HandlerError as error:
                failed += error.failures
        self.ctx.pop(ContextKey.CONTRIBUTOR, None)
        late = shut_down(self.handlers, self.ctx)
        self.handler_failures += late
        failed += late
        if failed and self.on_handler_error == "raise":
            raise HandlerError(failed)

    def _fire_and_adopt(self, event: str) -> FrozenWeights | None:
        """Fires an event in which a handler may replace the global model; gives what it put there."""
        model = self.ctx.get_model()
        before = None if model is None else model.weights
        return self.fire_for_model(event, None if before is None else Schema.of(before), before)

    def _fire(self, event: str, contributor: str | None) -> None:
        super()._fire(event, contributor)
        if self.ctx.get_prop(ContextKey.STOP) is not None:
            reason = self.ctx.pop(ContextKey.STOP)
            message = f"a handler asked to end the job ({reason}), which the workflow does not offer"
            logger.error("%s", message)
            if self.on_handler_error == "raise":
                raise FedLearnError(message)
