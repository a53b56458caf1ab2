"""The demo's data: real data sets that scikit-learn ships, split over clients that see different classes.

Four kinds of part that share no example: each client's training part and its selection part, the server's validation
part, and the test part that only the report uses.
"""

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fed_learn.arguments import check_member


class Dataset(enum.StrEnum):
    """Data sets that scikit-learn ships."""

    DIGITS = "digits"
    BREAST_CANCER = "breast-cancer"


TEST_SHARE = 0.2
SERVER_SHARE = 0.1
SELECTION_SHARE = 0.2
"""Of each client's own examples."""
FEWEST = 10
"""Examples that every client gets at least."""


@dataclass(frozen=True, eq=False)
class Part:
    """Examples with their classes.

    Attributes:
        x: Features, float32, `(examples, features)`, scaled by what the training parts show.
        y: Classes, int64, `(examples,)`.
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Split:
    """A data set in its parts.

    Attributes:
        train: One part per client, to train on.
        selection: One part per client, to select models by.
        server: The server's validation part.
        test: The part that only the report uses.
        num_classes: Classes in the whole data set.
    """

    train: tuple[Part, ...]
    selection: tuple[Part, ...]
    server: Part
    test: Part
    num_classes: int


def load_split(dataset: str, num_clients: int, alpha: float, seed: int) -> Split:
    """Loads a data set and splits it.

    Classes are spread over clients by a Dirichlet distribution (Hsu, Qi & Brown, 2019): the smaller `alpha`, the more
    the clients differ. Features are centred and scaled by mean and deviation over all training parts (sums that a real
    federation would share); test and validation data take no part in that.

    Args:
        dataset: One of `Dataset`.
        num_clients: At least 1.
        alpha: Concentration, > 0.
        seed: The same seed gives the same split.

    Raises:
        ImportError: scikit-learn is not installed (extra `demo`).
        ValueError: An argument is out of its range, or there are more clients than the data can serve.
    """
    check_member("dataset", dataset, Dataset)
    if num_clients < 1:
        raise ValueError(f"there must be at least 1 client, not {num_clients}")
    if not (np.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a finite number above 0, not {alpha}")
    x, y = _load(dataset)
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(len(y))
    test, server, rest = np.split(order, np.cumsum([round(len(y) * TEST_SHARE), round(len(y) * SERVER_SHARE)]))
    if len(rest) < num_clients * FEWEST * 2:
        raise ValueError(f"{dataset} has {len(rest)} examples to train on, too few for {num_clients} clients")
    own = _dirichlet(y, rest, num_clients, alpha, rng)
    selected = [indices[: max(1, round(len(indices) * SELECTION_SHARE))] for indices in own]
    trained = [indices[len(chosen) :] for indices, chosen in zip(own, selected, strict=True)]

    seen = x[np.concatenate(trained)]
    mean = seen.mean(axis=0)
    # Pixels share one unit, and dividing each by its own deviation would blow up the rims; other features do not.
    deviation = np.sqrt(((seen - mean) ** 2).mean(axis=None if dataset == "digits" else 0))
    scaled = ((x - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)

    def part(indices: npt.NDArray[np.int64]) -> Part:
        return Part(scaled[indices], y[indices])

    return Split(
        train=tuple(map(part, trained)),
        selection=tuple(map(part, selected)),
        server=part(server),
        test=part(test),
        num_classes=int(y.max()) + 1,
    )


def _load(dataset: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_breast_cancer, load_digits
    except ImportError as error:
        raise ImportError("the demo's data sets need scikit-learn: pip install 'fed-learn[demo]'") from error
    bunch = load_digits() if dataset == "digits" else load_breast_cancer()
    return bunch.data.astype(np.float64), bunch.target.astype(np.int64)


def _dirichlet(
    y: npt.NDArray[np.int64],
    indices: npt.NDArray[np.int64],
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
) -> list[npt.NDArray[np.int64]]:
    """Deals the examples of each class out by shares drawn from a Dirichlet distribution."""
    own: list[list[int]] = [[] for _ in range(num_clients)]
    for label in range(int(y.max()) + 1):
        members = indices[y[indices] == label]
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for client, dealt in enumerate(np.split(members, cuts)):
            own[client] += dealt.tolist()
    # A client with next to nothing could not be validated on: it takes from the richest.
    for poor in own:
        while len(poor) < FEWEST:
            poor.append(max(own, key=len).pop())
    return [rng.permutation(np.array(mine)) for mine in own]
