"""`FedAvg` in the place of Flower's, and `WithHandlers` around any other strategy of its Message API."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Strategy

from fed_learn.contribution import INITIAL_VALIDATION_METRIC, Contribution, Kind
from fed_learn.errors import FedLearnError, IntegerRangeError
from fed_learn.events import EventHandler
from fed_learn.integrations.flower.handled import Handled
from fed_learn.integrations.flower.metrics import mean_metrics
from fed_learn.integrations.flower.records import RecordWriter, to_weights
from fed_learn.integrations.flower.replies import N_ITER, without_arrays
from fed_learn.server.receiving import Refusal
from fed_learn.weights import FrozenWeights, Schema, check_finite

logger = logging.getLogger("flwr")

MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]


class FedAvg(Handled, FlowerFedAvg):
    """Federated averaging in Flower, by this library: checked, exact to rounding, with handlers.

    Takes the place of `flwr.serverapp.strategy.FedAvg`, with its arguments. A contribution that is not right in every
    way is refused and reported, and the others are averaged; the sum is taken in the order of the contributors' names.
    Integers and halves keep their dtypes.

    Args:
        fraction_train: This and the next nine are Flower's.
        fraction_evaluate: See Flower.
        min_train_nodes: See Flower.
        min_evaluate_nodes: See Flower.
        min_available_nodes: See Flower.
        weighted_by_key: See Flower.
        arrayrecord_key: See Flower.
        configrecord_key: See Flower.
        train_metrics_aggr_fn: See Flower. None: `mean_metrics`. It is given the replies without their arrays.
        evaluate_metrics_aggr_fn: See Flower. None: `mean_metrics`.
        handlers: The server's handlers.
        kind: Whether clients send full weights or the difference to what they received.
        min_contributions: Accepted contributions that a round needs, or else the global model stands. None:
            `min_train_nodes`.
        on_bad_contribution: `"reject"` goes on without it; `"raise"` ends the job.
        on_handler_error: `"raise"` ends the job when a handler raised; `"log"` goes on. Both log and record it.
        exact: Average with exact sums (see `fed_learn.weighted_average`).
        kernel: Name of the kernel; None: the current one.
        stream: Add up contributions as they arrive, and keep none: the memory of one sum, whatever the number of
            clients. Sums are then taken in the order of arrival (unless `exact`), and handlers see no weights.
        validation_metric: The metric of the clients' evaluation by which models are selected. What a client measured
            after a round is its score of the model that it receives in the next one. Scores that clients send with
            their contributions, as `initial_validation_metric`, come first.
        n_iter_key: Where a reply's metrics hold the number of local iterations.
        poll_interval: Seconds between two looks for replies.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: A handler lacks `handle_event` or `rollback`.
        KernelNameError, KernelUnavailableError: The kernel cannot be used.

    Example:
        >>> from fed_learn import ModelSelectionHandler
        >>> strategy = FedAvg(fraction_train=0.5, handlers=[ModelSelectionHandler()], validation_metric="accuracy")
        >>> strategy.fraction_train, len(strategy.handlers)
        (0.5, 1)
    """

    def __init__(
        self,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsFunction | None = None,
        evaluate_metrics_aggr_fn: MetricsFunction | None = None,
        *,
        handlers: Sequence[EventHandler] = (),
        kind: Kind = Kind.FULL,
        min_contributions: int | None = None,
        on_bad_contribution: str = "reject",
        on_handler_error: str = "raise",
        exact: bool = False,
        kernel: str | None = None,
        stream: bool = False,
        validation_metric: str = INITIAL_VALIDATION_METRIC,
        n_iter_key: str = N_ITER,
        poll_interval: float = 0.25,
    ) -> None:
        super().__init__(
            fraction_train=fraction_train,
            fraction_evaluate=fraction_evaluate,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=min_evaluate_nodes,
            min_available_nodes=min_available_nodes,
            weighted_by_key=weighted_by_key,
            arrayrecord_key=arrayrecord_key,
            configrecord_key=configrecord_key,
            train_metrics_aggr_fn=train_metrics_aggr_fn or mean_metrics,
            evaluate_metrics_aggr_fn=evaluate_metrics_aggr_fn or mean_metrics,
        )
        self.min_contributions = min_contributions
        self.on_bad_contribution = on_bad_contribution
        self.on_handler_error = on_handler_error
        self.exact = exact
        self.kernel = kernel
        self.stream = stream
        self._set_up(
            handlers=handlers,
            kind=kind,
            min_contributions=max(1, self.min_train_nodes) if min_contributions is None else min_contributions,
            on_bad_contribution=on_bad_contribution,
            on_handler_error=on_handler_error,
            exact=exact,
            kernel=kernel,
            stream=stream,
            validation_metric=validation_metric,
            n_iter_key=n_iter_key,
            poll_interval=poll_interval,
        )

    def _keep(self, message: Message, contribution: Contribution) -> RecordDict:
        """See `Handled._keep`."""
        return without_arrays(message.content)

    def _metrics_of_round(self, kept: list[RecordDict]) -> MetricRecord | None:
        """See `Handled._metrics_of_round`."""
        metrics: MetricRecord = self.train_metrics_aggr_fn(kept, self.weighted_by_key)
        return metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The clients' metrics of an evaluation, whose scores serve the selection of models."""
        contents = [message.content for message in self._score(replies)]
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key) if contents else None


class _Delegate(Strategy):
    """Does what another strategy does."""

    strategy: Strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The other's."""
        messages: Iterable[Message] = self.strategy.configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The other's."""
        aggregated: tuple[ArrayRecord | None, MetricRecord | None] = self.strategy.aggregate_train(
            server_round, replies
        )
        return aggregated

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The other's."""
        messages: Iterable[Message] = self.strategy.configure_evaluate(server_round, arrays, config, grid)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The other's."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """The other's."""
        self.strategy.summary()


class WithHandlers(Handled, _Delegate):
    """Any strategy of Flower's Message API with our checks before it and our handlers around it.

    The strategy samples nodes and aggregates, and is given the accepted replies alone, in the order of the
    contributors' names. What it aggregates gets the dtypes of the global model back.

    Args:
        strategy: The strategy.
        handlers: As of `FedAvg`, like all that follow.
        kind: See `FedAvg`. `Kind.DIFF` is for a strategy of one's own that makes the new model of differences.
        min_contributions: See `FedAvg`; None: the strategy's `min_train_nodes`, or 1.
        on_bad_contribution: See `FedAvg`.
        on_handler_error: See `FedAvg`.
        validation_metric: See `FedAvg`.
        n_iter_key: See `FedAvg`.
        poll_interval: See `FedAvg`.

    Raises:
        ValueError: Also for `Kind.DIFF` and a strategy of Flower's own, which would take the mean difference for the
            new model.

    Example:
        >>> from flwr.serverapp.strategy import FedMedian
        >>> from fed_learn import ModelSelectionHandler
        >>> strategy = WithHandlers(FedMedian(), handlers=[ModelSelectionHandler()])
        >>> strategy.weighted_by_key
        'num-examples'
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        handlers: Sequence[EventHandler] = (),
        kind: Kind = Kind.FULL,
        min_contributions: int | None = None,
        on_bad_contribution: str = "reject",
        on_handler_error: str = "raise",
        validation_metric: str = INITIAL_VALIDATION_METRIC,
        n_iter_key: str = N_ITER,
        poll_interval: float = 0.25,
    ) -> None:
        if Kind(kind) is Kind.DIFF and type(strategy).__module__.startswith("flwr."):
            raise ValueError(f"{type(strategy).__name__} makes a model of full weights: kind must be Kind.FULL")
        self.strategy = strategy
        for key in ("weighted_by_key", "arrayrecord_key", "configrecord_key"):
            setattr(self, key, getattr(strategy, key, getattr(type(self), key)))
        self.min_contributions = min_contributions
        self.on_bad_contribution = on_bad_contribution
        self.on_handler_error = on_handler_error
        self._metrics: MetricRecord | None = None
        at_least = max(1, getattr(strategy, "min_train_nodes", 1))
        self._set_up(
            handlers=handlers,
            kind=kind,
            min_contributions=at_least if min_contributions is None else min_contributions,
            on_bad_contribution=on_bad_contribution,
            on_handler_error=on_handler_error,
            validation_metric=validation_metric,
            n_iter_key=n_iter_key,
            poll_interval=poll_interval,
            aggregate=self._aggregate,
        )

    def _keep(self, message: Message, contribution: Contribution) -> tuple[Message, Contribution]:
        """See `Handled._keep`."""
        return message, contribution

    def _metrics_of_round(self, kept: list[Any]) -> MetricRecord | None:
        """See `Handled._metrics_of_round`."""
        return self._metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's, None if it refuses the replies; the scores serve the selection of models."""
        listed = list(replies)
        self._score(listed)
        try:
            return super().aggregate_evaluate(server_round, listed)
        except InconsistentMessageReplies as error:  # what clients report must not end the run
            logger.error("round %d: %s: %s", server_round, type(self.strategy).__name__, error)
            return None

    def _aggregate(self, contributions: Sequence[Contribution], weights: FrozenWeights) -> FrozenWeights:
        assert self.job is not None
        number, who = self.job.report.round + 1, type(self.strategy).__name__
        accepted, kept = [], dict(self._kept)
        for counted in contributions:
            message, contribution = kept.pop(counted.contributor, (None, None))
            if (
                contribution is None
                or contribution.weights is not counted.weights
                or contribution.aggregation_weight != counted.aggregation_weight
            ):
                raise ValueError(
                    f"{counted.contributor}: a handler changed the contribution, but {who} aggregates the replies as "
                    "they came: it can only be left out"
                )
            accepted.append(message)
        try:
            record, self._metrics = _Delegate.aggregate_train(self, number, accepted)
        except InconsistentMessageReplies as error:  # what clients report must not end the run
            raise Refusal(error) from error
        if record is None:
            raise Refusal(FedLearnError(f"round {number}: {who} aggregated nothing; the global model stands"))
        try:
            return _with_dtypes(to_weights(record, like=self.job.schema), self.job.schema, who)
        except FedLearnError as error:
            raise Refusal(error) from error


def _with_dtypes(weights: FrozenWeights, schema: Schema, who: str) -> FrozenWeights:
    """What a strategy made, in the dtypes of the global model; integers are rounded half to even."""
    Schema(
        {name: (shape, weights[name].dtype if name in weights else dtype) for name, (shape, dtype) in schema.items()}
    ).check(weights, who)
    check_finite(weights, who)
    writer = RecordWriter(schema)
    for name, (_, dtype) in schema.items():
        values: Any = weights[name]
        if dtype.kind in "biu" and values.dtype != dtype:
            values = values if values.dtype.kind in "biu" else np.rint(values)
            info = np.iinfo(dtype) if dtype.kind != "b" else None
            low, high = (info.min, info.max) if info is not None else (0, 1)
            if values.size and not (low <= values.min() and values.max() <= high):
                raise IntegerRangeError(f"{who}: {name!r} leaves the range of {dtype}", contributor=who, name=name)
        writer.arrays[name][...] = values.astype(dtype)
    made = writer.finish()
    check_finite(made, who)
    return made
