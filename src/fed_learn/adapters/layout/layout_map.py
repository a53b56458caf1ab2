"""A map between the weight dicts of two models: a list of parts, where each lies on both sides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fed_learn.adapters.layout.layers import Part
from fed_learn.adapters.tensors import framework_of
from fed_learn.errors import NamesError, TiedVariablesError
from fed_learn.weights import Array, Schema, WeightDict, as_weight_dict, native_dtype

Place = tuple[str, Part]
"""The name of a variable, and a part of it."""


@dataclass(frozen=True)
class Link:
    """What is the same on both sides. Where there are two places on one side, it is their sum."""

    source: tuple[Place, ...]
    target: tuple[Place, ...]

    def turned(self) -> "Link":
        """The way back."""
        return Link(self.target, self.source)


@dataclass(frozen=True)
class Side:
    """The weight dict of one model.

    Attributes:
        schema: Its variables.
        only: Those that the other side lacks.
        aliases: Further names of variables → the name that counts.
    """

    schema: Schema
    only: tuple[str, ...]
    aliases: dict[str, str]


class LayoutMap:
    """A map from the weight dicts of one model to those of another; made by `align`.

    `m(weights, base=None)` gives names and layouts of the target, `m.inverse(weights, base=None)` the way back. A map
    holds no model, only names, shapes and places, and can be pickled.

    It is linear, so that differences of weights (`Kind.DIFF`) go through it as weights do: without `base`, or with a
    `base` that is itself a difference.

    Attributes:
        source: Schema of the source's weight dict.
        target: Schema of the target's.
        layers: Which layer goes with which: pairs of places.
        notes: What differs between the models and is no weight, where `align` was told to let it pass; and what
            pads without its place being seen, which was not compared.
        inverse: The map back.
        left_out: Variables that the source alone has: they may be missing from its weights, and go nowhere.
        from_base: Variables that the target alone has: `base` supplies them, and without it they are missing.
        tied: Further names of variables that the source has (tied weights), and the name that counts for each.

    Example:
        >>> import torch
        >>> from fed_learn.adapters.layout import align
        >>> with_steps, without = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2, track_running_stats=False)
        >>> m = align(with_steps, without, strict=False)
        >>> m.left_out
        ('running_mean', 'running_var', 'num_batches_tracked')
        >>> list(m({name: tensor.numpy() for name, tensor in with_steps.state_dict().items()}))
        ['weight', 'bias']
    """

    def __init__(
        self,
        source: Side,
        target: Side,
        links: Sequence[Link],
        layers: Sequence[tuple[str, str]],
        notes: Sequence[str] = (),
        inverse: "LayoutMap | None" = None,
    ) -> None:
        self._source = source
        self._target = target
        self._links = tuple(links)
        self.layers = tuple(layers)
        self.notes = tuple(notes)
        self.inverse: LayoutMap = inverse or LayoutMap(
            target, source, [link.turned() for link in links], [(b, a) for a, b in layers], notes, self
        )

    @property
    def source(self) -> Schema:
        """Schema of the source's weight dict."""
        return self._source.schema

    @property
    def target(self) -> Schema:
        """Schema of the target's weight dict."""
        return self._target.schema

    @property
    def left_out(self) -> tuple[str, ...]:
        """Variables that the source alone has."""
        return self._source.only

    @property
    def from_base(self) -> tuple[str, ...]:
        """Variables that the target alone has."""
        return self._target.only

    @property
    def tied(self) -> dict[str, str]:
        """Further names of variables of the source (tied weights), and the name that counts for each."""
        return self._source.aliases

    def __call__(self, weights: WeightDict, base: WeightDict | None = None) -> dict[str, Array]:
        """The weights in names and layouts of the target.

        Args:
            weights: The source's, whole; those in `left_out` may be missing. Values are only moved: of NaN and infinity
                nothing is said. Tensors are taken as well.
            base: The target's weights that stay: supplies `from_base`. It may hold more.
                Where the target has two biases for the source's one (a torch LSTM), they become that bias and zero;
                with `base`, the second is the base's and the first the difference, in float64 and rounded once. Where
                the base's two add up to the bias already, both stay as they are, to the bit.

        Returns:
            A new dict of new C-contiguous arrays, in the order of the target; nothing is shared with the inputs.

        Raises:
            WeightsTypeError, NamesError, ShapeError, DtypeError: The weights are not those of the source, or `base`
                lacks a variable or has it in another form; names the variable.
            TiedVariablesError: Two names of one variable have different values.
        """
        given = _checked(weights, self._source, "weights")
        kept = None if base is None else _base(base, self._base_names(), self.target)
        made: dict[str, Array] = {}
        for name, (shape, dtype) in self.target.items():
            if name not in self._target.aliases and name not in self._target.only:
                made[name] = np.empty(shape, dtype)
            elif kept is not None and name in self._target.only:
                made[name] = np.array(kept[name], dtype, order="C")
        for link in self._links:
            _move(link, given, made, kept)
        made |= {name: made[first].copy() for name, first in self._target.aliases.items() if first in made}
        return {name: made[name] for name in self.target if name in made}

    def _base_names(self) -> list[str]:
        split = [name for link in self._links if len(link.target) > 1 for name, _ in link.target]
        return list(dict.fromkeys((*self._target.only, *split)))

    def __repr__(self) -> str:
        return f"<LayoutMap of {len(self.layers)} layers, {len(self.source)} variables to {len(self.target)}>"

    def __str__(self) -> str:
        width = max((len(place) for place, _ in self.layers), default=0)
        lines = [f"{place:{width}} → {other}" for place, other in self.layers]
        lines += [f"only in the source: {name}" for name in self.left_out]
        lines += [f"only in the target: {name}" for name in self.from_base]
        return "\n".join([repr(self)[1:-1], *lines, *(f"note: {note}" for note in self.notes)])


def _move(link: Link, given: WeightDict, made: WeightDict, base: WeightDict | None) -> None:
    sources = [part.view(given[name]) for name, part in link.source]
    targets = [part.view(made[name]) for name, part in link.target]
    if len(sources) == len(targets):
        for one, other in zip(sources, targets, strict=True):
            other[...] = one
    elif len(sources) == 2:
        targets[0][...] = _sum(*sources)
    else:
        targets[0][...], targets[1][...] = sources[0], 0
        if base is not None:
            first, second = (part.view(base[name]) for name, part in link.target)
            rest = (sources[0].astype(np.float64) - second.astype(np.float64)).astype(targets[0].dtype)
            targets[0][...] = np.where(_sum(first, second) == sources[0], first, rest)
            targets[1][...] = second


def _sum(a: Array, b: Array) -> Array:
    total: Array = (a.astype(np.float64) + b.astype(np.float64)).astype(native_dtype(a.dtype))
    return total


def _checked(weights: WeightDict, side: Side, what: str) -> dict[str, Array]:
    arrays = _arrays(weights, what)
    Schema((n, form) for n, form in side.schema.items() if n not in side.only or n in arrays).check(arrays, what)
    for name, first in side.aliases.items():
        if not np.array_equal(arrays[name], arrays[first], equal_nan=arrays[name].dtype.kind not in "biu"):
            raise TiedVariablesError(
                f"{what}: {first!r} and {name!r} are one variable in the model, and differ",
                name=name,
                names=(first, name),
            )
    return arrays


def _base(base: WeightDict, names: list[str], schema: Schema) -> dict[str, Array]:
    arrays = _arrays(base, "base")
    missing = tuple(name for name in names if name not in arrays)
    if missing:
        listed = ", ".join(map(repr, missing[:5]))
        raise NamesError(f"base: misses {listed}, which only this side has", name=missing[0], missing=missing, extra=())
    needed = {name: arrays[name] for name in names}
    Schema((name, schema[name]) for name in names).check(needed, "base")
    return needed


def _arrays(weights: object, what: str) -> dict[str, Array]:
    if not isinstance(weights, Mapping):
        return as_weight_dict(weights, what)
    shown: dict[Any, Any] = dict(weights)
    for name, value in shown.items():
        framework = framework_of(type(value))
        if framework is not None:
            framework.check(value, what, name)
            shown[name] = framework.view(value, what, name)
    return as_weight_dict(shown, what)
