"""How contributions become one weight dict: by the weighted mean or another rule, in a batch or as they stream in."""

from fed_learn.aggregation.accumulator import Accumulator
from fed_learn.aggregation.average import aggregate, weighted_average

__all__ = ["Accumulator", "aggregate", "weighted_average"]
