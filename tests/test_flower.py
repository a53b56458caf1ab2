"""Our FedAvg in Flower's Message API: events, names, refusals, streaming; every node in this process."""

import gc
import inspect
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedMedian, Krum
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

import fed_learn as fl
from fed_learn.integrations.flower import (
    ClientMod,
    FedAvg,
    LocalGrid,
    WithHandlers,
    mean_metrics,
    messages,
    to_record,
    to_weights,
)

Weights = dict[str, Any]
Train = Callable[[Weights, int, int], Weights]
E = fl.EventType


def initial() -> Weights:
    return {"w": np.zeros((2, 3), np.float32), "n": np.array(0)}


def moved(weights: Weights, node: int, number: int) -> Weights:
    """What a node makes of the weights: values whose every bit matters, and a counter."""
    rng = np.random.default_rng([node, number])
    return {"w": weights["w"] + rng.normal(size=(2, 3)).astype(np.float32), "n": weights["n"] + node}


def app(train: Train = moved, *, accuracy: Callable[[Weights], float] | None = None, **mod: Any) -> ClientApp:
    """Nodes that train; with `accuracy` their own evaluation reports it. `mod`: arguments of `ClientMod`, if any."""
    made = ClientApp(mods=[ClientMod(**mod)] if mod else [])

    @made.train()
    def train_(message: Message, context: Context) -> Message:
        config: Any = message.content.config_records["config"]
        node, number = int(context.node_config["partition-id"]), int(config["server-round"]) - 1
        weights = train(dict(to_weights(message.content.array_records["arrays"])), node, number)
        metrics = MetricRecord({"num-examples": examples(node), "num-iterations": node + 1, "loss": float(node)})
        if not mod:
            metrics["partition-id"] = node
        return Message(RecordDict({"arrays": to_record(weights), "metrics": metrics}), reply_to=message)

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        node = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": examples(node), "partition-id": node})
        if accuracy is not None:
            metrics["accuracy"] = accuracy(dict(to_weights(message.content.array_records["arrays"])))
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return made


def examples(node: int) -> int:
    return 10 + 3 * node


def averaged(weights: Weights, nodes: Iterable[int], number: int) -> Weights:
    """A round without Flower."""
    contributions = [fl.Contribution(f"partition-{k}", moved(weights, k, number), examples(k)) for k in nodes]
    return dict(fl.weighted_average(contributions))


def same(left: Any, right: Any) -> bool:
    return list(left) == list(right) and all(
        left[n].dtype == right[n].dtype and np.array_equal(left[n], right[n]) for n in left
    )


class Log(fl.Handler):
    """Notes events with the contributor and the round."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None, int | None]] = []

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        self.seen.append((event, ctx.get_prop(fl.ContextKey.CONTRIBUTOR), ctx.get_prop(fl.ContextKey.ROUND)))

    def events(self) -> list[str]:
        return [event for event, _, _ in self.seen]


def start(strategy: FedAvg | WithHandlers, client: Any = None, nodes: int = 3, rounds: int = 2, **more: Any) -> Any:
    grid = LocalGrid(app() if client is None else client, nodes)
    return strategy.start(grid, to_record(initial()), num_rounds=rounds, **more)


def in_vain(strategy: FedAvg | WithHandlers, client: Any = None) -> fl.JobResult:
    """What a run of one round leaves behind that ends with the model it began with."""
    with pytest.raises(fl.NothingAggregatedError) as caught:
        start(strategy, client, rounds=1)
    assert same(to_weights(caught.value.handled.arrays), initial())
    result: fl.JobResult = caught.value.result
    return result


def test_the_arguments_of_flowers_fedavg_stand_first_with_its_defaults() -> None:
    def arguments(cls: type) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(cls).parameters.values()]

    theirs = arguments(FlowerFedAvg)
    assert arguments(FedAvg)[: len(theirs)] == theirs
    assert issubclass(FedAvg, FlowerFedAvg)


def test_a_job_averages_as_the_library_does_and_fires_every_event_in_its_order() -> None:
    log = Log()
    result = start(FedAvg(handlers=[log]))
    expected = averaged(averaged(initial(), range(3), 0), range(3), 1)
    assert same(to_weights(result.arrays), expected)
    assert same(result.job.weights, expected)
    assert [report.accepted for report in result.job.reports] == [("partition-0", "partition-1", "partition-2")] * 2
    first = [E.START_ROUND, *[E.SEND_MODEL] * 3, *[E.CLIENT_REGISTER, E.RECEIVE_CONTRIBUTION] * 3]
    second = [E.START_ROUND, *[E.SEND_MODEL] * 3, *[E.RECEIVE_CONTRIBUTION] * 3]
    end = [E.BEFORE_AGGREGATION, E.END_AGGREGATION, E.END_ROUND]
    # Nobody reports a score: the final model is sent for evaluation, and no result can be received.
    last = [*[E.SEND_MODEL] * 3, *[E.CLIENT_QUIT] * 3, E.SHUTDOWN]
    assert log.events() == [E.STARTUP, *first, *end, *second, *end, *last]
    assert [number for event, _, number in log.seen if event == E.START_ROUND] == [0, 1]
    sent = [who for event, who, number in log.seen if event == E.SEND_MODEL and number == 1]
    assert sorted(map(str, sent)) == ["partition-0", "partition-1", "partition-2"]


def test_metrics_and_flowers_own_result_are_there() -> None:
    result = start(FedAvg(), app(accuracy=lambda w: 0.25), evaluate_fn=lambda n, arrays: MetricRecord({"seen": n}))
    loss = sum(examples(k) * k for k in range(3)) / sum(map(examples, range(3)))
    assert dict(result.train_metrics_clientapp[2]) == {
        "num-iterations": pytest.approx(loss + 1),
        "loss": pytest.approx(loss),
    }
    assert dict(result.evaluate_metrics_clientapp[1]) == {"accuracy": 0.25}
    assert {n: dict(m) for n, m in result.evaluate_metrics_serverapp.items()} == {n: {"seen": n} for n in range(3)}


@pytest.mark.parametrize("stream", [False, True])
def test_the_own_function_for_metrics_gets_the_accepted_replies_whole_unless_the_server_streams(stream: bool) -> None:
    got: list[list[RecordDict]] = []

    def aggregate(contents: list[RecordDict], key: str) -> MetricRecord:
        got.append(contents)
        return MetricRecord({"count": len(contents)})

    result = start(FedAvg(train_metrics_aggr_fn=aggregate, stream=stream), app(spoiled(2)), rounds=1)
    assert dict(result.train_metrics_clientapp[1]) == {"count": 2}
    assert [list(content.array_records) for content in got[0]] == [[] if stream else ["arrays"]] * 2
    if not stream:
        assert same(to_weights(got[0][1].array_records["arrays"]), moved(initial(), 1, 0))


def spoiled(node: int, number: int = 0) -> Train:
    """One node sends a NaN in one round."""

    def train(weights: Weights, k: int, n: int) -> Weights:
        made = moved(weights, k, n)
        if (k, n) == (node, number):
            made["w"][1, 2] = np.nan
        return made

    return train


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_contribution_is_refused_by_name_and_the_others_count(stream: bool) -> None:
    result = start(FedAvg(stream=stream), app(spoiled(1)), rounds=1)
    (report,) = result.job.reports
    assert report.accepted == ("partition-0", "partition-2")
    assert [(f.contributor, f.cause) for f in report.rejected] == [("partition-1", "NonFiniteError")]
    assert same(to_weights(result.arrays), averaged(initial(), (0, 2), 0))


def test_a_bad_contribution_ends_the_job_if_so_told() -> None:
    log = Log()
    with pytest.raises(fl.NonFiniteError, match=r"partition-1: 'w' at index \(1, 2\)"):
        start(FedAvg(on_bad_contribution="raise", handlers=[log]), app(spoiled(1)))
    assert log.events()[-1] == E.SHUTDOWN


def test_a_reply_with_two_weights_is_refused() -> None:
    client = app()

    def twofold(message: Message, context: Context) -> Message:
        reply = client(message, context)
        if context.node_config["partition-id"] == 1:
            reply.content["validation"] = MetricRecord({"num-examples": 5, "accuracy": 0.5})
        return reply

    (report,) = start(FedAvg(), twofold, rounds=1).job.reports
    assert report.accepted == ("partition-0", "partition-2")
    assert "partition-1: two of the reply's MetricRecords have a 'num-examples'" in str(report.rejected[0].error)


def test_too_few_contributions_leave_the_global_model_as_it_is() -> None:
    result = start(FedAvg(min_contributions=3), app(spoiled(1, number=1)))
    assert isinstance(result.job.reports[1].error, fl.TooFewContributionsError)
    assert same(to_weights(result.arrays), averaged(initial(), range(3), 0))
    assert list(result.train_metrics_clientapp) == [1]


def test_a_node_that_fails_leaves_and_comes_back() -> None:
    def train(weights: Weights, node: int, number: int) -> Weights:
        if (node, number) == (1, 0):
            raise RuntimeError("out of memory")
        return moved(weights, node, number)

    log = Log()
    result = start(FedAvg(handlers=[log]), app(train))
    (quit,) = result.job.quits
    assert "RuntimeError: out of memory" in str(quit.error)
    assert result.job.reports[1].accepted == ("partition-0", "partition-1", "partition-2")
    assert log.events().count(E.CLIENT_QUIT) == 4
    assert log.events().count(E.CLIENT_REGISTER) == 4


def test_a_node_that_does_not_answer_in_time_is_reported_as_absent() -> None:
    client = app()

    def silent(message: Message, context: Context) -> Message | None:
        return None if context.node_config["partition-id"] == 2 else client(message, context)

    result = start(FedAvg(fraction_evaluate=0.0), silent, timeout=0.0)
    assert [len(report.absent) for report in result.job.reports] == [1, 1]
    assert [report.accepted for report in result.job.reports] == [("partition-0", "partition-1")] * 2


def test_nodes_without_a_partition_are_named_by_their_numbers() -> None:
    client = ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        arrays = to_record(to_weights(message.content.array_records["arrays"]))
        return Message(RecordDict({"a": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    result = start(FedAvg(fraction_evaluate=0.0), client, rounds=1)
    assert result.job.reports[0].accepted == ("node-2", "node-3", "node-4")


@pytest.mark.parametrize("stated", ["by the mod", "as a metric"])
def test_several_nodes_of_one_partition_are_several_contributors(stated: str) -> None:
    client = app()

    def twin(message: Message, context: Context) -> Message:
        reply = client(message, context)
        partition = int(context.node_config["partition-id"]) % 2
        if stated == "by the mod":
            reply.content["fed_learn"] = ConfigRecord({"contributor": f"partition-{partition}"})
        else:
            next(iter(reply.content.metric_records.values()))["partition-id"] = partition
        return reply

    result = start(FedAvg(fraction_evaluate=0.0), twin, nodes=3, rounds=2)
    names = ("partition-0@node-2", "partition-0@node-4", "partition-1")  # whoever answered first
    assert [report.accepted for report in result.job.reports] == [names] * 2
    assert same(to_weights(result.arrays), averaged(averaged(initial(), (0, 2, 1), 0), (0, 2, 1), 1))


@pytest.mark.parametrize("value", [2.5, [1, 2], -1.5])
def test_metrics_of_an_apps_own_that_are_called_like_ours_refuse_nothing(value: Any) -> None:
    client = app()

    def numbers(message: Message, context: Context) -> Message:
        reply = client(message, context)
        metrics = next(iter(reply.content.metric_records.values()))
        metrics["num-iterations"] = metrics["partition-id"] = value
        return reply

    result = start(FedAvg(fraction_evaluate=0.0), numbers, rounds=2)
    assert [report.accepted for report in result.job.reports] == [("node-2", "node-3", "node-4")] * 2
    assert same(to_weights(result.arrays), averaged(averaged(initial(), range(3), 0), range(3), 1))


def test_a_node_keeps_its_name_whatever_it_counts_as_its_partition() -> None:
    client, calls = app(), [0]

    def counting(message: Message, context: Context) -> Message:
        calls[0] += 1
        reply = client(message, context)
        next(iter(reply.content.metric_records.values()))["partition-id"] = calls[0]
        return reply

    result = start(FedAvg(fraction_evaluate=0.0), counting, rounds=3)
    assert [report.accepted for report in result.job.reports] == [("partition-1", "partition-2", "partition-3")] * 3


@pytest.mark.parametrize("claim", ["node-2", "final", "global_best", " ", "x" * 201, 7])
def test_nobody_contributes_under_a_name_that_is_not_his(claim: Any) -> None:
    client = app()

    def impostor(message: Message, context: Context) -> Message:
        reply = client(message, context)
        if context.node_config["partition-id"] == 2:
            reply.content["fed_learn"] = ConfigRecord({"contributor": claim})
        return reply

    strategy = FedAvg(fraction_evaluate=0.0)
    grid = LocalGrid(impostor, 3)
    messages = strategy.configure_train(1, to_record(initial()), ConfigRecord(), grid)
    replies = sorted(grid.send_and_receive(messages), key=lambda reply: reply.metadata.src_node_id)
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    result = strategy.close()
    assert result is not None
    assert [(f.contributor, f.cause) for f in result.reports[0].rejected] == [("node-4", "UnknownContributorError")]
    assert same(to_weights(arrays), averaged(initial(), (0, 1), 0))


def test_a_name_goes_over_to_the_node_that_takes_anothers_place() -> None:
    # A SuperNode that is started anew has another number.
    strategy = FedAvg(min_train_nodes=1, min_available_nodes=1)
    for number, first in ((1, 0), (2, 1)):
        grid = LocalGrid(app(name=lambda context: "site-a"), 2)
        nodes = list(grid.get_node_ids())[first : first + 1]
        grid.get_node_ids = lambda nodes=nodes: nodes  # type: ignore[method-assign, misc]
        messages = strategy.configure_train(number, to_record(initial()), ConfigRecord(), grid)
        strategy.aggregate_train(number, grid.send_and_receive(messages))
    result = strategy.close()
    assert result is not None
    assert [report.accepted for report in result.reports] == [("site-a",)] * 2


def test_a_handler_replaces_the_global_model_before_it_is_sent() -> None:
    class Reset(fl.Handler):
        def start_round(self, ctx: fl.FLContext) -> None:
            if ctx[fl.ContextKey.ROUND] == 1:
                ctx.set_model(fl.ModelData(initial()))

    result = start(FedAvg(handlers=[Reset()]))
    assert same(to_weights(result.arrays), averaged(initial(), range(3), 1))


def test_a_handler_replaces_the_global_model_after_the_aggregation() -> None:
    class Zero(fl.Handler):
        def after_aggregation(self, ctx: fl.FLContext) -> None:
            ctx.set_model(fl.ModelData(initial()))

    assert same(to_weights(start(FedAvg(handlers=[Zero()])).arrays), initial())


class Failing(fl.Handler):
    def before_aggregation(self, ctx: fl.FLContext) -> None:
        raise RuntimeError("boom")


def test_a_handler_that_raises_ends_the_job_or_is_reported() -> None:
    with pytest.raises(fl.HandlerError, match="boom"):
        start(FedAvg(handlers=[Failing()]))
    result = start(FedAvg(handlers=[Failing()], on_handler_error="log"))
    assert [len(report.handler_failures) for report in result.job.reports] == [1, 1]
    assert same(to_weights(result.arrays), averaged(averaged(initial(), range(3), 0), range(3), 1))


def test_a_handler_that_raises_when_a_node_registers_is_no_failure_of_the_node() -> None:
    class Closed(fl.Handler):
        def client_register(self, ctx: fl.FLContext) -> None:
            raise RuntimeError("no more")

    with pytest.raises(fl.HandlerError, match="no more"):
        start(FedAvg(handlers=[Closed()], fraction_evaluate=0.0))
    result = start(FedAvg(handlers=[Closed()], on_handler_error="log"))
    assert result.job.quits == ()
    assert [len(report.accepted) for report in result.job.reports] == [3, 3]


def test_handlers_that_started_are_shut_down_once_if_one_cannot_start() -> None:
    class Broken(fl.Handler):
        def startup(self, ctx: fl.FLContext) -> None:
            raise RuntimeError("no port")

    log = Log()
    with pytest.raises(fl.HandlerError, match="no port"):
        start(FedAvg(handlers=[log, Broken()]))
    assert log.events() == [E.STARTUP, E.SHUTDOWN]


def test_handlers_are_shut_down_if_what_is_flowers_fails() -> None:
    log = Log()

    def evaluate_fn(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        start(FedAvg(handlers=[log]), evaluate_fn=evaluate_fn)
    assert log.events() == [E.STARTUP, E.SHUTDOWN]


def test_a_stale_reply_is_refused_by_the_group_that_it_inherits() -> None:
    strategy = FedAvg()
    _, stale = reply_to(strategy, 1, initial())
    strategy.aggregate_train(1, stale)
    _, replies = reply_to(strategy, 2, initial())
    new, old = (sorted(some, key=lambda reply: reply.metadata.src_node_id) for some in (replies, stale))
    strategy.aggregate_train(2, [*new[:2], old[2]])
    assert strategy.job is not None
    assert {failure.cause for failure in strategy.job.reports[1].rejected} == {"RoundError"}
    assert len(strategy.job.reports[1].rejected) == 1


def test_groups_of_a_strategys_own_are_left_alone() -> None:
    class Grouped(FlowerFedAvg):
        def configure_train(self, *arguments: Any) -> list[Message]:
            messages = list(super().configure_train(*arguments))
            for message in messages:
                message.metadata.group_id = "42"
            return messages

    result = start(WithHandlers(Grouped()), rounds=1)
    assert len(result.job.reports[0].accepted) == 3


def test_a_handler_stops_the_job() -> None:
    class Stop(fl.Handler):
        def receive_contribution(self, ctx: fl.FLContext) -> None:
            ctx.set_prop(fl.ContextKey.STOP, "enough")

    result = start(FedAvg(handlers=[Stop()]), rounds=5)
    assert len(result.job.reports) == 1
    assert result.job.stop_reason == "enough"


def test_a_handler_takes_a_contribution_out() -> None:
    class Without(fl.Handler):
        def before_aggregation(self, ctx: fl.FLContext) -> None:
            ctx[fl.ContextKey.CONTRIBUTIONS] = ctx[fl.ContextKey.CONTRIBUTIONS][1:]

    result = start(FedAvg(handlers=[Without()]), rounds=1)
    assert same(to_weights(result.arrays), averaged(initial(), (1, 2), 0))
    assert dict(result.train_metrics_clientapp[1])["loss"] == pytest.approx((13 * 1 + 16 * 2) / 29)


class Reweigh(fl.Handler):
    """Lets one contribution count as often as all others together."""

    def before_aggregation(self, ctx: fl.FLContext) -> None:
        *others, last = ctx[fl.ContextKey.CONTRIBUTIONS]
        total = sum(c.aggregation_weight for c in others)
        ctx[fl.ContextKey.CONTRIBUTIONS] = (*others, replace(last, aggregation_weight=total))


class Shrink(fl.Handler):
    def before_aggregation(self, ctx: fl.FLContext) -> None:
        ctx[fl.ContextKey.CONTRIBUTIONS] = tuple(
            replace(c, weights={n: (w / 2).astype(w.dtype) for n, w in c.weights.items()})
            for c in ctx[fl.ContextKey.CONTRIBUTIONS]
        )


class Twice(fl.Handler):
    def before_aggregation(self, ctx: fl.FLContext) -> None:
        ctx[fl.ContextKey.CONTRIBUTIONS] *= 2


def test_a_handler_weighs_contributions_anew() -> None:
    result = start(FedAvg(handlers=[Reweigh()]), rounds=1)
    contributions = [fl.Contribution(f"{k}", moved(initial(), k, 0), n) for k, n in enumerate((10, 13, 23))]
    assert same(to_weights(result.arrays), fl.weighted_average(contributions))
    assert result.job.reports[0].total_weight == 46


def test_a_handler_cannot_weigh_anew_what_has_been_added_up() -> None:
    with pytest.raises(ValueError, match="with stream=True they are added up already"):
        start(FedAvg(stream=True, handlers=[Reweigh()]))


@pytest.mark.parametrize("handler", [Reweigh, Shrink, Twice])
def test_a_handler_cannot_change_the_replies_that_another_strategy_is_given(handler: type[fl.Handler]) -> None:
    with pytest.raises(ValueError, match=r"partition-\d: a handler changed .* FedAvg aggregates the replies"):
        start(WithHandlers(FlowerFedAvg(), handlers=[handler()]))


def test_a_contribution_cannot_be_averaged_twice() -> None:
    with pytest.raises(fl.DuplicateContributionError, match="partition-0"):
        start(FedAvg(handlers=[Twice()]))


def accuracy_of(weights: Weights) -> float:
    """The model after round 1 is the best one: its counter is in the middle."""
    return 1.0 - abs(int(weights["n"]) - int(averaged(initial(), range(3), 0)["n"])) / 10


def test_models_are_selected_by_the_evaluation_of_clients_that_know_nothing_of_handlers() -> None:
    selection = fl.ModelSelectionHandler()
    result = start(FedAvg(handlers=[selection], validation_metric="accuracy"), app(accuracy=accuracy_of), rounds=3)
    assert (result.job.best.round, result.job.best.metric) == (1, 1.0)
    assert same(result.job.best.weights, averaged(initial(), range(3), 0))


def test_the_model_of_the_last_round_can_be_the_best() -> None:
    strategy = FedAvg(handlers=[fl.ModelSelectionHandler()], validation_metric="accuracy")
    result = start(strategy, app(accuracy=lambda w: float(w["n"]) / 10), rounds=3)
    assert result.job.best.round == 3
    assert same(result.job.best.weights, to_weights(result.arrays))
    assert result.job.metrics["selection"] == pytest.approx(result.job.best.metric)


def test_clients_that_score_what_they_receive_are_asked_for_the_last_model_too() -> None:
    def validate(weights: Any, context: Context) -> dict[str, float]:
        return {"accuracy": float(weights["n"]) / 10}

    strategy = FedAvg(fraction_evaluate=0.0, handlers=[fl.ModelSelectionHandler(weigh_by_local_iter=True)])
    result = start(strategy, app(validate=validate), rounds=2)
    assert [report.metrics["selection"] for report in result.job.reports] == [0.0, pytest.approx(0.1)]
    assert result.job.best.round == 2
    assert {r.contributor: r.n_iter for r in result.job.validation_results} == {
        f"partition-{k}": k + 1 for k in range(3)
    }


def test_the_last_model_is_scored_by_clients_whose_last_contributions_were_all_refused() -> None:
    def train(weights: Weights, node: int, number: int) -> Weights:
        return spoiled(node, number=1)(weights, node, number)

    def validate(weights: Any, context: Context) -> dict[str, float]:
        return {"accuracy": float(weights["n"]) / 10}

    strategy = FedAvg(fraction_evaluate=0.0, handlers=[fl.ModelSelectionHandler()])
    result = start(strategy, app(train, validate=validate), rounds=2)
    assert len(result.job.reports[1].rejected) == 3
    assert (result.job.best.round, result.job.best.metric) == (2, pytest.approx(0.1))
    assert same(result.job.best.weights, averaged(initial(), range(3), 0))


def test_the_server_validates_what_it_has_aggregated() -> None:
    class Evaluator(fl.ModelEvaluator):
        def evaluate(self, ctx: fl.FLContext) -> None:
            assert ctx.model is not None
            assert ctx.model.weights is not None
            self.score = accuracy_of(dict(ctx.model.weights))

        def get_metric(self) -> float:
            return self.score

    result = start(FedAvg(handlers=[fl.ServerValidationHandler(Evaluator(), num_rounds_per_valid=1)]), rounds=3)
    assert (result.job.best.round, result.job.best.metric) == (0, 1.0)


def test_streaming_gives_the_mean_in_the_order_of_arrival_and_keeps_no_weights() -> None:
    class Seen(fl.Handler):
        def before_aggregation(self, ctx: fl.FLContext) -> None:
            assert [c.weights for c in ctx[fl.ContextKey.CONTRIBUTIONS]] == [None] * 3

    result = start(FedAvg(stream=True, exact=True, handlers=[Seen()]), rounds=2)
    assert same(to_weights(result.arrays), to_weights(start(FedAvg(exact=True)).arrays))


def test_replies_are_taken_one_by_one_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    # The client of the next node works only after the reply of the last one was received.
    monkeypatch.setattr(messages, "IN_FLIGHT_BYTES", 0)  # as for a large model
    order: list[str] = []

    class Received(fl.Handler):
        def receive_contribution(self, ctx: fl.FLContext) -> None:
            order.append("received")

    def train(weights: Weights, node: int, number: int) -> Weights:
        order.append("trained")
        return moved(weights, node, number)

    start(FedAvg(stream=True, handlers=[Received()], fraction_evaluate=0.0), app(train), nodes=8, rounds=1)
    assert order == (["trained"] * 2 + ["received"] * 2) * 4  # two are pulled at once


def test_differences_are_added_to_the_global_model() -> None:
    result = start(FedAvg(kind=fl.Kind.DIFF), app(kind=fl.Kind.DIFF), rounds=1)
    right = averaged(initial(), range(3), 0)
    assert np.array_equal(to_weights(result.arrays)["n"], right["n"])
    np.testing.assert_allclose(to_weights(result.arrays)["w"], right["w"], rtol=1e-6)


def test_full_weights_are_refused_where_differences_are_expected() -> None:
    result = in_vain(FedAvg(kind=fl.Kind.DIFF), app(name=lambda context: f"site-{context.node_id}"))
    assert [failure.cause for failure in result.reports[0].rejected] == ["KindError"] * 3


def reply_to(strategy: Any, number: int, weights: Weights, nodes: int = 3) -> tuple[LocalGrid, list[Message]]:
    grid = LocalGrid(app(), nodes)
    return grid, list(grid.send_and_receive(strategy.configure_train(number, to_record(weights), ConfigRecord(), grid)))


def test_it_works_in_a_loop_of_ones_own() -> None:
    log = Log()
    strategy, arrays = FedAvg(handlers=[log]), to_record(initial())
    for number in (1, 2):
        grid = LocalGrid(app(), 3)
        replies = grid.send_and_receive(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        made, metrics = strategy.aggregate_train(number, replies)
        assert made is not None
        assert metrics is not None
        arrays = made
    assert same(to_weights(arrays), averaged(averaged(initial(), range(3), 0), range(3), 1))
    assert E.SHUTDOWN not in log.events()
    result = strategy.close()
    assert result is not None
    assert len(result.reports) == 2
    assert log.events()[-4:] == [*[E.CLIENT_QUIT] * 3, E.SHUTDOWN]
    assert strategy.close() is None


def test_aggregate_train_alone_takes_its_schema_from_the_first_good_reply() -> None:
    _, replies = reply_to(FlowerFedAvg(), 1, initial())
    replies.sort(key=lambda reply: reply.metadata.src_node_id)
    next(iter(replies[0].content.array_records.values()))["w"].data = b"junk"
    strategy = FedAvg()
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert same(to_weights(arrays), averaged(initial(), (1, 2), 0))
    assert strategy.job is not None
    assert [f.cause for f in strategy.job.reports[0].rejected] == ["WeightsTypeError"]


def test_aggregate_train_alone_makes_nothing_of_nothing() -> None:
    assert FedAvg().aggregate_train(1, []) == (None, None)


def test_another_model_begins_another_job() -> None:
    log = Log()
    strategy = FedAvg(handlers=[log])
    strategy.configure_train(1, to_record({"w": np.zeros(2)}), ConfigRecord(), LocalGrid(app(), 3))
    _, replies = reply_to(strategy, 1, initial())
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert same(to_weights(arrays), averaged(initial(), range(3), 0))
    assert log.events().count(E.STARTUP) == 2
    assert log.events().count(E.SHUTDOWN) == 1


def test_a_first_round_after_others_begins_another_job() -> None:
    log, jobs = Log(), []
    strategy = FedAvg(handlers=[log, fl.ModelSelectionHandler()])
    for _ in range(2):
        for number in (1, 2):
            _, replies = reply_to(strategy, number, initial())
            strategy.aggregate_train(number, replies)
        jobs.append(strategy.job)
    assert jobs[0] is not jobs[1]
    assert [[report.round for report in job.reports] for job in jobs if job] == [[0, 1], [0, 1]]
    assert (log.events().count(E.STARTUP), log.events().count(E.SHUTDOWN)) == (2, 1)


def test_the_callers_own_model_is_the_one_that_counts() -> None:
    strategy = FedAvg()
    other = {"w": np.ones((2, 3), np.float32), "n": np.array(5)}
    for number, weights in ((1, initial()), (2, other)):
        _, replies = reply_to(strategy, number, weights)
        arrays, _ = strategy.aggregate_train(number, replies)
        assert arrays is not None
        assert same(to_weights(arrays), averaged(weights, range(3), number - 1))


def test_a_subclass_that_overrides_both_methods_is_asked() -> None:
    class Half(FedAvg):
        """Sends to two nodes, and halves what comes out."""

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> list[Message]:
            return sorted(super().configure_train(server_round, arrays, config, grid), key=node)[:2]

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert arrays is not None
            return to_record(
                {name: (array / 2).astype(array.dtype) for name, array in to_weights(arrays).items()}
            ), metrics

    def node(message: Message) -> int:
        return message.metadata.dst_node_id

    expected = initial()
    for number in range(2):
        expected = {n: (a / 2).astype(a.dtype) for n, a in averaged(expected, range(2), number).items()}
    log = Log()
    result = start(Half(handlers=[log], fraction_evaluate=0.0))
    assert same(to_weights(result.arrays), expected)


def test_what_a_subclass_makes_of_the_average_is_the_jobs_result_too() -> None:
    class Half(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert arrays is not None
            halves = {name: (array / 2).astype(array.dtype) for name, array in to_weights(arrays).items()}
            return to_record(halves), metrics

    result = start(Half(), rounds=1)
    assert same(result.job.weights, to_weights(result.arrays))


def test_flowers_privacy_wrapper_takes_it_as_its_strategy() -> None:
    log = Log()
    inner = FedAvg(handlers=[log])
    strategy = DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 1000.0, 3)
    result = strategy.start(LocalGrid(app(), 3), to_record({"w": initial()["w"], "n": np.zeros(())}), num_rounds=1)
    np.testing.assert_allclose(to_weights(result.arrays)["w"], averaged(initial(), range(3), 0)["w"], rtol=1e-5)
    assert log.events().count(E.RECEIVE_CONTRIBUTION) == 3


@pytest.mark.parametrize(
    ("argument", "value"),
    [("on_bad_contribution", "ignore"), ("min_contributions", 0), ("kind", "half"), ("poll_interval", 0)],
)
def test_settings_that_are_wrong_are_refused_at_once(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument if argument != "kind" else "half"):
        FedAvg(**{argument: value})


def test_what_is_no_handler_or_no_kernel_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="no handler"):
        FedAvg(handlers=[Log])  # type: ignore[list-item]
    with pytest.raises(fl.KernelNameError):
        FedAvg(kernel="fast")


@pytest.mark.parametrize("make", [FedAvg, lambda: WithHandlers(FlowerFedAvg())])
@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_of_a_contribution_is_kept_past_its_round(make: Callable[[], Any], breaks: bool) -> None:
    strategy = make()
    _, replies = reply_to(strategy, 1, initial())
    kept = [weakref.ref(reply) for reply in replies]

    def arriving() -> Iterable[Message]:
        while replies:
            yield replies.pop()
        if breaks:
            raise ConnectionError

    if breaks:
        with pytest.raises(ConnectionError):
            strategy.aggregate_train(1, arriving())
    else:
        strategy.aggregate_train(1, arriving())
        contributions = (*strategy.job.ctx[fl.ContextKey.CONTRIBUTIONS], strategy.job.ctx[fl.ContextKey.CONTRIBUTION])
        assert [(c.contributor[:-1], c.weights) for c in contributions] == [("partition-", None)] * 4
    gc.collect()
    assert [reply() for reply in kept] == [None] * 3


# WithHandlers


def test_flowers_own_strategies_do_not_take_differences() -> None:
    with pytest.raises(ValueError, match="FedMedian makes a model of full weights"):
        WithHandlers(FedMedian(), kind=fl.Kind.DIFF)


def test_a_strategy_of_ones_own_may_take_differences() -> None:
    class Adding(FlowerFedAvg):
        def configure_train(self, server_round: int, arrays: Any, *others: Any) -> Any:
            self.sent = to_weights(arrays)
            return super().configure_train(server_round, arrays, *others)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            mean, metrics = super().aggregate_train(server_round, replies)
            assert mean is not None
            return to_record({n: self.sent[n] + np.float64(mean[n].numpy()) for n in self.sent}), metrics

    result = start(WithHandlers(Adding(), kind=fl.Kind.DIFF), app(kind=fl.Kind.DIFF))
    expected = averaged(averaged(initial(), range(3), 0), range(3), 1)
    np.testing.assert_allclose(to_weights(result.arrays)["w"], expected["w"], rtol=1e-5)
    assert to_weights(result.arrays)["n"] == expected["n"]


def test_integers_of_a_strategy_that_leave_their_dtype_fail_the_round() -> None:
    class Large(FlowerFedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return to_record({"w": np.zeros((2, 3), np.float32), "n": np.array(300)}), None

    made = ClientApp()

    @made.train()
    def train(message: Message, context: Context) -> Message:
        content = {"a": message.content["arrays"], "m": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    small = {**initial(), "n": np.array(1, np.uint8)}
    strategy = WithHandlers(Large(fraction_evaluate=0.0))
    with pytest.raises(fl.NothingAggregatedError, match="IntegerRangeError once") as caught:
        strategy.start(LocalGrid(made, 3), to_record(small), num_rounds=1)
    assert isinstance(caught.value.result.reports[0].error, fl.IntegerRangeError)
    assert same(caught.value.result.weights, small)


def test_flowers_median_gets_checks_and_handlers_and_keeps_dtypes() -> None:
    log = Log()
    result = start(WithHandlers(FedMedian(), handlers=[log]), app(spoiled(3)), nodes=4, rounds=1)
    assert [f.contributor for f in result.job.reports[0].rejected] == ["partition-3"]
    columns = [moved(initial(), k, 0) for k in range(3)]
    weights = to_weights(result.arrays)
    assert np.array_equal(weights["w"], np.median([c["w"] for c in columns], axis=0).astype(np.float32))
    assert weights["n"] == 1
    assert weights["n"].dtype == np.int64
    assert dict(result.train_metrics_clientapp[1])["loss"] == pytest.approx((13 + 32) / 39)
    assert log.events().count(E.RECEIVE_CONTRIBUTION) == 4
    assert log.events()[-1] == E.SHUTDOWN


def test_strategies_that_keep_the_model_they_sent_work_inside() -> None:
    theirs = FedAdam(eta=0.1).start(LocalGrid(app(), 3), to_record({"w": initial()["w"], "n": np.zeros(())}))
    selection = fl.ModelSelectionHandler()
    strategy = WithHandlers(FedAdam(eta=0.1), handlers=[selection], validation_metric="accuracy")
    client = app(accuracy=lambda w: float(np.abs(w["w"]).sum()))
    ours = strategy.start(LocalGrid(client, 3), to_record({"w": initial()["w"], "n": np.zeros(())}))
    np.testing.assert_allclose(to_weights(ours.arrays)["w"], to_weights(theirs.arrays)["w"], rtol=1e-5)
    assert ours.job is not None
    assert ours.job.best is not None
    assert ours.job.best.round == 3


def test_krum_gets_the_replies_in_the_order_of_names() -> None:
    def run() -> Any:
        return to_weights(start(WithHandlers(Krum(num_malicious_nodes=1)), nodes=5, rounds=1).arrays)

    assert same(run(), run())


def test_a_strategy_that_makes_nothing_or_refuses_fails_the_round() -> None:
    class Nothing(FlowerFedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return None, None

    result = in_vain(WithHandlers(Nothing()))
    assert "Nothing aggregated nothing" in str(result.reports[0].error)

    client = app()

    def differing(message: Message, context: Context) -> Message:
        reply = client(message, context)
        next(iter(reply.content.metric_records.values()))[f"only-{context.node_id}"] = 1.0
        return reply

    result = in_vain(WithHandlers(FlowerFedAvg(fraction_evaluate=0.0)), differing)
    assert "same keys" in str(result.reports[0].error)
    assert same(result.weights, initial())


def test_an_evaluation_that_another_strategy_refuses_does_not_end_the_job(caplog: pytest.LogCaptureFixture) -> None:
    client = app(accuracy=accuracy_of)

    def bare(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] == 1:
            return Message(RecordDict({}), reply_to=message)
        return client(message, context)

    strategy = WithHandlers(FlowerFedAvg(), handlers=[fl.ModelSelectionHandler()], validation_metric="accuracy")
    result = start(strategy, bare)
    assert len(result.job.reports) == 2
    assert result.job.best.round == 1
    assert result.evaluate_metrics_clientapp == {}
    assert (
        "round 1: FedAvg cannot aggregate the evaluation: InconsistentMessageReplies: Expected exactly" in caplog.text
    )


# Metrics


def record(**metrics: Any) -> RecordDict:
    return RecordDict({"m": MetricRecord(metrics)})


def test_the_mean_of_metrics_counts_those_who_report_them() -> None:
    contents = [record(n=1, loss=2.0, each=[1.0, 2.0]), record(n=3, loss=6.0, each=[5.0, 2.0]), record(n=4, other=7)]
    assert dict(mean_metrics(contents, "n")) == {"loss": 5.0, "each": [4.0, 2.0], "other": 7.0}


def test_the_mean_of_metrics_leaves_out_what_cannot_be_averaged() -> None:
    contents = [record(n=1, a=[1.0]), record(n=1, a=[1.0, 2.0], b=np.inf), record(n=0, b=5.0), record(b=5.0)]
    assert dict(mean_metrics(contents, "n")) == {"a": [1.0]}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, [0.5, 1.0], [], [math.nan]], ids=str)
@pytest.mark.parametrize("stream", [False, True], ids=["kept", "stream"])
def test_one_clients_bad_metric_costs_itself_and_not_the_mean(
    bad: Any, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def measures(message: Message, context: Context) -> Message:
        k: Any = context.node_config["partition-id"]
        metrics = {"num-examples": 1, "loss": bad if k == 1 else float(k), "other": float(k)}
        content = RecordDict({"m": MetricRecord(metrics)})
        if message.metadata.message_type.startswith("train"):
            content["a"] = ArrayRecord({"w": Array(np.ones(1))})
        return Message(content, reply_to=message)

    start_record = ArrayRecord({"w": Array(np.zeros(1))})
    result: Any = FedAvg(stream=stream).start(LocalGrid(measures, 4), start_record, num_rounds=2)
    for found in (result.train_metrics_clientapp, result.evaluate_metrics_clientapp):
        assert [dict(found[number]) for number in (1, 2)] == [{"loss": 5 / 3, "other": 1.5}] * 2
    assert [report.accepted for report in result.job.reports] == [tuple(f"node-{k}" for k in (2, 3, 4, 5))] * 2
    told = [r.getMessage() for r in caplog.records if "left out of the mean metrics" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("node-3: metric 'loss' ")


@pytest.mark.parametrize("examples", [math.nan, math.inf, -1.0])
def test_one_clients_bad_number_of_examples_costs_its_metrics_and_not_the_mean(
    examples: float, caplog: pytest.LogCaptureFixture
) -> None:
    contents = [record(n=1, loss=2.0), record(n=examples, loss=7.0), record(n=3, loss=6.0)]
    assert dict(mean_metrics(contents, "n")) == {"loss": 5.0}
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["reply 2"]


def test_the_mean_of_the_largest_metrics_and_weights_is_right() -> None:
    assert dict(mean_metrics([record(n=1, loss=1.7e308)] * 4, "n")) == {"loss": 1.7e308}
    assert dict(mean_metrics([record(n=1, loss=x) for x in (1.7e308, -1.7e308)], "n")) == {"loss": 0.0}
    assert dict(mean_metrics([record(n=1.7e308, loss=2.0)] * 2, "n")) == {"loss": 2.0}


def test_a_streaming_server_frees_each_reply_as_soon_as_it_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # At once, and not when Python next looks for reference cycles: replies are as large as models.
    monkeypatch.setattr(messages, "IN_FLIGHT_BYTES", 0)  # as for a large model
    weights = {"w": np.ones(3, np.float32)}
    alive: list[weakref.ref[RecordDict]] = []
    most = 0

    def train(message: Message, context: Context) -> Message:
        nonlocal most
        content = RecordDict({"arrays": to_record(weights), "metrics": MetricRecord({"num-examples": 1})})
        alive.append(weakref.ref(content))
        most = max(most, sum(one() is not None for one in alive))
        return Message(content, reply_to=message)

    gc.disable()
    try:
        strategy = FedAvg(fraction_evaluate=0.0, stream=True, handlers=[fl.Handler()])
        strategy.start(LocalGrid(train, 30), to_record(weights), 1)
        assert len(alive) == 30
        assert most <= 5
        assert not any(one() is not None for one in alive)
    finally:
        gc.enable()
