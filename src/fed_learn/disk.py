"""Files that a job writes, so that neither a kill, a full disk nor a second job takes away what is there.

What the files hold is left to others.
"""

import logging
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from fed_learn.errors import FileInUseError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there whole, as it was or as it is to be, whatever happens in between.

    It is written beside its place, flushed to the disk, and moved there. What a process that was killed leaves beside
    it is removed by the next `Claim` of the file. A link stays one, and leads to the new file. A device or a pipe is
    written to as it is: it must not be replaced.

    Raises:
        OSError: It cannot be written; one that was there before is still there, and nothing is beside it.
    """
    if is_stream(path):
        _write_to_stream(path, data)
        return
    with written_beside(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Gives a place beside a file to write to; what is there is then flushed to the disk, and takes the file's place.

    Raises:
        OSError: It cannot be written; a file that was there before is still there, and nothing is beside it.
    """
    path = _followed(path)
    temporary = path.with_name(f".{path.name}.fed-learn-{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def append_line(path: Path, line: str, *, flushed: bool = True) -> None:
    """Adds a line to a file, whole or not at all: what a write leaves that fails in the middle is cut off again.

    Args:
        path: The file, made where there is none; or what is no file, such as a pipe, which nothing can be cut off.
        line: The line, without its end.
        flushed: Whether the line is on the disk when this returns, and survives a loss of power.

    Raises:
        OSError: It cannot be written.
    """
    data = memoryview((line + "\n").encode())
    if is_stream(path):
        _write_to_stream(path, data)
        return
    with open(path, "a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end and (file.seek(end - 1), file.read(1))[1] != b"\n":  # the cut failed too, or a kill came before it
            data = memoryview(b"\n" + data)
        try:
            while data:  # on a disk that is nearly full a part of it is written, and only the next write fails
                data = data[file.write(data) :]
            if flushed:
                os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise
    if not end and flushed:
        flush(path.parent)


def cut(path: Path, size: int) -> None:
    """Takes away what a file has beyond its first bytes. One that is shorter, or not there, is left as it is.

    Raises:
        OSError: It cannot be written.
    """
    if not path.exists() or path.stat().st_size <= size:
        return
    with open(path, "r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def _write_to_stream(path: Path, data: bytes | memoryview) -> None:
    with open(path, "ab") as file:  # behind what is there, for standard output may lead to a file
        file.write(data)


def is_stream(path: Path) -> bool:
    """Whether a path is no place for a file of one's own: a device, a pipe, `/dev/stdout` wherever that leads."""
    return path.parent in (Path("/dev"), Path("/dev/fd")) or (path.exists() and not path.is_file())


def set_aside(path: Path) -> None:
    """Gives the file of an earlier job, if there is one, another name: `best.safetensors.1`, `….2`; says so.

    A link stays where it is, and the file is renamed to which it leads.

    Raises:
        OSError: It cannot be renamed.
    """
    path = _followed(path)
    if os.path.lexists(path):
        numbered = (path.with_name(f"{path.name}.{number}") for number in count(1))
        aside = next(one for one in numbered if not os.path.lexists(one))
        path.rename(aside)
        logger.warning("%s of an earlier job is kept as %s; overwrite=True replaces it", path, aside.name)


def remove(path: Path) -> None:
    """Removes the file of an earlier job, if there is one; of a link that to which it leads.

    Raises:
        OSError: It cannot be removed.
    """
    _followed(path).unlink(missing_ok=True)


def _followed(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def flush(path: Path) -> None:
    """Brings a file to the disk, or the names in a folder, without which a loss of power may take a new file away.

    What cannot be flushed is left as it is: it is written already, and some systems do not open or flush a folder.
    """
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Claim:
    """That a job writes some files: until it gives them up, or its process ends, no other process gets them.

    A lock file lies beside each of them meanwhile. It is the system that holds the lock, for as long as the process
    lives: the lock file that a killed one leaves behind stops nobody. In one process a job that was never shut down, as
    in a notebook, does not stop the next one, which is warned. A copy of a claim holds nothing.

    Args:
        paths: The files, which need not be there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "log.jsonl")
        ...     with Claim([path]):
        ...         append_line(path, "{}")
        ...         print(sorted(os.listdir(folder)))
        ...     print(os.listdir(folder))
        ['.log.jsonl.fed-learn.lock', 'log.jsonl']
        ['log.jsonl']
    """

    _held: ClassVar[dict[tuple[int, Path], "Claim"]] = {}
    """Process and lock file → which claim has it: a forked child has a copy of this, and none of the locks."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._locks: dict[tuple[int, Path], int] = {}

    def take(self) -> None:
        """Takes all of the files, and removes what a killed process left beside them; makes their folders.

        Raises:
            FileInUseError: Another process writes one of them.
            OSError: A folder cannot be written to.
        """
        try:
            for path in self.paths:
                self._take(path)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Gives up what it holds, and removes the lock files."""
        for key, descriptor in self._locks.items():
            if key[0] == os.getpid():
                self._held.pop(key)
                _unlock(key[1], descriptor)
        self._locks = {}

    def _take(self, path: Path) -> None:
        if is_stream(path):
            return
        file = _followed(path)  # two links may lead to one
        if not file.parent.is_dir():
            file.parent.mkdir(parents=True, exist_ok=True)
            flush(file.parent.parent)
        lock = file.parent.resolve() / f".{file.name}.fed-learn.lock"
        key = os.getpid(), lock
        other = self._held.get(key)
        if other is self:
            return
        if other is not None:
            logger.warning("%s is also written by an earlier job of this process, which was not shut down", path)
            self._locks[key] = other._locks.pop(key)
            self._held[key] = self
            return
        try:
            self._locks[key], locked = _lock(path, lock)
        except PermissionError as error:
            if not os.access(file, os.W_OK):
                raise
            # A file that may be written, in a folder that may not, such as one of a log.
            logger.warning("%s: no second job can be kept from writing it, for it cannot be locked: %s", path, error)
            return
        self._held[key] = self
        leftover = re.compile(rf"\.{re.escape(file.name)}\.fed-learn-\d+\.tmp")
        for name in os.listdir(lock.parent) if locked else ():
            if leftover.fullmatch(name):
                lock.with_name(name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Claim, (self.paths,)


def _lock(path: Path, lock: Path) -> tuple[int, bool]:
    """Opens and locks a lock file; gives its descriptor, and whether there are locks on this file system at all."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _try_lock(path, descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                with suppress(OSError):  # only for the message
                    os.truncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                return descriptor, locked
        except FileNotFoundError:
            pass  # who had it removed it in the meantime, and a lock on it would be worth nothing
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(path: Path, descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # far from what is read
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            # Of the process alone: of `flock` a forked worker that outlives a killed server would keep its copy.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, BlockingIOError | PermissionError):
            logger.warning("%s: no second job can be kept from writing it, for it cannot be locked: %s", path, error)
            return False
        who = os.read(descriptor, 200).decode(errors="replace") or "another process"
        raise FileInUseError(
            f"{path} is being written by another job ({who}): let it end, or write elsewhere", path=str(path)
        ) from None
    return True


def _unlock(lock: Path, descriptor: int) -> None:
    if sys.platform == "win32":  # where an open file cannot be removed
        os.close(descriptor)
        with suppress(OSError):
            lock.unlink(missing_ok=True)
    else:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
