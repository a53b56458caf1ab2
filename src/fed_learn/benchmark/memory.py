"""How much memory a call takes beyond what was there before: the peak of the process, where the system tells it."""

import ctypes
import gc
from pathlib import Path

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")


def release() -> None:
    """Frees what nothing refers to, and gives it back to the system."""
    gc.collect()
    _trim()


def _trim() -> None:
    """Gives what was freed back to the system, so that the next call has to ask for its memory again."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # of glibc alone
    except (AttributeError, OSError, TypeError):
        return


class Peak:
    """The peak of the resident memory since this was made."""

    def __init__(self) -> None:
        _trim()  # without a search for cycles: that takes longer than many a call, once large frameworks are loaded
        self._before: int | None = None
        try:
            RESET_PEAK.write_text("5")
            self._before = _status("VmRSS")
        except OSError:  # another system, or a sandbox
            return

    def beyond(self) -> int | None:
        """Bytes above what was resident then; None where the system does not tell."""
        if self._before is None:
            return None
        return max(0, _status("VmHWM") - self._before)


def _status(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")
