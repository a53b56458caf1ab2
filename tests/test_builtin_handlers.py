"""The handlers that write, log, print and stop: checkpoints, JSON lines, the round log, progress, early stopping."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from federation import (
    AddingLearner,
    At,
    NormEvaluator,
    Recorder,
    TamperingClient,
    WeightDict,
    clients_of,
    initial_weights,
    noise,
)
from reference import bits
from safetensors import safe_open
from safetensors.numpy import load_file

import fed_learn as fl
from fed_learn.contribution import FINAL_MODEL, ClientFailure
from fed_learn.handlers import (
    CheckpointHandler,
    EarlyStoppingHandler,
    JsonLinesHandler,
    ModelSelectionHandler,
    ProgressHandler,
    RoundLogHandler,
    ServerValidationHandler,
)
from fed_learn.weights import FrozenWeights

pytestmark = pytest.mark.quick


def by_value(weights: Any) -> float:
    return float(weights["b"][0])


def best(number: int, metric: float, weights: Any) -> fl.BestModel:
    return fl.BestModel(number, metric, "accuracy", FrozenWeights(weights))


def about(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert list(metadata) == ["fed_learn"]
    loaded: dict[str, Any] = json.loads(metadata["fed_learn"])
    return loaded


def files_in(folder: Path) -> list[str]:
    """The names of what a job has written; its lock files lie beside them while it runs."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".fed-learn.lock"))


# CheckpointHandler


def start_checkpoints(directory: Path) -> tuple[CheckpointHandler, fl.FLContext]:
    handler = CheckpointHandler(directory)
    ctx = fl.FLContext()
    fl.fire_event(fl.EventType.STARTUP, [handler], ctx)
    return handler, ctx


def end_round(handler: fl.Handler, ctx: fl.FLContext, number: int, weights: Any) -> None:
    ctx[fl.ContextKey.ROUND] = number
    ctx.set_model(fl.ModelData(weights))
    fl.fire_event(fl.EventType.END_ROUND, [handler], ctx)


def test_the_global_model_is_written_after_each_round_with_its_round(tmp_path: Path) -> None:
    handler, ctx = start_checkpoints(tmp_path)
    path = tmp_path / "global.safetensors"
    for number in range(2):
        end_round(handler, ctx, number, FrozenWeights(noise(number)))
        assert bits(load_file(path)) == bits(noise(number))
        assert about(path) == {"round": number}
    assert files_in(tmp_path) == ["global.safetensors"]


def test_the_best_model_is_written_with_its_round_and_metric_when_it_changes(tmp_path: Path) -> None:
    handler, ctx = start_checkpoints(tmp_path)
    path = tmp_path / "best.safetensors"
    end_round(handler, ctx, 0, noise(0))
    assert not path.exists()
    ctx[fl.ContextKey.BEST_RECEIVED] = best(1, 0.5, noise(1))
    end_round(handler, ctx, 1, noise(9))
    assert bits(load_file(path)) == bits(noise(1))
    assert about(path) == {"round": 1, "metric": 0.5, "metric_name": "accuracy"}
    path.unlink()
    end_round(handler, ctx, 2, noise(9))
    assert not path.exists()  # nothing new to write
    ctx[fl.ContextKey.BEST_AGGREGATED] = best(2, 0.25, noise(2))
    end_round(handler, ctx, 3, noise(9))
    assert bits(load_file(path)) == bits(noise(2))
    assert about(path)["metric"] == 0.25


def test_a_best_model_that_is_found_after_the_last_round_is_written_at_shutdown(tmp_path: Path) -> None:
    chain = [ModelSelectionHandler(), CheckpointHandler(tmp_path)]
    server = fl.FederatedServer(initial_weights(), num_rounds=2, handlers=chain)
    result = server.run(clients_of({"a": AddingLearner(1, score=by_value)}))
    assert result.best is not None
    assert result.best.round == 2
    assert bits(load_file(tmp_path / "best.safetensors")) == bits(result.best.weights)
    assert about(tmp_path / "best.safetensors")["round"] == 2
    assert bits(load_file(tmp_path / "global.safetensors")) == bits(result.weights)
    assert about(tmp_path / "global.safetensors") == {"round": 1}


def test_the_names_can_be_chosen_and_the_folder_is_made(tmp_path: Path) -> None:
    handler = CheckpointHandler(str(tmp_path / "a" / "b"), "g.st", "b.st")
    assert not (tmp_path / "a").exists()
    server = fl.FederatedServer(initial_weights(), num_rounds=1, handlers=[ModelSelectionHandler(), handler])
    server.run(clients_of({"a": AddingLearner(1)}))
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["b.st", "g.st"]


def test_the_same_job_writes_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for folder in ("one", "two"):
        chain = [ModelSelectionHandler(), CheckpointHandler(tmp_path / folder)]
        server = fl.FederatedServer(noise(1), num_rounds=2, handlers=chain)
        server.run(clients_of({name: AddingLearner(noise(i), score=by_value) for i, name in enumerate("abc")}))
        contents.append([(tmp_path / folder / f"{name}.safetensors").read_bytes() for name in ("global", "best")])
    assert contents[0] == contents[1]


def test_a_second_job_of_the_same_handler_writes_its_best_again(tmp_path: Path) -> None:
    chain = [ModelSelectionHandler(), CheckpointHandler(tmp_path, overwrite=True)]
    server = fl.FederatedServer(initial_weights(), num_rounds=1, handlers=chain)
    clients = clients_of({"a": AddingLearner(1)})
    for _ in range(2):
        server.run(clients)
        (tmp_path / "best.safetensors").unlink()
    assert os.listdir(tmp_path) == ["global.safetensors"]


SAVED_DTYPES = ["float16", "float32", "float64", "int8", "uint16", "int32", "uint64", "bool"]


@pytest.mark.parametrize("dtype", SAVED_DTYPES)
def test_every_dtype_can_be_read_back(dtype: str, tmp_path: Path) -> None:
    handler, ctx = start_checkpoints(tmp_path)
    weights = {
        "matrix": np.arange(6).reshape(2, 3).astype(dtype),
        "scalar": np.array(1, dtype),
        "empty": np.zeros((0, 2), dtype),
    }
    end_round(handler, ctx, 0, weights)
    assert bits(load_file(tmp_path / "global.safetensors")) == bits(weights)


def test_bfloat16_can_be_read_back(tmp_path: Path) -> None:
    handler, ctx = start_checkpoints(tmp_path)
    weights = {"w": np.array([[1.0, -2.5], [3e38, 1e-40]], ml_dtypes.bfloat16)}
    end_round(handler, ctx, 0, weights)
    with safe_open(tmp_path / "global.safetensors", "np") as file:
        loaded = file.get_tensor("w")
        assert file.get_slice("w").get_dtype() == "BF16"
    assert loaded.shape == (2, 2)
    assert loaded.tobytes() == weights["w"].tobytes()


@pytest.mark.parametrize(
    "layout",
    [
        lambda a: np.asfortranarray(a),
        lambda a: np.ascontiguousarray(a[::-1])[::-1],
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: a.astype(">f4"),
    ],
    ids=["Fortran order", "reversed", "strided", "byte-swapped"],
)
def test_weights_in_any_layout_are_written_as_what_they_are(layout: Callable[[Any], Any], tmp_path: Path) -> None:
    handler, ctx = start_checkpoints(tmp_path)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    given = layout(array)
    assert np.array_equal(given, array)
    end_round(handler, ctx, 0, {"w": given})
    assert load_file(tmp_path / "global.safetensors")["w"].tolist() == array.tolist()


@pytest.mark.parametrize("failing", ["replace", "fsync", "serialization"])
def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, ctx = start_checkpoints(tmp_path)
    end_round(handler, ctx, 0, noise(0))
    path = tmp_path / "global.safetensors"
    before = path.read_bytes()
    weights: dict[str, Any] = noise(1)
    if failing == "serialization":
        weights["w"] = np.array(["no", "number"])
    else:
        # There is no portable way to fill a disk.
        monkeypatch.setattr(os, failing, lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(fl.HandlerError) as caught:
        end_round(handler, ctx, 1, weights)
    assert caught.value.failures[0].handler == "fed_learn.handlers.checkpoint.CheckpointHandler"
    assert path.read_bytes() == before
    assert files_in(tmp_path) == ["global.safetensors"]
    monkeypatch.undo()
    end_round(handler, ctx, 2, noise(2))
    assert bits(load_file(path)) == bits(noise(2))


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, ctx = start_checkpoints(tmp_path)
    end_round(handler, ctx, 0, noise(0))
    before = (tmp_path / "global.safetensors").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        end_round(handler, ctx, 1, noise(1))
    assert (tmp_path / "global.safetensors").read_bytes() == before
    assert files_in(tmp_path) == ["global.safetensors"]


def test_a_best_model_whose_write_failed_is_written_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, ctx = start_checkpoints(tmp_path)
    ctx[fl.ContextKey.BEST_RECEIVED] = best(0, 0.5, noise(1))
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(fl.HandlerError):
        end_round(handler, ctx, 0, noise(0))
    monkeypatch.undo()
    end_round(handler, ctx, 1, noise(0))
    assert bits(load_file(tmp_path / "best.safetensors")) == bits(noise(1))


def test_a_variable_with_the_name_that_the_format_reserves_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    handler, ctx = start_checkpoints(tmp_path)
    end_round(handler, ctx, 0, noise(0))
    before = (tmp_path / "global.safetensors").read_bytes()
    with pytest.raises(fl.HandlerError) as caught:
        end_round(handler, ctx, 1, {**noise(1), "__metadata__": np.zeros(2)})
    (error,) = caught.value.exceptions
    assert isinstance(error, ValueError)
    assert "'__metadata__'" in str(error)
    assert files_in(tmp_path) == ["global.safetensors"]
    assert (tmp_path / "global.safetensors").read_bytes() == before


def test_without_a_model_nothing_is_written(tmp_path: Path) -> None:
    handler, ctx = start_checkpoints(tmp_path)
    ctx[fl.ContextKey.ROUND] = 0
    fl.fire_event(fl.EventType.END_ROUND, [handler], ctx)
    ctx.set_model(fl.ModelData())
    fl.fire_event(fl.EventType.END_ROUND, [handler], ctx)
    fl.fire_event(fl.EventType.SHUTDOWN, [handler], ctx)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("package", "extra", "build"),
    [
        ("safetensors", "files", lambda: CheckpointHandler("somewhere")),
        ("rich", "cli", lambda: ProgressHandler()),
    ],
)
def test_a_handler_whose_package_is_missing_says_so_at_once_and_names_the_extra(
    package: str, extra: str, build: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}.*fed-learn\[{extra}\]"):
        build()


# JsonLinesHandler


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, each of them JSON and nothing that JSON does not have."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_round_and_each_validation_result_is_a_line_of_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "job.jsonl"
    server = fl.FederatedServer(
        initial_weights(), num_rounds=2, handlers=[ModelSelectionHandler(), JsonLinesHandler(path)]
    )
    learners = {
        "a": AddingLearner(1, score=by_value, aggregation_weight=2, n_iter=7),
        "b": AddingLearner(4, score=by_value),
    }
    result = server.run(clients_of(learners))
    lines = strict_lines(path)
    rounds = [line for line in lines if line["type"] == "round"]
    validations = [line for line in lines if line["type"] == "validation"]
    assert lines == rounds + validations
    assert [line["round"] for line in rounds] == [0, 1]
    assert [line["accepted"] for line in rounds] == [["a", "b"]] * 2
    assert [line["metrics"] for line in rounds] == [{"selection": 0.0}, {"selection": 2.0}]
    assert [line["total_weight"] for line in rounds] == [3.0, 3.0]
    assert rounds[1]["contributions"] == {
        "a": {
            "aggregation_weight": 2,
            "n_iter": 7,
            "metrics": {"initial_validation_metric": 2.0, "initial_accuracy": 2.0},
        },
        "b": {
            "aggregation_weight": 1,
            "n_iter": 1,
            "metrics": {"initial_validation_metric": 2.0, "initial_accuracy": 2.0},
        },
    }
    assert [(line["model"], line["contributor"]) for line in validations] == [
        (r.model, r.contributor) for r in result.validation_results
    ]
    assert [(r.model, r.contributor) for r in result.validation_results] == [
        (model, contributor) for model in (FINAL_MODEL, "a", "b", "global_best") for contributor in "ab"
    ]
    assert validations[0]["metrics"] == {"initial_validation_metric": 4.0, "initial_accuracy": 4.0}


def test_each_line_is_complete_when_its_event_is_over(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    counts: list[int] = []
    watcher = At(fl.EventType.END_ROUND, lambda ctx: counts.append(len(strict_lines(path))))
    server = fl.FederatedServer(initial_weights(), num_rounds=3, handlers=[JsonLinesHandler(path), watcher])
    server.run(clients_of({"a": AddingLearner(1)}))
    assert counts == [1, 2, 3]


@pytest.mark.parametrize("overwrite", [False, True])
def test_each_job_begins_a_file_of_its_own(overwrite: bool, tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    path.write_text("left over\n", encoding="utf-8")
    handler = JsonLinesHandler(path, overwrite=overwrite)
    server = fl.FederatedServer(initial_weights(), num_rounds=1, handlers=[handler])
    for _ in range(2):
        server.run(clients_of({"a": AddingLearner(1)}))
        # A round, the final model and the client's own best.
        assert [line["type"] for line in strict_lines(path)] == ["round", "validation", "validation"]
    assert sorted(os.listdir(tmp_path)) == ["job.jsonl"] + ([] if overwrite else ["job.jsonl.1", "job.jsonl.2"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_number_that_json_does_not_have_becomes_null(value: float, tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    handler = JsonLinesHandler(path)
    ctx = fl.FLContext()
    fl.fire_event(fl.EventType.STARTUP, [handler], ctx)
    ctx[fl.ContextKey.REPORT] = fl.RoundReport(0, metrics={"selection": value})
    ctx[fl.ContextKey.CONTRIBUTIONS] = (fl.Contribution("a", None, 1, metrics={"loss": value, "other": 0.5}),)
    fl.fire_event(fl.EventType.END_ROUND, [handler], ctx)
    metrics: dict[str, Any] = {"loss": np.float32(value)}
    ctx[fl.ContextKey.VALIDATION_RESULTS] = (fl.ValidationResult("a", FINAL_MODEL, metrics),)
    fl.fire_event(fl.EventType.RECEIVE_VALIDATION_RESULTS, [handler], ctx)
    first, second = strict_lines(path)
    assert first["metrics"] == {"selection": None}
    assert first["contributions"]["a"]["metrics"] == {"loss": None, "other": 0.5}
    assert second == {"type": "validation", "model": FINAL_MODEL, "contributor": "a", "metrics": {"loss": None}}


def test_numpy_numbers_are_written_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    learner = AddingLearner(1, aggregation_weight=np.int64(3), n_iter=np.int32(4), score=lambda w: np.float32(0.25))  # type: ignore[arg-type,return-value]
    server = fl.FederatedServer(initial_weights(), num_rounds=1, handlers=[JsonLinesHandler(path)])
    server.run(clients_of({"a": learner}))
    entry = strict_lines(path)[0]["contributions"]["a"]
    assert (entry["aggregation_weight"], entry["n_iter"]) == (3, 4)
    assert entry["metrics"]["initial_accuracy"] == 0.25


NUMBERS: dict[str, tuple[Any, Any, Any]] = {
    "Fraction": (Fraction(5, 2), 3, Fraction(1, 4)),
    "long double": (np.longdouble(2.5), np.int16(3), np.longdouble(0.25)),
    "8 bits": (np.int8(100), np.int8(100), np.int8(100)),
    "half": (np.float16(60_000), np.uint8(200), np.float16(0.25)),
    "large": (10**30, 2**63 - 1, 10**300),
    "large numpy": (np.uint64(2**63), np.uint64(2**63 - 1), np.uint64(2**63)),
}
"""Aggregation weight, iterations and metric, of the types that clients come up with."""


@pytest.mark.parametrize(("weight", "n_iter", "metric"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_every_type_are_kept_as_plain_ones_and_written(
    weight: Any, n_iter: Any, metric: Any, tmp_path: Path
) -> None:
    class Measuring(AddingLearner):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult | None:
            result = super().train(weights, ctx)
            return None if result is None else replace(result, metrics={"loss": metric})

    path, recorder = tmp_path / "job.jsonl", Recorder()
    learner = Measuring(1, aggregation_weight=weight, n_iter=n_iter, score=lambda weights: metric)
    handlers = [JsonLinesHandler(path), recorder]
    server = fl.FederatedServer(initial_weights(), num_rounds=1, handlers=handlers, on_bad_contribution="reject")
    result = server.run(clients_of({"a": learner}))

    expected = {name: float(metric) for name in ("initial_validation_metric", "initial_accuracy", "loss")}
    (ctx,) = recorder.at(fl.EventType.RECEIVE_CONTRIBUTION)
    contribution = ctx[fl.ContextKey.CONTRIBUTION]
    assert ctx[fl.ContextKey.CONTRIBUTIONS] == (contribution,)
    assert (contribution.aggregation_weight, contribution.n_iter) == (float(weight), int(n_iter))
    assert contribution.metrics == expected
    received = [ctx[fl.ContextKey.VALIDATION_RESULTS][-1] for ctx in recorder.at("_receiveValidationResults")]
    assert tuple(received) == result.validation_results
    assert [r.n_iter for r in received] == [int(n_iter)] * 2
    assert all(r.metrics == {k: v for k, v in expected.items() if k != "loss"} for r in received)
    kept = [*contribution.metrics.values(), *(value for r in received for value in r.metrics.values())]
    assert {type(number) for number in (contribution.aggregation_weight, *kept)} == {float}
    assert {type(number) for number in (contribution.n_iter, *(r.n_iter for r in received))} == {int}

    first, *validations = strict_lines(path)
    entry = first["contributions"]["a"]
    assert entry == {"aggregation_weight": float(weight), "n_iter": int(n_iter), "metrics": expected}
    assert first["total_weight"] == result.reports[0].total_weight == float(weight)
    assert [line["metrics"] for line in validations] == [dict(r.metrics) for r in received]


@pytest.mark.parametrize(("weight", "total"), [(np.int8(100), 300.0), (np.float16(60_000), 180_000.0)], ids=repr)
def test_the_total_weight_of_narrow_numbers_does_not_overflow(weight: Any, total: float, tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    server = fl.FederatedServer(initial_weights(), num_rounds=1, handlers=[JsonLinesHandler(path)])
    (report,) = server.run(clients_of({name: AddingLearner(1, aggregation_weight=weight) for name in "abc"})).reports
    assert (report.total_weight, type(report.total_weight)) == (total, float)
    assert strict_lines(path)[0]["total_weight"] == total


@pytest.mark.parametrize("number", [Fraction(1, 4), np.longdouble(0.25), np.float16(0.25)], ids=repr)
def test_a_handler_driven_by_hand_writes_numbers_of_every_type(number: Any, tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    handler, ctx = JsonLinesHandler(path), fl.FLContext()
    fl.fire_event(fl.EventType.STARTUP, [handler], ctx)
    ctx[fl.ContextKey.REPORT] = fl.RoundReport(0, metrics={"selection": number})
    ctx[fl.ContextKey.CONTRIBUTIONS] = (fl.Contribution("a", None, number, n_iter=np.int8(4), metrics={"m": number}),)  # type: ignore[arg-type]
    fl.fire_event(fl.EventType.END_ROUND, [handler], ctx)
    (line,) = strict_lines(path)
    assert line["metrics"] == {"selection": 0.25}
    assert line["contributions"] == {"a": {"aggregation_weight": 0.25, "n_iter": 4, "metrics": {"m": 0.25}}}


def test_what_went_wrong_in_a_round_is_in_its_line(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    server = fl.FederatedServer(
        initial_weights(),
        num_rounds=2,
        handlers=[JsonLinesHandler(path)],
        min_contributions=1,
        on_bad_contribution="reject",
    )
    clients = [
        *clients_of({"a": AddingLearner(1, absent=[1])}),
        TamperingClient("b", AddingLearner(1), tamper=lambda c: "not this", rounds=[0, 1]),
    ]
    server.run(clients)
    first, second = strict_lines(path)[:2]
    assert first["accepted"] == ["a"]
    assert first["rejected"] == [
        {"contributor": "b", "cause": "WeightsTypeError", "message": "b: sent a str, not a Contribution"}
    ]
    assert first["error"] is None
    assert second["absent"] == ["a"]
    assert second["error"] == "round 2: 0 accepted contributions, 1 required; the global model stands"


# EarlyStoppingHandler


def stop_reason(patience: int, number: int, **props: Any) -> str | None:
    ctx = fl.FLContext({fl.ContextKey.ROUND: number, **props})
    fl.fire_event(fl.EventType.BEFORE_AGGREGATION, [EarlyStoppingHandler(patience)], ctx)
    reason: str | None = ctx.get_prop(fl.ContextKey.STOP)
    return reason


def test_a_received_model_that_stays_the_best_for_the_patience_ends_the_job() -> None:
    props = {fl.ContextKey.BEST_RECEIVED: best(2, 0.75, noise(0))}
    assert stop_reason(3, 4, **props) is None
    reason = stop_reason(3, 5, **props)
    assert reason is not None
    assert "round 3" in reason
    assert "accuracy 0.75" in reason


def test_without_a_best_model_it_never_stops() -> None:
    assert stop_reason(1, 100) is None


def test_a_reason_that_is_there_stays_when_it_has_none_itself() -> None:
    assert stop_reason(9, 1, **{fl.ContextKey.STOP: "another's"}) == "another's"


@pytest.mark.parametrize("patience", [0, -1])
def test_a_patience_below_one_is_refused(patience: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        EarlyStoppingHandler(patience)


@pytest.mark.parametrize("patience", [2.5, 2.0, True, "3", None], ids=repr)
def test_a_patience_that_is_no_int_is_refused(patience: Any) -> None:
    with pytest.raises(TypeError, match=f"patience must be an int, not {patience!r}"):
        EarlyStoppingHandler(patience)


def job_with_patience(patience: int, scores: list[float], *, validate_every: int | None) -> fl.JobResult:
    """A job whose k-th global model (0 is the initial one) scores `scores[k]`."""
    selection: fl.Handler = ModelSelectionHandler()
    if validate_every is not None:

        class ByTable(NormEvaluator):
            def evaluate(self, ctx: fl.FLContext) -> None:
                assert ctx.model is not None
                self.metric = scores[int(by_value(ctx.model.weights))]

        selection = ServerValidationHandler(ByTable(), validate_every)
    server = fl.FederatedServer(
        initial_weights(), num_rounds=len(scores) - 1, handlers=[selection, EarlyStoppingHandler(patience)]
    )
    return server.run(clients_of({"a": AddingLearner(1, score=lambda weights: scores[int(by_value(weights))])}))


@pytest.mark.parametrize("validate_every", [None, 1], ids=["received", "aggregated"])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_job_that_improves_every_round_runs_to_its_end(patience: int, validate_every: int | None) -> None:
    result = job_with_patience(patience, [0, 1, 2, 3, 4, 5, 6], validate_every=validate_every)
    assert len(result.reports) == 6
    assert result.stop_reason is None


def test_a_job_that_is_validated_more_seldom_than_the_patience_is_not_stopped_between_validations() -> None:
    result = job_with_patience(2, list(range(13)), validate_every=4)
    assert len(result.reports) == 12
    assert result.stop_reason is None


@pytest.mark.parametrize("validations", [[1.0, 2.0, 3.0], [1.0, 2.0, 1.5]], ids=["better", "worse at the end"])
def test_where_the_server_validates_the_scores_of_the_clients_stop_nothing(validations: list[float]) -> None:
    class Scripted(NormEvaluator):
        def evaluate(self, ctx: fl.FLContext) -> None:
            self.metric = scores.pop(0)

    scores = list(validations)
    handlers = [ModelSelectionHandler(), ServerValidationHandler(Scripted(), 5), EarlyStoppingHandler(patience=2)]
    server = fl.FederatedServer(initial_weights(), num_rounds=12, handlers=handlers)
    # For the clients each model is worse than the one before it.
    result = server.run(clients_of({"a": AddingLearner(1, score=lambda weights: -by_value(weights))}))
    assert [report.round for report in result.reports if "server_validation" in report.metrics] == [4, 9, 11]
    assert len(result.reports) == 12
    assert server.ctx[fl.ContextKey.BEST_RECEIVED].round == 0
    assert result.best is not None
    assert result.best.metric == max(validations)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_job_stops_once_the_received_models_were_no_better_for_the_patience(patience: int) -> None:
    # Model 2, received in round 2, is the best; the models of rounds 3, 4, … are worse.
    result = job_with_patience(patience, [0, 1, 9, 1, 1, 1, 1, 1, 1], validate_every=None)
    assert len(result.reports) == 2 + patience + 1
    assert result.stop_reason is not None
    assert result.best is not None
    assert result.best.metric == 9


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_job_stops_once_the_aggregated_models_were_no_better_for_the_patience(patience: int) -> None:
    # Model 2, aggregated in round 1, is the best; those of rounds 2, 3, … are worse, and `patience` of them must have
    # been seen. The round in hand when that is known is the last.
    result = job_with_patience(patience, [0, 1, 9, 1, 1, 1, 1, 1, 1], validate_every=1)
    assert len(result.reports) in (1 + patience + 1, 1 + patience + 2)
    assert result.stop_reason is not None
    assert result.best is not None
    assert (result.best.round, result.best.metric) == (1, 9)
    scored_since = [report.metrics["server_validation"] for report in result.reports[2:]]
    assert len(scored_since) >= patience


NONE = float("nan")
"""No score: a metric that is not finite."""


@pytest.mark.parametrize("validate_every", [None, 1], ids=["received", "aggregated"])
@pytest.mark.parametrize(
    ("scores", "patience", "rounds", "best"),
    [
        ([9, 9, NONE, NONE, NONE, NONE, NONE, NONE], 2, 7, 9),
        ([NONE] * 8, 1, 7, None),
        ([1, 2, NONE, NONE, 3, NONE, NONE, 4], 2, 7, 4),
        ([1, 9, NONE, NONE, NONE, NONE, 10, NONE, 11], 1, 8, 11),
    ],
    ids=["none after the best", "none at all", "better after gaps", "better after gaps longer than the patience"],
)
def test_rounds_without_a_score_end_no_job(
    scores: list[float], patience: int, rounds: int, best: float | None, validate_every: int | None
) -> None:
    result = job_with_patience(patience, scores, validate_every=validate_every)
    assert (len(result.reports), result.stop_reason) == (rounds, None)
    assert (result.best and result.best.metric) == best


@pytest.mark.parametrize(("validate_every", "stops_after"), [(None, 6), (1, 5)], ids=["received", "aggregated"])
def test_the_first_score_after_a_gap_decides_by_the_rounds_since_the_best_model(
    validate_every: int | None, stops_after: int
) -> None:
    """Model 1 is the best, models 2 to 4 have no score, and model 5 is worse: the best is 4 rounds older."""
    scores = [0, 9, NONE, NONE, NONE, 1, 1, 1, 1, 1, 1]
    for patience, later in ((3, 0), (4, 0), (5, 1)):
        result = job_with_patience(patience, scores, validate_every=validate_every)
        assert len(result.reports) == stops_after + later
        assert result.stop_reason is not None
        assert result.best is not None
        assert result.best.metric == 9


def test_rounds_that_fail_end_no_job_and_the_model_that_stands_is_no_worse() -> None:
    def fails(ctx: fl.FLContext) -> None:
        if ctx[fl.ContextKey.ROUND] in (1, 2, 3):
            ctx[fl.ContextKey.CONTRIBUTIONS] = ()

    handlers = [At(fl.EventType.BEFORE_AGGREGATION, fails), ModelSelectionHandler(), EarlyStoppingHandler(1)]
    server = fl.FederatedServer(initial_weights(), num_rounds=7, min_contributions=1, handlers=handlers)
    result = server.run(clients_of({"a": AddingLearner(1, score=by_value)}))
    assert [report.error is not None for report in result.reports] == [False, True, True, True, False, False, False]
    assert result.stop_reason is None
    assert result.best is not None
    assert result.best.metric == 4


# RoundLogHandler


def test_each_round_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fed_learn.rounds")
    server = fl.FederatedServer(initial_weights(), num_rounds=2, handlers=[ModelSelectionHandler(), RoundLogHandler()])
    server.run(clients_of({name: AddingLearner(1, score=by_value) for name in "ab"}))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("round 1 of 2: 2 accepted, 0 rejected, selection 0.0000, ")
    assert second.startswith("round 2 of 2: 2 accepted, 0 rejected, selection 1.0000, ")


def test_refused_contributions_are_warnings_and_failed_rounds_errors(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "my.rounds")
    handler = RoundLogHandler("my.rounds")
    refused = ClientFailure("site-7", fl.NonFiniteError("site-7: 'w' at index (0,): nan is not finite"))
    report = fl.RoundReport(4, rejected=(refused,), error=fl.TooFewContributionsError("too few"))
    fl.fire_event(fl.EventType.END_ROUND, [handler], fl.FLContext({fl.ContextKey.REPORT: report}))
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("my.rounds", "INFO", "round 5 of ?: 0 accepted, 1 rejected, 0.00 s"),
        ("my.rounds", "WARNING", "round 5: rejected, NonFiniteError: site-7: 'w' at index (0,): nan is not finite"),
        ("my.rounds", "ERROR", "round 5 failed: too few"),
    ]


# ProgressHandler


@pytest.fixture
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_terminal")
def test_away_from_a_terminal_it_prints_a_header_and_a_line_per_round(capsys: pytest.CaptureFixture[str]) -> None:
    chain = [ModelSelectionHandler(), ServerValidationHandler(NormEvaluator(), 2), ProgressHandler()]
    server = fl.FederatedServer(initial_weights(), num_rounds=2, handlers=chain, kernel="numpy")
    server.run(clients_of({name: AddingLearner(1, score=by_value) for name in "ab"}))
    out, err = capsys.readouterr()
    header, first, second = out.splitlines()
    assert header.split() == ["round", "accepted", "rejected", "selection", "server", "aggregation", "kernel"]
    assert first.split()[:5] == ["1", "2", "0", "0.0000", "–"]
    assert second.split()[:5] == ["2", "2", "0", "1.0000", "2.0000"]
    assert first.split()[-3:] == ["0.1", "kB", "numpy"]
    assert "\x1b" not in out
    assert err == ""


@pytest.mark.usefixtures("_no_terminal")
def test_it_can_leave_the_standard_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    server = fl.FederatedServer(initial_weights(), num_rounds=1, handlers=[ProgressHandler(stderr=True)])
    server.run(clients_of({"a": AddingLearner(1)}))
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2


@pytest.mark.usefixtures("_no_terminal")
def test_what_went_wrong_is_printed_below_the_round(capsys: pytest.CaptureFixture[str]) -> None:
    server = fl.FederatedServer(
        initial_weights(),
        num_rounds=2,
        handlers=[ProgressHandler()],
        min_contributions=1,
        on_bad_contribution="reject",
    )

    def fail(ctx: fl.FLContext) -> None:
        raise RuntimeError("out of memory")

    clients = [
        *clients_of({"a": AddingLearner(1, absent=[1]), "c": AddingLearner(1, during=fail)}),
        TamperingClient("b", AddingLearner(1), tamper=lambda c: "not this", rounds=[0, 1]),
    ]
    server.run(clients)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in (lines[1], lines[4])] == [["1", "1", "1"], ["2", "0", "1"]]
    assert lines[2].strip() == "WeightsTypeError: b: sent a str, not a Contribution"
    assert lines[3].strip() == "RuntimeError: out of memory"
    assert lines[5].strip() == "WeightsTypeError: b: sent a str, not a Contribution"
    assert lines[6].strip().startswith("round failed: round 2: 0 accepted contributions")
    assert len(lines) == 7


@pytest.mark.usefixtures("_no_terminal")
@pytest.mark.parametrize("name", ["block[a].weight", "[red]w", "[/]", "w[/bold]", "layers[0].bias", ":smile:"])
def test_names_that_a_client_sends_are_printed_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def add_variable(contribution: fl.Contribution) -> fl.Contribution:
        weights = {**(contribution.weights or {}), name: np.zeros(1)}
        return fl.Contribution("b", weights, 1, round=contribution.round)

    server = fl.FederatedServer(
        initial_weights(),
        num_rounds=1,
        handlers=[ProgressHandler()],
        min_contributions=1,
        on_bad_contribution="reject",
    )
    clients = [
        *clients_of({"a": AddingLearner(1)}),
        TamperingClient("b", AddingLearner(1), tamper=add_variable, rounds=[0]),
    ]
    server.run(clients)
    assert f"adds '{name}'" in capsys.readouterr().out
