"""Each kind of layer through a layout map: the same outputs, and the same bits on the way back."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import paired_models as pm
import pytest
import torch
from keras import layers, ops
from torch import nn

from fed_learn.adapters.layout import align


class Case(NamedTuple):
    torch: Callable[[], Any]
    keras: Callable[[], Any]
    shape: tuple[int, ...]
    """What one example looks like to Keras."""
    maps: bool = False
    """Feature maps: torch has their channels first."""


def conv(rank: int, **more: Any) -> Any:
    return getattr(nn, f"Conv{rank}d")(4, 6, 3, **more)


def keras_conv(rank: int, *args: Any, **more: Any) -> Any:
    return getattr(layers, f"Conv{rank}D")(*(args or (6, 3)), **more)


def recurrent(kind: str, **more: Any) -> Any:
    return pm.Call(lambda net, x: net.layer(x)[0], layer=getattr(nn, kind)(5, 3, batch_first=True, **more))


def attention(**more: Any) -> Any:
    net = nn.MultiheadAttention(6, 2, batch_first=True, **more)
    return pm.Call(lambda model, x: model.attention(x, x, x)[0], attention=net)


def keras_attention(**more: Any) -> Any:
    return pm.functional((4, 6), lambda x: layers.MultiHeadAttention(2, 3, **more)(x, x))


def cross_attention() -> Any:
    net = nn.MultiheadAttention(6, 2, kdim=4, vdim=5, batch_first=True)
    return pm.Call(lambda m, x: m.attention(x, x[..., :4], x[..., 1:])[0], attention=net)


def keras_cross_attention() -> Any:
    return pm.functional((4, 6), lambda x: layers.MultiHeadAttention(2, 3)(x, value=x[..., 1:], key=x[..., :4]))


def decoder_layer(norm_first: bool) -> Any:
    net = nn.TransformerDecoderLayer(6, 2, 7, batch_first=True, norm_first=norm_first)
    return pm.Call(lambda model, x: model.layer(x, x.flip(1)), layer=net)


def keras_decoder_layer(norm_first: bool) -> Any:
    def function(x: Any) -> Any:
        memory = ops.flip(x, axis=1)
        mine, theirs = layers.MultiHeadAttention(2, 3), layers.MultiHeadAttention(2, 3)
        norms = [pm.layer_norm() for _ in range(3)]
        inner, outer = layers.Dense(7, activation="relu"), layers.Dense(6)
        if norm_first:
            y = norms[0](x)
            x = x + mine(y, y)
            x = x + theirs(norms[1](x), memory)
            return x + outer(inner(norms[2](x)))
        x = norms[0](x + mine(x, x))
        x = norms[1](x + theirs(x, memory))
        return norms[2](x + outer(inner(x)))

    return pm.functional((4, 6), function)


def one(layer: Callable[[], Any], shape: tuple[int, ...]) -> Callable[[], Any]:
    return lambda: pm.sequential(shape, layer())


IMAGE, SIGNAL, VOLUME = (7, 6, 4), (9, 4), (5, 6, 7, 4)
SHAPES = {1: SIGNAL, 2: IMAGE, 3: VOLUME}
CASES: dict[str, Case] = {
    "dense": Case(lambda: nn.Linear(3, 5), one(lambda: layers.Dense(5), (3,)), (3,)),
    "dense without bias": Case(
        lambda: nn.Linear(3, 5, bias=False), one(lambda: layers.Dense(5, use_bias=False), (3,)), (3,)
    ),
    "dense on sequences": Case(lambda: nn.Linear(3, 5), one(lambda: layers.Dense(5), (4, 3)), (4, 3)),
    **{
        f"convolution {n}d": Case(
            partial(conv, n),
            one(partial(keras_conv, n), SHAPES[n]),
            SHAPES[n],
            True,
        )
        for n in (1, 2, 3)
    },
    "convolution with strides and dilation": Case(
        lambda: nn.Sequential(conv(2, stride=2), nn.Conv2d(6, 3, 2, dilation=2)),
        lambda: pm.sequential((17, 18, 4), keras_conv(2, strides=2), layers.Conv2D(3, 2, dilation_rate=2)),
        (17, 18, 4),
        True,
    ),
    "grouped convolution": Case(lambda: conv(2, groups=2), one(lambda: keras_conv(2, groups=2), IMAGE), IMAGE, True),
    "depthwise convolution 1d": Case(
        lambda: nn.Conv1d(4, 4, 3, groups=4), one(lambda: layers.DepthwiseConv1D(3), SIGNAL), SIGNAL, True
    ),
    "depthwise convolution 2d": Case(
        lambda: nn.Conv2d(4, 12, (3, 2), groups=4),
        one(lambda: layers.DepthwiseConv2D((3, 2), depth_multiplier=3), IMAGE),
        IMAGE,
        True,
    ),
    "depthwise convolution as a grouped one": Case(
        lambda: nn.Conv2d(4, 8, 3, groups=4), one(lambda: keras_conv(2, 8, 3, groups=4), IMAGE), IMAGE, True
    ),
    "separable convolution 1d": Case(
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3, groups=4, bias=False), nn.Conv1d(8, 5, 1)),
        one(lambda: layers.SeparableConv1D(5, 3, depth_multiplier=2), SIGNAL),
        SIGNAL,
        True,
    ),
    "separable convolution 2d": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.Conv2d(8, 5, 1)),
        one(lambda: layers.SeparableConv2D(5, 3, depth_multiplier=2), IMAGE),
        IMAGE,
        True,
    ),
    **{
        f"transposed convolution {n}d": Case(
            partial(getattr(nn, f"ConvTranspose{n}d"), 4, 6, 3, stride=2),
            one(partial(getattr(layers, f"Conv{n}DTranspose"), 6, 3, strides=2), SHAPES[n]),
            SHAPES[n],
            True,
        )
        for n in (1, 2, 3)
    },
    "batch norm of vectors": Case(lambda: nn.BatchNorm1d(4), one(pm.batch_norm, (4,)), (4,)),
    "batch norm 2d": Case(lambda: nn.BatchNorm2d(4), one(pm.batch_norm, IMAGE), IMAGE, True),
    "batch norm 3d": Case(lambda: nn.BatchNorm3d(4), one(pm.batch_norm, VOLUME), VOLUME, True),
    "batch norm without scale": Case(
        lambda: nn.BatchNorm2d(4, affine=False),
        one(lambda: pm.batch_norm(center=False, scale=False), IMAGE),
        IMAGE,
        True,
    ),
    "layer norm": Case(lambda: nn.LayerNorm(6), one(pm.layer_norm, (4, 6)), (4, 6)),
    "layer norm without offset": Case(
        lambda: nn.LayerNorm(6, bias=False), one(lambda: pm.layer_norm(center=False), (4, 6)), (4, 6)
    ),
    "rms norm": Case(
        lambda: nn.RMSNorm(6, eps=1e-5), one(lambda: layers.RMSNormalization(epsilon=1e-5), (4, 6)), (4, 6)
    ),
    "group norm": Case(
        lambda: nn.GroupNorm(2, 4), one(lambda: layers.GroupNormalization(2, epsilon=1e-5), IMAGE), IMAGE, True
    ),
    "instance norm": Case(
        lambda: nn.InstanceNorm2d(4, affine=True),
        one(lambda: layers.GroupNormalization(-1, epsilon=1e-5), IMAGE),
        IMAGE,
        True,
    ),
    "prelu": Case(lambda: nn.PReLU(4), one(lambda: layers.PReLU(shared_axes=[1, 2]), IMAGE), IMAGE, True),
    "attention": Case(attention, keras_attention, (4, 6)),
    "attention without bias": Case(lambda: attention(bias=False), lambda: keras_attention(use_bias=False), (4, 6)),
    "attention to others": Case(cross_attention, keras_cross_attention, (4, 6)),
    "decoder layer": Case(lambda: decoder_layer(False), lambda: keras_decoder_layer(False), (4, 6)),
    "decoder layer, norm first": Case(lambda: decoder_layer(True), lambda: keras_decoder_layer(True), (4, 6)),
    **{
        f"{kind}{name}": Case(
            partial(recurrent, kind, **more),
            one(partial(getattr(layers, keras), 3, use_bias=not more, return_sequences=True), (4, 5)),
            (4, 5),
        )
        for kind, keras in (("LSTM", "LSTM"), ("GRU", "GRU"), ("RNN", "SimpleRNN"))
        for name, more in (("", {}), (" without bias", {"bias": False}))
    },
    "RNN with relu": Case(
        lambda: recurrent("RNN", nonlinearity="relu"),
        one(lambda: layers.SimpleRNN(3, activation="relu", return_sequences=True), (4, 5)),
        (4, 5),
    ),
    "bidirectional": Case(
        lambda: recurrent("GRU", bidirectional=True),
        one(lambda: layers.Bidirectional(layers.GRU(3, return_sequences=True)), (4, 5)),
        (4, 5),
    ),
    "stacked cells": Case(
        lambda: recurrent("LSTM", num_layers=2),
        one(lambda: layers.RNN([layers.LSTMCell(3), layers.LSTMCell(3)], return_sequences=True), (4, 5)),
        (4, 5),
    ),
    "time distributed": Case(
        lambda: nn.Linear(3, 5), one(lambda: layers.TimeDistributed(layers.Dense(5)), (4, 3)), (4, 3)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_both_frameworks_give_the_same_outputs_and_the_way_back_the_same_bits(name: str) -> None:
    case = CASES[name]
    source, target = pm.stirred(case.torch()), case.keras()
    data = np.random.default_rng(1).standard_normal((3, *case.shape)).astype(np.float32)
    expected = pm.outputs(source, np.ascontiguousarray(np.moveaxis(data, -1, 1)) if case.maps else data)
    expected = pm.channels_last(expected) if case.maps else expected
    before = pm.torch_weights(source)
    m = align(source, target)
    mapped = m(before)
    assert list(mapped) == [variable.path for variable in target.weights]
    pm.load(target, mapped)
    given = pm.outputs(target, data)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(given, expected, atol=1e-5, rtol=1e-5)
    back = m.inverse(pm.keras_weights(target), before)
    assert pm.bits(back) == pm.bits(before)
    again = align(target, source)(mapped, before)
    assert pm.bits(again) == pm.bits(before)


def test_an_embedding_looks_up_the_same_rows() -> None:
    source = pm.stirred(nn.Embedding(11, 3))
    target = pm.functional((4,), layers.Embedding(11, 3), "int32")
    pm.load(target, align(source, target)(pm.torch_weights(source)))
    numbers = np.random.default_rng(0).integers(0, 11, (5, 4))
    assert np.array_equal(pm.outputs(target, numbers), pm.outputs(source, numbers))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_a_cell_is_a_layer_of_one_direction(cell: str) -> None:
    source, target = pm.stirred(getattr(nn, f"{cell}Cell")(5, 3)), getattr(nn, cell)(5, 3)
    pm.load(target, align(source, target)(pm.torch_weights(source)))
    data = torch.randn(1, 5)
    first = source(data)
    first = first[0] if isinstance(first, tuple) else first
    assert torch.allclose(target(data)[0], first, atol=1e-6)


def test_a_transposed_convolution_of_groups_goes_from_torch_to_torch() -> None:
    source, target = nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
    assert np.array_equal(align(source, target)(pm.torch_weights(source))["0.weight"], source.weight.detach().numpy())


def test_a_normalization_of_several_axes_goes_only_within_a_framework() -> None:
    source = pm.stirred(nn.LayerNorm([4, 3]))
    target = nn.Sequential(nn.LayerNorm([4, 3]))
    assert np.array_equal(align(source, target)(pm.torch_weights(source))["0.bias"], source.bias.detach().numpy())
    with pytest.raises(ValueError, match="axes differs: several, as torch has them and several, as Keras has them"):
        align(source, pm.sequential((4, 3), pm.layer_norm(axis=[1, 2])))
