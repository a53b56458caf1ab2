"""Variables that are not averaged: which they are by their policies (`Plan`), and what becomes of them (`Apart`).

They are taken out of a weight dict before it is opened, so that what is averaged goes its usual way. Regular
expressions, and what is known as a code without any, are left to `fed_learn.policies`; the comparison with the global
model of a job to `batch`.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from typing import Any, NoReturn

import numpy as np

from fed_learn import kernels
from fed_learn.adapters.tensors import framework_of, plain
from fed_learn.aggregation.exact import ExactSums, check_domain
from fed_learn.aggregation.integers import magnitude
from fed_learn.aggregation.tensors import Place, as_tensors, opened, schema_of
from fed_learn.errors import IntegerRangeError, NamesError, NotSameError, OutputError, WeightsTypeError, a_type
from fed_learn.limits import MOST_NAMED
from fed_learn.policies import Policies, codes_in
from fed_learn.weights import (
    PLAIN,
    Array,
    Schema,
    WeightDict,
    as_weight_dict,
    check_finite,
    items_of,
    listed,
    misses_and_adds,
    native_dtype,
    same_bits,
)

MOST_STRANGE, LONGEST_STRANGE = 1000, 200
"""Names that the global model does not have are looked at by expressions only as far as that cannot take long."""
EXTRA_STATE = "_extra_state"
"""How the name of what torch modules hand out by `get_extra_state` ends."""


@dataclass(frozen=True, eq=False)
class Parts:
    """What of a contribution is not averaged.

    Attributes:
        largest: Variables of which the largest values count, as they came, or as arrays once they are checked.
        summed: Variables that are summed.
        same: Variables that have to be equal everywhere, as they came.
        plan: By which they are apart.
    """

    plan: "Plan"
    largest: dict[str, Any] = field(default_factory=dict)
    summed: dict[str, Any] = field(default_factory=dict)
    same: dict[str, Any] = field(default_factory=dict)

    def only(self, name: str) -> "Parts":
        """One of them."""
        parts = (
            {n: value for n, value in part.items() if n == name} for part in (self.largest, self.summed, self.same)
        )
        return Parts(self.plan, *parts)

    def emptied(self) -> "Parts":
        """The same names without their values."""
        nothing = np.empty(0)
        return Parts(self.plan, *(dict.fromkeys(part, nothing) for part in (self.largest, self.summed, self.same)))

    @property
    def beside(self) -> dict[str, Any]:
        """What is combined in other ways than the rest."""
        return self.largest | self.summed


@dataclass(frozen=True, eq=False)
class Plan:
    """The variables that are not averaged, by name.

    Attributes:
        policies: The user's.
        of: The policy of each known variable.
        codes: Why a variable among them is one that has no mean.
        open: Whether the global model is not known, and each contribution is taken apart by its own names.
    """

    policies: Policies
    of: Mapping[str, str]
    codes: Mapping[str, str]
    open: bool = False

    def names(self, *policies: str) -> list[str]:
        """Names of the known variables with one of these policies."""
        return [name for name, policy in self.of.items() if policy in policies]

    def schema(self, schema: Schema, *policies: str) -> Schema:
        """The part of a schema with one of these policies."""
        return Schema({name: form for name, form in schema.items() if self.of.get(name, "mean") in policies})

    def apply(self, weights: Any, who: str) -> tuple[Any, Parts | None]:
        """What of weights is averaged, and what is not; what the global model or a client keeps is in neither.

        Args:
            weights: What should be a weight dict; anything else is left for the checks to judge.
            who: Its sender.

        Returns:
            The parts are None where the global model is not known, and all is averaged.

        Raises:
            WeightsTypeError, NamesError: It cannot be read.
        """
        parts = Parts(self)
        if not isinstance(weights, Mapping):
            return weights, None if self.open else parts
        averaged: dict[Any, Any] = {}
        places = {"mean": averaged, "max": parts.largest, "sum": parts.summed, "same": parts.same}
        items = items_of(weights, who)
        codes = codes_of(items) if self.open else {}
        strange = sum(name not in self.of for name in items) > MOST_STRANGE
        for name, value in items.items():
            place = places.get("mean" if strange and not self.open else self._policy(name, codes))
            if place is not None:
                place[name] = value
        if self.open and len(averaged) == len(items):
            return weights, None
        return averaged, parts

    def _policy(self, name: Any, codes: Collection[str]) -> str:
        policy = self.of.get(name)
        if policy is not None or type(name) is not str:
            return policy or "mean"
        own = self.policies.of(name) if self.policies and (self.open or len(name) <= LONGEST_STRANGE) else None
        if self.open:
            return own or ("same" if name in codes else "mean")
        # One that the global model does not have is no mistake if the client was to keep it to itself.
        return own if own in ("keep", "local") else "mean"

    def check_names(self, parts: Parts, who: str) -> None:
        """Refuses a contribution without one of the variables that are not averaged.

        Raises:
            NamesError: Says which.
        """
        missing = [n for n in self.names("same", "max", "sum") if n not in parts.same and n not in parts.beside]
        if missing:
            text = f"{who}: has other variables than expected: {misses_and_adds(missing, [])}"
            raise NamesError(text, contributor=who, name=missing[0], missing=tuple(missing))

    def check_same(self, name: str, one: object, other: object, who: str, whose: str) -> None:
        """Refuses a variable that has to be equal everywhere, and differs.

        Args:
            name: The variable.
            one: What was sent.
            other: What it has to equal.
            who: Who sent it.
            whose: Who has the other one, as in `"global model"`.

        Raises:
            NotSameError: It differs.
            WeightsTypeError: It cannot be compared.
        """
        same = alike(one, other)
        if same is None:
            text = f"{who}: {name!r} is {a_type(type(one), module=True)}, which cannot be compared with others"
            raise WeightsTypeError(text, contributor=who, name=name)
        if not same:
            self.refuse(name, who, whose)

    def refuse(self, name: str, who: str, whose: str) -> NoReturn:
        """Says that a variable is not the same as somebody's, and has to be; see `check_same`."""
        why = f"it is {self.codes[name]}" if name in self.codes else "its policy is 'same'"
        raise NotSameError(
            f"{who}: {name!r} is not the same as that of {whose}, and has to be equal everywhere: {why}. "
            f"policies={{{name!r}: 'keep'}} leaves the global model's own, 'local' each client's; "
            "fl.get_weights(model, only=...) reads only what was trained",
            contributor=who,
            name=name,
        )


def planned(policies: Mapping[str, str] | None, weights: object, who: str) -> Plan | None:
    """What becomes of the variables of a model; None if all are averaged.

    Args:
        policies: The user's, or None.
        weights: The global model, or the first contribution; anything but a mapping has no variables.
        who: Whose weights these are.

    Raises:
        ValueError: A policy wants the mean of codes; see `Policies`.
        ContributionError: The weights cannot be read.
    """
    own = policies if isinstance(policies, Policies) else Policies(policies)
    known: Mapping[Any, Any] = {}
    if isinstance(weights, Mapping):
        known = weights if type(weights) in PLAIN else items_of(weights, who)
    codes = codes_of(known)
    if not own and not codes:
        return None
    every = dict.fromkeys([name for name in known if isinstance(name, str)])
    found = {name: own.of(name) or ("same" if name in codes else "mean") for name in every}
    for name, why in codes.items():
        if found[name] != "same" and found[name] not in ("keep", "local") and "random" not in why:
            raise ValueError(
                f"policies: {name!r} has the policy {found[name]!r}, but it is {why}, which have no {found[name]}: "
                "'same', 'keep' or 'local' fit"
            )
    return Plan(own, found, codes)


def schemas_of(policies: Policies, model: WeightDict | None) -> tuple[Plan | None, Schema | None, Schema | None]:
    """What becomes of the variables of a job's global model.

    Args:
        policies: The user's.
        model: The global model; None or empty: it is not known.

    Returns:
        Which variables are not averaged, None if all are; the schema of those that are; that of the others that are
        sent. The schemas are None where the global model is not known.

    Raises:
        ValueError: Policies leave nothing to be averaged, or one wants the mean of codes.
    """
    schema = None if model is None else schema_of(model, "global model")
    if not schema:
        if "keep" in policies.values():
            raise ValueError("policies: nothing can be kept as it is in the global model, which is not known")
        return Plan(policies, {}, {}, open=True), None, None
    plan = planned(policies, model, "global model")
    if plan is None:
        return None, schema, None
    averaged = plan.schema(schema, "mean")
    if not averaged:
        raise ValueError("policies leave no variable of the global model to be averaged")
    return plan, averaged, plan.schema(schema, "max", "sum", "same")


def check_fitting(policies: Mapping[str, str] | None, weights: object) -> None:
    """Refuses expressions that are found in no name of a model, and so would do nothing, but for local variables.

    These may be at the clients alone.

    Args:
        policies: The user's.
        weights: The global model, or the first contribution; where that is none, or has no variables, nothing is known.

    Raises:
        ValueError: Says which expression.
    """
    names = [name for name in weights if isinstance(name, str)] if policies and isinstance(weights, Mapping) else []
    for pattern, policy in (policies or {}).items() if names else ():
        if policy != "local" and not any(Policies({pattern: policy}).of(name) for name in names):
            raise ValueError(f"policies: {pattern!r} fits none of the {len(names)} variables ({listed(names, 3)})")


def codes_of(weights: Mapping[Any, Any]) -> dict[str, str]:
    """Variables that are codes, and what they are: by their classes, or by their names and dtypes.

    Example:
        >>> codes_of({"w": np.zeros(2), "te._extra_state": BytesIO(b"pickled")})
        {'te._extra_state': 'the extra state of a module'}
    """
    owners = {kind: framework_of(kind) for kind in {*map(type, weights.values())} - {np.ndarray}}
    strange = None in owners.values()
    if not strange and not any(map(_may_be_code, {value.dtype for value in weights.values()})):
        return {}
    found: dict[str, str] = {}
    forms = Schema()
    for name, value in weights.items():
        if not isinstance(name, str):
            continue
        held = plain(value)
        framework, dtype = framework_of(type(held)), None
        if framework is not None:
            dtype, why = framework.dtype(held), framework.code(held)
            found |= {} if why is None else {name: why}
        elif type(held) is np.ndarray or isinstance(held, np.generic):
            dtype = native_dtype(held.dtype)
        elif name.endswith(EXTRA_STATE):
            found[name] = "the extra state of a module"
        if dtype is not None:
            forms[name] = (tuple(held.shape) if _may_be_code(dtype) else (), dtype)
    found = codes_in(forms) | found
    return {name: found[name] for name in weights if name in found}


@lru_cache(maxsize=100)
def _may_be_code(dtype: object) -> bool:
    """Whether a dtype of any framework is one in which there are codes."""
    text = str(dtype)
    return any(kind in text for kind in ("uint8", "int8", "qint", "quint", "uint32", "key<"))


def alike(one: Any, other: Any) -> bool | None:
    """Whether two values are equal, bit by bit; None if they are of a kind that cannot be compared.

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
        found = [alike(*pair) for pair in zip(one, other, strict=True)]
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


class Apart:
    """What becomes of the variables that are not averaged, as contributions come.

    Sums of floating-point numbers are kept exactly, in the domain of `exact`, and rounded at the end, so that they do
    not depend on the order; those of integers have to stay within their dtype. Of zeros the largest is +0.

    Args:
        plan: Which variables these are.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._same: dict[str, tuple[str, Any]] = {}
        self._largest: dict[str, Array] = {}
        self._sums: dict[str, tuple[ExactSums, Array]] = {}
        self._counts: dict[str, tuple[Array, Array]] = {}  # of integers, in int64
        self._places: dict[str, Place] = {}

    @property
    def _likes(self) -> dict[str, Array]:
        """An array of the shape and dtype of each variable that is combined."""
        return self._largest | {name: like for name, (_, like) in (*self._sums.items(), *self._counts.items())}

    def check(self, parts: Parts, who: str) -> Parts:
        """Opens the variables of a contribution, and refuses what does not agree with what came before.

        Returns:
            The same with arrays.

        Raises:
            ContributionError: One of its children.
            ExactDomainError: A value that is to be summed is outside of the domain of exact sums.
        """
        for name, value in parts.same.items():
            first, first_value = self._same.get(name, (who, value))
            self.plan.check_same(name, value, first_value, who, first)
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
            text = f"{who}: {name!r} is summed, and the sum leaves the range of {dtype}"
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
        check_finite(made, "sum")
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
