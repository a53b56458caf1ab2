"""`fed-learn simulate`: a federation on real data, in one process."""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fed_learn.cli.interrupts import StoppedError
from fed_learn.cli.options import as_wrong_use, policies_of
from fed_learn.contribution import GLOBAL_BEST, Kind
from fed_learn.disk import remove
from fed_learn.errors import described
from fed_learn.handlers import Handler
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.simulation.datasets import Dataset
from fed_learn.simulation.frameworks import Framework
from fed_learn.weights import Schema

if TYPE_CHECKING:
    from fed_learn.simulation.demo import Demo

DEFAULT_ROUNDS = 20
FILES = ("metrics.jsonl", "global.safetensors", "best.safetensors", "summary.json", "metrics.png")


class _Replacing(Handler):
    """Removes the files of an earlier job once the new one has started."""

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def start_round(self, ctx: FLContext) -> None:
        """Removes them, in the first round."""
        while self.paths:
            remove(self.paths.pop())


def _folder(value: str | Path) -> Path:
    """A folder that is there or can be made; without a name it would be the one in which the command runs."""
    if value == "":
        raise typer.BadParameter("the folder has no name")
    if os.path.exists(value) and not os.path.isdir(value):
        raise typer.BadParameter(f"{value} is a file, not a folder")
    return Path(value)


def simulate(
    dataset: Annotated[Dataset, typer.Option(help="Real data that scikit-learn ships.")] = Dataset.DIGITS,
    framework: Annotated[
        Framework,
        typer.Option(help="In what clients train; mixed: torch and TensorFlow clients in turn, in one job."),
    ] = Framework.NUMPY,
    clients: Annotated[int, typer.Option(min=1, help="Number of clients.")] = 4,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Number of rounds.", show_default=str(DEFAULT_ROUNDS))
    ] = None,
    alpha: Annotated[
        float, typer.Option(min=1e-6, help="How alike the clients' data are (Dirichlet); small: very different.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the initial weights and the training.")] = 0,
    local_epochs: Annotated[int, typer.Option(min=1, help="Passes over a client's data in a round.")] = 5,
    kind: Annotated[
        Kind | None,
        typer.Option(
            help="What clients send: full weights or differences.", show_default="full; diff with an aggregator"
        ),
    ] = None,
    rule: Annotated[str, typer.Option(help="How contributions are combined: mean.")] = "mean",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=POLICY",
            help="What becomes of variables with such a name: mean, same, keep, local, max or sum. Again for more.",
            show_default="mean",
        ),
    ] = None,
    partial: Annotated[
        str | None,
        typer.Option(help="What becomes of parts of the model: same, average or refuse.", show_default="same"),
    ] = None,
    kernel: Annotated[str, typer.Option(help="What averages: auto, native or numpy.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the aggregation.", show_default="all processors")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Average with exact sums.")] = False,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many rounds without a better model.", show_default="never")
    ] = None,
    out: Annotated[
        Path, typer.Option(parser=_folder, metavar="DIRECTORY", help="Folder for metrics, models, summary and plot.")
    ] = Path("fed-learn-job"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier job in that folder.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON: handlers, aggregator, filters, num_rounds, …; also a config_fed_server.json of Clara Train.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, and the progress on stderr.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train a federation on real data, split unequally over clients, and report on it."""
    from rich.console import Console

    from fed_learn import kernels
    from fed_learn.components.config import read_config
    from fed_learn.disk import Claim
    from fed_learn.handlers import (
        CheckpointHandler,
        EarlyStoppingHandler,
        JsonLinesHandler,
        ProgressHandler,
    )
    from fed_learn.server.config import ServerConfig
    from fed_learn.simulation.demo import build_demo
    from fed_learn.simulation.update_norms import UpdateNormHandler

    _configure_logging(debug)
    _quiet_tensorflow()
    _refuse_earlier_files(out, overwrite)
    settings = ServerConfig.of(read_config(config) if config is not None else {})
    aggregator = settings.build_aggregator(exact)
    kind = kind or (Kind.FULL if aggregator is None else Kind.DIFF)
    kernels.set_num_threads(threads)
    as_wrong_use(kernels.get_num_threads)
    started = time.perf_counter()
    replacing = _Replacing()
    demo = as_wrong_use(
        lambda: build_demo(
            dataset.value,
            framework=framework.value,
            num_clients=clients,
            num_rounds=rounds or settings.num_rounds or DEFAULT_ROUNDS,
            alpha=alpha,
            seed=seed,
            local_epochs=local_epochs,
            kind=kind,
            configured_handlers=settings.handler_entries(),
            client_filters=lambda number: settings.build_filters([seed, number]),
            reporters=[
                replacing,
                *([EarlyStoppingHandler(patience)] if patience is not None else []),
                UpdateNormHandler(),
                JsonLinesHandler(out / "metrics.jsonl"),
                CheckpointHandler(out),
                ProgressHandler(stderr=as_json),
            ],
            min_contributions=settings.min_num_clients,
            on_bad_contribution="reject",
            exact=exact and not getattr(aggregator, "exact", False),
            kernel=None if kernel == "auto" else kernel,
            rule=rule,
            policies=_policies(policies_of(policy or []), settings.policies),
            partial=partial or settings.partial or "same",
            aggregator=aggregator,
        )
    )
    schema = Schema.of(demo.server.weights)
    for doubt in settings.doubts(aggregator, schema, [client.name for client in demo.clients]):
        logging.getLogger("fed_learn").warning("%s: %s", config, doubt)
    settings_used = {
        "dataset": dataset.value,
        "framework": framework.value,
        "clients": clients,
        "rounds": demo.server.num_rounds,
        "alpha": alpha,
        "seed": seed,
        "local_epochs": local_epochs,
        "kind": kind.value,
        "rule": rule,
        "policies": dict(demo.server.settings.aggregation.policies),
        "partial": demo.server.settings.aggregation.partial,
        "kernel": demo.server.settings.aggregation.kernel,
        "threads": kernels.get_num_threads(),
        "exact": exact,
    }
    with Claim([out / name for name in ("summary.json", "metrics.png")]):
        _refuse_earlier_files(out, overwrite)  # once more: another job may have come and gone
        replacing.paths = [out / name for name in _files_in(out)]
        try:
            summary = _run(demo, out, settings_used, started)
        except KeyboardInterrupt as interrupt:
            raise StoppedError(_what_is_left(demo, [] if replacing.paths else _files_in(out), out)) from interrupt
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _print_summary(Console(soft_wrap=True, highlight=False, markup=False), summary)


def _policies(given: Mapping[str, str], configured: Mapping[str, str]) -> dict[str, str]:
    """Those of the command first, since the first expression that fits decides."""
    return {**given, **{pattern: policy for pattern, policy in configured.items() if pattern not in given}}


def _refuse_earlier_files(out: Path, overwrite: bool) -> None:
    names = _files_in(out)
    if names and not overwrite:
        raise typer.BadParameter(
            f"{out} holds files of an earlier job ({', '.join(names)}): name another folder, or replace them with "
            "--overwrite",
            param_hint="--out",
        )


def _run(demo: "Demo", out: Path, settings: dict[str, Any], started: float) -> dict[str, Any]:
    """Runs the job and writes the summary, before the plot, which nobody misses as much, and again with it."""
    from fed_learn.disk import write_whole
    from fed_learn.simulation.summary import summarize

    result = demo.run()
    summary = {**summarize(demo, result), "settings": settings}

    def write() -> None:
        summary["seconds"] = round(time.perf_counter() - started, 3)
        summary["files"] = {name: str(out / name) for name in FILES if name == "summary.json" or name in _files_in(out)}
        write_whole(out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())

    write()
    try:
        from fed_learn.simulation.plot import plot_job

        plot_job(out / "metrics.png", result, summary)
    except Exception as error:  # noqa: BLE001 - whatever it is, the job is done and its files are written
        logging.getLogger("fed_learn").warning("there is no plot: %s", described(error))
    else:
        write()
    return summary


def _files_in(out: Path) -> list[str]:
    return [name for name in FILES if (out / name).exists()]


def _what_is_left(demo: "Demo", files: list[str], out: Path) -> str:
    """What to tell of a job that was interrupted."""
    report = demo.server.ctx.get_prop(ContextKey.REPORT)
    where = "interrupted" if report is None else f"interrupted in round {report.round + 1} of {demo.server.num_rounds}"
    if not files:
        return f"{where}; nothing was written: run it again"
    if "summary.json" in files:
        return f"interrupted when the job was done; only the plot may be missing in {out}: {', '.join(files)}"
    return (
        f"{where}; kept in {out}: {', '.join(files)}. It cannot be resumed: run it again with another --out, or with "
        "--overwrite"
    )


def _print_summary(console: Any, summary: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from fed_learn.simulation.summary import site_labels

    best, final = summary["best"], summary["final"]
    console.print()
    if summary["stop_reason"]:
        console.print(f"Stopped early: {summary['stop_reason']}")
    if best is not None:
        final_one = best["source"] == "received" and best["round"] == len(summary["rounds"])
        where = "the final one" if final_one else f"{best['source']} in round {best['round'] + 1}"
        what = f"Best model   {where}, {best['metric_name']} {best['metric']:.4f}, "
        console.print(Text.assemble(what, (f"test accuracy {best['test_accuracy']:.4f}", "bold")))
    console.print(f"Final model  test accuracy {final['test_accuracy']:.4f}")
    matrix = summary["cross_site"]
    sites = list(dict.fromkeys(site for row in matrix.values() for site in row))
    labels = site_labels(summary)
    table = Table(title="\nCross-site validation: accuracy of each best model on each client's data", box=None)
    table.title_justify = "left"
    table.add_column("model", no_wrap=True)
    for site in sites:
        table.add_column(f"on {site}", justify="right")
    for model, row in matrix.items():
        cells = [f"{row[site]:.4f}" if site in row else "–" for site in sites]
        table.add_row(labels.get(model, model), *cells, style="bold" if model == GLOBAL_BEST else None)
    console.print(table)
    if summary["update_norms"]:
        console.print(_norms_table(summary, labels))
    console.print(f"\n{summary['seconds']:.1f} s. Files:")
    for path in summary["files"].values():
        console.print(f"  {path}")


def _norms_table(summary: dict[str, Any], labels: dict[str, str]) -> Any:
    from rich.table import Table

    title = "\nHow far each client moved the global model: ‖contribution − global‖₂ over what is trained"
    table = Table(title=title, box=None, title_justify="left")
    table.add_column("client")
    for column in ("rounds", "first", "last", "least", "most"):
        table.add_column(column, justify="right")
    for client, norms in summary["update_norms"].items():
        known = [norm for norm in norms if norm is not None]
        shown = [f"{norm:.4f}" for norm in (known[0], known[-1], min(known), max(known))] if known else ["–"] * 4
        table.add_row(labels[client], str(len(known)), *shown)
    return table


def _configure_logging(debug: bool) -> None:
    """Warnings and errors as single lines on stderr; with `debug` everything, with tracebacks."""

    class OneLine(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            text = f"{record.levelname}: {' '.join(record.getMessage().split())}"
            if debug and record.exc_info:
                text += "\n" + self.formatException(record.exc_info)
            return text

    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logger = logging.getLogger("fed_learn")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.propagate = False
    # Failed handlers end the job, and are named in its one line.
    logging.getLogger("fed_learn.events").setLevel(logging.NOTSET if debug else logging.CRITICAL)


def _quiet_tensorflow() -> None:
    """Keeps TensorFlow from talking of itself; what the user has set stays."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # announces itself, and rounds as it likes

    class NoRetracing(logging.Filter):
        # The model of each client is traced once, as it should be; TensorFlow counts them all as one function.
        def filter(self, record: logging.LogRecord) -> bool:
            return "triggered tf.function retracing" not in record.getMessage()

    logging.getLogger("tensorflow").addFilter(NoRetracing())
