"""What the replies to an evaluation say of the global model: scores, by which models are selected.

A score of the last evaluation is one of the final model; any other is its client's score of the model that it receives
in the next round. What becomes of scores is left to `FlowerJob`, the mean of the clients' metrics to `metrics`.
"""

import logging
from collections.abc import Sequence
from typing import Any

from flwr.app import Message

from fed_learn.contribution import INITIAL_VALIDATION_METRIC
from fed_learn.handlers.model_selection import by_likeness
from fed_learn.integrations.flower.flower_job import FlowerJob
from fed_learn.integrations.flower.names import in_one_line
from fed_learn.integrations.flower.replies import Reply, failure_of, metrics_of, node_name, node_of

logger = logging.getLogger("flwr")


def take_scores(running: FlowerJob, replies: Sequence[Message], metric: str) -> None:
    """Takes the clients' scores of the global model, or of the final one, from an evaluation.

    Args:
        running: The job.
        replies: To the evaluation.
        metric: By which models are selected.
    """
    silent: list[str] = []
    named = metric != INITIAL_VALIDATION_METRIC
    if named and running.job.handlers and not running.final:
        _check_scored(running, replies, metric)
    for place, message in enumerate(replies, 1):
        reply = Reply(message, place)
        if running.final:
            silent += take_final_score(running, reply, metric)
        elif message.has_content():
            _take_score(running, reply, metric)
    if silent and named:
        logger.warning("\t> No %r of the final model from %s", metric, in_one_line(silent))


def _take_score(running: FlowerJob, reply: Reply, metric: str) -> None:
    """Takes a client's score of the model that it receives in the next round, if its reply holds one."""
    score = _with_score(running, reply, metric).get(INITIAL_VALIDATION_METRIC)
    if score is not None:
        running.note_score(reply.node, lambda: reply.claim, score)


def take_final_score(running: FlowerJob, reply: Reply, metric: str) -> list[str]:
    """Takes a score of the final model; returns whom there is none from."""
    message = reply.message

    def read() -> dict[str, Any]:
        if message.has_error():
            raise failure_of(message, reply.node)
        return _with_score(running, reply, metric)

    if not message.has_error() and INITIAL_VALIDATION_METRIC not in _with_score(running, reply, metric):
        return [node_name(reply.node)]
    running.receive_final(reply.node, lambda: reply.claim, read)
    return []


def with_weight(running: FlowerJob, replies: list[Message], key: str) -> list[Message]:
    """Replies to an evaluation that can be weighed by their number under a key; says once in a job who has none."""
    names = [
        running.names.called(node_of(message, place))
        for place, message in enumerate(replies, 1)
        if key not in metrics_of(message.content)
    ]
    if names:
        running.told.once(
            "unweighted",
            f"no number {key!r} in the evaluation of {in_one_line(names)}: it is not counted in the aggregated "
            "metrics; its score counts where models are selected",
        )
    return [message for message in replies if key in metrics_of(message.content)]


def _check_scored(running: FlowerJob, replies: Sequence[Message], metric: str) -> None:
    """Says once in a job that no reply holds the metric by which models are to be selected."""
    found = [metrics_of(message.content) for message in replies if message.has_content()]
    named = {metric, f"initial_{metric}"}
    if found and not any(named & metrics.keys() for metrics in found):
        sent = by_likeness(metric, {name for metrics in found for name in metrics})
        text = f"no reply to the evaluation holds validation_metric={metric!r}; they hold {sent}"
        running.told.once("validation_metric", text)


def _with_score(running: FlowerJob, reply: Reply, metric: str) -> dict[str, Any]:
    """The metrics of an evaluation, the one to select by under the name that handlers know."""
    who = running.names.called(reply.node)
    metrics = running.selection.kept(who, reply.metrics, reply.score, [metric])
    if metric in metrics:
        metrics.setdefault(INITIAL_VALIDATION_METRIC, metrics[metric])
    return metrics
