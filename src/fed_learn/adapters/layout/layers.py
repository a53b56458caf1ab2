"""Layers in neutral words: what a torch layer and a Keras layer have in common when they compute the same.

A layer's variables consist of parts. A part has a role (`kernel`, `bias`, the kernel of one gate) and says where in the
variable it lies and what each axis means; two layers correspond when their parts have the same roles and axes. How a
layer of a framework is described is left to `torch_layers` and `keras_layers`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from fed_learn.adapters.layout.padding import Pad
from fed_learn.weights import Array, Schema

Layout: TypeAlias = Literal["first", "last"]
"""Where feature maps have their channels."""

STATISTICS = ("mean", "variance", "count")
"""Roles of variables that training only keeps account in: one side may lack them."""

BIASES = ("@input", "@state")
"""Ends of the roles of two biases that a recurrent layer adds up; a side may have their sum in their place."""

CHANNELS = "that of the channels"
"""The setting `axis` of a layer that has one number per channel, or per feature of what has no channels."""

CROPPING = "what padding and output_padding cut off"
"""The setting of a transposed convolution: from the beginning and the end of each axis; less than 0 where it grows."""

OWN = "own"
"""The kind of a layer that is not known: it corresponds to one of its own class, or to one it is pinned to."""


@dataclass(frozen=True)
class Part:
    """A part of a variable, and the meaning of its axes.

    Attributes:
        role: What it is to the layer.
        axes: Names and sizes of the axes, after the reshape that splits what the framework has packed into one.
        index: Where in the variable it lies; everything by default.

    Example:
        >>> torch_kernel = Part("kernel", (("out", 2), ("in", 3)))
        >>> keras_kernel = Part("kernel", (("in", 3), ("out", 2)))
        >>> torch_kernel.view(np.zeros((2, 3))).shape == keras_kernel.view(np.zeros((3, 2))).shape
        True
    """

    role: str
    axes: tuple[tuple[str, int], ...]
    index: tuple[int | slice, ...] = ()

    def view(self, array: Array) -> Array:
        """The part of this array, its axes in the order of their names; a view, so that it can also be written to."""
        split = array[(*self.index, ...)].reshape([size for _, size in self.axes])
        return split.transpose(sorted(range(len(self.axes)), key=lambda i: self.axes[i][0]))

    def sizes(self) -> dict[str, int]:
        """Axis → size, to be compared."""
        return dict(self.axes)

    def split(self, axis: str, channels: int, layout: Layout) -> "Part":
        """The same part, with an axis of flattened features taken apart into channels and positions."""
        axes: list[tuple[str, int]] = []
        for name, size in self.axes:
            if name == axis:
                pieces = [(f"{axis}: channel", channels), (f"{axis}: position", size // channels)]
                axes += pieces if layout == "first" else pieces[::-1]
            else:
                axes.append((name, size))
        return replace(self, axes=tuple(axes))


@dataclass(frozen=True)
class Slot:
    """One variable of a layer.

    Attributes:
        name: Its name in the weight dict.
        shape: Its shape.
        dtype: Its dtype.
        parts: What it consists of; together they cover it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer that has variables.

    Attributes:
        place: Where it is in its model.
        type: Its class, for messages.
        kind: What it computes; layers correspond only within one kind.
        slots: Its variables.
        settings: What changes its outputs and is no weight (`epsilon`, `strides`): may be allowed to differ. What
            one of two layers does not have is not compared.
        requires: What must agree whatever the caller allows.
        takes: Features that its axis `in` takes; None where it has no such axis.
        gives: Features, or channels, that it gives.
        layout: Where its feature maps have their channels; None for layers that do not have feature maps.
        hint: What may be the reason if nothing corresponds to it.
    """

    place: str
    type: str
    kind: str
    slots: tuple[Slot, ...]
    settings: dict[str, object] = field(default_factory=dict)
    requires: dict[str, object] = field(default_factory=dict)
    takes: int | None = None
    gives: int | None = None
    layout: Layout | None = None
    hint: str = ""

    @property
    def is_convolution(self) -> bool:
        """Whether it works on feature maps and gives new ones."""
        return self.kind.startswith("convolution")

    @property
    def is_per_feature(self) -> bool:
        """Whether all it has is one number per feature, so that features keep their order through it."""
        return self.kind in ("batch norm", "layer norm", "rms norm", "group norm", "prelu")

    def parts(self) -> dict[str, tuple[Slot, Part]]:
        """Role → part, and the variable that it lies in."""
        return {part.role: (slot, part) for slot in self.slots for part in slot.parts}

    def signature(self) -> tuple[object, ...]:
        """Equal for layers that correspond by kind and shapes."""
        roles = {role: tuple(sorted(part.axes)) for role, (_, part) in self.parts().items()}
        kept = {role.split("@")[0]: axes for role, axes in roles.items() if role not in STATISTICS}
        return self.kind, tuple(sorted(kept.items())), tuple(sorted(self.requires.items()))

    def __str__(self) -> str:
        shapes = ", ".join(f"{slot.name.replace('/', '.').rsplit('.', 1)[-1]} {slot.shape}" for slot in self.slots)
        return f"{self.place!r} ({self.type}: {shapes})"


Pair: TypeAlias = tuple[Layer, Layer]
"""A layer of the source and one of the target."""


@dataclass(eq=False)
class Step:
    """One thing that a model does with its features, in the order in which it does them.

    Attributes:
        what: A `layer` with variables; or `flatten`, `reshape`, global `pool`, `merge` (sum, product), `concat`; an
            `input`; `pass` for what leaves the features where they are; `code` for what is known by its
            shapes only; `other` for what is not known.
        inputs: The steps whose output it takes.
        layer: The layer, if it is one.
        certain: Whether the inputs are known, or only follow from the order in which layers are listed.
        taken: Shape of what it takes, without the batch; None where not known.
        given: Shape of what it gives.
        moves_channels: For `flatten`: it moves the channels to the end before it flattens.
        pad: For what pads: its place, and what it puts around a map.
        loose: Whether it is only listed before the next step, and code decides where it is called.
    """

    what: Literal["layer", "flatten", "reshape", "pool", "merge", "concat", "input", "pass", "code", "other"]
    inputs: "tuple[Step, ...]" = ()
    layer: Layer | None = None
    certain: bool = True
    taken: tuple[int | None, ...] | None = None
    given: tuple[int | None, ...] | None = None
    moves_channels: bool = False
    pad: tuple[str, Pad] | None = None
    loose: bool = False


@dataclass(frozen=True, eq=False)
class Description:
    """A model in neutral words.

    Attributes:
        framework: Its framework.
        schema: Names, shapes and dtypes of its weight dict.
        layers: Its layers that have variables, each once.
        steps: What it does, in order.
        aliases: Further names of variables (tied weights) → the name that a layer has for them.
    """

    framework: Literal["torch", "keras"]
    schema: Schema
    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]
    aliases: dict[str, str]

    @property
    def layout(self) -> Layout | None:
        """Where all its feature maps have their channels; None where they differ."""
        if self.framework == "torch":
            return "first"
        if any(step.moves_channels for step in self.steps):
            return None
        found = {layer.layout for layer in self.layers if layer.layout is not None} or {"last"}
        return found.pop() if len(found) == 1 else None


def chained(steps: Iterable[Step], inputs: tuple[Step, ...], *, certain: bool) -> list[Step]:
    """The steps one after the other, the first one on these inputs."""
    chain: list[Step] = []
    for step in steps:
        step.inputs, step.certain = inputs, certain and step.certain
        inputs = (step,)
        chain.append(step)
    return chain


def gate_parts(role: str, gates: Iterable[str], axes: tuple[tuple[str, int], ...], axis: int) -> tuple[Part, ...]:
    """One part per gate, where gates follow one another along an axis.

    Example:
        >>> [part.role for part in gate_parts("kernel", ("reset", "update"), (("unit", 2), ("in", 3)), 0)]
        ['kernel.reset', 'kernel.update']
    """
    size = axes[axis][1]
    before = (slice(None),) * axis
    return tuple(
        Part(f"{role}.{gate}", axes, (*before, slice(i * size, (i + 1) * size))) for i, gate in enumerate(gates)
    )
