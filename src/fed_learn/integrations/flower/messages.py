"""Messages out, and their replies in: all of them at once, or one by one as they arrive."""

import logging
import math
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fed_learn.errors import printable
from fed_learn.integrations.flower.records import record_bytes
from fed_learn.integrations.flower.replies import array_records, node_of

logger = logging.getLogger("flwr")

GROWTH = 1.5
"""Each wait for replies is so many times as long as the one before."""
LONGEST_WAIT = 4.0
"""Seconds to which waits grow; Flower's own grid waits for 3."""
IN_FLIGHT = 2
"""Replies for which a streaming server asks at once: what it holds beyond its sums."""
IN_FLIGHT_BYTES = 32 << 20
"""It asks for more than that as long as they take no more memory than this: every question is a request."""


def gathers(grid: Any) -> bool:
    """Whether a grid has a `send_and_receive` of its own, which is to be used, beyond pushing and pulling messages.

    So it is with what only looks like a grid, and with a class, or an instance, that has replaced nothing but this
    method, such as one that retries or counts.
    """
    if not issubclass(type(grid), Grid):
        return True
    places = [getattr(grid, "__dict__", {}), *map(vars, type(grid).__mro__)]

    def depth(method: str) -> int:
        return next(i for i, names in enumerate(places) if method in names)

    return depth("send_and_receive") < min(depth("push_messages"), depth("pull_messages"))


def replies_to(
    grid: Grid, messages: Iterable[Message], *, timeout: float | None, poll_interval: float, stream: bool = False
) -> Iterable[Message]:
    """Sends messages at once, and gives their replies in the order of their arrival.

    Looks for replies at once, after `poll_interval`, and then after waits that grow by half each time, to
    `LONGEST_WAIT` or the interval that the grid itself keeps: a short round ends soon, and a long one asks the
    SuperLink no more often than Flower does.

    Args:
        grid: Flower's, or one of the user's.
        messages: What to send.
        timeout: Seconds to wait for replies; None: for ever. After that, those that have come are all there are.
        poll_interval: Seconds of the first wait.
        stream: Give each reply as soon as it is here, and keep none. Else a list.
    """
    sent = list(messages)
    if gathers(grid):
        found: Iterable[Message] = grid.send_and_receive(messages=sent, timeout=timeout)
        by_id = {message.metadata.message_id: message for message in sent}
        return [_from_its_node(reply, by_id) for reply in (() if found is None else found)]
    ids = [message_id for message_id in (grid.push_messages(sent) if sent else ()) if message_id]
    by_id = {message.metadata.message_id: message for message in sent}
    if len(ids) < len(sent):
        logger.warning("%d of %d messages could not be sent", len(sent) - len(ids), len(sent))
    at_once = max(IN_FLIGHT, IN_FLIGHT_BYTES // max(1, _size(sent))) if stream else len(ids)
    replies = _pull(grid, ids, by_id, at_once, timeout, poll_interval)
    return replies if stream else list(replies)


def log_replies(results: int, failed: Sequence[Message], what: str = "aggregate_train") -> None:
    """What Flower's strategies log of the replies of a round, each error in a line of its own, whatever it says."""
    if results or failed:
        logger.info("%s: Received %s results and %s failures", what, results, len(failed))
    for message in failed:
        reason = printable(str(message.error.reason))
        logger.info("\t> Received error in reply from node %d: %s", message.metadata.src_node_id, reason)


def noted(replies: Iterable[Message], arrived: dict[Hashable, None]) -> Iterator[Message]:
    """Replies as they arrive; which nodes they are from is noted."""
    for place, message in enumerate(replies, 1):
        arrived[node_of(message, place)] = None
        yield message
        del message  # while the next one is awaited, a streaming server holds none


def _pull(
    grid: Grid, ids: list[str], sent: Mapping[str, Message], at_once: int, timeout: float | None, poll_interval: float
) -> Iterator[Message]:
    end = math.inf if timeout is None else time.monotonic() + timeout
    # A grid in this process says how often it may be asked, and asking costs nothing.
    longest = getattr(grid, "pull_interval", max(LONGEST_WAIT, poll_interval))
    wait = min(poll_interval, longest)
    while ids:
        left: list[str] = []
        for start in range(0, len(ids), at_once):
            some = ids[start : start + at_once]
            pulled = list(grid.pull_messages(some))
            answered = {reply.metadata.reply_to_message_id for reply in pulled}
            left += [message_id for message_id in some if message_id not in answered]
            while pulled:
                yield _from_its_node(pulled.pop(0), sent)
        ids = left
        remaining = end - time.monotonic()
        if not ids or remaining <= 0:
            return
        time.sleep(min(wait, remaining))
        wait = min(wait * GROWTH, longest)


def _size(messages: list[Message]) -> int:
    """Bytes of the model that a message holds, and its reply with it."""
    return max((sum(map(record_bytes, array_records(message.content))) for message in messages[:1]), default=0)


def _from_its_node(reply: Message, sent: Mapping[str, Message]) -> Message:
    """The reply; where the grid says in its own name that a node's is lost, in the name of that node."""
    asked = sent.get(reply.metadata.reply_to_message_id)
    if asked is None or not reply.has_error() or reply.metadata.src_node_id == asked.metadata.dst_node_id:
        return reply
    return Message(reply.error, reply_to=asked)
