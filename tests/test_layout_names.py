"""Where the names of layers and their order say different things: names win where they leave no doubt, else neither."""

from collections.abc import Callable
from typing import Any

import numpy as np
import paired_models as pm
import pytest
import torch
from keras import layers
from torch import nn

from fed_learn.adapters.layout import align
from fed_learn.errors import LayoutError

RNG = np.random.default_rng(4)
VECTORS = RNG.standard_normal((5, 6)).astype(np.float32)


def check(source: Any, target: Any, **how: Any) -> dict[str, str]:
    """Which layer goes with which, once the outputs agree."""
    m = align(pm.stirred(source), target, **how)
    pm.load(target, m(pm.torch_weights(source)))
    np.testing.assert_allclose(pm.outputs(target, VECTORS), pm.outputs(source, VECTORS), atol=1e-5, rtol=1e-5)
    return dict(m.layers)


def linear(*names: str) -> dict[str, Any]:
    return {name: nn.Linear(6, 6) for name in names}


def dense(name: str | None = None, **more: Any) -> Any:
    return layers.Dense(6, name=name, **more)


def torch_attention(order: tuple[str, ...], inner: bool = False) -> Any:
    def forward(net: Any, x: Any) -> Any:
        part = net.part if inner else net
        scores = torch.softmax(part.query(x) * part.key(x), -1)
        return net.fc(scores * part.value(x) + part.key(x))

    if inner:
        return pm.Call(forward, part=nn.ModuleDict(linear(*order)), fc=nn.Linear(6, 2))
    return pm.Call(forward, **linear(*order), fc=nn.Linear(6, 2))


def keras_attention() -> Any:
    def function(x: Any) -> Any:
        query, key, value = (dense(name)(x) for name in ("query", "key", "value"))
        scores = layers.Softmax()(layers.Multiply()([query, key]))
        x = layers.Add()([layers.Multiply()([scores, value]), key])
        return layers.Dense(2, name="head")(x)

    return pm.functional((6,), function)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("order", [("key", "query", "value"), ("value", "query", "key"), ("query", "key", "value")])
def test_names_tell_layers_apart_that_are_registered_in_another_order(order: tuple[str, ...], inner: bool) -> None:
    prefix = "part." if inner else ""
    expected = {**{prefix + name: name for name in order}, "fc": "head"}
    assert check(torch_attention(order, inner), keras_attention()) == expected


def test_numbers_in_names_count_where_they_do_not_rise() -> None:
    source = pm.Call(
        lambda net, x: net.out(net.fc2(torch.relu(net.fc1(x)))), **linear("fc2", "fc1"), out=nn.Linear(6, 2)
    )
    target = pm.functional(
        (6,), lambda x: layers.Dense(2, name="logits")(dense("fc2")(dense("fc1", activation="relu")(x)))
    )
    assert check(source, target) == {"fc2": "fc2", "fc1": "fc1", "out": "logits"}


def test_normalizations_go_with_the_layer_before_them() -> None:
    children = {
        name: make()
        for name in ("text", "image")
        for name, make in ((name, lambda: nn.Linear(6, 6)), (f"{name}_norm", lambda: nn.BatchNorm1d(6)))
    }

    def forward(net: Any, x: Any) -> Any:
        return net.head(torch.cat([net.text_norm(net.text(x)), net.image_norm(net.image(x))], 1))

    def function(x: Any) -> Any:
        image, text = (pm.batch_norm()(dense(name)(x)) for name in ("image", "text"))
        return layers.Dense(2)(layers.Concatenate()([text, image]))

    found = check(pm.Call(forward, **children, head=nn.Linear(12, 2)), pm.functional((6,), function))
    assert (found["text"], found["image"]) == ("text", "image")


def test_names_tell_alike_branches_apart_where_another_has_moved_too() -> None:
    def forward(net: Any, x: Any) -> Any:
        return torch.cat([net.out(net.left(x) - 2 * net.right(x)), net.side(x)], 1)

    def function(x: Any) -> Any:
        side = layers.Dense(3, name="aside")(x)
        right, left = dense("right")(x), dense("left")(x)
        out = layers.Dense(2, name="last")(layers.Subtract()([left, right * 2.0]))
        return layers.Concatenate()([out, side])

    source = pm.Call(forward, **linear("left", "right"), out=nn.Linear(6, 2), side=nn.Linear(6, 3))
    found = check(source, pm.functional((6,), function))
    assert found == {"left": "left", "right": "right", "out": "last", "side": "aside"}


# Where neither can be trusted.


def test_names_of_a_chain_are_not_taken_against_the_order() -> None:
    source = nn.ModuleDict(linear("a", "b"))
    target = pm.functional((6,), lambda x: dense("c")(dense("b")(x)))
    with pytest.raises(LayoutError, match=r"'a' of the source and 'b' of|'b' of the source and 'c' of") as caught:
        align(source, target)
    caught.match("the target has 'b' too, in another place. Say which layers go together with pairs=")
    assert (caught.value.source_layer, caught.value.target_layer) == ("b", "c")
    assert dict(align(source, target, pairs={"a": "b"}).layers) == {"a": "b", "b": "c"}
    assert dict(align(source, target, pairs={"b": "b"}).layers) == {"a": "c", "b": "b"}


def test_layers_without_a_name_between_those_that_change_places_are_not_guessed() -> None:
    def forward(net: Any, x: Any) -> Any:
        return net.image2(net.image1(x)) - net.text2(net.text1(x))

    def function(x: Any) -> Any:
        image, text = (dense()(dense(name)(x)) for name in ("image1", "text1"))
        return layers.Subtract()([image, text])

    source = pm.Call(forward, **linear("text1", "text2", "image1", "image2"))
    with pytest.raises(LayoutError, match=r"'(text|image)1' of the source and '(image|text)1' of the target"):
        align(source, pm.functional((6,), function))


def test_normalizations_of_which_only_one_side_has_one_are_refused() -> None:
    source = nn.ModuleDict({"b": nn.Linear(6, 6), "norm": nn.BatchNorm1d(6), "a": nn.Linear(6, 6)})
    target = pm.functional((6,), lambda x: dense("b")(pm.batch_norm()(dense("a")(x))))
    with pytest.raises(LayoutError, match=r"the target has '[ab]' too, in another place"):
        align(source, target)


# Where names mean nothing.

MEANINGLESS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "counted from another number": (
        lambda: nn.ModuleDict(linear("fc1", "fc2", "fc3")),
        lambda: pm.functional((6,), lambda x: dense("fc2")(dense("fc1")(dense("fc0")(x)))),
    ),
    "blocks counted from another number": (
        lambda: nn.ModuleDict({f"block{i}": nn.ModuleDict(linear("fc")) for i in (1, 2)}),
        lambda: nn.ModuleDict({f"block{i}": nn.ModuleDict(linear("fc")) for i in (0, 1)}),
    ),
    "places in a list": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)),
        lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)),
    ),
    "what Keras calls them": (
        lambda: nn.ModuleDict({"dense_1": nn.Linear(6, 6), "dense": nn.Linear(6, 6)}),
        lambda: pm.functional((6,), lambda x: dense("last")(dense("dense")(dense("dense_1")(x)))),
    ),
}


@pytest.mark.parametrize("name", MEANINGLESS)
def test_names_without_a_meaning_leave_the_order_as_it_is(name: str) -> None:
    source, target = (make() for make in MEANINGLESS[name])
    if name == "what Keras calls them":
        source["more"] = nn.Linear(6, 6)
    found = align(source, target).layers
    order = [place.rsplit(".", 1)[0] for place in (target.state_dict() if isinstance(target, nn.Module) else ())]
    order = list(dict.fromkeys(order)) or [layer.path for layer in target.layers if layer.weights]
    assert [place for _, place in found] == order


def test_a_name_of_another_shape_is_no_namesake() -> None:
    source = nn.ModuleDict({"stem": nn.Linear(6, 5), "fc": nn.Linear(5, 6)})
    target = pm.functional((6,), lambda x: layers.Dense(6, name="last")(layers.Dense(5, name="fc")(x)))
    assert dict(align(source, target).layers) == {"stem": "fc", "fc": "last"}
