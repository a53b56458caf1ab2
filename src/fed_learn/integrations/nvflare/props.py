"""What the aggregators and the bridge tell each other by way of NVFlare's `FLContext`, and how they read from it.

Both act within the same NVFlare events, on the same thread and the same `FLContext`. The aggregator leaves there what
it made of a contribution and of a round; the bridge finds it in the event that follows. Neither knows the other, and
each works without.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.fl_constant import ReturnCode, ServerCommandKey
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from fed_learn.contribution import Contribution
from fed_learn.errors import FedLearnError, as_failure, described, printable
from fed_learn.values import split_metrics

OUTCOME = "fed_learn.outcome"
"""Aggregator to bridge, from one contribution's acceptance to the event after it: an `Outcome`."""
REPORT = "fed_learn.report"
"""Aggregator to bridge, at AFTER_AGGREGATION: the aggregator's `RoundReport`."""
CONTRIBUTORS = "fed_learn.contributors"
"""Bridge to aggregator, from BEFORE_AGGREGATION on: names of those to be averaged."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a contribution.

    Attributes:
        contribution: The contribution without its weights; None if what came was no contribution.
        refusal: Why it was refused, or None.
        settle: To be called when all contributions of the round are in: refuses those that cannot be averaged with the
            others, and returns who that is and why. Calling it again does nothing more.
    """

    contribution: Contribution | None
    refusal: Exception | None = None
    settle: Callable[[], Sequence[tuple[str, Exception]]] = tuple


def sender(result: object, stated: Any) -> Any:
    """The name of the client that sent a result.

    NVFlare's server notes it in the header of what it has received, from the token by which it knows the client. The
    identity in the peer's context is what the client itself says, and counts where no server stands between the two.
    """
    client = result.get_header(ServerCommandKey.FL_CLIENT) if isinstance(result, Shareable) else None
    return client.name if isinstance(client, Client) else stated


def put(fl_ctx: Any, key: str, value: object) -> None:
    """Sets a prop for this context alone."""
    fl_ctx.set_prop(key, value, private=True, sticky=False)


def taken(fl_ctx: Any, key: str) -> Any:
    """Returns a prop, and sets it to None."""
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
        FedLearnError: There are none; the message says why.

    Example:
        >>> from nvflare.apis.dxo import DXO, DataKind
        >>> scores_in(DXO(DataKind.METRICS, {"accuracy": 0.5}).to_shareable())
        {'accuracy': 0.5}
    """
    code = answer.get_return_code()
    if code and code != ReturnCode.OK:
        raise FedLearnError(f"failed with {printable(str(code))}")
    try:
        model = FLModelUtils.from_shareable(answer)
    except BaseException as error:
        as_failure(error)
        raise FedLearnError(f"sent something unreadable: {described(error)}") from error
    if model.params is not None:
        raise FedLearnError("sent weights, and scores nothing unless its script asks flare.is_evaluate()")
    scores = numbers_in(model.metrics)
    if not scores:
        raise FedLearnError("sent no metric that is a number")
    return scores


def numbers_in(metrics: object) -> dict[str, float]:
    """The metrics that are numbers, bools among them, as NVFlare counts them; its clients may send anything beside.

    Example:
        >>> numbers_in({"accuracy": 0.5, "confusion": [[1, 2]], "converged": True})
        {'accuracy': 0.5, 'converged': 1.0}
    """
    return split(metrics)[0]


def split(metrics: object) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics that are numbers, as `numbers_in` counts them, and all others as plain values.

    Example:
        >>> split({"accuracy": 0.5, "confusion": [[1, 2]], "converged": True})
        ({'accuracy': 0.5, 'converged': 1.0}, {'confusion': ((1, 2),)})
    """
    numbers, others = split_metrics(metrics if isinstance(metrics, Mapping) else {})
    bools = {name: float(value) for name, value in others.items() if isinstance(value, bool)}
    return numbers | bools, {name: value for name, value in others.items() if name not in bools}
