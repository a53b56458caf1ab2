"""The steps of a Keras model, in the order of its graph where it has one, else in the order of its attributes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fed_learn.adapters.layout.keras_layers import keras_class, layers_of, own_layer
from fed_learn.adapters.layout.layers import CHANNELS, OWN, Description, Layer, Step, chained
from fed_learn.adapters.layout.padding import Pad
from fed_learn.adapters.layout.settings import count_pads
from fed_learn.adapters.models import variables
from fed_learn.weights import Schema

MERGES = {"Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Divide", "TrueDivide"}
RESHAPES = {"Reshape", "Permute", "RepeatVector", "Transpose", "ExpandDims", "Squeeze", "Moveaxis", "Swapaxes"}
FOREIGN = {"Lambda", "TFSMLayer"}
"""Layers of Keras's own that run the code of others."""
PADS = {"constant": "zeros", "reflect": "reflect"}
"""What `keras.ops.pad` calls `mode`."""


def describe(model: Any) -> Description:
    """The description of a Keras model or layer.

    Raises:
        ModelError, DtypeError: See `fed_learn.adapters.variables`.
    """
    schema = Schema((v.name, (v.shape, v.dtype)) for v in variables(model))
    steps = _Walk({}).of(model)
    for step in steps:
        step.loose = not step.certain
    count_pads(steps)
    layers = {id(step.layer): step.layer for step in steps if step.layer is not None}
    _name_axes(layers.values())
    return Description("keras", schema, tuple(layers.values()), tuple(steps), {})


def _name_axes(layers: Iterable[Layer]) -> None:
    """Says of the layers with one number per channel whether their axis is that of the channels."""
    layouts = {layer.layout for layer in layers if layer.layout is not None} or {"last"}
    for layer in layers:
        if layer.settings.get("axis") in layouts:
            layer.settings["axis"] = CHANNELS
        elif layer.settings.get("axis") in ("first", "last"):
            other = "last" if layer.settings["axis"] == "first" else "first"
            layer.settings["axis"] = f"the {layer.settings['axis']}, where channels are {other}"


@dataclass(eq=False)
class _Scope:
    """One call of a nested model: what its inputs are in the graph around it."""

    outer: "_Scope | None" = None
    inputs: dict[int, Any] = field(default_factory=dict)


class _Walk:
    """Goes through a model, and through the models in it."""

    def __init__(self, layers: dict[int, list[Layer]]) -> None:
        self.layers = layers
        self.steps: list[Step] = []
        self.done: dict[object, Step] = {}
        self.scopes: dict[object, _Scope] = {}

    def of(self, model: Any) -> list[Step]:
        graph = _graph_of(model)
        if graph is None:
            self._list(model, (Step("input"),), certain=keras_class(model) == "Sequential")
        else:
            scope = _Scope()
            for output in graph.outputs:
                self._trace(output, scope)
        return self.steps

    def _list(self, layer: Any, inputs: tuple[Step, ...], *, certain: bool) -> Step:
        """Steps of a layer that has no graph: the layers in it, one after the other."""
        steps = chained(self._listed(layer), inputs, certain=certain)
        self.steps += steps
        return steps[-1] if steps else inputs[0]

    def _listed(self, layer: Any) -> Iterator[Step]:
        if _graph_of(layer) is not None:
            nested = _Walk(self.layers)
            yield from (step for step in nested.of(layer) if step.what != "input")
            return
        known, inner = self._layers(layer), _inner(layer)
        yield from (Step("layer", layer=one) for one in known)
        if known and known[0].kind != OWN:
            return
        if not inner and not known:
            shape = (layer.get_build_config() or {}).get("input_shape")
            plain = isinstance(shape, tuple | list) and all(size is None or isinstance(size, int) for size in shape)
            yield _without_variables(layer, [tuple(shape[1:])] if plain and shape else [], None)
        for child in inner:
            yield from self._listed(child)

    def _layers(self, layer: Any) -> list[Layer]:
        """What the variables of a layer are, but not those of layers in it if its class is not known."""
        if id(layer) not in self.layers:
            known = layers_of(layer) if getattr(layer, "weights", ()) else []
            own = own_layer(layer) if known is None else None
            self.layers[id(layer)] = known or ([] if own is None else [own])
        return self.layers[id(layer)]

    def _trace(self, output: Any, scope: _Scope) -> None:
        """The steps that lead to an output: those of each branch together, in the order of the inputs."""
        left: list[tuple[Any, _Scope, bool]] = [(output, scope, False)]
        while left:
            tensor, scope, ready = left.pop()
            key = (id(tensor), id(scope))
            if key in self.done:
                continue
            needed = self._needed(tensor, scope)
            if ready:
                self.done[key] = self._step(tensor, scope, tuple(self.done[id(t), id(s)] for t, s in needed))
            else:
                left.append((tensor, scope, True))
                left += [(t, s, False) for t, s in reversed(needed)]

    def _needed(self, tensor: Any, scope: _Scope) -> list[tuple[Any, _Scope]]:
        """The tensors that this one is computed from; for that of a nested model, or its input, the one it is."""
        operation, index, position = tensor._keras_history
        if id(operation) in scope.inputs and scope.outer is not None:
            return [(scope.inputs[id(operation)], scope.outer)]
        if operation is None:
            return []
        inputs = operation._inbound_nodes[index].input_tensors
        graph = _graph_of(operation)
        if graph is None or len(graph.inputs) != len(inputs):
            return [(one, scope) for one in inputs]
        called = (id(operation), index, id(scope))
        if called not in self.scopes:
            names = (id(one._keras_history[0]) for one in graph.inputs)
            self.scopes[called] = _Scope(scope, dict(zip(names, inputs, strict=True)))
        return [(graph.outputs[position], self.scopes[called])]

    def _step(self, tensor: Any, scope: _Scope, inputs: tuple[Step, ...]) -> Step:
        operation, index, _ = tensor._keras_history
        if operation is None:
            return self._add(Step("input", given=_shape(tensor)))
        node = operation._inbound_nodes[index]
        same = (id(operation), index, id(scope), "step")
        if id(operation) in scope.inputs or same[:3] in self.scopes:
            return inputs[0]
        if same not in self.done:
            layers = self._layers(operation)
            if _inner(operation) and not (layers and layers[0].kind != OWN):
                # A layer that only wraps another leaves no doubt of the order.
                self.done[same] = self._list(operation, inputs, certain=keras_class(operation) == "TimeDistributed")
            elif layers:
                steps = chained([Step("layer", layer=layer) for layer in layers], inputs, certain=True)
                steps[0].taken = _shape(node.input_tensors[0])
                self.steps += steps
                self.done[same] = steps[-1]
            else:
                step = _without_variables(operation, [_shape(one) for one in node.input_tensors], _shape(tensor))
                step.inputs = inputs
                self.done[same] = self._add(step)
        return self.done[same]

    def _add(self, step: Step) -> Step:
        self.steps.append(step)
        return step


def _graph_of(model: Any) -> Any:
    """The functional graph of a model, if it has one."""
    names = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("keras.")}
    if "Sequential" in names:
        return model._functional
    return model if "Functional" in names else None


def _inner(layer: Any) -> list[Any]:
    """The layers that a layer has in it, in the order of its attributes."""
    return [one for one in getattr(layer, "_layers", ()) if keras_class(one) != "InputLayer"]


def _shape(tensor: Any) -> tuple[int | None, ...]:
    return tuple(None if size is None else int(size) for size in tensor.shape[1:])


def _without_variables(
    operation: Any, taken: list[tuple[int | None, ...]], given: tuple[int | None, ...] | None
) -> Step:
    """What an operation without variables does with the features, by its class and its shapes."""
    kind = keras_class(operation)
    first = taken[0] if taken else None
    if kind == "InputLayer":
        return Step("input", given=given)
    if kind in FOREIGN or not type(operation).call.__module__.startswith("keras."):
        return Step("code" if len(taken) < 2 or given in taken else "other", taken=first, given=given)
    if kind == "Flatten":
        moves = operation.data_format == "channels_first"
        return Step("flatten", taken=first, given=given, moves_channels=moves)
    if kind == "Concatenate":
        return Step("concat", taken=first, given=given)
    if kind == "Permute" and operation.dims[-1] != len(operation.dims):
        return Step("other", taken=first, given=given)
    if kind in RESHAPES:
        shape = given or getattr(operation, "target_shape", None)
        return Step("reshape", taken=first, given=None if shape is None else tuple(shape))
    if kind.startswith("Global") or (first is not None and given is not None and len(first) > len(given) == 1):
        return Step("pool", taken=first, given=given)
    if len(taken) > 1:
        return Step("merge" if kind in MERGES or given in taken else "other", taken=first, given=given)
    pad = _pad(operation, kind)
    place = str(getattr(operation, "path", operation.name))
    return Step("pass", taken=first, given=given, pad=None if pad is None else (place, pad))


def _pad(operation: Any, kind: str) -> Pad | None:
    """What an operation puts around a map; None if it does not pad."""
    if kind.startswith("ZeroPadding"):
        ends = [operation.padding] if kind == "ZeroPadding1D" else operation.padding
    elif kind == "Pad" and operation.mode in PADS and len(operation.pad_width) > 2:
        _, *ends = operation.pad_width
        ends = ends[:-1] if not any(ends[-1]) else ends[1:]  # those of the channels
    else:
        return None
    return Pad(PADS.get(getattr(operation, "mode", ""), "zeros"), tuple((int(a), int(b)) for a, b in ends))
