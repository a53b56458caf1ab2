"""The nodes: one pass over their own digits per round."""

from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fed_learn.integrations.flower import ClientMod, to_record, to_weights
from fed_learn.simulation import Split

from .tasks import BATCH_SIZE, Task, Weights, data, order_of, task


def own(context: Context) -> tuple[Task, int, Split]:
    """What this node trains with, its number, and the digits of all nodes."""
    place = context.node_config
    return task(str(context.run_config["framework"])), int(place["partition-id"]), data(int(place["num-partitions"]))


def validate(weights: Weights, context: Context) -> float:
    """The accuracy of the received model on examples that this node does not train on."""
    chosen, node, digits = own(context)
    return chosen.accuracy(weights, digits.selection[node])


app = ClientApp(mods=[ClientMod(validate=validate)])


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round."""
    config: Any = message.content.config_records["config"]
    chosen, node, digits = own(context)
    part = digits.train[node]
    received = to_weights(message.content.array_records["arrays"])
    weights, loss = chosen.train(received, part, order_of(part, node, int(config["server-round"])))
    metrics = MetricRecord({"num-examples": len(part), "num-iterations": -(-len(part) // BATCH_SIZE), "loss": loss})
    return Message(RecordDict({"arrays": to_record(weights), "metrics": metrics}), reply_to=message)
