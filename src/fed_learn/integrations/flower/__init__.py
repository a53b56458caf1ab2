"""Flower with this library's averaging, checks and handlers.

    from fed_learn.integrations.flower import FedAvg   # was: from flwr.serverapp.strategy import FedAvg

`FedAvg` is for Flower's Message API, `WithHandlers` goes around any other of its strategies, `LegacyFedAvg` is for
`flwr.server.strategy`. `ClientMod` is for the `ClientApp`. `to_record` and `to_weights` exchange weights with records,
bfloat16 among them; `LocalGrid` has all nodes in one process.

How they are built, from Flower's side to ours:

    strategy, legacy            the strategies themselves
    job_strategy, job_loop      the rounds of a strategy are rounds of a job; the loop of rounds
    strategy_base               arguments become settings; to which job a model or a reply belongs
    flower_job                  one job, its nodes, and when which event is due; it holds what the next three lines name
    record_job, sent_model      the global model as the bytes of messages
    answers, names, selection   who answered; who is called what; by which score models are selected
    widths, round_parts         replies of several precisions; rounds aggregated in several calls
    replies, scoring, metrics   what replies say: contributions, scores, metrics
    records, messages, local    weights in records; messages out and replies in; a grid in one process
    mod                         the client's side
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
