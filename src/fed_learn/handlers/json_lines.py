"""Writes what happens in a job to a file of JSON lines."""

import json
import math
import os
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from fed_learn.contribution import RoundReport, ValidationResult
from fed_learn.handlers.handler import ServerHandler
from fed_learn.model_meta import ContextKey, FLContext


class JsonLinesHandler(ServerHandler):
    """Appends a line per round and per validation result: `{"type": "round" | "validation", …}`.

    Each line is complete on disk when the event is over, so a job can be followed while it runs. NaN and infinities
    become null, which JSON has. Rounds are numbered from 0, as everywhere but on screen.

    Args:
        path: The file. It is begun anew when a job starts.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def startup(self, ctx: FLContext) -> None:
        """Makes the file, empty, and its folder."""
        super().startup(ctx)
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        Path(self.path).write_text("", encoding="utf-8")

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
        self._write({"type": "round", **report.as_dict(), "contributions": clients})

    def receive_validation_results(self, ctx: FLContext) -> None:
        """Writes the result at hand."""
        result: ValidationResult = ctx[ContextKey.VALIDATION_RESULTS][-1]
        self._write(
            {
                "type": "validation",
                "model": result.model,
                "contributor": result.contributor,
                "metrics": dict(result.metrics),
            }
        )

    def _write(self, entry: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(entry)) + "\n")


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
