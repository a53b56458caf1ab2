"""`StrategyBase`: what our strategies of both of Flower's interfaces share. Each has one job at a time.

It makes the job's settings of the strategy's arguments, begins and ends jobs, and decides to which job a model or a
reply belongs. What becomes of a round is left to `FlowerJob`, messages to the strategies.

Users derive classes from strategies and give names of their own, so names here begin with `_job_`.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord

from fed_learn import kernels
from fed_learn.aggregation.rules import Rule
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.arguments import check_choice
from fed_learn.components.direction import MODES
from fed_learn.contribution import Kind
from fed_learn.errors import NothingAggregatedError
from fed_learn.events import EventHandler
from fed_learn.integrations.flower.flower_job import Aggregate, FlowerJob
from fed_learn.integrations.flower.names import NodeNames, check_node_names
from fed_learn.policies import Policies
from fed_learn.server import JobResult
from fed_learn.server.job import Job
from fed_learn.server.settings import JobSettings
from fed_learn.weights import FrozenWeights, Schema, WeightDict

logger = logging.getLogger("flwr")


class StrategyBase:
    """A base beside one of Flower's strategies.

    Attributes:
        handlers: The server's handlers; this and the following are arguments of a strategy, which may be changed
            between two jobs.
        kind: The kind of contributions that clients send.
        rule: How they are combined.
        min_contributions: Accepted contributions that a round needs.
        on_bad_contribution: What a refused one does.
        on_handler_error: What a handler that raised does.
        partial: What becomes of parts of the model.
        policies: What becomes of variables by their names.
        exact: Whether sums are exact.
        kernel: Name of the kernel; None: the current one.
        stream: Whether contributions are added up as they arrive.
        validation_metric: By which models are selected.
        validation_mode: What is better of it.
        node_names: Which node is which contributor, as far as the user says.
        job: The `Job` that runs or ran last; None before the first. Not in copies and pickles of the strategy.
    """

    handlers: Sequence[EventHandler]
    kind: Kind
    rule: str | Rule = "mean"
    min_contributions: int
    on_bad_contribution: str
    on_handler_error: str
    partial: str = "same"
    policies: Mapping[str, str] | None = None
    exact: bool = False
    kernel: str | None = None
    stream: bool = False
    validation_metric: str
    validation_mode: str | None
    node_names: NodeNames | None
    job: Job | None = None
    _job_running: FlowerJob | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "job": None, "_job_running": None}

    def close(self) -> JobResult | None:
        """Ends the job."""
        raise NotImplementedError

    def _job_check(self) -> None:
        """Refuses now what a job would refuse later; no job runs so far.

        Raises:
            ValueError: An argument is out of its range.
            TypeError: A handler lacks `handle_event` or `rollback`, or `node_names` is of another sort.
        """
        self.job = self._job_running = None
        self.kind = self._job_settings(None).aggregation.kind
        if self.validation_mode is not None:
            check_choice("mode", self.validation_mode, MODES)
        check_node_names(self.node_names)

    def _job_settings(self, num_rounds: int | None) -> JobSettings:
        """What a job is told, as the attributes are now."""
        aggregation = AggregationSettings(
            rule=self.rule,
            kind=self.kind,
            partial=self.partial,
            policies=Policies(self.policies),
            exact=self.exact,
            stream=self.stream,
            kernel=kernels.resolve(self.kernel).name,
            min_contributions=self.min_contributions,
            on_bad_contribution=self.on_bad_contribution,
        )
        return JobSettings(
            num_rounds=None if num_rounds is None else max(1, num_rounds),
            handlers=self.handlers,
            on_handler_error=self.on_handler_error,
            aggregation=aggregation,
        )

    def _job_aggregate(self) -> Aggregate | None:
        """What aggregates in the place of the rule; None: nothing does."""
        return None

    def _job_start(
        self,
        weights: WeightDict,
        record: ArrayRecord | None = None,
        num_rounds: int | None = None,
        *,
        guessed: bool = False,
    ) -> FlowerJob:
        """Begins a job with the settings of the strategy: STARTUP. The arguments are those of `FlowerJob`."""
        running = FlowerJob(
            self._job_settings(num_rounds),
            weights,
            record,
            aggregate=self._job_aggregate(),
            guessed=guessed,
            validation_metric=self.validation_metric,
            validation_mode=self.validation_mode,
            node_names=self.node_names,
        )
        running.job.start()
        self._job_running, self.job = running, running.job
        return running

    def _job_open(
        self,
        server_round: int,
        holds: Callable[[FlowerJob], bool],
        read: Callable[[Schema | None], FrozenWeights],
        record: ArrayRecord | None = None,
    ) -> FlowerJob:
        """The job with a global model that comes from outside, in this round; begins either if need be.

        Args:
            server_round: From 1.
            holds: Whether that is the global model of a job, unchanged.
            read: Its weights, as those of a schema if there is one.
            record: The model as a record, if it is one.
        """
        if self._job_running is not None and self._job_running.is_over(server_round):
            self._job_replace()
        running, given = self._job_running, None
        if running is None or not holds(running):
            given = read(None if running is None else running.job.schema)
            if running is not None:
                running.model.take_part(given, type(self).__name__)
                given = running.model.completed(given)
            schema = Schema.of(given)
            if running is not None and running.num_rounds is not None:  # Flower runs one job
                if schema != running.job.schema:
                    running.model.change(schema, type(self).__name__)
            elif running is None or schema != running.job.schema:
                self._job_replace()  # another model: another job
                running, given = self._job_start(given, record), None
        running.guessed = False
        if running.number != server_round - 1 or given is not None:
            running.start_round(server_round - 1, given)
        return running

    def _job_replace(self) -> None:
        """Ends a job in the place of which another begins."""
        try:
            self.close()
        except NothingAggregatedError as error:
            logger.error("the job before ended in vain: %s", error)

    def _job_for(
        self, server_round: int, replies: Iterable[Any], readable: Callable[[], Iterable[WeightDict]]
    ) -> FlowerJob | None:
        """The job in which replies count, in this round; begins either if need be.

        Args:
            server_round: From 1.
            replies: What clients sent.
            readable: Gives the weights of those replies that can be read.

        Returns:
            None if there is nothing to begin with.
        """
        running = self._job_running
        if running is not None and not running.takes(server_round, readable()):
            self._job_replace()
            running = None
        if running is None and self.kind is Kind.FULL and any(True for _ in readable()):
            running = self._job_start(FrozenWeights({}), guessed=True)
        if running is None and any(True for _ in replies):
            logger.error("round %d: no reply can be read, and the global model is not known", server_round)
        if running is not None:
            running.enter(server_round - 1)
        return running
