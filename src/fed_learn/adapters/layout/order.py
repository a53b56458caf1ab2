"""The order of features, where the two sides of a pair of layers have it differently.

`flow` says what each model knows of its features; here the two are put together, and an axis of flattened features is
taken apart into channels and positions, so that both sides name them alike.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from fed_learn.adapters.layout.flow import Fact, Facts
from fed_learn.adapters.layout.layers import Description, Layer, Layout
from fed_learn.adapters.layout.matching import Pair
from fed_learn.errors import LayoutError

Models = tuple[Description, Description]


def in_common_order(models: Models, known: tuple[Facts, Facts], pair: Pair, flattened: Mapping[str, int]) -> Pair:
    """The two layers, their axes of flattened features taken apart where the two sides have them in another order.

    Args:
        models: The two models.
        known: What each knows of its features.
        pair: A layer of each.
        flattened: Place of a layer → channels of the map in its inputs, as the caller says.

    Raises:
        LayoutError: The order of features cannot be told.
    """
    layers = pair
    for axis in ("in", "out"):
        facts = known[0].get((id(pair[0]), axis)), known[1].get((id(pair[1]), axis))
        pinned = [flattened[layer.place] for layer in pair if layer.place in flattened] if axis == "in" else []
        channels = pinned[0] if pinned else _channels(models, pair, facts, axis)
        if channels is not None and channels != 1:
            layers = _taken_apart(models, pair, layers, facts, axis, channels)
    return layers


def _taken_apart(
    models: Models, pair: Pair, layers: Pair, facts: tuple[Fact | None, Fact | None], axis: str, channels: int
) -> Pair:
    size = next((n for _, part in pair[0].parts().values() for name, n in part.axes if name == axis), channels)
    if channels < 1 or size % channels:
        _refuse(pair, f"{size} features are no map of {channels} channels")
    first, second = (_layout(model, fact) for model, fact in zip(models, facts, strict=True))
    if first is None or second is None:
        _refuse(pair, "feature maps have channels first in one place and last in another")
    if first == second:
        return layers
    return _split(layers[0], axis, channels, first), _split(layers[1], axis, channels, second)


def _channels(models: Models, pair: Pair, facts: tuple[Fact | None, ...], axis: str) -> int | None:
    """Channels of the map whose features come along the axis; None where there is none, or no matter."""
    layouts = [_layout(model, fact) for model, fact in zip(models, facts, strict=True)]
    heard = [fact for fact in facts if fact is not None and fact.certain] or [
        fact for fact in facts if fact is not None
    ]
    unsure = next((fact for fact in heard if fact.what == "unsure"), None)
    counts = {fact.channels for fact in heard if fact.what == "flat"} | {None for fact in heard if fact.what == "plain"}
    if unsure is None and len(counts) == 1:
        return counts.pop()
    if layouts[0] == layouts[1] is not None:
        return None
    if unsure is None and not counts and not _may_be_flat(models, pair, axis):
        return None
    if unsure is not None:
        _refuse(pair, unsure.why, axis)
    if counts:
        _refuse(pair, "the two models flatten different feature maps")
    return _refuse(pair, "it is not seen whether its inputs are a flattened feature map")


def _may_be_flat(models: Models, pair: Pair, axis: str) -> bool:
    """Whether the layer, of which nothing is known, comes after a feature map whose channels are not its features."""
    if axis == "out" or pair[0].takes is None or pair[0].is_convolution:
        return False
    for model, layer in zip(models, pair, strict=True):
        before = model.layers[: model.layers.index(layer)]
        maps = [one for one in before if one.is_convolution]
        if maps and maps[-1].gives != layer.takes:
            return True
    return False


def _layout(model: Description, fact: Fact | None) -> Layout | None:
    return fact.layout if fact is not None and fact.what == "flat" else model.layout


def _split(layer: Layer, axis: str, channels: int, layout: Layout) -> Layer:
    slots = tuple(replace(s, parts=tuple(p.split(axis, channels, layout) for p in s.parts)) for s in layer.slots)
    return replace(layer, slots=slots)


def _refuse(pair: Pair, reason: str, axis: str = "in") -> NoReturn:
    a, b = pair
    advice = (
        f"flattened={{{a.place!r}: channels of the feature map that it takes, or 1 where both sides have one order}}"
    )
    if axis == "out":
        advice = "a functional Keras model, with a Reshape layer to four or more axes and a convolution after it"
    raise LayoutError(
        f"{a.place!r} and {b.place!r}: {reason}, so the order of features cannot be told. Say it with {advice}",
        source_layer=a.place,
        target_layer=b.place,
        reason=reason,
    )
