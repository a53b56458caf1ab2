"""What a stack and this library made of the same contributions, as a table."""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Outcome:
    """What became of a round.

    Attributes:
        weights: The new global model; None: the old one stands, or the case is not about it.
        error: What ended the run instead.
        refused: Contributor → cause, of the contributions that were refused.
        note: What else happened.
        metrics: The mean metrics of a round, which are not shown.
    """

    weights: dict[str, Any] | None = None
    error: Exception | None = None
    refused: tuple[tuple[str, str], ...] = ()
    note: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.error is not None:
            return f"{type(self.error).__name__} ends the run"
        if self.weights is None:
            made = self.note or "the global model stands"
        else:
            made = ", ".join(map(_shown, self.weights.items())) or "the global model is empty"
        return "; ".join([*(f"{who} refused: {cause}" for who, cause in self.refused), made])


@dataclass(frozen=True)
class Row:
    """A line of the table: the case, and what became of it in the stack as it is and with this library."""

    case: str
    stock: Outcome
    ours: Outcome


def run(cases: Sequence[Callable[[], Row]]) -> list[Row]:
    """All cases, run now, without what they log."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of what the stack computes
            return [case() for case in cases]
    finally:
        logging.disable(logging.NOTSET)


def show(stack: str, rows: Sequence[Row]) -> None:
    """Prints the table."""
    table = Table(box=None)
    for column in ("case", stack, "fed_learn"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.case, str(row.stock), str(row.ours))
    Console(width=150, markup=False).print(table)


def markdown(stack: str, rows: Sequence[Row]) -> str:
    """The table for a document."""
    lines = [("case", stack, "fed_learn"), ("---",) * 3, *((row.case, str(row.stock), str(row.ours)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(item: tuple[str, Any]) -> str:
    name, array = item
    listed = " ".join(np.array2string(np.asarray(array), precision=4).split())
    return f"{name} = {listed} ({array.dtype})"
