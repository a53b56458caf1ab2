"""What becomes of the variables that are not averaged, as contributions come: `Apart`. Which these are, `plan` says."""

import copy
from collections.abc import Mapping, Sequence
from fractions import Fraction
from io import BytesIO
from typing import Any

import numpy as np

from fed_learn import kernels
from fed_learn.adapters.tensors import framework_of, plain
from fed_learn.aggregation.exact import ExactSums, check_domain
from fed_learn.aggregation.integers import magnitude
from fed_learn.aggregation.plan import Parts, Plan
from fed_learn.aggregation.tensors import Place, as_tensors, opened, placeholder, schema_of
from fed_learn.contribution import Kind
from fed_learn.errors import DtypeError, IntegerRangeError, NamesError, OutputError, WeightsTypeError, a_type
from fed_learn.limits import DEEPEST, MOST_NAMED
from fed_learn.weights import (
    Array,
    Schema,
    WeightDict,
    as_weight_dict,
    check_finite,
    finite_elements,
    items_of,
    misses_and_adds,
    same_bits,
)


def alike(one: Any, other: Any, depth: int = DEEPEST) -> bool | None:
    """Whether two values are equal, bit by bit; None if they are of a kind that cannot be compared, or nested too deep.

    Example:
        >>> alike(BytesIO(b"state"), BytesIO(b"state")), alike(np.zeros(1), np.zeros(2)), alike(object(), object())
        (True, False, None)
    """
    if isinstance(one, BytesIO) and isinstance(other, BytesIO):
        return one.getvalue() == other.getvalue()
    if one is None or type(one) in (bytes, bool, int, float, str):
        return type(one) is type(other) and bool(one == other)
    if type(one) in (tuple, list):
        if type(other) is not type(one) or len(one) != len(other):
            return False
        found = [alike(*pair, depth - 1) if depth else None for pair in zip(one, other, strict=True)]
        return None if None in found else all(found)
    one, other = plain(one), plain(other)
    framework = framework_of(type(one))
    if framework is not None:
        return framework_of(type(other)) is framework and framework.alike(one, other)
    if not isinstance(one, np.ndarray | np.generic) or one.dtype.hasobject:
        return None
    if not isinstance(other, np.ndarray | np.generic):
        return False
    return same_bits(np.asarray(one), np.asarray(other))


def check_same(plan: Plan, name: str, one: object, other: object, who: str, whose: str) -> None:
    """Refuses a variable that has to be equal everywhere, and differs.

    Args:
        plan: By which it has to be.
        name: The variable.
        one: What was sent.
        other: What it has to equal.
        who: Who sent it.
        whose: Who has the other one.

    Raises:
        NotSameError: It differs.
        WeightsTypeError: It cannot be compared.
    """
    same = alike(one, other)
    if same is None:
        text = f"{who}: {name!r} is {a_type(type(one), module=True)}, which cannot be compared with others"
        raise WeightsTypeError(text, contributor=who, name=name)
    if not same:
        raise plan.not_same(name, who, whose)


def _check_no_difference(plan: Plan, name: str, value: object, base: object, who: str) -> None:
    """Refuses the difference of a variable that has to stay the same, unless it is 0 where that is finite.

    Raises:
        NotSameError: It is another.
    """
    array, own = (opened({name: one}, who).on_host()[name] for one in (value, base))
    if array.shape != own.shape or not is_no_difference(array, np.asarray(own)):
        raise plan.not_same(name, who, "like")


def is_no_difference(array: Array, base: Array) -> bool:
    """Whether a difference is 0 everywhere, or NaN where what it is the difference to is not finite."""
    return not array[finite_elements(base)].any() and bool(np.isnan(array[~finite_elements(base)]).all())


def no_difference(kept: WeightDict) -> dict[str, Any]:
    """Zeros in the place of variables that stay as they are, which is their difference."""
    held = opened(kept, "like")
    zeros = {name: np.zeros_like(array) for name, array in held.on_host().items()}
    return zeros if held.place is None else zeros | as_tensors({n: zeros[n] for n in held.owners}, held.place)


def held_by(plan: Plan, like: Any) -> dict[str, Any]:
    """What of the global model `Apart` compares contributions with: values that have to be the same, other forms.

    Args:
        plan: Which variables are apart.
        like: The global model; its tensors need have no values, and then contributions are compared with one another.
    """
    values = {n: copied(like[n]) for n in plan.names("same") if n in like and _has_values(n, plain(like[n]))}
    combined = schema_of({name: like[name] for name in plan.names("max", "sum") if name in like}, "like")
    return values | {name: placeholder(*form) for name, form in combined.items()}


def _has_values(name: str, value: Any) -> bool:
    """Whether a variable is more than its shape and dtype, as what lies on torch's meta device is not."""
    framework = framework_of(type(value))
    try:
        _ = framework is None or framework.check(value, "like", name)
    except DtypeError:  # it cannot be averaged, but compared
        return True
    except WeightsTypeError:
        return False
    return True


class Apart:
    """What becomes of the variables that are not averaged, as contributions come.

    Sums of floating-point numbers are kept exactly, in the domain of `exact`, and rounded at the end, so that they do
    not depend on the order; those of integers have to stay within their dtype. Of zeros the largest is +0.

    Args:
        plan: Which variables these are.
        like: These variables of the global model, as `held_by` gives them, with which contributions have to agree;
            None: the first contribution decides.
        kind: Whether contributions are full weights or differences to it.
    """

    def __init__(self, plan: Plan, like: WeightDict | None = None, kind: Kind = Kind.FULL) -> None:
        self.plan = plan
        self._like: WeightDict = {} if like is None else like
        self._kind = kind
        self._same: dict[str, tuple[str, Any]] = {}
        self._largest: dict[str, Array] = {}
        self._sums: dict[str, tuple[ExactSums, Array]] = {}
        self._counts: dict[str, tuple[Array, Array]] = {}  # of integers, in int64
        self._places: dict[str, Place] = {}

    @property
    def _likes(self) -> dict[str, Array]:
        """An array of the shape and dtype of each variable that is combined."""
        known = {name: like for name, (_, like) in (*self._sums.items(), *self._counts.items())}
        return {name: self._like[name] for name in self.plan.names("max", "sum") if name in self._like} | (
            self._largest | known
        )

    def check(self, parts: Parts, who: str) -> Parts:
        """Opens the variables of a contribution, and refuses what does not agree with what came before.

        Returns:
            The same with arrays.

        Raises:
            ContributionError: One of its children.
            ExactDomainError: A value that is to be summed is outside of the domain of exact sums.
        """
        for name, value in parts.same.items():
            if name in self._like and self._kind is Kind.DIFF:
                _check_no_difference(self.plan, name, value, self._like[name], who)
                continue
            model = ("like", self._like[name]) if name in self._like else (who, value)
            first, first_value = self._same.get(name, model)
            check_same(self.plan, name, value, first_value, who, first)
        held = opened(parts.beside, who)
        arrays = as_weight_dict(held.on_host(), who)
        before = self._likes
        known = {name: before[name] for name in arrays if name in before}
        Schema.of(known).check({name: arrays[name] for name in known}, who)
        Schema.of(arrays, who)
        check_finite(arrays, who)
        summed = {name: arrays[name] for name in parts.summed}
        check_domain(summed, 1.0, who)
        for name, array in summed.items():
            if array.dtype.kind in "iub":
                self._counted(name, array, who)
        if held.place is not None:
            self._places = {name: held.place.only([name]) for name in held.owners} | self._places
        return Parts(self.plan, {name: arrays[name] for name in parts.largest}, summed, parts.same)

    def _counted(self, name: str, array: Array, who: str, dtype: np.dtype[Any] | None = None) -> Array:
        """The sum of integers with those of an array.

        Raises:
            IntegerRangeError: It leaves the range of the dtype, or int64 on the way.
        """
        dtype = array.dtype if dtype is None else dtype
        before = self._counts[name][0] if name in self._counts else np.zeros(array.shape, np.int64)
        bounds = (0, 1) if dtype == np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        fits = not array.size or int(np.abs(before).max()) + magnitude(array) < 2**63
        after = before + array.astype(np.int64) if fits else before
        if not fits or (after.size and not bounds[0] <= int(after.min()) <= int(after.max()) <= bounds[1]):
            text = f"{who}: {name!r} is summed, and with that of the others the sum leaves the range of {dtype}"
            raise IntegerRangeError(text, contributor=who, name=name)
        return after

    def take(self, parts: Parts, who: str, *, counts: bool = True) -> None:
        """Takes in variables that `check` has opened.

        Args:
            parts: What it returned.
            who: Their sender.
            counts: Whether the contribution counts by more than 0; else only what is the same everywhere does.
        """
        for name, value in parts.same.items():
            self._same.setdefault(name, (who, copied(value)))
        for name, array in parts.largest.items() if counts else ():
            now = np.array(array if name not in self._largest else np.maximum(self._largest[name], array))
            now[now == 0] = 0  # of zeros of both signs numpy's choice depends on the order
            self._largest[name] = now
        for name, array in parts.summed.items() if counts else ():
            if array.dtype.kind in "iub":
                self._counts[name] = self._counted(name, array, who), np.zeros_like(array)
                continue
            sums, like = self._sums.get(name) or (ExactSums([array.size]), np.zeros_like(array))
            sums.add(kernels.resolve(device="cpu"), [[np.array(array, order="C")]], [1.0])
            self._sums[name] = sums, like

    def check_mergeable(self, other: "Apart") -> None:
        """Refuses what `merge` could not take in.

        Raises:
            ContributionError: Variables differ that have to be the same, or the sum of integers leaves their range.
        """
        likes = {name: np.zeros_like(like) for name, like in other._likes.items() if name not in other._largest}
        if other._likes:
            self.check(Parts(self.plan, other._largest, likes, other.same), "other")
        for name, (count, like) in other._counts.items():
            self._counted(name, count, "other", like.dtype)

    def merge(self, other: "Apart") -> None:
        """Takes in what another has; it stays as it is. `check_mergeable` comes first."""
        self.take(Parts(self.plan, other._largest, {}, other.same), "other")
        for name, (count, like) in other._counts.items():
            self._counts[name] = self._counted(name, count, "other", like.dtype), like
        for name, (sums, like) in other._sums.items():
            mine, _ = self._sums.get(name) or (ExactSums([like.size]), like)
            mine.merge(sums)
            self._sums[name] = mine, like
        self._places = self._places or other._places

    @property
    def same(self) -> dict[str, Any]:
        """The variables that are the same everywhere."""
        return {name: value for name, (_, value) in self._same.items()}

    def values(self) -> dict[str, Any]:
        """The results: new arrays, or tensors where the first contribution has them.

        Raises:
            NonFiniteError: A sum leaves the range of its dtype.
        """
        made: dict[str, Array] = {name: np.array(array) for name, array in self._largest.items()}
        made |= {name: np.array(count, like.dtype) for name, (count, like) in self._counts.items()}
        for name, (sums, like) in self._sums.items():
            made[name] = np.empty_like(like, order="C")
            sums.divide(kernels.resolve(device="cpu"), [0], Fraction(1), [made[name]])
        check_finite(made, "the sum of all")
        tensors = {name: as_tensors({name: made[name]}, place)[name] for name, place in self._places.items()}
        return {name: copied(value) for name, value in self.same.items()} | made | tensors


def copied(value: Any) -> Any:
    """The same value in memory that nobody else holds; as it is where it cannot be changed."""
    held = plain(value)
    framework = framework_of(type(held))
    return copy.deepcopy(held) if framework is None else framework.copied(held)


def assembled(order: Sequence[str], mean: WeightDict, values: Mapping[str, Any], out: Any) -> WeightDict:
    """The whole result: what was averaged, and what was not.

    Args:
        order: Names of the variables of the result.
        mean: What was averaged, in `out` already if that was given.
        values: All others.
        out: A dict to write to, or None.
    """
    if out is None:
        return {name: mean[name] if name in mean else values[name] for name in order}
    for name, value in values.items():
        target = plain(out[name])
        framework = framework_of(type(target))
        if framework is not None:
            problem = framework.unwritable(target)
            if problem is not None:
                raise OutputError(f"out: {name!r} {problem}", name=name)
            framework.write(target, value)
        elif isinstance(target, np.ndarray):
            np.copyto(target, value)
        else:
            out[name] = value
    result: WeightDict = out
    return result


def part_of(out: Any, order: Sequence[str], schema: Schema) -> dict[str, Any]:
    """What of `out=` the average is written to.

    Raises:
        NamesError: It has other variables than the result.
    """
    found = items_of(out, "out")
    missing, extra = [n for n in order if n not in found], [n for n in found if n not in order]
    if missing or extra:
        text = f"out has other variables than expected: {misses_and_adds(missing, extra)}"
        raise NamesError(text, missing=tuple(missing), extra=tuple(extra[:MOST_NAMED]))
    return {name: found[name] for name in schema}
