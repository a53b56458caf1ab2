"""A rule of a user's own in Flower, both interfaces, and in NVFlare."""

from typing import Any, ClassVar

import numpy as np
import pytest

from fed_learn.aggregation.rules import Given, Rule
from fed_learn.weights import WeightDict

pytest.importorskip("flwr")
pytest.importorskip("nvflare")

from flwr.app import Context, Message, MetricRecord, RecordDict
from nvflare.app_common.abstract.fl_model import FLModel

from fed_learn.integrations.flower import FedAvg, LegacyFedAvg, LocalGrid, to_record, to_weights
from fed_learn.integrations.nvflare import WeightedAverageAggregator, WeightedAverageDXOAggregator


class Largest(Rule):
    name: ClassVar[str] = "largest"

    def combine(self, given: Given) -> WeightDict:
        return {n: np.max([row.arrays[n] for row in given.rows], axis=0) for n in given.schema}


def train(message: Message, context: Context) -> Message:
    k = int(context.node_config["partition-id"])
    weights = {"w": np.array([k, -k], np.float32)}
    metrics = MetricRecord({"num-examples": 1 + k, "partition-id": k})
    return Message(RecordDict({"arrays": to_record(weights), "metrics": metrics}), reply_to=message)


def test_flowers_strategy_combines_by_a_rule() -> None:
    strategy = FedAvg(fraction_evaluate=0.0, rule=Largest())
    result = strategy.start(LocalGrid(train, 3), to_record({"w": np.zeros(2, np.float32)}), num_rounds=2)
    assert to_weights(result.arrays)["w"].tolist() == [2, 0]


@pytest.mark.parametrize("strategy", [FedAvg, LegacyFedAvg])
def test_an_unknown_rule_is_refused_when_a_strategy_of_flowers_is_made(strategy: Any) -> None:
    with pytest.raises(ValueError, match="rule must be 'lora' or 'mean'"):
        strategy(rule="medium")


def test_a_rule_that_needs_all_at_once_is_refused_where_flowers_strategy_streams() -> None:
    with pytest.raises(ValueError, match="rule 'largest' needs all contributions of a round at once"):
        FedAvg(rule=Largest(), stream=True)


@pytest.mark.parametrize("tensors", [False, True])
def test_nvflares_aggregator_combines_by_a_rule(tensors: bool) -> None:
    torch = pytest.importorskip("torch")
    aggregator = WeightedAverageAggregator(rule=Largest())
    for k in (1, 2, 3):
        w = torch.tensor([k, -k]) if tensors else np.array([k, -k])
        meta = {"client_name": f"site-{k}", "NUM_STEPS_CURRENT_ROUND": k}
        aggregator.accept_model(FLModel(params={"w": w}, meta=meta, current_round=0))
    assert np.asarray(aggregator.aggregate_model().params["w"]).tolist() == [3, -1]
    with pytest.raises(ValueError, match="rule must be 'lora' or 'mean'"):
        WeightedAverageDXOAggregator(rule="medium")
