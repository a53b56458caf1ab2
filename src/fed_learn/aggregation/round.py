"""`Round`: receives, refuses and at its end combines the contributions of one round. Fires no events.

The check of a contribution is left to `batch`, the choice between different parts of the model to `agreement`, and the
combination to the rule.
"""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, NamedTuple

import numpy as np

from fed_learn import kernels
from fed_learn.aggregation import agreement
from fed_learn.aggregation.accumulator import Accumulator
from fed_learn.aggregation.apart import Apart
from fed_learn.aggregation.batch import Checked, Terms
from fed_learn.aggregation.differences import add_difference
from fed_learn.aggregation.outputs import Output
from fed_learn.aggregation.plan import Plan, schemas_of
from fed_learn.aggregation.rules import Given, combined, failure_of
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.aggregation.tensors import OpenedWeights, placeholder, without_tensors
from fed_learn.aggregation.told import Told
from fed_learn.contribution import (
    ClientFailure,
    Contribution,
    Kind,
    RoundReport,
    check_countable,
    check_terms,
)
from fed_learn.errors import (
    AggregatorError,
    ContributionError,
    DuplicateContributionError,
    EmptyAggregationError,
    ExactDomainError,
    IntegerRangeError,
    NamesError,
    NonFiniteError,
    OutOfTurnError,
    SumOverflowError,
    TooFewContributionsError,
    without_tracebacks,
)
from fed_learn.limits import LEFT_OUT
from fed_learn.model_meta import FLContext
from fed_learn.values import whole_number_of
from fed_learn.weights import Array, FrozenWeights, Schema, WeightDict, finite_elements, listed, same_bits

MOST_FORMS = 4
"""Different parts that a stream adds up side by side, until the round is over and it is known which of them counts."""

UNUSABLE = (
    AggregatorError,
    EmptyAggregationError,
    ExactDomainError,
    IntegerRangeError,
    NonFiniteError,
    SumOverflowError,
)
"""Errors by which a round fails, while its job goes on."""


@dataclass(frozen=True, eq=False)
class Combined:
    """The contributions of a round, combined.

    Attributes:
        mean: What the rule made of the variables that are averaged, and what policies made of others: full weights or
            differences.
        constants: Variables that are taken as a contributor sent them, since the global model is not known.
        sent: Names of the variables that were sent, the kept constants among them.
        kind: Whether `mean` holds full weights or differences.
    """

    mean: WeightDict
    constants: WeightDict
    sent: tuple[str, ...]
    kind: Kind = Kind.FULL

    def applied_to(self, weights: FrozenWeights, output: Callable[[Schema], Output] | None = None) -> FrozenWeights:
        """The new global model. Variables that were not sent stay as they are.

        Args:
            weights: The old global model.
            output: Makes the memory to which the sum with a mean difference is written; None: new memory.

        Raises:
            NonFiniteError, IntegerRangeError: It would leave the range of a dtype.
        """
        mean = self.mean
        if self.kind is Kind.DIFF:
            base = {name: weights[name] for name in mean}
            written = None if output is None else output(Schema.of(base))
            mean = add_difference(base, mean, out=None if written is None else dict(written.arrays))
            mean = mean if written is None else written.finish()
        if list(mean) == list(weights):
            return mean if isinstance(mean, FrozenWeights) else FrozenWeights.adopt(mean)
        new = {**weights, **self.constants, **mean}
        return FrozenWeights.adopt({name: new[name] for name in weights or self.sent})


class _Seen(NamedTuple):
    """A contribution that `foresee` has checked, and the sentences to log when it is received."""

    sent: Contribution
    row: Checked
    said: list[str]


class Round:
    """The contributions of one round.

    Args:
        settings: How they are aggregated.
        number: The round, from 0; None: the one that most contributions state, of equally common ones the newer. In a
            stream it is the one that the first contribution states, since that is added up already.
        model: The global model, of arrays or tensors; None or empty: it is not known, and the contributions set it.
        own: Keep copies, which nobody else can change. False: the caller leaves what was sent as it is until the round
            is over, and tensors stay tensors.
        told: What has been told of clients in this job.

    Attributes:
        settings: As given.
        accepted: The contributions so far, by name; those of a stream without their weights.
        rejected: Who was refused, and why.

    Example:
        >>> this = Round(AggregationSettings(), number=0, model={"w": np.zeros(1), "b": np.zeros(1)})
        >>> for name, w, examples in ("site-2", 4.0, 1), ("site-1", 0.0, 3):
        ...     taken = this.receive(Contribution(name, {"w": np.array([w])}, examples, round=0))
        >>> this.close(), this.combine().mean, this.report.accepted
        ([], {'w': array([1.])}, ('site-1', 'site-2'))
    """

    def __init__(
        self,
        settings: AggregationSettings | None = None,
        *,
        number: int | None = None,
        model: WeightDict | None = None,
        own: bool = True,
        told: Told | None = None,
    ) -> None:
        self.settings = settings = AggregationSettings() if settings is None else settings
        self._model = model or None
        self._kernel = kernels.resolve(settings.kernel)
        self._plan, schema, beside = schemas_of(settings.policies, self._model)
        self._terms = Terms(
            schema=schema,
            kind=settings.kind,
            round=number,
            of_job=True,
            model=self._model,
            parts=settings.partial != "refuse",
            own=own,
            kernel=self._kernel,
            exact=settings.exact,
            plan=self._plan,
            beside=beside,
        )
        self._told = Told() if told is None else told
        # Positions, indices and masks, perhaps, which have no mean; a count of steps is a number without a shape.
        self._integers = [name for name, (shape, dtype) in (schema or {}).items() if shape and dtype.kind in "biu"]
        self._rows: dict[str, Checked] = {}
        self._rounds: Counter[int] = Counter()
        self._streams: dict[Hashable, Accumulator] = {}
        self._given_up: set[Hashable] = set()
        self._closed = False
        # Whether all hold the whole global model, so that `close` has nothing to decide or to tell.
        self._alike = self._plan is None or not (self._plan.codes or self._plan.names("local", "sum"))
        self._seen: dict[int, _Seen] = {}
        self._foreseen: tuple[list[Checked], Combined | None, float] = [], None, 0.0
        self._report = RoundReport(-1, kernel=self._kernel.name)
        self.accepted: dict[str, Contribution] = {}
        self.rejected: list[ClientFailure] = []

    @property
    def number(self) -> int | None:
        """The round, if it is known; else the one that most of the contributions so far state."""
        if self._terms.round is not None:
            return self._terms.round
        return max(self._rounds, key=lambda number: (self._rounds[number], number), default=None)

    @property
    def report(self) -> RoundReport:
        """The report so far; its round is -1 while that is not known."""
        number = self.number
        combined = bool(self._report.accepted) or self._report.error is not None
        return replace(
            self._report,
            round=-1 if number is None else number,
            accepted=self._report.accepted if combined else tuple(sorted(self.accepted)),
            rejected=tuple(self.rejected),
        )

    def foresee(self, sent: Sequence[Contribution], output: Callable[[Schema], Output] | None = None) -> bool:
        """Combines contributions before they are received, where all are at hand, so that memory is read only once.

        The result shows whether all values are finite. It is the result of the round, unless one of these contributions
        turns out not to count.

        Args:
            sent: What clients sent, which nobody changes until the round is over. Untrusted.
            output: As in `combine`.

        Returns:
            False if values are not finite, as in a model with masks: then it is of no use in later rounds either.
        """
        settings = self.settings
        usual = settings.how._shows_not_finite and not settings.exact and settings.partial != "average"
        if not usual or settings.stream or self._terms.schema is None:
            return True
        started, terms = time.perf_counter(), replace(self._terms, kernel=None)
        seen: dict[str, _Seen] = {}
        for contribution in sent:
            said: list[str] = []
            try:
                row = terms.check(contribution, seen, said.append)
            except ContributionError:  # which `receive` raises again
                continue
            if row.aggregation_weight:
                seen[row.contributor] = _Seen(contribution, replace(row, scanned=True), said)
        rows = [seen[name].row for name in sorted(seen)]
        try:
            made = self._combined(rows, rows, output, None) if rows else None
        except NonFiniteError:
            return False
        except (ContributionError, *UNUSABLE):
            return True
        self._seen = {id(one.sent): one for one in seen.values()}
        self._foreseen = rows, made, time.perf_counter() - started
        return True

    def receive(self, sent: Contribution) -> Contribution:
        """Accepts a contribution, or raises: then the round is as if it had never come, and the caller calls `refuse`.

        Args:
            sent: What a client sent. Untrusted.

        Returns:
            The contribution as it is kept; of a stream without its weights.

        Raises:
            ContributionError, ExactDomainError: It is refused.
        """
        seen = self._seen.get(id(sent))
        if seen is not None and seen.sent is sent and seen.row.contributor not in self.accepted:
            row, said = seen.row, seen.said
        else:
            said = []
            row = self._terms.check(sent, self.accepted, said.append)
        self._check_by_rule(row.sent)
        self._tell_of_integers(row)
        if self.settings.stream:
            row = self._added(row)
        who, kept = row.contributor, row.sent
        self._rows[who], self.accepted[who] = row, kept
        self._closed = False
        self._alike = self._alike and row.form is None and not row.filled and self._terms.schema is not None
        number = kept.round if self._terms.round is not None else whole_number_of(sent.round)
        if self._terms.round is None and number is not None:
            self._rounds[number] += 1
        for text in said:
            self._told.once((who, "rounded"), text)
        if LEFT_OUT in kept.info:
            self._told.once((who, "left out"), f"{who}: of its metrics and info are left out: {kept.info[LEFT_OUT]}")
        if self._terms.round is None and self.settings.stream:
            self._terms = replace(self._terms, round=number)
        return kept

    def refuse(self, who: object, error: Exception) -> Exception:
        """Records that a contribution was refused, and why. Of the error no traceback is kept, for it holds weights.

        Args:
            who: The name of its sender, whatever that is.
            error: Why.
        """
        self.rejected.append(ClientFailure(who, without_tracebacks(error)))  # type: ignore[arg-type]
        return error

    def close(self) -> list[tuple[Contribution, ContributionError]]:
        """Decides which contributions count together, now that all are in; the others are refused.

        Returns:
            Those that are refused after all, and why; the caller calls `refuse` for each.
        """
        refused: list[tuple[Contribution, ContributionError]] = []
        self._closed = True
        if self._alike and self._terms.round is not None:
            return refused

        def drop(found: agreement.Refused) -> None:
            for name, error in found:
                del self._rows[name]
                refused.append((self.accepted.pop(name), error))

        if self._terms.round is None:
            drop(agreement.of_other_rounds(self._rows, self.number))
        drop(agreement.alone(self._rows))
        if self.settings.partial != "average":
            drop(agreement.of_other_forms(self._rows, self._is_given_up, advise=not self.settings.stream))
        elif not self._terms.schema:
            drop(agreement.of_other_variables(self._rows))
        if not self.settings.stream:
            drop(agreement.of_sums(self._rows))
        if self.settings.kind is not Kind.DIFF:  # what is added to infinity changes nothing
            drop(agreement.of_other_constants(self._rows))
        if self._terms.round is None and refused:
            self._rounds = Counter(
                n for row in self._rows.values() if (n := whole_number_of(row.sent.round)) is not None
            )
        self._forget_streams()
        self._tell()
        return refused

    def too_few(self, count: int, required: int, taken: int = 0) -> TooFewContributionsError | None:
        """The error by which a round with too few contributions fails; None if there are enough.

        Args:
            count: How many there are.
            required: How many the round needs.
            taken: How many a handler took out.
        """
        if count >= required:
            return None
        number, out = self.number, f" after a handler took out {taken}" if taken else ""
        return TooFewContributionsError(
            f"round {'?' if number is None else number + 1}: {count} accepted contributions{out}, {required} required; "
            "the global model stands",
            count=count,
            required=required,
            round=number,
        )

    def fail(self, error: Exception, accepted: Sequence[str] | None = None) -> None:
        """Records in the report why the contributions are not combined.

        Args:
            error: Why.
            accepted: Names of those that would have been combined; None: all.
        """
        names = tuple(sorted(self.accepted)) if accepted is None else tuple(accepted)
        self._report = replace(self._report, accepted=names, error=without_tracebacks(error))

    def combine(
        self,
        contributions: Sequence[Contribution] | None = None,
        *,
        output: Callable[[Schema], Output] | None = None,
        ctx: FLContext | None = None,
    ) -> Combined:
        """Combines contributions by the rule; the report tells how long it took.

        Args:
            contributions: Those that count; None: all that were accepted. One that was not received in this form is
                checked now.
            output: Makes the memory to write to; used where all variables are written at once. None: new memory.
            ctx: The context of the job, for rules that want it.

        Raises:
            EmptyAggregationError: None of them counts by more than 0.
            NonFiniteError, IntegerRangeError, SumOverflowError, ExactDomainError: The mean leaves the range of a dtype.
            AggregatorError: A rule of a user's own failed.
            ContributionError: One that was not received in this form is bad.
            OutOfTurnError: `close` has not been called since the last one was received.
            ValueError: Some are left out that are added up already (`stream`).
        """
        if not self._closed:
            raise OutOfTurnError("combine: close comes first")
        started = time.perf_counter()
        chosen = self._chosen(self.accepted.values() if contributions is None else contributions)
        rows = [row for row in chosen if row.aggregation_weight]
        if not rows:
            raise EmptyAggregationError(
                "no contribution counts by more than 0 examples" if chosen else "no contributions to average"
            )
        foreseen, made, before = self._foreseen
        if made is None or len(rows) != len(foreseen) or not all(map(is_, rows, foreseen)):
            made, before = self._combined(chosen, rows, output, ctx), 0.0
        self._foreseen = [], None, 0.0
        self._report = replace(
            self._report,
            error=None,  # that of an earlier attempt, with too few contributions
            accepted=tuple([row.contributor for row in chosen]),
            total_weight=float(sum([row.aggregation_weight for row in chosen])),
            aggregation_seconds=before + time.perf_counter() - started,
            aggregation_bytes=len(chosen) * sum([int(value.nbytes) for value in made.mean.values()]),
        )
        return made

    def _combined(
        self,
        chosen: Sequence[Checked],
        rows: Sequence[Checked],
        output: Callable[[Schema], Output] | None,
        ctx: FLContext | None,
    ) -> Combined:
        settings, names = self.settings, self._names_sent(rows)
        given = Given(
            rows,
            self._terms.schema or Schema.of(rows[0].arrays),
            exact=settings.exact,
            kernel=settings.kernel,
            output=output,
            model=self._model if isinstance(self._model, FrozenWeights) else None,
            ctx=ctx,
        )
        if settings.how.makes_model:
            return Combined(combined(settings.how, given), {}, names)
        if settings.stream:
            if len(chosen) < len(self._rows):
                raise ValueError("a handler took contributions out, but with stream=True they are added up already")
            mean = self._streams[self._stream_of(chosen[0])].result()
        elif settings.partial == "average":
            mean = self._combined_each(given)
        else:
            problem = agreement.of_another_part(rows)
            if problem is not None:
                raise problem
            # Constants are put back into the mean, and what is apart comes beside it.
            if [row for row in rows if row.filled or row.apart is not None]:
                given = replace(given, output=None)
            mean = self._combined_of(given, rows, list(rows[0].averaged))
        constants: dict[str, Any] = {}
        for row in () if self._terms.schema else reversed(rows):
            constants |= row.constants
        apart = {} if settings.stream else _combined_apart(rows)
        if self._terms.schema is None:
            constants |= apart
        else:
            mean = {**mean, **apart}
        return Combined(self._with_constants(mean, rows), constants, names, settings.kind)

    def sent(self, contributions: Sequence[Contribution]) -> tuple[str, ...]:
        """Names of the variables that are in any of these contributions, in the order of the global model."""
        return self._names_sent([self._found(contribution) for contribution in contributions])

    def averaged(self, contributions: Sequence[Contribution]) -> frozenset[str]:
        """Names of the variables that are averaged: those that were sent, but for unchanged constants."""
        rows = [self._found(contribution) for contribution in contributions]
        return frozenset(name for row in rows for name in row.averaged if name not in row.unchanged)

    def _names_sent(self, rows: Sequence[Checked]) -> tuple[str, ...]:
        if self._terms.schema and None in [row.form for row in rows] and self._plan is None:
            return tuple(self._terms.schema)
        names = {name: None for row in rows for name in row.arrays}
        for row in rows:
            names |= {} if row.apart is None else dict.fromkeys([*row.apart.beside, *row.apart.same])
        if self._plan is not None:  # clients have them as they are
            names |= dict.fromkeys(self._plan.names("keep", "same"))
        return tuple(name for name in (self._model if self._terms.schema else names) or () if name in names)

    def _combined_of(self, given: Given, rows: Sequence[Checked], names: Sequence[str]) -> WeightDict:
        """Combines some variables of contributions that all have them."""
        if not names:
            return {}
        schema = Schema({name: given.schema[name] for name in names})
        if self._terms.schema is None:  # contributions have been compared with one another alone
            for row in rows:
                schema.check({name: row.arrays[name] for name in names}, row.contributor)
        return combined(self.settings.how, replace(given, rows=[row.only(names) for row in rows], schema=schema))

    def _combined_each(self, given: Given) -> WeightDict:
        """Combines each variable over the contributions that have it."""
        senders: dict[tuple[int, ...], list[str]] = {}
        names = tuple(self._terms.schema or dict.fromkeys(name for row in given.rows for name in row.averaged))
        for name in names:
            who = tuple(i for i, row in enumerate(given.rows) if name in row.averaged)
            if who:
                senders.setdefault(who, []).append(name)
        mean: dict[str, Any] = {}
        for who, theirs in senders.items():
            rows = [given.rows[i] for i in who]
            schema = given.schema if self._terms.schema else Schema.of({name: rows[0].arrays[name] for name in theirs})
            mean |= self._combined_of(replace(given, output=None, schema=schema), rows, theirs)
        return {name: mean[name] for name in names if name in mean}

    def _added(self, row: Checked) -> Checked:
        """Folds a contribution into the stream of its form."""
        key = self._stream_of(row)
        if key not in self._streams:
            self._make_room(row)
        stream = self._streams.get(key)
        if stream is None:
            stream = Accumulator(exact=self.settings.exact, kernel=self.settings.kernel)
        # Nobody changes its arrays: they are frozen, or the caller has promised so (`own=False`). No copy is needed.
        stream.take(row.only(list(row.averaged)), borrow=True)
        stream.flush()
        self._streams[key] = stream
        kept = {name: placeholder(array.shape, array.dtype) for name, array in row.arrays.items()}
        filled = dict.fromkeys(row.filled, np.empty(0))
        return replace(
            row,
            contribution=row.sent.without_weights(),
            held=OpenedWeights(kept, {}, {}),
            filled=filled,
            apart=None if row.apart is None else row.apart.emptied(),
        )

    def _forget_streams(self) -> None:
        """Drops the sums of refused contributions: of one sum either all contributions are refused, or none."""
        held = {self._stream_of(row) for row in self._rows.values()}
        self._streams = {key: stream for key, stream in self._streams.items() if key in held}
        self._given_up &= held

    def _stream_of(self, row: Checked) -> Hashable:
        return row.form, tuple(sorted(row.filled)) if self.settings.kind is Kind.FULL else ()

    def _is_given_up(self, row: Checked) -> bool:
        return self._stream_of(row) in self._given_up

    def _make_room(self, row: Checked) -> None:
        """Drops the smallest of many streams to make room for that of a contribution.

        Raises:
            NamesError: The new stream would be smaller still, or it has been dropped before.
        """
        if not self._is_given_up(row):
            if len(self._streams) < MOST_FORMS:
                return
            members = Counter(self._stream_of(other) for other in self._rows.values())
            sizes = {self._stream_of(other): len(other.averaged) for other in self._rows.values()}
            smallest = min(self._streams, key=lambda key: (members[key], sizes[key]))
            if row.form is None or (members[smallest], sizes[smallest]) < (1, len(row.averaged)):
                self._given_up.add(smallest)
                del self._streams[smallest]
                return
        raise NamesError(
            f"{row.contributor}: holds {listed(row.averaged)}, and {MOST_FORMS} other parts of the model are added up "
            "already",
            contributor=row.contributor,
        )

    def _chosen(self, contributions: Iterable[Contribution]) -> list[Checked]:
        """The checked form of contributions, in the order of their names."""
        found: dict[str, Checked] = {}
        for contribution in contributions:
            row = self._found(contribution)
            if row.contributor in found:
                raise DuplicateContributionError(f"{row.contributor}: contributed already", contributor=row.contributor)
            found[row.contributor] = row
        return [found[name] for name in sorted(found)]

    def _found(self, given: Contribution) -> Checked:
        """The checked form of a contribution that is to be averaged; one that a handler has made is checked now."""
        known = self._rows.get(given.contributor)
        if known is not None and known.contribution is given:
            return known
        if known is not None and known.sent.weights is given.weights:
            weight = check_countable(check_terms(given, kind=self.settings.kind, round=self.number), given.contributor)
            if not self.settings.stream or weight == known.aggregation_weight:
                return replace(known, aggregation_weight=weight, contribution=replace(given, aggregation_weight=weight))
        if self.settings.stream:
            raise ValueError(
                "a handler changed which contributions are averaged, or their weights, but with stream=True they are "
                "added up already"
            )
        self._check_by_rule(given)
        return replace(self._terms, round=self.number).check(given)

    def _check_by_rule(self, contribution: Contribution) -> None:
        """Lets the rule refuse a contribution.

        Raises:
            ContributionError: It does.
            AggregatorError: The code of the rule failed, which is not the client's doing.
        """
        try:
            self.settings.how.check(contribution)
        except ContributionError:
            raise
        except Exception as error:
            raise failure_of(self.settings.how, error) from error

    def _with_constants(self, mean: WeightDict, rows: Sequence[Checked]) -> WeightDict:
        """The mean with the constants of the global model in their places, without variables that nobody has changed.

        Raises:
            EmptyAggregationError: No variable is left.
        """
        filled = {name for row in rows for name in row.filled}
        changed = {name for row in rows for name in row.averaged if name not in row.unchanged} if filled else set()
        whole = filled - changed
        if whole:
            mean = {name: value for name, value in mean.items() if name not in whole}
        if not mean:
            raise EmptyAggregationError("no variable can be averaged: all that is sent are constants, not finite")
        for name in filled - whole:
            base = self._base(name)
            target = without_tensors({name: mean[name]}, "mean")[name]
            place = ~finite_elements(base)
            target[place] = 0 if self.settings.kind is Kind.DIFF else base[place]
        return mean

    def _base(self, name: str) -> Array:
        """A variable of the global model, as an array."""
        assert self._model is not None
        return np.asarray(without_tensors({name: self._model[name]}, "global model")[name])

    def _tell_of_integers(self, row: Checked) -> None:
        """Logs once which arrays of integers and booleans a client has changed, since they may be no numbers."""
        for name in self._integers:
            if name not in row.averaged or row.filled.get(name) is not None or not row.held.weights[name].size:
                continue
            array = row.only([name]).on_host().arrays[name]
            if array.any() if row.sent.kind is Kind.DIFF else not same_bits(array, self._base(name)):
                self._told.once(
                    ("integers", name),
                    f"{row.contributor}: {name!r} ({array.dtype}) is not that of the global model, and is averaged and "
                    f"rounded: where it holds no numbers, as positions and masks do not, policies={{{name!r}: 'same'}} "
                    "refuses another, 'keep' leaves the global model's",
                )

    def _tell(self) -> None:
        """Logs once that only a part of the global model is averaged, and which constants and codes are kept."""
        schema, rows = self._terms.schema, self._rows.values()
        if not schema or not rows:
            return
        if self._plan is not None and self._plan.codes:
            self._told.once(
                ("codes",),
                f"{listed(self._plan.codes)}: {' and '.join(sorted(set(self._plan.codes.values())))}, which have no "
                "mean: kept as they are in the global model, and clients that send others are refused",
            )
        local = [] if self._plan is None else self._plan.names("local")
        if local:
            self._told.once(
                ("local",),
                f"{listed(local)}: local to each client, by policy; the global model, and so its validation on the "
                "server and its files, has what it began with in their place",
            )
        combined = [*schema, *([] if self._plan is None else self._plan.names("max", "sum"))]
        sent = {*combined} & {*self._names_sent(list(rows))}
        if len(sent) < len(combined):
            kept = [name for name in combined if name not in sent]
            self._told.once(
                ("part", tuple(sorted(sent))),
                f"clients send {len(sent)} of the global model's {len(combined)} variables: these are averaged, and "
                f"the rest is kept as it is: {listed(kept)}",
            )
        summed = [] if self._plan is None or self.settings.kind is Kind.DIFF else self._plan.names("sum")
        growing = [name for name in summed if self._base(name).any()]
        if growing:
            self._told.once(
                ("sums",),
                f"{listed(growing)}: full weights are summed, and the global model's own value is not 0, so that it "
                "counts once for each client: differences (kind='diff') add up what the round has added",
            )
        if self.settings.partial == "average" and len(rows) > 1:
            beside = [name for row in rows if row.apart is not None for name in row.apart.beside]
            senders = Counter([*(name for row in rows for name in row.averaged), *beside])
            lone = [name for name in combined if senders[name] == 1]
            if lone:
                self._told.once(
                    ("lone", tuple(sorted(lone))),
                    f"{listed(lone)}: sent by one of {len(rows)} contributions alone, whose value it is then",
                )
        filled = {name for row in rows for name in row.filled}
        constants = [name for name in schema if name in filled] if filled else []
        if constants:
            self._told.once(
                ("constants", tuple(sorted(constants))),
                f"{listed(constants)}: not finite in the global model, and the same from clients: kept there as it is",
            )


def _combined_apart(rows: Sequence[Checked]) -> dict[str, Any]:
    """What becomes of the variables that are the largest, summed or the same, by the contributions that have them."""
    made: dict[str, Any] = {}
    apart = [(row.contributor, row.apart) for row in rows if row.apart is not None]
    for name in dict.fromkeys(name for _, parts in apart for name in (*parts.beside, *parts.same)):
        one = Apart(Plan(apart[0][1].plan.policies, {}, apart[0][1].plan.codes))
        for who, parts in apart:
            only = parts.only(name)
            one.take(one.check(only, who), who)
        made |= one.values()
    return made
