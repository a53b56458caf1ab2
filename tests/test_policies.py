"""Policies of variables: what becomes of each in averages, rules and streams, against exact references."""

import io
import pickle
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import BFLOAT16, DTYPES, FLOATS, KERNELS, SIZES, Array, exact_sum, fractions, ulp, values

import fed_learn as fl
from fed_learn.policies import POLICIES, POLICY_OF_ROLE, Policies, codes_in
from fed_learn.weights import Schema, WeightDict

pytestmark = pytest.mark.quick


def f32(numbers: list[float]) -> Array:
    return np.array(numbers, np.float32)


def u8(numbers: list[int]) -> Array:
    return np.array(numbers, np.uint8)


def clients() -> list[WeightDict]:
    """Three weight dicts with a variable for each policy."""
    return [
        {
            "fc.weight": f32([k, 2 * k]),
            "bn.weight": f32([10 * k]),
            "steps": np.array([k, 5 - k]),
            "seen": np.array(100 * k),
            "codes": u8([7, 9]),
            "scale": f32([k]),
        }
        for k in (1, 2, 3)
    ]


ALL = {"bn": "local", "^steps$": "max", "seen": "sum", "codes": "same", "scale": "keep"}
LIKE = {**clients()[0], "scale": f32([0.5])}


def shown(weights: WeightDict) -> dict[str, Any]:
    return {name: np.asarray(array).tolist() for name, array in weights.items()}


EXPECTED = {"fc.weight": [2, 4], "steps": [3, 4], "seen": 600, "codes": [7, 9], "scale": [0.5]}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("exact", [False, True])
def test_each_variable_becomes_what_its_policy_says(kernel: str, exact: bool) -> None:
    made = fl.weighted_average(clients(), like=LIKE, policies=ALL, kernel=kernel, exact=exact)
    assert shown(made) == EXPECTED
    assert list(made) == [name for name in LIKE if name != "bn.weight"]
    assert {n: (a.shape, a.dtype) for n, a in made.items()} == {n: (LIKE[n].shape, LIKE[n].dtype) for n in made}
    assert shown(fl.aggregate(clients(), like=LIKE, policies=ALL, rule="mean", exact=exact)) == EXPECTED


def test_inputs_and_the_global_model_share_no_memory_with_the_result() -> None:
    sent, like = clients(), {name: array.copy() for name, array in LIKE.items()}
    made = fl.weighted_average(sent, like=like, policies=ALL)
    for array in made.values():
        array[...] = 77
    assert shown(like) == shown(LIKE)
    assert [shown(one) for one in sent] == [shown(one) for one in clients()]


def test_the_result_can_go_where_it_is_told() -> None:
    out = {name: np.zeros_like(LIKE[name]) for name in EXPECTED}
    assert fl.weighted_average(clients(), like=LIKE, policies=ALL, out=out) is out
    assert shown(out) == EXPECTED
    with pytest.raises(fl.NamesError, match=r"out has other variables than expected: adds 'bn\.weight'"):
        fl.weighted_average(clients(), like=LIKE, policies=ALL, out={name: a.copy() for name, a in LIKE.items()})


@pytest.mark.parametrize("exact", [False, True])
def test_a_stream_gives_the_same_in_any_order_and_any_tree_of_merges(exact: bool) -> None:
    for order in permutations(range(3)):
        one, other = (fl.Accumulator(like=LIKE, policies=ALL, exact=exact) for _ in range(2))
        for place, k in enumerate(order):
            (other if place else one).add(clients()[k], 1.0, f"site-{k}")
        one.merge(pickle.loads(pickle.dumps(other)))
        assert shown(one.result()) == EXPECTED
    out = {name: np.zeros_like(LIKE[name]) for name in EXPECTED}
    assert one.result(out) is out
    assert shown(out) == EXPECTED


def test_an_empty_stream_takes_over_all_of_another() -> None:
    full, empty = fl.Accumulator(like=LIKE, policies=ALL), fl.Accumulator()
    for k, sent in enumerate(clients()):
        full.add(sent, 1.0, f"site-{k}")
    empty.merge(full)
    assert shown(empty.result()) == shown(full.result()) == EXPECTED
    with pytest.raises(fl.DuplicateContributionError, match="site-0: contributed to both"):
        empty.merge(full)


def test_a_stream_without_a_global_model_goes_by_its_first_contribution() -> None:
    policies = {name: policy for name, policy in ALL.items() if policy != "keep"}
    mean = fl.Accumulator(policies=policies)
    for k, sent in enumerate(clients()):
        mean.add(sent, 1.0, f"site-{k}")
    assert shown(mean.result()) == {**EXPECTED, "scale": [2.0]}
    with pytest.raises(ValueError, match="'scale' are kept as they are in the global model: give it as like="):
        fl.Accumulator(policies=ALL).add(clients()[0], 1.0)


def test_what_a_stream_refuses_changes_nothing() -> None:
    mean = fl.Accumulator(like=LIKE, policies=ALL)
    mean.add(clients()[0], 1.0, "site-1")
    bad: list[tuple[WeightDict, type[Exception], str]] = [
        ({**clients()[1], "codes": u8([7, 8])}, fl.NotSameError, "site-2: 'codes' is not the same as .* site-1"),
        ({**clients()[1], "steps": np.array([1])}, fl.ShapeError, "site-2: 'steps' has shape"),
        ({**clients()[1], "seen": np.array(2**63 - 1)}, fl.IntegerRangeError, "site-2: 'seen' is summed"),
        ({**clients()[1], "fc.weight": f32([np.nan, 0])}, fl.NonFiniteError, "site-2: 'fc.weight'"),
        ({n: a for n, a in clients()[1].items() if n != "seen"}, fl.NamesError, "site-2: .* misses 'seen'"),
    ]
    for weights, kind, text in bad:
        with pytest.raises(kind, match=text):
            mean.add(weights, 1.0, "site-2")
    mean.add(clients()[1], 1.0, "site-2")
    mean.add(clients()[2], 1.0, "site-3")
    assert shown(mean.result()) == EXPECTED


def test_what_counts_by_0_adds_nothing_but_has_to_agree() -> None:
    sent = clients()
    made = fl.weighted_average(sent, [1, 1, 0], like=LIKE, policies=ALL)
    assert shown(made) == {**EXPECTED, "fc.weight": [1.5, 3], "steps": [2, 4], "seen": 300}
    sent[2] = {**sent[2], "codes": u8([0, 0])}
    with pytest.raises(fl.NotSameError, match="codes"):
        fl.weighted_average(sent, [1, 1, 0], like=LIKE, policies=ALL)


def test_variables_that_are_kept_or_local_may_be_missing_or_anything_at_all() -> None:
    sent: list[Any] = clients()
    sent[0] = {name: array for name, array in sent[0].items() if name not in ("scale", "bn.weight")}
    sent[1] = {**sent[1], "scale": "no array", "bn.weight": np.full((3, 3), np.nan)}
    sent[2] = {**sent[2], "bn.running_mean": object()}  # a local one that the global model does not even have
    assert shown(fl.weighted_average(sent, like=LIKE, policies=ALL)) == EXPECTED


def test_contributions_are_combined_by_policies_too_and_differences_keep_nothing() -> None:
    sent = [fl.Contribution(f"site-{k}", weights, 1) for k, weights in enumerate(clients())]
    assert shown(fl.weighted_average(sent[::-1], like=LIKE, policies=ALL)) == EXPECTED
    policies = {"bn": "local", "scale": "keep", "codes": "keep"}
    differences = [
        fl.Contribution(s.contributor, {n: a for n, a in s.weights.items() if n != "codes"}, 1, kind=fl.Kind.DIFF)
        for s in sent
        if s.weights is not None
    ]
    made = fl.weighted_average(differences, like=LIKE, policies=policies)
    assert (made["scale"].tolist(), made["codes"].tolist()) == ([0.0], [0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_and_largest_values_are_right_for_every_dtype_and_size(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(0)
    for size in SIZES:
        arrays = [_summable(rng, dtype, size) for _ in range(3)]
        if dtype.kind == "b":
            arrays[1:] = [np.zeros(size, bool), ~arrays[0]]
        sent = [{"s": array, "m": array, "w": np.zeros(1)} for array in arrays]
        made = fl.weighted_average(sent, policies={"s": "sum", "m": "max"})
        assert made["s"].dtype == made["m"].dtype == dtype
        for found, expected in zip(fractions(made["s"]), exact_sum(arrays, [1, 1, 1]), strict=True):
            bound = Fraction(1 if dtype == np.float64 else Fraction(51, 100)) if dtype in FLOATS else 0
            assert abs(found - expected) <= bound * ulp(expected, dtype if dtype in FLOATS else np.dtype(float))
        assert made["m"].tolist() == [max(column) for column in zip(*(a.tolist() for a in arrays), strict=True)]


def _summable(rng: np.random.Generator, dtype: np.dtype[Any], size: int) -> Array:
    """Values whose sum of three stays within the dtype and the domain of exact sums."""
    if dtype in FLOATS:
        return np.asarray(rng.normal(size=size).astype(dtype))
    return np.asarray(values(rng, dtype, size) // 4, dtype) if dtype.kind != "b" else values(rng, dtype, size)


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda x: not 0 < abs(x) < 1e-200), min_size=3))
def test_the_sum_is_exact_and_does_not_depend_on_the_order(numbers: list[float]) -> None:
    def summed(order: list[float]) -> float:
        made = fl.weighted_average([{"s": np.array(x), "w": np.zeros(1)} for x in order], policies={"s": "sum"})
        return float(made["s"])

    exact = sum(map(Fraction, numbers), Fraction())
    assert summed(numbers) == summed(numbers[::-1])
    assert abs(Fraction(summed(numbers)) - exact) <= ulp(exact, np.dtype(float))


def test_of_zeros_the_largest_is_positive_whatever_the_order() -> None:
    for pair in ([0.0, -0.0], [-0.0, 0.0]):
        made = fl.weighted_average([{"m": np.array(x), "w": np.zeros(1)} for x in pair], policies={"m": "max"})
        assert not np.signbit(made["m"])


def test_the_first_expression_that_is_found_decides() -> None:
    policies = Policies({"^bn.out$": "mean", "bn": "local"})
    assert [policies.of(name) for name in ("bn.out", "bn.in", "fc")] == ["mean", "local", None]
    assert pickle.loads(pickle.dumps(policies)) == policies == {"^bn.out$": "mean", "bn": "local"}
    assert set(POLICY_OF_ROLE.values()) <= set(POLICIES)


@pytest.mark.parametrize(
    ("policies", "kind", "text"),
    [
        ({"(": "mean"}, ValueError, r"policies: '\(' is no regular expression"),
        ({"fc": "average"}, ValueError, "'fc' has the policy 'average'; there are 'mean', 'same', 'keep'"),
        ({"conv": "max"}, ValueError, r"policies: 'conv' fits none of the 6 variables \('fc.weight', "),
        (["bn"], TypeError, "policies must be a dict of regular expressions to policies"),
        ({3: "mean"}, TypeError, "must be the text of a regular expression"),
        ({"scale": "keep"}, ValueError, "give it as like="),
    ],
)
def test_wrong_policies_are_refused_and_say_why(policies: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        fl.weighted_average(clients(), policies=policies)


def test_an_expression_for_local_variables_may_fit_none_of_the_global_model() -> None:
    server = [{"fc": f32([k]), "bn": f32([k])} for k in (1, 3)]
    assert shown(fl.weighted_average(server, like={"fc": f32([0])}, policies={"bn": "local"})) == {"fc": [2.0]}


# Codes


def four_bits(codes: Array) -> dict[str, Any]:
    return {
        "base.weight": codes,
        "base.weight.absmax": f32([1, 2]),
        "base.weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        "base.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"quant_type": "nf4"}', np.uint8),
        "lora_A.weight": f32([1]),
    }


def test_codes_are_known_by_their_names_and_dtypes() -> None:
    eight: dict[str, Any] = {
        "l.weight": np.zeros((2, 2), np.int8),
        "l.SCB": np.zeros(2, np.float32),
        "l.weight_format": np.uint8(0),
    }
    states: dict[str, Any] = {"te._extra_state": np.zeros(3, np.uint8), "rng_state": np.zeros(5056, np.uint8)}
    names = {"params/dropout_rng": (2,), "keys": (8, 2), "dropout": (2,)}
    keys: dict[str, Any] = {name: np.zeros(shape, np.uint32) for name, shape in names.items()}
    plain: dict[str, Any] = {
        "mask": np.zeros(4, np.uint8),
        "class_counts": np.zeros(2, np.uint32),
        "hash": np.zeros((2, 3), np.uint32),
        "steps": np.uint32(0),
        "edges": np.zeros((5, 2), np.int32),
        "counts": np.zeros(3, np.int8),
    }
    found = codes_in(Schema.of({**four_bits(np.zeros(8, np.uint8)), **eight, **states, **keys, **plain}))
    assert set(found) == {*four_bits(np.zeros(1)), *eight, *states, *keys} - {"lora_A.weight"}
    assert {found[name] for name in eight} == {"8-bit codes of bitsandbytes"}


def test_codes_that_are_equal_are_kept_and_others_are_refused_by_name() -> None:
    one, other = four_bits(u8([1, 2, 3])), four_bits(u8([1, 2, 3]))
    other["lora_A.weight"] = f32([3])
    made = fl.weighted_average([one, other])
    assert (made["base.weight"].tolist(), made["base.weight.absmax"].tolist()) == ([1, 2, 3], [1, 2])
    assert made["lora_A.weight"].tolist() == [2.0]
    other["base.weight.absmax"] = f32([1, 3])
    advice = r"4-bit codes of bitsandbytes.*policies=\{'\^base.*absmax\$': 'keep'\}.*only="
    combiners: list[Any] = [fl.weighted_average, fl.aggregate]
    for combine in combiners:
        with pytest.raises(fl.NotSameError, match=advice) as caught:
            combine([one, other])
        assert (caught.value.contributor, caught.value.name) == ("contributions[1]", "base.weight.absmax")
    mean = fl.Accumulator()
    mean.add(one, 1, "a")
    with pytest.raises(fl.NotSameError, match=r"b: 'base\.weight\.absmax' is not the same as that of a"):
        mean.add(other, 1, "b")
    kept = fl.weighted_average([one, other], like=one, policies={r"^base\.": "keep"})
    assert kept["base.weight.absmax"].tolist() == [1, 2]


@pytest.mark.parametrize("policy", ["mean", "max", "sum"])
def test_codes_have_no_mean_even_where_one_is_asked_for(policy: str) -> None:
    with pytest.raises(ValueError, match=f"'base.weight' has the policy '{policy}', but it is 4-bit codes"):
        fl.weighted_average([four_bits(u8([1]))] * 2, policies={"^base.weight$": policy})


@pytest.mark.parametrize(
    ("name", "what"), [("key", "the state of a random generator"), ("dropout", "a random key, as it seems")]
)
def test_what_looks_like_a_random_state_can_be_averaged_where_that_is_asked_for(name: str, what: str) -> None:
    sent: list[Any] = [{name: np.array([k, k], np.uint32), "w": np.zeros(1)} for k in (2, 4)]
    with pytest.raises(fl.NotSameError, match=f"it is {what}.*, 'mean' averages it all the same;"):
        fl.weighted_average(sent)
    assert fl.weighted_average(sent, policies={name: "mean"})[name].tolist() == [3, 3]


def test_pickled_states_are_compared_and_never_opened() -> None:
    def sent(state: bytes) -> Any:
        return {"w": f32([1]), "te._extra_state": io.BytesIO(state)}

    made: Any = fl.weighted_average([sent(b"cos\nsystem\n"), sent(b"cos\nsystem\n")])
    assert made["te._extra_state"].getvalue() == b"cos\nsystem\n"
    with pytest.raises(fl.NotSameError, match="it is the extra state of a module"):
        fl.weighted_average([sent(b"a"), sent(b"b")])


# Masks


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS], ids=str)
def test_a_mask_of_minus_infinity_that_is_the_same_everywhere_is_kept(exact: bool, dtype: np.dtype[Any]) -> None:
    mask = np.array([0, -np.inf, 2], dtype)
    sent = [{"w": np.array([k], dtype), "mask": mask} for k in (1, 3)]
    made = fl.weighted_average(sent, [1, 3], exact=exact)
    assert shown(made) == {"w": [2.5], "mask": [0, -np.inf, 2]}
    assert {a.dtype for a in made.values()} == {dtype}
    assert shown(fl.aggregate(sent, [1, 3], exact=exact)) == shown(made)
    out = {name: np.zeros_like(array) for name, array in sent[0].items()}
    assert shown(fl.weighted_average(sent, [1, 3], out=out, exact=exact)) == shown(made)


def test_what_is_not_finite_is_no_mask_unless_another_has_the_same() -> None:
    mask = f32([0, -np.inf])
    for sent in (
        [{"m": mask}],
        [{"m": mask}, {"m": f32([-np.inf, 0])}],
        [{"m": mask}, {"m": f32([0, np.inf])}],
        [{"m": mask}, {"m": f32([0, 1])}],
        [{"m": f32([np.nan])}, {"m": f32([np.nan])}],
    ):
        with pytest.raises(fl.NonFiniteError, match="'m' at index"):
            fl.weighted_average(sent)
    assert shown(fl.weighted_average([{"m": mask}], like={"m": mask})) == {"m": [0, -np.inf]}
    nan = {"m": f32([np.nan, 1])}
    assert np.isnan(fl.weighted_average([nan, nan], like=nan)["m"][0])


def test_halves_are_summed_exactly_and_rounded_once() -> None:
    tiny, big = np.array([2.0**-9], BFLOAT16), np.array([1.0], BFLOAT16)
    made = fl.weighted_average([{"s": x, "w": np.zeros(1)} for x in (big, *[tiny] * 4)], policies={"s": "sum"})
    assert float(made["s"][0]) == 1.0 + 2.0**-7
    assert made["s"].dtype == BFLOAT16
