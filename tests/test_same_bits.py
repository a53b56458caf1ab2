"""The result has the same bits whatever the kernel, the number of threads, the order of arrival and the process's
floating-point environment. Every comparison counts differing bytes, and expects none.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import (
    BFLOAT16,
    DTYPES,
    FLOATS,
    KERNELS,
    SIZES,
    Array,
    differing_bytes,
    finite_patterns,
    in_all_layouts,
    largest,
    largest_error,
    num_threads,
    values,
)

import fed_learn as fl
from fed_learn.aggregation import Accumulator, weighted_average
from fed_learn.contribution import Contribution
from fed_learn.weights import WeightDict

needs_native = pytest.mark.skipif("native" not in KERNELS, reason="the native kernel was not built")
HALVES = (np.dtype("float16"), BFLOAT16)
CASES = 240


def case(seed: int) -> list[Contribution]:
    """A random batch, sorted by contributor: dtypes, odd sizes, layouts, number and weights are all drawn."""
    rng = np.random.default_rng(seed)
    schema = {
        f"counts/{k}": (DTYPES[int(rng.integers(len(DTYPES)))], SIZES[int(rng.integers(1, len(SIZES)))])
        for k in range(rng.integers(1, 5))
    }
    schema["counts/every dtype in turn"] = (DTYPES[seed % len(DTYPES)], SIZES[1 + seed % (len(SIZES) - 1)])
    count = int(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17]))
    weights: list[float] = rng.uniform(0.01, 1000, count).tolist()
    if rng.random() < 0.4:
        weights = [int(weight) + 1 for weight in weights]
    batch = []
    for k, weight in enumerate(weights):
        arrays = {name: values(rng, dtype, size) for name, (dtype, size) in schema.items()}
        if rng.random() < 0.3:
            layouts = [list(in_all_layouts(array).values()) for array in arrays.values()]
            arrays = {name: few[int(rng.integers(len(few)))] for name, few in zip(arrays, layouts, strict=True)}
        batch.append(Contribution(f"site-{k:02}", arrays, weight))
    return batch


def stream(batch: list[Contribution], kernel: str, exact: bool = False) -> WeightDict:
    accumulator = Accumulator(kernel=kernel, exact=exact)
    for contribution in batch:
        accumulator.add(contribution)
    return accumulator.result()


@needs_native
@pytest.mark.parametrize("seed", range(CASES))
def test_native_gives_the_bits_of_numpy_for_any_threads_and_order_and_streamed_or_not(seed: int) -> None:
    batch = case(seed)
    expected = weighted_average(batch, kernel="numpy")
    shuffled = [batch[int(k)] for k in np.random.default_rng(seed).permutation(len(batch))]
    differing = differing_bytes(expected, stream(batch, "numpy"))
    differing += differing_bytes(expected, weighted_average(shuffled, kernel="numpy"))
    for threads in (1, 2, 3):
        with num_threads(threads):
            differing += differing_bytes(expected, weighted_average(batch, kernel="native"))
            differing += differing_bytes(expected, weighted_average(shuffled, kernel="native"))
            differing += differing_bytes(expected, stream(batch, "native"))
    assert differing == 0


@needs_native
@pytest.mark.parametrize("seed", range(0, CASES, 12))
def test_exact_sums_give_the_same_bits_for_any_kernel_threads_and_order(seed: int) -> None:
    batch = case(seed)
    expected = weighted_average(batch, exact=True, kernel="numpy")
    differing = differing_bytes(expected, stream(batch[::-1], "numpy", exact=True))
    for threads in (1, 3):
        with num_threads(threads):
            differing += differing_bytes(expected, weighted_average(batch[::-1], exact=True, kernel="native"))
            differing += differing_bytes(expected, stream(batch, "native", exact=True))
    assert differing == 0


def test_the_random_cases_hold_every_dtype_many_counts_and_odd_sizes() -> None:
    batches = [case(seed) for seed in range(CASES)]
    arrays = [array for batch in batches for array in (batch[0].weights or {}).values()]
    assert {array.dtype.newbyteorder("=") for array in arrays} == set(DTYPES)
    assert len({len(batch) for batch in batches}) == 11
    assert {array.size for array in arrays} == set(SIZES[1:])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_gives_the_bits_of_numpy_on_large_arrays_and_default_shares(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(20)
    clients = [{"w": values(rng, dtype, 200_003), "v": values(rng, dtype, 65_537)} for _ in range(6)]
    weights = rng.uniform(0.1, 100, 6).tolist()
    expected = weighted_average(clients, weights, kernel="numpy")
    for threads in (1, 2, 3):
        with num_threads(threads, smallest_share=1 << 18):
            assert differing_bytes(expected, weighted_average(clients, weights, kernel="native")) == 0


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_native_gives_the_bits_of_numpy_on_any_finite_bit_pattern(dtype: np.dtype[Any], count: int) -> None:
    rng = np.random.default_rng(21)
    clients = [{"w": finite_patterns(rng, dtype, 20_001)} for _ in range(count)]
    weights = rng.uniform(0.1, 100_000, count).tolist()
    with num_threads(2):
        native = weighted_average(clients, weights, kernel="native")
    assert differing_bytes(weighted_average(clients, weights, kernel="numpy"), native) == 0


@needs_native
@pytest.mark.parametrize("scale", [5e-324, 1e-308, 1e-30, 1e30, 1e308])
def test_native_gives_the_bits_of_numpy_for_weights_of_any_scale(scale: float) -> None:
    rng = np.random.default_rng(22)
    clients = [{f"{dtype}": values(rng, dtype, 1025) for dtype in DTYPES} for _ in range(5)]
    weights = [scale * factor for factor in (1, 0.3, 1.7, 0.7, 1)]
    weights = [weight or scale for weight in weights]
    native = weighted_average(clients, weights, kernel="native")
    assert differing_bytes(weighted_average(clients, weights, kernel="numpy"), native) == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_streaming_gives_the_bits_of_a_batch_down_to_subnormals(kernel: str, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(23)
    patterns = np.dtype(f"uint{8 * dtype.itemsize}")
    # Between zero and a few times the smallest normal number, of either sign.
    top = 1 << {"float16": 12, "bfloat16": 9, "float32": 25, "float64": 54}[dtype.name]
    sign = 1 << (8 * dtype.itemsize - 1)
    batch = []
    for k in range(5):
        array = rng.integers(0, top, 999).astype(patterns)
        array[::3] |= np.array(sign, patterns)
        batch.append(Contribution(f"{k}", {"w": array.view(dtype)}, 3 * k + 1))
    assert differing_bytes(weighted_average(batch, kernel=kernel), stream(batch, kernel)) == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weights", [(0.3, 0.7, 2.5), (0.1, 0.1, 0.1), (2.0**-100, 1 / 3, 2.0**100)], ids=str)
def test_streaming_float64_subnormals_by_fractions_gives_the_bits_of_a_batch(
    kernel: str, weights: tuple[float, ...]
) -> None:
    rng = np.random.default_rng(30)
    batch = []
    for k, weight in enumerate(weights):
        array = rng.integers(0, 1 << 53, 999).view(np.float64)
        array[500:] = rng.integers(0, 1 << 10, 499).view(np.float64)
        array[::3] *= -1
        batch.append(Contribution(f"{k}", {"w": array}, weight))
    arrays = [c.weights["w"] for c in batch if c.weights is not None]
    mean = weighted_average(batch, kernel=kernel)
    assert differing_bytes(mean, stream(batch, kernel)) == 0
    assert differing_bytes(mean, weighted_average(batch, kernel="numpy")) == 0
    assert np.count_nonzero(np.abs(mean["w"]) < 2.0**-1022) > 500
    assert largest_error(mean["w"], arrays, weights) <= 4


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
def test_numpy_error_settings_of_the_caller_do_not_matter(kernel: str, exact: bool) -> None:
    rng = np.random.default_rng(28)
    batch = []
    for k in range(3):
        arrays = {f"{d}": finite_patterns(rng, d, 999) for d in FLOATS if d != np.float64}
        arrays["float64"] = np.array([2.0**700, 2.0**-700, 0.0, 1 / 3])
        arrays["int64"] = np.array([2**49, -(2**49), 0])
        batch.append(Contribution(f"{k}", arrays, (0.3, 1, 70_000)[k]))
    expected = weighted_average(batch, exact=exact, kernel=kernel)
    with np.errstate(all="raise"):
        assert differing_bytes(expected, weighted_average(batch, exact=exact, kernel=kernel)) == 0
        assert differing_bytes(expected, stream(batch, kernel, exact)) == 0


# The conversions between the halves and float64, each over all there is


def native_load(array: Array) -> Array:
    """`array` as float64, by the C code."""
    sums = np.empty(array.size)
    fl.kernels.resolve("native").accumulate([sums], [[array]], np.ones(1), start=True)
    return sums


def native_store(means: Array, dtype: np.dtype[Any]) -> Array:
    """`means` rounded to `dtype`, by the C code."""
    return store("native", means, dtype)


def store(name: str, means: Array, dtype: np.dtype[Any]) -> Array:
    output = np.empty(means.size, dtype)
    fl.kernels.resolve(name).divide([means], 1.0, [output])
    return output


def all_finite(dtype: np.dtype[Any]) -> Array:
    patterns: Array = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        finite: Array = patterns[np.isfinite(patterns)]
    return finite


def nearest_half(means: Array, dtype: np.dtype[Any]) -> Array:
    """Rounds to float32 and then to the nearest half, ties to even, by searching the list of all halves."""
    wide = means.astype(np.float32).astype(np.float64)
    table = np.arange(int(np.asarray(largest(dtype), dtype).view(np.uint16)) + 1, dtype=np.uint16)
    halves = table.view(dtype).astype(np.float64)
    size = np.abs(wide)
    above = np.clip(np.searchsorted(halves, size), 1, halves.size - 1)
    down, up = size - halves[above - 1], halves[above] - size
    even_above = above % 2 == 0
    pattern = np.where((up < down) | ((up == down) & even_above), above, above - 1)
    return np.asarray(table[pattern] | np.where(np.signbit(wide), 0x8000, 0)).astype(np.uint16).view(dtype)


@needs_native
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_native_loads_every_finite_half_exactly(dtype: np.dtype[Any]) -> None:
    finite = all_finite(dtype)
    assert finite.size == {"float16": 63_488, "bfloat16": 65_280}[dtype.name]
    assert native_load(finite).tobytes() == finite.astype(np.float64).tobytes()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_finite_half_is_stored_as_itself(name: str, dtype: np.dtype[Any]) -> None:
    finite = all_finite(dtype)
    assert store(name, finite.astype(np.float64), dtype).tobytes() == finite.tobytes()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_midpoints_of_halves_and_their_neighbours_are_rounded_by_way_of_float32(
    name: str, dtype: np.dtype[Any]
) -> None:
    halves = np.unique(all_finite(dtype).astype(np.float64))
    middles = (halves[:-1] + halves[1:]) / 2
    narrow = middles.astype(np.float32)
    assert np.array_equal(narrow, middles)
    candidates = [
        middles,
        *(np.nextafter(middles, toward) for toward in (-np.inf, np.inf)),
        *(np.nextafter(narrow, np.float32(toward)).astype(np.float64) for toward in (-np.inf, np.inf)),
    ]
    for means in candidates:
        assert store(name, means, dtype).tobytes() == nearest_half(means, dtype).tobytes()


@needs_native
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_native_rounds_random_float64_to_halves_as_numpy_does(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(24)
    spread = {"float16": (-30, 15), "bfloat16": (-160, 127)}[dtype.name]
    means = np.ldexp(rng.uniform(-1, 1, 300_000), rng.integers(*spread, 300_000))
    native = native_store(means, dtype)
    assert native.tobytes() == store("numpy", means, dtype).tobytes()
    assert native.tobytes() == nearest_half(means, dtype).tobytes()


@needs_native
def test_native_rounds_midpoints_of_float32_to_even_as_numpy_does() -> None:
    rng = np.random.default_rng(25)
    lower = finite_patterns(rng, np.dtype("float32"), 300_000).astype(np.float64)
    upper = np.nextafter(lower.astype(np.float32), np.float32(0)).astype(np.float64)
    middles = (lower + upper) / 2
    for means in (middles, np.nextafter(middles, -np.inf), np.nextafter(middles, np.inf)):
        with np.errstate(under="ignore"):
            expected = means.astype(np.float32)
        assert native_store(means, np.dtype("float32")).tobytes() == expected.tobytes()
    even = native_store(middles, np.dtype("float32")).view(np.uint32) % 2
    assert not even.any()


@needs_native
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in FLOATS], ids=str)
def test_native_rounds_halves_of_integers_to_even_as_numpy_does(dtype: np.dtype[Any]) -> None:
    low, high = (0, 2) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    middles = np.arange(max(low, -300), min(high, 300)) + 0.5
    means = np.concatenate([middles, np.nextafter(middles, -np.inf), np.nextafter(middles, np.inf)])
    assert native_store(means, dtype).tobytes() == np.rint(means).astype(dtype).tobytes()
    assert native_store(means, dtype).tobytes() == store("numpy", means, dtype).tobytes()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_loads_every_dtype_as_numpy_does(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(26)
    array = finite_patterns(rng, dtype, 9999) if dtype in FLOATS else values(rng, dtype, 9999)
    assert native_load(array).tobytes() == (array.astype(np.float64) + -0.0).tobytes()


# A process that has changed its floating-point environment

CHANGE = """
import ctypes, json, platform, sys
import numpy as np
import fed_learn as fl
from fed_learn.kernels import threads

change, *arguments = sys.argv[1:]
tiny = np.full(64, 1e-40, np.float32)
ones = np.ones(64)

if change == "denormals off":
    import torch

    def changed():
        return not (tiny * np.float32(1)).any()

    def switch(on):
        assert torch.set_flush_denormal(on)
else:
    x86 = {"rounding upward": 0x800, "rounding downward": 0x400, "rounding toward zero": 0xC00}
    arm = {"rounding upward": 0x400000, "rounding downward": 0x800000, "rounding toward zero": 0xC00000}
    mode = {"x86_64": x86, "AMD64": x86, "aarch64": arm, "arm64": arm}[platform.machine()][change]
    libm = ctypes.CDLL(None)

    def changed():
        return bool((ones + 1e-30 > 1).all() or (ones - 1e-30 < 1).all())

    def switch(on):
        assert libm.fesetround(mode if on else 0) == 0

assert not changed()
switch(True)
assert changed(), "numpy did not notice: the test proves nothing"
"""

AVERAGED_ALL_THE_SAME = (
    CHANGE
    + """
switch(False)
weights = json.loads(arguments[0])
threads.SMALLEST_SHARE = 64
fl.kernels.set_num_threads(2)
clients = [dict(np.load(path)) for path in arguments[3:]]

switch(True)
batch = fl.weighted_average(clients, weights, kernel="native")
assert changed(), "the environment of the process was not restored"
accumulator = fl.Accumulator(kernel="native")
for client, weight in zip(clients, weights):
    accumulator.add(client, weight)
streamed, total = accumulator.result(), accumulator.total_weight
assert changed(), "the environment of the process was not restored"
switch(False)
np.savez(arguments[1], **batch)
np.savez(arguments[2], **streamed)
expected = 0.0
for weight in weights:
    expected += weight
assert total == expected, (total, expected)
"""
)


def skip_if_it_cannot_be_changed(change: str) -> None:
    if change == "denormals off" and importlib.util.find_spec("torch") is None:
        pytest.skip("torch, which can switch denormals off, is not installed")
    if change != "denormals off" and not sys.platform.startswith("linux"):
        pytest.skip("the rounding is changed by way of the C library of Linux")


def run_python(code: str, *arguments: str) -> str:
    """Runs code in another process, which must succeed and complain of nothing; returns what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@needs_native
@pytest.mark.parametrize(
    ("change", "weights"),
    [
        ("denormals off", (3, 1, 5)),
        ("denormals off", (0.1, 0.7, 2.3)),
        ("rounding upward", (3, 1, 5)),
        ("rounding upward", (0.1, 0.7, 2.3)),
        ("rounding downward", (0.1, 0.7, 2.3)),
        ("rounding toward zero", (0.1, 0.7, 2.3)),
    ],
    ids=str,
)
def test_native_ignores_the_floating_point_environment_of_the_process_and_leaves_it_as_it_was(
    change: str, weights: tuple[float, ...], tmp_path: Path
) -> None:
    skip_if_it_cannot_be_changed(change)
    rng = np.random.default_rng(27)
    clients: list[dict[str, Array]] = []
    for k in range(3):
        single = rng.integers(0, 1 << 24, 999, dtype=np.uint32).view(np.float32)
        half = rng.integers(0, 1 << 11, 999, dtype=np.uint16).view(np.float16)
        clients.append({"single": single, "half": half, "double": values(rng, np.dtype("float64"), 999)})
        np.savez(tmp_path / f"{k}.npz", allow_pickle=False, **clients[-1])
    outputs = [str(tmp_path / "batch.npz"), str(tmp_path / "streamed.npz")]
    inputs = [str(tmp_path / f"{k}.npz") for k in range(3)]
    assert run_python(AVERAGED_ALL_THE_SAME, change, json.dumps(weights), *outputs, *inputs) == ""
    expected = weighted_average(clients, weights, kernel="numpy")
    for output in outputs:
        with np.load(output) as result:
            assert differing_bytes(expected, {name: result[name] for name in expected}) == 0
    assert np.count_nonzero(expected["single"] < np.float32(2.0**-126)) > 100


REFUSED = (
    CHANGE
    + """
from fed_learn.aggregation.differences import add_difference, difference

one, other = {"w": tiny}, {"w": 2 * tiny}
accumulator = fl.Accumulator(kernel="numpy")
attempts = {
    "difference": lambda: difference(one, other),
    "add_difference": lambda: add_difference(one, other),
    "weighted_average": lambda: fl.weighted_average([one, other], kernel="numpy"),
    "Accumulator.add": lambda: accumulator.add(one, 1),
    "exact weighted_average": lambda: fl.weighted_average([one, other], exact=True),
    "exact Accumulator.add": lambda: fl.Accumulator(exact=True).add(one, 1),
}
outcomes = {}
for name, attempt in attempts.items():
    try:
        attempt()
        outcomes[name] = "nothing"
    except RuntimeError as error:
        outcomes[name] = f"{type(error).__name__}: {error}"
switch(False)
assert not changed()
for name in ("difference", "add_difference", "weighted_average"):
    attempts[name]()  # it is not refused for good
print(json.dumps(outcomes))
"""
)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("denormals off", "flushes subnormal numbers to zero"),
        ("rounding upward", "does not round to nearest"),
        ("rounding downward", "does not round to nearest"),
        ("rounding toward zero", "does not round to nearest"),
    ],
)
def test_what_numpy_would_compute_otherwise_in_a_changed_environment_is_refused(change: str, says: str) -> None:
    skip_if_it_cannot_be_changed(change)
    outcomes: dict[str, str] = json.loads(run_python(REFUSED, change))
    assert list(outcomes) == [
        "difference",
        "add_difference",
        "weighted_average",
        "Accumulator.add",
        "exact weighted_average",
        "exact Accumulator.add",
    ]
    for outcome in outcomes.values():
        assert outcome.startswith("FloatingPointEnvironmentError: ")
        assert says in outcome
