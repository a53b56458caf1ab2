"""The contributions of one round: each checked whole as it comes, all averaged at the end. Knows nothing of NVFlare."""

import copy
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fed_learn import kernels
from fed_learn.aggregation import Accumulator, weighted_average
from fed_learn.aggregation.arrays import finite_columns
from fed_learn.aggregation.exact import check_domain
from fed_learn.aggregation.tensors import opened_contribution, schema_of
from fed_learn.contribution import ClientFailure, Contribution, Kind, RoundReport, check_contribution
from fed_learn.errors import (
    ExactDomainError,
    IntegerRangeError,
    NonFiniteError,
    SumOverflowError,
    TooFewContributionsError,
    brief,
    without_tracebacks,
)
from fed_learn.weights import Schema, WeightDict


class Intake:
    """Checks contributions as they come and averages them; begin a new one for each round.

    Args:
        number: The round; None: unknown, the first contribution that states one decides.
        like: The global model: names, shapes and dtypes; None: the first contribution decides.
        kind: The kind of contributions that is expected.
        min_contributions: Fewer, and the round fails.
        exact: Sum exactly.
        kernel: Name of the kernel; None: the current one.
        stream: Fold each contribution into float64 sums at once and keep none. Otherwise all are kept, as they are,
            until they are averaged in the order of their contributors' names: their arrays must not change till then.

    Raises:
        ContributionError: `like` is no weight dict, or holds dtypes that cannot be averaged.

    Example:
        >>> import numpy as np
        >>> intake = Intake(number=0, like={"w": np.zeros(2)})
        >>> for name, w, steps in ("site-2", 4.0, 1), ("site-1", 0.0, 3):
        ...     accepted = intake.receive(Contribution(name, {"w": np.full(2, w)}, steps, round=0))
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
        exact: bool = False,
        kernel: str | None = None,
        stream: bool = False,
    ) -> None:
        self.number = number
        self.like = like
        self.kind = kind
        self.min_contributions = min_contributions
        self.exact = exact
        self.kernel = kernel
        self.accepted: dict[str, Contribution] = {}
        self.rejected: list[ClientFailure] = []
        self.report = RoundReport(-1 if number is None else number, kernel=kernels.resolve(kernel).name)
        self._schema: Schema | None = None if like is None else schema_of(like, "global model")
        self._kept: dict[str, Contribution] = {}
        self._stream: Accumulator | None = Accumulator(like=like, exact=exact, kernel=kernel) if stream else None

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
        accepted = self._accept(contribution)
        self.accepted[accepted.contributor] = accepted
        self._note(accepted=tuple(sorted(self.accepted)))
        return accepted

    def refuse(self, who: object, error: Exception) -> Exception:
        """Notes in the report that a contribution was refused, and why.

        Returns:
            The error as it is kept: a copy, for the traceback of the one that is raised keeps the weights alive.
        """
        kept = without_tracebacks(copy.copy(error))
        self.rejected.append(ClientFailure(who if isinstance(who, str) else brief(who), kept))
        self._note(rejected=tuple(self.rejected))
        return kept

    def average(self, only: Collection[str] | None = None) -> dict[str, Any] | None:
        """The mean of what was accepted; the report tells of it.

        Args:
            only: Names of those that are averaged; None: all.

        Returns:
            A new dict of arrays, or of tensors where the first contribution has them. None if the round fails, because
            there are too few contributions or the mean left the range of a dtype: the report's `error` says so.

        Raises:
            ValueError: `only` leaves some out, and they are added up already (`stream`).
        """
        chosen = [name for name in sorted(self.accepted) if only is None or name in only]
        if self._stream is not None and len(chosen) < len(self.accepted):
            raise ValueError(
                "with stream=True the contributions are added up as they come: none can be taken out later"
            )
        if len(chosen) < self.min_contributions:
            count, required = len(chosen), self.min_contributions
            self._note(
                accepted=tuple(chosen),
                error=TooFewContributionsError(
                    f"round {self.number}: {count} accepted contributions, {required} required; "
                    "the global model stands",
                    count=count,
                    required=required,
                    round=self.number,
                ),
            )
            return None
        started = time.perf_counter()
        try:
            mean = self._mean(chosen)
        except (NonFiniteError, IntegerRangeError, SumOverflowError, ExactDomainError) as error:
            self._note(error=without_tracebacks(error))
            return None
        self._note(
            accepted=tuple(chosen),
            total_weight=float(sum(self.accepted[name].aggregation_weight for name in chosen)),
            aggregation_seconds=time.perf_counter() - started,
            aggregation_bytes=len(chosen) * sum(int(value.nbytes) for value in mean.values()),
        )
        return mean

    def metrics(self, only: Collection[str] | None = None) -> dict[str, float]:
        """The weighted means of the metrics that every averaged contribution has, finite ones."""
        chosen = [c for name, c in sorted(self.accepted.items()) if only is None or name in only]
        total = sum(c.aggregation_weight for c in chosen)
        names = [name for name in chosen[0].metrics if all(name in c.metrics for c in chosen)] if chosen else []
        means = {name: sum(c.metrics[name] * c.aggregation_weight for c in chosen) / total for name in names}
        return {name: mean for name, mean in means.items() if math.isfinite(mean)}

    def _accept(self, sent: Contribution) -> Contribution:
        if isinstance(sent.weights, Mapping):
            sent = replace(sent, weights={name: _loaded(value) for name, value in sent.weights.items()})
        opened, _ = opened_contribution(sent, None, on_host=True)
        weights, aggregation_weight = check_contribution(
            opened, self._schema, kind=self.kind, round=self.number, contributors=self.accepted, scan=False
        )
        accepted = replace(sent, aggregation_weight=aggregation_weight)
        if self._stream is not None:
            self._stream.add(accepted)
        else:
            finite_columns(kernels.resolve(self.kernel), weights, sent.contributor)
            if self.exact:
                check_domain(weights, aggregation_weight, sent.contributor)
            self._kept[sent.contributor] = accepted
        self._schema = Schema.of(weights) if self._schema is None else self._schema
        if self.number is None and sent.round is not None:
            self.number = sent.round
            self._note(round=sent.round)
        return accepted.without_weights()

    def _mean(self, chosen: list[str]) -> dict[str, Any]:
        if self._stream is not None:
            return dict(self._stream.result())
        contributions = [self._kept[name] for name in chosen]
        return dict(weighted_average(contributions, like=self.like, exact=self.exact, kernel=self.kernel))

    def _note(self, **changes: Any) -> None:
        self.report = replace(self.report, **changes)


def _loaded(value: Any) -> Any:
    """The value, loaded if it is a reference to one that lies elsewhere, such as on disk."""
    load = None if hasattr(value, "dtype") else getattr(value, "materialize", None)
    return load() if callable(load) else value
