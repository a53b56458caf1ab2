"""The data, the network and the server's evaluator: scikit-learn's digits, a share for each client and the server."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import fed_learn as fl

CLIENTS, SERVER_SHARE = 3, 400


class Network(nn.Module):
    """Two layers, with a BatchNorm between them: its counter is an integer, and averaged as one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # every site begins with the same weights
        self.hidden = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.output = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.output(torch.relu(self.norm(self.hidden(x))))
        return scores


def share(number: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's images and labels, by its number from 0; None: those that the server keeps for itself."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    parts = np.split(order[SERVER_SHARE:], [300, 700])  # of different sizes
    chosen = order[:SERVER_SHARE] if number is None else parts[number]
    return torch.tensor(digits.data[chosen] / 16, dtype=torch.float32), torch.tensor(digits.target[chosen])


def accuracy(network: Network, x: torch.Tensor, y: torch.Tensor) -> float:
    network.eval()
    with torch.no_grad():
        return float((network(x).argmax(dim=1) == y).double().mean())


def train(network: Network, x: torch.Tensor, y: torch.Tensor, seed: int) -> int:
    """One epoch; returns the number of steps. What is drawn at random depends on the seed alone."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    batches = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).split(32)
    for batch in batches:
        optimizer.zero_grad()
        functional.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()
    return len(batches)


class DigitsEvaluator(fl.ModelEvaluator):
    """Scores the global model on the server's own share."""

    metric_name = "accuracy"

    def evaluate(self, ctx: fl.FLContext) -> None:
        network = Network()
        assert ctx.model is not None and ctx.model.weights is not None
        fl.set_weights(network, ctx.model.weights)
        self._metric = accuracy(network, *share(None))

    def get_metric(self) -> float:
        return self._metric
