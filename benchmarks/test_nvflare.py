"""What it costs NVFlare's server to accept ten ResNet-50s and average them: its own in-time averaging, and ours.

    pytest benchmarks/test_nvflare.py --full

The models go through NVFlare's `FedAvg` controller, as they do in a job. Sides are checked, then timed in turn; ratios
are of one turn, and their median is printed, with the peak memory beyond the models that came in.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fed_learn import kernels
from fed_learn.benchmark import frameworks
from fed_learn.benchmark.check import OUR_BOUND, bound_of_peers, largest_error, reference
from fed_learn.benchmark.inputs import Inputs, make_inputs, resnet50
from fed_learn.benchmark.memory import Peak, release

pytest.importorskip("nvflare")

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.fedavg import FedAvg

from fed_learn.integrations.nvflare import WeightedAverageAggregator

CLIENTS, TURNS = 10, 9


@dataclass(frozen=True)
class Side:
    """A way to average: NVFlare's own where there is no aggregator; of arrays or tensors."""

    name: str
    aggregator: Callable[[], WeightedAverageAggregator] | None = None
    tensors: bool = False

    def run(self, models: list[FLModel]) -> dict[str, Any]:
        """What NVFlare's server does with the models of a round; returns the average."""
        aggregator = None if self.aggregator is None else self.aggregator()
        controller = FedAvg(num_clients=CLIENTS, aggregator=aggregator)
        controller.fl_ctx, controller.current_round = FLContext(), 0
        if aggregator is None:
            controller._aggr_helper, controller._aggr_metrics_helper = (WeightedAggregationHelper() for _ in range(2))
        else:  # as in a job, where it hears of the round and of the global model
            controller.fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 0)
            controller.fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(models[0].params, {}))
            aggregator.handle_event(AppEventType.ROUND_STARTED, controller.fl_ctx)
        for model in models:
            controller._aggregate_one_result(model)
        averaged: dict[str, Any] = controller._get_aggregated_result().params
        return averaged


SIDES = (
    Side("NVFlare, arrays"),
    Side("NVFlare, tensors", tensors=True),
    Side("ours, arrays", WeightedAverageAggregator),
    Side("ours, tensors", WeightedAverageAggregator, tensors=True),
    Side("ours, streaming arrays", lambda: WeightedAverageAggregator(stream=True)),
    Side("ours, streaming tensors", lambda: WeightedAverageAggregator(stream=True), tensors=True),
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def models_of(inputs: Inputs, tensors: bool) -> list[FLModel]:
    models = []
    for k, (client, a) in enumerate(zip(inputs.clients, inputs.aggregation_weights, strict=True)):
        params = dict(zip(client, frameworks.tensors(client), strict=True)) if tensors else client
        meta = {"client_name": f"site-{k}", "NUM_STEPS_CURRENT_ROUND": a}
        models.append(FLModel(params=params, meta=meta, current_round=0))
    return models


@pytest.mark.filterwarnings("default")
def test_accepting_and_averaging_models(pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    full = pytestconfig.getoption("--full")
    inputs = make_inputs(resnet50(64 if full else 16), np.float32, CLIENTS)
    model = inputs.nbytes // CLIENTS
    expected = reference(inputs)
    models = {tensors: models_of(inputs, tensors) for tensors in (False, True)}
    peaks: dict[str, int | None] = {}
    for side in SIDES:
        release()
        peak = Peak()
        averaged = side.run(models[side.tensors])
        peaks[side.name] = peak.beyond()
        error = largest_error({name: np.asarray(value) for name, value in averaged.items()}, expected)
        assert error <= (bound_of_peers(CLIENTS, inputs.dtype) if side.aggregator is None else OUR_BOUND), side.name
        del averaged
    seconds: dict[str, list[float]] = {side.name: [] for side in SIDES}
    for _ in range(TURNS):
        for side in SIDES:
            started = time.perf_counter()
            averaged = side.run(models[side.tensors])
            seconds[side.name].append(time.perf_counter() - started)
            del averaged

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    with capsys.disabled():
        print(f"\n{CLIENTS} × {model / 2**20:.1f} MiB, {kernels.get_num_threads()} threads")
        for side in SIDES:
            ours = "ours, tensors" if side.tensors else "ours, arrays"
            beyond = peaks[side.name]
            held = "" if beyond is None else f"{beyond / model:7.2f} models"
            print(
                f"{side.name:24} {1000 * statistics.median(seconds[side.name]):8.1f} ms"
                f"{ratio(side.name, ours):8.2f} × ours{held}"
            )
    if full:
        assert ratio("NVFlare, arrays", "ours, arrays") > 1
        assert ratio("NVFlare, tensors", "ours, tensors") > 1
        assert (peaks["ours, arrays"] or 0) < 1.5 * model
        assert (peaks["ours, streaming arrays"] or 0) < 3.5 * model
