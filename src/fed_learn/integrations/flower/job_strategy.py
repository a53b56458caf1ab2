"""`JobStrategy`: a strategy of Flower's whose rounds are rounds of a `Job`, with its checks and events.

A class is derived from it and from a strategy of Flower's, in this order, and its rounds are those of a job whoever
calls them: our own `start` (see `job_loop`), a loop of the user's, or a unit test. What a job makes of nodes and
replies is left to `FlowerJob`, what replies say to `replies` and `scoring`.

Users derive classes from this one and give methods and attributes names of their own, so what belongs to this module
alone has names with two underscores, and what children replace begins with `_job_`.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fed_learn.contribution import Contribution, Kind
from fed_learn.events import EventHandler, check_handlers
from fed_learn.integrations.flower.answers import Accepted
from fed_learn.integrations.flower.flower_job import FlowerJob
from fed_learn.integrations.flower.job_loop import JobLoop
from fed_learn.integrations.flower.messages import log_replies
from fed_learn.integrations.flower.names import NodeNames
from fed_learn.integrations.flower.replies import (
    SCORES,
    Keys,
    Reply,
    claims_of,
    failure_of,
    node_name,
    replies_of,
    without_arrays,
)
from fed_learn.integrations.flower.scoring import take_final_score
from fed_learn.server import JobResult
from fed_learn.weights import FrozenWeights


class JobStrategy(JobLoop):
    """A base beside one of Flower's strategies, whose methods it reaches by `super()`.

    Attributes:
        job: The `Job` that runs or ran last; None before the first. Not in copies and pickles of the strategy.
    """

    weighted_by_key: str = "num-examples"
    configrecord_key: str = "config"
    n_iter_key: str

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

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """START_ROUND, which may replace the global model; Flower's messages; SEND_MODEL for each that is left to send.

        Raises:
            HandlerError: A handler raised, with `on_handler_error="raise"`.
            ContributionError: `arrays`, or what a handler put in their place, are no model.
        """
        running = self._job_running
        if running is None or running.num_rounds is None or running.number != server_round - 1:
            running = self._job_open_for(server_round, arrays)
            running.names.connected = getattr(grid, "get_node_ids", None)
            arrays = running.model.record
        # What comes next in the order of bases is a strategy of Flower's.
        messages = self._job_stated(running, super().configure_train(server_round, arrays, config, grid), server_round)  # type: ignore[safe-super]
        if running.num_rounds is None:  # else a subclass may still leave some out
            for message in messages:
                running.ask(message.metadata.dst_node_id)
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
        if replies is None or not self.stream or self._job_running is None or self._job_running.guessed:
            replies = list(replies or ())
        good, failed = self._job_replies(replies)
        listed = replies_of(good) if isinstance(good, list) else []
        running = self._job_for(server_round, good, lambda: self.__readable(listed))
        if running is None:
            return None, None
        try:
            if listed:
                self.__receive_listed(running, listed)
                place = len(listed)
            else:
                place = self.__receive_one_by_one(running, good, failed)
            if self.stream:
                log_replies(place - len(failed), failed)
            running.failed = failed
            for number, message in enumerate(failed, place + 1):
                if message.has_error():  # a subclass may put aside others, which just do not count
                    reply = Reply(message, number)
                    self.__receive(running, reply, *self.__read(running, reply))
            accepted = running.accepted
            changed = running.close_round()
        except BaseException:
            running.forget_round()
            raise
        report = running.report
        assert report is not None
        counted = [(name, accepted[name].content) for name in report.accepted if name in accepted]
        metrics = self._job_metrics(counted if report.error is None else [])
        return (running.model.record if changed else None), metrics

    def close(self, replies: Iterable[Message] = ()) -> JobResult | None:
        """Ends a job that `start` did not run: CLIENT_QUIT and SHUTDOWN. Does nothing if there is none.

        Args:
            replies: Of the last evaluation, by which the final model is scored.

        Raises:
            NothingAggregatedError: No round made a new global model.
            HandlerError: A handler raised, with `on_handler_error="raise"`.
        """
        running, self._job_running = self._job_running, None
        if running is None:
            return None
        with running.job:
            running.begin_final()
            for place, message in enumerate(replies, 1):
                take_final_score(running, Reply(message, place), self.validation_metric)
            running.finish()
        return running.job.result()

    def _job_replies(self, replies: Iterable[Message]) -> tuple[Iterable[Message], list[Message]]:
        """Replies with content, and those that carry an error; what streams is not looked into."""
        raise NotImplementedError

    def _job_called(self, node: Hashable) -> str:
        """What a node is called, as far as is known."""
        return node_name(node) if self._job_running is None else self._job_running.names.called(node)

    def _job_metrics(self, counted: list[tuple[str, RecordDict]]) -> MetricRecord | None:
        """The metrics of a round, of the replies that counted, by the names of their clients."""
        raise NotImplementedError

    def __readable(self, replies: Iterable[Reply]) -> Iterator[FrozenWeights]:
        """The weights of those replies that can be read."""
        for reply in replies:
            weights = reply.weights(self.arrayrecord_key)
            if weights is not None:
                yield weights

    def __receive_listed(self, running: FlowerJob, replies: list[Reply]) -> None:
        """Receives the replies of a round, all of which are at hand: what one is depends on none that came before."""
        running.names.expect(claims_of(replies))
        if not running.job.schema:
            running.widths.note(self.__readable(replies))
        running.selection.expect([reply.score for reply in replies if reply.message.has_content()])
        read = [self.__read(running, reply) for reply in replies]
        running.job.foresee([sent for _, sent in read])
        for reply, (name, sent) in zip(replies, read, strict=True):
            self.__receive(running, reply, name, sent)

    def __receive_one_by_one(self, running: FlowerJob, messages: Iterable[Message], failed: list[Message]) -> int:
        """Receives the replies of a stream, and puts aside those that carry an error; returns how many there were."""
        place = 0
        for message in messages:
            place += 1
            if message.has_error():
                failed.append(message)
            else:
                reply = Reply(message, place)
                self.__receive(running, reply, *self.__read(running, reply))
                del reply
            del message  # while the next one is awaited, a streaming server holds none
        return place

    def __read(self, running: FlowerJob, reply: Reply) -> tuple[str, Contribution | Exception]:
        """What a client sent, by its name; see `FlowerJob.read`."""
        message = reply.message

        def read(name: str) -> Contribution:
            if message.has_error():
                raise failure_of(message, reply.node)
            if reply.records.stated.get(SCORES) is True:
                running.scorers[reply.node] = message.metadata.message_type
            selection = running.selection
            metrics = selection.with_score(name, selection.kept(name, reply.metrics, reply.score))
            keys = Keys(self.weighted_by_key, self.n_iter_key, self.arrayrecord_key)
            return reply.contribution(
                name, keys, running.job.schema, self.kind, metrics, states_round=running.states_round
            )

        return running.read(reply.node, lambda: reply.claim, read)

    def __receive(self, running: FlowerJob, reply: Reply, name: str, sent: Contribution | Exception) -> None:
        contribution = running.receive(reply.node, name, sent)
        if contribution is not None:
            message = None if self.stream else reply.message
            content = without_arrays(reply.message.content) if self.stream else reply.message.content
            running.accepted[contribution.contributor] = Accepted(content, contribution, message)
