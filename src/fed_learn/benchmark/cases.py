"""The cases: which models, how many clients, in what memory, and who takes part."""

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

from fed_learn import kernels
from fed_learn.benchmark import peers, sides
from fed_learn.benchmark.inputs import Inputs, Shapes, make_inputs, resnet50, transformer
from fed_learn.benchmark.sides import Side
from fed_learn.benchmark.stream_peers import STREAM
from fed_learn.weights import BFLOAT16


@dataclass(frozen=True)
class Sizes:
    """How large the models are.

    Attributes:
        resnet_width: Channels of the stem of the ResNet-50; the network has 64.
        flat: Elements of the model that is one flat array.
        blocks: Blocks of the transformer.
        width: Width of the transformer.
        total: Elements of all clients together, where their number varies.
        small: Rows and columns of the ten small matrices.
    """

    resnet_width: int
    flat: int
    blocks: int
    width: int
    total: int
    small: int


FULL = Sizes(resnet_width=64, flat=1 << 25, blocks=6, width=768, total=1 << 28, small=64)
"""About a gigabyte of inputs in most cases."""
QUICK = Sizes(resnet_width=24, flat=1 << 22, blocks=2, width=384, total=1 << 25, small=64)
"""Some 150 MB in most cases: shows that all works, and roughly how sides compare."""

FLOAT32 = np.dtype(np.float32)
SLOW_AND_FAST = tuple(peers.BATCH)
FAST = ("numpy running sum", "numpy in place", "torch._foreach_add_", "torch add_")
FOR_HALVES = (*FAST, "Flower aggregate", "NVFlare helper", "NVFlare helper, torch")
FOR_INTEGERS = ("numpy running sum", "numpy.average", "Flower aggregate", "NVFlare helper", "numba")

Variant = Literal["batch", "exact", "difference", "threads", "stream", "stream-borrow", "stream-exact"]
Among = Literal["all", "quick", "none"]
"""Which peers take part: all, those that start quickly, none."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: What the command line calls it.
        about: What it is, in a few words.
        shapes: The shapes of one client's model at some sizes.
        dtype: Of all arrays.
        clients: Their number.
        layout: How the arrays lie in memory, see `inputs.LAYOUTS`.
        reuse: Whether there is memory for the result already.
        variant: What is done.
        peers: Names of the peers that take part where they can.
    """

    name: str
    about: str
    shapes: Callable[[Sizes], Shapes]
    dtype: np.dtype[Any] = FLOAT32
    clients: int = 10
    layout: str = "plain"
    reuse: bool = True
    variant: Variant = "batch"
    peers: tuple[str, ...] = ()

    @property
    def streams(self) -> bool:
        """Whether contributions are added one by one; then one of them is the unit of all figures."""
        return self.variant.startswith("stream")

    def inputs(self, sizes: Sizes) -> Inputs:
        """Makes the inputs; the same ones every time."""
        return make_inputs(self.shapes(sizes), self.dtype, self.clients, layout=self.layout, reuse=self.reuse)

    def why_not(self) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.variant == "stream-borrow" and not sides.can_borrow():
            return "Accumulator.add has no argument borrow"
        if self.layout == "used-heap" and not hasattr(mmap, "MAP_PRIVATE"):
            return "this system has no private anonymous memory maps"
        return None

    def ours(self) -> list[Side]:
        """This package's sides. The first one is what the case is about."""
        # The torch kernel is for tensors on a device, and is there only once something has imported torch.
        kernel, *others = [name for name in kernels.available() if name != "torch"]
        match self.variant:
            case "threads":
                return [sides.on_threads(sides.average(kernel), n) for n in reversed(sides.numbers_of_threads())]
            case "exact":
                return [sides.average(kernel, exact=True), sides.average(kernel)]
            case "difference":
                return [sides.move(kernel), sides.average(kernel)]
            case "stream-exact":
                return [sides.stream(kernel, exact=True), sides.stream(kernel)]
            case "stream-borrow":
                return [sides.stream(kernel, borrow=True), sides.stream(kernel)]
            case "stream":
                return [sides.stream(name) for name in (kernel, *others)]
        # Memory conditions tell something about the kernel that is limited by memory.
        return [sides.average(name) for name in (kernel, *(others if self.layout == "plain" else ()))]

    def base(self, ours: Sequence[Side]) -> str:
        """The name of the side to which the others are compared: the first of ours, or the plain mean beside others."""
        return ours[1].name if self.variant in ("exact", "stream-exact", "difference") else ours[0].name

    def others(self, among: Among = "all") -> tuple[list[Side], dict[str, str]]:
        """The sides that are not this package's, and why the peers of the case that are not among them are not."""
        if self.variant == "threads":  # the limit by number of threads, beside ours
            return [sides.on_threads(sides.limit(), n) for n in reversed(sides.numbers_of_threads()[:-1])], {}
        if among == "none":
            return [], {}
        registry = STREAM if self.streams else peers.BATCH
        reasons = {name: peers.why_not(registry[name], self.dtype, quick=among == "quick") for name in self.peers}
        found = [registry[name] for name, reason in reasons.items() if reason is None]
        return found, {name: reason for name, reason in reasons.items() if reason is not None}

    def limit(self) -> Side:
        """The bare read of the inputs."""
        if self.variant == "threads":
            return sides.on_threads(sides.limit(), sides.numbers_of_threads()[-1])
        return sides.limit()


def _resnet50(sizes: Sizes) -> Shapes:
    return resnet50(sizes.resnet_width)


def _flat(sizes: Sizes) -> Shapes:
    return {"w": (sizes.flat,)}


def _half_as_flat(sizes: Sizes) -> Shapes:
    return {"w": (sizes.flat // 2,)}


def _transformer(sizes: Sizes) -> Shapes:
    return transformer(sizes.blocks, sizes.width)


def _small(sizes: Sizes) -> Shapes:
    return {f"layer{i}.weight": (sizes.small, sizes.small) for i in range(10)}


def _share_of(clients: int) -> Callable[[Sizes], Shapes]:
    return lambda sizes: {"w": (sizes.total // clients,)}


LAYOUTS = {
    "used-heap": "small pages of a used heap",
    "64k": "distances of multiples of 64 KiB",
    "off4": "4 bytes past an aligned address",
    "off20": "20 bytes past an aligned address",
}


def _batches() -> list[Case]:
    found = []
    for name, about, shapes in (("resnet50", "ResNet-50", _resnet50), ("flat", "one flat array", _flat)):
        found.append(Case(name, f"{about}, result in memory that is reused", shapes, peers=SLOW_AND_FAST))
        fresh = SLOW_AND_FAST if name == "resnet50" else FAST
        found.append(Case(f"{name}-fresh", f"{about}, result in new memory", shapes, reuse=False, peers=fresh))
        found += [
            Case(f"{name}-{layout}", f"{about}, {condition}", shapes, layout=layout, peers=FAST)
            for layout, condition in LAYOUTS.items()
        ]
    blocks = "blocks of a transformer"
    found += [
        Case(dtype.name, blocks, _transformer, dtype, peers=FOR_HALVES) for dtype in (BFLOAT16, np.dtype("float16"))
    ]
    found.append(Case("float32-same-count", f"{blocks}, as many elements", _transformer, peers=FOR_HALVES))
    found += [
        Case(f"clients-{n}", "one flat array, always as many bytes in all", _share_of(n), clients=n, peers=FAST)
        for n in (2, 8, 32, 128)
    ]
    found.append(Case("small", "ten small matrices", _small, peers=SLOW_AND_FAST))
    found += [
        Case(f"integers-{dtype}", "one flat array, half as long", _half_as_flat, np.dtype(dtype), peers=FOR_INTEGERS)
        for dtype in peers.INTEGERS
    ]
    return found


_ONE_BY_ONE = "ResNet-50, one contribution after the other"
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *_batches(),
        Case("streaming", _ONE_BY_ONE, _resnet50, variant="stream", peers=tuple(STREAM)),
        Case("streaming-borrow", f"{_ONE_BY_ONE}, borrowed", _resnet50, variant="stream-borrow", peers=("torch add_",)),
        Case("exact", "ResNet-50, exact sums", _resnet50, variant="exact"),
        Case("exact-streaming", f"{_ONE_BY_ONE}, exact sums", _resnet50, variant="stream-exact"),
        Case("difference", "ResNet-50, the model moved by a mean difference", _resnet50, variant="difference"),
        Case("threads", "one flat array, by number of threads", _flat, variant="threads"),
    )
}
"""Name → case, in the order in which they are measured."""


def select(names: Sequence[str]) -> list[Case]:
    """The cases of some names, in the order of `CASES`.

    Args:
        names: Names of cases; `integers` means every case that begins with `integers-` unless it is one itself; `*`
            and `?` stand for any characters. None: all.

    Raises:
        ValueError: A name fits no case; says which do.

    Example:
        >>> [case.name for case in select(["clients", "flat", "*-64k"])]
        ['resnet50-64k', 'flat', 'flat-64k', 'clients-2', 'clients-8', 'clients-32', 'clients-128']
    """
    chosen: set[str] = set()
    for name in names or ("*",):
        pattern = name if name in CASES or "*" in name or "?" in name else f"{name}-*"
        fitting = {case for case in CASES if fnmatchcase(case, pattern)}
        if not fitting:
            raise ValueError(f"no case is called {name!r}; there are {', '.join(CASES)}")
        chosen |= fitting
    return [case for name, case in CASES.items() if name in chosen]
