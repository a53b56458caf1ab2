"""`JobLedger`: what a job writes to its ledger about each round, and what of it is kept."""

import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fed_learn.aggregation.tensors import without_tensors
from fed_learn.contribution import Contribution, RoundReport
from fed_learn.disk import set_aside
from fed_learn.durable import digest
from fed_learn.durable.ledger import FORMAT, Ledger
from fed_learn.durable.weight_file import write_weights
from fed_learn.errors import text_of
from fed_learn.server.settings import JobSettings
from fed_learn.values import numbers_as_arrays
from fed_learn.weights import Schema, WeightDict, as_weight_dict

NAME, KEPT = "ledger.jsonl", "contributions"
"""The file of the ledger, and the folder of what rounds were made of, in the folder of the state."""


class JobLedger:
    """The ledger of a job: digests are computed as contributions come, one more pass over their bytes.

    Args:
        settings: The settings of the job, with a folder for its state.
    """

    def __init__(self, settings: JobSettings) -> None:
        assert settings.durable is not None
        self.settings = settings
        self.folder = settings.durable
        self.ledger = Ledger(settings.durable / NAME)
        self._digests: dict[str, tuple[Any, str]] = {}  # contributor → the weights, and their digest
        self._model: tuple[Any, str] = (None, "")
        self._before = ""
        self._made: str | None = None
        self._contributions: list[dict[str, Any]] = []

    def begin_job(self, weights: WeightDict) -> None:
        """Writes the first entry. What a job that was killed before it had a state has left there is set aside.

        Raises:
            OSError: It cannot be written.
        """
        set_aside(self.ledger.path)
        own = sys.modules["fed_learn"].__version__  # which imports this module
        versions = {"fed_learn": own, "python": platform.python_version(), "numpy": np.__version__}
        self.ledger.append(
            {
                "type": "job",
                "format": FORMAT,
                "versions": versions,
                "settings": self.settings.kept(),
                "model": self._digest_of_model(weights),
            }
        )

    def begin(self, weights: WeightDict) -> None:
        """A round begins with a global model."""
        self._digests, self._made, self._contributions = {}, None, []
        self._before = self._digest_of_model(weights)
        self._keep(weights, self._before)

    def note(self, accepted: Contribution, weights: Any, schema: Schema) -> None:
        """A contribution has been accepted.

        Args:
            accepted: As it is kept.
            weights: Its weights, which `accepted` may lack in a stream.
            schema: Of the global model.
        """
        who, policies = accepted.contributor, self.settings.aggregation.policies
        shared = {n: value for n, value in weights.items() if policies.of(n) not in ("local", "keep")}
        arrays = as_weight_dict(numbers_as_arrays(without_tensors(shared, who), schema), who)
        known = digest(arrays)
        self._digests[accepted.contributor] = accepted.weights, known
        self._keep(arrays, known)

    def close(self, contributions: Sequence[Contribution], made: WeightDict | None, schema: Schema) -> None:
        """These contributions count; one that a handler put there is noted now.

        Args:
            contributions: What was combined, or would have been.
            made: The global model that they made; None: none.
            schema: Of the global model.
        """
        self._made = None if made is None else self._digest_of_model(made)
        for one in contributions:
            if one.weights is not None and self._digests.get(one.contributor, (None,))[0] is not one.weights:
                self.note(one, one.weights, schema)
        self._contributions = [
            {
                "contributor": one.contributor,
                "digest": self._digests[one.contributor][1],
                "aggregation_weight": one.aggregation_weight,
                "n_iter": one.n_iter,
                "kind": one.kind.value,
            }
            for one in contributions
        ]

    def write(self, report: RoundReport, weights: WeightDict) -> None:
        """The round is over: writes its entry.

        Raises:
            OSError: It cannot be written.
        """
        self.ledger.append(
            {
                "type": "round",
                "round": report.round,
                "rule": self.settings.aggregation.how.name,
                "model_before": self._before,
                "contributions": self._contributions,
                "refused": [{"contributor": one.contributor, "cause": one.cause} for one in report.rejected],
                "aggregated": self._made,
                "model_after": self._digest_of_model(weights),
                "error": None if report.error is None else text_of(report.error),
            }
        )

    def get_state(self) -> Mapping[str, Any]:
        """How far the ledger has come."""
        return self.ledger.get_state()

    def set_state(self, state: Any) -> None:
        """Goes on from there."""
        self.ledger.set_state(state)

    def _digest_of_model(self, weights: WeightDict) -> str:
        if self._model[0] is not weights:
            self._model = weights, digest(weights)
        return self._model[1]

    def _keep(self, weights: WeightDict, name: str) -> None:
        if not self.settings.keep_contributions:
            return
        path = kept_at(self.folder / KEPT, name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_weights(path, weights)


def kept_at(folder: Path, name: str) -> Path:
    """Where weights of a digest are kept."""
    return folder / f"{name}.safetensors"
