"""Random stacks of layers, built in both frameworks: the same outputs, and the same bits on the way back."""

from typing import Any

import keras
import numpy as np
import paired_models as pm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers
from torch import nn

from fed_learn.adapters.layout import align

CONVOLUTIONS = ("plain", "grouped", "depthwise", "separable", "transposed")
IN_MAPS = ("batch norm", "group norm", "relu", "pool", *CONVOLUTIONS)
IN_VECTORS = ("dense", "batch norm", "layer norm", "relu", "prelu")
ENDS = ("flatten", "pool all")


def convolution(kind: str, channels: int, gives: int) -> tuple[list[Any], list[Any]]:
    """A convolution in both frameworks that keeps the size of a map."""
    same: dict[str, Any] = {"padding": "same"}
    if kind == "grouped":
        return [nn.Conv2d(channels, 2 * gives, 3, groups=2, **same)], [layers.Conv2D(2 * gives, 3, groups=2, **same)]
    if kind == "depthwise":
        both = nn.Conv2d(channels, 2 * channels, 3, groups=channels, **same)
        return [both], [layers.DepthwiseConv2D(3, depth_multiplier=2, **same)]
    if kind == "separable":
        first = nn.Conv2d(channels, channels, 3, groups=channels, bias=False, **same)
        return [first, nn.Conv2d(channels, gives, 1)], [layers.SeparableConv2D(gives, 3, **same)]
    if kind == "transposed":
        return [nn.ConvTranspose2d(channels, gives, 1)], [layers.Conv2DTranspose(gives, 1)]
    return [nn.Conv2d(channels, gives, 3, **same)], [layers.Conv2D(gives, 3, **same)]


def map_layers(kind: str, channels: int, gives: int, size: int) -> tuple[list[Any], list[Any]]:
    if kind == "batch norm":
        return [nn.BatchNorm2d(channels)], [pm.batch_norm()]
    if kind == "group norm":
        return [nn.GroupNorm(2, channels)], [layers.GroupNormalization(2, epsilon=pm.EPSILON)]
    if kind == "relu":
        return [nn.ReLU()], [layers.ReLU()]
    if kind == "pool":
        return ([nn.MaxPool2d(2)], [layers.MaxPooling2D(2)]) if size > 1 else ([], [])
    return convolution(kind, channels, gives)


def vector_layers(kind: str, features: int, gives: int) -> tuple[list[Any], list[Any]]:
    if kind == "batch norm":
        return [nn.BatchNorm1d(features)], [pm.batch_norm()]
    if kind == "layer norm":
        return [nn.LayerNorm(features)], [pm.layer_norm()]
    if kind == "prelu":
        return [nn.PReLU(features)], [layers.PReLU()]
    if kind == "relu":
        return [nn.ReLU()], [layers.ReLU()]
    return [nn.Linear(features, gives)], [layers.Dense(gives)]


def built(kinds: list[tuple[str, int]], end: str, vectors: list[tuple[str, int]]) -> tuple[Any, Any]:
    channels, size = 2, 4
    mine: list[Any] = []
    theirs: list[Any] = []
    for kind, gives in kinds:
        a, b = map_layers(kind, channels, 2 * gives, size)
        mine, theirs = mine + a, theirs + b
        channels = next((one.out_channels for one in reversed(a) if hasattr(one, "out_channels")), channels)
        size = size // 2 if kind == "pool" and size > 1 else size
    if end == "flatten":
        mine, theirs, features = [*mine, nn.Flatten()], [*theirs, layers.Flatten()], channels * size * size
    else:
        mine += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        theirs, features = [*theirs, layers.GlobalAveragePooling2D()], channels
    for kind, gives in [*vectors, ("dense", 3)]:
        a, b = vector_layers(kind, features, gives)
        mine, theirs = mine + a, theirs + b
        features = gives if kind == "dense" else features
    return nn.Sequential(*mine), keras.Sequential([keras.Input((4, 4, 2)), *theirs])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.tuples(st.sampled_from(IN_MAPS), st.integers(1, 3)), min_size=1, max_size=5).filter(
        lambda kinds: kinds[0][0] in CONVOLUTIONS
    ),
    end=st.sampled_from(ENDS),
    vectors=st.lists(st.tuples(st.sampled_from(IN_VECTORS), st.integers(1, 6)), max_size=3),
    seed=st.integers(0, 2**16),
)
def test_random_models_give_the_same_outputs(
    kinds: list[tuple[str, int]], end: str, vectors: list[tuple[str, int]], seed: int
) -> None:
    source, target = built(kinds, end, vectors)
    pm.stirred(source, seed)
    weights = pm.torch_weights(source)
    data = np.random.default_rng(seed).standard_normal((3, 2, 4, 4)).astype(np.float32)
    m = align(source, target)
    pm.load(target, m(weights))
    expected = pm.outputs(source, data)
    given_back = pm.outputs(target, pm.channels_last(data))
    np.testing.assert_allclose(given_back, expected, atol=1e-5 * max(1, np.abs(expected).max()), rtol=1e-5)
    assert pm.bits(m.inverse(pm.keras_weights(target), weights)) == pm.bits(weights)
