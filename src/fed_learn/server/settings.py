"""`JobSettings`: the settings of a job, frozen and checked when they are made; and the checks of its models."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fed_learn.aggregation.plan import check_fitting, schemas_of
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.aggregation.tensors import without_tensors
from fed_learn.arguments import check_choice, check_count
from fed_learn.contribution import Kind
from fed_learn.events import EventHandler, check_handlers
from fed_learn.policies import Policies
from fed_learn.weights import (
    FrozenWeights,
    Schema,
    WeightDict,
    as_weight_dict,
    check_differences,
    check_finite,
    finite_elements,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class JobSettings:
    """The settings of a job: its rounds, its handlers, how it aggregates.

    Attributes:
        num_rounds: Rounds to run, at least 1; None: not known beforehand.
        handlers: The server's handlers.
        on_handler_error: `"raise"` ends the job when a handler raised; `"log"` goes on. Both log and record it.
        aggregation: How contributions are aggregated.
        durable: The folder in which the state of the job is kept; None: it ends with its process.
        ledger: Whether a chained record of each round is written there.
        keep_contributions: Whether what rounds were made of is kept there, so that they can be made again.

    Raises:
        ValueError: One is out of its range.
        TypeError: A handler lacks `handle_event` or `rollback`, or `num_rounds` is no int.

    Example:
        >>> JobSettings(num_rounds=3).aggregation.partial
        'same'
    """

    num_rounds: int | None = None
    handlers: Sequence[EventHandler] = ()
    on_handler_error: str = "raise"
    aggregation: AggregationSettings = field(default_factory=AggregationSettings)
    durable: Path | None = None
    ledger: bool = False
    keep_contributions: bool = False

    def __post_init__(self) -> None:
        if self.num_rounds is not None:
            object.__setattr__(self, "num_rounds", check_count("num_rounds", self.num_rounds))
        check_choice("on_handler_error", self.on_handler_error, ("raise", "log"))
        object.__setattr__(self, "handlers", tuple(check_handlers(self.handlers)))
        object.__setattr__(self, "durable", None if self.durable is None else Path(self.durable))
        if (self.ledger or self.keep_contributions) and self.durable is None:
            raise ValueError("ledger and keep_contributions need durable=, the folder in which they are kept")
        if self.keep_contributions and not self.ledger:
            raise ValueError("keep_contributions needs ledger=True, which says what they are")

    def kept(self) -> dict[str, Any]:
        """The settings that a state holds, as plain values: all that are no objects with code."""
        kept = self.aggregation
        return {
            "num_rounds": self.num_rounds,
            "on_handler_error": self.on_handler_error,
            "rule": kept.how.name,
            "kind": kept.kind.value,
            "partial": kept.partial,
            "policies": dict(kept.policies or {}),
            "exact": kept.exact,
            "stream": kept.stream,
            "min_contributions": kept.min_contributions,
            "on_bad_contribution": kept.on_bad_contribution,
            "ledger": self.ledger,
            "keep_contributions": self.keep_contributions,
        }


def initial_model(weights: WeightDict, kind: Kind, policies: Policies | None = None) -> FrozenWeights:
    """The first global model of a job, a copy of its own.

    Args:
        weights: Arrays or tensors. Values that are not finite are constants, as in a mask of −inf. Empty: the model
            is not known yet.
        kind: The kind of the contributions that will come.
        policies: What becomes of its variables; those that are not combined need not be such as can be.

    Raises:
        ContributionError: It is no weight dict, or holds dtypes or values that cannot be averaged.
        ValueError: It is empty, and contributions are differences; or policies do not fit it.
    """
    arrays = as_weight_dict(without_tensors(weights, "global model"), "global model")
    schema = Schema.of(arrays, "global model")
    plan, averaged, _ = schemas_of(policies or Policies(), arrays)
    check_fitting(policies, arrays, of_job=True)
    if kind is Kind.DIFF:
        combined = averaged if plan is None or averaged is None else averaged | plan.schema(schema, "max", "sum")
        check_differences(schema if combined is None else Schema(combined), "global model")
        if not arrays:
            raise ValueError("differences need a global model to be added to, and this one is empty")
    if not any(finite_elements(array).any() for array in arrays.values() if array.size):
        check_finite(arrays, "global model")
    return FrozenWeights.adopt(arrays) if type(weights) is FrozenWeights else FrozenWeights(arrays)


def checked_model(
    weights: object, schema: Schema | None, who: str, *, constants: WeightDict | None = None
) -> FrozenWeights:
    """A global model that a handler or another stack gives, in the order of the schema. Copied, unless it is frozen.

    Args:
        weights: Should be a weight dict.
        schema: Names, shapes and dtypes that it must have; None or empty: not known.
        who: What errors call it.
        constants: The global model before; what is not finite in it may stay as it is.

    Raises:
        ContributionError: It is no such model, or not finite.
    """
    arrays = as_weight_dict(weights, who)
    if schema:
        schema.check(arrays, who)
    check_finite(arrays, who, constants=constants or None)
    ordered = {name: arrays[name] for name in schema or arrays}
    return FrozenWeights.adopt(ordered) if type(weights) is FrozenWeights else FrozenWeights(ordered)
