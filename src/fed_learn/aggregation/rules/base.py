"""What a rule is, and the register of those that go by a name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from fed_learn.aggregation.batch import Checked
from fed_learn.aggregation.outputs import Output
from fed_learn.contribution import Contribution, Kind
from fed_learn.model_meta import FLContext
from fed_learn.weights import FrozenWeights, Schema, WeightDict


@dataclass(frozen=True, eq=False)
class Given:
    """What a rule combines, and how.

    Attributes:
        rows: Contributions that count by more than 0, in the order of their names, all of the same variables.
        schema: Names, shapes and dtypes of these variables.
        exact: Whether sums are exact.
        kernel: Name of the kernel; None: the current one.
        out: A weight dict to write to, or None.
        output: Makes what is written to, in the place of `out`; None: new memory.
        model: The global model; None: it is not known.
        ctx: The context of the job; None outside of one.
    """

    rows: Sequence[Checked]
    schema: Schema
    exact: bool = False
    kernel: str | None = None
    out: WeightDict | None = None
    output: Callable[[Schema], Output] | None = None
    model: FrozenWeights | None = None
    ctx: FLContext | None = None


class Rule(ABC):
    """How the contributions of a round become one weight dict.

    A rule is given contributions that have been checked, and makes of full weights full weights, of differences a
    difference; it changes none of them, and its result does not depend on their order of arrival.

    Attributes:
        name: By which settings and the command find it.
        streams: Whether contributions can be added up one by one and dropped (`stream=True`).
        shows_not_finite: Whether its result would not be finite, and `NonFiniteError` be raised, if a value were not.
        makes_model: Whether what it makes is the new global model itself, rather than a mean or a difference.

    Example:
        >>> import numpy as np, fed_learn as fl
        >>> class Largest(Rule):
        ...     name = "largest"
        ...     def combine(self, given):
        ...         return {n: np.max([row.arrays[n] for row in given.rows], axis=0) for n in given.schema}
        >>> fl.aggregate([{"w": np.array([1.0, 4.0])}, {"w": np.array([3.0, 2.0])}], rule=Largest())
        {'w': array([3., 4.])}
    """

    name: ClassVar[str]
    streams: ClassVar[bool] = False
    shows_not_finite: ClassVar[bool] = False
    makes_model: ClassVar[bool] = False

    def check_settings(self, *, kind: Kind, partial: str, exact: bool, stream: bool) -> None:
        """Refuses settings under which the rule cannot work.

        Args:
            kind: Of the contributions.
            partial: What becomes of parts.
            exact: Whether sums are exact.
            stream: Whether contributions are added up as they come.

        Raises:
            ValueError: It cannot.
        """
        if stream and not self.streams:
            raise ValueError(f"rule {self.name!r} needs all contributions of a round at once, which stream=True drops")

    def check(self, contribution: Contribution) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuses a contribution that the rule could not use, before it counts; here none.

        Raises:
            ContributionError: Says who and why.
        """

    @abstractmethod
    def combine(self, given: Given) -> WeightDict:
        """Combines contributions.

        Returns:
            New arrays or tensors of the variables of `given.schema`; or `given.out`, or what `given.output` made.

        Raises:
            ContributionError: The result leaves the range of a dtype.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


R = TypeVar("R", bound=type[Rule])

_RULES: dict[str, Callable[[], Rule]] = {}


def register(rule: R) -> R:
    """Lets a rule, whose constructor needs no argument, be found by its name.

    Raises:
        ValueError: Another rule has this name.
    """
    if _RULES.setdefault(rule.name, rule) is not rule:
        raise ValueError(f"there is a rule {rule.name!r} already")
    return rule


def available() -> tuple[str, ...]:
    """Names of the rules.

    Example:
        >>> "mean" in available()
        True
    """
    return tuple(_RULES)


def find(rule: Any) -> Rule:
    """The rule of a name; a rule as it is.

    Raises:
        ValueError: There is none of this name; says which there are.
        TypeError: It is neither.

    Example:
        >>> find("mean")
        MeanRule()
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be the name of a rule or a Rule, not {rule!r}")
    if rule not in _RULES:
        raise ValueError(f"rule must be {' or '.join(map(repr, _RULES))}, not {rule!r}")
    return _RULES[rule]()
