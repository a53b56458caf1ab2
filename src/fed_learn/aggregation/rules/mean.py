"""The weighted mean as a rule: of all contributions at once, or added up as they come."""

from fed_learn.aggregation.mean import mean
from fed_learn.aggregation.rules.base import Given, Rule, register
from fed_learn.weights import WeightDict


@register
class MeanRule(Rule):
    """The weighted mean, `Σ aₖ·xₖ / Σ aₖ` for each variable: see `fed_learn.weighted_average`."""

    name = "mean"
    _streams = True
    _shows_not_finite = True
    _of_this_package = True

    def combine(self, given: Given) -> WeightDict:
        """The mean."""
        return mean(
            given.rows,
            given.schema,
            out=given.out,
            output=given.output,
            exact=given.exact,
            kernel=given.kernel,
        )
