"""Flower with this library's averaging, checks and handlers.

    from fed_learn.integrations.flower import FedAvg   # was: from flwr.serverapp.strategy import FedAvg

`FedAvg` is for Flower's Message API, `WithHandlers` goes around any other of its strategies, `LegacyFedAvg` is for
`flwr.server.strategy`. `ClientMod` is for the `ClientApp`. `to_record` and `to_weights` exchange weights with records,
bfloat16 among them; `LocalGrid` has all nodes in one process.
"""

from fed_learn.integrations.flower.legacy import LegacyFedAvg
from fed_learn.integrations.flower.local import LocalGrid
from fed_learn.integrations.flower.metrics import mean_metrics
from fed_learn.integrations.flower.mod import ClientMod
from fed_learn.integrations.flower.records import to_record, to_weights
from fed_learn.integrations.flower.strategy import FedAvg, WithHandlers

__all__ = [
    "ClientMod",
    "FedAvg",
    "LegacyFedAvg",
    "LocalGrid",
    "WithHandlers",
    "mean_metrics",
    "to_record",
    "to_weights",
]
