"""In which order features reach a layer: a data-flow analysis of each model by itself.

A feature map has its channels first in torch and, by default, last in Keras. Flattened, it gives the same features in
another order. So it is with a map of two channels, `a` and `b`, at three positions:

    >>> import numpy as np
    >>> channels_first = np.array([["a0", "a1", "a2"], ["b0", "b1", "b2"]])
    >>> " ".join(channels_first.ravel()), " ".join(channels_first.T.ravel())
    ('a0 a1 a2 b0 b1 b2', 'a0 b0 a1 b1 a2 b2')

Whatever has one number per flattened feature must follow: the kernel of the next dense layer, and a normalization
between the two. The same holds the other way round for a dense layer whose output is folded into a map.

The analysis walks through the steps of a model, and keeps a `State` of the features after each. What it learns of a
layer on the way is a `Fact`:

    step                             state after it                      fact
    convolution of 8 filters         a map of 8 channels
    flatten                          flat, of 8 channels
    batch norm                       flat, of 8 channels                 its features are flat, of 8 channels
    dense, to 10                     ordered, produced by this layer     its inputs are flat, of 8 channels
    dense, to 2                      ordered, produced by this layer     its inputs are plain

How the facts of two models are put together is left to `order`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from fed_learn.adapters.layout.layers import OWN, Description, Layer, Layout, Step


@dataclass(frozen=True)
class State:
    """What is known of the features at one point of a model.

    Attributes:
        what: `raw` data; a feature `map`; features that are `ordered` in one way everywhere (vectors, sequences); a
            `flat` map; features `folded` into a map; or `unsure`.
        channels: Of a map, or of the map that was flattened.
        layout: Where that has its channels; None where not known.
        shape: Of raw data, or of what features are folded into.
        producers: The layers whose output these features are, as long as only the order may have changed since.
        certain: Whether it follows from a graph, or only from the order in which layers are listed.
        why: Why it is unsure.
        joined: Whether branches are joined in it, so that it is not one map.
    """

    what: Literal["raw", "map", "ordered", "flat", "folded", "unsure"]
    channels: int | None = None
    layout: Layout | None = None
    shape: tuple[int | None, ...] | None = None
    producers: tuple[Layer, ...] = ()
    certain: bool = True
    why: str = ""
    joined: bool = False

    @property
    def is_vector(self) -> bool:
        """Whether it has one order because it has one axis of features, and nothing flattened is in it."""
        return self.what == "ordered" or (self.what == "raw" and len(self.shape or ()) <= 2)

    def ordered(self, *producers: Layer) -> "State":
        """The state of features in one order everywhere, as certain as this one."""
        return State("ordered", producers=producers, certain=self.certain)

    def unsure(self, why: str) -> "State":
        """The state of features whose order is not known, as certain as this one."""
        return State("unsure", certain=self.certain, why=why)


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
    """What is known of the features of the model's layers. What is not in it is not known.

    Example:
        >>> from fed_learn.adapters.layout.layers import chained
        >>> from fed_learn.weights import Schema
        >>> convolution = Layer("conv", "Conv2d", "convolution 2d", (), takes=3, gives=8, layout="first")
        >>> dense = Layer("fc", "Linear", "dense", (), takes=72, gives=10)
        >>> steps = [Step("layer", layer=convolution), Step("flatten"), Step("layer", layer=dense)]
        >>> steps = chained(steps, (Step("input"),), certain=True)
        >>> facts = facts_of(Description("torch", Schema(), (convolution, dense), tuple(steps), {}))
        >>> facts[id(dense), "in"].what, facts[id(dense), "in"].channels
        ('flat', 8)
    """
    states: dict[int, State] = {}
    facts: Facts = {}
    last_map = max((i for i, step in enumerate(model.steps) if step.layer and step.layer.is_convolution), default=-1)
    for number, step in enumerate(model.steps):
        state = _before(step, states)
        if step.layer is not None:
            _note_inputs(facts, step.layer, state, on_map=number < last_map)
            _note_producers(facts, step.layer, state)
        elif state.what == "folded" and step.what in ("pool", "flatten") and len(state.shape or ()) > 2:
            why = "its output is folded into a feature map that no convolution takes"
            for producer in state.producers:
                _note(facts, producer, _axis_of_output(producer), Fact("unsure", certain=state.certain, why=why))
        states[id(step)] = _after(step, state)
    return facts


# Facts


def _note(facts: Facts, layer: Layer, axis: str, fact: Fact) -> None:
    """Notes a fact; two that differ, of a layer that is used twice, are unsure."""
    known = facts.get((id(layer), axis))
    if known is not None and known != fact:
        fact = Fact("unsure", certain=fact.certain, why="it is used twice, on features of two kinds")
    facts[id(layer), axis] = fact


def _note_inputs(facts: Facts, layer: Layer, state: State, *, on_map: bool) -> None:
    """Notes what the state before a layer says of its inputs."""
    fact = _fact_of_inputs(layer, state, on_map=on_map)
    if fact is not None and (layer.takes is not None or layer.kind == "attention"):
        _note(facts, layer, "in", fact)


def _fact_of_inputs(layer: Layer, state: State, *, on_map: bool) -> Fact | None:
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


def _note_producers(facts: Facts, layer: Layer, state: State) -> None:
    """Notes what a convolution says of the outputs of the layers before it, which it takes as a feature map."""
    if not layer.is_convolution or state.what not in ("folded", "ordered"):
        return
    for producer in state.producers:
        if producer.is_per_feature:
            facts.pop((id(producer), "in"), None)  # its features are those of the map
        _note(facts, producer, _axis_of_output(producer), _fact_of_output(producer, layer, state))


def _fact_of_output(producer: Layer, convolution: Layer, state: State) -> Fact:
    if producer.gives == convolution.takes:
        return Fact("plain", certain=state.certain)
    if state.what == "folded" and state.certain and not convolution.kind.startswith("convolution 1d"):
        return Fact("flat", convolution.takes, convolution.layout)
    why = f"its output seems to be folded into the feature map that {convolution.place!r} takes"
    return Fact("unsure", certain=state.certain, why=why)


def _axis_of_output(layer: Layer) -> str:
    return "in" if layer.is_per_feature else "out"


# States


def _before(step: Step, states: dict[int, State]) -> State:
    """The state before a step, from those after the steps whose output it takes."""
    inputs = [states.get(id(one), State("raw", shape=one.given, certain=step.certain)) for one in step.inputs]
    state = _joined(inputs, step) if inputs else State("raw", shape=step.given)
    return state if step.certain else replace(state, certain=False)


def _joined(states: list[State], step: Step) -> State:
    """The state of what several branches give together."""
    if len(states) == 1:
        return states[0]
    certain = all(state.certain for state in states)
    kinds = {state.what for state in states}
    into_vector = step.given is not None and len(step.given) == 1
    unsure = next((state for state in states if state.what == "unsure"), None)
    if unsure is not None:
        return replace(unsure, certain=certain, joined=unsure.joined or into_vector)
    if "map" in kinds and kinds <= {"map", "ordered", "folded", "raw"}:
        joined = _joined_map(states, step, certain)
        if joined is not None:
            return joined
    if kinds <= {"ordered", "raw"}:
        producers = () if step.what == "concat" else tuple(layer for state in states for layer in state.producers)
        return State("ordered", producers=tuple(dict.fromkeys(producers)), certain=certain)
    if step.what != "concat" and len({(s.what, s.channels, s.layout) for s in states}) == 1:
        return replace(states[0], certain=certain)
    why = "branches of several kinds are joined before it"
    return State("unsure", certain=certain, why=why, joined=into_vector)


def _joined_map(states: list[State], step: Step, certain: bool) -> State | None:
    """The map that branches give together, maps among them; None if folded features do not fit into it."""
    maps = [state for state in states if state.what == "map"]
    layouts = {state.layout for state in maps}
    layout = layouts.pop() if len(layouts) == 1 else None
    counted = [state.channels for state in maps]
    channels = _channels(step.given, layout) if step.given else None
    if channels is None and None not in counted:
        channels = (sum if step.what == "concat" else max)(one for one in counted if one is not None)
    folded = [layer for state in states if state.what == "folded" for layer in state.producers]
    if folded and (step.what == "concat" or any(layer.gives != channels for layer in folded)):
        return None
    return State("map", channels, layout, certain=certain)


def _after(step: Step, state: State) -> State:
    """The state after a step, from the one before it."""
    if step.layer is not None:
        return _after_layer(step.layer, state)
    follows = _AFTER.get(step.what)
    return state if follows is None else follows(step, state)


def _after_layer(layer: Layer, state: State) -> State:
    if layer.is_convolution:
        return State("map", layer.gives, layer.layout, certain=state.certain)
    if layer.is_per_feature:
        follows = state.what == "ordered" and state.producers and state.producers[0].gives == layer.takes
        return replace(state, producers=(*state.producers, layer)) if follows else state
    if layer.kind == OWN and state.what not in ("ordered", "raw"):
        return state.unsure(f"{layer.place!r} before it may change the order of features")
    if layer.kind != "dense":
        return state.ordered()
    if state.what == "map" and (state.certain or layer.takes == state.channels):
        # Applied to each position, where torch must have its channels last for once.
        return State("map", layer.gives, None, producers=(layer,), certain=state.certain)
    if state.what == "raw" and state.shape is not None and len(state.shape) > 2:
        return State("map", layer.gives, None, certain=state.certain)
    return state.ordered(layer)


def _after_input(step: Step, state: State) -> State:
    return State("raw", shape=step.given, certain=state.certain)


def _after_flatten(step: Step, state: State) -> State:
    shape = step.taken or state.shape
    if state.what in ("unsure", "flat") or (shape is not None and len(shape) <= 1):
        return state
    if state.what == "map":
        return _flattened_map(state, shape, moves_channels=step.moves_channels)
    if state.what == "raw" and shape is not None and len(shape) > 2 and 1 not in (shape[0], shape[-1]):
        return state.unsure("it takes flattened data, whose channels may be first or last")
    if state.what in ("ordered", "folded") and step.moves_channels and shape is not None:
        return state.unsure("a sequence is flattened as if its channels were first")
    return state.ordered(*state.producers)


def _flattened_map(state: State, shape: tuple[int | None, ...] | None, *, moves_channels: bool) -> State:
    channels, layout = state.channels, state.layout
    if layout is None:
        return state.unsure("a map is flattened whose layout cannot be told")
    if shape is not None and _channels(shape, layout) is not None:
        channels = _channels(shape, layout)
    if moves_channels:
        if layout == "last":
            return state.unsure("a map with channels last is flattened as if first")
        layout = "last"
    return State("flat", channels, layout, certain=state.certain)


def _after_reshape(step: Step, state: State) -> State:
    rank = None if step.given is None else len(step.given)
    if state.what == "unsure":
        return state
    if state.what == "raw":
        return _after_input(step, state)
    if state.what == "map":
        if rank == 1 and step.given:
            return _after_flatten(replace(step, moves_channels=False), state)
        if step.given and state.layout == "last" and step.given[-1] == state.channels:
            return State("map", state.channels, None, certain=state.certain)  # as tokens
    elif state.what in ("ordered", "folded"):
        if rank == 1:
            return state.ordered(*state.producers)
        if state.producers and rank is not None:
            return State("folded", shape=step.given, producers=state.producers, certain=state.certain)
        if state.what == "ordered" and not state.producers:
            return state.ordered()
    return state.unsure("a reshape before it may change the order of features")


def _after_pool(step: Step, state: State) -> State:
    if state.what != "map":
        return state
    if step.given is not None and step.given[-1] != state.channels and state.layout != "first":
        return state.unsure("an operation before it changes the number of channels")
    return state.ordered()


def _after_code(step: Step, state: State) -> State:
    """The state after code known by its shapes only: they show a move of channels, but among axes of one size."""
    taken, given = step.taken, step.given
    if state.what == "unsure":
        return state
    if state.is_vector:
        return state.ordered()
    one_size = state.what == "map" and taken is not None and taken.count(state.channels) != 1
    if given in (None, taken) and not one_size:
        return state
    if state.what == "map" and given and len(given) == 1 and (given[0] != state.channels or not one_size):
        return _after_pool(step, state)
    return state.unsure("code before it may change the order of features")


def _after_unknown(_: Step, state: State) -> State:
    if state.what == "unsure":
        return state
    return (
        state.ordered() if state.is_vector else state.unsure("an operation before it may change the order of features")
    )


def _after_pass(step: Step, state: State) -> State:
    if state.what not in ("map", "flat") or not step.taken or not step.given:
        return state
    if _channels(step.taken, state.layout) == _channels(step.given, state.layout):
        return state
    return state.unsure("an operation before it changes the number of channels")


_AFTER: dict[str, Callable[[Step, State], State]] = {
    "input": _after_input,
    "flatten": _after_flatten,
    "reshape": _after_reshape,
    "pool": _after_pool,
    "code": _after_code,
    "other": _after_unknown,
    "pass": _after_pass,
}
"""What becomes of the state, by `Step.what`; what is not here leaves it as it is."""


def _channels(shape: Iterable[int | None] | None, layout: Layout | None) -> int | None:
    """The size of the axis of channels; None where it is not known which that is."""
    sizes = tuple(shape or ())
    if not sizes or layout is None:
        return None
    return sizes[-1] if layout == "last" else sizes[0]
