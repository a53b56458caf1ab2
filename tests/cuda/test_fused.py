"""The kernels in Triton: the bits of the numpy kernel, and what they are compiled to.

The bits are compared in Triton's interpreter, on the CPU, and on a CUDA device where there is one. The compiled code is
looked at without a device: Triton brings the compiler. The rest is in `interpreted.py`.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference as ref
import torch
from interpreted import interpreted, no_triton

from fed_learn.kernels.base import Segment
from fed_learn.kernels.numpy import NumpyKernel

if problem := no_triton():
    pytest.skip(problem, allow_module_level=True)

import fed_learn.kernels.fused as fused
import fed_learn.kernels.fused_kernels as fused_kernels

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CPU = torch.device("cpu")
BLOCK = fused.BLOCK
SIZES = (0, 1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 9)
COMBINED = (*ref.FLOATS, *(dtype for dtype in ref.INTEGERS if dtype.kind == "i"))
WEIGHTS = np.array([1.5, 300.0, 0.1, 1 / 3, 7.0, 1e-3, 2.0, 1e5 / 7, 0.7, 11.0] * 3)
NUMPY = NumpyKernel()
KERNELS = (fused_kernels.mean_kernel, fused_kernels.combination_kernel, fused_kernels.scan_kernel)

Tensor = torch.Tensor
Arrays = list[ref.Array]


class Place(NamedTuple):
    """Where the kernels run."""

    module: ModuleType
    device: torch.device

    def tensor(self, array: ref.Array, offset: int = 0) -> Tensor:
        """A copy that begins `offset` elements behind an address that is a multiple of 16."""
        flat = np.ascontiguousarray(array).reshape(-1)
        host = torch.from_numpy(flat.view(np.int16) if flat.dtype == ref.BFLOAT16 else flat)
        if flat.dtype == ref.BFLOAT16:
            host = host.view(torch.bfloat16)
        copy = torch.empty(offset + flat.size, dtype=host.dtype, device=self.device)[offset:]
        copy.view(torch.uint8).copy_(host.view(torch.uint8))
        return copy

    def tensors(self, arrays: Sequence[ref.Array], offset: int = 0) -> list[Tensor]:
        return [self.tensor(array, offset) for array in arrays]

    def run(self, name: str, *arguments: Any, **options: Any) -> list[bool]:
        with np.errstate(all="ignore"):  # of the interpreter
            flags = getattr(self.module, name)(*arguments, **options)
        if flags is None:
            return []
        assert (flags.dtype, flags.ndim) == (torch.int32, 1)
        return [bool(flag) for flag in flags.tolist()]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=CUDA)])
def place(request: pytest.FixtureRequest) -> Place:
    return Place(interpreted(), CPU) if request.param == "interpreter" else Place(fused, torch.device("cuda"))


def array_of(tensor: Tensor, dtype: np.dtype[Any]) -> ref.Array:
    words = tensor.cpu().view(torch.uint8)
    return words.numpy().view(dtype)


def assert_same(tensor: Tensor, expected: ref.Array) -> None:
    """The same bits; what is not a number has any bits of such."""
    found, flat = array_of(tensor, expected.dtype), expected.reshape(-1)
    words = f"u{flat.dtype.itemsize}"
    differ = found.view(words) != flat.view(words)
    if flat.dtype in ref.FLOATS:
        with np.errstate(invalid="ignore"):  # a signalling NaN
            differ &= ~(np.isnan(found) & np.isnan(flat))
    assert not differ.any(), (np.flatnonzero(differ)[:5], found[differ][:5], flat[differ][:5])


def columns_of(make: Callable[[int], ref.Array], count: int, sizes: Sequence[int] = SIZES) -> list[Arrays]:
    return [[make(size) for _ in range(count)] for size in sizes]


def check_mean(place: Place, columns: list[Arrays], weights: ref.Array, total: float, offset: int = 0) -> list[bool]:
    outputs = [np.empty_like(column[0]) for column in columns]
    segments = [Segment(column, output) for column, output in zip(columns, outputs, strict=True) if output.size]
    expected = NUMPY.weighted_mean(segments, weights, total)  # which cannot do without elements
    results = place.tensors(outputs, offset)
    found = place.run("mean", [place.tensors(column, offset) for column in columns], results, weights, total)
    assert [flag for flag, output in zip(found, outputs, strict=True) if output.size] == expected
    assert not any(flag for flag, output in zip(found, outputs, strict=True) if not output.size)
    for flag, result, output in zip(found, results, outputs, strict=True):
        if not flag or output.dtype in ref.FLOATS:  # the mean of integers that are too large is not defined
            assert_same(result, output)
    return found


# Means.


@pytest.mark.parametrize("count", [1, 2, 5, 30])
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_means_have_the_bits_of_the_numpy_kernel(place: Place, dtype: np.dtype[Any], count: int) -> None:
    rng = np.random.default_rng(count)
    sizes = SIZES if count <= 5 else (1, 2 * BLOCK + 9)
    columns = columns_of(lambda size: ref.values(rng, dtype, size), count, sizes)
    weights = WEIGHTS[:count]
    assert not any(check_mean(place, columns, weights, float(weights.sum())))


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_means_of_random_bit_patterns_have_the_bits_of_the_numpy_kernel(place: Place, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(7)
    columns = columns_of(lambda size: ref.finite_patterns(rng, dtype, size), 6)
    weights = np.array([0.25, 1 / 3, 0.1, 1 / 7, 0.01, 0.002])  # of which no sum overflows
    assert not any(check_mean(place, columns, weights, float(weights.sum())))


@pytest.mark.parametrize("dtype", [*ref.INTEGERS, np.dtype(bool)], ids=str)
def test_means_of_all_of_an_integer_dtype(place: Place, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(3)
    if dtype.kind == "b":
        columns = columns_of(lambda size: rng.integers(0, 2, size).astype(bool), 4)
        limits = np.array([False, True])
    else:
        top = 2 ** (8 * min(dtype.itemsize, 6) - (dtype.kind == "i")) - 1
        low = -top - 1 if dtype.kind == "i" else 0
        columns = columns_of(lambda size: rng.integers(low, top, size, dtype, endpoint=True), 4)
        limits = np.array([low, top, low + 1, top - 1, 0, 1], dtype)
    columns.append([limits] * 4)
    assert not any(check_mean(place, columns, WEIGHTS[:4], float(WEIGHTS[:4].sum())))


def test_a_boolean_is_true_whatever_bits_say_so(place: Place) -> None:
    odd = np.array([0, 1, 2, 255], np.uint8).view(bool)
    assert check_mean(place, [[odd, odd, ~odd]], np.ones(3), 3.0) == [False]
    output = place.tensor(odd)
    place.run("mean", [place.tensors([odd])], [output], np.ones(1), 1.0)
    assert output.view(torch.uint8).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_ties_are_rounded_to_even(place: Place, dtype: np.dtype[Any]) -> None:
    if dtype.kind == "b":
        pairs = [np.array([0, 0, 1, 1], bool), np.array([0, 1, 0, 1], bool)]
        expected: Any = [False, False, False, True]
    elif dtype.kind in "iu":
        low = -20 if dtype.kind == "i" else 0
        pairs = [np.arange(low, 20).astype(dtype), np.arange(low + 1, 21).astype(dtype)]
        expected = [round(Fraction(2 * k + 1, 2)) for k in range(low, 20)]
    else:
        one = np.ones(6, dtype).view(f"u{dtype.itemsize}")
        pairs = [
            (one + np.arange(6, dtype=one.dtype)).view(dtype),
            (one + np.arange(1, 7, dtype=one.dtype)).view(dtype),
        ]
        expected = (one + np.array([0, 2, 2, 4, 4, 6], one.dtype)).view(dtype).tolist()
        pairs += [-pair for pair in pairs]
        output = place.tensor(pairs[2])
        place.run("mean", [place.tensors(pairs[2:])], [output], np.ones(2), 2.0)
        assert array_of(output, dtype).tolist() == [-value for value in expected]
    output = place.tensor(pairs[0])
    place.run("mean", [place.tensors(pairs[:2])], [output], np.ones(2), 2.0)
    assert array_of(output, dtype).tolist() == expected


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_subnormals_and_the_signs_of_zeros_are_kept(place: Place, dtype: np.dtype[Any]) -> None:
    small = np.arange(1, 40, dtype=f"u{dtype.itemsize}").view(dtype)
    zeros = np.array([0.0, -0.0, 0.0, -0.0], dtype), np.array([0.0, -0.0, -0.0, 0.0], dtype)
    outputs = place.tensors([small, zeros[0]])
    columns = [place.tensors([small, small, small]), place.tensors([zeros[0], zeros[1], zeros[1]])]
    assert place.run("mean", columns, outputs, np.array([1.0, 2.0, 0.3]), 3.3) == [False, False]
    assert_same(outputs[0], small)
    assert np.signbit(array_of(outputs[1], dtype)).tolist() == [False, True, False, False]
    sums = [place.tensor(np.full(4, 9.0))]
    place.run("accumulate", sums, [place.tensors([-zeros[0]])], np.ones(1), start=True)
    assert np.signbit(array_of(sums[0], np.dtype(float))).tolist() == [True, False, True, False]


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_addresses_that_are_no_multiples_of_16_give_the_same_bits(place: Place, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(5)
    columns = columns_of(lambda size: ref.values(rng, dtype, size), 3, (3, BLOCK, BLOCK + 5))
    assert not any(check_mean(place, columns, WEIGHTS[:3], float(WEIGHTS[:3].sum()), offset=1))


@pytest.mark.parametrize("dtype", [ref.BFLOAT16, np.dtype("float16")], ids=str)
def test_all_patterns_of_the_halves(place: Place, dtype: np.dtype[Any]) -> None:
    patterns = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        assert check_mean(place, [[patterns]], np.ones(1), 1.0) == [True]
        wide = patterns.astype(np.float64)
        finite = wide[np.isfinite(wide)]
        # Halfway to the next number, and a little to either side, nearer than float32 tells.
        between = (finite[:-1] + finite[1:]) / 2
        sums = np.concatenate([wide, finite, between, between * (1 + 2.0**-40), between * (1 - 2.0**-40)])
        expected = np.empty(sums.size, dtype)
        assert NUMPY.divide([sums], 1.0, [expected]) == [True]
        output = place.tensor(np.zeros(sums.size, dtype))
        assert place.run("divide", [place.tensor(sums)], 1.0, [output]) == [True]
        assert_same(output, expected)
        ones = np.ones(2**16, dtype)
        for name in ("add", "subtract"):
            NUMPY_OPERATIONS[name]([patterns], [ones], [expected[: 2**16]])
            output = place.tensor(ones)
            assert place.run(name, [place.tensor(patterns)], [place.tensor(ones)], [output]) == [True]
            assert_same(output, expected[: 2**16])


def test_the_halves_are_rounded_by_way_of_float32(place: Place) -> None:
    for dtype, digits in ((np.dtype("float16"), 10), (ref.BFLOAT16, 7)):
        sums = np.array([1 + 2.0 ** -(digits + 1) + 2.0**-40])
        output = place.tensor(np.zeros(1, dtype))
        assert place.run("divide", [place.tensor(sums)], 1.0, [output]) == [False]
        assert array_of(output, dtype).tolist() == [1.0]


# Sums that stay float64.


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_sums_have_the_bits_of_the_numpy_kernel_and_so_have_their_means(place: Place, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(11)
    sizes = (0, 1, BLOCK, BLOCK + 3)
    first = columns_of(lambda size: ref.values(rng, dtype, size), 4, sizes)
    second = columns_of(lambda size: ref.values(rng, dtype, size), 7, sizes)
    expected = [np.full(size, np.nan) for size in sizes]
    sums = place.tensors(expected)
    for columns, weights, start in ((first, WEIGHTS[:4], True), (second, WEIGHTS[4:11], False)):
        NUMPY.accumulate(expected, columns, weights, start=start)
        place.run("accumulate", sums, [place.tensors(column) for column in columns], weights, start=start)
        for acc, other in zip(sums, expected, strict=True):
            assert_same(acc, other)
    means = [np.empty(size, dtype) for size in sizes]
    assert NUMPY.divide(expected, float(WEIGHTS[:11].sum()), means) == [False] * 4
    outputs = place.tensors(means)
    assert place.run("divide", sums, float(WEIGHTS[:11].sum()), outputs) == [False] * 4
    for output, mean in zip(outputs, means, strict=True):
        assert_same(output, mean)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_a_mean_does_not_leave_the_range_of_float64(place: Place, dtype: np.dtype[Any]) -> None:
    largest = np.finfo(np.float64).max
    sums = np.array([largest, -largest, 1.0])
    expected = np.empty(3, dtype)
    assert NUMPY.divide([sums], 1 - 2.0**-53, [expected]) == [False]
    output = place.tensor(np.zeros(3, dtype))
    assert place.run("divide", [place.tensor(sums)], 1 - 2.0**-53, [output]) == [False]
    assert_same(output, expected)
    bound = largest if dtype == np.float64 else np.inf
    assert array_of(output, dtype)[:2].tolist() == [bound, -bound]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_sums_that_are_not_finite_are_flagged_wherever_they_are(
    place: Place, dtype: np.dtype[Any], value: float
) -> None:
    sizes = (1, BLOCK, BLOCK + 1, 2 * BLOCK + 9)
    for at in (0, -1):
        columns = [[np.ones(size, dtype) for _ in range(3)] for size in sizes * 2]
        for column in columns[:4]:
            column[1][at] = value
        assert check_mean(place, columns, WEIGHTS[:3], 4.0) == [True] * 4 + [False] * 4
        sums = [np.ones(size) for size in sizes * 2]
        for acc in sums[:4]:
            acc[at] = value
        outputs = [np.empty(size, dtype) for size in sizes * 2]
        assert NUMPY.divide(sums, 4.0, outputs) == [True] * 4 + [False] * 4
        results = place.tensors(outputs)
        assert place.run("divide", place.tensors(sums), 4.0, results) == [True] * 4 + [False] * 4
        for result, output in zip(results, outputs, strict=True):
            assert_same(result, output)


def test_sums_that_overflow_are_flagged(place: Place) -> None:
    large = np.array([1.0, 1e308, 1.0])
    assert check_mean(place, [[large, large], [large[:1], large[:1]]], np.ones(2), 2.0) == [True, False]
    assert check_mean(place, [[large, -large, large]], np.full(3, 1.5), 2.0) == [False]


@pytest.mark.parametrize("dtype", [np.dtype("int64"), np.dtype("uint64")], ids=str)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_integers_of_which_a_mean_could_be_off_are_flagged(place: Place, dtype: np.dtype[Any], count: int) -> None:
    largest = 2**52 // (count + 2)
    limits = np.iinfo(dtype)
    values = [largest, largest + 1, limits.max, limits.min, -largest, -largest - 1]
    bad = [False, True, True, dtype.kind == "i", False, True]
    if dtype.kind == "u":
        values, bad = [*values[:4], 2**63, 2**63 - 1], [*bad[:4], True, True]
    for last in (0, count - 1):
        columns = [[np.full(BLOCK + 1, 5, dtype) for _ in range(count)] for _ in values]
        for column, value in zip(columns, values, strict=True):
            column[last][-1] = value
        assert check_mean(place, columns, np.ones(count), float(count)) == bad


# Sums and differences of two.

NUMPY_OPERATIONS: dict[str, Any] = {"add": NUMPY.add, "subtract": NUMPY.subtract}


def check_combination(place: Place, name: str, ones: Arrays, others: Arrays, offset: int = 0) -> list[bool]:
    outputs = [np.empty_like(one) for one in ones]
    # The numpy kernel cannot say which is the largest of no integers.
    flags = [
        bool(x.size) and NUMPY_OPERATIONS[name]([x], [y], [z])[0] for x, y, z in zip(ones, others, outputs, strict=True)
    ]
    results = place.tensors(outputs, offset)
    found = place.run(name, place.tensors(ones, offset), place.tensors(others, offset), results)
    assert found == flags
    for result, output in zip(results, outputs, strict=True):
        assert_same(result, output)
    return found


@pytest.mark.parametrize("name", NUMPY_OPERATIONS)
@pytest.mark.parametrize("dtype", COMBINED, ids=str)
def test_sums_and_differences_have_the_bits_of_the_numpy_kernel(place: Place, dtype: np.dtype[Any], name: str) -> None:
    rng = np.random.default_rng(13)
    small = [(ref.values(rng, dtype, size) / 2).astype(dtype) for size in SIZES for _ in range(2)]
    assert not any(check_combination(place, name, small[::2], small[1::2]))
    assert not any(check_combination(place, name, small[::2], small[1::2], offset=1))
    if dtype in ref.FLOATS:
        patterns = [ref.finite_patterns(rng, dtype, size) for size in SIZES for _ in range(2)]
        check_combination(place, name, patterns[::2], patterns[1::2])


@pytest.mark.parametrize("name", NUMPY_OPERATIONS)
@pytest.mark.parametrize("dtype", [dtype for dtype in COMBINED if dtype.kind == "i"], ids=str)
def test_integers_that_leave_the_range_are_flagged(place: Place, dtype: np.dtype[Any], name: str) -> None:
    limits = np.iinfo(dtype)
    half = 2**62
    values = [limits.min, limits.min + 1, -1, 0, 1, limits.max - 1, limits.max]
    if dtype.itemsize == 8:
        values += [half, half + 1, -half, -half - 1]
    pairs = [(x, y) for x in values for y in values]
    ones, others = ([np.array([0, pair[i]], dtype) for pair in pairs] for i in (0, 1))
    found = check_combination(place, name, ones, others)
    sign = 1 if name == "add" else -1
    bad = [not limits.min <= x + sign * y <= limits.max for x, y in pairs]
    if dtype.itemsize == 8:
        bad = [flag or abs(x) > half or abs(y) > half for flag, (x, y) in zip(bad, pairs, strict=True)]
    assert found == bad


@pytest.mark.parametrize("name", NUMPY_OPERATIONS)
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_results_that_are_not_finite_are_flagged(place: Place, dtype: np.dtype[Any], name: str) -> None:
    largest = ref.largest(dtype)
    for size in (1, BLOCK, BLOCK + 3):
        ones = [np.ones(size, dtype) for _ in range(5)]
        others = [np.ones(size, dtype) for _ in range(5)]
        for one, value in zip(ones, (np.nan, np.inf, -np.inf, largest), strict=False):
            one[-1] = value
        others[3][-1] = largest if name == "add" else -largest
        assert check_combination(place, name, ones, others) == [True] * 4 + [False]


# Looking and copying.


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_copies_have_all_bits_and_what_is_not_finite_is_flagged(place: Place, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(17)
    for offset in (0, 1):
        arrays = [ref.values(rng, dtype, size) for size in SIZES]
        expected = [False] * len(SIZES)
        if dtype in ref.FLOATS:
            specials = [np.nan, np.inf, -np.inf]
            for array, special in zip(arrays[3:], specials * 2, strict=True):
                array[array.size * 2 // 3] = special
            with np.errstate(invalid="ignore"):
                signalling = np.array([ref.largest(dtype), np.nan], dtype).view(f"u{dtype.itemsize}")
            quiet_bit = {"float16": 1 << 9, "bfloat16": 1 << 6, "float32": 1 << 22, "float64": 1 << 51}[dtype.name]
            signalling[1] ^= quiet_bit | 1
            arrays.append(signalling.view(dtype))
            expected = [False] * 3 + [True] * 7
        tensors = place.tensors(arrays, offset)
        copies = place.tensors([np.zeros_like(array) for array in arrays], offset)
        assert place.run("not_finite", tensors) == expected
        assert place.run("copy", tensors, copies) == expected
        for copied, array in zip(copies, arrays, strict=True):
            assert array_of(copied, dtype).tobytes() == array.tobytes()


# What a call does besides.


@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK + 1])
@pytest.mark.parametrize("dtype", [np.dtype("int8"), np.dtype("float32"), np.dtype("float64")], ids=str)
def test_nothing_is_written_past_the_end(place: Place, dtype: np.dtype[Any], size: int) -> None:
    def framed() -> Tensor:
        return place.tensor(np.full(size + 2 * BLOCK, 77, dtype))

    x = place.tensor(np.ones(size, dtype))
    results = [framed() for _ in range(4)]
    sums = place.tensor(np.full(size + 2 * BLOCK, 77.0))
    inner = [result[:size] for result in results]
    place.run("mean", [[x, x]], inner[:1], np.ones(2), 2.0)
    place.run("add", [x], [x], inner[1:2])
    place.run("copy", [x], inner[2:3])
    place.run("accumulate", [sums[:size]], [[x, x]], np.ones(2), start=True)
    place.run("divide", [sums[:size]], 2.0, inner[3:])
    for result, value in zip([*results, sums], [1, 2, 1, 1, 2], strict=True):
        assert result.tolist() == [value] * size + [77] * (2 * BLOCK)


def test_elements_beyond_the_reach_of_32_bits(place: Place) -> None:
    size = 2**32 + 5
    assert place.module._table((3, size), CPU, 0).view(3, -1)[:, -1].tolist() == [1, 2**32 // BLOCK, 5]
    # The last block alone, of tensors of which there is no more than it.
    x, out = place.tensors([np.arange(5, dtype=np.float32), np.zeros(5, np.float32)])
    addresses = [tensor.data_ptr() - 2**32 * 4 for tensor in (x, out, x, x)]
    table = torch.tensor([0, 2**32 // BLOCK, 5], dtype=torch.int32, device=place.device)
    flags = torch.zeros(1, dtype=torch.int32, device=place.device)

    def launch(kernel: str, header: ref.Array, addresses: list[int], *runtime: int, **constants: Any) -> list[Any]:
        out.zero_()
        numbers = torch.tensor([*header.view(np.int64).tolist(), *addresses], device=place.device)
        call = place.module._Call(numbers, table, flags, aligned=False)
        call.launch(getattr(place.module, kernel), *runtime, **constants)
        return out.tolist()

    types: dict[str, Any] = dict(zip(("loaded", "kind"), place.module._TYPES[torch.float32], strict=True))
    nothing = np.empty(0)
    word = place.module._WORDS[4]
    assert launch("scan_kernel", nothing, addresses[:2], word=word, exponent=0, copies=True) == [0, 1, 2, 3, 4]
    both = [*addresses[2:], addresses[1]]
    assert launch("combination_kernel", nothing, both, **types, subtracts=False) == [0, 2, 4, 6, 8]
    header = np.array([0.5, 0.0, 1.0, 2.0])
    assert launch("mean_kernel", header, addresses, 2, **types, reads=False, divides=True) == [0, 6, 12, 18, 24]


def test_flags_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(interpreted(), CPU)
    x = place.tensors([np.ones(5, np.float32), np.full(BLOCK + 1, np.nan, np.float32)])
    sums = place.tensors([np.ones(5), np.ones(BLOCK + 1)])

    def read(*_: Any) -> Any:
        raise AssertionError("a call waits for the device")

    with monkeypatch.context() as patch, np.errstate(all="ignore"):
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            patch.setattr(Tensor, name, read)
        module = place.module
        flags = [
            module.mean([[a, a] for a in x], x, np.ones(2), 2.0),
            module.divide(sums, 1.0, x),
            module.add(x, x, x),
            module.subtract(x, x, x),
            module.not_finite(x),
            module.copy(x, x),
        ]
        module.accumulate(sums, [[a] for a in x], np.ones(1), start=False)
    assert [flag.tolist() for flag in flags] == [[0, 1], [0, 0], [0, 0], [0, 0], [0, 0], [0, 0]]


# Where they can be used.


def test_the_check_of_a_device_passes_where_bits_are_the_same(place: Place) -> None:
    with np.errstate(all="ignore"):  # of the interpreter
        assert place.module.has_the_bits_of_separate_operations(place.device)


def test_the_check_of_a_device_notices_fused_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def fusing(columns: Any, outputs: Any, weights: Any, total: float) -> None:
        rows = [x.tolist() for x in columns[0]]
        for element, values in enumerate(zip(*rows, strict=True)):
            acc = 0.0
            for x, a in zip(values, weights.tolist(), strict=True):
                acc = float(Fraction(a) * Fraction(x) + Fraction(acc))
            outputs[0][element] = acc / total

    module = interpreted()
    monkeypatch.setattr(module, "mean", fusing)
    with np.errstate(all="ignore"):
        assert not module.has_the_bits_of_separate_operations(CPU)


class TestProblem:
    """What `problem` says of a device that is not there."""

    DEVICE = torch.device("cuda", 5)

    @pytest.fixture(autouse=True)
    def device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        monkeypatch.setattr(torch.version, "hip", None)

    def test_there_is_none_where_the_check_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fused, "has_the_bits_of_separate_operations", lambda device: device == self.DEVICE)
        assert fused.problem(self.DEVICE) is None

    def test_no_memory_now_is_no_problem_for_good(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: torch.device) -> bool:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(fused, "has_the_bits_of_separate_operations", fail)
        with pytest.raises(torch.OutOfMemoryError):
            fused.problem(self.DEVICE)

    def test_other_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fused, "has_the_bits_of_separate_operations", lambda _: False)
        assert fused.problem(self.DEVICE) == "on cuda:5 they give other bits than separate operations of torch"

    def test_a_failing_compiler_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: torch.device) -> bool:
            raise RuntimeError("Failed to find C compiler.\n  Please specify one\nby CC.")

        monkeypatch.setattr(fused, "has_the_bits_of_separate_operations", fail)
        told = "Failed to find C compiler. Please specify one by CC."
        assert fused.problem(self.DEVICE) == f"Triton cannot compile for cuda:5 or run there: RuntimeError: {told}"

    def test_an_interrupt_is_not_held_for_a_problem(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(_: torch.device) -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(fused, "has_the_bits_of_separate_operations", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fused.problem(self.DEVICE)

    def test_an_old_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
        assert fused.problem(self.DEVICE) == "they need compute capability 7.0, and cuda:5 has 6.1"

    def test_rocm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert fused.problem(self.DEVICE) == "that the bits are the same on ROCm has not been tested"
