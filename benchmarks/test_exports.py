"""Reading and loading whole models of 128 MiB, beside what their frameworks offer for it.

    pytest benchmarks/test_exports.py

Sides are checked before they are timed, and timed in turn. An export without a copy is held to a hundredth of the time
of the framework's own export, and of the model's memory. It is timed warm, one export after the other, and cold: after
the framework's export has swept 256 MiB through the caches, as training does before a client's export. Cold, to read a
handful of objects takes the time of their cache misses, whoever does it: where the framework's bare calls alone (the
names, and an array of each variable) take more than that, no library can; their time is printed beside ours.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import fed_learn as fl
from fed_learn.benchmark.memory import Peak

LAYERS, WIDTH = 8, 2048
"""8 square matrices of 16 MiB."""


@dataclass(frozen=True)
class Framework:
    """A model, what the framework does to export it, the least with which it shows its arrays, and to load it."""

    model: Any
    export: Callable[[], Any]
    bare: Callable[[], Any]
    load: Callable[[Any], Any]


def torch_model() -> Framework:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    return Framework(
        model,
        lambda: {name: tensor.clone() for name, tensor in model.state_dict().items()},
        lambda: {name: tensor.numpy() for name, tensor in model.state_dict().items()},
        model.load_state_dict,
    )


def keras_model() -> Framework:
    keras, tensorflow = pytest.importorskip("keras"), pytest.importorskip("tensorflow")
    read = tensorflow.raw_ops.ReadVariableOp

    def bare() -> Any:
        values = {variable.path: variable.value for variable in model.weights}
        return {path: np.asarray(read(resource=value.handle, dtype=value.dtype)) for path, value in values.items()}

    layers = [keras.layers.Dense(WIDTH, use_bias=False, name=f"layer_{i:02}") for i in range(LAYERS)]
    model = keras.Sequential([keras.Input((WIDTH,)), *layers], name="model")
    return Framework(model, model.get_weights, bare, model.set_weights)


def jax_model() -> Framework:
    jax = pytest.importorskip("jax")
    flatten = jax.tree_util.tree_flatten_with_path
    keys = jax.random.split(jax.random.key(0), LAYERS)
    model = {f"layer_{i:02}": jax.random.normal(key, (WIDTH, WIDTH)) for i, key in enumerate(keys)}
    return Framework(
        model,
        lambda: jax.tree_util.tree_map(np.array, model),
        lambda: {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flatten(model)[0]},
        lambda weights: jax.tree_util.tree_map(jax.numpy.array, weights),
    )


MODELS = {"torch": torch_model, "keras": keras_model, "jax": jax_model}


@pytest.fixture(scope="module", params=MODELS)
def framework(request: pytest.FixtureRequest) -> Framework:
    made: Framework = MODELS[request.param]()
    return made


def values_of(exported: Any) -> list[Any]:
    values = exported.values() if isinstance(exported, dict) else exported
    return [np.asarray(value) for value in values]


@pytest.mark.filterwarnings("default")
@pytest.mark.benchmark(max_time=0.5, min_rounds=5, warmup=True)
@pytest.mark.parametrize("side", ["ours, no copy", "ours, a copy", "the framework's"])
def test_export(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, framework: Framework, side: str) -> None:
    sides = {
        "ours, no copy": lambda: fl.get_weights(framework.model, copy=False),
        "ours, a copy": lambda: fl.get_weights(framework.model),
        "the framework's": framework.export,
    }
    exported = values_of(sides[side]())
    assert sum(array.nbytes for array in exported) == 1 << 27
    assert all(map(np.array_equal, exported, values_of(framework.export())))
    benchmark.group = f"export, {request.node.callspec.params['framework']}"
    benchmark(sides[side])


@pytest.mark.filterwarnings("default")
@pytest.mark.benchmark(max_time=0.5, min_rounds=5, warmup=True)
@pytest.mark.parametrize("side", ["ours", "the framework's"])
def test_load(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, framework: Framework, side: str) -> None:
    weights, exported = fl.get_weights(framework.model), framework.export()
    sides = {
        "ours": lambda: fl.set_weights(framework.model, weights),
        "the framework's": lambda: framework.load(exported),
    }
    sides[side]()
    assert all(map(np.array_equal, values_of(framework.export()), weights.values()))
    benchmark.group = f"load, {request.node.callspec.params['framework']}"
    benchmark(sides[side])


@pytest.mark.filterwarnings("default")
def test_an_export_without_a_copy_takes_a_hundredth_of_the_time_and_no_memory(
    request: pytest.FixtureRequest, framework: Framework, capsys: pytest.CaptureFixture[str]
) -> None:
    def seconds(export: Callable[[], Any]) -> float:
        start = time.perf_counter()
        exported = export()
        taken = time.perf_counter() - start
        del exported
        return taken

    def without_copy() -> Any:
        return fl.get_weights(framework.model, copy=False)

    assert all(map(np.array_equal, values_of(without_copy()), values_of(framework.bare())))
    median = statistics.median
    whole: list[float] = []
    cold: list[float] = []
    bare: list[float] = []
    for _ in range(21):
        for times, export in ((cold, without_copy), (bare, framework.bare)):
            whole.append(seconds(framework.export))
            times.append(seconds(export))
    warm = [seconds(without_copy) for _ in range(21)]
    peak = Peak()
    kept = without_copy()
    beyond = peak.beyond()
    one = median(whole)
    ratios = {"cold": median(cold) / one, "its bare calls cold": median(bare) / one, "warm": median(warm) / one}
    with capsys.disabled():
        name = request.node.callspec.params["framework"]
        told = ", ".join(f"{what} {ratio:.4f}" for what, ratio in ratios.items())
        print(f"\n{name}: ÷ its export of {one * 1e3:.1f} ms: {told}; {(beyond or 0) / 2**20:.1f} MiB of 128")
    assert len(kept) == LAYERS
    assert ratios["warm"] < 0.01
    assert ratios["cold"] < 0.01
    assert beyond is None or beyond < (1 << 27) / 100
