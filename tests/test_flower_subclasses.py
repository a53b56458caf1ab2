"""What subclasses and unit tests do with Flower's strategies: each does the same with ours, beside Flower's own."""

# mypy: disable-error-code="misc"
# Each class is derived from Flower's strategy and from ours in turn.

import copy
import logging
import pickle
from collections.abc import Iterable, Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from flower_parts import adding, content, first, mock_reply, record
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedMedian,
    FedTrimmedAvg,
    QFedAvg,
    Strategy,
)
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

import fed_learn as fl
from fed_learn.integrations.flower import FedAvg, LocalGrid, WithHandlers, to_record, to_weights

BOTH = pytest.mark.parametrize("base", [FlowerFedAvg, FedAvg])


def run(strategy: Strategy, rounds: int = 3, nodes: int = 3, app: Any = adding, **more: Any) -> Any:
    return strategy.start(LocalGrid(app, nodes), record(w=np.zeros(2)), num_rounds=rounds, **more)


# Replies


@BOTH
def test_replies_are_a_list_that_can_be_read_again(base: Any) -> None:
    class Mine(base):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            assert len(replies) == sum(1 for reply in replies if reply.has_content()) == 3
            assert replies[0] is next(iter(replies))
            return super().aggregate_train(server_round, replies)

        def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
            assert len(replies) == sum(1 for reply in replies if reply.has_content()) == 3
            return super().aggregate_evaluate(server_round, replies)

    result = run(Mine())
    assert first(result.arrays) == [3.0, 3.0]
    assert dict(result.evaluate_metrics_clientapp[3]) == {"accuracy": 3.0}


def test_replies_of_a_stream_can_be_read_once_and_those_of_an_evaluation_again() -> None:
    class Mine(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            assert isinstance(replies, Iterator)
            return super().aggregate_train(server_round, replies)

        def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
            assert len(replies) == 3
            return super().aggregate_evaluate(server_round, replies)

    assert first(run(Mine(stream=True)).arrays) == [3.0, 3.0]


@BOTH
def test_a_subclass_filters_replies(base: Any) -> None:
    class Mine(base):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return super().aggregate_train(server_round, [r for r in replies if r.metadata.src_node_id != 2])

    strategy = Mine(min_train_nodes=3, fraction_evaluate=0.0)
    assert first(run(strategy).arrays) == [3.0, 3.0]


def failing(message: Message, context: Context) -> Message:
    if context.node_config["partition-id"] == 0:
        raise MemoryError("no room")
    return adding(message, context)


@pytest.mark.parametrize("make", [FlowerFedAvg, FedAvg, lambda **sampling: WithHandlers(FlowerFedAvg(**sampling))])
def test_a_node_that_fails_costs_no_round_whatever_is_sampled(make: Any) -> None:
    strategy = make(min_train_nodes=3, min_available_nodes=3, fraction_evaluate=0.0)
    assert first(run(strategy, app=failing).arrays) == [3.0, 3.0]


def test_the_users_own_threshold_holds() -> None:
    strategy = FedAvg(min_contributions=3, fraction_evaluate=0.0)
    grid = LocalGrid(failing, 3)
    replies = grid.send_and_receive(strategy.configure_train(1, record(w=np.zeros(2)), ConfigRecord(), grid))
    assert strategy.aggregate_train(1, replies) == (None, None)
    assert strategy.job is not None
    assert isinstance(strategy.job.reports[0].error, fl.TooFewContributionsError)
    assert FedAvg(min_train_nodes=7).min_contributions == 1
    assert WithHandlers(FlowerFedAvg(min_train_nodes=7)).min_contributions == 1


# A pure function


@BOTH
def test_replies_of_mocks_are_averaged(base: Any) -> None:
    strategy = base()
    arrays, metrics = strategy.aggregate_train(1, [mock_reply([1.0]), mock_reply([3.0], examples=3)])
    assert first(arrays) == [2.5]
    assert dict(metrics) == {}


def test_replies_of_no_node_are_named_by_their_places() -> None:
    LocalGrid(adding, 1)
    strategy = FedAvg()
    bare = [Message(content([x]), 9, "train") for x in (1.0, 2.0)]  # as instructions, from the server itself
    unnamed = mock_reply([6.0])
    unnamed.metadata.src_node_id = "three"
    arrays, _ = strategy.aggregate_train(1, [*bare, unnamed])
    assert first(arrays) == [3.0]
    assert strategy.job is not None
    assert strategy.job.reports[0].accepted == ("reply-1", "reply-2", "reply-3")


def test_an_error_of_a_mock_is_a_failure_of_its_place(caplog: pytest.LogCaptureFixture) -> None:
    failed = Mock(spec=Message)
    failed.has_error.side_effect = lambda: True
    failed.has_content.side_effect = lambda: False
    failed.metadata.src_node_id = 17
    failed.error = Error(3, "no room")
    strategy = FedAvg()
    assert first(strategy.aggregate_train(1, [failed, mock_reply([3.0])])[0]) == [3.0]
    assert strategy.job is not None
    assert [str(quit.error) for quit in strategy.job.reports[0].quits] == ["node-17: no room (code 3)"]
    assert caplog.text.count("no room") == 1


CALLS: list[tuple[int, list[list[Any]], list[float]]] = [
    # Round, the arrays of each reply, the mean.
    (1, [[[1.0]], [[3.0]]], [2.0]),
    (1, [[[1.0]], [[5.0]]], [3.0]),  # again
    (2, [[[1.0, 1.0]], [[3.0, 5.0]]], [2.0, 3.0]),  # another shape
    (2, [[[1.0], [0.0]], [[3.0], [0.0]]], [2.0]),  # another name
    (7, [[[1.0], [0.0]], [[5.0], [0.0]]], [3.0]),  # a later round
    (3, [[[1.0], [0.0]], [[7.0], [0.0]]], [4.0]),  # an earlier one
    (0, [[[9.0]]], [9.0]),
]


@pytest.mark.parametrize("make", [FlowerFedAvg, FedAvg, lambda: FedAvg(stream=True), lambda: WithHandlers(FedMedian())])
@pytest.mark.parametrize("group", ["", "5", None])
def test_aggregate_train_is_a_pure_function(make: Any, group: str | None) -> None:
    LocalGrid(adding, 1)
    strategy = make()
    for number, arrays, mean in CALLS:
        if group is None:
            replies = [mock_reply(*each) for each in arrays]
        else:
            asked = [Message(RecordDict({}), node, "train", group_id=group) for node in range(2, 2 + len(arrays))]
            replies = [Message(content(*each), reply_to=m) for m, each in zip(asked, arrays, strict=True)]
        assert first(strategy.aggregate_train(number, replies)[0]) == mean


def test_partitions_may_be_others_in_the_next_call() -> None:
    LocalGrid(adding, 1)
    strategy = FedAvg()
    for number, names in ((1, (0, 1)), (2, (1, 0))):
        asked = [Message(RecordDict({}), node, "train") for node in (2, 3)]
        replies = [
            Message(content([4.0], **{"partition-id": k}), reply_to=m) for m, k in zip(asked, names, strict=True)
        ]
        assert first(strategy.aggregate_train(number, replies)[0]) == [4.0]
    assert strategy.job is not None
    assert [report.accepted for report in strategy.job.reports] == [("partition-0", "partition-1")] * 2


def test_a_guessed_job_goes_on_with_later_rounds_even_if_one_reply_is_bad() -> None:
    strategy = FedAvg()
    strategy.aggregate_train(1, [mock_reply([1.0])])
    first_job = strategy.job
    strategy.aggregate_train(2, [mock_reply([1.0, 2.0]), mock_reply([5.0])])
    assert strategy.job is first_job
    assert strategy.job is not None
    assert [failure.cause for failure in strategy.job.reports[1].rejected] == ["ShapeError"]
    strategy.aggregate_train(2, [mock_reply([5.0])])
    assert strategy.job is not first_job


@BOTH
def test_no_replies_give_nothing(base: Any) -> None:
    assert base().aggregate_train(1, []) == (None, None)
    assert base().aggregate_evaluate(1, []) is None


def test_a_round_that_was_broken_off_can_be_done_again() -> None:
    strategy = FedAvg(on_bad_contribution="raise")
    good, bad = mock_reply([1.0]), mock_reply([np.nan])
    strategy.aggregate_train(1, [good])
    with pytest.raises(fl.NonFiniteError, match="reply-2"):
        strategy.aggregate_train(2, [good, bad])
    assert first(strategy.aggregate_train(2, [good, mock_reply([3.0])])[0]) == [2.0]


# Hooks


@BOTH
def test_a_subclass_may_give_nothing(base: Any) -> None:
    class Mine(base):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            aggregated = super().aggregate_train(server_round, replies)
            return (None, None) if server_round == 2 else (aggregated[0], None)

    result = run(Mine())
    assert first(result.arrays) == [2.0, 2.0]
    assert result.train_metrics_clientapp == {}
    assert len(result.evaluate_metrics_clientapp) == 3


@BOTH
def test_a_subclass_may_make_another_model(base: Any) -> None:
    class Mine(base):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            if server_round == 1:
                return record(**{k: a.numpy().astype(np.float32) for k, a in arrays.items()}), metrics
            doubled = {k: a.numpy() * 2 for k, a in arrays.items()}
            return record(**{**doubled, "more": np.zeros(3, np.float32)}), metrics

    class Selected(Mine):
        def __init__(self) -> None:
            super().__init__(handlers=[fl.ModelSelectionHandler()], validation_metric="accuracy")

    result = run(Selected() if base is FedAvg else Mine())
    assert {k: a.numpy().tolist() for k, a in result.arrays.items()} == {"w": [10.0, 10.0], "more": [0.0] * 3}
    assert {str(a.dtype) for a in result.arrays.values()} == {"float32"}
    if base is FedAvg:
        assert {k: a.tolist() for k, a in result.job.weights.items()} == {"w": [10.0, 10.0], "more": [0.0] * 3}
        # Scored by the clients' evaluation of what the subclass made.
        assert (result.job.best.round, result.job.best.metric) == (3, 10.0)


@BOTH
def test_a_subclass_may_change_the_average_in_place(base: Any) -> None:
    class Mine(base):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            for name in arrays:
                arrays[name] = Array(arrays[name].numpy() * 2)
            return arrays, metrics

    result = run(Mine())
    assert first(result.arrays) == pytest.approx([14.0, 14.0])
    if base is FedAvg:
        assert result.job.weights["w"].tolist() == [14.0, 14.0]


@BOTH
def test_a_subclass_may_aggregate_by_itself(base: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Mine(base):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return record(w=max(r.content["a"]["w"].numpy() for r in [*replies][:1]) * np.ones(2)), None

    result = run(Mine(), rounds=2)
    assert first(result.arrays) == [2.0, 2.0]
    if base is FedAvg:
        assert [(r.round, r.accepted, r.error) for r in result.job.reports] == [(0, (), None), (1, (), None)]
        assert caplog.text.count("Mine.aggregate_train does not call super()") == 2


@BOTH
def test_a_subclass_may_aggregate_several_groups(base: Any) -> None:
    class Mine(base):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            listed = sorted(replies, key=lambda r: r.metadata.src_node_id)
            groups = [
                first(super(Mine, self).aggregate_train(server_round, part)[0]) for part in (listed[:2], listed[2:])
            ]
            return record(w=np.mean(groups, axis=0)), None

    assert first(run(Mine()).arrays) == [3.0, 3.0]


@BOTH
def test_messages_may_come_from_a_generator_and_to_nobody(base: Any) -> None:
    class Mine(base):
        def configure_train(self, server_round: int, *others: Any) -> Any:
            if server_round != 2:
                yield from super().configure_train(server_round, *others)

        def configure_evaluate(self, *others: Any) -> Any:
            return None

    class Patient(LocalGrid):
        def push_messages(self, messages: Iterable[Message] | None) -> Iterable[str]:
            return super().push_messages(messages or [])  # as Flower's grid of a deployment

    result = Mine().start(Patient(adding, 3), record(w=np.zeros(2)), num_rounds=3)
    assert first(result.arrays) == [2.0, 2.0]
    assert list(result.train_metrics_clientapp) == [1, 3]
    assert result.evaluate_metrics_clientapp == {}
    if base is FedAvg:
        assert [(len(r.accepted), r.error) for r in result.job.reports] == [(3, None), (0, None), (3, None)]


@BOTH
def test_a_job_of_evaluations_alone(base: Any, caplog: pytest.LogCaptureFixture) -> None:
    result = run(base(fraction_train=0.0), rounds=2)
    assert {n: dict(m) for n, m in result.evaluate_metrics_clientapp.items()} == {
        1: {"accuracy": 0.0},
        2: {"accuracy": 0.0},
    }
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


@BOTH
def test_a_subclass_sends_something_else(base: Any) -> None:
    class Mine(base):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            doubled = record(w=arrays["w"].numpy() + 10)
            messages = list(super().configure_train(server_round, doubled, config, grid))
            for message in messages:
                message.metadata.message_type = "train.custom"
            return messages

    assert first(run(Mine()).arrays) == [33.0, 33.0]


@BOTH
def test_a_subclass_looks_through_the_replies_in_its_own_way(base: Any) -> None:
    class Mine(base):
        def _check_and_log_replies(self, replies: Any, is_train: bool) -> Any:
            good, failed = super()._check_and_log_replies(replies, is_train)
            return good[:1], [*failed, *good[1:]]

    result = run(Mine(train_metrics_aggr_fn=lambda contents, key: MetricRecord({"count": len(contents)})))
    assert first(result.arrays) == [3.0, 3.0]
    assert dict(result.train_metrics_clientapp[3]) == {"count": 1}


@BOTH
def test_what_a_subclass_calls_its_own_is_its_own(base: Any) -> None:
    class Mine(base):
        def __init__(self) -> None:
            super().__init__()
            self._session = self._kept = self._final = self._settings = self.grid = "mine"

        def _sample(self, messages: Any) -> Any:
            return list(messages)[:2]

        def _train(self) -> None: ...

        def _evaluate(self) -> None: ...

        def _open(self) -> None: ...

        def configure_train(self, *others: Any) -> Any:
            self.grid = others[3]
            return self._sample(super().configure_train(*others))

        def summary(self) -> None:
            super().summary()
            self._settings = "told"

    strategy = Mine()
    assert first(run(strategy).arrays) == [3.0, 3.0]
    assert isinstance(strategy.grid, LocalGrid)
    assert (strategy._session, strategy._settings) == ("mine", "told")


@pytest.mark.parametrize("make", [FedAvg, lambda: WithHandlers(FlowerFedAvg())])
def test_strategies_can_be_copied_and_pickled_at_any_time(make: Any) -> None:
    strategy = make()
    made = [copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))]
    run(strategy)
    made += [copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))]
    strategy.aggregate_train(1, [mock_reply([1.0])])
    made += [copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))]
    assert [other.job for other in made] == [None] * 6
    assert [first(run(other).arrays) for other in made] == [[3.0, 3.0]] * 6


@BOTH
def test_an_evaluation_on_the_server_may_give_none(base: Any) -> None:
    seen: list[Any] = []
    result = run(base(), evaluate_fn=lambda number, arrays: seen.append((number, first(arrays))))
    assert seen == [(n, [float(n)] * 2) for n in range(4)]
    assert result.evaluate_metrics_serverapp == {}


@BOTH
def test_no_rounds_are_run_if_none_are_asked_for(base: Any) -> None:
    result = run(base(), rounds=0, evaluate_fn=lambda number, arrays: MetricRecord({"n": number}))
    assert {n: dict(m) for n, m in result.evaluate_metrics_serverapp.items()} == {0: {"n": 0}}


def test_of_several_records_the_one_named_like_the_model_counts() -> None:
    def app(message: Message, context: Context) -> Message:
        sent: Any = message.content["model"]
        own = {"state": record(c=np.zeros(5)), "model": record(w=sent["w"].numpy() + 1)}
        return Message(RecordDict({**own, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    strategy = FedAvg(arrayrecord_key="model", fraction_evaluate=0.0)
    assert first(run(strategy, app=app).arrays) == [3.0, 3.0]
    other = FedAvg(on_bad_contribution="raise")
    reply = mock_reply([1.0])
    reply.content = RecordDict({"a": record(w=[1.0]), "b": record(w=[1.0]), "m": MetricRecord({"num-examples": 1})})
    with pytest.raises(fl.WeightsTypeError, match="has 2 ArrayRecords, and none of them is called 'arrays'"):
        other.aggregate_train(1, [mock_reply([1.0]), reply])


# Results


@pytest.mark.parametrize("show", [str, repr])
def test_a_result_is_printed_as_shortly_as_flowers(show: Any) -> None:
    def app(message: Message, context: Context) -> Message:
        return Message(
            RecordDict({"a": message.content["arrays"], "m": MetricRecord({"num-examples": 1})}), reply_to=message
        )

    large = ArrayRecord([np.zeros(100_000)])
    theirs, ours = (
        base(fraction_evaluate=0.0).start(LocalGrid(app, 2), large, num_rounds=1) for base in (FlowerFedAvg, FedAvg)
    )
    assert show(ours) == show(theirs)
    assert "ArrayRecord (0.763 MB)" in show(ours)


def test_what_ends_a_job_has_what_was_done_until_then() -> None:
    class Late(fl.Handler):
        def start_round(self, ctx: fl.FLContext) -> None:
            if ctx[fl.ContextKey.ROUND] == 2:
                raise RuntimeError("on purpose")

    with pytest.raises(fl.HandlerError, match="on purpose") as caught:
        run(FedAvg(handlers=[Late()]))
    handled = caught.value.handled
    assert first(handled.arrays) == [2.0, 2.0]
    assert handled.job.weights["w"].tolist() == [2.0, 2.0]
    assert [len(report.accepted) for report in handled.job.reports] == [3, 3]
    assert list(handled.train_metrics_clientapp) == list(handled.evaluate_metrics_clientapp) == [1, 2]


def test_a_refused_contribution_that_ends_a_job_and_a_late_failure_lose_nothing() -> None:
    def spoiling(message: Message, context: Context) -> Message:
        reply: Any = adding(message, context)
        if message.content["config"]["server-round"] == 3 and message.metadata.message_type == "train":
            reply.content["a"]["w"] = Array(np.array([np.nan, 0]))
        return reply  # type: ignore[no-any-return]

    with pytest.raises(fl.NonFiniteError) as caught:
        run(FedAvg(on_bad_contribution="raise"), app=spoiling)
    assert first(caught.value.handled.arrays) == caught.value.handled.job.weights["w"].tolist() == [2.0, 2.0]

    class AtEnd(fl.Handler):
        def shutdown(self, ctx: fl.FLContext) -> None:
            raise RuntimeError("on purpose")

    with pytest.raises(fl.HandlerError) as late:
        run(FedAvg(handlers=[AtEnd()]))
    assert first(late.value.handled.arrays) == late.value.result.weights["w"].tolist() == [3.0, 3.0]


# Strategies inside


def test_the_errors_of_nodes_reach_the_strategy_inside() -> None:
    # With a node missing the noise would be too small for what is promised: Flower's wrapper then skips the round.
    inner = DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 0.0, 1e6, 3)
    strategy = WithHandlers(inner)
    grid = LocalGrid(failing, 3)
    replies = grid.send_and_receive(strategy.configure_train(1, record(w=np.zeros(2)), ConfigRecord(), grid))
    assert strategy.aggregate_train(1, replies) == (None, None)
    assert strategy.job is not None
    assert "aggregated nothing" in str(strategy.job.reports[0].error)


def test_a_strategy_inside_may_give_metrics_alone() -> None:
    class Mine(FlowerFedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            return (None if server_round == 2 else arrays), metrics

    result = run(WithHandlers(Mine()))
    assert first(result.arrays) == [2.0, 2.0]
    assert {n: dict(m) for n, m in result.train_metrics_clientapp.items()} == {n: {"loss": 0.5} for n in (1, 2, 3)}


def reporting(**metrics: Any) -> Any:
    def app(message: Message, context: Context) -> Message:
        node = context.node_config["partition-id"]
        reply: Any = adding(message, context)
        for name, values in metrics.items():
            reply.content["m"][name.replace("_", "-")] = values[node]
        return reply  # type: ignore[no-any-return]

    return app


@pytest.mark.parametrize(
    ("inner", "app", "word"),
    [
        (FlowerFedAvg(fraction_evaluate=0.0), reporting(each=([1.0], [1.0, 2.0], 3.0)), "FedAvg cannot aggregate"),
        (FedTrimmedAvg(beta=0.4, fraction_evaluate=0.0), reporting(loss=([1.0], 2.0, 3.0)), "FedTrimmedAvg cannot"),
        (QFedAvg(0.1, fraction_evaluate=0.0), reporting(), "Missing or invalid training loss"),
    ],
)
def test_what_clients_send_makes_a_round_of_flowers_strategies_fail_and_no_run_end(
    inner: Strategy, app: Any, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    def mixed(message: Message, context: Context) -> Message:
        good = message.content["config"]["server-round"] != 2
        reply: Any = adding(message, context) if good else app(message, context)
        if good:
            reply.content["m"]["train_loss"] = 0.5
        return reply  # type: ignore[no-any-return]

    result = run(WithHandlers(inner), app=mixed)
    assert [report.error is None for report in result.job.reports] == [True, False, True]
    assert word in str(result.job.reports[1].error)
    assert caplog.text.count(word) == 1


def test_an_evaluation_without_examples_does_not_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "evaluate":
            return Message(RecordDict({"m": MetricRecord({"num-examples": 0, "accuracy": 0.5})}), reply_to=message)
        return adding(message, context)

    with pytest.raises(ZeroDivisionError):
        run(FlowerFedAvg(), app=app)

    class Mine(FlowerFedAvg):
        def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
            return super().aggregate_evaluate(server_round, replies)

    for strategy in (FedAvg(), WithHandlers(FlowerFedAvg()), WithHandlers(Mine())):
        result = run(strategy, rounds=2, app=app)
        assert first(result.arrays) == [2.0, 2.0]
    assert caplog.text.count("cannot aggregate the evaluation: ZeroDivisionError") == 4


def test_a_mistake_in_the_users_strategy_is_raised() -> None:
    class Mine(FlowerFedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays: Any = super().aggregate_train(server_round, replies)[0]
            return arrays["no such name"], None

    with pytest.raises(KeyError):
        run(WithHandlers(Mine()))

    class Divides(FlowerFedAvg):
        def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
            return 1 // 0

    with pytest.raises(ZeroDivisionError):
        run(WithHandlers(Divides()))

    class Wrong(FlowerFedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return super().aggregate_train(server_round, 7)  # type: ignore[arg-type]

    with pytest.raises(TypeError):
        run(WithHandlers(Wrong()))


def test_records_are_as_good_as_flowers_for_whoever_reads_them() -> None:
    strategy = FedAvg()
    w = np.array([1, 2], np.float32)
    arrays, _ = strategy.aggregate_train(1, [mock_reply(w, np.int64(3))])
    assert arrays is not None
    assert arrays.object_id == ArrayRecord([w, np.array(3)]).object_id
    assert to_record(to_weights(arrays)).object_id == arrays.object_id
