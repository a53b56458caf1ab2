"""The privacy protocols do what their papers say: what is chosen, how it is bounded, how the noise is distributed.

Draws are seeded: the tests of distributions give the same p-values every time.
"""

import copy
import math
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from scipy import integrate, stats  # type: ignore[import-untyped]

from fed_learn.client.fed_privacy import (
    BLOCK,
    LaplacianProtocol,
    PercentileProtocol,
    PrivacyProtocol,
    SVTProtocol,
    TrainContext,
)

LIKELY = 1e-3
"""The smallest p-value that passes."""
RANDOMISED: tuple[type[Any], ...] = (LaplacianProtocol, SVTProtocol)
PLENTY = {"epsilon": 1e12, "noise_var": 1e12}
"""Budgets so large that the noise vanishes."""


def made(cls: type[Any], **arguments: Any) -> Any:
    """A protocol with the arguments that it knows."""
    if cls is LaplacianProtocol:
        arguments.pop("noise_var", None)
    return cls(**{"gamma": 1.0, "tau": 0.0, "fraction": 1.0, "seed": 1} | arguments)


def applied(protocol: PrivacyProtocol, numbers: Any, steps: int | None = None) -> npt.NDArray[np.float64]:
    sent = protocol.apply({"w": np.array(numbers, np.float64)}, TrainContext(steps))
    return np.asarray(sent["w"])


# ---- percentile


def test_the_percentile_is_taken_over_the_whole_model() -> None:
    diff = {"a": np.array([[1.0, -6], [3, 0]]), "b": np.array([-2.0, 5, 4, -8])}
    sent = PercentileProtocol(percentile=50, gamma=100).apply(diff)
    assert sent["a"].tolist() == [[0, -6], [0, 0]]
    assert sent["b"].tolist() == [0, 5, 4, -8]


@pytest.mark.parametrize(("percentile", "shared"), [(0, 1000), (10, 900), (75, 250), (99, 10), (100, 1)])
def test_the_percentile_says_how_many_are_shared(percentile: float, shared: int) -> None:
    diff = np.random.default_rng(0).normal(size=1000)
    sent = applied(PercentileProtocol(percentile, gamma=100), diff)
    chosen = np.flatnonzero(sent)
    assert len(chosen) == shared
    assert set(chosen) == set(np.argsort(np.abs(diff))[-shared:])
    assert np.array_equal(sent[chosen], diff[chosen])


def test_what_is_shared_is_bounded_per_step() -> None:
    assert applied(PercentileProtocol(50, gamma=2), [1, -9, 3, 0.5]).tolist() == [0, -2, 2, 0]
    assert applied(PercentileProtocol(50, gamma=2), [1, -9, 3, 0.5], steps=4).tolist() == [0, -8, 3, 0]
    assert applied(PercentileProtocol(0, gamma=0.1), [1, -1, 0.25], steps=5).tolist() == [0.5, -0.5, 0.25]


def test_equal_numbers_are_shared_or_not_together() -> None:
    assert applied(PercentileProtocol(50, gamma=9), [1, 1, 1, -1]).tolist() == [1, 1, 1, -1]
    assert applied(PercentileProtocol(50, gamma=9), [0, 0, 0]).tolist() == [0, 0, 0]


# ---- what all have in common

ALL = [PercentileProtocol(0, gamma=100), *(made(cls, gamma=100, **PLENTY) for cls in RANDOMISED)]


@pytest.mark.parametrize("protocol", ALL, ids=lambda p: type(p).__name__)
def test_shapes_and_dtypes_stay_and_what_is_no_float_passes(protocol: PrivacyProtocol) -> None:
    diff: dict[str, Any] = {
        "half": np.ones((2, 3), np.float16),
        "brain": np.ones(3, ml_dtypes.bfloat16),
        "single": np.full((1, 2, 2), 3, np.float32),
        "scalar": np.float32(5) * np.ones((), np.float32),
        "none": np.zeros((0, 4)),
        "counter": np.full((), 7_000, np.int64),
        "swapped": np.ones(2, ">f4"),
    }
    sent = protocol.apply(dict(diff), TrainContext(3))
    assert list(sent) == list(diff)
    for name, array in sent.items():
        assert (array.dtype, array.shape) == (diff[name].dtype, diff[name].shape), name
        assert np.allclose(array.astype(float), diff[name].astype(float), atol=1e-2), name
    assert int(sent["counter"]) == 7_000
    integers = {"n": np.ones(2, np.int32)}
    assert protocol.apply(integers, TrainContext(3))["n"].tolist() == [1, 1]
    assert dict(protocol.apply({}, None)) == {}


@pytest.mark.parametrize("protocol", [PercentileProtocol(0, 100), LaplacianProtocol(), SVTProtocol()])
@pytest.mark.parametrize("steps", [0, -1, math.nan, "many"])
def test_a_number_of_steps_that_is_none_is_refused(protocol: PrivacyProtocol, steps: Any) -> None:
    with pytest.raises(ValueError, match=r"^total_steps must be a positive, finite number, not "):
        applied(protocol, [1.0], steps)


@pytest.mark.parametrize("cls", RANDOMISED)
@pytest.mark.parametrize("twin", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_no_copy_of_a_protocol_has_the_noise_of_another(cls: type[Any], twin: Any) -> None:
    """Whoever knew both of two clients with the same noise could take it away."""
    one = cls(fraction=1.0, gamma=1.0, tau=0.0)
    other = twin(one)
    diff = np.random.default_rng(3).normal(size=100)
    assert not np.array_equal(applied(one, diff), applied(other, diff))


BAD_ARGUMENTS = [
    (PercentileProtocol, {"percentile": -1}, "percentile must be from 0 to 100, not -1"),
    (PercentileProtocol, {"percentile": math.nan}, "percentile must be from 0 to 100"),
    (PercentileProtocol, {"gamma": 0}, "gamma must be a positive, finite number, not 0"),
    *(
        (cls, {name: value}, name)
        for cls in RANDOMISED
        for name in ("fraction", "epsilon", "gamma")
        for value in (0, -1)
    ),
    *((cls, {"tau": value}, "tau must be") for cls in RANDOMISED for value in (-1, math.inf)),
    (SVTProtocol, {"noise_var": 0}, "noise_var"),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), BAD_ARGUMENTS)
def test_an_argument_out_of_its_range_is_refused(cls: type[Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize("cls", RANDOMISED)
def test_arguments_are_kept_and_seeds_repeat(cls: type[Any], caplog: pytest.LogCaptureFixture) -> None:
    diff = np.random.default_rng(3).normal(size=100)
    first, again, other = made(cls, seed=5), made(cls, seed=[5]), made(cls, seed=[5, 1])
    sent = applied(first, diff)
    assert np.array_equal(sent, applied(again, diff))
    assert not np.array_equal(sent, applied(other, diff))
    assert not np.array_equal(sent, applied(first, diff)), "each round has its own noise"
    assert not np.array_equal(applied(made(cls, seed=None), diff), applied(made(cls, seed=None), diff))
    twin = pickle.loads(pickle.dumps(first))
    assert (twin.fraction, twin.epsilon, twin.gamma, twin.tau, twin.seed) == (1.0, first.epsilon, 1.0, 0.0, 5)
    assert np.array_equal(applied(twin, diff), applied(first, diff))
    made(cls, fraction=50)
    assert "fraction 50 is above 1" in caplog.text


# ---- the sparse vector technique


@pytest.mark.parametrize("cls", RANDOMISED)
def test_without_noise_what_reaches_the_threshold_is_shared_and_bounded(cls: type[Any]) -> None:
    protocol = made(cls, tau=0.5, **PLENTY)
    sent = applied(protocol, [0.2, -0.6, 0.7, 5.0, -0.4, -9.0, 0.0])
    assert np.allclose(sent, [0, -0.6, 0.7, 1, 0, -1, 0], atol=1e-9)
    in_steps = applied(made(cls, tau=0.5, **PLENTY), [0.8, -2.4, 20.0], steps=4)
    assert np.allclose(in_steps, [0, -2.4, 4], atol=1e-9)


@pytest.mark.parametrize("cls", RANDOMISED)
@pytest.mark.parametrize(
    ("fraction", "size", "count"), [(0.1, 1000, 100), (0.1, 5, 1), (0.5, 7, 4), (1.0, 9, 9), (7.0, 9, 9)]
)
def test_no_more_than_the_fraction_is_shared(cls: type[Any], fraction: float, size: int, count: int) -> None:
    diff = np.linspace(0.5, 0.9, size)
    quiet = applied(made(cls, fraction=fraction, tau=0.1, **PLENTY), diff)
    assert np.count_nonzero(quiet) == count
    noisy = applied(made(cls, fraction=fraction, tau=0.1, epsilon=0.5, noise_var=0.5), diff)
    assert np.count_nonzero(noisy) <= count
    assert np.abs(noisy).max() <= 1.0


@pytest.mark.parametrize("cls", RANDOMISED)
def test_numbers_are_considered_in_random_order(cls: type[Any]) -> None:
    protocol = made(cls, fraction=0.1, tau=0.1, **PLENTY)
    times = np.zeros(50)
    for _ in range(1000):
        times += applied(protocol, np.full(50, 0.5)) != 0
    assert times.sum() == 5 * 1000
    assert stats.chisquare(times).pvalue > LIKELY


def test_choices_go_on_beyond_one_block() -> None:
    size = BLOCK + 100
    sent = applied(made(SVTProtocol, tau=0.1, **PLENTY), np.full(size, 0.5))
    assert np.count_nonzero(sent) == size


@pytest.mark.parametrize("cls", RANDOMISED)
def test_the_noise_of_what_is_shared_is_laplacian_of_the_scale_of_the_paper(cls: type[Any]) -> None:
    count, gamma = 4000, 0.25
    sensitivity = 2 * gamma
    epsilon = 1e7  # the noise stays well within ±gamma, where it can be seen
    scale = 2 * count * sensitivity / (2 / 9 * epsilon) if cls is LaplacianProtocol else count * sensitivity / epsilon
    diff = np.random.default_rng(4).uniform(0.1, 0.15, count) * np.array([1, -1] * (count // 2))
    sent = applied(made(cls, gamma=gamma, epsilon=epsilon, noise_var=epsilon), diff)
    chosen = sent != 0
    assert chosen.sum() > 0.99 * count
    assert 30 * scale < gamma
    noise = (sent - diff)[chosen]
    assert stats.kstest(noise, stats.laplace(scale=scale).cdf).pvalue > LIKELY
    for wrong in (scale / 1.2, scale * 1.2):
        assert stats.kstest(noise, stats.laplace(scale=wrong).cdf).pvalue < LIKELY


def reaches(distance: float, query: float, threshold: float) -> float:
    """P(ν − ρ ≥ distance) for ν ~ Lap(query), ρ ~ Lap(threshold), by integration over ρ."""
    density, tail = stats.laplace(scale=threshold).pdf, stats.laplace(scale=query).sf
    return float(
        integrate.quad(lambda r: density(r) * tail(distance + r), -60 * threshold, 60 * threshold, points=[0])[0]
    )


def both_reach(distance: float, query: float, threshold: float) -> float:
    """The probability that two numbers reach one and the same noisy threshold."""
    density, tail = stats.laplace(scale=threshold).pdf, stats.laplace(scale=query).sf
    integral = integrate.quad(
        lambda r: density(r) * tail(distance + r) ** 2, -60 * threshold, 60 * threshold, points=[0]
    )
    return float(integral[0])


def scales(cls: type[Any], count: int, epsilon: float, gamma: float) -> tuple[float, float]:
    """Of the noise on a number and on the threshold, as the papers have them."""
    s = 2 * gamma
    if cls is LaplacianProtocol:
        return 2 * (2 * count * s) / (8 / 9 * epsilon), 2 * count * s / (8 / 9 * epsilon)
    return 2 * count * s / ((2 * count) ** (2 / 3) * epsilon), s / epsilon


@pytest.mark.parametrize("cls", RANDOMISED)
@pytest.mark.parametrize(("number", "tau"), [(0.9, 0.3), (-0.2, 1.5), (0.5, 0.5)])
def test_a_number_is_chosen_as_often_as_the_paper_says(cls: type[Any], number: float, tau: float) -> None:
    protocol = made(cls, tau=tau, epsilon=3.0, noise_var=1e9)
    rounds = 5000
    chosen = sum(applied(protocol, [number])[0] != 0 for _ in range(rounds))
    expected = reaches(tau - abs(number), *scales(cls, 1, 3.0, 1.0))
    assert stats.binomtest(chosen, rounds, expected).pvalue > LIKELY


@pytest.mark.parametrize("cls", RANDOMISED)
def test_the_threshold_is_drawn_once_or_after_each_choice_as_the_paper_says(cls: type[Any]) -> None:
    protocol = made(cls, tau=1.0, epsilon=4.0, noise_var=1e9)
    rounds = 5000
    both = sum(np.all(applied(protocol, [0.5, 0.5]) != 0) for _ in range(rounds))
    query, threshold = scales(cls, 2, 4.0, 1.0)
    once, anew = both_reach(0.5, query, threshold), reaches(0.5, query, threshold) ** 2
    right, wrong = (anew, once) if cls is LaplacianProtocol else (once, anew)
    assert stats.binomtest(both, rounds, right).pvalue > LIKELY
    assert stats.binomtest(both, rounds, wrong).pvalue < LIKELY


@pytest.mark.parametrize("other", [-20.0, 0.0])
@pytest.mark.parametrize("cls", RANDOMISED)
def test_two_differences_can_hardly_be_told_apart(cls: type[Any], other: float) -> None:
    # A check from outside: whatever is sent, it is at most exp(budget) times likelier under one difference.
    arguments = {"epsilon": 3.0 if cls is LaplacianProtocol else 0.5, "noise_var": 1.0, "tau": 0.2}
    budget = 3.0 if cls is LaplacianProtocol else made(cls, **arguments).budget(1)
    edges = [-1.1, -0.9999, -1e-12, 1e-12, 0.9999, 1.1]
    rounds = 10_000
    shares = []
    for seed, number in enumerate((30.0, other)):
        protocol = made(cls, seed=seed, **arguments)
        sent = [applied(protocol, [number])[0] for _ in range(rounds)]
        shares.append(np.histogram(sent, edges)[0] / rounds)
    assert all(share.min() > 0.01 for share in shares)
    ratios = np.abs(np.log(shares[0] / shares[1]))
    slack = 4 * np.sqrt(1 / (rounds * shares[0]) + 1 / (rounds * shares[1]))
    assert np.all(ratios <= budget + slack)
    assert np.any(ratios > slack), "noise that hides everything would prove nothing"


def test_the_budget_of_the_sparse_vector_technique_is_that_of_its_three_parts() -> None:
    protocol = SVTProtocol(fraction=0.01, epsilon=0.1, noise_var=0.5)
    assert protocol.budget(400) == pytest.approx(0.1 + 8 ** (2 / 3) * 0.1 + 0.5)
    assert SVTProtocol(fraction=1, epsilon=1, noise_var=1).budget(1) == pytest.approx(2 + 2 ** (2 / 3))
