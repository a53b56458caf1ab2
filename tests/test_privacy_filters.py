"""What a client's difference goes through before it leaves: in real jobs, in order, and never skipped when it fails."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clara_parts import params_of
from federation import AddingLearner, Recorder, by_value, clients_of, initial_weights, noise, values

import fed_learn as fl
from fed_learn import EventType
from fed_learn.client.fed_privacy import PercentileProtocol, PrivacyProtocol
from fed_learn.components.data_processor import DataProcessor
from fed_learn.model_meta import FLContext
from fed_learn.numproto import ndarray_to_proto, proto_to_ndarray, weights_to_model
from fed_learn.protos.federated_pb2 import NDArray
from fed_learn.weights import WeightDict

KINDS = tuple(fl.Kind)
EXAMPLES = Path(__file__).parents[1] / "examples"


class Doing(PrivacyProtocol):
    """Applies a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        PrivacyProtocol.__init__(self)
        self.function = function

    def apply(self, model_diff: dict[str, Any], train_ctx: Any = None) -> Any:
        return self.function(model_diff, train_ctx)


class Processing(DataProcessor):
    """Applies a function to the arrays of the messages, and sets a new model."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def process(self, data_ctx: FLContext, app_ctx: FLContext) -> FLContext:
        changed = {name: self.function(proto_to_ndarray(message)) for name, message in params_of(data_ctx).items()}
        data_ctx.model = weights_to_model(changed)  # type: ignore[assignment]
        return data_ctx


def times(factor: float) -> Doing:
    return Doing(lambda diff, _: {name: array * factor for name, array in diff.items()})


def run(filters: Any, kind: fl.Kind = fl.Kind.DIFF, rounds: int = 2, **arguments: Any) -> fl.JobResult:
    """Two clients, which add 1 and 3; the filters are those of the second."""
    server = fl.FederatedServer(initial_weights(), num_rounds=rounds, kind=kind, **arguments)
    clients = clients_of({"a": AddingLearner(1)}, kind=kind)
    return server.run([*clients, fl.FederatedClient("b", AddingLearner(3, n_iter=4), kind=kind, filters=filters)])


def bits(weights: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in weights.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_filters_change_the_difference_whatever_is_contributed(kind: fl.Kind) -> None:
    assert values(run([times(3)], kind).weights) == (10.0, 10.0, 10.0)  # (1 + 9) / 2 a round
    assert values(run([], kind).weights) == (4.0, 4.0, 4.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "same", [Doing(lambda diff, _: diff), times(1.0), Processing(lambda array: array), PercentileProtocol(0, 1e9)]
)
def test_filters_that_change_nothing_leave_every_bit(same: Any, kind: fl.Kind) -> None:
    def job(filters: Any) -> fl.JobResult:
        learners: dict[str, fl.Learner] = {f"site-{i}": AddingLearner(noise(i)) for i in range(3)}
        server = fl.FederatedServer(noise(9), num_rounds=3, kind=kind)
        return server.run(clients_of(learners, kind=kind, filters=filters))

    assert bits(job([same]).weights) == bits(job([]).weights)


def test_filters_run_in_their_order_and_may_be_mixed() -> None:
    def plus(number: float) -> Processing:
        return Processing(lambda array: array + number)

    assert values(run([times(2), plus(1)], rounds=1).weights) == (4.0, 4.0, 4.0)  # (1 + 7) / 2
    assert values(run([plus(1), times(2)], rounds=1).weights) == (4.5, 4.5, 4.0)  # (1 + 8) / 2, a counter half to even


def test_a_filter_may_write_into_what_it_gets() -> None:
    def in_place(diff: dict[str, Any], _: Any) -> dict[str, Any]:
        for array in diff.values():
            np.put(array, [0], 0)
        return diff

    result = run([Doing(in_place)], rounds=1)
    assert result.weights["b"].tolist() == [0.5, 2.0, 2.0]
    assert result.weights["w"].reshape(-1).tolist() == [0.5, 2, 2, 2, 2, 2]


def test_what_a_filter_keeps_is_not_what_is_sent() -> None:
    kept: list[Any] = []

    def keep(diff: dict[str, Any], _: Any) -> dict[str, Any]:
        for array in kept:
            array[...] = 99
        kept.extend(diff.values())
        return diff

    assert values(run([Doing(keep)], rounds=3).weights) == (6.0, 6.0, 6.0)


def test_a_protocol_is_told_of_the_training() -> None:
    seen: list[Any] = []

    def per_step(diff: dict[str, Any], train_ctx: Any) -> dict[str, Any]:
        seen.append((train_ctx.total_steps, train_ctx.global_round))
        return {name: array / np.float64(train_ctx.total_steps) for name, array in diff.items()}

    result = run([Doing(per_step)])
    assert seen == [(4, 0), (4, 1)]
    assert {name: a.dtype for name, a in result.weights.items()} == {n: a.dtype for n, a in initial_weights().items()}
    assert values(result.weights)[:2] == (1.75, 1.75)  # (1 + 3/4) / 2 a round


def test_a_processor_gets_the_client_and_its_difference() -> None:
    seen: list[Any] = []

    class Look(DataProcessor):
        def process(self, data_ctx: FLContext, app_ctx: FLContext) -> FLContext:
            size = data_ctx.model.ByteSize()  # type: ignore[union-attr]
            seen.append(
                (app_ctx[fl.ContextKey.CONTRIBUTOR], data_ctx[fl.ContextKey.ROUND], list(params_of(data_ctx)), size)
            )
            data_ctx.set_prop("mine", 1)
            params_of(data_ctx)["w"].CopyFrom(ndarray_to_proto(np.zeros((2, 3))))
            return data_ctx

    client = fl.FederatedClient("b", AddingLearner(3), kind=fl.Kind.DIFF, filters=[Look()])
    result = fl.FederatedServer(initial_weights(), num_rounds=1, kind=fl.Kind.DIFF).run([client])
    # .npy has a header of 128 bytes; protobuf adds 3 bytes to each field of over 127, 2 to each name, and the name.
    assert seen == [("b", 0, ["w", "b", "steps"], 3 * 128 + 24 + 24 + 8 + 3 * (9 + 2) + 7)]
    assert values(result.weights) == (0.0, 3.0, 3.0)
    assert "mine" not in client.ctx


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_local_model_is_offered_as_it_was_filtered(kind: fl.Kind) -> None:
    recorder = Recorder()
    learner = AddingLearner(3, score=by_value)
    client = fl.FederatedClient("b", learner, kind=kind, filters=[times(0.5)], handlers=[recorder])
    result = fl.FederatedServer(initial_weights(), num_rounds=2, kind=kind).run([client])
    (ctx,) = recorder.at(EventType.SEND_BEST_MODEL)
    assert values(ctx.get_model().weights) == (3.0, 3.0, 4.0)  # type: ignore[union-attr,arg-type]
    assert result.cross_site["b"] == {"b": 3.0}


def raising(diff: dict[str, Any], _: Any) -> Any:
    raise ZeroDivisionError("no steps")


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_whose_filter_raises_leaves_and_sends_nothing(kind: fl.Kind) -> None:
    recorder = Recorder()
    result = run([Doing(raising)], kind, min_contributions=1, handlers=[recorder])
    assert values(result.weights) == (2.0, 2.0, 2.0)
    (quit_,) = result.quits
    assert quit_.contributor == "b"
    assert isinstance(quit_.error, fl.FilterError)
    assert str(quit_.error) == "b: filter Doing: ZeroDivisionError: no steps"
    assert quit_.error.contributor == "b"
    assert "b" not in {name for event, name in recorder.with_contributors() if event == EventType.RECEIVE_CONTRIBUTION}
    assert "b" not in result.cross_site


REFUSED: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "nothing": (lambda diff, _: None, fl.WeightsTypeError, "weights are a NoneType, not a dict"),
    "a list": (lambda diff, _: list(diff.values()), fl.WeightsTypeError, "weights are a list"),
    "a variable less": (lambda diff, _: {"w": diff["w"]}, fl.NamesError, "misses 'b', 'steps'"),
    "a variable more": (lambda diff, _: {**diff, "x": diff["b"]}, fl.NamesError, "adds 'x'"),
    "another shape": (lambda diff, _: {**diff, "b": diff["b"][:2]}, fl.ShapeError, "'b' has shape (2,), expected (3,)"),
    "NaN": (lambda diff, _: {**diff, "b": diff["b"] * np.nan}, fl.NonFiniteError, "'b' at index (0,): nan"),
    "a huge counter": (lambda diff, _: {**diff, "steps": np.float64(1e30)}, fl.IntegerRangeError, "'steps' leaves"),
    "raises what the library raises": (
        lambda *_: proto_to_ndarray(NDArray(ndarray=b"secret")),
        fl.WeightsTypeError,
        "6 bytes that are no array",
    ),
    "numbers of Python": (
        lambda diff, _: {**diff, "b": [1.0, 2.0, 3.0]},
        fl.WeightsTypeError,
        "'b' is a builtins.list",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("function", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_filter_spoils_is_refused_by_name(
    function: Any, error: type[Exception], message: str, kind: fl.Kind
) -> None:
    result = run([Doing(function)], kind, on_bad_contribution="reject", min_contributions=1)
    assert values(result.weights) == (2.0, 2.0, 2.0)
    assert result.quits == ()
    for report in result.reports:
        ((failure),) = report.rejected
        assert (failure.contributor, type(failure.error)) == ("b", error)
        assert str(failure.error).startswith("b: filter Doing: ")
        assert message in str(failure.error)


def test_a_processor_that_returns_no_context_is_refused() -> None:
    class Forgetful(DataProcessor):
        def process(self, data_ctx: FLContext, app_ctx: FLContext) -> Any:
            return None

    result = run([Forgetful()], on_bad_contribution="reject", min_contributions=1)
    ((failure),) = result.reports[0].rejected
    assert str(failure.error) == "b: filter Forgetful: gave a NoneType, not a context with a model"


@pytest.mark.parametrize("filters", [[PercentileProtocol], ["PercentileProtocol"], [None], [Recorder()]])
def test_what_is_no_filter_is_refused_at_once(filters: Any) -> None:
    with pytest.raises(TypeError, match="is no filter: pass a PrivacyProtocol or a DataProcessor"):
        fl.FederatedClient("b", AddingLearner(), filters=filters)


class Flipping(AddingLearner):
    """Adds, and changes a flag."""

    def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult:
        return fl.TrainingResult({"w": weights["w"] + self.step, "flag": ~weights["flag"]}, 1)


def test_full_weights_that_have_no_differences_pass_filters_unchanged_and_cannot_be_filtered_else() -> None:
    weights = {"w": np.zeros(1, np.float32), "flag": np.array([True, False])}
    server = fl.FederatedServer(weights, num_rounds=1)
    with pytest.raises(fl.DtypeError, match="b: 'flag' has dtype bool, which cannot hold a difference"):
        server.run([fl.FederatedClient("b", Flipping(1), filters=[times(1)])])

    class Keeping(Flipping):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult:
            return fl.TrainingResult({"w": weights["w"] + self.step, "flag": weights["flag"]}, 1)

    result = server.run([fl.FederatedClient("b", Keeping(2), filters=[times(3)])])
    assert (result.weights["w"].tolist(), result.weights["flag"].tolist()) == ([6.0], [True, False])


def test_the_protocol_of_the_example_drops_what_it_says() -> None:
    spec = importlib.util.spec_from_file_location("BYO_privacy", EXAMPLES / "clara" / "BYO_privacy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weights = {"w": np.zeros((20, 10), np.float32)}
    protocol = module.RandomDrop(percentage=25, seed=0)
    client = fl.FederatedClient("b", AddingLearner(1), kind=fl.Kind.DIFF, filters=[protocol])
    result = fl.FederatedServer(weights, num_rounds=1, kind=fl.Kind.DIFF).run([client])
    assert sorted(result.weights["w"].reshape(-1).tolist()) == [0.0] * 50 + [1.0] * 150
