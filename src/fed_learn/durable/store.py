"""`StateStore`: the states of a job in a folder, written so that a kill at any moment leaves the one before."""

import json
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from fed_learn.disk import Claim, flush, write_whole
from fed_learn.durable import digests, weight_file
from fed_learn.durable.values import decoded, encoded
from fed_learn.errors import StateError, brief, described
from fed_learn.weights import FrozenWeights, WeightDict

logger = logging.getLogger(__name__)

FORMAT, VERSION = "fed_learn state", 1
KEPT = 2
"""How many states are kept: should the newest be damaged, there is the one before."""
_STATE = re.compile(r"state-(\d{8,})\.json")
_WEIGHTS = re.compile(r"([0-9a-f]{64})\.safetensors")
_REFERENCE = re.compile(r'\{"\$(?:weights|arrays|large)":"([0-9a-f]{64})"\}')


class StateStore:
    """Keeps the last two states of a job in a folder.

    A state is a file `state-<number>.json`: a line that says what it is, with the digest of the rest, and a line of
    JSON (`fed_learn.durable.values`). The models in it lie beside it, in files that are named by their digests, so one
    that did not change, or stands in several places, is written once. Each file is written beside its place, flushed to
    the disk and moved there; a state comes after its models. What no state that is kept refers to is removed; other
    files in the folder are left alone.

    Args:
        folder: The folder; made when the first state is written.

    Raises:
        ImportError: blake3 or safetensors is not installed (extra `durable`).

    Example:
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder, StateStore(folder) as store:
        ...     for number in range(3):
        ...         store.save(number, {"model": {"w": np.full(1000, number, np.float64)}})
        ...     number, state = store.load()
        ...     print(number, state["model"]["w"][0], store.numbers())
        2 2.0 [1, 2]
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            weight_file.check_installed()
            digests.check_installed()
        except ImportError as error:
            raise ImportError("durable state needs blake3 and safetensors: pip install 'fed-learn[durable]'") from error
        self.folder = Path(folder)
        self._claim = Claim([self.folder / "state"])
        self._written: set[str] = set()  # digests of the models that are there and whole

    def open(self) -> None:
        """Sees to it that no other process writes to the folder, and removes what a killed one has left half written.

        Raises:
            FileInUseError: Another process writes to it.
            OSError: It cannot be made, or written to.
        """
        self._claim.take()
        for name in os.listdir(self.folder):
            if re.fullmatch(r"\.(state-\d+\.json|[0-9a-f]{64}\.safetensors)\.fed-learn-\d+\.tmp", name):
                (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Gives the folder up."""
        self._claim.release()

    def numbers(self) -> list[int]:
        """The numbers of the states that are there, in order; whether they are whole is not looked at."""
        if not self.folder.is_dir():
            return []
        found = (_STATE.fullmatch(name) for name in os.listdir(self.folder))
        return sorted(int(match[1]) for match in found if match)

    def save(self, number: int, state: Any) -> None:
        """Writes a state, and removes those before the last but one.

        Args:
            number: Counts up: the number of rounds that are over.
            state: What is to be kept.

        Raises:
            StateError: Something in it cannot be kept.
            OSError: It cannot be written; what was there is still there.
        """
        stored = encoded(state)
        for name, weights in stored.weights.items():
            self._write_weights(name, weights)
        body = stored.text.encode()
        head = {"format": FORMAT, "version": VERSION, "bytes": len(body), "digest": digests.blake3_of(body)}
        write_whole(self._path(number), json.dumps(head).encode() + b"\n" + body + b"\n")
        self._tidy(number, set(stored.weights))

    def load(self, *, newest: bool = False) -> tuple[int, Any]:
        """The newest state that is whole, with its number. Says so where a newer one is damaged.

        Args:
            newest: Only the newest will do.

        Raises:
            StateError: There is none, or none that is whole; or a newer version of fed_learn has written it.
            OSError: One cannot be read.
        """
        numbers = self.numbers()
        if not numbers:
            raise StateError(f"{self.folder} holds no state of a job", path=str(self.folder))
        problems: list[str] = []
        for number in numbers[-1:] if newest else reversed(numbers):
            try:
                state = self._read(number)
            except StateError as error:
                problems.append(str(error))
            else:
                for problem in problems:
                    logger.error("%s; the state after %d rounds is taken", problem, number)
                return number, state
        raise StateError("; ".join(problems), path=str(self.folder))

    def _read(self, number: int) -> Any:
        path = self._path(number)
        body = _checked_body(path, path.read_bytes())
        state = decoded(body, self._reader(path), what=path.name)
        self._written |= set(state.weights)
        return state.value

    def _reader(self, state: Path) -> Callable[[str], FrozenWeights]:
        def read(name: str) -> FrozenWeights:
            path = self.folder / f"{name}.safetensors"
            try:
                weights = weight_file.read_weights(path)
            except FileNotFoundError as error:
                raise StateError(f"{state} needs {path.name}, which is not there", path=str(path)) from error
            if digests.digest(weights) != name:
                raise StateError(f"{path} is damaged: its content has another digest than its name", path=str(path))
            return weights

        return read

    def _write_weights(self, name: str, weights: WeightDict) -> None:
        if name not in self._written:
            weight_file.write_weights(self.folder / f"{name}.safetensors", weights)
            self._written.add(name)

    def _tidy(self, number: int, needed: set[str]) -> None:
        """Removes states before the last but one, and models that no state refers to."""
        # States of a later number are of a job that was taken up again from an earlier, undamaged state.
        before = [one for one in self.numbers() if one < number]
        kept = before[-(KEPT - 1) :]
        for one in self.numbers():
            if one != number and one not in kept:
                self._path(one).unlink(missing_ok=True)
        for one in kept:
            with suppress(OSError):
                needed |= set(_REFERENCE.findall(self._path(one).read_text("utf-8", "replace")))
        for name in os.listdir(self.folder):
            match = _WEIGHTS.fullmatch(name)
            if match and match[1] not in needed:
                (self.folder / name).unlink(missing_ok=True)
                self._written.discard(match[1])
        flush(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"state-{number:08d}.json"

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked_body(path: Path, data: bytes) -> str:
    """The text of a state, if the file is whole.

    Raises:
        StateError: It is not.
    """
    line, _, rest = data.partition(b"\n")
    try:
        head = json.loads(line)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError(f"it does not begin as a {FORMAT} does")
        if head.get("version") != VERSION:
            raise StateError(
                f"{path} has version {brief(head.get('version'))} of the format, and this fed_learn reads version "
                f"{VERSION}: use the one that wrote it",
                path=str(path),
            )
        body = rest[:-1]
        if rest[-1:] != b"\n" or len(body) != head.get("bytes"):
            raise ValueError(f"it has {len(body)} of {brief(head.get('bytes'))} bytes")
        if digests.blake3_of(body) != head.get("digest"):
            raise ValueError("its content has another digest than it says")
        return body.decode()
    except (ValueError, RecursionError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path} is damaged: {described(error)}", path=str(path)) from error
