"""What turns a strategy of Flower's into one with our events: a round as a job of ours sees it."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fed_learn.contribution import INITIAL_VALIDATION_METRIC, Contribution, Kind
from fed_learn.errors import ContributionError
from fed_learn.events import EventHandler, check_handlers
from fed_learn.integrations.flower.exchange import replies_to
from fed_learn.integrations.flower.records import to_weights
from fed_learn.integrations.flower.replies import (
    METADATA,
    SCORE_ONLY,
    SCORES,
    Keys,
    claimed_name,
    contribution_of,
    failure_of,
    first_weights,
    metrics_of,
    states,
)
from fed_learn.integrations.flower.session import Aggregate, Session
from fed_learn.server import JobResult
from fed_learn.server.job import Job
from fed_learn.weights import Schema, WeightDict

logger = logging.getLogger("flwr")


@dataclass
class HandledResult(Result):
    """Flower's result, with ours beside it.

    Attributes:
        job: What handlers and checks left behind: the best model, a report per round.
    """

    job: JobResult | None = None


class Handled(Strategy):
    """A base beside one of Flower's strategies, whose methods it reaches by `super()`.

    Attributes:
        job: The `Job` that runs or ran last; None before the first.
    """

    weighted_by_key: str = "num-examples"
    arrayrecord_key: str = "arrays"
    configrecord_key: str = "config"

    def _set_up(
        self,
        *,
        handlers: Sequence[EventHandler],
        kind: Kind,
        min_contributions: int,
        validation_metric: str,
        n_iter_key: str,
        poll_interval: float,
        aggregate: Aggregate | None = None,
        **settings: Any,
    ) -> None:
        """Takes the arguments that `FedAvg` describes.

        Raises:
            ValueError: One is out of its range.
            TypeError: A handler lacks `handle_event` or `rollback`.
        """
        if not poll_interval > 0:
            raise ValueError(f"poll_interval must be positive, not {poll_interval!r}")
        self.handlers = check_handlers(handlers)
        self.kind = Kind(kind)
        self.validation_metric = validation_metric
        self.n_iter_key = n_iter_key
        self.poll_interval = poll_interval
        self._settings = {"kind": self.kind, "min_contributions": min_contributions, "aggregate": aggregate, **settings}
        self.job: Job | None = None
        self._session: Session | None = None
        self._kept: dict[str, Any] = {}
        self._scorers: dict[Any, str] = {}  # nodes whose mod scores → the type of the messages that reach it
        self._final = False
        self._states_round = True
        self._begin({"nothing": np.zeros(1)}, None, 1, handlers=())  # refuses what a job would refuse later

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> HandledResult:
        """Runs a job; arguments as of Flower's `Strategy.start`.

        Replies are taken as they arrive. The clients' evaluation in the last round scores the final model; if there is
        none, those whose `ClientMod` scored the models they received are asked for that score alone.

        Returns:
            Flower's result, `job` beside it.

        Raises:
            ContributionError: A contribution was refused, with `on_bad_contribution="raise"`.
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        logger.info("Starting %s strategy:", type(self).__name__)
        self.summary()
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        self.close()
        result, arrays = HandledResult(), initial_arrays
        session = self._start_job(to_weights(initial_arrays), initial_arrays, num_rounds)
        try:
            with session.job:
                _evaluate_here(evaluate_fn, 0, arrays, result)
                for number in range(1, num_rounds + 1):
                    logger.info("[ROUND %s/%s]", number, num_rounds)
                    arrays = self._train(grid, number, arrays, train_config, timeout, result)
                    last = number == num_rounds or session.job.stopped
                    self._evaluate(grid, number, arrays, evaluate_config, timeout, result, last)
                    _evaluate_here(evaluate_fn, number, arrays, result)
                    if last:
                        break
                session.finish()
            job = session.job.result()
            if arrays is not session.record:  # a subclass has made something else of the average
                job = replace(job, weights=to_weights(arrays, like=session.job.schema))
            result.arrays, result.job = arrays, job
        finally:
            self._session, self._final = None, False
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """START_ROUND, which may replace the global model; Flower's messages; SEND_MODEL for each."""
        under_way = self._session is not None and self._session.number == server_round - 1
        session = self._open(server_round, arrays)
        arrays = arrays if under_way else session.record
        # What comes next in the order of bases is a strategy of Flower's.
        messages = super().configure_train(server_round, arrays, config, grid)  # type: ignore[safe-super]
        return self._sent(messages, server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """RECEIVE_CONTRIBUTION for each reply, as soon as it comes; aggregation; END_ROUND.

        Outside of `start`, the global model is the one that `configure_train` was given; without that, the first reply
        that can be read tells names, shapes and dtypes.

        Args:
            server_round: From 1.
            replies: To `configure_train`'s messages, in any order; any iterable.

        Returns:
            The new global model, None if it stands as it was; and the clients' metrics.

        Raises:
            ContributionError: A contribution was refused, with `on_bad_contribution="raise"`.
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        if self._session is None:
            replies = list(replies)
            if not self._begin_from(replies):
                logger.error("round %d: no reply can be read, and the global model is not known", server_round)
                return None, None
        session = self._open(server_round, None)
        try:
            for message in replies:
                contribution = self._receive(session, message)
                if contribution is not None:
                    self._kept[contribution.contributor] = self._keep(message, contribution)
                del message, contribution  # while the next one is awaited, a streaming server holds none
            changed = session.close_round()
            report = session.job.reports[-1]
            counted = [self._kept[name] for name in report.accepted if name in self._kept]
            metrics = self._metrics_of_round(counted) if report.error is None else None
        finally:
            self._kept = {}
        return (session.record if changed else None), metrics

    def close(self, replies: Iterable[Message] = ()) -> JobResult | None:
        """Ends a job that `start` did not run: CLIENT_QUIT and SHUTDOWN. Does nothing if there is none.

        Args:
            replies: Of the last evaluation, by which the final model is scored.
        """
        session, self._session = self._session, None
        if session is None:
            return None
        with session.job:
            session.begin_final()
            for message in replies:
                self._receive_final(session, message)
            session.finish()
        return session.job.result()

    def _keep(self, message: Message, contribution: Contribution) -> Any:
        """What is kept of an accepted reply, and of the contribution in it, until the round is over."""
        raise NotImplementedError

    def _metrics_of_round(self, kept: list[Any]) -> MetricRecord | None:
        """The metrics of the clients whose contributions counted."""
        raise NotImplementedError

    def _score(self, replies: Iterable[Message]) -> list[Message]:
        """Takes the clients' scores of the global model from an evaluation; returns the replies that have content."""
        good: list[Message] = []
        for message in replies:
            session = self._session
            if session is not None and self._final:
                self._receive_final(session, message)
            elif session is not None and message.has_content():
                self._note_score(session, message)
            if message.has_content():
                good.append(message)
            else:
                logger.info("\t> %s", failure_of(message))
        return good

    def _train(
        self, grid: Grid, number: int, arrays: ArrayRecord, config: ConfigRecord, timeout: float, result: HandledResult
    ) -> ArrayRecord:
        """One round of training; returns the global model after it."""
        sent = self._open(number, arrays).record
        messages = self._sent(self.configure_train(number, sent, config, grid), number)
        replies = replies_to(grid, messages, timeout=timeout, poll_interval=self.poll_interval)
        del messages
        aggregated, metrics = self.aggregate_train(number, replies)
        if metrics is not None:
            logger.info("\t└──> Aggregated MetricRecord: %s", metrics)
            result.train_metrics_clientapp[number] = metrics
        return sent if aggregated is None else aggregated

    def _evaluate(
        self,
        grid: Grid,
        number: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        timeout: float,
        result: HandledResult,
        last: bool,
    ) -> None:
        """The clients' evaluation after a round."""
        messages = list(self.configure_evaluate(number, arrays, config, grid))
        session = self._session
        assert session is not None
        ours = last and bool(self.handlers) and not messages
        if ours:
            messages = self._questions(session, number, arrays)
        if last and self.handlers:
            self._final = True
            session.begin_final(None if arrays is session.record else to_weights(arrays, like=session.job.schema))
            for message in messages:
                session.ask(message.metadata.dst_node_id)
        replies = replies_to(grid, messages, timeout=timeout, poll_interval=self.poll_interval)
        if ours:  # no evaluation of the strategy's
            self._score(replies)
            return
        metrics = self.aggregate_evaluate(number, replies)
        if metrics is not None:
            logger.info("\t└──> Aggregated MetricRecord: %s", metrics)
            result.evaluate_metrics_clientapp[number] = metrics

    def _questions(self, session: Session, number: int, arrays: ArrayRecord) -> list[Message]:
        """Asks the nodes of the last round whose `ClientMod` scores for the score of the final model alone."""
        content = RecordDict({self.arrayrecord_key: arrays, METADATA: ConfigRecord({SCORE_ONLY: True})})
        asked = [node for node in self._scorers if node in session.contributed]
        if not asked:
            logger.info(
                "the final model is not scored by clients: for that, give their ClientApp a ClientMod(validate=...), "
                "or the strategy a fraction_evaluate above 0"
            )
        return [Message(content, node, self._scorers[node], group_id=str(number)) for node in asked]

    def _begin(
        self, weights: WeightDict, record: ArrayRecord | None, num_rounds: int | None, handlers: Sequence[EventHandler]
    ) -> Session:
        return Session(weights, record, num_rounds=num_rounds, handlers=handlers, **self._settings)

    def _open(self, server_round: int, arrays: ArrayRecord | None) -> Session:
        """The job, in this round; begins either if need be."""
        if arrays is not None and self._session is not None and self._session.is_over(server_round):
            self.close()
        session = self._session
        given = None
        if arrays is not None and (session is None or arrays is not session.record):
            given = to_weights(arrays, like=None if session is None else session.job.schema)
            if session is None or Schema.of(given) != session.job.schema:
                if session is not None and session.num_rounds is not None:  # `start` runs one job
                    session.job.schema.check(given, f"global model of {type(self).__name__}")
                self.close()  # another model: another job
                session, given = self._start_job(given, arrays), None
        assert session is not None
        if session.number != server_round - 1:
            session.start_round(server_round - 1, given)
        return session

    def _start_job(self, weights: WeightDict, record: ArrayRecord | None, num_rounds: int | None = None) -> Session:
        session = self._begin(weights, record, num_rounds, self.handlers)
        session.job.start()
        self._session, self.job = session, session.job
        self._scorers = {}
        return session

    def _begin_from(self, replies: list[Message]) -> bool:
        """Begins a job with the model of the first reply that holds one; False if none does."""
        for weights in first_weights(replies) if self.kind is Kind.FULL else ():
            try:
                self._start_job(weights, None)
            except ContributionError:  # it will be refused as a contribution too, with the reason
                continue
            return True
        return False

    def _sent(self, messages: Iterable[Message], server_round: int) -> list[Message]:
        """SEND_MODEL for each message, which from now on states its round."""
        listed = list(messages)
        # A strategy that uses group ids in its own way tells nothing of rounds by them.
        self._states_round = all(message.metadata.group_id in ("", str(server_round)) for message in listed)
        for message in listed:
            if not message.metadata.group_id:
                message.metadata.group_id = str(server_round)
            if self._session is not None:
                self._session.ask(message.metadata.dst_node_id)
        return listed

    def _receive(self, session: Session, message: Message) -> Contribution | None:
        keys = Keys(self.weighted_by_key, self.n_iter_key)

        def read(name: str) -> Contribution:
            if message.has_error():
                raise failure_of(message)
            if states(message.content, SCORES):
                self._scorers[message.metadata.src_node_id] = message.metadata.message_type
            found = contribution_of(message, name, keys, session.job.schema, self.kind)
            return found if self._states_round or METADATA in message.content else replace(found, round=None)

        return session.receive(message.metadata.src_node_id, lambda: _claim(message), read)

    def _receive_final(self, session: Session, message: Message) -> None:
        def read() -> dict[str, Any]:
            if message.has_error():
                raise failure_of(message)
            return self._with_score(message)

        if message.has_error() or INITIAL_VALIDATION_METRIC in self._with_score(message):
            session.receive_final(message.metadata.src_node_id, lambda: _claim(message), read)
        else:
            logger.info("\t> node-%d reports no %r", message.metadata.src_node_id, self.validation_metric)

    def _note_score(self, session: Session, message: Message) -> None:
        metric = self._with_score(message).get(INITIAL_VALIDATION_METRIC)
        if metric is not None:
            session.note_score(message.metadata.src_node_id, lambda: _claim(message), metric)

    def _with_score(self, message: Message) -> dict[str, Any]:
        """The metrics of an evaluation, the one to select by under the name that handlers know."""
        metrics = metrics_of(message.content)
        if self.validation_metric in metrics:
            metrics.setdefault(INITIAL_VALIDATION_METRIC, metrics[self.validation_metric])
        return metrics


def _claim(message: Message) -> str | None:
    return claimed_name(message.content, message.metadata.src_node_id) if message.has_content() else None


def _evaluate_here(
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    number: int,
    arrays: ArrayRecord,
    result: HandledResult,
) -> None:
    """Flower's own evaluation on the server."""
    metrics = None if evaluate_fn is None else evaluate_fn(number, arrays)
    if metrics is not None:
        logger.info("Global evaluation: %s", metrics)
        result.evaluate_metrics_serverapp[number] = metrics
