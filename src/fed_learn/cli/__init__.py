"""The command `fed-learn`. Each command is a module of its own; this one starts them and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. Errors are one line on stderr; `--debug` adds the
traceback.
"""

import sys
import traceback
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of `fed-learn`; leaves by `SystemExit`.

    Args:
        arguments: Command-line arguments; None: those of the process.
    """
    try:
        import rich  # noqa: F401 - checked here together with typer, so that the message is one
        import typer  # noqa: F401
    except ImportError:
        sys.exit("fed-learn: the command line needs typer and rich: pip install 'fed-learn[cli]'")
    from fed_learn.cli.app import app
    from fed_learn.errors import ConfigError

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(given, prog_name="fed-learn")  # leaves by SystemExit; reports wrong use itself
    except Exception as error:  # noqa: BLE001 - the edge of the program
        if "--debug" in given:
            traceback.print_exc()
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"fed-learn: {first}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
