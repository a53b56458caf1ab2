"""Interrupts of a command: Ctrl-C, and SIGTERM, by which service managers and containers end a process."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedError(Exception):
    """A command was interrupted; the message says what it leaves behind and how to go on."""


@contextmanager
def sigterm_like_ctrl_c() -> Iterator[list[int]]:
    """Makes SIGTERM raise `KeyboardInterrupt` in the main thread, unless the process was told what else to do.

    Yields:
        The signals that have come so far, Ctrl-C's not among them.
    """
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()  # Python lets no other handle signals
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or not in_main_thread:
        yield came
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
