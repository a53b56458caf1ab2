"""How features get from layer to layer: where flattened feature maps change the order of a layer's inputs or outputs.

A feature map has its channels first in torch and, by default, last in Keras. Flattened, it gives the same features in
another order, and whatever has one number per feature must follow: the kernel of the next dense layer, and a
normalization between the two. The same holds the other way round for a dense layer whose output is folded into a map.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from fed_learn.adapters.layout.layers import OWN, Description, Layer, Layout, Step


@dataclass(frozen=True)
class State:
    """What is known of the features at one point of a model.

    Attributes:
        what: `raw` data; a feature `map`; `features` whose order is the same everywhere (vectors, sequences); a `flat`
            map; features `folded` into a map; or `unsure`.
        channels: Of a map, or of the map that was flattened.
        layout: Where that has its channels; None where not known.
        shape: Of raw data.
        makers: The layers whose output these features are, as long as only the order may have changed since.
        certain: Whether it follows from a graph, or only from the order in which layers are listed.
        why: Why it is unsure.
        joined: Whether branches are joined in it, so that it is not one map.
    """

    what: Literal["raw", "map", "features", "flat", "folded", "unsure"]
    channels: int | None = None
    layout: Layout | None = None
    shape: tuple[int | None, ...] | None = None
    makers: tuple[Layer, ...] = ()
    certain: bool = True
    why: str = ""
    joined: bool = False


@dataclass(frozen=True)
class Fact:
    """What is known of the order of one layer's features.

    Attributes:
        what: They are in the same order everywhere (`plain`); come from a `flat` map; `unsure`.
        channels: Of the map.
        layout: Where the map has its channels.
        certain: Whether it follows from a graph.
        why: Why it is unsure.
        joined: Whether branches are joined in it, so that it is not one map.
    """

    what: Literal["plain", "flat", "unsure"]
    channels: int | None = None
    layout: Layout | None = None
    certain: bool = True
    why: str = ""
    joined: bool = False


Facts = dict[tuple[int, str], Fact]
"""By the `id` of a layer and the axis, `in` or `out`."""


def facts_of(model: Description) -> Facts:
    """What is known of the features of the model's layers. What is not in it is not known."""
    states: dict[int, State] = {}
    facts: Facts = {}
    last_map = max((i for i, step in enumerate(model.steps) if step.layer and step.layer.is_convolution), default=-1)
    for number, step in enumerate(model.steps):
        before = [states.get(id(one), State("raw", shape=one.given, certain=step.certain)) for one in step.inputs]
        state = _merged(before, step) if before else State("raw", shape=step.given)
        if not step.certain:
            state = replace(state, certain=False)
        if step.layer is not None:
            _learn(facts, step.layer, state, on_map=number < last_map)
        elif state.what == "folded" and step.what in ("pool", "flatten") and len(state.shape or ()) > 2:
            for maker in state.makers:
                why = "its output is folded into a feature map that no convolution takes"
                _note(facts, maker, _given_axis(maker), Fact("unsure", certain=state.certain, why=why))
        states[id(step)] = _after(step, state)
    return facts


def _learn(facts: Facts, layer: Layer, state: State, *, on_map: bool) -> None:
    """Notes what the state before a layer says of its inputs, and of the outputs of those before it."""
    found = _fact(layer, state, on_map=on_map)
    if found is not None and (layer.takes is not None or layer.kind == "attention"):
        _note(facts, layer, "in", found)
    if state.what not in ("folded", "features") or not layer.is_convolution or not state.makers:
        return
    for maker in state.makers:
        if maker.gives == layer.takes:
            fact = Fact("plain", certain=state.certain)
        elif state.what == "folded" and state.certain and not layer.kind.startswith("convolution 1d"):
            fact = Fact("flat", layer.takes, layer.layout)
        else:
            why = f"its output seems to be folded into the feature map that {layer.place!r} takes"
            fact = Fact("unsure", certain=state.certain, why=why)
        if maker.is_per_feature:
            facts.pop((id(maker), "in"), None)
        _note(facts, maker, _given_axis(maker), fact)


def _given_axis(maker: Layer) -> str:
    return "in" if maker.is_per_feature else "out"


def _note(facts: Facts, layer: Layer, axis: str, fact: Fact) -> None:
    known = facts.get((id(layer), axis))
    if known is not None and known != fact:
        fact = Fact("unsure", certain=fact.certain, why="it is used twice, on features of two kinds")
    facts[id(layer), axis] = fact


def _fact(layer: Layer, state: State, *, on_map: bool) -> Fact | None:
    if state.what == "unsure":
        return Fact("unsure", certain=state.certain, why=state.why, joined=state.joined)
    if state.what == "flat":
        if layer.takes == state.channels:
            return Fact("plain", certain=state.certain)
        if state.channels and layer.takes and layer.takes % state.channels == 0 and not layer.is_convolution:
            return Fact("flat", state.channels, state.layout, state.certain)
        return Fact("unsure", certain=state.certain, why=f"its features do not fit a map of {state.channels} channels")
    listed = state.what == "map" and not state.certain and not layer.is_convolution
    if listed and layer.takes != state.channels and not (on_map and layer.is_per_feature):
        return None
    return Fact("plain", certain=state.certain)


def _after(step: Step, state: State) -> State:
    """The state after a step, from the one before it."""
    layer = step.layer
    if layer is not None:
        return _after_layer(layer, state)
    if step.what == "input":
        return State("raw", shape=step.given, certain=state.certain)
    if step.what == "flatten":
        return _flattened(state, step)
    if step.what == "reshape":
        return _reshaped(state, step)
    if step.what == "pool":
        return _pooled(state, step)
    if step.what == "code":
        return _unknown(state, step)
    if step.what == "other":
        if state.what == "unsure":
            return state
        if state.what == "features" or (state.what == "raw" and len(state.shape or ()) <= 2):
            return State("features", certain=state.certain)
        return State("unsure", certain=state.certain, why="an operation before it may change the order of features")
    if (
        step.what == "pass"
        and state.what in ("map", "flat")
        and step.taken
        and step.given
        and _channels(step.taken, state.layout) != _channels(step.given, state.layout)
    ):
        return State("unsure", certain=state.certain, why="an operation before it changes the number of channels")
    return state


def _after_layer(layer: Layer, state: State) -> State:
    if layer.is_convolution:
        return State("map", layer.gives, layer.layout, certain=state.certain)
    if layer.is_per_feature:
        follows = state.what == "features" and state.makers and state.makers[0].gives == layer.takes
        return replace(state, makers=(*state.makers, layer)) if follows else state
    if layer.kind == OWN and state.what not in ("features", "raw"):
        return State("unsure", certain=state.certain, why=f"{layer.place!r} before it may change the order of features")
    if layer.kind != "dense":
        return State("features", certain=state.certain)
    if state.what == "map" and (state.certain or layer.takes == state.channels):
        # Applied to each position, where torch must have its channels last for once.
        return State("map", layer.gives, None, makers=(layer,), certain=state.certain)
    if state.what == "raw" and state.shape is not None and len(state.shape) > 2:
        return State("map", layer.gives, None, certain=state.certain)
    return State("features", makers=(layer,), certain=state.certain)


def _flattened(state: State, step: Step) -> State:
    shape = step.taken or state.shape
    if state.what == "unsure" or (shape is not None and len(shape) <= 1):
        return state
    if state.what == "map":
        channels, layout = state.channels, state.layout
        if layout is None:
            return State("unsure", certain=state.certain, why="a map is flattened whose layout cannot be told")
        if shape is not None and _channels(shape, layout) is not None:
            channels = _channels(shape, layout)
        if step.moves_channels:
            if layout == "last":
                return State("unsure", certain=state.certain, why="a map with channels last is flattened as if first")
            layout = "last"
        return State("flat", channels, layout, certain=state.certain)
    if state.what == "raw" and shape is not None and len(shape) > 2 and 1 not in (shape[0], shape[-1]):
        return State(
            "unsure", certain=state.certain, why="it takes flattened data, whose channels may be first or last"
        )
    if state.what in ("features", "folded") and step.moves_channels and shape is not None:
        return State("unsure", certain=state.certain, why="a sequence is flattened as if its channels were first")
    return State("features", makers=state.makers, certain=state.certain) if state.what != "flat" else state


def _pooled(state: State, step: Step) -> State:
    if state.what != "map":
        return state
    if step.given is not None and step.given[-1] != state.channels and state.layout != "first":
        return State("unsure", certain=state.certain, why="an operation before it changes the number of channels")
    return State("features", certain=state.certain)


def _unknown(state: State, step: Step) -> State:
    """The state after code known by its shapes only: they show a move of channels, but among axes of one size."""
    taken, given = step.taken, step.given
    if state.what == "unsure":
        return state
    if state.what == "features" or (state.what == "raw" and len(state.shape or ()) <= 2):
        return State("features", certain=state.certain)
    one_size = state.what == "map" and taken is not None and taken.count(state.channels) != 1
    if given in (None, taken) and not one_size:
        return state
    if state.what == "map" and given and len(given) == 1 and (given[0] != state.channels or not one_size):
        return _pooled(state, step)
    return State("unsure", certain=state.certain, why="code before it may change the order of features")


def _reshaped(state: State, step: Step) -> State:
    rank = None if step.given is None else len(step.given)
    if state.what == "unsure":
        return state
    if state.what == "raw":
        return State("raw", shape=step.given, certain=state.certain)
    if state.what == "map":
        if rank == 1 and step.given:
            return _flattened(state, replace(step, moves_channels=False))
        if step.given and state.layout == "last" and step.given[-1] == state.channels:
            return State("map", state.channels, None, certain=state.certain)  # as tokens
    elif state.what in ("features", "folded"):
        if rank == 1:
            return State("features", makers=state.makers, certain=state.certain)
        if state.makers and rank is not None:
            return State("folded", shape=step.given, makers=state.makers, certain=state.certain)
        if state.what == "features" and not state.makers:
            return State("features", certain=state.certain)
    return State("unsure", certain=state.certain, why="a reshape before it may change the order of features")


def _merged(states: list[State], step: Step) -> State:
    """The state of what several branches give together."""
    certain = all(state.certain for state in states)
    kinds = {state.what for state in states}
    if len(states) == 1:
        return replace(states[0], certain=certain)
    into_vector = step.given is not None and len(step.given) == 1
    unsure = next((state for state in states if state.what == "unsure"), None)
    if unsure is not None:
        return replace(unsure, certain=certain, joined=unsure.joined or into_vector)
    maps = [state for state in states if state.what == "map"]
    if maps and kinds <= {"map", "features", "folded", "raw"}:
        layouts = {state.layout for state in maps}
        layout = layouts.pop() if len(layouts) == 1 else None
        counted = [state.channels for state in maps]
        channels = _channels(step.given, layout) if step.given else None
        if channels is None and None not in counted:
            channels = (sum if step.what == "concat" else max)(one for one in counted if one is not None)
        folded = [maker for state in states if state.what == "folded" for maker in state.makers]
        if not folded or (step.what != "concat" and all(maker.gives == channels for maker in folded)):
            return State("map", channels, layout, certain=certain)
    if kinds <= {"features", "raw"}:
        makers = () if step.what == "concat" else tuple(maker for state in states for maker in state.makers)
        return State("features", makers=tuple(dict.fromkeys(makers)), certain=certain)
    if step.what != "concat" and len({(s.what, s.channels, s.layout) for s in states}) == 1:
        return replace(states[0], certain=certain)
    why = "branches of several kinds are joined before it"
    return State("unsure", certain=certain, why=why, joined=into_vector)


def _channels(shape: Iterable[int | None] | None, layout: Layout | None) -> int | None:
    sizes = tuple(shape or ())
    if not sizes or layout is None:
        return None
    return sizes[-1] if layout == "last" else sizes[0]
