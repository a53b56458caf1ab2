"""Keeps the global model and the best model on disk, as safetensors."""

import json
import os
from pathlib import Path

from fed_learn.contribution import BestModel
from fed_learn.handlers.handler import ServerHandler
from fed_learn.model_meta import ContextKey, FLContext
from fed_learn.weights import FrozenWeights, WeightDict


class CheckpointHandler(ServerHandler):
    """Writes the global model after each round and the job's best model whenever it changes.

    Where a round fails after it has made a global model, that is written when the job is shut down. A file is written
    beside its place and moved there, so whoever reads it sees the old or the new one, never half of one. The round
    (from 0) and the metric stand in the files' metadata, as JSON under the key `fed_learn`. To read bfloat16 with numpy
    use `safetensors.safe_open(path, "np")`: `safetensors.numpy.load_file` cannot.

    Args:
        directory: Where the files go; made when the job starts.
        global_name: File name of the global model.
        best_name: File name of the best model.

    Raises:
        ImportError: safetensors is not installed (extra `files`).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        global_name: str = "global.safetensors",
        best_name: str = "best.safetensors",
    ) -> None:
        try:
            import safetensors  # noqa: F401 - asked for now, rather than after the first round
        except ImportError as error:
            raise ImportError("CheckpointHandler needs safetensors: pip install 'fed-learn[files]'") from error
        self.directory = directory
        self.global_name = global_name
        self.best_name = best_name
        self._saved: BestModel | None = None
        self._round: int | None = None  # the one whose model is not yet written
        self._received: WeightDict | None = None

    def startup(self, ctx: FLContext) -> None:
        """Makes the directory."""
        super().startup(ctx)
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        self._saved = self._round = self._received = None

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
        finally:
            self._save_best(ctx)

    def _save_global(self, ctx: FLContext, number: int) -> None:
        if ctx.model is not None and ctx.model.weights is not None:
            save(Path(self.directory) / self.global_name, ctx.model.weights, {"round": number})

    def _save_best(self, ctx: FLContext) -> None:
        best = ctx.best_model
        if best is not None and best is not self._saved:
            about = {"round": best.round, "metric": best.metric, "metric_name": best.metric_name}
            save(Path(self.directory) / self.best_name, best.weights, about)
            self._saved = best


def save(path: Path, weights: WeightDict, about: dict[str, object]) -> None:
    """Writes a weight dict as safetensors, atomically: the file is there whole or not at all.

    Args:
        path: Where to.
        weights: A weight dict.
        about: What to tell about it: JSON in the file's metadata, under `fed_learn`.

    Raises:
        ValueError: A variable has the name that the format reserves.
        OSError: The file cannot be written; one that was there before is still there.
    """
    from safetensors.numpy import save as serialize

    # One key of metadata only: the order of several would differ from run to run, and the bytes with it.
    if "__metadata__" in weights:
        raise ValueError("a variable named '__metadata__' cannot be stored: safetensors keeps that name for itself")
    # It writes the buffer as it lies: frozen weights are contiguous and in native byte order.
    data = serialize(dict(FrozenWeights(weights)), {"fed_learn": json.dumps(about, sort_keys=True)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
