"""The settings of aggregation: frozen, and checked when they are made."""

from dataclasses import dataclass, field

from fed_learn import kernels
from fed_learn.aggregation.rules import Rule, find
from fed_learn.arguments import check_choice, check_count
from fed_learn.contribution import Kind
from fed_learn.policies import Policies

PARTIAL = ("same", "average", "refuse")
"""What becomes of contributions that hold a part of the global model's variables.

`"same"`: a part that is the same from all is averaged, and the rest of the global model kept; of different parts the
commonest counts. `"average"`: each variable is averaged over those who sent it. `"refuse"`: a part is refused.
"""


@dataclass(frozen=True, kw_only=True)
class AggregationSettings:
    """How the contributions of a round are aggregated, and what follows from a bad one.

    Attributes:
        rule: The rule that combines them, given by its name or as a `Rule`; kept as a `Rule`.
        kind: The kind of contributions that is expected.
        partial: One of `PARTIAL`.
        policies: What becomes of variables by regular expressions of their names; see `fed_learn.policies`. Kept as
            `Policies`.
        exact: Sum exactly (see `fed_learn.weighted_average`).
        stream: Add up contributions as they come, and keep none.
        kernel: Name of the kernel; None: the one that is current when a round begins.
        min_contributions: Accepted contributions that a round needs; None: the job decides.
        on_bad_contribution: `"raise"` ends the job at the first refused contribution; `"reject"` goes on without it.

    Raises:
        ValueError: One is out of its range, or two exclude each other.
        TypeError: `min_contributions` is no int, or `rule` neither a name nor a rule.
        KernelNameError, KernelUnavailableError: The kernel cannot be used.

    Example:
        >>> AggregationSettings(kind="diff").kind
        <Kind.DIFF: 'diff'>
        >>> AggregationSettings(partial="average", stream=True)
        Traceback (most recent call last):
        ...
        ValueError: partial='average' needs all contributions of a round at once, which stream=True drops
    """

    rule: Rule | str = "mean"
    kind: Kind = Kind.FULL
    partial: str = "same"
    policies: Policies = field(default_factory=Policies)
    exact: bool = False
    stream: bool = False
    kernel: str | None = None
    min_contributions: int | None = None
    on_bad_contribution: str = "raise"

    def __post_init__(self) -> None:
        if self.min_contributions is not None:
            object.__setattr__(self, "min_contributions", check_count("min_contributions", self.min_contributions))
        check_choice("on_bad_contribution", self.on_bad_contribution, ("raise", "reject"))
        check_choice("partial", self.partial, PARTIAL)
        if self.stream and self.partial == "average":
            raise ValueError("partial='average' needs all contributions of a round at once, which stream=True drops")
        object.__setattr__(self, "policies", Policies(self.policies))
        object.__setattr__(self, "kind", Kind(self.kind))
        object.__setattr__(self, "rule", find(self.rule))
        if self.policies and self.how.makes_model:
            raise ValueError(f"rule {self.how.name!r} makes the global model itself: leave policies= out")
        self.how.check_settings(kind=self.kind, partial=self.partial, exact=self.exact, stream=self.stream)
        kernels.resolve(self.kernel)

    @property
    def how(self) -> Rule:
        """The rule, found by its name."""
        assert isinstance(self.rule, Rule)
        return self.rule
