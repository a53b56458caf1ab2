"""`FedAvg` in the place of Flower's, and `WithHandlers` around any other strategy of its Message API."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from traceback import walk_tb
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Strategy

from fed_learn.aggregation.rules import Rule
from fed_learn.contribution import INITIAL_VALIDATION_METRIC, Contribution, Kind
from fed_learn.errors import AggregatorError, IntegerRangeError, described, printable
from fed_learn.events import EventHandler
from fed_learn.integrations.flower.flower_job import Aggregate, FlowerJob
from fed_learn.integrations.flower.job_strategy import JobStrategy
from fed_learn.integrations.flower.messages import log_replies
from fed_learn.integrations.flower.metrics import mean_by_name, mean_metrics
from fed_learn.integrations.flower.names import NodeNames
from fed_learn.integrations.flower.records import RecordWriter, to_weights
from fed_learn.integrations.flower.replies import N_ITER, node_of
from fed_learn.integrations.flower.scoring import with_weight
from fed_learn.weights import FrozenWeights, Schema, WeightDict, check_finite

logger = logging.getLogger("flwr")

MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]


class FedAvg(JobStrategy, FlowerFedAvg):
    """Federated averaging in Flower, by this library: checked, exact to rounding, with handlers.

    Takes the place of `flwr.serverapp.strategy.FedAvg`, with its arguments. A contribution that is not right in every
    way is refused and reported, and the others are averaged; the sum is taken in the order of the contributors' names.
    Integers and halves keep their dtypes.

    The first eight arguments are those of Flower's `FedAvg`.

    Args:
        train_metrics_aggr_fn: As in Flower; None: `mean_metrics`. It is given the replies that were accepted.
        evaluate_metrics_aggr_fn: As in Flower; None: `mean_metrics`.
        handlers: The server's handlers.
        kind: Whether clients send full weights or the difference to what they received.
        min_contributions: Accepted contributions that a round needs, or else the global model stands. How many nodes
            are sampled, or waited for, is another matter: that is what Flower's arguments say.
        on_bad_contribution: `"reject"` goes on without it; `"raise"` ends the job.
        on_handler_error: `"raise"` ends the job when a handler raised; `"log"` goes on. Both log and record it.
        partial: What becomes of replies that hold a part of the variables. `"same"`: a part that is the same from
            all is averaged, and the rest of the global model kept; of different parts the commonest counts, and the
            others are refused. `"average"`: each variable is averaged over those who sent it (not with `stream`).
            `"refuse"`: a part is refused.
        policies: What becomes of variables by regular expressions of their names, the first that is found deciding:
            `{"bn": "local"}` for FedBN; see `fed_learn.policies.Policy`. Messages do not carry what is `"local"`. Codes
            are `"same"`; all others are averaged.
        exact: Average with exact sums (see `fed_learn.weighted_average`).
        kernel: Name of the kernel; None: the current one.
        rule: How contributions are combined: the name of a rule, one of `fed_learn.rules.available()`, or a `Rule`.
        stream: Add up contributions as they arrive, and keep none: the memory of one sum, whatever the number of
            clients. Sums are then taken in the order of arrival (unless `exact`), handlers see no weights, and
            `train_metrics_aggr_fn` gets replies without their arrays. The `aggregate_train` of a subclass is given an
            iterator, which can be gone through once and has no `len()`; without `stream` it is given a list.
        validation_metric: The metric of the clients' evaluation by which models are selected. What a client measured
            after a round is its score of the model that it receives in the next one. Scores that clients send with
            their contributions, as `initial_validation_metric`, come first.
        validation_mode: What is better of it, `"max"` or `"min"`, which handlers follow; None: its name says so.
        n_iter_key: Where a reply's metrics hold the number of local iterations.
        poll_interval: Seconds from the first look for replies to the second. From look to look they grow by half, to 4.
        node_names: Which node is which contributor: a mapping of nodes' numbers to names, or a function of a number
            that gives a name, or None where it knows none. A node that claims to be another is refused. Of nodes that
            are not named so, a name belongs to the first that contributes under it, as long as that is connected.

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
        min_contributions: int = 1,
        on_bad_contribution: str = "reject",
        on_handler_error: str = "raise",
        partial: str = "same",
        policies: Mapping[str, str] | None = None,
        exact: bool = False,
        kernel: str | None = None,
        rule: str | Rule = "mean",
        stream: bool = False,
        validation_metric: str = INITIAL_VALIDATION_METRIC,
        validation_mode: str | None = None,
        n_iter_key: str = N_ITER,
        poll_interval: float = 0.25,
        node_names: NodeNames | None = None,
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
        self.policies = policies
        self.exact = exact
        self.kernel = kernel
        self.rule = rule
        self.stream = stream
        self._job_set_up(
            handlers=handlers,
            kind=kind,
            min_contributions=min_contributions,
            on_bad_contribution=on_bad_contribution,
            on_handler_error=on_handler_error,
            partial=partial,
            validation_metric=validation_metric,
            validation_mode=validation_mode,
            n_iter_key=n_iter_key,
            poll_interval=poll_interval,
            node_names=node_names,
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The clients' metrics of an evaluation, whose scores serve the selection of models."""
        listed = list(replies or ())
        self._job_scores(listed)
        good, _ = self.__looked_through(listed, is_train=False)
        if not good:
            return None
        if self.evaluate_metrics_aggr_fn is mean_metrics and self._job_running is not None:
            good = with_weight(self._job_running, good, self.weighted_by_key)
        named = [(self._job_called(node_of(m, place)), m.content) for place, m in enumerate(good, 1)]
        return self.__mean(self.evaluate_metrics_aggr_fn, named)

    def _job_replies(self, replies: Iterable[Message]) -> tuple[Iterable[Message], list[Message]]:
        return self.__looked_through(replies, is_train=True) if isinstance(replies, list) else (replies, [])

    def _job_metrics(self, counted: list[tuple[str, RecordDict]]) -> MetricRecord | None:
        return self.__mean(self.train_metrics_aggr_fn, counted) if counted else None

    def __mean(self, function: MetricsFunction, contents: list[tuple[str, RecordDict]]) -> MetricRecord:
        running = self._job_running
        if function is mean_metrics and running is not None:
            return mean_by_name(contents, self.weighted_by_key, running.told)
        return function([content for _, content in contents], self.weighted_by_key)

    def _check_and_log_replies(
        self, replies: Iterable[Message], is_train: bool, validate: bool = True
    ) -> tuple[list[Message], list[Message]]:
        """Replies with content and with errors, which are logged. Contents are checked later, one by one."""
        del validate
        listed = list(replies)
        good, failed = [m for m in listed if not m.has_error()], [m for m in listed if m.has_error()]
        log_replies(len(good), failed, "aggregate_train" if is_train else "aggregate_evaluate")
        return good, failed

    def __looked_through(self, replies: list[Message], *, is_train: bool) -> tuple[list[Message], list[Message]]:
        good, failed = self._check_and_log_replies(replies, is_train=is_train)  # a subclass may have its own
        return list(good), list(failed)


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


class WithHandlers(JobStrategy, _Delegate):
    """Any strategy of Flower's Message API with our checks before it and our handlers around it.

    The strategy samples nodes and aggregates. It is given the accepted replies, in the order of the contributors'
    names, and behind them the nodes' errors. What it aggregates gets the dtypes of the global model back. Where the
    code of Flower cannot aggregate what clients sent, the round fails, and the global model stands; an error in the
    code of your own strategy is raised. The other arguments are those of `FedAvg`.

    Args:
        strategy: The strategy.
        kind: Whether clients send full weights or differences. `Kind.DIFF` is for your own strategy that makes the new
            model from differences.

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
        min_contributions: int = 1,
        on_bad_contribution: str = "reject",
        on_handler_error: str = "raise",
        validation_metric: str = INITIAL_VALIDATION_METRIC,
        validation_mode: str | None = None,
        n_iter_key: str = N_ITER,
        poll_interval: float = 0.25,
        node_names: NodeNames | None = None,
    ) -> None:
        if Kind(kind) is Kind.DIFF and type(strategy).__module__.startswith("flwr."):
            raise ValueError(f"{type(strategy).__name__} makes a model of full weights: kind must be Kind.FULL")
        self.strategy = strategy
        for key in ("weighted_by_key", "arrayrecord_key", "configrecord_key"):
            setattr(self, key, getattr(strategy, key, getattr(type(self), key)))
        self.__metrics: MetricRecord | None = None
        self.__unsaid: tuple[int, list[Message]] | None = None
        self._job_set_up(
            handlers=handlers,
            kind=kind,
            min_contributions=min_contributions,
            on_bad_contribution=on_bad_contribution,
            on_handler_error=on_handler_error,
            partial="same",
            validation_metric=validation_metric,
            validation_mode=validation_mode,
            n_iter_key=n_iter_key,
            poll_interval=poll_interval,
            node_names=node_names,
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The strategy's, None if it cannot aggregate the replies; the scores serve the selection of models."""
        listed = list(replies or ())
        self._job_scores(listed)
        try:
            return super().aggregate_evaluate(server_round, listed)
        except Exception as error:
            if not _by_replies(error):
                raise
            who = type(self.strategy).__name__
            logger.error("round %d: %s cannot aggregate the evaluation: %s", server_round, who, described(error))
            return None

    def _job_replies(self, replies: Iterable[Message]) -> tuple[Iterable[Message], list[Message]]:
        # The strategy itself logs them, if it is asked.
        listed = list(replies)
        good, failed = [m for m in listed if not m.has_error()], [m for m in listed if m.has_error()]
        self.__metrics, self.__unsaid = None, (len(good), failed)
        return good, failed

    def _job_metrics(self, counted: list[tuple[str, RecordDict]]) -> MetricRecord | None:
        unsaid, self.__unsaid = self.__unsaid, None
        if unsaid is not None:
            log_replies(*unsaid)
        return self.__metrics

    def _job_aggregate(self) -> Aggregate | None:
        return self.__aggregate

    def __aggregate(self, running: FlowerJob, contributions: Sequence[Contribution]) -> FrozenWeights:
        number, who = running.job.report.round + 1, type(self.strategy).__name__
        self.__unsaid = None
        accepted: list[Message] = []
        kept = dict(running.accepted)
        for counted in contributions:
            own = kept.pop(counted.contributor, None)
            if (
                own is None
                or own.message is None
                or own.contribution.weights is not counted.weights
                or own.contribution.aggregation_weight != counted.aggregation_weight
            ):
                raise ValueError(
                    f"{counted.contributor}: a handler changed the contribution, but {who} aggregates the replies as "
                    "they came: it can only be left out"
                )
            accepted.append(own.message)
        for message in running.failed:  # whose reasons the strategy logs as they are
            if message.has_error():
                message.error = Error(message.error.code, printable(str(message.error.reason)))
        try:
            record, self.__metrics = _Delegate.aggregate_train(self, number, [*accepted, *running.failed])
        except Exception as error:
            if not _by_replies(error):
                raise
            raise AggregatorError(f"{who} cannot aggregate the replies: {described(error)}") from error
        if not record:
            raise AggregatorError(f"{who} aggregated nothing")
        made = to_weights(record, like=running.job.schema)
        return _completed(made, running, running.job.averaged(contributions), who)


def _by_replies(error: Exception) -> bool:
    """Whether what clients sent made a strategy raise: an error of Flower's, or one in Flower's own code.

    With code of the user's on the way there only arithmetic counts, such as a division by no examples at all: all else
    may be the mistake of that code.
    """
    if isinstance(error, InconsistentMessageReplies | AggregationError):
        return True
    modules = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    inner = [module for module in modules if module not in ("numpy", "fed_learn")]
    if not inner or inner[-1] != "flwr":
        return False
    return isinstance(error, ArithmeticError) or set(inner) == {"flwr"}


def _completed(made: FrozenWeights, running: FlowerJob, averaged: frozenset[str], who: str) -> FrozenWeights:
    """The new global model: what a strategy made, in the dtypes of the model before, and the rest of that.

    What a strategy returns beyond the variables of the model, or in other shapes, changes the model, as with Flower.

    Args:
        made: What the strategy made.
        running: The job.
        averaged: Names of what clients sent and changed.
        who: The strategy.
    """
    model = running.job.weights
    sent = running.model.names
    constants = sent - averaged  # what clients sent as it was: not finite
    taken = {name: array for name, array in made.items() if name not in constants or name not in model}
    Schema.of(taken, who)  # refuses dtypes that are no numbers
    check_finite(taken, who, constants=model or None)
    alike = {n: taken[n] for n in model if n in taken and taken[n].shape == model[n].shape}
    fitted = _with_dtypes(alike, Schema.of({name: model[name] for name in alike}), who)
    check_finite(fitted, who, constants=model or None)
    if len(fitted) == len(taken) == len(model):
        running.model.take_part(made, who)
        return fitted
    taken |= fitted
    missing = [name for name in model if name in averaged and name not in made]
    others = len(alike) < len(taken)
    if not others:
        running.model.take_part(made, who)
    dropped = set(missing) if others else set()
    new = {name: taken.get(name, array) for name, array in model.items() if name not in dropped}
    new |= taken
    if others and model:
        running.model.change(Schema.of(new), who)
    return FrozenWeights.adopt(new)


def _with_dtypes(made: WeightDict, schema: Schema, who: str) -> FrozenWeights:
    """The variables of a schema in its dtypes; integers are rounded half to even."""
    writer = RecordWriter(schema)
    for name, (_, dtype) in schema.items():
        values: Any = made[name]
        if dtype.kind in "biu" and values.dtype != dtype:
            values = values if values.dtype.kind in "biu" else np.rint(values)
            info = np.iinfo(dtype) if dtype.kind != "b" else None
            low, high = (info.min, info.max) if info is not None else (0, 1)
            if values.size and not (low <= values.min() and values.max() <= high):
                raise IntegerRangeError(f"{who}: {name!r} leaves the range of {dtype}", contributor=who, name=name)
        writer.arrays[name][...] = values.astype(dtype)
    return writer.finish()
