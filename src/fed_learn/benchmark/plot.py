"""The picture of a benchmark: per case, every side's time as a multiple of the limit, this package's highlighted."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fed_learn.benchmark.measure import CaseResult, SideResult
from fed_learn.pictures import AMBER, BLUE, GRID, INK, MUTED, RED, new_figure, without_frame

COLUMNS = 3
"""Panels side by side, where there are many cases."""
FAR = 6.0
"""From this multiple of the limit on the axis is logarithmic."""
ROW, HEAD = 0.235, 0.62
"""Inches per side, and of a panel beside its sides."""
BREADTH = 5.4
"""Inches of a panel."""
TITLE, LEGEND, LINE = 0.55, 0.4, 0.17
"""Inches of the title and of the legend, and of a line of text below the title."""
LEFT = 0.17
"""Inches from the left edge to the text."""


def plot_results(path: str | os.PathLike[str], results: Sequence[CaseResult], facts: Mapping[str, Any]) -> None:
    """Draws results to a PNG file: one panel per case, one row per side, from the limit to its time.

    Args:
        path: Where to.
        results: What was measured.
        facts: From `machine.facts`.

    Raises:
        ImportError: matplotlib is not installed (extra `bench`).
        ValueError: There is nothing to draw.
    """
    if not results:
        raise ValueError("no case was measured, so there is nothing to draw")
    columns = min(COLUMNS, len(results))
    rows = [results[at : at + columns] for at in range(0, len(results), columns)]
    heights = [HEAD + ROW * max(len(result.sides) for result in row) for row in rows]
    width = max(8.5, BREADTH * columns)
    lines = textwrap.wrap(_where(facts), int(width * 13.5))
    height = sum(heights) + TITLE + LINE * len(lines) + LEGEND
    figure = new_figure(width, height)
    figure.get_layout_engine().set(
        rect=(0, LEGEND / height, 1, sum(heights) / height), w_pad=0.12, h_pad=0.06, hspace=0.0, wspace=0.02
    )
    panels = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for row, axes_of_row in zip(rows, panels, strict=True):
        places = max(len(result.sides) for result in row)
        for axes in axes_of_row[len(row) :]:
            axes.set_axis_off()
        for axes, result in zip(axes_of_row, row, strict=False):
            _draw_case(axes, result, places)
            axes.set_title(_what(result, full=columns == 1), loc="right", color=MUTED, fontsize=8, pad=5)
    title = "Weighted averages: time ÷ limit"
    figure.text(LEFT / width, 1 - 0.3 / height, title, color=INK, fontsize=15, fontweight="bold", va="center")
    for number, line in enumerate(lines):
        below = TITLE + LINE * number
        figure.text(LEFT / width, 1 - below / height, line, color=MUTED, fontsize=9, va="center")
    _draw_legend(figure, any(side.wrong for result in results for side in result.sides))
    figure.savefig(Path(path))


def _draw_case(axes: Any, result: CaseResult, places: int) -> None:
    """Draws a panel with room for `places` sides, so that rows are equally far apart in panels side by side."""
    ours = [side for side in result.sides if side.ours]
    others = sorted((side for side in result.sides if not side.ours), key=result.to_limit)
    sides = [*ours, *others]
    values = [result.to_limit(side) for side in sides]
    low, high = _range(axes, values)
    axes.plot([1.0, 1.0], [-0.6, len(sides) - 0.4], color=AMBER, lw=1.6, zorder=2)
    for row, (side, value) in enumerate(zip(sides, values, strict=True)):
        colour = RED if side.wrong else BLUE if side.ours else MUTED
        axes.plot([1.0, value], [row, row], color=colour, lw=2.6 if side.ours else 1.6, zorder=3, solid_capstyle="butt")
        axes.plot(value, row, "o", color=colour, ms=7 if side.ours else 5.5, mec="white", mew=0.8, zorder=4)
        axes.annotate(
            _label(side, value),
            (max(value, 1.0), row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour if side.ours or side.wrong else INK,
            fontsize=8.5,
            fontweight="bold" if side.ours else "normal",
        )
    axes.set_xlim(low, high)
    axes.set_ylim(places - 0.4, -0.6)
    axes.set_yticks(range(len(sides)), [side.name for side in sides], fontsize=8.5)
    axes.grid(True, axis="x", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    without_frame(axes)
    axes.tick_params(axis="x", labelsize=8, pad=1)
    for label, side in zip(axes.get_yticklabels(), sides, strict=True):
        label.set_color(RED if side.wrong else BLUE if side.ours else INK)
        label.set_fontweight("bold" if side.ours else "normal")
    axes.set_title(result.case.name, loc="left", color=INK, fontsize=11, fontweight="bold", pad=5)


def _range(axes: Any, values: Sequence[float]) -> tuple[float, float]:
    """Sets the scale of the axis and its ticks; leaves room for the labels on the right."""
    least, most = min([*values, 1.0]), max([*values, 1.3])
    if most < FAR:
        margin = 0.06 * (most - least) + 0.02
        return least - margin, most + 0.3 * (most - least) + margin
    axes.set_xscale("log")
    decades = math.log10(most / least)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000) if tick <= most * 1.3]
    if decades > 1.4:
        ticks = [tick for tick in ticks if math.log10(tick) % 1 == 0]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    return least * 10 ** (-0.05 * decades), most * 10 ** (0.26 * decades)


def _label(side: SideResult, value: float) -> str:
    number = f"{value:.2f}" if value < 9.95 else f"{value:.1f}" if value < 99.5 else f"{value:.0f}"
    return f"{number}  wrong" if side.wrong else number


def _what(result: CaseResult, full: bool) -> str:
    unit = "1 contribution" if result.case.streams else f"{result.case.clients} clients"
    about = f"{result.case.about}: " if full else ""
    return f"{about}{unit}, {result.case.dtype.name}, {result.nbytes / 1e6:.0f} MB"


def _where(facts: Mapping[str, Any]) -> str:
    parts = [
        facts["processor"] or "unknown processor",
        f"{facts['threads']} threads",
        facts["instruction_set"],
        *(f"{name} {version}" for name, version in facts["versions"].items() if version and name != "ml-dtypes"),
    ]
    return "   ".join(part for part in parts if part)


def _draw_legend(figure: Any, wrong: bool) -> None:
    """What the colours mean, in a line below the panels."""
    width, height = figure.get_size_inches()
    entries = [
        ("● fed_learn", BLUE),
        ("● others", MUTED),
        *([("● wrong result", RED)] if wrong else []),
        ("▎limit: a bare read of the inputs, for a batch × (n+1)/n", AMBER),
    ]
    at = LEFT
    for text, colour in entries:
        figure.text(at / width, 0.2 / height, text, color=colour, fontsize=9, va="center")
        at += 0.35 + 0.073 * len(text)
