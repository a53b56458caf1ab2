"""Which layer goes with which; where models do not correspond, the error says at which layer and why."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import paired_models as pm
import pytest
import torch
from keras import layers
from torch import nn

from fed_learn.adapters.layout import align
from fed_learn.errors import LayoutError

Make = Callable[[], Any]


def dense(*parts: Any) -> Any:
    return pm.sequential((3,), *parts)


MISMATCHES: dict[str, tuple[Make, Make, str]] = {
    "another kind": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        lambda: dense(layers.Dense(4), pm.layer_norm(name="norm")),
        r"layer 2: torch layer '1' \(BatchNorm1d: weight \(4,\).* keras layer .*norm' \(LayerNormalization.*"
        "one is a batch norm, the other a layer norm",
    ),
    "another size": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)),
        lambda: dense(layers.Dense(4), layers.Dense(6, name="head")),
        r"layer 2: torch layer '1' \(Linear: weight \(5, 4\), bias \(5,\)\).*head.*"
        "kernel has other sizes: out 5, in 4 and in 4, out 6",
    ),
    "a bias": (
        lambda: nn.Linear(3, 4, bias=False),
        lambda: dense(layers.Dense(4, name="head")),
        "only .*head' has a bias",
    ),
    "a layer more in the source": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)),
        lambda: dense(layers.Dense(4)),
        "layer 2: torch layer '1' .* nothing in the keras model: the torch source has 2 layers .* target 1",
    ),
    "a layer more in the target": (
        lambda: nn.Linear(3, 4),
        lambda: dense(layers.Dense(4), layers.Dense(5, name="head")),
        "layer 2: nothing in the torch model .*head",
    ),
    "groups of a normalization": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)),
        lambda: dense(layers.Dense(4), layers.GroupNormalization(4, epsilon=1e-5)),
        "groups differs: 2 and 4",
    ),
    "groups of a convolution": (
        lambda: nn.Conv2d(4, 4, 3, groups=2),
        lambda: pm.sequential((5, 5, 4), layers.Conv2D(4, 3)),
        "kernel has other sizes: group 2",
    ),
    "heads": (
        lambda: nn.MultiheadAttention(6, 3),
        lambda: pm.functional((4, 6), lambda x: layers.MultiHeadAttention(2, 3)(x, x)),
        "query kernel has other sizes: head 3",
    ),
    "a bias in front of a normalization": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 5, 1)),
        lambda: pm.sequential((5, 5, 4), layers.SeparableConv2D(5, 3, depth_multiplier=2, name="both")),
        r"only '0' has a bias",
    ),
    "reset_after": (
        lambda: nn.GRU(3, 2),
        lambda: pm.sequential((4, 3), layers.GRU(2, reset_after=False)),
        "one is a gru, the other a gru with reset_after=False .torch has only what Keras calls reset_after=True",
    ),
    "directions": (
        lambda: nn.LSTM(3, 2, bidirectional=True),
        lambda: pm.sequential((4, 3), layers.LSTM(2)),
        "bidirectional differs: True and False",
    ),
    "how directions are joined": (
        lambda: nn.LSTM(3, 2, bidirectional=True),
        lambda: pm.sequential((4, 3), layers.Bidirectional(layers.LSTM(2), merge_mode="sum")),
        "merge_mode differs: None and sum",
    ),
    "projections": (
        lambda: nn.LSTM(3, 2, proj_size=1),
        lambda: pm.sequential((4, 3), layers.LSTM(2)),
        "layers of type torch.nn.modules.rnn.LSTM are not known",
    ),
    "attention with a bias of its keys": (
        lambda: nn.MultiheadAttention(6, 2, add_bias_kv=True),
        lambda: pm.functional((4, 6), lambda x: layers.MultiHeadAttention(2, 3)(x, x)),
        "layers of type torch.nn.modules.activation.MultiheadAttention are not known",
    ),
    "an unknown layer": (
        lambda: nn.Sequential(nn.Bilinear(3, 3, 2)),
        lambda: dense(layers.Dense(2)),
        "torch layer '0' .*layers of type torch.nn.modules.linear.Bilinear are not known here",
    ),
    "a parametrized layer": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        lambda: dense(layers.Dense(4)),
        r"torch layer '' \(torch.nn.utils.parametrize.ParametrizedLinear.* not known here",
    ),
    "another dtype": (
        lambda: nn.Linear(3, 4).double(),
        lambda: dense(layers.Dense(4)),
        "dtypes differ: float64 and float32; convert one",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_mismatch_names_the_layer_and_says_why(name: str) -> None:
    make, other, message = MISMATCHES[name]
    source, target = make(), other()
    for one, two in ((source, target), (target, source)):
        with pytest.raises(LayoutError) as caught:
            align(one, two)
        assert caught.value.reason
        if one is source:
            caught.match(message)
            assert caught.value.source_layer is not None or name == "a layer more in the target"


SETTINGS: dict[str, tuple[Make, Make, str]] = {
    "epsilon": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        lambda: dense(layers.Dense(4), layers.BatchNormalization(name="norm")),
        "epsilon is 1e-05 and 0.001",
    ),
    "strides": (
        lambda: nn.Conv2d(4, 4, 3, stride=2),
        lambda: pm.sequential((5, 5, 4), layers.Conv2D(4, 3)),
        r"strides is \(2, 2\) and \(1, 1\)",
    ),
    "activations": (
        lambda: nn.LSTM(3, 2),
        lambda: pm.sequential((4, 3), layers.LSTM(2, activation="relu")),
        r"activations is \('tanh', 'sigmoid'\) and \('relu', 'sigmoid'\)",
    ),
    "direction": (
        lambda: nn.LSTM(3, 2),
        lambda: pm.sequential((4, 3), layers.LSTM(2, go_backwards=True)),
        "backwards is False and True",
    ),
    "statistics": (
        lambda: nn.BatchNorm1d(3, track_running_stats=False),
        lambda: dense(pm.batch_norm()),
        "only .* has a running mean and variance",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_outputs_are_refused_or_noted(name: str) -> None:
    make, other, message = SETTINGS[name]
    source, target = make(), other()
    with pytest.raises(LayoutError, match=f"{message}: outputs would differ.*strict=False"):
        align(source, target)
    m = align(source, target, strict=False)
    assert len(m.notes) == 1
    assert re.search(message, m.notes[0])
    assert m.notes[0] in str(m)
    weights = pm.torch_weights(source)
    assert pm.bits(m.inverse(m(weights, pm.keras_weights(target)), weights)) == pm.bits(weights)


def test_statistics_of_one_side_come_from_base() -> None:
    source, target = nn.BatchNorm1d(3, track_running_stats=False), dense(pm.batch_norm(name="norm"))
    m = align(source, target, strict=False)
    base = {path: array + 4 for path, array in pm.keras_weights(target).items()}
    mapped = m(pm.torch_weights(source), base)
    assert [path.rsplit("/", 1)[1] for path in m.from_base] == ["moving_mean", "moving_variance"]
    assert [mapped[path].tolist() for path in m.from_base] == [[4, 4, 4], [5, 5, 5]]
    assert [path.rsplit("/", 1)[1] for path in m(pm.torch_weights(source))] == ["gamma", "beta"]


# Order.


def twins() -> tuple[Any, Any]:
    """Two dense layers of one shape in parallel, and a third; in Keras the other two first, and in another order."""
    source = pm.Call(
        lambda m, x: m.out(m.left(x) - 2 * m.right(x)) + m.side(x),
        left=nn.Linear(3, 4),
        right=nn.Linear(3, 4),
        out=nn.Linear(4, 2),
        side=nn.Linear(3, 2),
    )

    def function(x: Any) -> Any:
        side = layers.Dense(2, name="aside")(x)
        right, left = layers.Dense(4, name="second")(x), layers.Dense(4, name="first")(x)
        return layers.Add()([side, layers.Dense(2, name="last")(layers.Subtract()([left, right * 2.0]))])

    return pm.stirred(source), pm.functional((3,), function)


def test_layers_of_one_shape_in_another_order_are_not_guessed_and_can_be_pinned() -> None:
    source, target = twins()
    with pytest.raises(LayoutError, match=r"'left', 'right' of .*shapes do not tell which.*pairs=") as caught:
        align(source, target)
    assert caught.value.source_layer == "left"
    m = align(source, target, pairs={"left": "first", "right": "second"})
    assert dict(m.layers) == {"left": "first", "right": "second", "out": "last", "side": "aside"}
    pm.load(target, m(pm.torch_weights(source)))
    data = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    np.testing.assert_allclose(pm.outputs(target, data), pm.outputs(source, data), atol=1e-5)


def test_a_shortcut_in_another_place_is_found_by_its_shape_with_its_normalization() -> None:
    m = align(pm.torch_residual(), pm.keras_residual())
    found = dict(m.layers)
    assert [found[name] for name in ("conv1", "norm1", "conv2", "norm2", "shortcut", "norm3")] == [
        "conv_a", "norm_a", "conv_b", "norm_b", "conv_s", "norm_s",
    ]  # fmt: skip


def test_pairs_are_checked_and_must_exist() -> None:
    source, target = twins()
    with pytest.raises(LayoutError, match=r"'left' .*does not correspond to .*'last'.*kernel has other sizes"):
        align(source, target, pairs={"left": "last"})
    with pytest.raises(LayoutError, match=r"the source has 0 layers 'centre' .*it has 'left', 'right', 'out', 'side'"):
        align(source, target, pairs={"centre": "first"})
    with pytest.raises(LayoutError, match="the target has 0 layers 'centre'"):
        align(source, target, pairs={"left": "centre"})
    with pytest.raises(LayoutError, match="pinned twice"):
        align(source, target, pairs={"left": "first", "right": "first"})


def test_layers_go_by_name_where_all_names_agree() -> None:
    source = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    target = pm.functional((3,), lambda x: layers.Dense(3, name="a")(layers.Dense(3, name="b")(x)))
    assert dict(align(source, target).layers) == {"a": "a", "b": "b"}


def test_keras_models_whose_automatic_names_differ_go_together() -> None:
    one, other = pm.keras_conv_net(), pm.keras_conv_net()
    assert not {v.path for v in one.weights} & {v.path for v in other.weights}
    mapped = align(one, other)(pm.keras_weights(one))
    assert [a.tobytes() for a in mapped.values()] == [a.tobytes() for a in pm.keras_weights(one).values()]


def test_a_sequential_keras_model_and_a_functional_and_a_nested_one_go_together() -> None:
    sizes = (4, 4, 4)
    torch_model = pm.stirred(nn.Sequential(*(nn.Linear(a, b) for a, b in zip((3, *sizes), sizes, strict=False))))
    inner = pm.functional((4,), lambda x: layers.Dense(4)(x))
    nested = pm.functional((3,), lambda x: layers.Dense(4)(inner(layers.Dense(4)(x))))
    deferred = keras.Sequential([layers.Dense(4) for _ in sizes])
    data = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    deferred(data)
    for target in (nested, deferred, dense(*(layers.Dense(4) for _ in sizes))):
        pm.load(target, align(torch_model, target)(pm.torch_weights(torch_model)))
        np.testing.assert_allclose(pm.outputs(target, data), pm.outputs(torch_model, data), atol=1e-5)


def test_a_deep_model_is_no_problem() -> None:
    def function(x: Any) -> Any:
        for _ in range(300):
            x = layers.ReLU()(x)
        return layers.Dense(2)(x)

    assert len(align(nn.Linear(3, 2), pm.functional((3,), function)).layers) == 1


# Layers of one's own.


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0]]))
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Any) -> Any:
        return self.inner(x * self.factor)


class KerasScale(layers.Layer):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="scaled")
        self.inner = layers.Dense(2, name="inside")

    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(1, shape[-1]), name="factor")
        self.inner.build(shape)

    def call(self, x: Any) -> Any:
        return self.inner(x * self.factor)


def test_an_own_layer_goes_to_its_own_class_or_to_what_it_is_pinned_to() -> None:
    source, target = nn.Sequential(Scale()), pm.functional((3,), lambda x: KerasScale()(x))
    with pytest.raises(LayoutError, match="their classes are not known here"):
        align(source, target)
    pm.load(target, align(source, target, pairs={"0": "scaled"})(pm.torch_weights(source)))
    data = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    np.testing.assert_allclose(pm.outputs(target, data), pm.outputs(source, data), atol=1e-6)
    assert dict(align(source, Scale()).layers) == {"0": "", "0.inner": "inner"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when its compiler is loaded
def test_a_compiled_and_a_parallel_module_are_seen_through() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    compiled: Any = torch.compile(plain[0])
    part = nn.Sequential(compiled, plain[1])
    target = dense(layers.Dense(4), layers.Dense(2))
    expected = align(plain, target)(pm.torch_weights(plain))
    for model in (torch.compile(plain), nn.DataParallel(plain), part):
        assert pm.bits(align(model, target)(pm.torch_weights(plain))) == pm.bits(expected)
