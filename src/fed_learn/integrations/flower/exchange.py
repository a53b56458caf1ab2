"""Messages out, replies in one by one as they arrive."""

import logging
import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

logger = logging.getLogger("flwr")

IN_FLIGHT = 2
"""Replies that are pulled at once: what the server holds beyond its sums."""


def replies_to(
    grid: Grid, messages: Iterable[Message], *, timeout: float | None, poll_interval: float
) -> Iterator[Message]:
    """Sends messages at once, and yields each reply when it has come.

    Args:
        grid: Flower's.
        messages: What to send.
        timeout: Seconds to wait for replies; None: for ever. After that, those that have come are all there are.
        poll_interval: Seconds between two looks.

    Returns:
        The replies, in the order of their arrival; they are not kept here.
    """
    batch = list(messages)
    pushed = list(grid.push_messages(batch)) if batch else []
    by_id = {message.metadata.message_id: message for message in batch}
    waiting = [message_id for message_id in pushed if message_id]
    if len(waiting) < len(batch):
        logger.warning("%d of %d messages could not be sent", len(batch) - len(waiting), len(batch))
    return _pull(grid, waiting, by_id, timeout, poll_interval)


def _pull(
    grid: Grid, waiting: list[str], sent: dict[str, Message], timeout: float | None, poll_interval: float
) -> Iterator[Message]:
    end = None if timeout is None else time.monotonic() + timeout
    while waiting:
        left: list[str] = []
        for start in range(0, len(waiting), IN_FLIGHT):
            some = waiting[start : start + IN_FLIGHT]
            pulled = list(grid.pull_messages(some))
            answered = {reply.metadata.reply_to_message_id for reply in pulled}
            left += [message_id for message_id in some if message_id not in answered]
            while pulled:
                yield _from_its_node(pulled.pop(0), sent)
        found = len(left) < len(waiting)
        waiting = left
        if end is not None and time.monotonic() >= end:
            break
        if waiting and not found:
            time.sleep(poll_interval)
    if waiting:
        logger.warning("%d nodes have not answered within %s s", len(waiting), timeout)


def _from_its_node(reply: Message, sent: dict[str, Message]) -> Message:
    """The reply; where the grid says in its own name that a node's is lost, in the name of that node."""
    asked = sent.get(reply.metadata.reply_to_message_id)
    if asked is None or not reply.has_error() or reply.metadata.src_node_id == asked.metadata.dst_node_id:
        return reply
    return Message(reply.error, reply_to=asked)
