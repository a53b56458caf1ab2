"""What follows the last round: final scoring and the cross-site validation."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from federation import (
    AddingLearner,
    Array,
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


def unpickled(result: fl.ValidationResult, **fields: Any) -> fl.ValidationResult:
    """The result as pickle would bring it: with fields that no constructor has seen."""
    copied = copy.copy(result)
    copied.__dict__.update(fields)
    return copied


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
        {**initial_weights(), "b": [0.0, 0.0, 0.0]},
        {**initial_weights(), "b": np.array(["0", "0", "0"], np.dtypes.StringDType())},
        np.zeros(3),
        "no weights",
    ],
    ids=["NaN", "shape", "list", "StringDType", "array", "str"],
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
        lambda r: replace(r, contributor="a"),
        lambda r: replace(r, model="another"),
        lambda r: replace(r, metrics={**r.metrics, "initial_validation_metric": np.zeros(2)}),
        lambda r: unpickled(r, metrics=0.5),
        lambda r: replace(r, n_iter="many"),
        lambda r: replace(r, n_iter=2.5),
        lambda r: replace(r, n_iter=np.array([1, 2])),
        lambda r: replace(r, n_iter=10**400),
        lambda r: replace(r, n_iter=10**5000),
        lambda r: replace(r, contributor=np.array(["site-7", "a"])),
        lambda r: {"initial_validation_metric": 1.0},
        lambda r: np.zeros(3),
        lambda r: None,
    ],
    ids=[
        "no metric",
        "no number",
        "another's name",
        "another model",
        "a metric that is an array",
        "metrics that are a number",
        "iterations that are a str",
        "iterations that are a float",
        "iterations that are an array",
        "iterations of 400 digits",
        "iterations of 5000 digits",
        "a name that is an array",
        "dict",
        "array",
        "None",
    ],
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
    left_out = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    # On the final model and on the two local bests.
    assert ["site-7" in message for message in left_out] == [True] * 3


def test_a_learner_that_counts_its_iterations_in_words_has_no_say_and_the_job_goes_on() -> None:
    words: Any = "many"
    learners = {"a": AddingLearner(1, score=by_value), "site-7": AddingLearner(5, score=by_value, n_iter=words)}
    server = server_of(2, min_contributions=1, on_bad_contribution="reject", handlers=[fl.ModelSelectionHandler()])
    result = server.run(clients_of(learners))
    assert [report.accepted for report in result.reports] == [("a",)] * 2
    assert values(result.weights) == (2.0, 2.0, 2.0)
    # Its best, which it trained from 1 to 6, is sound: it is scored by the others.
    assert result.cross_site == {"a": {"a": 2.0}, "site-7": {"a": 6.0}, GLOBAL_BEST: {"a": 2.0}}
    assert {r.contributor for r in result.validation_results} == {"a"}
    assert result.quits == ()


class Changing(Mapping[str, Array]):
    """Weights of ones, until they have been read so many times; from then on they are NaN."""

    def __init__(self, reads: int) -> None:
        self.reads = reads

    def __getitem__(self, name: str) -> Array:
        self.reads -= 1
        array = initial_weights()[name]
        return array + 1 if self.reads >= 0 or array.dtype.kind == "i" else np.full_like(array, math.nan)

    def __iter__(self) -> Iterator[str]:
        return iter(initial_weights())

    def __len__(self) -> int:
        return len(initial_weights())


@pytest.mark.parametrize("reads", range(13))
def test_a_best_model_that_changes_between_reads_brings_no_nan_into_the_matrix(reads: int) -> None:
    class Shifty(fl.FederatedClient):
        def submit_best_model(self) -> FrozenWeights | None:
            best: Any = Changing(reads)
            return super().submit_best_model() and best

    def score(weights: WeightDict) -> float:
        return float(sum(array.sum() for array in weights.values()))

    clients = [*clients_of({"a": AddingLearner(2, score=score)}), Shifty("site-7", AddingLearner(2, score=score))]
    result = server_of(1).run(clients)
    good = {"a": {"a": 20.0, "site-7": 20.0}}
    assert result.cross_site in (good, {**good, "site-7": {"a": 10.0, "site-7": 10.0}})
    # Only the first two of the three variables can be NaN.
    assert ("site-7" in result.cross_site) == (reads >= 2)


def test_a_score_that_is_not_finite_stays_in_the_matrix_as_it_is() -> None:
    learners = {"a": AddingLearner(1), "b": AddingLearner(1, score=math.nan)}
    result = server_of(1).run(clients_of(learners))
    assert result.cross_site["a"]["a"] == 0.5
    assert math.isnan(result.cross_site["a"]["b"])
