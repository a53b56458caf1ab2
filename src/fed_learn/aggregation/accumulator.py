"""The weighted mean of contributions as they stream in: one float64 sum per element, and none of the inputs.

A contribution is checked whole (`add`), and waits for a while with others (`waiting`), so that the sums are read and
written once for all of them (`_add_waiting`); the mean is what they divide to (`result`). How contributions are opened
and checked is left to `batch`, exact sums to `exact`, where results go to `outputs`.
"""

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, overload

import numpy as np

from fed_learn import kernels
from fed_learn.aggregation import tensors
from fed_learn.aggregation.addable import check_addable, check_integers, finite_values, largest_integers
from fed_learn.aggregation.apart import Apart, assembled, copied, held_by, no_difference, part_of
from fed_learn.aggregation.arrays import is_frozen
from fed_learn.aggregation.batch import Checked, Terms
from fed_learn.aggregation.exact import ExactSums
from fed_learn.aggregation.mean import LIFT
from fed_learn.aggregation.outputs import Output, new_values, outputs_for
from fed_learn.aggregation.plan import Plan, check_fitting, not_kept, planned
from fed_learn.aggregation.tensors import check_devices, device_named
from fed_learn.aggregation.waiting import Waiting
from fed_learn.contribution import Contribution, Kind, in_order
from fed_learn.environment import sum_in_order
from fed_learn.errors import (
    BrokenAccumulatorError,
    DuplicateContributionError,
    EmptyAggregationError,
    ExactDomainError,
    KindError,
    MergeError,
    RoundError,
    SumOverflowError,
    brief,
)
from fed_learn.kernels.base import Kernel
from fed_learn.kernels.digits import DigitsError, Float64Array
from fed_learn.policies import Policies
from fed_learn.weights import Array, Schema, WeightDict, size_text

logger = logging.getLogger(__name__)

FLOAT64 = np.dtype(np.float64)


class Accumulator:
    """Averages contributions one at a time; keeps one float64 sum per element and none of the inputs.

    What is checked is what is added: weights that somebody could change meanwhile are copied first, and up to
    `MOST_COPIED` copies wait, so that the sums are read and written less often. That takes the memory of two models,
    and no time. What nobody can change, as `FrozenWeights` and views of bytes, is not copied. Neither is what the
    caller promises to leave alone for a while: `add(..., borrow=True)` lets up to `MOST_BORROWED` wait.

    The bits are those of `weighted_average` over the same contributions in the order in which they were added; with
    `exact=True` any order and any tree of merges give the same bits. Not to be shared between threads without a lock.
    Can be pickled; unpickled, it uses the kernel that is current there. Weights may be tensors of a framework, and the
    result is where those of the first contribution are: see `fed_learn.aggregation.tensors`.

    Args:
        like: The global model: sets names, shapes, dtypes and order. None: the first contribution does.
        kind: What contributions are; weights that are none of a `Contribution` are taken for it. None: the first
            contribution decides.
        round: The round to which they belong. None: the first contribution that states one decides.
        exact: Sum exactly (see `fed_learn.aggregation.exact` for the domain and the memory it takes).
        policies: As of `weighted_average`; `"keep"` needs `like`. What is summed or the largest is kept exactly.
        kernel: Name of the kernel; None: the current one, looked up now.
        device: Where the sums lie, `"cuda:0"` or a `torch.device`; arrays and tensors that lie elsewhere are moved.
            None: each variable's where the first contribution has it.

    What the first one decides, a wrong first one decides too, and the right ones after it are refused: a server that
    knows the model, the kind and the round says so.

    Raises:
        KernelNameError, KernelUnavailableError: The kernel cannot be used.
        ValueError: There is no such kind, or no such device here; or a policy is none, or fits no variable.

    Example:
        >>> mean = Accumulator()
        >>> mean.add({"w": np.float32([0, 1])}, 300, "site-1")
        >>> mean.add({"w": np.float32([4, 1])}, 100, "site-2")
        >>> mean.result(), mean.total_weight
        ({'w': array([1., 1.], dtype=float32)}, 400.0)
    """

    def __init__(
        self,
        *,
        like: WeightDict | None = None,
        kind: Kind | None = None,
        round: int | None = None,
        exact: bool = False,
        policies: Mapping[str, str] | None = None,
        kernel: str | None = None,
        device: object = None,
    ) -> None:
        self._device = device_named(device)
        self._requested = kernels.requested(kernel)
        self._kernel = kernels.resolve(self._requested)
        self._exact = exact
        self._place: tensors.Place | None = None
        self._policies = Policies(policies)
        self._planned = like is not None  # else the first contribution decides
        self._plan = planned(self._policies, like, "like")
        check_fitting(self._policies, like)
        self._order = self._ordered(like, self._plan)
        kept = [] if self._plan is None else self._plan.names("keep")
        self._kept: dict[str, Any] = {} if like is None else {name: copied(like[name]) for name in kept}
        self._like_apart = None if like is None or self._plan is None else held_by(self._plan, like)
        self._apart: Apart | None = None
        self._schema = None if like is None else tensors.schema_of(_averaged(self._plan, like), "like")
        self._names = None if like is None else tuple(like)  # the order of weights that come as a list
        self._sums: dict[str, Float64Array] = {}
        self._exact_sums: ExactSums | None = None
        self._total: float | Fraction = Fraction() if exact else 0.0
        self._count = 0
        self._largest: dict[str, int] = {}
        self._broken = False
        self._waiting = Waiting()
        self._done: Any = None  # a mark in the work of devices
        self._contributors: dict[str, None] = {}
        self._kind = None if kind is None else Kind(kind)
        self._bare = Kind.FULL if self._kind is None else self._kind
        self._round = round

    @property
    def total_weight(self) -> float:
        """The sum of the aggregation weights so far."""
        return float(self._total)

    @property
    def contributors(self) -> tuple[str, ...]:
        """Names of those that contributed so far; contributions without a name are not among them."""
        return tuple(self._contributors)

    def __len__(self) -> int:
        """The number of contributions so far that count by more than 0."""
        return self._count

    def __repr__(self) -> str:
        size = size_text(None if self._schema is None else _placeholders(self._schema))
        count = f"{self._count} contribution{'s' * (self._count != 1)}"
        return f"Accumulator({count}, {size}, total_weight={self.total_weight:g})"

    @overload
    def add(self, weights: Contribution, *, borrow: bool = False) -> None: ...
    @overload
    def add(
        self, weights: WeightDict, aggregation_weight: float, contributor: str | None = None, *, borrow: bool = False
    ) -> None: ...

    def add(
        self,
        weights: WeightDict | Contribution,
        aggregation_weight: float | None = None,
        contributor: str | None = None,
        *,
        borrow: bool = False,
    ) -> None:
        """Adds one contribution. It is checked whole before anything is added.

        Args:
            weights: A weight dict, or a `Contribution`, which brings the other two.
            aggregation_weight: The scalar by which it counts; a stream has no default for it. By 0 it is checked, and
                adds nothing.
            contributor: Who sent it; the same name twice is refused. None: anonymous.
            borrow: The accumulator may keep the arrays, and the caller promises to leave them as they are, until it is
                asked for `flush()`, `result()`, a merge or a copy, or adds what is not borrowed. At most
                `MOST_BORROWED` wait. The bits are the same.

        Raises:
            ContributionError: It is refused; the class says why, the attributes who and where.
            AggregationWeightError: Also for a weight outside of 2**-100 to 2**100.
            IntegerRangeError: Integers so large that their mean would not be right to the unit.
            ExactDomainError: With `exact`, a value or weight outside of the domain.
            BrokenAccumulatorError: An earlier call was interrupted while it was adding.
        """
        self._check_usable()
        contribution = self._as_contribution(weights, aggregation_weight, contributor)
        contribution = contribution if self._names is None else in_order(contribution, self._names)
        named = isinstance(weights, Contribution) or contributor is not None
        terms = Terms(self._schema, self._kind, self._round, device=self._device)
        plan, order, parts = self._plan, self._order, None
        if not self._planned:
            plan = planned(self._policies, contribution.weights, tensors.label_of(contribution.contributor))
            check_fitting(self._policies, contribution.weights)
        if plan is not None:
            if plan.names("keep") and not self._kept:
                raise not_kept(plan.names("keep"))
            given, parts = plan.apply(contribution.weights, tensors.label_of(contribution.contributor))
            order, contribution = self._ordered(contribution.weights, plan), contribution.settled(weights=given)
        row = terms.check(contribution, self._contributors if named else ())
        if plan is not None and parts is not None:
            plan.check_names(parts, row.contributor)
        self.take(row if parts is None else replace(row, apart=parts), borrow=borrow, named=named)
        if not self._planned:
            self._planned, self._plan, self._order = True, plan, order

    def take(self, row: Checked, *, borrow: bool = False, named: bool = True) -> None:
        """Adds a checked contribution, of which only the values are looked at, unless that is done as well.

        Args:
            row: The contribution: of the schema, the kind, the round.
            borrow: See `add`.
            named: Whether its name counts as that of a contributor.

        Raises:
            ContributionError, ExactDomainError: As `add` does, for values and weights that cannot be added.
        """
        held, a = row.held, row.aggregation_weight
        beside, apart = None, self._apart
        if row.apart is not None:
            apart = Apart(row.apart.plan, self._like_apart, row.sent.kind) if apart is None else apart
            beside = apart.check(row.apart, row.contributor)
        if self._count:
            check_devices(held.devices, self._devices, row.contributor)
        kernel, place = self._kernel_for(held.device), held.place
        on_devices = not self._exact and place is not None and place.resident is not None
        row = row if on_devices else row.on_host()
        self._wait()
        copies = None
        if a and not borrow and (on_devices or not all(map(is_frozen, row.arrays.values()))):
            if not self._count:
                self._waiting = Waiting()  # what it has room for may be what was refused
            copies = self._waiting.room_for(row.arrays, place if on_devices else None)
        values = finite_values(kernel, row, copies, on_devices=on_devices)
        if copies is not None:
            self._mark()  # what is refused from here on has been written to memory that is used again
        largest = largest_integers(row, values)
        if a:
            check_addable(row, values, exact=self._exact)
            check_integers(largest, self._largest, self._count + 1, self._exact, row.contributor, values)

        names = {row.contributor: None} if named else {}
        self._schema = Schema.of(row.arrays) if self._schema is None else self._schema
        if beside is not None and apart is not None:
            self._apart = apart
            apart.take(beside, row.contributor, counts=bool(a))
        if not a:
            self._contributors.update(names)
            return
        self._broken = True
        if not self._count:
            self._place, self._kernel = place, kernel
        in_order = [values[name] for name in self._schema]
        if self._waiting.put(in_order, a, borrowed=borrow, copied=copies is not None):
            self._add_waiting()
        self._mark()
        sent = row.sent
        self._note(1, a, sent.kind, sent.round, largest, names)
        self._broken = False

    def flush(self) -> None:
        """Adds the borrowed contributions that wait; their arrays are the caller's again.

        Example:
            >>> mean, received = Accumulator(), np.float32([1, 2])
            >>> mean.add({"w": received}, 10, "site-1", borrow=True)
            >>> mean.flush()
            >>> received[:] = 0
            >>> mean.result()
            {'w': array([1., 2.], dtype=float32)}
        """
        self._check_usable()
        if not self._waiting:
            return
        self._refuse_environment()
        self._wait()
        self._broken = True
        self._add_waiting()
        self._mark()
        self._broken = False

    def merge(self, other: "Accumulator") -> None:
        """Adds the sums that `other` holds; `other` stays as it is.

        With `exact=True` the bits are then those of adding its contributions here.

        Raises:
            NamesError, ShapeError, DtypeError: The schemas differ.
            DuplicateContributionError: A contributor is in both.
            KindError, RoundError: They hold contributions of different kinds or rounds.
            IntegerRangeError: Together they could not be averaged to the unit.
            MergeError: One is exact and the other is not, their policies differ, their sums lie on different devices,
                or `other` is this accumulator.
        """
        self._check_usable()
        other.flush()
        self._check_mergeable(other)
        if not other._count:  # nothing to add, from contributors that count by 0
            self._contributors.update(other._contributors)
            return
        kernel = self._kernel_for(next(iter(other._devices.values()), "cpu"))
        check_integers(other._largest, self._largest, self._count + other._count, self._exact)
        self._refuse_environment()
        self._wait()
        other._wait()

        self._broken = True
        if not self._count:
            self._place, self._kernel = other._place, kernel
        self._schema = other._schema if self._schema is None else self._schema
        assert self._schema is not None
        self._merge_apart(other)
        self._add_waiting()
        start = self._start(self._schema)
        if self._exact_sums is not None and other._exact_sums is not None:
            self._exact_sums.merge(other._exact_sums)
        else:
            self._add([[other._sums[name]] for name in self._sums], [1.0], start)
        self._mark()
        other._mark()
        self._note(other._count, other._total, other._kind, other._round, other._largest, other._contributors)
        self._broken = False

    def result(self, out: WeightDict | None = None) -> WeightDict:
        """The mean of what was added so far; more can be added afterwards.

        Args:
            out: A weight dict of the same schema to write the result to.

        Returns:
            A new dict in the order of the schema, of tensors where the first contribution had them; or `out`.

        Raises:
            EmptyAggregationError: Nothing was added, or nothing that counts by more than 0.
            SumOverflowError: A sum left float64, although the inputs were finite. `weighted_average` has no such
                limit.
            OutputError: `out` cannot be written to.
        """
        self.flush()
        if not self._count:
            raise EmptyAggregationError("no contributions to average")
        assert self._schema is not None
        kept = no_difference(self._kept) if self._kept and self._kind is Kind.DIFF else self._kept
        apart = {} if self._apart is None else kept | self._apart.values()
        order = [*(self._order or (*self._schema, *apart))]
        into = part_of(out, order, self._schema) if apart and out is not None else out
        outputs = outputs_for(self._schema, self._place, into, on_devices=not self._exact)
        if self._exact:
            self._divide_exact(outputs)
        else:
            self._wait()
            total = math.ldexp(float(self._total), LIFT)
            flags = self._kernel.divide(list(self._sums.values()), total, list(outputs.arrays.values()))
            self._mark()
            for name, flag in zip(self._sums, flags, strict=True):
                if flag:
                    raise SumOverflowError(
                        f"{name!r}: the sum left the range of float64 (weighted_average can take such values), or "
                        "borrowed weights have changed before they were added",
                        name=name,
                    )
        mean = outputs.finish()
        return assembled(order, mean, apart, out) if apart else mean

    @staticmethod
    def _ordered(weights: Any, plan: Plan | None) -> list[str] | None:
        """Names of the variables of the result, in order; None if all are averaged."""
        return None if plan is None or weights is None else [name for name in weights if plan.of.get(name) != "local"]

    def __copy__(self) -> "Accumulator":
        return copy.deepcopy(self)  # one that shared the sums would add to those of both

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        self._wait()
        left_out = ("_kernel", "_requested", "_waiting", "_done")
        state = {key: value for key, value in self.__dict__.items() if key not in left_out}
        on_devices = {name: acc for name, acc in self._sums.items() if not isinstance(acc, np.ndarray)}
        if on_devices:
            state["_sums"] = {**self._sums, **tensors.look_at(next(iter(on_devices.values()))).on_host(on_devices)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._waiting = Waiting()
        self._done = None
        self._requested = kernels.requested()
        self._sums = {name: acc if acc.flags.writeable else acc.copy() for name, acc in self._sums.items()}
        self._put_on_devices()
        self._kernel = kernels.resolve(device=next(iter(self._devices.values()), "cpu") if self._sums else "cpu")

    def _put_on_devices(self) -> None:
        """Puts sums that were unpickled on their devices; leaves all on the host where one of these is missing."""
        named = [] if self._device in (None, "cpu") else [str(self._device)]
        for device in dict.fromkeys([*self._devices.values(), *named]):
            problem = tensors.why_not_there(device)
            if problem is not None:
                logger.warning("Sums of an accumulator were on %s, and stay on the host here: %s", device, problem)
                self._place = None if self._place is None else self._place.on_host()
                self._device = None if self._device is None else "cpu"
                return
        framework = None if self._place is None else self._place.resident
        if framework is not None and self._sums:
            assert self._schema is not None
            arrays, self._sums = self._sums, self._new_sums(self._schema)
            for name, acc in self._sums.items():
                if isinstance(acc, np.ndarray):
                    acc[...] = arrays[name]
                else:
                    framework.write(acc, arrays[name].copy())
            self._mark()

    @property
    def _devices(self) -> Mapping[str, str]:
        return {} if self._place is None else self._place.devices

    # Work on a device is done later, in the order in which one stream was given it: another has to wait for that.

    def _mark(self) -> None:
        """Marks what has been done with the sums on devices so far."""
        framework = None if self._place is None or self._exact else self._place.resident
        self._done = None if framework is None else framework.mark(self._devices.values())

    def _wait(self) -> None:
        """Lets what is done from now on begin after that."""
        if self._done is not None and self._place is not None and self._place.resident is not None:
            values = [*self._sums.values(), *self._waiting.values()]
            self._place.resident.wait(self._done, [value for value in values if not isinstance(value, np.ndarray)])

    def _kernel_for(self, device: str) -> Kernel:
        """The kernel for weights on a device; exact sums are taken of copies on the host."""
        if device == "cpu":
            return self._kernel
        on_device = kernels.resolve(self._requested, device=device)
        return self._kernel if self._exact else on_device

    def _divide_exact(self, outputs: Output) -> None:
        assert self._exact_sums is not None
        total = Fraction(self._total)
        numbers = []
        for i, output in enumerate(outputs.arrays.values()):
            if output.dtype.kind in "biu":
                self._exact_sums.integer_mean(self._kernel, i, total, output)
            else:
                numbers.append(i)
        arrays = list(outputs.arrays.values())
        self._exact_sums.divide(self._kernel, numbers, total, [arrays[i] for i in numbers])

    def _add_waiting(self) -> None:
        """Adds all that waits to the sums, in the order in which it came."""
        if not self._waiting:
            return
        assert self._schema is not None
        start = self._start(self._schema)
        columns, aggregation_weights = self._waiting.columns()
        if self._exact_sums is not None:
            try:
                self._exact_sums.add(self._kernel, columns, aggregation_weights)
            except DigitsError as error:
                raise ExactDomainError(
                    "borrowed weights have changed before they were added, to values that exact sums do not take"
                ) from error
        else:
            self._add(columns, [math.ldexp(a, LIFT) for a in aggregation_weights], start)
        self._waiting.clear()

    def _start(self, schema: Schema) -> bool:
        """Makes the sums if there are none; returns whether it did."""
        if self._sums or self._exact_sums is not None:
            return False
        if self._exact:
            self._exact_sums = ExactSums([math.prod(shape) for shape, _ in schema.values()])
        else:
            self._sums = self._new_sums(schema)
        return True

    def _new_sums(self, schema: Schema) -> dict[str, Any]:
        """Memory for sums, where the contributions are; on a device those of one dtype lie next to one another."""
        order = sorted(schema, key=lambda name: schema[name][1].name)
        made = new_values(Schema({name: ((math.prod(schema[name][0]),), FLOAT64) for name in order}), self._place)
        return {name: made[name] for name in schema}

    def _add(self, columns: list[list[Array]], aggregation_weights: list[float], start: bool) -> None:
        self._kernel.accumulate(list(self._sums.values()), columns, np.array(aggregation_weights), start=start)

    def _refuse_environment(self) -> None:
        """Lets the kernel refuse to compute before anything is changed, for then the accumulator goes on."""
        if self._schema is None or self._exact or len(self._devices) < len(self._schema):
            self._kernel.not_finite([])

    def _check_usable(self) -> None:
        if self._broken:
            raise BrokenAccumulatorError("this accumulator was interrupted while it was adding; begin a new one")

    def _check_mergeable(self, other: "Accumulator") -> None:
        if other is self:
            raise MergeError("an accumulator cannot be merged with itself")
        if self._exact != other._exact:
            raise MergeError("an exact and an ordinary accumulator cannot be merged")
        for contributor in other._contributors:
            if contributor in self._contributors:
                raise DuplicateContributionError(f"{contributor}: contributed to both", contributor=contributor)
        self._check_policies(other)
        if self._apart is not None and other._apart is not None:
            self._apart.check_mergeable(other._apart)
        if not other._count:
            return
        for name in other._schema or () if self._count or self._device is not None else ():
            theirs = other._devices.get(name, "cpu")
            ours = self._devices.get(name, "cpu") if self._count else self._device
            if ours != theirs and not self._exact:
                message = f"other holds the sums of {name!r} on {theirs}, and this accumulator on {ours}"
                raise MergeError(f"{message}; give both the same device=")
        assert other._schema is not None
        if self._schema is not None:
            self._schema.check(_placeholders(other._schema), "other")
        if None not in (self._kind, other._kind) and self._kind is not other._kind:
            raise KindError(
                f"other holds contributions of kind {other._kind}, expected {self._kind}",
                kind=other._kind,
                expected=self._kind,
            )
        if None not in (self._round, other._round) and self._round != other._round:
            raise RoundError(
                f"other holds contributions of round {brief(other._round)}, expected {brief(self._round)}",
                round=other._round,
                expected=self._round,
            )

    def _check_policies(self, other: "Accumulator") -> None:
        """Refuses another that would make something else of a variable.

        Raises:
            MergeError: Says of which.
        """
        if not (self._planned and other._planned):
            if self._policies and other._policies and self._policies != other._policies:
                raise MergeError(f"other has the policies {dict(other._policies)}, and this {dict(self._policies)}")
            return
        ours, theirs = ({} if plan is None else plan.of for plan in (self._plan, other._plan))
        for name in {**ours, **theirs}:
            mine, its = ours.get(name, "mean"), theirs.get(name, "mean")
            if mine != its:
                raise MergeError(f"{name!r} has the policy {mine!r} here, and {its!r} in other")

    def _merge_apart(self, other: "Accumulator") -> None:
        """Takes in what is not averaged; that it agrees has been checked."""
        if other._apart is None:
            return
        if self._apart is None:
            self._planned, self._plan, self._order = True, other._plan, self._order or other._order
            self._kept = self._kept or {name: copied(value) for name, value in other._kept.items()}
            self._apart = Apart(other._apart.plan, self._like_apart, other._kind or Kind.FULL)
        self._apart.merge(other._apart)

    def _as_contribution(
        self, weights: WeightDict | Contribution, aggregation_weight: float | None, contributor: str | None
    ) -> Contribution:
        if not isinstance(weights, Contribution):
            name = f"contribution {self._count}" if contributor is None else contributor
            return Contribution(name, weights, aggregation_weight, kind=self._bare)  # type: ignore[arg-type]
        if aggregation_weight is not None or contributor is not None:
            raise TypeError("a Contribution brings its own aggregation weight and contributor")
        return weights

    def _note(
        self,
        count: int,
        weight: float | Fraction,
        kind: Kind | None,
        round: int | None,
        largest: Mapping[str, int],
        contributors: Mapping[str, None],
    ) -> None:
        """Notes what the sums have taken in: how many, how much they weigh, and what later ones must agree with."""
        if isinstance(self._total, Fraction):
            self._total += Fraction(weight)
        else:
            self._total = sum_in_order((self._total, float(weight)))
        self._count += count
        self._kind = kind
        self._round = round if self._round is None else self._round
        self._largest.update({name: max(size, self._largest.get(name, 0)) for name, size in largest.items()})
        self._contributors.update(contributors)


def _averaged(plan: Plan | None, weights: Any) -> Any:
    return weights if plan is None else plan.apply(weights, "like")[0]


def _placeholders(schema: Schema) -> dict[str, Array]:
    return {name: np.broadcast_to(np.empty((), dtype), shape) for name, (shape, dtype) in schema.items()}
