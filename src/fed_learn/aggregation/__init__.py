"""How contributions become one weight dict: the weighted mean, of a batch or as they stream in."""

from fed_learn.aggregation.accumulator import Accumulator
from fed_learn.aggregation.average import weighted_average

__all__ = ["Accumulator", "weighted_average"]
