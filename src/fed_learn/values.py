"""Values as clients and users' functions give them: numbers in any form, and what else there may be, made plain."""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from numbers import Integral, Real
from typing import Any

import numpy as np

from fed_learn.errors import a_type, as_failure, brief, described
from fed_learn.limits import DEEPEST, LEFT_OUT, LONGEST_INFO, LONGEST_NAME, MOST_INFO, MOST_METRICS
from fed_learn.weights import FLOATS, FrozenDict, Schema, items_of


def number_of(value: object) -> float | None:
    """The number that a value is, in whatever form it comes: of Python or numpy, an array or tensor of one element.

    Returns:
        None for anything else: text, bools, what has several elements, an int that no float can hold.

    Example:
        >>> number_of(np.int64(3)), number_of(np.array([0.5])), number_of("3"), number_of(True)
        (3.0, 0.5, None, None)
    """
    if type(value) is float:
        return value
    try:
        shape = getattr(value, "shape", None)
        if shape is not None and not isinstance(value, type):
            if math.prod(shape) != 1:
                return None
            held: Any = value
            value = held.item() if hasattr(held, "item") else held.numpy().item()
        if isinstance(value, bool | np.bool_) or not isinstance(value, Real | Decimal):
            return None
        return float(value)
    except BaseException as error:  # noqa: BLE001 - an object from outside may raise anything while it is looked at
        as_failure(error)
        return None


def whole_number_of(value: object) -> int | None:
    """The number that a value is, where it is a whole one of at most 64 bits; None for anything else.

    Example:
        >>> whole_number_of(np.float32(3)), whole_number_of(2.5), whole_number_of(10**400), whole_number_of("3")
        (3, None, None, None)
    """
    try:
        if isinstance(value, Integral) and not isinstance(value, bool | np.bool_):
            number = int(value)
        else:
            found = number_of(value)
            if found is None or not found.is_integer():
                return None
            number = int(found)
    except BaseException as error:  # noqa: BLE001 - as in `number_of`
        as_failure(error)
        return None
    return number if -(2**63) <= number < 2**63 else None


def split_metrics(metrics: Mapping[Any, Any], first: str | None = None) -> tuple[dict[str, float], "PlainValues"]:
    """The entries of a client's metrics that are numbers, as floats, and the others as plain values.

    NaN and infinities are numbers; handlers deal with them. Of too many metrics the first `MOST_METRICS` are read, and
    one with too long a name is left out; the other values then say so under `LEFT_OUT`.

    Args:
        metrics: From outside.
        first: The one that is read first, wherever it stands: the score to select by is not lost among too many.

    Example:
        >>> split_metrics({"accuracy": np.float32(0.5), "converged": True, "confusion": [[3, 1], [0, 4]]})
        ({'accuracy': 0.5}, {'converged': True, 'confusion': ((3, 1), (0, 4))})
    """
    numbers: dict[str, float] = {}
    others: dict[Any, Any] = {}
    found, said = entries_of(metrics, MOST_METRICS, first)
    for name, value in found.items():
        number = number_of(value) if isinstance(name, str) else None
        if isinstance(name, str) and len(name) > LONGEST_NAME:
            said = f"a metric with a name of {len(name)} characters"
        elif number is None:
            others[name] = value
        else:
            numbers[name] = number
    if said:
        others[LEFT_OUT] = said
    return numbers, plain_values(others)


def entries_of(values: Mapping[Any, Any], most: int, first: str | None = None) -> tuple[dict[Any, Any], str]:
    """The first entries of a mapping from outside, which may never end, and what is left out of it.

    Args:
        values: The mapping, or pairs.
        most: How many are taken.
        first: The entry that is taken first, wherever it stands.

    Example:
        >>> entries_of({"a": 1, "b": 2}, 1)
        ({'a': 1}, 'all entries but the first 1')
    """
    if not isinstance(values, Mapping):
        values = dict(islice(values, most + 2))  # of pairs; else a TypeError, since nobody means that
    try:
        found = {first: values[first]} if first in values else {}
        found |= islice(values.items(), most + 2)  # one more may be what is said of others
    except BaseException as error:  # noqa: BLE001 - from outside; it costs what it holds, and no weights
        as_failure(error)
        return {}, f"what cannot be read: {described(error)}"
    said = found.pop(LEFT_OUT, "")
    while len(found) > most:
        found.popitem()
        said = f"all entries but the first {most}"
    return found, said if isinstance(said, str) else brief(said)


class PlainValues(FrozenDict):
    """What `plain_values` has made, which it need not look through again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)  # who sends one has not made it here


def plain_values(values: Mapping[Any, Any]) -> PlainValues:
    """A copy of a mapping in plain JSON values that nobody can change; what is none becomes a short description.

    So do texts that are too long, and lists and dicts that are too deep or hold too much; see `fed_learn.limits`.

    Example:
        >>> plain_values({"host": "a100", "tags": ["x", {1}], "log": "x" * 20_000})
        {'host': 'a100', 'tags': ('x', '{1}'), 'log': "'xxxxxxxxxxxx...xxxxxxxxxxxxx'"}
    """
    if type(values) is PlainValues:
        return values
    found, said = entries_of(values, MOST_INFO)
    room = _Room(MOST_INFO - len(found))
    plain = {_plain_name(name): _described_unless_plain(value, room) for name, value in found.items()}
    if said:
        plain[LEFT_OUT] = said if len(said) <= LONGEST_INFO else brief(said)
    return PlainValues(plain)


_ALL = slice(None)


class _TooMuchError(Exception):
    """A value holds more entries than there is room for."""


class _Room:
    """How many more entries are taken, of all depths."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, count: int) -> None:
        """Takes room for so many entries.

        Raises:
            _TooMuchError: There is not as much.
        """
        if count > self.left:
            raise _TooMuchError
        self.left -= count


def _described_unless_plain(value: Any, room: _Room) -> Any:
    try:
        return _plain(value, DEEPEST, room)
    except BaseException as error:  # noqa: BLE001 - too much; an object from outside may raise anything while it is looked at
        as_failure(error)
        return brief(value)


def _plain_name(name: object) -> str:
    return name if type(name) is str and len(name) <= LONGEST_NAME else brief(name)


def _plain(value: Any, depth: int, room: _Room) -> Any:
    if value is None or type(value) in (bool, float):
        return value
    if type(value) is int and abs(value) < 2**63:  # Python does not even print the longest ones
        return value
    if isinstance(value, dict | list | tuple) and not depth:
        return a_type(type(value))  # of so deep ones there may be as many as entries are taken
    if isinstance(value, dict):
        room.take(dict.__len__(value))
        return FrozenDict({_plain_name(key): _plain(item, depth - 1, room) for key, item in dict.items(value)})
    if isinstance(value, list | tuple):
        items = list.__getitem__(value, _ALL) if isinstance(value, list) else tuple.__getitem__(value, _ALL)
        room.take(len(items))
        return tuple([_plain(item, depth - 1, room) for item in items])
    number = number_of(value)
    if number is not None:
        return number
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, str):
        text = str.__str__(value)
        return text if len(text) <= LONGEST_INFO else brief(text)
    return brief(value)


def mean_of(numbers: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean of numbers, within their range, whatever their order and however large they are.

    Infinities and NaN give what a plain sum gives.

    Args:
        numbers: At least one.
        weights: One for each: finite, not negative, and not all 0.

    Example:
        >>> mean_of([1.0, 3.0], [3, 1]), mean_of([1.5e308, 1.5e308], [1e300, 1e300])
        (1.5, 1.5e+308)
    """
    if all(map(math.isfinite, numbers)):  # those that count by 0 decide on nothing
        numbers, weights = zip(*[(number, a) for number, a in zip(numbers, weights, strict=True) if a], strict=True)
    if 0 < min(weights) < 2.0**-800 * max(weights) and all(map(math.isfinite, numbers)):  # products could underflow
        exact = [Fraction(weight) * Fraction(number) for weight, number in zip(weights, numbers, strict=True)]
        return float(sum(exact) / sum(map(Fraction, weights)))
    _, exponent = math.frexp(max(weights))
    scaled = [math.ldexp(weight, -exponent) for weight in weights]  # exactly, and none of them above 1
    largest = max(map(abs, numbers))
    shift = math.frexp(largest)[1] + len(weights).bit_length() if math.isfinite(largest) and largest > 1 else 0
    terms = [weight * math.ldexp(number, -shift) for weight, number in zip(scaled, numbers, strict=True)]
    if not all(map(math.isfinite, terms)):
        return sum(terms) / math.fsum(scaled)
    mean = math.fsum(terms) / math.fsum(scaled)
    # Rounding may have taken it out of the range of the numbers, and even of all floats.
    low, high = math.ldexp(min(numbers), -shift), math.ldexp(max(numbers), -shift)
    return math.ldexp(min(max(mean, low), high), shift)


class RunningMean:
    """`mean_of` of numbers that come one by one, to the same bits, without a pass over all of them each time.

    Example:
        >>> mean = RunningMean()
        >>> for number, weight in [(1.0, 3), (3.0, 1)]:
        ...     mean.add(number, weight)
        >>> mean.value()
        1.5
    """

    def __init__(self) -> None:
        self._numbers: list[float] = []
        self._weights: list[float] = []
        self._terms: list[float] = []  # as math.fsum keeps a sum: parts of it that do not overlap
        self._total: list[float] = []
        self._low, self._high = math.inf, -math.inf
        self._usual = True  # whether all are so far from the ends of the range that nothing has to be scaled

    def add(self, number: float, weight: float) -> None:
        """Takes in one more."""
        self._numbers.append(number)
        self._weights.append(weight)
        term = weight * number
        sizes = (weight, abs(number), abs(term))
        self._usual = self._usual and all(size == 0 or 2.0**-400 < size < 2.0**400 for size in sizes)
        if self._usual and weight:
            _grow(self._terms, term)
            _grow(self._total, weight)
            self._low, self._high = min(self._low, number), max(self._high, number)

    def value(self) -> float | None:
        """The mean so far; None if nothing counts by more than 0."""
        if not self._usual:
            return mean_of(self._numbers, self._weights) if any(self._weights) else None
        if not self._total:
            return None
        mean = math.fsum(self._terms) / math.fsum(self._total)
        return min(max(mean, self._low), self._high)


def _grow(parts: list[float], number: float) -> None:
    """Adds a number to a sum that is kept in parts without any rounding (Shewchuk, 1997), as `math.fsum` does."""
    kept = 0
    for part in parts:
        if abs(number) < abs(part):
            number, part = part, number
        high = number + part
        low = part - (high - number)
        if low:
            parts[kept] = low
            kept += 1
        number = high
    parts[kept:] = [number]


def numbers_as_arrays(weights: Any, schema: Schema) -> Any:
    """Weights with arrays in the place of Python's numbers, of the dtype of the schema where that is of their sort.

    Python has but one kind of floating-point numbers, and one of integers.

    Args:
        weights: What came from outside; anything but a mapping is returned as it is.
        schema: Of the global model; empty: nobody knows it.

    Example:
        >>> numbers_as_arrays({"scale": 2.0}, Schema.of({"scale": np.zeros((), np.float32)}))
        {'scale': array(2., dtype=float32)}
    """
    if not isinstance(weights, Mapping):
        return weights
    try:
        items = items_of(weights)
    except BaseException as error:  # noqa: BLE001 - from outside; the checks say what is wrong with it
        as_failure(error)
        return weights
    if not any(type(value) in (bool, int, float) for value in items.values()):
        return weights
    return {
        name: np.asarray(value, _dtype_of(value, schema.get(name))) if type(value) in (bool, int, float) else value
        for name, value in items.items()
    }


def _dtype_of(value: float, expected: tuple[Any, np.dtype[Any]] | None) -> np.dtype[Any] | None:
    if expected is None or isinstance(value, bool):
        return None
    return expected[1] if expected[1] in FLOATS else None
