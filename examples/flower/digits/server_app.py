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

from .tasks import Task, data, model_of, task, weights_of

app = ServerApp()


class Events(fl.Handler):
    """Notes every event, for whoever wants to see when handlers run."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str | None]] = []

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        self.log.append((str(event), ctx.get_prop(fl.ContextKey.CONTRIBUTOR)))


class Evaluator(fl.ModelEvaluator):
    """Scores the model just aggregated on the server's own digits."""

    metric_name = "accuracy"

    def __init__(self, chosen: Task, num_nodes: int) -> None:
        self.chosen = chosen
        self.part = data(num_nodes).server
        self.score = float("nan")

    def evaluate(self, ctx: fl.FLContext) -> None:
        assert ctx.model is not None and ctx.model.weights is not None
        self.score = self.chosen.accuracy(model_of(self.chosen, ctx.model.weights), self.part)

    def get_metric(self) -> float:
        return self.score


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One job."""
    config: Any = context.run_config
    chosen, nodes, rounds = task(config["framework"]), int(config["num-nodes"]), int(config["num-server-rounds"])
    initial = to_record(weights_of(chosen.model()))
    sampling: dict[str, Any] = {"fraction_evaluate": 0.0, "min_train_nodes": nodes, "min_available_nodes": nodes}
    if config["strategy"] == "flower":
        stock = FlowerFedAvg(**sampling)
        save(config["output"], stock.start(grid, initial, num_rounds=rounds).arrays, None, [])
        return
    events = Events()
    selection = fl.ModelSelectionHandler(weigh_by_local_iter=True)
    validation = fl.ServerValidationHandler(Evaluator(chosen, nodes), num_rounds_per_valid=1)
    strategy = FedAvg(**sampling, stream=bool(config["stream"]), handlers=[events, selection, validation])
    result = strategy.start(grid, initial, num_rounds=rounds)
    save(config["output"], result.arrays, result.job, events.log)


def save(output: str, arrays: ArrayRecord, job: fl.JobResult | None, log: list[tuple[str, str | None]]) -> None:
    """Writes the final and the best model, and prints how the job went."""
    if job is not None and job.best is not None:
        print(f"best: the model of round {job.best.round + 1}, {job.best.metric_name} {job.best.metric:.3f}")
    if not output:
        return
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "final.npz", **to_weights(arrays))
    if job is not None and job.best is not None:
        np.savez(folder / "best.npz", **job.best.weights)
        best = {"round": job.best.round, "metric": job.best.metric, "metric_name": job.best.metric_name}
        reports = [report.as_dict() for report in job.reports]
        final = {result.contributor: dict(result.metrics) for result in job.validation_results}
        content = {"best": best, "reports": reports, "events": log, "final": final, "metrics": dict(job.metrics)}
        (folder / "log.json").write_text(json.dumps(content))
