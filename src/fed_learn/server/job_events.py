"""`JobEvents`: the events of a job on its context, its global model and clients, and the record of what failed."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fed_learn.arguments import check_choice
from fed_learn.components.direction import MODES
from fed_learn.contribution import INITIAL_VALIDATION_METRIC, ClientFailure, RoundReport, check_contributor
from fed_learn.errors import (
    HandlerError,
    HandlerFailure,
    NothingAggregatedError,
    described,
    printable,
    text_of,
    without_tracebacks,
)
from fed_learn.events import EventHandler, EventType, fire_event
from fed_learn.model_meta import ContextKey, JobContext, ModelData, frozen_model
from fed_learn.server.settings import checked_model
from fed_learn.weights import FrozenWeights, Schema

logger = logging.getLogger(__name__)


class JobEvents:
    """What every job has, whether it is driven by our server, by your own loop or by another stack.

    Args:
        handlers: The handlers.
        on_handler_error: `"raise"` ends the job when a handler raised; `"log"` goes on. Both log and record it.
        weights: The initial global model.

    Attributes:
        ctx: The context.
        reports: One report per round that ended.
        handler_failures: Every handler that raised, in order.
        clients: Names of the clients that have registered and not quit.
        quits: Clients that left because they failed, and why.
    """

    def __init__(self, handlers: Sequence[EventHandler], on_handler_error: str, weights: FrozenWeights) -> None:
        self.handlers = tuple(handlers)
        self.on_handler_error = on_handler_error
        self.ctx = JobContext({ContextKey.HANDLERS: self.handlers})
        self.reports: list[RoundReport] = []
        self.handler_failures: list[HandlerFailure] = []
        self.clients: dict[str, None] = {}
        self.quits: list[ClientFailure] = []
        self._schema = Schema.of(weights)
        self._adopt(weights)

    @property
    def weights(self) -> FrozenWeights:
        """The global model."""
        return self._weights

    @property
    def schema(self) -> Schema:
        """Names, shapes and dtypes of the global model; empty until they are known."""
        return self._schema

    def change_schema(self, schema: Schema) -> None:
        """From the next `start_round` on, the global model has this schema."""
        self._schema = schema

    def declare_score(self, metric: str | None, mode: str | None) -> None:
        """Tells handlers, before STARTUP or the first score, by which metric models are selected, and its direction.

        Raises:
            ValueError: `mode` is neither `"max"` nor `"min"` nor None.
        """
        if mode is not None:
            check_choice("mode", mode, MODES)
            self.ctx.set_prop(ContextKey.SCORE_MODE, mode)
        if metric is not None and metric != INITIAL_VALIDATION_METRIC:
            self.ctx.set_prop(ContextKey.SCORE_METRIC, metric)

    @property
    def report(self) -> RoundReport:
        """The report of the round, which is in the context."""
        report: RoundReport = self.ctx[ContextKey.REPORT]
        return report

    def update_report(self, **changes: Any) -> None:
        """Replaces some fields of the report in the context."""
        self.ctx[ContextKey.REPORT] = replace(self.ctx[ContextKey.REPORT], **changes)

    def register(self, name: str) -> None:
        """CLIENT_REGISTER: a client takes part from now on.

        Raises:
            UnknownContributorError: That cannot be the name of a client.
            HandlerError: A handler raised, with `on_handler_error="raise"`; so in every method that fires an event.
        """
        self.clients[check_contributor(name)] = None
        self.fire(EventType.CLIENT_REGISTER, name)

    def quit(self, name: str, error: Exception | None = None) -> None:
        """CLIENT_QUIT: a client leaves, because it is done (no error) or because it failed."""
        if error is not None:
            self.note_failure(name, error, "leaves the job")
        self.clients.pop(name, None)
        self.fire(EventType.CLIENT_QUIT, name)

    def note_failure(self, name: str, error: Exception, what: str) -> None:
        """Logs and records that a client failed, without an event."""
        self.log_failure(name, error, what)
        failure = ClientFailure(name, without_tracebacks(error))
        self.quits.append(failure)
        if ContextKey.REPORT in self.ctx:
            self.update_report(quits=(*self.report.quits, failure))
        if isinstance(error, HandlerError):
            self.record(error.failures)

    def log_failure(self, name: str, error: Exception, what: str) -> None:
        """Logs that a client failed. A stack that has said so in its own words overrides this."""
        logger.error("%s %s: %s", printable(name), what, described(error), exc_info=error)

    def record(self, failures: Sequence[HandlerFailure]) -> None:
        """Keeps failures of handlers for the report and the result.

        Their tracebacks are dropped, since they keep weights alive; not with `on_handler_error="raise"`, where the
        error that is raised has to show where it happened.
        """
        if self.on_handler_error != "raise":
            for failure in failures:
                failure.without_tracebacks()
        self.handler_failures += failures
        if ContextKey.REPORT in self.ctx:
            self.update_report(handler_failures=(*self.report.handler_failures, *failures))

    def fire(self, event: str, contributor: str | None = None) -> None:
        """Fires an event in which handlers cannot replace the global model.

        Args:
            event: The event.
            contributor: The client that it is about, if it is about one.

        Raises:
            HandlerError: With `on_handler_error="raise"`.
        """
        if contributor is None:
            self.ctx.pop(ContextKey.CONTRIBUTOR, None)
        else:
            self.ctx[ContextKey.CONTRIBUTOR] = contributor
        if self.handlers:
            model = self.ctx.get_model()
            self._fire(event)
            self.ctx.set_model(model)

    def _adopt(self, weights: FrozenWeights) -> None:
        """Replaces the global model, in the context too."""
        self._schema = self._schema or Schema.of(weights)
        self._weights = weights
        self._model: ModelData | None = ModelData(weights)
        self.ctx.set_model(self._model)

    def _fire_and_adopt(self, event: str) -> None:
        """Fires an event in which a handler may replace the global model, and keeps the new one.

        Raises:
            HandlerError: As in `fire`; also if a handler set something that is no model of the schema.
        """
        self.ctx.pop(ContextKey.CONTRIBUTOR, None)
        if not self.handlers:
            return
        before, who = self.ctx.get_model(), f"model set by a handler at {event}"
        self.ctx.adopt = lambda model: ModelData(
            checked_model(model.weights, self.schema, who, constants=self._weights)
        )
        try:
            self._fire(event)
        finally:
            self.ctx.adopt = frozen_model
        after: Any = self.ctx.get_model()
        if after is not before:
            self._adopt(after.weights)

    def _fire(self, event: str) -> None:
        try:
            fire_event(event, self.handlers, self.ctx)
        except HandlerError as error:
            self.record(error.failures)
            if self.on_handler_error == "raise":
                raise


def nothing_aggregated(reports: Sequence[RoundReport]) -> NothingAggregatedError | None:
    """The error by which a job ends in which no round made a new global model.

    Returns:
        None if a round made one, or if no round failed.

    Example:
        >>> refused = ClientFailure("site-1", ValueError("site-1: no number of examples"))
        >>> error = nothing_aggregated([RoundReport(0, rejected=(refused,), error=ValueError("too few"))] * 2)
        >>> error.rounds, error.count, error.cause
        (2, 2, 'ValueError')
    """
    if any(report.accepted and report.error is None for report in reports):
        return None
    causes = [(f.cause, text_of(f.error)) for report in reports for f in (*report.rejected, *report.quits)]
    causes += [(type(r.error).__name__, text_of(r.error)) for r in reports if r.accepted and r.error is not None]
    absent = sum(len(report.absent) for report in reports)
    if absent > len(causes):
        causes = [("absent", "a client did not contribute")] * absent
    if not causes:
        causes = [(type(r.error).__name__, text_of(r.error)) for r in reports if r.error is not None]
    if not causes:
        return None
    cause, count = Counter(cause for cause, _ in causes).most_common(1)[0]
    example = next(text for named, text in causes if named == cause)
    rounds = "1 round" if len(reports) == 1 else f"{len(reports)} rounds"
    return NothingAggregatedError(
        f"nothing was aggregated in {rounds}, so no client's work is in the model: {cause} "
        f"{'once' if count == 1 else f'{count} times'}, the first: {example}",
        cause=cause,
        count=count,
        rounds=len(reports),
    )
