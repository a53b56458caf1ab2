"""What a server does with what clients send: checks it, keeps or folds in the contributions, averages them."""

import logging
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fed_learn import kernels
from fed_learn.aggregation import Accumulator, weighted_average
from fed_learn.aggregation.arrays import finite_columns
from fed_learn.aggregation.exact import check_domain
from fed_learn.aggregation.tensors import opened_contribution
from fed_learn.contribution import (
    INITIAL_VALIDATION_METRIC,
    Contribution,
    Kind,
    ValidationResult,
    check_contribution,
    checked_metrics,
    checked_n_iter,
)
from fed_learn.errors import (
    AggregatorError,
    BrokenAccumulatorError,
    ContributionError,
    ExactDomainError,
    FloatingPointEnvironmentError,
    IntegerRangeError,
    MetricError,
    NonFiniteError,
    SumOverflowError,
    UnknownContributorError,
    WeightsTypeError,
    brief,
    without_tracebacks,
)
from fed_learn.model_meta import FLContext
from fed_learn.server.model_aggregator import Aggregator, run_aggregator
from fed_learn.weights import Array, FrozenWeights, WeightDict, add_difference

if TYPE_CHECKING:
    from fed_learn.server.fed_server import FederatedServer

logger = logging.getLogger(__name__)


class Refusal(Exception):  # noqa: N818 - no failure of the library
    """A round that cannot be averaged; `error` says why."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Receiver:
    """The contributions of one round, kept until they are averaged or, where the server streams, folded in at once.

    Args:
        server: The settings.
    """

    def __init__(self, server: "FederatedServer") -> None:
        self.server = server
        self._stream: Accumulator | None = None
        self._added: dict[str, float] = {}

    def clear(self, weights: WeightDict) -> None:
        """Forgets the contributions of the last round."""
        self._added = {}
        if self.server.stream:
            self._stream = Accumulator(like=weights, exact=self.server.exact, kernel=self.server.kernel)

    def receive(
        self, name: str, sent: object, number: int, accepted: Sequence[Contribution]
    ) -> tuple[Contribution | None, Exception | None]:
        """Judges what a client sent.

        Returns:
            The contribution, without its weights where it is refused or folded in, None if it was none; and why it is
            refused, None if it is not.
        """
        contribution: Contribution | None = None
        try:
            # What handlers see of a refused contribution: everything but its weights.
            contribution = sent.without_weights() if isinstance(sent, Contribution) else None
            return self._accepted(name, sent, number, accepted), None
        except (BrokenAccumulatorError, FloatingPointEnvironmentError):
            raise  # not the client's doing
        except (ContributionError, ExactDomainError) as error:
            return contribution, without_tracebacks(error)
        except Exception as error:
            unreadable = WeightsTypeError(
                f"{name}: sent something unreadable: {type(error).__name__}: {error}", contributor=name
            )
            unreadable.__cause__ = error
            logger.error("%s", unreadable, exc_info=error)
            return contribution, without_tracebacks(unreadable)

    def _accepted(self, name: str, sent: object, number: int, accepted: Sequence[Contribution]) -> Contribution:
        """The contribution with weights that nobody else holds: those that have been checked."""
        if isinstance(sent, ContributionError):
            raise sent
        if not isinstance(sent, Contribution):
            raise WeightsTypeError(f"{name}: sent a {type(sent).__name__}, not a Contribution", contributor=name)
        if not isinstance(sent.contributor, str) or sent.contributor != name:
            raise UnknownContributorError(
                f"{name}: sent a contribution in the name of {brief(sent.contributor)}", contributor=name
            )
        sent, _ = opened_contribution(sent, None, on_host=True)
        weights, aggregation_weight = check_contribution(
            sent,
            self.server.schema,
            kind=self.server.kind,
            round=number,
            contributors={c.contributor for c in accepted},
            scan=False,
        )
        n_iter, metrics = checked_n_iter(sent.n_iter, name), checked_metrics(sent.metrics, name)
        kept: FrozenWeights | None = None
        if self._stream is not None:
            self._stream.add(Contribution(name, weights, aggregation_weight, round=number, kind=sent.kind))
            self._added[name] = aggregation_weight
        else:
            kept = _own(weights, sent.weights)
            finite_columns(kernels.resolve(self.server.kernel), kept, name)
            if self.server.exact:
                check_domain(kept, aggregation_weight, name)
        taken = Contribution(
            name, kept, aggregation_weight, n_iter=n_iter, round=number, kind=sent.kind, metrics=metrics, info=sent.info
        )
        if isinstance(self.server.aggregator, Aggregator):
            self.server.aggregator.check(taken)
        return taken

    def aggregate(self, contributions: Sequence[Contribution], weights: FrozenWeights, ctx: FLContext) -> FrozenWeights:
        """The new global model. Another way to aggregate overrides this.

        Args:
            contributions: Those to average.
            weights: The global model.
            ctx: The server's context.

        Raises:
            Refusal: It would leave the range of a dtype, or the server's aggregator failed.
            ValueError: A handler took contributions out or weighed them anew, and the server streams.
        """
        try:
            if self.server.aggregator is not None:
                with kernels.use(self.server.kernel):
                    return run_aggregator(self.server.aggregator, contributions, weights, ctx)
            mean = self._mean(contributions, weights)
            return FrozenWeights.adopt(mean if self.server.kind is Kind.FULL else add_difference(weights, mean))
        except (AggregatorError, NonFiniteError, IntegerRangeError, SumOverflowError, ExactDomainError) as error:
            raise Refusal(error) from error

    def _mean(self, contributions: Sequence[Contribution], weights: FrozenWeights) -> WeightDict:
        if self._stream is None:
            return weighted_average(contributions, like=weights, exact=self.server.exact, kernel=self.server.kernel)
        if sorted(self._added.items()) != sorted((c.contributor, c.aggregation_weight) for c in contributions):
            raise ValueError(
                "a handler changed which contributions are averaged, or their weights, but this server streams: they "
                "are added up already"
            )
        return self._stream.result()


def checked_result(name: str, model: str, result: object, others: Sequence[ValidationResult] = ()) -> ValidationResult:
    """The result of a validation with plain numbers.

    Raises:
        MetricError: It is none of this client on this model, or lacks the metric to select by; or one of the client is
            among the others already.
    """
    if not isinstance(result, ValidationResult) or (result.contributor, result.model) != (name, model):
        raise MetricError(f"{name}: sent no result of its own on {model!r}", contributor=name, metric=None)
    if any(other.contributor == name for other in others):
        raise MetricError(f"{name}: sent a result on {model!r} already", contributor=name, metric=None)
    metrics, n_iter = checked_metrics(result.metrics, name), checked_n_iter(result.n_iter, name)
    if INITIAL_VALIDATION_METRIC not in metrics:
        raise MetricError(
            f"{name}: no {INITIAL_VALIDATION_METRIC!r}", contributor=name, metric=INITIAL_VALIDATION_METRIC
        )
    return ValidationResult(name, model, metrics, n_iter)


def _own(weights: dict[str, Array], sent: object) -> FrozenWeights:
    """A copy, unless what was sent is frozen already. Shapes are known to be right, so it is no larger than a model."""
    if type(sent) is FrozenWeights and all(map(operator.is_, weights.values(), sent.values())):
        return sent
    return FrozenWeights(weights)
