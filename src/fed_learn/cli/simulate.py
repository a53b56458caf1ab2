"""`fed-learn simulate`: a federation on real data, in one process."""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fed_learn.cli.interrupts import INTERRUPTS, StoppedError
from fed_learn.cli.job_folder import DEFAULT, FILES, JobFolder, default_folder
from fed_learn.cli.options import as_wrong_use, policies_of
from fed_learn.contribution import GLOBAL_BEST, Kind
from fed_learn.errors import described
from fed_learn.model_meta import ContextKey
from fed_learn.simulation.datasets import Dataset
from fed_learn.simulation.frameworks import Framework
from fed_learn.weights import Schema

if TYPE_CHECKING:
    from fed_learn.simulation.demo import Demo

DEFAULT_ROUNDS = 20


def _folder(value: str | Path) -> Path:
    """A folder that is there or can be made; without a name it would be the one in which the command runs."""
    if value == "":
        raise typer.BadParameter("the folder has no name")
    if os.path.exists(value) and not os.path.isdir(value):
        raise typer.BadParameter(f"{value} is a file, not a folder")
    return Path(value)


def simulate(
    context: typer.Context,
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
        Path | None,
        typer.Option(
            parser=_folder,
            metavar="DIRECTORY",
            help="Folder for metrics, models, state, summary and plot.",
            show_default=f"{DEFAULT}, or {DEFAULT}-2, …",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the job in that folder, after a kill too; --rounds may ask for more of them."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier job in that folder.")
    ] = False,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Write a chained record of each round, for fed-learn verify.")
    ] = False,
    keep_contributions: Annotated[
        bool, typer.Option("--keep-contributions", help="Keep what rounds are made of; implies --ledger.")
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

    from fed_learn.components.config import read_config

    _configure_logging(debug)
    _quiet_tensorflow()
    if resume and overwrite:
        raise typer.BadParameter("it goes on with a job, and --overwrite would replace it", param_hint="--resume")
    folder = JobFolder(out if out is not None else default_folder(resume))
    options = {
        "dataset": dataset.value,
        "framework": framework.value,
        "clients": clients,
        "rounds": rounds,
        "alpha": alpha,
        "seed": seed,
        "local_epochs": local_epochs,
        "kind": None if kind is None else kind.value,
        "rule": rule,
        "policy": policy or [],
        "partial": partial,
        "kernel": kernel,
        "threads": threads,
        "exact": exact,
        "patience": patience,
        "ledger": ledger or keep_contributions,
        "keep_contributions": keep_contributions,
        "config": read_config(config) if config is not None else {},
    }
    if resume:
        options = folder.kept_options(options, {name for name in options if _is_given(context, name)})
    else:
        folder.check_free(overwrite)
    folder.options = options
    started = time.perf_counter()
    demo = _build(options, folder, resume, as_json)
    INTERRUPTS.last_words = lambda: _what_is_left(demo, folder)
    with folder.taken(overwrite, resume):
        try:
            summary = _run(demo, folder, _settings_used(demo, options), started)
        except KeyboardInterrupt as interrupt:
            raise StoppedError(_what_is_left(demo, folder)) from interrupt
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _print_summary(Console(soft_wrap=True, highlight=False, markup=False), summary)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line, rather than a default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _build(options: Mapping[str, Any], folder: JobFolder, resume: bool, as_json: bool) -> "Demo":
    """Puts the job together by its options.

    Raises:
        typer.BadParameter: One of them is out of its range.
        ConfigError: The configuration cannot be used.
        StateError: The job is to go on, and its state is damaged.
    """
    from fed_learn import kernels
    from fed_learn.handlers import CheckpointHandler, EarlyStoppingHandler, JsonLinesHandler, ProgressHandler
    from fed_learn.server.config import ServerConfig
    from fed_learn.simulation.demo import build_demo
    from fed_learn.simulation.update_norms import UpdateNormHandler

    settings = ServerConfig.of(options["config"])
    aggregator = settings.build_aggregator(options["exact"])
    kind = options["kind"] or (Kind.FULL if aggregator is None else Kind.DIFF)
    kernels.set_num_threads(options["threads"])
    as_wrong_use(kernels.get_num_threads)
    stopping = [] if options["patience"] is None else [EarlyStoppingHandler(options["patience"])]
    demo = as_wrong_use(
        lambda: build_demo(
            options["dataset"],
            framework=options["framework"],
            num_clients=options["clients"],
            num_rounds=options["rounds"] or settings.num_rounds or DEFAULT_ROUNDS,
            alpha=options["alpha"],
            seed=options["seed"],
            local_epochs=options["local_epochs"],
            kind=Kind(kind),
            configured_handlers=settings.handler_entries(),
            client_filters=lambda number: settings.build_filters([options["seed"], number]),
            reporters=[
                folder,
                *stopping,
                UpdateNormHandler(),
                JsonLinesHandler(folder.path / "metrics.jsonl", times=False, overwrite=True),
                CheckpointHandler(folder.path, overwrite=True),
                ProgressHandler(stderr=as_json),
            ],
            min_contributions=settings.min_num_clients,
            on_bad_contribution="reject",
            exact=options["exact"] and not getattr(aggregator, "exact", False),
            kernel=None if options["kernel"] == "auto" else options["kernel"],
            rule=options["rule"],
            policies=_policies(policies_of(options["policy"]), settings.policies),
            partial=options["partial"] or settings.partial or "same",
            aggregator=aggregator,
            durable=folder.state,
            ledger=options["ledger"],
            keep_contributions=options["keep_contributions"],
            resume=resume,
        )
    )
    for doubt in settings.doubts(aggregator, Schema.of(demo.server.weights), [client.name for client in demo.clients]):
        logging.getLogger("fed_learn").warning("--config: %s", doubt)
    return demo


def _policies(given: Mapping[str, str], configured: Mapping[str, str]) -> dict[str, str]:
    """Those of the command first, since the first expression that fits decides."""
    return {**given, **{pattern: policy for pattern, policy in configured.items() if pattern not in given}}


def _settings_used(demo: "Demo", options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a job as they took effect, for its summary."""
    from fed_learn import kernels

    aggregation = demo.server.settings.aggregation
    return {
        **{name: options[name] for name in ("dataset", "framework", "clients")},
        "rounds": demo.server.num_rounds,
        **{name: options[name] for name in ("alpha", "seed", "local_epochs")},
        "kind": aggregation.kind.value,
        "rule": options["rule"],
        "policies": dict(aggregation.policies),
        "partial": aggregation.partial,
        "kernel": aggregation.kernel,
        "threads": kernels.get_num_threads(),
        "exact": options["exact"],
    }


def _run(demo: "Demo", folder: JobFolder, settings: dict[str, Any], started: float) -> dict[str, Any]:
    """Runs the job and writes the summary, before the plot, which nobody misses as much, and again with it.

    The summary in the file has nothing in it that differs from run to run: times are in a file of their own.
    """
    from fed_learn.disk import write_whole
    from fed_learn.simulation.summary import summarize, times

    result = demo.run()
    summary = {**summarize(demo, result), "settings": settings}
    out = folder.path

    def write() -> dict[str, Any]:
        files = {"summary.json", "times.json", *folder.files}
        told = {**summary, "files": [name for name in FILES if name in files]}
        seconds = round(time.perf_counter() - started, 3)
        write_whole(out / "times.json", _json({"seconds": seconds, "rounds": times(result)}))
        write_whole(out / "summary.json", _json(told))
        return {**told, "seconds": seconds, "files": {name: str(out / name) for name in told["files"]}}

    printed = write()
    try:
        from fed_learn.simulation.plot import plot_job

        plot_job(out / "metrics.png", result, summary)
    except Exception as error:  # noqa: BLE001 - whatever it is, the job is done and its files are written
        logging.getLogger("fed_learn").warning("there is no plot: %s", described(error))
    else:
        printed = write()
    return printed


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _what_is_left(demo: "Demo", folder: JobFolder) -> str:
    """What to tell of a job that was interrupted."""
    report = demo.server.ctx.get_prop(ContextKey.REPORT)
    where = "interrupted" if report is None else f"interrupted in round {report.round + 1} of {demo.server.num_rounds}"
    if not folder.begun or not folder.has_state:
        return f"{where}; nothing was written: run it again"
    if "summary.json" in folder.files:
        files = ", ".join(folder.files)
        return f"interrupted when the job was done; only the plot may be missing in {folder.path}: {files}"
    kept = ", ".join([*folder.files, "state"])
    return f"{where}; kept in {folder.path}: {kept}. To go on: fed-learn simulate --out {folder.path} --resume"


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
