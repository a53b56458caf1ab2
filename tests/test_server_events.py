"""A job's events, and what the contexts hold at each of them."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from federation import (
    AddingLearner,
    At,
    Recorder,
    TamperingClient,
    by_value,
    clients_of,
    failing,
    initial_weights,
    raising,
    server_of,
    two_clients,
    values,
)

import fed_learn as fl
from fed_learn.weights import FrozenWeights

Event = fl.EventType
Key = fl.ContextKey


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
    assert report["handler_failures"] == ["federation.At at _startRound of round 1: OSError: disk full"]
