"""Settings that change outputs and are no weights: refused or noted where they differ, and only there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import paired_models as pm
import pytest
import torch
from keras import layers, ops
from torch import nn

from fed_learn.adapters.layout import align
from fed_learn.errors import LayoutError, ModelError

Make = Callable[[], Any]


def attention(**more: Any) -> Any:
    return pm.functional((4, 5, 6), lambda x: layers.MultiHeadAttention(2, 3, **more)(x, x))


def lstm(**more: Any) -> Any:
    return pm.sequential((4, 3), layers.LSTM(2, return_sequences=True, **more))


def both_ways(**back: Any) -> Any:
    make = partial(layers.LSTM, 2, return_sequences=True)
    return pm.sequential((4, 3), layers.Bidirectional(make(), backward_layer=make(go_backwards=True, **back)))


def stateful() -> Any:
    return keras.Sequential([keras.Input(batch_shape=(2, 4, 3)), layers.LSTM(2, stateful=True)])


NOT_THE_CHANNELS = "axis is that of the channels and the first, where channels are last"
SETTINGS: dict[str, tuple[Make, Make, str]] = {
    "zeros among the keys": (
        lambda: nn.MultiheadAttention(6, 2, add_zero_attn=True),
        lambda: pm.functional((4, 6), lambda x: layers.MultiHeadAttention(2, 3)(x, x)),
        "add_zero_attn is True and False",
    ),
    "attention along another axis": (
        lambda: nn.MultiheadAttention(6, 2),
        lambda: attention(attention_axes=2),
        r"attention_axes is \(1,\) and \(2,\)",
    ),
    "an embedding that shortens what it looks up": (
        lambda: nn.Embedding(5, 3, max_norm=0.5),
        lambda: pm.functional((4,), layers.Embedding(5, 3), "int32"),
        "max_norm is 0.5 and None",
    ),
    "an embedding that masks": (
        lambda: nn.Embedding(5, 3, padding_idx=0),
        lambda: pm.functional((4,), layers.Embedding(5, 3, mask_zero=True), "int32"),
        "mask_zero is False and True",
    ),
    "the way back": (
        lambda: nn.LSTM(3, 2, bidirectional=True),
        lambda: both_ways(activation="relu"),
        r"activations of the way back is \('tanh', 'sigmoid'\) and \('relu', 'sigmoid'\)",
    ),
    "a state that stays": (lambda: nn.LSTM(3, 2), stateful, "stateful is False and True"),
    "an activation that is a layer": (
        lambda: nn.LSTM(3, 2),
        lambda: lstm(activation=layers.LeakyReLU()),
        r"activations is .* and \('LeakyReLU\(.*negative_slope=0.3.*'sigmoid'\)",
    ),
    "an activation with arguments": (
        lambda: nn.LSTM(3, 2),
        lambda: lstm(activation=partial(keras.activations.leaky_relu, negative_slope=0.1)),
        r"and \('leaky_relu\(negative_slope=0.1\)', 'sigmoid'\)",
    ),
    "an activation of one's own": (
        lambda: nn.LSTM(3, 2),
        lambda: lstm(activation=own_activation),
        r"test_layout_settings.own_activation",
    ),
    "batch norm": (
        lambda: nn.BatchNorm2d(5),
        lambda: pm.sequential((5, 5, 5), pm.batch_norm(axis=1)),
        NOT_THE_CHANNELS,
    ),
    "layer norm": (
        lambda: nn.LayerNorm(5),
        lambda: pm.sequential((5, 5, 5), pm.layer_norm(axis=1)),
        NOT_THE_CHANNELS,
    ),
    "group norm": (
        lambda: nn.GroupNorm(5, 5),
        lambda: pm.sequential((5, 5, 5), layers.GroupNormalization(5, axis=1, epsilon=1e-5)),
        NOT_THE_CHANNELS,
    ),
    "group norm along the width": (
        lambda: nn.GroupNorm(5, 5),
        lambda: pm.sequential((5, 5, 5), layers.GroupNormalization(5, axis=2, epsilon=1e-5)),
        "axis is that of the channels and number 2",
    ),
    "prelu": (
        lambda: nn.PReLU(5),
        lambda: pm.sequential((5, 5, 5), layers.PReLU(shared_axes=[2, 3])),
        NOT_THE_CHANNELS,
    ),
}


def own_activation(x: Any) -> Any:
    return ops.tanh(x)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_refused_or_noted(name: str) -> None:
    make, other, message = SETTINGS[name]
    with pytest.raises(LayoutError, match=f"{message}.*: outputs would differ.*strict=False"):
        align(make(), other())
    assert len(align(make(), other(), strict=False).notes) == 1


ALIKE: dict[str, tuple[Make, Make]] = {
    "an activation by its layer": (lambda: nn.LSTM(3, 2), lambda: lstm(activation=layers.Activation("tanh"))),
    "the axis of vectors": (lambda: nn.BatchNorm1d(3), lambda: pm.sequential((3,), pm.batch_norm(axis=1))),
    "one slope": (lambda: nn.PReLU(1), lambda: pm.sequential((5, 5, 4), layers.PReLU(shared_axes=[1, 2, 3]))),
    "slopes of the channels of one row": (lambda: nn.PReLU(4), lambda: pm.sequential((1, 1, 4), layers.PReLU())),
    "a small number that depends on the dtype": (
        lambda: nn.RMSNorm(6),
        lambda: pm.sequential((4, 6), layers.RMSNormalization(epsilon=float(np.finfo(np.float32).eps))),
    ),
    "both ways": (lambda: nn.LSTM(3, 2, bidirectional=True), both_ways),
}


@pytest.mark.parametrize("name", ALIKE)
def test_settings_that_come_to_the_same_are_no_difference(name: str) -> None:
    make, other = ALIKE[name]
    assert align(make(), other()).notes == ()


def test_the_axis_is_that_of_the_channels_also_where_these_come_first() -> None:
    inputs = keras.Input((3, 8, 6))
    x = layers.Conv2D(4, 3, data_format="channels_first")(inputs)
    right, wrong = (keras.Model(inputs, pm.batch_norm(axis=axis)(x)) for axis in (1, -1))
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert align(source, right).notes == ()
    with pytest.raises(LayoutError, match="axis is that of the channels and the last, where channels are first"):
        align(source, wrong)


def test_activations_without_a_name_of_their_own_go_together_in_keras() -> None:
    for activation in (layers.LeakyReLU(), partial(keras.activations.leaky_relu, negative_slope=0.1), own_activation):
        assert align(lstm(activation=activation), lstm(activation=activation)).notes == ()


def test_the_way_back_of_another_kind_is_refused() -> None:
    back = layers.GRU(2, go_backwards=True, reset_after=False)
    target = pm.sequential((4, 3), layers.Bidirectional(layers.GRU(2), backward_layer=back))
    with pytest.raises(LayoutError, match="one is a gru, the other a gru with reset_after=False"):
        align(nn.GRU(3, 2, bidirectional=True), target)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_module_is_refused_by_name() -> None:
    plain = nn.Sequential(nn.Linear(3, 2))
    whole: Any = torch.jit.script(plain)
    part: Any = nn.Sequential(torch.jit.script(nn.Linear(3, 2)))
    trace: Any = torch.jit.trace
    traced = trace(nn.Linear(3, 2), torch.ones(1, 3))
    for model, place in ((whole, ""), (part, "0"), (traced, "")):
        for pair in ((model, plain), (plain, model)):
            with pytest.raises(ModelError, match=f"model: '{place}' is a scripted module.*made from"):
                align(*pair)
