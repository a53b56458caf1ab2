"""Checks a job by its ledger, and makes its rounds again where what they were made of has been kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fed_learn.aggregation.round import UNUSABLE, Round
from fed_learn.aggregation.rules import Rule, available
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.contribution import Contribution, Kind
from fed_learn.durable import digest
from fed_learn.durable.ledger import FORMAT, read_ledger
from fed_learn.durable.weight_file import read_weights
from fed_learn.errors import FedLearnError, LedgerError, StateError, brief, described
from fed_learn.policies import Policies
from fed_learn.server.durable_job import load_state
from fed_learn.server.job_ledger import KEPT, NAME, kept_at
from fed_learn.weights import FrozenWeights


@dataclass(frozen=True)
class Verification:
    """What `verify` found right.

    Attributes:
        rounds: How many rounds the ledger tells of.
        made_again: Numbers of the rounds that were made again, with the same bits.
        not_kept: Numbers of the rounds that could not, since what they were made of is not there.
        failed: Numbers of the rounds that failed when they were run, and left the global model as it was.
        replaced: Numbers of the rounds in or before which a handler replaced the global model.
        settings: Those of the job.
        head: The digest of the last entry, which stands for the whole ledger.
    """

    rounds: int
    made_again: tuple[int, ...]
    not_kept: tuple[int, ...]
    failed: tuple[int, ...]
    replaced: tuple[int, ...]
    settings: Mapping[str, Any]
    head: str


def verify(
    durable: str | PathLike[str],
    contributions: str | PathLike[str] | None = None,
    *,
    rule: Rule | None = None,
) -> Verification:
    """Checks the ledger of a job: that nobody has changed an entry, and that it tells of the models that are there.

    Args:
        durable: The folder of the job's state, in which its ledger is.
        contributions: The folder with what rounds were made of; None: `contributions` in that folder, if it is there.
        rule: The rule of the job, where it is one of your own.

    Raises:
        LedgerError: An entry was changed, taken out or put in; a model or a contribution is another than the ledger
            says; or a round, made again, gives other bits. The error says which.
        OSError: The ledger cannot be read.

    Example:
        >>> import tempfile, numpy as np, fed_learn as fl
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     server = fl.FederatedServer(
        ...         {"w": np.zeros(1)}, num_rounds=1, durable=folder, ledger=True, keep_contributions=True)
        ...     with server.begin() as job:
        ...         job.start_round(0)
        ...         accepted = job.receive("site-1", fl.Contribution("site-1", {"w": np.ones(1)}, 1, round=0))
        ...         averaged, report = job.aggregate(), job.end_round()
        ...     verify(folder).made_again
        (0,)
    """
    folder = Path(durable)
    kept = Path(contributions) if contributions is not None else folder / KEPT
    entries = list(read_ledger(folder / NAME))
    first, rounds = _checked(entries, folder)
    if contributions is None and first["settings"]["keep_contributions"] and not kept.is_dir():
        raise LedgerError(f"{kept}, in which the job kept its contributions, is not there", path=str(kept))
    made: dict[str, list[int]] = {"again": [], "not kept": [], "failed": []}
    for entry in rounds:
        made[_made_again(entry, first["settings"], kept, rule)].append(entry["round"])
    _check_state(folder, entries)
    models = [first["model"], *(entry["model_after"] for entry in rounds)]
    replaced = [
        entry["round"]
        for entry, before in zip(rounds, models, strict=False)
        if entry["model_before"] != before or entry["model_after"] != (entry["aggregated"] or entry["model_before"])
    ]
    return Verification(
        rounds=len(rounds),
        made_again=tuple(made["again"]),
        not_kept=tuple(made["not kept"]),
        failed=tuple(made["failed"]),
        replaced=tuple(replaced),
        settings=first["settings"],
        head=entries[-1]["digest"],
    )


def _checked(entries: Sequence[dict[str, Any]], folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entry of the job, and those of its rounds."""
    first, *rounds = entries
    if first.get("type") != "job" or first.get("format") != FORMAT:
        raise LedgerError(f"{folder / NAME} does not begin as a ledger does: {brief(first)}", path=str(folder), entry=0)
    for number, entry in enumerate(rounds, 1):
        if entry.get("type") != "round":
            raise LedgerError(f"{folder / NAME}: entry {number + 1} is of no round", path=str(folder), entry=number)
    return first, rounds


def _made_again(entry: Mapping[str, Any], settings: Mapping[str, Any], kept: Path, rule: Rule | None) -> str:
    """What came of making a round again: `"again"`, `"not kept"` or `"failed"`.

    Raises:
        LedgerError: It gives another model.
    """
    number, expected = entry["round"], entry["aggregated"]
    if expected is None:
        return "failed"
    names = [entry["model_before"], *(one["digest"] for one in entry["contributions"])]
    missing = [name for name in names if not kept_at(kept, name).exists()]
    if missing and settings["keep_contributions"]:
        path = kept_at(kept, missing[0])
        raise LedgerError(f"round {number + 1}: {path}, which was kept, is not there", path=str(path), entry=number + 1)
    if missing:
        return "not kept"
    if rule is None and entry["rule"] not in available():
        return "not kept"
    before, *weights = [_read(kept, name, number) for name in names]
    own = {key: settings[key] for key in ("partial", "exact", "min_contributions", "on_bad_contribution")}
    how = AggregationSettings(
        rule=entry["rule"] if rule is None else rule,
        kind=Kind(settings["kind"]),
        policies=Policies(settings["policies"]),
        **own,
    )
    # A stream adds up in the order of arrival, which the ledger does not tell: only exact sums do not depend on it.
    if settings["stream"] and not settings["exact"]:
        return "not kept"
    try:
        this = Round(how, number=number, model=before)
        for one, arrays in zip(entry["contributions"], weights, strict=True):
            this.receive(
                Contribution(
                    one["contributor"],
                    arrays,
                    one["aggregation_weight"],
                    n_iter=one["n_iter"],
                    round=number,
                    kind=Kind(one["kind"]),
                )
            )
        this.close()
        again = this.combine().applied_to(before)
    except (FedLearnError, *UNUSABLE) as error:
        raise LedgerError(f"round {number + 1} cannot be made again: {described(error)}", entry=number + 1) from error
    if digest(again) != expected:
        raise LedgerError(
            f"round {number + 1}, made again, gives another model than the ledger says: {digest(again)[:16]}… instead "
            f"of {expected[:16]}…",
            entry=number + 1,
        )
    return "again"


def _read(kept: Path, name: str, number: int) -> FrozenWeights:
    path = kept_at(kept, name)
    try:
        weights = read_weights(path)
    except StateError as error:
        raise LedgerError(f"round {number + 1}: {error}", path=str(path), entry=number + 1) from error
    if digest(weights) != name:
        raise LedgerError(
            f"round {number + 1}: {path} was changed: its content has another digest", path=str(path), entry=number + 1
        )
    return weights


def _check_state(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Compares the ledger with the newest state of the job, which knows its length, its rounds and its end.

    A job that runs, or was killed just then, may have an entry more than its state; its rounds are run again.

    Raises:
        LedgerError: They disagree, as where the last entries were cut off; or the state is damaged.
    """
    path = str(folder / NAME)
    try:
        state = load_state(folder, newest=True)
    except StateError as error:
        raise LedgerError(
            f"{folder / NAME} cannot be compared with the state of the job: {error}", path=path
        ) from error
    known = state.get("ledger") or {}
    count = known.get("count") or 0
    if not 0 < count <= len(entries) or entries[count - 1]["digest"] != known.get("head"):
        raise LedgerError(
            f"{folder / NAME} does not end with the entry that the state of the job has: {count} entries were written",
            path=path,
        )
    told = [report.round for report in state["reports"]]
    if [entry["round"] for entry in entries[1:count]] != told:
        raise LedgerError(f"{folder / NAME} does not tell of every round: {len(told)} were run", path=path)
    last = entries[count - 1]
    if digest(state["model"]) != last.get("model_after", last.get("model")):
        raise LedgerError(f"{folder}: the global model is another than the ledger says", path=str(folder))
