"""The order of features, where the two sides of a pair of layers have it differently.

`flow` says what each model knows of its features; here the two are put together, and an axis of flattened features is
taken apart into channels and positions, so that both sides name them alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import NoReturn

from fed_learn.adapters.layout.flow import Fact, Facts
from fed_learn.adapters.layout.layers import Description, Layer, Layout, Pair
from fed_learn.adapters.layout.matching import layers_at
from fed_learn.errors import LayoutError

Models = tuple[Description, Description]


def pinned_channels(models: Models, found: Sequence[Pair], flattened: Mapping[str, int]) -> dict[int, int]:
    """What the caller says of the inputs of layers: by the `id` of the source's layer, the channels of the map.

    Raises:
        LayoutError: There is no such layer, or it is not one pair of layers, or its inputs are no features.
    """
    pinned: dict[int, int] = {}
    for place, channels in flattened.items():
        meant = {id(layer) for model in models for layer in layers_at(model, place)}
        pairs = [pair for pair in found if meant & {id(pair[0]), id(pair[1])}]
        if len(pairs) != 1:
            what = "no layer with variables has this place" if not pairs else "several layers have this place"
            known = ", ".join(repr(layer.place) for pair in found for layer in pair if layer.takes is not None)
            raise LayoutError(f"flattened: {place!r}: {what}; the models have {known}", reason=what)
        a, _ = pairs[0]
        if not any(axis == "in" for _, part in a.parts().values() for axis, _ in part.axes):
            _refuse_pin(pairs[0], place, "its inputs are not features that may come from a flattened map")
        if not isinstance(channels, Integral) or channels < 1:
            _refuse_pin(pairs[0], place, f"{channels!r} is no number of channels")
        if pinned.setdefault(id(a), int(channels)) != channels:
            _refuse_pin(pairs[0], place, f"{pinned[id(a)]} and {channels} channels are said of one pair of layers")
    return pinned


def _refuse_pin(pair: Pair, place: str, reason: str) -> NoReturn:
    a, b = pair
    raise LayoutError(f"flattened: {place!r}: {reason}", source_layer=a.place, target_layer=b.place, reason=reason)


def in_common_order(models: Models, known: tuple[Facts, Facts], pair: Pair, pinned: Mapping[int, int]) -> Pair:
    """The two layers, their axes of flattened features taken apart where the two sides have them in another order.

    Args:
        models: The two models.
        known: What each knows of its features.
        pair: A layer of each.
        pinned: What the caller says: see `pinned_channels`.

    Raises:
        LayoutError: The order of features cannot be told, or is known to be another than the caller says.
    """
    layers = pair
    for axis in ("in", "out"):
        facts = known[0].get((id(pair[0]), axis)), known[1].get((id(pair[1]), axis))
        said = pinned.get(id(pair[0])) if axis == "in" else None
        if said is not None:
            _check_said(pair, facts, said)
        channels = said if said is not None else _channels(models, pair, facts, axis)
        if channels is not None and channels != 1:
            layers = _taken_apart(models, pair, layers, facts, axis, channels)
    return layers


def _check_said(pair: Pair, facts: tuple[Fact | None, Fact | None], channels: int) -> None:
    """Refuses what the caller says of the inputs, if a graph says something else."""
    for layer, fact in zip(pair, facts, strict=True):
        if fact is None or not fact.certain or channels == 1:
            continue
        if fact.joined:
            _refuse_pin(
                pair,
                layer.place,
                f"branches are joined before it, so that its inputs are not one map of {channels} channels",
            )
        if fact.what == "plain" or (fact.what == "flat" and fact.channels != channels):
            known = "no flattened map" if fact.what == "plain" else f"a flattened map of {fact.channels} channels"
            _refuse_pin(pair, layer.place, f"its inputs are {known}, not one of {channels}")


def _taken_apart(
    models: Models, pair: Pair, layers: Pair, facts: tuple[Fact | None, Fact | None], axis: str, channels: int
) -> Pair:
    size = next((n for _, part in pair[0].parts().values() for name, n in part.axes if name == axis), channels)
    if size % channels:
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
        _refuse(pair, unsure.why, axis, joined=unsure.joined)
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


def _refuse(pair: Pair, reason: str, axis: str = "in", *, joined: bool = False) -> NoReturn:
    a, b = pair
    advice = (
        f"Say it with flattened={{{a.place!r}: channels of the feature map that it takes, or 1 where both sides have "
        "one order}"
    )
    if axis == "out":
        advice = "Say it with a functional Keras model, with a Reshape layer to four or more axes before a convolution"
    elif joined:
        advice = "Give each branch a layer of its own in both models, and add up what these give"
    raise LayoutError(
        f"{a.place!r} and {b.place!r}: {reason}, so the order of features cannot be told. {advice}",
        source_layer=a.place,
        target_layer=b.place,
        reason=reason,
    )
