"""Bad contributions in a job: they end it or are left out, are named, and leave no trace in the aggregate."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from federation import AddingLearner, Array, Recorder, TamperingClient, WeightDict, clients_of, noise, server_of, values
from reference import bits

import fed_learn as fl

Key = fl.ContextKey

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


class Unreadable(Mapping[str, Array]):
    """Weights that raise when they are read."""

    def __getitem__(self, name: str) -> Array:
        raise OSError("the file is gone")

    def __iter__(self) -> Iterator[str]:
        return iter(noise(0))

    def __len__(self) -> int:
        return len(noise(0))


class Uncopied(fl.Contribution):
    """A contribution that cannot even be written down without its weights."""

    def without_weights(self) -> fl.Contribution:
        raise OSError("not copied")


def unpickled(contribution: fl.Contribution, **fields: Any) -> fl.Contribution:
    """The contribution as pickle would bring it: with fields that no constructor has seen."""
    copied = copy.copy(contribution)
    copied.__dict__.update(fields)
    return copied


BAD: dict[str, tuple[Tamper, type[fl.ContributionError], str | None]] = {
    "a variable is missing": (with_weights(lambda w: w.pop("b")), fl.NamesError, "b"),
    "a variable is extra": (with_weights(lambda w: w.update(new=np.zeros(1))), fl.NamesError, "new"),
    "no variable at all": (with_weights(lambda w: w.clear()), fl.NamesError, "w"),
    "another shape": (with_weights(lambda w: w.update(w=w["w"].T)), fl.ShapeError, "w"),
    "a shape that broadcasts": (with_weights(lambda w: w.update(w=w["w"][0])), fl.ShapeError, "w"),
    "another sort of dtype": (with_weights(lambda w: w.update(b=w["b"].astype(np.int64))), fl.DtypeError, "b"),
    "objects": (with_weights(lambda w: w.update(b=w["b"].astype(object))), fl.DtypeError, "b"),
    "NaN": (with_element("w", math.nan), fl.NonFiniteError, "w"),
    "infinity": (with_element("b", math.inf), fl.NonFiniteError, "b"),
    "a list for an array": (with_weights(lambda w: w.update(b=[0.0, 0.0, 0.0])), fl.WeightsTypeError, "b"),
    "a name that is no str": (with_weights(lambda w: w.update({1: np.zeros(1)})), fl.WeightsTypeError, None),
    "weights that are no dict": (lambda c: altered(c, weights=[1.0]), fl.WeightsTypeError, None),
    "no weights": (lambda c: altered(c, weights=None), fl.WeightsTypeError, None),
    "no aggregation weight": (lambda c: altered(c, aggregation_weight=None), fl.AggregationWeightError, None),
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
    "an array": (lambda c: np.zeros(3), fl.WeightsTypeError, None),
    "an array of one element": (lambda c: np.ones(1), fl.WeightsTypeError, None),
    "an empty array": (lambda c: np.zeros(0), fl.WeightsTypeError, None),
    "a number": (lambda c: 0.0, fl.WeightsTypeError, None),
    "False": (lambda c: False, fl.WeightsTypeError, None),
    "an empty string": (lambda c: "", fl.WeightsTypeError, None),
    "an empty dict": (lambda c: {}, fl.WeightsTypeError, None),
    "a generator": (lambda c: (one for one in [c]), fl.WeightsTypeError, None),
    "a list of arrays": (lambda c: [np.zeros(3)], fl.WeightsTypeError, None),
    "a list in a list": (lambda c: [[c]], fl.WeightsTypeError, None),
    "strings of variable width": (
        with_weights(lambda w: w.update(b=np.array(["0", "0", "0"], np.dtypes.StringDType()))),
        fl.DtypeError,
        "b",
    ),
    "weights that cannot be read": (lambda c: altered(c, weights=Unreadable()), fl.WeightsTypeError, None),
    "iterations of 5000 digits": (lambda c: altered(c, n_iter=10**5000), fl.ContributionError, None),
    "an array for a kind": (lambda c: unpickled(c, kind=np.array([1, 2])), fl.ContributionError, None),
    "a list for metrics": (lambda c: unpickled(c, metrics=[0.5]), fl.ContributionError, None),
    "a contribution that cannot be copied": (
        lambda c: Uncopied(c.contributor, c.weights, math.nan, round=c.round),
        fl.ContributionError,
        None,
    ),
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
        seen = [ctx.model for ctx in recorder.at(fl.EventType.END_AGGREGATION)]
        models.append([bits(model.weights) for model in seen if model and model.weights] + [bits(result.weights)])
    assert models[0] == models[1]
    assert len(models[0]) == 4


@pytest.mark.parametrize("kind", list(fl.Kind))
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda weights: weights["w"].__setitem__((0, 0), math.nan), fl.NonFiniteError),
        (lambda weights: weights.update(w=np.zeros((3, 2), np.float32)), fl.ShapeError),
    ],
    ids=["training that diverges", "another shape"],
)
def test_bad_trained_weights_are_a_bad_contribution_whatever_the_kind(
    spoil: Callable[[dict[str, Array]], object], error: type[fl.ContributionError], kind: fl.Kind
) -> None:
    class Spoiling(AddingLearner):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
            result = super().train(weights, ctx)
            if result is None or ctx[Key.ROUND] != 1:
                return result
            trained = dict(result.weights)
            spoil(trained)
            return replace(result, weights=trained)

    clients = clients_of({"a": AddingLearner(1), "b": Spoiling(1)}, kind=kind)
    result = server_of(3, kind=kind, min_contributions=1, on_bad_contribution="reject").run(clients)
    assert [report.accepted for report in result.reports] == [("a", "b"), ("a",), ("a", "b")]
    (failure,) = result.reports[1].rejected
    assert isinstance(failure.error, error)
    assert (failure.error.contributor, failure.error.name) == ("b", "w")
    with pytest.raises(error, match="b: 'w'"):
        server_of(3, kind=kind, min_contributions=1).run(clients)


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


def test_a_contribution_whose_weights_cannot_be_read_is_refused_with_the_cause() -> None:
    server, clients = tampering_job(lambda c: altered(c, weights=Unreadable()), on_bad_contribution="reject")
    (failure,) = server.run(clients).reports[1].rejected
    assert str(failure.error) == "b: weights cannot be read: OSError: the file is gone"
    assert isinstance(failure.error.__cause__, OSError)


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
