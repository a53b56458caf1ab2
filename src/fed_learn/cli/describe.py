"""`fed-learn describe`: the variables in a file of weights or of a model, and what becomes of each in a federation."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fed_learn.adapters.describe import described
from fed_learn.cli.options import as_wrong_use, policies_of
from fed_learn.cli.weight_files import read_variables
from fed_learn.errors import NamesError


def describe(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            readable=True,
            metavar="FILE",
            help="Weights or a model: .safetensors, .npz, .npy, .pt, .pth, .bin, .keras, .h5.",
        ),
    ],
    only: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Only variables in whose names this is found.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=POLICY",
            help="What becomes of variables with such a name: mean, same, keep, local, max or sum. Again for more.",
            show_default="by role",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="ENTRY", help="The entry of a checkpoint in which the weights are.", show_default="the only one"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Show the variables in a file: names, shapes, dtypes, roles, and what becomes of each. Nothing is unpickled."""
    policies = policies_of(policy or [])
    variables, remarks = read_variables(file, key)
    try:
        description = as_wrong_use(lambda: described(variables, only=only, policies=policies))
    except NamesError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error
    if as_json:
        facts = {
            "file": str(file),
            "remarks": remarks,
            "summary": description.summary,
            "policies": description.policies,
            "variables": [asdict(variable) for variable in description],
        }
        print(json.dumps(facts, indent=2))
        return
    encoding = sys.stdout.encoding or "utf-8"
    for text in (*remarks, str(description)):  # names may have letters that the output does not
        print(text.encode(encoding, "backslashreplace").decode(encoding))
