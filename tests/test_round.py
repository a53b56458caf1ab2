"""What a round accepts although it is not as the global model has it, which of several parts counts, and the values."""

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fed_learn as fl
from fed_learn import kernels
from fed_learn.aggregation.differences import add_difference, difference
from fed_learn.aggregation.round import MOST_FORMS, Combined, Round
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.contribution import Contribution, Kind
from fed_learn.weights import Array, FrozenWeights, WeightDict

pytestmark = pytest.mark.quick

KERNELS = kernels.available()
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["kept", "stream"])
INF = np.inf
MODEL: dict[str, Array] = {
    "fc.weight": np.zeros((2, 3), np.float32),
    "fc.bias": np.zeros(3, np.float64),
    "bn.mean": np.full(3, 7, np.float32),
    "bn.count": np.array(5, np.int64),
}


def f32(values: Any) -> Array:
    return np.array(values, np.float32)


def model(value: float, *names: str) -> dict[str, Array]:
    """All variables, or some of them, with one value everywhere."""
    return {name: np.full_like(array, value) for name, array in MODEL.items() if name in (names or MODEL)}


def sent(who: str, weights: Any, weight: Any = 1, **fields: Any) -> Contribution:
    return Contribution(who, weights, weight, **fields)


def begun(**options: Any) -> Round:
    """A round, of its own arguments and those of its settings."""
    own = {name: options.pop(name) for name in ("number", "model", "own", "told") if name in options}
    return Round(AggregationSettings(**options), **own)


def combined(this: Round, *contributions: Contribution) -> Combined:
    for contribution in contributions:
        this.receive(contribution)
    assert this.close() == []
    return this.combine()


def firsts(weights: WeightDict) -> dict[str, float]:
    """The first element of each variable."""
    return {name: float(np.asarray(array).reshape(-1)[0]) for name, array in weights.items()}


# Dtypes


@STREAMS
@pytest.mark.parametrize("given", ["float16", ml_dtypes.bfloat16, "float32", "float64"], ids=str)
@pytest.mark.parametrize("expected", ["float16", ml_dtypes.bfloat16, "float32", "float64"], ids=str)
def test_another_width_of_floats_is_rounded_to_that_of_the_model(given: Any, expected: Any, stream: bool) -> None:
    rng = np.random.default_rng(1)
    values = [rng.normal(size=33).astype(given) for _ in range(3)]
    this = begun(model={"w": np.zeros(33, expected)}, stream=stream)
    mean = combined(this, *(sent(f"{k}", {"w": array}, k + 1) for k, array in enumerate(values))).mean["w"]
    rounded = [
        np.float32(a).astype(expected) if np.dtype(expected).itemsize == 2 else a.astype(expected) for a in values
    ]
    assert mean.dtype == np.dtype(expected)
    assert mean.tobytes() == fl.weighted_average([{"w": a} for a in rounded], [1, 2, 3])["w"].tobytes()


def test_float64_to_bfloat16_goes_by_way_of_float32_in_every_place() -> None:
    # Exactly between two bfloat16 numbers once it is a float32, and above that as a float64.
    value = np.array([1 + 2.0**-8 + 2.0**-30])
    this = begun(model={"w": np.zeros(1, ml_dtypes.bfloat16)})
    assert combined(this, sent("a", {"w": value})).mean["w"].astype(float).tolist() == [1.0]


@STREAMS
def test_integers_take_other_widths_that_fit_and_floats_half_to_even(stream: bool) -> None:
    this = begun(model={"n": np.array([0, 0, 0], np.int64), "count": np.array(0), "w": np.zeros(1)}, stream=stream)
    mean = combined(
        this,
        sent("a", {"n": np.array([1, 2, 3], np.int32), "count": 12.5, "w": np.ones(1)}),
        sent("b", {"n": np.array([0.0, 2.0, 3.0]), "count": 13.5, "w": np.ones(1)}),
        sent("c", {"n": np.array([-1, 5, 3], np.int8), "count": 14, "w": np.ones(1)}),
    ).mean
    assert mean["n"].dtype == mean["count"].dtype == np.int64
    assert mean["n"].tolist() == [0, 3, 3]
    assert mean["count"] == 13  # of 12, 14 and 14: 13.3


@pytest.mark.parametrize(
    "known",
    [
        {"w": np.array([0, 0])},
        {"w": np.array([0, 0]), "b": np.zeros(1)},
        {"w": np.array([0])},
    ],
    ids=["weights begun as integers", "among others", "a single one"],
)
def test_fractions_are_not_cut_off_weights_that_were_begun_as_integers(known: dict[str, Array]) -> None:
    this = begun(model=known)
    fractions = {name: array + 0.25 for name, array in known.items()}
    with pytest.raises(fl.DtypeError, match="a: 'w' has dtype float64 with fractions, and the global model has int64"):
        this.receive(sent("a", fractions))


@pytest.mark.parametrize(
    ("expected", "array"),
    [
        (np.float16, np.array([70_000.0])),
        (np.float32, np.array([1e39])),
        (ml_dtypes.bfloat16, np.array([3.4e38])),
        (np.int8, np.array([128])),
        (np.int8, np.array([-129.0])),
        (np.uint8, np.array([-1], np.int16)),
        (np.int64, np.array([2.0**63])),
        (np.uint64, np.array([2.0**64])),
        (np.int64, np.array([np.nan])),
        (np.int32, np.array([np.inf])),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused_by_name(expected: Any, array: Array) -> None:
    this = begun(model={"w": np.zeros(1, expected)})
    with pytest.raises(fl.DtypeError, match=r"site-1: 'w' has dtype \w+ with values that do not fit into") as caught:
        this.receive(sent("site-1", {"w": array}))
    assert (caught.value.contributor, caught.value.name, caught.value.expected) == ("site-1", "w", np.dtype(expected))
    assert not this.accepted


@pytest.mark.parametrize(
    ("expected", "array"),
    [
        (np.float32, np.array([1, 1])),
        (np.float32, np.array([True, True])),
        (np.float32, np.array([0])),
        (np.bool_, np.array([1, 2])),
        (np.bool_, np.array([1.0, 0.5])),
        (np.bool_, np.array([1.0, np.nan])),
        (np.int64, np.array([True, True])),
        (np.float32, np.array([1 + 0j, 1])),
        (np.float32, np.array(["1", "1"])),
        (np.float32, np.zeros(2, "V4")),
    ],
    ids=str,
)
def test_another_sort_of_dtype_is_refused(expected: Any, array: Array) -> None:
    with pytest.raises(fl.DtypeError):
        begun(model={"w": np.zeros(array.shape, expected)}).receive(sent("site-1", {"w": array}))


@STREAMS
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, ml_dtypes.bfloat16])
def test_a_mask_of_truth_values_may_come_as_zeros_and_ones(dtype: Any, stream: bool) -> None:
    mask = np.array([True, False, True])
    this = begun(model={"mask": np.zeros(3, bool), "w": np.zeros(1)}, stream=stream)
    mean = combined(
        this,
        sent("a", {"mask": mask.astype(dtype), "w": np.ones(1)}),
        sent("b", {"mask": mask, "w": np.ones(1)}),
    ).mean
    assert (mean["mask"].dtype.name, mean["mask"].tolist()) == ("bool", [True, False, True])


@STREAMS
def test_a_single_number_of_floats_may_come_as_an_integer(stream: bool) -> None:
    this = begun(model={"step": np.zeros((), np.float32), "w": np.zeros(2, np.float32)}, stream=stream)
    mean = combined(
        this,
        sent("a", {"step": np.array(7), "w": f32([1, 2])}),
        sent("b", {"step": np.float32(8), "w": f32([1, 2])}),
    ).mean
    assert (mean["step"].dtype.name, mean["step"].tolist()) == ("float32", 7.5)


def test_nan_in_another_dtype_is_nan() -> None:
    with pytest.raises(fl.NonFiniteError, match=r"site-1: 'w' at index \(1,\): nan is not finite"):
        begun(model={"w": np.zeros(2, np.float32)}).receive(sent("site-1", {"w": np.array([1.0, np.nan])}))


def test_rounding_is_told_once_per_client(caplog: pytest.LogCaptureFixture) -> None:
    this = begun(model={"w": np.zeros(2, np.float32)})
    again = begun(model={"w": np.zeros(2, np.float32)}, told=this._told)
    for one in (this, again):
        for who in "ab":
            one.receive(sent(who, {"w": np.ones(2)}))
    assert [record.getMessage() for record in caplog.records] == [
        f"{who}: 'w' came as float64 and is rounded to float32, as the global model has it" for who in "ab"
    ]


# Numbers


@STREAMS
@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.array(3.0), np.int64(3)], ids=repr)
def test_a_number_in_any_form_is_a_variable_without_dimensions(value: Any, stream: bool) -> None:
    kind = np.asarray(value).dtype.kind
    expected = np.zeros((), np.int32 if kind == "i" else np.float32)
    found = combined(
        begun(model={"w": expected}, stream=stream), sent("a", {"w": value}), sent("b", {"w": expected})
    ).mean
    assert found["w"].dtype == expected.dtype
    assert found["w"] == (2 if kind == "i" else 1.5)


def test_a_number_is_not_broadcast() -> None:
    with pytest.raises(fl.ShapeError, match="a: 'w' has shape \\(\\), expected \\(2,\\)"):
        begun(model={"w": np.zeros(2)}).receive(sent("a", {"w": 1.0}))


# Parts


@STREAMS
@pytest.mark.parametrize("kind", list(Kind))
def test_a_part_that_is_the_same_from_all_is_averaged(
    kind: Kind, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    part = ("fc.bias", "fc.weight")
    this = begun(model=MODEL, kind=kind, stream=stream)
    found = combined(this, sent("a", model(1, *part), 1, kind=kind), sent("b", model(5, *part), 3, kind=kind))
    assert firsts(found.mean) == {"fc.weight": 4.0, "fc.bias": 4.0}
    assert found.sent == ("fc.weight", "fc.bias")  # in the order of the global model
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("clients send 2 of the global model's 4 variables")
    assert "'bn.mean', 'bn.count'" in told


@STREAMS
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_of_different_parts_the_commonest_counts_whoever_came_first(order: Sequence[int], stream: bool) -> None:
    contributions = [
        sent("a", model(1, "fc.weight")),
        sent("b", model(3, "fc.weight", "fc.bias")),
        sent("c", model(5, "fc.weight", "fc.bias")),
    ]
    this = begun(model=MODEL, stream=stream)
    for k in order:
        this.receive(contributions[k])
    ((refused, error),) = this.close()
    assert (refused.contributor, type(error), error.contributor) == ("a", fl.NamesError, "a")
    assert str(error).startswith("a: misses 'fc.bias', compared with what 2 of the round's contributions hold")
    assert error.missing == ("fc.bias",)
    assert sorted(this.accepted) == ["b", "c"]
    assert firsts(this.combine().mean) == {"fc.weight": 4.0, "fc.bias": 4.0}


def test_the_whole_model_wins_against_as_many_parts() -> None:
    this = begun(model=MODEL)
    this.receive(sent("a", model(1, "fc.weight")))
    this.receive(sent("b", model(3)))
    assert [refused.contributor for refused, _ in this.close()] == ["a"]
    assert firsts(this.combine().mean) == dict.fromkeys(MODEL, 3.0)


@STREAMS
def test_of_parts_as_common_and_as_large_the_choice_does_not_depend_on_arrival(stream: bool) -> None:
    for order in ((0, 1), (1, 0)):
        this = begun(model=MODEL, stream=stream)
        contributions = [sent("a", model(1, "fc.weight")), sent("b", model(3, "fc.bias"))]
        for k in order:
            this.receive(contributions[k])
        assert [refused.contributor for refused, _ in this.close()] == ["b"]


def test_parts_average_each_variable_over_those_who_sent_it() -> None:
    this = begun(model=MODEL, partial="average")
    this.receive(sent("a", model(1, "fc.weight"), 1))
    this.receive(sent("b", model(3, "fc.weight", "fc.bias"), 3))
    this.receive(sent("c", model(9, "bn.count"), 5))
    assert this.close() == []
    assert firsts(this.combine().mean) == {"fc.weight": 2.5, "fc.bias": 3.0, "bn.count": 9.0}


@given(st.data())
def test_parts_average_as_exact_rationals_do(data: st.DataObject) -> None:
    names = ["a", "b", "c"]
    known = {name: np.zeros(2, np.float32) for name in names}
    numbers = st.integers(-1000, 1000).map(float)
    clients = data.draw(
        st.lists(
            st.tuples(st.dictionaries(st.sampled_from(names), numbers, min_size=1), st.integers(0, 9)),
            min_size=1,
            max_size=6,
        )
    )
    this = begun(model=known, partial="average")
    for k, (values, weight) in enumerate(clients):
        this.receive(sent(f"{k}", {n: np.full(2, v, np.float32) for n, v in values.items()}, weight))
    assert this.close() == []
    expected: dict[str, float] = {}
    for name in names:
        terms = [(Fraction(values[name]), weight) for values, weight in clients if name in values and weight]
        if terms:
            expected[name] = float(np.float32(float(sum(v * w for v, w in terms) / sum(w for _, w in terms))))
    if not any(weight for _, weight in clients):
        with pytest.raises(fl.EmptyAggregationError):
            this.combine()
    else:
        assert firsts(this.combine().mean) == expected


def test_a_part_can_be_refused() -> None:
    with pytest.raises(fl.NamesError, match=r"a: has other variables than expected: misses 'fc.bias'"):
        begun(model=MODEL, partial="refuse").receive(sent("a", model(1, "fc.weight")))


@pytest.mark.parametrize("partial", ["same", "average"])
@pytest.mark.parametrize("weights", [{"new": np.zeros(1)}, {**model(1), "new": np.zeros(1)}, {}], ids=str)
def test_names_that_the_model_has_not_and_none_at_all_are_refused(weights: Any, partial: str) -> None:
    with pytest.raises(fl.NamesError):
        begun(model=MODEL, partial=partial).receive(sent("a", weights))


def test_a_stream_keeps_a_few_parts_apart_and_refuses_more() -> None:
    known = {f"{k}": np.zeros(1) for k in range(MOST_FORMS + 1)}
    this = begun(model=known, stream=True)
    for k in range(MOST_FORMS):
        this.receive(sent(f"site-{k}", {f"{k}": np.ones(1)}))
    with pytest.raises(fl.NamesError, match="last: holds '4', and 4 other parts of the model are added up already"):
        this.receive(sent("last", {f"{MOST_FORMS}": np.ones(1)}))
    this.receive(sent("site-x", {"2": np.array([3.0])}))
    assert len(this.close()) == MOST_FORMS - 1
    assert firsts(this.combine().mean) == {"2": 2.0}


def test_odd_parts_do_not_lock_whole_models_out_of_a_stream() -> None:
    known = {f"{k}": np.zeros(1) for k in range(MOST_FORMS + 2)}
    this = begun(model=known, stream=True)
    for k in range(MOST_FORMS):
        this.receive(sent(f"odd-{k}", {f"{k}": np.ones(1)}))
    for k in range(3):
        this.receive(sent(f"whole-{k}", {name: np.full(1, float(k)) for name in known}))
    with pytest.raises(fl.NamesError):  # a part that was given up does not come back
        this.receive(sent("late", {"0": np.ones(1)}))
    assert [refused.contributor for refused, _ in this.close()] == [f"odd-{k}" for k in range(MOST_FORMS)]
    assert firsts(this.combine().mean) == dict.fromkeys(known, 1.0)


# A global model that nobody knows


@STREAMS
def test_without_a_model_the_commonest_form_counts(stream: bool) -> None:
    this = begun(stream=stream)
    this.receive(sent("a", {"w": np.ones(3), "new": np.ones(1)}))
    this.receive(sent("b", {"w": np.ones(2)}))
    this.receive(sent("c", {"w": np.full(2, 3.0)}))
    ((refused, error),) = this.close()
    assert refused.contributor == "a"
    assert isinstance(error, fl.NamesError)
    found = this.combine()
    assert found.mean["w"].tolist() == [2.0, 2.0]
    assert found.sent == ("w",)


# Constants

MASK: Array = f32([[0, -INF], [0, 0]])
SCORES: dict[str, Array] = {
    "w": np.zeros(2, np.float32),
    "mask": MASK,
    "low": np.array(INF),
    "nan": np.array([np.nan, 1.0]),
}


def scores(value: float, **changed: Any) -> dict[str, Array]:
    return {**SCORES, "w": np.full(2, value, np.float32), **changed}


@STREAMS
@pytest.mark.parametrize("own", [True, False], ids=["copied", "as sent"])
def test_constants_that_are_not_finite_and_equal_everywhere_are_kept(
    own: bool, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    this = begun(model=SCORES, stream=stream, own=own)
    found = combined(this, sent("a", scores(1)), sent("b", scores(3)))
    assert found.mean["w"].tolist() == [2.0, 2.0]
    assert sorted(found.mean) == ["w"]
    assert found.sent == ("w", "mask", "low", "nan")
    assert "'mask', 'low', 'nan': not finite in the global model" in caplog.text


@STREAMS
def test_differences_of_constants_are_nan_or_zero_and_leave_them_as_they_are(stream: bool) -> None:
    this = begun(model=SCORES, kind=Kind.DIFF, stream=stream)
    with np.errstate(invalid="ignore"):
        naive = {name: array - SCORES[name] for name, array in scores(1).items()}
    ours = difference(scores(3), SCORES)
    assert all(np.isfinite(array).all() for array in ours.values())
    naive["low"] = np.asarray(naive["low"])
    this.receive(sent("a", naive, kind=Kind.DIFF))
    this.receive(sent("b", naive, kind=Kind.DIFF))
    assert this.close() == []
    mean = this.combine().mean
    assert mean["w"].tolist() == [1.0, 1.0]
    moved = add_difference(SCORES, ours)
    assert {n: a.tobytes() for n, a in moved.items()} == {n: a.tobytes() for n, a in scores(3).items()}


@STREAMS
@pytest.mark.parametrize(
    "changed",
    [
        {"mask": f32([[0, 0], [0, -INF]])},
        {"mask": f32([[0, INF], [0, 0]])},
        {"mask": f32([[0, -INF], [-INF, 0]])},
        {"low": np.array(-INF)},
        {"nan": np.array([np.nan, np.nan])},
        {"w": f32([1, np.nan])},
    ],
    ids=str,
)
def test_values_that_are_not_finite_elsewhere_are_refused(changed: Mapping[str, Array], stream: bool) -> None:
    (name,) = changed
    this = begun(model=SCORES, stream=stream)
    with pytest.raises(fl.NonFiniteError) as caught:
        this.receive(sent("a", {**scores(1), **changed}))
    assert (caught.value.contributor, caught.value.name) == ("a", name)
    assert not this.accepted


@STREAMS
@pytest.mark.parametrize("kind", list(Kind))
def test_where_only_some_places_are_constants_the_others_are_averaged(kind: Kind, stream: bool) -> None:
    bias = f32([1, -INF, 3])
    known = {"bias": bias, "w": np.zeros(1)}
    rows = [f32([2, -INF, 4]), f32([4, -INF, 8])]
    if kind is Kind.DIFF:
        with np.errstate(invalid="ignore"):
            rows = [row - bias for row in rows]
    this = begun(model=known, kind=kind, stream=stream)
    found = combined(this, *(sent(f"{k}", {"bias": row, "w": np.ones(1)}, kind=kind) for k, row in enumerate(rows)))
    assert found.mean["bias"].tolist() == ([3, -INF, 6] if kind is Kind.FULL else [2, 0, 3])


@STREAMS
def test_what_was_not_finite_may_become_a_number_if_it_does_everywhere(stream: bool) -> None:
    """As the range of a quantization observer does, which begins at infinity."""
    known = {"w": np.zeros(1), "low": np.array(INF)}
    this = begun(model=known, stream=stream)
    found = combined(this, *(sent(who, {"w": np.ones(1), "low": np.array(x)}) for who, x in (("a", 1.0), ("b", 3.0))))
    assert found.mean["low"] == 2.0
    mixed = begun(model=known, stream=stream)
    for who, low in (("a", 1.0), ("b", 3.0), ("c", INF)):
        mixed.receive(sent(who, {"w": np.ones(1), "low": np.array(low)}))
    assert [refused.contributor for refused, _ in mixed.close()] == ["c"]
    assert mixed.combine().mean["low"] == 2.0


@STREAMS
@pytest.mark.parametrize("kind", list(Kind))
def test_it_does_not_matter_who_trains_what_is_finite_beside_constants(kind: Kind, stream: bool) -> None:
    known = {"bias": f32([1, -INF]), "w": np.zeros(1)}
    rows = {"a": f32([2, -INF]), "b": f32([4, -INF]), "c": f32([1, -INF])}
    weights = {"a": 1, "b": 1, "c": 2, "idle": 0}
    this = begun(model=known, kind=kind, stream=stream)
    for who, weight in weights.items():
        row = rows.get(who, known["bias"])
        if kind is Kind.DIFF:
            # by fed_learn itself, or by plain subtraction
            row = difference({"x": row}, {"x": known["bias"]})["x"] if who == "a" else f32([row[0] - 1, np.nan])
        this.receive(sent(who, {"bias": row, "w": np.ones(1)}, weight, kind=kind))
    assert this.close() == []
    assert this.combine().mean["bias"].tolist() == ([2, -INF] if kind is Kind.FULL else [1, 0])


def test_a_part_without_the_constants_is_averaged_with_those_that_have_them() -> None:
    this = begun(model={"w": np.zeros(1), "mask": MASK}, partial="average")
    this.receive(sent("a", {"w": np.array([1.0])}))
    this.receive(sent("b", {"w": np.array([3.0]), "mask": MASK}))
    assert this.close() == []
    assert firsts(this.combine().mean) == {"w": 2.0}


def test_a_handler_sees_constants_as_they_were_sent() -> None:
    taken = begun(model=SCORES).receive(sent("a", scores(1)))
    assert taken.weights is not None
    assert {name: array.tobytes() for name, array in taken.weights.items()} == {
        name: array.tobytes() for name, array in scores(1).items()
    }


@STREAMS
def test_an_overflow_does_not_outvote_a_model_without_one_where_none_is_known(stream: bool) -> None:
    this = begun(stream=stream)
    for who, b in (("a", INF), ("b", INF), ("c", 1.0)):
        this.receive(sent(who, {"w": np.ones(1), "b": np.array([b])}))
    assert [refused.contributor for refused, _ in this.close()] == ["a", "b"]
    assert this.combine().mean["b"].tolist() == [1.0]


def test_what_is_kept_of_constants_is_a_copy() -> None:
    mine = [{"w": np.ones(1), "mask": MASK.copy()} for _ in range(2)]
    for stream in (False, True):
        this = begun(stream=stream, own=False)
        for who, weights in zip("ab", mine, strict=True):
            this.receive(sent(who, weights))
        assert this.close() == []
        kept = this.combine().constants["mask"]
        assert not any(np.shares_memory(kept, weights["mask"]) for weights in mine)


@STREAMS
def test_without_a_model_infinities_are_constants_if_another_sends_the_same(stream: bool) -> None:
    this = begun(stream=stream)
    for who, value in (("a", 1.0), ("b", 3.0)):
        this.receive(sent(who, {"w": np.full(2, value), "mask": MASK}))
    assert this.close() == []
    found = this.combine()
    assert found.mean["w"].tolist() == [2.0, 2.0]
    assert found.constants["mask"].tobytes() == MASK.tobytes()
    alone = begun(stream=stream)
    alone.receive(sent("a", {"w": np.full(2, 1.0), "mask": MASK}))
    ((_, error),) = alone.close()
    assert isinstance(error, fl.NonFiniteError)
    assert error.name == "mask"
    with pytest.raises(fl.NonFiniteError):
        begun(stream=stream).receive(sent("a", {"w": np.array([1.0, np.nan])}))


def test_a_model_of_constants_alone_is_nothing_to_average() -> None:
    this = begun(model={"mask": MASK})
    this.receive(sent("a", {"mask": MASK}))
    with pytest.raises(fl.OutOfTurnError, match="close comes first"):
        this.combine()
    assert this.close() == []
    with pytest.raises(fl.EmptyAggregationError, match="no variable can be averaged"):
        this.combine()


# Zeros


@STREAMS
def test_a_client_without_examples_is_present_and_adds_nothing(stream: bool) -> None:
    this = begun(model=MODEL, stream=stream)
    found = combined(this, sent("a", model(1), 0), sent("b", model(3), 2), sent("c", model(5), 2))
    assert sorted(this.accepted) == ["a", "b", "c"]
    assert firsts(found.mean) == dict.fromkeys(MODEL, 4.0)


@STREAMS
def test_clients_without_examples_have_no_say_in_which_part_counts(stream: bool) -> None:
    this = begun(model=MODEL, stream=stream)
    this.receive(sent("a", model(1), 0))
    this.receive(sent("b", model(2), 0))
    this.receive(sent("c", model(3, "fc.bias"), 5))
    assert [refused.contributor for refused, _ in this.close()] == ["a", "b"]
    assert firsts(this.combine().mean) == {"fc.bias": 3.0}


def test_what_a_handler_makes_is_checked_and_must_be_of_the_same_part() -> None:
    this = begun(model=MODEL)
    kept = [this.receive(sent(who, model(value, "fc.bias"))) for who, value in (("a", 1), ("b", 3))]
    assert this.close() == []
    halved = [Contribution(c.contributor, {"fc.bias": (c.weights or {})["fc.bias"] / 2}, 1) for c in kept]
    assert firsts(this.combine(halved).mean) == {"fc.bias": 1.0}
    with pytest.raises(fl.NamesError, match=r"b: has other variables than expected: adds 'fc\.weight'"):
        this.combine([kept[0], Contribution("b", model(3, "fc.bias", "fc.weight"), 1)])
    with pytest.raises(fl.NonFiniteError):
        this.combine([kept[0], Contribution("b", model(np.nan, "fc.bias"), 1)])


@STREAMS
def test_no_examples_anywhere_is_nothing_to_average(stream: bool) -> None:
    this = begun(model=MODEL, stream=stream)
    this.receive(sent("a", model(1), 0))
    assert this.close() == []
    with pytest.raises(fl.EmptyAggregationError, match="counts by more than 0"):
        this.combine()


# Bits


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_part_has_the_bits_that_its_variables_have_in_the_whole(kernel: str) -> None:
    rng = np.random.default_rng(5)
    whole = [
        {name: (rng.normal(size=array.shape) * 9).astype(array.dtype) for name, array in MODEL.items()}
        for _ in range(5)
    ]
    part = ("fc.weight", "bn.count")
    expected = fl.weighted_average(whole, [1, 2, 3, 4, 5], kernel=kernel)
    this = begun(model=MODEL, kernel=kernel)
    contributions = [sent(f"{k}", {name: w[name] for name in part}, k + 1) for k, w in enumerate(whole)]
    found = combined(this, *contributions).mean
    assert {name: array.tobytes() for name, array in found.items()} == {name: expected[name].tobytes() for name in part}


# Jobs


class Sending(fl.Learner):
    """Sends what a function makes of the weights it was given."""

    def __init__(self, make: Any, weight: Any = 1) -> None:
        self.make = make
        self.weight = weight

    def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult:
        return fl.TrainingResult(self.make(weights), self.weight)

    def validate(self, weights: WeightDict, ctx: fl.FLContext) -> Mapping[str, float]:
        return {"accuracy": 0.5}


def plus(step: float, *names: str, dtype: Any = None) -> Any:
    def make(weights: WeightDict) -> WeightDict:
        with np.errstate(invalid="ignore"):  # NaN for a counter
            return {n: (a + step).astype(dtype or a.dtype) for n, a in weights.items() if n in names}

    return make


@STREAMS
def test_a_job_averages_a_part_and_keeps_the_rest_of_the_global_model(stream: bool) -> None:
    server = fl.FederatedServer(MODEL, num_rounds=3, stream=stream)
    part = ("fc.weight", "fc.bias")
    learners = {"a": Sending(plus(1, *part)), "b": Sending(plus(3, *part, dtype=np.float64))}
    result = server.run([fl.FederatedClient(name, learner) for name, learner in learners.items()])
    assert [report.accepted for report in result.reports] == [("a", "b")] * 3
    assert firsts(result.weights) == {"fc.weight": 6.0, "fc.bias": 6.0, "bn.mean": 7.0, "bn.count": 5.0}
    assert {name: array.dtype for name, array in result.weights.items()} == {n: a.dtype for n, a in MODEL.items()}


def test_a_minority_that_is_refused_when_the_round_closes_is_in_event_report_and_log() -> None:
    seen: list[tuple[str, Any]] = []

    class Watch(fl.Handler):
        def receive_contribution(self, ctx: fl.FLContext) -> None:
            seen.append((ctx[fl.ContextKey.CONTRIBUTOR], ctx[fl.ContextKey.REJECTION]))

        def before_aggregation(self, ctx: fl.FLContext) -> None:
            assert [c.contributor for c in ctx[fl.ContextKey.CONTRIBUTIONS]] == ["b", "c"]

    server = fl.FederatedServer(
        MODEL, num_rounds=1, handlers=[Watch()], on_bad_contribution="reject", min_contributions=1
    )
    learners = {"a": Sending(plus(1, "fc.weight")), "b": Sending(plus(3, *MODEL)), "c": Sending(plus(5, *MODEL))}
    result = server.run([fl.FederatedClient(name, learner) for name, learner in learners.items()])
    assert [(name, error is None) for name, error in seen] == [("a", True), ("b", True), ("c", True), ("a", False)]
    (report,) = result.reports
    assert report.accepted == ("b", "c")
    assert [(failure.contributor, failure.cause) for failure in report.rejected] == [("a", "NamesError")]
    assert firsts(result.weights) == {"fc.weight": 4.0, "fc.bias": 4.0, "bn.mean": 11.0, "bn.count": 9.0}
    strict = fl.FederatedServer(MODEL, num_rounds=1)
    with pytest.raises(fl.NamesError, match=r"a: misses 'fc\.bias'"):
        strict.run([fl.FederatedClient(name, learner) for name, learner in learners.items()])


@pytest.mark.parametrize("kind", list(Kind))
def test_a_job_keeps_a_mask_whatever_the_kind(kind: Kind) -> None:
    server = fl.FederatedServer(SCORES, num_rounds=2, kind=kind, handlers=[fl.ModelSelectionHandler()])
    clients = [
        fl.FederatedClient(name, Sending(lambda w, step=step: {**w, "w": w["w"] + np.float32(step)}), kind=kind)
        for name, step in (("a", 1), ("b", 3))
    ]
    result = server.run(clients)
    assert {n: a.tobytes() for n, a in result.weights.items()} == {n: a.tobytes() for n, a in scores(4).items()}
    assert result.best is not None


def test_an_empty_global_model_is_what_the_contributions_of_the_first_round_say() -> None:
    server = fl.FederatedServer({}, num_rounds=2)
    clients = [
        fl.FederatedClient(name, Sending(lambda w, step=step: {"w": (w["w"] if w else np.zeros(2)) + step}))
        for name, step in (("a", 1.0), ("b", 3.0))
    ]
    assert server.run(clients).weights["w"].tolist() == [4.0, 4.0]
    with pytest.raises(ValueError, match="differences need a global model"):
        fl.FederatedServer({}, num_rounds=1, kind=Kind.DIFF)


def test_no_examples_anywhere_leaves_the_model_as_it_is_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    clients = [fl.FederatedClient(name, Sending(plus(1, *MODEL), weight=0)) for name in "ab"]
    server = fl.FederatedServer(MODEL, num_rounds=2, on_bad_contribution="reject")
    with pytest.raises(fl.NothingAggregatedError, match="EmptyAggregationError 2 times") as caught:
        server.run(clients)
    result = caught.value.result
    assert [report.accepted for report in result.reports] == [("a", "b")] * 2
    assert firsts(result.weights) == firsts(MODEL)
    assert "round 1: no contribution counts by more than 0 examples; the global model stands" in caplog.text


@pytest.mark.parametrize("on_bad_contribution", ["reject", "raise"])
def test_a_job_in_which_nothing_was_ever_aggregated_names_the_commonest_cause(on_bad_contribution: str) -> None:
    bad = {"a": plus(np.nan, *MODEL), "b": lambda w: {"other": np.zeros(1)}, "c": lambda w: {"another": np.zeros(1)}}
    server = fl.FederatedServer(MODEL, num_rounds=3, min_contributions=1, on_bad_contribution=on_bad_contribution)
    clients = [fl.FederatedClient(name, Sending(make)) for name, make in bad.items()]
    if on_bad_contribution == "raise":
        with pytest.raises(fl.ContributionError, match="a: "):
            server.run(clients)
        return
    with pytest.raises(fl.NothingAggregatedError) as caught:
        server.run(clients)
    error = caught.value
    assert (error.cause, error.count, error.rounds) == ("NamesError", 6, 3)
    assert str(error).startswith("nothing was aggregated in 3 rounds, so no client's work is in the model:")
    assert "NamesError 6 times, the first: b: has other variables than expected" in str(error)
    assert error.result.weights["fc.bias"].tolist() == [0.0, 0.0, 0.0]
    assert [len(report.rejected) for report in error.result.reports] == [3, 3, 3]


def test_a_job_that_nobody_contributes_to_is_in_vain_and_one_with_a_single_good_round_is_not() -> None:
    job = fl.FederatedServer(MODEL, num_rounds=1).begin()
    job.start_round(0)
    assert not job.aggregate()
    job.end_round()
    with pytest.raises(fl.NothingAggregatedError, match="TooFewContributionsError once"):
        job.finish()
    calls = []

    def once(weights: WeightDict) -> WeightDict:
        calls.append(1)
        return plus(1 if len(calls) == 2 else np.nan, *MODEL)(weights)  # type: ignore[no-any-return]

    server = fl.FederatedServer(MODEL, num_rounds=3, on_bad_contribution="reject")
    result = server.run([fl.FederatedClient("a", Sending(once))])
    assert [len(report.accepted) for report in result.reports] == [0, 1, 0]


def test_clients_that_all_sit_out_every_round_leave_a_job_without_a_model(caplog: pytest.LogCaptureFixture) -> None:
    class Idle(Sending):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> Any:
            return None

    with caplog.at_level(logging.ERROR), pytest.raises(fl.NothingAggregatedError) as caught:
        fl.FederatedServer(MODEL, num_rounds=2).run([fl.FederatedClient(name, Idle(None)) for name in "ab"])
    assert (caught.value.cause, caught.value.count) == ("absent", 4)


def test_weights_that_are_frozen_in_another_order_come_in_that_of_the_model() -> None:
    turned = FrozenWeights(dict(reversed(model(1).items())))
    taken = begun(model=MODEL).receive(sent("a", turned))
    assert taken.weights is not None
    assert list(taken.weights) == list(MODEL)


@STREAMS
def test_the_way_out_is_named_where_there_is_one(stream: bool) -> None:
    this = begun(model=MODEL, stream=stream)
    for who, names in (("a", ("fc.weight",)), ("b", ("fc.weight",)), ("c", ("fc.bias",))):
        this.receive(sent(who, model(1, *names)))
    ((_, error),) = this.close()
    way_out = "; partial='average' averages each variable over those who sent it"
    text = "c: misses 'fc.weight' and adds 'fc.bias', compared with what 2 of the round's contributions hold"
    assert str(error) == (text if stream else text + way_out)


@pytest.mark.parametrize("place", range(4))
def test_a_round_that_nobody_told_is_the_one_that_most_contributions_state(place: int) -> None:
    this = begun(model=MODEL)
    stated = [3, None, 3]
    stated.insert(place, 99)
    for k, number in enumerate(stated):
        this.receive(sent("liar" if number == 99 else f"site-{k}", model(9 if number == 99 else 1), round=number))
    ((refused, error),) = this.close()
    assert (refused.contributor, type(error), this.number) == ("liar", fl.RoundError, 3)
    assert firsts(this.combine().mean)["fc.weight"] == 1.0


@STREAMS
def test_a_number_of_examples_that_nobody_has_is_refused_by_name(stream: bool) -> None:
    this = begun(model=MODEL, stream=stream)
    for weight in (2.0**101, 1e300, 1.7e308):
        with pytest.raises(fl.AggregationWeightError) as caught:
            this.receive(sent("liar", model(9), weight))
        assert caught.value.contributor == "liar"
    for k, weight in enumerate((2.0**100, 2.0**100, 2.0**100)):
        this.receive(sent(f"site-{k}", model(k), weight))
    assert this.close() == []
    assert firsts(this.combine().mean)["fc.weight"] == 1.0


def test_the_total_weight_of_a_round_stays_finite_whatever_clients_state() -> None:
    server = fl.FederatedServer({"w": np.zeros(1)}, num_rounds=1, on_bad_contribution="reject", min_contributions=1)
    with server.begin() as job:
        job.start_round(0)
        for name, weight in (("a", 3.0), ("b", 1.7e308), ("c", 1.7e308), ("d", 1.0)):
            job.receive(name, sent(name, {"w": np.full(1, weight)}, weight, round=0))
        job.aggregate()
        report = job.end_round()
    assert (report.accepted, report.total_weight) == (("a", "d"), 4.0)
    assert [(f.contributor, f.cause) for f in report.rejected] == [(who, "AggregationWeightError") for who in "bc"]


# Foresight: what is at hand before it is received


@pytest.mark.parametrize("names", [(), ("fc.weight", "fc.bias")], ids=["whole", "part"])
def test_what_is_foreseen_is_what_is_combined_without_foresight(names: tuple[str, ...]) -> None:
    found = []
    for foreseen in (True, False):
        this = begun(number=0, model=MODEL)
        some = [sent(f"site-{k}", FrozenWeights(model(k, *names)), k + 1, round=0) for k in (2, 0, 1)]
        if foreseen:
            assert this.foresee(some)
        for one in some:
            this.receive(one)
        assert this.close() == []
        made = this.combine()
        found.append(({n: a.tobytes() for n, a in made.mean.items()}, made.sent, made.kind, this.report.accepted))
    assert found[0] == found[1]


def test_what_is_foreseen_does_not_count_if_one_of_it_turns_out_not_to() -> None:
    this = begun(number=0, model={"w": np.zeros(1)})
    some = [sent(f"site-{k}", FrozenWeights({"w": np.array([float(k)])}), 1, round=0) for k in (1, 2, 6)]
    some.append(sent("site-2", FrozenWeights({"w": np.array([100.0])}), 1, round=0))
    assert this.foresee(some)
    for one in some[:3]:
        this.receive(one)
    with pytest.raises(fl.DuplicateContributionError):
        this.receive(some[3])
    this.close()
    assert this.combine(list(this.accepted.values())[:2]).mean["w"].tolist() == [1.5]
    assert this.combine().mean["w"].tolist() == [3.0]


def test_foresight_leaves_it_to_receive_to_say_who_sent_what_is_not_finite() -> None:
    this = begun(number=0, model={"w": np.zeros(1)})
    good, bad = (sent(who, FrozenWeights({"w": np.array([x])}), 1, round=0) for who, x in (("a", 1.0), ("b", np.nan)))
    assert not this.foresee([good, bad])
    this.receive(good)
    with pytest.raises(fl.NonFiniteError, match="b: 'w'"):
        this.receive(bad)
    this.close()
    assert this.combine().mean["w"].tolist() == [1.0]


def test_a_mask_that_a_handler_puts_into_a_contribution_is_kept_as_a_mask() -> None:
    this = begun(number=0, model={"w": f32([0, -INF])}, kind="full")
    received = this.receive(sent("a", {"w": f32([3, -INF])}, 1, round=0))
    this.close()
    replaced = sent("a", {"w": f32([1, -INF])}, 1, round=0)
    assert received.contributor == replaced.contributor
    assert this.combine([replaced]).mean["w"].tolist() == [1, -INF]


@pytest.mark.parametrize(("partial", "stream"), [("same", False), ("same", True), ("average", False)])
def test_where_no_model_is_known_variables_are_found_by_name_and_not_by_place(partial: str, stream: bool) -> None:
    one = {"a": np.full(1000, 1.0), "b": np.array(100, np.int8)}
    other = {"b": np.array(50, np.int8), "a": np.full(1000, 3.0)}
    this = begun(number=0, partial=partial, stream=stream)
    made = combined(this, sent("s1", one, 1, round=0), sent("s2", other, 1, round=0)).mean
    assert made["a"].tolist() == [2.0] * 1000
    assert int(made["b"]) == 75


def test_where_no_model_is_known_what_a_handler_makes_has_the_shapes_of_the_others() -> None:
    this = begun(number=0)
    first = this.receive(sent("a", {"w": np.zeros(1000)}, 1, round=0))
    this.receive(sent("b", {"w": np.zeros(1000)}, 1, round=0))
    this.close()
    with pytest.raises(fl.ShapeError, match=r"b: 'w' has shape \(1,\), expected \(1000,\)"):
        this.combine([first, sent("b", {"w": np.zeros(1)}, 1, round=0)])
