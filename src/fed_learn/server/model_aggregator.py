"""Aggregators by Clara Train's API: the base of a user's own, and `ModelAggregator`. What runs them is `ClaraRule`."""

import re
from collections.abc import Mapping

from fed_learn.aggregation import weighted_average
from fed_learn.aggregation.differences import add_difference
from fed_learn.aggregation.rules.clara import Aggregator
from fed_learn.contribution import Contribution, Kind, check_aggregation_weight, check_factor
from fed_learn.errors import EmptyAggregationError, MetricError
from fed_learn.model_meta import ContextKey, FLContext, ModelData
from fed_learn.numproto import model_arrays, to_dtypes
from fed_learn.weights import FrozenDict, FrozenWeights, Schema

__all__ = ["Aggregator", "ModelAggregator"]


class ModelAggregator(Aggregator):
    """Adds the mean of the differences to the global model, each weighed by its iterations.

    A contribution counts by `n_iter` times the factor of its contributor. The arithmetic is that of
    `fed_learn.weighted_average`.

    Args:
        exclude_vars: A regular expression; variables with a match anywhere in their names stay as they are.
        aggregation_weights: Contributor → factor, positive; 1 where there is none.
        exact: Average with exact sums.

    Raises:
        ValueError: `exclude_vars` is no regular expression, or a factor is not positive and finite.
    """

    def __init__(
        self,
        exclude_vars: str | None = None,
        aggregation_weights: Mapping[str, float] | None = None,
        *,
        exact: bool = False,
    ) -> None:
        try:
            self._excluded = re.compile(exclude_vars) if exclude_vars else None
        except re.error as error:
            raise ValueError(f"exclude_vars {exclude_vars!r} is no regular expression: {error}") from error
        for contributor, factor in (aggregation_weights or {}).items():
            check_factor(factor, contributor)
        self.exclude_vars = exclude_vars
        self.aggregation_weights = FrozenDict(aggregation_weights or {})
        self.exact = exact

    def check(self, contribution: Contribution) -> None:
        """Refuses a contribution without `n_iter`, by which it would be weighed.

        Raises:
            MetricError: It has none, or a negative one.
        """
        who, n_iter = contribution.contributor, contribution.n_iter
        if n_iter is None or n_iter < 0:
            problem = "no n_iter" if n_iter is None else f"n_iter is {n_iter}"
            raise MetricError(f"{who}: {problem}, by which contributions are weighed", contributor=who, metric="n_iter")

    def process(self, accumulator: list[FLContext], fl_ctx: FLContext) -> bool:
        """Aggregates; never calls a model the best.

        Raises:
            MetricError: A contribution has no `n_iter`.
            ContributionError: One is bad in another way, or the new model leaves the range of a dtype.
            EmptyAggregationError: `exclude_vars` leaves nothing to aggregate.
        """
        base = model_arrays(fl_ctx.get_model(), "global model")
        excluded = {name for name in base if self._excluded is not None and self._excluded.search(name)}
        averaged = {name: array for name, array in base.items() if name not in excluded}
        new = {name: array.copy() for name, array in base.items() if name in excluded}
        if not averaged:
            raise EmptyAggregationError(f"exclude_vars {self.exclude_vars!r} matches all variables of the global model")
        schema = Schema.of(averaged, "global model")
        sent = [self._weighed(item, schema) for item in accumulator]
        new |= add_difference(averaged, weighted_average(sent, like=averaged, exact=self.exact))
        fl_ctx.set_model(ModelData(FrozenWeights.adopt({name: new[name] for name in base})))
        return False

    def _weighed(self, item: FLContext, schema: Schema) -> Contribution:
        """The contribution with the variables that are averaged, and with the weight by which it counts here."""
        contribution: Contribution = item.get_prop(ContextKey.CONTRIBUTION)
        self.check(contribution)
        who = contribution.contributor
        arrays = model_arrays(item.get_model(), who)
        weights = {name: arrays[name] for name in schema if name in arrays}
        return Contribution(
            who,
            weights if schema.describes(weights) else to_dtypes(weights, schema, who),
            check_aggregation_weight(contribution.n_iter, who) * self.aggregation_weights.get(who, 1.0),
            kind=Kind.DIFF,
        )
