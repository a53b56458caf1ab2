"""What the fuzz feeds: valid bytes and their mutations, headers by a grammar, objects that raise wherever one looks."""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

Rng = np.random.Generator
T = TypeVar("T")

TOKENS = (
    b"'descr'", b"'fortran_order'", b"'shape'", b"True", b"False", b"(3,)", b"()", b"(3", b"3L", b"-1", b"1e9", b"0x10",
    b"9" * 20, b"9" * 5000, b" " * 4000, b"\n", b"\t", b"\0", b"'", b'"', b"{", b"}", b"[", b"]", b",", b":", b"#",
    b"'|O'", b"'<f8'", b"'V2'", b"lambda:0", b"f()", b"\xff\xff", b"\x80", b"\x93NUMPY", b"__import__('os')",
)  # fmt: skip


def choose(rng: Rng, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    """The bytes of an `.npy` file, as numpy writes it."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version, allow_pickle=True)
    return file.getvalue()


ARRAYS: tuple[Any, ...] = tuple(
    np.asarray(np.arange(math.prod(shape)).reshape(shape), dtype, order=order)
    for code in ("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8")
    for dtype in (np.dtype(code), np.dtype(code).newbyteorder(">"))
    for shape in ((), (0,), (3,), (2, 0), (2, 3), (1, 2, 3))
    for order in ("C", "F")
)
SEEDS = (
    *tuple(dict.fromkeys(npy(array, version) for array in ARRAYS for version in ((1, 0), (2, 0)))),
    npy(np.arange(3).astype(ml_dtypes.bfloat16).view("V2")),
)
OTHERS: tuple[bytes, ...] = (
    *(npy(value) for value in (np.array(["x"]), np.array([b"x"]), np.zeros(2, complex), np.array([object], object))),
    npy(np.zeros(2, [("a", "f4"), ("b", "O")])),
    npy(np.zeros(2, "M8[s]")),
    npy(np.zeros(2, np.longdouble)),
    b"",
    b"PK\x03\x04",
)
"""What no weight dict holds."""


def mutated(rng: Rng, data: bytes, others: Sequence[bytes] = SEEDS) -> bytes:
    """The bytes after one to four mutations."""
    content = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, end = sorted(int(i) for i in rng.integers(len(content) + 1, size=2))
        if rng.random() < 0.5:  # most of what is decided is decided in the first bytes
            at, end = min(at, 90), min(at, 90) + (end - at) % 8
        match int(rng.integers(7)):
            case 0 if content:
                content[at % len(content)] = int(rng.integers(256))
            case 1:
                del content[at:end]
            case 2:
                content[at:at] = content[at:end]
            case 3:
                content[at:at] = choose(rng, TOKENS)
            case 4:
                content[at:end] = choose(rng, TOKENS)
            case 5:
                del content[at:]
            case _:
                other = choose(rng, others)
                content[at:end] = other[at % (len(other) + 1) :]
    return bytes(content[:200_000])


DESCRS = (
    "'<f4'", "'>f8'", "'|u1'", "'|V2'", "'=i4'", "'f2'", "'|O'", "'<c8'", "'<U3'", "'<f3'", "''", "[('a', '<f4')]",
    "[" * 500, "'" + "x" * 900 + "'", "u'<f4'", "None",
)  # fmt: skip
SIZES = (
    "0", "1", "3", "7", "-1", "03", "1_0", "True", "10" * 9, "9" * 18, "9" * 19, "9" * 600, " 2", "2 ", "",
)  # fmt: skip
ENDS = ("\n", "", "$", "x" + " " * 3000 + "$")


def header(rng: Rng) -> bytes:
    """An `.npy` file with a header by a grammar, in which any part may be off."""
    sizes = [choose(rng, SIZES) for _ in range(choose(rng, (0, 1, 2, 3, 64, 65, 400)))]
    parts = [
        f"'descr': {choose(rng, DESCRS)}",
        f"'fortran_order': {choose(rng, ('True', 'False', '1', 'None'))}",
        f"'shape': ({', '.join(sizes)}{choose(rng, ('', ',', ', ', ',,'))})",
    ]
    if rng.random() < 0.1:
        rng.shuffle(parts)
    if rng.random() < 0.1:
        del parts[int(rng.integers(3))]
    inner = choose(rng, (", ", ",", " , ")).join(parts) + choose(rng, (", }", "}", ",}", "", ","))
    encoded = ("{" + inner + " " * choose(rng, (0, 20, 900, 4000)) + choose(rng, ENDS)).encode()
    version, width = choose(rng, ((b"\1\0", 2), (b"\2\0", 4), (b"\3\0", 4), (b"\1\1", 2)))
    length = len(encoded) if rng.random() < 0.9 else int(rng.integers(2**15))
    data: bytes = b"\x93NUMPY" + version + min(length, 2 ** (8 * width) - 1).to_bytes(width, "little") + encoded
    return data + bytes(int(choose(rng, (0, 1, 4, 12, 24, 8 * 21))))


def file_bytes(rng: Rng) -> bytes:
    """What stands in the place of an `.npy` file: valid, mutated, or by the grammar."""
    kind = rng.random()
    if kind < 0.15:
        return choose(rng, SEEDS)
    if kind < 0.25:
        return choose(rng, OTHERS)
    return header(rng) if kind < 0.6 else mutated(rng, choose(rng, SEEDS + OTHERS))


TEXTS = (
    "w", "b", "n", "", " ", "w ", "layer.0/kernel:0", "größe", "\n", "a\nERROR b", "\x1b[2K", "\ud800", "\0", "x" * 999,
    "x" * 1001, "x" * 20_000, "a/b", "..", "𝕏", "final", "node-3", "hospital@node-2", "(a+)+$", "%s%n", "{0.__class__}",
)  # fmt: skip


def text(rng: Rng) -> str:
    """A name, or what stands in the place of one."""
    return choose(rng, TEXTS)


NUMBERS: tuple[Any, ...] = (
    0, 1, 3, -1, 2**31, 2**53 + 1, 2**63, 10**400, 10**5000, -(10**5000), 0.0, -0.0, 0.5, 1e-320, 1e300, math.nan,
    math.inf, -math.inf, True, False, np.float32(0.5), np.int64(3), np.float64("nan"), np.bool_(True), np.array(3),
    np.array([4.0]), np.array([1, 2]), np.zeros((0,)), Decimal("0.5"), Decimal("1e999999"), Decimal("sNaN"),
    Fraction(1, 3), Fraction(10**400, 3), 1j, None, "3", b"3", ml_dtypes.bfloat16(1.5),
)  # fmt: skip

ERRORS = (ValueError, TypeError, RuntimeError, KeyError, AttributeError, RecursionError, MemoryError)
LOOKS = (
    "__len__", "__iter__", "__getitem__", "__contains__", "__eq__", "__ne__", "__lt__", "__gt__", "__hash__",
    "__bool__", "__float__", "__int__", "__index__", "__abs__", "__repr__", "__str__", "__array__", "__format__",
)  # fmt: skip
PROPERTIES = (
    "shape", "dtype", "nbytes", "item", "items", "keys", "values", "numpy", "state_dict", "weights", "value",
    "__class__",
)  # fmt: skip


class Endless(Mapping[str, Any]):
    """A mapping that says that it holds one entry, and never ends."""

    def __getitem__(self, key: str) -> Any:
        return np.ones(2)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        number = 0
        while True:
            yield f"w{number}"
            number += 1


def raising(rng: Rng, *bases: type) -> type:
    """A class that raises wherever one looks: at some of the methods that anybody would call."""
    error = choose(rng, ERRORS)

    def fail(*_: Any, **__: Any) -> Any:
        raise error("gotcha\n\x1b[2K")

    some = [name for name in LOOKS if rng.random() < 0.3]
    held = [name for name in PROPERTIES if rng.random() < 0.2]
    return type("Raising", bases, dict.fromkeys(some, fail) | {name: property(fail) for name in held})


def raiser(rng: Rng) -> Any:
    """An object of such a class: of its own, or a child of a builtin or an array."""
    base: type = choose(rng, (object, str, int, float, dict, list, np.ndarray))
    if base is np.ndarray:
        return np.ones(2).view(raising(rng, np.ndarray))
    made: dict[type, Callable[[Any], Any]] = {
        str: lambda cls: str.__new__(cls, "w"),
        int: lambda cls: int.__new__(cls, 3),
        float: lambda cls: float.__new__(cls, 0.5),
    }
    cls = raising(rng, base)
    return made[base](cls) if base in made else cls()


def nested(rng: Rng, depth: int = 0) -> Any:
    """A value of a metric or of `info`: of any type, any depth, any width."""
    kind = rng.random()
    if kind < 0.3 or depth > 12:
        return choose(rng, NUMBERS)
    if kind < 0.45:
        return text(rng)
    if kind < 0.55:
        return raiser(rng)
    if kind < 0.6:
        wide: tuple[Any, ...] = ([0.5] * 20_000, {f"k{i}": i for i in range(20_000)}, "x" * 50_000, [[0] * 200] * 200)
        return choose(rng, (*wide, shared(), deep()))
    inner = [nested(rng, depth + 1) for _ in range(int(rng.integers(4)))]
    keys = [choose(rng, (text(rng), "k", 1, None, (1, 2), 0.5)) for _ in inner]
    return choose(rng, (inner, tuple(inner), dict(zip(keys, inner, strict=True))))


def shared() -> list[Any]:
    """Lists that hold one another: few in memory, without number as text."""
    found: list[Any] = [0.5]
    for _ in range(40):
        found = [found] * 10
    return found


def deep() -> list[Any]:
    """A list in a list, and so on."""
    found: list[Any] = []
    for _ in range(5000):
        found = [found]
    return found


def entries(rng: Rng) -> dict[Any, Any]:
    """Metrics, or what a client calls so."""
    if rng.random() < 0.05:
        return {f"metric {i}": float(i) for i in range(int(rng.integers(900, 12_000)))}
    names = ("loss", "num-examples", "initial_validation_metric", text(rng), 3, None)
    return {choose(rng, names): nested(rng) for _ in range(int(rng.integers(5)))}


def weights(rng: Rng) -> Any:
    """What stands in the place of a weight dict of `w` (two float32), `b` (a float64) and `n` (a counter)."""
    good: dict[Any, Any] = {"w": np.array([1, 2], np.float32), "b": np.array([3.0]), "n": np.array(4)}
    for _ in range(int(rng.integers(3))):
        name = choose(rng, ("w", "b", "n", text(rng), 1, None, (1,)))
        match int(rng.integers(7)):
            case 0:
                good.pop(name, None)
            case 1:
                good[name] = raiser(rng)
            case 2:
                good[name] = nested(rng)
            case 3:
                good[name] = choose(rng, ARRAYS)
            case 4:
                shape, number = (
                    choose(rng, ((), (2,), (1,), (0,), (2, 1))),
                    choose(rng, (0.5, math.nan, math.inf, 1e39)),
                )
                with np.errstate(over="ignore"):
                    good[name] = np.full(shape, number, choose(rng, ("f2", "f4", "f8", ">f4")))
            case 5:
                good[name] = np.ma.masked_array([1.0, 2.0], [False, True])
            case _:
                good = {name: array for name, array in good.items() if rng.random() < 0.7}
    if rng.random() < 0.05:
        good |= {f"x{i}": np.zeros(1) for i in range(2000)}
    return good if rng.random() < 0.9 else choose(rng, (None, 3, "w", [good], raiser(rng), raising(rng, dict)(good)))
