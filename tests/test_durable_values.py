"""What a state is made of: every value comes back as it was, and what cannot be kept is refused by name."""

import json
import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fed_learn as fl
from fed_learn.contribution import ClientFailure, ValidationResult
from fed_learn.durable import decoded, digest, encoded
from fed_learn.errors import HandlerFailure
from fed_learn.weights import FrozenWeights, WeightDict

pytestmark = pytest.mark.quick

DTYPES = [np.dtype(code) for code in ("?", "i1", "u2", "i4", "u8", "f2", "f4", "f8", ">f4", "c8", ml_dtypes.bfloat16)]

numbers = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
arrays = st.sampled_from(DTYPES[:9]).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0)))
values = st.recursive(
    numbers | arrays,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.just("$weights"), inner)
    ),
    max_leaves=20,
)


def back(value: Any) -> Any:
    stored = encoded(value)
    frozen = {name: FrozenWeights(weights) for name, weights in stored.weights.items()}
    return decoded(stored.text, frozen.__getitem__).value


def same(one: Any, other: Any) -> bool:
    """Whether two values are alike, down to types, signs of zeros and bits of arrays."""
    if isinstance(one, np.ndarray):
        native = one.astype(one.dtype.newbyteorder("="))
        return (
            isinstance(other, np.ndarray)
            and (one.shape, native.dtype) == (other.shape, other.dtype)
            and native.tobytes() == other.tobytes()
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return (one == other and math.copysign(1, one) == math.copysign(1, other)) or (one != one and other != other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@given(values)
def test_every_value_comes_back_as_it_was(value: Any) -> None:
    assert same(value, back(value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 5000])
def test_arrays_of_every_dtype_and_size_come_back_and_can_be_changed(dtype: np.dtype[Any], size: int) -> None:
    array = np.arange(size).astype(dtype)
    returned = back({"a": [array]})["a"][0]
    assert same(array, returned)
    returned[...] = 0  # it is the caller's own


def test_a_weight_dict_in_several_places_is_kept_once_and_keeps_its_order() -> None:
    weights = FrozenWeights({"b": np.ones(2000), "a": np.zeros(3, np.float32)})
    stored = encoded({"model": weights, "best": fl.BestModel(2, 0.5, "accuracy", weights)})
    assert list(stored.weights) == [digest(weights)]
    returned = back({"model": weights, "best": fl.BestModel(2, 0.5, "accuracy", weights)})
    assert list(returned["model"]) == ["b", "a"]
    assert returned["best"].weights is returned["model"]


def test_records_come_back_with_what_is_told_of_their_errors() -> None:
    refused = ClientFailure("site-1", fl.NonFiniteError("site-1: w is NaN", contributor="site-1", name="w", index=(0,)))
    foreign = type("CudaError", (RuntimeError,), {})("out of memory")
    report = fl.RoundReport(
        3,
        accepted=("site-2",),
        rejected=(refused,),
        handler_failures=(HandlerFailure("_endRound", "mine.Handler", foreign, round=3),),
        metrics={"loss": 0.25},
        error=KeyError("w"),
    )
    result = ValidationResult("site-2", "final", {"loss": float("nan")}, 7)
    said: dict[str, Any] = {"loss": 1.0, "host": "a"}
    contribution = fl.Contribution("site-2", None, 12, metrics=said, kind=fl.Kind.DIFF)
    one, two, three = back([report, result, contribution])
    assert one.as_dict() == report.as_dict()
    assert isinstance(one.rejected[0].error, fl.NonFiniteError)
    assert (one.rejected[0].error.contributor, one.rejected[0].error.name) == ("site-1", "w")
    assert str(one.handler_failures[0]) == str(report.handler_failures[0])
    assert isinstance(one.error, KeyError)
    assert (two.contributor, two.model, two.n_iter) == ("site-2", "final", 7)
    assert (three.metrics, three.info, three.kind) == ({"loss": 1.0}, {"host": "a"}, fl.Kind.DIFF)
    assert encoded(one).text == encoded(report).text


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, object()]}, r"state\.a\[1\] is an object"),
        ({"f": len}, r"state\.f is a builtin_function_or_method"),
        ({"a": np.array([None])}, r"state\.a is an array of object"),
        ({frozenset([1]): 2}, "a frozenset cannot be a key"),
        ({"s": {1, 2}}, r"state\.s is a set"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_place(value: Any, where: str) -> None:
    with pytest.raises(fl.StateError, match=where):
        encoded(value)


def test_a_value_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(fl.StateError, match="holds itself"):
        encoded(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1",
        '{"$float": 1}',
        '{"$float": "1e400"}',
        '{"$tuple": 3}',
        '{"$bytes": "!"}',
        '{"$dict": [[1]]}',
        '{"$dict": [[[], 1]]}',
        '{"$array": ["object", [1], ""]}',
        '{"$array": ["float64", [3], "AAAA"]}',
        '{"$array": [["f8"], [0], ""]}',
        '{"$array": ["S3", [1], "AAAA"]}',
        '{"$weights": "../../etc/passwd"}',
        '{"$weights": ["a"]}',
        '{"$record": ["Popen", {}]}',
        '{"$record": ["BestModel", {"round": 1}]}',
        '{"$record": ["BestModel", {"round": 1, "metric": 1, "metric_name": "m", "weights": 3}]}',
        '{"$error": ["__import__(1)", "x", {}]}',
        '{"$error": [3, "x", {}]}',
        '{"$pickle": "gASV"}',
        '{"a": 1, "$b": 2}',
        "[" * 100_000,
        "[" * 600 + "]" * 600,
        "1" * 5000,
    ],
)
def test_a_hostile_text_is_refused_and_nothing_else(text: str) -> None:
    def read(name: str) -> FrozenWeights:
        raise AssertionError(f"nothing of the name {name!r} may be read")

    with pytest.raises(fl.StateError):
        print(decoded(text, read))


def test_a_digest_is_that_of_its_documented_form() -> None:
    blake3 = pytest.importorskip("blake3").blake3
    weights: WeightDict = {
        "b": np.arange(3, dtype=">f4"),
        "a": np.array(2.5, ml_dtypes.bfloat16),
        "ü\n": np.zeros((2, 0), np.int8),
    }
    values = {"a": b"\x20\x40", "b": np.arange(3, dtype="<f4").tobytes(), "ü\n": b""}
    forms = {"a": ("bfloat16", []), "b": ("float32", [3]), "ü\n": ("int8", [2, 0])}
    lines = "".join(
        json.dumps([name, *forms[name], blake3(values[name]).hexdigest()], ensure_ascii=False, separators=(",", ":"))
        + "\n"
        for name in sorted(weights)
    )
    assert digest(weights) == blake3(lines.encode()).hexdigest()
    turned: WeightDict = {name: np.asarray(weights[name]) for name in reversed(list(weights))}
    assert digest(turned) == digest(weights)
    column = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert digest({"w": column}) == digest({"w": np.ascontiguousarray(column)}) != digest({"w": column.T})
