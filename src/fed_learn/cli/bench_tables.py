"""What `fed-learn bench` prints: the machine, a table per case, and a summary; to be read at 100 columns."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fed_learn.benchmark import Case, CaseResult, SideResult

WIDTH = 100
"""Columns that the tables may take, also where the terminal has fewer or the output is a pipe."""
LEGEND = (
    "limit: time of a bare read of the inputs; for a batch of n × (n+1)/n, since a result is written",
    "× limit, × ours: time as a multiple of the limit and of ours; medians over turns of both",
    "peak: memory beyond the inputs, the result included; error: the largest, in units of the last place",
)


def wide_console(*, stderr: bool = False) -> Console:
    """A console on which no table wraps."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False)
    console.width = max(console.width if console.is_terminal else WIDTH, WIDTH)
    return console


def print_cases(console: Console, cases: Iterable[Case]) -> None:
    """Prints what the cases are."""
    table = _table("case", "what")
    table.add_column("clients", justify="right")
    table.add_column("dtype")
    for case in cases:
        table.add_row(case.name, case.about, str(case.clients), case.dtype.name)
    console.print(table)


def print_machine(console: Console, facts: Mapping[str, Any]) -> None:
    """Prints where it is measured, and a warning where others are at work."""
    processors, memory, load = facts["processors"], facts["memory_bytes"], facts["load"]
    console.print(
        ", ".join(
            [
                facts["processor"] or "unknown processor",
                f"{processors or 'unknown number of'} processors",
                *([f"{memory / 1e9:.0f} GB"] if memory else []),
                facts["system"],
                *([f"huge pages: {facts['transparent_huge_pages']}"] if facts["transparent_huge_pages"] else []),
            ]
        )
    )
    instruction_set = f" ({facts['instruction_set']})" if facts["instruction_set"] else ""
    console.print(f"kernels {', '.join(facts['kernels'])}{instruction_set}, threads: {facts['threads']}")
    versions = facts["versions"]
    console.print(", ".join(f"{name} {version}" for name, version in versions.items() if version is not None))
    absent = [name for name, version in versions.items() if version is None]
    if absent:
        console.print(f"not installed: {', '.join(absent)}", style="dim")
    if load is not None and processors and load > processors / 2:
        console.print(
            f"Others are at work here (load {load:g}): figures will be unsteady, above all those of frameworks\n"
            "whose threads wait actively for one another.",
            style="yellow",
        )


def print_note(console: Console, text: str) -> None:
    """Prints a remark."""
    console.print(text, style="dim")


def print_case(console: Console, result: CaseResult) -> None:
    """Prints the table of a case."""
    case, limit = result.case, result.limit
    console.print()
    console.print(Text.assemble((case.name, "bold"), f"  {case.about}"))
    unit = "one contribution" if case.streams else f"{case.clients} clients"
    plural = "s" if result.tensors > 1 else ""
    console.print(
        f"{unit} of {result.tensors} {case.dtype.name} array{plural}, {_megabytes(result.nbytes)} MB, "
        f"limit {_duration(limit.seconds * result.factor)}",
        style="dim",
    )
    table = _table("side")
    for title in ("× limit", "× ours", "GB/s", "peak MB", "error, ulp"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    ours = [side for side in result.sides if side.ours]
    others = sorted((side for side in result.sides if not side.ours), key=result.to_base)
    for side in (*ours, *others, limit):
        style = "dim" if side is limit else "red" if side.wrong else "bold" if side.ours else None
        table.add_row(*_cells(result, side), style=style)
    console.print(table)
    for reason, names in _by_reason(result.missing).items():
        console.print(f"not measured: {', '.join(names)} ({reason})", style="dim")


def print_summary(console: Console, results: Sequence[CaseResult]) -> None:
    """Prints one row per case: ours against the limit and against the fastest peer with a right result."""
    console.print()
    table = _table("case")
    for title in ("ours ÷ limit", "peak MB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("against the best peer", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for result in results:
        subject, peer = result.subject, result.best_peer()
        speed = "–" if peer is None else f"{peer.ratio_to(subject):.2f} × as fast"
        cells = (f"{result.to_limit(subject):.2f}", _peak(subject), speed, "" if peer is None else f"as {peer.name}")
        table.add_row(result.case.name, *cells, style="red" if subject.wrong else None)
    console.print(table)
    for line in LEGEND:
        console.print(line, style="dim")


def _cells(result: CaseResult, side: SideResult) -> tuple[str, ...]:
    wrong = "WRONG " if side.wrong else ""
    error = (
        "–" if side.error is None else f"{wrong}{side.error:.3g}" if side.error >= 1000 else f"{wrong}{side.error:.3f}"
    )
    return (
        side.name,
        _ratio(result.to_limit(side)),
        _ratio(result.to_base(side)),
        f"{result.nbytes / side.seconds / 1e9:.1f}",
        _peak(side),
        error,
        side.dtype or "–",
    )


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="underline")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def _by_reason(missing: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in missing.items():
        found.setdefault(reason, []).append(name)
    return found


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _peak(side: SideResult) -> str:
    return "–" if side.peak is None else _megabytes(side.peak)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}" if nbytes < 1e8 else f"{nbytes / 1e6:.0f}"


def _duration(seconds: float) -> str:
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.1f} µs"
