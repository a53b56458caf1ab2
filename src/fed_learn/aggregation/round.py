"""`Round`: receives, refuses and at its end combines the contributions of one round. Fires no events."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fed_learn import kernels
from fed_learn.aggregation.accumulator import Accumulator
from fed_learn.aggregation.average import weighted_average
from fed_learn.aggregation.batch import Checked, Terms
from fed_learn.aggregation.exact import check_domain
from fed_learn.aggregation.tensors import schema_of, without_tensors
from fed_learn.contribution import Contribution, Kind, check_terms
from fed_learn.errors import ContributionError, EmptyAggregationError, NamesError, NonFiniteError
from fed_learn.weights import FrozenWeights, Schema, WeightDict, finite_elements, listed

logger = logging.getLogger(__name__)

PARTIAL = ("same", "average", "refuse")
"""What becomes of contributions that hold a part of the global model's variables.

`"same"`: a part that is the same from all is averaged, and the rest of the global model kept; of different parts the
commonest counts. `"average"`: each variable is averaged over those who sent it. `"refuse"`: a part is refused.
"""

MOST_FORMS = 4
"""Different parts that a stream adds up side by side, until the round is over and it is known which of them counts."""


@dataclass(frozen=True, eq=False)
class Told:
    """Says things once in a job, as warnings in the log.

    Attributes:
        logger: Where to.
    """

    logger: logging.Logger = logger
    _said: set[Hashable] = field(default_factory=set)

    def once(self, about: Hashable, text: str) -> None:
        """Logs a sentence, unless one about the same was logged before."""
        if about not in self._said:
            self._said.add(about)
            self.logger.warning("%s", text)


@dataclass(frozen=True, eq=False)
class Combined:
    """What the contributions of a round make together.

    Attributes:
        mean: The mean of each variable that is averaged, full weights or differences.
        constants: Variables that are taken as a contributor sent them, since the global model is not known.
        sent: Names of the variables that were sent, the kept constants among them.
    """

    mean: WeightDict
    constants: WeightDict
    sent: tuple[str, ...]


class Round:
    """The contributions of one round.

    Args:
        number: The round, from 0; None: the first contribution that states one decides.
        model: The global model, of arrays or tensors; None or empty: it is not known, and the contributions tell.
        kind: The kind of contributions that is expected.
        partial: One of `PARTIAL`.
        exact: Sum exactly.
        stream: Fold each contribution into float64 sums at once and keep none.
        kernel: Name of the kernel; None: the current one.
        own: Keep copies, which nobody else can change. Without, what is sent must be left as it is until the round is
            over, and tensors stay tensors.
        told: What has been told of clients in this job.

    Attributes:
        accepted: The contributions so far, by name; those of a stream without their weights.

    Example:
        >>> this = Round(number=0, model={"w": np.zeros(1), "b": np.zeros(1)})
        >>> for name, w, examples in ("site-2", 4.0, 1), ("site-1", 0.0, 3):
        ...     taken = this.receive(Contribution(name, {"w": np.array([w])}, examples, round=0))
        >>> this.settle(), this.combine().mean
        ([], {'w': array([1.])})
    """

    def __init__(
        self,
        *,
        number: int | None = None,
        model: WeightDict | None = None,
        kind: Kind | None = Kind.FULL,
        partial: str = "same",
        exact: bool = False,
        stream: bool = False,
        kernel: str | None = None,
        own: bool = True,
        told: Told | None = None,
    ) -> None:
        self._model = model or None
        schema = Schema() if self._model is None else schema_of(self._model, "global model")
        self._terms = Terms(schema, self._model, kind, number, partial != "refuse", own)
        self._partial = partial
        self._exact = exact
        self._stream = stream
        self._kernel = kernel
        self._told = Told() if told is None else told
        self._checked: dict[str, Checked] = {}
        self._streams: dict[Hashable, Accumulator] = {}
        self.accepted: dict[str, Contribution] = {}

    @property
    def number(self) -> int | None:
        """The round, if it is known."""
        return self._terms.round

    def receive(self, sent: Contribution, check: Callable[[Contribution], object] | None = None) -> Contribution:
        """Accepts a contribution, or refuses it and is as if it had never come.

        Args:
            sent: What a client sent. Untrusted.
            check: Is shown the contribution before it counts, and may raise a `ContributionError`.

        Returns:
            The contribution as it is kept; of a stream without its weights.

        Raises:
            ContributionError, ExactDomainError: It is refused.
        """
        who = sent.contributor
        checked = self._terms.check(sent, lambda text: self._told.once((who, "rounded"), text), self.accepted)
        if not self._stream:
            checked = self._scanned(checked)
        if check is not None:
            check(checked.contribution)
        if self._stream:
            checked = self._added(checked)
        self._checked[who] = checked
        self.accepted[who] = checked.contribution
        if self._terms.round is None and sent.round is not None:
            self._terms = replace(self._terms, round=sent.round)
        return checked.contribution

    def settle(self) -> list[tuple[Contribution, ContributionError]]:
        """Decides which contributions count together, now that all are in; the others are refused.

        Returns:
            Those that are refused after all, and why.
        """
        refused: list[tuple[Contribution, ContributionError]] = []
        counts = Counter(checked.form for checked in self._checked.values())
        for name, checked in list(self._checked.items()):
            if checked.unless_alone is not None and counts[checked.form] == 1:
                refused.append((self._drop(name), checked.unless_alone))
        refused += self._drop_others()
        self._tell()
        return refused

    def combine(
        self,
        contributions: Sequence[Contribution] | None = None,
        out: Callable[[Schema], WeightDict] | None = None,
    ) -> Combined:
        """The mean of contributions.

        Args:
            contributions: Those that are averaged; None: all that were accepted. They may be other ones than were
                received, which are then checked anew.
            out: Gives the arrays to write to, of a schema.

        Raises:
            EmptyAggregationError: None of them counts by more than 0.
            NonFiniteError, IntegerRangeError, SumOverflowError, ExactDomainError: The mean leaves the range of a dtype.
            ContributionError: One that was not received is bad.
            ValueError: Those that are added up already (`stream`) are not all.
        """
        chosen = [self._found(c) for c in (self.accepted.values() if contributions is None else contributions)]
        counting = [checked for checked in chosen if checked.contribution.aggregation_weight]
        if not counting:
            raise EmptyAggregationError(
                "no contribution counts by more than 0 examples" if chosen else "no contributions to average"
            )
        if self._stream:
            mean = self._streamed(chosen)
        elif self._partial == "average" and self._terms.schema:
            mean = self._mean_of_each(counting)
        else:
            self._check_alike(counting)
            mean = self._mean(counting, counting[0].averaged, out)
        if not mean:
            raise EmptyAggregationError("no variable can be averaged: all that is sent are constants, not finite")
        self._restore(mean, counting)
        sent = {name: None for checked in counting for name in checked.arrays}
        first, constants = counting[0], {}
        if not self._terms.schema:
            constants = {name: array for name, array in first.arrays.items() if name not in first.averaged}
        return Combined(mean, constants, tuple(name for name in self._terms.schema or sent if name in sent))

    def sent(self, contributions: Sequence[Contribution]) -> tuple[str, ...]:
        """Names of the variables that are in any of these contributions, in the order of the global model."""
        found = {name: None for contribution in contributions for name in self._found(contribution).arrays}
        return tuple(name for name in self._terms.schema or found if name in found)

    def averaged(self, contributions: Sequence[Contribution]) -> frozenset[str]:
        """Names of the variables of these contributions that are averaged: all but constants."""
        return frozenset(name for contribution in contributions for name in self._found(contribution).averaged)

    def completed(self, contributions: Sequence[Contribution], model: WeightDict) -> list[Contribution]:
        """Differences that count, with zeros for the variables of which nothing was sent.

        Raises:
            EmptyAggregationError: None counts by more than 0.
        """
        found = [self._found(contribution) for contribution in contributions]
        counting = [checked for checked in found if checked.contribution.aggregation_weight]
        if not counting:
            raise EmptyAggregationError("no contribution counts by more than 0 examples")
        if all(checked.form is None for checked in counting):
            return [checked.contribution for checked in counting]
        zeros = FrozenWeights({name: np.zeros_like(array) for name, array in model.items()})
        return [
            replace(
                checked.contribution,
                weights=FrozenWeights.adopt(
                    {name: checked.arrays[name] if name in checked.averaged else zeros[name] for name in model}
                ),
            )
            for checked in counting
        ]

    def _scanned(self, checked: Checked) -> Checked:
        contribution = checked.contribution
        checked = self._terms.scanned(checked, kernels.resolve(self._kernel))
        if self._exact:
            averaged = {name: checked.arrays[name] for name in checked.averaged}
            check_domain(averaged, contribution.aggregation_weight or 1.0, contribution.contributor)
        return checked

    def _added(self, checked: Checked) -> Checked:
        """Folds a contribution into the stream of its form; the accumulator looks for NaN on the way."""
        try:
            self._add(checked)
        except NonFiniteError:
            checked = self._terms.scanned(checked, kernels.resolve(self._kernel))  # raises, unless these are constants
            self._add(checked)
        constants = {name: array for name, array in checked.arrays.items() if name not in checked.averaged}
        kept = dict.fromkeys(checked.arrays, np.empty(0)) | constants
        return replace(checked, contribution=checked.contribution.without_weights(), arrays=kept)

    def _add(self, checked: Checked) -> None:
        stream = self._streams.get(checked.form)
        if stream is None:
            if len(self._streams) == MOST_FORMS:
                raise self._terms.schema.names_error(checked.arrays, checked.contribution.contributor)
            like = None if self._model is None else _only(self._model, checked.averaged)
            stream = Accumulator(like=like, exact=self._exact, kernel=self._kernel)
        stream.add(_with(checked, checked.averaged))
        self._streams[checked.form] = stream

    def _found(self, given: Contribution) -> Checked:
        """What is known of a contribution that is to be averaged; one that a handler has made is checked now."""
        known = self._checked.get(given.contributor)
        if known is not None and known.contribution is given:
            return known
        if known is not None and known.contribution.weights is given.weights:
            weight = check_terms(given, kind=self._terms.kind, round=self.number)
            if not self._stream or weight == known.contribution.aggregation_weight:
                return replace(known, contribution=replace(given, aggregation_weight=weight))
        if self._stream:
            raise ValueError(
                "a handler changed which contributions are averaged, or their weights, but with stream=True they are "
                "added up already"
            )
        return self._scanned(self._terms.check(given, lambda text: None))

    def _check_alike(self, chosen: Sequence[Checked]) -> None:
        """Refuses a contribution that a handler has made of another part than the others."""
        expected = set(chosen[0].averaged)
        for checked in chosen:
            if checked.averaged != chosen[0].averaged and set(checked.averaged) != expected:
                who = checked.contribution.contributor
                raise Schema.of({name: chosen[0].arrays[name] for name in expected}).names_error(
                    {name: checked.arrays[name] for name in checked.averaged}, who
                )

    def _mean(
        self,
        chosen: Sequence[Checked],
        names: Sequence[str],
        out: Callable[[Schema], WeightDict] | None = None,
    ) -> WeightDict:
        """The mean of some variables over contributions that all have them."""
        if not names:
            return {}
        contributions = [_with(checked, names) for checked in chosen]
        like = None if self._model is None else _only(self._model, names)
        given = None
        if out is not None:
            schema = self._terms.schema or Schema.of(chosen[0].arrays)
            given = out(Schema({name: schema[name] for name in names}))
        return weighted_average(contributions, like=like, out=given, exact=self._exact, kernel=self._kernel)

    def _mean_of_each(self, chosen: Sequence[Checked]) -> dict[str, Any]:
        """The mean of each variable over those who sent it."""
        senders: dict[tuple[int, ...], list[str]] = {}
        for name in self._terms.schema:
            who = tuple(i for i, checked in enumerate(chosen) if name in checked.averaged)
            if who:
                senders.setdefault(who, []).append(name)
        mean: dict[str, Any] = {}
        for who, names in senders.items():
            mean |= self._mean([chosen[i] for i in who], names)
        return {name: mean[name] for name in self._terms.schema if name in mean}

    def _streamed(self, chosen: Sequence[Checked]) -> WeightDict:
        if len(chosen) < len(self._checked):
            raise ValueError("a handler took contributions out, but with stream=True they are added up already")
        return self._streams[chosen[0].form].result()

    def _restore(self, mean: WeightDict, chosen: Sequence[Checked]) -> None:
        """Puts constants back into variables of which they are a part."""
        for name in {name for checked in chosen for name in checked.masked}:
            assert self._model is not None
            base = np.asarray(without_tensors({name: self._model[name]}, "global model")[name])
            place = ~finite_elements(base)
            target = without_tensors({name: mean[name]}, "mean")[name]
            target[place] = 0 if self._terms.kind is Kind.DIFF else base[place]

    def _drop(self, name: str) -> Contribution:
        del self._checked[name]
        return self.accepted.pop(name)

    def _drop_others(self) -> list[tuple[Contribution, ContributionError]]:
        """Refuses those that are not of the commonest form; of equally common ones the largest counts."""
        forms: dict[Hashable, list[str]] = {}
        apart = self._partial != "average" or not self._terms.schema
        for name, checked in self._checked.items():
            forms.setdefault(checked.form if apart else checked.masked, []).append(name)
        if len(forms) < 2:
            return []

        def rank(names: list[str]) -> tuple[int, int, int, str]:
            counting = sum(1 for name in names if self.accepted[name].aggregation_weight)
            return -counting, -len(names), -len(self._checked[names[0]].averaged), min(names)

        usual, *others = sorted(forms.values(), key=rank)
        expected = self._checked[usual[0]]
        return [
            (self._drop(name), self._other_form(name, checked, expected, len(usual)))
            for name in sorted(name for names in others for name in names)
            for checked in [self._checked[name]]
        ]

    def _other_form(self, who: str, checked: Checked, usual: Checked, count: int) -> ContributionError:
        if checked.unless_alone is not None:
            return checked.unless_alone
        expected, found = set(usual.averaged), set(checked.averaged)
        missing = tuple(name for name in usual.averaged if name not in found)
        extra = tuple(name for name in checked.averaged if name not in expected)
        parts = [f"{what} {listed(names)}" for what, names in (("misses", missing), ("adds", extra)) if names]
        what = " and ".join(parts) or "has other shapes, dtypes or constants"
        advice = "; partial='average' averages each variable over those who sent it" if missing or extra else ""
        return NamesError(
            f"{who}: {what}, compared with what {count} of the round's contributions hold{advice}",
            contributor=who,
            name=next(iter(missing or extra), None),
            missing=missing,
            extra=extra,
        )

    def _tell(self) -> None:
        """Says once that a part of the global model is averaged and the rest kept, and which constants are."""
        schema, checked = self._terms.schema, list(self._checked.values())
        if not schema or not checked:
            return
        sent = {name for one in checked for name in one.arrays}
        kept = [name for name in schema if name not in sent]
        if kept:
            self._told.once(
                ("part", frozenset(sent)),
                f"clients send {len(sent)} of the global model's {len(schema)} variables: these are averaged, and the "
                f"rest is kept as it is: {listed(kept)}",
            )
        constants = [name for name in schema if name in sent and not any(name in one.averaged for one in checked)]
        if constants:
            self._told.once(
                ("constants", frozenset(constants)),
                f"{listed(constants)}: not finite in the global model, and the same from all clients: kept as it is",
            )


def _only(weights: WeightDict, names: Sequence[str]) -> WeightDict:
    return weights if len(names) == len(weights) else {name: weights[name] for name in names}


def _with(checked: Checked, names: Sequence[str]) -> Contribution:
    """The contribution with some of its variables."""
    assert checked.contribution.weights is not None
    weights = _only(checked.contribution.weights, names)
    contribution = checked.contribution
    return contribution if weights is contribution.weights else replace(contribution, weights=weights)
