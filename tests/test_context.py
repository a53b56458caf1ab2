"""The job context, its keys, its model and metadata, and the read-only values that the library puts into it."""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fed_learn as fl
from fed_learn.weights import FrozenDict, FrozenWeights

pytestmark = pytest.mark.quick

KEYS = {
    "ROUND": "_round",
    "NUM_ROUNDS": "_numRounds",
    "CONTRIBUTOR": "_contributor",
    "CONTRIBUTION": "_contribution",
    "CONTRIBUTIONS": "_contributions",
    "REJECTION": "_rejection",
    "VALIDATION_RESULTS": "_validationResults",
    "METRICS": "_metrics",
    "REPORT": "_report",
    "BEST_RECEIVED": "_bestReceived",
    "BEST_AGGREGATED": "_bestAggregated",
    "STOP": "_stop",
    "SCORE_METRIC": "_scoreMetric",
    "SCORE_MODE": "_scoreMode",
    "SCORES_LATE": "_scoresLate",
    "HANDLERS": "_handlers",
    "AGGREGATOR": "_aggregator",
}


def best(metric: float) -> fl.BestModel:
    return fl.BestModel(0, metric, "accuracy", FrozenWeights({"w": np.zeros(1)}))


# Keys


def test_the_keys_have_these_values() -> None:
    assert {key.name: key.value for key in fl.ContextKey} == KEYS


def test_a_key_and_its_value_name_the_same_prop() -> None:
    ctx = fl.FLContext()
    ctx["_round"] = 3
    assert ctx[fl.ContextKey.ROUND] == 3
    ctx.set_prop(fl.ContextKey.ROUND, 4)
    assert ctx == {"_round": 4}


# Props


def test_the_items_of_the_dict_are_the_props() -> None:
    ctx = fl.FLContext({"a": 1})
    assert isinstance(ctx, dict)
    assert ctx.get_prop("a") == ctx["a"] == 1
    ctx["b"] = 2
    assert ctx.get_prop("b") == 2
    ctx.set_prop("a", 3)
    assert dict(ctx) == {"a": 3, "b": 2}


def test_a_missing_prop_gives_the_default() -> None:
    ctx = fl.FLContext({"none": None})
    assert ctx.get_prop("other") is None
    assert ctx.get_prop("other", 7) == 7
    assert ctx.get_prop("other", default=8) == 8
    assert ctx.get_prop("none", 7) is None
    assert "other" not in ctx


def test_set_props_binds_several_and_leaves_the_others() -> None:
    ctx = fl.FLContext({"a": 1, "b": 2})
    ctx.set_props({"b": 3, "c": 4})
    assert ctx == {"a": 1, "b": 3, "c": 4}


def test_the_mapping_it_is_made_from_is_copied() -> None:
    props = {"a": 1}
    ctx = fl.FLContext(props)
    ctx.set_prop("a", 2)
    assert props == {"a": 1}


def test_a_new_context_is_empty() -> None:
    ctx = fl.FLContext()
    assert ctx == {}
    assert ctx.get_model() is None
    assert ctx.get_all_metadata() == {}
    assert ctx.best_model is None


# Model


def test_the_model_is_read_and_replaced_by_property_and_by_method() -> None:
    first, second = fl.ModelData({"w": np.zeros(1)}), fl.ModelData({"w": np.ones(1)})
    ctx = fl.FLContext(model=first)
    assert ctx.model is first
    assert ctx.get_model() is first
    ctx.set_model(second)
    assert ctx.model is second
    ctx.model = first
    assert ctx.get_model() is first
    ctx.set_model(None)
    assert ctx.model is None


def test_the_model_is_not_among_the_props() -> None:
    assert fl.FLContext(model=fl.ModelData()) == {}


def test_model_data_holds_a_weight_dict_under_both_names() -> None:
    weights = {"w": np.zeros(2)}
    model = fl.ModelData(weights)
    assert model.weights is weights
    assert model.params is weights
    assert fl.ModelData().weights is None
    assert fl.ModelData().params is None


def test_model_data_cannot_be_rebound() -> None:
    model = fl.ModelData({"w": np.zeros(2)})
    for attribute in ("weights", "params", "other"):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            setattr(model, attribute, {})
    assert model.weights is not None
    assert list(model.weights) == ["w"]


# Metadata


def test_metadata_is_added_read_and_replaced() -> None:
    ctx = fl.FLContext()
    ctx.add_metadata("a", 1)
    ctx.add_metadata("b", 2)
    ctx.add_metadata("a", 3)
    assert ctx.get_metadata("a") == 3
    assert ctx.get_metadata("other") is None
    assert ctx.get_metadata("other", 7) == 7
    assert ctx.get_all_metadata() == {"a": 3, "b": 2}
    ctx.set_metadata({"c": 4})
    assert ctx.get_all_metadata() == {"c": 4}
    assert ctx == {}


def test_metadata_is_copied_on_the_way_in_and_out() -> None:
    ctx = fl.FLContext()
    given = {"a": 1}
    ctx.set_metadata(given)
    given["a"] = 2
    ctx.get_all_metadata()["a"] = 3
    assert ctx.get_metadata("a") == 1


# Metrics and the best model


def test_published_metrics_collect_in_a_read_only_mapping() -> None:
    ctx = fl.FLContext()
    ctx.publish_metric("selection", 0.5)
    first = ctx[fl.ContextKey.METRICS]
    ctx.publish_metric("server_validation", np.float64(0.25))
    ctx.publish_metric("selection", 1)
    assert first == {"selection": 0.5}
    assert ctx[fl.ContextKey.METRICS] == {"selection": 1.0, "server_validation": 0.25}
    assert all(type(value) is float for value in ctx[fl.ContextKey.METRICS].values())
    with pytest.raises(TypeError):
        ctx[fl.ContextKey.METRICS]["selection"] = 2.0


def test_the_best_model_is_the_aggregated_one_where_there_is_one_else_the_received_one() -> None:
    ctx = fl.FLContext()
    received, aggregated = best(0.9), best(0.1)
    ctx[fl.ContextKey.BEST_RECEIVED] = received
    assert ctx.best_model is received
    ctx[fl.ContextKey.BEST_AGGREGATED] = aggregated
    assert ctx.best_model is aggregated


# Copies


class Site(fl.FLContext):
    """A user's own subclass, which cannot be called without arguments."""

    def __init__(self, site: str, **props: Any) -> None:
        super().__init__(props)
        self.site = site


def test_a_clone_has_the_same_values_model_metadata_and_attributes() -> None:
    value = [1]
    ctx = Site("one", a=value)
    ctx.set_model(fl.ModelData())
    ctx.add_metadata("m", value)
    clone = ctx.clone()
    assert type(clone) is Site
    assert clone is not ctx
    assert clone == ctx
    assert clone["a"] is value
    assert clone.get_model() is ctx.get_model()
    assert clone.get_metadata("m") is value
    assert clone.site == "one"


CLONES: dict[str, Callable[[Site], Site]] = {"clone": lambda ctx: ctx.clone(), "copy.copy": copy.copy}


@pytest.mark.parametrize("duplicate", CLONES.values(), ids=CLONES)
def test_what_happens_to_a_clone_does_not_happen_to_the_original(duplicate: Callable[[Site], Site]) -> None:
    ctx = Site("one", a=1)
    model = fl.ModelData()
    ctx.set_model(model)
    ctx.add_metadata("m", 1)
    clone = duplicate(ctx)
    clone.set_prop("a", 2)
    clone.set_model(None)
    clone.add_metadata("m", 2)
    clone.site = "two"
    assert (ctx, ctx.get_model(), ctx.get_all_metadata(), ctx.site) == ({"a": 1}, model, {"m": 1}, "one")
    assert (clone, clone.get_model(), clone.get_all_metadata(), clone.site) == ({"a": 2}, None, {"m": 2}, "two")


def test_what_happens_to_the_original_does_not_happen_to_a_clone() -> None:
    ctx = fl.FLContext({"a": 1})
    clone = ctx.clone()
    ctx.add_metadata("m", 1)
    ctx.clear()
    assert clone == {"a": 1}
    assert clone.get_all_metadata() == {}


def test_restore_puts_a_snapshot_back_as_often_as_one_likes() -> None:
    ctx = fl.FLContext({"a": 1, "b": 2}, model=fl.ModelData())
    ctx.add_metadata("m", 1)
    model = ctx.get_model()
    snapshot = ctx.snapshot()
    for _ in range(2):
        ctx.clear()
        ctx.set_model(None)
        ctx.add_metadata("m", 2)
        ctx.restore(snapshot)
        assert list(ctx.items()) == [("a", 1), ("b", 2)]
        assert ctx.get_model() is model
        assert ctx.get_all_metadata() == {"m": 1}


def test_a_context_survives_pickling_with_model_metadata_and_read_only_weights() -> None:
    ctx = fl.FLContext({fl.ContextKey.ROUND: 2, fl.ContextKey.BEST_RECEIVED: best(0.5)})
    ctx.set_model(fl.ModelData(FrozenWeights({"w": np.arange(3, dtype=np.float32)})))
    ctx.add_metadata("m", {"x": 1})
    ctx.publish_metric("accuracy", 0.5)
    second = pickle.loads(pickle.dumps(ctx))
    assert type(second) is fl.FLContext
    assert second[fl.ContextKey.ROUND] == 2
    assert second[fl.ContextKey.METRICS] == {"accuracy": 0.5}
    assert type(second[fl.ContextKey.METRICS]) is FrozenDict
    assert second.get_all_metadata() == {"m": {"x": 1}}
    assert second.best_model is not None
    assert second.best_model.metric == 0.5
    model = second.get_model()
    assert model is not None
    assert model.weights is not None
    assert model.weights["w"].tolist() == [0.0, 1.0, 2.0]
    assert not model.weights["w"].flags.writeable
    second.add_metadata("m", 2)
    assert ctx.get_metadata("m") == {"x": 1}


# Read-only values

REFUSED: dict[str, Callable[[Any], object]] = {
    "set": lambda d: d.__setitem__("a", 2),
    "set new": lambda d: d.__setitem__("new", 2),
    "delete": lambda d: d.__delitem__("a"),
    "clear": lambda d: d.clear(),
    "pop": lambda d: d.pop("a"),
    "pop with default": lambda d: d.pop("new", None),
    "popitem": lambda d: d.popitem(),
    "setdefault": lambda d: d.setdefault("new", 2),
    "update": lambda d: d.update({"a": 2}),
    "update by keyword": lambda d: d.update(a=2),
    "update in place": lambda d: d.__ior__({"a": 2}),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_frozen_dict_refuses_every_change(change: Callable[[Any], object]) -> None:
    frozen = FrozenDict(a=1)
    with pytest.raises(TypeError, match="FrozenDict cannot be changed"):
        change(frozen)
    assert frozen == {"a": 1}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_frozen_weights_refuse_every_change(change: Callable[[Any], object]) -> None:
    frozen = FrozenWeights({"a": np.zeros(1)})
    with pytest.raises(TypeError, match="FrozenWeights cannot be changed"):
        change(frozen)
    assert list(frozen) == ["a"]
    assert frozen["a"].tolist() == [0.0]


def test_a_frozen_dict_reads_like_any_dict_and_yields_plain_ones() -> None:
    frozen = FrozenDict(a=1)
    assert frozen["a"] == 1
    assert {**frozen} == {"a": 1}
    plain = dict(frozen)
    plain["a"] = 2
    copied = frozen.copy()
    copied["a"] = 3
    merged = frozen | {"b": 2}
    merged["a"] = 4
    assert frozen == {"a": 1}
    assert isinstance(frozen, Mapping)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies_of_frozen_values_are_frozen(duplicate: Callable[[Any], Any]) -> None:
    metrics = duplicate(FrozenDict(a=1))
    assert type(metrics) is FrozenDict
    assert metrics == {"a": 1}
    weights = duplicate(FrozenWeights({"w": np.arange(2, dtype=ml_dtypes.bfloat16), "n": np.array(3)}))
    assert type(weights) is FrozenWeights
    assert weights["w"].dtype == ml_dtypes.bfloat16
    assert weights["w"].tolist() == [0.0, 1.0]
    assert weights["n"].shape == ()
    assert [array.flags.writeable for array in weights.values()] == [False, False]


def test_frozen_weights_are_an_own_read_only_copy() -> None:
    mine: dict[str, Any] = {"w": np.zeros((2, 3), np.float32)}
    frozen = FrozenWeights(mine)
    mine["w"][:] = 7
    mine["new"] = np.zeros(1)
    assert list(frozen) == ["w"]
    assert frozen["w"].tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match="read-only"):
        frozen["w"][0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        np.add(frozen["w"], 1, out=frozen["w"])
    assert frozen["w"].tolist() == [[0.0] * 3] * 2


def test_frozen_weights_are_contiguous_and_in_native_byte_order() -> None:
    frozen = FrozenWeights(
        {
            "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
            "swapped": np.arange(3, dtype=">f4"),
            "strided": np.arange(6)[::2],
            "scalar": np.array(5, np.int64),
            "empty": np.zeros((0, 2), np.float16),
        }
    )
    assert all(array.flags.c_contiguous for array in frozen.values())
    assert all(array.dtype.isnative for array in frozen.values())
    assert frozen["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert frozen["swapped"].tolist() == [0, 1, 2]
    assert frozen["strided"].tolist() == [0, 2, 4]
    assert frozen["scalar"].shape == ()
    assert frozen["scalar"] == 5
    assert frozen["empty"].shape == (0, 2)


def test_freezing_what_is_frozen_shares_its_arrays() -> None:
    first = FrozenWeights({"w": np.zeros(3)})
    assert FrozenWeights(first)["w"] is first["w"]


def test_frozen_weights_keep_no_hold_on_a_view_of_frozen_arrays() -> None:
    # A plain dict of read-only views is copied: the arrays beneath may be anybody's.
    mine = np.zeros(3)
    view = mine.view()
    view.flags.writeable = False
    frozen = FrozenWeights({"w": view})
    mine[0] = 7
    assert frozen["w"].tolist() == [0.0, 0.0, 0.0]


def test_adopt_takes_the_arrays_as_they_are_and_makes_them_read_only() -> None:
    array = np.zeros(3)
    frozen = FrozenWeights.adopt({"w": array})
    assert type(frozen) is FrozenWeights
    assert np.shares_memory(frozen["w"], array)
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        frozen["w"].flags.writeable = True


@pytest.mark.parametrize("freeze", [FrozenWeights, FrozenWeights.adopt], ids=["copied", "adopted"])
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, ">i8", "bool"], ids=str)
def test_frozen_arrays_cannot_be_made_writeable_again(
    freeze: Callable[[dict[str, Any]], FrozenWeights], dtype: Any
) -> None:
    frozen = freeze({"matrix": np.ones((2, 3), dtype), "scalar": np.ones((), dtype), "empty": np.ones(0, dtype)})
    for array in (*frozen.values(), frozen["matrix"].T, frozen["matrix"][0], frozen["matrix"].view()):
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)
        assert not array.flags.writeable


def test_the_metrics_of_a_contribution_are_a_read_only_copy() -> None:
    metrics = {"loss": 0.5}
    contribution = fl.Contribution("a", None, 1, metrics=metrics)
    metrics["loss"] = 0.1
    assert contribution.metrics == {"loss": 0.5}
    with pytest.raises(TypeError):
        contribution.metrics["loss"] = 0.1  # type: ignore[index]
    assert fl.Contribution("a", None, 1).metrics == {}
    with pytest.raises(TypeError):
        fl.Contribution("a", None, 1).metrics["loss"] = 0.1  # type: ignore[index]
    assert fl.Contribution("b", None, 1).metrics == {}


def test_a_frozen_contribution_keeps_everything_and_owns_its_weights() -> None:
    mine = {"w": np.zeros(2)}
    contribution = fl.Contribution("a", mine, 5, n_iter=3, round=2, kind=fl.Kind.DIFF, metrics={"m": 1.0})
    frozen = contribution.frozen()
    mine["w"][0] = 7
    assert frozen.weights is not None
    assert frozen.weights["w"].tolist() == [0.0, 0.0]
    assert not frozen.weights["w"].flags.writeable
    assert (frozen.contributor, frozen.aggregation_weight, frozen.n_iter, frozen.round) == ("a", 5, 3, 2)
    assert (frozen.kind, frozen.metrics) == (fl.Kind.DIFF, {"m": 1.0})
    bare = contribution.without_weights()
    assert bare.weights is None
    assert (bare.contributor, bare.aggregation_weight, bare.metrics) == ("a", 5, {"m": 1.0})
    assert contribution.weights is mine


def test_records_cannot_be_rebound() -> None:
    records: list[Any] = [
        fl.Contribution("a", None, 1),
        best(0.5),
        fl.ValidationResult("a", "final", {"accuracy": 0.5}),
        fl.RoundReport(0),
    ]
    for record in records:
        for field in dataclasses.fields(record):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(record, field.name, None)


@pytest.mark.parametrize("name", ["metrics", "accepted", "rejected", "absent", "quits", "handler_failures"])
def test_the_collections_of_a_report_are_read_only(name: str) -> None:
    assert type(getattr(fl.RoundReport(0), name)) in (FrozenDict, tuple)
