"""The folder of a job of `fed-learn simulate`: whether the job may have it, what lies in it, how to go on with it."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import typer

from fed_learn.disk import Claim, remove
from fed_learn.errors import StateError
from fed_learn.handlers import Handler
from fed_learn.model_meta import FLContext
from fed_learn.server import load_state

FILES = ("metrics.jsonl", "global.safetensors", "best.safetensors", "summary.json", "times.json", "metrics.png")
"""What a job leaves, beside its state."""
AT_THE_END = ("summary.json", "times.json", "metrics.png")
"""Those of them that are written when the job is done."""
DEFAULT = "fed-learn-job"
OPTIONS = "options"
"""Where the metadata of the job's context has the options of its command."""
_ANY = ("rounds", "kernel", "threads")
"""Options that a job that goes on may have other values of."""


class JobFolder(Handler):
    """The folder of a job; as its handler it keeps the options of the command with the state.

    Args:
        path: The folder, which need not be there.

    Attributes:
        options: The options by which the job is put together, as plain values.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.options: Mapping[str, Any] = {}
        self._to_replace: list[Path] = []
        self._resumed = False

    @property
    def state(self) -> Path:
        """Where the state of the job is kept."""
        return self.path / "state"

    @property
    def earlier_state(self) -> Path:
        """Where the state of a job that is to be replaced lies until the new job has begun."""
        return self.path / ".earlier-state"

    @property
    def files(self) -> list[str]:
        """Names of the files of a job that are there."""
        return [name for name in FILES if (self.path / name).exists()]

    @property
    def has_state(self) -> bool:
        """Whether there is a job that can go on."""
        return self.state.is_dir() and any(name.startswith("state-") for name in os.listdir(self.state))

    def check_free(self, overwrite: bool) -> None:
        """Raises if the folder holds anything that a new job should not be mixed with.

        Raises:
            typer.BadParameter: It does, and says what can be done.
        """
        self._recover()
        names = os.listdir(self.path) if self.path.is_dir() else []
        # A job that was killed before it had a first state left nothing that could go on.
        there = sorted(name for name in names if not _is_lock(name) and (name != self.state.name or self.has_state))
        ours = self.files
        if overwrite or not there:
            return
        if self.has_state:
            text = f"{self.path} holds a job: go on with it by --resume, name another folder, or replace it with "
            raise typer.BadParameter(text + "--overwrite", param_hint="--out")
        if ours:
            raise typer.BadParameter(
                f"{self.path} holds files of an earlier job ({', '.join(ours)}): name another folder, or replace them "
                "with --overwrite",
                param_hint="--out",
            )
        shown = ", ".join(there[:3]) + (" …" if len(there) > 3 else "")
        raise typer.BadParameter(
            f"{self.path} is not empty ({shown}): name another folder, or one that is not there yet; --overwrite puts "
            "the files of the job beside what is there",
            param_hint="--out",
        )

    def kept_options(self, given: Mapping[str, Any], by_hand: set[str]) -> dict[str, Any]:
        """The options of the job that lies here, where it is to go on.

        Args:
            given: The options as they are now.
            by_hand: Which of them were given, and are no defaults.

        Raises:
            typer.BadParameter: There is no job, or it was begun with other options.
            StateError: Its state is damaged.
        """
        self._recover()
        if not self.has_state:
            raise typer.BadParameter(f"{self.path} holds no job that could go on", param_hint="--resume")
        state = load_state(self.state)
        kept = state.get("metadata", {}).get(OPTIONS)
        if not isinstance(kept, dict):
            raise StateError(f"{self.state} is not of a job of this command", path=str(self.state))
        for name in sorted(by_hand - set(_ANY)):
            if given[name] != kept.get(name):
                raise typer.BadParameter(
                    f"the job in {self.path} was begun with {_shown(kept.get(name))}, not {_shown(given[name])}: leave "
                    "that out to go on with it",
                    param_hint="--" + name.replace("_", "-"),
                )
        changed = {name: given[name] for name in by_hand & set(_ANY)}
        rounds = {"rounds": state["settings"]["num_rounds"]}
        return {**kept, "kernel": given["kernel"], "threads": given["threads"], **rounds, **changed}

    @contextmanager
    def taken(self, overwrite: bool, resume: bool) -> Iterator[None]:
        """The folder belongs to this job meanwhile. An earlier one's files are replaced once it has begun.

        Raises:
            typer.BadParameter: Another job has come and gone since `check_free`.
            FileInUseError: Another job runs there.
        """
        with Claim([self.path / name for name in AT_THE_END]):
            if resume:
                self._resumed = True
                if self.earlier_state.exists():  # of the job that this one was to replace
                    _remove_tree(self.earlier_state)
                self._to_replace = [self.path / name for name in self.files if name in AT_THE_END]
                yield
                return
            self.check_free(overwrite)
            self._to_replace = [self.path / name for name in self.files]
            if self.state.is_dir():
                if self.earlier_state.exists():  # of a job that was to be replaced by one that was killed
                    _remove_tree(self.earlier_state)
                self._to_replace.append(self.earlier_state)
                self.state.rename(self.earlier_state)
            try:
                yield
            finally:
                if self.earlier_state in self._to_replace:  # no round has begun
                    if self.state.exists():
                        _remove_tree(self.state)
                    self.earlier_state.rename(self.state)

    @property
    def begun(self) -> bool:
        """Whether the job has begun its first round, so that what lies here is its own."""
        return self._resumed or not self._to_replace

    def _recover(self) -> None:
        """Gives a job its state back that was to be replaced by one that was killed before it had a state itself.

        Raises:
            FileInUseError: A job runs there.
        """
        if self.earlier_state.exists() and not self.has_state:
            with Claim([self.path / name for name in AT_THE_END]):
                if self.state.exists():
                    _remove_tree(self.state)
                self.earlier_state.rename(self.state)

    def startup(self, ctx: FLContext) -> None:
        """Keeps the options with the state."""
        ctx.add_metadata(OPTIONS, dict(self.options))

    def start_round(self, ctx: FLContext) -> None:
        """Removes the files of an earlier job, in the first round."""
        while self._to_replace:
            path = self._to_replace[-1]
            if path == self.earlier_state:
                _remove_tree(path)
            else:
                remove(path)
            self._to_replace.pop()


def default_folder(resume: bool) -> Path:
    """The folder of a job that names none: a new one, or the newest one that has a state.

    Raises:
        typer.BadParameter: There is none that could be resumed.
    """
    numbered = (Path(DEFAULT if number == 1 else f"{DEFAULT}-{number}") for number in count(1))
    if not resume:
        return next(path for path in numbered if not path.exists() or not any(path.iterdir()))
    found = (re.fullmatch(rf"{DEFAULT}(?:-(\d+))?", name) for name in os.listdir())
    numbers = sorted(int(match[1] or 1) for match in found if match)
    there = (Path(DEFAULT if number == 1 else f"{DEFAULT}-{number}") for number in reversed(numbers))
    newest = next((path for path in there if JobFolder(path).has_state), None)
    if newest is None:
        raise typer.BadParameter(f"no job in {DEFAULT} could go on: name its folder with --out", param_hint="--resume")
    return newest


def _remove_tree(path: Path) -> None:
    """Removes a folder; of a link to one the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _is_lock(name: str) -> bool:
    return name.startswith(".") and name.endswith(".fed-learn.lock")


def _shown(value: object) -> str:
    return "the default" if value is None else str(value)
