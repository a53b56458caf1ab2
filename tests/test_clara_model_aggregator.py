"""`ModelAggregator`: weights, exclusions, refusals, subclasses."""

import pickle
from typing import Any

import numpy as np
import pytest
from clara_parts import params_of, server_with, two_clients
from federation import AddingLearner, clients_of, values

import fed_learn as fl
from fed_learn.model_meta import FLContext
from fed_learn.numproto import ndarray_to_proto, proto_to_ndarray
from fed_learn.server.model_aggregator import ModelAggregator


def test_weights_of_clients_multiply_their_iterations() -> None:
    aggregator = ModelAggregator(aggregation_weights={"b": 1 / 3, "nobody": 5})
    result = server_with(aggregator, num_rounds=1).run(two_clients())
    assert values(result.weights) == (2.0, 2.0, 2.0)


def test_excluded_variables_stay_as_they_are() -> None:
    result = server_with(ModelAggregator(exclude_vars="^b|tep")).run(two_clients())
    assert values(result.weights) == (7.5, 0.0, 0.0)
    assert values(server_with(ModelAggregator(exclude_vars="dummy")).run(two_clients()).weights) == (7.5, 7.5, 6.0)


def test_a_job_in_which_everything_is_excluded_ends_with_an_error() -> None:
    with pytest.raises(fl.NothingAggregatedError, match=r"exclude_vars '\.' matches all variables") as caught:
        server_with(ModelAggregator(exclude_vars=".")).run(two_clients())
    assert (caught.value.cause, caught.value.count, caught.value.rounds) == ("AggregatorError", 3, 3)
    assert values(caught.value.result.weights) == (0.0, 0.0, 0.0)


def test_a_round_in_which_an_aggregator_leaves_the_model_untouched_has_failed() -> None:
    class Seldom(ModelAggregator):
        def __init__(self, rounds: tuple[int, ...]) -> None:
            super().__init__()
            self.rounds = rounds

        def process(self, accumulator: list[FLContext], fl_ctx: FLContext) -> bool:
            return fl_ctx[fl.ContextKey.ROUND] in self.rounds and super().process(accumulator, fl_ctx)

    result = server_with(Seldom((1,))).run(two_clients())
    untouched = "aggregator Seldom: put no variable into the global model, so no contribution is in it"
    assert [str(report.error) for report in result.reports] == [untouched, "None", untouched]
    assert values(result.weights) == (2.5, 2.5, 2.0)
    with pytest.raises(fl.NothingAggregatedError, match=f"AggregatorError 3 times, the first: {untouched}"):
        server_with(Seldom(())).run(two_clients())


@pytest.mark.parametrize(
    ("n_iter", "message"),
    [(None, "a: no n_iter, by which"), (-3, "a: n_iter is -3, by which")],
)
def test_the_model_aggregator_refuses_a_contribution_without_iterations_and_averages_the_others(
    n_iter: int | None, message: str
) -> None:
    clients = clients_of({"a": AddingLearner(n_iter=n_iter), "b": AddingLearner(3)}, kind=fl.Kind.DIFF)
    result = server_with(ModelAggregator(), min_contributions=1, on_bad_contribution="reject").run(clients)
    report = result.reports[0]
    assert [(f.contributor, f.cause) for f in report.rejected] == [("a", "MetricError")]
    assert str(report.rejected[0].error).startswith(message)
    assert report.accepted == ("b",)
    assert report.error is None
    assert values(result.weights) == (3.0 * len(result.reports),) * 3


def test_a_mean_that_leaves_the_range_of_a_dtype_is_lost() -> None:
    diff = {"w": np.full(2, 40_000, np.float16)}
    with server_with(ModelAggregator(), num_rounds=2, weights={"w": np.zeros(2, np.float16)}).begin() as job:
        for number in range(2):
            job.start_round(number)
            job.send_model("a")
            job.receive("a", fl.Contribution("a", diff, 1, n_iter=1, round=number, kind=fl.Kind.DIFF))
            assert job.aggregate() is (number == 0)
            job.end_round()
    assert "'w' at index (0,): inf is not finite" in str(job.reports[1].error)
    assert job.weights["w"].tolist() == diff["w"].tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"exclude_vars": "("}, ValueError, "is no regular expression"),
        ({"aggregation_weights": {"a": 0}}, ValueError, "a: aggregation weight 0 is not positive"),
        ({"aggregation_weights": {"a": float("nan")}}, ValueError, "a: aggregation weight nan is not finite"),
    ],
)
def test_bad_arguments_of_the_model_aggregator(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ModelAggregator(**arguments)


def test_the_model_aggregator_keeps_its_arguments_and_can_be_pickled() -> None:
    aggregator = pickle.loads(pickle.dumps(ModelAggregator("dummy", {"a": 2.0}, exact=True)))
    assert (aggregator.exclude_vars, aggregator.aggregation_weights, aggregator.exact) == ("dummy", {"a": 2.0}, True)


def test_a_subclass_may_change_contributions_before_the_mean() -> None:
    class Clipped(ModelAggregator):
        def process(self, accumulator: list[FLContext], fl_ctx: FLContext) -> bool:
            for item in accumulator:
                for message in params_of(item).values():
                    message.CopyFrom(ndarray_to_proto(np.minimum(proto_to_ndarray(message), 1)))
            return super().process(accumulator, fl_ctx)

    assert values(server_with(Clipped()).run(two_clients()).weights) == (3.0, 3.0, 3.0)


def test_by_hand_it_changes_and_keeps_nothing_of_what_it_is_given() -> None:
    mine = {"w": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    diff = {name: np.full(2, 2, np.float32) for name in mine}
    item = FLContext(model=fl.ModelData(diff))
    item.set_prop("_contribution", fl.Contribution("a", None, 1, n_iter=5))
    ctx = FLContext(model=fl.ModelData(mine))
    assert ModelAggregator(exclude_vars="b").process([item], ctx) is False
    for array in (*mine.values(), *diff.values()):
        array += 10
    assert params_of(ctx)["w"].tolist() == [3, 3]
    assert params_of(ctx)["b"].tolist() == [1, 1]
