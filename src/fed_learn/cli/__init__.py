"""The command `fed-learn`. Each command is a module of its own; this one starts them and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted by Ctrl-C (SIGINT), 143 by SIGTERM. Errors are one line on
stderr; `--debug` adds the traceback.
"""

import signal
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
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    from fed_learn.cli.app import app
    from fed_learn.cli.interrupts import StoppedError, handled
    from fed_learn.errors import ConfigError, text_of

    with handled() as interrupts:
        try:
            code = app(arguments, prog_name="fed-learn", standalone_mode=False)
            # In the parser's hands an interrupt becomes an exit code of its own.
            error: BaseException | None = KeyboardInterrupt() if code == 128 + signal.SIGINT else None
        except (Exception, KeyboardInterrupt) as raised:  # noqa: BLE001 - the edge of the program
            error = raised
    if error is None:
        return code if isinstance(code, int) else 0
    # Errors of the command line's parser bring their exit code; typer brings its own copy of their classes.
    if isinstance(error, KeyboardInterrupt | StoppedError) or type(error).__name__ == "Abort":
        return _fail(str(error) or "interrupted", interrupts.exit_code)
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):
        message = error.format_message()
        return _fail(message, error.exit_code) if message else int(error.exit_code)
    if "--debug" in arguments:
        traceback.print_exception(error)
    return _fail(text_of(error) or type(error).__name__, 2 if isinstance(error, ConfigError) else 1)


def _fail(message: str, code: int) -> int:
    print(f"fed-learn: {' '.join(message.split())}", file=sys.stderr)
    return code
