"""What the aggregators and the bridge tell each other by way of NVFlare's `FLContext`, and how they read from it.

Both act within the same NVFlare events, on the same thread and the same `FLContext`. The aggregator leaves there what
it made of a contribution and of a round; the bridge finds it in the event that follows. Neither knows the other, and
each works without.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fed_learn.contribution import Contribution
from fed_learn.errors import FedLearnError

OUTCOME = "fed_learn.outcome"
"""Aggregator to bridge, from one contribution's acceptance to the event after it: an `Outcome`."""
REPORT = "fed_learn.report"
"""Aggregator to bridge, at AFTER_AGGREGATION: the aggregator's `RoundReport`."""
CONTRIBUTORS = "fed_learn.contributors"
"""Bridge to aggregator, from BEFORE_AGGREGATION on: names of those to be averaged."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a contribution: it, without its weights, None if it was none; why it was refused, or None."""

    contribution: Contribution | None
    refusal: Exception | None = None


def put(fl_ctx: Any, key: str, value: object) -> None:
    """Sets a prop for this context alone."""
    fl_ctx.set_prop(key, value, private=True, sticky=False)


def taken(fl_ctx: Any, key: str) -> Any:
    """The prop, which is set to None."""
    value = fl_ctx.get_prop(key)
    if value is not None:
        put(fl_ctx, key, None)
    return value


def global_weights(fl_ctx: Any) -> dict[str, Any] | None:
    """NVFlare's own dict of the global weights, None where it has none yet."""
    model = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
    weights = model.get(ModelLearnableKey.WEIGHTS) if isinstance(model, Mapping) else None
    return weights if isinstance(weights, dict) and weights else None


def scores_in(answer: Shareable) -> dict[str, float]:
    """The numbers of a client's answer to a validation task.

    An answer with weights scores nothing: the script did not ask `flare.is_evaluate()`, trained, and may have measured
    before or after that. (In training, metrics beside weights are by NVFlare's convention those of the model received.)

    Raises:
        FedLearnError: There are none, for the reason that the message tells.

    Example:
        >>> from nvflare.apis.dxo import DXO, DataKind
        >>> scores_in(DXO(DataKind.METRICS, {"accuracy": 0.5}).to_shareable())
        {'accuracy': 0.5}
    """
    code = answer.get_return_code()
    if code and code != ReturnCode.OK:
        raise FedLearnError(f"failed with {code}")
    try:
        model = FLModelUtils.from_shareable(answer)
    except Exception as error:
        raise FedLearnError(f"sent something unreadable: {type(error).__name__}: {error}") from error
    if model.params is not None:
        raise FedLearnError("sent weights, and scores nothing unless its script asks flare.is_evaluate()")
    scores = numbers_in(model.metrics)
    if not scores:
        raise FedLearnError("sent no metric that is a number")
    return scores


def plain(value: Any) -> Any:
    """A numpy scalar, or an array or tensor without dimensions, as the Python number in it; the rest as it is.

    Example:
        >>> import numpy as np
        >>> plain(np.array(3)), plain(np.float32(0.5)), plain([1])
        (3, 0.5, [1])
    """
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def numbers_in(metrics: object) -> dict[str, float]:
    """The metrics that are numbers; NVFlare's clients may send anything beside them.

    Example:
        >>> import numpy as np
        >>> numbers_in({"accuracy": 0.5, "loss": np.array(2), "confusion": [[1, 2]], "converged": True})
        {'accuracy': 0.5, 'loss': 2.0}
    """
    items = metrics.items() if isinstance(metrics, Mapping) else ()
    found = {}
    for name, value in ((name, plain(value)) for name, value in items):
        if isinstance(name, str) and isinstance(value, Real) and not isinstance(value, bool):
            try:
                found[name] = float(value)
            except OverflowError:  # an int that no float holds
                continue
    return found


def whole(steps: object) -> int | None:
    """A number of steps as a 64-bit int, where it is one.

    Example:
        >>> whole(3.0), whole(2.5), whole(10**400), whole("3")
        (3, None, None, None)
    """
    steps = plain(steps)
    if isinstance(steps, bool) or not isinstance(steps, Integral | float):
        return None
    if isinstance(steps, float) and not steps.is_integer():
        return None
    return int(steps) if abs(int(steps)) < 2**63 else None
