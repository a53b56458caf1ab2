"""What changes the outputs of two layers and is no weight: collected from the steps of a model, and compared."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from fed_learn.adapters.layout.layers import Description, Layer, Pair, Step
from fed_learn.adapters.layout.padding import Pad, Padding

Note = tuple[Layer, Layer, str]
"""Two layers, and what differs between them."""

SparePad = tuple[str, Pad, bool]
"""A layer that pads and is not right before a convolution: place, what it puts there, and whether it yet may be."""


def count_pads(steps: Sequence[Step]) -> None:
    """Counts layers that pad towards the convolution right behind them; tells convolutions the sizes of their maps."""
    found: dict[int, list[Padding]] = {}
    layers: dict[int, Layer] = {}
    for step in steps:
        padding = None if step.layer is None else step.layer.settings.get("padding")
        if step.layer is not None and isinstance(padding, Padding):
            layers[id(step.layer)] = step.layer
            found.setdefault(id(step.layer), []).append(_padding_of(step, step.layer, padding))
    for number, uses in found.items():
        first = uses[0]
        if any(not first.agrees(use) for use in uses):
            first = Padding((Pad(f"another each time: {', '.join(map(str, uses))}"),))
        layers[number].settings["padding"] = first


def _padding_of(step: Step, layer: Layer, padding: Padding) -> Padding:
    if step.taken is not None and layer.layout is not None:
        padding = padding.on(step.taken[:-1] if layer.layout == "last" else step.taken[1:])
    for one in _pads_before(step):
        if one.pad is not None:
            padding = padding.behind(*one.pad)
    return padding


def _pads_before(step: Step) -> Iterable[Step]:
    """The steps right before a convolution that pad, from the inside to the outside."""
    before = step.inputs
    while len(before) == 1 and before[0].pad is not None and not before[0].loose:
        yield before[0]
        before = before[0].inputs


def compared(source: Description, target: Description, found: Iterable[Pair]) -> tuple[list[Note], list[str]]:
    """What differs between the layers of each pair, and what was not compared."""
    spare = _spare_pads(source), _spare_pads(target)
    differences: list[Note] = []
    remarks: list[str] = []
    called: set[str] = set()
    for a, b in found:
        for difference, place in _differences(a, b, spare):
            if place is None:
                differences.append((a, b, difference))
            else:
                called.add(place)
                hope = f"which comes to the same if {place!r} is called right before: that is not seen"
                remarks.append(f"{a.place!r} and {b.place!r}: {difference}, {hope}")
        if ("padding" in a.settings) != ("padding" in b.settings):
            own = b if "padding" in a.settings else a
            remarks.append(f"{a.place!r} and {b.place!r}: {own.type} has code of its own: padding is not compared")
    if Counter(pad for _, pad, _ in spare[0]) != Counter(pad for _, pad, _ in spare[1]):
        places = dict.fromkeys(place for pads in spare for place, _, _ in pads if place not in called)
        remarks += [
            f"{place!r} pads, but not right before a convolution that is seen: whether the other model pads there too "
            "is not compared"
            for place in places
        ]
    return differences, remarks


def _differences(a: Layer, b: Layer, spare: Sequence[list[SparePad]]) -> Iterator[tuple[str, str | None]]:
    """What differs between two layers; and, of padding, the layer without a known place that would make it good."""
    for name, mine in a.settings.items():
        if name not in b.settings:
            continue
        theirs = b.settings[name]
        if isinstance(mine, Padding) and isinstance(theirs, Padding):
            if not mine.agrees(theirs):
                yield f"{name} is {mine} and {theirs}", _missing_pad(mine, theirs, spare)
        elif not _equal(mine, theirs):
            yield f"{name} is {mine} and {theirs}", None
    for one, other in ((a, b), (b, a)):
        lacking = one.parts().keys() & {"mean", "variance"} - other.parts().keys()
        if lacking:
            yield f"only {one.place!r} has a running {' and '.join(sorted(lacking))}", None


def _equal(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _spare_pads(model: Description) -> list[SparePad]:
    counted = {
        id(one)
        for step in model.steps
        if step.layer is not None and isinstance(step.layer.settings.get("padding"), Padding)
        for one in _pads_before(step)
    }
    return [(*step.pad, step.loose) for step in model.steps if step.pad is not None and id(step) not in counted]


def _missing_pad(mine: Padding, theirs: Padding, spare: Sequence[list[SparePad]]) -> str | None:
    """The layer without a known place that would make the two agree."""
    for one, other, pads in ((mine, theirs, spare[0]), (theirs, mine, spare[1])):
        for place, pad, loose in pads:
            if loose and one.behind(place, pad).agrees(other):
                return place
    return None
