"""The digits with torch."""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fed_learn.simulation import Part

from .tasks import BATCH_SIZE, Weights, weights_of, with_weights


def network() -> nn.Module:
    """A small network with batch normalisation, whose counters are int64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def initial() -> Weights:
    """The weights of a new network."""
    return weights_of(network())


def train(weights: Weights, part: Part, order: npt.NDArray[np.intp]) -> tuple[Weights, float]:
    """One pass of SGD."""
    model = with_weights(network(), weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    losses = []
    for start in range(0, len(order) - 1, BATCH_SIZE):  # a batch of one has no variance
        batch = order[start : start + BATCH_SIZE]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.from_numpy(part.x[batch])), torch.from_numpy(part.y[batch]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return weights_of(model), float(np.mean(losses))


def accuracy(weights: Weights, part: Part) -> float:
    """The share of right answers."""
    model = with_weights(network(), weights)
    model.eval()
    with torch.no_grad():
        answers = model(torch.from_numpy(part.x)).argmax(dim=1).numpy()
    return float((answers == part.y).mean())
