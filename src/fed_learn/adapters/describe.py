"""What a person reads before a first federation: the variables of a model, and what becomes of each.

Names, roles and what cannot be averaged come from the adapters; policies from the user and, where he says nothing, from
the roles.
"""

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from fed_learn.adapters.base import Variable
from fed_learn.adapters.models import Only, adapter_of, choose, predicate, tied_names
from fed_learn.errors import printable
from fed_learn.policies import POLICY_OF_ROLE, Policies, Policy, Role, codes_in, expression_of
from fed_learn.weights import Schema, bytes_text, listed

LONG = 60
"""Rows from which variables of one kind, whose names differ in numbers, share a line of the table."""
NARROWEST = 24
"""Columns that names have at least, however narrow the terminal is."""
NUMBER = re.compile(r"(?<![^./_\[\]-])\d+(?![^./_\[\]-])")
"""A number that is a part of a name of its own: of a layer, not that of `conv1`."""


@dataclass(frozen=True)
class DescribedVariable:
    """One row of a `Description`.

    Attributes:
        name: Its name in the weight dict.
        shape: Its shape; empty where a variable has none that can be told.
        dtype: Its dtype, as the framework calls it.
        role: See `fed_learn.policies.Role`; None where nobody can know.
        policy: See `fed_learn.policies.Policy`; None where it cannot be sent at all: see `problem`.
        trainable: Whether training changes it; None where that cannot be known.
        nbytes: Its bytes.
        tied_to: The first name of the same variable, if it has several and this is a later one; else None.
        problem: Why it can be neither averaged nor sent; else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role | None
    policy: Policy | None
    trainable: bool | None
    nbytes: int
    tied_to: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Description:
    """What `describe` returns: one row for each variable; as text a table.

    In the table of a long model, variables that differ in numbers of their names alone share a line, which says how
    many they are; the rows are always all there.

    Attributes:
        variables: The rows, in the model's order.
        left: State beside the variables that cannot travel as numbers, such as vocabularies, in words.
    """

    variables: tuple[DescribedVariable, ...]
    left: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[DescribedVariable]:
        return iter(self.variables)

    def __len__(self) -> int:
        return len(self.variables)

    @property
    def policies(self) -> dict[str, str]:
        r"""The policies of all variables that have another than `"mean"`, each by its own name, for `policies=`.

        Example:
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
            >>> describe(model, policies={"running": "local"}).policies
            {'^0\\.running_mean$': 'local', '^0\\.running_var$': 'local'}
        """
        return {expression_of(v.name): v.policy for v in self if v.policy not in (None, "mean")}

    @property
    def summary(self) -> str:
        """How many variables, numbers and bytes there are, and how many of each policy; tied variables count once."""
        own = [variable for variable in self if variable.tied_to is None]
        lines = [f"{_amount(own)}, {sum(prod(v.shape) for v in own if v.problem is None):,} numbers"]
        for policy in dict.fromkeys(variable.policy for variable in own):
            what = "cannot be averaged" if policy is None else policy
            lines.append(f"{what}: {_amount([variable for variable in own if variable.policy == policy])}")
        tied = len(self) - len(own)
        if tied:
            lines.append(f"{tied} more name{'s' * (tied != 1)} of the same variables (tied)")
        return "; ".join(lines)

    def table(self, width: int | None = None) -> str:
        """The table, with the summary beneath it.

        Args:
            width: Columns that it may take; None: those of the terminal.
        """
        width = width or shutil.get_terminal_size((100, 24)).columns
        groups = _grouped(self.variables) if len(self) >= LONG else [(v.name, [v]) for v in self]
        several = any(len(group) > 1 for _, group in groups)
        cells = [_cells(name, group) for name, group in groups]
        rows = [("name", "n", "shape", "dtype", "role", "policy", "trained", "bytes"), *cells]
        lines = _aligned(rows if several else [(name, *others) for name, _, *others in rows], width)
        if several:
            lines.append("(n: so many variables, whose names have other numbers in the place of *)")
        for text in _problems(self.variables):
            lines += ["", *textwrap.wrap(text, width)]
        if self.left:
            text = f"Not among them, for it cannot travel as numbers: {', '.join(self.left)}."
            lines += ["", *textwrap.wrap(text, width)]
        if any(v.role == "constant" and v.policy == "same" for v in self.variables):
            lines += ["", *textwrap.wrap(OF_CONSTANTS, width)]
        return "\n".join([*lines, "", *textwrap.wrap(self.summary, width)])

    def __str__(self) -> str:
        return self.table()


OF_CONSTANTS = (
    "Of constants a job knows only what policies=fl.describe(model).policies tells it; without that it averages them, "
    "which changes nothing while they are equal everywhere."
)
"""What the table says beneath constants, whose role is known to the model alone."""


def describe(model: object, *, only: Only | None = None, policies: Mapping[str, str] | None = None) -> Description:
    """The variables of a model or of weights: names, shapes, dtypes, roles, and what becomes of each: its policy.

    To be read before a first federation: whether a mask is averaged, BatchNorm's statistics are shared, a frozen base
    is sent. Nothing is refused here; a variable that cannot be averaged has its `problem`.

    Args:
        model: What `get_weights` takes: a model, a `state_dict`, a weight dict.
        only: Which variables; see `get_weights`.
        policies: Regular expressions of names and their policies; the first that is found in a name decides, and a
            variable's role where none is. See `fed_learn.policies.Policies`.

    Raises:
        ModelError: No adapter knows the model.
        NamesError: `only` fits none of the names, or is no regular expression.
        ValueError, TypeError: The policies are none, or an expression is found in none of the model's names; or two
            names of one variable have different policies.

    Example:
        >>> import torch
        >>> description = describe(torch.nn.BatchNorm1d(2), policies={"running": "local"})
        >>> print(description.table(width=80))
        name                 shape  dtype    role       policy  trained  bytes
        weight               2      float32  trained    mean    yes      8 B
        bias                 2      float32  trained    mean    yes      8 B
        running_mean         2      float32  statistic  local   no       8 B
        running_var          2      float32  statistic  local   no       8 B
        num_batches_tracked  ()     int64    counter    mean    no       8 B
        <BLANKLINE>
        5 variables, 40 B, 9 numbers; mean: 3 variables, 24 B; local: 2 variables, 16 B
        >>> [variable.name for variable in description if variable.role == "counter"]
        ['num_batches_tracked']
    """
    adapter = adapter_of(model)
    found = adapter.variables(model)
    left = getattr(adapter, "left", None)
    if isinstance(model, Mapping) and all(variable.name in model for variable in found):
        order = {name: place for place, name in enumerate(model)}  # weights are read in the order in which they are
        found = sorted(found, key=lambda variable: order[variable.name])
    states = () if left is None else left(model, predicate(only))
    return described(found, only=only, policies=policies, left=states)


def described(
    variables: Sequence[Variable],
    *,
    only: Only | None = None,
    policies: Mapping[str, str] | None = None,
    left: Sequence[str] = (),
) -> Description:
    """The same, of variables that an adapter or the header of a file has told.

    Raises:
        NamesError, ValueError, TypeError: See `describe`.
    """
    wanted = Policies(policies)
    for pattern in wanted:
        if not any(re.search(pattern, variable.name) for variable in variables):
            names = listed((variable.name for variable in variables), 3)
            raise ValueError(f"policies: {pattern!r} fits none of the {len(variables)} variables ({names})")
    codes = codes_in(Schema((v.name, (v.shape, v.dtype)) for v in variables if v.problem is None))
    chosen, rows = choose(variables, only), []
    tied = tied_names(chosen)
    first: dict[object, str] = {}
    given: dict[str, Any] = {}
    for variable in chosen:
        role: Role | None = "code" if variable.name in codes else variable.role
        policy: Any = None
        if variable.problem is None:
            policy = wanted.of(variable.name) or ("mean" if role is None else POLICY_OF_ROLE[role])
        name = first.setdefault(variable.identity, variable.name)
        if policy != given.setdefault(name, policy):
            raise ValueError(
                f"policies: {name!r} and {variable.name!r} are one variable, and the first has the policy "
                f"{given[name]!r}, the second {policy!r}: give both the same"
            )
        rows.append(
            DescribedVariable(
                variable.name,
                variable.shape,
                _dtype_text(variable),
                role,
                policy,
                variable.trainable,
                prod(variable.shape) * variable.dtype.itemsize,
                tied.get(variable.name),
                None if variable.problem is None else str(variable.problem),
            )
        )
    return Description(tuple(rows), tuple(left))


def _dtype_text(variable: Variable) -> str:
    if variable.problem is None:
        return variable.dtype.name
    told = getattr(variable.problem, "dtype", None) or getattr(variable.tensor, "dtype", "unknown")
    return str(told).removeprefix("torch.")


def _problems(variables: Iterable[DescribedVariable]) -> list[str]:
    """What is wrong with variables, once for all with which the same is."""
    alike: dict[str, list[DescribedVariable]] = {}
    for variable in variables:
        if variable.problem is not None:
            alike.setdefault(variable.problem.replace(repr(variable.name), ""), []).append(variable)
    return [
        f"{first.problem}" + (f". So it is with {len(others)} more: {listed(v.name for v in others)}" if others else "")
        for first, *others in alike.values()
    ]


def _amount(variables: list[DescribedVariable]) -> str:
    count = len(variables)
    return f"{count} variable{'s' * (count != 1)}, {bytes_text(sum(v.nbytes for v in variables))}"


def _grouped(variables: Iterable[DescribedVariable]) -> list[tuple[str, list[DescribedVariable]]]:
    """The variables that share a line, and what stands for their names."""
    kinds: dict[tuple[object, ...], list[DescribedVariable]] = {}
    for v in variables:
        kind = (NUMBER.sub("*", v.name), v.shape, v.dtype, v.role, v.policy, v.trainable, v.tied_to, v.problem is None)
        kinds.setdefault(kind, []).append(v)
    return [(str(kind[0]) if len(group) > 1 else group[0].name, group) for kind, group in kinds.items()]


def _cells(name: str, group: list[DescribedVariable]) -> tuple[str, ...]:
    variable = group[0]
    if variable.tied_to is not None:
        name += f" (tied to {variable.tied_to})"
    return (
        name,
        str(len(group)),
        "x".join(map(str, variable.shape)) or "()",
        variable.dtype,
        variable.role or "?",
        variable.policy or "-",
        {True: "yes", False: "no", None: "?"}[variable.trainable],
        bytes_text(sum(v.nbytes for v in group)),
    )


def _aligned(rows: list[tuple[str, ...]], width: int) -> list[str]:
    """The lines of a table; names that are too long go on in the next line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], max(width - sum(widths[1:]) - 2 * (len(widths) - 1), NARROWEST))
    lines = []
    for name, *others in rows:
        begin, *rest = _folded(printable(name), widths[0])
        cells = [begin, *others]
        lines.append("  ".join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True)).rstrip())
        lines += rest
    return lines


def _folded(name: str, width: int) -> list[str]:
    """A name in lines of this width, broken between its parts where that can be."""
    lines = [""]
    for part in re.split(r"(?<=[./ ])", name):
        rest = part
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        while len(lines[-1]) + len(rest) > width:
            cut = width - len(lines[-1])
            lines[-1] += rest[:cut]
            rest = rest[cut:]
            lines.append("  ")
        lines[-1] += rest
    return lines
