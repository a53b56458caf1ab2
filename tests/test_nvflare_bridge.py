"""What `HandlerBridge` is made of: the events that a foreign job brings about, and what goes wrong in them."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fed_learn as fl

pytest.importorskip("nvflare")

from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.event import fire_event_to_components
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fed_learn.errors import HandlerError
from fed_learn.integrations.nvflare import HandlerBridge
from fed_learn.integrations.nvflare.mirror import Mirror

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


def started(*handlers: fl.Handler, on_handler_error: str = "raise") -> Mirror:
    mirror = Mirror(handlers, on_handler_error)
    mirror.start()
    for name in ("a", "b"):
        mirror.register(name)
    mirror.start_round(0, 2, W)
    return mirror


def test_a_round_in_which_one_is_refused_and_one_is_absent() -> None:
    log = Log()
    mirror = started(log)
    mirror.register("c")
    for name in ("a", "b", "c"):
        mirror.send_model(name)
    mirror.receive("b", contribution("b", 0.5), None)
    mirror.receive("a", contribution("a", 0.5), fl.NonFiniteError("a: nan", contributor="a"))
    assert mirror.before_aggregation() is None
    mirror.note_aggregation(fl.RoundReport(0, ("b",), total_weight=10.0, kernel="numpy", aggregation_bytes=8))
    mirror.end_aggregation({"w": np.ones(2, np.float32)})
    mirror.end_round()
    (report,) = mirror.reports
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
    mirror = started(log)
    mirror.receive("a", contribution("a", 0.5), None)
    mirror.before_aggregation()
    mirror.note_aggregation(fl.RoundReport(0, ("a",), error=fl.TooFewContributionsError("1 of 2")))
    assert mirror.end_aggregation(W) is None
    mirror.end_round()
    assert [event for event, _ in log.seen][-2:] == ["_beforeAggregation", "_endRound"]
    assert str(mirror.reports[0].error) == "1 of 2"


@pytest.mark.parametrize("event", [fl.EventType.END_AGGREGATION, fl.EventType.END_ROUND])
def test_a_handler_replaces_the_global_model(event: str) -> None:
    mirror = started(Sets(event, {"w": np.full(2, 7, np.float32)}))
    mirror.receive("a", contribution("a", 0.5), None)
    mirror.before_aggregation()
    replaced = [mirror.end_aggregation(W), mirror.end_round()]
    found = replaced[event == fl.EventType.END_ROUND]
    assert found is not None
    assert found["w"].tolist() == [7, 7]
    assert replaced[event != fl.EventType.END_ROUND] is None


@pytest.mark.parametrize(
    ("weights", "error"),
    [({"w": np.zeros(3, np.float32)}, fl.ShapeError), ({"w": np.full(2, np.nan, np.float32)}, fl.NonFiniteError)],
    ids=["shape", "nan"],
)
def test_a_bad_model_of_a_handler_is_refused(weights: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="model set by a handler at _startRound"):
        started(Sets(fl.EventType.START_ROUND, weights))


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

    mirror = started(Changes())
    for name in ("a", "b"):
        mirror.receive(name, contribution(name, 0.5), None)
    with pytest.raises(fl.FedLearnError, match="changed or added contributions"):
        mirror.before_aggregation()


def test_other_events_cannot_replace_the_model() -> None:
    mirror = started(Sets(fl.EventType.SEND_MODEL, {"w": np.ones(2, np.float32)}))
    mirror.send_model("a")
    assert mirror.ctx.model is not None
    assert mirror.ctx.model.weights is not None
    assert mirror.ctx.model.weights["w"].tolist() == [0, 0]


def test_the_context_holds_copies() -> None:
    weights = {"w": np.zeros(2, np.float32)}
    mirror = Mirror([])
    mirror.start_round(0, 1, weights)
    weights["w"][:] = 5
    assert mirror.ctx.model is not None
    assert mirror.ctx.model.weights is not None
    assert mirror.ctx.model.weights["w"].tolist() == [0, 0]
    assert weights["w"].flags.writeable


def test_handlers_that_raise_are_recorded_and_raised_or_not() -> None:
    with pytest.raises(HandlerError, match="on purpose"):
        started(Fails(fl.EventType.START_ROUND))
    mirror = started(Fails(fl.EventType.START_ROUND), on_handler_error="log")
    mirror.end_round()
    assert [str(failure.exception) for failure in mirror.reports[0].handler_failures] == ["on purpose"]
    assert len(mirror.handler_failures) == 1


def test_all_handlers_are_shut_down_whatever_fails() -> None:
    log = Log()
    mirror = started(log, Fails(fl.EventType.CLIENT_QUIT), Fails(fl.EventType.SHUTDOWN))
    with pytest.raises(HandlerError) as raised:
        mirror.shut_down()
    assert len(raised.value.failures) == 3  # two clients that quit, and the last
    assert [event for event, _ in log.seen][-3:] == ["_clientQuit", "_clientQuit", "_shutdown"]
    mirror.shut_down()  # once is enough
    assert len(log.seen) == 7


def test_a_client_that_is_gone_quits_once() -> None:
    log = Log()
    mirror = started(log)
    mirror.quit("a", fl.ClientQuitError("a: disconnected", contributor="a"))
    mirror.quit("a")
    mirror.shut_down()
    assert [ctx[fl.ContextKey.CONTRIBUTOR] for event, ctx in log.seen if event == "_clientQuit"] == ["a", "b"]
    assert [quit.cause for quit in mirror.report.quits] == ["ClientQuitError"]


def test_a_wish_to_stop_is_not_silently_ignored() -> None:
    class Stops(fl.Handler):
        def start_round(self, ctx: fl.FLContext) -> None:
            ctx.set_prop(fl.ContextKey.STOP, "enough")

    with pytest.raises(fl.FedLearnError, match=r"asked to end the job \(enough\)"):
        started(Stops())
    assert fl.ContextKey.STOP not in started(Stops(), on_handler_error="log").ctx


def test_the_final_model_competes_with_those_before() -> None:
    for final, best in ((0.9, 1), (0.3, 0)):
        mirror = started(fl.ModelSelectionHandler(weigh_by_local_iter=True))
        for name in ("a", "b"):
            mirror.receive(name, contribution(name, 0.5, n_iter=3), None)
        mirror.before_aggregation()
        mirror.end_aggregation(W)
        mirror.end_round()
        mirror.begin_final({"w": np.ones(2, np.float32)})
        for name in ("a", "b"):
            mirror.receive_result(name, {"initial_validation_metric": final})
        assert mirror.best is not None
        assert mirror.best.round == best
        assert mirror.best.weights["w"].tolist() == [best, best]


def test_results_on_other_models_come_without_a_model_and_select_nothing() -> None:
    log = Log()
    mirror = started(fl.ModelSelectionHandler(), log)
    mirror.end_round()
    mirror.receive_result("a", {"initial_validation_metric": 0.9}, "SRV_FL_global_model.pt")
    event, ctx = log.seen[-1]
    assert event == "_receiveValidationResults"
    (result,) = ctx[fl.ContextKey.VALIDATION_RESULTS]
    assert (result.contributor, result.model) == ("a", "SRV_FL_global_model.pt")
    assert ctx.model is None
    assert mirror.ctx.model is not None
    assert mirror.best is None


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


def contributed(ear: Ear, fl_ctx: FLContext, site: str, accepted: bool = True, steps: Any = 4) -> None:
    """NVFlare's events when a result comes that another aggregator than ours took, or did not."""
    peer = FLContext()
    peer.put(ReservedKey.IDENTITY_NAME, site, private=False, sticky=False)
    fl_ctx.set_peer_context(peer)
    result = FLModelUtils.to_shareable(
        FLModel(params=W, metrics={"loss": 0.5}, meta={"NUM_STEPS_CURRENT_ROUND": steps})
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
    assert bridge.mirror is not None
    assert bridge.mirror.report.accepted == ("a",)


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
    assert bridge.mirror is not None
    (sent,) = bridge.mirror.ctx[fl.ContextKey.CONTRIBUTIONS]
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
    assert "a: an unreadable validation result on 'final': ValueError" in caplog.text


def test_a_model_of_a_handler_is_not_lost_where_nvflare_holds_none() -> None:
    ear, bridge = Ear(), HandlerBridge([Sets(fl.EventType.START_ROUND, W)])
    fl_ctx = context(bridge, ear)
    for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
        ear.fire_event(event, fl_ctx)
    (reason,) = [data for event, data in ear.heard if event == EventType.FATAL_SYSTEM_ERROR]
    assert "a handler replaced the global model, which NVFlare does not hold" in reason


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
    assert bridge.mirror is not None
    assert [str(quit.error) for quit in bridge.mirror.report.quits] == ["b: disconnected"]


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
