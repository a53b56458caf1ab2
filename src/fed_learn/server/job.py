"""`Job`: the moving parts of a running job that its rounds and its validation share."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fed_learn.contribution import ClientFailure, RoundReport
from fed_learn.errors import HandlerError, HandlerFailure, TooFewContributionsError, without_tracebacks
from fed_learn.events import EventType, fire_event, shut_down
from fed_learn.model_meta import ContextKey, FLContext, ModelData
from fed_learn.server.roster import Roster
from fed_learn.weights import FrozenWeights, WeightDict, as_weight_dict, check_finite

if TYPE_CHECKING:
    from fed_learn.server.fed_server import FederatedServer

logger = logging.getLogger(__name__)


class Job:
    """One run of a server: its context, its clients, the global model, and the record of what failed.

    Args:
        server: The settings.
        roster: The clients.
        ctx: The server's context.
    """

    def __init__(self, server: "FederatedServer", roster: Roster, ctx: FLContext) -> None:
        self.server = server
        self.roster = roster
        self.ctx = ctx
        self.required = len(roster) if server.min_contributions is None else server.min_contributions
        self.reports: list[RoundReport] = []
        self.quits: list[ClientFailure] = []
        self.handler_failures: list[HandlerFailure] = []
        self.local_bests: dict[str, FrozenWeights] = {}
        self.set_weights(server.weights)

    @property
    def weights(self) -> FrozenWeights:
        """The global model."""
        return self._weights

    def set_weights(self, weights: FrozenWeights) -> None:
        """Replaces the global model, in the context too."""
        self._weights = weights
        self._model = ModelData(weights)
        self.ctx.set_model(self._model)

    def fire(self, event: str, contributor: str | None = None) -> None:
        """Fires an event on the server's context. Failures are recorded, and raised or not as the server was told.

        Args:
            event: The event.
            contributor: The client that it is about, if it is about one.

        Raises:
            HandlerError: With `on_handler_error="raise"`.
        """
        if contributor is None:
            self.ctx.pop(ContextKey.CONTRIBUTOR, None)
        else:
            self.ctx.set_prop(ContextKey.CONTRIBUTOR, contributor)
        model = self.ctx.get_model()
        self._fire(event)
        self.ctx.set_model(model)  # only some events may replace the global model

    def _fire(self, event: str) -> None:
        try:
            fire_event(event, self.server.handlers, self.ctx)
        except HandlerError as error:
            self.record(error.failures)
            if self.server.on_handler_error == "raise":
                raise

    def fire_and_adopt(self, event: str) -> None:
        """Fires an event in which a handler may replace the global model; checks and keeps what it put there.

        Raises:
            ContributionError: It is not a model of the job's schema.
            HandlerError: As in `fire`.
        """
        self.ctx.pop(ContextKey.CONTRIBUTOR, None)
        self._fire(event)
        model = self.ctx.get_model()
        if model is self._model:
            return
        who = f"model set by a handler at {event}"
        arrays: WeightDict = as_weight_dict(None if model is None else model.weights, who)
        self.server.schema.check(arrays, who)
        check_finite(arrays, who)
        self.set_weights(FrozenWeights({name: arrays[name] for name in self.server.schema}))

    @property
    def report(self) -> RoundReport:
        """The report of the round, as the context has it."""
        report: RoundReport = self.ctx[ContextKey.REPORT]
        return report

    def update_report(self, **changes: Any) -> None:
        """Binds a report with some fields replaced."""
        self.ctx.set_prop(ContextKey.REPORT, replace(self.report, **changes))

    def record(self, failures: Sequence[HandlerFailure]) -> None:
        """Keeps failures of handlers for the report and the result."""
        self.handler_failures += failures
        if ContextKey.REPORT in self.ctx:
            self.update_report(handler_failures=(*self.report.handler_failures, *failures))

    def register(self) -> None:
        """Starts the clients; CLIENT_REGISTER for each.

        Raises:
            TooFewContributionsError: Not enough of them could start.
        """
        for name, answer in self.roster.ask(lambda client: client.start(self.server.num_rounds)):
            if isinstance(answer, Exception):
                self._leave(name, answer, "could not start")
            else:
                self.fire(EventType.CLIENT_REGISTER, name)
        self.check_enough_clients()

    def quit(self, name: str, error: Exception) -> None:
        """Takes a client that failed off the job: CLIENT_QUIT, and the client's own SHUTDOWN."""
        self._leave(name, error, "leaves the job")
        self.fire(EventType.CLIENT_QUIT, name)

    def _leave(self, name: str, error: Exception, what: str) -> None:
        logger.error("%s %s: %s: %s", name, what, type(error).__name__, error, exc_info=error)
        failure = ClientFailure(name, without_tracebacks(error))
        self.quits.append(failure)
        if ContextKey.REPORT in self.ctx:
            self.update_report(quits=(*self.report.quits, failure))
        if isinstance(error, HandlerError):
            self.record(error.failures)
        self.record(self.roster.remove(name).stop())

    def unregister(self) -> None:
        """The job is over: CLIENT_QUIT for each client, and its SHUTDOWN."""
        for name in self.roster:
            self.fire(EventType.CLIENT_QUIT, name)
            self.record(self.roster.remove(name).stop())

    def check_enough_clients(self) -> None:
        """Ends the job once too many clients have left.

        Raises:
            TooFewContributionsError: Fewer are left than are required.
        """
        if len(self.roster) < self.required:
            left = "; ".join(f"{quit.contributor} left ({quit.cause}: {quit.error})" for quit in self.quits)
            raise TooFewContributionsError(
                f"{len(self.roster)} clients are left, {self.required} required: {left}",
                count=len(self.roster),
                required=self.required,
                round=self.ctx.get_prop(ContextKey.ROUND),
            )

    def shut_down(self) -> tuple[HandlerFailure, ...]:
        """Ends the pool, the clients and the handlers, whatever fails in between."""
        failures: list[HandlerFailure] = []
        self.ctx.pop(ContextKey.CONTRIBUTOR, None)
        with ExitStack() as last_first:  # goes on whatever is raised, an interrupt included
            last_first.callback(lambda: failures.extend(shut_down(self.server.handlers, self.ctx)))
            for name in reversed(tuple(self.roster)):
                last_first.callback(lambda client: failures.extend(client.stop()), self.roster.remove(name))
            last_first.callback(self.roster.close)
        return tuple(failures)
