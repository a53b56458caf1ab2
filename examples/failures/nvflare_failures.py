"""What NVFlare's FedAvg makes of contributions that are not as they should be, with its own averaging and with ours.

    python examples/failures/nvflare_failures.py

Three clients send models in one round; each case spoils something. NVFlare's controller runs for real, without network:
what a client sent, the average and the update of the global model go through its own code.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import ml_dtypes
import numpy as np
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.utils.event import fire_event_to_components
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg
from outcomes import Outcome, Row, run, show

import fed_learn as fl
from fed_learn.integrations.nvflare import HandlerBridge, WeightedAverageAggregator

ROUND = 4
Weights = dict[str, Any]


def sent(weights: Sequence[Weights], steps: Sequence[Any] = (10, 10, 10), **changes: Any) -> list[FLModel]:
    """What clients send in the round; a number of steps of None is left out."""
    models = []
    for k, (params, n) in enumerate(zip(weights, steps, strict=True)):
        meta = {"client_name": f"site-{k + 1}"} | ({} if n is None else {"NUM_STEPS_CURRENT_ROUND": n})
        models.append(FLModel(params=params, meta=meta, current_round=ROUND, **changes))
    return models


def both(case: str, models: list[FLModel], initial: Weights, **settings: Any) -> Row:
    """The round with both; the settings are those of our aggregator."""
    return Row(case, round_of(None, models, initial), round_of(WeightedAverageAggregator(**settings), models, initial))


def round_of(
    aggregator: WeightedAverageAggregator | None, models: list[FLModel], initial: Weights, **settings: Any
) -> Outcome:
    """One round of NVFlare's controller, with its own averaging, and its settings, where there is no aggregator."""
    controller = FedAvg(num_clients=len(models), num_rounds=9, aggregator=aggregator, **settings)
    controller.fl_ctx, controller.current_round = FLContext(), ROUND
    if aggregator is None:
        controller._aggr_helper = WeightedAggregationHelper(exclude_vars=controller.exclude_vars)
        controller._aggr_metrics_helper, controller._all_metrics = WeightedAggregationHelper(), True
    else:
        props = {AppConstants.GLOBAL_MODEL: make_model_learnable(initial, {}), AppConstants.CURRENT_ROUND: ROUND}
        for key, value in props.items():
            controller.fl_ctx.set_prop(key, value)
        aggregator.handle_event(AppEventType.ROUND_STARTED, controller.fl_ctx)
    refused = []
    with np.errstate(all="ignore"):
        for model in models:
            try:
                controller._aggregate_one_result(model)
            except Exception as error:  # noqa: BLE001 - as the controller does, which logs it and goes on
                refused.append((str(model.meta.get("client_name")), type(error).__name__))
        try:
            result = controller._get_aggregated_result()
        except Exception as error:  # noqa: BLE001 - this one ends the run
            return Outcome(error=error, refused=tuple(refused))
    if aggregator is not None and aggregator.report is not None:
        refused = [(failure.contributor, failure.cause) for failure in aggregator.report.rejected]
    params = FLModelUtils.update_model(FLModel(params=dict(initial)), result).params
    weights = {name: np.asarray(array) for name, array in params.items()}
    return Outcome(weights, refused=tuple(refused), metrics=result.metrics or {})


def f32(*values: float) -> Any:
    """A float32 vector."""
    return np.array(values, np.float32)


def int64_counters() -> Row:
    return both("int64 counters 10, 10, 11", sent([{"n": np.array(v)} for v in (10, 10, 11)]), {"n": np.array(0)})


def float16_many_steps() -> Row:
    models = sent([{"w": np.ones(2, np.float16)}] * 4, [20_000] * 4)
    return both("float16 ones, 20 000 steps × 4", models, {"w": np.ones(2, np.float16)})


def bfloat16() -> Row:
    weights = [{"w": np.array([v, -v], ml_dtypes.bfloat16)} for v in (1, 2, 6)]
    return both("bfloat16, 1001 steps each", sent(weights, [1001] * 3), weights[0])


def broadcast() -> Row:
    weights = [
        {"w": np.zeros((3, 1), np.float32)},
        {"w": np.ones((3, 1), np.float32)},
        {"w": np.ones((1, 3), np.float32)},
    ]
    return both("site-3 sends shape (1, 3) for (3, 1)", sent(weights), weights[0])


def one_nan() -> Row:
    weights = [{"w": f32(k, np.nan if k == 1 else k)} for k in range(3)]
    return both("one NaN from site-2", sent(weights), weights[0])


def one_infinity() -> Row:
    weights = [{"w": f32(k, np.inf if k == 2 else k)} for k in range(3)]
    return both("one infinity from site-3", sent(weights), weights[0])


def bad_steps(what: str, steps: Any) -> Row:
    weights = [{"w": f32(v)} for v in (1, 1, 1000)]
    return both(f"site-3 counts by {what}, the others by 10 steps", sent(weights, [10, 10, steps]), weights[0])


def zero_steps() -> Row:
    return bad_steps("0 steps", 0)


def nan_steps() -> Row:
    return bad_steps("NaN steps", float("nan"))


def missing_steps() -> Row:
    return bad_steps("no number of steps", None)


def missing_variable() -> Row:
    whole = {"w": f32(1), "b": f32(1)}
    return both("site-3 leaves a variable out", sent([whole, whole, {"w": f32(4)}]), whole)


def wrong_dtype() -> Row:
    weights = [{"w": f32(1)}, {"w": f32(1)}, {"w": np.array([4], np.complex64)}]
    return both("site-3 sends complex numbers", sent(weights), weights[0])


def duplicate() -> Row:
    models = sent([{"w": f32(v)} for v in (1, 1, 4)])
    return both("site-3 contributes twice", [*models, models[2]], {"w": f32(1)})


def stale() -> Row:
    models = sent([{"w": f32(v)} for v in (1, 1, 4)])
    models[2].current_round = ROUND - 1
    return both("site-3 answers an earlier round", models, {"w": f32(1)})


def wrong_kind() -> Row:
    models = sent([{"w": f32(v)} for v in (1, 1, 4)])
    models[2] = sent([{"w": f32(0)}] * 3, params_type="DIFF")[2]
    return both("site-3 sends a difference, the others models", models, {"w": f32(1)})


def nothing() -> Row:
    return both("no contribution at all", [], {"w": f32(1)})


def order_of_arrival() -> Row:
    """How many elements of the mean depend on the order in which the same models arrive."""
    rng = np.random.default_rng(0)
    weights = [{"w": rng.normal(size=10_000).astype(np.float32)} for _ in range(10)]
    models = sent(weights, rng.integers(10, 100, 10).tolist())
    made = []
    for ours in (False, True):
        one, other = (
            round_of(WeightedAverageAggregator() if ours else None, some, weights[0]).weights
            for some in (models, models[::-1])
        )
        assert one is not None
        assert other is not None
        made.append(Outcome({"elements that differ": np.array((one["w"] != other["w"]).sum())}))
    return Row("10 000 float32 of 10 clients, arriving in two orders", *made)


class Raises(FLComponent, fl.Handler):  # type: ignore[misc] # NVFlare has no type information
    """A component of NVFlare, and a handler of ours, that fails when a round starts."""

    def handle_event(self, event: str, ctx: Any) -> None:
        if event in (AppEventType.ROUND_STARTED, fl.EventType.START_ROUND):
            raise RuntimeError("on purpose")


class Ends(FLComponent):  # type: ignore[misc]
    """Notes whether the run was told to end."""

    ended = False

    def handle_event(self, event: str, ctx: Any) -> None:
        self.ended = self.ended or event == EventType.FATAL_SYSTEM_ERROR


class Engine:
    """As much of NVFlare's engine as its events need; they are dispatched by its own function."""

    def __init__(self, components: Sequence[FLComponent]) -> None:
        self.components = components

    def fire_event(self, event: str, fl_ctx: FLContext) -> None:
        fire_event_to_components(event, self.components, fl_ctx)

    def get_clients(self) -> list[Any]:
        return []


def handler_raises() -> Row:
    made = []
    for component in (Raises(), HandlerBridge([Raises()])):
        end, fl_ctx = Ends(), FLContext()
        fl_ctx.put(ReservedKey.ENGINE, Engine([component, end]), private=True, sticky=False)
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 0)
        for event in (EventType.START_RUN, AppEventType.ROUND_STARTED):
            end.fire_event(event, fl_ctx)
        made.append(Outcome(note="ends the run" if end.ended else "logged; the run goes on without it"))
    return Row("a handler raises", *made)


CASES: tuple[Callable[[], Row], ...] = (
    int64_counters,
    float16_many_steps,
    bfloat16,
    broadcast,
    one_nan,
    one_infinity,
    zero_steps,
    nan_steps,
    missing_steps,
    missing_variable,
    wrong_dtype,
    duplicate,
    stale,
    wrong_kind,
    nothing,
    order_of_arrival,
    handler_raises,
)


def rows() -> list[Row]:
    """All cases, run now."""
    made: list[Row] = run(CASES)
    return made


if __name__ == "__main__":
    show("NVFlare " + version("nvflare"), rows())
