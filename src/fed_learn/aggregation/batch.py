"""Opens and checks what a client sent, once and whole. Means, rules and rounds take the result, a `Checked`.

`Terms` say what is expected. Those of `weighted_average` and `Accumulator` are strict: names, shapes and dtypes must be
the same. Those of a job also accept what differs from the global model and has one clear meaning: numbers in any form,
another width of floating-point numbers, a part of the model, constants that are not finite. Everything else is refused
by an error that names the contributor and the variable. Which of several parts counts is left to `agreement`.
"""

import hashlib
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import is_
from typing import Any, Self

import numpy as np

from fed_learn.aggregation.apart import is_no_difference
from fed_learn.aggregation.arrays import contiguous
from fed_learn.aggregation.exact import check_domain
from fed_learn.aggregation.outputs import new_arrays
from fed_learn.aggregation.plan import Parts, Plan
from fed_learn.aggregation.tensors import OpenedWeights, label_of, opened, without_tensors
from fed_learn.contribution import (
    Contribution,
    Kind,
    check_countable,
    check_terms,
    checked_n_iter,
)
from fed_learn.errors import (
    FedLearnError,
    NonFiniteError,
    WeightsTypeError,
    as_failure,
    described,
)
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
    listed,
    native_dtype,
    same_bits,
    same_values,
)

Tell = Callable[[str], None]
"""Called with a sentence on what is accepted although it differs from the global model."""


@dataclass(eq=False)  # frozen ones take ten times as long to make
class Checked:
    """A contribution that has been opened and has passed every check. It is not changed any more.

    Attributes:
        contributor: The name of its client.
        aggregation_weight: The number by which it counts.
        held: Its weights, in the order and the dtypes that are expected: arrays, and the tensors that they stand for.
        contribution: The contribution itself, with plain numbers; None for bare weights.
        scanned: Whether its values have been checked: they are finite, but for `filled` and `constants`, and in the
            domain of exact sums if those are wanted.
        constants: Variables that are not averaged: they are not finite, and the global model is not known.
        filled: Variables that are not finite in the same places as the global model, with 0 in these places. These
            arrays are averaged in place of what was sent.
        unchanged: Names of those among `filled` that leave the global model as it is.
        form: Equal for contributions of the same variables; None: all variables of the global model.
        unless_alone: Why it is refused if nobody else sent one of this form.
        apart: Its variables that are not averaged, by their policies.
    """

    contributor: str
    aggregation_weight: float
    held: OpenedWeights
    contribution: Contribution | None = None
    scanned: bool = False
    constants: Mapping[str, Array] = field(default_factory=dict)
    filled: WeightDict = field(default_factory=dict)
    unchanged: frozenset[str] = frozenset()
    form: Hashable = None
    unless_alone: NonFiniteError | None = None
    apart: Parts | None = None

    @property
    def arrays(self) -> dict[str, Array]:
        """The weights as arrays; placeholders of tensors that are averaged on their device."""
        arrays: dict[str, Array] = self.held.weights
        return arrays

    @cached_property
    def averaged(self) -> dict[str, None]:
        """Names of the variables that are averaged, in order."""
        names = self.held.weights
        return dict.fromkeys([name for name in names if name not in self.constants] if self.constants else names)

    @property
    def sent(self) -> Contribution:
        """The contribution, where it is one."""
        assert self.contribution is not None
        return self.contribution

    def only(self, names: Sequence[str]) -> Self:
        """The contribution with some of its variables, in the form in which they are averaged."""
        held = self.held.only(names)
        filled = {name: self.filled[name] for name in names if name in self.filled}
        if held is self.held and not filled:
            return self
        return replace(self, held=held.replaced({**held.weights, **filled}) if filled else held)

    def completed(self, model: WeightDict) -> Contribution:
        """The contribution, a difference, with zeros for the variables of the global model that were not sent."""
        if self.form is None and not self.filled and self.apart is None:
            return self.sent
        beside = {} if self.apart is None else self.apart.beside
        known = {**self.arrays, **self.filled, **beside}
        zeros = {name: np.zeros_like(array) for name, array in model.items() if name not in known}
        whole = {**zeros, **known}
        return self.sent.settled(weights=FrozenWeights.adopt({name: whole[name] for name in model}))

    def on_host(self) -> Self:
        """The same with arrays in the memory of the host alone."""
        return self if not self.held.owners else replace(self, held=OpenedWeights(self.held.on_host(), {}, {}))

    def shown(self) -> Self:
        """The same with arrays in the memory of the host, which whoever sees them cannot change."""
        views = {name: array.view() for name, array in self.on_host().arrays.items()}
        for view in views.values():
            view.flags.writeable = False
        return replace(self, held=OpenedWeights(views, {}, {}))

    def owned(self) -> Self:
        """The same with copies of arrays, which nobody else can change."""
        held = OpenedWeights({name: array.copy() for name, array in self.arrays.items()}, {}, {})
        return replace(self, held=held, scanned=False)


@dataclass(frozen=True, eq=False)
class Terms:
    """What contributions have to agree with.

    Attributes:
        schema: Names, shapes and dtypes; None: not known yet, and each contribution is checked by its own.
        kind: The kind that is expected, if any.
        round: The round that is expected, if any.
        of_job: Whether they are those of a job. These are lenient where a meaning is clear, and refuse aggregation
            weights that are no number of examples. The attributes below are for these alone.
        model: The global model, for constants in it that are not finite; None: it is not at hand.
        parts: Whether a part of the variables may be sent.
        own: Whether the weights are copied, so that nobody else can change them.
        kernel: The kernel that looks for values that are not finite; None: that is left to the sums.
        exact: Whether values have to lie in the domain of exact sums.
        device: Where to move weights that lie elsewhere; None: they stay where they are.
        plan: Which variables are not averaged, in a job; None: all are. The schema is that of the others.
        beside: Names, shapes and dtypes of those, as far as they are sent; None: not known yet.
    """

    schema: Schema | None = None
    kind: Kind | None = None
    round: int | None = None
    of_job: bool = False
    model: WeightDict | None = None
    parts: bool = True
    own: bool = True
    kernel: Kernel | None = None
    exact: bool = False
    device: str | None = None
    plan: Plan | None = None
    beside: Schema | None = None

    def check(self, sent: Contribution, contributors: Container[str] = (), tell: Tell | None = None) -> Checked:
        """Checks a contribution.

        Args:
            sent: What a client sent. Untrusted.
            contributors: Names that have contributed already.
            tell: Called with a sentence on what is accepted although it differs from the global model.

        Raises:
            ContributionError: One of its children, naming the contributor, the variable and the cause.
            ExactDomainError: With `exact`, a value or weight outside of the domain.
        """
        try:
            aggregation_weight = check_terms(sent, kind=self.kind, round=self.round, contributors=contributors)
            who = sent.contributor
            if self.of_job:
                who = str.__str__(who)
                check_countable(aggregation_weight, who)
                return self._checked_for_job(sent, who, aggregation_weight, tell or (lambda text: None))
            held = self._strictly(sent.weights, who)
        except FedLearnError:
            raise
        except BaseException as error:  # an object that raises at any access
            as_failure(error)
            who = label_of(sent.contributor)
            raise WeightsTypeError(f"{who}: sent something unreadable: {described(error)}", contributor=who) from error
        if sent.kind is Kind.DIFF:
            check_differences(self.schema or Schema.of(held.weights, who), who)
        return Checked(who, aggregation_weight, held, sent)

    def check_weights(self, weights: object, aggregation_weight: float, who: str) -> Checked:
        """Checks bare weights, strictly.

        Args:
            weights: Should be a weight dict.
            aggregation_weight: The number by which they count.
            who: What errors call the sender.

        Raises:
            ContributionError: One of its children.
        """
        return Checked(who, aggregation_weight, self._strictly(weights, who))

    def _strictly(self, weights: Any, who: str) -> OpenedWeights:
        schema, held = self.schema, opened(weights, who, self.device)
        found = held.weights
        if schema is not None and type(found) in PLAIN and schema.describes(found):
            return held.only(schema)
        arrays = as_weight_dict(found, who)
        schema = Schema.of(arrays, who) if schema is None else schema
        schema.check(arrays, who)
        # A placeholder has the dtype already, and what is made of one would have no values.
        fit = {n: arrays[n] if n in held.devices else np.asarray(arrays[n], dtype) for n, (_, dtype) in schema.items()}
        return held.replaced(fit)

    def _checked_for_job(self, sent: Contribution, who: str, aggregation_weight: float, tell: Tell) -> Checked:
        given, apart = (sent.weights, None) if self.plan is None else self._apart(self.plan, sent, who)
        held = self._fitted(opened(given, who), who, tell)
        if sent.kind is Kind.DIFF:
            held = _without_no_differences(held)
            check_differences(Schema.of(held.weights, who), who)
        flagged: list[str] | None = None
        if self.own:
            held, weights, flagged = self._owned(OpenedWeights(held.on_host(), {}, {}), given)
        else:
            weights = held.as_sent(given)
        if apart is not None:
            weights = self._whole(weights, apart)
        contribution = sent.settled(
            contributor=who,
            weights=weights,
            aggregation_weight=aggregation_weight,
            n_iter=checked_n_iter(sent.n_iter, who),
            round=sent.round if self.round is None else self.round,
        )
        form = self._form(held.weights, apart)
        checked = Checked(who, aggregation_weight, held, contribution, form=form, apart=apart)
        return checked if self.kernel is None else self._scanned(checked, self.kernel, flagged)

    def _fitted(self, held: OpenedWeights, who: str, tell: Tell) -> OpenedWeights:
        """The weights in native byte order, in the dtypes and the order of the global model."""
        schema = self.schema
        if schema and type(held.weights) in PLAIN and schema.describes(held.weights):
            return held  # the usual case
        host = held.on_host()
        arrays = as_weight_dict(numbers_as_arrays(host, schema or Schema()), who)
        if not schema:
            fit = {name: np.asarray(arrays[name], dtype) for name, (_, dtype) in Schema.of(arrays, who).items()}
            return held.replaced(fit, host)
        if not self.parts and len(arrays) < len(schema):
            raise schema.names_error(arrays, who)
        fit, rounded = schema.fit(arrays, who)
        for (came, expected), names in rounded.items():
            if came.kind in "iu":  # no bit of them is lost
                continue
            tell(f"{who}: {listed(names)} came as {came} and is rounded to {expected}, as the global model has it")
        return held.replaced(fit, host)

    def _apart(self, plan: Plan, sent: Contribution, who: str) -> tuple[Any, Parts | None]:
        """What of a contribution is averaged, and the rest as arrays of its own, checked.

        Raises:
            NotSameError: A variable differs from the global model's that has to be the same.
        """
        given, parts = plan.apply(sent.weights, who)
        if parts is None:
            return given, None
        if not self.parts and self.schema is not None:
            plan.check_names(parts, who)
        found = without_tensors(parts.beside | parts.same, who)
        if self.beside is None:
            found = as_weight_dict(found, who)
        elif found:
            found, _ = self.beside.fit(as_weight_dict(numbers_as_arrays(found, self.beside), who), who)
        for name in parts.same if self.model is not None else ():
            base = self._base(name)
            if base is None or not (is_no_difference if sent.kind is Kind.DIFF else _is_same)(found[name], base):
                raise plan.not_same(name, who, "the global model")
        kept = parts.beside if self.model is not None else found  # codes are large, and the global model has its own
        own = {name: np.array(found[name], native_dtype(found[name].dtype)) for name in kept}
        largest, summed = ({name: own[name] for name in part} for part in (parts.largest, parts.summed))
        check_finite(largest | summed, who)
        check_domain({name: array for name, array in summed.items() if array.dtype.kind not in "biu"}, 1.0, who)
        return given, Parts(plan, largest, summed, {name: own[name] for name in parts.same if name in own})

    def _whole(self, weights: Any, apart: Parts) -> Any:
        """The weights with those that are combined in other ways, in the order of the global model."""
        every = {**weights, **apart.beside, **apart.same}
        if len(every) == len(weights):
            return weights
        ordered = {name: every[name] for name in self.model or every if name in every}
        return FrozenWeights.adopt(ordered) if self.own else ordered

    def _owned(self, held: OpenedWeights, sent: Any) -> tuple[OpenedWeights, FrozenWeights, list[str] | None]:
        """A copy, unless what was sent is frozen already; and which variables are not finite, if that was checked.

        Shapes have been checked, so the copy is no larger than a model.
        """
        arrays: dict[str, Array] = held.weights
        if type(sent) is FrozenWeights and all(map(is_, map(sent.get, arrays), arrays.values())):
            frozen = sent if list(sent) == list(arrays) else FrozenWeights.adopt(arrays)
            return held if frozen is sent else OpenedWeights(dict(frozen), {}, {}), frozen, None
        copies, flagged = new_arrays(Schema.of(arrays)), None
        if self.kernel is None:
            for name, copied in copies.items():
                copied[...] = arrays[name]
        else:  # in one pass, so that the flags are those of the copy
            flags = self.kernel.copy([contiguous(array) for array in arrays.values()], list(copies.values()))
            flagged = [name for name, flag in zip(arrays, flags, strict=True) if flag]
        frozen = FrozenWeights.adopt(copies)
        return OpenedWeights(dict(frozen), {}, {}), frozen, flagged

    def _scanned(self, checked: Checked, kernel: Kernel, flagged: list[str] | None) -> Checked:
        """The contribution, after a check that NaN and infinity are constants, and that all is in the domain.

        Args:
            checked: The contribution.
            kernel: The kernel that looks for NaN and infinity.
            flagged: Names of the variables that hold some; None: not known yet.

        Raises:
            NonFiniteError: Says which value of which variable is not finite.
            ExactDomainError: With `exact`, a value or weight is outside of the domain.
        """
        held, who = checked.held, checked.contributor
        if flagged is None:
            flagged = held.not_finite(kernel)
        checked = replace(checked, scanned=True)
        if flagged:
            checked = self._with_constants(checked, flagged)
        if self.exact:
            averaged = checked.only(list(checked.averaged)).on_host().arrays
            check_domain(averaged, checked.aggregation_weight or 1.0, who)
        return checked

    def _with_constants(self, checked: Checked, flagged: Sequence[str]) -> Checked:
        """The contribution, with the values that are not finite taken as constants.

        They are constants if the global model has the same values in the same places or, while it is not known, if
        another contributor sends the same.

        Raises:
            NonFiniteError: They are no constants.
        """
        kind, who = checked.sent.kind, checked.contributor
        arrays = checked.held.only(flagged).on_host()  # they are in the order of all
        if not self.schema:
            return _with_constants_of_its_own(checked, arrays)
        filled: dict[str, Array] = {}
        unchanged = set()
        for name in flagged:
            base, array = self._base(name), arrays[name]
            if base is None or not _agrees(array, base, kind):
                raise not_finite(name, array, who)
            filled[name] = np.where(finite_elements(array), array, np.zeros((), array.dtype))
            if not filled[name].any() if kind is Kind.DIFF else same_values(array, base):
                unchanged.add(name)
        return replace(checked, filled=filled, unchanged=frozenset(unchanged))

    def _form(self, arrays: WeightDict, apart: Parts | None) -> Hashable:
        if self.schema:
            combined = [] if self.plan is None else self.plan.names("max", "sum")
            came = set() if apart is None else apart.beside.keys()
            if len(arrays) == len(self.schema) and len(came) == len(combined):
                return None
            return (*arrays, *(name for name in combined if name in came))
        form = tuple(sorted((name, array.shape, array.dtype.str) for name, array in arrays.items()))
        if apart is None:
            return form
        if not apart.beside and not apart.same:
            return form
        beside = tuple(sorted((name, array.shape, array.dtype.str) for name, array in apart.beside.items()))
        return form, beside, tuple(sorted((name, _digest(array)) for name, array in apart.same.items()))

    def _base(self, name: str) -> Array | None:
        """A variable of the global model, as an array."""
        if self.model is None or name not in self.model:
            return None
        return np.asarray(without_tensors({name: self.model[name]}, "global model")[name])


def _with_constants_of_its_own(checked: Checked, arrays: WeightDict) -> Checked:
    """The contribution while the global model is not known: infinities wait for another who sends the same."""
    who = checked.contributor
    for name, array in arrays.items():
        if np.isnan(array).any():
            raise not_finite(name, array, who)
    name, array = next(iter(arrays.items()))
    constants = {name: array.copy() for name, array in arrays.items()}
    digests = tuple(map(_digest, constants.values()))
    averaged = tuple(name for name in checked.arrays if name not in constants)
    form = (checked.form, averaged, digests)
    return replace(checked, constants=constants, form=form, unless_alone=not_finite(name, array, who))


def _without_no_differences(held: OpenedWeights) -> OpenedWeights:
    """Differences without the variables whose dtype can hold none, if they are 0: so they are as good as not sent."""
    doubtful = [name for name, array in held.weights.items() if array.dtype.kind in "bu"]
    if not doubtful:
        return held
    values = held.only([name for name in held.weights if name in {*doubtful}]).on_host()
    return held.only([name for name in held.weights if name not in values or values[name].any()])


def _digest(array: Array) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


def _is_same(array: Array, base: Array) -> bool:
    """Whether a variable is that of the global model, by its values; equal bits are found sooner."""
    return same_bits(array, base) or (array.dtype.kind not in "biu" and same_values(array, base))


def _agrees(array: Array, base: Array, kind: Kind) -> bool:
    """Whether the values that are not finite are the same, in the same places, as in the global model."""
    bad, place = ~finite_elements(array), ~finite_elements(base)
    if kind is Kind.DIFF:  # −inf minus −inf is NaN
        return not (bad & ~place).any() and bool(np.isnan(array[bad]).all())
    return bool((bad == place).all()) and same_values(array[bad], base[bad])


def not_finite(name: str, array: Array, who: str) -> NonFiniteError:
    """The error for a variable in which a kernel has found what is not finite."""
    try:
        check_finite({name: array}, who)
    except NonFiniteError as error:
        return error
    raise AssertionError(f"a kernel has found {name!r} not finite, and it is")
