"""`fed-learn verify`: checks a job by its ledger."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer


def verify(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Of a job, or of its state.")],
    contributions: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="With what rounds were made of; else beside the ledger."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Check that nobody has changed the ledger of a job, and make its rounds again where their contributions are kept.

    Exit code 1, and one line that says what was changed, if anything was.
    """
    from fed_learn.server.job_ledger import NAME
    from fed_learn.server.verification import verify as verified

    state = folder if (folder / NAME).exists() else folder / "state"
    if not (state / NAME).exists():
        raise typer.BadParameter(f"{folder} holds no ledger: a job writes one with ledger=True (simulate --ledger)")
    found = verified(state, contributions)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    print(f"{found.rounds} rounds; each entry of the ledger is as it was written, and follows the one before it.")
    if found.made_again:
        print(f"{len(found.made_again)} rounds were made again from their contributions, with the same bits.")
    if found.failed:
        print(f"{len(found.failed)} rounds had failed, and left the global model as it was.")
    if found.replaced:
        print(f"In {len(found.replaced)} rounds a handler replaced the global model.")
    if found.not_kept:
        print(f"{len(found.not_kept)} rounds cannot be made again: what they were made of, or their rule, is not here.")
    print(f"Digest of the last entry, which stands for all: {found.head}")
