"""The ledger of a job: a file of one line per round, each of which holds the digest of the line before.

A line is a JSON object, as `json.dumps(entry, sort_keys=True, separators=(",", ":"))` writes it, then a space and the
BLAKE3 digest of these bytes, as 64 hexadecimal digits. Another program checks the chain so: the digest of each line is
that of its JSON, and its `"previous"` is the digest of the line before (64 zeros in the first).

The first line tells of the job: `type` (`"job"`), `format`, `versions`, `settings`, and `model`, the digest of the
initial global model (`fed_learn.durable.digests`). Each further line tells of a round:

    type            "round"
    round           its number, from 0
    model_before    digest of the global model that was sent
    contributions   what was accepted, in the order of names: contributor, digest, aggregation_weight, n_iter, kind
    refused         contributor and cause
    rule            the rule that combined them
    aggregated      digest of what it made into a global model; null if the round failed
    model_after     digest of the global model after the round: another than `aggregated` where a handler replaced it
    error           why the round failed, or null
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fed_learn.disk import append_line, cut
from fed_learn.durable.digests import blake3_of
from fed_learn.errors import LedgerError, brief

FORMAT = "fed_learn ledger 1"
NOTHING = "0" * 64
"""What the first line has as the digest of the line before."""


class Ledger:
    """Appends entries to the ledger of a job.

    Args:
        path: The file; made with the first entry.

    Attributes:
        head: The digest of the last entry.
        count: How many entries there are.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ledger = Ledger(Path(folder, "ledger.jsonl"))
        ...     for number in range(2):
        ...         ledger.append({"type": "round", "round": number})
        ...     [entry["round"] for entry in read_ledger(ledger.path)]
        [0, 1]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head = NOTHING
        self.count = 0
        self._size = 0

    def append(self, entry: Mapping[str, Any]) -> None:
        """Writes an entry, with the digest of the one before, and brings it to the disk.

        Raises:
            OSError: It cannot be written; the ledger is as it was.
            LedgerError: Somebody else has written to the file.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._size:
            raise LedgerError(f"{self.path} has {size} bytes, and {self._size} were written", path=str(self.path))
        body = _body({**entry, "previous": self.head})
        head = blake3_of(body.encode())
        append_line(self.path, f"{body} {head}")
        self.head, self.count, self._size = head, self.count + 1, self._size + len(body) + 66

    def get_state(self) -> dict[str, Any]:
        """How far it has come."""
        return {"head": self.head, "count": self.count, "size": self._size}

    def set_state(self, state: Any) -> None:
        """Goes on from there: what follows in the file is of a round that is run again, and is removed.

        Raises:
            LedgerError: The file is shorter than it was, or its last entry is another.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < state["size"]:
            raise LedgerError(f"{self.path} has {size} bytes, and had {state['size']}", path=str(self.path))
        cut(self.path, state["size"])
        last = self.path.read_bytes()[-65:-1].decode("ascii", "replace") if state["count"] else NOTHING
        if last != state["head"]:
            raise LedgerError(f"{self.path}: its last entry is not the one that the job wrote", path=str(self.path))
        self.head, self.count, self._size = state["head"], state["count"], state["size"]


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a ledger, in order, each of which has been checked.

    Raises:
        LedgerError: An entry was changed, taken out or put in; the error says which.
        OSError: It cannot be read.
    """
    previous = NOTHING
    data = path.read_bytes()
    lines = data.split(b"\n")
    if lines.pop() or not lines:
        raise LedgerError(f"{path}: it does not end with a whole entry", path=str(path), entry=len(lines))
    for number, line in enumerate(lines):
        where = f"{path}: entry {number + 1}"
        body, space, head = line[:-65], line[-65:-64], line[-64:]
        if space != b" " or blake3_of(body) != head.decode("ascii", "replace"):
            raise LedgerError(f"{where} was changed: its digest is another", path=str(path), entry=number)
        try:
            entry = json.loads(body)
            known = isinstance(entry, dict) and _body(entry).encode() == body
        except (ValueError, RecursionError):
            known = False
        if not known:
            raise LedgerError(f"{where} is none: {brief(body)}", path=str(path), entry=number)
        if entry.get("previous") != previous:
            raise LedgerError(f"{where} does not follow the one before it", path=str(path), entry=number)
        previous = head.decode()
        yield {**entry, "digest": previous}


def _body(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
