"""Keeps the global model and the best model on disk, as safetensors."""

import os
from pathlib import Path
from typing import Any

from fed_learn.contribution import BestModel
from fed_learn.disk import Claim, remove, set_aside, write_whole
from fed_learn.durable.weight_file import check_installed, serialized
from fed_learn.handlers.handler import ServerHandler
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.weights import WeightDict


class CheckpointHandler(ServerHandler):
    """Writes the global model after each round and the job's best model whenever it changes.

    Where a round fails after it has made a global model, that is written when the job is shut down. A file is written
    beside its place and moved there, so whoever reads it sees the old or the new one, never half of one. The round
    (from 0) and the metric stand in the files' metadata, as JSON under the key `fed_learn`. To read bfloat16 with numpy
    use `safetensors.safe_open(path, "np")`: `safetensors.numpy.load_file` cannot.

    The models of an earlier job are left alone until the job has its first one to write, and are then kept under
    numbered names (`best.safetensors.1`), which the log tells. A job that is resumed goes on with its own files; if
    they have changed since its state was kept, they are treated as those of an earlier job. While a job writes the
    files, no other process can.

    Args:
        directory: Where the files go; made when the job starts.
        global_name: File name of the global model.
        best_name: File name of the best model.
        overwrite: Replace the models of an earlier job instead of keeping them.

    Raises:
        ImportError: safetensors is not installed (extra `files`).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        global_name: str = "global.safetensors",
        best_name: str = "best.safetensors",
        *,
        overwrite: bool = False,
    ) -> None:
        try:
            check_installed()  # asked for now, rather than after the first round
        except ImportError as error:
            raise ImportError("CheckpointHandler needs safetensors: pip install 'fed-learn[files]'") from error
        self.directory = directory
        self.global_name = global_name
        self.best_name = best_name
        self.overwrite = overwrite
        self._claim: Claim | None = None
        self._begun = False
        self._written: int | None = None  # the round of the global model that this job wrote last
        self._unwritten: int | None = None  # one that it wrote before it was resumed, and that is not there any more
        self._saved: BestModel | None = None
        self._round: int | None = None  # the one whose model is not yet written
        self._received: WeightDict | None = None

    def startup(self, ctx: FLContext) -> None:
        """Makes the directory, and sees to it that no other job writes the files.

        Raises:
            FileInUseError: One does.
            OSError: The directory cannot be written to.
        """
        super().startup(ctx)
        self._begun = False
        self._take()
        self._saved = self._round = self._received = self._written = self._unwritten = None

    def start_round(self, ctx: FLContext) -> None:
        """Notes the model from which the round starts."""
        self._round = ctx[ContextKey.ROUND]
        self._received = None if ctx.model is None else ctx.model.weights

    def end_round(self, ctx: FLContext) -> None:
        """Writes the global model, and the best one if it changed."""
        self._save_global(ctx, ctx[ContextKey.ROUND])
        self._round = self._received = None
        self._save_best(ctx)

    def shutdown(self, ctx: FLContext) -> None:
        """Writes the model of a round that did not come to its end, and the best one if it changed since."""
        try:
            if self._round is not None and ctx.model is not None and ctx.model.weights is not self._received:
                self._save_global(ctx, self._round)
            elif self._unwritten is not None:
                self._save_global(ctx, self._unwritten)
        finally:
            try:
                self._save_best(ctx)
            finally:
                if self._claim is not None:
                    self._claim.release()
                    self._claim = None

    def get_state(self) -> dict[str, Any]:
        """By what the files of this job are known, their sizes and times, and the round of the global model."""
        return {"files": self._forms() if self._begun else None, "round": self._written}

    def set_state(self, state: Any) -> None:
        """Goes on to write them, if they are those of this job; others are treated as those of an earlier one."""
        self._begun = state["files"] is not None and (self.overwrite or state["files"] == self._forms())
        self._written = state["round"] if self._begun else None
        self._unwritten = None if self._begun else state["round"]

    def _forms(self) -> dict[str, list[int]]:
        found = {path.name: path.stat() for path in self._paths() if path.is_file()}
        return {name: [of.st_size, of.st_mtime_ns] for name, of in found.items()}

    def _take(self) -> None:
        if self._claim is None:
            self._claim = Claim(self._paths())
        self._claim.take()

    def _paths(self) -> list[Path]:
        return [Path(self.directory) / name for name in (self.global_name, self.best_name)]

    def _save_global(self, ctx: FLContext, number: int) -> None:
        if ctx.model is not None and ctx.model.weights is not None:
            self._save(self.global_name, ctx.model.weights, {"round": number})
            self._written, self._unwritten = number, None

    def _save_best(self, ctx: FLContext) -> None:
        best = ctx.best_model
        if best is not None and best is not self._saved:
            about = {"round": best.round, "metric": best.metric, "metric_name": best.metric_name}
            self._save(self.best_name, best.weights, about)
            self._saved = best

    def _save(self, name: str, weights: WeightDict, about: dict[str, object]) -> None:
        data, path = serialized(weights, about), Path(self.directory) / name
        # Both of an earlier job's go: a best model of one job beside a global model of another misleads.
        earlier = [] if self._begun else self._paths()
        if earlier:
            self._take()
        if not self.overwrite:
            for one in earlier:
                set_aside(one)
        write_whole(path, data)
        if self.overwrite:
            for one in earlier:
                if one != path:
                    remove(one)
        self._begun = True
