"""Which layer of one model goes with which of another."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from fed_learn.adapters.layout.layers import OWN, STATISTICS, Description, Layer, Pair
from fed_learn.adapters.layout.names import Name, agreeing, named, paths, put_apart
from fed_learn.errors import LayoutError

ADVICE = "If the layers are there in another order, name them in pairs={'source layer': 'target layer'}"


def matched(source: Description, target: Description, pairs: Mapping[str, str]) -> list[Pair]:
    """The layers of the two models that go together, in the order of the source.

    Pinned layers first. The others by their names, if all names agree; else in order. Where the order differs, as in
    the branches of a block, a stretch of layers is set in order by kinds and shapes, if only one way of doing so fits.
    Layers that change places by their names do so, if the names leave no doubt about those between them.

    Raises:
        LayoutError: A layer has no counterpart, or more than one could be meant; says which, and why.
    """
    pinned = [_pinned(source, target, places) for places in pairs.items()]
    for pair in pinned:
        _check(source, target, pair, is_pinned=True)
    taken = {id(layer) for pair in pinned for layer in pair}
    if len(taken) < 2 * len(pinned):
        place = Counter(pairs.values()).most_common(1)[0][0]
        raise LayoutError(f"pairs: {place!r} is pinned twice", target_layer=place, reason="pinned twice")
    left, right = ([one for one in model.layers if id(one) not in taken] for model in (source, target))
    found = _by_name(left, right)
    if found is None:
        found = _in_order(left, right) or _rearranged(source, target, left, right)
        found = _back_together(left, right, found)
    for pair in found:
        _check(source, target, pair, is_pinned=False)
    order = {id(layer): number for number, layer in enumerate(source.layers)}
    return sorted([*pinned, *found], key=lambda pair: order[id(pair[0])])


def difference_of(a: Layer, b: Layer, *, is_pinned: bool = False) -> str | None:
    """Why two layers do not correspond; None if they do."""
    hint = "".join(f" ({one.hint})" for one in (a, b) if one.hint)
    both_own = a.kind == b.kind == OWN
    if both_own and not is_pinned and a.type != b.type:
        return "their classes are not known here; if they compute the same, name them in pairs="
    if a.kind != b.kind:
        unknown = next((one for one in (a, b) if one.kind == OWN), None)
        if unknown is not None:
            return f"layers of type {unknown.type} are not known here{hint}"
        return f"one is a {a.kind}, the other a {b.kind}{hint}"
    for name in sorted(a.requires.keys() | b.requires.keys()):
        if a.requires.get(name) != b.requires.get(name):
            return f"{name} differs: {a.requires.get(name)} and {b.requires.get(name)}"
    mine, theirs = _roles(a), _roles(b)
    for role in [*mine, *(role for role in theirs if role not in mine)]:
        if role not in mine or role not in theirs:
            return f"only {(a if role in mine else b).place!r} has a {role.split('.')[0]}{hint}"
        if mine[role] != theirs[role]:
            sizes = (", ".join(f"{name} {size}" for name, size in one[role].items()) for one in (mine, theirs))
            return f"{role.split('.')[0]} has other sizes: {' and '.join(sizes)}"
    dtypes = [_dtypes(one) for one in (a, b)]
    if dtypes[0] != dtypes[1]:
        return f"dtypes differ: {' and '.join(dtypes)}; convert one of the models"
    return None


def _dtypes(layer: Layer) -> str:
    return ", ".join(sorted({str(slot.dtype) for slot in layer.slots if slot.dtype.kind != "i"}))


def _roles(layer: Layer) -> dict[str, dict[str, int]]:
    """Role → axes, with the two biases of a recurrent layer as one: one side may have their sum only."""
    roles = {role: part.sizes() for role, (_, part) in layer.parts().items() if role not in STATISTICS}
    return {role.split("@")[0]: sizes for role, sizes in roles.items()}


def layers_at(model: Description, place: str) -> list[Layer]:
    """The layers of this place; those whose place ends so, for the names of Keras layers."""
    return [layer for layer in model.layers if layer.place == place] or [
        layer for layer in model.layers if layer.place.rsplit("/", 1)[-1] == place
    ]


def _pinned(source: Description, target: Description, places: tuple[str, str]) -> Pair:
    found = []
    for model, place in zip((source, target), places, strict=True):
        layers = layers_at(model, place)
        if len(layers) != 1:
            known = ", ".join(repr(layer.place) for layer in model.layers)
            side = "source" if model is source else "target"
            raise LayoutError(
                f"pairs: the {side} has {len(layers)} layers {place!r} with variables; it has {known}",
                **{f"{side}_layer": place},
                reason="no such layer" if not layers else "several layers of this name",
            )
        found.append(layers[0])
    return found[0], found[1]


def _check(source: Description, target: Description, pair: Pair, *, is_pinned: bool) -> None:
    reason = difference_of(*pair, is_pinned=is_pinned)
    if reason is not None:
        _refuse(source, target, pair, reason, "" if is_pinned else ADVICE)


def _refuse(
    source: Description, target: Description, pair: tuple[Layer | None, Layer | None], why: str, do: str
) -> NoReturn:
    a, b = pair
    sides = [
        f"{model.framework} layer {layer}" if layer else f"nothing in the {model.framework} model"
        for model, layer in ((source, a), (target, b))
    ]
    number = next((model.layers.index(one) for model, one in ((source, a), (target, b)) if one is not None), 0)
    raise LayoutError(
        f"layer {number + 1}: {sides[0]} does not correspond to {sides[1]}: {why}" + (f". {do}" if do else ""),
        source_layer=a.place if a else None,
        target_layer=b.place if b else None,
        reason=why,
    )


def _by_name(left: Sequence[Layer], right: Sequence[Layer]) -> list[Pair] | None:
    """Pairs of equal names, if all names agree."""
    mine, theirs = paths(left), paths(right)
    if not mine or mine.keys() != theirs.keys() or len(mine) != len(left) or len(theirs) != len(right):
        return None
    pairs = [(layer, theirs[name]) for name, layer in mine.items()]
    return None if any(difference_of(*pair) for pair in pairs) else pairs


def _in_order(left: Sequence[Layer], right: Sequence[Layer]) -> list[Pair] | None:
    if len(left) != len(right):
        return None
    pairs = list(zip(left, right, strict=True))
    return None if any(difference_of(*pair) for pair in pairs) else pairs


def _rearranged(source: Description, target: Description, left: list[Layer], right: list[Layer]) -> list[Pair]:
    """Pairs in spite of another order: in each stretch that holds the same layers on both sides, if all are unlike.

    Those that are alike are told apart by names that both sides have.
    """
    mine, theirs = _chunks(left), _chunks(right)
    signatures = [[tuple(one.signature() for one in chunk) for chunk in chunks] for chunks in (mine, theirs)]
    if Counter(signatures[0]) != Counter(signatures[1]):
        _refuse_first(source, target, left, right)
    names = _common_names(left, right)
    marks = [[names.get(id(chunk[0])) for chunk in chunks] for chunks in (mine, theirs)]
    pairs: list[Pair] = []
    for start, end in _stretches(*signatures):
        keys = [list(zip(signatures[side][start:end], marks[side][start:end], strict=True)) for side in (0, 1)]
        if len(set(signatures[0][start:end])) == end - start:
            keys = [[(signature, None) for signature, _ in side] for side in keys]
        if end - start > 1 and (set(keys[0]) != set(keys[1]) or len(set(keys[0])) < end - start):
            _refuse_ambiguous(mine[start:end], theirs[start:end], lambda chunk: [one.signature() for one in chunk])
        places = {key: start + i for i, key in enumerate(keys[1])}
        for number, key in enumerate(keys[0], start):
            pairs += zip(mine[number], theirs[places[key] if end - start > 1 else start], strict=True)
    return pairs


def _common_names(left: Sequence[Layer], right: Sequence[Layer]) -> dict[int, Name]:
    """By the `id` of a layer, the name that it has in common with one of the other side; a whole path if one is."""
    mine, theirs = named(left), named(right)
    common = sorted(mine.keys() & theirs.keys())
    return {id(side[name]): name for name in common for side in (mine, theirs)}


def _back_together(left: list[Layer], right: list[Layer], found: list[Pair]) -> list[Pair]:
    """The pairs, but those of one name together that change places; refuses if names and order remain at odds."""
    apart = [pair for pair in put_apart(found) if difference_of(*pair) is None] if found else []
    if not apart:
        return found
    mine, theirs = ({id(one): chunk for chunk in _chunks(side) for one in chunk} for side in (left, right))
    partner = {id(a): b for a, b in found}
    first, namesake = apart[0]
    moved: dict[int, Layer] = {}
    for a, b in apart:
        if len(mine[id(a)]) != len(theirs[id(b)]):
            _refuse_names(a, partner[id(a)], b)
        moved |= {id(one): other for one, other in zip(mine[id(a)], theirs[id(b)], strict=True)}
    together = [(a, moved.get(id(a), b)) for a, b in found]
    clear = agreeing(together) | moved.keys()
    for side, ends in ((left, [a for a, _ in found if id(a) in moved]), (right, list(moved.values()))):
        places = [side.index(one) for one in ends]
        between = {id(one) for one in side[min(places) : max(places) + 1]}
        if any(id(a) not in clear and between & {id(a), id(b)} for a, b in together):
            _refuse_names(first, partner[id(first)], namesake)
    wrong = len({id(b) for _, b in together}) < len(together) or any(difference_of(*pair) for pair in together)
    if wrong or any(difference_of(*pair) is None for pair in put_apart(together)):
        _refuse_names(first, partner[id(first)], namesake)
    return together


def _refuse_names(a: Layer, b: Layer, namesake: Layer) -> NoReturn:
    reason = f"the order of the layers pairs them, but the target has {namesake.place!r} too, in another place"
    raise LayoutError(
        f"{a.place!r} of the source and {b.place!r} of the target: {reason}. Say which layers go together with "
        "pairs={'source layer': 'target layer'}",
        source_layer=a.place,
        target_layer=b.place,
        reason=reason,
    )


def _chunks(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers with the normalizations that follow them: these go where the layer before them goes."""
    chunks: list[list[Layer]] = []
    for layer in layers:
        follows = chunks and layer.is_per_feature and chunks[-1][-1].gives == layer.takes
        if follows and not chunks[-1][0].is_per_feature:
            chunks[-1].append(layer)
        else:
            chunks.append([layer])
    return chunks


def _stretches(mine: Sequence[object], theirs: Sequence[object]) -> Iterator[tuple[int, int]]:
    """The shortest stretches that hold the same on both sides, whatever its order.

    Example:
        >>> list(_stretches("abcd", "acbd"))
        [(0, 1), (1, 3), (3, 4)]
    """
    balance: Counter[object] = Counter()
    start = 0
    for end, (a, b) in enumerate(zip(mine, theirs, strict=True), start=1):
        balance[a] += 1
        balance[b] -= 1
        if not any(balance.values()):
            yield start, end
            start = end


def _refuse_first(source: Description, target: Description, left: list[Layer], right: list[Layer]) -> NoReturn:
    """Names the first two layers, in order, that do not correspond."""
    for pair in zip(left, right, strict=False):
        reason = difference_of(*pair)
        if reason is not None:
            _refuse(source, target, pair, reason, ADVICE)
    rest = max(left, right, key=len)[min(len(left), len(right))]
    only: tuple[Layer | None, Layer | None] = (rest, None) if len(left) > len(right) else (None, rest)
    counts = f"the {source.framework} source has {len(left)} layers with variables, the {target.framework} target"
    _refuse(source, target, only, f"{counts} {len(right)}", ADVICE)


def _refuse_ambiguous(
    mine: list[list[Layer]], theirs: list[list[Layer]], key: Callable[[list[Layer]], object]
) -> NoReturn:
    like = next(chunk for chunk in mine if sum(key(other) == key(chunk) for other in mine) > 1)
    candidates = [
        ", ".join(repr(chunk[0].place) for chunk in chunks if key(chunk) == key(like)) for chunks in (mine, theirs)
    ]
    reason = "the two models have these layers in another order, and shapes do not tell which goes with which"
    raise LayoutError(
        f"layers {candidates[0]} of the source and {candidates[1]} of the target: {reason}. Name them in "
        "pairs={'source layer': 'target layer'}",
        source_layer=like[0].place,
        target_layer=next(chunk for chunk in theirs if key(chunk) == key(like))[0].place,
        reason=reason,
    )
