"""What a job averages, to the bit; that nothing it hands out can be changed; and what handlers may change."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from federation import (
    AddingLearner,
    At,
    NormEvaluator,
    Recorder,
    TamperingClient,
    WeightDict,
    by_value,
    clients_of,
    failing,
    initial_weights,
    noise,
    replacing,
    server_of,
    two_clients,
    values,
    watched_job,
)
from reference import bits

import fed_learn as fl
from fed_learn.weights import FrozenDict, FrozenWeights

Event = fl.EventType
Key = fl.ContextKey


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


# What handlers may change


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
        (None, fl.ContextError),
        (fl.ModelData(), fl.ContextError),
        (fl.ModelData({"w": np.zeros((2, 3), np.float32)}), fl.NamesError),
        (fl.ModelData({**initial_weights(), "w": np.zeros((3, 2), np.float32)}), fl.ShapeError),
        (fl.ModelData({**initial_weights(), "w": np.zeros((2, 3))}), fl.DtypeError),
        (fl.ModelData({**initial_weights(), "b": np.full(3, math.nan)}), fl.NonFiniteError),
        (fl.ModelData({**initial_weights(), "b": [0.0, 0.0, 0.0]}), fl.WeightsTypeError),  # type: ignore[dict-item]
    ],
    ids=["no model", "no weights", "names", "shape", "dtype", "NaN", "no array"],
)
def test_a_bad_replacement_of_the_global_model_is_that_handlers_failure_and_the_model_stands(
    bad: fl.ModelData | None, error: type[fl.FedLearnError], event: str, on_handler_error: str
) -> None:
    watched, server, clients = watched_job(
        on_server=[At(event, lambda ctx: ctx.set_model(bad))], on_handler_error=on_handler_error
    )
    if on_handler_error == "raise":
        with pytest.raises(fl.HandlerError, match=f"At at {event} of round 1: {error.__name__}: ") as caught:
            server.run(clients)
        assert [type(one) for one in caught.value.exceptions] == [error]
    else:
        result = server.run(clients)
        assert values(result.weights) == (2.0, 2.0, 2.0)
        assert [(f.event, type(f.exception)) for f in result.handler_failures] == [(event, error)] * 2
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
