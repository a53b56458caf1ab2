"""What one weight dict has more than another, and the way back: differences, in the dtypes of the weights."""

import numpy as np

from fed_learn.environment import check_environment
from fed_learn.errors import DtypeError, IntegerRangeError
from fed_learn.weights import Array, Schema, WeightDict, about, check_finite, finite_elements, same_elements


def difference(weights: WeightDict, base: WeightDict) -> dict[str, Array]:
    """`weights − base` per variable, taken in float64 (integers exactly) and rounded to the dtype.

    Where both hold the same, be it an infinity or NaN as in masks, the difference is 0.

    Args:
        weights: A weight dict, of all or a part of the variables of `base`, in the dtypes of `base` or other widths.
        base: What it started from.

    Raises:
        DtypeError: For booleans and unsigned integers, which cannot hold a negative difference.
        NonFiniteError, IntegerRangeError: The difference leaves the range of the dtype.
        NamesError, ShapeError, DtypeError: `weights` do not fit `base`; see `Schema.fit`.
        FloatingPointEnvironmentError: The process does not compute as numbers are defined.

    Example:
        >>> difference({"w": np.float32([3, 1])}, {"w": np.float32([1, 2])})
        {'w': array([ 2., -1.], dtype=float32)}
    """
    check_environment()
    weights, _ = Schema.of(base).fit(weights)
    schema = Schema.of(weights)
    check_differences(schema)
    with np.errstate(invalid="ignore"):  # of equal infinities, below
        wide = {name: np.asarray(_wide(weights[name], name) - _wide(base[name], name)) for name in schema}
    for name, array in wide.items():
        if array.dtype.kind == "f" and not finite_elements(array).all():
            array[same_elements(weights[name], base[name])] = 0
    return _rounded(wide, schema)


def add_difference(base: WeightDict, diff: WeightDict) -> dict[str, Array]:
    """`base + diff` per variable of `diff`, with the arithmetic of `difference`.

    A variable of `base` that is not finite, as a mask, passes if the difference leaves it as it is.

    Raises:
        NonFiniteError, IntegerRangeError: The sum leaves the range of the dtype.
        NamesError, ShapeError, DtypeError: The two do not have the same schema.

    Example:
        >>> add_difference({"w": np.float32([1, 2])}, {"w": np.float32([2, -1])})
        {'w': array([3., 1.], dtype=float32)}
    """
    check_environment()
    schema = Schema({name: form for name, form in Schema.of(base).items() if name in diff})
    schema.check(diff)
    check_differences(schema)
    return _rounded({name: _wide(base[name], name) + _wide(diff[name], name) for name in schema}, schema, base)


def check_differences(schema: Schema, contributor: str | None = None) -> None:
    """Refuses a schema whose differences its own dtypes cannot hold.

    Raises:
        DtypeError: A variable is boolean or an unsigned integer.
    """
    for name, (_, dtype) in schema.items():
        if dtype.kind in "bu":
            raise DtypeError(
                f"{about(contributor, name)}has dtype {dtype}, which cannot hold a difference; send full weights",
                contributor=contributor,
                name=name,
                dtype=dtype,
                expected=None,
            )


def _wide(array: Array, name: str) -> Array:
    """float64; int64 for integers, so small that the sum of two cannot wrap around."""
    if array.dtype.kind != "i":
        return array.astype(np.float64)
    wide = array.astype(np.int64)
    if wide.size and max(-int(wide.min()), int(wide.max())) > 2**62:
        raise IntegerRangeError(f"{name!r} holds integers beyond 2**62, whose differences may not fit", name=name)
    return wide


def _rounded(wide: WeightDict, schema: Schema, constants: WeightDict | None = None) -> dict[str, Array]:
    with np.errstate(all="ignore"):  # what overflows is reported by name below
        narrow = {name: np.asarray(wide[name]).astype(dtype) for name, (_, dtype) in schema.items()}
    check_finite(narrow, constants=constants)
    for name, array in narrow.items():
        if array.dtype.kind == "i" and not np.array_equal(array, wide[name]):
            raise IntegerRangeError(f"{name!r} leaves the range of {array.dtype}", name=name)
    return narrow
