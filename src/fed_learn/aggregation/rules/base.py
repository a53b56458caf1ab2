"""`Rule`, and the registry in which rules are found by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from fed_learn.aggregation.arrays import Columns
from fed_learn.aggregation.batch import Checked
from fed_learn.aggregation.outputs import Output, outputs_for
from fed_learn.aggregation.tensors import without_tensors
from fed_learn.contribution import Contribution, Kind
from fed_learn.errors import AggregatorError, FedLearnError, described, text_of
from fed_learn.model_meta import FLContext
from fed_learn.weights import FrozenWeights, Schema, WeightDict, as_weight_dict, check_finite


@dataclass(frozen=True, eq=False)
class Given:
    """What a rule combines, and how.

    Attributes:
        rows: Contributions that count by more than 0, in the order of their names, all of the same variables.
        schema: Names, shapes and dtypes of these variables.
        exact: Whether sums are exact.
        kernel: Name of the kernel; None: the current one.
        out: A weight dict to write to, or None.
        output: Makes the memory to write to, in the place of `out`; None: new memory.
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

    A rule gets checked contributions, and changes none of them. Of full weights it makes full weights, of differences a
    difference. Its result does not depend on their order of arrival.

    The result of a user's own rule is checked: it must have exactly the variables of the contributions, with finite
    values, and is rounded to their dtypes where it has wider ones. If the rule raises, or returns anything else,
    `AggregatorError` is raised, and a round of a job fails.

    Attributes:
        name: The name by which settings and the command find it.
        makes_model: Whether its result is the new global model itself, rather than a mean or a difference.

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
    makes_model: ClassVar[bool] = False
    _streams: ClassVar[bool] = False
    """Whether an `Accumulator` gives its result, so that contributions can be added up one by one (`stream=True`)."""
    _shows_not_finite: ClassVar[bool] = False
    """Whether `NonFiniteError` is raised by its result if a value is not finite."""
    _of_this_package: ClassVar[bool] = False
    """Whether its result has the schema, and goes where it is told, for certain."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = vars(cls).get("name", cls.__name__)

    def check_settings(self, *, kind: Kind, partial: str, exact: bool, stream: bool) -> None:
        """Refuses settings under which the rule cannot work.

        Args:
            kind: Of the contributions.
            partial: What becomes of contributions that hold a part of the model.
            exact: Whether sums are exact.
            stream: Whether contributions are added up as they come.

        Raises:
            ValueError: The rule cannot work under them.
        """
        if stream and not self._streams:
            raise ValueError(f"rule {self.name!r} needs all contributions of a round at once: leave stream=True out")

    def check(self, contribution: Contribution) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuses a contribution that the rule could not use, before it counts; here none.

        Raises:
            ContributionError: Says who and why.
        """

    @abstractmethod
    def combine(self, given: Given) -> WeightDict:
        """Combines contributions.

        Returns:
            Arrays of the variables of `given.schema`.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def combined(rule: Rule, given: Given) -> WeightDict:
    """The result of a rule, in the dtypes of the schema.

    Returns:
        New arrays, tensors where the first contribution has them; or `given.out`, or what `given.output` made.

    Raises:
        AggregatorError: A rule of a user's own raised, or returned something else.
        ContributionError: The result leaves the range of a dtype.
    """
    if rule._of_this_package:
        return rule.combine(given)
    who = f"rule {rule.name!r}"
    schema = Schema.of(given.model or {}) if rule.makes_model else given.schema
    try:
        made = rule.combine(replace(given, rows=[row.shown() for row in given.rows]))
        arrays = as_weight_dict(without_tensors(made, who), who)
        fit, _ = schema.fit(arrays, who)
        if len(fit) < len(schema):
            raise schema.names_error(fit, who)
        check_finite(fit, who, constants=given.model if rule.makes_model else None)
    except Exception as error:
        raise failure_of(rule, error) from error
    place = None if rule.makes_model else given.rows[0].held.place
    if given.output is not None:
        outputs = given.output(schema)
    else:
        inputs = [tensor for row in given.rows for tensor in row.held.tensors.values()]
        columns = Columns(schema, [row.on_host().arrays for row in given.rows]) if given.out is not None else None
        outputs = outputs_for(schema, place, given.out, columns=columns, inputs=inputs)
    for name, array in fit.items():
        outputs.arrays[name][...] = array
    return outputs.finish()


def failure_of(rule: Rule, error: Exception) -> AggregatorError:
    """The error for what the code of a rule raised."""
    who, cause = f"rule {rule.name!r}", text_of(error) if isinstance(error, FedLearnError) else described(error)
    return AggregatorError(f"{who}: {cause.removeprefix(f'{who}: ')}")


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
    """The rule of this name; a `Rule` is returned as it is.

    Raises:
        ValueError: No rule has this name; the message says which names there are.
        TypeError: It is neither a name nor a rule.

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
