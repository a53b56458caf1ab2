"""How replies are looked for in Flower: how many requests a round takes, and whose `send_and_receive` is used."""

from collections.abc import Iterable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from flower_parts import Busy, Clock, adding, content, first, record, requests_of_flower
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fed_learn.integrations.flower import FedAvg, LocalGrid, WithHandlers, messages


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(messages, "time", made)
    return made


def sent(grid: Grid) -> list[Message]:
    arrays = record(w=np.zeros(2))
    return list(FlowerFedAvg().configure_train(1, arrays, ConfigRecord(), grid))


# Seconds until the last node has answered → our requests.
REQUESTS = {0: 1, 0.1: 2, 1: 4, 10: 9, 60: 21, 300: 81, 3600: 906}


@pytest.mark.parametrize("nodes", [2, 400])
@pytest.mark.parametrize("seconds", REQUESTS)
def test_a_long_round_takes_no_more_requests_than_with_flower(clock: Clock, seconds: float, nodes: int) -> None:
    grid = Busy(clock, nodes, lambda number: seconds * number / nodes)
    replies = list(messages.replies_to(grid, sent(grid), timeout=3600 * 24, poll_interval=0.25))
    assert len(replies) == nodes
    assert len(grid.requests) == REQUESTS[seconds]
    assert seconds < 60 or len(grid.requests) <= requests_of_flower(seconds)
    assert clock.now <= min(1.5 * seconds + 0.25, seconds + 4)
    assert grid.requests[0] == (0, nodes)


def test_a_stream_asks_for_few_large_replies_at_once_and_backs_off_too(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room, at_once in ((0, messages.IN_FLIGHT), (messages.IN_FLIGHT_BYTES, 400)):
        monkeypatch.setattr(messages, "IN_FLIGHT_BYTES", room)
        clock.now = 0
        grid = Busy(clock, 400, lambda number: 60.0)
        replies = messages.replies_to(grid, sent(grid), timeout=None, poll_interval=0.25, stream=True)
        assert len(list(replies)) == 400
        assert {count for _, count in grid.requests} == {at_once}
        assert grid.most == at_once
        assert len(grid.requests) == REQUESTS[60] * 400 // at_once


def test_what_has_not_come_in_time_is_looked_for_once_more_at_the_end(clock: Clock) -> None:
    grid = Busy(clock, 3, lambda number: 5.0 * number)
    replies = list(messages.replies_to(grid, sent(grid), timeout=10.0, poll_interval=0.25))
    assert len(replies) == 2
    assert clock.now == grid.requests[-1][0] == 10.0


def test_a_grid_in_this_process_is_asked_as_often_as_it_says(clock: Clock) -> None:
    grid = Busy(clock, 3, lambda number: 60.0)
    grid.pull_interval = 0.1  # type: ignore[attr-defined] # as Flower's in-memory grid has it
    assert len(list(messages.replies_to(grid, sent(grid), timeout=None, poll_interval=0.25))) == 3
    assert clock.now == pytest.approx(60.0, abs=0.11)


def test_a_longer_first_wait_is_kept(clock: Clock) -> None:
    grid = Busy(clock, 3, lambda number: 60.0)
    assert len(list(messages.replies_to(grid, sent(grid), timeout=None, poll_interval=20.0))) == 3
    assert [now for now, _ in grid.requests] == [0, 20, 40, 60]


class Retrying(LocalGrid):
    """Overrides nothing but `send_and_receive`."""

    calls = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        self.calls += 1
        return super().send_and_receive(messages, timeout=timeout)


class Duck:
    """No grid of Flower's, and good enough for its strategies."""

    def __init__(self, grid: LocalGrid) -> None:
        self.grid, self.calls = grid, 0

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        self.calls += 1
        return self.grid.send_and_receive(messages, timeout=timeout)


def test_whose_send_and_receive_is_used() -> None:
    class Pulling(Retrying):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return super().pull_messages(message_ids)

    patched = LocalGrid(adding, 2)
    assert not messages.gathers(patched)
    patched.send_and_receive = lambda messages, *, timeout=None: []  # type: ignore[method-assign]
    assert messages.gathers(patched)
    assert messages.gathers(Retrying(adding, 2))
    assert not messages.gathers(Pulling(adding, 2))
    assert messages.gathers(Duck(LocalGrid(adding, 2)))
    assert messages.gathers(Mock(spec=Grid))
    assert messages.gathers(Mock())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("make", [lambda: Retrying(adding, 3), lambda: Duck(LocalGrid(adding, 3))])
def test_a_grid_with_its_own_way_to_gather_replies_is_used_by_it(
    make: Any, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    grid = make()
    result = FedAvg(stream=stream).start(grid, record(w=np.zeros(2)), num_rounds=2)
    assert grid.calls == 4
    assert first(result.arrays) == [2.0, 2.0]
    told = [r.getMessage() for r in caplog.records if "gathers the replies" in r.getMessage()]
    assert len(told) == int(stream)


def test_a_mock_of_a_grid_works_as_in_flower() -> None:
    def grid() -> Any:
        made = Mock(spec=Grid)
        made.get_node_ids.return_value = [2, 3]

        def answer(messages: Iterable[Message], timeout: float | None) -> list[Message]:
            return [Message(content([4.0]), reply_to=m) for m in messages if m.metadata.message_type == "train"]

        made.send_and_receive.side_effect = answer
        return made

    LocalGrid(adding, 1)  # messages can be made from here on
    strategies = FlowerFedAvg(), FedAvg(), WithHandlers(FlowerFedAvg())
    results = [strategy.start(grid(), record(**{"0": np.zeros(1)}), num_rounds=1) for strategy in strategies]
    assert [first(result.arrays) for result in results] == [[4.0]] * 3


def test_a_grid_that_gives_none_gives_no_replies() -> None:
    class Nothing(LocalGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Any:
            return None

    assert messages.replies_to(Nothing(adding, 2), [], timeout=None, poll_interval=1.0) == []


def test_a_reply_that_the_grid_says_is_lost_is_its_nodes() -> None:
    class Losing(Retrying):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Any:
            listed = list(messages)
            replies = list(super().send_and_receive(listed, timeout=timeout))
            if not listed:
                return replies
            lost = Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "gone"), reply_to=listed[0])
            lost.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
            return [lost, *replies[1:]]

    result = FedAvg(fraction_evaluate=0.0).start(Losing(adding, 3), record(w=np.zeros(1)), num_rounds=1)
    assert result.job is not None
    assert len(result.job.quits) == 1
    assert result.job.quits[0].contributor in {"node-2", "node-3", "node-4"}
    assert first(result.arrays) == [1.0]


def test_a_message_without_arrays_is_small(clock: Clock) -> None:
    grid = Busy(clock, 3, lambda number: 0.0, app=lambda message, context: Message(content(1.0), reply_to=message))
    queries = [Message(RecordDict({}), node, "query") for node in grid.get_node_ids()]
    assert len(list(messages.replies_to(grid, queries, timeout=None, poll_interval=1.0, stream=True))) == 3
    assert len(grid.requests) == 1
