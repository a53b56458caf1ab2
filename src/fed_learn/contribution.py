"""What one client sends in one round, the checks it must pass, and the records a round leaves behind."""

import enum
import math
from collections.abc import Collection, Container, Iterable, Mapping, Set, Sized
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, NoReturn

import numpy as np

from fed_learn.errors import (
    AggregationWeightError,
    DuplicateContributionError,
    HandlerFailure,
    KindError,
    MetricError,
    RoundError,
    UnknownContributorError,
    WeightsTypeError,
    a_type,
    brief,
    text_of,
)
from fed_learn.hints import of_weights
from fed_learn.limits import LEFT_OUT, LONGEST_CONTRIBUTOR, MOST_INFO
from fed_learn.values import PlainValues, entries_of, number_of, plain_values, split_metrics, whole_number_of
from fed_learn.weights import (
    FrozenDict,
    FrozenWeights,
    WeightDict,
    about,
    as_weight_dict,
    in_order_of,
    size_text,
)


class Kind(enum.StrEnum):
    """What the weights of a contribution are."""

    FULL = "full"
    """The client's whole weights."""
    DIFF = "diff"
    """Its weights minus the global weights it received."""

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(f"kind must be {' or '.join(map(repr, map(str, cls)))}, not {brief(value)}")


@dataclass(frozen=True, eq=False)
class Contribution:
    """One client's weight dict with what is needed to aggregate it.

    Nothing is checked here: contributions come from outside, and whatever aggregates them refuses a bad one with its
    contributor's name.

    Attributes:
        contributor: The name of the client; stable from round to round.
        weights: Its weight dict. None once the weights are gone, as in a streaming server's records.
        aggregation_weight: The scalar by which it counts: examples or iterations. Finite and ≥ 0; by 0 it is present
            and adds nothing.
        n_iter: Local iterations done.
        round: The round it belongs to, from 0.
        kind: Full weights, or the difference to the global model.
        metrics: Numbers the client measured, by name, in any form; kept as a read-only copy of floats.
        info: What else the client says: plain JSON values by name. Entries of `metrics` that are no numbers go here,
            and under `fed_learn.limits.LEFT_OUT` what of both was too much to be kept.

    Example:
        >>> metrics = {"loss": np.float32(0.5), "host": "a100"}
        >>> c = Contribution("site-1", {"w": np.ones(2)}, 120, n_iter=12, round=0, metrics=metrics)
        >>> c.contributor, c.aggregation_weight, c.metrics, c.info
        ('site-1', 120, {'loss': 0.5}, {'host': 'a100'})
    """

    contributor: str
    weights: WeightDict | None
    aggregation_weight: float
    n_iter: int | None = field(default=None, kw_only=True)
    round: int | None = field(default=None, kw_only=True)
    kind: Kind = field(default=Kind.FULL, kw_only=True)
    metrics: Mapping[str, float] = field(default_factory=FrozenDict, kw_only=True)
    info: Mapping[str, Any] = field(default_factory=FrozenDict, kw_only=True)

    def __post_init__(self) -> None:
        numbers, others = split_metrics(self.metrics or {}, INITIAL_VALIDATION_METRIC)
        info: Mapping[Any, Any] = self.info or {}
        if others and info:
            entries, said = entries_of(info, MOST_INFO)
            info = {**others, **entries, **({LEFT_OUT: said} if said else {})}
        object.__setattr__(self, "metrics", FrozenDict(numbers))
        object.__setattr__(self, "info", plain_values(info or others))
        if type(self.kind) is str and self.kind in tuple(Kind):
            object.__setattr__(self, "kind", Kind(self.kind))

    def frozen(self) -> "Contribution":
        """The same with an own, read-only copy of the weights.

        Raises:
            WeightsTypeError: The weights are no weight dict, such as a dict of tensors.
        """
        if self.weights is None or isinstance(self.weights, FrozenWeights):
            return replace(self)
        return replace(self, weights=FrozenWeights(as_weight_dict(self.weights, self.contributor)))

    def settled(self, **fields: Any) -> "Contribution":
        """The same with some fields as they were checked; itself, if they are so already.

        Args:
            **fields: Plain values. Metrics and info are kept: they are plain from the beginning.
        """
        now = vars(self)
        if type(self) is not Contribution or (type(self.metrics), type(self.info)) != (FrozenDict, PlainValues):
            return Contribution(**{name: now[name] for name in now if name not in fields}, **fields)
        for name, value in fields.items():
            held = now[name]
            if held is not value and (type(held) is not type(value) or type(value) not in _PLAIN or held != value):
                break
        else:
            return self
        other = object.__new__(Contribution)
        vars(other).update(now, **fields)
        return other

    def without_weights(self) -> "Contribution":
        """The same with `weights=None`."""
        return self.settled(weights=None)

    def __repr__(self) -> str:
        parts = [brief(self.contributor), size_text(self.weights)]
        parts.append(f"aggregation_weight={brief(self.aggregation_weight)}")
        parts += [f"round={brief(self.round + 1)}"] if type(self.round) is int else []
        parts += [f"kind={brief(self.kind)}"] if self.kind is not Kind.FULL else []
        return f"Contribution({', '.join(parts)})"


_PLAIN = (int, float, str)
"""Types of fields that are compared by value."""


def check_aggregation_weight(value: object, contributor: str | None = None) -> float:
    """The aggregation weight as a float.

    Raises:
        AggregationWeightError: It is missing, not a number, not finite or negative.

    Example:
        >>> check_aggregation_weight(np.int64(120))
        120.0
    """
    if type(value) is float and 0 <= value < math.inf:
        return value  # the usual case
    problem = None
    number = number_of(value)
    if value is None:
        problem = "is missing: give the number of examples by which it counts"
    elif number is None:
        problem = f"{brief(value)} is not a number"
        problem += ": it is that of examples, one for each contribution" if isinstance(value, Sized) else ""
    elif not math.isfinite(number):
        problem = f"{number} is not finite"
    elif number < 0:
        problem = f"{brief(value)} is negative"
    elif number == 0 and value != 0:
        problem = f"{brief(value)} is smaller than any float"
    if problem is not None or number is None:
        text = f"{about(contributor)}aggregation weight {problem}"
        raise AggregationWeightError(text, contributor=contributor, value=value)
    return number


def listed_weights(aggregation_weights: Any, count: int) -> list[Any]:
    """The aggregation weights of bare weight dicts, one for each, unchecked.

    Args:
        aggregation_weights: A list of numbers, or an array or tensor of them; None: all count equally.
        count: How many weight dicts there are.

    Raises:
        AggregationWeightError: They are in no order, or not as many.

    Example:
        >>> listed_weights(None, 2), listed_weights(np.array([300, 100]), 2)
        ([1.0, 1.0], [np.int64(300), np.int64(100)])
    """
    if aggregation_weights is None:
        return [1.0] * count
    problem = None
    if isinstance(aggregation_weights, Mapping | Set | str | bytes):
        problem = "is not in the order of the contributions"
    try:
        listed = list(aggregation_weights)
    except TypeError:  # a number, or an array or tensor of one
        listed, problem = [], "is not a list"
    if problem is not None:
        raise AggregationWeightError(
            f"aggregation_weights {brief(aggregation_weights)} {problem}: pass a list with one number for each weight "
            "dict, in their order, or fl.Contributions, which bring their own",
            value=aggregation_weights,
        )
    if len(listed) != count:
        raise AggregationWeightError(
            f"{len(listed)} aggregation weights for {count} weight dicts", value=aggregation_weights
        )
    return listed


def in_order(contribution: Contribution, names: Collection[str]) -> Contribution:
    """The contribution with a weight dict in the place of a list of arrays, in the order of these names.

    Raises:
        NamesError: There are more arrays than names, or fewer.

    Example:
        >>> in_order(Contribution("site-1", [np.zeros(2)], 1), ["w"]).weights
        {'w': array([0., 0.])}
    """
    sender = contribution.contributor
    who = sender if type(sender) is str else brief(sender)
    named = in_order_of(contribution.weights, names, who, "like")
    return contribution if named is contribution.weights else contribution.settled(weights=named)


def listed_contributions(contributions: Any, like: object = None, what: str = "contributions") -> list[Any]:
    """The contributions of a batch, unchecked.

    Args:
        contributions: What came from outside.
        like: The global model, in whose order lists of arrays become weight dicts; None: it is not known.
        what: What errors call them.

    Raises:
        WeightsTypeError: It is one weight dict, one contribution, or several by name.
        NamesError: A list has more arrays than `like` has variables, or fewer.

    Example:
        >>> listed_contributions({"w": np.zeros(2)})
        Traceback (most recent call last):
        ...
        fed_learn.errors.WeightsTypeError: contributions is one weight dict: pass a list of them, [a, b, …]
    """
    instead = ""
    if isinstance(contributions, Contribution):
        instead = "is one Contribution: pass a list of them, [a, b, …]"
    elif isinstance(contributions, Mapping):
        several = bool(contributions) and all(isinstance(one, Mapping) for one in contributions.values())
        instead = "is one weight dict: pass a list of them, [a, b, …]"
        if several or any(isinstance(one, Contribution) for one in contributions.values()):
            instead = f"is a dict of several by name: pass list({what}.values()), or a list of fl.Contributions"
    elif isinstance(contributions, str | PathLike) or not isinstance(contributions, Iterable):
        found = of_weights(contributions) or a_type(type(contributions))
        instead = f"is {found}: pass a list of weight dicts, [a, b, …]"
    if instead:
        raise WeightsTypeError(f"{what} {instead}")
    batch = list(contributions)
    if not isinstance(like, Mapping):
        return batch
    return [
        in_order(one, like) if isinstance(one, Contribution) else in_order_of(one, like, f"contributions[{i}]", "like")
        for i, one in enumerate(batch)
    ]


def check_countable(aggregation_weight: float, contributor: str) -> float:
    """An aggregation weight that a job takes: nobody has more than `LARGEST_WEIGHT` examples, and sums stay finite.

    Raises:
        AggregationWeightError: It is larger.
    """
    if aggregation_weight > LARGEST_WEIGHT:
        raise AggregationWeightError(
            f"{contributor}: aggregation weight {aggregation_weight} is above 2**100, which no number of examples is",
            contributor=contributor,
            value=aggregation_weight,
        )
    return aggregation_weight


def check_factor(value: object, contributor: str) -> float:
    """A factor of a contributor's aggregation weights, from the settings, as a float.

    Raises:
        AggregationWeightError: It is no number, not finite or not positive.
    """
    factor = check_aggregation_weight(value, contributor)
    if factor == 0:
        raise AggregationWeightError(
            f"{contributor}: aggregation weight 0 is not positive", contributor=contributor, value=value
        )
    return factor


INITIAL_VALIDATION_METRIC = "initial_validation_metric"
"""Name of the metric by which models are selected: what a client measured on the model as it received it."""

SMALLEST_WEIGHT, LARGEST_WEIGHT = 2.0**-100, 2.0**100
"""The usual range of aggregation weights: sums of products with float32 stay well within float64."""


def checked_n_iter(n_iter: object, contributor: str) -> int | None:
    """The number of iterations as a plain int, or None.

    Raises:
        MetricError: It is something else.
    """
    if n_iter is None:
        return None
    number = whole_number_of(n_iter)
    if number is None:
        raise MetricError(
            f"{contributor}: n_iter is {brief(n_iter)}, not a 64-bit int",
            contributor=contributor,
            metric="n_iter",
        )
    return number


def _advice(kind: object) -> str:
    """How to have contributions of a kind averaged, whoever averages them; nothing where there is no such kind."""
    if not isinstance(kind, Kind):
        return ""
    nvflare = "WEIGHTS" if kind is Kind.FULL else "WEIGHT_DIFF"
    what = "full weights" if kind is Kind.FULL else "differences"
    return (
        f"; where all clients are to send {what}, pass kind=Kind.{kind.name} to the server or the strategy, in NVFlare "
        f"expected_data_kind={nvflare!r} to the aggregator"
    )


SPACES_AND_JOINERS = "\u00a0\u202f\u3000\u200c\u200d"
"""What Python does not count as printable, although French, Japanese and Persian names are written with it, and emoji.
Errors show it as its escape."""


def check_contributor(given: Any) -> str:
    r"""A contributor's name, if it can be one: it is part of log lines, files and the order of sums.

    It has at most `LONGEST_CONTRIBUTOR` characters, printable ones or `SPACES_AND_JOINERS`, no slash or backslash,
    neither begins nor ends with a space, and is not that of a global model, `FINAL_MODEL` or `GLOBAL_BEST`. All names
    go through here, whoever gives them.

    Raises:
        UnknownContributorError: It cannot.

    Example:
        >>> check_contributor("site-1"), check_contributor("Klinikum Süd 3")
        ('site-1', 'Klinikum Süd 3')
        >>> check_contributor("site-1\nERROR")
        Traceback (most recent call last):
        ...
        fed_learn.errors.UnknownContributorError: contributor 'site-1\nERROR' is not a name: '\n' is not printable
    """
    # By its type and by the methods of str: nothing that the sender's own class computes is called.
    name = str.__str__(given) if issubclass(type(given), str) else ""
    if not name:
        order = ": its order is Contribution(contributor, weights, aggregation_weight)"
        raise UnknownContributorError(
            f"contributor {brief(given)} is not a name{order if isinstance(given, Mapping) else ''}", contributor=None
        )
    if len(name) > LONGEST_CONTRIBUTOR:
        problem = f"it has {len(name)} characters, at most {LONGEST_CONTRIBUTOR} are taken"
    elif not name.isprintable() and (
        unprintable := [c for c in name if not c.isprintable() and c not in SPACES_AND_JOINERS]
    ):
        problem = f"{unprintable[0]!r} is not printable"
    elif "/" in name or "\\" in name:
        problem = "it holds a slash or backslash, and names become parts of paths"
    elif name != name.strip():
        problem = "it begins or ends with a space"
    elif name in (FINAL_MODEL, GLOBAL_BEST):
        problem = "it names a global model"
    else:
        return name
    raise UnknownContributorError(
        f"contributor {brief(name)} is not a name: {problem}", contributor=name[:LONGEST_CONTRIBUTOR]
    )


def check_terms(
    contribution: Contribution,
    *,
    kind: Kind | None = None,
    round: int | None = None,
    contributors: Container[str] = (),
) -> float:
    """Checks all of a contribution but its weights.

    Args:
        contribution: What a client sent. Untrusted.
        kind: The kind that is expected, if any.
        round: The round that is expected, if any. A contribution that states none passes.
        contributors: Names that have contributed already.

    Returns:
        The aggregation weight as a float.

    Raises:
        ContributionError: One of its children, naming the contributor and the cause.
    """
    who = check_contributor(contribution.contributor)
    if who in contributors:
        raise DuplicateContributionError(f"{who}: contributed already", contributor=who)
    own_round = contribution.round
    number = whole_number_of(own_round)
    if own_round is not None and (number is None or round not in (None, number)):
        expected = "a number" if round is None else brief(_shown(round))
        raise RoundError(
            f"{who}: contribution is of round {brief(_shown(own_round))}, expected {expected}",
            contributor=who,
            round=own_round,
            expected=round,
        )
    if not isinstance(contribution.kind, Kind) or (kind is not None and contribution.kind is not kind):
        given: object = contribution.kind
        shown = brief(str(given) if isinstance(given, Kind) else given)
        raise KindError(
            f"{who}: contribution is of kind {shown}, expected {kind or ' or '.join(Kind)}"
            + _advice(contribution.kind),
            contributor=who,
            kind=contribution.kind,
            expected=kind,
        )
    checked_n_iter(contribution.n_iter, who)
    return check_aggregation_weight(contribution.aggregation_weight, who)


def _shown(number: object) -> object:
    """A round as a person counts it, from 1."""
    return number + 1 if isinstance(number, int | np.integer) and not isinstance(number, bool) else number


@dataclass(frozen=True, eq=False)
class BestModel:
    """The best model so far, as a handler found it.

    Attributes:
        round: For `BEST_RECEIVED` the round in which clients received it (the number of rounds, for the
            final model); for `BEST_AGGREGATED` the round that produced it.
        metric: Its score.
        metric_name: What the score is.
        weights: Its weights, read-only.
    """

    round: int
    metric: float
    metric_name: str
    weights: FrozenWeights

    def __repr__(self) -> str:
        metric = f"{self.metric_name}={self.metric:.6g}"
        return f"BestModel(round={self.round + 1}, {metric}, {size_text(self.weights)})"


@dataclass(frozen=True, eq=False)
class ValidationResult:
    """What one client measured on one model that the server sent for validation.

    Attributes:
        contributor: The client that measured.
        model: Which model: a client's name (its local best), `FINAL_MODEL` or `GLOBAL_BEST`.
        metrics: The numbers, by name, named as in the client's contributions.
        n_iter: Local iterations of the client's last contribution, by which selection may weigh.
    """

    contributor: str
    model: str
    metrics: Mapping[str, float]
    n_iter: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", FrozenDict(split_metrics(self.metrics, INITIAL_VALIDATION_METRIC)[0]))


FINAL_MODEL = "final"
"""`ValidationResult.model` of the global model after the last round."""
GLOBAL_BEST = "global_best"
"""`ValidationResult.model` of the job's best global model in the cross-site validation."""


@dataclass(frozen=True, eq=False)
class ClientFailure:
    """A contribution that was refused, or a client that left the job: who, and the error that says why.

    Where `contributor` is not a name, it becomes a short description, so that it can be shown.
    """

    contributor: str
    error: Exception

    def __post_init__(self) -> None:
        try:
            check_contributor(self.contributor)
        except UnknownContributorError:
            object.__setattr__(self, "contributor", brief(self.contributor))

    @property
    def cause(self) -> str:
        """The class of the error, such as `NonFiniteError`."""
        return type(self.error).__name__

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"contributor": self.contributor, "cause": self.cause, "message": text_of(self.error)}


@dataclass(frozen=True, eq=False)
class RoundReport:
    """What happened in one round.

    Attributes:
        round: From 0.
        accepted: Contributors whose contributions were accepted, by name; averaged, unless `error` is set.
        rejected: Refused contributions, and why.
        absent: Clients that sat this round out.
        quits: Clients that left in this round, and why.
        handler_failures: Handlers that raised.
        metrics: Scores that handlers published in this round (`ContextKey.METRICS`).
        total_weight: Sum of the aggregation weights.
        aggregation_seconds: Time of the averaging alone.
        aggregation_bytes: Bytes of the contributions that were read.
        kernel: Name of the kernel that averaged.
        seconds: Time of the whole round.
        error: Why the round failed and left the global model as it was; None if it did not.
    """

    round: int
    accepted: tuple[str, ...] = ()
    rejected: tuple[ClientFailure, ...] = ()
    absent: tuple[str, ...] = ()
    quits: tuple[ClientFailure, ...] = ()
    handler_failures: tuple[HandlerFailure, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=FrozenDict)
    total_weight: float = 0.0
    aggregation_seconds: float = 0.0
    aggregation_bytes: int = 0
    kernel: str = ""
    seconds: float = 0.0
    error: Exception | None = None

    def as_dict(self, *, times: bool = True) -> dict[str, Any]:
        """For JSON: plain dicts, lists, strings and numbers.

        Args:
            times: Whether the measured times are there, which differ from run to run; all else is reproducible.
        """
        told = {
            "round": self.round,
            "accepted": list(self.accepted),
            "rejected": [failure.as_dict() for failure in self.rejected],
            "absent": list(self.absent),
            "quits": [failure.as_dict() for failure in self.quits],
            "handler_failures": [str(failure) for failure in self.handler_failures],
            "metrics": dict(self.metrics),
            "total_weight": self.total_weight,
            "aggregation_seconds": self.aggregation_seconds,
            "aggregation_bytes": self.aggregation_bytes,
            "kernel": self.kernel,
            "seconds": self.seconds,
            "error": None if self.error is None else text_of(self.error),
        }
        return told if times else {name: told[name] for name in told if not name.endswith("seconds")}
