"""The bits of the torch kernel at a place, against those of the native kernel: every difference is counted.

A check takes a `Comparison`, which makes inputs of a seed, gives them to both, and compares byte by byte. Where a call
is refused, both must refuse it by the same error, about the same contributor, variable and element.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import reference as ref
import torch
from benchmarks.cuda_parts.course import Course
from benchmarks.cuda_parts.places import USED, Place, array_of

import fed_learn as fl
from fed_learn.kernels import unfused
from fed_learn.kernels.torch import TorchKernel
from fed_learn.weights import Array

Shape: TypeAlias = int | tuple[int, ...]
Model: TypeAlias = dict[str, Array]
Outcome: TypeAlias = Mapping[str, Any] | tuple[Any, ...]

BLOCK = 1024
"""`fused.BLOCK`, which cannot be read where Triton is missing; where it can, `compare` does so."""
SMALL: tuple[Shape, ...] = (1, 3, BLOCK - 1, BLOCK, BLOCK + 1, (), (2, 0), (3, 5))
FEW: tuple[Shape, ...] = (1, BLOCK - 1, BLOCK + 1, (), (2, 0))
SIGNED = tuple(dtype for dtype in ref.INTEGERS if dtype.kind == "i")
HALVES = (np.dtype("float16"), ref.BFLOAT16)
NATIVE = partial(fl.kernels.resolve, "native")
KERNEL = TorchKernel()


@dataclass
class Comparison:
    """What was compared at a place.

    Attributes:
        place: Where.
        course: Whose time it takes.
        compared: Bytes.
        differing: Those that differ.
        refused: Calls that both refused alike.
        examples: What the first differences were.
    """

    place: Place
    course: Course
    compared: int = 0
    differing: int = 0
    refused: int = 0
    examples: list[str] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(20))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Those of most checks."""
        return FEW if self.place.interpreted else SMALL

    def patterns(self, dtype: np.dtype[Any], shape: Shape) -> Array:
        """Random finite bit patterns: numbers of all binades, subnormals, zeros of both signs; all of an integer."""
        if dtype.kind == "b":
            return ref.values(self.rng, dtype, shape)
        array = np.frombuffer(self.rng.bytes(dtype.itemsize * int(np.prod(shape))), dtype).copy()
        if dtype.kind not in "iu":
            with np.errstate(invalid="ignore"):  # signalling NaNs are among them
                array[~np.isfinite(array)] = -0.0
        return array.reshape(shape)

    def values(self, dtype: np.dtype[Any], shape: Shape) -> Array:
        """Values as models hold them."""
        return np.array(ref.values(self.rng, dtype, shape), dtype)

    def weights(self, count: int) -> list[float]:
        """Aggregation weights, most of them no integers."""
        return [float(a) for a in self.rng.permutation([3.0, 0.1, 1 / 3, 7e-5, 12345.678, 1.0] * 5)[:count]]

    def same(self, what: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """The same names, dtypes, shapes and bytes."""
        self.course.check_time()
        if list(found) != list(expected):
            self._differ(f"{what}: other names", 1)
            return
        for name in expected:
            x, y = array_of(found[name]), array_of(expected[name])
            if (x.dtype, x.shape) != (y.dtype, y.shape):
                self._differ(f"{what}, {name!r}: {x.dtype} {x.shape} for {y.dtype} {y.shape}", 1)
                continue
            x, y = (np.ascontiguousarray(each).reshape(-1) for each in (x, y))
            differ = x.view(np.uint8) != y.view(np.uint8)
            self.compared += differ.size
            if differ.any():
                first = int(np.flatnonzero(differ)[0]) // x.itemsize
                count = int(np.count_nonzero(differ))
                self._differ(f"{what}, {name!r}[{first}]: {x[first]!r} for {y[first]!r}", count)

    def alike(self, what: str, found: Outcome, expected: Outcome) -> None:
        """The same bits, or the same refusal."""
        if isinstance(found, Mapping) and isinstance(expected, Mapping):
            self.same(what, found, expected)
        elif found == expected:
            self.refused += 1
        else:
            self._differ(f"{what}: {_brief(found)} for {_brief(expected)}", 1)

    def _differ(self, example: str, count: int) -> None:
        self.differing += count
        self.examples.append(example)

    def averaged(self, what: str, arrays: Sequence[Model], weights: Sequence[float], **options: Any) -> None:
        """Compares `weighted_average`, and that it stays where it was."""
        sent = [self.place.model(one) for one in arrays]
        found = outcome(fl.weighted_average, sent, weights, **options)
        expected = outcome(fl.weighted_average, arrays, weights, kernel="native", **options)
        self.alike(what, found, expected)
        if isinstance(found, Mapping):
            stayed = {str(tensor.device) for tensor in found.values()} == {self.place.device}
            if not stayed:
                self._differ(f"{what}: the mean does not lie on {self.place.device}", 1)

    def operation(self, name: str, inputs: Sequence[Sequence[Array]], *arguments: Any, dtypes: Sequence[Any]) -> None:
        """Compares an operation of the kernel itself, with what it flags.

        Args:
            name: One whose last argument is where results go.
            inputs: Lists of arrays, as it takes them.
            arguments: What comes between these and the outputs.
            dtypes: Of the outputs.
        """
        shapes = [array.size for array in inputs[0]]
        outputs = [np.zeros(size, dtype) for size, dtype in zip(shapes, dtypes, strict=True)]
        results: Any = [self.place.tensor(output) for output in outputs]
        sent = [[self.place.tensor(array) for array in arrays] for arrays in inputs]
        found = getattr(KERNEL, name)(*sent, *arguments, results)
        expected = getattr(NATIVE(), name)(*inputs, *arguments, outputs)
        self.alike(f"flags of {name}", tuple(found), tuple(expected))
        # Of integers, what is flagged is not defined.
        kept = [i for i, flag in enumerate(expected) if outputs[i].dtype in ref.FLOATS or not flag]
        self.same(name, {f"{i}": results[i] for i in kept}, {f"{i}": outputs[i] for i in kept})


def outcome(call: Callable[..., Any], *arguments: Any, **options: Any) -> Outcome:
    """What a call returns, or what it was refused for."""
    try:
        returned: Mapping[str, Any] = call(*arguments, **options)
    except fl.FedLearnError as error:
        return (type(error).__name__, *(getattr(error, name, None) for name in ("contributor", "name", "index")))
    return returned


def _brief(found: Outcome) -> str:
    return f"a result of {len(found)} variables" if isinstance(found, Mapping) else str(found)[:200]


def seams(place: Place) -> list[Shape]:
    """Sizes around those of tiles and blocks; in the interpreter, which takes its time, of blocks alone."""
    tiles = (unfused.ALONE_ON_CPU, unfused.TILE_ON_CPU) if place.device == "cpu" else (unfused.ALONE, unfused.TILE)
    large = [size + more for size in tiles for more in (-1, 0, 1)]
    return [2 * BLOCK + 9, BLOCK] if place.interpreted else [*SMALL, *large]


def means(c: Comparison) -> None:
    counts: Sequence[int] = (1, 30) if c.course.quick else (1, 2, 3, 10, 30)
    if c.place.interpreted:
        counts = (4,) if c.course.quick else (1, 4, 12)
    for dtype in ref.DTYPES:
        for make in (c.patterns, c.values):
            for count in counts:
                arrays = [{f"{shape}": make(dtype, shape) for shape in c.shapes} for _ in range(count)]
                c.averaged(f"mean of {count}, {dtype}", arrays, c.weights(count))


def sizes(c: Comparison) -> None:
    for dtype in ref.DTYPES:
        make = c.patterns if dtype.kind not in "iu" else c.values
        arrays = [{f"{shape}": make(dtype, shape) for shape in seams(c.place)} for _ in range(3)]
        c.averaged(f"sizes, {dtype}", arrays, c.weights(3))


def ties(c: Comparison) -> None:
    """Halfway between neighbours, of both signs, and the mean of subnormals."""
    for dtype in ref.DTYPES:
        if dtype.kind == "b":
            arrays = [{"w": np.array([0, 0, 1, 1], bool)}, {"w": np.array([0, 1, 0, 1], bool)}]
        elif dtype.kind in "iu":
            arrays = [{"w": np.arange(k, 120 + k).astype(dtype)} for k in (0, 1)]
            if dtype.kind == "i":
                arrays = [one | {"m": -one["w"]} for one in arrays]
        else:
            words = np.dtype(f"u{dtype.itemsize}")
            starts = np.concatenate([np.zeros(1), ref.values(c.rng, dtype, 300).astype(float)]).astype(dtype)
            arrays = [{"w": (np.abs(starts).view(words) + words.type(k)).view(dtype)} for k in (0, 1)]
            arrays = [one | {"m": -one["w"]} for one in arrays]
        c.averaged(f"ties, {dtype}", arrays, [1, 1])


def strides(c: Comparison) -> None:
    for dtype in (*ref.FLOATS, np.dtype("int64"), np.dtype("uint8")):
        arrays = [{"w": c.values(dtype, (5, 3, 17, 7))} for _ in range(4)]
        weights = c.weights(4)
        expected = fl.weighted_average(arrays, weights, kernel="native")
        plain = [c.place.tensor(one["w"]) for one in arrays]
        forms = {
            "channels_last": [x.contiguous(memory_format=torch.channels_last) for x in plain],
            "strided": [torch.stack([x, x], dim=-1)[..., 0] for x in plain],
            "transposed": [x.transpose(0, 2).contiguous().transpose(0, 2) for x in plain],
            "not aligned": [torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape) for x in plain],
        }
        for name, sent in forms.items():
            out: Any = {"w": torch.zeros_like(sent[0])}
            models: Any = [{"w": x} for x in sent]
            c.same(f"{name}, {dtype}", fl.weighted_average(models, weights), expected)
            fl.weighted_average(models, weights, out=out)
            c.same(f"{name}, out=, {dtype}", out, expected)


def integer_extremes(c: Comparison) -> None:
    for dtype in ref.INTEGERS:
        limits = np.iinfo(dtype)
        some = [limits.min, limits.max, limits.min + 1, limits.max - 1, 0, 1, limits.max // 2]
        arrays = [{"w": np.roll(np.array(some, dtype), k)} for k in range(4)]
        for weights in ([1, 1, 1, 1], [1, 2, 3, 0.3], [1, 1e300, 1, 1], [1, 1e-300, 2, 0]):
            c.averaged(f"extremes, {dtype}", arrays, weights)


def overflow(c: Comparison) -> None:
    top = np.finfo(np.float64).max
    arrays = [{"w": np.array([top, 1.0, -top, top])}, {"w": np.array([top, 3.0, -top, 0.0])}]
    for weights in ([1, 1], [1, 1e300], [2, 3], [1, 1e-300], [2.0**-1000, 2.0**1000]):
        c.averaged("large numbers", arrays, weights)
    outcomes: list[Outcome] = []
    for kernel, models in ((None, [c.place.model(one) for one in arrays]), ("native", arrays)):
        stream = fl.Accumulator(kernel=kernel)
        for model in models:
            stream.add(model, 2.0**90)
        outcomes.append(outcome(stream.result))
    c.alike("a stream that overflows", *outcomes)


def not_finite(c: Comparison) -> None:
    for dtype in ref.FLOATS:
        for value in (np.nan, np.inf, -np.inf):
            for size in (1, BLOCK, BLOCK + 3):
                good = {"a": np.zeros(3), "b": np.ones((2, size), dtype), "n": np.ones(2, np.int64)}
                bad = good | {"b": good["b"].copy()}
                bad["b"][1, -1] = value
                for weight in (0, 2):
                    found, expected = (_refusals(place, good, bad, weight) for place in (c.place, None))
                    for one, other in zip(found, expected, strict=True):
                        c.alike(f"{value} in {dtype}", one, other)


def _refusals(place: Place | None, good: Model, bad: Model, weight: float) -> Iterator[Outcome]:
    models = [good, bad] if place is None else [place.model(good), place.model(bad)]
    kernel = "native" if place is None else None
    sent = [fl.Contribution(f"site-{i}", one, a) for i, (one, a) in enumerate(zip(models, (1, weight), strict=True))]
    yield outcome(fl.weighted_average, sent, kernel=kernel)
    stream = fl.Accumulator(kernel=kernel)
    stream.add(sent[0])
    yield outcome(stream.add, sent[1])
    yield outcome(stream.result)


def streams(c: Comparison) -> None:
    for dtype in ref.DTYPES:
        count = 7
        arrays = [{f"{shape}": c.values(dtype, shape) for shape in c.shapes} for _ in range(count)]
        weights = c.weights(count)
        expected = _streamed(arrays, weights, kernel="native")
        found = _streamed([c.place.model(one) for one in arrays], weights)
        for one, other in zip(found, expected, strict=True):
            c.same(f"stream, {dtype}", one, other)


def _streamed(models: Sequence[Any], weights: Sequence[float], **options: Any) -> list[Mapping[str, Any]]:
    """Results of a stream on its way: copied and borrowed contributions, a merge, and a copy of it."""
    stream, other = fl.Accumulator(**options), fl.Accumulator(**options)
    results = []
    for k, (model, weight) in enumerate(zip(models, weights, strict=True)):
        (other if k in (2, 3) else stream).add(model, weight, borrow=k % 2 == 1)
        if k == 4:
            stream.merge(other)
            results.append(stream.result())
            stream = copy.copy(stream)
    return [*results, stream.result()]


def exact(c: Comparison) -> None:
    for dtype in ref.DTYPES:
        arrays = [{f"{shape}": c.values(dtype, shape) for shape in c.shapes} for _ in range(5)]
        weights = c.weights(5)
        c.averaged(f"exact, {dtype}", arrays, weights, exact=True)
        expected = _streamed(arrays, weights, kernel="native", exact=True)
        found = _streamed([c.place.model(one) for one in arrays], weights, exact=True)
        for one, other in zip(found, expected, strict=True):
            c.same(f"exact stream, {dtype}", one, other)


def differences(c: Comparison) -> None:
    for dtype in (*ref.FLOATS, *SIGNED):
        shapes = seams(c.place)
        for make in (c.patterns, c.values):
            ones, others = ([make(dtype, shape).reshape(-1) for shape in shapes] for _ in range(2))
            ones, others = ([array for array in arrays if array.size] for arrays in (ones, others))
            for name in ("add", "subtract"):
                c.operation(name, [ones, others], dtypes=[dtype] * len(ones))
    for dtype in SIGNED:
        limits = np.iinfo(dtype)
        some = [limits.min, limits.min + 1, -1, 0, 1, limits.max - 1, limits.max, limits.max // 2 + 1]
        pairs = [(x, y) for x in some for y in some]
        for name in ("add", "subtract"):
            sent = [[np.array([pair[i]], dtype) for pair in pairs] for i in (0, 1)]
            c.operation(name, sent, dtypes=[dtype] * len(pairs))


def all_halves(c: Comparison) -> None:
    """All 65 536 patterns, the finite ones in pairs, and what lies between neighbours."""
    for dtype in HALVES:
        patterns = np.arange(2**16, dtype=np.uint16).view(dtype)
        with np.errstate(invalid="ignore"):
            finite = patterns[np.isfinite(patterns)]
        c.operation("copy", [[patterns, finite]], dtypes=[dtype] * 2)
        found = KERNEL.not_finite([c.place.tensor(patterns), c.place.tensor(finite)])  # type: ignore[list-item]
        c.alike("not_finite", tuple(found), (True, False))
        wide = np.sort(finite.astype(np.float64))
        between = (wide[:-1] + wide[1:]) / 2
        near = [wide, between, between * (1 + 2.0**-40), between * (1 - 2.0**-40)]
        c.operation("divide", [near], 1.0, dtypes=[dtype] * len(near))
        for _ in range(1 if c.course.quick or c.place.interpreted else 16):
            other = c.rng.permutation(finite)
            c.averaged(f"all pairs of {dtype}", [{"w": finite}, {"w": other}], c.weights(2))
            for name in ("add", "subtract"):
                c.operation(name, [[finite], [other]], dtypes=[dtype])


CHECKS: dict[str, Callable[[Comparison], None]] = {
    "means of 1 to 30": means,
    "ties": ties,
    "strides": strides,
    "integer extremes": integer_extremes,
    "overflow": overflow,
    "NaN and infinity": not_finite,
    "streams": streams,
    "exact sums": exact,
    "differences": differences,
    "all 16-bit patterns": all_halves,
    "sizes around tiles": sizes,
}


def compare(place: Place, course: Course) -> None:
    """Runs all checks at a place, and puts the counts into the facts of the course."""
    c = Comparison(place, course)
    if place.fused and place.operations.BLOCK != BLOCK:
        course.fail(f"sizes are around blocks of {BLOCK}, and those of {place.name} are {place.operations.BLOCK}")
    for name, check in CHECKS.items():
        if check is exact and place.fused:  # they are taken on the host, and so the same whatever else is used
            continue
        if not course.has(5, f"bits, {place.name}: {name}"):
            continue
        with course.step(f"bits, {place.name}: {name}"), place.entered():
            check(c)
    if c.compared and not USED[place.name]:
        course.fail(f"{place.name}: nothing was averaged by these operations")
    for example in c.examples[:20]:
        course.say(f"differs, {place.name}: {example}")
    if c.differing:
        course.fail(f"{place.name}: {c.differing} of {c.compared} bytes differ")
    course.facts.setdefault("bits", {})[place.name] = {
        "calls": USED[place.name],
        "compared": c.compared,
        "differing": c.differing,
        "refused": c.refused,
        "examples": c.examples[:20],
    }
    course.say(f"bits, {place.name}: {c.differing} of {c.compared} bytes differ; {c.refused} refusals are alike")
