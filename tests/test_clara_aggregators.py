"""Aggregators by Clara Train's API in real jobs: equal to the built-in mean, and harmless when they fail."""

import logging
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from clara_parts import CustomModelAggregator, Doing, params_of, server_with, two_clients
from federation import (
    AddingLearner,
    At,
    NormEvaluator,
    Recorder,
    TamperingClient,
    clients_of,
    initial_weights,
    noise,
    values,
)

import fed_learn as fl
from fed_learn import EventType
from fed_learn.aggregation.rules.clara import CALLED_BEST, ReceivedContribution
from fed_learn.model_meta import FLContext
from fed_learn.numproto import ndarray_to_proto, proto_to_ndarray
from fed_learn.protos.federated_pb2 import ModelData, NDArray
from fed_learn.server.model_aggregator import ModelAggregator


def bits(weights: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in weights.items()}


def noisy_clients() -> list[fl.FederatedClient]:
    learners: dict[str, fl.Learner] = {
        f"site-{i}": AddingLearner(noise(i), n_iter=i, aggregation_weight=i) for i in (1, 2, 3, 7)
    }
    return clients_of(learners, kind=fl.Kind.DIFF)


@pytest.mark.parametrize(
    "aggregator", [None, ModelAggregator(), CustomModelAggregator()], ids=["no aggregator", "built in", "own"]
)
def test_a_job_with_an_aggregator_of_ones_own_gives_the_values_of_the_built_in_mean(aggregator: Any) -> None:
    result = server_with(aggregator).run(two_clients())
    assert values(result.weights) == (7.5, 7.5, 6.0)  # the counter: 2.5 becomes 2, three times
    assert [report.accepted for report in result.reports] == [("a", "b")] * 3
    assert [report.error for report in result.reports] == [None] * 3


def test_the_model_aggregator_gives_the_bits_of_the_servers_own_mean() -> None:
    own = server_with(None).run(noisy_clients())
    assert bits(server_with(ModelAggregator()).run(noisy_clients()).weights) == bits(own.weights)
    exact = server_with(None, exact=True).run(noisy_clients())
    assert bits(server_with(ModelAggregator(exact=True)).run(noisy_clients()).weights) == bits(exact.weights)


def test_an_aggregator_of_ones_own_is_within_a_rounding_of_the_built_in_mean() -> None:
    own = server_with(None, num_rounds=1).run(noisy_clients()).weights
    theirs = server_with(CustomModelAggregator(), num_rounds=1).run(noisy_clients()).weights
    assert {name: a.dtype for name, a in theirs.items()} == {name: a.dtype for name, a in own.items()}
    assert np.allclose(theirs["w"], own["w"], rtol=2 * np.finfo(np.float32).eps, atol=0)
    assert np.allclose(theirs["b"], own["b"], rtol=1e-14, atol=1e-16)
    assert int(theirs["steps"]) == int(own["steps"])


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_the_kernel_of_the_server_is_that_of_its_aggregator(kernel: str) -> None:
    seen = []
    result = server_with(Doing(lambda _, ctx: seen.append(fl.kernels.current())), kernel=kernel).run(noisy_clients())
    assert seen == [kernel] * 3
    assert bits(result.weights) == bits(server_with(None, kernel="numpy").run(noisy_clients()).weights)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int32, np.int8])
@pytest.mark.parametrize("aggregator", [ModelAggregator(), CustomModelAggregator()], ids=["built in", "own"])
def test_the_result_has_the_dtype_of_the_global_model(aggregator: Any, dtype: Any) -> None:
    clients = clients_of({"a": AddingLearner(1, n_iter=1), "b": AddingLearner(2, n_iter=3)}, kind=fl.Kind.DIFF)
    result = server_with(aggregator, num_rounds=2, weights={"w": np.full(3, 4, dtype)}).run(clients)
    assert result.weights["w"].dtype == dtype
    step = 2.0 if np.issubdtype(dtype, np.integer) else 1.75
    assert result.weights["w"].astype(float).tolist() == [4 + 2 * step] * 3


def test_what_an_aggregator_sees() -> None:
    seen: list[Any] = []

    def look(accumulator: list[FLContext], ctx: Any) -> None:
        for item in accumulator:
            sent = item.get_prop("_contribution")
            step = proto_to_ndarray(params_of(item)["b"])[0]
            seen.append((sent.contributor, sent.client.uid, sent.n_iter, step, item.get_prop(fl.ContextKey.ROUND)))
        assert isinstance(sent, ReceivedContribution)
        seen.append(ctx.get_prop(fl.ContextKey.NUM_ROUNDS))

    server_with(Doing(look), num_rounds=1).run(two_clients()[::-1])
    assert seen == [("a", "a", 1, 1.0, 0), ("b", "b", 3, 3.0, 0), 1]


def test_no_contribution_is_copied_for_an_aggregator() -> None:
    shared: list[bool] = []

    def compare(accumulator: list[FLContext], _: Any) -> None:
        for item in accumulator:
            params = params_of(item)
            kept = item.get_prop("_contribution").weights
            shared.extend(np.shares_memory(params[name].array, kept[name]) for name in kept)

    server_with(Doing(compare), num_rounds=1).run(two_clients())
    assert shared == [True] * 6


def test_an_aggregator_that_writes_into_what_it_read_changes_nothing_but_its_own_copy() -> None:
    def scribble(accumulator: list[FLContext], ctx: Any) -> None:
        for item in [*accumulator, ctx]:
            for message in params_of(item).values():
                proto_to_ndarray(message)[...] = 77

    assert values(server_with(Doing(scribble)).run(two_clients()).weights) == (7.5, 7.5, 6.0)


@pytest.mark.parametrize(
    "put",
    [
        lambda ctx, weights: ctx.set_model(fl.ModelData(weights)),
        lambda ctx, weights: ctx.model.CopyFrom(ModelData({n: ndarray_to_proto(a) for n, a in weights.items()})),
        lambda ctx, weights: setattr(ctx, "model", ModelData({n: ndarray_to_proto(a) for n, a in weights.items()})),
        lambda ctx, weights: [m.CopyFrom(ndarray_to_proto(weights[n])) for n, m in ctx.model.params.items()] and None,
        lambda ctx, weights: (
            [m.CopyFrom(NDArray(ndarray=ndarray_to_proto(weights[n]).ndarray)) for n, m in ctx.model.params.items()]
            and None
        ),
    ],
    ids=["set_model", "CopyFrom of the model", "a new message", "CopyFrom of arrays", "CopyFrom of bytes"],
)
def test_every_way_to_leave_a_model_works(put: Any) -> None:
    mine: dict[str, Any] = {"w": np.full((2, 3), 0.5), "b": np.full(3, 0.5), "steps": np.float64(0.5)}
    result = server_with(Doing(lambda _, ctx: put(ctx, mine))).run(two_clients())
    mine["w"][:] = 9  # what the server keeps is its own
    assert values(result.weights) == (0.5, 0.5, 0.0)
    assert not result.weights["w"].flags.writeable


def removed_name(*_: Any) -> Any:
    return np.float(1)  # type: ignore[attr-defined]  # noqa: NPY001 - numpy has no such name any more


def change(name: str, value: Any) -> Callable[[list[FLContext], Any], None]:
    """Sets a variable of the new model."""
    return lambda _, ctx: ctx.model.params[name].CopyFrom(ndarray_to_proto(value))


def failing(*_: Any) -> None:
    raise ZeroDivisionError("no clients")


FAILURES: dict[str, tuple[Callable[[list[FLContext], Any], Any], type[Exception], str]] = {
    "raises": (failing, ZeroDivisionError, "ZeroDivisionError: no clients"),
    "uses what numpy has removed": (removed_name, AttributeError, "AttributeError: module 'numpy' has no attribute"),
    "another shape": (change("w", np.ones((3, 2))), fl.ShapeError, "'w' has shape (3, 2), expected (2, 3)"),
    "a shape that would broadcast": (change("b", np.ones(1)), fl.ShapeError, "'b' has shape (1,), expected (3,)"),
    "NaN": (change("b", [0, np.nan, 0]), fl.NonFiniteError, "'b' at index (1,): nan is not finite"),
    "infinity": (change("w", np.full((2, 3), -np.inf)), fl.NonFiniteError, "'w' at index (0, 0): -inf is not finite"),
    "too large for float32": (change("w", np.full((2, 3), 1e39)), fl.NonFiniteError, "'w' at index (0, 0): inf"),
    "too large for a counter": (change("steps", 1e30), fl.IntegerRangeError, "'steps' leaves the range of int64"),
    "a variable too many": (change("x", 1.0), fl.NamesError, "has other variables than expected: adds 'x'"),
    "a variable too few": (lambda _, ctx: ctx.model.params.pop("b"), fl.NamesError, "misses 'b'"),
    "text": (change("b", ["x", "y", "z"]), fl.DtypeError, "'b' has dtype <U1, which cannot be averaged"),
    "bytes": (
        lambda _, ctx: ctx.model.params["b"].CopyFrom(NDArray(ndarray=b"secret")),
        fl.WeightsTypeError,
        "'b' holds 6 bytes that are no array in the .npy format",
    ),
    "an empty message": (lambda _, ctx: ctx.model.params["new"], fl.WeightsTypeError, "'new' holds 0 bytes"),
    "no model": (lambda _, ctx: ctx.set_model(None), fl.WeightsTypeError, "the model is a NoneType, not a ModelData"),
    "a dict": (lambda _, ctx: ctx.set_model({"w": 1}), fl.WeightsTypeError, "the model is a dict, not a ModelData"),
    "an empty model": (lambda _, ctx: ctx.set_model(fl.ModelData()), fl.WeightsTypeError, "not a ModelData"),
    "writes into a contribution": (
        lambda accumulator, _: accumulator[0].get_prop("_contribution").weights["w"].fill(1),
        ValueError,
        "ValueError: assignment destination is read-only",
    ),
}


@pytest.mark.parametrize(("then", "cause", "message"), FAILURES.values(), ids=FAILURES)
def test_a_round_whose_aggregator_fails_is_lost_and_the_global_model_stands(
    then: Any, cause: type[Exception], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()

    def then_leave_a_trace(accumulator: list[FLContext], ctx: Any) -> bool:
        ctx.set_prop("trace", 1)
        then(accumulator, ctx)
        return True

    server = server_with(Doing(then_leave_a_trace, rounds=(1,)), handlers=[recorder])
    with caplog.at_level(logging.ERROR, "fed_learn"):
        result = server.run(two_clients())
    assert values(result.weights) == (5.0, 5.0, 4.0)  # of rounds 0 and 2
    assert result.best is None
    first, error, last = (report.error for report in result.reports)
    assert (first, last) == (None, None)
    assert isinstance(error, fl.AggregatorError)
    assert isinstance(error.__cause__, cause)
    assert str(error).startswith("aggregator Doing: ")
    assert message in str(error)
    assert [record.getMessage() for record in caplog.records] == [f"round 2: {error}; the global model stands"]
    (ctx,) = (c for c in recorder.at(EventType.END_ROUND) if c[fl.ContextKey.ROUND] == 1)
    assert "trace" not in ctx
    assert values(ctx.get_model().weights) == (2.5, 2.5, 2.0)  # type: ignore[union-attr,arg-type]
    assert [c[fl.ContextKey.ROUND] for c in recorder.at(EventType.END_AGGREGATION)] == [0, 2]


def test_a_verdict_that_is_none_costs_the_round_too() -> None:
    class Undecided(ModelAggregator):
        def process(self, accumulator: list[FLContext], fl_ctx: FLContext) -> Any:
            super().process(accumulator, fl_ctx)
            return np.ones(2)

    with pytest.raises(
        fl.NothingAggregatedError, match="AggregatorError once, the first: aggregator Undecided"
    ) as caught:
        server_with(Undecided(), 1).run(two_clients())
    result = caught.value.result
    assert values(result.weights) == values(initial_weights())
    assert str(result.reports[0].error).startswith("aggregator Undecided: ValueError: The truth value of an array")


def test_an_interrupt_leaves_the_context_as_it_was() -> None:
    def interrupt(_: Any, ctx: Any) -> None:
        ctx.set_prop("trace", 1)
        raise KeyboardInterrupt

    server = server_with(Doing(interrupt, rounds=(1,)))
    with pytest.raises(KeyboardInterrupt):
        server.run(two_clients())
    assert "trace" not in server.ctx
    assert values(server.ctx.get_model().weights) == (2.5, 2.5, 2.0)  # type: ignore[union-attr,arg-type]


def test_a_bad_contribution_never_reaches_an_aggregator() -> None:
    seen: list[list[str]] = []

    def poison(contribution: fl.Contribution) -> fl.Contribution:
        weights = {**(contribution.weights or {}), "b": np.full(3, np.nan)}
        return fl.Contribution("c", weights, 1, n_iter=1, round=contribution.round, kind=fl.Kind.DIFF)

    bad = TamperingClient("c", AddingLearner(100), tamper=poison, rounds=range(9), kind=fl.Kind.DIFF)
    aggregator = Doing(lambda items, _: seen.append([i.get_prop(fl.ContextKey.CONTRIBUTOR) for i in items]))
    server = server_with(aggregator, on_bad_contribution="reject", min_contributions=2)
    assert values(server.run([*two_clients(), bad]).weights) == (7.5, 7.5, 6.0)
    assert seen == [["a", "b"]] * 3


def test_a_handler_chooses_what_is_aggregated() -> None:
    def drop_b(ctx: FLContext) -> None:
        ctx[fl.ContextKey.CONTRIBUTIONS] = ctx[fl.ContextKey.CONTRIBUTIONS][:1]

    server = server_with(ModelAggregator(), min_contributions=1, handlers=[At(EventType.BEFORE_AGGREGATION, drop_b)])
    assert values(server.run(two_clients()).weights) == (3.0, 3.0, 3.0)


def test_a_job_that_something_else_drives_uses_the_aggregator_too() -> None:
    with server_with(CustomModelAggregator(), num_rounds=1).begin() as job:
        job.start_round(0)
        for name, step, n_iter in (("a", 1.0, 1), ("b", 3.0, 3)):
            job.send_model(name)
            diff = {n: np.full_like(a, step) for n, a in initial_weights().items()}
            job.receive(name, fl.Contribution(name, diff, 1, n_iter=n_iter, round=0, kind=fl.Kind.DIFF))
        assert job.aggregate()
        assert values(job.weights) == (2.5, 2.5, 2.0)
        job.end_round()


def test_the_model_that_an_aggregator_calls_the_best_is_the_jobs_best() -> None:
    server = server_with(Doing(lambda _, ctx: ctx.get_prop(fl.ContextKey.ROUND) != 2), num_rounds=3)
    for _ in range(2):  # a second job starts afresh
        best = server.run(two_clients()).best
        assert best is not None
        assert (best.round, best.metric, best.metric_name) == (1, 2.0, CALLED_BEST)
        assert values(best.weights) == (5.0, 5.0, 4.0)


def test_a_server_that_validates_decides_what_is_best_in_place_of_the_aggregator() -> None:
    handler = fl.ServerValidationHandler(NormEvaluator(scale=-1), 1)
    best = server_with(Doing(lambda *_: True), handlers=[handler]).run(two_clients()).best
    assert best is not None
    assert (best.round, best.metric_name) == (0, "first_element")


def test_what_an_aggregator_puts_into_the_context_is_there_for_handlers() -> None:
    recorder = Recorder()
    aggregator = Doing(lambda _, ctx: ctx.set_prop("spread", 2.0))
    server_with(aggregator, num_rounds=1, handlers=[recorder]).run(two_clients())
    (ctx,) = recorder.at(EventType.END_AGGREGATION)
    assert ctx.get_prop("spread") == 2.0
    assert isinstance(ctx.get_model(), fl.ModelData)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": fl.Kind.FULL}, ValueError, "kind=Kind.DIFF"),
        ({"exact": True}, ValueError, "exact and stream"),
        ({"stream": True}, ValueError, "exact and stream"),
        ({"aggregator": ModelAggregator}, TypeError, "is no aggregator"),
        ({"aggregator": "ModelAggregator"}, TypeError, "'ModelAggregator' is no aggregator"),
    ],
)
def test_a_server_that_could_not_use_its_aggregator_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fl.FederatedServer(
            initial_weights(), **{"num_rounds": 1, "kind": fl.Kind.DIFF, "aggregator": ModelAggregator(), **arguments}
        )


def test_handlers_read_and_replace_the_model_by_claras_names() -> None:
    seen: list[float] = []

    def double(ctx: Any) -> None:
        doubled = {
            name: ndarray_to_proto(2 * proto_to_ndarray(array)) for name, array in ctx.get_model().params.items()
        }
        seen.append(float(proto_to_ndarray(doubled["b"])[0]))
        ctx.set_model(ModelData(doubled))

    result = server_with(ModelAggregator(), num_rounds=2, handlers=[At(EventType.END_AGGREGATION, double)]).run(
        two_clients()
    )
    assert seen == [5.0, 15.0]
    assert values(result.weights) == (15.0, 15.0, 12.0)
