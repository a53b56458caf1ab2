"""The small thread pool on which kernels split their work by bytes.

It is shared by all kernels, made when first needed, made anew in a forked child, and is not the pool in which a
simulation trains its clients.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")

SMALLEST_SHARE = 1 << 21
"""Bytes per thread below which another thread costs more than it brings: waking one takes about 0.1 ms."""

_num_threads: int | None = None
_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()
"""Held while the pool is made, given work or retired, so that no work goes to one that is retired."""


def set_num_threads(n: int | None) -> None:
    """Sets how many threads a kernel may use; the result has the same bits whatever it is.

    Args:
        n: At least 1, or None for the default: `FED_LEARN_NUM_THREADS`, else the usable processors.

    Raises:
        ValueError: `n` is smaller than 1.

    Example:
        >>> set_num_threads(2)
        >>> get_num_threads()
        2
        >>> set_num_threads(None)
    """
    global _num_threads, _pool
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"the number of threads must be an int of at least 1, not {n!r}")
    with _lock:
        if n != _num_threads and _pool is not None:
            _pool.shutdown(wait=False)  # what it was given, it finishes
            _pool = None
        _num_threads = n


def get_num_threads() -> int:
    """How many threads a kernel may use.

    Raises:
        ValueError: `FED_LEARN_NUM_THREADS` is set to something else than a number of at least 1.
    """
    if _num_threads is not None:
        return _num_threads
    setting = os.environ.get("FED_LEARN_NUM_THREADS", "")
    if setting:
        if not setting.isdecimal() or int(setting) < 1:
            raise ValueError(f"FED_LEARN_NUM_THREADS must be a number of at least 1, not {setting!r}")
        return int(setting)
    return usable_processors()


def usable_processors() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_for(num_bytes: int) -> int:
    """How many threads pay for work that reads and writes `num_bytes`."""
    shares = num_bytes // SMALLEST_SHARE
    return 1 if shares <= 1 else min(get_num_threads(), shares)


class _Task(Generic[T]):
    """A share of work that is done once, by the first thread that calls it; any thread can wait for its end.

    A pool may keep a task for which it could not start a thread, and call it after the caller has done the work.
    """

    def __init__(self, function: Callable[[T], None], share: T) -> None:
        self._function = function
        self._share = share
        self._claim = threading.Lock()
        self._outcome: Future[None] = Future()

    def __call__(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._function(self._share)
        except BaseException as error:  # noqa: BLE001 - `run` raises it again
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(None)

    def error(self) -> BaseException | None:
        """What it raised; waits until it has ended."""
        return self._outcome.exception()


def run(function: Callable[[T], None], shares: Sequence[T]) -> None:
    """Calls `function` on each share, side by side; the calling thread takes those that no other has begun.

    An interrupt may end the wait for the others: a share must keep alive whatever memory it works on.

    Raises:
        BaseException: What the first failing share raised, once all have ended.
    """
    global _pool
    if len(shares) == 1:
        function(shares[0])
        return
    tasks = [_Task(function, share) for share in shares]
    with _lock, suppress(RuntimeError):  # no thread can be started, or the interpreter shuts down: see below
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, get_num_threads() - 1), thread_name_prefix="fed_learn-kernel")
        for task in tasks[1:]:
            _pool.submit(task)
    for task in tasks:
        task()
    for error in [task.error() for task in tasks]:
        if error is not None:
            raise error


def _forget_pool() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
