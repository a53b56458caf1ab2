"""Failures that Flower's older interface passes on as exceptions, which name no client."""

import logging
from typing import Any

import numpy as np
import pytest
from flwr.common import Code, DisconnectRes, EvaluateRes, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import Server, SimpleClientManager
from flwr.server.client_proxy import ClientProxy

import fed_learn as fl
from fed_learn.integrations.flower import LegacyFedAvg


class Proxy(ClientProxy):
    """A client that adds one, or fails."""

    def __init__(self, cid: str, error: Exception | None = None) -> None:
        super().__init__(cid)
        self.error = error

    def fit(self, ins: Any, timeout: Any, group_id: Any) -> FitRes:
        if self.error is not None:
            raise self.error
        made = [array + 1 for array in parameters_to_ndarrays(ins.parameters)]
        return FitRes(Status(Code.OK, ""), ndarrays_to_parameters(made), 10, {})

    def evaluate(self, ins: Any, timeout: Any, group_id: Any) -> EvaluateRes:
        return EvaluateRes(Status(Code.OK, ""), 0.5, 10, {})

    def get_properties(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def get_parameters(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def reconnect(self, *_: Any, **__: Any) -> DisconnectRes:
        return DisconnectRes("")


def served(*errors: Exception | None, rounds: int = 2) -> Any:
    strategy = LegacyFedAvg(num_rounds=rounds, initial_parameters=ndarrays_to_parameters([np.zeros(2)]))
    manager = SimpleClientManager()
    for number, error in enumerate(errors):
        manager.register(Proxy(str(number), error))
    server = Server(client_manager=manager, strategy=strategy)
    server.fit(num_rounds=rounds, timeout=5)
    assert strategy.job is not None
    return strategy.job.result()


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [line for line in said if line.startswith("\t>")]


def test_the_only_client_that_did_not_answer_is_the_one_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    result = served(None, RuntimeError("dead"), None)
    assert [(q.contributor, q.cause, str(q.error)) for q in result.quits] == [
        ("node-1", "ClientQuitError", "a client failed: RuntimeError: dead")
    ] * 2
    assert [report.absent for report in result.reports] == [(), ()]
    assert result.weights["0"].tolist() == [2.0, 2.0]
    assert warned(caplog) == ["\t> a client failed: RuntimeError: dead"] * 2


def test_of_several_that_failed_in_different_ways_none_is_named(caplog: pytest.LogCaptureFixture) -> None:
    result = served(None, RuntimeError("dead"), ValueError("bad"), rounds=1)
    assert sorted((q.contributor, str(q.error)) for q in result.quits) == [
        ("a client", "a client failed: RuntimeError: dead"),
        ("a client", "a client failed: ValueError: bad"),
    ]
    assert result.reports[0].absent == ()
    assert len(warned(caplog)) == 2


def test_a_job_in_which_all_fail_says_why() -> None:
    with pytest.raises(fl.NothingAggregatedError) as caught:
        served(RuntimeError("dead"), RuntimeError("dead"))
    assert (caught.value.cause, caught.value.count) == ("ClientQuitError", 4)
    assert str(caught.value).endswith("ClientQuitError 4 times, the first: a client failed: RuntimeError: dead")


def test_the_older_interface_is_not_advised_to_send_an_empty_record() -> None:
    strategy = LegacyFedAvg(num_rounds=1, fraction_evaluate=0.0)
    other = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([np.zeros(3)]), 1, {})
    manager = SimpleClientManager()
    for number in "12":
        manager.register(Proxy(number))
    strategy.configure_fit(1, ndarrays_to_parameters([np.zeros(2)]), manager)
    with pytest.raises(fl.NothingAggregatedError) as caught:
        strategy.aggregate_fit(1, [(Proxy("1"), other)], [])
    assert caught.value.cause == "ShapeError"
    assert "empty initial record" not in str(caught.value)
