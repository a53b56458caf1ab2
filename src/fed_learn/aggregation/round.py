"""`Round`: receives, refuses and at its end combines the contributions of one round. Fires no events."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fed_learn import kernels
from fed_learn.aggregation.accumulator import Accumulator
from fed_learn.aggregation.average import weighted_average
from fed_learn.aggregation.batch import Checked, Terms
from fed_learn.aggregation.exact import check_domain
from fed_learn.aggregation.tensors import schema_of, without_tensors
from fed_learn.contribution import Contribution, Kind, check_countable, check_terms
from fed_learn.errors import (
    ContributionError,
    DtypeError,
    EmptyAggregationError,
    ExactDomainError,
    IntegerRangeError,
    NamesError,
    NonFiniteError,
    OutOfTurnError,
    RoundError,
    ShapeError,
    SumOverflowError,
    printable,
)
from fed_learn.limits import LEFT_OUT, MOST_NAMED, MOST_TOLD
from fed_learn.values import whole_number_of
from fed_learn.weights import (
    SHAPE_AND_DTYPE,
    Array,
    FrozenWeights,
    Schema,
    WeightDict,
    finite_elements,
    listed,
    misses_and_adds,
)

logger = logging.getLogger(__name__)

PARTIAL = ("same", "average", "refuse")
"""What becomes of contributions that hold a part of the global model's variables.

`"same"`: a part that is the same from all is averaged, and the rest of the global model kept; of different parts the
commonest counts. `"average"`: each variable is averaged over those who sent it. `"refuse"`: a part is refused.
"""

MOST_FORMS = 4
"""Different parts that a stream adds up side by side, until the round is over and it is known which of them counts."""

UNUSABLE = (EmptyAggregationError, ExactDomainError, IntegerRangeError, NonFiniteError, SumOverflowError)
"""What keeps a round from having a mean, and a job from nothing else."""


def check_partial(partial: str, stream: bool) -> None:
    """Checks how parts are treated.

    Raises:
        ValueError: It is none of `PARTIAL`, or needs what a stream drops.
    """
    if partial not in PARTIAL:
        raise ValueError(f"partial must be {' or '.join(map(repr, PARTIAL))}, not {partial!r}")
    if stream and partial == "average":
        raise ValueError("partial='average' needs all contributions of a round at once, which stream=True drops")


@dataclass(frozen=True, eq=False)
class Told:
    """Says things once in a job, as warnings in the log.

    Attributes:
        logger: Where to.
    """

    logger: logging.Logger = logger
    _said: set[Hashable] = field(default_factory=set)

    def once(self, about: Hashable, text: str) -> None:
        """Logs a sentence, unless one about the same was logged before, or `MOST_TOLD` others."""
        if about not in self._said and len(self._said) <= MOST_TOLD:
            self._said.add(about)
            more = "" if len(self._said) <= MOST_TOLD else "; no more is told of what clients send"
            self.logger.warning("%s", printable(text + more))


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
        number: The round, from 0; None: the one that most contributions state, the newer of equally common ones; in a
            stream the first decides, since it is added up already.
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
        self._given_up: set[Hashable] = set()
        self._settled = False
        self.accepted: dict[str, Contribution] = {}

    @property
    def number(self) -> int | None:
        """The round, if it is known; else as most of the contributions so far state it."""
        if self._terms.round is not None or not self._checked:
            return self._terms.round
        rounds = Counter(number for c in self.accepted.values() if (number := whole_number_of(c.round)) is not None)
        return max(rounds, key=lambda number: (rounds[number], number), default=None)

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
        said: list[str] = []
        checked = self._terms.check(sent, said.append, self.accepted)
        if not self._stream:
            checked = self._scanned(checked)
        if check is not None:
            check(checked.contribution)
        if self._stream:
            checked = self._added(checked)
        who = checked.contribution.contributor
        self._checked[who] = checked
        self.accepted[who] = checked.contribution
        self._settled = False
        for text in said:
            self._told.once((who, "rounded"), text)
        if LEFT_OUT in checked.contribution.info:
            left_out = checked.contribution.info[LEFT_OUT]
            self._told.once((who, "left out"), f"{who}: of its metrics and info are left out: {left_out}")
        if self._terms.round is None and self._stream:
            self._terms = replace(self._terms, round=whole_number_of(sent.round))
        return checked.contribution

    def settle(self) -> list[tuple[Contribution, ContributionError]]:
        """Decides which contributions count together, now that all are in; the others are refused.

        Returns:
            Those that are refused after all, and why.
        """
        refused: list[tuple[Contribution, ContributionError]] = []
        if self._terms.round is None:
            refused += self._drop_other_rounds()
        counts = Counter(checked.form for checked in self._checked.values())
        for name, checked in list(self._checked.items()):
            if checked.unless_alone is not None and counts[checked.form] == 1:
                refused.append((self._drop(name), checked.unless_alone))
        if self._partial != "average":
            refused += self._drop_other_forms()
        elif not self._terms.schema:
            refused += self._drop_other_variables()
        refused += self._drop_other_constants()
        self._forget_streams()
        self._tell()
        self._settled = True
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
            OutOfTurnError: `settle` has not been called since the last one was received.
            ValueError: Those that are added up already (`stream`) are not all.
        """
        if not self._settled:
            raise OutOfTurnError("combine: settle comes first")
        chosen = [self._found(c) for c in (self.accepted.values() if contributions is None else contributions)]
        counting = [checked for checked in chosen if checked.contribution.aggregation_weight]
        if not counting:
            raise EmptyAggregationError(
                "no contribution counts by more than 0 examples" if chosen else "no contributions to average"
            )
        if self._stream:
            mean = self._streamed(chosen)
        elif self._partial == "average":
            mean = self._mean_of_each(counting)
        else:
            self._check_alike(counting)
            mean = self._mean(counting, counting[0].averaged, out)
        mean = self._with_constants(mean, counting)
        sent = {name: None for checked in counting for name in checked.arrays}
        order = tuple(name for name in self._terms.schema or sent if name in sent)
        constants: dict[str, Any] = {}
        for checked in () if self._terms.schema else reversed(counting):
            constants |= checked.constants
        return Combined(mean, constants, order)

    def sent(self, contributions: Sequence[Contribution]) -> tuple[str, ...]:
        """Names of the variables that are in any of these contributions, in the order of the global model."""
        found = {name: None for contribution in contributions for name in self._found(contribution).arrays}
        return tuple(name for name in self._terms.schema or found if name in found)

    def averaged(self, contributions: Sequence[Contribution]) -> frozenset[str]:
        """Names of the variables that are averaged: what was sent but for what is the same in all, and not finite."""
        found = [self._found(contribution) for contribution in contributions]
        names = {name for checked in found for name in checked.averaged}
        changed = {name for checked in found for name in checked.averaged if name not in checked.unchanged}
        return frozenset(names & changed)

    def completed(self, contributions: Sequence[Contribution], model: WeightDict) -> list[Contribution]:
        """Differences that count, with zeros for the variables of which nothing was sent.

        Raises:
            EmptyAggregationError: None counts by more than 0.
        """
        found = [self._found(contribution) for contribution in contributions]
        counting = [checked for checked in found if checked.contribution.aggregation_weight]
        if not counting:
            raise EmptyAggregationError("no contribution counts by more than 0 examples")
        if all(checked.form is None and not checked.filled for checked in counting):
            return [checked.contribution for checked in counting]
        zeros = FrozenWeights({name: np.zeros_like(array) for name, array in model.items()})
        whole = [
            {name: checked.filled.get(name, checked.arrays.get(name, zeros[name])) for name in model}
            for checked in counting
        ]
        return [
            replace(checked.contribution, weights=FrozenWeights.adopt(weights))
            for checked, weights in zip(counting, whole, strict=True)
        ]

    def _scanned(self, checked: Checked) -> Checked:
        contribution = checked.contribution
        checked = self._terms.scanned(checked, kernels.resolve(self._kernel))
        if self._exact:
            filled = without_tensors(checked.filled, contribution.contributor)
            averaged = {name: filled.get(name, checked.arrays[name]) for name in checked.averaged}
            check_domain(averaged, contribution.aggregation_weight or 1.0, contribution.contributor)
        return checked

    def _added(self, checked: Checked) -> Checked:
        """Folds a contribution into the stream of its form; the accumulator looks for NaN on the way."""
        try:
            self._add(checked)
        except NonFiniteError:
            checked = self._terms.scanned(checked, kernels.resolve(self._kernel))  # raises, unless these are constants
            self._add(checked)
        kept = {name: _placeholder(*SHAPE_AND_DTYPE(array)) for name, array in checked.arrays.items()}
        kept |= checked.constants
        filled = dict.fromkeys(checked.filled, np.empty(0))
        return replace(checked, contribution=checked.contribution.without_weights(), arrays=kept, filled=filled)

    def _add(self, checked: Checked) -> None:
        key = self._stream_of(checked)
        if key not in self._streams:
            self._make_room(checked)
            like = None if self._model is None else _only(self._model, checked.averaged)
            stream = Accumulator(like=like, exact=self._exact, kernel=self._kernel)
        else:
            stream = self._streams[key]
        # Frozen, or left alone as was promised: neither needs a copy, nor to wait.
        stream.add(checked.to_average(checked.averaged), borrow=True)
        stream.flush()
        self._streams[key] = stream

    def _forget_streams(self) -> None:
        """Drops the sums whose contributions have been refused: those of one sum are refused all or none."""
        held = {self._stream_of(checked) for checked in self._checked.values()}
        self._streams = {key: stream for key, stream in self._streams.items() if key in held}
        self._given_up &= held

    def _stream_of(self, checked: Checked) -> Hashable:
        return checked.form, tuple(sorted(checked.filled)) if self._terms.kind is Kind.FULL else ()

    def _make_room(self, checked: Checked) -> None:
        """Gives up the smallest of many streams for a new one, unless that would be smaller still.

        Raises:
            NamesError: It would.
        """
        if self._stream_of(checked) not in self._given_up:
            if len(self._streams) < MOST_FORMS:
                return
            members = Counter(self._stream_of(other) for other in self._checked.values())
            sizes = {self._stream_of(other): len(other.averaged) for other in self._checked.values()}
            smallest = min(self._streams, key=lambda key: (members[key], sizes[key]))
            if checked.form is None or (members[smallest], sizes[smallest]) < (1, len(checked.averaged)):
                self._given_up.add(smallest)
                del self._streams[smallest]
                return
        who = checked.contribution.contributor
        raise NamesError(
            f"{who}: holds {listed(checked.averaged)}, and {MOST_FORMS} other parts of the model are added up already",
            contributor=who,
        )

    def _found(self, given: Contribution) -> Checked:
        """What is known of a contribution that is to be averaged; one that a handler has made is checked now."""
        known = self._checked.get(given.contributor)
        if known is not None and known.contribution is given:
            return known
        if known is not None and known.contribution.weights is given.weights:
            weight = check_countable(check_terms(given, kind=self._terms.kind, round=self.number), given.contributor)
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
        expected = chosen[0].averages
        for checked in chosen:
            if checked.averaged != chosen[0].averaged and checked.averages != expected:
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
        contributions = [checked.to_average(names) for checked in chosen]
        like = None if self._model is None else _only(self._model, names)
        given = None
        if out is not None:
            schema = self._terms.schema or Schema.of(chosen[0].arrays)
            given = out(Schema({name: schema[name] for name in names}))
        return weighted_average(contributions, like=like, out=given, exact=self._exact, kernel=self._kernel)

    def _mean_of_each(self, chosen: Sequence[Checked]) -> dict[str, Any]:
        """The mean of each variable over those who sent it."""
        senders: dict[tuple[int, ...], list[str]] = {}
        names = tuple(self._terms.schema or dict.fromkeys(name for checked in chosen for name in checked.averaged))
        for name in names:
            who = tuple(i for i, checked in enumerate(chosen) if name in checked.averages)
            if who:
                senders.setdefault(who, []).append(name)
        mean: dict[str, Any] = {}
        for who, theirs in senders.items():
            mean |= self._mean([chosen[i] for i in who], theirs)
        return {name: mean[name] for name in names if name in mean}

    def _streamed(self, chosen: Sequence[Checked]) -> WeightDict:
        if len(chosen) < len(self._checked):
            raise ValueError("a handler took contributions out, but with stream=True they are added up already")
        return self._streams[self._stream_of(chosen[0])].result()

    def _with_constants(self, mean: WeightDict, chosen: Sequence[Checked]) -> WeightDict:
        """The mean with the constants of the global model in their places; without those that are nothing else.

        Raises:
            EmptyAggregationError: Nothing is left.
        """
        filled = {name for checked in chosen for name in checked.filled}
        changed = {name for checked in chosen for name in checked.averaged if name not in checked.unchanged}
        whole = filled - changed
        mean = {name: value for name, value in mean.items() if name not in whole}
        if not mean:
            raise EmptyAggregationError("no variable can be averaged: all that is sent are constants, not finite")
        for name in filled - whole:
            base = self._base(name)
            target = without_tensors({name: mean[name]}, "mean")[name]
            place = ~finite_elements(base)
            target[place] = 0 if self._terms.kind is Kind.DIFF else base[place]
        return mean

    def _base(self, name: str) -> Array:
        assert self._model is not None
        return np.asarray(without_tensors({name: self._model[name]}, "global model")[name])

    def _drop(self, name: str) -> Contribution:
        del self._checked[name]
        return self.accepted.pop(name)

    def _drop_other_rounds(self) -> list[tuple[Contribution, ContributionError]]:
        """Refuses those that state another round than most."""
        refused: list[tuple[Contribution, ContributionError]] = []
        number = self.number
        for name in sorted(self._checked):
            try:
                check_terms(self.accepted[name], round=number)
            except RoundError as error:
                refused.append((self._drop(name), error))
        return refused

    def _drop_other_forms(self) -> list[tuple[Contribution, ContributionError]]:
        """Refuses those that are not of the commonest form; of equally common ones the largest counts."""
        forms: dict[Hashable, list[str]] = {}
        for name, checked in self._checked.items():
            forms.setdefault(checked.form, []).append(name)
        if len(forms) < 2:
            return []

        def rank(names: list[str]) -> tuple[bool, bool, int, int, int, str]:
            first = self._checked[names[0]]
            given_up = self._stream_of(first) in self._given_up
            return (
                given_up,
                first.unless_alone is not None,
                -self._counting(names),
                -len(names),
                -len(first.averaged),
                min(names),
            )

        usual, *others = sorted(forms.values(), key=rank)
        expected = self._checked[usual[0]]
        return [
            (self._drop(name), self._other_form(name, checked, expected, len(usual)))
            for name in sorted(name for names in others for name in names)
            for checked in [self._checked[name]]
        ]

    def _drop_other_variables(self) -> list[tuple[Contribution, ContributionError]]:
        """Refuses those in which a variable is another than in most that hold it: by shape, dtype or constants."""

        def sort(name: str, checked: Checked) -> tuple[Any, ...]:
            array = checked.arrays[name]
            return array.shape, array.dtype, None if name in checked.averages else array.tobytes()

        usual: dict[str, tuple[tuple[Any, ...], int]] = {}
        for name in {name for checked in self._checked.values() for name in checked.arrays}:
            counts = Counter(sort(name, one) for one in self._checked.values() if name in one.arrays)
            usual[name] = min(counts.items(), key=lambda item: (-item[1], str(item[0])))
        refused: list[tuple[Contribution, ContributionError]] = []
        for who, checked in sorted(self._checked.items()):
            other = next((name for name in checked.arrays if sort(name, checked) != usual[name][0]), None)
            if other is not None:
                (shape, dtype, _), count = usual[other]
                error = _other_variable(who, other, checked, (shape, dtype), count) or checked.unless_alone
                text = f"{who}: {other!r} holds numbers, and is not finite in {count} of the round's contributions"
                refused.append((self._drop(who), error or NonFiniteError(text, contributor=who, name=other)))
        return refused

    def _drop_other_constants(self) -> list[tuple[Contribution, ContributionError]]:
        """Refuses the fewer of those that send numbers for a constant of the global model, and those that keep it."""
        refused: list[tuple[Contribution, ContributionError]] = []
        if self._terms.kind is Kind.DIFF:  # what is added to infinity changes nothing
            return refused
        for name in sorted({name for checked in self._checked.values() for name in checked.filled}):
            holders = [who for who, checked in self._checked.items() if name in checked.averages]
            keep = [who for who in holders if name in self._checked[who].filled]
            change = [who for who in holders if name not in self._checked[who].filled]
            fewer, more = (change, keep) if self._counting(keep) >= self._counting(change) else (keep, change)
            what = "holds numbers" if fewer is change else "is not finite, as in the global model,"
            for who in sorted(fewer):
                text = f"{who}: {name!r} {what} where it is otherwise in {len(more)} of the round's contributions"
                refused.append((self._drop(who), NonFiniteError(text, contributor=who, name=name)))
        return refused

    def _counting(self, names: Sequence[str]) -> int:
        """How many of these count by more than 0."""
        return sum(1 for name in names if self.accepted[name].aggregation_weight)

    def _other_form(self, who: str, checked: Checked, usual: Checked, count: int) -> ContributionError:
        if checked.unless_alone is not None:
            return checked.unless_alone
        expected, found = usual.averages, checked.averages
        missing = [name for name in usual.averaged if name not in found]
        extra = [name for name in checked.averaged if name not in expected]
        if not missing and not extra:
            for name in checked.averaged:
                other = _other_variable(who, name, checked, SHAPE_AND_DTYPE(usual.arrays[name]), count)
                if other is not None:
                    return other
        what = misses_and_adds(missing, extra) or "has other constants"
        helps = (missing or extra) and not self._stream
        advice = "; partial='average' averages each variable over those who sent it" if helps else ""
        return NamesError(
            f"{who}: {what}, compared with what {count} of the round's contributions hold{advice}",
            contributor=who,
            name=next(iter(missing or extra), None),
            missing=tuple(missing[:MOST_NAMED]),
            extra=tuple(extra[:MOST_NAMED]),
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
        constants = [name for name in schema if any(name in one.filled for one in checked)]
        if constants:
            self._told.once(
                ("constants", frozenset(constants)),
                f"{listed(constants)}: not finite in the global model, and the same from clients: kept there as it is",
            )


@lru_cache(maxsize=10_000)
def _placeholder(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that takes no memory, for all that have its shape and dtype."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _other_variable(
    who: str, name: str, checked: Checked, usual: tuple[Any, ...], count: int
) -> ShapeError | DtypeError | None:
    """What is wrong with a variable that has another shape or dtype than in `count` other contributions."""
    (shape, dtype), found = usual, checked.arrays[name]
    others = f"in {count} of the round's contributions"
    if found.shape != shape:
        return ShapeError(
            f"{who}: {name!r} has shape {found.shape}, and {shape} {others}",
            contributor=who,
            name=name,
            shape=found.shape,
            expected=shape,
        )
    if found.dtype != dtype:
        return DtypeError(
            f"{who}: {name!r} has dtype {found.dtype}, and {dtype} {others}",
            contributor=who,
            name=name,
            dtype=found.dtype,
            expected=dtype,
        )
    return None


def _only(weights: WeightDict, names: Sequence[str]) -> WeightDict:
    return weights if len(names) == len(weights) else {name: weights[name] for name in names}
