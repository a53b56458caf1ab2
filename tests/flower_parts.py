"""Small parts for tests of the strategies in Flower: nodes that add one, a clock that never waits, made-up replies."""

import math
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import Mock

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict

from fed_learn.integrations.flower import LocalGrid


def adding(message: Message, context: Context) -> Message:
    """A node that adds one to the model; it has ten examples and a loss, and says in an evaluation what it received."""
    received: Any = message.content["arrays"]
    arrays = received.to_numpy_ndarrays()
    metrics: dict[str, Any] = {"num-examples": 10}
    if message.metadata.message_type.startswith("evaluate"):
        return Message(
            RecordDict({"m": MetricRecord({**metrics, "accuracy": float(arrays[0].flat[0])})}), reply_to=message
        )
    named = dict(zip(received, (array + 1 for array in arrays), strict=True))
    return Message(RecordDict({"a": record(**named), "m": MetricRecord({**metrics, "loss": 0.5})}), reply_to=message)


def record(**arrays: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def content(*arrays: Any, examples: float = 1, **metrics: Any) -> RecordDict:
    """What a client sends."""
    made = ArrayRecord([np.asarray(array) for array in arrays])
    return RecordDict({"arrays": made, "metrics": MetricRecord({"num-examples": examples, **metrics})})


def mock_reply(*arrays: Any, examples: float = 1) -> Any:
    """A reply as Flower's own unit tests make it."""
    message = Mock(spec=Message)
    message.content = content(*arrays, examples=examples)
    message.has_error.side_effect = lambda: False
    message.has_content.side_effect = lambda: True
    return message


def first(arrays: ArrayRecord | None) -> Any:
    """The values of the first array."""
    assert arrays is not None
    return arrays.to_numpy_ndarrays()[0].tolist()


class Clock:
    """In the place of the module `time`: sleeping takes no time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


class Busy(LocalGrid):
    """Nodes that answer when a clock says so; counts the requests that a SuperLink would get."""

    def __init__(
        self, clock: Clock, nodes: int, answers_at: Callable[[int], float], app: Callable[..., Any] = adding
    ) -> None:
        super().__init__(app, nodes)
        self.clock, self.answers_at = clock, answers_at
        self.requests: list[tuple[float, int]] = []
        self.most = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        self.requests.append((self.clock.now, len(ids)))
        ready = [i for i in ids if self.answers_at(int(i.removeprefix("message-"))) <= self.clock.now]
        replies = list(super().pull_messages(ready))
        self.most = max(self.most, len(replies))
        return replies


def requests_of_flower(seconds: float) -> int:
    """How often Flower's own grid asks for a reply that comes after so many seconds."""
    return math.ceil(seconds / 3) + 1
