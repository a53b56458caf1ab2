"""The tables at the end of a run, as docs have them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.cuda_parts.models import RESNET

LIMIT = "copy on the device"


def tables(facts: Mapping[str, Any]) -> str:
    """Bits, counts and times, as far as they are there, in markdown."""
    parts = [list(_bits(facts)), list(_counts(facts)), list(_times(facts))]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _rows(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join('–' if cell is None else str(cell) for cell in row)} |"


def _bits(facts: Mapping[str, Any]) -> Iterator[str]:
    found = facts.get("bits", {})
    if found:
        rows = [(name, f"{b['compared']:,}", b["differing"], b["refused"]) for name, b in found.items()]
        yield from _rows(("against the native kernel", "bytes compared", "that differ", "refused alike"), rows)


def _counts(facts: Mapping[str, Any]) -> Iterator[str]:
    found = facts.get("counts", {})
    if found:
        names = ("launches", "synchronisations", "bytes_per_element", "kernel_ms")
        rows = [(name, *(counts[key] for key in names)) for name, counts in found.items()]
        head = (f"one mean of {RESNET}", "launches", "waits", "bytes moved per element", "ms in kernels")
        yield from _rows(head, rows)


def _times(facts: Mapping[str, Any]) -> Iterator[str]:
    found = facts.get("times", [])
    if not found:
        return
    # Each case may have been measured twice, with a limit each.
    limits = {row["case"]: row["ms"] for row in found if row["side"].startswith(LIMIT)}
    rows = [
        (row["case"], row["side"], row["ms"], row["gb_per_s"], _ratio(row, limits), row["peak_mib"])
        for row in sorted(found, key=lambda row: (str(row["case"]), float(row["ms"])))
    ]
    yield from _rows(("case", "side", "ms", "GB/s needed", "× the limit", "MiB beyond inputs"), rows)


def _ratio(row: Mapping[str, Any], limits: Mapping[str, float]) -> str | None:
    limit = limits.get(row["case"])
    return None if limit is None else f"{row['ms'] / limit:.2f}"
