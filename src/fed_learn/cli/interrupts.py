"""Interrupts of a command: Ctrl-C, and SIGTERM, by which service managers and containers end a process."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

QUIET, PATIENCE = 2.0, 60.0
"""Seconds after which an interrupted command says that it still waits, and after which it ends all the same."""


class StoppedError(Exception):
    """A command was interrupted; the message says what it leaves behind and how to go on."""


class Interrupts:
    """What has come so far, and what to say if the process has to end without an answer from what it is doing.

    Attributes:
        came: The number of the first signal; None: none has come.
        last_words: Gives what to say in that case.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A command begins, and nothing of an earlier one in the same process is left."""
        self.came: int | None = None
        self.last_words: Callable[[], str] = lambda: "interrupted"
        self._timers: list[threading.Timer] = []

    def end(self) -> None:
        """The command has ended by itself."""
        for timer in self._timers:
            timer.cancel()

    @property
    def exit_code(self) -> int:
        """The exit code of a process that a signal ended, as shells have it."""
        return 128 + (signal.SIGINT if self.came is None else self.came)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal raises `KeyboardInterrupt` where the command is; a second one ends the process at once."""
        if self.came is not None:
            self._leave("ended at once")
        self.came = number
        for seconds, what in ((QUIET, self._say_that_it_waits), (PATIENCE, self._give_up)):
            timer = threading.Timer(seconds, what)
            timer.daemon = True
            timer.start()
            self._timers.append(timer)
        raise KeyboardInterrupt

    def _say_that_it_waits(self) -> None:
        _say("interrupted, and waits for what is being done, such as a client's training; once more ends it at once")

    def _give_up(self) -> None:
        self._leave(f"ended after {PATIENCE:.0f} s, for what was being done did not end")

    def _leave(self, how: str) -> None:
        try:
            words = self.last_words()
        except Exception as error:  # noqa: BLE001 - the process ends in any case
            words = f"interrupted ({type(error).__name__})"
        _say(f"{words} ({how})")
        os._exit(self.exit_code)  # threads of learners that hang would keep the process otherwise


INTERRUPTS = Interrupts()
"""Those of the command that runs in this process."""


@contextmanager
def handled() -> Iterator[Interrupts]:
    """Handles SIGINT and SIGTERM meanwhile, unless the process was told what else to do with them."""
    INTERRUPTS.begin()
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other handle signals
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) is usual:
                before[number] = usual
                signal.signal(number, INTERRUPTS.handle)
    try:
        yield INTERRUPTS
    finally:
        INTERRUPTS.end()
        for number, usual in before.items():
            signal.signal(number, usual)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar has hidden the cursor
    print(f"fed-learn: {text}", file=sys.stderr, flush=True)
