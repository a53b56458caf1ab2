"""The job in Flower's simulation engine."""

from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from parts import CLIENTS, ROUNDS, SITES, Site, demo, handlers, spoiled  # type: ignore[import-not-found]

import fed_learn as fl
from fed_learn.integrations.flower import ClientMod, FedAvg, to_record, to_weights


def number_of(context: Context) -> int:
    return int(context.node_config["partition-id"])


mod = ClientMod(
    validate=lambda weights, context: Site(number_of(context)).validate(weights, fl.FLContext()),
    name=lambda context: SITES[number_of(context)],
)
client = ClientApp(mods=[mod])
client.evaluate()(mod.evaluate)


@client.train()
def train(message: Message, context: Context) -> Message:
    config: Any = message.content.config_records["config"]
    number, site = int(config["server-round"]) - 1, number_of(context)
    result, _ = Site(site).round(to_weights(message.content.array_records["arrays"]), number)
    arrays = to_record(spoiled(result.weights, SITES[site], number))
    metrics = MetricRecord({"num-examples": result.aggregation_weight, "num-iterations": result.n_iter})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


server = ServerApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=CLIENTS,
        min_available_nodes=CLIENTS,
        min_contributions=2,
        handlers=handlers(server.decisions),  # type: ignore[attr-defined]
    )
    strategy.start(grid, to_record(demo().server.weights), num_rounds=ROUNDS)
