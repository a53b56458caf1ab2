"""`JobEvents`: the events of a job on its context, and the record of the handlers that failed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fed_learn.contribution import ClientFailure, Contribution, RoundReport
from fed_learn.errors import HandlerError, HandlerFailure
from fed_learn.events import EventHandler, EventType, fire_event
from fed_learn.model_meta import ContextKey, FLContext, ModelData
from fed_learn.weights import FrozenWeights, Schema, as_weight_dict, check_finite


class JobEvents:
    """What every job has, whoever averages and carries its messages.

    Args:
        handlers: The handlers.
        on_handler_error: `"raise"` ends the job when a handler raised; `"log"` goes on. Both log and record it.

    Attributes:
        ctx: The context.
        reports: One report per round that ended.
        handler_failures: Every handler that raised, in order.
    """

    def __init__(self, handlers: Sequence[EventHandler], on_handler_error: str = "raise") -> None:
        self.handlers = tuple(handlers)
        self.on_handler_error = on_handler_error
        self.ctx = FLContext({ContextKey.HANDLERS: self.handlers})
        self.reports: list[RoundReport] = []
        self.handler_failures: list[HandlerFailure] = []

    @property
    def report(self) -> RoundReport:
        """The report of the round, as the context has it."""
        report: RoundReport = self.ctx[ContextKey.REPORT]
        return report

    def update_report(self, **changes: Any) -> None:
        """Binds a report with some fields replaced."""
        self.ctx.set_prop(ContextKey.REPORT, replace(self.report, **changes))

    def drop_weights(self) -> None:
        """Binds the contributions of the round without their weights, which would take memory until the next one."""
        last: Contribution | None = self.ctx.get_prop(ContextKey.CONTRIBUTION)
        if last is not None:
            self.ctx.set_prop(ContextKey.CONTRIBUTION, last.without_weights())
        listed: Sequence[Contribution] = self.ctx.get_prop(ContextKey.CONTRIBUTIONS, ())
        self.ctx.set_prop(ContextKey.CONTRIBUTIONS, tuple(c.without_weights() for c in listed))

    def record(self, failures: Sequence[HandlerFailure]) -> None:
        """Keeps failures of handlers for the report and the result."""
        self.handler_failures += failures
        if ContextKey.REPORT in self.ctx:
            self.update_report(handler_failures=(*self.report.handler_failures, *failures))

    def fire(self, event: str, contributor: str | None = None) -> None:
        """Fires an event that may not replace the global model.

        Args:
            event: The event.
            contributor: The client that it is about, if it is about one.

        Raises:
            HandlerError: With `on_handler_error="raise"`.
        """
        model = self.ctx.get_model()
        self._fire(event, contributor)
        self.ctx.set_model(model)

    def fire_contribution(self, name: str, contribution: Contribution | None, refusal: Exception | None) -> None:
        """RECEIVE_CONTRIBUTION, with what a client sent in the context and in the report.

        Args:
            name: The client.
            contribution: What it sent; None if that was none.
            refusal: Why it is refused; None: it is accepted.

        Raises:
            HandlerError: As in `fire`.
        """
        accepted: tuple[Contribution, ...] = self.ctx[ContextKey.CONTRIBUTIONS]
        if refusal is not None:
            self.update_report(rejected=(*self.report.rejected, ClientFailure(name, refusal)))
        elif contribution is not None:
            accepted = tuple(sorted((*accepted, contribution), key=lambda c: c.contributor))
        self.ctx.set_props(
            {
                ContextKey.CONTRIBUTION: contribution,
                ContextKey.CONTRIBUTIONS: accepted,
                ContextKey.REJECTION: refusal,
            }
        )
        self.update_report(accepted=tuple(c.contributor for c in accepted))
        self.fire(EventType.RECEIVE_CONTRIBUTION, name)

    def fire_for_model(self, event: str, schema: Schema | None) -> FrozenWeights | None:
        """Fires an event in which a handler may replace the global model.

        Args:
            event: The event.
            schema: What a model must have; None: nobody knows yet.

        Returns:
            What it was replaced by, checked and in the order of the schema; None if it was not.

        Raises:
            ContributionError: It is not a model of the schema.
            HandlerError: As in `fire`.
        """
        before = self.ctx.get_model()
        self._fire(event, None)
        after = self.ctx.get_model()
        if after is before:
            return None
        replaced = checked_model(None if after is None else after.weights, schema, f"model set by a handler at {event}")
        self.ctx.set_model(ModelData(replaced))
        return replaced

    def _fire(self, event: str, contributor: str | None) -> None:
        if contributor is None:
            self.ctx.pop(ContextKey.CONTRIBUTOR, None)
        else:
            self.ctx.set_prop(ContextKey.CONTRIBUTOR, contributor)
        try:
            fire_event(event, self.handlers, self.ctx)
        except HandlerError as error:
            self.record(error.failures)
            if self.on_handler_error == "raise":
                raise


def checked_model(weights: object, schema: Schema | None, who: str) -> FrozenWeights:
    """A global model that comes from outside, in the order of the schema. Copied, unless it is frozen.

    Args:
        weights: Should be a weight dict.
        schema: What it must have; None: nobody knows.
        who: Whose it is, for the error.

    Raises:
        ContributionError: It is no such model, or not finite.
    """
    arrays = as_weight_dict(weights, who)
    if schema is not None:
        schema.check(arrays, who)
    check_finite(arrays, who)
    ordered = {name: arrays[name] for name in schema or arrays}
    return FrozenWeights.adopt(ordered) if type(weights) is FrozenWeights else FrozenWeights(ordered)
