"""The picture of a job: its metrics over rounds, and the cross-site matrix."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from fed_learn.contribution import GLOBAL_BEST
from fed_learn.disk import write_whole
from fed_learn.handlers.model_selection import SELECTION_METRIC
from fed_learn.handlers.server_validation import SERVER_VALIDATION_METRIC
from fed_learn.pictures import AMBER, BLUE, GREEN, GRID, INK, MUTED, new_figure, without_frame
from fed_learn.server import JobResult
from fed_learn.simulation.summary import site_labels

SERVER, CLIENTS, BEST = BLUE, AMBER, GREEN


def plot_job(path: str | os.PathLike[str], result: JobResult, summary: dict[str, Any]) -> None:
    """Draws a job to a PNG file.

    Left: the scores of each global model, placed at the number of rounds of training behind it, so that what the
    server measured after a round and what clients measured at the start of the next lie above each other. Right: the
    cross-site matrix. Beneath, where there is more than one framework: how far each client moved the global model.

    Args:
        path: Where to.
        result: The job.
        summary: From `summarize`, with `settings`.

    Raises:
        ImportError: matplotlib is not installed (extra `demo`).
    """
    settings, labels = summary["settings"], site_labels(summary)
    norms = summary["update_norms"] if len(set(summary["frameworks"].values())) > 1 else {}
    figure = new_figure(12.5, 8.6 if norms else 5.2)
    grid = figure.add_gridspec(2 if norms else 1, 2, width_ratios=[1.9, 1], height_ratios=[1.5, 1] if norms else [1])
    _draw_scores(figure.add_subplot(grid[0, 0]), result, summary)
    _draw_matrix(figure.add_subplot(grid[0, 1]), result.cross_site, labels)
    if norms:
        _draw_norms(figure.add_subplot(grid[1, :]), norms, summary["frameworks"])
    of = "" if settings["framework"] == "numpy" else f", {settings['framework']}"
    figure.suptitle(
        f"{settings['dataset']}: {settings['clients']} clients{of}, α = {settings['alpha']:g}, seed {settings['seed']}",
        x=0.01,
        ha="left",
        color=INK,
        fontsize=14,
        fontweight="bold",
    )
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_whole(Path(path), picture.getvalue())


def _draw_scores(axes: Any, result: JobResult, summary: dict[str, Any]) -> None:
    reports = result.reports
    received = [(r.round, r.metrics[SELECTION_METRIC]) for r in reports if SELECTION_METRIC in r.metrics]
    if SELECTION_METRIC in result.metrics:
        received.append((len(reports), result.metrics[SELECTION_METRIC]))
    aggregated = [
        (r.round + 1, r.metrics[SERVER_VALIDATION_METRIC]) for r in reports if SERVER_VALIDATION_METRIC in r.metrics
    ]
    axes.set_title("Accuracy of the global model", loc="left", color=INK, fontsize=11, pad=10)
    for points, colour, label in (
        (received, CLIENTS, "clients' selection data (mean)"),
        (aggregated, SERVER, "server's validation data"),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, lw=2.2, marker="o", ms=3.5, label=label, zorder=3)
    best = summary["best"]
    if best is not None:
        rounds_behind = best["round"] + (1 if best["source"] == "aggregated" else 0)
        axes.plot(rounds_behind, best["metric"], "*", color=BEST, ms=17, mec="white", mew=1.2, zorder=5)
        axes.axhline(best["test_accuracy"], color=BEST, lw=1.4, ls=(0, (5, 3)), zorder=2)
        axes.annotate(
            f"best: after {rounds_behind} rounds, test accuracy {best['test_accuracy']:.3f}",
            (0.99, 0.04),
            xycoords="axes fraction",
            ha="right",
            color=BEST,
            fontsize=10.5,
            fontweight="bold",
        )
    scores = [score for _, score in (*received, *aggregated)]
    # The first, untrained model would squeeze all others into a strip: let it leave the picture.
    later = [score for at, score in (*received, *aggregated) if at > 0] or scores or [0.0, 1.0]
    low = min(later)
    margin = max(0.02, 0.12 * (1 - low))
    axes.set_ylim(max(0.0, low - margin), min(1.005, max([*later, 0.0]) + margin))
    axes.set_xlim(0, max(1, len(reports)) * 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("rounds of training", color=MUTED)
    axes.grid(True, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    without_frame(axes)
    if scores:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.09), labelcolor=INK, fontsize=10)


def _draw_norms(axes: Any, norms: Any, frameworks: Any) -> None:
    colours = dict(zip(dict.fromkeys(frameworks.values()), (SERVER, CLIENTS), strict=False))
    axes.set_title(
        "How far each client moved the global model (‖contribution − global‖₂)", loc="left", color=INK, fontsize=11
    )
    named: set[str] = set()
    for client, row in norms.items():
        framework = frameworks[client]
        points = [(number, norm) for number, norm in enumerate(row, start=1) if norm is not None]
        if points:
            label = None if framework in named else framework
            axes.plot(*zip(*points, strict=True), color=colours[framework], lw=1.4, marker="o", ms=3.5, label=label)
            named.add(framework)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("round", color=MUTED)
    axes.grid(True, color=GRID, lw=0.8)
    without_frame(axes)
    axes.legend(frameon=False, loc="upper right", labelcolor=INK, fontsize=10)


def _draw_matrix(axes: Any, matrix: Any, names: dict[str, str]) -> None:
    axes.set_title("Cross-site validation", loc="left", color=INK, fontsize=11, pad=10)
    models = list(matrix)
    sites = list(dict.fromkeys(site for row in matrix.values() for site in row))
    if not models or not sites:
        axes.set_axis_off()
        return
    values = np.array([[matrix[model].get(site, np.nan) for site in sites] for model in models])
    axes.imshow(values, cmap="GnBu", vmin=0, vmax=1, aspect="auto")
    if len(models) * len(sites) <= 150:
        for row, model in enumerate(models):
            for column in range(len(sites)):
                value = values[row, column]
                axes.text(
                    column,
                    row,
                    f"{value:.2f}" if np.isfinite(value) else "–",
                    ha="center",
                    va="center",
                    color="white" if value > 0.65 else INK,
                    fontsize=10,
                    fontweight="bold" if model == GLOBAL_BEST else "normal",
                )
    labels = ["global best" if model == GLOBAL_BEST else f"{names.get(model, model)}'s best" for model in models]
    axes.set_yticks(range(len(models)), labels)
    axes.set_xticks(range(len(sites)), sites, rotation=0 if len(sites) <= 5 else 60)
    axes.set_xlabel("validated on the data of", color=MUTED)
    without_frame(axes)
    axes.set_xticks(np.arange(len(sites) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(models) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=2.5)
    axes.tick_params(which="minor", length=0)
