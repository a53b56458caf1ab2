"""Differences of two weight dicts, and sums of weights and differences, in the dtypes of the weights.

The kernels do the arithmetic and flag the variables in which it went wrong; only those are checked here.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fed_learn import kernels
from fed_learn.aggregation.arrays import Columns, contiguous
from fed_learn.aggregation.integers import magnitude
from fed_learn.aggregation.outputs import ArrayOutputs, new_arrays
from fed_learn.environment import check_environment
from fed_learn.errors import IntegerRangeError
from fed_learn.ties import once, twins, under_all_names
from fed_learn.weights import (
    Array,
    Schema,
    WeightDict,
    check_differences,
    check_finite,
    finite_elements,
    same_elements,
    same_values,
)


def difference(weights: WeightDict, base: WeightDict) -> dict[str, Array]:
    """`weights − base` per variable, taken in float64 (integers exactly) and rounded to the dtype.

    Where both hold the same, be it an infinity or NaN as in masks, the difference is 0.

    Args:
        weights: A weight dict, of all or a part of the variables of `base`, in the dtypes of `base` or other widths.
        base: What it started from.

    Returns:
        New arrays in the shapes and dtypes of `base`. Names for which `weights` have one array share one here too.

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
    tied = _still_tied(weights, base)
    weights, _ = Schema.of(base).fit(weights)
    schema = Schema.of(once(weights, tied) if tied else weights)
    check_differences(schema)
    made = new_arrays(schema)
    flags = kernels.resolve().subtract(_ready(weights, schema), _ready(base, schema), list(made.values()))
    flagged = _flagged(made, flags)
    _check_inputs(flagged, (weights, base))
    for name, array in flagged.items():
        if array.dtype.kind != "i":
            array[same_elements(weights[name], base[name])] = 0
    check_finite(flagged)
    _check_range(flagged)
    return under_all_names(made, tied, weights) if tied else made


def add_difference(base: WeightDict, diff: WeightDict, *, out: WeightDict | None = None) -> WeightDict:
    """`base + diff` per variable of `diff`, with the arithmetic of `difference`.

    A variable of `base` that is not finite, as a mask, passes if the difference leaves it as it is.

    Args:
        base: A weight dict.
        diff: One of all or a part of its variables, in the same shapes and dtypes.
        out: A weight dict in those as well to write the result to; its content is undefined after an error.

    Returns:
        A new dict, or `out`. In a new one, names for which `diff` has one array share one too.

    Raises:
        NonFiniteError, IntegerRangeError: The sum leaves the range of the dtype.
        NamesError, ShapeError, DtypeError: The two do not have the same schema, or `out` has another one.
        OutputError: `out` cannot be written to.
        FloatingPointEnvironmentError: The process does not compute as numbers are defined.

    Example:
        >>> add_difference({"w": np.float32([1, 2])}, {"w": np.float32([2, -1])})
        {'w': array([3., 1.], dtype=float32)}
    """
    check_environment()
    schema = Schema({name: form for name, form in Schema.of(base).items() if name in diff})
    schema.check(diff)
    check_differences(schema)
    tied = _still_tied(diff, base) if out is None else {}
    whole, schema = schema, Schema(once(schema, tied)) if tied else schema
    bases, diffs = _ready(base, schema), _ready(diff, schema)
    rows = [dict(zip(schema, arrays, strict=True)) for arrays in (bases, diffs)]
    outputs = ArrayOutputs(schema, out, Columns(schema, rows))
    made = {name: outputs.arrays[name] for name in schema}
    flags = kernels.resolve().add(bases, diffs, list(made.values()))
    flagged = _flagged(made, flags)
    _check_inputs(flagged, (base, diff))
    check_finite(flagged, constants=base)
    _check_range(flagged)
    for name, array in flagged.items():
        constant = ~finite_elements(array)
        with np.errstate(invalid="ignore"):  # a signalling NaN; kernels differ in the bits of what is no number
            wide = base[name][constant].astype(np.float64) + diff[name][constant].astype(np.float64)
            array[constant] = wide.astype(array.dtype)
    return under_all_names(outputs.finish(), tied, whole) if tied else outputs.finish()


def _still_tied(weights: WeightDict, base: WeightDict) -> dict[str, str]:
    """The further names of variables in `weights`, as far as `base` holds the same values under them."""
    tied = twins(weights)
    forms = Schema.of({name: base[name] for name in (*tied, *tied.values()) if name in base}) if tied else Schema()
    return {
        name: one
        for name, one in tied.items()
        if name in forms and forms[name] == forms.get(one) and same_values(base[name], base[one])
    }


def _ready(weights: WeightDict, schema: Schema) -> list[Array]:
    """The arrays of a schema's variables, as a kernel takes them."""
    return [contiguous(np.asarray(weights[name])) for name in schema]


def _flagged(made: Mapping[str, Array], flags: Iterable[bool]) -> dict[str, Array]:
    return {name: array for (name, array), flag in zip(made.items(), flags, strict=True) if flag}


def _check_inputs(names: Iterable[str], inputs: Sequence[WeightDict]) -> None:
    """Refuses 64-bit integers so large that the sum of two could wrap around."""
    for name in names:
        for weights in inputs:
            array = weights[name]
            if magnitude(array) > 2**62:
                raise IntegerRangeError(
                    f"{name!r} holds integers beyond 2**62, whose differences may not fit", name=name
                )


def _check_range(flagged: Mapping[str, Array]) -> None:
    """Refuses integers that a kernel has flagged: they left the range of their dtype."""
    for name, array in flagged.items():
        if array.dtype.kind == "i":
            raise IntegerRangeError(f"{name!r} leaves the range of {array.dtype}", name=name)
