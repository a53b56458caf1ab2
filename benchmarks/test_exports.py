"""Reading and loading whole models of 128 MiB, beside what their frameworks offer for it.

    pytest benchmarks/test_exports.py

Sides are checked before they are timed, and timed in turn. Besides the table, the ratio of an export without a copy to
the framework's own export is held to a hundredth, and its memory to a hundredth of the model.
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
    """A model, what the framework does to export it, and to load it."""

    model: Any
    export: Callable[[], Any]
    load: Callable[[Any], Any]


def torch_model() -> Framework:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    return Framework(
        model,
        lambda: {name: tensor.clone() for name, tensor in model.state_dict().items()},
        model.load_state_dict,
    )


def keras_model() -> Framework:
    keras = pytest.importorskip("keras")
    layers = [keras.layers.Dense(WIDTH, use_bias=False, name=f"layer_{i:02}") for i in range(LAYERS)]
    model = keras.Sequential([keras.Input((WIDTH,)), *layers], name="model")
    return Framework(model, model.get_weights, model.set_weights)


def jax_model() -> Framework:
    jax = pytest.importorskip("jax")
    keys = jax.random.split(jax.random.key(0), LAYERS)
    model = {f"layer_{i:02}": jax.random.normal(key, (WIDTH, WIDTH)) for i, key in enumerate(keys)}
    return Framework(
        model,
        lambda: jax.tree_util.tree_map(np.array, model),
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

    ratios = [seconds(without_copy) / seconds(framework.export) for _ in range(21)]
    peak = Peak()
    kept = without_copy()
    beyond = peak.beyond()
    ratio = statistics.median(ratios)
    with capsys.disabled():
        name = request.node.callspec.params["framework"]
        print(f"\n{name}: export without a copy ÷ the framework's {ratio:.4f}, {(beyond or 0) / 2**20:.1f} MiB of 128")
    assert len(kept) == LAYERS
    assert ratio < 0.01
    assert beyond is None or beyond < (1 << 27) / 100
