"""Everything from a client is untrusted: each bad contribution is refused with an error of its own class that names
the contributor and the variable, by a batch and by an accumulator, and leaves no trace.
"""

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference import BFLOAT16, FLOATS, KERNELS, Array, bits, largest, rounded_mean

from fed_learn.aggregation import Accumulator, weighted_average
from fed_learn.contribution import Contribution, Kind, check_aggregation_weight
from fed_learn.errors import (
    AggregationWeightError,
    ContributionError,
    DtypeError,
    DuplicateContributionError,
    EmptyAggregationError,
    FedLearnError,
    IntegerRangeError,
    KindError,
    MetricError,
    NamesError,
    NonFiniteError,
    RoundError,
    ShapeError,
    UnknownContributorError,
    WeightsTypeError,
)
from fed_learn.values import whole_number_of

pytestmark = pytest.mark.quick

ROUND = 4

Attempt = Callable[[], object]


def good_weights() -> dict[str, Array]:
    """A variable of every kind that the cases below spoil."""
    return {
        "fc.weight": np.ones((4, 3), np.float32),
        "fc.bias": np.ones(3, np.float64),
        "half": np.ones(3, np.float16),
        "brain": np.ones(3, BFLOAT16),
        "steps": np.array(1000),
        "seen": np.array([1, 2], np.uint64),
        "mask": np.array([True, False]),
    }


def good(contributor: str = "site-1", **rest: Any) -> Contribution:
    return Contribution(contributor, good_weights(), 120, round=ROUND, **rest)


def with_array(name: str, array: Any) -> Contribution:
    """A contribution of site-2 with another array for one variable."""
    weights = good_weights()
    weights[name] = array
    return replace(good("site-2"), weights=weights)


@dataclass(frozen=True)
class Refusal:
    """A bad contribution of site-2, and everything about the error that it must raise."""

    bad: Contribution
    error: type[FedLearnError]
    builtin: type[Exception]
    name: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    own_schema: bool = False
    """Refused whatever the schema says, hence also as the first contribution without `like=`."""


REFUSALS: dict[str, Refusal] = {}


def refuse(what: str, bad: Contribution, *rest: Any, **more: Any) -> None:
    assert what not in REFUSALS
    REFUSALS[what] = Refusal(bad, *rest, **more)


# Names

without = good_weights()
del without["half"]
refuse(
    "a missing variable",
    replace(good("site-2"), weights=without),
    NamesError,
    KeyError,
    "half",
    {"missing": ("half",), "extra": ()},
)
refuse(
    "an extra variable",
    with_array("back.door", np.ones(3)),
    NamesError,
    KeyError,
    "back.door",
    {"missing": (), "extra": ("back.door",)},
)
refuse(
    "a variable under another name",
    replace(good("site-2"), weights={**without, "Half": np.ones(3, np.float16)}),
    NamesError,
    KeyError,
    "half",
    {"missing": ("half",), "extra": ("Half",)},
    says="Half",
)
refuse(
    "no variables",
    replace(good("site-2"), weights={}),
    NamesError,
    KeyError,
    "fc.weight",
    {"missing": tuple(good_weights()), "extra": ()},
)
for strange in (3, None, b"fc.weight", ("fc", "weight")):
    refuse(
        f"a variable named by a {type(strange).__name__}",
        replace(good("site-2"), weights={**good_weights(), strange: np.ones(3)}),  # type: ignore[dict-item]
        WeightsTypeError,
        TypeError,
        says=repr(strange),
        own_schema=True,
    )

# What is not a weight dict of arrays

for not_weights in (None, [1.0, 1.0], np.ones(3), "weights", 7):
    refuse(
        f"weights that are a {type(not_weights).__name__}",
        replace(good("site-2"), weights=not_weights),  # type: ignore[arg-type]
        WeightsTypeError,
        TypeError,
        says=type(not_weights).__name__,
        own_schema=True,
    )
for not_array in ([1.0, 1.0, 1.0], (1.0, 1.0, 1.0), 1.0, None, "111", memoryview(bytes(24)), {"a": 1}):
    refuse(
        f"a {type(not_array).__name__} instead of an array",
        with_array("fc.bias", not_array),
        WeightsTypeError,
        TypeError,
        "fc.bias",
        says=type(not_array).__name__,
        own_schema=True,
    )
refuse(
    "a masked array",
    with_array("fc.bias", np.ma.masked_array(np.ones(3), [False, True, False])),
    WeightsTypeError,
    TypeError,
    "fc.bias",
    says="MaskedArray",
    own_schema=True,
)


class Unreadable(Mapping[str, Array]):
    """Weights that raise when they are read."""

    def __getitem__(self, name: str) -> Array:
        raise OSError("the file is gone")

    def __iter__(self) -> Iterator[str]:
        return iter(good_weights())

    def __len__(self) -> int:
        return len(good_weights())


refuse(
    "weights that cannot be read",
    replace(good("site-2"), weights=Unreadable()),
    WeightsTypeError,
    TypeError,
    says="OSError: the file is gone",
    own_schema=True,
)

# Shapes

for name, shape, expected in (
    ("fc.weight", (3,), (4, 3)),
    ("fc.weight", (1, 3), (4, 3)),
    ("fc.weight", (4, 1), (4, 3)),
    ("fc.weight", (3, 4), (4, 3)),
    ("fc.weight", (12,), (4, 3)),
    ("fc.weight", (), (4, 3)),
    ("fc.bias", (4,), (3,)),
    ("fc.bias", (1, 3), (3,)),
    ("fc.bias", (0,), (3,)),
):
    refuse(
        f"shape {shape} for {expected}",
        with_array(name, np.ones(shape, good_weights()[name].dtype)),
        ShapeError,
        ValueError,
        name,
        {"shape": shape, "expected": expected},
        says=f"{shape}, expected {expected}",
    )
refuse(
    "shape (1,) for ()",
    with_array("steps", np.array([1000])),
    ShapeError,
    ValueError,
    "steps",
    {"shape": (1,), "expected": ()},
)

# Dtypes

for name, dtype in (
    ("fc.weight", "float64"),
    ("fc.weight", "float16"),
    ("fc.weight", "int32"),
    ("fc.bias", "float32"),
    ("half", BFLOAT16),
    ("brain", "float16"),
    ("brain", "int16"),
    ("steps", "float64"),
    ("steps", "int32"),
    ("steps", "uint64"),
    ("seen", "int64"),
    ("mask", "uint8"),
):
    array = good_weights()[name]
    refuse(
        f"{np.dtype(dtype)} for {array.dtype}",
        with_array(name, array.astype(dtype)),
        DtypeError,
        TypeError,
        name,
        {"dtype": np.dtype(dtype), "expected": array.dtype},
        says=f"{np.dtype(dtype)}, expected {array.dtype}",
    )
for never in (
    np.ones(3, complex),
    np.ones(3, np.complex64),
    np.ones(3, ml_dtypes.float8_e4m3fn),
    np.ones(3, ml_dtypes.float8_e5m2),
    np.ones(3, ml_dtypes.int4),
    np.array(["1", "2", "3"]),
    np.array([b"1", b"2", b"3"]),
    np.array(["1", "2", "3"], np.dtypes.StringDType()),
    np.array(["1", None, "3"], np.dtypes.StringDType(na_object=None)),
    np.array([1.0, None, "x"], object),
    np.zeros(3, [("a", "f4"), ("b", "i4")]),
    np.zeros(3, "V2"),
    np.zeros(3, "datetime64[s]"),
    np.zeros(3, "timedelta64[s]"),
    np.ones(3, np.longdouble),
):
    refuse(
        f"dtype {never.dtype}",
        with_array("fc.bias", never),
        DtypeError,
        TypeError,
        "fc.bias",
        {"dtype": never.dtype},
        own_schema=True,
    )

# Values

for name, array in good_weights().items():
    if array.dtype not in FLOATS:
        continue
    for value in (np.nan, np.inf, -np.inf):
        poisoned = array.copy()
        position = (3, 1) if array.ndim == 2 else (1,)
        poisoned[position] = value
        refuse(
            f"{value} in {array.dtype}",
            with_array(name, poisoned),
            NonFiniteError,
            ValueError,
            name,
            {"index": position, "value": float(value)},
            says=str(position),
            own_schema=True,
        )
    signalling = array.copy()
    pattern = {"float16": 0x7D01, "bfloat16": 0x7F81, "float32": 0x7F800001, "float64": 0x7FF0000000000001}
    unsigned = np.dtype(f"uint{8 * array.itemsize}")
    signalling.reshape(-1).view(unsigned)[-1] = pattern[array.dtype.name]
    refuse(
        f"a signalling NaN in {array.dtype}",
        with_array(name, signalling),
        NonFiniteError,
        ValueError,
        name,
        {"index": tuple(length - 1 for length in array.shape)},
        own_schema=True,
    )
refuse(
    "NaN in the other byte order",
    with_array("fc.bias", np.array([1.0, 1.0, np.nan]).astype(">f8")),
    NonFiniteError,
    ValueError,
    "fc.bias",
    {"index": (2,)},
    own_schema=True,
)
refuse(
    "infinity in bfloat16 of the other byte order",
    with_array("brain", np.array([1, np.inf, 1], BFLOAT16).astype(BFLOAT16.newbyteorder("S"))),
    NonFiniteError,
    ValueError,
    "brain",
    {"index": (1,), "value": np.inf},
    own_schema=True,
)
# Aggregation weights

BAD_WEIGHTS: dict[str, Any] = {
    "missing": None,
    "negative": -120,
    "tiny and negative": -5e-324,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "minus infinity": float("-inf"),
    "True": True,
    "numpy True": np.True_,
    "numpy NaN": np.float32("nan"),
    "numpy minus one": np.int64(-1),
    "a str": "120",
    "bytes": b"120",
    "10**400": 10**400,
    "-10**400": -(10**400),
    "a complex": 120 + 0j,
    "a list": [120],
    "an array": np.array([120.0, 1.0]),
    "a matrix": np.ones((2, 2)),
    "a Fraction that underflows": Fraction(1, 10**400),
}
for what, bad_weight in BAD_WEIGHTS.items():
    refuse(
        f"aggregation weight: {what}",
        replace(good("site-2"), aggregation_weight=bad_weight),
        AggregationWeightError,
        ValueError,
        says="aggregation weight",
        values={"value": bad_weight},
        own_schema=True,
    )

# Round, kind, metrics

refuse(
    "a stale round",
    replace(good("site-2"), round=ROUND - 1),
    RoundError,
    ValueError,
    values={"round": ROUND - 1, "expected": ROUND},
)
refuse(
    "a stale round as a numpy integer",
    replace(good("site-2"), round=np.int64(ROUND - 1)),  # type: ignore[arg-type]
    RoundError,
    ValueError,
    values={"round": ROUND - 1, "expected": ROUND},
)
refuse(
    "a round that is a str",
    replace(good("site-2"), round=str(ROUND)),  # type: ignore[arg-type]
    RoundError,
    ValueError,
    values={"round": str(ROUND), "expected": ROUND},
)
refuse(
    "another kind",
    Contribution(
        "site-2",
        {name: array for name, array in good_weights().items() if array.dtype.kind not in "ub"},
        1,
        kind=Kind.DIFF,
    ),
    KindError,
    ValueError,
    values={"kind": Kind.DIFF, "expected": Kind.FULL},
)
refuse(
    "no kind of contribution",
    replace(good("site-2"), kind="gradient"),  # type: ignore[arg-type]
    KindError,
    ValueError,
    values={"kind": "gradient"},
    says="gradient",
    own_schema=True,
)
for what, bad_count in {
    "a str": "12",
    "a float that is not whole": 12.5,
    "a Fraction that is not whole": Fraction(1, 2),
    "a numpy bool": np.True_,
    "an array": np.array([12, 12]),
    "2**63": 2**63,
    "2**63 as a numpy integer": np.uint64(2**63),
    "10**400": 10**400,
}.items():
    refuse(
        f"iterations that are {what}",
        replace(good("site-2"), n_iter=bad_count),  # type: ignore[arg-type]
        MetricError,
        ValueError,
        values={"metric": "n_iter"},
        says="n_iter",
        own_schema=True,
    )

every_refusal = pytest.mark.parametrize("what", REFUSALS)
# Bare weight dicts have neither round nor kind nor metrics.
refused_without_an_envelope = pytest.mark.parametrize(
    "what", [w for w, r in REFUSALS.items() if r.error not in (RoundError, KindError, MetricError)]
)
refused_whatever_the_schema = pytest.mark.parametrize("what", [w for w, r in REFUSALS.items() if r.own_schema])


def check(error: FedLearnError, refusal: Refusal, contributor: str = "site-2") -> None:
    """Checks everything that an error promises."""
    assert type(error) is refusal.error
    assert isinstance(error, ContributionError)
    assert isinstance(error, FedLearnError)
    assert isinstance(error, refusal.builtin)
    assert error.contributor == contributor
    assert error.name == refusal.name
    for attribute, value in refusal.values.items():
        found = getattr(error, attribute)
        assert found is value or same(found, value), attribute
    message = str(error)
    assert "\n" not in message
    assert contributor in message
    assert refusal.name is None or repr(refusal.name) in message
    assert refusal.says in message


def same(found: Any, value: Any) -> bool:
    """Equal and of the same type, where NaN equals itself."""
    if isinstance(value, np.ndarray):
        return np.array_equal(found, value)
    return bool(found == value or (found != found and value != value))


def state(accumulator: Accumulator) -> tuple[Any, ...]:
    result = bits(accumulator.result()) if len(accumulator) else None
    return len(accumulator), accumulator.total_weight, accumulator.contributors, result


# By a batch


@every_refusal
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_batch_refuses_what_the_global_model_does_not_allow(what: str, exact: bool, kernel: str) -> None:
    refusal = REFUSALS[what]
    batch = [good("site-1"), refusal.bad, good("site-3")]
    with pytest.raises(refusal.error) as caught:
        weighted_average(batch, like=good_weights(), exact=exact, kernel=kernel)
    check(caught.value, refusal)


@every_refusal
def test_batch_without_a_global_model_refuses_what_the_first_contribution_does_not_allow(what: str) -> None:
    refusal = REFUSALS[what]
    with pytest.raises(refusal.error) as caught:
        weighted_average([good("site-1"), refusal.bad])
    check(caught.value, refusal)


@refused_whatever_the_schema
def test_batch_refuses_it_as_the_first_contribution_too(what: str) -> None:
    refusal = REFUSALS[what]
    with pytest.raises(refusal.error) as caught:
        weighted_average([refusal.bad, good("site-3")])
    check(caught.value, refusal)


@refused_without_an_envelope
def test_batch_of_bare_weight_dicts_names_the_position(what: str) -> None:
    refusal = REFUSALS[what]
    batch: Any = [good_weights(), refusal.bad.weights]
    with pytest.raises(refusal.error) as caught:
        weighted_average(batch, [120, refusal.bad.aggregation_weight])
    check(caught.value, refusal, "contributions[1]")


@every_refusal
def test_refused_batch_does_not_change_its_inputs(what: str) -> None:
    first, third = good("site-1"), good("site-3")
    with pytest.raises(REFUSALS[what].error):
        weighted_average([first, REFUSALS[what].bad, third])
    assert first.weights is not None
    assert third.weights is not None
    assert bits(first.weights) == bits(third.weights) == bits(good_weights())


def test_error_about_weights_that_cannot_be_read_has_the_cause() -> None:
    bad = REFUSALS["weights that cannot be read"].bad
    attempts: tuple[Attempt, ...] = (
        lambda: weighted_average([good("site-1"), bad]),
        lambda: weighted_average([good("site-1")], like=bad.weights),
        lambda: Accumulator().add(bad),
        lambda: Accumulator(like=bad.weights),
    )
    for attempt in attempts:
        with pytest.raises(WeightsTypeError) as caught:
            attempt()
        assert isinstance(caught.value.__cause__, OSError)
        assert str(caught.value.__cause__) == "the file is gone"


@pytest.mark.parametrize("like", [None, {"w": np.zeros(3)}], ids=["without like", "with like"])
def test_strings_of_variable_width_are_refused_by_their_dtype(like: dict[str, Array] | None) -> None:
    strings = np.array(["1", "2", "3"], np.dtypes.StringDType())
    contribution = Contribution("site-2", {"w": strings}, 1)
    accumulator = Accumulator(like=like)
    attempts: tuple[Attempt, ...] = (
        lambda: weighted_average([contribution], like=like),
        lambda: accumulator.add(contribution),
    )
    for attempt in attempts:
        with pytest.raises(DtypeError) as caught:
            attempt()
        assert (caught.value.contributor, caught.value.name) == ("site-2", "w")
        assert (caught.value.dtype, caught.value.expected) == (strings.dtype, None if like is None else np.float64)
    assert len(accumulator) == 0
    for refused in (lambda: weighted_average([good()], like={"w": strings}), lambda: Accumulator(like={"w": strings})):
        with pytest.raises(DtypeError, match="like: 'w' has dtype StringDType"):
            refused()


# By an accumulator


@every_refusal
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
def test_accumulator_refuses_it_and_is_as_if_it_had_never_come(what: str, exact: bool) -> None:
    refusal = REFUSALS[what]
    accumulator = Accumulator(like=good_weights(), exact=exact)
    accumulator.add(good("site-1"))
    before = state(accumulator)
    with pytest.raises(refusal.error) as caught:
        accumulator.add(refusal.bad)
    check(caught.value, refusal)
    assert state(accumulator) == before
    accumulator.add(good("site-2"))
    expected = Accumulator(like=good_weights(), exact=exact)
    expected.add(good("site-1"))
    expected.add(good("site-2"))
    assert state(accumulator) == state(expected)


@every_refusal
def test_accumulator_without_a_global_model_refuses_what_the_first_does_not_allow(what: str) -> None:
    refusal = REFUSALS[what]
    accumulator = Accumulator()
    accumulator.add(good("site-1"))
    before = state(accumulator)
    with pytest.raises(refusal.error) as caught:
        accumulator.add(refusal.bad)
    check(caught.value, refusal)
    assert state(accumulator) == before


@refused_whatever_the_schema
def test_accumulator_refuses_it_as_the_first_contribution_and_stays_empty(what: str) -> None:
    refusal = REFUSALS[what]
    accumulator = Accumulator()
    with pytest.raises(refusal.error) as caught:
        accumulator.add(refusal.bad)
    check(caught.value, refusal)
    assert state(accumulator) == (0, 0.0, (), None)
    accumulator.add(Contribution("site-2", {"other": np.ones(2)}, 1, round=0))
    assert accumulator.result()["other"].tolist() == [1.0, 1.0]


@refused_without_an_envelope
def test_accumulator_refuses_bare_weights_with_the_name_it_was_given(what: str) -> None:
    refusal = REFUSALS[what]
    accumulator: Any = Accumulator(like=good_weights())
    with pytest.raises(refusal.error) as caught:
        accumulator.add(refusal.bad.weights, refusal.bad.aggregation_weight, "site-2")
    check(caught.value, refusal)
    with pytest.raises(refusal.error) as caught:
        accumulator.add(refusal.bad.weights, refusal.bad.aggregation_weight)
    check(caught.value, refusal, "contribution 0")
    assert len(accumulator) == 0


def test_only_the_good_ones_count_in_an_accumulator_that_saw_all_of_the_bad_ones() -> None:
    accumulator, expected = Accumulator(like=good_weights()), Accumulator(like=good_weights())
    for k, refusal in enumerate(REFUSALS.values()):
        contribution = Contribution(f"good-{k}", good_weights(), k + 1, round=ROUND)
        accumulator.add(contribution)
        expected.add(contribution)
        with pytest.raises(refusal.error):
            accumulator.add(refusal.bad)
    assert len(accumulator) == len(REFUSALS)
    assert state(accumulator) == state(expected)


# Contributors


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
def test_second_contribution_of_the_same_contributor_is_refused(exact: bool) -> None:
    with pytest.raises(DuplicateContributionError, match="site-1") as caught:
        weighted_average([good("site-1"), good("site-2"), good("site-1")], exact=exact)
    assert (caught.value.contributor, isinstance(caught.value, ValueError)) == ("site-1", True)
    accumulator = Accumulator(exact=exact)
    accumulator.add(good("site-1"))
    before = state(accumulator)
    for _ in range(2):
        with pytest.raises(DuplicateContributionError, match="site-1") as again:
            accumulator.add(good("site-1"))
        assert again.value.contributor == "site-1"
        with pytest.raises(DuplicateContributionError, match="site-1"):
            accumulator.add(good_weights(), 1, "site-1")
    assert state(accumulator) == before


@pytest.mark.parametrize("contributor", [None, 7, b"site-1", "", ("site", 1), ["site-1"]], ids=repr)
def test_contributor_without_a_name_is_refused(contributor: Any) -> None:
    bad = replace(good(), contributor=contributor)
    accumulator = Accumulator()
    attempts: tuple[Attempt, ...] = (lambda: weighted_average([bad]), lambda: accumulator.add(bad))
    for attempt in attempts:
        with pytest.raises(ContributionError) as caught:
            attempt()
        assert repr(contributor) in str(caught.value)
        assert isinstance(caught.value, ValueError | TypeError)
    assert len(accumulator) == 0


def test_name_with_a_line_break_does_not_break_the_message_in_two() -> None:
    bad = replace(good(), contributor="site-1\nroot: all is well")
    with pytest.raises(UnknownContributorError) as caught:
        weighted_average([bad])
    assert caught.value.contributor == "site-1\nroot: all is well"
    assert "\n" not in str(caught.value)


def test_variable_with_a_line_break_does_not_break_the_message_in_two() -> None:
    name = "fc\nroot: all is well"
    with pytest.raises(NonFiniteError) as caught:
        weighted_average([Contribution("site-1", {name: np.array([np.nan])}, 1)])
    assert caught.value.name == name
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a\tb", "'\\\\t' is not printable"),
        ("a\x1b[2Kb", "'\\\\x1b' is not printable"),
        ("a\u202eb", "'\\\\u202e' is not printable"),
        ("a\u2028b", "'\\\\u2028' is not printable"),
        ("../a", "holds a slash"),
        ("a\\b", "holds a slash or backslash"),
        (" a", "begins or ends with a space"),
        ("a\u00a0", "begins or ends with a space"),
        ("a\u200bb", "'\\\\u200b' is not printable"),
        ("a" * 201, "has 201 characters, at most 200"),
    ],
)
def test_what_could_forge_a_log_line_a_path_or_another_name_is_no_name(name: str, problem: str) -> None:
    with pytest.raises(UnknownContributorError, match=problem) as caught:
        weighted_average([replace(good(), contributor=name)])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "site-1",
        "Klinikum Süd 3",
        "病院",
        "東京\u3000病院",
        "Hôpital\u00a0Nord",
        "بیمارستان\u200cها",
        "👩\u200d🔬 lab",
        "site-1@node-7",
        "a" * 200,
    ],
)
def test_names_that_people_give_are_names(name: str) -> None:
    assert weighted_average([replace(good(), contributor=name)]).keys() == good().weights.keys()  # type: ignore[union-attr]


# Rounds and kinds


def test_contribution_of_an_older_round_is_the_stale_one_wherever_it_stands_in_the_list() -> None:
    fresh, stale = [good("site-1"), good("site-3")], replace(good("site-2"), round=ROUND - 1)
    for batch in ([stale, *fresh], [fresh[0], stale, fresh[1]], [*fresh, stale]):
        with pytest.raises(RoundError) as caught:
            weighted_average(batch)
        assert (caught.value.contributor, caught.value.round, caught.value.expected) == ("site-2", ROUND - 1, ROUND)


def test_the_one_of_another_round_is_refused_and_not_the_others_wherever_it_stands() -> None:
    honest = [good(f"site-{k}") for k in (1, 3, 4)]
    for stated in (0, ROUND - 1, ROUND + 1, 99, 2**62):
        for place in range(4):
            batch = [*honest[:place], replace(good("site-2"), round=stated), *honest[place:]]
            with pytest.raises(RoundError) as caught:
                weighted_average(batch)
            assert (caught.value.contributor, caught.value.round, caught.value.expected) == ("site-2", stated, ROUND)
            assert "as many" not in str(caught.value)


def test_of_equally_common_rounds_the_newer_counts_and_the_refusal_says_that_they_are() -> None:
    batch = [good("site-1"), replace(good("site-2"), round=ROUND + 1)]
    for listed in (batch, batch[::-1]):
        with pytest.raises(
            RoundError, match="as many contributions of this call state it as state the expected one"
        ) as caught:
            weighted_average(listed)
        assert caught.value.contributor == "site-1"


@pytest.mark.parametrize("stated", ["4", 2.5, [4], None])
def test_a_round_or_a_kind_that_is_none_does_not_decide(stated: Any) -> None:
    batch = [replace(good("site-1"), round=stated), replace(good("site-2"), kind=stated), good("site-3")]
    for listed in (batch, batch[::2], batch[:1]):
        if stated is None and batch[1] not in listed:
            assert bits(weighted_average(listed)) == bits(good_weights())
            continue
        with pytest.raises((RoundError, KindError)) as caught:
            weighted_average(listed)
        assert caught.value.contributor in ("site-1", "site-2")
        assert "as many" not in str(caught.value)


def test_the_one_of_another_kind_is_refused_and_not_the_others_wherever_it_stands() -> None:
    weights = {"w": np.ones(2)}
    for kind, other in ((Kind.FULL, Kind.DIFF), (Kind.DIFF, Kind.FULL)):
        honest = [Contribution(f"site-{k}", weights, 1, kind=kind) for k in (1, 3)]
        for place in range(3):
            with pytest.raises(KindError) as caught:
                weighted_average([*honest[:place], Contribution("site-2", weights, 1, kind=other), *honest[place:]])
            assert (caught.value.contributor, caught.value.expected) == ("site-2", kind)


def test_rounds_that_are_numpy_integers_are_compared_too() -> None:
    batch = [replace(good(f"site-{k}"), round=np.int64(k)) for k in (3, 4)]  # type: ignore[arg-type]
    with pytest.raises(RoundError) as caught:
        weighted_average(batch)
    assert caught.value.contributor == "site-3"


def test_contribution_that_states_no_round_is_accepted() -> None:
    batch = [good("site-1"), replace(good("site-2"), round=None)]
    assert bits(weighted_average(batch)) == bits(good_weights())


def test_kinds_do_not_mix_in_either_direction() -> None:
    weights = {"w": np.ones(2)}
    full, diff = Contribution("a", weights, 1), Contribution("b", weights, 1, kind=Kind.DIFF)
    for first, second in ((full, diff), (diff, full)):
        with pytest.raises(KindError) as caught:
            weighted_average([first, second])
        assert caught.value.contributor == second.contributor
        assert (caught.value.kind, caught.value.expected) == (second.kind, first.kind)


def test_kind_may_be_given_as_its_value() -> None:
    kinds: tuple[Any, ...] = ("diff", Kind.DIFF)
    batch = [Contribution(f"{k}", {"w": np.ones(2)}, 1, kind=kind) for k, kind in enumerate(kinds)]
    assert weighted_average(batch)["w"].tolist() == [1.0, 1.0]


def test_unknown_kind_is_not_what_the_error_says_it_expected() -> None:
    bad: Any = Contribution("a", {"w": np.ones(2)}, 1, kind="gradient")  # type: ignore[arg-type]
    with pytest.raises(KindError) as caught:
        weighted_average([bad])
    assert caught.value.expected != "gradient"
    assert "expected gradient" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "uint32", "uint64"])
def test_differences_of_booleans_and_unsigned_integers_are_refused(dtype: str) -> None:
    bad = Contribution("site-2", {"w": np.ones(2), "n": np.ones(3, dtype)}, 1, kind=Kind.DIFF)
    accumulator = Accumulator()
    attempts: tuple[Attempt, ...] = (lambda: weighted_average([bad]), lambda: accumulator.add(bad))
    for attempt in attempts:
        with pytest.raises(DtypeError, match="cannot hold a difference") as caught:
            attempt()
        assert (caught.value.contributor, caught.value.name) == ("site-2", "n")
        assert (caught.value.dtype, caught.value.expected) == (np.dtype(dtype), None)
    assert len(accumulator) == 0


@pytest.mark.parametrize(
    "dtype", ["float16", BFLOAT16, "float32", "float64", "int8", "int16", "int32", "int64"], ids=str
)
def test_differences_of_signed_dtypes_are_averaged(dtype: Any) -> None:
    batch = [Contribution(f"{k}", {"w": np.array([-3, 5], dtype)}, k + 1, kind=Kind.DIFF) for k in range(3)]
    assert weighted_average(batch)["w"].tolist() == [-3, 5]


# Aggregation weights


@pytest.mark.parametrize(
    "weight", [1, 0.5, 5e-324, 1.7e308, np.int8(3), np.uint64(2**63), np.float32(0.5), Fraction(1, 3), 10**300]
)
def test_any_positive_finite_real_number_is_an_aggregation_weight(weight: Any) -> None:
    assert check_aggregation_weight(weight) == float(weight)
    assert weighted_average([replace(good(), aggregation_weight=weight)])["fc.bias"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("weights", [[1, -1], [0, -1], [-0.5, 0]], ids=str)
def test_negative_weights_are_named_errors_and_never_count_as_one(weights: list[float]) -> None:
    with pytest.raises(AggregationWeightError) as caught:
        weighted_average([{"w": np.ones(1)}, {"w": np.ones(1)}], weights)
    first = next(k for k, weight in enumerate(weights) if weight < 0)
    assert caught.value.contributor == f"contributions[{first}]"
    assert caught.value.value == weights[first]


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize("zero", [0, 0.0, -0.0, np.int64(0), np.array(0.0), Decimal(0), Fraction(0)], ids=repr)
def test_what_counts_by_zero_is_checked_and_leaves_every_bit_as_if_it_had_never_come(zero: Any, exact: bool) -> None:
    rng = np.random.default_rng(3)
    first, second, idle = ({"w": rng.normal(size=7).astype(np.float32), "z": np.array([-0.0])} for _ in range(3))
    idle["z"] = np.array([0.0])  # −0 plus 0 · 0 would be +0
    expected = weighted_average([first, second], [3, 0.7], exact=exact)
    found = weighted_average([first, idle, second], [3, zero, 0.7], exact=exact)
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in expected.items()}
    stream = Accumulator(exact=exact)
    stream.add(idle, zero, "b")
    stream.add(first, 3, "a")
    stream.add(second, 0.7, "c")
    assert {n: a.tobytes() for n, a in stream.result().items()} == {n: a.tobytes() for n, a in expected.items()}
    assert (stream.contributors, len(stream), stream.total_weight) == (("b", "a", "c"), 2, 3.7)
    with pytest.raises(DuplicateContributionError):
        stream.add(idle, zero, "b")
    idle["w"][2] = np.nan
    attempts: tuple[Attempt, ...] = (
        lambda: weighted_average([first, idle], [3, zero], exact=exact),
        lambda: stream.add(idle, zero, "d"),
    )
    for attempt in attempts:
        with pytest.raises(NonFiniteError):
            attempt()


def test_nothing_but_zeros_is_nothing_to_average() -> None:
    stream = Accumulator()
    stream.add({"w": np.ones(1)}, 0, "a")
    attempts: tuple[Attempt, ...] = (
        lambda: weighted_average([{"w": np.ones(1)}, {"w": np.ones(1)}], [0, 0.0]),
        stream.result,
    )
    for attempt in attempts:
        with pytest.raises(EmptyAggregationError):
            attempt()


# Python itself refuses to print an integer of so many digits.
TOO_LONG_TO_BE_PRINTED: dict[str, tuple[dict[str, Any], type[ContributionError]]] = {
    "aggregation weight": ({"aggregation_weight": 10**5000}, AggregationWeightError),
    "aggregation weight that underflows": ({"aggregation_weight": Fraction(1, 10**5000)}, AggregationWeightError),
    "aggregation weight below zero": ({"aggregation_weight": Fraction(-1, 10**5000)}, AggregationWeightError),
    "iterations": ({"n_iter": 10**5000}, MetricError),
    "round": ({"round": -(10**5000)}, RoundError),
}


@pytest.mark.parametrize(("fields", "error"), TOO_LONG_TO_BE_PRINTED.values(), ids=TOO_LONG_TO_BE_PRINTED)
def test_numbers_too_long_to_be_printed_are_refused_like_any_other(
    fields: dict[str, Any], error: type[ContributionError]
) -> None:
    bad = replace(good("site-2"), **fields)
    accumulator = Accumulator()
    accumulator.add(good("site-1"))
    attempts: tuple[Attempt, ...] = (
        lambda: weighted_average([good("site-1"), bad]),
        lambda: accumulator.add(bad),
    )
    for attempt in attempts:
        with pytest.raises(error) as caught:
            attempt()
        assert caught.value.contributor == "site-2"
        assert len(str(caught.value)) < 300
    assert accumulator.contributors == ("site-1",)


def test_zero_contributions_are_an_error_and_never_nan() -> None:
    attempts: tuple[Attempt, ...] = (lambda: weighted_average([]), lambda: Accumulator().result())
    for attempt in attempts:
        with pytest.raises(EmptyAggregationError):
            attempt()


# Metrics are never a reason to refuse weights


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("0.9", "0.9"),
        (None, None),
        (True, True),
        ([0.9, 1], (0.9, 1)),
        ({"a": [1]}, {"a": (1,)}),
        (0.9 + 0j, "(0.9+0j)"),
        (10**400, "1000000000000...0000000000000"[:3]),
        (10**5000, "an int"),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_an_entry_of_metrics_that_is_no_number_goes_to_the_info(value: Any, kept: Any) -> None:
    contribution = replace(good("site-2"), metrics={"loss": np.float32(0.5), "accuracy": value})  # type: ignore[dict-item]
    assert contribution.metrics == {"loss": 0.5}
    assert type(contribution.metrics["loss"]) is float
    found = contribution.info["accuracy"]
    assert found == kept or (isinstance(found, str) and found.startswith(kept))
    assert weighted_average([good("site-1"), contribution])["fc.bias"].tolist() == [1.0, 1.0, 1.0]
    assert replace(contribution, round=1).info == contribution.info


@pytest.mark.parametrize("twelve", [12, 12.0, Fraction(12), np.longdouble(12), np.array(12), np.float32(12)], ids=repr)
def test_iterations_are_taken_in_any_form_of_a_whole_number(twelve: Any) -> None:
    assert whole_number_of(twelve) == 12
    assert weighted_average([replace(good(), n_iter=twelve)])["fc.bias"].tolist() == [1.0, 1.0, 1.0]


# Regressions of other libraries


@pytest.mark.parametrize(
    ("first", "second"), [((4, 3), (3,)), ((3, 1), (1, 3)), ((1, 3), (3, 1)), ((), (3,)), ((3,), (3, 1))]
)
def test_shapes_are_never_broadcast(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    pair = [{"w": np.ones(first, np.float32)}, {"w": np.ones(second, np.float32)}]
    accumulator = Accumulator()
    accumulator.add(pair[0], 1)
    attempts: tuple[Attempt, ...] = (lambda: weighted_average(pair), lambda: accumulator.add(pair[1], 1, "site-2"))
    for attempt in attempts:
        with pytest.raises(ShapeError) as caught:
            attempt()
        assert (caught.value.shape, caught.value.expected) == (second, first)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_nan_does_not_poison_its_element(dtype: np.dtype[Any]) -> None:
    accumulator = Accumulator()
    accumulator.add({"w": np.ones(3, dtype)}, 1, "a")
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(NonFiniteError):
            accumulator.add({"w": np.array([1, value, 1], dtype)}, 1, "b")
    accumulator.add({"w": np.full(3, 3, dtype)}, 1, "b")
    assert accumulator.result()["w"].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_value_that_is_not_finite_is_found_however_little_it_weighs(
    kernel: str, dtype: np.dtype[Any], count: int
) -> None:
    for value in (np.nan, np.inf, -np.inf):
        for index in (0, 7, 1024):
            poisoned = np.zeros(1025, dtype)
            poisoned[index] = value
            rest = [Contribution(f"site-{k}", {"w": np.ones(1025, dtype)}, 10.0**9) for k in range(1, count)]
            for weight in (5e-324, 1e-9, 1, 1e300):
                with pytest.raises(NonFiniteError) as caught:
                    weighted_average([*rest, Contribution("site-0", {"w": poisoned}, weight)], kernel=kernel)
                assert (caught.value.contributor, caught.value.index) == ("site-0", (index,))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opposite_infinities_do_not_hide_each_other(kernel: str, dtype: np.dtype[Any]) -> None:
    batch = [Contribution(f"{k}", {"w": np.array([sign * np.inf], dtype)}, 1) for k, sign in enumerate((1, -1))]
    with pytest.raises(NonFiniteError) as caught:
        weighted_average(batch, kernel=kernel)
    assert caught.value.contributor == "0"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_largest_finite_values_are_not_taken_for_infinities(dtype: np.dtype[Any]) -> None:
    array = np.array([largest(dtype), -largest(dtype)], dtype)
    assert weighted_average([{"w": array}, {"w": array}])["w"].tobytes() == array.tobytes()


HUGE = [("int64", 2**53 + 1), ("int64", -(2**53) - 1), ("int64", 2**63 - 1), ("int64", -(2**63)), ("uint64", 2**64 - 1)]


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize(("dtype", "count"), HUGE)
def test_stream_refuses_integers_too_large_for_its_sums_and_says_where(dtype: str, count: int, exact: bool) -> None:
    accumulator = Accumulator(exact=exact)
    accumulator.add({"seen": np.array([1, 2], dtype)}, 3, "site-1")
    with pytest.raises(IntegerRangeError) as caught:
        accumulator.add({"seen": np.array([1, count], dtype)}, 3, "site-2")
    assert isinstance(caught.value, ValueError)
    assert (caught.value.contributor, caught.value.name, caught.value.index) == ("site-2", "seen", (1,))
    assert caught.value.value == abs(count)
    assert "site-2: 'seen'" in str(caught.value)
    assert accumulator.result()["seen"].tolist() == [1, 2]
    assert pickle.loads(pickle.dumps(caught.value)).index == (1,)


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize(("dtype", "count"), HUGE)
def test_batch_averages_huge_integers_exactly(dtype: str, count: int, exact: bool) -> None:
    arrays = [np.array([count, 7], dtype), np.array([count, 10], dtype)]
    for weights in ([3, 5], [0.1, 0.7], [1e-20, 1e20] if exact else [1e-300, 1e300]):
        result = weighted_average([{"seen": array} for array in arrays], weights, exact=exact)["seen"]
        assert result.dtype == dtype
        assert result.tolist() == rounded_mean(arrays, weights)


@pytest.mark.parametrize("shape", [(1025,), (5, 7, 3)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_index_of_the_first_value_that_is_not_finite_is_named(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        array = np.ones(shape, dtype)
        positions = sorted(tuple(int(rng.integers(length)) for length in shape) for _ in range(2))
        for position in positions:
            array[position] = np.inf
        for some in (array, np.asarray(array, order="F")):
            with pytest.raises(NonFiniteError) as caught:
                weighted_average([{"w": some}])
            assert caught.value.index == positions[0]


# Messages and pickling


def test_many_wrong_names_are_told_in_one_short_line_and_all_carried() -> None:
    like = {f"layer.{k}": np.ones(1) for k in range(1000)}
    with pytest.raises(NamesError) as caught:
        weighted_average([Contribution("site-1", {}, 1)], like=like)
    assert caught.value.missing == tuple(like)
    assert len(str(caught.value)) < 300
    assert "and 995 more" in str(caught.value)


def copies(error: FedLearnError) -> list[FedLearnError]:
    protocols = range(2, pickle.HIGHEST_PROTOCOL + 1)
    return [*(pickle.loads(pickle.dumps(error, protocol)) for protocol in protocols), copy.copy(error)]


@every_refusal
def test_errors_survive_pickling_with_their_attributes(what: str) -> None:
    refusal = REFUSALS[what]
    with pytest.raises(refusal.error) as caught:
        weighted_average([good("site-1"), refusal.bad])
    for again in copies(caught.value):
        check(again, refusal)
        assert str(again) == str(caught.value)
        assert vars(again).keys() == vars(caught.value).keys()


def test_message_of_a_key_error_is_not_a_repr() -> None:
    assert str(NamesError("site-1: misses 'w'")) == "site-1: misses 'w'"
    assert str(pickle.loads(pickle.dumps(NamesError("site-1: misses 'w'")))) == "site-1: misses 'w'"


def test_attribute_that_an_error_does_not_carry_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="carries no 'index'"):
        _ = ShapeError("x").index


def every_error() -> list[type[FedLearnError]]:
    def below(kind: type[FedLearnError]) -> list[type[FedLearnError]]:
        return [kind, *(grandchild for child in kind.__subclasses__() for grandchild in below(child))]

    return below(FedLearnError)


@pytest.mark.parametrize("error", [e for e in every_error() if not issubclass(e, ExceptionGroup)])
def test_every_error_survives_pickling_with_its_attributes(error: type[FedLearnError]) -> None:
    for again in copies(error("what happened", contributor="site-1", name="w", index=(0, 3))):
        assert type(again) is error
        assert (str(again), again.contributor, again.name, again.index) == ("what happened", "site-1", "w", (0, 3))


def test_every_error_but_the_two_bases_is_also_a_builtin_that_a_caller_would_catch() -> None:
    builtins: tuple[Callable[..., Exception], ...] = (
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        OverflowError,
        OSError,
    )
    for error in every_error():
        bases = [base for base in builtins if issubclass(error, base)]  # type: ignore[arg-type]
        expected = error not in (FedLearnError, ContributionError) and not issubclass(error, ExceptionGroup)
        assert bool(bases) == expected, error
