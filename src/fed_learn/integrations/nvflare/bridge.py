"""`HandlerBridge`: our handlers on the events of a job that NVFlare runs."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, MetaKey, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fed_learn.arguments import check_choice
from fed_learn.contribution import (
    FINAL_MODEL,
    INITIAL_VALIDATION_METRIC,
    BestModel,
    Contribution,
    Kind,
    check_aggregation_weight,
)
from fed_learn.errors import (
    AggregationWeightError,
    ClientQuitError,
    ContributionError,
    FedLearnError,
    NothingAggregatedError,
    WeightsTypeError,
    as_failure,
    described,
    printable,
    text_of,
)
from fed_learn.events import EventHandler, check_handlers
from fed_learn.integrations.nvflare import props
from fed_learn.integrations.nvflare.followed_job import FollowedJob
from fed_learn.model_meta import ContextKey
from fed_learn.server.job_events import nothing_aggregated
from fed_learn.values import whole_number_of


class HandlerBridge(FLComponent):  # type: ignore[misc] # NVFlare has no type information
    """Lets handlers act on the events of a job on NVFlare's server: `job.to_server(HandlerBridge([…]), id="handlers")`.

    NVFlare's events become ours, on our context (see `fed_learn.EventType`; `docs/nvflare.md` has the table). It works
    beside any aggregator; with those of this package handlers see exactly the contributions that were accepted, why
    others were refused, and how the average was taken. Contributions come without their weights.

    A handler may replace the global model in START_ROUND, END_AGGREGATION and END_ROUND, and with an aggregator of this
    package that does not stream, take contributions out in BEFORE_AGGREGATION. Whenever the job's best model changes,
    NVFlare is told (GLOBAL_BEST_MODEL_AVAILABLE), so that its persistor keeps it; NVFlare's own model selector should
    then be off (`key_metric=""`). To have the model of the last round scored as well, add `FinalValidation`.

    A training of which no round was aggregated ends the job with an error that names the commonest cause.

    Each handler is exported as a component of its own, by its path and arguments, so its arguments must be what JSON
    holds or objects that are exported in the same way.

    Args:
        handlers: Handlers; or, in a job's JSON, ids of components that are handlers.
        key_metric: Name of the metric that clients measure on the model as they received it: handlers see it as
            `initial_validation_metric` too.
        on_handler_error: `"raise"` ends the job when a handler raised (NVFlare's `system_panic`); `"log"` goes on. Both
            log and record it.
        mode: `"max"` or `"min"`: which `key_metric` is better, for handlers that are not told otherwise; None: not
            said.

    Raises:
        TypeError: A handler lacks `handle_event` or `rollback`.
        ValueError: For another `on_handler_error` or `mode`.

    Attributes:
        job: The job that runs or ran last, with its context, reports and failures; None before.
    """

    def __init__(
        self,
        handlers: Sequence[EventHandler | str],
        key_metric: str = "accuracy",
        on_handler_error: str = "raise",
        mode: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("on_handler_error", on_handler_error, ("raise", "log"))
        if mode is not None:
            check_choice("mode", mode, ("max", "min"))
        check_handlers([handler for handler in handlers if not isinstance(handler, str)])
        self.handlers = list(handlers)
        self.key_metric = key_metric
        self.on_handler_error = on_handler_error
        self.mode = mode
        self.job: FollowedJob | None = None
        self._lock = threading.RLock()
        self._first_round: int | None = None
        self._num_rounds: int | None = None
        self._announced: BestModel | None = None
        self._failed = False
        self._settle: Callable[[], Sequence[tuple[str, Exception]]] = tuple
        self._actions: dict[str, Callable[[FollowedJob, FLContext], None]] = {
            EventType.START_WORKFLOW: self._start_workflow,
            AppEventType.ROUND_STARTED: self._start_round,
            AppEventType.BEFORE_TRAIN_TASK: self._send_model,
            AppEventType.AFTER_CONTRIBUTION_ACCEPT: self._receive,
            AppEventType.BEFORE_AGGREGATION: self._before_aggregation,
            AppEventType.AFTER_AGGREGATION: self._after_aggregation,
            AppEventType.AFTER_SHAREABLE_TO_LEARNABLE: self._end_round,
            AppEventType.SEND_MODEL_FOR_VALIDATION: self._send_for_validation,
            AppEventType.VALIDATION_RESULT_RECEIVED: self._receive_result,
            EventType.CLIENT_DISCONNECTED: self._disconnected,
            EventType.END_WORKFLOW: self._end_workflow,
        }

    def add_to_fed_job(self, job: Any, ctx: Any, **kwargs: Any) -> Any:
        """Called by NVFlare's job API: adds each handler as a component, and the bridge with their ids.

        NVFlare copies the source of what a job uses into the job. This package is left out: it has to be installed
        where the job runs.
        """
        del kwargs
        job.set_app_packages(sorted({*job.job.app_packages, "fed_learn"}))
        ids = []
        for handler in self.handlers:
            named = isinstance(handler, str)
            ids.append(handler if named else job.add_component(type(handler).__name__, handler, ctx))
        exported = HandlerBridge(ids, self.key_metric, self.on_handler_error, self.mode)
        return job.add_component(ctx.comp_id or "handlers", exported, ctx)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Acts on NVFlare's event. What goes wrong ends the job: NVFlare itself would only log it."""
        announce = False
        try:
            with self._lock:
                if event_type == EventType.START_RUN:
                    self._start(fl_ctx)
                elif event_type == EventType.END_RUN:
                    self._shut_down()
                elif event_type in self._actions and self.job is not None and not self._failed:
                    self._actions[event_type](self.job, fl_ctx)
                    announce = self._best_changed(event_type)
        except NothingAggregatedError as error:
            self._failed = True
            self.system_panic(text_of(error), fl_ctx)
            return
        except BaseException as error:  # noqa: BLE001 - ends the job, below; NVFlare's threads would end without a word
            as_failure(error)
            self._failed = True
            self.log_exception(fl_ctx, f"at {event_type}: {described(error)}")
            # Outside of the lock: what acts on this event may wait for a thread that waits for the lock.
            self.system_panic(f"HandlerBridge at {event_type}: {text_of(error) or type(error).__name__}", fl_ctx)
            return
        if announce and self._announced is not None:
            props.put(fl_ctx, AppConstants.VALIDATION_RESULT, self._announced.metric)
            self.fire_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, fl_ctx)

    def _start(self, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        found: list[Any] = []
        for handler in self.handlers:
            component = engine.get_component(handler) if isinstance(handler, str) else handler
            if component is None:
                raise FedLearnError(f"the job has no component {handler!r}, which should be a handler")
            found.append(component)
        self._failed, self._announced = False, None
        self.job = FollowedJob(found, self.on_handler_error)
        self.job.declare_score(self.key_metric or None, self.mode)
        self.job.ctx.set_prop(ContextKey.SCORES_LATE, True)  # with a validation, if not with the contributions
        self.job.start()

    def _shut_down(self) -> None:
        if self.job is not None:
            self.job.shut_down()

    def _start_workflow(self, job: FollowedJob, fl_ctx: FLContext) -> None:
        self._first_round = self._num_rounds = None

    def _start_round(self, job: FollowedJob, fl_ctx: FLContext) -> None:
        number = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        if self._first_round is None:
            # From the second round on, FedAvg fires this event on a context that knows the number of rounds no more.
            self._first_round, count = number, fl_ctx.get_prop(AppConstants.NUM_ROUNDS)
            self._num_rounds = None if count is None else number + count
        for client in fl_ctx.get_engine().get_clients():
            job.register(client.name)
        job.start_round(number, props.global_weights(fl_ctx), num_rounds=self._num_rounds)

    def _send_model(self, job: FollowedJob, fl_ctx: FLContext) -> None:
        if not job.in_round:
            return
        if job.ctx.get_model() is None:  # a workflow that was given its model has it nowhere else in the first round
            job.show(FLModelUtils.from_shareable(fl_ctx.get_prop(AppConstants.TRAIN_SHAREABLE)).params)
        name = _peer(fl_ctx)
        job.register(name)
        job.send_model(name)

    def _receive(self, job: FollowedJob, fl_ctx: FLContext) -> None:
        if not job.in_round:
            return
        accepted = bool(fl_ctx.get_prop(AppConstants.AGGREGATION_ACCEPTED))
        outcome: props.Outcome | None = props.taken(fl_ctx, props.OUTCOME)
        result = fl_ctx.get_prop(AppConstants.TRAINING_RESULT)
        name = props.sender(result, _peer(fl_ctx))
        if outcome is not None:
            contribution, refusal, self._settle = outcome.contribution, outcome.refusal, outcome.settle
        else:
            contribution, refusal = _read(name, result, fl_ctx.get_prop(AppConstants.CURRENT_ROUND)), None
        if refusal is None and not accepted:
            refusal = _why_not(name, result)
        if contribution is not None:
            contribution = replace(contribution, metrics=self._named(contribution.metrics))
        job.note(name, contribution, refusal)

    def _before_aggregation(self, job: FollowedJob, fl_ctx: FLContext) -> None:
        if job.in_round:
            settle, self._settle = self._settle, tuple
            for name, refusal in settle():
                job.refuse(name, refusal)
            count = len(job.ctx[ContextKey.CONTRIBUTIONS])
            chosen = [one.contributor for one in job.before_aggregation()]
            props.put(fl_ctx, props.CONTRIBUTORS, chosen if len(chosen) < count else None)

    def _after_aggregation(self, job: FollowedJob, fl_ctx: FLContext) -> None:
        if not job.in_round:
            return
        report = props.taken(fl_ctx, props.REPORT)
        if report is not None:
            job.note_aggregation(report)
        elif props.taken(fl_ctx, props.CONTRIBUTORS) is not None:
            raise FedLearnError("a handler took contributions out, which this aggregator does not know of")

    def _end_round(self, job: FollowedJob, fl_ctx: FLContext) -> None:
        if not job.in_round:
            return
        job.end_aggregation(props.global_weights(fl_ctx))
        job.end_round()

    def _send_for_validation(self, job: FollowedJob, fl_ctx: FLContext) -> None:
        if fl_ctx.get_prop(AppConstants.MODEL_OWNER) != FINAL_MODEL:
            return
        if job.ctx.get_prop(ContextKey.REPORT) is not None:  # the first client
            job.begin_final(props.global_weights(fl_ctx))
        job.send_model(_peer(fl_ctx))

    def _receive_result(self, job: FollowedJob, fl_ctx: FLContext) -> None:
        name, model = fl_ctx.get_prop(AppConstants.DATA_CLIENT), fl_ctx.get_prop(AppConstants.MODEL_OWNER)
        result: Shareable = fl_ctx.get_prop(AppConstants.VALIDATION_RESULT)
        try:
            metrics = props.scores_in(result)
        except FedLearnError as error:
            text = printable(f"{name}: no validation result on {model!r}: {text_of(error)}")
            self.log_warning(fl_ctx, text, fire_event=False)
            return
        job.receive_result(name, self._named(metrics), model)

    def _disconnected(self, job: FollowedJob, fl_ctx: FLContext) -> None:
        name = fl_ctx.get_prop(FLContextKey.DISCONNECTED_CLIENT_NAME)
        job.quit(name, ClientQuitError(f"{name}: disconnected", contributor=name))

    def _end_workflow(self, job: FollowedJob, fl_ctx: FLContext) -> None:
        """Ends the job with an error if no round was aggregated, unless it ends with an error already.

        The best model may have changed by now: all clients have scored the final model.
        """
        error = nothing_aggregated(job.reports)
        if error is not None and not fl_ctx.get_prop(FLContextKey.FATAL_SYSTEM_ERROR):
            raise error

    def _best_changed(self, event_type: str) -> bool:
        """Whether NVFlare is told of a new best model, at an event at which its global model is that model."""
        best = None if self.job is None else self.job.ctx.best_model
        if best is None or best is self._announced:
            return False
        moments = (AppEventType.BEFORE_AGGREGATION, AppEventType.AFTER_SHAREABLE_TO_LEARNABLE, EventType.END_WORKFLOW)
        if event_type not in moments:
            return False
        self._announced = best
        return True

    def _named(self, metrics: Any) -> dict[str, float]:
        """The metrics, with `key_metric` as `initial_validation_metric` too."""
        named = dict(metrics)
        if self.key_metric in named:
            named.setdefault(INITIAL_VALIDATION_METRIC, named[self.key_metric])
        return named


def _peer(fl_ctx: FLContext) -> str:
    """The client that is talking."""
    peer = fl_ctx.get_peer_context()
    return str(peer.get_identity_name() if peer is not None else fl_ctx.get_prop(ReservedKey.IDENTITY_NAME))


def _read(name: str, result: Any, number: int | None) -> Contribution | None:
    """What is known of a contribution that another aggregator took; None if it cannot be read."""
    try:
        model: FLModel = FLModelUtils.from_shareable(result)
    except BaseException as error:  # noqa: BLE001 - from outside; the aggregator judges it, not the bridge
        as_failure(error)
        return None
    steps = (model.meta or {}).get(MetaKey.NUM_STEPS_CURRENT_ROUND)
    try:
        weight = check_aggregation_weight(steps, name) or 1.0
    except AggregationWeightError:
        weight = 1.0  # as NVFlare counts whatever is no number of steps
    kind = Kind.DIFF if model.params_type == ParamsType.DIFF else Kind.FULL
    metrics = props.numbers_in(model.metrics)
    return Contribution(name, None, weight, n_iter=whole_number_of(steps), round=number, kind=kind, metrics=metrics)


def _why_not(name: str, result: Any) -> ContributionError:
    """Why NVFlare did not accept a result, as far as can be told from outside."""
    try:
        empty = not FLModelUtils.from_shareable(result).params
    except BaseException as error:  # noqa: BLE001 - from outside, or not there at all: its client failed
        as_failure(error)
        empty = False
    if empty:
        return WeightsTypeError(f"{name}: sent no weights", contributor=name)
    return ContributionError(f"{name}: not accepted; the log of NVFlare says why", contributor=name)
