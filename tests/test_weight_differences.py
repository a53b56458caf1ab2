"""`difference` and `add_difference`: the bits and the errors of plain numpy, from every kernel and instruction set."""

import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from reference import BFLOAT16, FLOATS, KERNELS, Array, finite_patterns, in_all_layouts, num_threads, values

import fed_learn as fl
from fed_learn.aggregation.differences import add_difference, difference
from fed_learn.benchmark.inputs import resnet50
from fed_learn.errors import IntegerRangeError
from fed_learn.kernels import Kernel
from fed_learn.weights import WeightDict, check_finite, same_elements

SIGNED = tuple(np.dtype(f"int{bits}") for bits in (8, 16, 32, 64))
SETS = fl.kernels.instruction_sets() if "native" in KERNELS else ()
VARIANTS = [*((name, None) for name in KERNELS), *(("native", name) for name in SETS[1:])]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
Variant: TypeAlias = tuple[str, str | None]


@contextmanager
def used(variant: Variant) -> Iterator[Kernel]:
    with ExitStack() as stack:
        stack.enter_context(fl.kernels.use(variant[0]))
        if variant[1] is not None:
            stack.enter_context(fl.kernels.use_instruction_set(variant[1]))
        yield fl.kernels.resolve()


def numpy_difference(weights: WeightDict, base: WeightDict) -> dict[str, Array]:
    """The definition, in whole arrays."""
    with np.errstate(all="ignore"):
        wide_arrays = {name: wide(weights[name], name) - wide(base[name], name) for name in weights}
    for name, array in wide_arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            array[same_elements(weights[name], base[name])] = 0
    return numpy_rounded(wide_arrays, base, None)


def numpy_sum(base: WeightDict, diff: WeightDict) -> dict[str, Array]:
    with np.errstate(all="ignore"):
        wide_arrays = {name: wide(base[name], name) + wide(diff[name], name) for name in diff}
    return numpy_rounded(wide_arrays, base, base)


def wide(array: Array, name: str) -> Array:
    if array.dtype.kind != "i":
        with np.errstate(invalid="ignore"):
            return array.astype(np.float64)
    exact = array.astype(np.int64)
    if exact.size and max(-int(exact.min()), int(exact.max())) > 2**62:
        raise IntegerRangeError(f"{name!r} holds integers beyond 2**62, whose differences may not fit", name=name)
    return exact


def numpy_rounded(wide_arrays: WeightDict, base: WeightDict, constants: WeightDict | None) -> dict[str, Array]:
    with np.errstate(all="ignore"):
        narrow = {name: array.astype(base[name].dtype) for name, array in wide_arrays.items()}
    check_finite(narrow, constants=constants)
    for name, array in narrow.items():
        if array.dtype.kind == "i" and not np.array_equal(array, wide_arrays[name]):
            raise IntegerRangeError(f"{name!r} leaves the range of {array.dtype}", name=name)
    return narrow


Outcome: TypeAlias = dict[str, tuple[Any, ...]]


def outcome(operation: Callable[[WeightDict, WeightDict], WeightDict], one: WeightDict, other: WeightDict) -> Outcome:
    """All bits, or all that the error says."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            made = operation(one, other)
        except (ValueError, ArithmeticError) as error:
            told = {name: repr(value) for name, value in vars(error).items()}
            return {"error": (type(error), str(error), told)}
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in made.items()}


def assert_as_numpy(variant: Variant, one: WeightDict, other: WeightDict) -> None:
    with used(variant):
        assert outcome(difference, one, other) == outcome(numpy_difference, one, other)
        assert outcome(add_difference, one, other) == outcome(numpy_sum, one, other)


def in_range(one: Array, other: Array) -> Array:
    """Where neither the sum nor the difference overflows."""
    with np.errstate(all="ignore"):
        x, y = one.astype(np.float64), other.astype(np.float64)
        fits: Array = np.isfinite((x + y).astype(one.dtype)) & np.isfinite((x - y).astype(one.dtype))
    return fits


# Bits


@every_variant
@pytest.mark.parametrize("dtype", [np.dtype("float16"), BFLOAT16], ids=str)
def test_all_halves_with_random_differences(variant: Variant, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(1)
    halves: Array = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    for scale in (-24, -12, -3, 0, 9):
        small = np.ldexp(rng.standard_normal(halves.size), scale).astype(dtype)
        for others in (small, finite_patterns(rng, dtype, halves.size)):
            fits = in_range(halves, others)
            assert fits.sum() > 40_000
            assert_as_numpy(variant, {"w": halves[fits]}, {"w": others[fits]})
    # Among them NaN, which the sum with a base leaves as it is.
    with used(variant):
        assert outcome(add_difference, {"w": halves}, {"w": small * 0}) == outcome(
            numpy_sum, {"w": halves}, {"w": small * 0}
        )


@every_variant
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_finite_bits(variant: Variant, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(2)
    for size in (1, 7, 33, 1025, 20_001):
        one, other = finite_patterns(rng, dtype, size), finite_patterns(rng, dtype, size)
        assert_as_numpy(variant, {"w": one}, {"w": other})
        one[~in_range(one, other)] = 0
        other[~in_range(one, other)] = 0
        assert_as_numpy(variant, {"w": one}, {"w": other})


@every_variant
@pytest.mark.parametrize("dtype", SIGNED, ids=str)
@pytest.mark.parametrize("share", [1, 2])
def test_integers(variant: Variant, dtype: np.dtype[Any], share: int) -> None:
    rng = np.random.default_rng(3)
    limits = np.iinfo(dtype)
    for size in (1, 3, 65, 4097):
        one, other = rng.integers(limits.min // share, limits.max // share, (2, size), dtype)
        assert_as_numpy(variant, {"w": one}, {"w": other})


@every_variant
def test_large_arrays_on_several_threads(variant: Variant) -> None:
    rng = np.random.default_rng(4)
    one, other = ({f"{d}": values(rng, d, 1_100_001) for d in (np.dtype("float32"), BFLOAT16)} for _ in range(2))
    with num_threads(3, smallest_share=1 << 16):
        assert_as_numpy(variant, one, other)


@every_variant
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masks_of_what_is_not_finite(variant: Variant, dtype: np.dtype[Any]) -> None:
    mask = np.array([0, -np.inf, np.inf, np.nan, 3], dtype)
    moved = np.array([1, -np.inf, np.inf, np.nan, 5], dtype)
    assert_as_numpy(variant, {"w": moved}, {"w": mask})
    assert_as_numpy(variant, {"w": mask}, {"w": np.array([1, 0, -5, np.nan, 2], dtype)})
    with used(variant):
        assert difference({"w": moved}, {"w": mask})["w"].tolist() == [1, 0, 0, 0, 2]


@pytest.mark.parametrize("kernel", KERNELS)
def test_layouts_and_byte_order_do_not_matter(kernel: str) -> None:
    rng = np.random.default_rng(5)
    one, other = (values(rng, np.dtype("float32"), (5, 7)) for _ in range(2))
    with fl.kernels.use(kernel):
        expected = difference({"w": one}, {"w": other})["w"].tobytes()
        for name, layout in in_all_layouts(one).items():
            assert difference({"w": layout}, {"w": other})["w"].tobytes() == expected, name
        for name, layout in in_all_layouts(other).items():
            assert difference({"w": one}, {"w": layout})["w"].tobytes() == expected, name
            assert add_difference({"w": layout}, {"w": one})["w"].dtype.isnative, name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_single_numbers_and_nothing(kernel: str, shape: tuple[int, ...]) -> None:
    one, other = np.full(shape, 3.0), np.full(shape, 1.0)
    with fl.kernels.use(kernel):
        assert difference({"w": one}, {"w": other})["w"].tolist() == np.full(shape, 2.0).tolist()
        assert add_difference({"w": one}, {"w": other})["w"].shape == shape
        assert add_difference({"w": one}, {}) == {}


# Errors


BIG, ONE, INFINITE = np.array([2**62 + 1]), np.array([1]), np.array([np.inf], "float32")


@every_variant
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"w": np.array([60_000], "float16")}, {"w": np.array([-60_000], "float16")}),
        ({"w": np.array([3e38], "float32")}, {"w": np.array([-3e38], "float32")}),
        ({"w": np.array([1.7e308], "float64")}, {"w": np.array([-1.7e308], "float64")}),
        ({"w": INFINITE}, {"w": np.array([1], "float32")}),
        ({"w": np.array([1], "float32")}, {"w": INFINITE}),
        ({"a": np.array([100], "int8"), "f": INFINITE}, {"a": np.array([-100], "int8"), "f": np.array([1], "float32")}),
        ({"f": INFINITE, "i": BIG}, {"f": np.array([1], "float32"), "i": ONE}),
        ({"f": INFINITE, "i": ONE}, {"f": np.array([1], "float32"), "i": -BIG}),
        ({"a": np.array([100], "int8"), "i": ONE}, {"a": np.array([-100], "int8"), "i": BIG}),
        (
            {"a": np.array([100], "int8"), "b": np.array([-30_000], "int16")},
            {"a": np.array([100], "int8"), "b": np.array([-30_000], "int16")},
        ),
    ],
    ids=str,
)
def test_what_leaves_the_range_is_the_same_error(variant: Variant, one: WeightDict, other: WeightDict) -> None:
    assert "error" in outcome(numpy_difference, one, other) | outcome(numpy_sum, one, other)
    assert_as_numpy(variant, one, other)


@every_variant
def test_a_difference_of_two_to_the_63rd_does_not_wrap_around(variant: Variant) -> None:
    one, other = {"w": np.array([0, 2**62])}, {"w": np.array([0, -(2**62)])}
    with used(variant):
        with pytest.raises(IntegerRangeError, match="'w' leaves the range of int64"):
            difference(one, other)
        with pytest.raises(IntegerRangeError, match="'w' leaves the range of int64"):
            add_difference(one, one)
        assert difference(other, one)["w"].tolist() == [0, -(2**63)]


# What kernels say


@every_variant
def test_kernels_flag_the_outputs_that_went_wrong(variant: Variant) -> None:
    cases: list[tuple[Any, float, float, bool]] = [
        ("float16", 60_000, 5_516, False),
        ("float16", 60_000, 5_520, True),
        (BFLOAT16, 3.3895313892515355e38, 6e35, False),
        (BFLOAT16, 3.3895313892515355e38, 2.0**119, True),
        ("float32", 3.4028234663852886e38, 1e31, False),
        ("float32", 3.4028234663852886e38, 2.0**103, True),
        ("float64", 1.7976931348623157e308, 2.0**969, False),
        ("float64", 1.7976931348623157e308, 2.0**970, True),
        ("float32", np.nan, 0, True),
        ("int8", 100, 27, False),
        ("int8", 100, 28, True),
        ("int32", 2**31 - 1, 1, True),
        ("int64", 2**62, 1, False),
        ("int64", 2**62 + 1, 1, True),
        ("int64", 1, 2**62 + 1, True),
    ]
    with used(variant) as kernel, warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype, x, y, expected in cases:
            for size, at in ((1, 0), (100, 0), (100, 63), (100, 99)):
                one, other, negative, output = (np.zeros(size, dtype) for _ in range(4))
                one[at], other[at] = x, y
                negative[at] = -other[at]
                assert kernel.add([one], [other], [output]) == [expected], (dtype, x, y)
                assert kernel.subtract([one], [negative], [output]) == [expected], (dtype, x, y)


def test_the_torch_kernel_takes_tensors() -> None:
    base, diff, made = (torch.tensor([1.0, x], dtype=torch.bfloat16) for x in (2.0, 0.5, 0.0))
    kernel: Any = fl.kernels.resolve("torch")
    assert kernel.add([base], [diff], [made]) == [False]
    assert made.tolist() == [2.0, 2.5]
    assert kernel.subtract([base], [diff], [made]) == [False]
    assert made.tolist() == [0.0, 1.5]


# Memory


def test_out_is_written_to() -> None:
    base, diff = {"v": np.ones(3), "w": np.array([1, 2], "float32")}, {"w": np.array([2, -1], "float32")}
    out = {"w": np.empty(2, np.float32)}
    assert add_difference(base, diff, out=out) is out
    assert out["w"].tolist() == [3, 1]
    assert base["w"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        (lambda base: {"w": base["w"]}, fl.OutputError, "overlaps an input"),
        (lambda base: {"w": np.empty(2)}, fl.DtypeError, "out: 'w' has dtype float64, expected float32"),
        (lambda base: {}, fl.NamesError, "out: "),
    ],
)
def test_out_that_cannot_be_written_to_is_refused(
    out: Callable[[WeightDict], WeightDict], error: type[Exception], says: str
) -> None:
    base = {"w": np.array([1, 2], "float32")}
    with pytest.raises(error, match=says):
        add_difference(base, {"w": np.array([1, 1], "float32")}, out=out(base))
    assert base["w"].tolist() == [1, 2]


@pytest.mark.parametrize("operation", [difference, add_difference])
def test_there_are_no_copies_of_the_model_but_the_result(
    operation: Callable[[WeightDict, WeightDict], WeightDict],
) -> None:
    one = {name: np.ones(shape, np.float32) for name, shape in resnet50(16).items()}
    other = {name: np.ones(shape, np.float32) for name, shape in resnet50(16).items()}
    size = sum(array.nbytes for array in one.values())
    tracemalloc.start()
    try:
        made = operation(one, other)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(made) == len(one)
    if fl.kernels.current() == "native":
        assert peak <= 1.1 * size
