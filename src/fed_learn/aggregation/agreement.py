"""Which contributions of a round count together where they differ in rounds, variables or constants: the majority.

Each function looks at all accepted contributions, and returns those that are to be refused after all, and why.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fed_learn.aggregation.batch import Checked
from fed_learn.contribution import check_terms
from fed_learn.errors import (
    ContributionError,
    DtypeError,
    IntegerRangeError,
    NamesError,
    NonFiniteError,
    RoundError,
    ShapeError,
)
from fed_learn.limits import MOST_NAMED
from fed_learn.weights import SHAPE_AND_DTYPE, Array, Schema, dtype_error, misses_and_adds, same_bits, shape_error

Rows = Mapping[str, Checked]
"""The accepted contributions by name."""
Refused = list[tuple[str, ContributionError]]
"""Contributors, and why their contributions are refused."""


def of_other_rounds(rows: Rows, number: int | None) -> Refused:
    """Contributions that state another round than `number`, which is the round of most."""
    refused: Refused = []
    for name in sorted(rows):
        try:
            check_terms(rows[name].sent, round=number)
        except RoundError as error:
            refused.append((name, error))
    return refused


def alone(rows: Rows) -> Refused:
    """Contributions whose constants nobody else sent: these are just values that are not finite."""
    counts = Counter(row.form for row in rows.values())
    return [(n, row.unless_alone) for n, row in rows.items() if row.unless_alone is not None and counts[row.form] == 1]


def of_other_forms(rows: Rows, given_up: Callable[[Checked], bool], advise: bool) -> Refused:
    """Contributions that are not of the commonest form; of equally common forms that with the most variables counts.

    Args:
        rows: The accepted contributions.
        given_up: Whether the sums that a contribution was added to have been dropped.
        advise: Whether the error may advise `partial="average"`.
    """
    forms: dict[Hashable, list[str]] = {}
    for name, row in rows.items():
        forms.setdefault(row.form, []).append(name)
    if len(forms) < 2:
        return []

    def rank(names: list[str]) -> tuple[bool, bool, int, int, int, str]:
        first = rows[names[0]]
        return (
            given_up(first),
            first.unless_alone is not None,
            -_counting(rows, names),
            -len(names),
            -len(first.averaged),
            min(names),
        )

    usual, *others = sorted(forms.values(), key=rank)
    expected, count = rows[usual[0]], len(usual)
    names = sorted(name for names in others for name in names)
    return [(name, _other_form(name, rows[name], expected, count, advise)) for name in names]


def of_other_variables(rows: Rows) -> Refused:
    """Contributions in which a variable has another shape, dtype or constant than in most that hold it."""
    every = {who: _every_variable(row) for who, row in rows.items()}

    def sort(name: str, who: str) -> tuple[Any, ...]:
        constant = rows[who].constants.get(name)
        fixed = constant if constant is not None else _same(rows[who]).get(name)
        return (*SHAPE_AND_DTYPE(every[who][name]), None if fixed is None else fixed.tobytes())

    usual: dict[str, tuple[tuple[Any, ...], int]] = {}
    for name in {name for variables in every.values() for name in variables}:
        counts = Counter(sort(name, who) for who, variables in every.items() if name in variables)
        usual[name] = min(counts.items(), key=lambda item: (-item[1], str(item[0])))
    refused: Refused = []
    for who, row in sorted(rows.items()):
        other = next((name for name in every[who] if sort(name, who) != usual[name][0]), None)
        if other is not None:
            (shape, dtype, _), count = usual[other]
            error: ContributionError | None = _other_variable(who, other, every[who][other], (shape, dtype), count)
            error = error or row.unless_alone
            if error is None and other in _same(row):
                error = _not_the_same(who, other, row, count)
            text = f"{who}: {other!r} holds numbers, and is not finite in {count} of the round's contributions"
            refused.append((who, error or NonFiniteError(text, contributor=who, name=other)))
    return refused


def of_sums(rows: Rows) -> Refused:
    """Those without whom the sums of variables stay in the range of their dtypes: of the largest values, one by one."""
    refused: Refused = []
    left = {who: row.apart.summed for who, row in rows.items() if row.apart is not None and row.aggregation_weight}
    for name in sorted({name for summed in left.values() for name in summed}):
        values = {who: summed[name] for who, summed in left.items() if name in summed and summed[name].size}
        sizes = {who: max(abs(array.min().item()), abs(array.max().item())) for who, array in values.items()}
        for who in sorted(sizes, key=lambda who: (-sizes[who], who)):
            dtype = values[who].dtype
            if _sum_fits(list(values.values()), sum(sizes.values()), dtype):
                break
            text = f"{who}: with its {name!r}, the largest, the sum of all leaves the range of {dtype}"
            refused.append((who, IntegerRangeError(text, contributor=who, name=name)))
            del values[who], left[who], sizes[who]
    return refused


def _sum_fits(values: Sequence[Array], bound: float, dtype: np.dtype[Any]) -> bool:
    """Whether the sum of arrays of a dtype is in its range; the bound is one of its magnitude."""
    if dtype.kind in "iub":
        least, largest = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
        least, largest = max(least, -(2**63)), min(largest, 2**63 - 1)  # they are summed in int64
        if bound <= largest:
            return True
        total = sum([array.astype(object) for array in values])
        return bool(np.min(total) >= least and np.max(total) <= largest)
    largest_float = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    if bound <= largest_float / 2:
        return True
    with np.errstate(over="ignore"):
        total = np.sum([array.astype(np.longdouble) for array in values], axis=0)
        return bool(np.isfinite(total.astype(np.float64).astype(dtype)).all())


def of_other_constants(rows: Rows) -> Refused:
    """The minority where some contributions change a constant of the global model to numbers, and others keep it."""
    refused: Refused = []
    left = dict(rows)
    for name in sorted({name for row in rows.values() for name in row.filled}):
        holders = [who for who, row in left.items() if name in row.averaged]
        keep = [who for who in holders if name in left[who].filled]
        change = [who for who in holders if name not in left[who].filled]
        fewer, more = (change, keep) if _counting(left, keep) >= _counting(left, change) else (keep, change)
        what = "holds numbers" if fewer is change else "is not finite, as in the global model,"
        for who in sorted(fewer):
            text = f"{who}: {name!r} {what} where it is otherwise in {len(more)} of the round's contributions"
            refused.append((who, NonFiniteError(text, contributor=who, name=name)))
            del left[who]
    return refused


def of_another_part(rows: Sequence[Checked]) -> ContributionError | None:
    """The error for a contribution that a handler has made, with other variables than the first one; else None."""
    first = rows[0]
    for row in rows:
        if row.averaged.keys() != first.averaged.keys():
            expected = Schema.of({name: first.arrays[name] for name in first.averaged})
            return expected.names_error({name: row.arrays[name] for name in row.averaged}, row.contributor)
    return None


def _counting(rows: Rows, names: Sequence[str]) -> int:
    """How many of these contributions have an aggregation weight above 0."""
    return sum(1 for name in names if rows[name].aggregation_weight)


def _other_form(who: str, row: Checked, usual: Checked, count: int, advise: bool) -> ContributionError:
    if row.unless_alone is not None:
        return row.unless_alone
    missing = [name for name in usual.averaged if name not in row.averaged]
    extra = [name for name in row.averaged if name not in usual.averaged]
    ours, theirs = _every_variable(row), _every_variable(usual)
    if not missing and not extra:
        missing = [name for name in theirs if name not in ours]
        extra = [name for name in ours if name not in theirs]
    for name in () if missing or extra else ours:
        other = _other_variable(who, name, ours[name], SHAPE_AND_DTYPE(theirs[name]), count)
        if other is not None:
            return other
        if name in _same(row) and not same_bits(ours[name], theirs[name]):
            return _not_the_same(who, name, row, count)
    what = misses_and_adds(missing, extra) or "has other constants"
    helps = (missing or extra) and advise
    advice = "; partial='average' averages each variable over those who sent it" if helps else ""
    return NamesError(
        f"{who}: {what}, compared with what {count} of the round's contributions hold{advice}",
        contributor=who,
        name=next(iter(missing or extra), None),
        missing=tuple(missing[:MOST_NAMED]),
        extra=tuple(extra[:MOST_NAMED]),
    )


def _every_variable(row: Checked) -> dict[str, Array]:
    """All variables of a contribution that are compared with those of others, averaged or not."""
    return row.arrays if row.apart is None else {**row.arrays, **row.apart.beside, **row.apart.same}


def _same(row: Checked) -> dict[str, Array]:
    """The variables that have to be the same everywhere, and are not compared with the global model."""
    return {} if row.apart is None else row.apart.same


def _not_the_same(who: str, name: str, row: Checked, count: int) -> ContributionError:
    assert row.apart is not None
    return row.apart.plan.not_same(name, who, f"{count} of the round's contributions")


def _other_variable(
    who: str, name: str, found: Array, usual: tuple[Any, ...], count: int
) -> ShapeError | DtypeError | None:
    """The error for a variable with another shape or dtype than in `count` other contributions; else None."""
    shape, dtype = usual
    others = f"in {count} of the round's contributions"
    if found.shape != shape:
        return shape_error(name, found, shape, who, others)
    if found.dtype != dtype:
        return dtype_error(name, found, dtype, who, others=others)
    return None
