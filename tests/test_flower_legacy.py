"""`LegacyFedAvg` behind Flower's older interface, run by Flower's own server."""

import copy
import math
import pickle
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Code, EvaluateRes, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerConfig, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.app import start_grid
from flwr.server.strategy import FedAvg as FlowerFedAvg

import fed_learn as fl
from fed_learn.integrations.flower import LegacyFedAvg, LocalGrid

E = fl.EventType
SHAPES = ((4, 3), (3,))


def initial() -> list[Any]:
    return [np.zeros(shape, np.float32) for shape in SHAPES]


def step(node: int) -> list[Any]:
    rng = np.random.default_rng(node)
    return [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]


class Client(NumPyClient):
    def __init__(self, node: int) -> None:
        self.node = node

    def fit(self, parameters: Any, config: Any) -> Any:
        trained = [p + s for p, s in zip(parameters, step(self.node), strict=True)]
        return trained, 10 + self.node, {"partition-id": self.node, "num-iterations": 5}

    def evaluate(self, parameters: Any, config: Any) -> Any:
        return 0.5, 10, {"partition-id": self.node, "accuracy": float(np.abs(parameters[0]).sum())}


class Log(fl.Handler):
    def __init__(self) -> None:
        self.events: list[str] = []

    def handle_event(self, event: str, ctx: fl.FLContext) -> None:
        self.events.append(event)


def averaged(weights: list[Any]) -> list[Any]:
    dicts = [{str(i): p + s for i, (p, s) in enumerate(zip(weights, step(k), strict=True))} for k in range(3)]
    return list(fl.weighted_average(dicts, [10, 11, 12]).values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flowers_own_server_runs_it_with_handlers() -> None:
    client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client())
    log, selection = Log(), fl.ModelSelectionHandler()
    finals: list[Any] = []
    strategy = LegacyFedAvg(
        num_rounds=2,
        handlers=[log, selection],
        validation_metric="accuracy",
        min_fit_clients=3,
        min_available_clients=3,
        initial_parameters=ndarrays_to_parameters(initial()),
        evaluate_fn=lambda number, arrays, config: finals.append(arrays) or (0.1, {}),  # type: ignore[func-returns-value]
    )
    history = start_grid(grid=LocalGrid(client, 3), config=ServerConfig(num_rounds=2), strategy=strategy)
    expected = averaged(averaged(initial()))
    assert all(np.array_equal(a, b) for a, b in zip(finals[-1], expected, strict=True))
    assert [loss for _, loss in history.losses_distributed] == [0.5, 0.5]
    assert strategy.job is not None
    assert [r.accepted for r in strategy.job.reports] == [("partition-0", "partition-1", "partition-2")] * 2
    best = strategy.job.result().best
    assert best is not None
    assert best.round == 2
    assert all(np.array_equal(a, b) for a, b in zip(best.weights.values(), expected, strict=True))
    assert log.events[0] == E.STARTUP
    assert log.events[-1] == E.SHUTDOWN
    assert log.events.count(E.RECEIVE_VALIDATION_RESULTS) == 3
    assert log.events.count(E.SEND_MODEL) == 6


class Proxy(ClientProxy):
    get_properties = get_parameters = fit = evaluate = reconnect = None  # type: ignore[assignment]


def results(*weights: list[Any], metrics: Any = None) -> list[tuple[ClientProxy, FitRes]]:
    status = Status(Code.OK, "")
    return [
        (
            Proxy(str(100 + k)),
            FitRes(status, ndarrays_to_parameters(w), 10, {"partition-id": k} if metrics is None else metrics),
        )
        for k, w in enumerate(weights)
    ]


def test_a_bad_result_is_refused_and_the_metrics_are_those_of_the_others() -> None:
    bad = [np.full(shape, np.nan, np.float32) for shape in SHAPES]
    strategy = LegacyFedAvg(fit_metrics_aggregation_fn=lambda pairs: {"count": len(pairs)})
    parameters, metrics = strategy.aggregate_fit(1, results(step(0), bad, step(2)), [])
    assert parameters is not None
    assert np.array_equal(
        parameters_to_ndarrays(parameters)[0],
        fl.weighted_average([{"w": step(0)[0]}, {"w": step(2)[0]}])["w"],
    )
    assert metrics == {"count": 2}
    result = strategy.close()
    assert result is not None
    assert [(f.contributor, f.cause) for f in result.reports[0].rejected] == [("partition-1", "NonFiniteError")]


@pytest.mark.parametrize("closed", ["by close", "by the last round"])
def test_two_rounds_in_vain_end_with_an_error_that_names_the_commonest_cause(closed: str) -> None:
    strategy = LegacyFedAvg(
        num_rounds=None if closed == "by close" else 2,
        fraction_evaluate=0.0,
        min_fit_clients=0,
        min_available_clients=0,
    )
    nan = [np.full(shape, np.nan, np.float32) for shape in SHAPES]
    other = [np.zeros((2, 2), np.float32), np.zeros(3, np.float32)]
    manager = SimpleClientManager()

    def run() -> None:
        for number, sent in ((1, (nan, other)), (2, (nan, nan))):
            strategy.configure_fit(number, ndarrays_to_parameters(initial()), manager)
            assert strategy.aggregate_fit(number, results(*sent), []) == (None, {})
        strategy.close()

    with pytest.raises(fl.NothingAggregatedError) as caught:
        run()
    error = caught.value
    assert (error.cause, error.count, error.rounds) == ("NonFiniteError", 3, 2)
    assert str(error) == (
        "nothing was aggregated in 2 rounds, so no client's work is in the model: NonFiniteError 3 times, the first: "
        "partition-0: '0' at index (0, 0): nan is not finite"
    )
    causes = [[failure.cause for failure in report.rejected] for report in error.result.reports]
    assert causes == [["NonFiniteError", "ShapeError"], ["NonFiniteError"] * 2]
    assert [array.tolist() for array in error.result.weights.values()] == [array.tolist() for array in initial()]


def test_clients_are_named_by_their_ids_where_they_say_nothing() -> None:
    strategy = LegacyFedAvg()
    strategy.aggregate_fit(1, results(step(0), step(1), metrics={}), [])
    assert strategy.job is not None
    assert strategy.job.reports[0].accepted == ("node-100", "node-101")


def test_several_clients_of_a_partition_are_several_contributors_and_what_is_none_is_the_apps_own() -> None:
    trained = results(step(0), step(1), step(2), metrics={})
    claims: list[Any] = [0, 0.0, "x" * 201]
    for (_, result), claim in zip(trained, claims, strict=True):
        result.metrics = {"partition-id": claim}
    strategy = LegacyFedAvg()
    strategy.aggregate_fit(1, trained, [])
    assert strategy.job is not None
    (report,) = strategy.job.reports
    assert report.accepted == ("node-102", "partition-0@node-100", "partition-0@node-101")
    assert report.rejected == ()


def test_an_evaluation_without_examples_has_no_loss() -> None:
    none = EvaluateRes(Status(Code.OK, ""), 0.5, 0, {})
    some = EvaluateRes(Status(Code.OK, ""), 0.25, 10, {})
    assert LegacyFedAvg().aggregate_evaluate(1, [(Proxy("1"), none)], []) == (None, {})
    assert LegacyFedAvg().aggregate_evaluate(1, [(Proxy("1"), none), (Proxy("2"), some)], []) == (0.25, {})


def test_failures_are_reported_and_may_fail_the_round() -> None:
    failed = (Proxy("7"), FitRes(Status(Code.FIT_NOT_IMPLEMENTED, "no fit"), ndarrays_to_parameters([]), 0, {}))
    for accept, made in ((True, True), (False, False)):
        strategy = LegacyFedAvg(accept_failures=accept, fit_metrics_aggregation_fn=lambda pairs: {"count": len(pairs)})
        parameters, metrics = strategy.aggregate_fit(1, results(step(0), step(1)), [failed, RuntimeError("lost")])
        assert metrics == ({"count": 2} if made else {})
        assert (parameters is not None) is made
        assert strategy.job is not None
        assert isinstance(strategy.job.reports[0].error, type(None) if made else fl.ClientQuitError)
        assert [(quit.contributor, str(quit.error)) for quit in strategy.job.reports[0].quits] == [
            ("node-7", "7: FIT_NOT_IMPLEMENTED: no fit"),
            ("a client", "a client failed: RuntimeError: lost"),
        ]


def test_a_score_that_is_no_number_is_left_out() -> None:
    strategy = LegacyFedAvg(validation_metric="accuracy", handlers=[fl.ModelSelectionHandler()])
    strategy.aggregate_fit(1, results(step(0), step(1)), [])
    scores: list[Any] = ["high", 0.5]
    evaluated: Any = [
        (Proxy(str(100 + k)), EvaluateRes(Status(Code.OK, ""), 0.5, 10, {"partition-id": k, "accuracy": score}))
        for k, score in enumerate(scores)
    ]
    assert strategy.aggregate_evaluate(1, evaluated, [])[0] == 0.5
    strategy.aggregate_fit(2, results(step(0), step(1)), [])
    result = strategy.close()
    assert result is not None
    assert result.best is not None
    assert (result.best.round, result.best.metric) == (1, 0.5)


def test_a_first_round_after_others_begins_another_job() -> None:
    log = Log()
    strategy = LegacyFedAvg(handlers=[log], min_available_clients=0, min_fit_clients=0)
    manager = SimpleClientManager()
    for _ in range(2):
        for number in (1, 2):
            strategy.configure_fit(number, ndarrays_to_parameters(initial()), manager)
            strategy.aggregate_fit(number, results(step(0), step(1)), [])
    assert strategy.job is not None
    assert [report.round for report in strategy.job.reports] == [0, 1]
    assert (log.events.count(E.STARTUP), log.events.count(E.SHUTDOWN)) == (2, 1)


def test_a_handler_may_put_in_a_contribution_of_its_own() -> None:
    class Guest(fl.Handler):
        def before_aggregation(self, ctx: fl.FLContext) -> None:
            first = ctx[fl.ContextKey.CONTRIBUTIONS][0]
            ctx[fl.ContextKey.CONTRIBUTIONS] = (first, replace(first, contributor="server"))

    strategy = LegacyFedAvg(handlers=[Guest()], fit_metrics_aggregation_fn=lambda pairs: {"count": len(pairs)})
    parameters, metrics = strategy.aggregate_fit(1, results(step(0), step(1)), [])
    assert parameters is not None
    assert np.array_equal(parameters_to_ndarrays(parameters)[0], step(0)[0])
    assert metrics == {"count": 1}


def test_without_results_nothing_happens() -> None:
    assert LegacyFedAvg().aggregate_fit(1, [], []) == (None, {})


def test_it_is_flowers_fedavg_with_its_arguments() -> None:
    strategy = LegacyFedAvg(fraction_fit=0.3, min_fit_clients=5, min_available_clients=5)
    assert isinstance(strategy, FlowerFedAvg)
    assert strategy.num_fit_clients(10) == (5, 5)
    with pytest.raises(ValueError, match="on_bad_contribution"):
        LegacyFedAvg(on_bad_contribution="ignore")


BOTH = pytest.mark.parametrize("base", [FlowerFedAvg, LegacyFedAvg])


def values(parameters: Any) -> Any:
    assert parameters is not None
    return parameters_to_ndarrays(parameters)[0].tolist()


def results_of(*arrays: Any, clients: Any = None) -> Any:
    clients = [Proxy(str(k)) for k in range(len(arrays))] if clients is None else clients[: len(arrays)]
    parameters = [ndarrays_to_parameters([np.asarray(array)]) for array in arrays]
    return [(c, FitRes(Status(Code.OK, ""), p, 1, {})) for c, p in zip(clients, parameters, strict=True)]


@BOTH
def test_what_is_sampled_is_no_threshold(base: Any) -> None:
    strategy = base(min_fit_clients=3, min_available_clients=3)
    failures: Any = [RuntimeError("lost")]
    assert values(strategy.aggregate_fit(1, results_of([1.0], [3.0]), failures)[0]) == [2.0]
    assert base(accept_failures=False).aggregate_fit(1, results_of([1.0]), failures) == (None, {})


def test_the_users_own_threshold_holds() -> None:
    strategy = LegacyFedAvg(min_contributions=3)
    assert strategy.aggregate_fit(1, results_of([1.0], [3.0]), []) == (None, {})
    assert LegacyFedAvg().min_contributions == 1


@BOTH
def test_aggregate_fit_is_a_pure_function(base: Any) -> None:
    strategy = base()
    one_client = MagicMock()
    for number, arrays, mean in [
        (1, ([1.0], [3.0]), [2.0]),
        (1, ([1.0], [5.0]), [3.0]),
        (2, ([1.0, 1.0], [3.0, 5.0]), [2.0, 3.0]),
        (2, ([1.0, 1.0], [5.0, 5.0]), [3.0, 3.0]),
        (9, ([7.0],), [7.0]),
        (4, ([8.0],), [8.0]),
    ]:
        for clients in (None, [one_client, one_client], [MagicMock(), MagicMock()]):
            assert values(strategy.aggregate_fit(number, results_of(*arrays, clients=clients), [])[0]) == mean
    assert strategy.aggregate_fit(1, [], []) == (None, {})


class Manager(SimpleClientManager):
    def sample(self, *arguments: Any, **options: Any) -> Any:
        return [Proxy("0"), Proxy("1")]


@BOTH
@pytest.mark.parametrize("num_rounds", [None, 3])
def test_a_subclass_may_make_another_model(base: Any, num_rounds: int | None) -> None:
    class Mine(base):  # type: ignore[misc]
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            parameters, metrics = super().aggregate_fit(server_round, results, failures)
            if server_round == 1:  # in place
                parameters.tensors[0] = ndarrays_to_parameters([parameters_to_ndarrays(parameters)[0] * 2]).tensors[0]
                return parameters, metrics
            more = [*parameters_to_ndarrays(parameters), np.zeros(3)]
            return ndarrays_to_parameters(more), metrics

    strategy = Mine(**({"num_rounds": num_rounds} if base is LegacyFedAvg else {}))
    parameters = ndarrays_to_parameters([np.zeros(2)])
    for number in (1, 2, 3):
        sent = [ins.parameters for _, ins in strategy.configure_fit(number, parameters, Manager())]
        moved = [ndarrays_to_parameters([a + 1 for a in parameters_to_ndarrays(p)]) for p in sent]
        trained = [(Proxy(str(k)), FitRes(Status(Code.OK, ""), p, 1, {})) for k, p in enumerate(moved)]
        parameters, _ = strategy.aggregate_fit(number, trained, [])
    assert [a.tolist() for a in parameters_to_ndarrays(parameters)] == [[4.0, 4.0], [1.0] * 3, [0.0] * 3]
    if base is LegacyFedAvg:
        assert len(strategy.job.reports) == (3 if num_rounds else 1)


def test_a_strategy_can_be_copied_and_pickled_at_any_time() -> None:
    strategy = LegacyFedAvg()
    strategy.aggregate_fit(1, results_of([1.0]), [])
    for other in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        assert other.job is None
        assert values(other.aggregate_fit(2, results_of([2.0]), [])[0]) == [2.0]


def test_each_failure_is_told_once_and_so_is_the_lack_of_a_function_for_metrics(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed = (Proxy("7"), FitRes(Status(Code.FIT_NOT_IMPLEMENTED, "no fit"), ndarrays_to_parameters([]), 0, {}))
    strategy = LegacyFedAvg()
    for number in (1, 2):
        strategy.aggregate_fit(number, results_of([1.0], [np.nan]), [failed, RuntimeError("lost")])
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        *(once := ["\t> 7: FIT_NOT_IMPLEMENTED: no fit", "\t> a client failed: RuntimeError: lost"]),
        "\t> Refused: NonFiniteError: node-1: '0' at index (0,): nan is not finite",
        "No fit_metrics_aggregation_fn provided",
        *once,
        "\t> Refused: NonFiniteError: node-1: '0' at index (0,): nan is not finite",
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_clients_loss_that_is_not_finite_costs_itself_and_not_the_mean(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    def result(loss: float, examples: int) -> EvaluateRes:
        return EvaluateRes(Status(Code.OK, ""), loss, examples, {"accuracy": 0.5})

    seen: list[int] = []
    strategy = LegacyFedAvg(evaluate_metrics_aggregation_fn=lambda pairs: seen.append(len(pairs)) or {})  # type: ignore[func-returns-value]
    results: Any = [(Proxy("1"), result(0.25, 3)), (Proxy("2"), result(bad, 9)), (Proxy("3"), result(0.75, 1))]
    assert strategy.aggregate_evaluate(1, results, []) == (0.375, {})
    assert seen == [3]
    told = [r.getMessage() for r in caplog.records if "left out of the mean loss" in r.getMessage()]
    assert told == [f"node-2: its loss is {bad}, left out of the mean loss"]
    assert strategy.aggregate_evaluate(1, results[1:2], [])[0] is None


def test_a_client_id_that_could_not_be_a_name_is_one_all_the_same() -> None:
    ids = ("10.0.0.1:80/a", "10.0.0.1:80%2Fa", "site\n1")
    strategy = LegacyFedAvg(num_rounds=1, fraction_evaluate=0.0)
    parameters = ndarrays_to_parameters([np.ones(2, np.float32)])
    results: Any = [(Proxy(cid), FitRes(Status(Code.OK, ""), parameters, 1, {})) for cid in ids]
    strategy.aggregate_fit(1, results, [])
    assert strategy.job is not None
    assert strategy.job.reports[0].accepted == (
        "node-10.0.0.1:80%252Fa",
        "node-10.0.0.1:80%2Fa",
        "node-site%0A1",
    )
