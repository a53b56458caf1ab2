"""Our FedAvg in Flower's simulation engine, with any number of nodes; prints what came out as JSON.

python tests/flower_apps/simulation.py --nodes 100 --stream
"""

import argparse
import json
import time
from typing import Any

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

import fed_learn as fl
from fed_learn.integrations.flower import ClientMod, FedAvg, to_record, to_weights

ROUNDS, FAILS, SPOILS = 2, 3, 4
"""Node 3 raises in the second round, and node 4 sends a NaN."""


def step(node: int, number: int) -> dict[str, Any]:
    """What a node adds in a round: values whose every bit matters, and a counter."""
    rng = np.random.default_rng([node, number])
    return {"w": rng.normal(size=(50, 20)).astype(np.float32), "n": np.array(node, np.int64)}


def examples(node: int) -> int:
    return 10 + node % 7


def moved(weights: Any, node: int, number: int) -> dict[str, Any]:
    return {name: weights[name] + array for name, array in step(node, number).items()}


client = ClientApp(mods=[ClientMod(validate=lambda weights, context: {"accuracy": float(weights["n"]) / 1000})])


@client.train()
def train(message: Message, context: Context) -> Message:
    config: Any = message.content.config_records["config"]
    node, number = int(context.node_config["partition-id"]), int(config["server-round"]) - 1
    if (node, number) == (FAILS, 1):
        raise RuntimeError("out of memory")
    weights = moved(to_weights(message.content.array_records["arrays"]), node, number)
    if (node, number) == (SPOILS, 1):
        weights["w"][7, 3] = np.nan
    metrics = MetricRecord({"num-examples": examples(node)})
    return Message(RecordDict({"arrays": to_record(weights), "metrics": metrics}), reply_to=message)


def expected(nodes: int, initial: Any) -> Any:
    """The same without Flower: exact sums, so that no order matters."""
    weights = initial
    for number in range(ROUNDS):
        taking_part = [k for k in range(nodes) if number == 0 or k not in (FAILS, SPOILS)]
        contributions = [fl.Contribution(f"partition-{k}", moved(weights, k, number), examples(k)) for k in taking_part]
        weights = fl.weighted_average(contributions, like=initial, exact=True)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=6)
    parser.add_argument("--stream", action="store_true")
    arguments = parser.parse_args()
    initial: dict[str, Any] = {"w": np.zeros((50, 20), np.float32), "n": np.array(0, np.int64)}
    results = []
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        selection = fl.ModelSelectionHandler()
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_train_nodes=arguments.nodes,
            min_available_nodes=arguments.nodes,
            min_contributions=2,
            handlers=[selection],
            exact=True,
            stream=arguments.stream,
        )
        results.append(strategy.start(grid, to_record(initial), num_rounds=ROUNDS))

    start = time.perf_counter()
    resources: Any = {"client_resources": {"num_cpus": 1}}
    run_simulation(server_app=server, client_app=client, num_supernodes=arguments.nodes, backend_config=resources)
    (result,) = results
    job = result.job
    assert job is not None
    assert job.best is not None
    right = expected(arguments.nodes, initial)
    weights = to_weights(result.arrays)
    printed = {
        "seconds": time.perf_counter() - start,
        "same bits": all(np.array_equal(weights[name], right[name]) for name in right),
        "dtypes": [str(array.dtype) for array in weights.values()],
        "reports": [report.as_dict() for report in job.reports],
        "best round": job.best.round,
        "final results": len(job.validation_results),
    }
    print(json.dumps(printed))


if __name__ == "__main__":
    main()
