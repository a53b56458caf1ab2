"""The nodes: one pass over their own digits per round."""

from collections.abc import Mapping
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fed_learn.integrations.flower import ClientMod, to_record, to_weights

from .tasks import BATCH_SIZE, Weights, data, model_of, order_of, task, weights_of


def validate(weights: Weights, context: Context) -> Mapping[str, float]:
    """Scores the received model on examples that this node does not train on."""
    chosen, node = task(str(context.run_config["framework"])), int(context.node_config["partition-id"])
    model = model_of(chosen, weights)
    return {"accuracy": chosen.accuracy(model, data(int(context.run_config["num-nodes"])).selection[node])}


mod = ClientMod(validate=validate)
app = ClientApp(mods=[mod])
app.evaluate()(mod.evaluate)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round."""
    config: Any = message.content.config_records["config"]
    chosen, node = task(str(context.run_config["framework"])), int(context.node_config["partition-id"])
    part = data(int(context.run_config["num-nodes"])).train[node]
    model = model_of(chosen, to_weights(message.content.array_records["arrays"]))
    loss = chosen.train(model, part, order_of(part, node, int(config["server-round"])))
    metrics = MetricRecord({"num-examples": len(part), "num-iterations": -(-len(part) // BATCH_SIZE), "loss": loss})
    return Message(RecordDict({"arrays": to_record(weights_of(model)), "metrics": metrics}), reply_to=message)
