"""Keras layers as neutral layers. Nothing here imports Keras: it is there when there are layers.

Which layers a model has, and in which order it calls them, is left to `keras_models`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fed_learn.adapters.layout.layers import BIASES, CHANNELS, CROPPING, OWN, Layer, Layout, Part, Slot, gate_parts
from fed_learn.adapters.layout.padding import Padding

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
    transposed = "Transpose" in keras_class(layer)
    kind = f"convolution {rank}d" + (" transposed" if transposed else "")
    both: dict[str, object] = {"strides": tuple(layer.strides), "dilation": tuple(layer.dilation_rate)}
    if transposed:
        both[CROPPING] = _cropping(layer)
    elif type(layer).call.__module__.startswith("keras."):
        both["padding"] = _padding(layer)
    both |= settings
    layout = layout_of(layer.data_format)
    return Layer(layer.path + name, type(layer).__name__, kind, found, both, takes=takes, gives=gives, layout=layout)


def _spans(layer: Any) -> list[int]:
    """How much of each axis of a map the kernel covers."""
    return [(size - 1) * rate + 1 for size, rate in zip(layer.kernel_size, layer.dilation_rate, strict=True)]


def _padding(layer: Any) -> Padding:
    spans = _spans(layer)
    if layer.padding == "same":
        return Padding.same(zip(spans, layer.strides, strict=True))
    return Padding.zeros([(span - 1 if layer.padding == "causal" else 0, 0) for span in spans])


def _cropping(layer: Any) -> tuple[tuple[int, int], ...]:
    """How much of each axis is cut off in front and behind (`CROPPING`).

    "valid" cuts nothing off; "same" makes `stride` times the size unless `output_padding` says otherwise.
    """
    more = layer.output_padding
    ends = []
    for i, (span, stride) in enumerate(zip(_spans(layer), layer.strides, strict=True)):
        behind = more[i] if isinstance(more, list | tuple) else more
        if layer.padding == "valid":
            ends.append((0, min(span - stride, 0) if behind is None else -behind))
        else:
            total = span - stride if behind is None else span - span % 2 - behind
            before = max(total // 2, 0)
            ends.append((before, total - before))
    return tuple(ends)


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
        _convolved(
            layer, second, narrow, gives, " (pointwise)", strides=ones_each, dilation=ones_each, padding=Padding()
        ),
    ]


def _axis_of(layer: Any, axis: Any) -> str:
    """The setting `axis`: first or last, or `CHANNELS` where there is no other; `keras_models` knows which it is."""
    axes = list(axis) if isinstance(axis, list | tuple) else [axis]
    shape = (layer.get_build_config() or {}).get("input_shape") or ()
    if len(axes) != 1:
        return f"{axes}"
    number = axes[0] % len(shape) if shape else axes[0]
    if len(shape) == 2:
        return CHANNELS
    return {len(shape) - 1: "last", 1: "first"}.get(number, f"number {axes[0]}")


def _normalized(layer: Any, kind: str, found: tuple[Slot, ...], size: int | None, **more: Any) -> list[Layer]:
    settings = {"epsilon": layer.epsilon, "axis": _axis_of(layer, layer.axis)}
    return [Layer(layer.path, type(layer).__name__, kind, found, settings, more, takes=size, gives=size)]


def _batch_norm(layer: Any) -> list[Layer]:
    size = int(layer.moving_mean.shape[0])
    roles = {"gamma": "scale", "beta": "offset", "moving_mean": "mean", "moving_variance": "variance"}
    found = _slots(layer, **{name: _vector(role, size, "in") for name, role in roles.items()})
    return _normalized(layer, "batch norm", found, size)


def _layer_norm(layer: Any) -> list[Layer]:
    kind = "rms norm" if keras_class(layer) == "RMSNormalization" else "layer norm"
    if getattr(layer, "rms_scaling", False):
        kind = "layer norm with rms_scaling"
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
    if len(several) > 1:
        return [Layer(layer.path, type(layer).__name__, "prelu", found)]
    settings: dict[str, object] = {"axis": _axis_of(layer, 1 + int(several[0][0])) if several else CHANNELS}
    return [Layer(layer.path, type(layer).__name__, "prelu", found, settings, takes=size, gives=size)]


def _embedding(layer: Any) -> list[Layer]:
    rows, width = map(int, layer.embeddings.shape)
    found = _slots(layer, embeddings=Part("table", (("index", rows), ("out", width))))
    settings: dict[str, object] = {"max_norm": None, "mask_zero": bool(layer.mask_zero)}
    return [Layer(layer.path, type(layer).__name__, "embedding", found, settings, gives=width)]


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
    settings = {"add_zero_attn": False, "attention_axes": tuple(layer._attention_axes)}
    return [Layer(layer.path, type(layer).__name__, "attention", found, settings, gives=width)]


def _recurrent(layer: Any) -> list[Layer]:
    cells = getattr(layer.cell, "cells", [layer.cell])
    if any(keras_class(cell) not in GATES for cell in cells):
        return []
    layers = []
    for number, cell in enumerate(cells):
        place = layer.path if len(cells) == 1 else f"{layer.path}[{number}]"
        settings = {"activations": _activations(cell), "backwards": bool(layer.go_backwards)}
        layers.append(_recurrent_layer(layer, place, [cell], _cell_slots(cell, ""), settings))
    return layers


def _bidirectional(layer: Any) -> list[Layer]:
    forward, backward = layer.forward_layer, layer.backward_layer
    if any(keras_class(getattr(one, "cell", None)) not in GATES for one in (forward, backward)):
        return []
    found = _cell_slots(forward.cell, "") + _cell_slots(backward.cell, "backward ")
    settings = {
        "activations": _activations(forward.cell),
        "activations of the way back": _activations(backward.cell),
        "backwards": bool(forward.go_backwards),
    }
    described = _recurrent_layer(layer, layer.path, [forward.cell, backward.cell], found, settings)
    if layer.merge_mode != "concat":
        described.requires["merge_mode"] = layer.merge_mode
    return [described]


def _activations(cell: Any) -> tuple[str, ...]:
    gates = [getattr(cell, name, None) for name in ("activation", "recurrent_activation")]
    return tuple(_name_of(gate) for gate in gates if gate is not None)


def _name_of(function: Any) -> str:
    """The name of an activation: that of Keras's own alone, else with all that makes it what it is."""
    if isinstance(function, partial):
        given = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{_name_of(function.func)}({', '.join(given)})"
    inner = getattr(function, "activation", None)
    if keras_class(function) == "Activation" and inner is not None:
        return _name_of(inner)
    if keras_class(function):
        config = {name: value for name, value in function.get_config().items() if name not in ("name", "dtype")}
        return f"{type(function).__name__}({', '.join(f'{name}={value!r}' for name, value in config.items())})"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    module = getattr(function, "__module__", type(function).__module__)
    return str(name) if module.startswith("keras.") else f"{module}.{name}"


def _recurrent_layer(
    layer: Any, place: str, cells: list[Any], found: tuple[Slot, ...], settings: dict[str, object]
) -> Layer:
    cell, both = cells[0], len(cells) > 1
    kind, hint = " and ".join(dict.fromkeys(KINDS[keras_class(one)] for one in cells)), ""
    settings = {**settings, "stateful": bool(layer.stateful)}
    if any(not getattr(one, "reset_after", True) for one in cells):
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
