"""FedAvg, FedBN and FedPer on real digits whose clients differ: in what images look like, or in what they show.

    python examples/personalization.py [--seeds 5] [--rounds 25]

FedBN (Li et al., 2021, https://arxiv.org/abs/2102.07623) keeps BatchNorm at each client, FedPer (Arivazhagan et al.,
2019, https://arxiv.org/abs/1912.00818) the last layer: one line each, see `METHODS`. The clients differ in three ways:

- "looks": six clients have all ten digits, and each changes its images in its own way, as another scanner would;
- "two digits": ten clients have images that look alike, of two digits each;
- "Dirichlet": eight clients, each digit dealt out to them by shares from a Dirichlet distribution (0.3).

The table has the mean test accuracy of the clients, each with its own model on its own test part, and the standard
deviation over the seeds. "alone" is training without the others, the floor; "FedAvg, tuned" is FedAvg's model after two
more epochs at each client. A client uses, of the models that it received, the one that does best on its selection part.
All methods have the same data, initial weights and settings, which were chosen by selection parts of another seed.
Neither method is best everywhere: FedBN is for data that look different; FedPer, where clients know few of the labels.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import fed_learn as fl
from fed_learn.integrations.torch import TorchLearner, evaluate
from fed_learn.policies import Policies

Images = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

METHODS: Mapping[str, Mapping[str, str]] = {
    "FedAvg": {},
    "FedBN": {"bn": "local"},
    "FedPer": {"head": "local"},
}
TRAINED, SELECTED = 0.2, 0.2
"""Shares of each client's examples that it trains on, so few that it needs others, and that it selects by; it is tested
on the rest."""
ALPHA = 0.3
FEWEST = 50
"""Examples that each client has at least; splits by Dirichlet with fewer are drawn again."""


class Network(nn.Module):
    """A small convolutional network with BatchNorm, whose last layer is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.head = nn.Linear(32 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 2)
        x = nn.functional.max_pool2d(self.bn2(self.conv2(x)).relu(), 2)
        logits: torch.Tensor = self.head(x.flatten(1))
        return logits


@dataclass(frozen=True)
class Parts:
    """What one client has: examples to train on, to select by, and to be tested on, none of them twice."""

    train: TensorDataset
    selection: TensorDataset
    test: TensorDataset


class PersonalLearner(TorchLearner):
    """Keeps, of the models that its client received, the one that does best on its selection part; of equals, the last.

    Args:
        model: The client's own; what it is not sent stays in it.
        parts: The client's examples.
        seed: Of their order.
    """

    def __init__(self, model: nn.Module, parts: Parts, seed: int) -> None:
        super().__init__(
            model,
            parts.train,
            parts.selection,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
            epochs=2,
            batch_size=32,
            seed=seed,
        )
        self.test = parts.test
        self._best = -1.0
        self._kept: fl.weights.WeightDict = {}

    def consider(self, weights: fl.weights.WeightDict) -> None:
        score = self.validate(weights, fl.FLContext())["accuracy"]
        if score >= self._best:
            self._best, self._kept = score, fl.get_weights(self.model)

    def train(self, weights: fl.weights.WeightDict, ctx: fl.FLContext) -> fl.TrainingResult:
        self.consider(weights)
        return super().train(weights, ctx)

    def tested(self) -> float:
        """The accuracy of the model that was kept, on the test part."""
        fl.set_weights(self.model, self._kept)
        return evaluate(self.model, self.test, {"accuracy": "accuracy"})["accuracy"]

    def tune(self, number: int) -> None:
        """Trains what was kept for one more round, on the client's own examples alone, and keeps that."""
        super().train(self._kept, fl.FLContext({fl.ContextKey.ROUND: number}))
        self._kept = fl.get_weights(self.model)


def looks(rng: np.random.Generator) -> dict[str, Callable[[Images], Images]]:
    """How each client's images differ from those that scikit-learn ships, with values from 0 to 1."""
    ramp = np.linspace(0, 1, 8)
    return {
        "plain": lambda x: x,
        "inverted": lambda x: 1 - x,
        "faint": lambda x: 0.4 + 0.2 * x,
        "rotated": lambda x: np.rot90(x, axes=(1, 2)),
        "noisy": lambda x: x + rng.normal(0, 0.3, x.shape),
        "uneven": lambda x: 0.5 * x + ramp,
    }


def by_looks(seed: int) -> list[Parts]:
    """Six clients with as many images each, which look different."""
    rng = np.random.default_rng(seed)
    x, y = _digits()
    changes = looks(rng)
    own = np.array_split(rng.permutation(len(y)), len(changes))
    return [_parts(change(x[mine]), y[mine]) for change, mine in zip(changes.values(), own, strict=True)]


def by_two_digits(seed: int) -> list[Parts]:
    """Ten clients with two digits each; each digit is split between two clients."""
    rng = np.random.default_rng(seed)
    x, y = _digits()
    digits = rng.permutation(10)
    halves = [np.array_split(rng.permutation(np.flatnonzero(y == digit)), 2) for digit in digits]
    own = [np.concatenate([halves[k][0], halves[k - 1][1]]) for k in range(10)]
    return [_parts(x[mine], y[mine]) for mine in map(rng.permutation, own)]


def by_dirichlet(seed: int, clients: int = 8) -> list[Parts]:
    """Clients to whom the images of each digit are dealt out by shares from a Dirichlet distribution."""
    rng = np.random.default_rng(seed)
    x, y = _digits()
    while True:
        own: list[list[int]] = [[] for _ in range(clients)]
        for digit in range(10):
            members = rng.permutation(np.flatnonzero(y == digit))
            cuts = np.round(np.cumsum(rng.dirichlet(np.full(clients, ALPHA)))[:-1] * len(members)).astype(int)
            for mine, dealt in zip(own, np.split(members, cuts), strict=True):
                mine += dealt.tolist()
        if min(map(len, own)) >= FEWEST:
            return [_parts(x[mine], y[mine]) for mine in map(rng.permutation, own)]


SPLITS: Mapping[str, Callable[[int], list[Parts]]] = {
    "looks": by_looks,
    "two digits": by_two_digits,
    "Dirichlet": by_dirichlet,
}


def _digits() -> tuple[Images, Indices]:
    digits = load_digits()
    return digits.images / 16, digits.target.astype(np.int64)


def _parts(x: Images, y: Indices) -> Parts:
    images = torch.tensor(np.ascontiguousarray(x), dtype=torch.float32)[:, None]
    cuts = [round(len(y) * TRAINED), round(len(y) * (TRAINED + SELECTED))]
    pieces = (torch.tensor_split(tensor, cuts) for tensor in (images, torch.tensor(y)))
    return Parts(*(TensorDataset(*piece) for piece in zip(*pieces, strict=True)))


def learners_of(parts: Sequence[Parts], seed: int) -> list[PersonalLearner]:
    """One learner per client, all with the same initial weights."""
    initial = _initial(seed)
    return [
        PersonalLearner(fl.set_weights(Network(), initial), mine, seed=1000 * seed + k) for k, mine in enumerate(parts)
    ]


def _initial(seed: int) -> fl.weights.WeightDict:
    torch.manual_seed(seed)
    return fl.get_weights(Network())


def federate(learners: Sequence[PersonalLearner], policies: Mapping[str, str], seed: int, rounds: int) -> fl.JobResult:
    """A job; afterwards each learner has a model of its own."""
    server = fl.FederatedServer(_initial(seed), num_rounds=rounds, policies=policies)
    clients = [fl.FederatedClient(f"site-{k}", learner) for k, learner in enumerate(learners, 1)]
    result = server.run(clients, max_workers=1)
    shared = {name: array for name, array in result.weights.items() if Policies(policies).of(name) != "local"}
    for learner in learners:
        learner.consider(shared)
    return result


def accuracies(split: str, seed: int, rounds: int) -> dict[str, float]:
    """The mean test accuracy of the clients, by method."""
    torch.set_num_threads(1)  # the model is small
    parts = SPLITS[split](seed)
    found: dict[str, float] = {}

    def test(method: str, learners: Sequence[PersonalLearner]) -> None:
        found[method] = fmean(learner.tested() for learner in learners)

    learners = learners_of(parts, seed)
    for learner in learners:
        federate([learner], {}, seed, rounds)
    test("alone", learners)
    for method, policies in METHODS.items():
        learners = learners_of(parts, seed)
        federate(learners, policies, seed, rounds)
        test(method, learners)
        if not policies:
            for learner in learners:
                learner.tune(rounds)
            test(f"{method}, tuned", learners)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=25)
    chosen = parser.parse_args()

    runs = list(product(SPLITS, range(chosen.seeds), [chosen.rounds]))
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(runs)), get_context("spawn")) as pool:
        found = list(pool.map(accuracies, *zip(*runs, strict=True)))
    table = Table("test accuracy", *SPLITS, box=None)
    for method in found[0]:
        cells = []
        for split in SPLITS:
            values = [one[method] for (of, _, _), one in zip(runs, found, strict=True) if of == split]
            cells.append(f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else ""))
        table.add_row(method, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
