"""The fuzz: what reads bytes or names of others, what it may raise, and what it must give.

A target makes an input of a random generator, runs the library on it, and judges: the value is right, or the error is
one of those that are declared, with a text that may be logged. Nothing else is raised, warned or imported.
"""

import contextlib
import io
import json
import math
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fuzz_inputs as given
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from fuzz_inputs import Rng, choose
from nvflare.app_common.abstract.fl_model import FLModel

import fed_learn as fl
from fed_learn.aggregation.round import UNUSABLE, Round
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.components.config import build_component, read_config
from fed_learn.errors import printable
from fed_learn.integrations.flower.local import LocalGrid
from fed_learn.integrations.flower.metrics import mean_metrics
from fed_learn.integrations.flower.records import to_weights
from fed_learn.integrations.flower.replies import Keys, Reply, failure_of
from fed_learn.integrations.flower.strategy import FedAvg
from fed_learn.integrations.nvflare import WeightedAverageAggregator
from fed_learn.limits import LONGEST_MESSAGE
from fed_learn.npy import viewed
from fed_learn.numproto import model_to_weights
from fed_learn.protos.federated_pb2 import ModelData, NDArray
from fed_learn.server.config import AGGREGATORS, FILTERS, ServerConfig
from fed_learn.weights import Schema

MODEL: dict[str, Any] = {"w": np.zeros(2, np.float32), "b": np.zeros(1), "n": np.array(0)}
SCHEMA = Schema.of(MODEL)
GOOD: dict[str, Any] = {"w": np.array([1, 2], np.float32), "b": np.array([3.0]), "n": np.array(4)}
REFUSALS = (fl.ContributionError, fl.ExactDomainError)
KEYS = Keys("num-examples", "num-iterations")


@dataclass(frozen=True)
class Target:
    """One thing that reads what others send.

    Attributes:
        name: What it is called.
        make: An input.
        run: The library on an input.
        judge: Raises an `AssertionError` unless the value is right; is given the input too.
        raises: The declared errors.
        size: Bytes of an input, roughly.
        valid: A valid input of a size, to compare times with.
    """

    name: str
    make: Callable[[Rng], Any]
    run: Callable[[Any], Any]
    judge: Callable[[Any, Any], None]
    raises: tuple[type[Exception], ...]
    size: Callable[[Any], int]
    valid: Callable[[int], Any]

    def rng(self, number: int) -> Rng:
        """What makes the input of a number, which so tells all that is needed to see it again."""
        return np.random.default_rng([zlib.crc32(self.name.encode()), number])

    def outcome(self, sent: Any) -> Any:
        """What the library makes of an input: a value, or the error."""
        try:
            return self.run(sent)
        except Exception as error:  # noqa: BLE001 - judged
            return error

    def check(self, sent: Any, outcome: Any) -> None:
        """Judges what became of an input."""
        if not isinstance(outcome, Exception):
            self.judge(sent, outcome)
            return
        if not isinstance(outcome, self.raises):
            raise AssertionError(f"{type(outcome).__name__} is not declared") from outcome
        check_text(outcome)


def check_text(error: BaseException) -> None:
    """An error's text is one printable line of bounded length."""
    said = str(error)
    assert said, type(error)
    assert said.isprintable(), type(error)
    assert len(said) <= 12 * LONGEST_MESSAGE
    assert printable(said) == said


# Bytes of .npy files, alone and in the messages of two stacks.


def same_bits(found: Any, expected: Any) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def judge_npy(data: bytes, found: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # numpy takes a blank too many for Python 2's
        expected = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    assert same_bits(found, expected)
    assert not found.flags.writeable or not np.shares_memory(found, np.frombuffer(data, np.uint8))


def run_npy(data: bytes) -> Any:
    try:
        return viewed(data)
    except (fl.WeightsTypeError, fl.DtypeError):
        assert data not in SEEDS, "what numpy writes is refused"
        raise


SEEDS = frozenset(given.SEEDS)


def file_of(size: int) -> bytes:
    return given.npy(np.zeros(max(size - 128, 0), np.uint8))


def make_record(rng: Rng) -> dict[str, Array]:
    record = {name: Array("", (), "numpy.ndarray", given.npy(array)) for name, array in GOOD.items()}
    for _ in range(int(rng.integers(4))):
        name = choose(rng, ("w", "b", "n", given.text(rng)))
        marks = ("float32", "bfloat16", ">V2", "", given.text(rng))
        kinds = ("numpy.ndarray",) * 9 + ("pickle", "x" * 50_000)
        record[name] = Array(choose(rng, marks), (3,), choose(rng, kinds), given.file_bytes(rng))
    return record


def judge_record(record: dict[str, Array], found: Any) -> None:
    assert list(found) == list(record)
    for name, array in found.items():
        expected = np.lib.format.read_array(io.BytesIO(record[name].data), allow_pickle=False)
        assert (array.shape, array.tobytes()) == (expected.shape, expected.tobytes())


def record_size(record: dict[str, Array]) -> int:
    return sum(len(name) + len(array.data) + len(array.stype) for name, array in record.items())


def make_clara(rng: Rng) -> ModelData:
    model = ModelData({name: NDArray(ndarray=given.npy(array)) for name, array in GOOD.items()})
    for _ in range(int(rng.integers(4))):
        model.params[choose(rng, ("w", "b", "n", given.text(rng)))].CopyFrom(NDArray(ndarray=given.file_bytes(rng)))
    if rng.random() < 0.1:
        model.params.pop(choose(rng, list(model.params)))
    return model


def judge_weights(_: Any, found: Any) -> None:
    assert Schema.of(found) == SCHEMA
    assert all(np.isfinite(array).all() for array in found.values())


def clara_of(size: int) -> ModelData:
    return ModelData({"w": NDArray(ndarray=file_of(size))})


# Replies in Flower.


def question() -> Message:
    return LocalGrid(lambda asked, _: asked, 1).create_message(RecordDict(), "train", 2, "1")


def make_reply(rng: Rng) -> Message:
    if rng.random() < 0.1:
        reasons = (given.text(rng), "Traceback (most recent call last)\n" * 300, "<class '" * 3000, "Exception " * 3000)
        return Message(Error(0, choose(rng, reasons)), reply_to=question())
    content = RecordDict()
    for _ in range(1 + int(rng.random() < 0.1)):
        content[choose(rng, ("arrays", "a", "x" * 2000))] = ArrayRecord(make_record(rng))
    values: Any = (1, 3, 0, -1, 0.5, math.nan, math.inf, 2**63, 10**400, [1], [0.5] * 3, [1] * 20_000, [])
    metrics = MetricRecord({"num-examples": choose(rng, values[:10])})
    for _ in range(int(rng.integers(4))):
        name = choose(rng, ("loss", "num-examples", "partition-id", "initial_validation_metric", given.text(rng)))
        metrics[name] = choose(rng, values)
    if rng.random() < 0.05:
        metrics.update({f"m{i}": 0.5 for i in range(3000)})
    content["metrics"] = metrics
    stated = ConfigRecord()
    claims: Any = (given.text(rng), 0, 1, -1, 10**400, True, 0.5, b"x", ["a"] * 3, "diff", "full")
    for key in ("contributor", "round", "kind", "metric", "mode", "scores"):
        if rng.random() < 0.15:
            stated[key] = choose(rng, claims)
    content["fed_learn"] = stated
    return Message(content, reply_to=question())


def run_reply(message: Message) -> Any:
    if message.has_error():
        return (failure_of(message, 2),)
    mean_metrics([message.content], "num-examples")
    reply = Reply(message, 1)
    _ = reply.score
    name = reply.claim or "node-2"
    sent = reply.contribution(name, KEYS, SCHEMA, fl.Kind.FULL, reply.metrics, states_round=True)
    return receive(sent, 0, stream=False)


def judge_reply(message: Message, found: Any) -> None:
    if message.has_error():
        check_text(found[0])
        assert len(str(found[0])) < 1000
    else:
        judge_round(None, found)


def reply_size(message: Message) -> int:
    if message.has_error():
        return len(message.error.reason or "")
    size = 0
    for record in message.content.values():
        if isinstance(record, ArrayRecord):
            size += record_size(dict(record))
        else:
            size += sum(len(key) + 8 * (len(value) if isinstance(value, list) else 1) for key, value in record.items())
    return size


def reply_of(size: int) -> Message:
    record = {name: Array("", (), "numpy.ndarray", given.npy(array)) for name, array in GOOD.items()}
    metrics = MetricRecord({"num-examples": 1, "list": [0.5] * (size // 8)})
    return Message(RecordDict({"arrays": ArrayRecord(record), "metrics": metrics}), reply_to=question())


def run_strategy(message: Message) -> Any:
    """A whole round of the strategy, in which node 3 answers with what is in the message."""

    def app(asked: Message, _: Any) -> Message:
        if asked.metadata.dst_node_id == 3:
            if message.has_error():
                return Message(message.error, reply_to=asked)
            return Message(message.content, reply_to=asked)
        good = ArrayRecord({name: Array(array) for name, array in GOOD.items()})
        return Message(RecordDict({"arrays": good, "m": MetricRecord({"num-examples": 2})}), reply_to=asked)

    initial = ArrayRecord({name: Array(array) for name, array in MODEL.items()})
    with contextlib.redirect_stdout(io.StringIO()):
        result = FedAvg(fraction_evaluate=0.0).start(LocalGrid(app, 2), initial, num_rounds=1)
    assert result.job is not None
    (report,) = result.job.reports
    return report, to_weights(result.arrays)


def judge_strategy(_: Message, found: Any) -> None:
    report, mean = found
    assert report.error is None
    assert len(report.accepted) + len(report.rejected) + len(report.quits) == 2
    for failure in report.rejected:
        assert isinstance(failure.error, REFUSALS)
        check_text(failure.error)
    judge_weights(None, mean)
    if len(report.accepted) == 1:
        assert all(np.array_equal(mean[name], array) for name, array in GOOD.items())


# Contributions as objects, of a server's own clients and of NVFlare's.


@cache
def known(weights: bool) -> dict[str, Any] | None:
    return MODEL if weights else None


def receive(
    sent: fl.Contribution, number: int | None, *, stream: bool, model: bool = True, partial: str = "same"
) -> Any:
    """The mean of a good contribution and this one, and this one as it was accepted."""
    this = Round(AggregationSettings(stream=stream, partial=partial), number=number, model=known(model))
    this.receive(fl.Contribution("good", GOOD, 2, round=number))
    accepted = this.receive(sent)
    refused = this.close()
    return accepted, refused, this.combine().mean, stream


def judge_round(_: Any, found: Any) -> None:
    accepted, refused, mean, stream = found
    for one, error in refused:
        assert isinstance(error, REFUSALS), one
        check_text(error)
    dropped = {one.contributor for one, _ in refused}
    good = 0 if "good" in dropped else 2
    other = 0 if accepted.contributor in dropped else accepted.aggregation_weight
    for name, array in mean.items():
        assert np.isfinite(array).all()
        if not other:
            assert np.array_equal(array, GOOD[name])
        elif name in GOOD and not stream and name in accepted.weights:
            share = other / (good + other)
            expected = np.asarray(accepted.weights[name], np.float64) * share
            expected += GOOD[name] * (1 - share) if good else 0
            atol = 0.51 if array.dtype.kind == "i" else 1e-30
            assert np.allclose(array.astype(np.float64), expected, rtol=1e-6, atol=atol)
    json.dumps(dict(accepted.info))  # plain values
    assert all(type(value) is float for value in accepted.metrics.values())


def make_contribution(rng: Rng) -> dict[str, Any]:
    return {
        "contributor": "site" if rng.random() < 0.8 else choose(rng, (given.text(rng), given.raiser(rng), None, 3)),
        "weights": given.weights(rng),
        "aggregation_weight": 3 if rng.random() < 0.7 else choose(rng, (*given.NUMBERS, given.raiser(rng))),
        "n_iter": None if rng.random() < 0.8 else choose(rng, (*given.NUMBERS, given.raiser(rng))),
        "round": 0 if rng.random() < 0.8 else choose(rng, (*given.NUMBERS, given.raiser(rng))),
        "kind": fl.Kind.FULL
        if rng.random() < 0.8
        else choose(rng, ("full", "diff", "x" * 3000, 3, None, given.raiser(rng))),
        "metrics": given.entries(rng),
        "info": given.entries(rng),
        "settings": {
            "stream": bool(rng.random() < 0.3),
            "model": bool(rng.random() < 0.7),
            "partial": choose(rng, ("same", "refuse")),
        },
    }


def run_contribution(sent: dict[str, Any]) -> Any:
    fields = {key: value for key, value in sent.items() if key != "settings"}
    contribution = fl.Contribution(**fields)
    assert isinstance(repr(contribution), str)
    return receive(contribution, 0, **sent["settings"])


def weights_size(sent: Any) -> int:
    """Roughly, of plain values; others are small, and raise."""
    if type(sent) is np.ndarray:
        return sent.nbytes
    if type(sent) is dict:
        return sum(50 + weights_size(key) + weights_size(value) for key, value in sent.items())
    return len(sent) * (8 if type(sent) in (list, tuple) else 1) if type(sent) in (str, bytes, list, tuple) else 8


def contribution_of_size(size: int) -> dict[str, Any]:
    return {
        "contributor": "site",
        "weights": {f"x{i}": np.zeros(1) for i in range(size // 60)},
        "aggregation_weight": 3,
        "settings": {"stream": False, "model": False},
    }


def make_fl_model(rng: Rng) -> tuple[FLModel, str | None, bool]:
    sent = FLModel(params={"w": np.zeros(1)}, current_round=0)
    sent.params, sent.metrics = given.weights(rng), given.entries(rng)
    sent.meta = {"client_name": "site", "NUM_STEPS_CURRENT_ROUND": 3}
    for key in ("client_name", "NUM_STEPS_CURRENT_ROUND", "PROCESSED_ALGORITHM", given.text(rng)):
        if rng.random() < 0.1:
            sent.meta[key] = choose(rng, (*given.NUMBERS, given.text(rng), given.raiser(rng)))
    if rng.random() < 0.1:
        sent.current_round = choose(rng, (*given.NUMBERS, given.raiser(rng)))
    return sent, choose(rng, (None, "^n$", "(x+)+$")), bool(rng.random() < 0.8)


def run_fl_model(sent: tuple[FLModel, str | None, bool]) -> Any:
    model, exclude_vars, is_known = sent
    aggregator = WeightedAverageAggregator(exclude_vars=exclude_vars)
    aggregator._round, aggregator._global = 0, known(is_known)
    meta = {"client_name": "good", "NUM_STEPS_CURRENT_ROUND": 2}
    aggregator.accept_model(FLModel(params=GOOD, current_round=0, meta=meta))
    aggregator.accept_model(model)
    if exclude_vars is not None and not is_known:  # of full weights nobody could put back what is excluded
        return None
    return aggregator.report, aggregator.aggregate_model().params


def judge_fl_model(_: Any, found: Any) -> None:
    if found is None:
        return
    report, mean = found
    assert "good" in report.accepted or report.rejected
    assert all(np.isfinite(array).all() for array in mean.values())


# Configurations.

NAMES = (
    "ModelAggregator",
    "LaplacianProtocol",
    "PercentileProtocol",
    "SVTProtocol",
    "ModelSelectionHandler",
    "Nothing",
    "",
)
PATHS = (
    "fed_learn.handlers.ModelSelectionHandler", "fed_learn.server.model_aggregator.ModelAggregator",
    "nowhere.to.be.Found", "fed_learn.handlers.Nothing", "Bare", ".", "..x", "fed_learn..handlers.x", "",
)  # fmt: skip
KNOWN = {**AGGREGATORS, **FILTERS, "ModelSelectionHandler": fl.ModelSelectionHandler}


def make_config(rng: Rng) -> str:
    def value(depth: int = 0) -> Any:
        kind = rng.random()
        if kind < 0.4:
            return entry(depth)
        if kind < 0.8 or depth > 3:
            return choose(
                rng, (1, 0, -1, 2.5, True, None, "x", "(a", "a*", given.text(rng), [], {}, 10**30, 1e400, -1.0)
            )
        inner = [value(depth + 1) for _ in range(int(rng.integers(3)))]
        return choose(rng, (inner, {given.text(rng): one for one in inner}))

    def entry(depth: int = 0) -> Any:
        made: dict[str, Any] = {}
        for key, options in (("name", NAMES), ("path", PATHS)):
            if rng.random() < 0.5:
                made[key] = choose(rng, options) if rng.random() < 0.9 else value(4)
        args = (
            "exclude_vars",
            "aggregation_weights",
            "mode",
            "min_delta",
            "gamma",
            "seed",
            "fraction",
            given.text(rng),
        )
        if rng.random() < 0.5:
            made["args"] = {choose(rng, args): value(depth + 1) for _ in range(int(rng.integers(3)))}
        return made

    settings: dict[str, Any] = {}
    for key in (
        "num_rounds",
        "min_num_clients",
        "validate_on_server",
        "num_rounds_per_valid",
        "exclude_vars",
        given.text(rng),
    ):
        if rng.random() < 0.3:
            settings[key] = value(3)
    for key in ("handlers", "filters", "servers"):
        if rng.random() < 0.4:
            settings[key] = [value() for _ in range(int(rng.integers(3)))] if rng.random() < 0.9 else value()
    for key in ("aggregator", "client"):
        if rng.random() < 0.3:
            settings[key] = value()
    written = json.dumps(settings)
    if rng.random() < 0.3:
        changed = given.mutated(
            rng, written.encode(), [b'{"num_rounds": 1, "num_rounds": 2}', b"[" * 2000, b'"\\ud800"']
        )
        written = changed.decode("utf-8", "surrogateescape")
    return written


@cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz"))


def run_config(written: str) -> Any:
    path = folder() / "config.json"
    path.write_bytes(written.encode("utf-8", "surrogateescape"))
    before = set(sys.modules)
    try:
        return _built(path)
    finally:
        outside = {name for name in set(sys.modules) - before if not name.startswith(("fed_learn", "encodings"))}
        assert not outside, f"a configuration imports {outside}"


def _built(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what Python says of the user's own pattern
        config = ServerConfig.of(read_config(path))
    handlers = [build_component(entry, KNOWN) for entry in config.handler_entries() or ()]
    return config, handlers, config.build_aggregator(), config.build_filters()


def judge_config(_: str, found: Any) -> None:
    config, handlers, _aggregator, filters = found
    assert config.num_rounds is None or config.num_rounds >= 1
    assert len(filters) == len(config.filters)
    assert len(handlers) >= len(config.handlers or ())


TARGETS = {
    target.name: target
    for target in (
        Target("npy", given.file_bytes, run_npy, judge_npy, (fl.WeightsTypeError, fl.DtypeError), len, file_of),
        Target(
            "flower records",
            make_record,
            lambda record: to_weights(record, like=SCHEMA, contributor="site"),
            judge_record,
            (fl.ContributionError,),
            record_size,
            lambda size: {"w": Array("", (), "numpy.ndarray", file_of(size))},
        ),
        Target("flower replies", make_reply, run_reply, judge_reply, (*REFUSALS, *UNUSABLE), reply_size, reply_of),
        Target("flower strategy", make_reply, run_strategy, judge_strategy, (), reply_size, reply_of),
        Target(
            "clara messages",
            make_clara,
            lambda model: model_to_weights(model, SCHEMA, "aggregator"),
            judge_weights,
            REFUSALS,
            lambda model: sum(len(name) + len(one.ndarray) for name, one in model.params.items()),
            clara_of,
        ),
        Target(
            "contributions",
            make_contribution,
            run_contribution,
            judge_round,
            (*REFUSALS, *UNUSABLE),
            weights_size,
            contribution_of_size,
        ),
        Target(
            "nvflare models",
            make_fl_model,
            run_fl_model,
            judge_fl_model,
            (*REFUSALS, *UNUSABLE),
            lambda sent: weights_size(sent[0].params) + weights_size(sent[0].metrics) + weights_size(sent[0].meta),
            lambda size: (FLModel(params=contribution_of_size(size)["weights"], current_round=0), None, False),
        ),
        Target(
            "configurations",
            make_config,
            run_config,
            judge_config,
            (fl.ConfigError,),
            len,
            lambda size: json.dumps({"num_rounds": 1, "note": "x" * size}),
        ),
    )
}
