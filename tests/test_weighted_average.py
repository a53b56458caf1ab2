"""The weighted mean of a batch: its arithmetic against exact rationals, and arrays of any layout."""

import math
import os
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from reference import (
    BFLOAT16,
    COUNTS,
    DTYPES,
    FLOATS,
    INTEGERS,
    KERNELS,
    NARROW_FLOATS,
    SIZES,
    Array,
    bits,
    exact_magnitude,
    exact_mean,
    finite_patterns,
    fractions,
    in_all_layouts,
    largest,
    largest_error,
    num_threads,
    rounded_mean,
    values,
)

import fed_learn as fl
from fed_learn.aggregation import weighted_average
from fed_learn.contribution import Contribution
from fed_learn.errors import (
    AggregationWeightError,
    ContributionError,
    DtypeError,
    EmptyAggregationError,
    FedLearnError,
    NamesError,
    OutputError,
    ShapeError,
    WeightsTypeError,
)

pytestmark = pytest.mark.quick

WEIGHTS = (1, 120, 7, 33, 999, 2, 58)

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)
every_narrow_float = pytest.mark.parametrize("dtype", NARROW_FLOATS, ids=str)
every_integer = pytest.mark.parametrize("dtype", INTEGERS, ids=str)


def mean(arrays: list[Array], weights: Any, kernel: str) -> Array:
    """The mean of one variable, by whose name none is a random key."""
    return weighted_average([{"counts": array} for array in arrays], weights, kernel=kernel)["counts"]


@cache
def inputs(dtype: np.dtype[Any], size: int, count: int = len(WEIGHTS)) -> tuple[Array, ...]:
    """The same random arrays for every kernel."""
    rng = np.random.default_rng([size, count, *dtype.name.encode()])
    return tuple(values(rng, dtype, size) for _ in range(count))


def test_native_kernel_is_available_where_it_is_required() -> None:
    required = os.environ.get("FED_LEARN_REQUIRE_NATIVE") == "1"
    assert "native" in fl.kernels.available() or not required, fl.kernels.unavailable()


def test_numpy_kernel_is_available_everywhere() -> None:
    assert "numpy" in fl.kernels.available()


# Accuracy: floats


@every_kernel
@every_narrow_float
@pytest.mark.parametrize("size", SIZES)
def test_float_means_lie_within_half_an_ulp_of_the_exact_rational(kernel: str, dtype: np.dtype[Any], size: int) -> None:
    arrays = list(inputs(dtype, size))
    result = mean(arrays, WEIGHTS, kernel)
    assert (result.dtype, result.shape) == (dtype, (size,))
    assert largest_error(result, arrays, WEIGHTS) <= 0.51


@every_kernel
@every_narrow_float
def test_positive_floats_and_fractional_weights_lie_within_half_an_ulp(kernel: str, dtype: np.dtype[Any]) -> None:
    arrays = [np.abs(array) for array in inputs(dtype, 1025, 5)]
    weights = (0.1, 1 / 3, 2.7182818284590452, 1e-3, 12345.678)
    assert largest_error(mean(arrays, weights, kernel), arrays, weights) <= 0.51


@every_kernel
@every_narrow_float
def test_means_of_random_bit_patterns_lie_within_half_an_ulp(kernel: str, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(1)
    arrays = [finite_patterns(rng, dtype, 1025) for _ in range(5)]
    weights = (3, 1, 70_000, 11, 0.25)
    assert largest_error(mean(arrays, weights, kernel), arrays, weights) <= 0.51


@pytest.mark.not_quick
@every_kernel
@every_narrow_float
def test_means_of_4096_contributions_lie_within_half_an_ulp(kernel: str, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(2)
    weights = rng.integers(1, 100_000, 4096).tolist()
    arrays = [values(rng, dtype, 3) for _ in weights]
    assert largest_error(mean(arrays, weights, kernel), arrays, weights) <= 0.51


@pytest.mark.not_quick
@every_kernel
@pytest.mark.parametrize("size", SIZES)
def test_float64_means_err_by_one_rounding_per_step(kernel: str, size: int) -> None:
    arrays = list(inputs(np.dtype("float64"), size))
    result = fractions(mean(arrays, WEIGHTS, kernel))
    # Each product, each sum, Σa and the division round once: at most 2N + 1 half-ulps of Σ|a·x|/Σa.
    steps = 2 * len(WEIGHTS) + 1
    bounds = [steps * size / 2**53 for size in exact_magnitude(arrays, WEIGHTS)]
    errors = [abs(a - b) for a, b in zip(result, exact_mean(arrays, WEIGHTS), strict=True)]
    assert len(errors) == size
    assert all(error <= bound for error, bound in zip(errors, bounds, strict=True))


@every_kernel
@every_dtype
def test_single_contribution_is_returned_bit_for_bit(kernel: str, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(3)
    array = finite_patterns(rng, dtype, 1025) if dtype in NARROW_FLOATS else values(rng, dtype, 1025)
    # a·x is rounded once more where x has all the bits of a float64, but not where a is a power of two.
    for weight in (1, 0.25, 2**40) if dtype == np.float64 else (1, 3, 0.1, 100_000):
        assert mean([array], [weight], kernel).tobytes() == array.tobytes()


@every_kernel
@every_float
def test_equal_contributions_of_equal_weight_keep_their_bits(kernel: str, dtype: np.dtype[Any]) -> None:
    array = values(np.random.default_rng(4), dtype, 1025)
    assert mean([array] * 4, None, kernel).tobytes() == array.tobytes()


@every_kernel
def test_float16_with_70000_examples_is_not_nan(kernel: str) -> None:
    arrays = [np.full(9, value, np.float16) for value in (1.5, 2.5)]
    assert mean(arrays, [70_000, 70_000], kernel).tolist() == [2.0] * 9


@every_kernel
def test_float16_with_weight_20000_from_four_clients_is_not_infinite(kernel: str) -> None:
    arrays = [np.full(9, value, np.float16) for value in (60_000, 60_000, 64_000, 64_000)]
    assert mean(arrays, [20_000] * 4, kernel).tolist() == [62_016.0] * 9  # 62 000 is a tie between two multiples of 32


@every_kernel
@every_narrow_float
@pytest.mark.parametrize("examples", [70_000, 100_000, 10**12])
def test_largest_values_with_many_examples_stay_finite(kernel: str, dtype: np.dtype[Any], examples: int) -> None:
    top = largest(dtype)
    arrays = [np.array([top, -top, top, 1], dtype) for _ in range(10)]
    weights = [examples + k for k in range(10)]
    assert mean(arrays, weights, kernel).tolist() == [top, -top, top, 1.0]


@every_kernel
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 100])
def test_float64_near_the_largest_finite_does_not_overflow(kernel: str, count: int) -> None:
    top = largest(np.dtype("float64"))
    array = np.array([top, -top, top / 2, np.nextafter(top, 0)])
    weights = [float(3 * k + 1) for k in range(count)]
    result = mean([array] * count, weights, kernel)
    assert np.isfinite(result).all()
    assert np.abs(result / array - 1).max() <= 2 * count * 2.0**-53


@every_kernel
def test_float64_extremes_of_opposite_sign_cancel_to_zero(kernel: str) -> None:
    top = largest(np.dtype("float64"))
    arrays = [np.array([top, top]), np.array([top, -top]), np.array([-top, top]), np.array([-top, -top])]
    assert mean(arrays, [1e300] * 4, kernel).tolist() == [0.0, 0.0]


@every_kernel
@pytest.mark.parametrize("weight", [5e-324, 1e-310, 1e-300, 1e300, 1.7e308])
def test_float32_mean_does_not_depend_on_the_scale_of_the_weights(kernel: str, weight: float) -> None:
    arrays = [np.array([1.0, 3e38, 1e-38, 1e-45], np.float32), np.array([3.0, 3e38, 1e-38, 1e-45], np.float32)]
    assert mean(arrays, [weight, weight], kernel).tobytes() == mean(arrays, [1, 1], kernel).tobytes()
    assert mean(arrays, [weight, weight], kernel).tolist() == np.array([2.0, 3e38, 1e-38, 1e-45], np.float32).tolist()


@every_kernel
def test_float32_subnormals_are_averaged_not_flushed(kernel: str) -> None:
    smallest = np.float32(2.0**-149)
    arrays = [np.arange(0, 64, dtype=np.uint32).view(np.float32), np.arange(2, 66, dtype=np.uint32).view(np.float32)]
    result = mean(arrays, [1, 1], kernel)
    assert (result / smallest).tolist() == list(range(1, 65))
    assert largest_error(result, arrays, [1, 1]) == 0.0


@every_kernel
@every_narrow_float
def test_subnormals_of_every_narrow_float_lie_within_half_an_ulp(kernel: str, dtype: np.dtype[Any]) -> None:
    bits_of = np.dtype(f"uint{8 * dtype.itemsize}")
    rng = np.random.default_rng(5)
    top = int(np.asarray(smallest_normal(dtype)).view(bits_of)) * 2
    arrays = [rng.integers(0, top, 1025, dtype=bits_of).view(dtype) for _ in range(3)]
    assert largest_error(mean(arrays, [5, 2, 4], kernel), arrays, [5, 2, 4]) <= 0.51


def smallest_normal(dtype: np.dtype[Any]) -> Array:
    """The smallest normal number as a 0-d array."""
    exponent = -14 if dtype == np.float16 else -126
    return np.array(2.0**exponent, dtype)


@every_kernel
def test_float64_subnormals_that_all_share_are_kept(kernel: str) -> None:
    array = np.array([5e-324, -1.5e-323, 1e-310, 2.0**-1022, 3.3e-308])
    for count in (1, 2, 4):
        assert mean([array] * count, None, kernel).tobytes() == array.tobytes()


@every_kernel
@pytest.mark.parametrize(
    "weights",
    [[1e-30, 1e-30], [1e-31, 1e-31], [1e-30, 1e-31], [1e-300, 5e-324], [2.0**-100, 0.3], [1e308, 1e-30]],
    ids=str,
)
@pytest.mark.parametrize("size", [1e-300, 1e-308, 1e-320, 5e-324])
def test_tiny_float64_with_weights_of_any_scale_do_not_vanish(kernel: str, size: float, weights: list[float]) -> None:
    arrays = [np.array([size, -size, size]), np.array([size, -size, 3 * size])]
    result = mean(arrays, weights, kernel)
    assert result.all()
    assert result.tolist()[:2] == pytest.approx([size, -size], rel=1e-15, abs=5e-324)
    assert largest_error(result, arrays, weights) <= 3


@every_kernel
@pytest.mark.parametrize("numbers", [(1.0, 1e300), (1e-300, 1e-300), (1e300, -1e300), (-2.5, 0.0)], ids=str)
def test_weights_many_orders_of_magnitude_apart_leave_the_mean_to_the_large_one(
    kernel: str, numbers: tuple[float, float]
) -> None:
    arrays = [np.array([number]) for number in numbers]
    weights = [3e200, 1e-200]
    result = mean(arrays, weights, kernel)
    assert result.tolist() == [numbers[0]]
    assert largest_error(result, arrays, weights) <= 2


@every_kernel
def test_a_small_weight_still_counts_where_the_large_one_has_nothing_to_add(kernel: str) -> None:
    arrays = [np.array([0.0]), np.array([1e300])]
    result = mean(arrays, [3e200, 1e-200], kernel)
    assert result.tolist() == pytest.approx([1e-100 / 3], rel=1e-15, abs=0)


@every_kernel
@pytest.mark.parametrize("apart", [799, 801, 930, 1900, 2040])
@every_float
def test_weights_however_far_apart_lose_no_bits(kernel: str, apart: int, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(31)
    weights = [1.1e307, 0.7e307, math.ldexp(1.3, 1019 - apart), math.ldexp(1.3, 1019 - min(apart, 900))]
    arrays = [values(rng, dtype, 9) for _ in weights]
    arrays[0][:6] = arrays[1][:6] = 0
    arrays[2][3:6] = 0
    arrays[2][0] = arrays[3][3] = largest(dtype)
    assert largest_error(mean(arrays, weights, kernel), arrays, weights) <= (4 if dtype == np.float64 else 0.51)
    out = {"w": np.empty(9, dtype)}
    given = weighted_average([{"w": array} for array in arrays], weights, out=out, kernel=kernel)
    assert given is out
    assert out["w"].tobytes() == mean(arrays, weights, kernel).tobytes()


@every_kernel
def test_a_tiny_weight_decides_on_a_tie_of_large_integers(kernel: str) -> None:
    arrays = [np.array([2**60 + k, -(2**60) - k]) for k in (0, 1)] + [np.array([2**62, -(2**62)])]
    weights = [1.0, 1.0, 2.0**-930]
    assert mean(arrays[:2], weights[:2], kernel).tolist() == [2**60, -(2**60)]
    assert mean(arrays, weights, kernel).tolist() == rounded_mean(arrays, weights) == [2**60 + 1, -(2**60) - 1]


@every_kernel
def test_the_mean_of_a_tiny_float64_does_not_depend_on_its_neighbours(kernel: str) -> None:
    rng = np.random.default_rng(29)
    weights = (0.3, 0.7, 2.5)
    tiny = [rng.integers(1, 1 << 54, 999).view(np.float64) for _ in weights]
    alone = mean(tiny, weights, kernel)
    assert largest_error(alone, tiny, weights) <= 4
    with_large = mean([np.append(array, 1e285) for array in tiny], weights, kernel)
    assert with_large[-1] == pytest.approx(1e285, rel=1e-15)
    assert np.count_nonzero(with_large[:-1] != alone) == 0


@every_kernel
@every_float
def test_negative_zeros_average_to_negative_zero(kernel: str, dtype: np.dtype[Any]) -> None:
    negative, positive = np.full(5, -0.0, dtype), np.zeros(5, dtype)
    for count in (1, 2, 5, 6):
        assert mean([negative] * count, None, kernel).tobytes() == negative.tobytes()
    assert mean([negative, positive], None, kernel).tobytes() == positive.tobytes()
    assert mean([positive, negative], None, kernel).tobytes() == positive.tobytes()


@every_kernel
def test_bfloat16_is_averaged_and_restored(kernel: str) -> None:
    arrays = [np.array([1, 2, -3], BFLOAT16), np.array([3, 4, -5], BFLOAT16)]
    result = mean(arrays, [1, 3], kernel)
    assert result.dtype == BFLOAT16
    assert result.tolist() == [2.5, 3.5, -4.5]


@every_kernel
@pytest.mark.parametrize("dtype", [np.dtype("float16"), BFLOAT16], ids=str)
def test_every_half_way_case_of_a_half_goes_to_the_even_neighbour(kernel: str, dtype: np.dtype[Any]) -> None:
    top = int(np.asarray(largest(dtype), dtype).view(np.uint16))
    patterns = np.arange(top + 1, dtype=np.uint16)
    lower, upper = patterns[:-1].view(dtype), patterns[1:].view(dtype)
    even = np.where(patterns[:-1] % 2 == 0, patterns[:-1], patterns[1:])
    assert mean([lower, upper], [1, 1], kernel).tobytes() == even.tobytes()
    negative = [(-lower.astype(np.float64)).astype(dtype), (-upper.astype(np.float64)).astype(dtype)]
    assert mean(negative, [1, 1], kernel).tobytes() == (even | np.uint16(0x8000)).tobytes()


# Integers and booleans


@every_kernel
@pytest.mark.parametrize("dtype", COUNTS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_counts_are_the_exact_rational_rounded_half_to_even(kernel: str, dtype: np.dtype[Any], size: int) -> None:
    arrays = list(inputs(dtype, size))
    result = mean(arrays, WEIGHTS, kernel)
    assert (result.dtype, result.shape) == (dtype, (size,))
    assert result.tolist() == rounded_mean(arrays, WEIGHTS)


@every_kernel
@every_integer
def test_ties_of_integers_go_to_the_even_one(kernel: str, dtype: np.dtype[Any]) -> None:
    arrays = [np.arange(0, 100, dtype=dtype), np.arange(1, 101, dtype=dtype)]
    assert mean(arrays, [1, 1], kernel).tolist() == [k + k % 2 for k in range(100)]
    if dtype.kind == "i":
        negative = [-array for array in arrays]
        assert mean(negative, [1, 1], kernel).tolist() == [-(k + k % 2) for k in range(100)]


@every_kernel
def test_booleans_follow_the_weighted_majority_and_a_tie_is_false(kernel: str) -> None:
    arrays = [np.array([True, True, False, False]), np.array([True, False, True, False])]
    assert mean(arrays, [1, 1], kernel).tolist() == [True, False, False, False]
    assert mean(arrays, [2, 1], kernel).tolist() == [True, True, False, False]
    assert mean(arrays, [1, 2], kernel).tolist() == [True, False, True, False]


@every_kernel
def test_booleans_of_any_nonzero_byte_are_true(kernel: str) -> None:
    arrays = [np.array([0, 1, 2, 255], np.uint8).view(bool), np.array([0, 64, 1, 0], np.uint8).view(bool)]
    result = mean(arrays, [2, 1], kernel)
    assert result.tobytes() == np.array([False, True, True, True]).tobytes()


@every_kernel
@every_integer
def test_extremes_of_integers_are_kept(kernel: str, dtype: np.dtype[Any]) -> None:
    limits = np.iinfo(dtype)
    array = np.array([max(limits.min, -(2**53)), min(limits.max, 2**53)], dtype)
    assert mean([array] * 3, [1, 2, 5], kernel).tolist() == array.tolist()


@every_kernel
@pytest.mark.parametrize("dtype", [np.dtype("int64"), np.dtype("uint64")], ids=str)
def test_a_counter_that_all_share_is_kept_up_to_2_to_the_53(kernel: str, dtype: np.dtype[Any]) -> None:
    array = 2**53 - np.arange(100).astype(dtype)
    for weights in ([3, 5], [1, 1, 1], [7, 100_000, 33]):
        assert mean([array] * len(weights), weights, kernel).tolist() == array.tolist()


@every_kernel
def test_large_counters_are_the_exact_rational_rounded_half_to_even(kernel: str) -> None:
    rng = np.random.default_rng(6)
    arrays = [2**53 - rng.integers(0, 1000, 200) for _ in range(3)]
    for weights in ([1, 1, 1], [3, 5, 7], [100_000, 70_001, 3]):
        assert mean(arrays, weights, kernel).tolist() == rounded_mean(arrays, weights)


@every_kernel
@pytest.mark.parametrize("dtype", [np.dtype(np.int64), np.dtype(np.uint64)], ids=str)
@pytest.mark.parametrize("weights", [(1, 1), (3, 5, 7), (0.1, 0.7, 1e-3, 33), (1e300, 1.0), (2.0**-1074, 1e-9, 1e308)])
def test_integers_of_any_size_are_the_exact_rational_rounded_half_to_even(
    kernel: str, dtype: np.dtype[Any], weights: tuple[float, ...]
) -> None:
    rng = np.random.default_rng(len(weights))
    info = np.iinfo(dtype)
    extremes = [info.min, info.max, info.min + 1, info.max - 1, 0, 1, 2, 2**53, 2**53 + 1, 2**62, 2**62 + 1]
    arrays = [
        np.array([*rng.permutation(np.array(extremes, dtype)), *rng.integers(info.min, info.max, 30, dtype)])
        for _ in weights
    ]
    assert mean(arrays, weights, kernel).tolist() == rounded_mean(arrays, weights)


@every_kernel
def test_one_large_integer_is_summed_exactly_and_the_others_as_ever(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [np.arange(10_000) + k for k in range(3)]
    arrays[1][77] = 2**60 + 1
    deposited: list[int] = []
    kind: Any = type(fl.kernels.resolve(kernel))
    deposit = kind.deposit

    def counted(self: Any, digits: Any, starts: Any, inputs: Any, *rest: Any) -> Any:
        deposited.extend(x.size for column in inputs for x in column)
        return deposit(self, digits, starts, inputs, *rest)

    monkeypatch.setattr(kind, "deposit", counted)
    assert mean(arrays, (1, 2, 3), kernel).tolist() == rounded_mean(arrays, (1, 2, 3))
    assert set(deposited) == {1}  # a single element, a few times


@every_kernel
def test_int64_counter_keeps_its_value(kernel: str) -> None:
    counter = np.array(1000)
    result = weighted_average([{"steps": counter}, {"steps": counter}], [3, 5], kernel=kernel)["steps"]
    assert (result.dtype.name, result.shape, int(result)) == ("int64", (), 1000)


@every_kernel
def test_integer_counters_are_not_truncated_term_by_term(kernel: str) -> None:
    arrays = [np.full(3, 1), np.full(3, 1), np.full(3, 2)]
    assert mean(arrays, [1 / 3, 1 / 3, 1 / 3], kernel).tolist() == [1, 1, 1]


@every_kernel
def test_counters_of_different_layers_do_not_mix(kernel: str) -> None:
    clients = [
        {"a.batches": np.array(10), "b.batches": np.array(500)},
        {"a.batches": np.array(30), "b.batches": np.array(700)},
    ]
    result = weighted_average(clients, [1, 3], kernel=kernel)
    assert {name: int(value) for name, value in result.items()} == {"a.batches": 25, "b.batches": 650}


# Layouts of arrays


@every_kernel
@every_dtype
@pytest.mark.parametrize("shape", [(7, 9), (1025,), (), (0,), (3, 0, 2)], ids=str)
def test_every_layout_gives_the_bits_of_contiguous_arrays_and_is_not_changed(
    kernel: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(7)
    first, second = values(rng, dtype, shape), values(rng, dtype, shape)
    expected = weighted_average([{"w": first}, {"w": second}], [3, 1], kernel=kernel)["w"]
    for layout, array in in_all_layouts(first).items():
        before = array.tobytes()
        result = weighted_average([{"w": array}, {"w": second}], [3, 1], kernel=kernel)["w"]
        assert result.dtype == dtype, layout
        assert result.dtype.isnative, layout
        assert (result.shape, result.tobytes()) == (shape, expected.tobytes()), layout
        assert array.tobytes() == before, layout


@every_kernel
@every_dtype
def test_all_layouts_mix_in_one_batch(kernel: str, dtype: np.dtype[Any]) -> None:
    array = values(np.random.default_rng(8), dtype, (5, 3))
    layouts = list(in_all_layouts(array).values())
    assert mean(layouts, [1] * len(layouts), kernel).tobytes() == mean([array] * len(layouts), None, kernel).tobytes()


@every_kernel
def test_models_of_only_empty_arrays_and_of_no_variables_work(kernel: str) -> None:
    empty: dict[str, Array] = {"a": np.empty((0, 4), np.float32), "b": np.empty(0, np.int8)}
    result = weighted_average([empty, empty], [1, 2], kernel=kernel)
    assert bits(result) == bits(empty)
    assert weighted_average([{}, {}], [1, 2], kernel=kernel) == {}


@every_kernel
def test_empty_arrays_among_others_work(kernel: str) -> None:
    weights: dict[str, Array] = {
        "a": np.empty((0, 4), np.float32),
        "b": np.ones(3, np.float32),
        "c": np.empty(0, np.int8),
    }
    assert bits(weighted_average([weights, weights], kernel=kernel)) == bits(weights)


@every_kernel
def test_numpy_scalars_are_taken_as_0d_arrays(kernel: str) -> None:
    clients: list[Any] = [{"w": np.float32(1)}, {"w": np.array(3, np.float32)}]
    result = weighted_average(clients, kernel=kernel)["w"]
    assert type(result) is np.ndarray
    assert (result.shape, result.dtype.name, float(result)) == ((), "float32", 2.0)


@every_kernel
def test_memory_mapped_files_are_read_and_written(kernel: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    arrays = [values(rng, np.dtype("float32"), (17, 5)) for _ in range(3)]
    mapped = []
    for k, array in enumerate(arrays):
        np.save(tmp_path / f"{k}.npy", array)
        mapped.append(np.load(tmp_path / f"{k}.npy", mmap_mode="r"))
    expected = mean(arrays, [1, 2, 3], kernel)
    assert mean(mapped, [1, 2, 3], kernel).tobytes() == expected.tobytes()
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=(17, 5))
    weighted_average([{"w": array} for array in mapped], [1, 2, 3], out={"w": out}, kernel=kernel)
    out.flush()
    assert (tmp_path / "out").read_bytes() == expected.tobytes()


@every_kernel
def test_result_is_writable_and_shares_no_memory_with_the_inputs(kernel: str) -> None:
    arrays = [np.arange(9, dtype=np.float64)]
    result = mean(arrays, [1], kernel)
    result[:] = -1
    assert arrays[0].tolist() == list(range(9))


@every_kernel
def test_other_names_of_the_same_dtype_are_accepted(kernel: str) -> None:
    annotated = np.dtype("int64", metadata={"unit": "steps"})
    arrays = [np.arange(3, dtype=np.longlong), np.arange(3, dtype=annotated), np.arange(3, dtype=np.int64)]
    result = mean(arrays, [1, 2, 3], kernel)
    assert (result.dtype.name, result.tolist()) == ("int64", [0, 1, 2])


@every_kernel
def test_array_subclasses_give_plain_arrays(kernel: str) -> None:
    class Named(np.ndarray[Any, np.dtype[Any]]):
        pass

    array = np.arange(4, dtype=np.float32).view(Named)
    result = mean([array, array], None, kernel)
    assert (type(result), result.tolist()) == (np.ndarray, [0.0, 1.0, 2.0, 3.0])


# out=


@every_kernel
@every_dtype
def test_out_is_written_and_returned(kernel: str, dtype: np.dtype[Any]) -> None:
    clients = [{"a": array[:5].reshape(5, 1), "b": array} for array in inputs(dtype, 9)]
    expected = weighted_average(clients, WEIGHTS, kernel=kernel)
    out = {"a": np.empty((5, 1), dtype), "b": np.empty(9, dtype)}
    kept = dict(out)
    for _ in range(2):
        assert weighted_average(clients, WEIGHTS, out=out, kernel=kernel) is out
        assert all(out[name] is kept[name] for name in out)
        assert bits(out) == bits(expected)


@every_kernel
@every_dtype
def test_out_may_have_any_writable_layout(kernel: str, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(10)
    clients = [{"w": values(rng, dtype, (4, 3))} for _ in range(3)]
    expected = weighted_average(clients, [1, 2, 3], kernel=kernel)["w"]
    for layout, array in in_all_layouts(np.zeros((4, 3), dtype)).items():
        if layout.startswith("bytes at offset"):
            buffer = bytearray(int(layout.split()[-1]) + array.nbytes)
            array = np.frombuffer(buffer, dtype, offset=int(layout.split()[-1])).reshape(4, 3)
        if array.flags.writeable:
            weighted_average(clients, [1, 2, 3], out={"w": array}, kernel=kernel)
            assert array.astype(dtype).tobytes() == expected.tobytes(), layout


@every_kernel
def test_out_leaves_what_lies_between_its_elements(kernel: str) -> None:
    frame = np.full((4, 6), 7, np.float32)
    weighted_average([{"w": np.ones((2, 2), np.float32)}], out={"w": frame[1:3, 1:5:2]}, kernel=kernel)
    expected = np.full((4, 6), 7, np.float32)
    expected[1:3, 1:5:2] = 1
    assert frame.tolist() == expected.tolist()


@every_kernel
def test_out_may_be_empty_and_0d(kernel: str) -> None:
    clients = [{"e": np.empty(0, np.float32), "s": np.array(2)}, {"e": np.empty(0, np.float32), "s": np.array(4)}]
    out = {"e": np.empty(0, np.float32), "s": np.array(0)}
    weighted_average(clients, out=out, kernel=kernel)
    assert (out["e"].size, int(out["s"])) == (0, 3)


@every_kernel
def test_out_that_is_an_input_is_refused_and_not_changed(kernel: str) -> None:
    first, second = {"w": np.arange(5, dtype=np.float32)}, {"w": np.ones(5, np.float32)}
    for out in (first, second, {"w": first["w"][::-1]}, {"w": first["w"].view()}):
        with pytest.raises(OutputError, match="overlaps an input in memory") as caught:
            weighted_average([first, second], out=out, kernel=kernel)
        assert caught.value.name == "w"
    assert first["w"].tolist() == [0, 1, 2, 3, 4]
    assert second["w"].tolist() == [1, 1, 1, 1, 1]


@every_kernel
@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_out_that_overlaps_another_variable_of_an_input_is_refused(kernel: str, start: int) -> None:
    slab = np.arange(20, dtype=np.float32)
    before = slab.tobytes()
    client = {"a": slab[5:10], "b": np.zeros(5, np.float32)}
    out = {"a": np.empty(5, np.float32), "b": slab[start + 1 : start + 6]}
    with pytest.raises(OutputError, match="overlaps an input in memory") as caught:
        weighted_average([client, client], out=out, kernel=kernel)
    assert caught.value.name == "b"
    assert slab.tobytes() == before


@every_kernel
def test_out_beside_an_input_in_the_same_memory_is_accepted(kernel: str) -> None:
    slab = np.arange(15, dtype=np.float32)
    out = {"a": slab[0:5], "b": slab[10:15]}
    weighted_average([{"a": slab[5:10], "b": slab[5:10]}], out=out, kernel=kernel)
    assert slab.tolist() == [5, 6, 7, 8, 9] * 3


@every_kernel
def test_out_whose_variables_overlap_is_refused(kernel: str) -> None:
    slab = np.zeros(9, np.float32)
    client = {"a": np.ones(5, np.float32), "b": np.ones(5, np.float32)}
    with pytest.raises(OutputError, match="overlap in memory"):
        weighted_average([client], out={"a": slab[:5], "b": slab[4:]}, kernel=kernel)
    with pytest.raises(OutputError, match="overlap in memory"):
        weighted_average([client], out={"a": slab[:5], "b": slab[:5]}, kernel=kernel)


@every_kernel
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3,), (0,)), ((2, 3), (8, 8)), ((3,), (4,)), ((3,), (-4,)), ((2, 2), (8, 12)), ((2, 2, 2), (0, 8, 16))],
)
def test_out_that_overlaps_itself_is_refused(kernel: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    memory = np.zeros(20)
    out = {"w": np.lib.stride_tricks.as_strided(memory[8:], shape, strides)}
    with pytest.raises(OutputError, match="'w' overlaps itself") as caught:
        weighted_average([{"w": np.ones(shape)}], out=out, kernel=kernel)
    assert caught.value.name == "w"
    assert not memory.any()


@every_kernel
@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3,), (16,)), ((2, 3), (8, 16)), ((2, 2), (16, 24)), ((2, 1, 3), (8, 0, 16)), ((3,), (-8,)), ((0, 2), (0, 0))],
)
def test_out_of_any_layout_whose_elements_lie_apart_is_written_to(
    kernel: str, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    out = {"w": np.lib.stride_tricks.as_strided(np.zeros(20)[8:], shape, strides)}
    expected = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    assert weighted_average([{"w": expected}], out=out, kernel=kernel) is out
    assert out["w"].tolist() == expected.tolist()


@every_kernel
def test_out_that_is_read_only_is_refused_before_anything_is_written(kernel: str) -> None:
    client = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}
    out = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
    out["b"].flags.writeable = False
    with pytest.raises(OutputError, match="'b' is read-only") as caught:
        weighted_average([client], out=out, kernel=kernel)
    assert isinstance(caught.value, ValueError)
    assert caught.value.name == "b"
    assert out["a"].tolist() == out["b"].tolist() == [0, 0, 0]


@every_kernel
def test_out_that_is_a_numpy_scalar_cannot_take_a_result(kernel: str) -> None:
    client = {"s": np.array(2.0, np.float32)}
    with pytest.raises(OutputError) as caught:
        weighted_average([client], out={"s": np.float32(0)}, kernel=kernel)  # type: ignore[dict-item]
    assert caught.value.name == "s"


@every_kernel
@pytest.mark.parametrize(
    ("out", "error"),
    [
        ({"w": np.zeros(4, np.float32)}, ShapeError),
        ({"w": np.zeros((1, 3), np.float32)}, ShapeError),
        ({"w": np.zeros(3, np.float64)}, DtypeError),
        ({"v": np.zeros(3, np.float32)}, NamesError),
        ({}, NamesError),
        ({"w": [0.0, 0.0, 0.0]}, WeightsTypeError),
    ],
    ids=["longer", "broadcasting", "wider", "other name", "no name", "list"],
)
def test_out_of_another_schema_is_refused(kernel: str, out: Any, error: type[ContributionError]) -> None:
    with pytest.raises(error) as caught:
        weighted_average([{"w": np.ones(3, np.float32)}], out=out, kernel=kernel)
    assert caught.value.contributor == "out"


@every_kernel
def test_out_may_be_any_mapping_in_any_order(kernel: str) -> None:
    arrays = {"b": np.zeros(2, np.float32), "a": np.zeros(1, np.float32)}
    client = {"a": np.ones(1, np.float32), "b": np.full(2, 2, np.float32)}
    weighted_average([client], out=MappingProxyType(arrays), kernel=kernel)
    assert (arrays["a"].tolist(), arrays["b"].tolist()) == ([1], [2, 2])


# Order, like= and what is accepted


def contributions(count: int = 9) -> list[Contribution]:
    """Contributions whose float64 sums depend on the order."""
    rng = np.random.default_rng(11)
    return [
        Contribution(f"site-{k}", {"w": values(rng, np.dtype("float64"), 999)}, float(rng.uniform(0.1, 9)))
        for k in range(count)
    ]


@every_kernel
def test_contributions_are_summed_in_the_order_of_their_names_whatever_the_list_order(kernel: str) -> None:
    batch = contributions()
    dicts = [c.weights for c in batch if c.weights is not None]
    expected = weighted_average(dicts, [c.aggregation_weight for c in batch], kernel=kernel)["w"].tobytes()
    rng = np.random.default_rng(12)
    for _ in range(20):
        shuffled = [batch[int(k)] for k in rng.permutation(len(batch))]
        assert weighted_average(shuffled, kernel=kernel)["w"].tobytes() == expected


@every_kernel
def test_bare_weight_dicts_are_summed_in_list_order(kernel: str) -> None:
    arrays = [np.array([value]) for value in (1.0, 2.0**60, -(2.0**60))]
    first = mean(arrays, None, kernel)
    assert first.tolist() == [0.0]
    assert mean([arrays[1], arrays[2], arrays[0]], None, kernel).tolist() == [1 / 3]


def test_names_are_ordered_as_strings() -> None:
    arrays = {"site-10": 1.0, "site-2": 2.0**60, "site-9": -(2.0**60)}
    batch = [Contribution(name, {"w": np.array([value])}, 1) for name, value in reversed(arrays.items())]
    assert weighted_average(batch)["w"].tolist() == [0.0]


@every_kernel
def test_two_arrival_orders_do_not_differ_in_any_float32_element(kernel: str) -> None:
    rng = np.random.default_rng(13)
    batch = [
        Contribution(f"{k}", {"w": rng.standard_normal(100_003).astype(np.float32)}, int(rng.integers(1, 1000)))
        for k in range(10)
    ]
    first, second = weighted_average(batch, kernel=kernel), weighted_average(batch[::-1], kernel=kernel)
    assert first["w"].tobytes() == second["w"].tobytes()


def test_bare_weight_dicts_without_weights_count_equally() -> None:
    arrays = [np.array([1.0, 4.0]), np.array([3.0, 8.0])]
    expected = [2.0, 6.0]
    assert weighted_average([{"w": array} for array in arrays])["w"].tolist() == expected
    assert weighted_average([{"w": array} for array in arrays], [5, 5])["w"].tolist() == expected


@pytest.mark.parametrize("weights", [(1, 3), np.array([1, 3]), np.array([0.5, 1.5], np.float32), [np.int8(1), 3.0]])
def test_aggregation_weights_may_be_any_sequence_of_numbers(weights: Any) -> None:
    assert mean([np.array([0.0]), np.array([4.0])], weights, "numpy").tolist() == [3.0]


def test_generators_of_weight_dicts_and_of_contributions_are_accepted() -> None:
    def dicts() -> Iterator[dict[str, Array]]:
        yield {"w": np.array([1.0])}
        yield {"w": np.array([3.0])}

    assert weighted_average(dicts())["w"].tolist() == [2.0]
    assert weighted_average(dicts(), [3, 1])["w"].tolist() == [1.5]
    named = (Contribution(f"{k}", weights, 1) for k, weights in enumerate(dicts()))
    assert weighted_average(named)["w"].tolist() == [2.0]


def test_like_sets_the_order_of_the_result() -> None:
    like = {name: np.zeros(1) for name in "bca"}
    clients = [{name: np.ones(1) for name in order} for order in ("abc", "cab")]
    assert list(weighted_average(clients, like=like)) == ["b", "c", "a"]
    assert list(weighted_average(clients)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("like", "error"),
    [
        ({"w": np.zeros(3, np.float16)}, DtypeError),
        ({"w": np.zeros((3, 1), np.float32)}, ShapeError),
        ({"w": np.zeros(3, np.float32), "v": np.zeros(1)}, NamesError),
        ({}, NamesError),
    ],
    ids=["dtype", "shape", "missing", "extra"],
)
def test_like_is_the_authority_even_when_all_contributions_agree(
    like: dict[str, Array], error: type[ContributionError]
) -> None:
    client = {"w": np.ones(3, np.float32)}
    with pytest.raises(error) as caught:
        weighted_average([Contribution("a", client, 1), Contribution("b", client, 1)], like=like)
    assert caught.value.contributor == "a"


def test_values_of_like_do_not_take_part() -> None:
    like = {"w": np.array([np.nan, 7.0])}
    assert weighted_average([{"w": np.array([1.0, 2.0])}], like=like)["w"].tolist() == [1.0, 2.0]
    assert like["w"].tolist()[1] == 7.0


def test_byte_order_of_like_does_not_matter() -> None:
    like = {"w": np.zeros(2, ">f4")}
    result = weighted_average([{"w": np.array([1, 2], np.float32)}], like=like)["w"]
    assert result.dtype.isnative
    assert result.tolist() == [1.0, 2.0]


def test_like_that_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(DtypeError) as caught:
        weighted_average([{"w": np.zeros(2)}], like={"w": np.zeros(2, complex)})
    assert (caught.value.contributor, caught.value.name) == ("like", "w")


def test_weights_beside_contributions_are_refused() -> None:
    with pytest.raises(AggregationWeightError, match="bring their own"):
        weighted_average([Contribution("a", {"w": np.zeros(1)}, 1)], [1])


@pytest.mark.parametrize("weights", [[], [1], [1, 2, 3]], ids=len)
def test_as_many_aggregation_weights_as_weight_dicts_are_required(weights: list[float]) -> None:
    with pytest.raises(AggregationWeightError, match=f"{len(weights)} aggregation weights for 2 weight dicts"):
        weighted_average([{"w": np.zeros(1)}] * 2, weights)


def test_contributions_among_bare_weight_dicts_are_refused() -> None:
    mixed: Any = [{"w": np.zeros(1)}, Contribution("a", {"w": np.zeros(1)}, 1)]
    with pytest.raises(WeightsTypeError, match=r"contributions\[1\]"):
        weighted_average(mixed)


@pytest.mark.parametrize("like", [None, {"w": np.zeros(2)}], ids=["without like", "with like"])
def test_nothing_to_average_is_an_error_and_never_nan(like: dict[str, Array] | None) -> None:
    with pytest.raises(EmptyAggregationError) as caught:
        weighted_average([], like=like)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FedLearnError)


def test_result_is_a_plain_dict_of_plain_arrays() -> None:
    result = weighted_average([MappingProxyType({"w": np.ones(2)})])
    assert (type(result), type(result["w"])) == (dict, np.ndarray)


# Scale


@every_kernel
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 17, 31, 33])
def test_any_number_of_contributions_is_summed_in_order(kernel: str, count: int) -> None:
    arrays = list(inputs(np.dtype("float64"), 33, count))
    weights = np.random.default_rng(14).uniform(0.1, 9, count).tolist()
    acc = weights[0] * arrays[0]
    total = weights[0]
    for a, x in zip(weights[1:], arrays[1:], strict=True):
        acc = acc + a * x
        total = total + a
    assert mean(arrays, weights, kernel).tobytes() == (acc / total).tobytes()


@every_kernel
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_many_variables_of_many_sizes_and_dtypes_do_not_mix(kernel: str, threads: int) -> None:
    rng = np.random.default_rng(15)
    shapes = {f"counts/{dtype}/{size}": (dtype, size) for size in SIZES for dtype in DTYPES}
    clients = [{name: values(rng, dtype, size) for name, (dtype, size) in shapes.items()} for _ in range(3)]
    with num_threads(threads):
        together = weighted_average(clients, [3, 1, 2], kernel=kernel)
    for name in shapes:
        alone = mean([client[name] for client in clients], [3, 1, 2], kernel)
        assert together[name].tobytes() == alone.tobytes(), name


@every_kernel
def test_threads_do_not_write_beside_their_elements(kernel: str) -> None:
    slab = np.full(4096, 7, np.int16)
    out = {f"{k}": slab[start + 1 : stop - 1] for k, (start, stop) in enumerate(pairwise(range(0, 4096, 273)))}
    client = {name: np.ones(array.shape, np.int16) for name, array in out.items()}
    expected = np.full(4096, 7, np.int16)
    for start, stop in pairwise(range(0, 4096, 273)):
        expected[start + 1 : stop - 1] = 1
    with num_threads(5):
        weighted_average([client, client], out=out, kernel=kernel)
    assert slab.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("prefix", "whose"),
    [("module.", ", as torch.nn.DataParallel has it"), ("base_model.model.", ", as PEFT has it"), ("encoder.", "")],
)
def test_names_with_something_in_front_say_how_to_make_them_the_same(prefix: str, whose: str) -> None:
    plain = {"a.w": np.ones(2), "b": np.ones(1)}
    longer = {prefix + name: array for name, array in plain.items()}
    with pytest.raises(fl.NamesError) as caught:
        fl.weighted_average([plain, longer])
    assert f"All that is added has {prefix!r} in front{whose}: fl.without_prefix(weights, {prefix!r})" in str(
        caught.value
    )
    assert fl.without_prefix(longer, prefix) == plain
    with pytest.raises(fl.NamesError) as caught:
        fl.weighted_average([longer, plain])
    assert f"All that is missed has {prefix!r} in front{whose}: {{{prefix!r} + name: array" in str(caught.value)
    for other in ({f"{prefix}a.w": np.ones(2), "c": np.ones(1)}, longer | {"more": np.ones(1)}):
        with pytest.raises(fl.NamesError) as caught:
            fl.weighted_average([plain, other])
        assert "in front" not in str(caught.value)
