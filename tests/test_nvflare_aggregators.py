"""The aggregators for NVFlare, call by call."""

import gc
import json
import math
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fed_learn as fl

pytest.importorskip("nvflare")

from nvflare.apis.client import Client
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReservedKey, ReturnCode, ServerCommandKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.np.recipes import NumpyFedAvgRecipe
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fed_learn.integrations.nvflare import (
    HandlerBridge,
    WeightedAverageAggregator,
    WeightedAverageDXOAggregator,
    add_handlers,
)

STEPS = {"site-1": 10, "site-2": 20, "site-3": 70}


def model(site: str, params: Any, **changes: Any) -> FLModel:
    meta = {"client_name": site, "NUM_STEPS_CURRENT_ROUND": STEPS[site]} | changes.pop("meta", {})
    return FLModel(params=params, meta=meta, **changes)


def once(site: str, params: Any, **changes: Any) -> FLModel:
    """A model that counts by one step."""
    return model(site, params, meta={"NUM_STEPS_CURRENT_ROUND": 1}, **changes)


def weights_of(k: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(k)
    return {
        "w": rng.standard_normal((5, 3), np.float32),
        "half": rng.standard_normal(7, np.float32).astype(np.float16),
        "count": np.array(100 + k),
    }


WEIGHTS = dict(zip(STEPS, map(weights_of, range(3)), strict=True))


def average(aggregator: WeightedAverageAggregator, order: tuple[str, ...] = tuple(STEPS)) -> FLModel:
    for site in order:
        aggregator.accept_model(model(site, dict(WEIGHTS[site])))
    return aggregator.aggregate_model()


def start_round(aggregator: Any, number: int, weights: dict[str, Any]) -> FLContext:
    """What NVFlare tells of a round that begins."""
    fl_ctx = FLContext()
    fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(weights, {}))
    fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number)
    aggregator.handle_event(AppEventType.ROUND_STARTED, fl_ctx)
    return fl_ctx


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name, array in one.items():
        assert (array.dtype, array.shape) == (other[name].dtype, other[name].shape)
        assert np.asarray(array).tobytes() == np.asarray(other[name]).tobytes(), name


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"stream": True}, {"stream": True, "exact": True}], ids=str)
@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_the_average_is_ours_in_every_mode(options: dict[str, Any], kernel: str) -> None:
    if kernel not in fl.kernels.available():
        pytest.skip(f"no {kernel} kernel here")
    expected = fl.weighted_average(list(WEIGHTS.values()), list(STEPS.values()), exact=options.get("exact", False))
    aggregator = WeightedAverageAggregator(kernel=kernel, **options)
    result = average(aggregator)
    assert result.params_type == ParamsType.FULL
    assert_same(result.params, dict(expected))
    assert aggregator.report is not None
    assert (aggregator.report.accepted, aggregator.report.total_weight) == (tuple(STEPS), 100.0)
    assert aggregator.report.kernel == kernel
    assert aggregator.report.aggregation_bytes == 3 * (60 + 14 + 8)


@pytest.mark.parametrize("options", [{}, {"stream": True, "exact": True}], ids=str)
def test_the_order_of_arrival_leaves_no_trace(options: dict[str, Any]) -> None:
    one = average(WeightedAverageAggregator(**options)).params
    other = average(WeightedAverageAggregator(**options), ("site-3", "site-1", "site-2")).params
    assert_same(one, other)


def test_differences_are_averaged_as_differences() -> None:
    aggregator = WeightedAverageAggregator(expected_data_kind=DataKind.WEIGHT_DIFF)
    for site, step in zip(STEPS, (1.0, 2.0, 4.0), strict=True):
        aggregator.accept_model(model(site, {"w": np.full(2, step)}, params_type=ParamsType.DIFF))
    result = aggregator.aggregate_model()
    assert result.params_type == ParamsType.DIFF
    assert result.params["w"].tolist() == [3.3, 3.3]
    with pytest.raises(fl.KindError, match="site-1: contribution is of kind 'full', expected diff"):
        aggregator.accept_model(model("site-1", {"w": np.zeros(2)}))


def test_tensors_stay_tensors_in_their_dtypes() -> None:
    torch = pytest.importorskip("torch")
    for stream in (False, True):
        aggregator = WeightedAverageAggregator(stream=stream)
        for site, v in zip(STEPS, (1, 2, 3), strict=True):
            params = {"a": torch.full((3,), v, dtype=torch.bfloat16), "b": torch.full((2,), v, dtype=torch.float16)}
            aggregator.accept_model(model(site, params | {"n": torch.tensor(v)}))
        params = aggregator.aggregate_model().params
        assert torch.equal(params["a"], torch.full((3,), 2.6, dtype=torch.bfloat16))
        assert torch.equal(params["b"], torch.full((2,), 2.6, dtype=torch.float16))
        assert params["n"].dtype == torch.int64
        assert int(params["n"]) == 3


def test_what_lies_on_disk_is_loaded(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict

    for stream in (False, True):
        aggregator = WeightedAverageAggregator(stream=stream)
        for site, v in zip(STEPS, (1.0, 2.0, 3.0), strict=True):
            folder = tmp_path / f"{stream}-{site}"
            folder.mkdir()
            save_file({"w": torch.full((4,), v)}, folder / "file")
            lazy = LazyTensorDict({"w": (str(folder / "file"), "w")}, str(folder))
            aggregator.accept_model(model(site, {"w": lazy.make_lazy_ref("w")}))
        assert torch.equal(aggregator.aggregate_model().params["w"], torch.full((4,), 2.6))


def test_a_reference_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from nvflare.app_opt.pt.lazy_tensor_dict import LazyTensorDict

    aggregator = WeightedAverageAggregator()
    lazy = LazyTensorDict({"w": (str(tmp_path / "gone"), "w")}, str(tmp_path / "none"))
    with pytest.raises(fl.WeightsTypeError, match="site-1: sent something unreadable: FileNotFoundError"):
        aggregator.accept_model(model("site-1", {"w": lazy.make_lazy_ref("w")}))


def test_a_refused_model_leaves_no_trace() -> None:
    bad = {name: array.copy() for name, array in WEIGHTS["site-3"].items()}
    bad["half"][3] = np.nan  # the last variable but one: all before it are fine
    for stream in (False, True):
        aggregator = WeightedAverageAggregator(stream=stream)
        aggregator.accept_model(model("site-1", dict(WEIGHTS["site-1"])))
        with pytest.raises(fl.NonFiniteError, match=r"site-3: 'half' at index \(3,\): nan is not finite"):
            aggregator.accept_model(model("site-3", bad))
        aggregator.accept_model(model("site-2", dict(WEIGHTS["site-2"])))
        expected = fl.weighted_average([WEIGHTS["site-1"], WEIGHTS["site-2"]], [10, 20])
        assert_same(aggregator.aggregate_model().params, dict(expected))
        assert aggregator.report is not None
        assert [(r.contributor, r.cause) for r in aggregator.report.rejected] == [("site-3", "NonFiniteError")]


def test_a_refused_client_may_try_again() -> None:
    aggregator = WeightedAverageAggregator()
    start_round(aggregator, 0, {"w": np.zeros(2)})
    with pytest.raises(fl.ShapeError):
        aggregator.accept_model(model("site-1", {"w": np.zeros(3)}))
    aggregator.accept_model(model("site-1", {"w": np.ones(2)}))
    assert aggregator.aggregate_model().params["w"].tolist() == [1, 1]


def test_the_global_model_is_the_authority_over_the_first_contribution() -> None:
    aggregator = WeightedAverageAggregator()
    start_round(aggregator, 3, {"w": np.zeros(2, np.float32)})
    with pytest.raises(fl.DtypeError, match="site-1: 'w' has dtype int64, expected float32"):
        aggregator.accept_model(model("site-1", {"w": np.zeros(2, np.int64)}))
    with pytest.raises(fl.RoundError, match="site-1: contribution is of round 3, expected 4"):
        aggregator.accept_model(model("site-1", {"w": np.zeros(2, np.float32)}, current_round=2))
    aggregator.accept_model(model("site-1", {"w": np.ones(2, np.float32)}, current_round=3))
    assert aggregator.aggregate_model().current_round == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_global_model_that_cannot_be_averaged_is_no_clients_fault(stream: bool) -> None:
    aggregator = WeightedAverageAggregator(stream=stream)
    start_round(aggregator, 0, {"w": [0.0, 0.0]})
    for call in (lambda: aggregator.accept_model(model("site-1", {"w": np.zeros(2)})), aggregator.aggregate_model):
        with pytest.raises(fl.WeightsTypeError, match=r"^global model: 'w' is a builtins.list, not a numpy array"):
            call()
    assert aggregator.report is None


def test_a_model_that_is_only_sent_is_the_authority_too() -> None:
    aggregator = WeightedAverageAggregator(exclude_vars="^head")
    fl_ctx = start_round(aggregator, 0, {})
    task = FLModelUtils.to_shareable(FLModel(params={"head": np.full(1, 7.0), "w": np.zeros(2)}))
    fl_ctx.set_prop(AppConstants.TRAIN_SHAREABLE, task)
    aggregator.handle_event(AppEventType.BEFORE_TRAIN_TASK, fl_ctx)
    with pytest.raises(fl.ShapeError, match=r"site-1: 'w' has shape \(3,\), expected \(2,\)"):
        aggregator.accept_model(model("site-1", {"w": np.zeros(3)}))
    aggregator.accept_model(model("site-1", {"w": np.ones(2)}))
    params = aggregator.aggregate_model().params
    assert {name: array.tolist() for name, array in params.items()} == {"head": [7], "w": [1, 1]}


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_global_model_the_commonest_form_decides(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    aggregator = WeightedAverageAggregator(stream=stream)
    start_round(aggregator, 0, {})
    for site, params in (("site-1", {"v": np.ones(2)}), ("site-2", {"w": np.ones(2)}), ("site-3", {"w": np.ones(2)})):
        aggregator.accept_model(model(site, params))
    assert aggregator.aggregate_model().params["w"].tolist() == [1, 1]
    assert aggregator.report is not None
    assert aggregator.report.accepted == ("site-2", "site-3")
    assert [(r.contributor, r.cause) for r in aggregator.report.rejected] == [("site-1", "NamesError")]
    assert "refused: site-1: misses 'w' and adds 'v', compared with what 2 of the round's" in caplog.text


def test_refusals_end_the_job_when_they_should() -> None:
    aggregator = WeightedAverageAggregator(on_bad_contribution="raise")
    aggregator.accept_model(model("site-1", {"w": np.ones(2)}))
    with pytest.raises(fl.NonFiniteError):
        aggregator.accept_model(model("site-2", {"w": np.full(2, np.nan)}))
    with pytest.raises(fl.NonFiniteError, match="site-2: 'w' at index"):
        aggregator.aggregate_model()


def test_too_few_contributions_leave_the_global_model_as_it_is() -> None:
    aggregator = WeightedAverageAggregator(min_contributions=2)
    aggregator.accept_model(model("site-1", {"w": np.ones(2)}, current_round=5))
    result = aggregator.aggregate_model()
    assert (result.params_type, result.params) == (ParamsType.DIFF, {})
    assert aggregator.report is not None
    assert isinstance(aggregator.report.error, fl.TooFewContributionsError)
    assert "round 6: 1 accepted contributions, 2 required" in str(aggregator.report.error)


def test_excluded_variables_stay_those_of_the_global_model() -> None:
    aggregator = WeightedAverageAggregator(exclude_vars="^head")
    start_round(aggregator, 0, {"head.w": np.full(2, 7.0), "w": np.zeros(2)})
    aggregator.accept_model(model("site-1", {"head.w": np.full(9, np.nan), "w": np.ones(2)}))
    aggregator.accept_model(model("site-2", {"w": np.ones(2)}))
    params = aggregator.aggregate_model().params
    assert list(params) == ["head.w", "w"]
    assert params["head.w"].tolist() == [7, 7]
    assert params["w"].tolist() == [1, 1]


def test_who_sent_names_that_are_too_long_is_named_where_variables_are_excluded_too() -> None:
    aggregator = WeightedAverageAggregator(exclude_vars="^head", on_bad_contribution="raise")
    start_round(aggregator, 0, {"head": np.zeros(2), "w": np.zeros(2)})
    with pytest.raises(fl.NamesError, match=r"^site-1: a variable's name has 2000 characters") as caught:
        aggregator.accept_model(model("site-1", {"w" * 2000: np.ones(2)}))
    assert caught.value.contributor == "site-1"


def test_variables_are_not_excluded_from_a_global_model_that_is_not_known() -> None:
    """NVFlare takes a mean of full weights for the whole model: it would lose them."""
    aggregator = WeightedAverageAggregator(exclude_vars="^head")
    aggregator.accept_model(model("site-1", {"head": np.ones(1), "w": np.ones(2)}))
    with pytest.raises(fl.FedLearnError, match="exclude_vars leaves 'head' as it is in the global model, which"):
        aggregator.aggregate_model()
    aggregator = WeightedAverageAggregator(exclude_vars="^head", expected_data_kind=DataKind.WEIGHT_DIFF)
    params = {"head": np.ones(1), "w": np.ones(2)}
    aggregator.accept_model(model("site-1", params, params_type=ParamsType.DIFF))
    assert list(aggregator.aggregate_model().params) == ["w"]


@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_a_round_in_which_everything_is_excluded_ends_the_job_and_is_no_clients_fault(kind: DataKind) -> None:
    aggregator = WeightedAverageAggregator(exclude_vars="w|b", expected_data_kind=kind)
    start_round(aggregator, 0, {"w": np.zeros(2), "b": np.zeros(1)})
    sent = model("site-1", {"w": np.ones(2)}, params_type="DIFF" if kind == DataKind.WEIGHT_DIFF else "FULL")
    for call in (lambda: aggregator.accept_model(sent), aggregator.aggregate_model):
        with pytest.raises(fl.FedLearnError, match=r"^exclude_vars 'w\|b' matches all variables of the global model$"):
            call()
    assert aggregator.report is None


def moved(weights: dict[str, Any], result: FLModel) -> dict[str, Any]:
    """The global model that NVFlare makes of a mean."""
    return dict(FLModelUtils.update_model(FLModel(params=dict(weights)), result).params)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_a_part_moves_that_part_of_the_model_whatever_its_kind(kind: DataKind, stream: bool) -> None:
    weights = {"bn": np.full(1, 7, np.float32), "w": np.ones(2, np.float32)}
    aggregator = WeightedAverageAggregator(expected_data_kind=kind, stream=stream)
    start_round(aggregator, 0, weights)
    params_type = ParamsType.DIFF if kind == DataKind.WEIGHT_DIFF else ParamsType.FULL
    for site, v in (("site-1", 1.0), ("site-2", 3.0)):
        aggregator.accept_model(once(site, {"w": np.full(2, v, np.float32)}, params_type=params_type))
    with pytest.raises(fl.NamesError, match="misses 'bn', 'w' and adds 'head'"):
        aggregator.accept_model(once("site-3", {"head": np.ones(1, np.float32)}, params_type=params_type))
    result = aggregator.aggregate_model()
    assert result.params_type == params_type
    new = moved(weights, result)
    expected = 3 if kind == DataKind.WEIGHT_DIFF else 2
    assert {name: array.tolist() for name, array in new.items()} == {"bn": [7], "w": [expected] * 2}
    assert {array.dtype for array in new.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_differences_of_another_width_are_those_of_the_global_model(
    dtype: type, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator = WeightedAverageAggregator(expected_data_kind=DataKind.WEIGHT_DIFF, stream=stream)
    sent = {"site-1": np.array([0.1, -2.0]).astype(dtype), "site-2": np.array([0.3, 1.0]).astype(np.float32)}
    for number in (0, 1):
        start_round(aggregator, number, {"w": np.zeros(2, np.float32)})
        for site, array in sent.items():
            aggregator.accept_model(once(site, {"w": array}, params_type=ParamsType.DIFF, current_round=number))
        narrow = [{"w": array.astype(np.float32)} for array in sent.values()]
        assert_same(aggregator.aggregate_model().params, dict(fl.weighted_average(narrow)))
    told = [text for text in caplog.messages if "as the global model has it" in text]
    assert len(told) == 1
    assert told[0].startswith(f"site-1: 'w' came as {np.dtype(dtype)} and is ")


@pytest.mark.parametrize("stream", [False, True])
def test_a_difference_that_no_float32_can_hold_is_refused(stream: bool) -> None:
    aggregator = WeightedAverageAggregator(expected_data_kind=DataKind.WEIGHT_DIFF, stream=stream)
    start_round(aggregator, 0, {"w": np.zeros(2, np.float32)})
    with pytest.raises(fl.FedLearnError, match="site-1: 'w'"):
        aggregator.accept_model(once("site-1", {"w": np.array([0.0, 1e39])}, params_type=ParamsType.DIFF))
    aggregator.accept_model(once("site-2", {"w": np.ones(2, np.float32)}, params_type=ParamsType.DIFF))
    assert aggregator.aggregate_model().params["w"].tolist() == [1, 1]


def test_clients_count_by_steps_times_their_factor_or_by_the_factor_alone() -> None:
    factors = {"site-1": 4.0, "site-2": 0.5}
    for by_steps, expected in ((True, (40 * 1 + 10 * 2 + 70 * 3) / 120), (False, (4 * 1 + 0.5 * 2 + 1 * 3) / 5.5)):
        aggregator = WeightedAverageAggregator(aggregation_weights=factors, weigh_by_local_iter=by_steps)
        for site, v in zip(STEPS, (1.0, 2.0, 3.0), strict=True):
            aggregator.accept_model(model(site, {"w": np.array([v])}))
        assert aggregator.aggregate_model().params["w"].item() == pytest.approx(expected, rel=1e-15)
    aggregator.accept_model(model("site-1", {"w": np.zeros(1)}, meta={"NUM_STEPS_CURRENT_ROUND": None}))
    assert aggregator.report is not None
    assert aggregator.report.accepted == ("site-1",)


def test_clients_that_send_no_number_of_steps_count_by_1_and_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    aggregator = WeightedAverageAggregator()
    for number in (0, 1):
        start_round(aggregator, number, {"w": np.zeros(1)})
        for site, v, steps in (("site-1", 1.0, None), ("site-2", 3.0, None), ("site-3", 9.0, 2)):
            meta = {"NUM_STEPS_CURRENT_ROUND": steps}
            aggregator.accept_model(model(site, {"w": np.array([v])}, meta=meta, current_round=number))
        assert aggregator.aggregate_model().params["w"].tolist() == [5.5]
    told = [record.getMessage() for record in caplog.records if "counted by 1" in record.getMessage()]
    assert [text.split(":")[0] for text in told] == ["site-1", "site-2"]


def test_no_number_of_steps_can_be_refused_and_zero_steps_add_nothing() -> None:
    aggregator = WeightedAverageAggregator(require_weight=True)
    start_round(aggregator, 0, {"w": np.zeros(1)})
    with pytest.raises(fl.AggregationWeightError, match="site-1: meta lacks 'NUM_STEPS_CURRENT_ROUND'"):
        aggregator.accept_model(model("site-1", {"w": np.ones(1)}, meta={"NUM_STEPS_CURRENT_ROUND": None}))
    aggregator.accept_model(model("site-2", {"w": np.array([4.0])}, meta={"NUM_STEPS_CURRENT_ROUND": 0}))
    aggregator.accept_model(model("site-3", {"w": np.array([2.0])}, meta={"NUM_STEPS_CURRENT_ROUND": np.int64(5)}))
    assert aggregator.aggregate_model().params["w"].tolist() == [2.0]
    assert aggregator.report is not None
    assert aggregator.report.accepted == ("site-2", "site-3")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "value", [3.0, np.float32(3), np.array(3.0), torch.tensor(3.0), torch.tensor(3.0).double()], ids=repr
)
def test_numbers_in_any_form_are_parameters(value: Any, stream: bool) -> None:
    aggregator = WeightedAverageAggregator(stream=stream)
    start_round(aggregator, 0, {"scale": np.float32(0)})
    aggregator.accept_model(once("site-1", {"scale": value}))
    aggregator.accept_model(once("site-2", {"scale": np.float32(1)}))
    assert float(aggregator.aggregate_model().params["scale"]) == 2.0


def test_a_part_is_averaged_and_the_global_model_keeps_the_rest() -> None:
    aggregator = WeightedAverageAggregator()
    start_round(aggregator, 0, {"bn": np.full(1, 7.0), "w": np.zeros(2)})
    for site, v in (("site-1", 1.0), ("site-2", 3.0)):
        aggregator.accept_model(once(site, {"w": np.full(2, v)}))
    params = aggregator.aggregate_model().params
    assert {name: array.tolist() for name, array in params.items()} == {"bn": [7], "w": [2, 2]}


def test_parts_can_be_averaged_as_nvflare_does() -> None:
    aggregator = WeightedAverageAggregator(partial="average")
    start_round(aggregator, 0, {"a": np.zeros(1), "b": np.zeros(1), "c": np.full(1, 7.0)})
    aggregator.accept_model(once("site-1", {"a": np.array([1.0])}))
    aggregator.accept_model(once("site-2", {"a": np.array([3.0]), "b": np.array([5.0])}))
    params = aggregator.aggregate_model().params
    assert {name: array.tolist() for name, array in params.items()} == {"a": [2], "b": [5], "c": [7]}


def test_bools_among_the_metrics_are_averaged_as_nvflare_does() -> None:
    aggregator = WeightedAverageAggregator()
    for site, done in (("site-1", True), ("site-2", False), ("site-3", np.True_)):
        metrics = {"done": done, "loss": torch.tensor(0.5), "host": site}
        aggregator.accept_model(once(site, {"w": np.zeros(1)}, metrics=metrics))
    assert aggregator.aggregate_model().metrics == {"done": pytest.approx(2 / 3), "loss": 0.5}


def test_a_contribution_of_another_round_than_the_context_is_false() -> None:
    """A controller that only sets CURRENT_ROUND, and fires no event, tells the round by it."""
    aggregator, fl_ctx = WeightedAverageDXOAggregator(), FLContext()
    for number, stated, accepted in ((2, 1, False), (2, 3, False), (2, 2, True), (3, 2, False), (3, 3, True)):
        fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number)
        sent = DXO(
            DataKind.WEIGHT_DIFF, {"w": np.full(2, float(stated))}, {"NUM_STEPS_CURRENT_ROUND": 1}
        ).to_shareable()
        sent.set_peer_props({ReservedKey.IDENTITY_NAME: "site-1"})
        sent.add_cookie(AppConstants.CONTRIBUTION_ROUND, stated)
        assert aggregator.accept(sent, fl_ctx) is accepted
    assert from_shareable(aggregator.aggregate(fl_ctx)).data["w"].tolist() == [3.0, 3.0]


def test_each_metric_is_averaged_by_the_same_weights_over_those_who_sent_a_number() -> None:
    aggregator = WeightedAverageAggregator()
    for site, v in zip(STEPS, (0.1, 0.2, 0.3), strict=True):
        metrics = {"accuracy": v, "note": "text", **({"extra": 1.0} if site == "site-1" else {})}
        metrics["loss"] = math.nan if site == "site-2" else 1.0  # best for good, in NVFlare's choice of a model
        aggregator.accept_model(model(site, {"w": np.zeros(1)}, metrics=metrics))
    assert aggregator.aggregate_model().metrics == {"accuracy": pytest.approx(0.26), "extra": 1.0, "loss": 1.0}


def test_metrics_that_are_left_out_of_the_mean_are_told_of_once_for_each_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    aggregator = WeightedAverageAggregator()
    for number in (0, 1):
        start_round(aggregator, number, {"w": np.zeros(1)})
        for site, loss in zip(STEPS, (0.5, math.nan, 1.5), strict=True):
            metrics = {"loss": loss, "recall": np.array([0.5, 1.0]), "one": np.array([2.0]), "host": site}
            aggregator.accept_model(once(site, {"w": np.ones(1)}, metrics=metrics, current_round=number))
        assert aggregator.aggregate_model().metrics == {"loss": 1.0, "one": 2.0}
    expected = ["site-2: metric 'loss' is nan: it is left out of the mean metrics"]
    for site in STEPS:
        for told in ("'recall' is array([0.5, 1. ])", f"'host' is '{site}'"):
            expected.append(f"{site}: metric {told}, no single number: it is left out of the mean metrics")
    assert sorted(r.getMessage() for r in caplog.records if r.levelname == "WARNING") == sorted(expected)


def test_metrics_as_large_as_floats_go_have_a_mean() -> None:
    aggregator = WeightedAverageAggregator()
    for site in ("site-1", "site-2"):
        metrics = {"large": 1.5e308, "small": -1.5e308, "both": 1.5e308 if site == "site-1" else -1.5e308}
        aggregator.accept_model(once(site, {"w": np.ones(1)}, metrics=metrics))
    assert aggregator.aggregate_model().metrics == {"large": 1.5e308, "small": -1.5e308, "both": 0.0}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"meta": {"client_name": None}}, fl.UnknownContributorError, "contributor None is not a name"),
        ({"meta": {"NUM_STEPS_CURRENT_ROUND": "many"}}, fl.AggregationWeightError, "'many' is not a number"),
        ({"meta": {"NUM_STEPS_CURRENT_ROUND": -3}}, fl.AggregationWeightError, "-3 is negative"),
        ({"meta": {"NUM_STEPS_CURRENT_ROUND": math.nan}}, fl.AggregationWeightError, "nan is not finite"),
        ({"meta": {"PROCESSED_ALGORITHM": "_he_"}}, fl.WeightsTypeError, "processed by '_he_'"),
        ({"params": [np.zeros(1)]}, fl.WeightsTypeError, "weights are a list"),
        ({"params": {"w": "1.0"}}, fl.WeightsTypeError, "'w' is a builtins.str, not a numpy array"),
        ({"params": {1: np.zeros(1)}}, fl.WeightsTypeError, "variable name 1 is an int"),
    ],
    ids=str,
)
def test_what_is_no_contribution_is_refused(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    aggregator = WeightedAverageAggregator()
    with pytest.raises(error, match=match):
        aggregator.accept_model(model("site-1", changes.pop("params", {"w": np.zeros(1)}), **changes))
    assert aggregator.report is not None
    assert [r.cause for r in aggregator.report.rejected] == [error.__name__]


def test_nothing_keeps_a_model_alive_once_it_is_refused_or_averaged() -> None:
    aggregator = WeightedAverageAggregator()
    good, bad = np.zeros(3), np.full(3, np.nan)
    alive = [weakref.ref(good), weakref.ref(bad)]
    aggregator.accept_model(model("site-1", {"w": good}))
    with pytest.raises(fl.NonFiniteError):
        aggregator.accept_model(model("site-2", {"w": bad}))
    aggregator.aggregate_model()
    del good, bad
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_a_streaming_aggregator_keeps_no_model() -> None:
    aggregator = WeightedAverageAggregator(stream=True)
    array = np.zeros(3)
    alive = weakref.ref(array)
    aggregator.accept_model(model("site-1", {"w": array}))
    del array
    gc.collect()
    assert alive() is None
    assert aggregator.aggregate_model().params["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"on_bad_contribution": "ignore"}, "must be 'raise' or 'reject'"),
        ({"expected_data_kind": "METRICS"}, "expected_data_kind must be one of"),
        ({"min_contributions": 0}, "min_contributions must be at least 1"),
        ({"exclude_vars": "("}, "no regular expression"),
        ({"exclude_vars": 2.0}, "no regular expression"),
        (
            {"aggregation_weights": {"site-1": 0.0}},
            "aggregation_weights: site-1: aggregation weight 0 is not positive",
        ),
        ({"kernel": "fastest"}, "fastest"),
    ],
    ids=str,
)
@pytest.mark.parametrize("aggregator", [WeightedAverageAggregator, WeightedAverageDXOAggregator])
def test_bad_settings_are_refused_before_the_job(aggregator: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        aggregator(**options)


def update(
    site: str, data: Any, *, kind: str = DataKind.WEIGHT_DIFF, number: int | None = None, **meta: Any
) -> Shareable:
    sent = DXO(kind, data, {MetaKey.NUM_STEPS_CURRENT_ROUND: STEPS[site], **meta}).to_shareable()
    sent.set_peer_props({ReservedKey.IDENTITY_NAME: site})
    if number is not None:
        sent.add_cookie(AppConstants.CONTRIBUTION_ROUND, number)
    return sent


def test_shareables_are_accepted_refused_and_averaged() -> None:
    aggregator = WeightedAverageDXOAggregator()
    fl_ctx = start_round(aggregator, 1, {"w": np.zeros(2)})
    broken = Shareable()
    broken.set_peer_props({ReservedKey.IDENTITY_NAME: "site-2"})
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    sent = [
        update("site-1", {"w": np.full(2, 1.0)}, number=1),
        update("site-2", {"w": np.full(2, np.nan)}, number=1),
        update("site-2", {"w": np.full(2, 2.0)}, number=0),
        update("site-2", {"w": np.full(2, 2.0)}, kind=DataKind.WEIGHTS, number=1),
        update("site-2", {"w": np.full(2, 2.0)}, kind=DataKind.COLLECTION, number=1),
        broken,
        failed,
        update("site-1", {"w": np.full(2, 1.0)}, number=1),
        update("site-3", {"w": np.full(2, 5.0)}, number=1),
    ]
    assert [aggregator.accept(one, fl_ctx) for one in sent] == [True, *[False] * 7, True]
    result = from_shareable(aggregator.aggregate(fl_ctx))
    assert result.data_kind == DataKind.WEIGHT_DIFF
    assert result.data["w"].tolist() == [4.5, 4.5]
    assert aggregator.report is not None
    assert [r.cause for r in aggregator.report.rejected] == [
        "NonFiniteError",
        "RoundError",
        "KindError",
        "KindError",
        "WeightsTypeError",
        "ClientQuitError",
        "DuplicateContributionError",
    ]
    aggregator.reset(fl_ctx)
    assert from_shareable(aggregator.aggregate(fl_ctx)).data == {}


def server_config(recipe: Any, folder: Path) -> dict[str, Any]:
    recipe.export(str(folder))
    (path,) = folder.rglob("config_fed_server.json")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


SETTINGS: dict[str, Any] = {
    "exclude_vars": "^head",
    "aggregation_weights": {"site-1": 2.0},
    "weigh_by_local_iter": False,
    "on_bad_contribution": "raise",
    "min_contributions": 2,
    "exact": True,
    "kernel": "numpy",
    "stream": True,
}


def recipes() -> dict[str, Any]:
    def numpy(**options: Any) -> Any:
        return NumpyFedAvgRecipe(model=[[1.0]], **options)

    def torch(**options: Any) -> Any:
        pytest.importorskip("torch")
        from nvflare.app_opt.pt.recipes import FedAvgRecipe as TorchRecipe

        return TorchRecipe(
            model={"class_path": "torch.nn.Linear", "args": {"in_features": 2, "out_features": 1}}, **options
        )

    def tensorflow(**options: Any) -> Any:
        pytest.importorskip("tensorflow")
        from nvflare.app_opt.tf.recipes import FedAvgRecipe as TensorFlowRecipe

        return TensorFlowRecipe(model={"class_path": "keras.Sequential", "args": {}}, **options)

    return {"numpy": numpy, "torch": torch, "tensorflow": tensorflow}


@pytest.mark.parametrize("name", ["numpy", "torch", "tensorflow"])
@pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
def test_every_recipe_exports_the_aggregator_with_its_arguments(name: str, kind: DataKind, tmp_path: Path) -> None:
    aggregator = WeightedAverageAggregator(expected_data_kind=kind, **SETTINGS)
    script = str(Path(__file__).with_name("nvflare_client.py"))
    recipe = recipes()[name](
        min_clients=2, train_script=script, aggregator=aggregator, aggregator_data_kind=kind, key_metric=""
    )
    config = server_config(recipe, tmp_path)
    exported = config["workflows"][0]["args"]["aggregator"]
    assert exported["path"] == "fed_learn.integrations.nvflare.aggregators.WeightedAverageAggregator"
    expected = SETTINGS | ({} if kind == DataKind.WEIGHTS else {"expected_data_kind": "WEIGHT_DIFF"})
    assert exported["args"] == expected
    again = WeightedAverageAggregator(**exported["args"])
    assert {key: getattr(again, key) for key in expected} == expected


def test_handlers_are_exported_by_path_and_arguments(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("nvflare_client.py"))
    recipe = NumpyFedAvgRecipe(model=[[1.0]], min_clients=2, train_script=script, key_metric="")
    selection = fl.ModelSelectionHandler(True, "initial_loss", {"site-1": 2.0}, mode="min", min_delta=0.5)
    add_handlers(recipe, [selection, selection], key_metric="loss", on_handler_error="log")
    config = server_config(recipe, tmp_path)
    components = {component["id"]: component for component in config["components"]}
    bridge = components["handlers"]["args"]
    assert bridge == {"handlers": ["ModelSelectionHandler"] * 2, "key_metric": "loss", "on_handler_error": "log"}
    assert components["ModelSelectionHandler"]["args"] == {
        "weigh_by_local_iter": True,
        "validation_metric_name": "initial_loss",
        "aggregation_weights": {"site-1": 2.0},
        "mode": "min",
        "min_delta": 0.5,
    }
    again = fl.ModelSelectionHandler(**components["ModelSelectionHandler"]["args"])
    assert vars(again) == vars(selection)
    assert [workflow["id"] for workflow in config["workflows"]] == ["controller", "final_validation"]
    assert HandlerBridge(**bridge).handlers == bridge["handlers"]
    assert not list(tmp_path.rglob("fed_learn"))  # the package is not copied into the job


def test_a_bridge_takes_handlers_alone() -> None:
    with pytest.raises(TypeError, match="is no handler"):
        HandlerBridge([fl.ModelSelectionHandler])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="on_handler_error must be 'raise' or 'log'"):
        HandlerBridge([], on_handler_error="ignore")


def test_a_client_cannot_contribute_in_the_name_of_another() -> None:
    aggregator = WeightedAverageDXOAggregator()

    def sent(by: str, stated: str, value: float) -> Shareable:
        made = DXO(DataKind.WEIGHT_DIFF, {"w": np.full(1, value)}, {"NUM_STEPS_CURRENT_ROUND": 1}).to_shareable()
        made.set_peer_props({ReservedKey.IDENTITY_NAME: stated})
        made.set_header(ServerCommandKey.FL_CLIENT, Client(by, "token"))  # as NVFlare's server does, by the token
        return made

    assert aggregator.accept(sent("site-2", "site-1", 3.0), FLContext())
    assert aggregator.accept(sent("site-1", "site-1", 1.0), FLContext())
    assert not aggregator.accept(sent("site-2", "site-3", 5.0), FLContext())
    assert aggregator.report is not None
    assert aggregator.report.accepted == ("site-1", "site-2")
    assert [(f.contributor, f.cause) for f in aggregator.report.rejected] == [("site-2", "DuplicateContributionError")]
    assert from_shareable(aggregator.aggregate(FLContext())).data["w"].tolist() == [2.0]


@pytest.mark.parametrize("name", ["a\nERROR all is lost\x1b[2K", "a/b", " a", "final", "x" * 201])
def test_a_client_whose_name_is_none_is_refused_in_one_printable_line(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator = WeightedAverageAggregator()
    with pytest.raises(fl.UnknownContributorError, match="is not a name") as caught:
        aggregator.accept_model(FLModel(params={"w": np.ones(1)}, meta={"client_name": name}))
    assert str(caught.value).isprintable()
    assert aggregator.report is not None
    (failure,) = aggregator.report.rejected
    assert failure.contributor.isprintable()
    assert len(failure.contributor) < 100


class Noting:
    """A pattern that notes which names it meets."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.met = re.compile(pattern), set[str]()

    def search(self, name: str) -> object:
        self.met.add(name)
        return self.pattern.search(name)


@pytest.mark.parametrize("kind", ["FULL", "DIFF"])
@pytest.mark.parametrize("known", [True, False])
def test_a_pattern_meets_no_name_that_a_client_made_up(kind: str, known: bool) -> None:
    """A user's own pattern may take time that grows with the square of a name, or worse."""
    data_kind = DataKind.WEIGHTS if kind == "FULL" else DataKind.WEIGHT_DIFF
    aggregator = WeightedAverageAggregator(exclude_vars="^head", expected_data_kind=data_kind)
    aggregator._excluded = noting = Noting("^head")  # type: ignore[assignment]
    if known:
        start_round(aggregator, 0, {"head": np.zeros(1), "w": np.zeros(2)})
    aggregator.accept_model(model("site-1", {"head": np.ones(1), "w": np.ones(2)}, params_type=kind))
    made_up = {"head": np.ones(1), "w": np.ones(2), "head of another": np.ones(1), "x": np.ones(1)}
    if known:
        with pytest.raises(
            fl.NamesError, match="adds 'head of another', 'x'; exclude_vars is for variables that the global model has"
        ):
            aggregator.accept_model(model("site-2", made_up, params_type=kind))
    for bad in (made_up | {"x": "no array"}, {"x" * 10**5: np.ones(1)}):
        with pytest.raises(fl.ContributionError):
            aggregator.accept_model(model("site-3", bad, params_type=kind))
    if known or kind == "DIFF":
        params = aggregator.aggregate_model().params
        assert params["w"].tolist() == [1, 1]
        assert list(params) == (["head", "w"] if known and kind == "FULL" else ["w"])
    assert noting.met == ({"head", "w"} if known or kind == "DIFF" else set())
