"""How wrong the plain mean of LoRA's factors is, the more the data of clients differ: a table, in Markdown.

    python examples/lora_heterogeneity.py [--quick] [--seeds 5] [--alphas 100 1 0.3 0.1 0.03]

Ten clients fine-tune one network with PEFT, each on its own part of the digits, split by a Dirichlet distribution of
labels. For each layer, the mean of what they add is compared with the product of the means of A and B, and with the
best approximation of the same rank, which `fl.lora.average` and `rule="lora"` give. The error is the Frobenius norm of
the difference, relative to the mean; it is given with the plain mean of the factors where clients begin with the same
A, as in a federation, and where each has drawn its own. Accuracies are of the server's model after this one round.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import peft
import torch
from sklearn.datasets import load_digits

import fed_learn as fl

CLIENTS, RANK, STEPS = 10, 4, 150
CONFIG = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0", "2", "4"])

digits = load_digits()
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def fit(model: torch.nn.Module, part: Any, steps: int, seed: int) -> None:
    """Trains what can be trained, on the rows of a part."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    random = np.random.default_rng(seed)
    for _ in range(steps):
        rows = random.choice(part, 32)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()


def network(weights: Mapping[str, Any] | None = None) -> torch.nn.Sequential:
    sizes = [(64, 64), (64, 64), (64, 10)]
    layers = [layer for size in sizes for layer in (torch.nn.Linear(*size), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers[:-1])
    return model if weights is None else fl.set_weights(model, weights)


def split(rows: Any, alpha: float, random: np.random.Generator) -> list[Any]:
    """Rows for each client; the smaller alpha is, the fewer labels a client has."""
    parts: list[Any] = [rows[:0]] * CLIENTS
    for label in range(10):
        own = random.permutation(rows[digits.target[rows] == label])
        cuts = (np.cumsum(random.dirichlet([alpha] * CLIENTS))[:-1] * len(own)).astype(int)
        parts = [np.concatenate(pair) for pair in zip(parts, np.split(own, cuts), strict=True)]
    return [part for part in parts if len(part)]


def accuracy(base: Mapping[str, Any], made: fl.lora.LoraAverage, rows: Any) -> float:
    model = peft.get_peft_model(network(base if made.base is None else made.base), made.config)
    peft.set_peft_model_state_dict(model, {name: torch.tensor(array) for name, array in made.weights.items()})
    with torch.no_grad():
        return float((model(images[rows]).argmax(1) == labels[rows]).float().mean())


def mean_error(made: fl.lora.LoraAverage) -> float:
    return float(np.mean([layer.error for layer in made.report.values()]))


def one_row(alpha: float, seed: int) -> list[float]:
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    rows = random.permutation(len(images))
    tested, before, rest = rows[:400], rows[400:500], rows[500:]
    model = network()
    fit(model, before, 100, seed)
    base = fl.get_weights(model)
    parts = split(rest, alpha, random)
    trained: dict[str, list[Any]] = {"same": [], "own": []}
    for start, adapters in trained.items():
        for k, part in enumerate(parts):
            torch.manual_seed(1000 + (k if start == "own" else 0))
            client = peft.get_peft_model(network(base), CONFIG)
            fit(client, part, STEPS, 100 * seed + k)
            adapters.append(fl.get_weights(peft.get_peft_model_state_dict(client)))
    counts = [len(part) for part in parts]

    def averaged(start: str, **how: Any) -> fl.lora.LoraAverage:
        return fl.lora.average(trained[start], counts, config=CONFIG, **how)

    residual, best = averaged("same", method="residual", base=base), averaged("same")
    naive = fl.lora.LoraAverage(residual.weights, CONFIG, residual.report)
    errors = [mean_error(residual), mean_error(averaged("own", method="residual", base=base)), mean_error(best)]
    return errors + [accuracy(base, made, tested) for made in (naive, best, averaged("same", method="stack"))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--alphas", type=float, nargs="+", default=[100, 1, 0.3, 0.1, 0.03])
    parser.add_argument("--quick", action="store_true", help="one seed, and two values of Dirichlet's α")
    chosen = parser.parse_args()
    seeds, alphas = (1, [100, 0.1]) if chosen.quick else (chosen.seeds, chosen.alphas)

    titles = ["Dirichlet α", "error of mean A × mean B", "where each client draws its A", 'error of `method="svd"`']
    titles += ["accuracy with mean A × mean B", "with `svd`", "with the exact mean"]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for alpha in alphas:
        cells = np.mean([one_row(alpha, seed) for seed in range(seeds)], axis=0)
        print(f"| {alpha:g} | {' | '.join(f'{100 * cell:.1f} %' for cell in cells)} |")


if __name__ == "__main__":
    main()
