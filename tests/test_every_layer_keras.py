"""Each class of layers of Keras, loaded: what it computes afterwards is what its source computes, as in Keras."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import layers_of_keras as layers
import numpy as np
import pytest

import fed_learn as fl
from fed_learn.weights import Array

# Keras, as it makes arrays of the variables of TensorFlow.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LOADED = [name for name, recipe in layers.RECIPES.items() if not recipe.left]
LEFT = [name for name, recipe in layers.RECIPES.items() if recipe.left]
CLASSES = layers.classes()
OTHERS = sorted(CLASSES.keys() - layers.RECIPES.keys() - layers.ELSEWHERE - layers.NO_LAYERS)


def same(one: list[Array], other: list[Array]) -> bool:
    return 0 < len(one) == len(other) and all(map(np.array_equal, one, other))


def load_as_keras_does(target: Any, source: Any) -> None:
    target.set_weights(source.get_weights())
    for layer in target._flatten_layers():
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()


@pytest.mark.parametrize("name", LOADED)
def test_a_layer_computes_what_its_source_does_once_it_is_loaded_and_what_keras_would_load(name: str) -> None:
    recipe = layers.RECIPES[name]
    source, target, kerass, fresh = (layers.made(recipe, seed) for seed in (1, 2, 2, 2))
    load_as_keras_does(kerass, source)
    fl.set_weights(target, fl.get_weights(source))
    for training in (False, True):
        outputs = [layers.called(model, recipe, training=training) for model in (source, target, kerass, fresh)]
        assert same(outputs[0], outputs[1])
        assert same(outputs[2], outputs[1])
        assert name in layers.CONSTANT or not same(outputs[0], outputs[3])


@pytest.mark.parametrize("name", LEFT)
def test_what_a_layer_keeps_that_cannot_travel_is_named_once(name: str) -> None:
    recipe = layers.RECIPES[name]
    source, target = (layers.made(recipe, seed) for seed in (1, 2))
    for copy in (True, False):
        model = layers.made(recipe, 1)
        with pytest.warns(UserWarning, match=f"keeps {recipe.left} '.*', which cannot travel as numbers.*every client"):
            weights = fl.get_weights(model, copy=copy)
        assert weights == fl.get_weights(model, copy=copy) == {}
    before = layers.called(target, recipe, training=False)
    fl.set_weights(target, weights)
    assert same(layers.called(target, recipe, training=False), before)
    assert not same(layers.called(source, recipe, training=False), before)


@pytest.mark.parametrize("name", OTHERS)
def test_a_class_without_a_recipe_has_nothing_to_load(name: str) -> None:
    assert not layers.may_have_state(CLASSES[name]), f"write a recipe for {name} in tests/layers_of_keras.py"


def test_there_is_a_recipe_for_what_is_there_alone() -> None:
    recipes = {name for name in layers.RECIPES if " " not in name}
    assert CLASSES.keys() >= recipes | layers.ELSEWHERE | layers.NO_LAYERS


# Layers that belong to one back end.

BEGINNING = """
import warnings
import keras, numpy as np
import fed_learn as fl

def outputs(model, x):
    return np.asarray(keras.ops.convert_to_numpy(model(x)))

def loaded(make):
    source, target = make(1), make(2)
    x = np.linspace(0, 1, 12, dtype="float32").reshape(4, 3)
    assert not np.array_equal(outputs(source, x), outputs(target, x))
    fl.set_weights(target, fl.get_weights(source))
    return np.array_equal(outputs(source, x), outputs(target, x))
"""
BELONGING = {
    "TorchModuleWrapper": """
import torch

def make(seed, *more):
    keras.utils.clear_session()
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), *more)
    return keras.Sequential([keras.Input((3,)), keras.layers.TorchModuleWrapper(module, name="wrapped")], name="net")

warnings.simplefilter("error", UserWarning)
assert loaded(make)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fl.get_weights(make(1, torch.nn.BatchNorm1d(3)))
(warning,) = caught
left = "the buffers '1.running_mean', '1.running_var', '1.num_batches_tracked' of TorchModuleWrapper 'wrapped'"
assert left in str(warning.message), warning.message
""",
    "JaxLayer": """
import jax

def make(seed):
    def init(rng, inputs):
        return {"w": jax.random.normal(jax.random.key(seed), (3, 2))}, {"seen": 0.0 * inputs.sum() + seed}

    def call(params, state, inputs):
        return inputs @ params["w"] + state["seen"], state

    keras.utils.clear_session()
    return keras.Sequential([keras.Input((3,)), keras.layers.JaxLayer(call, init, name="jax")], name="net")

warnings.simplefilter("error", UserWarning)
assert loaded(make)
""",
    "FlaxLayer": """
import flax.linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, training=False):
        return nn.BatchNorm(use_running_average=not training)(nn.Dense(3)(x))

def make(seed):
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((3,)), keras.layers.FlaxLayer(Net(), name="flax")], name="net")

assert loaded(make)
""",
    "TFSMLayer": """
import sys, tempfile, os

def make(seed):
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).export(folder, verbose=False)
        layer = keras.layers.TFSMLayer(folder, call_endpoint="serve", name="saved")
    return keras.Sequential([keras.Input((3,)), layer], name="net")

assert loaded(make)
""",
}
BACKENDS = {"TorchModuleWrapper": "torch", "JaxLayer": "jax", "FlaxLayer": "jax", "TFSMLayer": "tensorflow"}


@pytest.mark.parametrize("name", sorted(layers.ELSEWHERE))
def test_layers_of_one_back_end_compute_what_their_source_does_once_they_are_loaded(name: str, tmp_path: Path) -> None:
    pytest.importorskip(BACKENDS[name])
    environment = os.environ | {"KERAS_BACKEND": BACKENDS[name]}
    command = [sys.executable, "-c", BEGINNING + BELONGING[name]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
