"""The server: our FedAvg with handlers that keep the best model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

import fed_learn as fl
from fed_learn.integrations.flower import FedAvg, to_record, to_weights

from .tasks import Task, data, task

app = ServerApp()


class Progress(fl.Handler):
    """Prints a line per round, and notes every event, for whoever wants to see when handlers run."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str | None]] = []

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        self.log.append((str(event), ctx.get_prop(fl.ContextKey.CONTRIBUTOR)))
        super().handle_event(event, ctx)

    def end_round(self, ctx: fl.FLContext) -> None:
        report: fl.RoundReport = ctx[fl.ContextKey.REPORT]
        if report.error is not None:
            print(f"round {report.round + 1}: no new model: {report.error}")
            return
        accuracy = report.metrics["server_validation"]
        print(f"round {report.round + 1}: {len(report.accepted)} nodes, accuracy {accuracy:.3f}")


class Evaluator(fl.ModelEvaluator):
    """Scores the model just aggregated on the server's own digits."""

    metric_name = "accuracy"

    def __init__(self, chosen: Task) -> None:
        self.chosen = chosen
        self.part = data(1).server
        self.score = float("nan")

    def evaluate(self, ctx: fl.FLContext) -> None:
        assert ctx.model is not None and ctx.model.weights is not None
        self.score = self.chosen.accuracy(ctx.model.weights, self.part)

    def get_metric(self) -> float:
        return self.score


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One job."""
    config: Any = context.run_config
    chosen, nodes, rounds = task(config["framework"]), int(config["min-nodes"]), int(config["num-server-rounds"])
    initial = to_record(chosen.initial())
    sampling: dict[str, Any] = {"fraction_evaluate": 0.0, "min_train_nodes": nodes, "min_available_nodes": nodes}
    if config["strategy"] == "flower":
        stock = FlowerFedAvg(**sampling)
        save(config["output"], stock.start(grid, initial, num_rounds=rounds).arrays, None, [])
        return
    progress = Progress()
    selection = fl.ModelSelectionHandler(weigh_by_local_iter=True)
    validation = fl.ServerValidationHandler(Evaluator(chosen), num_rounds_per_valid=1)
    strategy = FedAvg(**sampling, stream=bool(config["stream"]), handlers=[selection, validation, progress])
    result = strategy.start(grid, initial, num_rounds=rounds)
    save(config["output"], result.arrays, result.job, progress.log)


def save(output: str, arrays: ArrayRecord, job: fl.JobResult | None, log: list[tuple[str, str | None]]) -> None:
    """Writes the final and the best model and what happened, and prints how the job went."""
    folder = Path(output).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "final.npz", **to_weights(arrays))
    if job is not None and job.best is not None:
        print(f"best model: of round {job.best.round + 1}, {job.best.metric_name} {job.best.metric:.3f}")
        np.savez(folder / "best.npz", **job.best.weights)
        best = {"round": job.best.round, "metric": job.best.metric, "metric_name": job.best.metric_name}
        reports = [report.as_dict() for report in job.reports]
        final = {result.contributor: dict(result.metrics) for result in job.validation_results}
        content = {"best": best, "reports": reports, "events": log, "final": final, "metrics": dict(job.metrics)}
        (folder / "log.json").write_text(json.dumps(content))
    print(f"files: {folder}")
