"""Padding in all its words: where a map is made without a note, both models give the same outputs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import paired_models as pm
import pytest
from keras import layers, ops
from torch import nn

from fed_learn.adapters.layout import LayoutMap, align
from fed_learn.errors import LayoutError

Make = Callable[[], Any]


def outputs_agree(m: LayoutMap, source: Any, target: Any, shape: tuple[int, ...]) -> bool:
    """Whether the two models give the same on random data, once the target has the source's weights."""
    data = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
    pm.load(target, m(pm.torch_weights(pm.stirred(source)), pm.keras_weights(target)))
    expected = np.moveaxis(pm.outputs(source, np.ascontiguousarray(np.moveaxis(data, -1, 1))), 1, -1)
    given = pm.outputs(target, data)
    assert np.abs(expected).max() > 0.1
    return given.shape == expected.shape and np.allclose(given, expected, atol=1e-5, rtol=1e-5)


def torch_conv(size: int = 3, **more: Any) -> Any:
    return nn.Conv2d(3, 4, size, **more)


def conv(shape: Any, *before: Any, size: int = 3, **more: Any) -> Any:
    return pm.sequential((*shape, 3), *before, layers.Conv2D(4, size, **more))


def padded(widths: Any, mode: str = "constant") -> Any:
    return pm.functional((8, 8, 3), lambda x: layers.Conv2D(4, 3)(ops.pad(x, ((0, 0), *widths, (0, 0)), mode=mode)))


class Widened(nn.Conv2d):
    """Pads in code of its own, as "same" does on maps of an even size."""

    def forward(self, input: Any) -> Any:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


SAME: dict[str, tuple[Make, Make, tuple[int, ...]]] = {
    "the first layer of a ResNet": (
        lambda: torch_conv(7, stride=2, padding=3),
        lambda: conv((15, 14), layers.ZeroPadding2D(3), size=7, strides=2),
        (15, 14, 3),
    ),
    "zeros on one side only": (
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), torch_conv(stride=2)),
        lambda: conv((8, 8), layers.ZeroPadding2D(((0, 1), (0, 1))), strides=2),
        (8, 8, 3),
    ),
    "zeros on one side and same with strides on even sizes": (
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), torch_conv(stride=2)),
        lambda: conv((8, 6), strides=2, padding="same"),
        (8, 6, 3),
    ),
    "same with strides on odd sizes": (
        lambda: torch_conv(stride=2, padding=1),
        lambda: conv((7, 9), strides=2, padding="same"),
        (7, 9, 3),
    ),
    "same with strides and a kernel of one": (
        lambda: torch_conv(1, stride=2),
        lambda: conv((None, None), size=1, strides=2, padding="same"),
        (8, 9, 3),
    ),
    "same with dilation and an even kernel": (
        lambda: torch_conv(4, padding="same", dilation=3),
        lambda: conv((14, 13), size=4, dilation_rate=3, padding="same"),
        (14, 13, 3),
    ),
    "sides in another order": (
        lambda: nn.Sequential(nn.ConstantPad2d((0, 1, 2, 3), 0.0), torch_conv()),
        lambda: conv((8, 8), layers.ZeroPadding2D(((2, 3), (0, 1)))),
        (8, 8, 3),
    ),
    "a layer that pads, and padding": (
        lambda: nn.Sequential(nn.ZeroPad2d(1), torch_conv(padding=1)),
        lambda: conv((8, 8), layers.ZeroPadding2D(2)),
        (8, 8, 3),
    ),
    "causal": (
        lambda: nn.Sequential(nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(3, 4, 3, dilation=2)),
        lambda: pm.sequential((8, 3), layers.Conv1D(4, 3, dilation_rate=2, padding="causal")),
        (8, 3),
    ),
    "one dimension": (
        lambda: nn.Conv1d(3, 4, 3, padding=2),
        lambda: pm.sequential((8, 3), layers.ZeroPadding1D(2), layers.Conv1D(4, 3)),
        (8, 3),
    ),
    "three dimensions": (
        lambda: nn.Sequential(nn.ConstantPad3d((0, 1, 2, 3, 1, 1), 0.0), nn.Conv3d(3, 4, 3)),
        lambda: pm.sequential((8, 7, 6, 3), layers.ZeroPadding3D(((1, 1), (2, 3), (0, 1))), layers.Conv3D(4, 3)),
        (8, 7, 6, 3),
    ),
    "a depthwise convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, stride=2, padding=1, groups=3, bias=False), nn.Conv2d(3, 4, 1)),
        lambda: pm.sequential((8, 8, 3), layers.ZeroPadding2D(1), layers.SeparableConv2D(4, 3, strides=2)),
        (8, 8, 3),
    ),
    "reflection": (
        lambda: torch_conv(padding=2, padding_mode="reflect"),
        lambda: padded(((2, 2), (2, 2)), "reflect"),
        (8, 8, 3),
    ),
    "a layer that reflects": (
        lambda: nn.Sequential(nn.ReflectionPad2d((1, 2, 0, 1)), torch_conv()),
        lambda: padded(((0, 1), (1, 2)), "reflect"),
        (8, 8, 3),
    ),
    "zeros by an operation": (lambda: torch_conv(padding=2), lambda: padded(((2, 2), (2, 2))), (8, 8, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", SAME)
def test_padding_in_other_words_is_the_same(name: str) -> None:
    make, other, shape = SAME[name]
    source, target = make(), other()
    m = align(source, target)
    assert m.notes == ()
    assert outputs_agree(m, source, target, shape)


OTHER: dict[str, tuple[Make, Make, str]] = {
    "same with strides on even sizes": (
        lambda: torch_conv(stride=2, padding=1),
        lambda: conv((8, 8), strides=2, padding="same"),
        r"padding is 1 and 'same', here \(0, 1\)",
    ),
    "same with strides on sizes that are not known": (
        lambda: torch_conv(stride=2, padding=1),
        lambda: conv((None, None), strides=2, padding="same"),
        "padding is 1 and 'same', whose zeros depend on the size of the map",
    ),
    "none": (lambda: torch_conv(padding=1), lambda: conv((8, 8)), "padding is 1 and none"),
    "two axes": (
        lambda: torch_conv(padding=(1, 2)),
        lambda: conv((8, 8), layers.ZeroPadding2D((2, 1))),
        r"padding is 1 by 2 and 2 by 1 \(with '.*zero_padding2d.*'\)",
    ),
    "reflection": (
        lambda: torch_conv(padding=1, padding_mode="reflect"),
        lambda: conv((8, 8), padding="same"),
        "padding is reflect 1 and 1",
    ),
    "a ring of what is opposite": (
        lambda: torch_conv(padding=1, padding_mode="circular"),
        lambda: conv((8, 8), padding="same"),
        "padding is circular 1 and 1",
    ),
    "ones": (
        lambda: nn.Sequential(nn.ConstantPad2d(1, 1.0), torch_conv()),
        lambda: conv((8, 8), layers.ZeroPadding2D(1)),
        r"padding is constant 1.0 1 \(with '0'\) and 1",
    ),
    "causal": (
        lambda: nn.Conv1d(3, 4, 3, padding=1),
        lambda: pm.sequential((8, 3), layers.Conv1D(4, 3, padding="causal")),
        r"padding is 1 and \(2, 0\)",
    ),
    "a depthwise convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, stride=2, padding=1, groups=3, bias=False), nn.Conv2d(3, 4, 1)),
        lambda: pm.sequential((8, 8, 3), layers.SeparableConv2D(4, 3, strides=2, padding="same")),
        r"\(depthwise\)': padding is 1 and 'same'",
    ),
    "a pool between": (
        lambda: nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(2, 1), torch_conv()),
        lambda: conv((8, 8), layers.ZeroPadding2D(1)),
        "padding is none and 1",
    ),
    "rows that are cut off": (
        lambda: nn.Sequential(nn.ZeroPad2d(-1), torch_conv(padding=1)),
        lambda: conv((8, 8)),
        "padding is 1 and none",
    ),
    "a convolution that is called twice": (
        lambda: nn.Conv2d(3, 3, 3),
        lambda: called_twice(layers.Conv2D(3, 3)),
        r"padding is none and another each time: none, 1 \(with",
    ),
    "a transposed convolution": (
        lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
        lambda: pm.sequential((8, 8, 3), layers.Conv2DTranspose(4, 3, strides=2, padding="same")),
        r"cut off is \(\(1, 0\), \(1, 0\)\) and \(\(0, 1\), \(0, 1\)\)",
    ),
}


def called_twice(layer: Any) -> Any:
    return pm.functional((8, 8, 3), lambda x: layer(layers.ZeroPadding2D(1)(layer(x))))


@pytest.mark.parametrize("name", OTHER)
def test_other_padding_is_refused_or_noted(name: str) -> None:
    make, other, message = OTHER[name]
    source, target = make(), other()
    shape = (8, 3) if "causal" in name else (8, 8, 3)
    with pytest.raises(LayoutError, match=f"{message}.*: outputs would differ.*strict=False") as caught:
        align(source, target)
    assert caught.value.source_layer is not None
    m = align(source, target, strict=False)
    assert len([note for note in m.notes if "padding is" in note or "cut off" in note]) == 1
    assert not outputs_agree(m, source, target, shape)


def test_a_convolution_takes_the_same_padding_exactly_where_outputs_agree() -> None:
    agreed = 0
    for size, stride, length in [(k, s, n) for k in (1, 2, 3, 4) for s in (1, 2, 3) for n in (6, 7)]:
        for padding in ("valid", "same"):
            target = conv((length, length), size=size, strides=stride, padding=padding)
            for width in (0, 1, 2):
                source = torch_conv(size, stride=stride, padding=width)
                m = align(source, target, strict=False)
                agree = outputs_agree(m, source, target, (length, length, 3))
                assert (m.notes == ()) == agree, (size, stride, length, padding, width, m.notes)
                agreed += agree
    assert agreed > 30


def test_a_transposed_convolution_cuts_off_the_same_exactly_where_outputs_agree() -> None:
    agreed = 0
    for size, stride in [(k, s) for k in (1, 2, 3, 4) for s in (1, 2, 3)]:
        for padding, behind in [("valid", None), ("same", None), *([("valid", 1), ("same", 1)] if stride > 1 else [])]:
            layer = layers.Conv2DTranspose(4, size, strides=stride, padding=padding, output_padding=behind)
            target = pm.sequential((4, 4, 3), layer)
            for width, more in [(w, b) for w in (0, 1) for b in range(min(stride, 2))]:
                source = nn.ConvTranspose2d(3, 4, size, stride=stride, padding=width, output_padding=more)
                m = align(source, target, strict=False)
                agree = outputs_agree(m, source, target, (4, 4, 3))
                assert (m.notes == ()) == agree, (size, stride, padding, behind, width, more, m.notes)
                agreed += agree
    assert agreed > 10


def test_same_is_the_same_in_keras_whatever_the_size() -> None:
    models = [conv(shape, strides=2, padding="same") for shape in ((None, None), (8, 8), (7, 7))]
    assert all(align(one, other).notes == () for one in models for other in models)


def test_a_layer_that_pads_where_code_calls_it_is_a_note() -> None:
    target = conv((8, 8), layers.ZeroPadding2D(1))
    for order in (("pad", "conv"), ("conv", "pad")):
        children = {"pad": nn.ZeroPad2d(1), "conv": torch_conv()}
        source = pm.Call(lambda net, x: net.conv(net.pad(x)), **{name: children[name] for name in order})
        m = align(source, target)
        assert len(m.notes) == 1
        assert "padding is none and 1" in m.notes[0]
        assert "comes to the same if 'pad' is called right before: that is not seen" in m.notes[0]
        assert outputs_agree(m, source, target, (8, 8, 3))
    wider = pm.Call(lambda net, x: net.conv(net.pad(x)), pad=nn.ZeroPad2d(2), conv=torch_conv())
    with pytest.raises(LayoutError, match=r"'conv' and .*padding is none and 1"):
        align(wider, target)
    unused = pm.Call(lambda net, x: net.conv(x), pad=nn.ZeroPad2d(1), conv=torch_conv(padding=1))
    m = align(unused, target)
    assert ["'pad' pads, but not right before a convolution" in note for note in m.notes] == [True]
    assert outputs_agree(m, unused, target, (8, 8, 3))


def test_a_layer_that_pads_for_a_pool_is_a_note() -> None:
    source = nn.Sequential(torch_conv(), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    after = [layers.ZeroPadding2D(1, name="ring"), layers.MaxPooling2D(3, 2)]
    target = pm.sequential((8, 8, 3), layers.Conv2D(4, 3, activation="relu"), *after)
    m = align(source, target)
    assert len(m.notes) == 1
    assert "ring' pads, but not right before a convolution that is seen" in m.notes[0]
    assert outputs_agree(m, source, target, (8, 8, 3))
    assert align(source, source).notes == align(target, target).notes == ()


def test_padding_of_a_convolution_with_code_of_its_own_is_not_compared() -> None:
    source, target = nn.Sequential(Widened(3, 4, 3, stride=2)), conv((8, 8), strides=2, padding="same")
    m = align(source, target)
    assert len(m.notes) == 1
    assert "Widened has code of its own: padding is not compared" in m.notes[0]
    assert outputs_agree(m, source, target, (8, 8, 3))


def test_a_residual_network_of_strides_and_paddings_goes_together() -> None:
    source, target = pm.torch_strided_residual(), pm.keras_strided_residual()
    m = align(source, target)
    assert [note for note in m.notes if "pool_pad" not in note] == []
    images = np.random.default_rng(2).standard_normal((2, 33, 30, 3)).astype(np.float32)
    pm.load(target, m(pm.torch_weights(pm.stirred(source))))
    expected = pm.outputs(source, np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(pm.outputs(target, images), expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-5)
