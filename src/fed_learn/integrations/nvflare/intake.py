"""The contributions of one round: each checked whole as it comes, all averaged at the end. Knows nothing of NVFlare."""

import copy
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fed_learn import kernels
from fed_learn.aggregation.round import UNUSABLE, Round, Told
from fed_learn.aggregation.tensors import label_of
from fed_learn.contribution import ClientFailure, Contribution, Kind, RoundReport
from fed_learn.errors import TooFewContributionsError, without_tracebacks
from fed_learn.values import mean_of
from fed_learn.weights import WeightDict, items_of


class Intake:
    """Checks contributions as they come and averages them; begin a new one for each round.

    Args:
        number: The round; None: unknown; see `fed_learn.aggregation.round.Round`.
        like: The global model: names, shapes and dtypes; None: the first contribution decides.
        kind: The kind of contributions that is expected.
        min_contributions: Fewer, and the round fails.
        partial: What becomes of parts of the model; see `fed_learn.aggregation.round.PARTIAL`.
        exact: Sum exactly.
        kernel: Name of the kernel; None: the current one.
        stream: Fold each contribution into float64 sums at once and keep none. Otherwise all are kept, as they are,
            until they are averaged in the order of their contributors' names: their arrays must not change till then.
        told: What has been told of clients in this job.

    Raises:
        ContributionError: `like` is no weight dict, or holds dtypes that cannot be averaged.

    Example:
        >>> import numpy as np
        >>> intake = Intake(number=0, like={"w": np.zeros(2)})
        >>> for name, w, steps in ("site-2", 4.0, 1), ("site-1", 0.0, 3):
        ...     accepted = intake.receive(Contribution(name, {"w": np.full(2, w)}, steps, round=0))
        >>> intake.settle()
        []
        >>> intake.average(), intake.report.accepted
        ({'w': array([1., 1.])}, ('site-1', 'site-2'))
    """

    def __init__(
        self,
        *,
        number: int | None = None,
        like: WeightDict | None = None,
        kind: Kind = Kind.FULL,
        min_contributions: int = 1,
        partial: str = "same",
        exact: bool = False,
        kernel: str | None = None,
        stream: bool = False,
        told: Told | None = None,
    ) -> None:
        self.like = like
        self.min_contributions = min_contributions
        self.rejected: list[ClientFailure] = []
        self.report = RoundReport(-1 if number is None else number, kernel=kernels.resolve(kernel).name)
        self._round = Round(
            number=number,
            model=like,
            kind=kind,
            partial=partial,
            exact=exact,
            stream=stream,
            kernel=kernel,
            own=False,
            told=told,
        )

    @property
    def accepted(self) -> dict[str, Contribution]:
        """The contributions so far, by name."""
        return self._round.accepted

    def receive(self, contribution: Contribution) -> Contribution:
        """Accepts a contribution, or refuses it and is as if it had never come.

        Args:
            contribution: What a client sent. Untrusted. Its weights may be arrays, tensors, or references with a method
                `materialize()` that loads one.

        Returns:
            The contribution without its weights.

        Raises:
            ContributionError, ExactDomainError: It is refused; the caller tells `refuse`.
            Exception: Whatever reading the weights raises, such as a file that is gone.
        """
        if isinstance(contribution.weights, Mapping):
            items = items_of(contribution.weights, label_of(contribution.contributor))
            loaded = {name: _loaded(value) for name, value in items.items()}
            contribution = replace(contribution, weights=loaded)
        accepted = self._round.receive(contribution)
        self._note_accepted()
        return accepted.without_weights()

    def refuse(self, who: object, error: Exception) -> Exception:
        """Notes in the report that a contribution was refused, and why.

        Returns:
            The error as it is kept: a copy, for the traceback of the one that is raised keeps the weights alive.
        """
        kept = without_tracebacks(copy.copy(error))
        self.rejected.append(ClientFailure(who, kept))  # type: ignore[arg-type] # whatever it is
        self._note(rejected=tuple(self.rejected))
        return kept

    def settle(self) -> list[tuple[str, Exception]]:
        """Refuses what cannot be averaged with the others, now that all are in: who and why. See `Round.settle`."""
        found = [(contribution.contributor, error) for contribution, error in self._round.settle()]
        refused = [(who, self.refuse(who, error)) for who, error in found]
        self._note_accepted()
        return refused

    def average(self, only: Collection[str] | None = None) -> dict[str, Any] | None:
        """The mean of what was accepted; the report tells of it.

        Args:
            only: Names of those that are averaged; None: all.

        Returns:
            A new dict of arrays, or of tensors where the first contribution has them: of the variables that clients
            sent, or of all where the global model is known. None if the round fails, because there are too few
            contributions, none counts by more than 0, or the mean left the range of a dtype: the report's `error` says
            so.

        Raises:
            OutOfTurnError: `settle` has not been called since the last contribution was received.
            ValueError: `only` leaves some out, and they are added up already (`stream`).
        """
        chosen = [name for name in sorted(self.accepted) if only is None or name in only]
        if len(chosen) < self.min_contributions:
            self._note(accepted=tuple(chosen), error=self._too_few(len(chosen)))
            return None
        started = time.perf_counter()
        try:
            combined = self._round.combine([self.accepted[name] for name in chosen])
        except UNUSABLE as error:
            self._note(error=without_tracebacks(error))
            return None
        weights = [self.accepted[name].aggregation_weight for name in chosen]
        self._note(
            accepted=tuple(chosen),
            total_weight=float(sum(weights)),
            aggregation_seconds=time.perf_counter() - started,
            aggregation_bytes=len(chosen) * sum(int(value.nbytes) for value in combined.mean.values()),
        )
        mean = {**combined.constants, **combined.mean}
        return {name: mean[name] for name in self.like or combined.sent if name in mean}

    def metrics(self, only: Collection[str] | None = None) -> dict[str, float]:
        """The weighted mean of each metric over those averaged contributions in which it is a finite number."""
        numbers: dict[str, list[float]] = {}
        weights: dict[str, list[float]] = {}
        for name, contribution in sorted(self.accepted.items()):
            if contribution.aggregation_weight and (only is None or name in only):
                for metric, value in contribution.metrics.items():
                    if math.isfinite(value):
                        numbers.setdefault(metric, []).append(value)
                        weights.setdefault(metric, []).append(contribution.aggregation_weight)
        return {metric: mean_of(values, weights[metric]) for metric, values in numbers.items()}

    def _too_few(self, count: int) -> TooFewContributionsError:
        number, taken = self.report.round, len(self.accepted) - count
        out = f" after a handler took out {taken}" if taken else ""
        return TooFewContributionsError(
            f"round {number + 1 if number >= 0 else '?'}: {count} accepted contributions{out}, "
            f"{self.min_contributions} required; the global model stands",
            count=count,
            required=self.min_contributions,
            round=self._round.number,
        )

    def _note_accepted(self) -> None:
        number = self._round.number
        self._note(accepted=tuple(sorted(self.accepted)), round=-1 if number is None else number)

    def _note(self, **changes: Any) -> None:
        self.report = replace(self.report, **changes)


def _loaded(value: Any) -> Any:
    """The value, loaded if it is a reference to one that lies elsewhere, such as on disk."""
    load = None if hasattr(value, "dtype") else getattr(value, "materialize", None)
    return load() if callable(load) else value
