"""The streaming mean: its bits, its bookkeeping, merging, pickling, and that a refusal leaves it as it was."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import (
    BFLOAT16,
    DTYPES,
    KERNELS,
    NARROW_FLOATS,
    Array,
    bits,
    differing_bytes,
    in_all_layouts,
    largest,
    largest_error,
    rounded_mean,
    values,
)

import fed_learn as fl
from fed_learn.aggregation import Accumulator, weighted_average
from fed_learn.aggregation.exact import ExactSums
from fed_learn.aggregation.waiting import MOST_BORROWED
from fed_learn.contribution import Contribution, Kind
from fed_learn.errors import (
    AggregationWeightError,
    BrokenAccumulatorError,
    ContributionError,
    DtypeError,
    DuplicateContributionError,
    EmptyAggregationError,
    ExactDomainError,
    FedLearnError,
    KernelNameError,
    KindError,
    MergeError,
    NamesError,
    NonFiniteError,
    OutputError,
    RoundError,
    ShapeError,
    SumOverflowError,
)
from fed_learn.weights import FrozenWeights, WeightDict

pytestmark = pytest.mark.quick

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
plain_and_exact = pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])

TOP = largest(np.dtype("float64"))


def model(*numbers: float) -> dict[str, Array]:
    return {"w": np.array(numbers), "steps": np.array(7)}


def batch(count: int = 7, seed: int = 0) -> list[Contribution]:
    """Contributions of every dtype."""
    rng = np.random.default_rng(seed)
    return [
        Contribution(
            f"site-{seed}-{k}",
            {dtype.name: values(rng, dtype, (5, 7)) for dtype in DTYPES},
            float(rng.uniform(0.1, 100)),
            round=4,
        )
        for k in range(count)
    ]


def filled(contributions: list[Contribution], *, exact: bool = False, kernel: str | None = None) -> Accumulator:
    accumulator = Accumulator(exact=exact, kernel=kernel)
    for contribution in contributions:
        accumulator.add(contribution)
    return accumulator


State = tuple[int, float, tuple[str, ...], dict[str, tuple[str, tuple[int, ...], bytes]] | None]


def state(accumulator: Accumulator) -> State:
    """Everything that can be seen of an accumulator."""
    result = bits(accumulator.result()) if len(accumulator) else None
    return len(accumulator), accumulator.total_weight, accumulator.contributors, result


# The mean


@every_kernel
@plain_and_exact
def test_bits_are_those_of_the_batch_in_the_same_order(kernel: str, exact: bool) -> None:
    contributions = batch()
    accumulator = filled(contributions, exact=exact, kernel=kernel)
    assert bits(accumulator.result()) == bits(weighted_average(contributions, exact=exact, kernel=kernel))


@pytest.mark.not_quick
@every_kernel
@plain_and_exact
@pytest.mark.parametrize("dtype", NARROW_FLOATS, ids=str)
def test_streamed_means_lie_within_half_an_ulp_of_the_exact_rational(
    kernel: str, exact: bool, dtype: np.dtype[Any]
) -> None:
    rng = np.random.default_rng(1)
    arrays = [values(rng, dtype, 1025) for _ in range(6)]
    weights = [120, 7, 0.1, 100_000, 3, 33]
    accumulator = Accumulator(kernel=kernel, exact=exact)
    for array, weight in zip(arrays, weights, strict=True):
        accumulator.add({"w": array}, weight)
    result = accumulator.result()["w"]
    assert result.dtype == dtype
    assert largest_error(result, arrays, weights) <= 0.51


@pytest.mark.not_quick
@every_kernel
@plain_and_exact
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.kind in "iub"], ids=str)
def test_streamed_counts_are_the_exact_rational_rounded_half_to_even(
    kernel: str, exact: bool, dtype: np.dtype[Any]
) -> None:
    rng = np.random.default_rng(2)
    arrays, weights = [values(rng, dtype, 1025) for _ in range(6)], [1, 1, 2, 4, 1, 1]
    accumulator = Accumulator(kernel=kernel, exact=exact)
    for array, weight in zip(arrays, weights, strict=True):
        accumulator.add({"w": array}, weight)
    result = accumulator.result()["w"]
    assert result.dtype == dtype
    assert result.tolist() == rounded_mean(arrays, weights)


@every_kernel
@plain_and_exact
def test_streamed_float16_with_70000_examples_is_not_nan(kernel: str, exact: bool) -> None:
    accumulator = Accumulator(kernel=kernel, exact=exact)
    for value in (65_504, 65_504, 65_504):
        accumulator.add({"w": np.full(3, value, np.float16)}, 70_000)
    assert accumulator.result()["w"].tolist() == [65_504.0] * 3


@every_kernel
@plain_and_exact
def test_streamed_int64_counter_keeps_its_value(kernel: str, exact: bool) -> None:
    accumulator = Accumulator(kernel=kernel, exact=exact)
    for weight in (3, 5):
        accumulator.add({"steps": np.array(1000)}, weight)
    result = accumulator.result()["steps"]
    assert (result.dtype.name, result.shape, int(result)) == ("int64", (), 1000)


@every_kernel
@pytest.mark.parametrize("weight", [2.0**-100, 1e-20, 1e30])
def test_streamed_float32_does_not_depend_on_the_scale_of_the_weights(kernel: str, weight: float) -> None:
    arrays = [np.array([1.0, 1e-38, 3e-40, 1e-45], np.float32), np.array([3.0, 1e-38, 3e-40, 1e-45], np.float32)]
    accumulator = Accumulator(kernel=kernel)
    for array in arrays:
        accumulator.add({"w": array}, weight)
    assert largest_error(accumulator.result()["w"], arrays, [weight, weight]) <= 0.51


@pytest.mark.parametrize("weight", [5e-324, 1e-300, 2.0**-101, 2.0**101, 1e300])
def test_weights_so_unusual_that_sums_could_leave_float64_are_refused(weight: float) -> None:
    accumulator = filled(batch(2))
    before = state(accumulator)
    with pytest.raises(AggregationWeightError) as caught:
        accumulator.add(batch(1)[0].weights or {}, weight, "tiny")
    assert (caught.value.contributor, caught.value.value) == ("tiny", weight)
    assert state(accumulator) == before


@every_kernel
def test_negative_zeros_stream_to_negative_zero(kernel: str) -> None:
    accumulator = Accumulator(kernel=kernel)
    for _ in range(3):
        accumulator.add({"w": np.full(3, -0.0, np.float32)}, 2)
        assert accumulator.result()["w"].tobytes() == np.full(3, -0.0, np.float32).tobytes()


@every_kernel
@plain_and_exact
@every_dtype
def test_every_layout_streams_to_the_bits_of_contiguous_arrays(kernel: str, exact: bool, dtype: np.dtype[Any]) -> None:
    array = values(np.random.default_rng(3), dtype, (4, 3))
    expected = Accumulator(kernel=kernel, exact=exact)
    accumulator = Accumulator(kernel=kernel, exact=exact)
    for layout in in_all_layouts(array).values():
        expected.add({"w": array}, 2)
        accumulator.add({"w": layout}, 2)
    assert bits(accumulator.result()) == bits(expected.result())


@every_kernel
@plain_and_exact
def test_empty_and_0d_arrays_stream(kernel: str, exact: bool) -> None:
    accumulator = Accumulator(kernel=kernel, exact=exact)
    for value in (1.0, 3.0):
        accumulator.add({"e": np.empty((0, 2), np.float32), "s": np.array(value)}, 1)
    result = accumulator.result()
    assert (result["e"].shape, result["e"].dtype.name) == ((0, 2), "float32")
    assert (result["s"].shape, float(result["s"])) == ((), 2.0)


@every_kernel
@plain_and_exact
@pytest.mark.parametrize("weights", [{}, {"e": np.empty(0, np.float32)}], ids=["no variables", "empty"])
def test_models_without_an_element_stream(kernel: str, exact: bool, weights: dict[str, Array]) -> None:
    accumulator = Accumulator(kernel=kernel, exact=exact)
    accumulator.add(weights, 1)
    other = Accumulator(kernel=kernel, exact=exact)
    other.add(weights, 2)
    accumulator.merge(other)
    assert bits(accumulator.result()) == bits(weights)
    assert accumulator.total_weight == 3.0


# Inputs are consumed


@every_kernel
@plain_and_exact
@every_dtype
def test_input_is_consumed_when_add_returns_and_never_changed(kernel: str, exact: bool, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(4)
    arrays = [values(rng, dtype, 33) for _ in range(3)]
    untouched, accumulator = Accumulator(kernel=kernel, exact=exact), Accumulator(kernel=kernel, exact=exact)
    for array in arrays:
        untouched.add({"w": array}, 2)
        mine = {"w": array.copy()}
        accumulator.add(mine, 2)
        assert mine["w"].tobytes() == array.tobytes()
        mine["w"][...] = 1
        del mine["w"]
    assert bits(accumulator.result()) == bits(untouched.result())


def test_like_is_not_kept_and_its_values_do_not_take_part() -> None:
    like = {"w": np.array([np.nan, 1.0])}
    accumulator = Accumulator(like=like)
    del like["w"]
    accumulator.add({"w": np.array([1.0, 2.0])}, 1)
    assert accumulator.result()["w"].tolist() == [1.0, 2.0]


@plain_and_exact
def test_result_belongs_to_the_caller(exact: bool) -> None:
    accumulator = Accumulator(exact=exact)
    accumulator.add(model(1.0, 2.0), 1)
    before = state(accumulator)
    result = accumulator.result()
    result["w"][:] = 99
    result["steps"][...] = 99
    assert state(accumulator) == before


@plain_and_exact
def test_read_only_frozen_weights_are_accepted(exact: bool) -> None:
    accumulator = Accumulator(exact=exact)
    accumulator.add(FrozenWeights(model(1.0, 2.0)), 3)
    assert accumulator.result()["w"].tolist() == [1.0, 2.0]


# Bookkeeping


@plain_and_exact
def test_new_accumulator_is_empty_and_its_result_is_an_error(exact: bool) -> None:
    accumulator = Accumulator(exact=exact, like=model(0.0))
    assert (len(accumulator), accumulator.total_weight, accumulator.contributors) == (0, 0.0, ())
    with pytest.raises(EmptyAggregationError) as caught:
        accumulator.result()
    assert isinstance(caught.value, ValueError)


@plain_and_exact
@pytest.mark.parametrize(("weight", "total"), [(np.int8(100), 300.0), (np.float16(60_000), 180_000.0)], ids=repr)
def test_total_weight_of_narrow_numbers_does_not_overflow(exact: bool, weight: Any, total: float) -> None:
    accumulator = Accumulator(exact=exact)
    for number in (1.0, 2.0, 6.0):
        accumulator.add({"w": np.array([number])}, weight)
    assert (accumulator.total_weight, type(accumulator.total_weight)) == (total, float)
    assert accumulator.result()["w"].tolist() == [3.0]


@plain_and_exact
def test_length_total_weight_and_contributors_follow_what_is_added(exact: bool) -> None:
    accumulator = Accumulator(exact=exact)
    accumulator.add(model(1.0), 2, "b")
    accumulator.add(model(1.0), 0.5)
    accumulator.add(Contribution("a", model(1.0), 4))
    assert (len(accumulator), accumulator.total_weight, accumulator.contributors) == (3, 6.5, ("b", "a"))


def test_total_weight_of_an_exact_accumulator_does_not_depend_on_the_order() -> None:
    weights = [0.1, 1e16, 0.7, 3.3, 2.0**-90, 1e16]
    totals = set()
    for start in range(len(weights)):
        accumulator = Accumulator(exact=True)
        for weight in weights[start:] + weights[:start]:
            accumulator.add(model(1.0), weight)
        totals.add(accumulator.total_weight)
    assert len(totals) == 1


@pytest.mark.not_quick
@every_kernel
@plain_and_exact
def test_more_can_be_added_after_a_result(kernel: str, exact: bool) -> None:
    contributions = batch()
    accumulator = Accumulator(kernel=kernel, exact=exact)
    for count, contribution in enumerate(contributions, 1):
        accumulator.add(contribution)
        expected = weighted_average(contributions[:count], exact=exact, kernel=kernel)
        assert bits(accumulator.result()) == bits(expected)
        assert bits(accumulator.result()) == bits(expected)


def test_like_sets_the_order_of_the_result() -> None:
    accumulator = Accumulator(like={"b": np.zeros(1), "a": np.zeros(1)})
    accumulator.add({"a": np.ones(1), "b": np.zeros(1)}, 1)
    assert list(accumulator.result()) == ["b", "a"]


def test_kernel_is_looked_up_when_the_accumulator_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    reference = type(fl.kernels.resolve("numpy"))
    accumulate = reference.accumulate

    def spy(self: Any, *rest: Any, **options: Any) -> None:
        calls.append(self.name)
        accumulate(self, *rest, **options)

    monkeypatch.setattr(reference, "accumulate", spy)
    with fl.kernels.use("numpy"):
        accumulator = Accumulator()
    accumulator.add(model(1.0), 1)
    accumulator.flush()
    assert calls == ["numpy"]
    Accumulator(kernel="numpy").add(FrozenWeights(model(1.0)), 1)
    assert calls == ["numpy", "numpy"]


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(KernelNameError):
        Accumulator(kernel="abacus")


def test_contribution_brings_its_own_weight_and_name() -> None:
    accumulator: Any = Accumulator()
    for extra in ((1,), (None, "a")):
        with pytest.raises(TypeError, match="brings its own"):
            accumulator.add(Contribution("a", model(1.0), 1), *extra)
    assert len(accumulator) == 0


# out=


@pytest.mark.not_quick
@every_kernel
@plain_and_exact
def test_out_is_written_again_and_again_and_returned(kernel: str, exact: bool) -> None:
    contributions = batch()
    accumulator = Accumulator(kernel=kernel, exact=exact)
    out: dict[str, Array] = {dtype.name: np.empty((5, 7), dtype) for dtype in DTYPES}
    kept = dict(out)
    for contribution in contributions:
        accumulator.add(contribution)
        assert accumulator.result(out) is out
        assert all(out[name] is kept[name] for name in out)
        assert bits(out) == bits(accumulator.result())


@every_kernel
@plain_and_exact
def test_out_of_any_writable_layout_is_filled(kernel: str, exact: bool) -> None:
    accumulator = Accumulator(kernel=kernel, exact=exact)
    accumulator.add({"w": np.arange(12, dtype=np.float32).reshape(3, 4)}, 1)
    for layout, array in in_all_layouts(np.zeros((3, 4), np.float32)).items():
        if array.flags.writeable:
            accumulator.result({"w": array})
            assert array.reshape(-1).tolist() == list(range(12)), layout


@plain_and_exact
def test_out_that_cannot_take_the_result_is_refused_and_changes_nothing(exact: bool) -> None:
    accumulator = Accumulator(exact=exact)
    accumulator.add({"w": np.ones(3)}, 1)
    before = state(accumulator)
    read_only = np.zeros(3)
    read_only.flags.writeable = False
    slab = np.zeros(3)
    with pytest.raises(OutputError, match="read-only"):
        accumulator.result({"w": read_only})
    for out, error in (
        ({"w": np.zeros(4)}, ShapeError),
        ({"w": np.zeros((3, 1))}, ShapeError),
        ({"w": np.zeros(3, np.float32)}, DtypeError),
        ({"v": slab}, NamesError),
        ({"w": slab, "v": slab}, NamesError),
    ):
        with pytest.raises(error):
            accumulator.result(out)
    assert slab.tolist() == [0.0, 0.0, 0.0]
    assert state(accumulator) == before


# Refusals


BAD: dict[str, tuple[Callable[[], tuple[Any, ...]], type[FedLearnError]]] = {
    "other names": (lambda: ({"w": np.ones(2)}, 1, "new"), NamesError),
    "other shape": (lambda: ({"w": np.ones(3), "steps": np.array(7)}, 1, "new"), ShapeError),
    "other dtype": (lambda: ({"w": np.ones(2, np.float32), "steps": np.array(7)}, 1, "new"), DtypeError),
    "NaN in the last variable": (
        lambda: ({"steps": np.array(7), "w": np.array([1.0, np.nan])}, 1, "new"),
        NonFiniteError,
    ),
    "no weight": (lambda: (model(1.0, 2.0), None, "new"), AggregationWeightError),
    "negative weight": (lambda: (model(1.0, 2.0), -1, "new"), AggregationWeightError),
    "weight too large": (lambda: (model(1.0, 2.0), TOP, "new"), AggregationWeightError),
    "contributed already": (lambda: (model(1.0, 2.0), 1, "old"), DuplicateContributionError),
    "other kind": (lambda: (Contribution("new", model(1.0, 2.0), 1, kind=Kind.DIFF),), KindError),
    "other round": (lambda: (Contribution("new", model(1.0, 2.0), 1, round=4),), RoundError),
}


@every_kernel
@plain_and_exact
@pytest.mark.parametrize("what", BAD)
def test_refused_contribution_leaves_no_trace(kernel: str, exact: bool, what: str) -> None:
    arguments, error = BAD[what]
    if exact and what == "weight too large":
        error = ExactDomainError
    accumulator: Any = Accumulator(kernel=kernel, exact=exact)
    accumulator.add(Contribution("old", model(1.0, 2.0), 2, round=3))
    before = state(accumulator)
    with pytest.raises(error):
        accumulator.add(*arguments())
    assert state(accumulator) == before
    accumulator.add(Contribution("new", model(3.0, 4.0), 1, round=3))
    assert accumulator.contributors == ("old", "new")


@plain_and_exact
def test_refused_first_contribution_sets_neither_schema_nor_kind_nor_round(exact: bool) -> None:
    accumulator = Accumulator(exact=exact)
    with pytest.raises(NonFiniteError):
        accumulator.add(Contribution("a", {"x": np.array([np.inf])}, 1, kind=Kind.DIFF, round=9))
    assert state(accumulator) == (0, 0.0, (), None)
    accumulator.add(Contribution("a", model(1.0), 1, round=2))
    assert accumulator.result()["w"].tolist() == [1.0]


@plain_and_exact
def test_anonymous_contributions_may_repeat_but_names_may_not(exact: bool) -> None:
    accumulator = Accumulator(exact=exact)
    accumulator.add(model(1.0), 1)
    accumulator.add(model(1.0), 1)
    accumulator.add(model(1.0), 1, "contribution 3")
    accumulator.add(model(1.0), 1)
    assert (len(accumulator), accumulator.contributors) == (4, ("contribution 3",))
    with pytest.raises(DuplicateContributionError) as caught:
        accumulator.add(model(1.0), 1, "contribution 3")
    assert caught.value.contributor == "contribution 3"


@plain_and_exact
def test_differences_are_averaged_among_themselves(exact: bool) -> None:
    accumulator = Accumulator(exact=exact)
    accumulator.add(Contribution("a", {"w": np.array([-2.0])}, 1, kind=Kind.DIFF))
    accumulator.add(Contribution("b", {"w": np.array([4.0])}, 3, kind=Kind.DIFF))
    assert accumulator.result()["w"].tolist() == [2.5]
    with pytest.raises(KindError) as caught:
        accumulator.add({"w": np.array([1.0])}, 1, "c")
    assert (caught.value.contributor, caught.value.kind, caught.value.expected) == ("c", Kind.FULL, Kind.DIFF)


@plain_and_exact
def test_round_is_set_by_the_first_that_states_one(exact: bool) -> None:
    accumulator = Accumulator(exact=exact)
    accumulator.add(Contribution("a", model(1.0), 1))
    accumulator.add(Contribution("b", model(1.0), 1, round=3))
    accumulator.add(Contribution("c", model(1.0), 1))
    accumulator.add(Contribution("d", model(1.0), 1, round=3))
    for stale in (2, 4):
        with pytest.raises(RoundError) as caught:
            accumulator.add(Contribution("e", model(1.0), 1, round=stale))
        assert (caught.value.contributor, caught.value.round, caught.value.expected) == ("e", stale, 3)
    assert accumulator.contributors == ("a", "b", "c", "d")


# Sums that leave float64


@every_kernel
@pytest.mark.parametrize("sign", [1, -1])
def test_sum_beyond_float64_is_noticed_and_named(kernel: str, sign: int) -> None:
    accumulator = Accumulator(kernel=kernel)
    contributions = [{"fine": np.ones(2), "huge": np.array([1.0, sign * TOP])} for _ in range(2)]
    for contribution in contributions:
        accumulator.add(contribution, 1)
    with pytest.raises(SumOverflowError) as caught:
        accumulator.result()
    assert (caught.value.name, isinstance(caught.value, OverflowError)) == ("huge", True)
    assert weighted_average(contributions, kernel=kernel)["huge"].tolist() == [1.0, sign * TOP]


@every_kernel
def test_overflow_that_turns_into_nan_is_noticed_too(kernel: str) -> None:
    accumulator = Accumulator(kernel=kernel)
    for value in (TOP, TOP, -TOP, -TOP):
        accumulator.add({"w": np.array([value])}, 2)
    with pytest.raises(SumOverflowError):
        accumulator.result()


@every_kernel
def test_product_beyond_float64_is_noticed(kernel: str) -> None:
    accumulator = Accumulator(kernel=kernel)
    accumulator.add({"w": np.array([1e300])}, 1e10)
    with pytest.raises(SumOverflowError):
        accumulator.result()


@every_kernel
def test_overflow_in_a_merge_is_noticed(kernel: str) -> None:
    first, second = Accumulator(kernel=kernel), Accumulator(kernel=kernel)
    for accumulator in (first, second):
        accumulator.add({"w": np.array([TOP])}, 1)
    first.merge(second)
    with pytest.raises(SumOverflowError):
        first.result()


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize("step", ["add", "merge"])
def test_interrupted_accumulator_refuses_to_go_on(step: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator, other = filled(batch(2), exact=exact), filled(batch(2, 1), exact=exact)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    if exact:
        monkeypatch.setattr(ExactSums, step, interrupted)
    else:
        monkeypatch.setattr(type(accumulator._kernel), "accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accumulator.merge(other) if step == "merge" else accumulator.add(batch(1, 3)[0].frozen())
    for use in (accumulator.result, lambda: accumulator.add(batch(1, 4)[0]), lambda: other.merge(accumulator)):
        with pytest.raises(BrokenAccumulatorError):
            use()


# Merging


@every_kernel
@plain_and_exact
def test_merge_adds_all_that_the_other_holds_and_leaves_the_other_as_it_was(kernel: str, exact: bool) -> None:
    first = filled(batch(3, 1), exact=exact, kernel=kernel)
    second = filled(batch(4, 2), exact=exact, kernel=kernel)
    before = state(second)
    expected_total = first.total_weight + second.total_weight
    first.merge(second)
    assert len(first) == 7
    assert first.total_weight == pytest.approx(expected_total, rel=1e-15)
    assert first.contributors == tuple(c.contributor for c in batch(3, 1) + batch(4, 2))
    assert state(second) == before


@every_kernel
def test_plain_merge_lies_within_half_an_ulp_of_the_exact_rational(kernel: str) -> None:
    contributions = batch(3, 1) + batch(4, 2)
    accumulator = filled(contributions[:3], kernel=kernel)
    accumulator.merge(filled(contributions[3:], kernel=kernel))
    result = accumulator.result()
    for dtype in NARROW_FLOATS:
        arrays = [c.weights[dtype.name] for c in contributions if c.weights is not None]
        weights = [c.aggregation_weight for c in contributions]
        assert largest_error(result[dtype.name], arrays, weights) <= 0.51


@every_kernel
def test_exact_merge_gives_the_bits_of_adding(kernel: str) -> None:
    contributions = batch(3, 1) + batch(4, 2)
    accumulator = filled(contributions[:3], exact=True, kernel=kernel)
    accumulator.merge(filled(contributions[3:], exact=True, kernel=kernel))
    assert state(accumulator) == state(filled(contributions, exact=True, kernel=kernel))


@plain_and_exact
def test_accumulators_of_unequal_size_count_by_their_weights(exact: bool) -> None:
    small, large = Accumulator(exact=exact), Accumulator(exact=exact)
    small.add({"w": np.array([10.0])}, 1)
    for _ in range(9):
        large.add({"w": np.array([0.0])}, 1)
    small.merge(large)
    assert small.result()["w"].tolist() == [1.0]


@plain_and_exact
def test_merge_into_an_empty_accumulator_takes_over_everything(exact: bool) -> None:
    full = filled(batch(3), exact=exact)
    empty = Accumulator(exact=exact)
    empty.merge(full)
    assert state(empty) == state(full)
    with pytest.raises(RoundError):
        empty.add(Contribution("late", batch(1)[0].weights, 1, round=5))
    before = state(full)
    empty.add(Contribution("more", batch(1)[0].weights, 1, round=4))
    assert state(full) == before


@plain_and_exact
def test_merge_of_an_empty_accumulator_changes_nothing(exact: bool) -> None:
    full = filled(batch(3), exact=exact)
    before = state(full)
    full.merge(Accumulator(exact=exact))
    full.merge(Accumulator(exact=exact, like={"other": np.zeros(1)}))
    assert state(full) == before


@every_kernel
@plain_and_exact
def test_contributions_that_count_by_zero_merge_as_they_are_added(kernel: str, exact: bool) -> None:
    def only_zero() -> Accumulator:
        accumulator = filled([], exact=exact, kernel=kernel)
        accumulator.add({"w": np.array([9.0, -9.0])}, 0, "zero")
        return accumulator

    full = filled([Contribution("one", {"w": np.array([1.0, 3.0])}, 2)], exact=exact, kernel=kernel)
    zero = only_zero()
    full.merge(zero)
    assert (len(full), full.total_weight, full.contributors) == (1, 2, ("one", "zero"))
    assert full.result()["w"].tolist() == [1, 3]
    assert (len(zero), zero.contributors) == (0, ("zero",))
    zero.merge(filled([Contribution("one", {"w": np.array([1.0, 3.0])}, 2)], exact=exact, kernel=kernel))
    assert (len(zero), zero.total_weight, zero.contributors) == (1, 2, ("zero", "one"))
    assert zero.result()["w"].tolist() == [1, 3]
    with pytest.raises(DuplicateContributionError, match="zero: contributed to both"):
        zero.merge(only_zero())


@plain_and_exact
def test_two_accumulators_of_zero_weights_have_no_mean(exact: bool) -> None:
    first, second = Accumulator(exact=exact), Accumulator(exact=exact)
    first.add({"w": np.ones(2)}, 0, "a")
    second.add({"w": np.ones(2)}, 0, "b")
    first.merge(second)
    assert (len(first), first.total_weight, first.contributors) == (0, 0, ("a", "b"))
    with pytest.raises(EmptyAggregationError, match="no contributions to average"):
        first.result()
    first.add({"w": np.full(2, 5.0)}, 1, "c")
    assert first.result()["w"].tolist() == [5, 5]


def one(contributor: str, weights: WeightDict, **rest: Any) -> Callable[[bool], Accumulator]:
    def make(exact: bool) -> Accumulator:
        return filled([Contribution(contributor, weights, 1, **rest)], exact=exact)

    return make


@plain_and_exact
@pytest.mark.parametrize(
    ("other", "error"),
    [
        (one("b", {"v": np.ones(2)}), NamesError),
        (one("b", {"w": np.ones(3)}), ShapeError),
        (one("b", {"w": np.ones((1, 2))}), ShapeError),
        (one("b", {"w": np.ones(2, np.float32)}), DtypeError),
        (one("a", {"w": np.ones(2)}), DuplicateContributionError),
        (one("b", {"w": np.ones(2)}, kind=Kind.DIFF), KindError),
        (one("b", {"w": np.ones(2)}, round=2), RoundError),
    ],
    ids=["names", "shape", "broadcasting", "dtype", "duplicate", "kind", "round"],
)
def test_refused_merge_changes_neither(
    exact: bool, other: Callable[[bool], Accumulator], error: type[ContributionError]
) -> None:
    accumulator = one("a", {"w": np.ones(2)}, round=3)(exact)
    second = other(exact)
    before, second_before = state(accumulator), state(second)
    with pytest.raises(error):
        accumulator.merge(second)
    assert state(accumulator) == before
    assert state(second) == second_before


def test_merge_refusals_carry_the_values() -> None:
    accumulator = one("a", {"w": np.ones(2)}, round=3)(False)
    with pytest.raises(DuplicateContributionError) as duplicate:
        accumulator.merge(one("a", {"w": np.ones(2)})(False))
    assert duplicate.value.contributor == "a"
    with pytest.raises(RoundError) as stale:
        accumulator.merge(one("b", {"w": np.ones(2)}, round=2)(False))
    assert (stale.value.round, stale.value.expected) == (2, 3)
    with pytest.raises(KindError) as kind:
        accumulator.merge(one("b", {"w": np.ones(2)}, kind=Kind.DIFF)(False))
    assert (kind.value.kind, kind.value.expected) == (Kind.DIFF, Kind.FULL)


@plain_and_exact
def test_accumulator_is_not_merged_with_itself(exact: bool) -> None:
    accumulator = filled(batch(2), exact=exact)
    before = state(accumulator)
    with pytest.raises(MergeError):
        accumulator.merge(accumulator)
    assert state(accumulator) == before


def test_exact_and_plain_accumulators_do_not_merge_and_the_error_has_a_builtin_base() -> None:
    plain, exact = filled(batch(2)), filled(batch(2, 1), exact=True)
    before = state(plain), state(exact)
    for first, second in ((plain, exact), (exact, plain)):
        with pytest.raises(FedLearnError) as caught:
            first.merge(second)
        assert isinstance(caught.value, ValueError | TypeError)
    assert (state(plain), state(exact)) == before


# Pickling


@pytest.mark.not_quick
@every_kernel
@plain_and_exact
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_accumulator_goes_on_with_the_same_bits(kernel: str, exact: bool, protocol: int) -> None:
    contributions = batch()
    accumulator = filled(contributions[:4], exact=exact, kernel=kernel)
    copied: Accumulator = pickle.loads(pickle.dumps(accumulator, protocol))
    assert state(copied) == state(accumulator)
    for contribution in contributions[4:]:
        copied.add(contribution)
    assert state(copied) == state(filled(contributions, exact=exact, kernel=kernel))
    assert len(accumulator) == 4
    with pytest.raises(DuplicateContributionError):
        copied.add(contributions[0])
    with pytest.raises(RoundError):
        copied.add(Contribution("late", contributions[0].weights, 1, round=5))


@pytest.mark.skipif("native" not in KERNELS, reason="the native kernel was not built")
@pytest.mark.parametrize(("before", "after"), [("native", "numpy"), ("numpy", "native")])
@plain_and_exact
def test_unpickled_accumulator_goes_on_with_the_kernel_that_is_current_there(
    before: str, after: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    contributions = batch()
    expected = bits(filled(contributions, exact=exact).result())
    monkeypatch.setenv("FED_LEARN_KERNEL", before)
    data = pickle.dumps(filled(contributions[:4], exact=exact))
    assert b"Kernel" not in data
    monkeypatch.setenv("FED_LEARN_KERNEL", after)
    used: list[str] = []
    for name in KERNELS:
        kernel = type(fl.kernels.resolve(name))

        def spy(self: Any, *rest: Any, original: Any = kernel.accumulate, **options: Any) -> None:
            used.append(self.name)
            original(self, *rest, **options)

        monkeypatch.setattr(kernel, "accumulate", spy)
    copied: Accumulator = pickle.loads(data)
    for contribution in contributions[4:]:
        copied.add(contribution)
    assert bits(copied.result()) == expected
    # Of three copies two are added in one pass. Exact sums are deposited.
    assert used == ([] if exact else [after] * 2)


@plain_and_exact
def test_empty_accumulator_can_be_pickled_with_its_schema(exact: bool) -> None:
    like = {"w": np.zeros(2, BFLOAT16)}
    copied: Accumulator = pickle.loads(pickle.dumps(Accumulator(like=like, exact=exact)))
    with pytest.raises(DtypeError):
        copied.add({"w": np.zeros(2, np.float32)}, 1)
    copied.add({"w": np.ones(2, BFLOAT16)}, 1)
    assert copied.result()["w"].tolist() == [1.0, 1.0]


# Borrowed contributions


@pytest.mark.not_quick
@every_kernel
@plain_and_exact
@every_dtype
def test_borrowed_contributions_give_the_bits_of_those_that_are_added_at_once(
    kernel: str, exact: bool, dtype: np.dtype[Any]
) -> None:
    rng = np.random.default_rng(17)
    count = 2 * MOST_BORROWED + 3
    models = [{"w": values(rng, dtype, 65), "b": values(rng, dtype, (3, 5))} for _ in range(count)]
    weights = rng.uniform(1, 1000, count).tolist()
    plain, borrowing, mixed = (Accumulator(kernel=kernel, exact=exact) for _ in range(3))
    for k, (model, weight) in enumerate(zip(models, weights, strict=True)):
        plain.add(model, weight)
        borrowing.add(model, weight, borrow=True)
        mixed.add(model, weight, borrow=k % 3 > 0)
    expected = plain.result()
    for accumulator in (borrowing, mixed):
        assert len(accumulator) == count
        assert accumulator.total_weight == plain.total_weight
        assert differing_bytes(accumulator.result(), expected) == 0


def test_at_most_so_many_borrowed_contributions_wait_and_flush_lets_go_of_them() -> None:
    accumulator = Accumulator()
    arrays = [np.full(7, k, np.float32) for k in range(MOST_BORROWED + 1)]
    for k, array in enumerate(arrays[:-1]):
        accumulator.add({"w": array}, 1, borrow=True)
        assert len(accumulator._waiting) == (k + 1) % MOST_BORROWED
    accumulator.add({"w": arrays[-1]}, 1, borrow=True)
    accumulator.flush()
    assert len(accumulator._waiting) == 0
    for array in arrays:
        array[:] = np.nan
    assert accumulator.result()["w"].tolist() == [MOST_BORROWED / 2] * 7


@pytest.mark.parametrize("use", ["result", "merge", "be merged", "pickle", "copy", "deepcopy", "add"])
def test_what_asks_for_the_sums_adds_what_was_borrowed(use: str) -> None:
    accumulator, other = Accumulator(), Accumulator()
    array = np.array([1, 5], np.float32)
    accumulator.add({"w": array}, 3, "a", borrow=True)
    other.add({"w": np.array([5, 1], np.float32)}, 1, "b")
    if use == "result":
        assert accumulator.result()["w"].tolist() == [1, 5]
        other = accumulator
    elif use == "merge":
        accumulator.merge(other)
        other = accumulator
    elif use == "be merged":
        other.merge(accumulator)
    elif use == "pickle":
        other = pickle.loads(pickle.dumps(accumulator))
    elif use == "copy":
        other = copy.copy(accumulator)
        accumulator.add({"w": np.array([7, 7], np.float32)}, 1, "c")
    elif use == "deepcopy":
        other = copy.deepcopy(accumulator)
    else:
        accumulator.add({"w": np.array([5, 1], np.float32)}, 1, "b")
        other = accumulator
    array[:] = 99
    assert other.result()["w"].tolist() == ([2, 4] if len(other) == 2 else [1, 5])


def test_a_borrowed_contribution_is_checked_before_it_waits() -> None:
    accumulator = Accumulator()
    accumulator.add({"w": np.ones(2)}, 1, "a", borrow=True)
    for weights, weight, contributor, error in (
        ({"w": np.array([1, np.nan])}, 1, "b", NonFiniteError),
        ({"w": np.ones(3)}, 1, "b", ShapeError),
        ({"w": np.ones(2)}, -1, "b", AggregationWeightError),
        ({"w": np.ones(2)}, 1, "a", DuplicateContributionError),
    ):
        with pytest.raises(error):
            accumulator.add(weights, weight, contributor, borrow=True)
    assert len(accumulator) == 1
    assert accumulator.result()["w"].tolist() == [1, 1]


def test_an_accumulator_that_is_told_kind_and_round_does_not_take_them_from_the_first() -> None:
    mean = Accumulator(kind=Kind.DIFF, round=3)
    liars = [
        Contribution("liar", model(1.0), 1, kind=Kind.DIFF, round=99),
        Contribution("liar", model(1.0), 1, kind=Kind.FULL, round=3),
    ]
    for liar, error in zip(liars, (RoundError, KindError), strict=True):
        with pytest.raises(error) as caught:
            mean.add(liar)
        assert caught.value.contributor == "liar"
    mean.add(Contribution("a", model(1.0), 1, kind=Kind.DIFF, round=3))
    mean.add(model(3.0), 1, "b")  # bare weights are of the kind that it was told
    assert mean.contributors == ("a", "b")
    assert mean.result()["w"].tolist() == [2.0]


def test_an_accumulator_that_is_told_kind_and_round_merges_only_with_these() -> None:
    def holding(**said: Any) -> Accumulator:
        made = Accumulator()
        made.add(Contribution("a", model(1.0), 1, **said))
        return made

    mean = Accumulator(kind=Kind.DIFF, round=3)
    for other, error in ((holding(round=3), KindError), (holding(kind=Kind.DIFF, round=2), RoundError)):
        with pytest.raises(error):
            mean.merge(other)
    mean.merge(holding(kind=Kind.DIFF, round=3))
    assert mean.contributors == ("a",)
    with pytest.raises(ValueError, match="gradient"):
        Accumulator(kind="gradient")  # type: ignore[arg-type]
