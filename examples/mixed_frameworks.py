"""Torch and TensorFlow clients in one job, against a job of torch clients alone: five seeds each.

    python examples/mixed_frameworks.py [--seeds 5] [--rounds 20] [--dataset digits]

For each seed: the test accuracy of both final models, and the smallest step by which a client of either kind moved the
global model in any round. It fails if the mean accuracies differ by more than 0.02, if a client left the global model
as it was in some round, or if the cross-site matrix misses anybody.
"""

import argparse
import os
import sys
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from fed_learn.simulation import UpdateNormHandler, build_demo
from fed_learn.simulation.summary import summarize

LARGEST_DIFFERENCE = 0.02
KINDS = "torch", "tensorflow"


def run(framework: str, dataset: str, seed: int, rounds: int) -> dict[str, Any]:
    demo = build_demo(
        dataset, framework=framework, seed=seed, num_rounds=rounds, num_clients=4, reporters=[UpdateNormHandler()]
    )
    return summarize(demo, demo.run())


def least_steps(summary: dict[str, Any]) -> dict[str, float]:
    """By kind of client the smallest norm of all its clients and rounds; 0 where one contributed nothing."""
    norms: dict[str, list[float]] = {kind: [] for kind in summary["frameworks"].values()}
    for client, row in summary["update_norms"].items():
        norms[summary["frameworks"][client]] += [norm or 0.0 for norm in row]
    return {kind: min(found) for kind, found in norms.items()}


def problems_of(summary: dict[str, Any]) -> list[str]:
    clients, matrix = set(summary["frameworks"]), summary["cross_site"]
    found = [f"no {kind} client" for kind in KINDS if kind not in summary["frameworks"].values()]
    found += [f"a {kind} client moved nothing" for kind, step in least_steps(summary).items() if not step > 0]
    if set(matrix) != {*clients, "global_best"} or any(set(row) != clients for row in matrix.values()):
        found.append("the cross-site matrix is not complete")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dataset", default="digits")
    chosen = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

    table = Table("seed", "torch: accuracy", "mixed: accuracy", *(f"least step, {kind}" for kind in KINDS), box=None)
    accuracies: dict[str, list[float]] = {"torch": [], "mixed": []}
    problems: list[str] = []
    for seed in range(chosen.seeds):
        summaries = {name: run(name, chosen.dataset, seed, chosen.rounds) for name in accuracies}
        for name, summary in summaries.items():
            accuracies[name].append(summary["final"]["test_accuracy"])
        problems += [f"seed {seed}: {problem}" for problem in problems_of(summaries["mixed"])]
        steps = least_steps(summaries["mixed"])
        cells = (*(found[-1] for found in accuracies.values()), *(steps[kind] for kind in KINDS))
        table.add_row(str(seed), *(f"{cell:.4f}" for cell in cells))
    means = {framework: fmean(found) for framework, found in accuracies.items()}
    table.add_row("mean", *(f"{mean:.4f}" for mean in means.values()), style="bold")
    Console().print(table)
    if abs(means["torch"] - means["mixed"]) > LARGEST_DIFFERENCE:
        problems.append(f"the mean accuracies differ by more than {LARGEST_DIFFERENCE}")
    if problems:
        sys.exit("; ".join(problems))


if __name__ == "__main__":
    main()
