"""`Handler` against the reference page of Clara Train 3.1, and what every handler of the library promises."""

import importlib
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federation import AddingLearner, NormEvaluator, clients_of, initial_weights

import fed_learn as fl
from fed_learn import handlers

pytestmark = pytest.mark.quick

EVENTS = {
    "BEFORE_AGGREGATION": "_beforeAggregation",
    "END_AGGREGATION": "_endAggregation",
    "START_ROUND": "_startRound",
    "END_ROUND": "_endRound",
    "CLIENT_REGISTER": "_clientRegister",
    "CLIENT_QUIT": "_clientQuit",
    "GET_MODEL": "_getModel",
    "SEND_MODEL": "_sendModel",
    "RECEIVE_MODEL": "_receiveModel",
    "RECEIVE_CONTRIBUTION": "_receiveContribution",
    "SEND_BEST_MODEL": "_sendBestModel",
    "SUBMIT_LOCAL_BEST_MODEL": "_submitLocalBestModel",
    "RECEIVE_VALIDATION_MODEL": "_receiveValidationModel",
    "SEND_VALIDATION_RESULTS": "_sendValidationResults",
    "RECEIVE_VALIDATION_RESULTS": "_receiveValidationResults",
    "STARTUP": "_startup",
    "SHUTDOWN": "_shutdown",
}

METHODS = {
    "_beforeAggregation": "before_aggregation",
    "_endAggregation": "after_aggregation",
    "_startRound": "start_round",
    "_endRound": "end_round",
    "_clientRegister": "client_register",
    "_clientQuit": "client_quit",
    "_getModel": "request_model",
    "_sendModel": "send_global_model",
    "_receiveModel": "receive_model",
    "_receiveContribution": "receive_contribution",
    "_sendBestModel": "send_best_model",
    "_submitLocalBestModel": "submit_local_best_model",
    "_receiveValidationModel": "receive_validation_models",
    "_sendValidationResults": "send_validation_results",
    "_receiveValidationResults": "receive_validation_results",
    "_startup": "startup",
    "_shutdown": "shutdown",
}

HANDLER_PAGE = {
    "after_aggregation": ["ctx"],
    "before_aggregation": ["ctx"],
    "client_quit": ["ctx"],
    "client_register": ["ctx"],
    "end_round": ["ctx"],
    "handle_event": ["event", "ctx"],
    "receive_contribution": ["ctx"],
    "receive_model": ["ctx"],
    "receive_validation_models": ["ctx"],
    "rollback": ["ctx"],
    "send_best_model": ["ctx"],
    "send_global_model": ["ctx"],
    "send_validation_results": ["ctx"],
    "shutdown": ["ctx"],
    "startup": ["ctx"],
}
MODEL_SELECTION_PAGE = {"before_aggregation": ["fl_ctx"], "rollback": ["fl_ctx"], "startup": ["fl_ctx"]}
SERVER_VALIDATION_PAGE = {"after_aggregation": ["fl_ctx"], "rollback": ["fl_ctx"], "startup": ["fl_ctx"]}

PAGE = [
    *((fl.Handler, method, names) for method, names in HANDLER_PAGE.items()),
    *((fl.ModelSelectionHandler, method, names) for method, names in MODEL_SELECTION_PAGE.items()),
    *((fl.ServerValidationHandler, method, names) for method, names in SERVER_VALIDATION_PAGE.items()),
]


# Events


def test_the_events_have_the_values_of_clara() -> None:
    assert {event.name: event.value for event in fl.EventType} == EVENTS


def test_an_event_is_its_value() -> None:
    value: str = fl.EventType.END_AGGREGATION
    assert value == "_endAggregation"
    assert str(fl.EventType.END_AGGREGATION) == "_endAggregation"
    assert {"_endAggregation": 1}[fl.EventType.END_AGGREGATION] == 1


@pytest.mark.parametrize(("event", "method"), METHODS.items())
def test_each_event_calls_its_method_and_no_other(event: str, method: str) -> None:
    called: list[tuple[str, fl.FLContext]] = []

    def recording(name: str) -> Callable[[fl.Handler, fl.FLContext], None]:
        return lambda self, ctx: called.append((name, ctx))

    spy_class = type("Spy", (fl.Handler,), {name: recording(name) for name in METHODS.values()})
    ctx = fl.FLContext()
    fl.fire_event(event, [spy_class()], ctx)
    assert called == [(method, ctx)]
    assert called[0][1] is ctx


@pytest.mark.parametrize("event", [*METHODS, "_unknown", ""])
def test_the_base_class_does_nothing_at_any_event(event: str) -> None:
    ctx = fl.FLContext({"a": 1})
    fl.fire_event(event, [fl.Handler()], ctx)
    assert ctx == {"a": 1}
    assert ctx.get_model() is None


def test_a_legacy_subclass_may_have_a_get_model_of_its_own() -> None:
    class Legacy(fl.Handler):
        def get_model(self, one: int, two: int) -> None:
            raise AssertionError("not an event method")

    ctx = fl.FLContext()
    fl.fire_event(fl.EventType.GET_MODEL, [Legacy()], ctx)
    assert ctx == {}


# The reference page


@pytest.mark.parametrize(("cls", "method", "names"), PAGE, ids=[f"{cls.__name__}.{method}" for cls, method, _ in PAGE])
def test_the_methods_of_the_page_have_its_names_and_parameters(
    cls: type[fl.Handler], method: str, names: list[str]
) -> None:
    assert list(inspect.signature(getattr(cls, method)).parameters) == ["self", *names]


def test_every_method_of_the_page_can_be_called_by_keyword() -> None:
    handler = fl.Handler()
    ctx = fl.FLContext()
    for method, names in HANDLER_PAGE.items():
        arguments: dict[str, Any] = {"event": "_endRound", "ctx": ctx}
        assert getattr(handler, method)(**{name: arguments[name] for name in names}) is None
    assert ctx == {}


def test_fire_event_has_the_parameters_of_the_page() -> None:
    assert list(inspect.signature(fl.fire_event).parameters) == ["event", "handlers", "ctx"]
    ctx = fl.FLContext()
    handler = handlers.ModelSelectionHandler()
    ctx[handler.best_key] = "of an earlier job"
    fl.fire_event(event=fl.EventType.STARTUP, handlers=[handler], ctx=ctx)
    assert ctx == {}


def test_the_constructors_begin_with_the_parameters_of_the_page() -> None:
    selection = inspect.signature(fl.ModelSelectionHandler).parameters
    assert list(selection)[:3] == ["weigh_by_local_iter", "validation_metric_name", "aggregation_weights"]
    assert selection["weigh_by_local_iter"].default is False
    assert selection["validation_metric_name"].default == "initial_validation_metric"
    assert dict(selection["aggregation_weights"].default) == {"1": 1.0, "2": 1.0}
    validation = inspect.signature(fl.ServerValidationHandler).parameters
    assert list(validation)[:2] == ["evaluator", "num_rounds_per_valid"]
    assert validation["num_rounds_per_valid"].default is inspect.Parameter.empty
    for parameters, count in ((selection, 3), (validation, 2)):
        ours = list(parameters.values())[count:]
        assert [p.kind for p in ours] == [inspect.Parameter.KEYWORD_ONLY] * len(ours)


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("fed_learn.handlers.handler", "Handler", fl.Handler),
        ("fed_learn.handlers.handler", "fire_event", fl.fire_event),
        ("fed_learn.handlers", "Handler", fl.Handler),
        ("fed_learn.handlers", "fire_event", fl.fire_event),
        ("fed_learn.handlers", "ModelSelectionHandler", fl.ModelSelectionHandler),
        ("fed_learn.handlers", "ServerValidationHandler", fl.ServerValidationHandler),
        ("fed_learn.handlers.model_selection", "ModelSelectionHandler", fl.ModelSelectionHandler),
        ("fed_learn.handlers.server_validation", "ServerValidationHandler", fl.ServerValidationHandler),
        ("fed_learn.model_meta", "FLContext", fl.FLContext),
        ("fed_learn.components.model_evaluator", "ModelEvaluator", fl.ModelEvaluator),
    ],
)
def test_the_import_paths_of_the_page_work(path: str, name: str, expected: object) -> None:
    assert getattr(importlib.import_module(path), name) is expected


def test_the_handlers_of_the_page_are_handlers() -> None:
    assert issubclass(fl.ModelSelectionHandler, fl.Handler)
    assert issubclass(fl.ServerValidationHandler, fl.Handler)
    assert fl.Handler.__bases__ == (object,)


# What every handler promises

EVALUATOR = NormEvaluator(2.0)
BUILT_IN: dict[type[fl.Handler], dict[str, Any]] = {
    handlers.CheckpointHandler: {
        "directory": "some/folder",
        "global_name": "g.safetensors",
        "best_name": "b.safetensors",
        "overwrite": True,
    },
    handlers.EarlyStoppingHandler: {"patience": 7},
    handlers.JsonLinesHandler: {"path": "some/file.jsonl", "overwrite": True, "times": False},
    handlers.ModelSelectionHandler: {
        "weigh_by_local_iter": True,
        "validation_metric_name": "initial_loss",
        "aggregation_weights": {"a": 2.0},
        "mode": "min",
        "min_delta": 0.25,
        "best_key": "mine",
    },
    handlers.ProgressHandler: {"stderr": True},
    handlers.RoundLogHandler: {"logger_name": "my.logger"},
    handlers.ServerValidationHandler: {
        "evaluator": EVALUATOR,
        "num_rounds_per_valid": 3,
        "mode": "min",
        "min_delta": 0.25,
        "best_key": "mine",
    },
}
built_in = pytest.mark.parametrize("cls", BUILT_IN, ids=lambda cls: cls.__name__)


def parameters_of(cls: type[fl.Handler]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls).parameters)


def with_defaults(cls: type[fl.Handler]) -> fl.Handler:
    needed = {
        name: BUILT_IN[cls][name]
        for name, parameter in parameters_of(cls).items()
        if parameter.default is inspect.Parameter.empty
    }
    return cls(**needed)


def plain(value: Any) -> Any:
    """The value, or where it has no equality of its own, its type and attributes."""
    return (type(value), vars(value)) if isinstance(value, fl.ModelEvaluator) else value


class Losing(AddingLearner):
    """Measures a loss as well."""

    def validate(self, weights: Any, ctx: fl.FLContext) -> Any:
        return {**super().validate(weights, ctx), "loss": 0.5}


def test_every_handler_of_the_package_is_tested_here() -> None:
    assert {cls.__name__ for cls in BUILT_IN} | {"Handler", "fire_event"} == set(handlers.__all__)


@built_in
def test_a_handler_keeps_its_constructor_arguments_under_their_names(cls: type[fl.Handler]) -> None:
    arguments = BUILT_IN[cls]
    assert set(arguments) == set(parameters_of(cls))
    handler = cls(**arguments)
    assert {name: getattr(handler, name) for name in arguments} == arguments


@built_in
def test_a_handler_keeps_its_defaults_under_their_names_too(cls: type[fl.Handler]) -> None:
    handler = with_defaults(cls)
    for name, parameter in parameters_of(cls).items():
        if parameter.default is not inspect.Parameter.empty:
            assert getattr(handler, name) == parameter.default


@built_in
def test_a_handler_can_be_pickled(cls: type[fl.Handler]) -> None:
    handler = cls(**BUILT_IN[cls])
    second = pickle.loads(pickle.dumps(handler))
    assert type(second) is cls
    for name, value in BUILT_IN[cls].items():
        assert plain(getattr(second, name)) == plain(value)


@built_in
def test_a_handler_can_be_pickled_after_a_job(
    cls: type[fl.Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    handler = cls(**BUILT_IN[cls])
    server = fl.FederatedServer(initial_weights(), num_rounds=3, handlers=[fl.ModelSelectionHandler(), handler])
    result = server.run(clients_of({"a": Losing(1, score=lambda w: float(w["b"][0]))}))
    assert len(result.reports) == 3
    second = pickle.loads(pickle.dumps(handler))
    for name, value in BUILT_IN[cls].items():
        assert type(getattr(second, name)) is type(value)


@built_in
def test_no_default_is_mutable(cls: type[fl.Handler]) -> None:
    for parameter in parameters_of(cls).values():
        assert not isinstance(parameter.default, list | dict | set | bytearray)


@built_in
def test_two_handlers_share_no_mutable_attribute(cls: type[fl.Handler]) -> None:
    first, second = with_defaults(cls), with_defaults(cls)
    given = {id(value) for value in BUILT_IN[cls].values()}
    for name, value in vars(first).items():
        if isinstance(value, list | dict | set):
            assert getattr(second, name) is not value
            assert id(value) not in given


def test_a_change_of_ones_own_aggregation_weights_reaches_no_other_handler() -> None:
    given = {"a": 2.0}
    first, second = handlers.ModelSelectionHandler(), handlers.ModelSelectionHandler(aggregation_weights=given)
    first.aggregation_weights["1"] = 9.0
    second.aggregation_weights["a"] = 9.0
    assert handlers.ModelSelectionHandler().aggregation_weights == {"1": 1.0, "2": 1.0}
    assert given == {"a": 2.0}


@built_in
def test_a_handler_runs_through_a_job_of_its_own(
    cls: type[fl.Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the others: none relies on what another one binds, but for the one that says so.
    monkeypatch.chdir(tmp_path)
    others = [fl.ModelSelectionHandler()] if cls is handlers.EarlyStoppingHandler else []
    server = fl.FederatedServer(initial_weights(), num_rounds=2, handlers=[*others, with_defaults(cls)])
    result = server.run(clients_of({"a": AddingLearner(1)}))
    assert result.handler_failures == ()
    assert result.weights["b"].tolist() == [2.0, 2.0, 2.0]
