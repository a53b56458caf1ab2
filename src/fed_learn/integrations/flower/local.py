"""`LocalGrid`: nodes in this process, to try a strategy and an app without a SuperLink or Flower's simulation."""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fed_learn.errors import as_failure, described
from fed_learn.integrations.flower.replies import PARTITION_ID

App = Callable[[Message, Context], Message | None]
RUN_ID = 1


class LocalGrid(Grid):
    """Runs an app for each message when its reply is pulled, one after the other, in this process.

    Nodes are numbered from 2 and know their partitions, as `num-partitions` and `partition-id` of the configuration. An
    exception of the app becomes an error in the reply, as with Flower. A reply of None never comes.

    Args:
        app: A `ClientApp`, or any function of a message and a context.
        num_nodes: How many nodes there are.
        run_config: What the app finds as `context.run_config`.

    Example:
        >>> import numpy as np
        >>> from flwr.app import MetricRecord
        >>> from fed_learn.integrations.flower import FedAvg, to_record, to_weights
        >>> def train(message, context):
        ...     w = to_weights(message.content["arrays"])["w"] + 1 + context.node_config["partition-id"]
        ...     metrics = MetricRecord({"num-examples": 10})
        ...     return Message(RecordDict({"arrays": to_record({"w": w}), "metrics": metrics}), reply_to=message)
        >>> strategy = FedAvg(fraction_evaluate=0.0)
        >>> result = strategy.start(LocalGrid(train, 3), to_record({"w": np.zeros(2)}), num_rounds=2)
        >>> to_weights(result.arrays)["w"]
        array([4., 4.])
    """

    def __init__(self, app: App, num_nodes: int, run_config: Mapping[str, Any] | None = None) -> None:
        if TaskIdentity._run_id is None:  # outside of a run: messages cannot be made without
            TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN_ID, RUN_ID, SUPERLINK_NODE_ID
        self._app = app
        self._contexts = {
            SUPERLINK_NODE_ID + 1 + k: Context(
                run_id=RUN_ID,
                node_id=SUPERLINK_NODE_ID + 1 + k,
                node_config={PARTITION_ID: k, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for k in range(num_nodes)
        }
        self._run = Run.create_empty(RUN_ID)
        self._sent: dict[str, Message] = {}
        self._ids = itertools.count(1)

    def set_run(self, run: Run) -> None:
        """Sets the run, which nothing here depends on."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message; Flower's own constructor does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keeps the messages until their replies are pulled."""
        ids = []
        for message in messages:
            # A grid gives the id, and there is no setter.
            message.metadata.__dict__["_message_id"] = f"message-{next(self._ids)}"
            self._sent[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Runs the app for those of these messages for which it has not run yet."""
        for message_id in message_ids:
            sent = self._sent.pop(message_id, None)
            reply = None if sent is None else self._answer(sent)
            if reply is not None:
                yield reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies that there are."""
        return list(self.pull_messages(self.push_messages(messages)))

    def _answer(self, sent: Message) -> Message | None:
        context = self._contexts[sent.metadata.dst_node_id]
        # What an app does to its message stays with it: elsewhere each gets bytes of its own.
        received = Message(copy.deepcopy(sent.content), metadata=sent.metadata)  # type: ignore[call-overload]
        try:
            return self._app(received, context)
        except BaseException as error:  # noqa: BLE001 - a node that fails, or leaves, is one that fails
            as_failure(error)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, described(error)), reply_to=sent)
