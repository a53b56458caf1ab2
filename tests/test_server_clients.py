"""Clients that leave a job or sit a round out, and a client by itself."""

import gc
import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from federation import (
    AddingLearner,
    At,
    Lifecycle,
    Recorder,
    WeightDict,
    by_value,
    clients_of,
    failing,
    initial_weights,
    raising,
    replacing,
    server_of,
    values,
)

import fed_learn as fl
from fed_learn.weights import FrozenWeights

Event = fl.EventType
Key = fl.ContextKey


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


def test_a_learner_that_exits_makes_its_client_leave_and_the_job_gives_its_result() -> None:
    learners = {"a": AddingLearner(1), "b": AddingLearner(3, during=lambda ctx: sys.exit("no GPU"))}
    result = server_of(2, min_contributions=1).run(clients_of(learners))
    assert values(result.weights) == (2.0, 2.0, 2.0)
    assert [report.accepted for report in result.reports] == [("a",), ("a",)]
    (failure,) = result.quits
    assert (failure.contributor, failure.cause) == ("b", "ClientQuitError")
    assert str(failure.error) == "b: SystemExit: no GPU"
    assert isinstance(failure.error.__cause__, SystemExit)


def raise_plainly() -> None:
    raise OSError("no disk")


def raise_from() -> None:
    inner = np.zeros(1000)
    KEPT.append(weakref.ref(inner))
    try:
        raise KeyError(inner.shape)
    except KeyError as error:
        raise OSError("no disk") from error


def raise_in_handling() -> None:
    inner = np.zeros(1000)
    KEPT.append(weakref.ref(inner))
    try:
        raise KeyError(inner.shape)
    except KeyError:
        raise OSError("no disk")  # noqa: B904 - the implicit chain is what is tested


def raise_group() -> None:
    try:
        raise_from()
    except OSError as error:
        raise ExceptionGroup("several", [error, ValueError("another")]) from None


def raise_exit() -> None:
    sys.exit("no disk")


KEPT: list[weakref.ref[Any]] = []
"""To arrays that only the frames of what failed refer to."""


def fail_in_a_frame_with_arrays(fail: Callable[[], None]) -> None:
    weights = np.zeros(1000)
    KEPT.append(weakref.ref(weights))
    fail()
    raise AssertionError(weights)


@pytest.mark.parametrize("fail", [raise_plainly, raise_from, raise_in_handling, raise_group, raise_exit])
@pytest.mark.parametrize("where", ["start", "train", "validate", "a client's handler", "the final model"])
def test_a_client_that_failed_keeps_no_arrays_alive(
    where: str, fail: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The records that pytest keeps would hold the traceback.
    monkeypatch.setattr(logging.getLogger("fed_learn"), "propagate", False)
    KEPT.clear()

    class Failing(AddingLearner):
        def validate(self, weights: WeightDict, ctx: fl.FLContext) -> Mapping[str, float]:
            if where == "validate":
                fail_in_a_frame_with_arrays(fail)
            return super().validate(weights, ctx)

    def act(ctx: fl.FLContext) -> None:
        fail_in_a_frame_with_arrays(fail)

    events = {
        "start": Event.STARTUP,
        "a client's handler": Event.RECEIVE_MODEL,
        "the final model": Event.RECEIVE_VALIDATION_MODEL,
    }
    handlers = [At(events[where], act)] if where in events else []
    learner = Failing(1, during=act if where == "train" else None)
    clients = [*clients_of({"a": AddingLearner(1)}), fl.FederatedClient("b", learner, handlers=handlers)]
    result = server_of(1, min_contributions=1).run(clients)
    assert [failure.contributor for failure in result.quits] == ["b"]
    if any(reference() is not None for reference in KEPT):
        gc.collect()  # cycles are for the collector; it takes its time, so only if there are any
    assert len(KEPT) == (2 if fail in (raise_from, raise_in_handling, raise_group) else 1)
    assert [reference() for reference in KEPT] == [None] * len(KEPT)


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


def test_a_client_that_left_one_job_takes_part_in_the_next() -> None:
    client = fl.FederatedClient("b", AddingLearner(3))
    leave = At(Event.END_ROUND, lambda ctx: client.quit("lunch") if ctx[Key.ROUND] == 0 else None)
    server = server_of(2, handlers=[leave], min_contributions=1)
    clients = [*clients_of({"a": AddingLearner(1)}), client]
    first, second = server.run(clients), server.run(clients)
    assert [report.accepted for report in first.reports] == [("a", "b"), ("a",)]
    assert [report.accepted for report in second.reports] == [("a", "b"), ("a",)]


# A client by itself, driven by your own loop


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
    assert client.ctx == {
        Key.CONTRIBUTOR: "a",
        Key.NUM_ROUNDS: 1,
        Key.HANDLERS: (),
        Key.SCORE_METRIC: "accuracy",
    }
    assert client.ctx.get_model() is None
    assert client.submit_best_model() is None


def test_a_new_job_of_a_client_forgets_the_iterations_of_the_last_one() -> None:
    assert client_in_its_second_job().validate_model("m", initial_weights()).n_iter is None


def test_a_handler_that_takes_a_clients_model_away_is_an_error_that_names_handler_and_event() -> None:
    client = fl.FederatedClient("a", AddingLearner(), handlers=[At(Event.RECEIVE_MODEL, lambda c: c.set_model(None))])
    client.start(num_rounds=1)
    with pytest.raises(
        fl.HandlerError, match=r"federation.At at _receiveModel of round 1: ContextError: .* the model of a job"
    ):
        client.train_round(0, initial_weights)


def test_a_handler_may_change_the_best_model_that_a_client_sends() -> None:
    # Such as one that adds noise for privacy.
    client = fl.FederatedClient("a", AddingLearner(1), handlers=[At(Event.SUBMIT_LOCAL_BEST_MODEL, replacing(10))])
    client.start(num_rounds=1)
    client.train_round(0, initial_weights)
    best = client.submit_best_model()
    assert best is not None
    assert values(best) == (11.0, 11.0, 11.0)


# A learner that trains a part


class PartLearner(AddingLearner):
    """Trains `w` alone, and validates the sum of all variables."""

    def __init__(self, step: float) -> None:
        super().__init__(step, score=lambda weights: float(sum(array.sum() for array in weights.values())))

    def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult:
        trained: dict[str, Any] = {"w": weights["w"] + self.step, "scale": 3.0}
        return fl.TrainingResult(trained, 1)


PART_MODEL: dict[str, Any] = {"w": np.zeros(2), "b": np.full(1, 10.0), "scale": np.float32(1)}


@pytest.mark.parametrize("kind", [fl.Kind.FULL, fl.Kind.DIFF])
def test_a_learner_that_returns_a_part_is_validated_on_the_whole_model(kind: fl.Kind) -> None:
    clients = [fl.FederatedClient(name, PartLearner(step), kind=kind) for name, step in {"a": 1, "b": 3}.items()]
    server = fl.FederatedServer(PART_MODEL, num_rounds=2, kind=kind, handlers=[fl.ModelSelectionHandler()])
    result = server.run(clients)
    assert {name: array.tolist() for name, array in result.weights.items()} == {"w": [4, 4], "b": [10], "scale": 3}
    assert result.weights["scale"].dtype == np.float32
    assert result.best is not None
    assert (result.best.round, result.best.metric) == (2, 21.0)
    # Each one's best is that of the last round: (2 + step) twice, and what it has not trained.
    assert result.cross_site["b"] == {"a": 23.0, "b": 23.0}
    assert result.cross_site["a"] == {"a": 19.0, "b": 19.0}


def test_a_learner_that_returns_no_variable_is_refused_by_name() -> None:
    class Empty(AddingLearner):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult:
            return fl.TrainingResult({}, 1)

    clients = [fl.FederatedClient("a", Empty()), *clients_of({"b": AddingLearner(2)})]
    result = server_of(1, min_contributions=1, on_bad_contribution="reject").run(clients)
    (refused,) = result.reports[0].rejected
    assert (refused.contributor, str(refused.error)) == ("a", "a: train returned weights without a variable")
    assert values(result.weights) == (2.0, 2.0, 2.0)


def test_an_aggregator_and_a_mean_of_each_variable_exclude_each_other() -> None:
    from fed_learn.server.model_aggregator import ModelAggregator

    with pytest.raises(ValueError, match="partial='average' belongs to the weighted mean"):
        fl.FederatedServer(PART_MODEL, num_rounds=1, kind=fl.Kind.DIFF, aggregator=ModelAggregator(), partial="average")
