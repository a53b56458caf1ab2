"""Privacy protocols: what a client does to its difference to the global model before anybody sees it.

Two are randomised, by the Laplace mechanism behind a sparse vector technique. What they promise holds for one round:
whatever two differences a client might have, nothing that is sent is more than exp(budget) times likelier under one
than under the other. The budgets of rounds add up. Metrics, the aggregation weight and the number of iterations are
sent beside the difference, and whatever is not a floating-point variable (a counter of batches) passes as it is: the
promise is not about them. A variable with several names, which hold one array (`fed_learn.ties`), is one variable: its
numbers are counted, chosen and get noise once, and what is made of them is sent under each name.
Laplace noise in floating point leaks low bits (I. Mironov, "On significance of the least significant bits for
differential privacy", CCS 2012); nothing here helps that.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fed_learn.arguments import check_not_negative, check_positive
from fed_learn.contribution import check_factor
from fed_learn.errors import AggregationWeightError, brief
from fed_learn.ties import once, twins, under_all_names
from fed_learn.weights import FLOATS, Array, WeightDict, native_dtype

logger = logging.getLogger(__name__)

Floats: TypeAlias = npt.NDArray[np.float64]

BLOCK = 65536
"""Numbers that become Python's at a time."""


@dataclass(frozen=True)
class TrainContext:
    """What a privacy protocol is told of the training.

    Attributes:
        total_steps: Iterations of this round, as the learner says; None if it says nothing.
        global_round: The round, from 0.
    """

    total_steps: int | None = None
    global_round: int | None = None


class PrivacyProtocol(ABC):
    """Changes a client's difference to the global model; one of `FederatedClient(filters=)`.

    Example:
        >>> class Halve(PrivacyProtocol):
        ...     def apply(self, model_diff, train_ctx=None):
        ...         return {name: diff / 2 for name, diff in model_diff.items()}
        >>> Halve().apply({"w": np.ones(2)})
        {'w': array([0.5, 0.5])}
    """

    @abstractmethod
    def apply(self, model_diff: dict[str, Array], train_ctx: Any = None) -> WeightDict:
        """Gives what is sent in place of `model_diff`.

        Args:
            model_diff: The trained weights minus the received ones; the protocol's own, to change or to keep.
            train_ctx: A `TrainContext`.

        Returns:
            A difference with the same names and shapes; it is rounded to the dtypes of the model.
        """


class PercentileProtocol(PrivacyProtocol):
    """Shares the largest part of the numbers, bounded; the others become 0.

    The selection and bounding of R. Shokri, V. Shmatikov, "Privacy-preserving deep learning", CCS 2015, over the whole
    model at once. It limits what is shared; it is not differentially private.

    Args:
        percentile: Numbers whose absolute value is below this percentile of all are not shared; 0 to 100.
        gamma: The bound, per step of the training: what is shared is clipped to ±`gamma` times the number of steps.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> PercentileProtocol(percentile=50, gamma=3.0).apply({"w": np.array([1.0, -2.0, 5.0, 0.5])})
        {'w': array([ 0., -2.,  3.,  0.])}
    """

    def __init__(self, percentile: float = 10, gamma: float = 0.01) -> None:
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must be from 0 to 100, not {percentile!r}")
        self.percentile = percentile
        self.gamma = check_positive("gamma", gamma)

    def apply(self, model_diff: dict[str, Array], train_ctx: Any = None) -> WeightDict:
        """Selects and bounds."""

        def share(numbers: Floats) -> Floats:
            sizes = np.abs(numbers)
            kept = sizes >= np.percentile(sizes, self.percentile)
            return np.where(kept, np.clip(numbers, -self.gamma, self.gamma), 0.0)

        return _per_step(share, model_diff, train_ctx)


class LaplacianProtocol(PrivacyProtocol):
    """Shares some of the numbers above a threshold, with Laplace noise, at a privacy budget of `epsilon` a round.

    R. Shokri, V. Shmatikov, "Privacy-preserving deep learning", CCS 2015, figure 12: with the sensitivity 2·`gamma` of
    numbers bounded by ±`gamma`, it is NumericSparse of C. Dwork, A. Roth, "The Algorithmic Foundations of Differential
    Privacy", 2014, algorithm 3 with δ = 0: of the budget 8/9 choose (noise on the threshold, drawn anew after each
    choice, and twice as much on each number), and 1/9 is spent on what is shared. Each number is considered once, in
    random order.

    Args:
        fraction: The part of the numbers that is shared at most; above 1: all.
        epsilon: The privacy budget of a round.
        gamma: The bound of a number, per step of the training.
        tau: The threshold, per step, at least 0.
        seed: Seed of the noise, as for `numpy.random.default_rng`; None: from the operating system. Whoever knows it
            can take the noise away.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        fraction: float = 0.1,
        epsilon: float = 2.0,
        gamma: float = 1e-4,
        tau: float = 5e-5,
        *,
        seed: int | Sequence[int] | None = None,
    ) -> None:
        self.fraction = _fraction(fraction)
        self.epsilon = check_positive("epsilon", epsilon)
        self.gamma = check_positive("gamma", gamma)
        self.tau = check_not_negative("tau", tau)
        self.seed = seed
        self._seeded = None if seed is None else np.random.default_rng(seed)

    def get_state(self) -> Any:
        """The state of the seeded noise, so that it goes on and never repeats itself; None without a seed."""
        return _state_of_noise(self._seeded)

    def set_state(self, state: Any) -> None:
        """Goes on with it."""
        self._seeded = _noise_in_state(self._seeded, state)

    def apply(self, model_diff: dict[str, Array], train_ctx: Any = None) -> WeightDict:
        """Chooses, bounds and adds noise."""
        rng = _source_of_noise(self._seeded)

        def share(numbers: Floats) -> Floats:
            count = _count(self.fraction, numbers.size)
            unit = 2 * count * 2 * self.gamma  # 2c times the sensitivity
            choose, serve = self.epsilon * 8 / 9, self.epsilon * 2 / 9  # the paper's; half of the latter is spent
            thresholds = self.tau + rng.laplace(scale=unit / choose, size=count + 1)
            return _sparse_vector(numbers, self.gamma, count, thresholds, 2 * unit / choose, unit / serve, rng)

        return _per_step(share, model_diff, train_ctx)


class SVTProtocol(PrivacyProtocol):
    """The sparse vector technique, at a privacy budget of ε₁ + ε₂ + ε₃ a round.

    W. Li et al., "Privacy-preserving Federated Brain Tumour Segmentation", MLMI 2019, after M. Lyu, D. Su, N. Li,
    "Understanding the Sparse Vector Technique for Differential Privacy", VLDB 2017, algorithm 7: with c numbers to
    share and their sensitivity s = 2·`gamma`, a number x is shared as x + Lap(c·s/ε₃) if |x| + Lap(2·c·s/ε₂) reaches
    `tau` + Lap(s/ε₁), the last drawn once a round; what is shared is bounded again. ε₂ = (2c)^⅔·ε₁, the best split
    between the two. Each number is considered once, in random order, until c have been shared.

    Args:
        fraction: The part of the numbers that is shared at most; above 1: all.
        epsilon: ε₁, the budget of the threshold.
        noise_var: ε₃, the budget of what is shared. It is no variance: the more, the less noise.
        gamma: The bound of a number, per step of the training.
        tau: The threshold, per step, at least 0.
        seed: Seed of the noise (see `LaplacianProtocol`).

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        fraction: float = 0.1,
        epsilon: float = 0.1,
        noise_var: float = 0.1,
        gamma: float = 1e-5,
        tau: float = 1e-6,
        *,
        seed: int | Sequence[int] | None = None,
    ) -> None:
        self.fraction = _fraction(fraction)
        self.epsilon = check_positive("epsilon", epsilon)
        self.noise_var = check_positive("noise_var", noise_var)
        self.gamma = check_positive("gamma", gamma)
        self.tau = check_not_negative("tau", tau)
        self.seed = seed
        self._seeded = None if seed is None else np.random.default_rng(seed)

    def get_state(self) -> Any:
        """The state of the seeded noise, so that it goes on and never repeats itself; None without a seed."""
        return _state_of_noise(self._seeded)

    def set_state(self, state: Any) -> None:
        """Goes on with it."""
        self._seeded = _noise_in_state(self._seeded, state)

    def budget(self, size: int) -> float:
        """ε₁ + ε₂ + ε₃: what a round costs a client whose model has `size` floating-point numbers, tied ones once.

        Example:
            >>> round(SVTProtocol(fraction=0.01, epsilon=0.1, noise_var=0.5).budget(400), 3)
            1.0
        """
        return self.epsilon + self._epsilon_2(_count(self.fraction, size)) + self.noise_var

    def _epsilon_2(self, count: int) -> float:
        return float((2 * count) ** (2 / 3) * self.epsilon)

    def apply(self, model_diff: dict[str, Array], train_ctx: Any = None) -> WeightDict:
        """Chooses, bounds and adds noise."""
        rng = _source_of_noise(self._seeded)

        def share(numbers: Floats) -> Floats:
            count, sensitivity = _count(self.fraction, numbers.size), 2 * self.gamma
            threshold = self.tau + rng.laplace(scale=sensitivity / self.epsilon)
            return _sparse_vector(
                numbers,
                self.gamma,
                count,
                np.full(count + 1, threshold),
                2 * count * sensitivity / self._epsilon_2(count),
                count * sensitivity / self.noise_var,
                rng,
            )

        return _per_step(share, model_diff, train_ctx)


def _source_of_noise(seeded: np.random.Generator | None) -> np.random.Generator:
    """The seeded one; else one that starts anew each time, so that no copy of a protocol has the noise of another."""
    return np.random.default_rng() if seeded is None else seeded


def _state_of_noise(seeded: np.random.Generator | None) -> Any:
    return None if seeded is None else seeded.bit_generator.state


def _noise_in_state(seeded: np.random.Generator | None, state: Any) -> np.random.Generator | None:
    if seeded is not None:
        seeded.bit_generator.state = state
    return seeded


def _sparse_vector(
    numbers: Floats,
    bound: float,
    count: int,
    thresholds: Floats,
    query_scale: float,
    answer_scale: float,
    rng: np.random.Generator,
) -> Floats:
    """Answers up to `count` of the bounded numbers whose noisy size reaches the noisy threshold; 0 for all others.

    Args:
        numbers: The numbers, shape (n,).
        bound: They are clipped to ±`bound`, before and after.
        count: How many are shared at most.
        thresholds: The noisy threshold after k answers, shape (count + 1,).
        query_scale: Scale of the Laplace noise on each size.
        answer_scale: Scale of the Laplace noise on each answer.
        rng: The source of noise.
    """
    bounded = np.clip(numbers, -bound, bound)
    order = rng.permutation(numbers.size)
    noisy = np.abs(bounded[order]) + rng.laplace(scale=query_scale, size=numbers.size)
    limits: list[float] = thresholds.tolist()
    chosen: list[int] = []
    blocks = range(0, numbers.size, BLOCK)
    # One by one: each choice changes the threshold of the next.
    for position, size in enumerate(size for start in blocks for size in noisy[start : start + BLOCK].tolist()):
        if len(chosen) == count:
            break
        if size >= limits[len(chosen)]:
            chosen.append(position)
    shared = order[chosen]
    answers = np.zeros_like(numbers)
    noise = rng.laplace(scale=answer_scale, size=len(chosen))
    answers[shared] = np.clip(bounded[shared] + noise, -bound, bound)
    return answers


def _per_step(share: Callable[[Floats], Floats], model_diff: dict[str, Array], train_ctx: Any) -> WeightDict:
    """Applies `share` to all floating-point numbers at once, each divided by the steps that made it, and multiplies."""
    tied = twins(model_diff)
    names = [name for name, diff in once(model_diff, tied).items() if native_dtype(diff.dtype) in FLOATS]
    numbers = np.concatenate([np.zeros(0), *(model_diff[name].ravel().astype(np.float64) for name in names)])
    if not numbers.size:
        return model_diff
    total_steps = getattr(train_ctx, "total_steps", None)
    try:
        steps = 1.0 if total_steps is None else check_factor(total_steps, "total_steps")
    except AggregationWeightError as error:
        message = f"total_steps must be a positive, finite number, not {brief(total_steps)}"
        raise AggregationWeightError(message, value=total_steps) from error
    shared = share(numbers / steps) * steps
    logger.debug("%d of %d numbers are shared", np.count_nonzero(shared), shared.size)
    parts = np.split(shared, np.cumsum([model_diff[name].size for name in names])[:-1])
    sent = {n: p.reshape(model_diff[n].shape).astype(model_diff[n].dtype) for n, p in zip(names, parts, strict=True)}
    return under_all_names({**model_diff, **sent}, tied, model_diff)


def _count(fraction: float, size: int) -> int:
    return min(size, math.ceil(fraction * size))


def _fraction(value: float) -> float:
    check_positive("fraction", value)
    if value > 1:
        logger.warning("fraction %g is above 1: all numbers may be shared (0.5 is half of them)", value)
    return value
