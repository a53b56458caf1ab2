"""The order of features where a map is flattened, or features are folded into a map; and that it is not guessed."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import paired_models as pm
import pytest
import torch
from keras import layers, ops
from torch import nn

from fed_learn.adapters.layout import align
from fed_learn.errors import LayoutError

RNG = np.random.default_rng(3)
COLOURS = RNG.standard_normal((5, 3, 8, 6)).astype(np.float32)
"""Images with their channels first."""


def check(source: Any, target: Any, mine: Any, theirs: Any, **how: Any) -> None:
    """The outputs agree, and the way back gives the same bits."""
    pm.stirred(source)
    pm.outputs(target, theirs[:1])
    m = align(source, target, **how)
    weights = pm.torch_weights(source)
    pm.load(target, m(weights))
    expected = pm.outputs(source, mine)
    assert np.abs(expected).max() > 0.1
    given = pm.outputs(target, theirs)
    given = np.moveaxis(given, -1, 1) if given.ndim > 2 and given.shape != expected.shape else given
    np.testing.assert_allclose(given, expected, atol=2e-5, rtol=2e-5)
    assert pm.bits(m.inverse(pm.keras_weights(target), weights)) == pm.bits(weights)


def torch_flat(*between: Any, flatten: bool = True) -> Any:
    """Convolution, flatten, what is between, dense."""
    net = nn.Sequential(*between)
    start = nn.Flatten() if flatten else nn.Identity()
    return pm.Call(
        lambda m, x: m.head(m.net(torch.flatten(m.start(m.conv(x)), 1))),
        conv=nn.Conv2d(3, 4, 3),
        start=start,
        net=net,
        head=nn.Linear(4 * 6 * 4, 2),
    )


def keras_flat(*between: Any) -> Any:
    return pm.sequential((8, 6, 3), layers.Conv2D(4, 3), layers.Flatten(), *between, layers.Dense(2))


def slope() -> Any:
    return layers.PReLU()


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ((), ()),
        ((nn.Dropout(0.5),), (layers.Dropout, 0.5)),
        ((nn.BatchNorm1d(96),), (pm.batch_norm,)),
        ((nn.LayerNorm(96), nn.PReLU(96)), (pm.layer_norm, slope)),
    ],
    ids=["nothing", "dropout", "batch norm", "layer norm and prelu"],
)
def test_what_follows_a_flattened_map_is_permuted(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    between = [layers.Dropout(0.5)] if layers.Dropout in theirs else [make() for make in theirs]
    check(torch_flat(*mine), keras_flat(*between), COLOURS, pm.channels_last(COLOURS))


@pytest.mark.parametrize("rank", [1, 3])
def test_maps_of_one_and_three_dimensions_are_permuted(rank: int) -> None:
    shape = (6, 5, 4)[:rank]
    data = RNG.standard_normal((3, 2, *shape)).astype(np.float32)
    size = 3 * int(np.prod([n - 1 for n in shape]))
    source = nn.Sequential(getattr(nn, f"Conv{rank}d")(2, 3, 2), nn.Flatten(), nn.Linear(size, 4))
    conv = getattr(layers, f"Conv{rank}D")(3, 2)
    target = pm.sequential((*shape, 2), conv, layers.Flatten(), layers.Dense(4))
    check(source, target, data, pm.channels_last(data))


def test_channels_in_front_need_no_permutation_but_where_keras_flatten_moves_them() -> None:
    source = torch_flat()
    for flatten, permuted in (("channels_last", False), ("channels_first", True)):
        inputs = keras.Input((3, 8, 6))
        x = layers.Conv2D(4, 3, data_format="channels_first")(inputs)
        target = keras.Model(inputs, layers.Dense(2)(layers.Flatten(data_format=flatten)(x)))
        mapped = align(source, target)(pm.torch_weights(source))
        kernel = mapped[target.layers[-1].kernel.path].T.reshape(2, 96)
        expected = source.head.weight.detach().numpy()
        if permuted:
            expected = expected.reshape(2, 4, 24).transpose(0, 2, 1).reshape(2, 96)
        assert np.array_equal(kernel, expected)


def test_keras_models_of_both_data_formats_go_together() -> None:
    first = keras.Input((3, 8, 6))
    x = layers.Conv2D(4, 3, data_format="channels_first")(first)
    source = keras.Model(first, layers.Dense(2)(layers.Flatten(data_format="channels_last")(x)))
    target, torch_model = keras_flat(), torch_flat()
    through = align(torch_model, target)(pm.torch_weights(torch_model))
    direct = align(source, target)(align(torch_model, source)(pm.torch_weights(torch_model)))
    assert pm.bits(direct) == pm.bits(through)


def test_global_pooling_and_a_map_of_one_position_need_no_permutation() -> None:
    source = pm.Call(lambda m, x: m.head(m.conv(x).mean((2, 3))), conv=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 2))
    pooled = pm.sequential((8, 6, 3), layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(2))
    check(source, pooled, COLOURS, pm.channels_last(COLOURS))
    by_hand = pm.functional((8, 6, 3), lambda x: layers.Dense(2)(ops.mean(layers.Conv2D(4, 3)(x), (1, 2))))
    check(source, by_hand, COLOURS, pm.channels_last(COLOURS))
    kept = pm.sequential(
        (8, 6, 3), layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(keepdims=True), layers.Flatten(), layers.Dense(2)
    )
    check(source, kept, COLOURS, pm.channels_last(COLOURS))


def test_joined_branches_that_are_pooled_do_not_look_like_a_flattened_map() -> None:
    def forward(m: Any, x: Any) -> Any:
        return m.head(torch.cat([m.a(x), m.b(x)], 1).mean((2, 3)))

    def function(x: Any) -> Any:
        joined = layers.Concatenate()([layers.Conv2D(4, 3, padding="same")(x), layers.Conv2D(4, 1)(x)])
        return layers.Dense(2)(layers.GlobalAveragePooling2D()(joined))

    source = pm.Call(forward, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(3, 4, 1), head=nn.Linear(8, 2))
    check(source, pm.functional((8, 6, 3), function), COLOURS, pm.channels_last(COLOURS))


def test_joined_branches_that_are_flattened_are_one_map() -> None:
    def forward(m: Any, x: Any) -> Any:
        return m.head(torch.cat([m.a(x), m.b(x)], 1).flatten(1))

    def function(x: Any) -> Any:
        joined = layers.Concatenate()([layers.Conv2D(4, 3, padding="same")(x), layers.Conv2D(2, 1)(x)])
        return layers.Dense(2)(ops.reshape(joined, (-1, 6 * 48)))

    source = pm.Call(forward, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(3, 2, 1), head=nn.Linear(6 * 48, 2))
    check(source, pm.functional((8, 6, 3), function), COLOURS, pm.channels_last(COLOURS))


def test_a_nested_model_is_followed_to_its_flatten() -> None:
    body = pm.sequential((8, 6, 3), layers.Conv2D(4, 3), layers.ReLU())
    source = torch_flat(flatten=False)
    source.start = nn.ReLU()
    target = pm.functional((8, 6, 3), lambda x: layers.Dense(2)(layers.Flatten()(body(x))))
    check(source, target, COLOURS, pm.channels_last(COLOURS))


def test_a_flattened_sequence_keeps_its_order() -> None:
    numbers = RNG.integers(0, 9, (5, 4))
    source = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 2))
    target = pm.functional((4,), lambda x: layers.Dense(2)(layers.Flatten()(layers.Embedding(9, 3)(x))), "int32")
    check(source, target, numbers, numbers)


def test_images_without_channels_are_flattened_in_one_order() -> None:
    source = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10))
    for shape in ((8, 8), (8, 8, 1)):
        target = pm.sequential(shape, layers.Flatten(), layers.Dense(5, activation="relu"), layers.Dense(10))
        check(source, target, pm.digits(), pm.digits().reshape(-1, *shape))


def test_features_that_are_folded_into_a_map_are_permuted() -> None:
    def forward(m: Any, x: Any) -> Any:
        return m.up(torch.relu(m.norm(m.grow(x))).view(-1, 4, 3, 2))

    def function(x: Any) -> Any:
        x = layers.ReLU()(pm.batch_norm()(layers.Dense(24)(x)))
        return layers.Conv2DTranspose(2, 3, strides=2)(layers.Reshape((3, 2, 4))(x))

    source = pm.Call(forward, grow=nn.Linear(7, 24), norm=nn.BatchNorm1d(24), up=nn.ConvTranspose2d(4, 2, 3, stride=2))
    data = RNG.standard_normal((5, 7)).astype(np.float32)
    check(source, pm.functional((7,), function), data, data)


def test_squeeze_and_excitation_keeps_the_order_of_channels() -> None:
    def forward(m: Any, x: Any) -> Any:
        x = m.conv(x)
        weight = torch.sigmoid(m.grow(torch.relu(m.squeeze(x.mean((2, 3))))))
        return m.out(x * weight[..., None, None])

    def function(x: Any) -> Any:
        x = layers.Conv2D(6, 3)(x)
        weight = layers.Dense(3, activation="relu")(layers.GlobalAveragePooling2D()(x))
        weight = layers.Reshape((1, 1, 6))(layers.Dense(6, activation="sigmoid")(weight))
        return layers.Conv2D(2, 1)(layers.Multiply()([x, weight]))

    source = pm.Call(
        forward, conv=nn.Conv2d(3, 6, 3), squeeze=nn.Linear(6, 3), grow=nn.Linear(3, 6), out=nn.Conv2d(6, 2, 1)
    )
    check(source, pm.functional((8, 6, 3), function), COLOURS, pm.channels_last(COLOURS))


def test_a_subclassed_model_without_a_flatten_layer_is_refused_and_can_be_told() -> None:
    source, target = pm.torch_conv_net(), pm.KerasConvNet(flatten=False)
    images = pm.digits()
    target(images[:1, ..., None])
    with pytest.raises(
        LayoutError, match=r"'hidden' and .*it is not seen whether its inputs are .*flattened="
    ) as caught:
        align(source, target)
    assert caught.value.source_layer == "hidden"
    for place in ("hidden", target.hidden.path):
        check(source, target, images[:, None], images[..., None], flattened={place: 5})
    with pytest.raises(LayoutError, match="80 features are no map of 7 channels"):
        align(source, target, flattened={"hidden": 7})


def test_what_is_said_of_a_flattened_map_must_be_about_one_layer_and_agree_with_what_is_seen() -> None:
    source = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(144, 5), nn.Linear(5, 2))
    ends = [layers.Dense(5, name="hidden"), layers.Dense(2, name="last")]
    target = pm.sequential((8, 6, 3), layers.Conv2D(6, 3, name="conv"), layers.Flatten(), *ends)
    for place in ("2", "hidden", ends[0].path):
        check(source, target, COLOURS, pm.channels_last(COLOURS), flattened={place: 6})
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"typo": 6}, r"flattened: 'typo': no layer with variables has this place; the models have '0', .*hidden"),
        ({"hidden": 3}, r"its inputs are a flattened map of 6 channels, not one of 3"),
        ({"last": 5}, r"its inputs are no flattened map"),
        ({"2": 0}, "flattened: '2': 0 is no number of channels"),
        ({"2": 2.5}, "flattened: '2': 2.5 is no number of channels"),
        ({"2": 6, "hidden": 1}, "flattened: 'hidden': 6 and 1 channels are said of one pair"),
    ]
    for flattened, message in wrong:
        with pytest.raises(LayoutError, match=message):
            align(source, target, flattened=flattened)
    looked_up = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(LayoutError, match="flattened: '0': its inputs are not features"):
        align(looked_up, looked_up, flattened={"0": 3})


def test_joined_branches_are_not_one_map_whatever_is_said() -> None:
    def forward(m: Any, x: Any) -> Any:
        return m.head(torch.cat([m.conv(x).flatten(1), x.mean((2, 3))], 1))

    def function(x: Any) -> Any:
        flat, pooled = layers.Flatten()(layers.Conv2D(3, 3)(x)), layers.GlobalAveragePooling2D()(x)
        return layers.Dense(2)(layers.Concatenate()([flat, pooled]))

    def by_code(x: Any) -> Any:
        flat, row = layers.Flatten()(layers.Conv2D(3, 3)(x)), layers.Lambda(lambda y: y[:, 0, 0])(x)
        return layers.Dense(2)(layers.Concatenate()([flat, row]))

    source = pm.Call(forward, conv=nn.Conv2d(3, 3, 3), head=nn.Linear(75, 2))
    for target in (pm.functional((8, 6, 3), function), pm.functional((8, 6, 3), by_code)):
        with pytest.raises(
            LayoutError, match=r"so the order of features cannot be told\. Give each branch a layer"
        ) as e:
            align(source, target)
        assert "flattened=" not in str(e.value)
        with pytest.raises(LayoutError, match="branches are joined before it, so that its inputs are not one map of 3"):
            align(source, target, flattened={"head": 3})


def test_the_advice_for_joined_branches_leads_to_the_same_outputs() -> None:
    def forward(m: Any, x: Any) -> Any:
        return m.head(m.conv(x).flatten(1)) + m.more(x.mean((2, 3)))

    def function(x: Any) -> Any:
        flat, pooled = layers.Flatten()(layers.Conv2D(3, 3)(x)), layers.GlobalAveragePooling2D()(x)
        return layers.Add()([layers.Dense(2)(flat), layers.Dense(2, use_bias=False)(pooled)])

    source = pm.Call(forward, conv=nn.Conv2d(3, 3, 3), head=nn.Linear(72, 2), more=nn.Linear(3, 2, bias=False))
    check(source, pm.functional((8, 6, 3), function), COLOURS, pm.channels_last(COLOURS))


# Code of others in a Keras graph.


class Doubled(layers.Layer):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        return x * 2.0


def through(channels: int, *between: Any) -> tuple[Any, Any]:
    """A convolution, something, and a dense layer on the flattened map, which has 6 rows and 4 columns."""

    def function(x: Any) -> Any:
        x = layers.Conv2D(channels, 3)(x)
        for layer in between:
            x = layer(x)
        return layers.Dense(2)(layers.Flatten()(x))

    source = pm.Call(
        lambda m, x: m.head((2 * m.conv(x)).flatten(1)),
        conv=nn.Conv2d(3, channels, 3),
        head=nn.Linear(channels * 24, 2),
    )
    return source, pm.functional((8, 6, 3), function)


@pytest.mark.parametrize("make", [lambda: layers.Lambda(lambda x: x * 2.0), Doubled], ids=["lambda", "own layer"])
def test_code_that_keeps_the_shape_of_a_map_passes_where_no_axis_looks_like_the_channels(make: Any) -> None:
    check(*through(5, make()), COLOURS, pm.channels_last(COLOURS))
    for channels in (4, 6):
        source, target = through(channels, make())
        with pytest.raises(LayoutError, match="code before it may change the order of features"):
            align(source, target)
        check(source, target, COLOURS, pm.channels_last(COLOURS), flattened={"head": channels})


def test_code_that_turns_a_map_of_one_size_is_not_let_through() -> None:
    cube = np.ascontiguousarray(COLOURS[:, :, :, :])
    turned = layers.Lambda(lambda x: ops.transpose(x, (0, 3, 1, 2)))
    source = nn.Sequential(nn.Conv2d(3, 6, (3, 1)), nn.Flatten(), nn.Linear(216, 2))
    target = pm.sequential((8, 6, 3), layers.Conv2D(6, (3, 1)), turned, layers.Flatten(), layers.Dense(2))
    with pytest.raises(LayoutError, match="code before it may change the order of features"):
        align(source, target)
    check(source, target, cube, pm.channels_last(cube), flattened={"2": 1})


def test_code_before_a_convolution_and_in_place_of_a_pool_is_no_matter() -> None:
    def function(x: Any) -> Any:
        x = layers.Conv2D(4, 3)(layers.Lambda(lambda y: y * 2.0)(x))
        return layers.Dense(2)(layers.Lambda(lambda y: ops.mean(y, (1, 2)))(layers.Conv2D(5, 1)(x)))

    source = pm.Call(
        lambda m, x: m.head(m.second(m.first(2 * x)).mean((2, 3))),
        first=nn.Conv2d(3, 4, 3),
        second=nn.Conv2d(4, 5, 1),
        head=nn.Linear(5, 2),
    )
    check(source, pm.functional((8, 6, 3), function), COLOURS, pm.channels_last(COLOURS))


def beside_a_map(x: Any) -> Any:
    x = layers.Conv2D(4, 3)(x)
    more = layers.Reshape((6, 4, 2))(layers.Dense(48)(layers.GlobalAveragePooling2D()(x)))
    return layers.Conv2D(2, 1)(layers.Concatenate()([x, more]))


AMBIGUOUS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "images with colours": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 2)),
        lambda x: layers.Dense(2)(layers.Flatten()(x)),
        "flattened data, whose channels may be first or last",
    ),
    "a map that is turned": (
        torch_flat,
        lambda x: layers.Dense(2)(layers.Flatten()(layers.Permute((3, 1, 2))(layers.Conv2D(4, 3)(x)))),
        "an operation before it",
    ),
    "two maps, each flattened": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(192, 2)),
        lambda x: layers.Dense(2)(layers.Concatenate()([layers.Flatten()(layers.Conv2D(4, 3)(x)) for _ in range(2)])),
        "branches of several kinds",
    ),
    "a map as a sequence": (
        lambda: nn.ModuleList([nn.Conv2d(3, 4, 3), nn.LSTM(16, 2)]),
        lambda x: layers.LSTM(2)(layers.Reshape((6, 16))(layers.Conv2D(4, 3)(x))),
        "reshape before it",
    ),
    "features folded beside a map": (
        lambda: nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Linear(4, 48), nn.Conv2d(6, 2, 1)]),
        beside_a_map,
        "branches of several kinds",
    ),
    "a lambda": (
        torch_flat,
        lambda x: layers.Dense(2)(
            layers.Lambda(lambda y: ops.reshape(y, (-1, 96)), output_shape=(96,))(layers.Conv2D(4, 3)(x))
        ),
        "changes the number of channels",
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_order_that_cannot_be_told_is_refused(name: str) -> None:
    make, function, message = AMBIGUOUS[name]
    with pytest.raises(LayoutError, match=message):
        align(make(), pm.functional((8, 6, 3), function))


def test_within_a_framework_the_order_of_features_never_matters() -> None:
    for name, (_, function, _) in AMBIGUOUS.items():
        one, other = (pm.functional((8, 6, 3), function) for _ in range(2))
        mapped = align(one, other)(pm.keras_weights(one))
        assert [a.tobytes() for a in mapped.values()] == [a.tobytes() for a in pm.keras_weights(one).values()], name
