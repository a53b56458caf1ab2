"""Opens what a client sent and checks it, once and whole, against what its round expects.

A job accepts what has one clear meaning even where it is not as the global model has it: numbers in any form, another
width of floating-point numbers, a part of the model, constants that are not finite. Everything else is refused by an
error that names who and what. Which of several parts counts is left to `fed_learn.aggregation.round`.
"""

import hashlib
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from fed_learn.aggregation.arrays import contiguous
from fed_learn.aggregation.tensor_outputs import as_tensors
from fed_learn.aggregation.tensors import Opened, label_of, opened_contribution, without_tensors
from fed_learn.contribution import Contribution, Kind, check_contributor, check_countable, check_terms, checked_n_iter
from fed_learn.errors import FedLearnError, NonFiniteError, WeightsTypeError, as_failure, described
from fed_learn.kernels.base import Kernel
from fed_learn.values import numbers_as_arrays
from fed_learn.weights import (
    PLAIN,
    Array,
    FrozenWeights,
    Schema,
    WeightDict,
    as_weight_dict,
    check_differences,
    check_finite,
    finite_elements,
    items_of,
    listed,
    same_values,
)

Tell = Callable[[str], None]
"""Takes a sentence on what is accepted although it is not as the global model has it."""


@dataclass(frozen=True, eq=False)
class Checked:
    """A contribution that has been opened and has passed every check.

    Attributes:
        contribution: It, with plain numbers, and its weights in the order and the dtypes of the global model.
        arrays: The same weights as arrays.
        averaged: Names of the variables that are averaged: all that were sent but `constants`.
        filled: Variables that are not finite where the global model is not: what is averaged in their place, 0 there.
        unchanged: Names of those that are as a whole what they are in the global model.
        form: Equal for contributions of the same variables; None: all of the global model.
        unless_alone: Why it is refused if nobody else sent one of this form.
    """

    contribution: Contribution
    arrays: WeightDict
    averaged: tuple[str, ...]
    filled: WeightDict = field(default_factory=dict)
    unchanged: frozenset[str] = frozenset()
    form: Hashable = None
    unless_alone: NonFiniteError | None = None

    def to_average(self, names: Sequence[str]) -> Contribution:
        """The contribution with some of its variables, as they are averaged."""
        weights = self.contribution.weights
        assert weights is not None
        if not self.filled and len(names) == len(weights):
            return self.contribution
        return replace(self.contribution, weights={name: self.filled.get(name, weights[name]) for name in names})

    @cached_property
    def averages(self) -> frozenset[str]:
        """The names in `averaged`, for looking up one of a hundred thousand."""
        return frozenset(self.averaged)

    @property
    def constants(self) -> dict[str, Array]:
        """Variables that are not averaged: not finite, and the global model is not known."""
        return {name: array for name, array in self.arrays.items() if name not in self.averages}


@dataclass(frozen=True, eq=False)
class Terms:
    """What the contributions of a round have to agree with.

    Attributes:
        schema: Names, shapes and dtypes of the global model; empty: nobody knows them yet.
        model: The global model, for constants in it that are not finite; None: it is not at hand.
        kind: The kind that is expected.
        round: The round; None: unknown.
        parts: Whether a part of the variables may be sent.
        own: Whether the weights are copied, so that nobody else can change them.
    """

    schema: Schema
    model: WeightDict | None = None
    kind: Kind | None = None
    round: int | None = None
    parts: bool = True
    own: bool = True

    def check(self, sent: Contribution, tell: Tell, contributors: Container[str] = ()) -> Checked:
        """Checks all but whether values are finite.

        Args:
            sent: What a client sent. Untrusted.
            tell: Is told of what is accepted although it is not as the global model has it.
            contributors: Names that have contributed already.

        Raises:
            ContributionError: One of its children, naming the contributor, the variable and the cause.
        """
        try:
            return self._checked(sent, tell, contributors)
        except FedLearnError:
            raise
        except BaseException as error:  # an object that raises wherever one looks
            as_failure(error)
            who = label_of(sent.contributor)
            raise WeightsTypeError(f"{who}: sent what cannot be read: {described(error)}", contributor=who) from error

    def _checked(self, sent: Contribution, tell: Tell, contributors: Container[str]) -> Checked:
        aggregation_weight = check_terms(sent, kind=self.kind, round=self.round, contributors=contributors)
        who = check_contributor(sent.contributor)
        check_countable(aggregation_weight, who)
        if isinstance(sent.weights, Mapping) and type(sent.weights) not in PLAIN:
            sent = replace(sent, weights=items_of(sent.weights, who))
        opened, found = opened_contribution(sent, None, on_host=True)
        arrays = self._arrays(opened.weights, who, tell)
        if sent.kind is Kind.DIFF:
            check_differences(Schema.of(arrays, who), who)
        weights = _owned(arrays, sent.weights) if self.own else _as_sent(arrays, opened.weights, sent.weights, found)
        contribution = Contribution(
            who,
            weights,
            aggregation_weight,
            n_iter=checked_n_iter(sent.n_iter, who),
            round=sent.round if self.round is None else self.round,
            kind=sent.kind,
            metrics=sent.metrics,
            info=sent.info,
        )
        arrays = dict(weights) if self.own else arrays
        return Checked(contribution, arrays, tuple(arrays), form=self._form(arrays))

    def scanned(self, checked: Checked, kernel: Kernel) -> Checked:
        """The same, once a kernel has found no NaN and no infinity but the constants of the global model.

        Raises:
            NonFiniteError: Says which value of which variable is not finite.
        """
        arrays = checked.arrays
        columns = [contiguous(array) for array in arrays.values()]
        flagged = [name for name, flag in zip(arrays, kernel.not_finite(columns), strict=True) if flag]
        return self.with_constants(checked, flagged) if flagged else checked

    def with_constants(self, checked: Checked, flagged: Sequence[str]) -> Checked:
        """The same, where the values of some variables that are not finite are constants.

        They are if the global model has the same ones in the same places; if it is not known, if another contributor
        sends the same.

        Raises:
            NonFiniteError: They are not.
        """
        contribution, arrays = checked.contribution, checked.arrays
        who, kind = contribution.contributor, contribution.kind
        if not self.schema:
            return self._with_constants_of_its_own(checked, flagged)
        filled: dict[str, Any] = {}
        unchanged = set()
        for name in flagged:
            base, array = self._base(name), arrays[name]
            if base is None or not _agrees(array, base, kind):
                raise _not_finite(name, array, who)
            filled[name] = np.where(finite_elements(array), array, np.zeros((), array.dtype))
            if not filled[name].any() if kind is Kind.DIFF else same_values(array, base):
                unchanged.add(name)
        _, found = opened_contribution(contribution, None)
        if found.place is not None:  # tensors stay tensors
            filled = as_tensors(filled, found.place)
        return replace(checked, filled=filled, unchanged=frozenset(unchanged))

    def _with_constants_of_its_own(self, checked: Checked, flagged: Sequence[str]) -> Checked:
        """Where the global model is not known: infinities are kept aside until another sends the same; NaN is NaN."""
        arrays = dict(checked.arrays)
        first = _not_finite(flagged[0], arrays[flagged[0]], checked.contribution.contributor)
        for name in flagged:
            if np.isnan(arrays[name]).any():
                raise _not_finite(name, arrays[name], checked.contribution.contributor)
            arrays[name] = arrays[name].copy()
        digests = tuple(hashlib.sha256(np.ascontiguousarray(arrays[name]).tobytes()).digest() for name in flagged)
        infinite = frozenset(flagged)
        averaged = tuple(name for name in arrays if name not in infinite)
        form = (checked.form, averaged, digests)
        return replace(checked, arrays=arrays, averaged=averaged, form=form, unless_alone=first)

    def _arrays(self, weights: Any, who: str, tell: Tell) -> dict[str, Array]:
        """The weights as arrays in native byte order, in the dtypes and the order of the global model."""
        schema = self.schema
        if schema and isinstance(weights, dict) and type(weights) in PLAIN and schema.describes(weights):
            return dict(weights)  # the usual case
        arrays = as_weight_dict(numbers_as_arrays(weights, schema), who)
        if not schema:
            return {name: np.asarray(arrays[name], dtype) for name, (_, dtype) in Schema.of(arrays, who).items()}
        if not self.parts and len(arrays) < len(schema):
            raise schema.names_error(arrays, who)
        fit, rounded = schema.fit(arrays, who)
        for (given, expected), names in rounded.items():
            if given.kind in "iu":  # no bit of them is lost
                continue
            tell(f"{who}: {listed(names)} came as {given} and is rounded to {expected}, as the global model has it")
        return fit

    def _form(self, arrays: WeightDict) -> Hashable:
        if self.schema:
            return None if len(arrays) == len(self.schema) else tuple(arrays)
        return tuple(sorted((name, array.shape, array.dtype.str) for name, array in arrays.items()))

    def _base(self, name: str) -> Array | None:
        """A variable of the global model, as an array."""
        if self.model is None or name not in self.model:
            return None
        return np.asarray(without_tensors({name: self.model[name]}, "global model")[name])


def _owned(arrays: dict[str, Array], sent: Any) -> WeightDict:
    """A copy, unless what was sent is frozen already. Shapes are right, so it is no larger than a model."""
    if type(sent) is not FrozenWeights or any(sent[name] is not array for name, array in arrays.items()):
        return FrozenWeights(arrays)
    return sent if list(sent) == list(arrays) else FrozenWeights.adopt(arrays)


def _as_sent(arrays: dict[str, Array], opened: Any, sent: Any, found: Opened) -> WeightDict:
    """What was sent itself, be it arrays or tensors, but where it had to be rounded."""
    if not found.owners:
        return arrays
    changed = {name: array for name, array in arrays.items() if array is not opened[name]}
    place = found.place
    assert place is not None
    return {**{name: sent[name] for name in arrays}, **as_tensors(changed, place)}


def _agrees(array: Array, base: Array, kind: Kind) -> bool:
    """Whether values that are not finite are just those of the global model."""
    bad, place = ~finite_elements(array), ~finite_elements(base)
    if kind is Kind.DIFF:  # −inf minus −inf is NaN
        return not (bad & ~place).any() and bool(np.isnan(array[bad]).all())
    return bool((bad == place).all()) and same_values(array[bad], base[bad])


def _not_finite(name: str, array: Array, who: str) -> NonFiniteError:
    try:
        check_finite({name: array}, who)
    except NonFiniteError as error:
        return error
    raise AssertionError(f"a kernel has found {name!r} not finite, and it is")
