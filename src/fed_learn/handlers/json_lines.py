"""Writes what happens in a job to a file of JSON lines."""

import hashlib
import json
import logging
import math
import os
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from fed_learn.contribution import RoundReport, ValidationResult
from fed_learn.disk import Claim, append_line, cut, flush, is_stream, remove, set_aside
from fed_learn.handlers.handler import ServerHandler
from fed_learn.model_meta import ContextKey, FLContext

logger = logging.getLogger(__name__)


class JsonLinesHandler(ServerHandler):
    """Appends a line per round and per validation result: `{"type": "round" | "validation", …}`.

    Each line is in the file when the event is over, so a job can be followed while it runs; whole, or not at all where
    the disk is full. NaN and infinities become null, which JSON has. Rounds are numbered from 0, as everywhere but on
    screen.

    A job begins a file of its own, and one that is resumed goes on with it: each round is in it once. A file that is
    there already is left alone until the job has its first line to write, and is then kept under a numbered name
    (`job.jsonl.1`), which the log tells. While a job writes the file, no other process can.

    Args:
        path: The file.
        overwrite: Replace the file of an earlier job instead of keeping it.
        times: Write how long rounds took; all else is the same from run to run.

    Example:
        >>> import tempfile, fed_learn as fl
        >>> folder = tempfile.TemporaryDirectory()
        >>> log = Path(folder.name, "job.jsonl")
        >>> server = fl.FederatedServer({"w": np.zeros(1)}, num_rounds=1, handlers=[JsonLinesHandler(log)])
        >>> with server.begin() as job:
        ...     job.start_round(0)
        ...     accepted = job.receive("site-1", fl.Contribution("site-1", {"w": np.ones(1)}, 1, round=0))
        ...     averaged, report = job.aggregate(), job.end_round()
        >>> json.loads(log.read_text())["accepted"]
        ['site-1']
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, times: bool = True) -> None:
        self.path = path
        self.overwrite = overwrite
        self.times = times
        self._claim: Claim | None = None
        self._begun = False
        self._written = ""  # a digest of what this job has written, which goes on from line to line

    def startup(self, ctx: FLContext) -> None:
        """Makes the folder, and sees to it that no other job writes the file.

        Raises:
            FileInUseError: One does.
            OSError: The file cannot be written.
        """
        super().startup(ctx)
        self._begun, self._written = False, ""
        if os.path.exists(self.path):
            with open(self.path, "ab"):  # better to hear now that it cannot be written
                pass
        self._take()

    def shutdown(self, ctx: FLContext) -> None:
        """Brings the file to the disk, and gives it up."""
        if self._begun and not is_stream(Path(self.path)):
            flush(Path(self.path))
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def end_round(self, ctx: FLContext) -> None:
        """Writes the round's report, with the metrics of each contribution."""
        report: RoundReport = ctx[ContextKey.REPORT]
        contributions = ctx.get_prop(ContextKey.CONTRIBUTIONS, ())
        clients = {
            c.contributor: {
                "aggregation_weight": c.aggregation_weight,
                "n_iter": c.n_iter,
                "metrics": dict(c.metrics),
                **({"info": dict(c.info)} if c.info else {}),
            }
            for c in contributions
        }
        self._write({"type": "round", **report.as_dict(times=self.times), "contributions": clients})

    def receive_validation_results(self, ctx: FLContext) -> None:
        """Writes the result at hand."""
        result: ValidationResult = ctx[ContextKey.VALIDATION_RESULTS][-1]
        self._write(
            {
                "type": "validation",
                "model": result.model,
                "contributor": result.contributor,
                "metrics": dict(result.metrics),
            },
            flushed=False,  # one per model and client: those of a large job would take minutes
        )

    def get_state(self) -> dict[str, Any]:
        """How long the file is after the lines of the rounds that are over, and a digest of them."""
        path = Path(self.path)
        size = path.stat().st_size if path.is_file() and self._begun else 0
        return {"size": size, "digest": self._written if self._begun else None}

    def set_state(self, state: Any) -> None:
        """Goes on behind these lines: what follows them is of a round that is run again, and is removed.

        A file that does not begin with them is another job's, and is treated as such.
        """
        path = Path(self.path)
        if state["digest"] is None:
            return
        if is_stream(path):
            self._begun = True
            return
        lines = path.read_bytes()[: state["size"]] if path.exists() else b""
        written = ""
        for line in lines.splitlines(keepends=True):
            written = _gone_on(written, line)
        if written == state["digest"]:
            self._begun, self._written = True, written
            cut(path, state["size"])
            return
        logger.warning("%s does not hold the rounds that this job wrote there: a new file begins", path)

    def _take(self) -> None:
        if self._claim is None:
            self._claim = Claim([Path(self.path)])
        self._claim.take()

    def _write(self, entry: dict[str, Any], *, flushed: bool = True) -> None:
        path, line = Path(self.path), json.dumps(jsonable(entry))
        if not self._begun:
            self._take()
            if not is_stream(path) and path.exists() and path.stat().st_size:
                if self.overwrite:
                    remove(path)
                else:
                    set_aside(path)
            self._begun = True
        append_line(path, line, flushed=flushed)
        self._written = _gone_on(self._written, line.encode() + b"\n")


def _gone_on(digest: str, line: bytes) -> str:
    return hashlib.sha256(digest.encode() + line).hexdigest()


def jsonable(value: Any) -> Any:
    """The value with numpy numbers made plain and non-finite ones made None, as JSON wants it.

    Example:
        >>> import numpy as np
        >>> jsonable({"a": np.float32(0.5), "b": [float("nan"), 3]})
        {'a': 0.5, 'b': [None, 3]}
    """
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, Real) and not isinstance(value, bool | int):
        value = value.item() if isinstance(value, np.integer) else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
