"""What `HandlerBridge` is made of: the events that a foreign job brings about, and what goes wrong in them."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fed_learn as fl

pytest.importorskip("nvflare")

from nvflare.apis.client import Client
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.utils.event import fire_event_to_components
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.job_config.base_fed_job import BaseFedJob

from fed_learn.contribution import ClientFailure
from fed_learn.errors import HandlerError, NothingAggregatedError
from fed_learn.integrations.nvflare import HandlerBridge, WeightedAverageAggregator, add_handlers, props
from fed_learn.integrations.nvflare.followed_job import FollowedJob
from fed_learn.server.job_events import nothing_aggregated

W = {"w": np.zeros(2, np.float32)}


class Log(fl.Handler):
    """Keeps the events and what was in the context."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        self.seen.append((event, ctx.clone()))


class Sets(fl.Handler):
    """Replaces the global model at an event."""

    def __init__(self, event: str, weights: Any) -> None:
        self.event = event
        self.weights = weights

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        if event == self.event:
            ctx.set_model(fl.ModelData(self.weights))


class Fails(fl.Handler):
    """Raises at an event."""

    def __init__(self, event: str) -> None:
        self.event = event

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        if event == self.event:
            raise RuntimeError("on purpose")


def contribution(name: str, accuracy: float, n_iter: int = 1) -> fl.Contribution:
    metrics = {"initial_validation_metric": accuracy}
    return fl.Contribution(name, None, 10, n_iter=n_iter, round=0, metrics=metrics)


def started(*handlers: fl.Handler, on_handler_error: str = "raise") -> FollowedJob:
    job = FollowedJob(handlers, on_handler_error)
    job.start()
    for name in ("a", "b"):
        job.register(name)
    job.start_round(0, dict(W), num_rounds=2)
    return job


def test_a_round_in_which_one_is_refused_and_one_is_absent() -> None:
    log = Log()
    job = started(log)
    job.register("c")
    for name in ("a", "b", "c"):
        job.send_model(name)
    job.note("b", contribution("b", 0.5))
    job.note("a", contribution("a", 0.5), fl.NonFiniteError("a: nan", contributor="a"))
    assert [c.contributor for c in job.before_aggregation()] == ["b"]
    job.note_aggregation(fl.RoundReport(0, ("b",), total_weight=10.0, kernel="numpy", aggregation_bytes=8))
    job.end_aggregation({"w": np.ones(2, np.float32)})
    job.end_round()
    (report,) = job.reports
    assert (report.accepted, report.absent, report.total_weight, report.kernel) == (("b",), ("c",), 10.0, "numpy")
    assert [(r.contributor, r.cause) for r in report.rejected] == [("a", "NonFiniteError")]
    last = [event for event, _ in log.seen][-4:]
    assert last == ["_receiveContribution", "_beforeAggregation", "_endAggregation", "_endRound"]
    (_, at_refusal) = log.seen[-4]
    assert isinstance(at_refusal[fl.ContextKey.REJECTION], fl.NonFiniteError)
    assert [c.contributor for c in at_refusal[fl.ContextKey.CONTRIBUTIONS]] == ["b"]
    assert at_refusal[fl.ContextKey.NUM_ROUNDS] == 2


def test_a_round_that_failed_has_no_end_of_aggregation() -> None:
    log = Log()
    job = started(log)
    job.note("a", contribution("a", 0.5))
    job.before_aggregation()
    job.note_aggregation(fl.RoundReport(0, ("a",), error=fl.TooFewContributionsError("1 of 2")))
    job.end_aggregation({"w": np.ones(2, np.float32)})
    assert job.weights["w"].tolist() == [0, 0]
    job.end_round()
    assert [event for event, _ in log.seen][-2:] == ["_beforeAggregation", "_endRound"]
    assert str(job.reports[0].error) == "1 of 2"


@pytest.mark.parametrize("event", [fl.EventType.END_AGGREGATION, fl.EventType.END_ROUND])
def test_a_handler_replaces_the_global_model(event: str) -> None:
    job = started(Sets(event, {"w": np.full(2, 7, np.float32)}))
    job.note("a", contribution("a", 0.5))
    job.before_aggregation()
    theirs = {"w": np.ones(2, np.float32)}
    job.end_aggregation(theirs)
    assert theirs["w"].tolist() == ([7, 7] if event == fl.EventType.END_AGGREGATION else [1, 1])
    job.end_round()
    assert theirs["w"].tolist() == [7, 7]
    assert job.weights["w"].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("weights", "error"),
    [({"w": np.zeros(3, np.float32)}, fl.ShapeError), ({"w": np.full(2, np.nan, np.float32)}, fl.NonFiniteError)],
    ids=["shape", "nan"],
)
def test_a_bad_model_of_a_handler_is_refused(weights: Any, error: type[Exception]) -> None:
    with pytest.raises(fl.HandlerError, match="model set by a handler at _startRound") as caught:
        started(Sets(fl.EventType.START_ROUND, weights))
    assert [type(one) for one in caught.value.exceptions] == [error]


@pytest.mark.parametrize("change", ["weight", "twice", "another"])
def test_a_handler_that_does_more_than_take_contributions_out_is_not_ignored(change: str) -> None:
    class Changes(fl.Handler):
        def before_aggregation(self, ctx: fl.FLContext) -> None:
            one, other = ctx[fl.ContextKey.CONTRIBUTIONS]
            changed = {
                "weight": replace(other, aggregation_weight=1000),
                "twice": one,
                "another": contribution("c", 0.5),
            }
            ctx[fl.ContextKey.CONTRIBUTIONS] = (one, changed[change])

    job = started(Changes())
    for name in ("a", "b"):
        job.note(name, contribution(name, 0.5))
    with pytest.raises(fl.FedLearnError, match="changed or added contributions"):
        job.before_aggregation()


def test_other_events_cannot_replace_the_model() -> None:
    job = started(Sets(fl.EventType.SEND_MODEL, {"w": np.ones(2, np.float32)}))
    job.send_model("a")
    assert job.ctx.model is not None
    assert job.ctx.model.weights is not None
    assert job.ctx.model.weights["w"].tolist() == [0, 0]


def test_the_context_holds_copies() -> None:
    weights = {"w": np.zeros(2, np.float32)}
    job = FollowedJob([])
    job.start_round(0, weights, num_rounds=1)
    weights["w"][:] = 5
    assert job.ctx.model is not None
    assert job.ctx.model.weights is not None
    assert job.ctx.model.weights["w"].tolist() == [0, 0]
    assert weights["w"].flags.writeable


def test_handlers_that_raise_are_recorded_and_raised_or_not() -> None:
    with pytest.raises(HandlerError, match="on purpose"):
        started(Fails(fl.EventType.START_ROUND))
    job = started(Fails(fl.EventType.START_ROUND), on_handler_error="log")
    job.end_round()
    assert [str(failure.exception) for failure in job.reports[0].handler_failures] == ["on purpose"]
    assert len(job.handler_failures) == 1


def test_all_handlers_are_shut_down_whatever_fails() -> None:
    log = Log()
    job = started(log, Fails(fl.EventType.CLIENT_QUIT), Fails(fl.EventType.SHUTDOWN))
    with pytest.raises(HandlerError) as raised:
        job.shut_down()
    assert len(raised.value.failures) == 3  # two clients that quit, and the last
    assert [event for event, _ in log.seen][-3:] == ["_clientQuit", "_clientQuit", "_shutdown"]
    job.shut_down()  # once is enough
    assert len(log.seen) == 7


def test_handlers_that_a_failed_startup_has_shut_down_are_not_shut_down_again() -> None:
    log = Log()
    job = FollowedJob([log, Fails(fl.EventType.STARTUP)])
    with pytest.raises(HandlerError, match="on purpose"):
        job.start()
    job.shut_down()
    assert [event for event, _ in log.seen] == ["_startup", "_shutdown"]
    assert [str(failure.exception) for failure in job.handler_failures] == ["on purpose"]


def test_a_client_that_is_gone_quits_once() -> None:
    log = Log()
    job = started(log)
    job.quit("a", fl.ClientQuitError("a: disconnected", contributor="a"))
    job.quit("a")
    job.shut_down()
    assert [ctx[fl.ContextKey.CONTRIBUTOR] for event, ctx in log.seen if event == "_clientQuit"] == ["a", "b"]
    assert [quit.cause for quit in job.report.quits] == ["ClientQuitError"]


def test_a_wish_to_stop_is_not_silently_ignored() -> None:
    class Stops(fl.Handler):
        def start_round(self, ctx: fl.FLContext) -> None:
            ctx.set_prop(fl.ContextKey.STOP, "enough")

    with pytest.raises(fl.FedLearnError, match=r"asked to end the job \(enough\)"):
        started(Stops())
    assert fl.ContextKey.STOP not in started(Stops(), on_handler_error="log").ctx


def test_the_final_model_competes_with_those_before() -> None:
    for final, best in ((0.9, 1), (0.3, 0)):
        job = started(fl.ModelSelectionHandler(weigh_by_local_iter=True))
        for name in ("a", "b"):
            job.note(name, contribution(name, 0.5, n_iter=3))
        job.before_aggregation()
        job.end_aggregation(W)
        job.end_round()
        job.begin_final({"w": np.ones(2, np.float32)})
        for name in ("a", "b"):
            job.receive_result(name, {"initial_validation_metric": final})
        assert job.ctx.best_model is not None
        assert job.ctx.best_model.round == best
        assert job.ctx.best_model.weights["w"].tolist() == [best, best]


def test_results_on_other_models_come_without_a_model_and_select_nothing() -> None:
    log = Log()
    job = started(fl.ModelSelectionHandler(), log)
    job.end_round()
    job.receive_result("a", {"initial_validation_metric": 0.9}, "SRV_FL_global_model.pt")
    event, ctx = log.seen[-1]
    assert event == "_receiveValidationResults"
    (result,) = ctx[fl.ContextKey.VALIDATION_RESULTS]
    assert (result.contributor, result.model) == ("a", "SRV_FL_global_model.pt")
    assert ctx.model is None
    assert job.ctx.model is not None
    assert job.ctx.best_model is None


class Engine:
    """As much of NVFlare's engine as its events need; they are dispatched by its own function."""

    def __init__(self, *components: FLComponent) -> None:
        self.components = components

    def fire_event(self, event: str, fl_ctx: FLContext) -> None:
        fire_event_to_components(event, self.components, fl_ctx)

    def get_clients(self) -> list[Client]:
        return [Client(name, "token") for name in ("a", "b")]

    def get_component(self, name: str) -> Any:
        return None


class Ear(FLComponent):  # type: ignore[misc] # NVFlare has no type information
    """Keeps NVFlare's events."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, Any]] = []

    def handle_event(self, event: str, fl_ctx: FLContext) -> None:
        self.heard.append((event, fl_ctx.get_prop(FLContextKey.EVENT_DATA)))


def context(*components: FLComponent) -> FLContext:
    fl_ctx = FLContext()
    fl_ctx.put(ReservedKey.ENGINE, Engine(*components), private=True, sticky=False)
    fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 0)
    fl_ctx.set_prop(AppConstants.NUM_ROUNDS, 1)
    return fl_ctx


def test_what_goes_wrong_ends_the_run_and_says_why() -> None:
    ear, bridge = Ear(), HandlerBridge(["no-such-id"])
    ear.fire_event(EventType.START_RUN, context(bridge, ear))
    (reason,) = [data for event, data in ear.heard if event == EventType.FATAL_SYSTEM_ERROR]
    assert reason == "HandlerBridge at _start_run: the job has no component 'no-such-id', which should be a handler"


def test_handlers_are_shut_down_after_a_failure_and_do_nothing_else() -> None:
    log = Log()
    ear, bridge = Ear(), HandlerBridge([log, Fails(fl.EventType.START_ROUND)])
    fl_ctx = context(bridge, ear)
    events = (EventType.START_RUN, AppEventType.ROUND_STARTED, AppEventType.BEFORE_AGGREGATION, EventType.END_RUN)
    for event in events:
        ear.fire_event(event, fl_ctx)
    clients = ["_clientRegister"] * 2, ["_clientQuit"] * 2
    assert [event for event, _ in log.seen] == ["_startup", *clients[0], "_startRound", *clients[1], "_shutdown"]


@pytest.mark.parametrize("tensors", [False, True], ids=["arrays", "tensors"])
def test_a_model_of_a_handler_goes_into_nvflares_own(tensors: bool) -> None:
    weights: dict[str, Any] = {"w": np.zeros(2, np.float32)}
    new: dict[str, Any] = {"w": np.full(2, 3, np.float32)}
    if tensors:
        torch = pytest.importorskip("torch")
        weights = {"w": torch.zeros(2, dtype=torch.bfloat16)}
        new = {"w": new["w"].astype(ml_dtypes.bfloat16)}
    ear, bridge = Ear(), HandlerBridge([Sets(fl.EventType.START_ROUND, new)])
    fl_ctx = context(bridge, ear)
    fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(weights, {}))
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    held = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
    assert held is weights  # what NVFlare is about to send
    assert type(held["w"]).__name__ == ("Tensor" if tensors else "ndarray")
    assert held["w"].tolist() == [3, 3]


def contributed(ear: Ear, fl_ctx: FLContext, site: str, accepted: bool = True, steps: Any = 4, params: Any = W) -> None:
    """NVFlare's events when a result comes that another aggregator than ours took, or did not."""
    peer = FLContext()
    peer.put(ReservedKey.IDENTITY_NAME, site, private=False, sticky=False)
    fl_ctx.set_peer_context(peer)
    result = FLModelUtils.to_shareable(
        FLModel(params=params, metrics={"loss": 0.5}, meta={"NUM_STEPS_CURRENT_ROUND": steps})
    )
    for key, value in ((AppConstants.AGGREGATION_ACCEPTED, accepted), (AppConstants.TRAINING_RESULT, result)):
        fl_ctx.set_prop(key, value, private=True, sticky=False)
    ear.fire_event(AppEventType.AFTER_CONTRIBUTION_ACCEPT, fl_ctx)


def test_contributions_to_another_aggregator_are_told_of() -> None:
    log = Log()
    ear, bridge = Ear(), HandlerBridge([log], key_metric="loss")
    fl_ctx = context(bridge, ear)
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    contributed(ear, fl_ctx, "a")
    contributed(ear, fl_ctx, "b", accepted=False)
    (one, other) = [ctx for event, ctx in log.seen if event == "_receiveContribution"]
    sent = one[fl.ContextKey.CONTRIBUTION]
    assert (sent.contributor, sent.aggregation_weight, sent.n_iter, sent.weights) == ("a", 4, 4, None)
    assert sent.metrics == {"loss": 0.5, "initial_validation_metric": 0.5}
    assert str(other[fl.ContextKey.REJECTION]) == "b: not accepted; the log of NVFlare says why"
    assert bridge.job is not None
    assert bridge.job.report.accepted == ("a",)


@pytest.mark.parametrize(
    ("steps", "weight", "n_iter"),
    [(np.array([1, 2]), 1, None), ("many", 1, None), (-3, 1, -3), (10**400, 1, None), (2.5, 2.5, None)],
    ids=str,
)
def test_steps_of_a_client_cannot_end_the_job(steps: Any, weight: float, n_iter: int | None) -> None:
    """NVFlare's own averaging counts what is no number of steps as one."""
    ear, bridge = Ear(), HandlerBridge([fl.ModelSelectionHandler(mode="min")], key_metric="loss")
    fl_ctx = context(bridge, ear)
    fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(dict(W), {}))
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    contributed(ear, fl_ctx, "a", steps=steps)
    ear.fire_event(AppEventType.BEFORE_AGGREGATION, fl_ctx)
    assert EventType.FATAL_SYSTEM_ERROR not in [event for event, _ in ear.heard]
    assert bridge.job is not None
    (sent,) = bridge.job.ctx[fl.ContextKey.CONTRIBUTIONS]
    assert (sent.aggregation_weight, sent.n_iter) == (weight, n_iter)


def test_a_validation_result_that_cannot_be_read_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    log = Log()
    ear, bridge = Ear(), HandlerBridge([log])
    fl_ctx = context(bridge, ear)
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    result = {
        AppConstants.DATA_CLIENT: "a",
        AppConstants.MODEL_OWNER: "final",
        AppConstants.VALIDATION_RESULT: Shareable(),
    }
    for key, value in result.items():
        fl_ctx.set_prop(key, value, private=True, sticky=False)
    ear.fire_event(AppEventType.VALIDATION_RESULT_RECEIVED, fl_ctx)
    assert EventType.FATAL_SYSTEM_ERROR not in [event for event, _ in ear.heard]
    assert "_receiveValidationResults" not in [event for event, _ in log.seen]
    assert "a: no validation result on 'final': sent something unreadable: ValueError" in caplog.text


def test_a_model_of_a_handler_is_not_lost_where_nvflare_holds_none() -> None:
    ear, bridge = Ear(), HandlerBridge([Sets(fl.EventType.START_ROUND, W)])
    fl_ctx = context(bridge, ear)
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    (reason,) = [data for event, data in ear.heard if event == EventType.FATAL_SYSTEM_ERROR]
    assert "a handler replaced the global model, which NVFlare does not hold" in reason


@pytest.mark.parametrize("error", [SystemExit, GeneratorExit])
def test_a_handler_that_leaves_ends_the_run_by_its_name_and_the_others_are_shut_down(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """A thread of NVFlare's would end by it without a word, and the job would wait for ever."""

    class Leaving(fl.Handler):
        def start_round(self, ctx: fl.FLContext) -> None:
            raise error("bye")

    log = Log()
    ear, bridge = Ear(), HandlerBridge([log, Leaving()], on_handler_error="log")
    fl_ctx = context(bridge, ear)
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED, EventType.END_RUN):
        ear.fire_event(event, fl_ctx)
    (reason,) = [data for event, data in ear.heard if event == EventType.FATAL_SYSTEM_ERROR]
    assert reason == f"HandlerBridge at {AppEventType.ROUND_STARTED}: bye"
    assert f"test_nvflare_bridge.{Leaving.__qualname__} leaves at _startRound by {error.__name__}: bye" in caplog.text
    assert log.seen[-1][0] == "_shutdown"


def test_a_handler_that_garbles_the_context_has_failed_and_the_round_goes_on() -> None:
    class Tidy(fl.Handler):
        def before_aggregation(self, ctx: fl.FLContext) -> None:
            ctx.clear()

    job = started(Tidy(), on_handler_error="log")
    job.note("a", contribution("a", 0.5))
    assert [c.contributor for c in job.before_aggregation()] == ["a"]
    job.note_aggregation(fl.RoundReport(0, ("a",)))
    job.end_aggregation(W)
    job.end_round()
    assert job.reports[0].accepted == ("a",)
    (failure,) = job.reports[0].handler_failures
    assert isinstance(failure.exception, fl.ContextError)
    assert failure.exception.__traceback__ is None


class Drops(fl.Handler):
    """Takes all contributions but the first out."""

    def before_aggregation(self, ctx: fl.FLContext) -> None:
        ctx[fl.ContextKey.CONTRIBUTIONS] = ctx[fl.ContextKey.CONTRIBUTIONS][:1]


def test_taking_contributions_from_an_aggregator_that_does_not_listen_ends_the_run() -> None:
    ear, bridge = Ear(), HandlerBridge([Drops()])
    fl_ctx = context(bridge, ear)
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    for site in ("a", "b"):
        contributed(ear, fl_ctx, site)
    for event in (AppEventType.BEFORE_AGGREGATION, AppEventType.AFTER_AGGREGATION):
        ear.fire_event(event, fl_ctx)
    (reason,) = [data for event, data in ear.heard if event == EventType.FATAL_SYSTEM_ERROR]
    assert "a handler took contributions out, which this aggregator does not know of" in reason


def test_a_client_that_nvflare_loses_quits() -> None:
    log = Log()
    ear, bridge = Ear(), HandlerBridge([log])
    fl_ctx = context(bridge, ear)
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    fl_ctx.set_prop(FLContextKey.DISCONNECTED_CLIENT_NAME, "b")
    for event in (EventType.CLIENT_DISCONNECTED, EventType.END_RUN):
        ear.fire_event(event, fl_ctx)
    assert [ctx[fl.ContextKey.CONTRIBUTOR] for event, ctx in log.seen if event == "_clientQuit"] == ["b", "a"]
    assert bridge.job is not None
    assert [str(quit.error) for quit in bridge.job.report.quits] == ["b: disconnected"]


def test_nvflare_is_told_of_a_new_best_model_when_it_holds_it() -> None:
    ear, bridge = Ear(), HandlerBridge([fl.ModelSelectionHandler(mode="min")], key_metric="loss")
    fl_ctx = context(bridge, ear)
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(dict(W), {}))
        ear.fire_event(event, fl_ctx)
    contributed(ear, fl_ctx, "a")
    ear.fire_event(AppEventType.BEFORE_AGGREGATION, fl_ctx)
    last = [event for event, _ in ear.heard][-2:]
    assert sorted(last) == sorted([AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, AppEventType.BEFORE_AGGREGATION])
    assert fl_ctx.get_prop(AppConstants.VALIDATION_RESULT) == 0.5
    ear.fire_event(EventType.END_WORKFLOW, fl_ctx)  # nothing new
    assert [event for event, _ in ear.heard].count(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE) == 1


@pytest.mark.parametrize("mode", [None, "min"])
def test_handlers_are_told_which_metric_and_which_direction(mode: str | None) -> None:
    log = Log()
    ear, bridge = Ear(), HandlerBridge([log], key_metric="loss", mode=mode)
    ear.fire_event(EventType.START_RUN, context(bridge, ear))
    (event, ctx) = log.seen[0]
    assert (event, ctx[fl.ContextKey.SCORE_METRIC]) == ("_startup", "loss")
    assert ctx.get_prop(fl.ContextKey.SCORE_MODE, "nobody said") == (mode or "nobody said")


def test_a_mode_is_max_or_min() -> None:
    with pytest.raises(ValueError, match="mode must be 'max' or 'min', not 'up'"):
        HandlerBridge([], mode="up")


def test_a_job_is_exported_with_the_bridges_arguments(tmp_path: Path) -> None:
    job = BaseFedJob(name="job", min_clients=1, key_metric="")
    job.to_server(FedAvg(num_clients=1))
    add_handlers(job, [fl.ModelSelectionHandler(mode="min")], key_metric="loss", mode="min", on_handler_error="log")
    job.export_job(str(tmp_path))
    (file,) = tmp_path.rglob("config_fed_server.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    (bridge,) = [component for component in config["components"] if component["id"] == "handlers"]
    arguments = {"key_metric": "loss", "on_handler_error": "log", "mode": "min"}
    assert bridge["args"] == {"handlers": ["ModelSelectionHandler"], **arguments}


def test_arguments_of_a_recipe_that_reach_no_aggregator_are_told_of() -> None:
    def recipe(**arguments: Any) -> NumpyFedAvgRecipe:
        script = str(Path(__file__).with_name("nvflare_client.py"))
        return NumpyFedAvgRecipe(min_clients=1, model=[1.0], train_script=script, key_metric="", **arguments)

    ours = WeightedAverageAggregator()
    with pytest.warns(UserWarning, match="aggregation_weights and exclude_vars do not reach a custom aggregator"):
        add_handlers(recipe(aggregator=ours, aggregation_weights={"site-1": 2.0}, exclude_vars="head"), [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_handlers(recipe(aggregation_weights={"site-1": 2.0}), [])
        add_handlers(recipe(aggregator=ours), [])


def test_the_number_of_rounds_stays_known_and_begins_with_the_first_round() -> None:
    log = Log()
    ear, bridge = Ear(), HandlerBridge([log])
    fl_ctx = context(bridge, ear)
    ear.fire_event(EventType.START_RUN, fl_ctx)
    for first, count in ((5, 2), (7, 3)):  # two workflows
        ear.fire_event(EventType.START_WORKFLOW, fl_ctx)
        for number in range(first, first + count):
            fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number)
            fl_ctx.set_prop(AppConstants.NUM_ROUNDS, count if number == first else None)
            ear.fire_event(AppEventType.ROUND_STARTED, fl_ctx)
    rounds = [(ctx[fl.ContextKey.ROUND], ctx[fl.ContextKey.NUM_ROUNDS]) for e, ctx in log.seen if e == "_startRound"]
    assert rounds == [(5, 7), (6, 7), (7, 10), (8, 10), (9, 10)]


@pytest.mark.parametrize("steps", [np.float32(4), np.int64(4), np.array(4), 4.0], ids=repr)
def test_numbers_of_steps_may_be_of_numpy(steps: Any) -> None:
    ear, bridge = Ear(), HandlerBridge([])
    fl_ctx = context(bridge, ear)
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    contributed(ear, fl_ctx, "a", steps=steps)
    assert bridge.job is not None
    (sent,) = bridge.job.ctx[fl.ContextKey.CONTRIBUTIONS]
    assert (sent.aggregation_weight, sent.n_iter) == (4, 4)


@pytest.mark.parametrize("params", [None, {}], ids=["none", "empty"])
def test_a_result_without_weights_is_refused_by_name(params: Any) -> None:
    ear, bridge = Ear(), HandlerBridge([])
    fl_ctx = context(bridge, ear)
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    contributed(ear, fl_ctx, "a", accepted=False, params=params)
    assert bridge.job is not None
    assert [str(failure.error) for failure in bridge.job.report.rejected] == ["a: sent no weights"]


def ended(*accepted: bool, fatal: bool = False) -> list[str]:
    """Why a job of one round ends with an error, if it does; one client for each answer."""
    ear, bridge = Ear(), HandlerBridge([], key_metric="loss")
    fl_ctx = context(bridge, ear)
    fl_ctx.set_prop(FLContextKey.FATAL_SYSTEM_ERROR, fatal)
    for event in (EventType.START_RUN, EventType.START_WORKFLOW, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    for name, taken in zip("ab", accepted, strict=False):
        contributed(ear, fl_ctx, name, accepted=taken)
    for event in (
        AppEventType.BEFORE_AGGREGATION,
        AppEventType.AFTER_AGGREGATION,
        AppEventType.AFTER_SHAREABLE_TO_LEARNABLE,
        EventType.END_WORKFLOW,
        EventType.END_WORKFLOW,  # of the workflow after it
    ):
        ear.fire_event(event, fl_ctx)
    return [data for event, data in ear.heard if event == EventType.FATAL_SYSTEM_ERROR]


def test_a_training_in_vain_ends_the_job_once() -> None:
    first = "a: not accepted; the log of NVFlare says why"
    initial = "nothing was aggregated in 1 round, so no client's work is in the model"
    assert ended(False, False) == [f"{initial}: ContributionError 2 times, the first: {first}"]
    assert ended(True, False) == []
    assert ended() == []  # nobody contributed
    assert ended(False, fatal=True) == []  # the job ends with an error already


def sent(ear: Ear, fl_ctx: FLContext, aggregator: WeightedAverageAggregator, site: str, params: Any) -> None:
    """NVFlare's events and calls when a result comes for our aggregator; it logs what the aggregator raises."""
    ear.fire_event(AppEventType.BEFORE_CONTRIBUTION_ACCEPT, fl_ctx)
    model = FLModel(params=params, meta={"client_name": site, "NUM_STEPS_CURRENT_ROUND": 4})
    try:
        aggregator.accept_model(model)
    except fl.ContributionError:
        accepted = False
    else:
        accepted = True
    contributed(ear, fl_ctx, site, accepted, params=params)


@pytest.mark.parametrize("stream", [False, True])
def test_handlers_choose_among_the_contributions_that_count_together(stream: bool) -> None:
    """What is of another part than the others is refused before they look."""
    log, aggregator = Log(), WeightedAverageAggregator(stream=stream)
    ear, bridge = Ear(), HandlerBridge([log])
    fl_ctx = context(aggregator, bridge, ear)
    fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable({**W, "b": np.zeros(1, np.float32)}, {}))
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    for site, params in (
        ("a", {"w": np.full(2, 1, np.float32)}),
        ("b", {"b": np.full(1, 9, np.float32)}),
        ("c", {"w": np.full(2, 3, np.float32)}),
    ):
        sent(ear, fl_ctx, aggregator, site, params)
    ear.fire_event(AppEventType.BEFORE_AGGREGATION, fl_ctx)
    events = [event for event, _ in log.seen]
    assert events[-5:] == ["_receiveContribution"] * 4 + ["_beforeAggregation"]
    (_, all_in), (_, at_refusal), (_, choosing) = log.seen[-3:]
    assert [c.contributor for c in all_in[fl.ContextKey.CONTRIBUTIONS]] == ["a", "b", "c"]
    assert at_refusal[fl.ContextKey.CONTRIBUTOR] == "b"
    assert str(at_refusal[fl.ContextKey.REJECTION]).startswith("b: misses 'w' and adds 'b', compared with what 2 of")
    assert [c.contributor for c in choosing[fl.ContextKey.CONTRIBUTIONS]] == ["a", "c"]
    report = choosing[fl.ContextKey.REPORT]
    assert report.accepted == ("a", "c")
    assert [(failure.contributor, failure.cause) for failure in report.rejected] == [("b", "NamesError")]
    params = aggregator.aggregate_model().params
    assert {name: array.tolist() for name, array in params.items()} == {"w": [2, 2], "b": [0]}


@pytest.mark.parametrize("bridged", [False, True], ids=["alone", "with the bridge"])
@pytest.mark.parametrize(
    ("value", "least", "few", "why"),
    [
        (
            np.nan,
            1,
            "0 accepted contributions, 1 required",
            "NonFiniteError 4 times, the first: a: 'w' at index (0,): nan is not finite",
        ),
        (
            1.0,
            3,
            "2 accepted contributions, 3 required",
            "TooFewContributionsError 2 times, the first: round 1: 2",
        ),
    ],
    ids=["refused", "too few"],
)
def test_the_aggregator_ends_a_job_in_vain_with_and_without_the_bridge(
    value: float, least: int, few: str, why: str, bridged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ear, aggregator = Ear(), WeightedAverageAggregator(min_contributions=least)
    fl_ctx = context(aggregator, *([HandlerBridge([])] if bridged else []), ear)
    fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(dict(W), {}))
    for event in (EventType.START_RUN, EventType.START_WORKFLOW):
        ear.fire_event(event, fl_ctx)
    for number in (0, 1):
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number)
        ear.fire_event(AppEventType.ROUND_STARTED, fl_ctx)
        for site in ("a", "b"):
            sent(ear, fl_ctx, aggregator, site, {"w": np.full(2, value, np.float32)})
        ear.fire_event(AppEventType.BEFORE_AGGREGATION, fl_ctx)
        result = aggregator.aggregate_model()
        assert (result.params_type, result.params) == ("DIFF", {})
        for event in (AppEventType.AFTER_AGGREGATION, AppEventType.AFTER_SHAREABLE_TO_LEARNABLE):
            ear.fire_event(event, fl_ctx)
    assert [event for event, _ in ear.heard if event == EventType.FATAL_SYSTEM_ERROR] == []
    ear.fire_event(EventType.END_WORKFLOW, fl_ctx)
    reasons = [data for event, data in ear.heard if event == EventType.FATAL_SYSTEM_ERROR]
    initial = "nothing was aggregated in 2 rounds, so no client's work is in the model"
    assert len(reasons) == 1 + bridged  # of which NVFlare's server hears the first, and then no other
    assert all(reason.startswith(f"{initial}: {why}") for reason in reasons)
    for number in (1, 2):
        assert f"round {number}: {few}; the global model stands" in caplog.text


def refused(*errors: Exception) -> tuple[ClientFailure, ...]:
    return tuple(ClientFailure("a", error) for error in errors)


def test_the_commonest_cause_is_named() -> None:
    nan, shape = fl.NonFiniteError("a: nan"), fl.ShapeError("a: shape")
    few = fl.TooFewContributionsError("1 of 2")
    reports = [
        fl.RoundReport(0, rejected=refused(shape, nan), error=few),
        fl.RoundReport(1, ("b",), rejected=refused(nan), error=few),
    ]
    error = nothing_aggregated(reports)
    assert isinstance(error, NothingAggregatedError)
    assert (error.cause, error.count, error.rounds) == ("NonFiniteError", 2, 2)
    assert str(error).endswith(
        "in 2 rounds, so no client's work is in the model: NonFiniteError 2 times, the first: a: nan"
    )
    assert nothing_aggregated([*reports, fl.RoundReport(2, ("b",))]) is None


def test_a_round_may_fail_though_nobody_is_refused() -> None:
    error = nothing_aggregated([fl.RoundReport(0, ("a",), error=fl.TooFewContributionsError("1 of 2"))])
    assert str(error).endswith(
        "in 1 round, so no client's work is in the model: TooFewContributionsError once, the first: 1 of 2"
    )
    nobody = nothing_aggregated([fl.RoundReport(0, absent=("a",), error=fl.TooFewContributionsError("0 of 1"))])
    assert nobody is not None
    assert (nobody.cause, nobody.count) == ("absent", 1)
    assert nothing_aggregated([]) is None


def answer(**model: Any) -> Shareable:
    return FLModelUtils.to_shareable(FLModel(**model))


def test_scores_are_the_numbers_of_an_answer() -> None:
    metrics = {
        "loss": np.float32(0.5),
        "n": np.int64(3),
        "zero_d": np.array(0.25),
        "nested": {"loss": 1.0},
        "ok": True,
        "also": np.bool_(True),
        "list": [1.0],
        "none": None,
        "text": "1",
        "one": np.ones(1),
        "huge": 10**400,
        3: 1.0,
    }
    assert props.scores_in(answer(metrics=metrics)) == {
        "loss": 0.5,
        "n": 3.0,
        "zero_d": 0.25,
        "ok": 1.0,
        "also": 1.0,
        "one": 1.0,
    }


def test_scores_may_be_tensors() -> None:
    torch = pytest.importorskip("torch")
    metrics = {"accuracy": torch.tensor(0.5), "half": torch.tensor(0.25, dtype=torch.bfloat16), "many": torch.ones(2)}
    assert props.scores_in(answer(metrics=metrics)) == {"accuracy": 0.5, "half": 0.25}


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (answer(params=W, metrics={"accuracy": 1.0}), "sent weights"),
        (answer(params=W), "sent weights"),
        (answer(metrics={"accuracy": "good"}), "sent no metric that is a number"),
        (answer(metrics={}), "sent no metric that is a number"),
        (make_reply(ReturnCode.EXECUTION_EXCEPTION), "failed with EXECUTION_EXCEPTION"),
        (Shareable(), "sent something unreadable: ValueError"),
        (DXO(DataKind.COLLECTION, {}).to_shareable(), "sent weights"),
    ],
    ids=["weights and metrics", "weights", "text", "nothing", "failed", "unreadable", "collection"],
)
def test_an_answer_may_score_nothing(sent: Shareable, why: str) -> None:
    with pytest.raises(fl.FedLearnError, match=why):
        props.scores_in(sent)
