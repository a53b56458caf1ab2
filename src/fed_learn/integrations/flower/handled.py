"""What turns a strategy of Flower's into one with our events: a round as a job of ours sees it.

Users derive classes from these and give methods and attributes names of their own, so what belongs to this module alone
has names with two underscores, and what its children replace begins with `_job_`.
"""

import io
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import log_strategy_start_info

from fed_learn.contribution import INITIAL_VALIDATION_METRIC, Contribution, Kind
from fed_learn.errors import FedLearnError
from fed_learn.events import EventHandler, check_handlers
from fed_learn.handlers.model_selection import by_likeness
from fed_learn.integrations.flower.messages import gathers, log_replies, noted, replies_to
from fed_learn.integrations.flower.names import NodeNames, in_one_line
from fed_learn.integrations.flower.one_job import OneJob
from fed_learn.integrations.flower.records import to_weights
from fed_learn.integrations.flower.replies import (
    METADATA,
    SCORE_ONLY,
    SCORES,
    Keys,
    Reply,
    claims_of,
    failure_of,
    metrics_of,
    node_name,
    node_of,
    replies_of,
    without_arrays,
)
from fed_learn.integrations.flower.session import Accepted, Session
from fed_learn.model_meta import ContextKey
from fed_learn.server import JobResult
from fed_learn.weights import FrozenWeights

logger = logging.getLogger("flwr")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass(repr=False)  # Flower's, which is short
class HandledResult(Result):
    """Flower's result, with ours beside it.

    Attributes:
        job: What handlers and checks left behind: the best model, a report per round.
    """

    job: JobResult | None = None


class Handled(OneJob, Strategy):
    """A base beside one of Flower's strategies, whose methods it reaches by `super()`.

    Attributes:
        job: The `Job` that runs or ran last; None before the first. Not in copies and pickles of the strategy.
    """

    weighted_by_key: str = "num-examples"
    arrayrecord_key: str = "arrays"
    configrecord_key: str = "config"

    def _job_set_up(
        self,
        *,
        handlers: Sequence[EventHandler],
        kind: Kind,
        min_contributions: int,
        on_bad_contribution: str,
        on_handler_error: str,
        partial: str,
        validation_metric: str,
        validation_mode: str | None,
        n_iter_key: str,
        poll_interval: float,
        node_names: NodeNames | None,
    ) -> None:
        """Takes the arguments that `FedAvg` describes.

        Raises:
            ValueError: One is out of its range.
            TypeError: A handler lacks `handle_event` or `rollback`.
        """
        if not poll_interval > 0:
            raise ValueError(f"poll_interval must be positive, not {poll_interval!r}")
        self.handlers = check_handlers(handlers)
        self.kind = kind
        self.min_contributions = min_contributions
        self.on_bad_contribution = on_bad_contribution
        self.on_handler_error = on_handler_error
        self.partial = partial
        self.validation_metric = validation_metric
        self.validation_mode = validation_mode
        self.n_iter_key = n_iter_key
        self.poll_interval = poll_interval
        self.node_names = node_names
        self._job_check()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> HandledResult:
        """Runs a job; arguments as of Flower's `Strategy.start`, and its log in Flower's words.

        The clients' evaluation in the last round scores the final model; if there is none, those whose `ClientMod`
        scored the models they received are asked for that score alone.

        Returns:
            Flower's result, `job` beside it.

        Raises:
            ContributionError: A contribution was refused, with `on_bad_contribution="raise"`.
            NothingAggregatedError: No round made a new global model.
            HandlerError: A handler raised, with `on_handler_error="raise"`. What had been done is in the error: as
                `result` the `JobResult` so far, as `handled` what this method would have returned. After any other
                error `strategy.job.result()` has the former.
        """
        logger.info("Starting %s strategy:", type(self).__name__)
        log_strategy_start_info(num_rounds, initial_arrays, train_config, evaluate_config)
        self.summary()
        logger.info("")
        if self.stream and gathers(grid):
            logger.info("\t└──> %s gathers the replies of a round before they are added up", type(grid).__name__)
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        began = time.time()
        self.close()
        result, arrays = HandledResult(), initial_arrays
        session = self._job_start(to_weights(initial_arrays), initial_arrays, num_rounds)
        # Now, before a subclass puts the nodes that it samples in the place of the grid's.
        session.connect(getattr(grid, "get_node_ids", None))
        try:
            with session.job:
                if evaluate_fn:
                    metrics = evaluate_fn(0, arrays)
                    logger.info("Initial global evaluation results: %s", metrics)
                    if metrics is not None:
                        result.evaluate_metrics_serverapp[0] = metrics
                for number in range(1, num_rounds + 1):
                    logger.info("")
                    logger.info("[ROUND %s/%s]", number, num_rounds)
                    arrays = self.__train(grid, number, arrays, train_config, timeout, result)
                    last = number == num_rounds or session.job.stopped
                    self.__evaluate(grid, number, arrays, evaluate_config, timeout, result, last)
                    if evaluate_fn:
                        logger.info("Global evaluation")
                        metrics = evaluate_fn(number, session.whole(arrays))
                        logger.info("\t└──> MetricRecord: %s", metrics)
                        if metrics is not None:
                            result.evaluate_metrics_serverapp[number] = metrics
                    if last:
                        if number < num_rounds:
                            reason = session.job.ctx.get_prop(ContextKey.STOP)
                            logger.info("A handler ends the job after round %s of %s: %s", number, num_rounds, reason)
                        break
                session.finish()
        except FedLearnError as error:
            result.arrays, result.job = session.whole(arrays), session.job.result()
            error.handled = result  # type: ignore[attr-defined] # beside `result`, which every stack has
            raise
        finally:
            self._job_session = None
        job, whole = session.job.result(), session.whole(arrays)
        if not session.holds(arrays):  # a subclass has made something else of the average
            job = replace(job, weights=to_weights(whole, like=session.job.schema))
        result.arrays, result.job = whole, job
        logger.info("")
        logger.info("Strategy execution finished in %.2fs", time.time() - began)
        logger.info("")
        logger.info("Final results:")
        logger.info("")
        for line in io.StringIO(str(result)):
            logger.info("\t%s", line.strip("\n"))
        logger.info("")
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """START_ROUND, which may replace the global model; Flower's messages; SEND_MODEL for each that is left to send.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
            ContributionError: `arrays`, or what a handler put in their place, are no model.
        """
        session = self._job_session
        if session is None or session.num_rounds is None or session.number != server_round - 1:
            session = self.__open(server_round, arrays)
            session.connect(getattr(grid, "get_node_ids", None))
            arrays = session.record
        # What comes next in the order of bases is a strategy of Flower's.
        messages = self.__sent(session, super().configure_train(server_round, arrays, config, grid), server_round)  # type: ignore[safe-super]
        if session.num_rounds is None:  # else a subclass may still leave some out
            for message in messages:
                session.ask(message.metadata.dst_node_id)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """RECEIVE_CONTRIBUTION for each reply, CLIENT_QUIT for each that carries an error; aggregation; END_ROUND.

        Outside of `start`, the global model is the one that `configure_train` was given. Without that, the replies tell
        names, shapes and dtypes, the commonest ones, and only as long as replies have them and rounds count up: the
        method may be called with anything, in any order, as Flower's may.

        Args:
            server_round: From 1.
            replies: To `configure_train`'s messages, in any order. A list, unless the server streams: then `start`
                passes an iterator, which gives each reply once, as soon as it comes.

        Returns:
            The new global model, None if it stands as it was, and of a model of which clients send a part that part;
            and the clients' metrics.

        Raises:
            ContributionError: A contribution was refused, with `on_bad_contribution="raise"`.
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        streams = self.stream
        if replies is None or not streams or self._job_session is None:
            replies = list(replies or ())
        good, failed = self._job_replies(replies)
        listed = replies_of(good) if isinstance(good, list) else []
        session = self._job_for(server_round, good, lambda: self.__readable(listed))
        if session is None:
            return None, None
        try:
            if listed:
                session.expect(claims_of(listed))
                if not session.job.schema:
                    session.widths.note(self.__readable(listed))
                session.selection.expect([reply.score for reply in listed if reply.message.has_content()])
            read = [self.__read(session, reply) for reply in listed]
            session.foresee([sent for _, sent in read])
            for reply, (name, sent) in zip(listed, read, strict=True):
                self.__receive(session, reply, name, sent)
            place = len(listed)
            for message in () if listed else good:  # of a stream
                place += 1
                if message.has_error():
                    failed.append(message)
                else:
                    reply = Reply(message, place)
                    self.__receive(session, reply, *self.__read(session, reply))
                    del reply
                del message  # while the next one is awaited, a streaming server holds none
            if streams:
                log_replies(place - len(failed), failed)
            session.failed = failed
            for message in failed:
                place += 1
                if message.has_error():  # a subclass may put aside others, which just do not count
                    reply = Reply(message, place)
                    self.__receive(session, reply, *self.__read(session, reply))
            accepted = session.accepted
            changed = session.close_round()
        except BaseException:
            session.forget_round()
            raise
        report = session.report
        assert report is not None
        counted = [(name, accepted[name].content) for name in report.accepted if name in accepted]
        metrics = self._job_metrics(counted if report.error is None else [])
        return (session.record if changed else None), metrics

    def close(self, replies: Iterable[Message] = ()) -> JobResult | None:
        """Ends a job that `start` did not run: CLIENT_QUIT and SHUTDOWN. Does nothing if there is none.

        Args:
            replies: Of the last evaluation, by which the final model is scored.

        Raises:
            NothingAggregatedError: No round made a new global model.
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        session, self._job_session = self._job_session, None
        if session is None:
            return None
        with session.job:
            session.begin_final()
            for place, message in enumerate(replies, 1):
                self.__receive_final(session, Reply(message, place))
            session.finish()
        return session.job.result()

    def _job_replies(self, replies: Iterable[Message]) -> tuple[Iterable[Message], list[Message]]:
        """Replies with content, and those that carry an error; what streams is not looked into."""
        raise NotImplementedError

    def _job_called(self, node: Hashable) -> str:
        """What a node is called, as far as is known."""
        return node_name(node) if self._job_session is None else self._job_session.called(node)

    def _job_metrics(self, counted: list[tuple[str, RecordDict]]) -> MetricRecord | None:
        """The metrics of a round, of the replies that counted, by the names of their clients."""
        raise NotImplementedError

    def _job_scores(self, replies: Sequence[Message]) -> None:
        """Takes the clients' scores of the global model from an evaluation."""
        session = self._job_session
        if session is None:
            return
        silent: list[str] = []
        named = self.validation_metric != INITIAL_VALIDATION_METRIC
        if named and self.handlers and not session.final:
            self.__check_scored(session, replies)
        for place, message in enumerate(replies, 1):
            if session.final:
                silent += self.__receive_final(session, Reply(message, place))
            elif message.has_content():
                reply = Reply(message, place)
                metric = self.__with_score(session, reply).get(INITIAL_VALIDATION_METRIC)
                if metric is not None:
                    session.note_score(reply.node, reply.claim, metric)
        if silent and named:
            logger.warning("\t> No %r of the final model from %s", self.validation_metric, in_one_line(silent))

    def _job_weighed(self, replies: list[Message]) -> list[Message]:
        """Replies to an evaluation by whose examples they can be weighted; says once in a job that there are others."""
        session = self._job_session
        if session is None:
            return replies
        names = [
            session.called(node_of(message, place))
            for place, message in enumerate(replies, 1)
            if self.weighted_by_key not in metrics_of(message.content)
        ]
        if names:
            session.told.once(
                "unweighted",
                f"no number {self.weighted_by_key!r} in the evaluation of {in_one_line(names)}: it is not counted in "
                "the aggregated metrics; its score counts where models are selected",
            )
        return [message for message in replies if self.weighted_by_key in metrics_of(message.content)]

    def __check_scored(self, session: Session, replies: Sequence[Message]) -> None:
        """Says once in a job that no reply holds the metric by which models are to be selected."""
        found = [metrics_of(message.content) for message in replies if message.has_content()]
        named = {self.validation_metric, f"initial_{self.validation_metric}"}
        if found and not any(named & metrics.keys() for metrics in found):
            sent = by_likeness(self.validation_metric, {name for metrics in found for name in metrics})
            text = f"no reply to the evaluation holds validation_metric={self.validation_metric!r}; they hold {sent}"
            session.told.once("validation_metric", text)

    def __train(
        self, grid: Grid, number: int, arrays: ArrayRecord, config: ConfigRecord, timeout: float, result: HandledResult
    ) -> ArrayRecord:
        """One round of training; returns the global model after it."""
        session = self.__open(number, arrays)
        sent = session.record
        messages = self.__sent(session, self.configure_train(number, sent, config, grid), number)
        for message in messages:
            session.ask(message.metadata.dst_node_id)
        replies = replies_to(grid, messages, timeout=timeout, poll_interval=self.poll_interval, stream=self.stream)
        del messages
        arrived: dict[Hashable, None] = {}
        session.arrived = arrived
        if isinstance(replies, list):
            arrived.update(dict.fromkeys(node_of(message, place) for place, message in enumerate(replies, 1)))
        else:
            replies = noted(replies, arrived)
        aggregated, metrics = self.aggregate_train(number, replies)
        if session.number is not None:
            if aggregated is not None:
                who = f"{type(self).__name__}.aggregate_train"
                logger.warning("\t> %s does not call super(): handlers see no contribution of this round", who)
            session.end_round(aggregated_elsewhere=aggregated is not None)
        if metrics is not None:
            logger.info("\t└──> Aggregated MetricRecord: %s", metrics)
            result.train_metrics_clientapp[number] = metrics
        return sent if aggregated is None else aggregated

    def __evaluate(
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
        messages = list(self.configure_evaluate(number, arrays, config, grid) or ())
        session = self._job_session
        assert session is not None
        ours = last and bool(self.handlers) and not messages
        if ours:
            messages = self.__questions(session, number, arrays)
        if last and self.handlers:
            session.begin_final(None if session.holds(arrays) else to_weights(session.whole(arrays)))
            for message in messages:
                session.ask(message.metadata.dst_node_id)
        replies = replies_to(grid, messages, timeout=timeout, poll_interval=self.poll_interval)
        if ours:  # no evaluation of the strategy's
            self._job_scores(list(replies))
            return
        metrics = self.aggregate_evaluate(number, replies)
        if metrics is not None:
            logger.info("\t└──> Aggregated MetricRecord: %s", metrics)
            result.evaluate_metrics_clientapp[number] = metrics

    def __questions(self, session: Session, number: int, arrays: ArrayRecord) -> list[Message]:
        """Asks the nodes of the last round whose `ClientMod` scores for the score of the final model alone."""
        content = RecordDict({self.arrayrecord_key: arrays, METADATA: ConfigRecord({SCORE_ONLY: True})})
        asked = [node for node in session.scorers if node in session.contributed and isinstance(node, int)]
        if not asked:
            logger.info(
                "the final model is not scored by clients: for that, give their ClientApp a ClientMod(validate=...), "
                "or the strategy a fraction_evaluate above 0"
            )
        return [Message(content, node, session.scorers[node], group_id=str(number)) for node in asked]

    def __open(self, server_round: int, arrays: ArrayRecord) -> Session:
        return self._job_open(
            server_round, lambda session: session.holds(arrays), lambda schema: to_weights(arrays, like=schema), arrays
        )

    def __sent(self, session: Session, messages: Iterable[Message] | None, server_round: int) -> list[Message]:
        """The messages, each of which states its round from now on."""
        sent = list(messages or ())
        # A strategy that uses group ids in its own way tells nothing of rounds by them.
        session.states_round = all(message.metadata.group_id in ("", str(server_round)) for message in sent)
        for message in sent:
            if not message.metadata.group_id:
                message.metadata.group_id = str(server_round)
        return sent

    def __readable(self, replies: Iterable[Reply]) -> Iterator[FrozenWeights]:
        """The weights of those replies that can be read."""
        for reply in replies:
            weights = reply.weights(self.arrayrecord_key)
            if weights is not None:
                yield weights

    def __read(self, session: Session, reply: Reply) -> tuple[str, Contribution | Exception]:
        """See `Session.read`."""
        message = reply.message

        def read(name: str) -> Contribution:
            if message.has_error():
                raise failure_of(message, reply.node)
            if reply.stated.get(SCORES) is True:
                session.scorers[reply.node] = message.metadata.message_type
            metrics = session.with_score(name, session.selection.kept(name, reply.metrics, reply.score))
            keys = Keys(self.weighted_by_key, self.n_iter_key, self.arrayrecord_key)
            return reply.contribution(
                name, keys, session.job.schema, self.kind, metrics, states_round=session.states_round
            )

        return session.read(reply.node, reply.claim, read)

    def __receive(self, session: Session, reply: Reply, name: str, sent: Contribution | Exception) -> None:
        contribution = session.receive(reply.node, name, sent)
        if contribution is not None:
            message = None if self.stream else reply.message
            content = without_arrays(reply.message.content) if self.stream else reply.message.content
            session.accepted[contribution.contributor] = Accepted(content, contribution, message)

    def __receive_final(self, session: Session, reply: Reply) -> list[str]:
        """Takes a score of the final model; returns whom there is none from."""
        message = reply.message

        def read() -> dict[str, Any]:
            if message.has_error():
                raise failure_of(message, reply.node)
            return self.__with_score(session, reply)

        if not message.has_error() and INITIAL_VALIDATION_METRIC not in self.__with_score(session, reply):
            return [node_name(reply.node)]
        session.receive_final(reply.node, reply.claim, read)
        return []

    def __with_score(self, session: Session, reply: Reply) -> dict[str, Any]:
        """The metrics of an evaluation, the one to select by under the name that handlers know."""
        who = session.called(reply.node)
        metrics = session.selection.kept(who, reply.metrics, reply.score, [self.validation_metric])
        if self.validation_metric in metrics:
            metrics.setdefault(INITIAL_VALIDATION_METRIC, metrics[self.validation_metric])
        return metrics
