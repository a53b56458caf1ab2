"""What follows the last round: final scoring and the cross-site validation."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from federation import (
    AddingLearner,
    Recorder,
    WeightDict,
    by_value,
    clients_of,
    initial_weights,
    server_of,
    two_clients,
    values,
)

import fed_learn as fl
from fed_learn.contribution import FINAL_MODEL, GLOBAL_BEST
from fed_learn.weights import FrozenWeights

Event = fl.EventType
Key = fl.ContextKey


def shifted_score(offset: float) -> Callable[[WeightDict], float]:
    return lambda weights: by_value(weights) + offset


def test_the_final_model_and_every_best_are_scored_by_every_client() -> None:
    # Score: the model's value, plus 100 at b. A client that trains adds 1 (a) or 3 (b) to what it received.
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
