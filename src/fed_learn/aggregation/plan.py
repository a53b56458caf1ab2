"""Which variables are not averaged, by their policies: `Plan`, by which a contribution is taken apart into `Parts`.

They are taken out of a weight dict before it is opened, so that what is averaged goes its usual way. Regular
expressions, and what is known as a code by its name and dtype, are left to `fed_learn.policies`; what becomes of these
variables to `apart`, and of those of a job with a global model to `batch`.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fed_learn.adapters.tensors import framework_of, plain
from fed_learn.aggregation.tensors import schema_of
from fed_learn.errors import NamesError, NotSameError
from fed_learn.policies import Policies, codes_in, expression_of
from fed_learn.weights import PLAIN, Schema, WeightDict, items_of, listed, misses_and_adds, native_dtype

logger = logging.getLogger(__name__)

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
        of_job: Whether contributions come from clients, whose names for variables that the global model lacks meet no
            expression: that may be slow on names made for it.
    """

    policies: Policies
    of: Mapping[str, str]
    codes: Mapping[str, str]
    open: bool = False
    of_job: bool = False

    def names(self, *policies: str) -> list[str]:
        """Names of the known variables with one of these policies."""
        return [name for name, policy in self.of.items() if policy in policies]

    def schema(self, schema: Schema, *policies: str) -> Schema:
        """The part of a schema with one of these policies."""
        return Schema({name: form for name, form in schema.items() if self.of.get(name, "mean") in policies})

    def apply(self, weights: Any, who: str) -> tuple[Any, Parts | None]:
        """What of weights is averaged, and what is not; what the global model or a client keeps is in neither.

        Args:
            weights: A weight dict, if the client has sent one; anything else is left for the checks to judge.
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
        for name, value in items.items():
            place = places.get(self._policy(name, codes))
            if place is not None:
                place[name] = value
        if self.open and len(averaged) == len(items):
            return weights, None
        return averaged, parts

    def _policy(self, name: Any, codes: Collection[str]) -> str:
        policy = self.of.get(name)
        if policy is not None or type(name) is not str:
            return policy or "mean"
        if self.open:
            return self.policies.of(name) or ("same" if name in codes else "mean")
        # A variable that the global model lacks is an extra one, and refused; not one that is local to the client.
        return "local" if not self.of_job and self.policies.of(name) == "local" else "mean"

    def check_names(self, parts: Parts, who: str) -> None:
        """Refuses a contribution without one of the variables that are not averaged.

        Raises:
            NamesError: Says which.
        """
        missing = [n for n in self.names("same", "max", "sum") if n not in parts.same and n not in parts.beside]
        if missing:
            text = f"{who}: has other variables than expected: {misses_and_adds(missing, [])}"
            raise NamesError(text, contributor=who, name=missing[0], missing=tuple(missing))

    def not_same(self, name: str, who: str, whose: str) -> NotSameError:
        """The error for a variable that is not the same as somebody's, and has to be.

        Args:
            name: The variable.
            who: Who sent it.
            whose: Whose is another, as in `"the global model"`.
        """
        why = f"it is {self.codes[name]}" if name in self.codes else "its policy is 'same'"
        counted = ", 'mean' averages it all the same" if "random" in why else ""
        return NotSameError(
            f"{who}: {name!r} is not the same as that of {whose}, and has to be equal everywhere: {why}. "
            f"policies={{{expression_of(name)!r}: 'keep'}} leaves the global model's own, 'local' each client's"
            f"{counted}; "
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
    known: Mapping[Any, Any] = {}
    if isinstance(weights, Mapping):
        known = weights if type(weights) in PLAIN else items_of(weights, who)
    codes = codes_of(known)
    if not policies and not codes and (policies is None or isinstance(policies, Mapping)):
        return None
    own = policies if isinstance(policies, Policies) else Policies(policies)
    every = dict.fromkeys([name for name in known if isinstance(name, str)])
    found = {name: own.of(name) or ("same" if name in codes else "mean") for name in every}
    for name, why in codes.items():
        if found[name] != "same" and found[name] not in ("keep", "local") and "random" not in why:
            raise ValueError(
                f"policies: {name!r} has the policy {found[name]!r}, but it is {why}, which have no {found[name]}: "
                "'same', 'keep' or 'local' fit"
            )
    return Plan(own, found, codes)


def not_kept(names: Sequence[str]) -> ValueError:
    """The error where variables are to stay as they are in a global model that is not given."""
    return ValueError(f"policies: {listed(names)} are kept as they are in the global model: give it as like=")


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
    plan = replace(plan, of_job=True)
    averaged = plan.schema(schema, "mean")
    if not averaged:
        raise ValueError("policies leave no variable of the global model to be averaged")
    return plan, averaged, plan.schema(schema, "max", "sum", "same")


def check_fitting(policies: Mapping[str, str] | None, weights: object, *, of_job: bool = False) -> None:
    """Refuses expressions that are found in no name of a model, and so would do nothing, but for local variables.

    These may be at the clients alone.

    Args:
        policies: The user's.
        weights: The global model, or the first contribution; where that is none, or has no variables, nothing is known.
        of_job: Whether it is the global model of a job: then a warning says where local variables are none of it.

    Raises:
        ValueError: Says which expression.
    """
    if not policies or not isinstance(weights, Mapping):
        return
    names = [name for name in weights if isinstance(name, str)]
    for pattern, policy in policies.items() if names else ():
        if any(Policies({pattern: policy}).of(name) for name in names):
            continue
        text = f"policies: {pattern!r} fits none of the {len(names)} variables ({listed(names, 3)})"
        if policy != "local":
            raise ValueError(text)
        if of_job:
            logger.warning("%s: right if only clients have such, and they are then never sent", text)


def codes_of(weights: Mapping[Any, Any]) -> dict[str, str]:
    """Variables that are codes, and what they are: by their classes, or by their names and dtypes.

    Example:
        >>> from io import BytesIO
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
    return any(kind in text for kind in ("int8", "int16", "int32", "qint", "quint", "key<"))
