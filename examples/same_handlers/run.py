"""The same three handlers in our own server, in Flower's simulation engine and in NVFlare's simulator.

    python examples/same_handlers/run.py

Three clients train on digits, with the same random numbers in each stack, and one of them sends a NaN once. Model
selection, server validation and a handler of one's own run unchanged. Prints what they decided, and fails if two stacks
differ in a round, a score, a refusal or a bit of a model.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parts import CLIENTS, ROUNDS, SITES, Site, demo, handlers, spoiled  # type: ignore[import-not-found]
from rich.console import Console
from rich.table import Table

import fed_learn as fl

HERE = Path(__file__).resolve().parent


def fed_learn(decisions: Path, _: Path) -> None:
    class Client(fl.FederatedClient):
        def train_round(self, number: int, request_model: Callable[[], Any]) -> fl.Contribution | None:
            sent = super().train_round(number, request_model)
            assert sent is not None and sent.weights is not None
            weights = spoiled(sent.weights, self.name, number)
            return fl.Contribution(
                self.name, weights, sent.aggregation_weight, n_iter=sent.n_iter, round=number, metrics=sent.metrics
            )

    server = fl.FederatedServer(
        demo().server.weights,
        num_rounds=ROUNDS,
        handlers=handlers(decisions),
        min_contributions=2,
        on_bad_contribution="reject",
    )
    server.run([Client(name, Site(k)) for k, name in enumerate(SITES)])


def flower(decisions: Path, _: Path) -> None:
    from flower_app import client, server  # type: ignore[import-not-found] # beside this file
    from flwr.simulation import run_simulation

    server.decisions = decisions
    resources: Any = {"client_resources": {"num_cpus": 1}}
    run_simulation(server_app=server, client_app=client, num_supernodes=CLIENTS, backend_config=resources)


def nvflare(decisions: Path, workspace: Path) -> None:
    from nvflare.app_common.workflows.fedavg import FedAvg
    from nvflare.fuel.utils.constants import FrameworkType
    from nvflare.job_config.base_fed_job import BaseFedJob
    from nvflare.job_config.script_runner import ScriptRunner
    from nvflare_persistor import DemosModel  # type: ignore[import-not-found] # beside this file

    from fed_learn.integrations.nvflare import WeightedAverageAggregator, add_handlers

    job = BaseFedJob(name="digits", min_clients=CLIENTS, key_metric="")
    aggregator = WeightedAverageAggregator(min_contributions=2)
    workflow = FedAvg(num_clients=CLIENTS, num_rounds=ROUNDS, persistor_id="persistor", aggregator=aggregator)
    job.to_server(workflow, id="controller")
    job.to_server(DemosModel(), id="persistor")
    job.to_clients(ScriptRunner(script=str(HERE / "nvflare_client.py"), framework=FrameworkType.NUMPY))
    add_handlers(job, handlers(decisions))
    job.simulator_run(str(workspace), n_clients=CLIENTS)


def path() -> dict[str, str]:
    """For processes that a stack starts: where the modules beside this file are."""
    return {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}


STACKS = {"fed_learn": fed_learn, "Flower": flower, "NVFlare": nvflare}


def shown(line: dict[str, Any]) -> str:
    scores = ", ".join(f"{name} {value:.4f}" for name, value in line["scores"].items())
    refused = "".join(f"; {failure['message']}" for failure in line.get("refused", ()))
    best = f"best received of {line['best_received'][0]}, aggregated of {line['best_aggregated'][0]}"
    return f"{scores}; {best}; model {line['model']}{refused}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    chosen = parser.parse_args().stacks
    os.environ.update(path())
    decided: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stack in chosen:
            decisions = Path(folder) / f"{stack}.jsonl"
            STACKS[stack](decisions, Path(folder) / "workspace")
            decided[stack] = [json.loads(line) for line in decisions.read_text(encoding="utf-8").splitlines()]
    table = Table("after", "what the handlers decided", "the same in", box=None)
    first = decided[chosen[0]]
    for number, line in enumerate(first):
        alike = [stack for stack, lines in decided.items() if len(lines) == len(first) and lines[number] == line]
        after = "the end" if number == len(first) - 1 else f"round {line['round'] + 1}"
        table.add_row(after, shown(line), ", ".join(alike))
    Console(width=200).print(table)
    if any(lines != first for lines in decided.values()):
        for stack, lines in decided.items():
            print(stack, *map(json.dumps, lines), sep="\n  ", file=sys.stderr)
        sys.exit("the stacks decided differently")


if __name__ == "__main__":
    main()
