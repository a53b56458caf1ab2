"""Maps between the weight dicts of two models of one architecture, above all of torch and Keras: `align`.

`torch_layers`, `keras_layers` and `keras_models` describe models in the neutral words of `layers`; `matching` and
`names` find which layer goes with which, `settings` and `padding` what else differs between them, `flow` and `order`
where flattened feature maps change the order of features; `layout_map` is the result.
Frameworks are found by the type of a model: nothing is imported that the caller has not imported.
"""

import sys
from collections.abc import Mapping
from typing import Any

from fed_learn.adapters.layout import keras_models, torch_layers
from fed_learn.adapters.layout.flow import facts_of
from fed_learn.adapters.layout.layers import BIASES, Description, Layer, Pair
from fed_learn.adapters.layout.layout_map import LayoutMap, Link, Place, Side
from fed_learn.adapters.layout.matching import matched
from fed_learn.adapters.layout.order import in_common_order, pinned_channels
from fed_learn.adapters.layout.settings import Note, compared
from fed_learn.errors import LayoutError, ModelError

__all__ = ["LayoutMap", "align"]


def align(
    source_model: object,
    target_model: object,
    *,
    pairs: Mapping[str, str] | None = None,
    flattened: Mapping[str, int] | None = None,
    strict: bool = True,
) -> LayoutMap:
    """A map between the weight dicts of two models of the same architecture, in torch or Keras 3 each.

    | torch | Keras |
    | --- | --- |
    | Linear | Dense |
    | Conv1d to 3d, also grouped and depthwise; two for a separable one | Conv1D to 3D, DepthwiseConv, SeparableConv |
    | ConvTranspose1d to 3d | Conv1DTranspose to 3D |
    | BatchNorm, LayerNorm, RMSNorm | BatchNormalization, LayerNormalization, RMSNormalization |
    | GroupNorm, InstanceNorm | GroupNormalization |
    | MultiheadAttention, also in TransformerEncoderLayer and TransformerDecoderLayer | MultiHeadAttention |
    | LSTM, GRU, RNN and their cells, in one or both directions | LSTM, GRU (reset_after), SimpleRNN, Bidirectional |
    | a recurrent layer of several | as many layers |
    | Embedding, PReLU | Embedding, PReLU |

    Layers are matched in the order in which the models have them: that of the graph in Keras, that of registration in
    torch and in subclassed Keras models; by their names where all names agree. Where branches stand in another order,
    shapes decide, or names that both sides have, or else `pairs`. So do names where the order puts layers of one name
    apart, though they fit: if these only change places, names win; else the models are refused until `pairs` says more.

    Padding is compared in numbers, with that of layers right before a convolution. Keras's "same" with strides is that
    of torch only on some sizes, which must follow from the model. What code of a model pads is not seen: use layers.

    The order of features after a flattened feature map follows from the graph of a Keras model, or from Flatten layers.
    What a model does in its own code to the order of features or channels (a permutation, a pixel shuffle) is not seen.

    Variables that one side alone has (`num_batches_tracked`, the running statistics of a BatchNorm) stay local. A bias
    that one side alone has is a difference, and refused.

    Args:
        source_model: A torch module or a Keras model that is built.
        target_model: The same.
        pairs: Layers that go together, by their places: `{"source layer": "target layer"}`. Layers of classes that are
            not known here correspond only so: variable by variable, of the same shapes, moved as they are.
        flattened: Place of a layer, on either side, whose inputs are a flattened feature map → channels of that map;
            1 if its inputs are in the same order on both sides. Only where that cannot be told.
        strict: Refuse settings that are no weights and make outputs differ (the `epsilon` of a normalization, strides,
            padding, activations of an LSTM). Else they become `notes` of the map.

    Returns:
        The map; both ways.

    Raises:
        LayoutError: The models do not correspond, or more than one map is possible; names the layers, and says why.
        ModelError: Neither torch nor Keras knows a model, or it is not built yet.
        DtypeError, WeightsTypeError: A variable of a model cannot be averaged.

    Example:
        >>> import numpy as np, torch
        >>> one = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
        >>> other = torch.nn.ModuleDict({"head": torch.nn.Linear(3, 2, bias=False)})
        >>> m = align(one, other)
        >>> m({"0.weight": np.ones((2, 3), np.float32)})
        {'head.weight': array([[1., 1., 1.],
               [1., 1., 1.]], dtype=float32)}
        >>> print(m)
        LayoutMap of 1 layers, 1 variables to 1
        0 → head
    """
    source, target = _described(source_model), _described(target_model)
    found = matched(source, target, pairs or {})
    notes, remarks = compared(source, target, found)
    if strict:
        _refuse_any(notes)
    links, *unlinked = _linked(source, target, found, flattened or {})
    return LayoutMap(
        _side(source, unlinked[0]),
        _side(target, unlinked[1]),
        links,
        [(a.place, b.place) for a, b in found],
        [f"{a.place!r} and {b.place!r}: {note}" for a, b, note in notes] + remarks,
    )


def _described(model: Any) -> Description:
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    # Keras first: with its torch back end, a Keras layer is a torch module as well.
    if isinstance(model, getattr(keras, "Layer", ())):
        found = keras_models.describe(model)
    elif isinstance(model, getattr(getattr(torch, "nn", None), "Module", ())):
        found = torch_layers.describe(model)
    else:
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise ModelError(f"a {kind} is neither a torch module nor a Keras model", model=kind)
    described = {slot.name for layer in found.layers for slot in layer.slots} | found.aliases.keys()
    unknown = [name for name in found.schema if name not in described]
    if unknown:
        raise LayoutError(
            f"model: {unknown[0]!r} belongs to no layer that is known here", name=unknown[0], reason="unknown variable"
        )
    return found


def _refuse_any(notes: list[Note]) -> None:
    if notes:
        a, b, note = notes[0]
        more = f", and {len(notes) - 1} layers more" if len(notes) > 1 else ""
        raise LayoutError(
            f"{a.place!r} and {b.place!r}: {note}{more}: outputs would differ. Make them equal, or take the map as it "
            "is with strict=False",
            source_layer=a.place,
            target_layer=b.place,
            reason=note,
        )


def _linked(
    source: Description, target: Description, found: list[Pair], flattened: Mapping[str, int]
) -> tuple[list[Link], set[str], set[str]]:
    """The links of all layers, and the names that are in none, on both sides."""
    known = facts_of(source), facts_of(target)
    pinned = pinned_channels((source, target), found, flattened)
    links: list[Link] = []
    for pair in found:
        a, b = in_common_order((source, target), known, pair, pinned)
        mine, theirs = _places(a), _places(b)
        for role, place in mine.items():
            if role in theirs:
                links.append(Link((place,), (theirs[role],)))
            elif role + BIASES[0] in theirs:
                links.append(Link((place,), tuple(theirs[role + end] for end in BIASES)))
        for role, place in theirs.items():
            if role not in mine and role + BIASES[0] in mine:
                links.append(Link(tuple(mine[role + end] for end in BIASES), (place,)))
    named = {name for link in links for name, _ in link.source}, {name for link in links for name, _ in link.target}
    return links, source.schema.keys() - named[0], target.schema.keys() - named[1]


def _places(layer: Layer) -> dict[str, Place]:
    return {role: (slot.name, part) for role, (slot, part) in layer.parts().items()}


def _side(model: Description, unlinked: set[str]) -> Side:
    only = tuple(name for name in model.schema if model.aliases.get(name, name) in unlinked)
    return Side(model.schema, only, model.aliases)
