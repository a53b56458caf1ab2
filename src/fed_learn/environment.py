"""The floating-point environment of the process, which frameworks can change and which changes bits.

The native kernel sets its own while it computes; numpy computes in the one it finds, so what relies on numpy asks
here first.
"""

from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from fed_learn.errors import FloatingPointEnvironmentError


def rounds_to_nearest() -> bool:
    """Whether this thread rounds to nearest, as it does unless somebody changed that."""
    half_ulp = np.float64(2.0**-53)
    up, down = np.float64(1.0) + half_ulp, np.float64(-1.0) - half_ulp
    return bool(up == 1.0 and down == -1.0 and np.float64(1.0) - half_ulp / 2 == 1.0)


def check_environment() -> None:
    """Refuses an environment in which numpy gives other bits than the default one.

    Raises:
        FloatingPointEnvironmentError: The rounding mode was changed, or subnormal numbers are flushed to zero.
    """
    if not rounds_to_nearest():
        raise FloatingPointEnvironmentError("this thread does not round to nearest, so numpy would give other bits")
    with np.errstate(all="ignore"):
        flushed = np.float32(2.0**-140) * np.float32(1.0) == 0 or np.float64(2.0**-1040) * np.float64(1.0) == 0
    if flushed:
        raise FloatingPointEnvironmentError(
            "this process flushes subnormal numbers to zero (torch.set_flush_denormal?), so numpy would give other "
            "bits; the native kernel does not mind, unless exact sums are asked for"
        )


def sum_in_order(values: Iterable[float]) -> float:
    """The sum of positive floats from the first to the last, each step rounded to nearest whatever the mode is.

    Example:
        >>> sum_in_order([0.1, 0.2, 0.3]) == (0.1 + 0.2) + 0.3
        True
    """
    if rounds_to_nearest():
        total = 0.0
        for value in values:
            total += value
        return total
    exact = 0.0
    for value in values:  # fractions become floats by integer arithmetic
        exact = float(Fraction(exact) + Fraction(value))
    return exact
