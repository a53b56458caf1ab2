"""`JobLoop`: Flower's loop of rounds, `Strategy.start`, around which a job runs.

It asks nodes, waits for replies and keeps what `start` returns. What becomes of the replies of a round is left to
`JobStrategy`, which is derived from it.
"""

import io
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import log_strategy_start_info

from fed_learn.errors import FedLearnError
from fed_learn.integrations.flower.flower_job import FlowerJob
from fed_learn.integrations.flower.messages import gathers, noted, replies_to
from fed_learn.integrations.flower.records import to_weights
from fed_learn.integrations.flower.replies import METADATA, SCORE_ONLY, node_of
from fed_learn.integrations.flower.scoring import take_scores
from fed_learn.integrations.flower.strategy_base import StrategyBase
from fed_learn.model_meta import ContextKey
from fed_learn.server import JobResult

logger = logging.getLogger("flwr")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass(repr=False)  # Flower's, which is short
class StrategyResult(Result):
    """Flower's result, with ours beside it.

    Attributes:
        job: What handlers and checks left behind: the best model, a report per round.
    """

    job: JobResult | None = None


@dataclass(frozen=True)
class _Call:
    """What one call of `start` was told, and what it returns."""

    grid: Grid
    timeout: float
    train_config: ConfigRecord
    evaluate_config: ConfigRecord
    result: StrategyResult


class JobLoop(StrategyBase, Strategy):
    """A base of strategies of Flower's Message API: it calls their methods in the order of rounds.

    Attributes:
        arrayrecord_key: The key of the model in messages.
        poll_interval: Seconds from the first look for replies to the second.
    """

    arrayrecord_key: str = "arrays"
    poll_interval: float

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> StrategyResult:
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
        began = time.time()
        self.close()
        result, arrays = StrategyResult(), initial_arrays
        call = _Call(
            grid,
            timeout,
            ConfigRecord() if train_config is None else train_config,
            ConfigRecord() if evaluate_config is None else evaluate_config,
            result,
        )
        running = self._job_start(to_weights(initial_arrays), initial_arrays, num_rounds)
        # Now, before a subclass puts the nodes that it samples in the place of the grid's.
        running.names.connected = getattr(grid, "get_node_ids", None)
        try:
            with running.job:
                if evaluate_fn:
                    metrics = evaluate_fn(0, arrays)
                    logger.info("Initial global evaluation results: %s", metrics)
                    if metrics is not None:
                        result.evaluate_metrics_serverapp[0] = metrics
                for number in range(1, num_rounds + 1):
                    logger.info("")
                    logger.info("[ROUND %s/%s]", number, num_rounds)
                    arrays = self.__train(call, number, arrays)
                    last = number == num_rounds or running.job.stopped
                    self.__evaluate(call, number, arrays, last=last)
                    if evaluate_fn:
                        logger.info("Global evaluation")
                        metrics = evaluate_fn(number, running.model.whole(arrays))
                        logger.info("\t└──> MetricRecord: %s", metrics)
                        if metrics is not None:
                            result.evaluate_metrics_serverapp[number] = metrics
                    if last:
                        if number < num_rounds:
                            reason = running.job.ctx.get_prop(ContextKey.STOP)
                            logger.info("A handler ends the job after round %s of %s: %s", number, num_rounds, reason)
                        break
                running.finish()
        except FedLearnError as error:
            result.arrays, result.job = running.model.whole(arrays), running.job.result()
            error.handled = result  # type: ignore[attr-defined] # beside `result`, which every stack has
            raise
        finally:
            self._job_running = None
        job, whole = running.job.result(), running.model.whole(arrays)
        if not running.model.holds(arrays):  # a subclass has made something else of the average
            job = replace(job, weights=to_weights(whole, like=running.job.schema))
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

    def _job_scores(self, replies: Sequence[Message]) -> None:
        """Takes the clients' scores of the global model from an evaluation."""
        if self._job_running is not None:
            take_scores(self._job_running, replies, self.validation_metric)

    def _job_open_for(self, server_round: int, arrays: ArrayRecord) -> FlowerJob:
        """The job with this global model, in this round; begins either if need be."""
        return self._job_open(
            server_round,
            lambda running: running.model.holds(arrays),
            lambda schema: to_weights(arrays, like=schema),
            arrays,
        )

    def _job_stated(self, running: FlowerJob, messages: Iterable[Message] | None, server_round: int) -> list[Message]:
        """The messages, each of which states its round from now on."""
        sent = list(messages or ())
        # A strategy that uses group ids in its own way tells nothing of rounds by them.
        running.states_round = all(message.metadata.group_id in ("", str(server_round)) for message in sent)
        for message in sent:
            if not message.metadata.group_id:
                message.metadata.group_id = str(server_round)
        return sent

    def __train(self, call: _Call, number: int, arrays: ArrayRecord) -> ArrayRecord:
        """One round of training; returns the global model after it."""
        running = self._job_open_for(number, arrays)
        sent = running.model.record
        messages = self._job_stated(running, self.configure_train(number, sent, call.train_config, call.grid), number)
        for message in messages:
            running.ask(message.metadata.dst_node_id)
        replies = replies_to(
            call.grid, messages, timeout=call.timeout, poll_interval=self.poll_interval, stream=self.stream
        )
        del messages
        arrived: dict[Hashable, None] = {}
        running.answers.arrived = arrived
        if isinstance(replies, list):
            arrived.update(dict.fromkeys(node_of(message, place) for place, message in enumerate(replies, 1)))
        else:
            replies = noted(replies, arrived)
        aggregated, metrics = self.aggregate_train(number, replies)
        if running.number is not None:
            if aggregated is not None:
                who = f"{type(self).__name__}.aggregate_train"
                logger.warning("\t> %s does not call super(): handlers see no contribution of this round", who)
            running.end_round(aggregated_elsewhere=aggregated is not None)
        if metrics is not None:
            logger.info("\t└──> Aggregated MetricRecord: %s", metrics)
            call.result.train_metrics_clientapp[number] = metrics
        return sent if aggregated is None else aggregated

    def __evaluate(self, call: _Call, number: int, arrays: ArrayRecord, *, last: bool) -> None:
        """The clients' evaluation after a round."""
        messages = list(self.configure_evaluate(number, arrays, call.evaluate_config, call.grid) or ())
        running = self._job_running
        assert running is not None
        ours = last and bool(self.handlers) and not messages
        if ours:
            messages = self.__questions(running, number, arrays)
        if last and self.handlers:
            running.begin_final(None if running.model.holds(arrays) else to_weights(running.model.whole(arrays)))
            for message in messages:
                running.ask(message.metadata.dst_node_id)
        replies = replies_to(call.grid, messages, timeout=call.timeout, poll_interval=self.poll_interval)
        if ours:  # no evaluation of the strategy's
            self._job_scores(list(replies))
            return
        metrics = self.aggregate_evaluate(number, replies)
        if metrics is not None:
            logger.info("\t└──> Aggregated MetricRecord: %s", metrics)
            call.result.evaluate_metrics_clientapp[number] = metrics

    def __questions(self, running: FlowerJob, number: int, arrays: ArrayRecord) -> list[Message]:
        """Asks the nodes of the last round whose `ClientMod` scores for the score of the final model alone."""
        content = RecordDict({self.arrayrecord_key: arrays, METADATA: ConfigRecord({SCORE_ONLY: True})})
        asked = [node for node in running.scorers if node in running.answers.contributed and isinstance(node, int)]
        if not asked:
            logger.info(
                "the final model is not scored by clients: for that, give their ClientApp a ClientMod(validate=...), "
                "or the strategy a fraction_evaluate above 0"
            )
        return [Message(content, node, running.scorers[node], group_id=str(number)) for node in asked]
