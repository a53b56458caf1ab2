"""What a server does with what clients send: a round receives it, and what counts makes the next global model."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fed_learn import kernels
from fed_learn.aggregation.differences import add_difference
from fed_learn.aggregation.round import UNUSABLE, Combined, Round, Told
from fed_learn.contribution import (
    INITIAL_VALIDATION_METRIC,
    Contribution,
    Kind,
    ValidationResult,
    check_contributor,
    checked_n_iter,
)
from fed_learn.errors import (
    AggregatorError,
    BrokenAccumulatorError,
    ContributionError,
    ExactDomainError,
    FloatingPointEnvironmentError,
    MetricError,
    UnknownContributorError,
    WeightsTypeError,
    a_type,
    as_failure,
    brief,
    described,
    text_of,
    without_tracebacks,
)
from fed_learn.model_meta import FLContext
from fed_learn.server.model_aggregator import Aggregator, run_aggregator
from fed_learn.values import split_metrics
from fed_learn.weights import FrozenWeights, WeightDict

if TYPE_CHECKING:
    from fed_learn.server.fed_server import FederatedServer

logger = logging.getLogger(__name__)


class Refusal(Exception):  # noqa: N818 - no failure of the library
    """A round that cannot be averaged; `error` says why."""

    def __init__(self, error: Exception) -> None:
        super().__init__(text_of(error))
        self.error = error


class Receiver:
    """The contributions of the rounds of one job, one round after another.

    Args:
        server: The settings.
    """

    def __init__(self, server: "FederatedServer") -> None:
        self.server = server
        self._told = Told()
        self._round = self._begun(server.weights, None)

    def begin(self, weights: WeightDict, number: int | None = None) -> None:
        """Forgets the contributions of the last round, and begins another.

        Args:
            weights: The global model; empty: not known yet.
            number: The round, from 0.
        """
        self._round = self._begun(weights, number)

    def receive(self, name: str, sent: object) -> tuple[Contribution | None, Exception | None]:
        """Judges what a client sent.

        Returns:
            The contribution, without its weights where it is refused or folded in, None if it was none; and why it is
            refused, None if it is not.
        """
        contribution: Contribution | None = None
        try:
            # What handlers see of a refused contribution: everything but its weights.
            contribution = sent.without_weights() if isinstance(sent, Contribution) else None
            aggregator = self.server.aggregator
            check = aggregator.check if isinstance(aggregator, Aggregator) else None
            return self._round.receive(_from_client(name, sent), check), None
        except (BrokenAccumulatorError, FloatingPointEnvironmentError):
            raise  # not the client's doing
        except (ContributionError, ExactDomainError) as error:
            return contribution, without_tracebacks(error)
        except BaseException as error:
            unreadable = WeightsTypeError(f"{name}: sent something unreadable: {described(error)}", contributor=name)
            unreadable.__cause__ = as_failure(error)
            logger.error("%s", unreadable, exc_info=error)
            return contribution, without_tracebacks(unreadable)

    def settle(self) -> list[tuple[Contribution, Exception]]:
        """Those that are refused now that all contributions are known, and why; see `Round.settle`."""
        return [(contribution, without_tracebacks(error)) for contribution, error in self._round.settle()]

    def aggregate(self, contributions: Sequence[Contribution], weights: FrozenWeights, ctx: FLContext) -> FrozenWeights:
        """The new global model. Another way to aggregate overrides this.

        Args:
            contributions: Those to average.
            weights: The global model.
            ctx: The server's context.

        Raises:
            Refusal: It would leave the range of a dtype, nothing counts, or the server's aggregator failed.
            ValueError: A handler took contributions out or weighed them anew, and the server streams.
        """
        try:
            if self.server.aggregator is not None:
                with kernels.use(self.server.kernel):
                    whole = self._round.completed(contributions, weights)
                    return run_aggregator(self.server.aggregator, whole, weights, ctx)
            return moved(weights, self._round.combine(contributions), self.server.kind)
        except (AggregatorError, *UNUSABLE) as error:
            raise Refusal(error) from error

    def _begun(self, weights: WeightDict, number: int | None) -> Round:
        return Round(
            number=number,
            model=weights,
            kind=self.server.kind,
            partial=self.server.partial,
            exact=self.server.exact,
            stream=self.server.stream,
            kernel=self.server.kernel,
            told=self._told,
        )


def moved(weights: FrozenWeights, combined: Combined, kind: Kind) -> FrozenWeights:
    """The global model that the mean of a round makes of the one before; what was not sent is kept.

    Raises:
        NonFiniteError, IntegerRangeError: It would leave the range of a dtype.
    """
    mean = combined.mean
    if kind is Kind.DIFF:
        mean = add_difference({name: weights[name] for name in mean}, mean)
    if mean.keys() == weights.keys():
        return FrozenWeights.adopt({name: mean[name] for name in weights})
    new = {**weights, **combined.constants, **mean}
    return FrozenWeights.adopt({name: new[name] for name in weights or combined.sent})


def _from_client(name: str, sent: object) -> Contribution:
    """What a client sent, if it is a contribution in its own name."""
    if isinstance(sent, ContributionError):
        raise sent
    if not isinstance(sent, Contribution):
        raise WeightsTypeError(f"{name}: sent {a_type(type(sent))}, not a Contribution", contributor=name)
    if not isinstance(sent.contributor, str) or sent.contributor != name:
        raise UnknownContributorError(
            f"{name}: sent a contribution in the name of {brief(sent.contributor)}", contributor=name
        )
    return sent


def checked_result(name: str, model: str, result: object, others: Sequence[ValidationResult] = ()) -> ValidationResult:
    """The result of a validation with plain numbers.

    Raises:
        UnknownContributorError: That cannot be the name of a client.
        MetricError: It is none of this client on this model, or lacks the metric to select by; or one of the client is
            among the others already.
    """
    check_contributor(name)
    if not isinstance(result, ValidationResult) or (result.contributor, result.model) != (name, model):
        raise MetricError(f"{name}: sent no result of its own on {model!r}", contributor=name, metric=None)
    if any(other.contributor == name for other in others):
        raise MetricError(f"{name}: sent a result on {model!r} already", contributor=name, metric=None)
    (metrics, _), n_iter = split_metrics(result.metrics, INITIAL_VALIDATION_METRIC), checked_n_iter(result.n_iter, name)
    if INITIAL_VALIDATION_METRIC not in metrics:
        raise MetricError(
            f"{name}: no {INITIAL_VALIDATION_METRIC!r}", contributor=name, metric=INITIAL_VALIDATION_METRIC
        )
    return ValidationResult(name, model, metrics, n_iter)
