"""`FederatedServer` and `FederatedClient`: whole jobs, their events, and what they do when something goes wrong."""

import _thread
import dataclasses
import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from federation import (
    CLIENT_EVENTS,
    SERVER_EVENTS,
    AddingLearner,
    Array,
    At,
    Lifecycle,
    NormEvaluator,
    Recorder,
    TamperingClient,
    WeightDict,
    clients_of,
    initial_weights,
    noise,
    raising,
    two_clients,
)
from reference import bits

import fed_learn as fl
from fed_learn.contribution import FINAL_MODEL, GLOBAL_BEST
from fed_learn.errors import HandlerFailure
from fed_learn.weights import FrozenDict, FrozenWeights

Event = fl.EventType
Key = fl.ContextKey


def by_value(weights: WeightDict) -> float:
    return float(weights["b"][0])


def server_of(num_rounds: int = 2, **arguments: Any) -> fl.FederatedServer:
    return fl.FederatedServer(initial_weights(), num_rounds=num_rounds, **arguments)


def values(weights: WeightDict) -> tuple[float, float, float]:
    """One element of each variable, after a check that the others are the same."""
    for array in weights.values():
        assert np.all(array == array.reshape(-1)[0])
    w, b, steps = (float(weights[name].reshape(-1)[0]) for name in ("w", "b", "steps"))
    return w, b, steps


def failing(*rounds: int, error: BaseException | None = None) -> Callable[[fl.FLContext], object]:
    """For `AddingLearner(during=)`: raises in these rounds."""

    def during(ctx: fl.FLContext) -> object:
        if ctx[Key.ROUND] in rounds:
            raise error or RuntimeError("out of memory")
        return None

    return during


# The events of a job


def round_of_events(clients: Sequence[str]) -> list[tuple[str, str | None]]:
    return [
        (Event.START_ROUND, None),
        *((Event.SEND_MODEL, name) for name in clients),
        *((Event.RECEIVE_CONTRIBUTION, name) for name in clients),
        (Event.BEFORE_AGGREGATION, None),
        (Event.END_AGGREGATION, None),
        (Event.END_ROUND, None),
    ]


@pytest.mark.parametrize(("clients", "num_rounds"), [("ab", 2), ("abc", 3), ("cab", 1)])
@pytest.mark.parametrize("selecting", [False, True])
def test_the_server_fires_its_events_in_order(clients: str, num_rounds: int, selecting: bool) -> None:
    recorder = Recorder()
    handlers = [*([fl.ModelSelectionHandler()] if selecting else []), recorder]
    server_of(num_rounds, handlers=handlers).run(clients_of({name: AddingLearner() for name in clients}))
    models = 1 + len(clients) + selecting  # the final one, each client's best, the job's best
    assert recorder.with_contributors() == [
        (Event.STARTUP, None),
        *((Event.CLIENT_REGISTER, name) for name in clients),
        *(round_of_events(clients) * num_rounds),
        *((Event.SEND_MODEL, name) for name in clients),
        *([(Event.RECEIVE_VALIDATION_RESULTS, name) for name in clients] * models),
        *((Event.CLIENT_QUIT, name) for name in clients),
        (Event.SHUTDOWN, None),
    ]


@pytest.mark.parametrize(("clients", "num_rounds"), [("ab", 2), ("abc", 3)])
def test_each_client_fires_its_events_in_order(clients: str, num_rounds: int) -> None:
    recorders = {name: Recorder() for name in clients}
    server_of(num_rounds, handlers=[fl.ModelSelectionHandler()]).run(
        [fl.FederatedClient(name, AddingLearner(), handlers=[recorders[name]]) for name in clients]
    )
    models = 1 + len(clients) + 1
    for recorder in recorders.values():
        assert recorder.events == [
            Event.STARTUP,
            *([Event.GET_MODEL, Event.RECEIVE_MODEL] * num_rounds),
            Event.SUBMIT_LOCAL_BEST_MODEL,
            Event.SEND_BEST_MODEL,
            *([Event.RECEIVE_VALIDATION_MODEL, Event.SEND_VALIDATION_RESULTS] * models),
            Event.SHUTDOWN,
        ]


def test_handlers_run_in_list_order_and_shut_down_in_reverse() -> None:
    log: list[str] = []

    def chain(side: str) -> list[fl.Handler]:
        def noting(name: str) -> list[fl.Handler]:
            return [
                At(Event.STARTUP, lambda ctx: log.append(f"{side} {name} up")),
                At(Event.SHUTDOWN, lambda ctx: log.append(f"{side} {name} down")),
            ]

        return [*noting("first"), *noting("second")]

    server_of(1, handlers=chain("server")).run(clients_of({"a": AddingLearner()}, handlers=chain("client")))
    assert log == [
        "server first up",
        "server second up",
        "client first up",
        "client second up",
        "client second down",
        "client first down",
        "server second down",
        "server first down",
    ]


def test_a_round_with_too_few_contributions_has_no_aggregation_events() -> None:
    recorder = Recorder()
    server = server_of(2, handlers=[recorder], min_contributions=2)
    server.run(clients_of({"a": AddingLearner(), "b": AddingLearner(absent=[0])}))
    first, second = (recorder.events.index(Event.START_ROUND), len(recorder.events))
    events = recorder.events[first:second]
    assert events[: events.index(Event.END_ROUND) + 1] == [
        Event.START_ROUND,
        Event.SEND_MODEL,
        Event.SEND_MODEL,
        Event.RECEIVE_CONTRIBUTION,
        Event.END_ROUND,
    ]
    assert Counter(recorder.events)[Event.END_AGGREGATION] == 1


# The contexts


def test_the_server_and_each_client_have_contexts_of_their_own() -> None:
    def claim(name: str) -> list[fl.Handler]:
        def write(ctx: fl.FLContext) -> None:
            ctx.set_prop("owner", name)
            ctx.add_metadata("owner", name)

        return [At(Event.STARTUP, write)]

    clients = [fl.FederatedClient(name, AddingLearner(), handlers=claim(name)) for name in "ab"]
    server = server_of(handlers=claim("server"))
    server.run(clients)
    contexts = [server.ctx, *(client.ctx for client in clients)]
    assert [ctx["owner"] for ctx in contexts] == ["server", "a", "b"]
    assert [ctx.get_metadata("owner") for ctx in contexts] == ["server", "a", "b"]
    for client in clients:
        assert client.ctx[Key.CONTRIBUTOR] == client.name
        assert not {Key.REPORT, Key.CONTRIBUTIONS, Key.CONTRIBUTION, Key.REJECTION} & set(client.ctx)


def test_a_handler_that_changes_its_own_model_changes_nobody_elses() -> None:
    replacement = fl.ModelData(FrozenWeights({name: array + 100 for name, array in initial_weights().items()}))
    b = Recorder()
    server = server_of(1)
    clients = [
        fl.FederatedClient(
            "a", AddingLearner(1), handlers=[At(Event.RECEIVE_MODEL, lambda ctx: ctx.set_model(replacement))]
        ),
        fl.FederatedClient("b", AddingLearner(3), handlers=[b]),
    ]
    result = server.run(clients)
    assert values(result.weights) == (52.0, 52.0, 52.0)  # a trained from 100, b from 0
    (ctx,) = b.at(Event.RECEIVE_MODEL)
    assert ctx.model is not None
    assert ctx.model.weights is not None
    assert values(ctx.model.weights) == (0.0, 0.0, 0.0)


def test_the_round_and_the_number_of_rounds_are_in_every_context() -> None:
    recorder, of_client = Recorder(), Recorder()
    server_of(3, handlers=[recorder]).run([fl.FederatedClient("a", AddingLearner(), handlers=[of_client])])
    for seen in (recorder, of_client):
        assert {ctx[Key.NUM_ROUNDS] for ctx in seen.contexts} == {3}
    for event in (Event.START_ROUND, Event.RECEIVE_CONTRIBUTION, Event.END_AGGREGATION, Event.END_ROUND):
        assert [ctx[Key.ROUND] for ctx in recorder.at(event)] == [0, 1, 2]
    for event in (Event.GET_MODEL, Event.RECEIVE_MODEL):
        assert [ctx[Key.ROUND] for ctx in of_client.at(event)] == [0, 1, 2]
    assert [ctx[Key.ROUND] for ctx in recorder.at(Event.SEND_MODEL)] == [0, 1, 2, 3]
    assert {ctx[Key.ROUND] for ctx in recorder.at(Event.RECEIVE_VALIDATION_RESULTS)} == {3}


def test_an_accepted_contribution_is_in_the_context_when_it_is_received() -> None:
    recorder = Recorder()
    learners = {"b": AddingLearner(3, aggregation_weight=3, n_iter=7), "a": AddingLearner(1)}
    server_of(1, handlers=[recorder]).run(clients_of(learners))
    first, second = recorder.at(Event.RECEIVE_CONTRIBUTION)
    for ctx, name in ((first, "b"), (second, "a")):
        assert ctx[Key.CONTRIBUTOR] == ctx[Key.CONTRIBUTION].contributor == name
        assert ctx[Key.REJECTION] is None
    assert first[Key.CONTRIBUTION].n_iter == 7
    assert first[Key.CONTRIBUTION].aggregation_weight == 3
    assert first[Key.CONTRIBUTION].round == 0
    assert first[Key.CONTRIBUTION].kind is fl.Kind.FULL
    assert first[Key.CONTRIBUTION].metrics == {"initial_validation_metric": 0.5, "initial_accuracy": 0.5}
    assert values(first[Key.CONTRIBUTION].weights) == (3.0, 3.0, 3.0)
    assert [c.contributor for c in first[Key.CONTRIBUTIONS]] == ["b"]
    assert [c.contributor for c in second[Key.CONTRIBUTIONS]] == ["a", "b"]
    assert second[Key.REPORT].accepted == ("a", "b")


def test_a_refused_contribution_is_in_the_context_without_its_weights_and_with_the_reason() -> None:
    recorder = Recorder()
    server = server_of(2, handlers=[recorder], min_contributions=1, on_bad_contribution="reject")
    server.run(
        [
            TamperingClient("b", AddingLearner(), tamper=lambda c: replace(c, aggregation_weight=-1), rounds=[0]),
            fl.FederatedClient("a", AddingLearner()),
        ]
    )
    refused, accepted, *rest = recorder.at(Event.RECEIVE_CONTRIBUTION)
    assert isinstance(refused[Key.REJECTION], fl.AggregationWeightError)
    assert refused[Key.CONTRIBUTOR] == "b"
    assert refused[Key.CONTRIBUTION].contributor == "b"
    assert refused[Key.CONTRIBUTION].weights is None
    assert refused[Key.CONTRIBUTIONS] == ()
    assert accepted[Key.REJECTION] is None
    assert [ctx[Key.REJECTION] for ctx in rest] == [None, None]


def test_contributions_are_sorted_by_name_before_aggregation_and_the_model_is_the_one_that_was_sent() -> None:
    recorder = Recorder()
    server_of(2, handlers=[recorder]).run(clients_of({name: AddingLearner(1) for name in ("c", "a", "b")}))
    for number, ctx in enumerate(recorder.at(Event.BEFORE_AGGREGATION)):
        assert type(ctx[Key.CONTRIBUTIONS]) is tuple
        assert [c.contributor for c in ctx[Key.CONTRIBUTIONS]] == ["a", "b", "c"]
        assert ctx.model is not None
        assert ctx.model.weights is not None
        assert by_value(ctx.model.weights) == number
        assert all(by_value(c.weights) == number + 1 for c in ctx[Key.CONTRIBUTIONS])


def test_after_aggregation_the_model_is_the_new_one() -> None:
    recorder = Recorder()
    server_of(2, handlers=[recorder]).run(clients_of({"a": AddingLearner(1)}))
    models = [ctx.model for ctx in recorder.at(Event.END_AGGREGATION)]
    assert [by_value(model.weights) for model in models if model and model.weights] == [1.0, 2.0]


def test_a_round_begins_without_what_is_left_of_the_last_one() -> None:
    recorder = Recorder()
    server_of(2, handlers=[fl.ModelSelectionHandler(), recorder]).run(clients_of({"a": AddingLearner()}))
    for ctx in recorder.at(Event.START_ROUND):
        assert ctx[Key.CONTRIBUTIONS] == ()
        assert ctx[Key.METRICS] == {}
        assert ctx[Key.REPORT].accepted == ()
        assert not {Key.CONTRIBUTION, Key.REJECTION, Key.CONTRIBUTOR} & set(ctx)


def test_events_about_no_client_name_none() -> None:
    recorder = Recorder()
    server_of(2, handlers=[recorder]).run(two_clients())
    about_none = (Event.START_ROUND, Event.BEFORE_AGGREGATION, Event.END_AGGREGATION, Event.END_ROUND, Event.SHUTDOWN)
    for event in about_none:
        assert [Key.CONTRIBUTOR in ctx for ctx in recorder.at(event)] == [False] * len(recorder.at(event))


def test_the_report_of_a_round_is_complete_at_its_end() -> None:
    recorder = Recorder()
    result = server_of(1, handlers=[fl.ModelSelectionHandler(), recorder], kernel="numpy").run(two_clients())
    (ctx,) = recorder.at(Event.END_ROUND)
    report = ctx[Key.REPORT]
    assert report is result.reports[0]
    assert (report.round, report.accepted, report.rejected, report.absent, report.quits) == (0, ("a", "b"), (), (), ())
    assert report.total_weight == 4.0
    assert report.aggregation_bytes == 2 * (6 * 4 + 3 * 8 + 8)
    assert report.kernel == "numpy"
    assert report.metrics == {"selection": 0.5}
    assert report.handler_failures == ()
    assert report.error is None
    assert 0 < report.aggregation_seconds <= report.seconds


def test_a_report_can_be_written_as_json() -> None:
    server = server_of(2, min_contributions=1, on_bad_contribution="reject", on_handler_error="log",
                       handlers=[At(Event.START_ROUND, raising(OSError("disk full")))])  # fmt: skip
    clients = [
        *clients_of({"a": AddingLearner(), "b": AddingLearner(absent=[0]), "c": AddingLearner(during=failing(0))}),
        TamperingClient("d", AddingLearner(), tamper=lambda c: replace(c, round=9), rounds=[0]),
    ]
    report = json.loads(json.dumps(server.run(clients).reports[0].as_dict()))
    assert report["accepted"] == ["a"]
    assert report["absent"] == ["b"]
    assert report["quits"] == [{"contributor": "c", "cause": "RuntimeError", "message": "out of memory"}]
    assert report["rejected"][0]["contributor"] == "d"
    assert report["rejected"][0]["cause"] == "RoundError"
    assert report["handler_failures"] == ["federation.At at _startRound: OSError: disk full"]


# The average


@pytest.mark.parametrize("kind", list(fl.Kind))
@pytest.mark.parametrize("exact", [False, True])
def test_full_weights_and_differences_give_the_weighted_mean(kind: fl.Kind, exact: bool) -> None:
    learners = {"a": AddingLearner(1), "b": AddingLearner(3, aggregation_weight=3)}
    result = server_of(2, kind=kind, exact=exact).run(clients_of(learners, kind=kind))
    # (1·1 + 3·3) / 4 = 2.5 a round; the counter rounds it half to even, 2.5 → 2 and then 4.5 → 4.
    assert values(result.weights) == (5.0, 5.0, 4.0)
    assert {name: (a.dtype, a.shape) for name, a in result.weights.items()} == {
        name: (a.dtype, a.shape) for name, a in initial_weights().items()
    }


@pytest.mark.parametrize("kind", list(fl.Kind))
def test_what_a_client_contributes_is_what_its_kind_says(kind: fl.Kind) -> None:
    recorder = Recorder()
    server = fl.FederatedServer(noise(1), num_rounds=1, kind=kind, handlers=[recorder])
    server.run(clients_of({"a": AddingLearner(2)}, kind=kind))
    (ctx,) = recorder.at(Event.RECEIVE_CONTRIBUTION)
    contribution = ctx[Key.CONTRIBUTION]
    assert contribution.kind is kind
    start = noise(1)
    trained = {name: (array + 2).astype(array.dtype) for name, array in start.items()}
    if kind is fl.Kind.FULL:
        assert bits(contribution.weights) == bits(trained)
    else:
        for name, array in trained.items():
            expected = (array.astype(np.float64) - start[name].astype(np.float64)).astype(array.dtype)
            assert contribution.weights[name].tobytes() == expected.tobytes()


def test_the_order_of_the_clients_list_does_not_change_the_bits() -> None:
    learners = {name: AddingLearner(noise(i), aggregation_weight=i + 0.3) for i, name in enumerate("abcd", 1)}
    results = []
    for order in permutations("abcd"):
        handlers = [fl.ModelSelectionHandler(), fl.ServerValidationHandler(NormEvaluator(), 1)]
        server = fl.FederatedServer(noise(9), num_rounds=2, handlers=handlers)
        results.append(bits(server.run(clients_of({name: learners[name] for name in order})).weights))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("max_workers", [1, 2, 5])
def test_the_number_of_workers_does_not_change_the_bits(max_workers: int) -> None:
    learners = {name: AddingLearner(noise(i), aggregation_weight=i + 0.3) for i, name in enumerate("abcd", 1)}
    server = fl.FederatedServer(noise(9), num_rounds=2)
    assert bits(server.run(clients_of(learners), max_workers=max_workers).weights) == bits(
        server.run(clients_of(learners)).weights
    )


def test_the_same_server_and_clients_run_twice_to_the_same_bits() -> None:
    learners = {name: AddingLearner(noise(i), score=by_value) for i, name in enumerate("abc")}
    handlers = [
        fl.ModelSelectionHandler(weigh_by_local_iter=True),
        fl.ServerValidationHandler(NormEvaluator(-1.0), 1),
    ]
    server = fl.FederatedServer(noise(9), num_rounds=3, handlers=handlers)
    clients = clients_of(learners)
    first, second = server.run(clients), server.run(clients)
    assert bits(first.weights) == bits(second.weights)
    assert first.best is not None
    assert second.best is not None
    assert (first.best.round, first.best.metric) == (second.best.round, second.best.metric)
    assert bits(first.best.weights) == bits(second.best.weights)
    assert first.cross_site == second.cross_site
    assert [report.metrics for report in first.reports] == [report.metrics for report in second.reports]


def test_a_client_that_left_one_job_takes_part_in_the_next() -> None:
    client = fl.FederatedClient("b", AddingLearner(3))
    leave = At(Event.END_ROUND, lambda ctx: client.quit("lunch") if ctx[Key.ROUND] == 0 else None)
    server = server_of(2, handlers=[leave], min_contributions=1)
    clients = [*clients_of({"a": AddingLearner(1)}), client]
    first, second = server.run(clients), server.run(clients)
    assert [report.accepted for report in first.reports] == [("a", "b"), ("a",)]
    assert [report.accepted for report in second.reports] == [("a", "b"), ("a",)]


def test_the_initial_weights_are_copied() -> None:
    mine = initial_weights()
    server = fl.FederatedServer(mine, num_rounds=1)
    mine["b"][:] = 7
    mine["new"] = np.zeros(1)
    assert values(server.run(clients_of({"a": AddingLearner(1)})).weights) == (1.0, 1.0, 1.0)


def test_a_client_that_goes_on_training_in_place_does_not_change_the_aggregate() -> None:
    class InPlace(AddingLearner):
        """Gives its own arrays away and goes on writing to them."""

        def __init__(self) -> None:
            super().__init__()
            self.arrays = initial_weights()

        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
            for array in self.arrays.values():
                array += 1
            return fl.TrainingResult(self.arrays, 1)

    learner = InPlace()

    def spoil(ctx: fl.FLContext) -> None:
        for array in learner.arrays.values():
            array += 1000

    kept: list[fl.Contribution] = []
    handlers = [
        At(Event.RECEIVE_CONTRIBUTION, lambda ctx: kept.append(ctx[Key.CONTRIBUTION])),
        At(Event.RECEIVE_CONTRIBUTION, spoil),
        At(Event.END_ROUND, spoil),
    ]
    result = server_of(1, handlers=handlers).run(clients_of({"a": learner}))
    assert values(result.weights) == (1.0, 1.0, 1.0)
    assert kept[0].weights is not None
    assert values(kept[0].weights) == (1.0, 1.0, 1.0)


def test_the_weights_that_a_custom_client_sends_are_copied() -> None:
    live = initial_weights()

    def send_live(contribution: fl.Contribution) -> fl.Contribution:
        for array in live.values():
            array[...] = 1
        return replace(contribution, weights=live)

    def spoil(ctx: fl.FLContext) -> None:
        for array in live.values():
            array[...] = 1000

    server = server_of(1, handlers=[At(Event.RECEIVE_CONTRIBUTION, spoil)])
    result = server.run([TamperingClient("a", AddingLearner(), tamper=send_live, rounds=[0])])
    assert values(result.weights) == (1.0, 1.0, 1.0)


# Nothing that is handed out can be changed


def parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The value and all it holds, with a word for where it is."""
    yield type(value).__name__, value
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, tuple | list):
        inner = value
    elif dataclasses.is_dataclass(value):
        inner = vars(value).values()
    for item in inner:
        for where, part in parts_of(item):
            yield f"{type(value).__name__} > {where}", part


def mutable_parts(value: Any) -> list[str]:
    return [
        where
        for where, part in parts_of(value)
        if (isinstance(part, np.ndarray) and part.flags.writeable)
        or (isinstance(part, dict) and not isinstance(part, FrozenDict))
        or isinstance(part, list | set | bytearray)
        or rebindable(part)
    ]


def rebindable(part: Any) -> bool:
    """Whether it is a dataclass that is not frozen."""
    parameters: Any = getattr(type(part), "__dataclass_params__", None)
    return parameters is not None and not parameters.frozen


def test_nothing_that_the_library_puts_into_a_context_can_be_changed() -> None:
    recorder, of_client = Recorder(), Recorder()
    handlers = [fl.ModelSelectionHandler(), fl.ServerValidationHandler(NormEvaluator(), 1), recorder]
    server = server_of(2, handlers=handlers, min_contributions=1, on_bad_contribution="reject")
    clients = [
        fl.FederatedClient("a", AddingLearner(score=by_value), handlers=[of_client]),
        fl.FederatedClient("b", AddingLearner(during=failing(1))),
        TamperingClient("c", AddingLearner(), tamper=lambda c: replace(c, round=9), rounds=[0]),
    ]
    result = server.run(clients)
    assert len(recorder.contexts) > 20
    for ctx in (*recorder.contexts, *of_client.contexts):
        assert {key: mutable_parts(value) for key, value in ctx.items() if mutable_parts(value)} == {}
        assert mutable_parts(ctx.get_model()) == []
    assert {key for ctx in recorder.contexts for key in ctx} >= {
        Key.CONTRIBUTIONS,
        Key.CONTRIBUTION,
        Key.VALIDATION_RESULTS,
        Key.REPORT,
        Key.METRICS,
        Key.BEST_RECEIVED,
        Key.BEST_AGGREGATED,
    }
    for part in (result.weights, result.best, result.reports, result.validation_results, result.metrics):
        assert mutable_parts(part) == []


def test_a_learner_gets_read_only_weights() -> None:
    seen: list[list[str]] = []

    class Watching(AddingLearner):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
            seen.append(mutable_parts(weights))
            return super().train(weights, ctx)

        def validate(self, weights: WeightDict, ctx: fl.FLContext) -> dict[str, float]:
            seen.append(mutable_parts(weights))
            return {"accuracy": 0.5}

    server_of(1).run(clients_of({"a": Watching()}))
    # Validate what was received, train, validate that; then the final model and the own best.
    assert seen == [[]] * 5


# Clients that leave or sit out


def test_a_client_that_raises_leaves_and_the_job_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    recorder, lifecycle = Recorder(), Lifecycle()
    error = RuntimeError("out of memory")
    clients = [
        *clients_of({"a": AddingLearner(1)}),
        fl.FederatedClient("b", AddingLearner(3, during=failing(1, error=error)), handlers=[lifecycle]),
    ]
    result = server_of(3, handlers=[recorder], min_contributions=1).run(clients)
    assert [report.accepted for report in result.reports] == [("a", "b"), ("a",), ("a",)]
    assert [[f.contributor for f in report.quits] for report in result.reports] == [[], ["b"], []]
    assert [(f.contributor, f.error) for f in result.quits] == [("b", error)]
    assert values(result.weights) == (4.0, 4.0, 4.0)
    assert recorder.with_contributors().count((Event.CLIENT_QUIT, "b")) == 1
    left = recorder.with_contributors().index((Event.CLIENT_QUIT, "b"))
    assert all(name != "b" for _, name in recorder.with_contributors()[left + 1 :])
    assert recorder.contexts[left][Key.ROUND] == 1
    assert (lifecycle.started, lifecycle.shut_down) == (1, 1)
    assert "b leaves the job: RuntimeError: out of memory" in caplog.text


def test_a_clients_own_handlers_are_shut_down_when_it_leaves_and_not_when_the_job_ends() -> None:
    log: list[str] = []
    clients = [
        *clients_of({"a": AddingLearner(1)}),
        fl.FederatedClient(
            "b",
            AddingLearner(during=failing(0)),
            handlers=[At(Event.SHUTDOWN, lambda ctx: log.append("b is shut down"))],
        ),
    ]
    end_round = At(Event.END_ROUND, lambda ctx: log.append(f"round {ctx[Key.ROUND]}"))
    server_of(2, handlers=[end_round], min_contributions=1).run(clients)
    assert log == ["b is shut down", "round 0", "round 1"]


@pytest.mark.parametrize("where", ["train", "validate", "a client's handler"])
def test_whatever_a_client_raises_in_a_round_makes_it_leave(where: str) -> None:
    class Failing(AddingLearner):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
            if ctx[Key.ROUND] == 1 and where == "train":
                raise OSError(where)
            return super().train(weights, ctx)

        def validate(self, weights: WeightDict, ctx: fl.FLContext) -> dict[str, float]:
            if ctx[Key.ROUND] == 1 and where == "validate":
                return {"another metric": 0.5}
            return {"accuracy": 0.5}

    handlers = []
    if where == "a client's handler":
        handlers = [At(Event.GET_MODEL, lambda ctx: raising(OSError(where))(ctx) if ctx[Key.ROUND] == 1 else None)]
    clients = [
        *clients_of({"a": AddingLearner(1)}),
        fl.FederatedClient("b", Failing(1), handlers=handlers),
    ]
    result = server_of(3, min_contributions=1).run(clients)
    assert [len(report.quits) for report in result.reports] == [0, 1, 0]
    assert [failure.contributor for failure in result.quits] == ["b"]
    assert values(result.weights) == (3.0, 3.0, 3.0)
    expected = {"train": OSError, "validate": fl.MetricError, "a client's handler": fl.HandlerError}
    assert type(result.quits[0].error) is expected[where]


def test_a_client_can_quit_of_its_own_will() -> None:
    client = fl.FederatedClient("b", AddingLearner(3))
    leave = At(Event.END_ROUND, lambda ctx: client.quit("going home") if ctx[Key.ROUND] == 0 else None)
    result = server_of(3, handlers=[leave], min_contributions=1).run([*clients_of({"a": AddingLearner(1)}), client])
    assert [report.accepted for report in result.reports] == [("a", "b"), ("a",), ("a",)]
    (failure,) = result.quits
    assert isinstance(failure.error, fl.ClientQuitError)
    assert failure.error.contributor == "b"
    assert str(failure.error) == "b: going home"
    assert failure.cause == "ClientQuitError"


@pytest.mark.parametrize("event", [Event.SUBMIT_LOCAL_BEST_MODEL, Event.RECEIVE_VALIDATION_MODEL])
def test_a_client_that_leaves_after_the_last_round_leaves_the_others_to_finish(event: str) -> None:
    recorder = Recorder()
    clients = [
        *clients_of({"a": AddingLearner(1, score=by_value)}),
        fl.FederatedClient("b", AddingLearner(1), handlers=[At(event, raising(OSError("gone")))]),
    ]
    result = server_of(1, handlers=[recorder]).run(clients)
    assert values(result.weights) == (1.0, 1.0, 1.0)
    assert [failure.contributor for failure in result.quits] == ["b"]
    assert result.cross_site["a"] == {"a": 1.0}
    assert recorder.with_contributors().count((Event.CLIENT_QUIT, "b")) == 1
    assert recorder.with_contributors()[-2:] == [(Event.CLIENT_QUIT, "a"), (Event.SHUTDOWN, None)]


@pytest.mark.parametrize(("min_contributions", "required"), [(None, 2), (2, 2)])
def test_a_job_ends_when_too_few_clients_are_left(min_contributions: int | None, required: int) -> None:
    recorder = Recorder()
    clients = clients_of({"a": AddingLearner(1), "b": AddingLearner(3, during=failing(1))})
    server = server_of(5, handlers=[recorder], min_contributions=min_contributions)
    with pytest.raises(
        fl.TooFewContributionsError, match=r"1 clients? (is|are) left, 2 required.*out of memory"
    ) as caught:
        server.run(clients)
    assert (caught.value.count, caught.value.required, caught.value.round) == (1, required, 1)
    assert recorder.events[-2:] == [Event.END_ROUND, Event.SHUTDOWN]
    failed_round = recorder.at(Event.END_ROUND)[-1][Key.REPORT]
    assert isinstance(failed_round.error, fl.TooFewContributionsError)
    assert server.ctx.model is not None
    assert server.ctx.model.weights is not None
    assert values(server.ctx.model.weights) == (2.0, 2.0, 2.0)


def test_a_client_that_cannot_start_does_not_take_part() -> None:
    recorder, before = Recorder(), Lifecycle()
    clients = [
        *clients_of({"a": AddingLearner(1)}),
        fl.FederatedClient("b", AddingLearner(3), handlers=[before, At(Event.STARTUP, raising(OSError("no disk")))]),
    ]
    result = server_of(1, handlers=[recorder], min_contributions=1).run(clients)
    assert [(f.contributor, type(f.error)) for f in result.quits] == [("b", fl.HandlerError)]
    assert values(result.weights) == (1.0, 1.0, 1.0)
    assert [name for event, name in recorder.with_contributors() if event == Event.CLIENT_REGISTER] == ["a"]
    assert (before.started, before.shut_down) == (1, 1)
    with pytest.raises(fl.TooFewContributionsError, match="no disk"):
        server_of(1).run(clients)


def test_a_learner_that_returns_none_sits_the_round_out() -> None:
    clients = clients_of({"a": AddingLearner(1), "b": AddingLearner(3, absent=[1])})
    result = server_of(3, min_contributions=1).run(clients)
    assert [report.absent for report in result.reports] == [(), ("b",), ()]
    assert [report.accepted for report in result.reports] == [("a", "b"), ("a",), ("a", "b")]
    assert result.quits == ()
    assert values(result.weights)[:2] == (5.0, 5.0)


def test_a_round_below_the_minimum_fails_and_later_rounds_go_on(caplog: pytest.LogCaptureFixture) -> None:
    learners = {"a": AddingLearner(1), "b": AddingLearner(1, absent=[1]), "c": AddingLearner(1, absent=[1])}
    result = server_of(3, min_contributions=2).run(clients_of(learners))
    assert values(result.weights) == (2.0, 2.0, 2.0)
    assert [report.error is None for report in result.reports] == [True, False, True]
    error = result.reports[1].error
    assert isinstance(error, fl.TooFewContributionsError)
    assert (error.count, error.required, error.round) == (1, 2, 1)
    assert result.reports[1].accepted == ("a",)
    assert result.reports[1].total_weight == 0.0
    assert "the global model stands" in caplog.text


def test_the_global_model_stands_in_a_failed_round_whatever_a_handler_bound_on_the_way() -> None:
    replacement = fl.ModelData(FrozenWeights({name: array + 100 for name, array in initial_weights().items()}))
    handlers = [
        At(Event.SEND_MODEL, lambda ctx: ctx.set_model(replacement)),
        At(Event.RECEIVE_CONTRIBUTION, lambda ctx: ctx.set_model(replacement)),
    ]
    clients = clients_of({"a": AddingLearner(1), "b": AddingLearner(1, absent=[1])})
    result = server_of(2, min_contributions=2, handlers=handlers).run(clients)
    assert result.reports[1].error is not None
    assert values(result.weights) == (1.0, 1.0, 1.0)


# Bad contributions

Tamper = Callable[[fl.Contribution], Any]


def altered(contribution: fl.Contribution, **fields: Any) -> fl.Contribution:
    """The contribution with some fields replaced by whatever a client might send."""
    return replace(contribution, **fields)


def with_weights(change: Callable[[dict[Any, Any]], object]) -> Tamper:
    """Changes the weight dict of a contribution."""

    def tamper(contribution: fl.Contribution) -> fl.Contribution:
        weights: dict[Any, Any] = {name: array.copy() for name, array in (contribution.weights or {}).items()}
        change(weights)
        return altered(contribution, weights=weights)

    return tamper


def with_element(name: str, value: float) -> Tamper:
    return with_weights(lambda weights: weights[name].__setitem__(..., value))


BAD: dict[str, tuple[Tamper, type[fl.ContributionError], str | None]] = {
    "a variable is missing": (with_weights(lambda w: w.pop("b")), fl.NamesError, "b"),
    "a variable is extra": (with_weights(lambda w: w.update(new=np.zeros(1))), fl.NamesError, "new"),
    "no variable at all": (with_weights(lambda w: w.clear()), fl.NamesError, "w"),
    "another shape": (with_weights(lambda w: w.update(w=w["w"].T)), fl.ShapeError, "w"),
    "a shape that broadcasts": (with_weights(lambda w: w.update(w=w["w"][0])), fl.ShapeError, "w"),
    "another dtype": (with_weights(lambda w: w.update(b=w["b"].astype(np.float32))), fl.DtypeError, "b"),
    "objects": (with_weights(lambda w: w.update(b=w["b"].astype(object))), fl.DtypeError, "b"),
    "NaN": (with_element("w", math.nan), fl.NonFiniteError, "w"),
    "infinity": (with_element("b", math.inf), fl.NonFiniteError, "b"),
    "a list for an array": (with_weights(lambda w: w.update(b=[0.0, 0.0, 0.0])), fl.WeightsTypeError, "b"),
    "a name that is no str": (with_weights(lambda w: w.update({1: np.zeros(1)})), fl.WeightsTypeError, None),
    "weights that are no dict": (lambda c: altered(c, weights=[1.0]), fl.WeightsTypeError, None),
    "no weights": (lambda c: altered(c, weights=None), fl.WeightsTypeError, None),
    "no aggregation weight": (lambda c: altered(c, aggregation_weight=None), fl.AggregationWeightError, None),
    "aggregation weight zero": (lambda c: altered(c, aggregation_weight=0), fl.AggregationWeightError, None),
    "aggregation weight negative": (lambda c: altered(c, aggregation_weight=-2), fl.AggregationWeightError, None),
    "aggregation weight NaN": (lambda c: altered(c, aggregation_weight=math.nan), fl.AggregationWeightError, None),
    "aggregation weight infinite": (lambda c: altered(c, aggregation_weight=math.inf), fl.AggregationWeightError, None),
    "aggregation weight no number": (lambda c: altered(c, aggregation_weight="3"), fl.AggregationWeightError, None),
    "a stale round": (lambda c: altered(c, round=(c.round or 0) - 1), fl.RoundError, None),
    "a round to come": (lambda c: altered(c, round=(c.round or 0) + 1), fl.RoundError, None),
    "a round that is no number": (lambda c: altered(c, round="1"), fl.RoundError, None),
    "a round that is an array": (lambda c: altered(c, round=np.array([1, 2])), fl.RoundError, None),
    "another kind": (lambda c: altered(c, kind=fl.Kind.DIFF), fl.KindError, None),
    "an unknown kind": (lambda c: altered(c, kind="gradient"), fl.KindError, None),
    "a metric that is no number": (lambda c: altered(c, metrics={"m": "high"}), fl.MetricError, None),
    "a metric that is an array": (lambda c: altered(c, metrics={"m": np.zeros(2)}), fl.MetricError, None),
    "iterations that are no int": (lambda c: altered(c, n_iter=0.5), fl.MetricError, None),
    "in another's name": (lambda c: altered(c, contributor="a"), fl.UnknownContributorError, None),
    "in an unknown name": (lambda c: altered(c, contributor="z"), fl.UnknownContributorError, None),
    "in no name": (lambda c: altered(c, contributor=None), fl.UnknownContributorError, None),
    "in the name of an array": (
        lambda c: altered(c, contributor=np.array(["b", "a"])),
        fl.UnknownContributorError,
        None,
    ),
    "no contribution": (lambda c: {"w": 1}, fl.WeightsTypeError, None),
    "a bare weight dict": (lambda c: c.weights, fl.WeightsTypeError, None),
    "a string": (lambda c: "contribution", fl.WeightsTypeError, None),
    "a class": (lambda c: fl.Contribution, fl.WeightsTypeError, None),
}
every_bad_kind = pytest.mark.parametrize(("tamper", "error", "name"), BAD.values(), ids=BAD)


def tampering_job(tamper: Tamper, **arguments: Any) -> tuple[fl.FederatedServer, list[fl.FederatedClient]]:
    """Three rounds in which `b` is bad in the second; every bit of its other contributions matters."""
    server = fl.FederatedServer(noise(9), num_rounds=3, min_contributions=1, **arguments)
    return server, [
        fl.FederatedClient("a", AddingLearner(noise(1), aggregation_weight=1.3)),
        TamperingClient("b", AddingLearner(noise(2), aggregation_weight=2.7), tamper=tamper, rounds=[1]),
        fl.FederatedClient("c", AddingLearner(noise(3), aggregation_weight=0.9)),
    ]


@every_bad_kind
def test_a_bad_contribution_ends_the_job_by_default_and_is_named(
    tamper: Tamper, error: type[fl.ContributionError], name: str | None
) -> None:
    server, clients = tampering_job(tamper)
    with pytest.raises(error) as caught:
        server.run(clients)
    assert caught.value.contributor == "b"
    assert "b" in str(caught.value)
    assert caught.value.name == name
    if name is not None:
        assert repr(name) in str(caught.value)


@every_bad_kind
def test_a_bad_contribution_can_be_left_out_and_is_in_the_report(
    tamper: Tamper, error: type[fl.ContributionError], name: str | None
) -> None:
    server, clients = tampering_job(tamper, on_bad_contribution="reject")
    result = server.run(clients)
    assert [report.accepted for report in result.reports] == [("a", "b", "c"), ("a", "c"), ("a", "b", "c")]
    assert [len(report.rejected) for report in result.reports] == [0, 1, 0]
    (failure,) = result.reports[1].rejected
    assert failure.contributor == "b"
    assert isinstance(failure.error, error)
    assert failure.cause == type(failure.error).__name__
    assert failure.error.name == name
    assert result.quits == ()


@every_bad_kind
def test_the_aggregate_is_as_if_a_bad_contribution_had_never_come(
    tamper: Tamper, error: type[fl.ContributionError], name: str | None
) -> None:
    models = []
    for sat_out in (False, True):
        recorder = Recorder()
        server, clients = tampering_job(tamper, on_bad_contribution="reject", handlers=[recorder])
        if sat_out:
            learner = AddingLearner(noise(2), aggregation_weight=2.7, absent=[1])
            clients[1] = fl.FederatedClient("b", learner)
        result = server.run(clients)
        seen = [ctx.model for ctx in recorder.at(Event.END_AGGREGATION)]
        models.append([bits(model.weights) for model in seen if model and model.weights] + [bits(result.weights)])
    assert models[0] == models[1]
    assert len(models[0]) == 4


@pytest.mark.parametrize("kind", list(fl.Kind))
def test_training_that_diverges_is_a_bad_contribution_whatever_the_kind(kind: fl.Kind) -> None:
    class Diverging(AddingLearner):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
            result = super().train(weights, ctx)
            if result is not None and ctx[Key.ROUND] == 1:
                np.asarray(result.weights["w"])[0, 0] = math.nan
            return result

    clients = clients_of({"a": AddingLearner(1), "b": Diverging(1)}, kind=kind)
    result = server_of(3, kind=kind, min_contributions=1, on_bad_contribution="reject").run(clients)
    assert [report.accepted for report in result.reports] == [("a", "b"), ("a",), ("a", "b")]
    (failure,) = result.reports[1].rejected
    assert isinstance(failure.error, fl.NonFiniteError)
    assert (failure.error.contributor, failure.error.name) == ("b", "w")
    with pytest.raises(fl.NonFiniteError, match="b: 'w'"):
        server_of(3, kind=kind, min_contributions=1).run(clients)


@pytest.mark.parametrize("kind", list(fl.Kind))
def test_trained_weights_of_another_shape_are_a_bad_contribution_whatever_the_kind(kind: fl.Kind) -> None:
    class Reshaping(AddingLearner):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
            result = super().train(weights, ctx)
            if result is not None and ctx[Key.ROUND] == 1:
                return fl.TrainingResult({**result.weights, "w": np.zeros((3, 2), np.float32)}, 1)
            return result

    clients = clients_of({"a": AddingLearner(1), "b": Reshaping(1)}, kind=kind)
    result = server_of(3, kind=kind, min_contributions=1, on_bad_contribution="reject").run(clients)
    assert [report.accepted for report in result.reports] == [("a", "b"), ("a",), ("a", "b")]
    (failure,) = result.reports[1].rejected
    assert isinstance(failure.error, fl.ShapeError)
    assert (failure.error.contributor, failure.error.name) == ("b", "w")


@pytest.mark.parametrize("kind", list(fl.Kind))
@pytest.mark.parametrize(
    ("trained", "name"),
    [
        (None, None),
        ([1.0], None),
        ({"w": [[0.0] * 3] * 2, "b": np.zeros(3), "steps": np.array(0)}, "w"),
        ({"w": memoryview(bytes(24)), "b": np.zeros(3), "steps": np.array(0)}, "w"),
    ],
    ids=["None", "list", "dict of lists", "dict of buffers"],
)
def test_a_learner_that_returns_no_arrays_is_told_so_by_client_and_variable(
    trained: Any, name: str | None, kind: fl.Kind
) -> None:
    class Confused(AddingLearner):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
            return fl.TrainingResult(trained, 1)

    clients = clients_of({"a": AddingLearner(1), "b": Confused(1)}, kind=kind)
    server = server_of(1, kind=kind, min_contributions=1, on_bad_contribution="reject")
    report = server.run(clients).reports[0]
    assert report.accepted == ("a",)
    (failure,) = (*report.rejected, *report.quits)
    assert isinstance(failure.error, fl.WeightsTypeError)
    assert (failure.error.contributor, failure.error.name) == ("b", name)


def test_a_second_contribution_of_the_same_client_is_refused() -> None:
    server, clients = tampering_job(lambda c: [c, replace(c, aggregation_weight=9)], on_bad_contribution="reject")
    result = server.run(clients)
    assert [report.accepted for report in result.reports] == [("a", "b", "c")] * 3
    (failure,) = result.reports[1].rejected
    assert isinstance(failure.error, fl.DuplicateContributionError)
    assert failure.contributor == "b"
    server, clients = tampering_job(lambda c: c)
    assert bits(server.run(clients).weights) == bits(result.weights)


def test_every_client_of_a_round_is_accounted_for_even_one_that_sends_an_empty_list() -> None:
    server, clients = tampering_job(lambda c: [], on_bad_contribution="reject")
    report = server.run(clients).reports[1]
    named = [*report.accepted, *(f.contributor for f in report.rejected), *report.absent]
    assert sorted(named) == ["a", "b", "c"]


def test_what_is_checked_is_what_is_averaged() -> None:
    class Shifty(dict[str, Array]):
        """Shows good arrays to whoever looks first, and bad ones to whoever looks again."""

        looks = 0

        def items(self) -> Any:
            self.looks += 1
            return super().items() if self.looks == 1 else dict.fromkeys(self, np.array(math.nan)).items()

    server, clients = tampering_job(lambda c: altered(c, weights=Shifty(c.weights or {})), on_bad_contribution="reject")
    result = server.run(clients)
    assert len(result.reports) == 3
    assert all(np.isfinite(array).all() for array in result.weights.values())


def test_differences_that_lead_out_of_the_range_of_a_dtype_do_not_end_a_job_that_rejects() -> None:
    # Each is finite, and so is their mean; the global model plus that mean is not.
    start = {"w": np.full(2, 3e38, np.float32)}
    server = fl.FederatedServer(
        start, num_rounds=2, kind=fl.Kind.DIFF, min_contributions=1, on_bad_contribution="reject"
    )
    clients = [
        fl.FederatedClient("a", AddingLearner(0), kind=fl.Kind.DIFF),
        TamperingClient(
            "b",
            AddingLearner(0, aggregation_weight=9),
            kind=fl.Kind.DIFF,
            tamper=lambda c: replace(c, weights={"w": np.full(2, 3e38, np.float32)}),
            rounds=[0],
        ),
    ]
    result = server.run(clients)
    first, second = result.reports
    assert first.error is not None or [failure.contributor for failure in first.rejected] == ["b"]
    assert second.accepted == ("a", "b")
    assert bits(result.weights) == bits(start)


def test_a_round_fails_when_every_contribution_is_bad_and_the_next_goes_on() -> None:
    tamper = with_element("w", math.nan)
    clients = [TamperingClient(name, AddingLearner(1), tamper=tamper, rounds=[0]) for name in "ab"]
    result = server_of(2, min_contributions=1, on_bad_contribution="reject").run(clients)
    assert [f.contributor for f in result.reports[0].rejected] == ["a", "b"]
    assert result.reports[0].error is not None
    assert values(result.weights) == (1.0, 1.0, 1.0)


def test_an_exact_job_refuses_what_leaves_its_domain_and_names_it() -> None:
    learners = {"a": AddingLearner(1), "b": AddingLearner(1, aggregation_weight=5e-324)}
    server = server_of(1, exact=True, min_contributions=1, on_bad_contribution="reject")
    (failure,) = server.run(clients_of(learners)).reports[0].rejected
    assert isinstance(failure.error, fl.ExactDomainError)
    assert failure.contributor == "b"


# Handlers that fail


def broken(event: str, error: Exception) -> At:
    return At(event, raising(error))


@pytest.mark.parametrize("event", [event for event in SERVER_EVENTS if event != Event.SHUTDOWN])
def test_a_handler_that_raises_ends_the_job_by_default(event: str) -> None:
    error, before, after = OSError("disk full"), Lifecycle(), Lifecycle()
    server = server_of(handlers=[before, broken(event, error), after])
    with pytest.raises(fl.HandlerError, match="disk full") as caught:
        server.run(two_clients())
    assert caught.value.exceptions == (error,)
    assert caught.value.failures[0].event == event
    assert (before.started, before.shut_down) == (1, 1)
    assert (after.started, after.shut_down) == ((0, 0) if event == Event.STARTUP else (1, 1))


def test_a_failing_shutdown_is_raised_after_all_is_shut_down() -> None:
    error, before, after, of_client = OSError("stuck"), Lifecycle(), Lifecycle(), Lifecycle()
    server = server_of(handlers=[before, broken(Event.SHUTDOWN, error), after])
    with pytest.raises(fl.HandlerError) as caught:
        server.run(clients_of({"a": AddingLearner()}, handlers=[of_client]))
    assert caught.value.exceptions == (error,)
    assert [(h.started, h.shut_down) for h in (before, after, of_client)] == [(1, 1)] * 3


def count_of(event: str) -> int:
    """How often a job of two clients and two rounds fires it."""
    recorder = Recorder()
    server_of(handlers=[recorder]).run(two_clients())
    return recorder.events.count(event)


@pytest.mark.parametrize("event", [event for event in SERVER_EVENTS if event != Event.STARTUP])
def test_a_server_told_to_log_goes_on_and_records_every_failure(event: str, caplog: pytest.LogCaptureFixture) -> None:
    error = OSError("disk full")
    result = server_of(handlers=[broken(event, error)], on_handler_error="log").run(two_clients())
    assert values(result.weights) == (5.0, 5.0, 4.0)
    assert [failure.event for failure in result.handler_failures] == [event] * count_of(event)
    assert all(failure.exception is error for failure in result.handler_failures)
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == count_of(event)


@pytest.mark.parametrize(
    "event",
    [
        Event.START_ROUND,
        Event.SEND_MODEL,
        Event.RECEIVE_CONTRIBUTION,
        Event.BEFORE_AGGREGATION,
        Event.END_AGGREGATION,
        Event.END_ROUND,
    ],
)
def test_a_failure_in_a_round_is_in_its_report(event: str) -> None:
    def in_second_round(ctx: fl.FLContext) -> None:
        if ctx[Key.ROUND] == 1:
            raise OSError("disk full")

    result = server_of(3, handlers=[At(event, in_second_round)], on_handler_error="log").run(
        clients_of({"a": AddingLearner()})
    )
    assert [[(f.event, f.handler) for f in report.handler_failures] for report in result.reports] == [
        [],
        [(event, "federation.At")],
        [],
    ]
    assert result.handler_failures == result.reports[1].handler_failures
    assert isinstance(result.handler_failures[0], HandlerFailure)


def test_a_server_that_logs_still_does_not_start_with_a_handler_that_cannot() -> None:
    client = Lifecycle()
    with pytest.raises(fl.HandlerError, match="disk full"):
        server_of(handlers=[broken(Event.STARTUP, OSError("disk full"))], on_handler_error="log").run(
            clients_of({"a": AddingLearner()}, handlers=[client])
        )
    assert client.started == 0


def test_a_failure_that_ends_the_job_is_in_the_report_that_the_context_still_has() -> None:
    error = OSError("disk full")
    server = server_of(handlers=[broken(Event.BEFORE_AGGREGATION, error)])
    with pytest.raises(fl.HandlerError):
        server.run(two_clients())
    report = server.ctx[Key.REPORT]
    assert [(f.event, f.exception) for f in report.handler_failures] == [(Event.BEFORE_AGGREGATION, error)]
    assert report.accepted == ("a", "b")


def test_failures_during_an_abnormal_end_are_notes_on_the_error_that_ended_the_job() -> None:
    first, second = OSError("disk full"), ValueError("stuck")
    server = server_of(handlers=[broken(Event.SHUTDOWN, second), broken(Event.END_ROUND, first)])
    with pytest.raises(fl.HandlerError) as caught:
        server.run(two_clients())
    assert caught.value.exceptions == (first,)
    assert caught.value.__notes__ == ["during shutdown: federation.At at _shutdown: ValueError: stuck"]


def test_a_clients_handler_that_fails_in_shutdown_is_recorded() -> None:
    error = OSError("stuck")
    clients = clients_of({"a": AddingLearner()}, handlers=[broken(Event.SHUTDOWN, error)])
    result = server_of(on_handler_error="log").run(clients)
    assert [failure.exception for failure in result.handler_failures] == [error]


# Every started handler is shut down once


class Watched:
    """A job whose handlers count their starts and shutdowns; one of them may act up in between."""

    def __init__(self) -> None:
        self.counters: dict[str, list[Lifecycle]] = {}

    def chain(self, name: str, *between: fl.Handler) -> list[fl.Handler]:
        self.counters[name] = [Lifecycle(), Lifecycle()]
        return [self.counters[name][0], *between, self.counters[name][1]]

    def unbalanced(self) -> dict[str, list[tuple[int, int]]]:
        """Whoever was started and shut down unequally often, or twice."""
        counts = {name: [(h.started, h.shut_down) for h in chain] for name, chain in self.counters.items()}
        return {name: pairs for name, pairs in counts.items() if not set(pairs) <= {(0, 0), (1, 1)}}

    def started(self, name: str) -> list[int]:
        return [handler.started for handler in self.counters[name]]


def watched_job(
    on_server: Sequence[fl.Handler] = (),
    on_client: Sequence[fl.Handler] = (),
    learner: fl.Learner | None = None,
    client_class: Callable[..., fl.FederatedClient] = fl.FederatedClient,
    **arguments: Any,
) -> tuple[Watched, fl.FederatedServer, list[fl.FederatedClient]]:
    """Three clients; the one in the middle has `on_client` and `learner`."""
    watched = Watched()
    server = server_of(handlers=watched.chain("server", *on_server), **arguments)
    clients = [
        fl.FederatedClient("a", AddingLearner(), handlers=watched.chain("a")),
        client_class("b", learner or AddingLearner(), handlers=watched.chain("b", *on_client)),
        fl.FederatedClient("c", AddingLearner(), handlers=watched.chain("c")),
    ]
    return watched, server, clients


def test_after_a_job_every_handler_has_been_shut_down_once() -> None:
    watched, server, clients = watched_job()
    server.run(clients)
    assert watched.unbalanced() == {}
    assert [watched.started(name) for name in ("server", "a", "b", "c")] == [[1, 1]] * 4


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("event", SERVER_EVENTS)
def test_every_started_handler_is_shut_down_once_when_one_of_the_server_raises(
    event: str, error: type[BaseException]
) -> None:
    watched, server, clients = watched_job(on_server=[At(event, raising(error()))])
    with pytest.raises(fl.HandlerError if error is OSError else error):
        server.run(clients)
    assert watched.unbalanced() == {}
    assert watched.started("server") == ([1, 0] if event == Event.STARTUP else [1, 1])


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("event", CLIENT_EVENTS)
def test_every_started_handler_is_shut_down_once_when_one_of_a_client_raises(
    event: str, error: type[BaseException]
) -> None:
    watched, server, clients = watched_job(on_client=[At(event, raising(error()))], min_contributions=1)
    if error is OSError:
        server.run(clients)
    else:
        with pytest.raises(error):
            server.run(clients)
    assert watched.unbalanced() == {}
    assert watched.started("server") == [1, 1]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["train", "validate"])
def test_every_started_handler_is_shut_down_once_when_a_learner_raises(where: str, error: type[BaseException]) -> None:
    class Failing(AddingLearner):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
            if where == "train":
                raise error
            return super().train(weights, ctx)

        def validate(self, weights: WeightDict, ctx: fl.FLContext) -> dict[str, float]:
            if where == "validate":
                raise error
            return {"accuracy": 0.5}

    watched, server, clients = watched_job(learner=Failing(), min_contributions=1)
    if error is OSError:
        assert [f.contributor for f in server.run(clients).quits] == ["b"]
    else:
        with pytest.raises(error):
            server.run(clients)
    assert watched.unbalanced() == {}


def test_every_started_handler_is_shut_down_once_when_an_evaluator_is_interrupted() -> None:
    class Interrupted(NormEvaluator):
        def evaluate(self, ctx: fl.FLContext) -> None:
            raise KeyboardInterrupt

    watched, server, clients = watched_job(on_server=[fl.ServerValidationHandler(Interrupted(), 1)])
    with pytest.raises(KeyboardInterrupt):
        server.run(clients)
    assert watched.unbalanced() == {}


def test_every_started_handler_is_shut_down_once_after_a_bad_contribution() -> None:
    class Bad(fl.FederatedClient):
        def train_round(self, number: int, request_model: Callable[[], WeightDict]) -> fl.Contribution | None:
            super().train_round(number, request_model)
            return "bad"  # type: ignore[return-value]

    watched, server, clients = watched_job(client_class=Bad)
    with pytest.raises(fl.ContributionError):
        server.run(clients)
    assert watched.unbalanced() == {}


def test_every_started_handler_is_shut_down_once_when_too_few_clients_are_left() -> None:
    watched, server, clients = watched_job(learner=AddingLearner(during=failing(0)))
    with pytest.raises(fl.TooFewContributionsError):
        server.run(clients)
    assert watched.unbalanced() == {}


def test_an_interrupt_in_one_clients_shutdown_does_not_keep_the_others_from_theirs() -> None:
    # The job ends by an error, so that all clients are shut down in one go.
    watched, server, clients = watched_job(
        on_server=[broken(Event.END_ROUND, OSError("disk full"))],
        on_client=[At(Event.SHUTDOWN, raising(KeyboardInterrupt()))],
    )
    with pytest.raises(KeyboardInterrupt):
        server.run(clients)
    assert watched.unbalanced() == {}


def test_every_started_handler_is_shut_down_once_when_the_user_interrupts_while_clients_work() -> None:
    # As Ctrl-C does: the interrupt reaches the main thread, which waits for the clients.
    watched, server, clients = watched_job(learner=AddingLearner(during=lambda ctx: _thread.interrupt_main()))
    with pytest.raises(KeyboardInterrupt):
        server.run(clients)
    assert watched.unbalanced() == {}
    assert [watched.started(name) for name in ("server", "a", "b", "c")] == [[1, 1]] * 4


@pytest.mark.parametrize("error", [None, OSError, KeyboardInterrupt])
def test_no_thread_of_a_job_outlives_it(error: type[BaseException] | None) -> None:
    seen: list[str] = []

    def look(ctx: fl.FLContext) -> None:
        seen.append(threading.current_thread().name)
        if error is not None:
            raise error

    server, clients = server_of(1), clients_of({"a": AddingLearner(during=look), "b": AddingLearner()})
    if error is None:
        server.run(clients)
    else:
        with pytest.raises(fl.TooFewContributionsError if error is OSError else error):
            server.run(clients)
    assert seen[0].startswith("fed_learn-client")
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("fed_learn-client")] == []


def test_an_interrupted_job_can_be_run_again() -> None:
    interrupts = iter([KeyboardInterrupt()])

    def interrupt_once(ctx: fl.FLContext) -> None:
        for error in interrupts:
            raise error

    watched, server, clients = watched_job(on_server=[At(Event.END_AGGREGATION, interrupt_once)])
    with pytest.raises(KeyboardInterrupt):
        server.run(clients)
    result = server.run(clients)
    assert values(result.weights) == (2.0, 2.0, 2.0)
    assert [watched.started(name) for name in ("server", "a", "b", "c")] == [[2, 2]] * 4
    assert all(h.shut_down == 2 for chain in watched.counters.values() for h in chain)


# What handlers may change


def shifted(weights: WeightDict, by: float) -> dict[str, Array]:
    return {name: np.asarray(array + by).astype(array.dtype) for name, array in weights.items()}


def replacing(by: float) -> Callable[[fl.FLContext], object]:
    def action(ctx: fl.FLContext) -> None:
        assert ctx.model is not None
        assert ctx.model.weights is not None
        ctx.set_model(fl.ModelData(shifted(ctx.model.weights, by)))

    return action


@pytest.mark.parametrize("event", [Event.START_ROUND, Event.END_AGGREGATION, Event.END_ROUND])
def test_a_handler_may_replace_the_global_model(event: str) -> None:
    received = Recorder()
    server = server_of(2, handlers=[At(event, replacing(10))])
    result = server.run([fl.FederatedClient("a", AddingLearner(1), handlers=[received])])
    assert values(result.weights) == (22.0, 22.0, 22.0)
    assert type(result.weights) is FrozenWeights
    models = [ctx.model for ctx in received.at(Event.RECEIVE_MODEL)]
    expected = [10.0, 21.0] if event == Event.START_ROUND else [0.0, 11.0]
    assert [by_value(model.weights) for model in models if model and model.weights] == expected


def test_a_replaced_global_model_is_copied_and_put_into_the_order_of_the_schema() -> None:
    mine = {name: array + 5 for name, array in reversed(initial_weights().items())}
    handlers = [
        At(Event.END_AGGREGATION, lambda ctx: ctx.set_model(fl.ModelData(mine))),
        At(Event.END_ROUND, lambda ctx: [array.__iadd__(1000) for array in mine.values() if array.shape]),
    ]
    result = server_of(1, handlers=handlers).run(clients_of({"a": AddingLearner(1)}))
    assert values(result.weights) == (5.0, 5.0, 5.0)
    assert list(result.weights) == list(initial_weights())


@pytest.mark.parametrize("on_handler_error", ["raise", "log"])
@pytest.mark.parametrize("event", [Event.START_ROUND, Event.END_AGGREGATION, Event.END_ROUND])
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (None, fl.WeightsTypeError),
        (fl.ModelData(), fl.WeightsTypeError),
        (fl.ModelData({"w": np.zeros((2, 3), np.float32)}), fl.NamesError),
        (fl.ModelData({**initial_weights(), "w": np.zeros((3, 2), np.float32)}), fl.ShapeError),
        (fl.ModelData({**initial_weights(), "w": np.zeros((2, 3))}), fl.DtypeError),
        (fl.ModelData({**initial_weights(), "b": np.full(3, math.nan)}), fl.NonFiniteError),
        (fl.ModelData({**initial_weights(), "b": [0.0, 0.0, 0.0]}), fl.WeightsTypeError),  # type: ignore[dict-item]
    ],
    ids=["no model", "no weights", "names", "shape", "dtype", "NaN", "no array"],
)
def test_a_bad_replacement_of_the_global_model_is_refused(
    bad: fl.ModelData | None, error: type[fl.FedLearnError], event: str, on_handler_error: str
) -> None:
    watched, server, clients = watched_job(
        on_server=[At(event, lambda ctx: ctx.set_model(bad))], on_handler_error=on_handler_error
    )
    with pytest.raises(error, match=f"handler at {event}"):
        server.run(clients)
    assert watched.unbalanced() == {}


def test_contributions_that_a_handler_rebinds_are_the_ones_that_are_averaged() -> None:
    def drop_b(ctx: fl.FLContext) -> None:
        ctx[Key.CONTRIBUTIONS] = tuple(c for c in ctx[Key.CONTRIBUTIONS] if c.contributor != "b")

    def double_a(ctx: fl.FLContext) -> None:
        ctx[Key.CONTRIBUTIONS] = tuple(
            replace(c, aggregation_weight=c.aggregation_weight * (3 if c.contributor == "a" else 1))
            for c in ctx[Key.CONTRIBUTIONS]
        )

    learners = {"a": AddingLearner(1), "b": AddingLearner(100), "c": AddingLearner(5)}
    handlers = [At(Event.BEFORE_AGGREGATION, drop_b), At(Event.BEFORE_AGGREGATION, double_a)]
    result = server_of(1, handlers=handlers, min_contributions=1).run(clients_of(learners))
    assert values(result.weights) == (2.0, 2.0, 2.0)  # (3·1 + 1·5) / 4
    assert result.reports[0].accepted == ("a", "c")
    assert result.reports[0].total_weight == 4.0


@pytest.mark.parametrize("left", [0, 1])
def test_a_round_in_which_a_handler_leaves_too_few_contributions_fails_and_the_next_goes_on(left: int) -> None:
    def drop(ctx: fl.FLContext) -> None:
        if ctx[Key.ROUND] == 0:
            ctx[Key.CONTRIBUTIONS] = ctx[Key.CONTRIBUTIONS][:left]

    server = server_of(2, handlers=[At(Event.BEFORE_AGGREGATION, drop)], min_contributions=2)
    result = server.run(clients_of({name: AddingLearner(1) for name in "abc"}))
    assert isinstance(result.reports[0].error, fl.TooFewContributionsError)
    assert result.reports[1].error is None
    assert values(result.weights) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("event", [Event.START_ROUND, Event.RECEIVE_CONTRIBUTION, Event.BEFORE_AGGREGATION])
def test_a_handler_can_make_a_round_the_last(event: str) -> None:
    def stop(ctx: fl.FLContext) -> None:
        if ctx[Key.ROUND] == 1:
            ctx[Key.STOP] = "good enough"

    recorder = Recorder()
    result = server_of(9, handlers=[At(event, stop), recorder]).run(clients_of({"a": AddingLearner(1)}))
    assert len(result.reports) == 2
    assert result.stop_reason == "good enough"
    assert values(result.weights) == (2.0, 2.0, 2.0)
    assert {ctx[Key.ROUND] for ctx in recorder.at(Event.RECEIVE_VALIDATION_RESULTS)} == {2}
    assert recorder.events[-1] == Event.SHUTDOWN


def test_a_job_that_runs_to_its_end_has_no_reason_to_have_stopped() -> None:
    assert server_of(1).run(two_clients()).stop_reason is None


# Final scoring and the cross-site validation


def shifted_score(offset: float) -> Callable[[WeightDict], float]:
    return lambda weights: by_value(weights) + offset


def test_the_final_model_and_every_best_are_scored_by_every_client() -> None:
    # Score: the model's value, plus 100 at b. Both clients' last models are their best: 3 + 1 and 3 + 2 …
    learners = {"a": AddingLearner(1, score=by_value), "b": AddingLearner(3, score=shifted_score(100))}
    recorder = Recorder()
    server = server_of(2, handlers=[fl.ModelSelectionHandler(), recorder])
    result = server.run(clients_of(learners))
    # The global models are 0, 2, 4; a trained 1 and 3, b trained 3 and 5; the best global model is the final one.
    assert values(result.weights) == (4.0, 4.0, 4.0)
    assert result.cross_site == {
        "a": {"a": 3.0, "b": 103.0},
        "b": {"a": 5.0, "b": 105.0},
        "global_best": {"a": 4.0, "b": 104.0},
    }
    assert list(result.cross_site) == ["a", "b", GLOBAL_BEST]
    scores = [(r.model, r.contributor, r.metrics["initial_validation_metric"]) for r in result.validation_results]
    assert scores == [
        (FINAL_MODEL, "a", 4.0),
        (FINAL_MODEL, "b", 104.0),
        *((model, client, score) for model, row in result.cross_site.items() for client, score in row.items()),
    ]
    assert result.metrics == {"selection": 54.0}
    contexts = recorder.at(Event.RECEIVE_VALIDATION_RESULTS)
    for ctx, expected in zip(contexts, result.validation_results, strict=True):
        assert ctx[Key.VALIDATION_RESULTS][-1] is expected
        assert {r.model for r in ctx[Key.VALIDATION_RESULTS]} == {expected.model}
        assert ctx[Key.CONTRIBUTOR] == expected.contributor
    assert [len(ctx[Key.VALIDATION_RESULTS]) for ctx in contexts] == [1, 2] * 4
    models = [ctx.model for ctx in contexts]
    assert [by_value(model.weights) for model in models if model and model.weights] == [4, 4, 3, 3, 5, 5, 4, 4]


def test_without_a_selecting_handler_there_is_no_best_of_the_job() -> None:
    result = server_of(1).run(two_clients())
    assert result.best is None
    assert list(result.cross_site) == ["a", "b"]
    assert result.metrics == {}


def test_a_clients_local_best_is_the_best_it_trained_by_its_own_mode() -> None:
    class Loss(AddingLearner):
        mode = "min"
        validation_metric = "loss"

        def validate(self, weights: WeightDict, ctx: fl.FLContext) -> dict[str, float]:
            return {"loss": (by_value(weights) - 2) ** 2, "accuracy": 0.5}

    of_client = Recorder()
    # It trains 1, 2, 3 with losses 1, 0, 1.
    result = server_of(3).run([fl.FederatedClient("a", Loss(1), handlers=[of_client])])
    assert result.cross_site == {"a": {"a": 0.0}}
    for event in (Event.SUBMIT_LOCAL_BEST_MODEL, Event.SEND_BEST_MODEL):
        (ctx,) = of_client.at(event)
        assert ctx.model is not None
        assert ctx.model.weights is not None
        assert values(ctx.model.weights) == (2.0, 2.0, 2.0)


def test_a_client_that_never_trained_validates_but_offers_no_best() -> None:
    recorder = Recorder()
    learners = {"a": AddingLearner(1, score=by_value), "b": AddingLearner(absent=range(9))}
    clients = [*clients_of({"a": learners["a"]}), fl.FederatedClient("b", learners["b"], handlers=[recorder])]
    result = server_of(2, min_contributions=1).run(clients)
    assert result.cross_site == {"a": {"a": 2.0, "b": 0.5}}
    assert Event.SUBMIT_LOCAL_BEST_MODEL not in recorder.events
    assert recorder.events.count(Event.RECEIVE_VALIDATION_MODEL) == 2


@pytest.mark.parametrize(
    "bad",
    [
        {**initial_weights(), "b": np.full(3, math.nan)},
        {**initial_weights(), "w": np.zeros((3, 2), np.float32)},
        {"w": np.zeros((2, 3), np.float32)},
        {**initial_weights(), "b": [0.0, 0.0, 0.0]},
        "no weights",
    ],
    ids=["NaN", "shape", "names", "list", "str"],
)
def test_a_local_best_that_is_invalid_is_left_out_and_logged(bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Bad(fl.FederatedClient):
        def submit_best_model(self) -> FrozenWeights | None:
            super().submit_best_model()
            best: FrozenWeights = bad
            return best

    clients = [*clients_of({"a": AddingLearner(1, score=by_value)}), Bad("site-7", AddingLearner(1))]
    result = server_of(1).run(clients)
    assert result.cross_site == {"a": {"a": 1.0, "site-7": 0.5}}
    assert "the best model of site-7 is left out" in caplog.text
    assert result.quits == ()


@pytest.mark.parametrize(
    "tamper",
    [
        lambda r: replace(r, metrics={}),
        lambda r: replace(r, metrics={**r.metrics, "initial_validation_metric": "high"}),
        lambda r: replace(r, metrics={**r.metrics, "other": None}),
        lambda r: replace(r, contributor="a"),
        lambda r: replace(r, model="another"),
        lambda r: {"initial_validation_metric": 1.0},
        lambda r: None,
    ],
    ids=["no metric", "no number", "another no number", "another's name", "another model", "dict", "None"],
)
def test_a_validation_result_that_is_invalid_is_left_out_and_logged(
    tamper: Callable[[fl.ValidationResult], Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Bad(fl.FederatedClient):
        def validate_model(self, model: str, weights: WeightDict) -> fl.ValidationResult:
            result: fl.ValidationResult = tamper(super().validate_model(model, weights))
            return result

    recorder = Recorder()
    clients = [*clients_of({"a": AddingLearner(1, score=by_value)}), Bad("site-7", AddingLearner(1, score=by_value))]
    result = server_of(1, handlers=[recorder]).run(clients)
    assert result.cross_site == {"a": {"a": 1.0}, "site-7": {"a": 1.0}}
    assert {r.contributor for r in result.validation_results} == {"a"}
    assert {ctx[Key.CONTRIBUTOR] for ctx in recorder.at(Event.RECEIVE_VALIDATION_RESULTS)} == {"a"}
    assert "a validation result is left out: site-7" in caplog.text


def test_a_score_that_is_not_finite_stays_in_the_matrix_as_it_is() -> None:
    learners = {"a": AddingLearner(1), "b": AddingLearner(1, score=math.nan)}
    result = server_of(1).run(clients_of(learners))
    assert result.cross_site["a"]["a"] == 0.5
    assert math.isnan(result.cross_site["a"]["b"])


# What a server and a client refuse


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b", "a"], [FINAL_MODEL], ["a", GLOBAL_BEST], []], ids=str)
def test_names_that_are_used_twice_or_reserved_are_refused_before_anything_starts(names: list[str]) -> None:
    recorder = Recorder()
    clients = [fl.FederatedClient(name, AddingLearner(), handlers=[recorder]) for name in names]
    with pytest.raises(ValueError, match=r"two clients|no name for a client|at least one client"):
        server_of(handlers=[recorder]).run(clients)
    assert recorder.events == []


def test_a_pool_without_workers_is_refused_before_anything_starts() -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match="max_workers"):
        server_of(handlers=[recorder]).run(clients_of({"a": AddingLearner()}, handlers=[recorder]), max_workers=0)
    assert recorder.events == []


def test_a_minimum_that_the_clients_can_never_reach_is_an_error_before_the_first_round() -> None:
    recorder = Recorder()
    with pytest.raises(fl.TooFewContributionsError, match="2 clients are left, 3 required"):
        server_of(handlers=[recorder], min_contributions=3).run(two_clients())
    assert Event.START_ROUND not in recorder.events


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_client_needs_a_name(name: Any) -> None:
    with pytest.raises(ValueError, match="name"):
        fl.FederatedClient(name, AddingLearner())


class HalfAHandler:
    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        pass


@pytest.mark.parametrize(
    "thing",
    [object(), fl.Handler, print, None, HalfAHandler()],
    ids=["object", "class", "function", "None", "half a handler"],
)
def test_what_is_no_handler_is_refused_by_a_server(thing: Any) -> None:
    with pytest.raises(TypeError, match="is no handler"):
        server_of(handlers=[fl.Handler(), thing])


@pytest.mark.parametrize(
    "thing",
    [object(), fl.Handler, print, None, HalfAHandler()],
    ids=["object", "class", "function", "None", "half a handler"],
)
def test_what_is_no_handler_is_refused_by_a_client(thing: Any) -> None:
    with pytest.raises(TypeError, match="is no handler"):
        fl.FederatedClient("a", AddingLearner(), handlers=[fl.Handler(), thing])


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_rounds": 0},
        {"num_rounds": -1},
        {"min_contributions": 0},
        {"on_bad_contribution": "ignore"},
        {"on_handler_error": "ignore"},
        {"kind": "gradient"},
        {"kernel": "abacus"},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        fl.FederatedServer(initial_weights(), **{"num_rounds": 1, **arguments})


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (None, fl.WeightsTypeError),
        ({"w": [1.0]}, fl.WeightsTypeError),
        ({"w": np.array([math.nan])}, fl.NonFiniteError),
        ({"w": np.array(["a"])}, fl.DtypeError),
        ({"w": np.zeros(1, complex)}, fl.DtypeError),
    ],
    ids=["None", "list", "NaN", "str", "complex"],
)
def test_initial_weights_that_cannot_be_averaged_are_refused(weights: Any, error: type[fl.FedLearnError]) -> None:
    with pytest.raises(error, match="global model"):
        fl.FederatedServer(weights, num_rounds=1)


# A client by itself, as in a loop of one's own


def test_a_client_can_be_driven_without_a_server() -> None:
    recorder = Recorder()
    client = fl.FederatedClient("a", AddingLearner(1, aggregation_weight=7, score=by_value), handlers=[recorder])
    client.start(num_rounds=1)
    contribution = client.train_round(0, initial_weights)
    assert contribution is not None
    assert (contribution.contributor, contribution.aggregation_weight, contribution.round) == ("a", 7, 0)
    assert contribution.metrics == {"initial_validation_metric": 0.0, "initial_accuracy": 0.0}
    assert contribution.weights is not None
    assert values(contribution.weights) == (1.0, 1.0, 1.0)
    best = client.submit_best_model()
    assert best is not None
    assert values(best) == (1.0, 1.0, 1.0)
    result = client.validate_model("another", contribution.weights)
    assert (result.contributor, result.model, result.n_iter) == ("a", "another", 1)
    assert result.metrics["initial_validation_metric"] == 1.0
    assert client.ctx[Key.VALIDATION_RESULTS] == (result,)
    assert client.stop() == ()
    assert client.stop() == ()
    assert recorder.events.count(Event.SHUTDOWN) == 1


def test_a_client_that_has_quit_answers_every_question_with_it() -> None:
    client = fl.FederatedClient("a", AddingLearner())
    client.start(num_rounds=1)
    client.quit("enough")
    for question in (
        lambda: client.train_round(0, initial_weights),
        client.submit_best_model,
        lambda: client.validate_model("m", initial_weights()),
    ):
        with pytest.raises(fl.ClientQuitError, match="a: enough"):
            question()
    assert client.stop() == ()


def test_a_client_that_was_not_started_has_nothing_to_stop() -> None:
    recorder = Recorder()
    client = fl.FederatedClient("a", AddingLearner(), handlers=[recorder])
    assert client.stop() == ()
    assert recorder.events == []


def client_in_its_second_job() -> fl.FederatedClient:
    client = fl.FederatedClient("a", AddingLearner(1, n_iter=7))
    client.start(num_rounds=9)
    client.train_round(3, initial_weights)
    client.stop()
    client.start(num_rounds=1)
    return client


def test_a_new_job_of_a_client_forgets_context_and_best_model_of_the_last_one() -> None:
    client = client_in_its_second_job()
    assert client.ctx == {Key.CONTRIBUTOR: "a", Key.NUM_ROUNDS: 1}
    assert client.ctx.get_model() is None
    assert client.submit_best_model() is None


def test_a_new_job_of_a_client_forgets_the_iterations_of_the_last_one() -> None:
    assert client_in_its_second_job().validate_model("m", initial_weights()).n_iter is None


def test_a_handler_that_takes_a_clients_model_away_is_an_error_that_names_client_and_event() -> None:
    client = fl.FederatedClient("a", AddingLearner(), handlers=[At(Event.RECEIVE_MODEL, lambda c: c.set_model(None))])
    client.start(num_rounds=1)
    with pytest.raises(ValueError, match="a: a handler took the model away at _receiveModel"):
        client.train_round(0, initial_weights)


def test_a_handler_may_change_the_best_model_that_a_client_sends() -> None:
    # Such as one that adds noise for privacy.
    client = fl.FederatedClient("a", AddingLearner(1), handlers=[At(Event.SUBMIT_LOCAL_BEST_MODEL, replacing(10))])
    client.start(num_rounds=1)
    client.train_round(0, initial_weights)
    best = client.submit_best_model()
    assert best is not None
    assert values(best) == (11.0, 11.0, 11.0)
