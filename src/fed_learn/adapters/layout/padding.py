"""What is put around feature maps, in numbers: the frameworks have other words for it, and for "same" other results."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

Sides = tuple[tuple[int, int], ...]
"""Of each axis of a map, how much comes before it and after it."""

Window = tuple[int, int]
"""Of one axis, how much of the map a convolution sees at a time, and its stride."""


@dataclass(frozen=True)
class Pad:
    """One ring around a map.

    Attributes:
        mode: `zeros`, `reflect`, `replicate`, `circular`; or `same`: zeros, as many as the size of the map asks for.
        sides: How wide it is; of `same`, nothing.
        windows: Of `same`, those of the convolution.
    """

    mode: str
    sides: Sides = ()
    windows: tuple[Window, ...] = ()

    def __str__(self) -> str:
        if self.mode == "same":
            return "'same', whose zeros depend on the size of the map"
        each = [str(one) if one == other else f"({one}, {other})" for one, other in self.sides]
        text = each[0] if len(set(each)) == 1 else " by ".join(each)
        return text if self.mode == "zeros" else f"{self.mode} {text}".strip()


@dataclass(frozen=True)
class Padding:
    """All that is put around the maps which a convolution takes.

    Attributes:
        pads: From the inside to the outside; none that is empty.
        places: The layers in front of the convolution that do some of it.
        sizes: Of the maps that the convolution takes; None where not known.

    Example:
        >>> one, other = Padding.zeros([(1, 1)]), Padding.same([(3, 2)])
        >>> one.agrees(other.on([7])), one.agrees(other.on([8])), one.agrees(other)
        (True, False, False)
        >>> print(one, Padding.same([(3, 1)]), other.on([8]))
        1 1 'same', here (0, 1)
    """

    pads: tuple[Pad, ...] = ()
    places: tuple[str, ...] = field(default=(), compare=False)
    sizes: tuple[int | None, ...] | None = field(default=None, compare=False)

    @classmethod
    def zeros(cls, sides: Iterable[tuple[int, int]], mode: str = "zeros") -> "Padding":
        """Rings of this width; zeros by default."""
        return cls(_joined([Pad(mode, tuple((int(a), int(b)) for a, b in sides))]))

    @classmethod
    def same(cls, windows: Iterable[Window], mode: str = "zeros") -> "Padding":
        """What "same" means to both frameworks: with strides, the size of the map decides."""
        windows = tuple(windows)
        if all(1 in window for window in windows):
            return cls.zeros([_zeros_of_same(window, 0) for window in windows], mode)
        return cls((Pad("same", windows=windows),))

    def behind(self, place: str, pad: Pad) -> "Padding":
        """This one, with a layer in front that pads too."""
        return replace(self, pads=_joined([pad, *self.pads]), places=(place, *self.places))

    def on(self, sizes: Sequence[int | None]) -> "Padding":
        """This one, on maps of these sizes."""
        return replace(self, sizes=tuple(sizes))

    def agrees(self, other: "Padding") -> bool:
        """Whether both come to the same."""
        return self.pads == other.pads or self._in_numbers() == other._in_numbers()

    def _in_numbers(self) -> tuple[Pad, ...]:
        sizes = self.sizes
        if sizes is None or None in sizes:
            return self.pads
        known = [size for size in sizes if size is not None]
        return _joined(
            [
                Pad("zeros", tuple(map(_zeros_of_same, pad.windows, known))) if pad.mode == "same" else pad
                for pad in self.pads
            ]
        )

    def __str__(self) -> str:
        text = " and ".join(map(str, self.pads)) or "none"
        numbers = self._in_numbers()
        if numbers != self.pads:
            text = f"'same', here {' and '.join(map(str, numbers)) or 'none'}"
        return text + (f" (with {', '.join(map(repr, self.places))})" if self.places else "")


def _joined(pads: Iterable[Pad]) -> tuple[Pad, ...]:
    """Without empty rings, and one ring of zeros for two that follow one another."""
    joined: list[Pad] = []
    for pad in pads:
        if pad.sides and not any(map(any, pad.sides)):
            continue
        if joined and joined[-1].mode == pad.mode == "zeros":
            sides = zip(joined[-1].sides, pad.sides, strict=True)
            joined[-1] = Pad("zeros", tuple((a + c, b + d) for (a, b), (c, d) in sides))
        else:
            joined.append(pad)
    return tuple(joined)


def _zeros_of_same(window: Window, size: int) -> tuple[int, int]:
    """The zeros that "same" puts before and after an axis of this size."""
    span, stride = window
    total = span - 1 if stride == 1 else max((-(-size // stride) - 1) * stride + span - size, 0)
    return total // 2, total - total // 2
