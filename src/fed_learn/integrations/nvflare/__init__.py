"""fed_learn in NVFlare: aggregators for its workflows, and a component that lets our handlers act on its events.

    from fed_learn.integrations.nvflare import WeightedAverageAggregator, add_handlers

    recipe = FedAvgRecipe(..., aggregator=WeightedAverageAggregator(), key_metric="")
    add_handlers(recipe, [ModelSelectionHandler()])

- `aggregators`: `WeightedAverageAggregator`, `WeightedAverageDXOAggregator`
- `followed_job`: `FollowedJob`, a job that NVFlare runs and aggregates, with our context
- `bridge`: `HandlerBridge`
- `final_validation`: `FinalValidation`, a workflow in which clients score the final model
- `jobs`: `add_handlers`
- `props`: what they tell each other in NVFlare's context
"""

from fed_learn.integrations.nvflare.aggregators import WeightedAverageAggregator, WeightedAverageDXOAggregator
from fed_learn.integrations.nvflare.bridge import HandlerBridge
from fed_learn.integrations.nvflare.final_validation import FinalValidation
from fed_learn.integrations.nvflare.jobs import add_handlers

__all__ = [
    "FinalValidation",
    "HandlerBridge",
    "WeightedAverageAggregator",
    "WeightedAverageDXOAggregator",
    "add_handlers",
]
