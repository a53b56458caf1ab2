"""Each class of layers of Keras, loaded: what it computes afterwards is what its source computes, as in Keras."""

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
