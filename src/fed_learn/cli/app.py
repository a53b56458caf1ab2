"""The commands, gathered."""

from typing import Annotated

import typer

from fed_learn.cli.bench import bench
from fed_learn.cli.describe import describe
from fed_learn.cli.info import info
from fed_learn.cli.simulate import simulate
from fed_learn.cli.verify import verify

app = typer.Typer(
    help="Federated learning: event handlers and reproducible averaging.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fed_learn import __version__

        print(f"fed-learn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated learning: event handlers and reproducible averaging."""


app.command()(simulate)
app.command()(bench)
app.command()(describe)
app.command()(info)
app.command()(verify)
