"""What the names of layers say of which goes with which, to be held against what their order says."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from fed_learn.adapters.layout.layers import Layer, Pair

Name = tuple[str, str]
"""Which part of a layer's place it is, and the name."""


def paths(layers: Sequence[Layer]) -> dict[str, Layer]:
    """The layers by their places, without what all places begin with.

    Example:
        >>> list(paths([Layer(place, "Dense", "dense", ()) for place in ("net/a", "net/b/c")]))
        ['a', 'b.c']
    """
    split = [re.split(r"[./]", layer.place) for layer in layers]
    while split and len({path[0] for path in split}) == 1 and all(len(path) > 1 for path in split):
        split = [path[1:] for path in split]
    return {".".join(path): layer for path, layer in zip(split, layers, strict=True)}


def named(layers: Sequence[Layer]) -> dict[Name, Layer]:
    """The layers by the names that somebody gave them: by whole paths, and by the ends that only one path has.

    Numbers in a list are no names, nor is what Keras calls the layers of a class.

    Example:
        >>> list(named([Layer(place, "Dense", "dense", ()) for place in ("a/x", "a/dense_1", "b/x")]))
        [('whole', 'a_x'), ('whole', 'b_x')]
        >>> list(named([Layer(place, "Dense", "dense", ()) for place in ("a.0", "a.1.fc", "head")]))
        [('whole', 'a_1_fc'), ('whole', 'head'), ('end', 'fc'), ('end', 'head')]
    """
    given = {path: layer for path, layer in paths(layers).items() if _is_given(path, layer)}
    ends = Counter(_end(layer.place) for layer in layers)
    whole: dict[Name, Layer] = {("whole", path.replace(".", "_")): layer for path, layer in given.items()}
    return whole | {("end", _end(path)): layer for path, layer in given.items() if ends[_end(path)] == 1}


def agreeing(pairs: Sequence[Pair]) -> set[int]:
    """By the `id` of the first of each: pairs that have a name in common."""
    mine, theirs = named([a for a, _ in pairs]), named([b for _, b in pairs])
    partner = {id(a): b for a, b in pairs}
    return {id(a) for name, a in mine.items() if theirs.get(name) is partner[id(a)]}


def put_apart(pairs: Sequence[Pair]) -> list[Pair]:
    """Layers of one name that the pairs put apart.

    Where the pairs differ in numbers alone, and these rise on both sides, the sides only count from another number:
    `conv1`, `conv2` go with `conv0`, `conv1`.

    Example:
        >>> def layers(*places): return [Layer(place, "Dense", "dense", ()) for place in places]
        >>> [a.place for a, _ in put_apart(list(zip(layers("key", "query"), layers("query", "key"))))]
        ['key', 'query']
        >>> put_apart(list(zip(layers("conv1", "conv2"), layers("conv0", "conv1"))))
        []
    """
    mine, theirs = named([a for a, _ in pairs]), named([b for _, b in pairs])
    partner = {id(a): b for a, b in pairs}
    orders = [{id(layer): i for i, layer in enumerate(side)} for side in zip(*pairs, strict=True)]
    apart = {}
    for name, a in mine.items():
        other, given = theirs.get(name), partner[id(a)]
        if other is None or other is given:
            continue
        counted = any(layer is given and _stem(one) == _stem(name) for one, layer in theirs.items())
        if not (counted and _rises(mine, name, orders[0]) and _rises(theirs, name, orders[1])):
            apart[id(a), id(other)] = a, other
    return list(apart.values())


def _rises(side: dict[Name, Layer], name: Name, order: dict[int, int]) -> bool:
    """Whether all names that differ from this one in their numbers alone have these in the order of the layers."""
    alike = sorted((order[id(layer)], one[1]) for one, layer in side.items() if _stem(one) == _stem(name))
    return all(a < b for a, b in pairwise([int(n) for n in re.findall(r"\d+", one)] for _, one in alike))


def _stem(name: Name) -> Name:
    return name[0], re.sub(r"\d+", "#", name[1])


def _end(path: str) -> str:
    return re.split(r"[./]", path)[-1]


def _is_given(path: str, layer: Layer) -> bool:
    cls = re.sub(r"\W.*", "", layer.type.rsplit(".", 1)[-1])
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])", "_", cls).lower()
    return re.fullmatch(rf"\d*|{words}(_\d+)?", re.sub(r"[ \[].*", "", _end(path))) is None
