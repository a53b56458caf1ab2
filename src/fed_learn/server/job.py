"""`Job`: one run of a server, event by event, driven by our server, by your own loop or by another stack.

Its rounds are those of `JobRounds`, and `DurableJob` keeps their state; here are its beginning, the validation of
models, and its end.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from fed_learn.contribution import FINAL_MODEL, INITIAL_VALIDATION_METRIC, ValidationResult
from fed_learn.errors import (
    FedLearnError,
    HandlerError,
    HandlerFailure,
    MetricError,
    OutOfTurnError,
    TooFewContributionsError,
    as_failure,
    described,
    is_error,
    printable,
    text_of,
)
from fed_learn.events import EventType, fire_event, shut_down
from fed_learn.model_meta import ContextKey, ModelData
from fed_learn.server.durable_job import DurableJob
from fed_learn.server.job_events import nothing_aggregated
from fed_learn.server.result import JobResult
from fed_learn.server.settings import JobSettings
from fed_learn.server.validation import checked_result
from fed_learn.weights import FrozenDict, FrozenWeights, WeightDict

logger = logging.getLogger(__name__)


class Job(DurableJob):
    """One run of a server: the context, the global model, the contributions of the round, and the record of it all.

    `FederatedServer.begin` makes one. Its driver (our server, your own loop, another stack) calls each method at the
    moment that the method is named after, and the method fires the event of that moment. As a context manager a job
    shuts the handlers down, whatever fails.

    Args:
        settings: The settings of the job.
        weights: The initial global model: see `initial_model`.
        num_clients: How many contributions a round needs if the settings say nothing; None: one of each client that
            was sent the model.

    Attributes:
        settings: As given.
        validation_results: What clients measured, in the order in which it came.
        cross_site: Model → client → that client's validation metric on it.

    Example:
        >>> import numpy as np, fed_learn as fl
        >>> server = fl.FederatedServer({"w": np.zeros(1)}, num_rounds=1)
        >>> with server.begin() as job:
        ...     job.start_round(0)
        ...     for name, w in {"site-1": 1.0, "site-2": 3.0}.items():
        ...         job.send_model(name)
        ...         accepted = job.receive(name, fl.Contribution(name, {"w": np.array([w])}, 10, round=0))
        ...     averaged, report = job.aggregate(), job.end_round()
        >>> averaged, report.accepted, job.weights["w"]
        (True, ('site-1', 'site-2'), array([2.]))
    """

    def __init__(self, settings: JobSettings, weights: WeightDict, num_clients: int | None = None) -> None:
        super().__init__(settings, weights, num_clients)
        self.cross_site: dict[str, dict[str, float]] = {}
        self.validation_results: list[ValidationResult] = []
        self._validated: str | None = None
        self._heard: set[str] = set()  # clients whose results on that model have been accepted
        self._final_metrics = FrozenDict()
        self._result: JobResult | None = None
        self._late: list[HandlerFailure] = []
        self._over = False
        self._finished = False

    def start(self, state: Any = None) -> None:
        """STARTUP.

        Args:
            state: Where to go on: what `load_state` gave of a job before; None: at the beginning.

        Raises:
            HandlerError: A handler could not start; those before it have been shut down.
            StateExistsError: The folder for the state holds that of another job.
            StateError: The state is none of this job, or the first one could not be written.
        """
        self.open_store(state)
        try:
            fire_event(EventType.STARTUP, self.handlers, self.ctx)
        except BaseException as error:
            self._over = True
            self.close_store()
            if isinstance(error, HandlerError):
                self.record(error.failures)
                error.result = self.result()
            raise
        try:
            if state is None:
                self.begin_ledger()
                self.save()
            else:
                self.set_state(state)
        except BaseException:
            self.shut_down()
            raise

    def start_round(self, number: int, weights: WeightDict | None = None) -> None:
        """START_ROUND; a handler may replace the global model, which is in the context again after a validation.

        Args:
            number: The round, from 0.
            weights: Replaces the global model, before a handler sees it. Copied, unless they are frozen.

        Raises:
            ContributionError: These are no model of the job's schema.
            HandlerError: A handler raised, or set what is no model, with `on_handler_error="raise"`.
            OutOfTurnError: The round before is not over, and contributions to it would be lost.
        """
        self._end_validation()
        super().start_round(number, weights)

    @property
    def stopped(self) -> bool:
        """Whether a handler made this round the last (`ContextKey.STOP`)."""
        return self.ctx.get_prop(ContextKey.STOP) is not None

    def get_state(self) -> dict[str, Any]:
        """What must outlive the process; as `DurableJob` says, with what has been validated so far."""
        return {
            **super().get_state(),
            "cross_site": self.cross_site,
            "validation_results": list(self.validation_results),
            "final_metrics": dict(self._final_metrics),
        }

    def set_state(self, state: Any) -> None:
        """Goes on with a state; as `DurableJob` says."""
        super().set_state(state)
        self.cross_site = {model: dict(row) for model, row in state["cross_site"].items()}
        self.validation_results = list(state["validation_results"])
        self._final_metrics = FrozenDict(state["final_metrics"])

    def begin_validation(self, model: str = FINAL_MODEL, weights: FrozenWeights | None = None) -> None:
        """Begins the validation of a model: the context shows it, and results on it may come in.

        Args:
            model: `FINAL_MODEL`, which comes first, is the global model after the last round. The round in the context
                is then the number of rounds run, the round in which clients would have received it. A client's name
                stands for its local best model, `GLOBAL_BEST` for the best model of the job.
            weights: The weights of the model; None: those of the global model.

        Raises:
            OutOfTurnError: A round is not over, and contributions to it would be lost.
        """
        self._check_answered("begin_validation")
        if model == FINAL_MODEL:
            self.ctx.set_props({ContextKey.ROUND: len(self.reports), ContextKey.METRICS: FrozenDict()})
            for key in (ContextKey.CONTRIBUTION, ContextKey.CONTRIBUTIONS, ContextKey.REJECTION, ContextKey.REPORT):
                self.ctx.pop(key, None)
        else:
            if self._validated == FINAL_MODEL:
                self._final_metrics = self.ctx[ContextKey.METRICS]
            self.cross_site.setdefault(model, {})
        self.ctx.pop(ContextKey.VALIDATION_RESULTS, None)
        self._validated, self._heard = model, set()
        self.ctx.set_model(self._model if weights is None else ModelData(weights))

    def receive_validation_result(self, name: str, result: object) -> ValidationResult | None:
        """RECEIVE_VALIDATION_RESULTS: one client's numbers on the model of `begin_validation`.

        Args:
            name: The client.
            result: A `ValidationResult`; an exception means that the client failed, and leaves the job. A bad result is
                left out, and logged.

        Raises:
            OutOfTurnError: No model is being validated.
        """
        if is_error(result):
            self.quit(name, as_failure(result))
            return None
        if self._validated is None:
            raise OutOfTurnError("receive_validation_result: begin_validation comes first")
        try:
            checked = checked_result(name, self._validated, result, self._heard)
        except BaseException as error:  # noqa: BLE001 - whatever a client sent must not end the job
            named = isinstance(as_failure(error), MetricError)
            reason = text_of(error) if named else f"{printable(name)}: {described(error)}"
            logger.error("a validation result is left out: %s", reason)
            return None
        self.note_validation_result(checked)
        if self._validated != FINAL_MODEL:
            self.cross_site[self._validated][name] = checked.metrics[INITIAL_VALIDATION_METRIC]
        return checked

    def note_validation_result(self, result: ValidationResult) -> None:
        """RECEIVE_VALIDATION_RESULTS: the context lists a checked result after the others on the same model.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        listed: tuple[ValidationResult, ...] = self.ctx.get_prop(ContextKey.VALIDATION_RESULTS, ())
        earlier = listed if listed and listed[-1].model == result.model else ()
        self.validation_results.append(result)
        if result.model == self._validated:
            self._heard.add(result.contributor)
        self.ctx.set_prop(ContextKey.VALIDATION_RESULTS, (*earlier, result))
        self.fire(EventType.RECEIVE_VALIDATION_RESULTS, result.contributor)

    def check_enough_clients(self) -> None:
        """Ends the job once too many clients have left.

        Raises:
            TooFewContributionsError: Fewer are left than are required.
        """
        if len(self.clients) < self.required:
            left = "; ".join(f"{quit.contributor} left ({described(quit.error)})" for quit in self.quits)
            raise TooFewContributionsError(
                f"{len(self.clients)} clients are left, {self.required} required: {left}",
                count=len(self.clients),
                required=self.required,
                round=self.ctx.get_prop(ContextKey.ROUND),
            )

    def finish(self) -> None:
        """Fixes the result: what handlers put into the context from now on is not in it.

        Raises:
            NothingAggregatedError: Rounds were run, and none of them made a new global model.
            OutOfTurnError: A round is not over, and contributions to it would be lost.
        """
        self._check_answered("finish")
        self.ctx.set_model(self._model)
        self._result = self._so_far()
        self._refuse_untrained()

    def result(self) -> JobResult:
        """The result of the job, or its result so far."""
        return replace(
            self._so_far() if self._result is None else self._result, handler_failures=tuple(self.handler_failures)
        )

    def shut_down(self) -> tuple[HandlerFailure, ...]:
        """SHUTDOWN of every handler, once; returns what failed, which has been logged."""
        if self._over:
            return ()
        self._over = True
        self.ctx.pop(ContextKey.CONTRIBUTOR, None)
        self.ctx.set_model(self._model)  # during a cross-site validation it is a client's model
        at_the_end = self.ctx.snapshot()
        try:
            failures = shut_down(self.handlers, self.ctx)
        finally:
            self.close_store()
            self.ctx.mend(at_the_end)  # handlers may have removed what the result is read from
        self.record_late(failures)
        return failures

    def record_late(self, failures: Sequence[HandlerFailure]) -> None:
        """Keeps failures of handlers while a job shuts down: they do not stop it from doing so."""
        self._late += failures
        self.handler_failures += failures

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.shut_down()
        except BaseException as leaving:
            self._leave_result(leaving)
            raise
        if error is None:
            self._check_answered("the end of the job")
            self._refuse_untrained()
        if error is not None:
            for failure in self._late:
                error.add_note(f"during shutdown: {failure}")
            self._leave_result(error)
        elif self._late and self.on_handler_error == "raise":
            late = HandlerError(tuple(self._late))
            late.result = self.result()
            raise late

    def _leave_result(self, error: BaseException) -> None:
        """Puts the result so far into the error that ends the job, or into the `SystemExit` that a handler raised."""
        if not isinstance(error, FedLearnError) and isinstance(error, Exception):
            return  # an error of the caller's own loop
        ended: Any = error
        ended.result = self._result_of_broken_job()
        if isinstance(error, SystemExit):
            logger.error(
                "the job ends by %s after %d rounds; what it has so far is the result of this exception",
                described(error),
                len(self.reports),
            )

    def _result_of_broken_job(self) -> JobResult:
        """The result so far, with the report of a round that did not come to its end."""
        result, under_way = self.result(), self.ctx.get_prop(ContextKey.REPORT)
        if under_way is None or any(report.round == under_way.round for report in result.reports):
            return result
        return replace(result, reports=(*result.reports, under_way))

    def _end_validation(self) -> None:
        """Ends a validation: the model in the context is the global model again."""
        if self._validated == FINAL_MODEL:
            self._final_metrics = self.ctx[ContextKey.METRICS]
        self._validated = None
        self.ctx.set_model(self._model)

    def _refuse_untrained(self) -> None:
        """Raises, once, if no round of the job was aggregated although clients were asked to train."""
        error = None if self._finished or self.aggregated_elsewhere else nothing_aggregated(self.reports)
        self._finished = True
        if error is not None:
            error.result = self.result()
            raise error

    def _so_far(self) -> JobResult:
        # While the final model is validated, handlers publish its scores in the context.
        final: Any = self.ctx[ContextKey.METRICS] if self._validated == FINAL_MODEL else self._final_metrics
        return JobResult(
            weights=self._weights,
            best=self.ctx.best_model,
            reports=tuple(self.reports),
            metrics=final,
            cross_site=self.cross_site,
            validation_results=tuple(self.validation_results),
            quits=tuple(self.quits),
            handler_failures=(),
            stop_reason=self.ctx.get_prop(ContextKey.STOP),
        )
