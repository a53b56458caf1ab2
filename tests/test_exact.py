"""`exact=True`: the same bits for every order and every tree of merges, and a result that is that of the exact sum."""

import copy
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    BFLOAT16,
    COUNTS,
    DTYPES,
    FLOATS,
    KERNELS,
    NARROW_FLOATS,
    Array,
    bits,
    exact_mean,
    finite_patterns,
    largest,
    largest_own_error,
    rounded_mean,
    values,
)

from fed_learn.aggregation import Accumulator, weighted_average
from fed_learn.contribution import Contribution
from fed_learn.errors import ExactDomainError, FedLearnError

pytestmark = pytest.mark.quick

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)

ADVERSARIAL = (2.0**60, 1.0, 2.0**-60, -(2.0**60), -1.0)
FEW_EXAMPLES = settings(deadline=None, max_examples=60)

Pair = tuple[Array, float]


def streamed(pairs: Sequence[Pair], kernel: str | None = None) -> Accumulator:
    accumulator = Accumulator(exact=True, kernel=kernel)
    for array, weight in pairs:
        accumulator.add({"w": array}, weight)
    return accumulator


def mean_bits(accumulator: Accumulator) -> bytes:
    return accumulator.result()["w"].tobytes()


def merged_at_random(pairs: Sequence[Pair], rng: np.random.Generator) -> Accumulator:
    """The pairs in random order, dealt to random accumulators, which are merged along a random tree."""
    order = rng.permutation(len(pairs))
    cuts = np.sort(rng.integers(0, len(pairs) + 1, int(rng.integers(0, len(pairs)))))
    leaves = [streamed([pairs[int(k)] for k in part]) for part in np.split(order, cuts)]
    while len(leaves) > 1:
        other = leaves.pop(int(rng.integers(len(leaves))))
        leaves[int(rng.integers(len(leaves)))].merge(other)
    return leaves[0]


def assert_is_the_exact_mean(result: Array, pairs: Sequence[Pair]) -> None:
    """However much the terms cancel, the error is measured against the mean itself and not against the terms."""
    arrays, weights = [array for array, _ in pairs], [weight for _, weight in pairs]
    bound = 3 if result.dtype == np.float64 else 0.51
    assert largest_own_error(result, exact_mean(arrays, weights)) <= bound


# Orders and trees


@every_kernel
def test_every_order_of_adversarial_terms_gives_their_exact_sum(kernel: str) -> None:
    for order in itertools.permutations(ADVERSARIAL):
        accumulator = streamed([(np.array([term]), 1) for term in order], kernel)
        assert float(accumulator.result()["w"][0]) == 2.0**-60 / 5


def test_plain_sums_of_the_same_terms_do_depend_on_the_order() -> None:
    plain = {
        float(weighted_average([{"w": np.array([term])} for term in order])["w"][0])
        for order in itertools.permutations(ADVERSARIAL)
    }
    assert len(plain) > 1


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_5040_orders_of_seven_terms_give_the_same_bits(kernel: str, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(0)
    terms = finite_patterns(rng, dtype, 7) if dtype in NARROW_FLOATS else values(rng, dtype, 7)
    # One order in each element: contribution k holds what comes k-th.
    orders = np.array(list(itertools.permutations(range(7))))
    result = streamed([(terms[orders[:, k]], 0.3) for k in range(7)], kernel).result()["w"]
    assert result.size == 5040
    assert result.tobytes() == result[:1].tobytes() * 5040


def test_hundreds_of_orders_of_weighted_terms_give_the_same_bits() -> None:
    rng = np.random.default_rng(0)
    pairs = [(values(rng, np.dtype("float64"), 33), float(rng.uniform(0.01, 100))) for _ in range(7)]
    expected = mean_bits(streamed(pairs))
    assert {mean_bits(streamed([pairs[int(k)] for k in rng.permutation(7)])) for _ in range(250)} == {expected}


@pytest.mark.not_quick
@every_float
def test_random_trees_of_merges_give_the_same_bits(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(1)
    pairs = [(values(rng, dtype, 33), float(rng.uniform(0.01, 100))) for _ in range(9)]
    expected = mean_bits(streamed(pairs))
    assert {mean_bits(merged_at_random(pairs, rng)) for _ in range(250)} == {expected}
    assert_is_the_exact_mean(streamed(pairs).result()["w"], pairs)


@every_kernel
@every_float
def test_batch_gives_the_bits_of_streaming_in_any_order(kernel: str, dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(2)
    pairs = [(values(rng, dtype, 1025), float(rng.uniform(0.01, 100))) for _ in range(9)]
    expected = mean_bits(streamed(pairs))
    for _ in range(5):
        shuffled = [pairs[int(k)] for k in rng.permutation(len(pairs))]
        dicts, weights = [{"w": array} for array, _ in shuffled], [weight for _, weight in shuffled]
        result = weighted_average(dicts, weights, exact=True, kernel=kernel)["w"]
        assert result.tobytes() == expected
        assert mean_bits(streamed(shuffled, kernel)) == expected
        contributions = [Contribution(f"{k}", {"w": array}, weight) for k, (array, weight) in enumerate(shuffled)]
        assert weighted_average(contributions, exact=True, kernel=kernel)["w"].tobytes() == expected


FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
IN_DOMAIN = st.one_of(
    st.just(0.0),
    st.floats(2.0**-700, 2.0**700),
    st.floats(-(2.0**700), -(2.0**-700)),
    st.sampled_from([sign * 2.0**k for sign in (1, -1) for k in range(-700, 701, 50)]),
)
WEIGHTS = st.one_of(st.integers(1, 10**6), st.floats(2.0**-100, 2.0**100), st.floats(0.001, 1000.0))


@given(st.lists(st.tuples(st.tuples(FLOAT32, FLOAT32), WEIGHTS), min_size=1, max_size=7), st.integers(0, 2**32))
@FEW_EXAMPLES
def test_any_float32_values_and_weights_give_the_exact_mean_in_every_order(
    terms: list[tuple[tuple[float, float], float]], seed: int
) -> None:
    pairs = [(np.array(numbers, np.float32), weight) for numbers, weight in terms]
    result = streamed(pairs).result()["w"]
    assert_is_the_exact_mean(result, pairs)
    rng = np.random.default_rng(seed)
    assert {mean_bits(merged_at_random(pairs, rng)) for _ in range(5)} == {result.tobytes()}


@given(st.lists(st.tuples(st.tuples(IN_DOMAIN, IN_DOMAIN), WEIGHTS), min_size=1, max_size=7), st.integers(0, 2**32))
@FEW_EXAMPLES
def test_any_float64_values_of_the_domain_give_the_exact_mean_in_every_order(
    terms: list[tuple[tuple[float, float], float]], seed: int
) -> None:
    pairs = [(np.array(numbers), weight) for numbers, weight in terms]
    result = streamed(pairs).result()["w"]
    assert_is_the_exact_mean(result, pairs)
    rng = np.random.default_rng(seed)
    assert {mean_bits(merged_at_random(pairs, rng)) for _ in range(5)} == {result.tobytes()}


@given(
    st.sampled_from([np.dtype(f"{sign}int{size}") for sign in ("", "u") for size in (8, 16, 32, 64)]),
    st.lists(st.tuples(st.integers(0, 2**64), st.integers(1, 1000)), min_size=1, max_size=7),
    st.integers(0, 2**32),
)
@FEW_EXAMPLES
def test_any_integers_give_the_exact_mean_rounded_half_to_even_in_every_order(
    dtype: np.dtype[Any], terms: list[tuple[int, int]], seed: int
) -> None:
    limits = np.iinfo(dtype)
    low, high = max(limits.min, -(2**38)), min(limits.max, 2**38)
    pairs = [(np.array([low + number % (high - low + 1)], dtype), weight) for number, weight in terms]
    result = streamed(pairs).result()["w"]
    assert result.tolist() == rounded_mean([array for array, _ in pairs], [weight for _, weight in pairs])
    rng = np.random.default_rng(seed)
    assert {mean_bits(merged_at_random(pairs, rng)) for _ in range(5)} == {result.tobytes()}


# Exactness


@every_float
def test_means_of_random_values_are_exact_at_the_ends_of_the_weights_too(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(3)
    pairs = [(values(rng, dtype, 257), float(rng.uniform(0.5, 1) * 2.0**k)) for k in (-99, -40, 0, 1, 60, 100)]
    assert_is_the_exact_mean(streamed(pairs).result()["w"], pairs)


@pytest.mark.parametrize("dtype", NARROW_FLOATS, ids=str)
def test_every_magnitude_of_the_narrow_floats_lies_in_the_domain(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(4)
    pairs = [(finite_patterns(rng, dtype, 513), float(rng.uniform(0.01, 100))) for _ in range(5)]
    result = streamed(pairs).result()["w"]
    assert result.dtype == dtype
    assert_is_the_exact_mean(result, pairs)
    again = [(array, weight) for array, weight in pairs[::-1]]
    assert mean_bits(streamed(again)) == result.tobytes()


def test_float32_subnormals_survive_among_the_largest_values() -> None:
    top = largest(np.dtype("float32"))
    terms = [np.array([value, value], np.float32) for value in (top, 3e-45, -top, top, -top)]
    for order in itertools.permutations(terms):
        assert (
            (streamed([(term, 0.2) for term in order]).result()["w"]).tolist() == [float(np.float32(1e-45 / 5 * 2))] * 2
        )


def test_float64_of_the_whole_domain_is_summed_without_loss() -> None:
    terms = [2.0**700, 2.0**300, 1.0, 2.0**-300, 2.0**-700]
    cancelling = [*terms, *(-term for term in terms[:4])]
    rng = np.random.default_rng(5)
    for _ in range(50):
        pairs = [(np.array([cancelling[int(k)]]), 3.0) for k in rng.permutation(len(cancelling))]
        assert streamed(pairs).result()["w"].tolist() == [2.0**-700 / 9]


def test_terms_that_cancel_leave_what_the_weights_are_worth() -> None:
    a, b = 0.1, float(np.nextafter(0.1, 1))
    x = np.array([1e10, 3.3, float(np.float32(1e30))])
    result = streamed([(x, a), (-x, b)]).result()["w"]
    assert_is_the_exact_mean(result, [(x, a), (-x, b)])
    assert (result < 0).all()


@pytest.mark.parametrize("dtype", [np.dtype("int32"), np.dtype("int64")], ids=str)
def test_ties_of_large_integers_that_cancel_go_to_the_even_one(dtype: np.dtype[Any]) -> None:
    large = (2**31 - 1 if dtype == np.int32 else 2**50) - np.arange(100).astype(dtype)
    pairs = [(large, 0.1), ((1 - large).astype(dtype), 0.1)]  # mean 1/2 everywhere
    assert streamed(pairs).result()["w"].tolist() == [0] * 100
    pairs = [(large, 0.1), ((3 - large).astype(dtype), 0.1)]  # mean 3/2 everywhere
    assert streamed(pairs).result()["w"].tolist() == [2] * 100


@pytest.mark.not_quick
@every_kernel
@pytest.mark.parametrize("dtype", COUNTS, ids=str)
@pytest.mark.parametrize("weight", [0.1, 0.3, 1 / 3, 2.0**-100, 1e-3])
def test_ties_of_counts_with_weights_that_are_no_whole_numbers_go_to_the_even_one(
    kernel: str, dtype: np.dtype[Any], weight: float
) -> None:
    ties = {(1, 0): 0} if dtype.kind == "b" else {(1, 0): 0, (1, 2): 2, (3, 2): 2, (3, 4): 4, (7, 0): 4, (5, 0): 2}
    firsts, seconds = (np.array(column, dtype) for column in zip(*ties, strict=True))
    pairs = [(array, weight) for array in (firsts, seconds) for _ in range(5)]
    assert streamed(pairs, kernel).result()["w"].tolist() == list(ties.values())
    assert streamed(pairs[::-1], kernel).result()["w"].tolist() == list(ties.values())
    dicts = [{"w": array} for array, _ in pairs]
    result = weighted_average(dicts, [weight] * 10, exact=True, kernel=kernel)["w"]
    assert (result.dtype, result.tolist()) == (dtype, list(ties.values()))


def weights_of_counts(rng: np.random.Generator, count: int) -> list[float]:
    """Aggregation weights of many kinds: equal ones and small multiples make ties likely."""
    kind = rng.integers(4)
    if kind == 0:
        return [float(rng.choice([0.1, 0.3, 0.7, 1 / 3]))] * count
    if kind == 1:
        return [0.1 * int(k) for k in rng.integers(1, 5, count)]
    if kind == 2:
        return [float(2.0**k) for k in rng.integers(-100, 101, count)]
    return [float(a) for a in rng.uniform(0.01, 100, count)]


@pytest.mark.not_quick
@every_kernel
def test_counts_of_500_random_cases_are_the_exact_rational_rounded_half_to_even(kernel: str) -> None:
    wrong = []
    for seed in range(500):
        rng = np.random.default_rng([31, seed])
        dtype, count = COUNTS[seed % len(COUNTS)], int(rng.integers(1, 12))
        arrays = [rng.integers(0, 4, 7).astype(dtype) if seed % 2 else values(rng, dtype, 7) for _ in range(count)]
        weights = weights_of_counts(rng, count)
        batch = weighted_average([{"w": array} for array in arrays], weights, exact=True, kernel=kernel)["w"]
        stream = streamed(list(zip(arrays, weights, strict=True)), kernel).result()["w"]
        assert stream.tobytes() == batch.tobytes()
        if batch.tolist() != rounded_mean(arrays, weights):
            wrong.append(seed)
    assert wrong == []


def test_total_weight_is_the_exact_sum_rounded_once() -> None:
    weights = [0.1, 2.0**-99, 1e20, 0.3, 1e20, 7.7]
    expected = float(sum(map(Fraction, weights)))
    for order in itertools.islice(itertools.permutations(weights), 0, 720, 7):
        assert streamed([(np.ones(1), weight) for weight in order]).total_weight == expected


@every_float
def test_single_contribution_of_a_power_of_two_is_returned_bit_for_bit(dtype: np.dtype[Any]) -> None:
    array = values(np.random.default_rng(6), dtype, 257)
    for weight in (1, 2.0**-100, 2.0**100):
        assert mean_bits(streamed([(array, weight)])) == array.tobytes()


def test_zeros_of_both_signs_give_the_same_bits_in_every_order() -> None:
    terms = [np.array([0.0, -0.0, 1.0]), np.array([-0.0, -0.0, -1.0]), np.array([0.0, -0.0, 0.0])]
    means = {mean_bits(streamed([(term, 1) for term in order])) for order in itertools.permutations(terms)}
    assert len(means) == 1
    assert np.frombuffer(means.pop()).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("exact", [False, True])
def test_inputs_of_other_byte_order_and_strides_give_the_same_bits(exact: bool) -> None:
    rng = np.random.default_rng(7)
    array = rng.standard_normal((6, 4))
    pairs: list[Pair] = [(array, 0.3), (array.astype(">f8"), 0.7), (np.asfortranarray(array), 2.0)]
    plain: list[Pair] = [(array, weight) for _, weight in pairs]
    results = []
    for some in (pairs, plain):
        accumulator = Accumulator(exact=exact)
        for one, weight in some:
            accumulator.add({"w": one}, weight)
        results.append(mean_bits(accumulator))
    assert results[0] == results[1]


# Carrying


@pytest.mark.not_quick
@pytest.mark.parametrize("after", [1, 2, 3, 4, 7])
@every_float
def test_carrying_early_does_not_change_the_bits(
    after: int, dtype: np.dtype[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(8)
    pairs = [(values(rng, dtype, 33), float(rng.uniform(0.01, 100))) for _ in range(20)]
    expected = mean_bits(streamed(pairs))
    monkeypatch.setattr("fed_learn.aggregation.exact.MOST_TERMS", after)
    assert mean_bits(streamed(pairs)) == expected
    assert {mean_bits(merged_at_random(pairs, rng)) for _ in range(10)} == {expected}


@given(st.lists(st.tuples(IN_DOMAIN, WEIGHTS), min_size=1, max_size=12), st.integers(1, 5))
@FEW_EXAMPLES
def test_carrying_early_does_not_change_the_bits_of_any_values(terms: list[tuple[float, float]], after: int) -> None:
    pairs = [(np.array([number]), weight) for number, weight in terms]
    expected = mean_bits(streamed(pairs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fed_learn.aggregation.exact.MOST_TERMS", after)
        assert mean_bits(streamed(pairs)) == expected
        assert mean_bits(streamed(pairs[::-1])) == expected


@pytest.mark.not_quick
def test_more_terms_than_fit_without_a_carry_are_summed_exactly() -> None:
    term, weight = np.array([2.0**44 - 1, 1 - 2.0**44, 1 / 3]), 1 - 2.0**-53
    accumulator = Accumulator(exact=True)
    for _ in range(33_000):
        accumulator.add({"w": term}, weight)
    assert accumulator.total_weight == float(33_000 * Fraction(weight))
    accumulator.add({"w": -term}, 32_999)
    expected = [
        Fraction(x) * (33_000 * Fraction(weight) - 32_999) / (33_000 * Fraction(weight) + 32_999) for x in term.tolist()
    ]
    assert largest_own_error(accumulator.result()["w"], expected) <= 3


@pytest.mark.parametrize("doublings", [1, 17, 20, 40, 60])
def test_sums_of_far_more_terms_than_fit_without_a_carry_keep_their_last_bit(doublings: int) -> None:
    scales = np.array([1.0, -1.0, 2.0**-72, 2.0**360])
    term = {"w": (2.0**35 - 1) * scales}
    accumulator = Accumulator(exact=True)
    accumulator.add(term, 1)
    for _ in range(doublings - 1):
        accumulator.merge(copy.deepcopy(accumulator))
        accumulator.add(term, 1)
    assert len(accumulator) == 2**doublings - 1
    # (2**k - 1)(2**35 - 1) = 2**(k + 35) - 2**k - 2**35 + 1: what these three take away leaves the 1.
    for rest in (-(2.0 ** (doublings + 35)), 2.0**doublings, 2.0**35):
        accumulator.add({"w": rest * scales}, 1)
    assert accumulator.total_weight == 2.0**doublings + 2
    assert accumulator.result()["w"].tolist() == (scales / (2.0**doublings + 2)).tolist()


def test_merging_two_that_are_about_to_carry_is_exact() -> None:
    term = np.array([2.0**44 - 1, -(2.0**44 - 1), 2.0**700 - 2.0**648])
    one = streamed([(term, 1.0)] * 4)
    for _ in range(13):
        one.merge(copy.deepcopy(one))
    assert len(one) == 1 << 15
    almost = streamed([])
    for power in range(15):
        part = streamed([(term, 1.0)])
        for _ in range(power):
            part.merge(copy.deepcopy(part))
        almost.merge(part)
    assert len(almost) == (1 << 15) - 1
    almost.merge(copy.deepcopy(almost))
    assert mean_bits(almost) == mean_bits(one) == term.tobytes()


# The domain


DOMAIN_VIOLATIONS: dict[str, tuple[Array, float, str | None]] = {
    "float64 above 2**700": (np.array([1.0, np.nextafter(2.0**700, np.inf)]), 1, "w"),
    "float64 below -2**700": (np.array([1.0, -(2.0**701)]), 1, "w"),
    "float64 below 2**-700": (np.array([1.0, np.nextafter(2.0**-700, 0)]), 1, "w"),
    "float64 subnormal": (np.array([0.0, -5e-324]), 1, "w"),
    "float64 of the other byte order above 2**700": (np.array([1.0, 2.0**701]).astype(">f8"), 1, "w"),
    "float64 of the other byte order below 2**-700": (np.array([1.0, 2.0**-701]).astype(">f8"), 1, "w"),
    "aggregation weight above 2**100": (np.array([1.0, 1.0]), float(np.nextafter(2.0**100, np.inf)), None),
    "aggregation weight below 2**-100": (np.array([1.0, 1.0]), float(np.nextafter(2.0**-100, 0)), None),
}


@pytest.mark.parametrize("what", DOMAIN_VIOLATIONS)
def test_leaving_the_domain_raises_and_changes_nothing(what: str) -> None:
    array, weight, name = DOMAIN_VIOLATIONS[what]
    accumulator = Accumulator(exact=True)
    good = Contribution("good", {"v": np.array([3.0]), "w": np.array([1.0, 2.0])}, 2)
    accumulator.add(good)
    before = bits(accumulator.result())
    bad = Contribution("site-7", {"v": np.array([9.0]), "w": array}, weight)
    with pytest.raises(ExactDomainError, match="site-7") as caught:
        accumulator.add(bad)
    assert (caught.value.contributor, caught.value.name) == ("site-7", name)
    assert (isinstance(caught.value, OverflowError), isinstance(caught.value, FedLearnError)) == (True, True)
    assert bits(accumulator.result()) == before
    assert (len(accumulator), accumulator.total_weight, accumulator.contributors) == (1, 2.0, ("good",))
    for batch in ([good, bad], [bad, good]):
        with pytest.raises(ExactDomainError, match="site-7") as caught:
            weighted_average(batch, exact=True)
        assert (caught.value.contributor, caught.value.name) == ("site-7", name)
    assert weighted_average([good, bad])["v"].shape == (1,)


@pytest.mark.parametrize("what", DOMAIN_VIOLATIONS)
def test_leaving_the_domain_with_the_first_contribution_sets_no_schema(what: str) -> None:
    array, weight, _ = DOMAIN_VIOLATIONS[what]
    accumulator = Accumulator(exact=True)
    with pytest.raises(ExactDomainError):
        accumulator.add({"w": array}, weight)
    accumulator.add({"other": np.array([1.0])}, 1)
    assert accumulator.result()["other"].tolist() == [1.0]


@pytest.mark.parametrize("number", [2.0**700, 2.0**-700, -(2.0**700), -(2.0**-700), 0.0, -0.0])
@pytest.mark.parametrize("weight", [2.0**100, 2.0**-100, 1.0])
def test_ends_of_the_domain_belong_to_it(number: float, weight: float) -> None:
    assert streamed([(np.array([number]), weight)]).result()["w"].tolist() == [number]
    assert weighted_average([{"w": np.array([number])}], [weight], exact=True)["w"].tolist() == [number]


def test_other_dtypes_have_no_domain() -> None:
    weights: dict[str, Array] = {
        "single": np.array([largest(np.dtype("float32")), 1e-45], np.float32),
        "half": np.array([65_504, 2.0**-24], np.float16),
        "brain": np.array([largest(BFLOAT16), 2.0**-133], BFLOAT16),
        "long": np.array([2**50, -(2**50)]),
    }
    for weight in (2.0**100, 2.0**-100):
        accumulator = Accumulator(exact=True)
        accumulator.add(weights, weight)
        assert bits(accumulator.result()) == bits(weights)
