"""What the three stacks share: the clients' work on digits, the server's evaluator, and the three handlers."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import fed_learn as fl
from fed_learn.simulation import Demo, build_demo

CLIENTS, ROUNDS = 3, 4
SITES = [f"site-{k + 1}" for k in range(CLIENTS)]


@cache
def demo() -> Demo:
    """The demo's perceptron and data, split over the clients and the server."""
    return build_demo(num_clients=CLIENTS, num_rounds=ROUNDS, alpha=1.0, seed=3, local_epochs=1)


class Site(fl.Learner):
    """The demo's learner, counted by its iterations, which is the one weight that NVFlare knows.

    Args:
        number: Of the client, from 0.
    """

    def __init__(self, number: int) -> None:
        self.learner = demo().clients[number].learner

    def train(self, weights: Mapping[str, Any], ctx: fl.FLContext) -> fl.TrainingResult:
        result = self.learner.train(weights, ctx)
        assert result is not None and result.n_iter is not None
        return fl.TrainingResult(result.weights, result.n_iter, result.n_iter)

    def validate(self, weights: Mapping[str, Any], ctx: fl.FLContext) -> Mapping[str, float]:
        return {"accuracy": self.learner.validate(weights, ctx)["accuracy"]}

    def round(self, weights: Mapping[str, Any], number: int) -> tuple[fl.TrainingResult, float]:
        """What a client of another stack does: trains, and scores what it received."""
        ctx = fl.FLContext({fl.ContextKey.ROUND: number})
        return self.train(weights, ctx), self.validate(weights, ctx)["accuracy"]


class ServersDigits(fl.ModelEvaluator):
    """Accuracy on the digits that the server keeps."""

    metric_name = "accuracy"

    def __init__(self) -> None:
        self.evaluator = demo().networks[0].evaluator(demo().split.server)

    def evaluate(self, ctx: fl.FLContext) -> None:
        self.evaluator.evaluate(ctx)

    def get_metric(self) -> float:
        return self.evaluator.get_metric()


class Decisions(fl.Handler):
    """Writes what was decided: a line after each round, and one at the end.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def startup(self, fl_ctx: fl.FLContext) -> None:
        Path(self.path).unlink(missing_ok=True)

    def end_round(self, fl_ctx: fl.FLContext) -> None:
        assert fl_ctx.model is not None and fl_ctx.model.weights is not None
        report = fl_ctx[fl.ContextKey.REPORT]
        accepted, refused = list(report.accepted), [failure.as_dict() for failure in report.rejected]
        self._write(fl_ctx, accepted=accepted, refused=refused, model=digest(fl_ctx.model.weights))

    def shutdown(self, fl_ctx: fl.FLContext) -> None:
        best = fl_ctx.best_model
        assert best is not None
        self._write(fl_ctx, model=digest(best.weights))

    def _write(self, ctx: fl.FLContext, **decided: Any) -> None:
        for key in (fl.ContextKey.BEST_RECEIVED, fl.ContextKey.BEST_AGGREGATED):
            best = ctx[key]
            decided[key.name.lower()] = [best.round, best.metric, best.metric_name]
        line = {"round": ctx[fl.ContextKey.ROUND], "scores": dict(ctx[fl.ContextKey.METRICS]), **decided}
        with Path(self.path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")


def handlers(path: Path) -> list[fl.Handler]:
    """The three handlers; they are the same in each stack."""
    return [
        fl.ModelSelectionHandler(weigh_by_local_iter=True),
        fl.ServerValidationHandler(ServersDigits(), num_rounds_per_valid=1),
        Decisions(str(path)),
    ]


def digest(weights: Mapping[str, Any]) -> str:
    """A hash of names and bits."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return total.hexdigest()[:12]


def spoiled(weights: Mapping[str, Any], site: str, number: int) -> dict[str, Any]:
    """The last site sends a NaN in round 1, which must be refused."""
    sent = {name: array.copy() for name, array in weights.items()}
    if (site, number) == (SITES[-1], 1):
        next(iter(sent.values())).flat[0] = np.nan
    return sent
