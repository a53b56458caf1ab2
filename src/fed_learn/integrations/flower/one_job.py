"""What our strategies of both of Flower's interfaces share: one job at a time, and which models and replies are its.

What belongs to this module has names that begin with `_job_`: users derive classes and give names of their own.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
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
from fed_learn.integrations.flower.names import NodeNames, check_node_names
from fed_learn.integrations.flower.session import Aggregate, Session
from fed_learn.server import JobResult
from fed_learn.server.job import Job
from fed_learn.server.settings import JobSettings
from fed_learn.weights import FrozenWeights, Schema, WeightDict

logger = logging.getLogger("flwr")


class OneJob:
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
    exact: bool = False
    kernel: str | None = None
    stream: bool = False
    validation_metric: str
    validation_mode: str | None
    node_names: NodeNames | None
    job: Job | None = None
    _job_session: Session | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "job": None, "_job_session": None}

    def close(self) -> JobResult | None:
        """Ends the job."""
        raise NotImplementedError

    def _job_check(self) -> None:
        """Refuses now what a job would refuse later; no job runs so far.

        Raises:
            ValueError: An argument is out of its range.
            TypeError: A handler lacks `handle_event` or `rollback`, or `node_names` is of another sort.
        """
        self.job = self._job_session = None
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

    def _job_begin(
        self, weights: WeightDict, record: ArrayRecord | None, num_rounds: int | None, *, guessed: bool
    ) -> Session:
        """A job with the settings of the strategy; arguments as of `Session`."""
        return Session(
            self._job_settings(num_rounds),
            weights,
            record,
            aggregate=self._job_aggregate(),
            guessed=guessed,
            validation_metric=self.validation_metric,
            validation_mode=self.validation_mode,
            node_names=self.node_names,
        )

    def _job_start(
        self,
        weights: WeightDict,
        record: ArrayRecord | None = None,
        num_rounds: int | None = None,
        *,
        guessed: bool = False,
    ) -> Session:
        """Begins a job: STARTUP."""
        session = self._job_begin(weights, record, num_rounds, guessed=guessed)
        session.job.start()
        self._job_session, self.job = session, session.job
        return session

    def _job_open(
        self,
        server_round: int,
        holds: Callable[[Session], bool],
        read: Callable[[Schema | None], FrozenWeights],
        record: ArrayRecord | None = None,
    ) -> Session:
        """The job with a global model that comes from outside, in this round; begins either if need be.

        Args:
            server_round: From 1.
            holds: Whether that is the global model of a job, unchanged.
            read: Its weights, as those of a schema if there is one.
            record: The model as a record, if it is one.
        """
        if self._job_session is not None and self._job_session.is_over(server_round):
            self._job_replace()
        session, given = self._job_session, None
        if session is None or not holds(session):
            given = read(None if session is None else session.job.schema)
            if session is not None:
                session.take_part(given, type(self).__name__)
                given = session.completed(given)
            schema = Schema.of(given)
            if session is not None and session.num_rounds is not None:  # Flower runs one job
                if schema != session.job.schema:
                    session.change_model(schema, type(self).__name__)
            elif session is None or schema != session.job.schema:
                self._job_replace()  # another model: another job
                session, given = self._job_start(given, record), None
        session.guessed = False
        if session.number != server_round - 1 or given is not None:
            session.start_round(server_round - 1, given)
        return session

    def _job_replace(self) -> None:
        """Ends a job in the place of which another begins."""
        try:
            self.close()
        except NothingAggregatedError as error:
            logger.error("the job before ended in vain: %s", error)

    def _job_for(
        self, server_round: int, replies: Iterable[Any], readable: Callable[[], Iterable[WeightDict]]
    ) -> Session | None:
        """The job in which replies count, in this round; begins either if need be.

        Args:
            server_round: From 1.
            replies: What clients sent.
            readable: Gives the weights of those replies that can be read.

        Returns:
            None if there is nothing to begin with.
        """
        session = self._job_session
        if session is not None and not session.takes(server_round, readable()):
            self._job_replace()
            session = None
        if session is None and self.kind is Kind.FULL and any(True for _ in readable()):
            session = self._job_start(FrozenWeights({}), guessed=True)
        if session is None and any(True for _ in replies):
            logger.error("round %d: no reply can be read, and the global model is not known", server_round)
        if session is not None:
            session.enter(server_round - 1)
        return session
