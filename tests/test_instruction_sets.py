"""The variants of the native kernel give the bits of the numpy kernel, can be forced, and say so if they cannot."""

import concurrent.futures

import numpy as np
import pytest
from reference import DTYPES, KERNELS, Array, differing_bytes, finite_patterns, num_threads, values

import fed_learn as fl

needs_native = pytest.mark.skipif("native" not in KERNELS, reason="the C extension was not built")
SETS = fl.kernels.instruction_sets() if "native" in KERNELS else ("none",)
every_set = pytest.mark.parametrize("name", SETS)

# Around a vector, a block of vectors and a tile of every variant, and odd.
SIZES = (0, 1, 2, 3, 5, 7, 9, 15, 16, 17, 31, 33, 63, 65, 4095, 4097, 8193)
# Around a group of contributions.
COUNTS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 33)


@needs_native
@every_set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_variant_gives_the_bits_of_numpy(name: str, dtype: np.dtype[np.generic]) -> None:
    rng = np.random.default_rng(5)
    for size in SIZES:
        count = int(rng.choice(COUNTS))
        models = [{"counts": values(rng, dtype, size)} for _ in range(count)]
        aggregation_weights = rng.uniform(0.1, 1000, count).tolist()
        expected = fl.weighted_average(models, aggregation_weights, kernel="numpy")
        with fl.kernels.use_instruction_set(name):
            batch = fl.weighted_average(models, aggregation_weights, kernel="native")
            accumulator = fl.Accumulator(kernel="native")
            for model, aggregation_weight in zip(models, aggregation_weights, strict=True):
                accumulator.add(model, aggregation_weight)
            assert differing_bytes(expected, batch) == 0
            assert differing_bytes(expected, accumulator.result()) == 0


@needs_native
@every_set
@pytest.mark.parametrize("count", COUNTS)
def test_any_number_of_contributions_is_summed_in_order(name: str, count: int) -> None:
    rng = np.random.default_rng(count)
    models = [{"w": rng.standard_normal(5000)} for _ in range(count)]
    aggregation_weights = rng.uniform(0.1, 1000, count).tolist()
    expected = fl.weighted_average(models, aggregation_weights, kernel="numpy")
    with fl.kernels.use_instruction_set(name):
        assert differing_bytes(expected, fl.weighted_average(models, aggregation_weights, kernel="native")) == 0


@needs_native
@every_set
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_finite_half_survives(name: str, dtype: str) -> None:
    patterns: Array = np.arange(1 << 16, dtype=np.uint16).view(next(d for d in DTYPES if d.name == dtype))
    finite = patterns[np.isfinite(patterns.astype(np.float32))]
    with fl.kernels.use_instruction_set(name):
        assert fl.weighted_average([{"w": finite}], kernel="native")["w"].tobytes() == finite.tobytes()


@needs_native
@every_set
def test_unaligned_views_and_many_threads_change_no_bit(name: str) -> None:
    rng = np.random.default_rng(9)
    models = [{"w": finite_patterns(rng, np.dtype("float32"), 9001)} for _ in range(9)]
    expected = fl.weighted_average(models, kernel="numpy")
    for offset in (4, 20, 28):
        views = []
        for model in models:
            received = np.frombuffer(b"\0" * offset + model["w"].tobytes(), np.uint8)
            views.append({"w": received[offset:].view(np.float32)})
        with fl.kernels.use_instruction_set(name), num_threads(3):
            assert differing_bytes(expected, fl.weighted_average(views, kernel="native")) == 0


@needs_native
def test_the_widest_variant_is_used_unless_another_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FED_LEARN_INSTRUCTION_SET", raising=False)
    assert fl.kernels.current_instruction_set() == SETS[0]
    monkeypatch.setenv("FED_LEARN_INSTRUCTION_SET", SETS[-1])
    assert fl.kernels.current_instruction_set() == SETS[-1]
    with fl.kernels.use_instruction_set(SETS[0]):
        assert fl.kernels.current_instruction_set() == SETS[0]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(fl.kernels.current_instruction_set).result() == SETS[-1]
    assert fl.kernels.current_instruction_set() == SETS[-1]


@needs_native
def test_a_variant_that_is_not_there_is_an_error_that_names_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(fl.KernelNameError, match="'avx1024' is not usable here") as caught,
        fl.kernels.use_instruction_set("avx1024"),
    ):
        pass
    assert caught.value.valid == SETS
    monkeypatch.setenv("FED_LEARN_INSTRUCTION_SET", "mmx")
    with pytest.raises(fl.KernelNameError, match="FED_LEARN_INSTRUCTION_SET 'mmx' is not usable here"):
        fl.weighted_average([{"w": np.ones(3)}], kernel="native")
    assert fl.weighted_average([{"w": np.ones(3)}], kernel="numpy")["w"].tolist() == [1.0] * 3
