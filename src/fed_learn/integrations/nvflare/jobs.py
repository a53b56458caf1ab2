"""`add_handlers`: gives an NVFlare job handlers, in one call."""

import warnings
from collections.abc import Sequence
from typing import Any

from fed_learn.events import EventHandler
from fed_learn.integrations.nvflare.bridge import HandlerBridge
from fed_learn.integrations.nvflare.final_validation import FinalValidation


def add_handlers(
    recipe: Any,
    handlers: Sequence[EventHandler],
    *,
    key_metric: str = "accuracy",
    on_handler_error: str = "raise",
    mode: str | None = None,
    score_final_model: bool = True,
) -> None:
    """Adds a `HandlerBridge` to a recipe or a job; to a job after the workflow that trains.

    Args:
        recipe: An NVFlare `Recipe` or `FedJob`.
        handlers: The handlers.
        key_metric: Name of the metric that clients measure on the model as they received it.
        on_handler_error: `"raise"` ends the job when a handler raised; `"log"` goes on. Both log and record it.
        mode: `"max"` or `"min"`: which `key_metric` is better, for handlers not told otherwise; None: not said.
        score_final_model: Add `FinalValidation` too.

    Warns:
        UserWarning: The recipe has arguments that NVFlare does not pass on to its aggregator.
    """
    lost = [name for name in ("aggregation_weights", "exclude_vars") if getattr(recipe, name, None)]
    if lost and getattr(recipe, "aggregator", None) is not None:
        warnings.warn(
            f"the recipe's {' and '.join(lost)} do not reach a custom aggregator: pass them to the aggregator",
            stacklevel=2,
        )
    job = recipe if hasattr(recipe, "to_server") else recipe._job  # where NVFlare's own utilities find it
    if score_final_model:
        job.to_server(FinalValidation(), id="final_validation")
    job.to_server(HandlerBridge(handlers, key_metric, on_handler_error, mode), id="handlers")
