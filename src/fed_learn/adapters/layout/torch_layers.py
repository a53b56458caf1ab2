"""torch modules as neutral layers. Nothing here imports torch: it is there when there are modules.

A module does not say in which order it calls its children: they are taken in the order in which they were registered,
which is the order of the `state_dict`, but for torch's own modules, whose order is known.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fed_learn.adapters.layout.layers import (
    BIASES,
    CHANNELS,
    CROPPING,
    OWN,
    Description,
    Layer,
    Part,
    Slot,
    Step,
    chained,
    gate_parts,
)
from fed_learn.adapters.layout.padding import Pad, Padding
from fed_learn.adapters.layout.settings import count_pads
from fed_learn.adapters.models import variables
from fed_learn.adapters.torch import unwrapped
from fed_learn.errors import ModelError
from fed_learn.weights import Schema

Slots = dict[str, Slot | None]
GATES = {
    "LSTM": ("input", "forget", "cell", "output"),
    "GRU": ("reset", "update", "new"),
    "RNN": ("only",),
}
ACTIVATIONS = {"LSTM": ("tanh", "sigmoid"), "GRU": ("tanh", "sigmoid")}
PADS = {"ZeroPad": "zeros", "ReflectionPad": "reflect", "ReplicationPad": "replicate", "CircularPad": "circular"}
"""Begin of a class → what convolutions call `padding_mode`."""

MOVES_FEATURES = {"PixelShuffle", "PixelUnshuffle", "ChannelShuffle", "Fold", "Unfold"}


def describe(model: Any) -> Description:
    """The description of a module.

    Raises:
        ModelError, DtypeError, WeightsTypeError: See `fed_learn.adapters.variables`.

    Example:
        >>> import torch
        >>> [layer.kind for layer in describe(torch.nn.TransformerEncoderLayer(4, 2)).layers]
        ['attention', 'layer norm', 'dense', 'dense', 'layer norm']
    """
    module = unwrapped(model)
    found = variables(module)
    schema = Schema((v.name, (v.shape, v.dtype)) for v in found)
    identities = {v.name: v.identity for v in found}
    steps = chained(_Walk(schema).of(module, ""), (Step("input"),), certain=False)
    count_pads(steps)
    layers: list[Layer] = []
    named: dict[object, str] = {}
    for layer in (step.layer for step in steps if step.layer is not None):
        if any(identities[slot.name] not in named for slot in layer.slots):
            layers.append(layer)
            for slot in layer.slots:
                named.setdefault(identities[slot.name], slot.name)
    own = {slot.name for layer in layers for slot in layer.slots}
    aliases = {n: named[i] for n, i in identities.items() if n not in own and i in named}
    return Description("torch", schema, tuple(layers), tuple(steps), aliases)


class _Walk:
    """Goes through a module and its children, each once."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.seen: set[int] = set()

    def of(self, module: Any, place: str, *, listed: bool = False) -> Iterator[Step]:
        """The steps of a module, or of its children where it has no variables of its own.

        Args:
            module: The module.
            place: Its name.
            listed: Whether it is one of a Sequential, so that the next step takes its output.
        """
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if any(cls.__module__ == "torch.jit._script" for cls in type(module).__mro__):
            raise ModelError(
                f"model: {place!r} is a scripted module, whose layers cannot be seen: align the module that it was "
                "made from, which has the same names",
                model=_class_name(module),
            )
        kind = _torch_class(module)
        prefix = f"{place}." if place else ""
        own = [prefix + name for name in (*module._parameters, *module._buffers) if prefix + name in self.schema]
        if kind in LAYERS:
            layers = LAYERS[kind](module, place, _Slots(self.schema, prefix))
            within = {name for name in self.schema if name.startswith(prefix)}
            if own and {slot.name for layer in layers for slot in layer.slots} == within:
                yield from (Step("layer", layer=layer) for layer in layers)
                return
        if not own and not module._modules:
            yield _without_variables(kind or "", module, place, listed)
        if own:
            shapes = [self.schema[name] for name in own]
            slots = [
                Slot(name, *shape, (Part(f"variable {i}", _numbered(shape[0])),))
                for i, (name, shape) in enumerate(zip(own, shapes, strict=True))
            ]
            yield Step("layer", layer=Layer(place, _class_name(module), OWN, tuple(slots)))
        for name, child in _children(kind, module):
            if name == "_orig_mod":
                yield from self.of(child, place, listed=listed)
            else:
                yield from self.of(child, prefix + name, listed=kind == "Sequential")


class _Slots:
    """Makes slots of the variables that a module has."""

    def __init__(self, schema: Schema, prefix: str) -> None:
        self.schema = schema
        self.prefix = prefix

    def __call__(self, name: str, *parts: Part) -> tuple[Slot, ...]:
        """The slot of a variable, or nothing where the module has none of this name."""
        name = self.prefix + name
        return (Slot(name, *self.schema[name], parts),) if name in self.schema else ()


def _numbered(shape: Any) -> tuple[tuple[str, int], ...]:
    return tuple((f"{i:02}", int(size)) for i, size in enumerate(shape))


def _torch_class(module: Any) -> str | None:
    """The class of torch's own that it is of, by the name that is known here if there is one."""
    names = [cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.")]
    names = names[: names.index("Module")] if "Module" in names else names
    return next((name for name in names if name in LAYERS or name in ORDERS), names[0] if names else None)


def _class_name(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _children(kind: str | None, module: Any) -> list[tuple[str, Any]]:
    children = list(module.named_children())
    order = ORDERS.get(kind or "")
    if order is None:
        return children
    called = order(bool(getattr(module, "norm_first", False)))
    return sorted(children, key=lambda child: called.index(child[0]) if child[0] in called else len(called))


def _encoder_layer(norm_first: bool) -> list[str]:
    if norm_first:
        return ["norm1", "self_attn", "norm2", "linear1", "linear2"]
    return ["self_attn", "norm1", "linear1", "linear2", "norm2"]


def _decoder_layer(norm_first: bool) -> list[str]:
    if norm_first:
        return ["norm1", "self_attn", "norm2", "multihead_attn", "norm3", "linear1", "linear2"]
    return ["self_attn", "norm1", "multihead_attn", "norm2", "linear1", "linear2", "norm3"]


ORDERS: dict[str, Callable[[bool], list[str]]] = {
    "TransformerEncoderLayer": _encoder_layer,
    "TransformerDecoderLayer": _decoder_layer,
}
"""The order in which torch's own modules call their children, where they register them in another."""


def _without_variables(kind: str, module: Any, place: str, listed: bool) -> Step:
    if kind == "Flatten":
        return Step("flatten") if (module.start_dim, module.end_dim) == (1, -1) else Step("reshape")
    if kind == "Unflatten":
        return Step("reshape", given=(None, *(int(size) for size in module.unflattened_size)))
    if kind.startswith("Adaptive") and set(_tuple(module.output_size, 1)) == {1}:
        return Step("pool")
    if kind in MOVES_FEATURES:
        return Step("other")
    pad = _pad(kind, module)
    return Step("pass", pad=None if pad is None else (place, pad), loose=not listed)


def _pad(kind: str, module: Any) -> Pad | None:
    """What a layer puts around a map; None if it does not pad, or cuts something off."""
    if kind.startswith("ConstantPad"):
        mode: str | None = "zeros" if module.value == 0 else f"constant {module.value}"
    else:
        mode = PADS.get(kind[:-2])
    if mode is None or min(module.padding) < 0:
        return None
    ends = tuple(map(int, module.padding))
    return Pad(mode, tuple(zip(ends[-2::-2], ends[::-2], strict=True)))


def _tuple(value: Any, count: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * count


def _linear(module: Any, place: str, slots: _Slots) -> list[Layer]:
    gives, takes = map(int, module.weight.shape)
    found = slots("weight", Part("kernel", (("out", gives), ("in", takes)))) + slots("bias", _vector("bias", gives))
    return [Layer(place, type(module).__name__, "dense", found, takes=takes, gives=gives)]


def _vector(role: str, size: int, axis: str = "out") -> Part:
    return Part(role, ((axis, size),))


def _convolution(module: Any, place: str, slots: _Slots) -> list[Layer]:
    groups, transposed = module.groups, module.transposed
    takes, gives = module.in_channels, module.out_channels
    ends = [("in", takes // groups), ("out", gives // groups)]
    window = tuple((f"window {i}", size) for i, size in enumerate(module.kernel_size))
    axes = (("group", groups), *(ends if transposed else ends[::-1]), *window)
    found = slots("weight", Part("kernel", axes)) + slots("bias", _vector("bias", gives))
    kind = f"convolution {len(window)}d" + (" transposed" if transposed else "")
    settings: dict[str, object] = {"strides": tuple(module.stride), "dilation": tuple(module.dilation)}
    if transposed:
        settings[CROPPING] = tuple(
            (around, around - behind) for around, behind in zip(module.padding, module.output_padding, strict=True)
        )
    elif type(module).forward.__module__.startswith("torch.nn."):
        settings["padding"] = _padding(module)
    return [
        Layer(place, type(module).__name__, kind, found, settings, takes=takes, gives=gives, layout="first"),
    ]


def _padding(module: Any) -> Padding:
    if module.padding == "same":
        spans = [(size - 1) * rate + 1 for size, rate in zip(module.kernel_size, module.dilation, strict=True)]
        return Padding.same([(span, 1) for span in spans], module.padding_mode)
    around = (0,) * len(module.kernel_size) if module.padding == "valid" else module.padding
    return Padding.zeros([(each, each) for each in around], module.padding_mode)


def _batch_norm(module: Any, place: str, slots: _Slots) -> list[Layer]:
    size = module.num_features
    names = {"weight": "scale", "bias": "offset", "running_mean": "mean", "running_var": "variance"}
    found = tuple(slot for name, role in names.items() for slot in slots(name, _vector(role, size, "in")))
    found += slots("num_batches_tracked", Part("count", ()))
    return [_norm(module, place, "batch norm", found, size)]


def _norm(module: Any, place: str, kind: str, found: tuple[Slot, ...], size: int | None, **more: Any) -> Layer:
    epsilon = np.finfo(found[0].dtype).eps if module.eps is None and found else module.eps
    settings: dict[str, object] = {"epsilon": epsilon} | ({} if size is None else {"axis": CHANNELS})
    return Layer(place, type(module).__name__, kind, found, settings, more, takes=size, gives=size)


def _layer_norm(module: Any, place: str, slots: _Slots) -> list[Layer]:
    kind = "rms norm" if _torch_class(module) == "RMSNorm" else "layer norm"
    shape = tuple(module.normalized_shape)
    if len(shape) == 1:
        parts = [_vector(role, shape[0], "in") for role in ("scale", "offset")]
        found = slots("weight", parts[0]) + slots("bias", parts[1])
        return [_norm(module, place, kind, found, shape[0])]
    found = tuple(
        slot
        for name, role in (("weight", "scale"), ("bias", "offset"))
        for slot in slots(name, Part(role, _numbered(shape)))
    )
    return [_norm(module, place, kind, found, None, axes="several, as torch has them")]


def _group_norm(module: Any, place: str, slots: _Slots) -> list[Layer]:
    size = module.num_channels
    found = slots("weight", _vector("scale", size, "in")) + slots("bias", _vector("offset", size, "in"))
    return [_norm(module, place, "group norm", found, size, groups=module.num_groups)]


def _instance_norm(module: Any, place: str, slots: _Slots) -> list[Layer]:
    size = module.num_features
    found = slots("weight", _vector("scale", size, "in")) + slots("bias", _vector("offset", size, "in"))
    return [_norm(module, place, "group norm", found, size, groups=size)]


def _prelu(module: Any, place: str, slots: _Slots) -> list[Layer]:
    size = module.num_parameters
    found = slots("weight", _vector("slope", size, "in"))
    return [Layer(place, "PReLU", "prelu", found, {"axis": CHANNELS}, takes=size, gives=size)]


def _embedding(module: Any, place: str, slots: _Slots) -> list[Layer]:
    axes = (("index", module.num_embeddings), ("out", module.embedding_dim))
    found = slots("weight", Part("table", axes))
    settings: dict[str, object] = {"max_norm": module.max_norm, "mask_zero": False}
    return [Layer(place, type(module).__name__, "embedding", found, settings, gives=module.embedding_dim)]


def _attention(module: Any, place: str, slots: _Slots) -> list[Layer]:
    width, heads, dim = module.embed_dim, module.num_heads, module.head_dim
    found: tuple[Slot, ...] = ()
    which = ("query", "key", "value")
    rows = [(slice(i * width, (i + 1) * width),) for i in range(3)]
    inner = (("head", heads), ("dim", dim))
    packed = (Part(f"{role} kernel", (*inner, ("feature", width)), row) for role, row in zip(which, rows, strict=True))
    found += slots("in_proj_weight", *packed)
    for role, size in zip(which, (width, module.kdim, module.vdim), strict=True):
        found += slots(f"{role[0]}_proj_weight", Part(f"{role} kernel", (*inner, ("feature", size))))
    found += slots("in_proj_bias", *(Part(f"{role} bias", inner, row) for role, row in zip(which, rows, strict=True)))
    found += slots("out_proj.weight", Part("output kernel", (("out", width), *inner)))
    found += slots("out_proj.bias", _vector("output bias", width))
    settings: dict[str, object] = {"add_zero_attn": bool(module.add_zero_attn), "attention_axes": (1,)}
    return [Layer(place, type(module).__name__, "attention", found, settings, gives=width)]


def _recurrent(module: Any, place: str, slots: _Slots) -> list[Layer]:
    kind = module.mode.split("_")[0]
    directions = ("", "_reverse") if module.bidirectional else ("",)
    layers = []
    for number in range(module.num_layers):
        takes = module.input_size if number == 0 else module.hidden_size * len(directions)
        found: tuple[Slot, ...] = ()
        for end in directions:
            found += _cell_slots(kind, slots, f"_l{number}{end}", takes, module.hidden_size, "backward " if end else "")
        name = place if module.num_layers == 1 else f"{place}[{number}]"
        layers.append(_recurrent_layer(module, name, kind, found, takes, bool(module.bidirectional)))
    return layers


def _cell(module: Any, place: str, slots: _Slots) -> list[Layer]:
    kind = (_torch_class(module) or "").removesuffix("Cell")
    found = _cell_slots(kind, slots, "", module.input_size, module.hidden_size, "")
    return [_recurrent_layer(module, place, kind, found, module.input_size, False)]


def _recurrent_layer(module: Any, place: str, kind: str, found: tuple[Slot, ...], takes: int, both: bool) -> Layer:
    activations = ACTIVATIONS.get(kind) or (getattr(module, "nonlinearity", "tanh"),)
    settings: dict[str, object] = {"activations": activations, "backwards": False, "stateful": False}
    if both:
        settings["activations of the way back"] = activations
    gives = module.hidden_size * (2 if both else 1)
    return Layer(
        place, type(module).__name__, kind.lower(), found, settings, {"bidirectional": both}, takes=takes, gives=gives
    )


def _cell_slots(kind: str, slots: _Slots, end: str, takes: int, units: int, direction: str) -> tuple[Slot, ...]:
    gates, unit = GATES[kind], ("unit", units)

    def parts(role: str, *axes: tuple[str, int], end: str = "") -> tuple[Part, ...]:
        named = gate_parts(direction + role, gates, (unit, *axes), 0)
        return tuple(replace(part, role=part.role + end) for part in named)

    return (
        *slots(f"weight_ih{end}", *parts("kernel", ("in", takes))),
        *slots(f"weight_hh{end}", *parts("recurrent kernel", ("from", units))),
        *slots(f"bias_ih{end}", *parts("bias", end=BIASES[0])),
        *slots(f"bias_hh{end}", *parts("bias", end=BIASES[1])),
    )


LAYERS: dict[str, Callable[[Any, str, _Slots], list[Layer]]] = {
    "Linear": _linear,
    **{f"Conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": _convolution for n in (1, 2, 3)},
    "_BatchNorm": _batch_norm,
    **{f"InstanceNorm{n}d": _instance_norm for n in (1, 2, 3)},
    "LayerNorm": _layer_norm,
    "RMSNorm": _layer_norm,
    "GroupNorm": _group_norm,
    "PReLU": _prelu,
    "Embedding": _embedding,
    "MultiheadAttention": _attention,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    **dict.fromkeys(("LSTMCell", "GRUCell", "RNNCell"), _cell),
}
"""Class → how it is described. A layer some of whose variables its description lacks is not known."""
