"""Values of a state as JSON text and weight dicts beside it, and back. Nothing is pickled.

A state is made of None, bool, int, float, str, bytes, lists, tuples, dicts and arrays, and of the records that a job
leaves behind: `BestModel`, `Contribution`, `RoundReport`, `ValidationResult`, `ClientFailure`, `HandlerFailure`, with
the exceptions in them. In JSON,

    null, true, 1, 0.5, "text", [...], {...}     stand for themselves,
    {"$float": "nan" | "inf" | "-inf"}           for the floats that JSON does not have,
    {"$tuple": [...]}                            for a tuple,
    {"$bytes": base64}                           for bytes,
    {"$dict": [[key, value], ...]}               for a dict with other keys than text, or with a key that begins with $,
    {"$array": [dtype, shape, base64]}           for a small array,
    {"$weights": digest}                         for frozen weights, which lie in a file of that name,
    {"$arrays": digest}                          for another dict of arrays, likewise,
    {"$large": digest}                           for a large array, the only one of such a file,
    {"$record": [class, fields]}                 for a record, its fields by name,
    {"$error": [class, text, attributes]}        for an exception: what is told of it, not how it came.
"""

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import ml_dtypes
import numpy as np

from fed_learn.contribution import (
    BestModel,
    ClientFailure,
    Contribution,
    Kind,
    RoundReport,
    ValidationResult,
)
from fed_learn.durable.digests import digest
from fed_learn.durable.told_errors import error_of, told_of
from fed_learn.errors import HandlerFailure, StateError, a_type, brief
from fed_learn.weights import Array, FrozenDict, FrozenWeights, WeightDict

LARGEST_IN_TEXT = 4096
"""Arrays of no more bytes than this stand in the text, larger ones in files."""
ALONE = "array"
"""The name of a large array in its file."""
_EXTENDED = {name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}
_IN_FILES = {"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))} | {
    *(f"float{bits}" for bits in (16, 32, 64)),
    "bfloat16",
}
"""Dtypes that safetensors has."""
_RECORDS: dict[str, type] = {
    one.__name__: one for one in (BestModel, ClientFailure, Contribution, HandlerFailure, RoundReport, ValidationResult)
}


@dataclass(frozen=True, eq=False)
class Encoded:
    """A value as it is stored.

    Attributes:
        text: JSON, without a newline.
        weights: Digest → the weight dict that the text refers to by it.
    """

    text: str
    weights: Mapping[str, WeightDict]


@dataclass(eq=False)
class Decoded:
    """A value as it was stored.

    Attributes:
        value: The value; weight dicts that lie in files are read-only.
        weights: Digest → the weight dict that is part of it.
    """

    value: Any
    weights: dict[str, FrozenWeights] = field(default_factory=dict)


def encoded(value: object, what: str = "state") -> Encoded:
    """A value as JSON text and weight dicts.

    Args:
        value: What the head of this module lists.
        what: What errors call it.

    Raises:
        StateError: Something in it cannot be stored; the error says where it is.

    Example:
        >>> import numpy as np
        >>> encoded({"patience": 3, "rng": np.arange(2), "loss": float("nan")}).text
        '{"patience":3,"rng":{"$array":["int64",[2],"AAAAAAAAAAABAAAAAAAAAA=="]},"loss":{"$float":"nan"}}'
    """
    weights: dict[str, WeightDict] = {}
    try:
        plain = _Encoder(weights).plain(value, what)
    except RecursionError as error:
        raise StateError(f"{what} is nested too deeply, or holds itself") from error
    return Encoded(json.dumps(plain, ensure_ascii=True, allow_nan=False, separators=(",", ":")), weights)


def decoded(text: str, read: Callable[[str], FrozenWeights], what: str = "state") -> Decoded:
    """The value that a text stands for.

    Args:
        text: What `encoded` gave.
        read: Gives the weight dict of a digest.
        what: What errors call it.

    Raises:
        StateError: It is no such text.

    Example:
        >>> decoded('{"patience":3,"rng":{"$array":["int64",[2],"AAAAAAAAAAABAAAAAAAAAA=="]}}', {}.get).value
        {'patience': 3, 'rng': array([0, 1])}
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{what} is no JSON: {error}") from error
    found = Decoded(None)
    try:
        found.value = _Decoder(found.weights, read).value(plain, what)
    except RecursionError as error:
        raise StateError(f"{what} is nested too deeply") from error
    return found


class _Encoder:
    """Turns values into plain JSON values; puts weight dicts aside."""

    def __init__(self, weights: dict[str, WeightDict]) -> None:
        self.weights = weights
        self._digests: dict[int, str] = {}

    def plain(self, value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float | np.floating) and not isinstance(value, np.longdouble):
            number = float(value)
            return number if math.isfinite(number) else {"$float": repr(number)}
        if isinstance(value, bool | np.bool_):
            return bool(value)
        if isinstance(value, int | np.integer):
            return int(value)
        if isinstance(value, str):
            return str(value)
        if isinstance(value, bytes | bytearray):
            return {"$bytes": base64.b64encode(value).decode()}
        if isinstance(value, np.ndarray):
            return self._array(value, where)
        if isinstance(value, Mapping):
            return self._mapping(value, where)
        if _RECORDS.get(type(value).__name__) is type(value):
            record: Any = value
            named = {one.name: getattr(record, one.name) for one in fields(record)}
            return {"$record": [type(value).__name__, self._mapping(named, where)]}
        if isinstance(value, Exception):
            return {"$error": self.plain(list(told_of(value)), where)}
        if isinstance(value, list):
            return [self.plain(one, f"{where}[{i}]") for i, one in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": [self.plain(one, f"{where}[{i}]") for i, one in enumerate(value)]}
        raise StateError(
            f"{where} is {a_type(type(value))}, which cannot be kept: a state is made of None, numbers, text, bytes, "
            "arrays, lists, tuples and dicts of these",
            path=where,
        )

    def _array(self, array: Array, where: str) -> Any:
        if array.dtype.kind not in "biufc" and array.dtype.name not in _EXTENDED:
            raise StateError(f"{where} is an array of {array.dtype}, which cannot be kept", path=where)
        if array.nbytes > LARGEST_IN_TEXT and array.dtype.name in _IN_FILES:
            return {"$large": self._put({ALONE: array})}
        values = array.astype(array.dtype.newbyteorder("<"), copy=False)
        data = base64.b64encode(values.tobytes()).decode()
        return {"$array": [array.dtype.name, list(array.shape), data]}

    def _mapping(self, value: Mapping[Any, Any], where: str) -> Any:
        if _is_large_weight_dict(value):
            return {"$weights" if type(value) is FrozenWeights else "$arrays": self._put(value)}
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.plain(one, f"{where}.{key}") for key, one in value.items()}
        pairs = []
        for key, one in value.items():
            inside = f"{where}[{brief(key)}]"
            if not isinstance(key, str | int | float | bool | tuple | None):
                raise StateError(f"{inside}: {a_type(type(key))} cannot be a key of what is kept", path=where)
            pairs.append([self.plain(key, inside), self.plain(one, inside)])
        return {"$dict": pairs}

    def _put(self, weights: WeightDict) -> str:
        # One weight dict stands in several places: as the global model, and as the best one.
        known = self._digests.get(id(weights))
        if known is None:
            known = digest(weights)
            self.weights.setdefault(known, weights)
            self._digests[id(weights)] = known
        return known


def _is_large_weight_dict(value: Mapping[Any, Any]) -> bool:
    arrays = list(value.values())
    return (
        sum([one.nbytes for one in arrays if isinstance(one, np.ndarray)]) > LARGEST_IN_TEXT
        and all(isinstance(one, np.ndarray) and one.dtype.name in _IN_FILES for one in arrays)
        and all(type(key) is str and key != "__metadata__" for key in value)
    )


class _Decoder:
    """Turns plain JSON values back; asks for weight dicts by their digests."""

    def __init__(self, weights: dict[str, FrozenWeights], read: Callable[[str], FrozenWeights]) -> None:
        self.weights = weights
        self.read = read

    def value(self, plain: Any, where: str) -> Any:
        if isinstance(plain, list):
            return [self.value(one, f"{where}[{i}]") for i, one in enumerate(plain)]
        if not isinstance(plain, dict):
            return plain
        if len(plain) == 1:
            ((key, one),) = plain.items()
            if key.startswith("$"):
                try:
                    return self._marked(key, one, where)
                except StateError:
                    raise
                except (TypeError, ValueError, KeyError, OverflowError, MemoryError) as error:
                    raise StateError(f"{where}: {key} with what it cannot have: {brief(one)}", path=where) from error
        if any(key.startswith("$") for key in plain):
            raise StateError(f"{where}: {brief(plain)} means nothing", path=where)
        return {key: self.value(one, f"{where}.{key}") for key, one in plain.items()}

    def _marked(self, mark: str, one: Any, where: str) -> Any:
        if mark == "$float" and one in ("nan", "inf", "-inf"):
            return float(one)
        if mark == "$tuple" and isinstance(one, list):
            return tuple([self.value(part, f"{where}[{i}]") for i, part in enumerate(one)])
        if mark == "$bytes":
            return base64.b64decode(one, validate=True)
        if mark == "$dict":
            return {self.value(key, where): self.value(value, f"{where}[{brief(key)}]") for key, value in one}
        if mark == "$array":
            return _small_array(*one)
        if mark == "$record":
            return _record(one[0], self.value(one[1], where))
        if mark == "$error":
            return error_of(*self.value(one, where))
        if mark in ("$weights", "$arrays", "$large"):
            weights = self._weights(one)
            if mark == "$arrays":
                return {name: array.copy() for name, array in weights.items()}
            return weights if mark == "$weights" else weights[ALONE].copy()
        raise StateError(f"{where}: {brief({mark: one})} means nothing", path=where)

    def _weights(self, name: Any) -> FrozenWeights:
        if not isinstance(name, str) or len(name) != 64 or not set(name) <= set("0123456789abcdef"):
            raise StateError(f"{brief(name)} is no digest")
        if name not in self.weights:
            self.weights[name] = self.read(name)
        return self.weights[name]


def _record(name: str, given: Mapping[str, Any]) -> Any:
    """The record of a class, with these fields and no others."""
    kind: Any = _RECORDS[name]
    if given.keys() != {one.name for one in fields(kind)}:
        raise ValueError(name)
    mappings = {key: FrozenDict(value) for key, value in given.items() if type(value) is dict}
    if kind is BestModel:
        weights = given["weights"]
        mappings = {"weights": weights if type(weights) is FrozenWeights else FrozenWeights(weights)}
    return kind(**{**given, **mappings, **({"kind": Kind(given["kind"])} if "kind" in given else {})})


def _small_array(name: Any, shape: Any, data: Any) -> Array:
    dtype = _EXTENDED[name] if name in _EXTENDED else np.dtype(name)
    if dtype.kind not in "biufcV" or (dtype.kind == "V" and name not in _EXTENDED):
        raise ValueError(name)
    given = np.frombuffer(base64.b64decode(data, validate=True), dtype.newbyteorder("<"))
    array: Array = given.astype(dtype).reshape(shape)
    return array
