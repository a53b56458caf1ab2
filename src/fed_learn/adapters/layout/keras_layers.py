"""Keras layers as neutral layers. Nothing here imports Keras: it is there when there are layers.

Which layers a model has, and in which order it calls them, is left to `keras_models`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fed_learn.adapters.layout.layers import BIASES, OWN, Layer, Layout, Part, Slot, gate_parts

GATES = {
    "LSTMCell": ("input", "forget", "cell", "output"),
    "GRUCell": ("update", "reset", "new"),
    "SimpleRNNCell": ("only",),
}
KINDS = {"LSTMCell": "lstm", "GRUCell": "gru", "SimpleRNNCell": "rnn"}


def layers_of(layer: Any) -> list[Layer] | None:
    """The description of a layer that has variables; None if its class is not known, or it has more than is known."""
    kind = keras_class(layer)
    if kind not in LAYERS:
        return None
    layers = LAYERS[kind](layer)
    described = {slot.name for one in layers for slot in one.slots}
    return layers if described == {variable.path for variable in layer.weights} else None


def own_layer(layer: Any) -> Layer | None:
    """The variables that a layer of no known class has, but not those of layers in it."""
    inner = {variable.path for child in layer._layers for variable in child.weights}
    slots = tuple(
        slot_of(v, Part(f"variable {i}", tuple((f"{n:02}", int(size)) for n, size in enumerate(v.shape))))
        for i, v in enumerate(v for v in layer.weights if v.path not in inner)
    )
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    return Layer(layer.path, name, OWN, slots) if slots else None


def keras_class(layer: Any) -> str:
    """The class of Keras's own that a layer is of, by the name that is known here if there is one."""
    names = [cls.__name__ for cls in type(layer).__mro__ if cls.__module__.startswith("keras.")]
    return next((name for name in names if name in LAYERS), names[0] if names else "")


def slot_of(variable: Any, *parts: Part) -> Slot:
    """The slot of a variable."""
    return Slot(variable.path, tuple(map(int, variable.shape)), np.dtype(variable.dtype), parts)


def layout_of(data_format: str) -> Layout:
    """What Keras calls `data_format`."""
    return "first" if data_format == "channels_first" else "last"


def _slots(layer: Any, **parts: Part | tuple[Part, ...]) -> tuple[Slot, ...]:
    """Slots of the layer's variables, by their names; a variable that it does not have is left out."""
    found = {variable.name: variable for variable in layer.weights}
    named = {name: part if isinstance(part, tuple) else (part,) for name, part in parts.items()}
    return tuple(slot_of(found[name], *part) for name, part in named.items() if name in found)


def _vector(role: str, size: int, axis: str = "out") -> Part:
    return Part(role, ((axis, size),))


def _window(layer: Any) -> tuple[tuple[str, int], ...]:
    return tuple((f"window {i}", int(size)) for i, size in enumerate(layer.kernel_size))


def _dense(layer: Any) -> list[Layer]:
    takes, gives = map(int, layer.kernel.shape)
    found = _slots(layer, kernel=Part("kernel", (("in", takes), ("out", gives))), bias=_vector("bias", gives))
    return [Layer(layer.path, "Dense", "dense", found, takes=takes, gives=gives)]


def _convolved(layer: Any, found: tuple[Slot, ...], takes: int, gives: int, name: str = "", **settings: Any) -> Layer:
    rank = len(layer.kernel_size)
    kind = f"convolution {rank}d" + (" transposed" if "Transpose" in keras_class(layer) else "")
    both: dict[str, object] = {"strides": tuple(layer.strides), "dilation": tuple(layer.dilation_rate), **settings}
    layout = layout_of(layer.data_format)
    return Layer(layer.path + name, type(layer).__name__, kind, found, both, takes=takes, gives=gives, layout=layout)


def _convolution(layer: Any) -> list[Layer]:
    *_, narrow, gives = map(int, layer.kernel.shape)
    groups = int(layer.groups)
    axes = (*_window(layer), ("in", narrow), ("group", groups), ("out", gives // groups))
    found = _slots(layer, kernel=Part("kernel", axes), bias=_vector("bias", gives))
    return [_convolved(layer, found, narrow * groups, gives)]


def _transposed_convolution(layer: Any) -> list[Layer]:
    *_, gives, takes = map(int, layer.kernel.shape)
    axes = (*_window(layer), ("group", 1), ("out", gives), ("in", takes))
    found = _slots(layer, kernel=Part("kernel", axes), bias=_vector("bias", gives))
    return [_convolved(layer, found, takes, gives)]


def _depthwise_convolution(layer: Any) -> list[Layer]:
    *_, channels, multiplier = map(int, layer.kernel.shape)
    axes = (*_window(layer), ("in", 1), ("group", channels), ("out", multiplier))
    found = _slots(layer, kernel=Part("kernel", axes), bias=_vector("bias", channels * multiplier))
    return [_convolved(layer, found, channels, channels * multiplier)]


def _separable_convolution(layer: Any) -> list[Layer]:
    *_, channels, multiplier = map(int, layer.depthwise_kernel.shape)
    *ones, narrow, gives = map(int, layer.pointwise_kernel.shape)
    depthwise = (*_window(layer), ("in", 1), ("group", channels), ("out", multiplier))
    window = tuple((f"window {i}", size) for i, size in enumerate(ones))
    pointwise = (*window, ("in", narrow), ("group", 1), ("out", gives))
    first = _slots(layer, depthwise_kernel=Part("kernel", depthwise))
    second = _slots(layer, pointwise_kernel=Part("kernel", pointwise), bias=_vector("bias", gives))
    ones_each = (1,) * len(ones)
    return [
        _convolved(layer, first, channels, narrow, " (depthwise)"),
        _convolved(layer, second, narrow, gives, " (pointwise)", strides=ones_each, dilation=ones_each),
    ]


def _normalized(layer: Any, kind: str, found: tuple[Slot, ...], size: int | None, **more: Any) -> list[Layer]:
    settings = {"epsilon": layer.epsilon}
    return [Layer(layer.path, type(layer).__name__, kind, found, settings, more, takes=size, gives=size)]


def _batch_norm(layer: Any) -> list[Layer]:
    size = int(layer.moving_mean.shape[0])
    roles = {"gamma": "scale", "beta": "offset", "moving_mean": "mean", "moving_variance": "variance"}
    found = _slots(layer, **{name: _vector(role, size, "in") for name, role in roles.items()})
    return _normalized(layer, "batch norm", found, size)


def _layer_norm(layer: Any) -> list[Layer]:
    kind = "rms norm" if keras_class(layer) == "RMSNormalization" else "layer norm"
    roles = {"gamma": "scale", "beta": "offset", "scale": "scale"}
    shape = next((tuple(map(int, v.shape)) for v in layer.weights), ())
    if len(shape) == 1:
        found = _slots(layer, **{name: _vector(role, shape[0], "in") for name, role in roles.items()})
        return _normalized(layer, kind, found, shape[0])
    axes = tuple((f"{i:02}", size) for i, size in enumerate(shape))
    found = _slots(layer, **{name: Part(role, axes) for name, role in roles.items()})
    return _normalized(layer, kind, found, None, axes="several, as Keras has them")


def _group_norm(layer: Any) -> list[Layer]:
    size = next((int(v.shape[0]) for v in layer.weights), 0)
    found = _slots(layer, gamma=_vector("scale", size, "in"), beta=_vector("offset", size, "in"))
    return _normalized(layer, "group norm", found, size, groups=int(layer.groups))


def _prelu(layer: Any) -> list[Layer]:
    shape = tuple(map(int, layer.alpha.shape))
    several = [(f"{i:02}", size) for i, size in enumerate(shape) if size > 1]
    size = int(np.prod(shape))
    axes = (("in", size),) if len(several) <= 1 else tuple(several)
    found = _slots(layer, alpha=Part("slope", axes))
    takes = size if len(several) <= 1 else None
    return [Layer(layer.path, type(layer).__name__, "prelu", found, takes=takes, gives=takes)]


def _embedding(layer: Any) -> list[Layer]:
    rows, width = map(int, layer.embeddings.shape)
    found = _slots(layer, embeddings=Part("table", (("index", rows), ("out", width))))
    return [Layer(layer.path, type(layer).__name__, "embedding", found, gives=width)]


def _attention(layer: Any) -> list[Layer]:
    found: tuple[Slot, ...] = ()
    for role in ("query", "key", "value"):
        dense = getattr(layer, f"_{role}_dense")
        width, heads, dim = map(int, dense.kernel.shape)
        inner = (("head", heads), ("dim", dim))
        kernel = Part(f"{role} kernel", (("feature", width), *inner))
        found += _slots(dense, kernel=kernel, bias=Part(f"{role} bias", inner))
    dense = layer._output_dense
    heads, dim, width = map(int, dense.kernel.shape)
    kernel = Part("output kernel", (("head", heads), ("dim", dim), ("out", width)))
    found += _slots(dense, kernel=kernel, bias=_vector("output bias", width))
    return [Layer(layer.path, type(layer).__name__, "attention", found, gives=width)]


def _recurrent(layer: Any) -> list[Layer]:
    cells = getattr(layer.cell, "cells", [layer.cell])
    if any(keras_class(cell) not in GATES for cell in cells):
        return []
    layers = []
    for number, cell in enumerate(cells):
        place = layer.path if len(cells) == 1 else f"{layer.path}[{number}]"
        layers.append(_recurrent_layer(layer, place, cell, _cell_slots(cell, ""), bool(layer.go_backwards)))
    return layers


def _bidirectional(layer: Any) -> list[Layer]:
    forward, backward = layer.forward_layer, layer.backward_layer
    if any(keras_class(getattr(one, "cell", None)) not in GATES for one in (forward, backward)):
        return []
    found = _cell_slots(forward.cell, "") + _cell_slots(backward.cell, "backward ")
    described = _recurrent_layer(layer, layer.path, forward.cell, found, False, both=True)
    if layer.merge_mode != "concat":
        described.requires["merge_mode"] = layer.merge_mode
    return [described]


def _recurrent_layer(
    layer: Any, place: str, cell: Any, found: tuple[Slot, ...], backwards: bool, both: bool = False
) -> Layer:
    kind = KINDS[keras_class(cell)]
    gates = [getattr(cell, name, None) for name in ("activation", "recurrent_activation")]
    settings = {"activations": tuple(gate.__name__ for gate in gates if gate is not None), "backwards": backwards}
    hint = ""
    if kind == "gru" and not cell.reset_after:
        kind, hint = "gru with reset_after=False", "torch has only what Keras calls reset_after=True"
    name = type(layer).__name__ if not both else f"{type(layer).__name__}({type(layer.forward_layer).__name__})"
    takes, gives = int(cell.kernel.shape[0]), int(cell.units) * (2 if both else 1)
    return Layer(place, name, kind, found, settings, {"bidirectional": both}, takes=takes, gives=gives, hint=hint)


def _cell_slots(cell: Any, direction: str) -> tuple[Slot, ...]:
    gates, unit = GATES[keras_class(cell)], ("unit", int(cell.units))
    kernel = gate_parts(f"{direction}kernel", gates, (("in", int(cell.kernel.shape[0])), unit), 1)
    recurrent = gate_parts(f"{direction}recurrent kernel", gates, (("from", unit[1]), unit), 1)
    bias = gate_parts(f"{direction}bias", gates, (unit,), 0)
    if getattr(cell, "reset_after", False):
        bias = tuple(
            Part(part.role + end, part.axes, (row, *part.index)) for row, end in enumerate(BIASES) for part in bias
        )
    return _slots(cell, kernel=kernel, recurrent_kernel=recurrent, bias=bias)


LAYERS: dict[str, Callable[[Any], list[Layer]]] = {
    "Dense": _dense,
    **{f"Conv{n}D": _convolution for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": _transposed_convolution for n in (1, 2, 3)},
    **{f"DepthwiseConv{n}D": _depthwise_convolution for n in (1, 2)},
    **{f"SeparableConv{n}D": _separable_convolution for n in (1, 2)},
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "PReLU": _prelu,
    "Embedding": _embedding,
    "MultiHeadAttention": _attention,
    "Bidirectional": _bidirectional,
    "RNN": _recurrent,
}
"""Class → how it is described."""
