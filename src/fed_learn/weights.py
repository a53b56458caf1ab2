"""Weight dicts: what one is, its schema, and the checks of names, shapes, dtypes and values.

A weight dict is a `dict[str, numpy.ndarray]`, parameter name → array. This module knows nothing of clients,
kernels or frameworks; who sent a weight dict is only passed through into the errors.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from operator import attrgetter, eq
from typing import Any, NoReturn, Self, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fed_learn import hints
from fed_learn.errors import (
    DtypeError,
    NamesError,
    NonFiniteError,
    ShapeError,
    WeightsTypeError,
    a_type,
    as_failure,
    brief,
    described,
)
from fed_learn.limits import LONGEST_NAME, MOST_NAMED, MOST_VARIABLES
from fed_learn.ties import once, twins, under_all_names

Array: TypeAlias = npt.NDArray[Any]
"""An array of any supported dtype."""

WeightDict: TypeAlias = Mapping[str, Array]
"""What the library accepts; what it returns is a plain `dict` or, where it is kept, a `FrozenWeights`."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = tuple(map(np.dtype, ("float16", BFLOAT16, "float32", "float64")))
BOOL = np.dtype(bool)
INTEGERS = tuple(map(np.dtype, ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")))
SHAPE_AND_DTYPE = attrgetter("shape", "dtype")
SUPPORTED_DTYPES = frozenset((*FLOATS, *INTEGERS, np.dtype(bool)))


class FrozenDict(dict[str, Any]):
    """A `dict` that cannot be changed: what the library hands to handlers.

    Example:
        >>> metrics = FrozenDict(accuracy=0.5)
        >>> metrics["accuracy"] = 1.0
        Traceback (most recent call last):
        ...
        TypeError: FrozenDict cannot be changed; make a dict(...) of it first
    """

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be changed; make a dict(...) of it first")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def size_text(weights: object) -> str:
    """How large weights are, for a `repr`: counts and bytes, never values. Never raises, whatever they are.

    Example:
        >>> size_text({"w": np.zeros((2, 3), np.float32), "b": np.zeros(3)}), size_text(None)
        ('2 variables, 48 B', 'no weights')
    """
    if weights is None:
        return "no weights"
    try:
        weights = items_of(weights)  # type: ignore[arg-type] # what is no mapping has no items
        size = sum(int(getattr(value, "nbytes", 0)) for value in weights.values())
    except BaseException as error:  # noqa: BLE001 - from outside; the checks say what is wrong with it
        as_failure(error)
        return f"{a_type(type(weights))} in the place of weights"
    return f"{len(weights)} variable{'s' * (len(weights) != 1)}, {bytes_text(size)}"


def bytes_text(size: int) -> str:
    """A number of bytes for people to read.

    Example:
        >>> bytes_text(48), bytes_text(102_230_000)
        ('48 B', '102.2 MB')
    """
    for unit, bytes_of_one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_of_one:
            return f"{size / bytes_of_one:.1f} {unit}"
    return f"{size} B"


class FrozenWeights(FrozenDict):
    """An own, read-only copy of a weight dict: C-contiguous, native byte order, `writeable=False`.

    Freezing a `FrozenWeights` again shares its arrays: nobody can change them. Names of one variable keep one array
    (see `fed_learn.ties`).

    Args:
        weights: Any weight dict. Its arrays are copied.

    Raises:
        WeightsTypeError: It is none, such as a dict of tensors.

    Example:
        >>> mine = {"w": np.zeros(2, np.float32)}
        >>> kept = FrozenWeights(mine)
        >>> mine["w"][0] = 7
        >>> kept["w"].tolist(), kept["w"].flags.writeable
        ([0.0, 0.0], False)
        >>> kept
        FrozenWeights(1 variable, 8 B)
    """

    def __init__(self, weights: WeightDict) -> None:
        if isinstance(weights, FrozenWeights):
            super().__init__(weights)
            return
        arrays = as_weight_dict(weights)
        tied = twins(arrays)
        kept = once(arrays, tied) if tied else arrays
        own = {name: np.array(a, dtype=native_dtype(a.dtype), order="C") for name, a in kept.items()}
        sealed = {name: _sealed(array) for name, array in own.items()}
        super().__init__(under_all_names(sealed, tied, arrays) if tied else sealed)

    @classmethod
    def adopt(cls, weights: WeightDict) -> Self:
        """The same without a copy, for arrays that nobody else holds: they are made read-only as they are."""
        adopted = cls.__new__(cls)
        tied = twins(weights)
        sealed = {name: _sealed(array) for name, array in (once(weights, tied) if tied else weights).items()}
        dict.__init__(adopted, under_all_names(sealed, tied, weights) if tied else sealed)
        return adopted

    def __repr__(self) -> str:
        return f"FrozenWeights({size_text(self)})"


PLAIN = (dict, FrozenWeights)
"""Weight dicts that give at each reading what they hold."""


def _sealed(array: Array) -> Array:
    """A view of the array, which is made read-only: numpy refuses to make such a view writeable again."""
    array.flags.writeable = False
    if isinstance(array.base, np.ndarray):  # a slab that several results share
        array.base.flags.writeable = False
    return array.view()


def native_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The same dtype in this machine's byte order.

    Example:
        >>> native_dtype(np.dtype(">f4")) == np.float32
        True
    """
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def as_weight_dict(weights: object, contributor: str | None = None) -> dict[str, Array]:
    """Checks that `weights` is a mapping from `str` to arrays; returns a new dict that shares them.

    numpy scalars are taken as 0-d arrays, since arithmetic on 0-d arrays yields scalars.

    Args:
        weights: What came from outside.
        contributor: Who sent it, for the error.

    Returns:
        A plain dict of plain `numpy.ndarray`, in the order of `weights`.

    Raises:
        WeightsTypeError: For anything else.
        NamesError: There are more variables, or longer names, than any model has.

    Example:
        >>> as_weight_dict({"steps": np.int64(3)})
        {'steps': array(3)}
    """
    if isinstance(weights, dict) and type(weights) in PLAIN:
        names, values = set(map(type, weights)), set(map(type, weights.values()))
        if names <= {str} and values <= {np.ndarray}:
            if len(weights) > MOST_VARIABLES or max(map(len, weights), default=0) > LONGEST_NAME:
                check_names(weights, contributor)
            return dict(weights)  # the usual case, at a tenth of the time
    if not isinstance(weights, Mapping):
        instead = hints.of_weights(weights) or a_type(type(weights))
        raise WeightsTypeError(
            f"{about(contributor)}weights are {instead}, not a dict of numpy arrays", contributor=contributor
        )
    items = items_of(weights, contributor)
    arrays: dict[str, Array] = {}
    for name, value in items.items():
        if not isinstance(name, str):
            raise WeightsTypeError(
                f"{about(contributor)}variable name {brief(name)} is {a_type(type(name))}, not a str",
                contributor=contributor,
            )
        if not isinstance(value, np.ndarray | np.generic) or isinstance(value, np.ma.MaskedArray):
            raise WeightsTypeError(
                f"{about(contributor, name)}is {a_type(type(value), module=True)}, not a numpy array"
                + hints.of_entry(name, value, items),
                contributor=contributor,
                name=name,
            )
        arrays[str.__str__(name)] = np.asarray(value)  # a str of another class may do as it likes
    return arrays


def in_order_of(weights: Any, expected: Collection[str], who: str, of: str) -> Any:
    """A list of arrays as a weight dict, its names those that are expected, in their order; all else as it is.

    Lists come from `model.get_weights()` of Keras and from Flower's parameters. Shapes and dtypes are left to the
    checks of weight dicts.

    Args:
        weights: What came from outside.
        expected: The names.
        who: Whose it is, for the error.
        of: Whose the names are.

    Raises:
        NamesError: There are more arrays than names, or fewer.

    Example:
        >>> in_order_of([np.zeros(2), np.ones(1)], ["kernel", "bias"], "site-1", "like")
        {'kernel': array([0., 0.]), 'bias': array([1.])}
    """
    # By their types alone: an object from outside may raise anything while it is looked at.
    if not issubclass(type(weights), list | tuple) or not all(hasattr(type(one), "shape") for one in weights):
        return weights
    if len(weights) != len(expected):
        raise NamesError(
            f"{about(who)}has {len(weights)} arrays in a list, for the {len(expected)} variables of {of}: pass a dict "
            "with their names, or one array for each variable, in this order",
            contributor=who,
            missing=tuple(expected)[len(weights) :],
            extra=(),
        )
    return dict(zip(expected, weights, strict=True))


def items_of(weights: Mapping[Any, Any], contributor: str | None = None) -> dict[Any, Any]:
    """What a mapping holds, read once: at another reading one from outside may hold something else, or never end.

    Raises:
        NamesError: There are more variables, or longer names, than any model has.
        WeightsTypeError: It cannot be read.

    Example:
        >>> items_of({"w" * 2000: 0}, "site-1")
        Traceback (most recent call last):
        ...
        fed_learn.errors.NamesError: site-1: a variable's name has 2000 characters, at most 1000 are taken
    """
    try:
        items = list(islice(weights.items(), MOST_VARIABLES + 1))
        found = dict(items)
    except BaseException as error:
        as_failure(error)
        raise WeightsTypeError(
            f"{about(contributor)}weights cannot be read: {described(error)}", contributor=contributor
        ) from error
    check_names(items if len(items) > MOST_VARIABLES else found, contributor)
    return found


def check_names(names: Collection[object], contributor: str | None = None) -> None:
    """Refuses more variables, or longer names, than any model has.

    Raises:
        NamesError: Says which limit of `fed_learn.limits` it is.
    """
    if len(names) > MOST_VARIABLES:
        problem = f"more than {MOST_VARIABLES} variables, which is the most that is taken"
    else:
        plain = names if set(map(type, names)) <= {str} else [name for name in names if isinstance(name, str)]
        longest = max(map(str.__len__, plain), default=0)  # type: ignore[arg-type]
        if longest <= LONGEST_NAME:
            return
        problem = f"a variable's name has {longest} characters, at most {LONGEST_NAME} are taken"
    raise NamesError(about(contributor) + problem, contributor=contributor)


class Schema(dict[str, tuple[tuple[int, ...], np.dtype[Any]]]):
    """The names, shapes and dtypes that a weight dict must have: name → `(shape, dtype)`.

    Example:
        >>> schema = Schema.of({"w": np.zeros((2, 3), np.float32)})
        >>> schema.check({"w": np.zeros((2, 3), np.float64)}, contributor="site-1")
        Traceback (most recent call last):
        ...
        fed_learn.errors.DtypeError: site-1: 'w' has dtype float64, expected float32
    """

    @classmethod
    def of(cls, weights: WeightDict, contributor: str | None = None) -> Self:
        """The schema of `weights`.

        Raises:
            DtypeError: For a dtype that cannot be averaged (complex, float8, strings, objects, void …).
        """
        schema = cls()
        last: np.dtype[Any] | None = None
        for name, array in weights.items():
            if array.dtype is not last:  # mostly all are of one dtype
                last = array.dtype
                dtype = native_dtype(last)
                if dtype not in SUPPORTED_DTYPES:
                    raise DtypeError(
                        f"{about(contributor, name)}has dtype {array.dtype}, which cannot be averaged",
                        contributor=contributor,
                        name=name,
                        dtype=array.dtype,
                        expected=None,
                    )
            schema[name] = (array.shape, dtype)
        return schema

    def describes(self, weights: WeightDict) -> bool:
        """Whether these hold plain arrays of just these names, shapes and dtypes.

        In this order and in native byte order too: a fast `check` that gives no reasons. One array after the other: a
        list of all their shapes would set off the garbage collector.
        """
        arrays = weights.values()
        return (
            list(weights) == list(self)
            and {*map(type, arrays)} <= {np.ndarray}
            and all(map(eq, map(SHAPE_AND_DTYPE, arrays), self.values()))
        )

    def check(self, weights: WeightDict, contributor: str | None = None) -> None:
        """Refuses weights whose names, shapes or dtypes differ; byte order and strides do not matter.

        Raises:
            NamesError: Names are missing or extra.
            DtypeError: A dtype differs.
            ShapeError: A shape differs; nothing is ever broadcast.
        """
        if weights.keys() != self.keys():
            raise self.names_error(weights, contributor)
        for name, (shape, dtype) in self.items():
            array = weights[name]
            if native_dtype(array.dtype) != dtype:
                raise dtype_error(name, array, dtype, contributor)
            if array.shape != shape:
                raise shape_error(name, array, shape, contributor)

    def names_error(self, weights: WeightDict, contributor: str | None) -> NamesError:
        """What is wrong with the names of weights that have others than these."""
        missing = [name for name in self if name not in weights]
        extra = [name for name in weights if name not in self]
        return NamesError(
            f"{about(contributor)}has other variables than expected: {misses_and_adds(missing, extra)}"
            f"{hints.of_names(missing, extra)}",
            contributor=contributor,
            name=next(iter(missing or extra), None),
            missing=tuple(missing),
            extra=tuple(extra[:MOST_NAMED]),
        )

    def fit(
        self, weights: WeightDict, contributor: str | None = None
    ) -> tuple[dict[str, Array], dict[tuple[np.dtype[Any], np.dtype[Any]], list[str]]]:
        """Weights of some or all of these variables, in their order and in their dtypes.

        Args:
            weights: In any byte order, floating-point numbers and integers of any width; see `fitted`. Fractions for
                integers are taken only in counters: single numbers beside variables of floating-point numbers; integers
                for floating-point numbers only where the shape is ().
            contributor: Who sent them, for the error.

        Returns:
            The arrays, those that need no rounding as they are; and for each pair of the dtype that came and the one
            that is expected, the names of the variables that were rounded.

        Raises:
            NamesError: There are others, or none.
            DtypeError: A dtype is of another sort, or values do not fit.
            ShapeError: A shape differs; nothing is ever broadcast.

        Example:
            >>> schema = Schema.of({"w": np.zeros(1, np.float32), "mask": np.zeros(1)})
            >>> schema.fit({"w": np.array([0.5])})
            ({'w': array([0.5], dtype=float32)}, {(dtype('float64'), dtype('float32')): ['w']})
        """
        if not weights.keys() <= self.keys() or not weights:
            raise self.names_error(weights, contributor)
        fit: dict[str, Array] = {}
        rounded: dict[tuple[np.dtype[Any], np.dtype[Any]], list[str]] = {}
        for name, (shape, dtype) in self.items():
            array = weights.get(name)
            if array is None:
                continue
            given = native_dtype(array.dtype)
            counted = given in INTEGERS and dtype in FLOATS and shape == ()  # a number beside weights
            if given != dtype and not counted and not same_sort(given, dtype):
                raise dtype_error(name, array, dtype, contributor)
            if array.shape != shape:
                raise shape_error(name, array, shape, contributor)
            found = np.asarray(array, dtype) if given == dtype else fitted(array, dtype)
            if found is None:
                raise dtype_error(name, array, dtype, contributor, "with values that do not fit into")
            if given in FLOATS and dtype in INTEGERS and not (self._is_counter(name) or np.array_equal(found, array)):
                raise dtype_error(name, array, dtype, contributor, "with fractions, and the global model has")
            if given != dtype:
                rounded.setdefault((given, dtype), []).append(name)
            fit[name] = found
        return fit, rounded

    def _is_counter(self, name: str) -> bool:
        """Whether integers are a number beside weights, rather than the weights of a model that was begun with them."""
        return math.prod(self[name][0]) == 1 and any(dtype in FLOATS for _, dtype in self.values())


def misses_and_adds(missing: Sequence[str], extra: Sequence[str]) -> str:
    """Names that are missing and names that are extra, for a message; empty if there are none.

    Example:
        >>> misses_and_adds(["w"], ["bias"])
        "misses 'w' and adds 'bias'"
    """
    both = (("misses", missing), ("adds", extra))
    return " and ".join(f"{what} {listed(names)}" for what, names in both if names)


def dtype_error(
    name: str,
    array: Array,
    expected: np.dtype[Any],
    contributor: str | None,
    problem: str = "expected",
    others: str = "",
) -> DtypeError:
    """Says that a variable has another dtype than expected, or than there is in `others`."""
    comma = "," if problem == "expected" else ""
    instead = f", and {expected} {others}" if others else f"{comma} {problem} {expected}"
    return DtypeError(
        f"{about(contributor, name)}has dtype {array.dtype}{instead}",
        contributor=contributor,
        name=name,
        dtype=array.dtype,
        expected=expected,
    )


def shape_error(
    name: str, array: Array, expected: tuple[int, ...], contributor: str | None, others: str = ""
) -> ShapeError:
    """Says that a variable has another shape than expected, or than there is in `others`."""
    instead = f"and {expected} {others}" if others else f"expected {expected}"
    return ShapeError(
        f"{about(contributor, name)}has shape {array.shape}, {instead}{hints.of_shape(name, array.shape, expected)}",
        contributor=contributor,
        name=name,
        shape=array.shape,
        expected=expected,
    )


def check_finite(weights: WeightDict, contributor: str | None = None, *, constants: WeightDict | None = None) -> None:
    """Refuses NaN and infinity.

    Args:
        weights: Weights that may hold them.
        contributor: Whose they are, for the error.
        constants: A model with the same schema; what is not finite there passes where it is the same, as in a mask of
            −inf.

    Raises:
        NonFiniteError: Says which value of which variable is not finite.
    """
    for name, array in weights.items():
        if array.dtype.kind in "biu":
            continue
        finite = finite_elements(array)
        if finite.all():
            continue
        if constants is None or not same_values(array[~finite], constants[name][~finite]):
            raise not_finite_error(contributor, name, *first_of(~finite, array))


def not_finite_error(contributor: str | None, name: str, index: tuple[int, ...], value: float) -> NonFiniteError:
    """Says which value of which variable is not finite."""
    return NonFiniteError(
        f"{about(contributor, name)}at index {index}: {value} is not finite",
        contributor=contributor,
        name=name,
        index=index,
        value=value,
    )


def finite_elements(array: Array) -> npt.NDArray[np.bool_]:
    """Where an array of floating-point numbers is finite; signalling NaNs cause no warning."""
    with np.errstate(invalid="ignore"):
        finite: npt.NDArray[np.bool_] = np.isfinite(array)
    return finite


def same_values(one: Array, other: Array) -> bool:
    """Whether two arrays hold equal values everywhere, NaN being equal to NaN.

    Example:
        >>> mask = np.float32([0, -np.inf, np.nan])
        >>> same_values(mask, mask.copy()), same_values(mask, np.zeros(3))
        (True, False)
    """
    return one.shape == other.shape and bool(same_elements(one, other).all())


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays have one shape and dtype, whatever their byte order, and the same bits everywhere.

    Example:
        >>> same_bits(np.array([np.nan, 0.0]), np.array([np.nan, 0.0], ">f8")), same_bits(np.zeros(1), -np.zeros(1))
        (True, False)
    """
    dtype = native_dtype(one.dtype)
    if one.shape != other.shape or native_dtype(other.dtype) != dtype:
        return False
    first, second = (np.array(x, dtype, order="C", copy=None).reshape(-1).view(np.uint8) for x in (one, other))
    parts = range(0, first.size, 1 << 20)  # numpy's comparison takes as much memory as what it compares
    return all(np.array_equal(first[i : i + (1 << 20)], second[i : i + (1 << 20)]) for i in parts)


def same_elements(one: Array, other: Array) -> npt.NDArray[np.bool_]:
    """Where two arrays of one shape hold equal values, NaN being equal to NaN."""
    with np.errstate(invalid="ignore"):
        same: npt.NDArray[np.bool_] = np.asarray((one == other) | ((one != one) & (other != other)))
    return same


def same_sort(given: np.dtype[Any], expected: np.dtype[Any]) -> bool:
    """Whether numbers of one dtype can be taken for those of another: see `fitted`.

    Example:
        >>> same_sort(np.dtype(np.float64), np.dtype(np.float32)), same_sort(np.dtype(int), np.dtype(np.float32))
        (True, False)
    """
    if given in FLOATS:
        return expected in (*FLOATS, *INTEGERS, BOOL)
    return given in INTEGERS and expected in (*INTEGERS, BOOL)


def fitted(array: Array, dtype: np.dtype[Any]) -> Array | None:
    """An array rounded to another dtype of the same sort.

    Floating-point numbers of one width become those of another, to the nearest, halves by way of float32; integers of
    one width become those of another; floating-point numbers become integers, half to even, as the mean of integers
    does; and 0 and 1 become truth values, as in a mask.

    Args:
        array: In any byte order.
        dtype: What it should have; see `same_sort`.

    Returns:
        A new array; None where a value does not fit. NaN and infinities stay what they are, where `dtype` has them.

    Example:
        >>> fitted(np.array([0.1]), np.dtype(np.float32)), fitted(np.array([300]), np.dtype(np.int8))
        (array([0.1], dtype=float32), None)
    """
    with np.errstate(all="ignore"):  # what does not fit is told below
        if dtype == BOOL:
            truth = array.astype(BOOL)
            return truth if np.array_equal(truth, array) else None
        if dtype in FLOATS:
            near = rounded(array, dtype)
            lost = finite_elements(array) & ~finite_elements(near)
            return None if lost.any() else near
        whole = np.rint(array.astype(np.float64)) if native_dtype(array.dtype) in FLOATS else array
        if whole.size and whole.dtype.kind == "f" and not np.isfinite(whole).all():
            return None
        bounds = np.iinfo(dtype)
        if whole.size and not (bounds.min <= int(whole.min()) and int(whole.max()) <= bounds.max):
            return None
        return np.asarray(whole.astype(dtype))


def rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    """A new array with numbers rounded to a dtype as means are: halves by way of float32, integers half to even.

    Args:
        array: Numbers; for integers and booleans, of a floating-point dtype and within the range.
        dtype: Any supported one.

    Example:
        >>> rounded(np.array([0.5, 1.5]), np.dtype(np.int8))
        array([0, 2], dtype=int8)
    """
    if dtype.kind in "biu":
        array = np.rint(array)
    elif dtype.itemsize == 2:
        array = array.astype(np.float32)
    return np.asarray(array.astype(dtype))


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


def first_of(bad: npt.NDArray[np.bool_], array: Array) -> tuple[tuple[int, ...], float]:
    """Index and value of the first element that `bad` marks."""
    index = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), array.shape))
    return index, array[index].item()


def about(contributor: str | None, name: str | None = None) -> str:
    """How a message begins that is about a contributor and a variable, as far as they are known.

    Example:
        >>> about("site-1", "fc.weight"), about(None)
        ("site-1: 'fc.weight' ", '')
    """
    return (f"{contributor}: " if contributor is not None else "") + (f"{name!r} " if name is not None else "")


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names for a message, the first few of them.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    all_names = list(names)
    shown = ", ".join(repr(name[:200]) for name in all_names[:most])
    return shown + (f" and {len(all_names) - most} more" if len(all_names) > most else "")
