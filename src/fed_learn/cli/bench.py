"""`fed-learn bench`: averaging on this machine, against the limit and the peers installed."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fed_learn.disk import write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from fed_learn.benchmark import Case, CaseResult, Sizes
    from fed_learn.benchmark.cases import Among

TURNS, QUICK_TURNS = 7, 3


def bench(
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="A case: its name, the part of it before a dash, or a pattern with * and ?. Can be repeated.",
            show_default="all",
        ),
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Print the cases, and measure nothing.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small models, few turns, no peers that take seconds to start.")
    ] = False,
    repetitions: Annotated[
        int | None, typer.Option(min=1, help="Number of turns.", show_default=f"{TURNS}, or {QUICK_TURNS} if quick")
    ] = None,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Measure this package and the limit alone.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of kernels and peers.", show_default="all processors")
    ] = None,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Draw the results to this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and the tables on stderr.")] = False,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the JSON to this file.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Measure averaging against a bare read of the same memory and against other ways to the same mean."""
    from fed_learn import kernels
    from fed_learn.benchmark import FULL, QUICK, machine, select
    from fed_learn.cli import bench_tables

    console = bench_tables.wide_console(stderr=as_json)
    try:
        cases = select(case or [])
        kernels.set_num_threads(threads)
        facts = machine.facts()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if list_cases:
        if as_json:
            print(json.dumps([{"name": c.name, "about": c.about} for c in cases], indent=2))
        else:
            bench_tables.print_cases(console, cases)
        return
    _check_files(plot, out)
    sizes, turns = (QUICK, QUICK_TURNS) if quick else (FULL, TURNS)
    turns = repetitions or turns
    bench_tables.print_machine(console, facts)
    if quick:
        bench_tables.print_note(
            console, f"A quick run: small models, {turns} turns; for figures to quote leave it out."
        )
    results = _measure_all(console, cases, sizes, turns, "none" if no_peers else "quick" if quick else "all")
    if results:
        bench_tables.print_summary(console, results)
    settings = {
        "quick": quick,
        "repetitions": turns,
        "peers": not no_peers,
        "threads": kernels.get_num_threads(),
        "sizes": asdict(sizes),
    }
    _hand_out(_as_json(facts, settings, results, cases), as_json, out)
    if plot is not None:
        from fed_learn.benchmark.plot import plot_results

        plot_results(plot, results, facts)
        console.print(f"\nPicture: {plot}")
    wrong = [
        f"{r.case.name}: {s.name} is off by {s.error:.3g} ulp" for r in results for s in r.sides if s.ours and s.wrong
    ]
    if wrong:
        raise RuntimeError(f"wrong results of this package: {'; '.join(wrong)}")


def _check_files(plot: Path | None, out: Path | None) -> None:
    """Complains before anything is measured, not minutes later."""
    if plot is not None and plot.suffix != ".png":
        raise typer.BadParameter(f"--plot writes PNG files, so the name must end in .png: {plot}")
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot needs matplotlib: pip install 'fed-learn[bench]'")
    for path in (plot, out):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no folder for {path}")


def _measure_all(
    console: "Console", cases: Sequence["Case"], sizes: "Sizes", turns: int, among: "Among"
) -> list["CaseResult"]:
    """Measures cases, and prints each when it is done."""
    from fed_learn.cli import bench_tables

    results = []
    for number, case in enumerate(cases):
        reason = case.why_not()
        if reason is not None:
            bench_tables.print_note(console, f"\n{case.name} is not measured: {reason}")
            continue
        results.append(_measure(case, sizes, turns, among, number, len(cases)))
        bench_tables.print_case(console, results[-1])
    return results


def _measure(case: "Case", sizes: "Sizes", turns: int, among: "Among", number: int, total: int) -> "CaseResult":
    """Measures a case, with a bar where stderr is a terminal; the bar is gone when the table is to be printed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fed_learn.benchmark import measure

    others, missing = case.others(among)
    stderr = Console(stderr=True)
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(case.name, total=total, completed=number)

        def tell(text: str) -> None:
            progress.update(task, description=f"{case.name}: {text}")

        return measure(case, sizes, turns, others=others, missing=missing, progress=tell)


def _as_json(
    facts: dict[str, Any], settings: dict[str, Any], results: Sequence["CaseResult"], cases: Sequence["Case"]
) -> str:
    from fed_learn.benchmark.measure import as_json

    reasons = {case.name: case.why_not() for case in cases}
    document = {
        "machine": facts,
        "settings": settings,
        "cases": [as_json(result) for result in results],
        "not_measured": {name: reason for name, reason in reasons.items() if reason is not None},
    }
    return json.dumps(document, indent=2, allow_nan=False)


def _hand_out(text: str, as_json: bool, out: Path | None) -> None:
    if out is not None:
        write_whole(out, (text + "\n").encode())
    if as_json:
        print(text)
