"""`JobEvents`: the events of a job on its context, and the record of the handlers that failed."""

from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fed_learn.arguments import check_choice
from fed_learn.components.direction import MODES
from fed_learn.contribution import INITIAL_VALIDATION_METRIC, ClientFailure, Contribution, RoundReport
from fed_learn.errors import HandlerError, HandlerFailure, NothingAggregatedError, text_of
from fed_learn.events import EventHandler, EventType, fire_event
from fed_learn.model_meta import ContextKey, JobContext, ModelData, frozen_model
from fed_learn.weights import FrozenWeights, Schema, WeightDict, as_weight_dict, check_finite


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
        self.ctx = JobContext({ContextKey.HANDLERS: self.handlers})
        self.reports: list[RoundReport] = []
        self.handler_failures: list[HandlerFailure] = []
        self._listed: tuple[Contribution, ...] = ()
        self._names: tuple[str, ...] = ()

    def declare_score(self, metric: str | None, mode: str | None) -> None:
        """Tells handlers, before STARTUP or the first score, by which metric models are selected, and what is better.

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
        """The report of the round, as the context has it."""
        report: RoundReport = self.ctx[ContextKey.REPORT]
        return report

    def update_report(self, **changes: Any) -> None:
        """Binds a report with some fields replaced."""
        self.ctx.set_prop(ContextKey.REPORT, replace(self.report, **changes))

    def drop_weights(self) -> None:
        """Binds the contributions of the round without their weights, which would take memory until the next one."""
        last: Contribution | None = self.ctx.get_prop(ContextKey.CONTRIBUTION)
        listed: Sequence[Contribution] = self.ctx.get_prop(ContextKey.CONTRIBUTIONS, ())
        light = {id(one): one.without_weights() for one in (*listed, last) if one is not None}
        if last is not None:
            self.ctx.set_prop(ContextKey.CONTRIBUTION, light[id(last)])
        self.ctx.set_prop(ContextKey.CONTRIBUTIONS, tuple([light[id(one)] for one in listed]))

    def record(self, failures: Sequence[HandlerFailure]) -> None:
        """Keeps failures of handlers for the report and the result, each without what its traceback would keep alive.

        With `on_handler_error="raise"` whoever is raised the error still finds where it happened.
        """
        if self.on_handler_error != "raise":
            for failure in failures:
                failure.without_tracebacks()
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
        # Unless a handler has bound others, only one is new: with many clients, to go through all takes long.
        names = self._names if accepted is self._listed else tuple(c.contributor for c in accepted)
        rejected = self.report.rejected
        if refusal is not None:
            rejected = (*rejected, ClientFailure(name, refusal))
        elif contribution is not None:
            place = bisect(names, contribution.contributor)
            accepted = (*accepted[:place], contribution, *accepted[place:])
            names = (*names[:place], contribution.contributor, *names[place:])
        self._listed, self._names = accepted, names
        self.ctx.set_props(
            {
                ContextKey.CONTRIBUTION: contribution,
                ContextKey.CONTRIBUTIONS: accepted,
                ContextKey.REJECTION: refusal,
            }
        )
        self.update_report(accepted=names, rejected=rejected)
        self.fire(EventType.RECEIVE_CONTRIBUTION, name)

    def fire_for_model(
        self, event: str, schema: Schema | None, constants: WeightDict | None = None
    ) -> FrozenWeights | None:
        """Fires an event in which a handler may replace the global model.

        Args:
            event: The event.
            schema: What a model must have; None or empty: nobody knows yet.
            constants: See `checked_model`.

        Returns:
            What it was replaced by, checked and in the order of the schema; None if it was not.

        Raises:
            HandlerError: As in `fire`; so it is where what a handler put there is not a model of the schema.
        """
        before, who = self.ctx.get_model(), f"model set by a handler at {event}"
        self.ctx.adopt = lambda given: ModelData(checked_model(given.weights, schema, who, constants=constants))
        try:
            self._fire(event, None)
        finally:
            self.ctx.adopt = frozen_model
        after: Any = self.ctx.get_model()
        replaced: FrozenWeights | None = None if after is before else after.weights
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


def checked_model(
    weights: object, schema: Schema | None, who: str, *, constants: WeightDict | None = None
) -> FrozenWeights:
    """A global model that comes from outside, in the order of the schema. Copied, unless it is frozen.

    Args:
        weights: Should be a weight dict.
        schema: What it must have; None or empty: nobody knows.
        who: Whose it is, for the error.
        constants: The global model before; what is not finite in it may stay as it is.

    Raises:
        ContributionError: It is no such model, or not finite.
    """
    arrays = as_weight_dict(weights, who)
    if schema:
        schema.check(arrays, who)
    check_finite(arrays, who, constants=constants or None)
    ordered = {name: arrays[name] for name in schema or arrays}
    return FrozenWeights.adopt(ordered) if type(weights) is FrozenWeights else FrozenWeights(ordered)


def nothing_aggregated(reports: Sequence[RoundReport]) -> NothingAggregatedError | None:
    """The error of a job whose rounds are over and in which none of them made a new global model.

    Returns:
        None if there was one, or if no round failed.

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
