"""What Flower's FedAvg and ours make of contributions that are not as they should be.

    python examples/failures/flower_failures.py

Three clients send weights in one round; each case spoils something. Both strategies run for real, on the same replies.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import ml_dtypes
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg as LegacyFlowerFedAvg
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Strategy
from outcomes import Outcome, Row, run, show

import fed_learn as fl
from fed_learn.integrations.flower import FedAvg, LegacyFedAvg, LocalGrid, to_record, to_weights

CLIENTS = 3
Weights = dict[str, Any]
Spoil = Callable[[list[Message]], list[Message]]


def sent(
    weights: Sequence[Weights], examples: Sequence[int] = (10, 10, 10), spoil: Spoil = lambda replies: replies
) -> list[Message]:
    """The replies to round 1 of clients that send these weights."""

    def train(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"])
        arrays = ArrayRecord({name: Array(np.asarray(array)) for name, array in weights[k].items()})
        metrics = MetricRecord({"num-examples": examples[k], "partition-id": k})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    grid = LocalGrid(train, CLIENTS)
    replies = grid.send_and_receive(FlowerFedAvg().configure_train(1, ArrayRecord(), ConfigRecord(), grid))
    return spoil(sorted(replies, key=lambda reply: reply.metadata.src_node_id))


def both(case: str, replies: list[Message], initial: Weights) -> Row:
    """Both strategies on the same replies."""
    return Row(case, round_of(FlowerFedAvg(), replies, initial), round_of(FedAvg(), replies, initial))


def round_of(strategy: Strategy, replies: list[Message], initial: Weights) -> Outcome:
    """One round of a strategy of the Message API."""
    grid = LocalGrid(lambda message, context: None, CLIENTS)
    list(strategy.configure_train(1, to_record(initial), ConfigRecord(), grid))
    try:
        with np.errstate(all="ignore"):
            arrays, _ = strategy.aggregate_train(1, replies)
        weights = None if arrays is None else {name: array.numpy() for name, array in arrays.items()}
    except Exception as error:  # noqa: BLE001 - that is what is asked for
        return Outcome(None, error)
    if not isinstance(strategy, FedAvg):
        return Outcome(weights)
    weights = None if arrays is None else dict(to_weights(arrays))
    try:
        job = strategy.close()
    except fl.NothingAggregatedError as error:  # of a job of this one round
        job = error.result
    assert job is not None
    return Outcome(weights, refused=tuple((failure.contributor, failure.cause) for failure in job.reports[0].rejected))


def legacy(case: str, weights: Sequence[Any], examples: Sequence[int] = (10, 10, 10), *, inplace: bool = True) -> Row:
    """Both strategies of the older interface, on one parameter."""
    results: Any = [
        (Client(str(k)), FitRes(Status(Code.OK, ""), ndarrays_to_parameters([array]), n, {"partition-id": k}))
        for k, (array, n) in enumerate(zip(weights, examples, strict=True))
    ]
    outcomes = []
    for strategy in (LegacyFlowerFedAvg(inplace=inplace), LegacyFedAvg()):
        with np.errstate(all="ignore"):
            parameters, _ = strategy.aggregate_fit(1, results, [])
        assert parameters is not None
        outcomes.append(Outcome({"w": parameters_to_ndarrays(parameters)[0]}))
    return Row(case, *outcomes)


class Client(ClientProxy):
    """Only its id counts here."""

    get_properties = get_parameters = fit = evaluate = reconnect = None  # type: ignore[assignment]


def f32(*values: float) -> Any:
    """A float32 vector."""
    return np.array(values, np.float32)


def int64_counter() -> Row:
    return both("int64 counters 10, 10, 11", sent([{"n": np.int64(v)} for v in (10, 10, 11)]), {"n": np.int64(0)})


def legacy_int64_counter() -> Row:
    return legacy("older interface: int64 counters 1000", [np.array(1000)] * 3)


def legacy_float16() -> Row:
    ones = [np.ones(2, np.float16)] * 3
    return legacy(
        "older interface, inplace=False: float16 ones, 70 000 examples each", ones, [70_000] * 3, inplace=False
    )


def bfloat16() -> Row:
    w = [{"w": np.array([v, -v], ml_dtypes.bfloat16)} for v in (1, 2, 6)]
    return both("bfloat16", sent(w), w[0])


def one_nan() -> Row:
    weights = [{"w": f32(k, np.nan if k == 1 else k)} for k in range(CLIENTS)]
    return both("one NaN from client 1", sent(weights), weights[0])


def one_infinity() -> Row:
    weights = [{"w": f32(k, np.inf if k == 2 else k)} for k in range(CLIENTS)]
    return both("one infinity from client 2", sent(weights), weights[0])


def zero_total() -> Row:
    return both("no examples anywhere", sent([{"w": f32(1)}] * 3, [0, 0, 0]), {"w": f32(0)})


def negative_weight() -> Row:
    weights = [{"w": f32(v)} for v in (1, 1, 4)]
    return both("client 2 claims −10 examples", sent(weights, [10, 10, -10]), weights[0])


def wrong_shape() -> Row:
    weights = [{"w": np.zeros((3, 3), np.float32)}, {"w": np.zeros((3, 3), np.float32)}, {"w": f32(3, 6, 9)}]
    return both("client 2 sends shape (3,) for (3, 3)", sent(weights), weights[0])


def wrong_dtype() -> Row:
    weights = [{"w": f32(1)}, {"w": f32(1)}, {"w": np.array([4], np.complex64)}]
    return both("client 2 sends complex numbers", sent(weights), weights[0])


def missing_variable() -> Row:
    full = {"w": f32(1), "b": f32(1)}
    return both("client 2 leaves a variable out", sent([full, full, {"w": full["w"]}]), full)


def stale() -> Row:
    def spoil(replies: list[Message]) -> list[Message]:
        for reply in replies:
            reply.metadata.group_id = "1"
        replies[2].metadata.group_id = "9"  # what our messages state, and their replies with them
        return replies

    weights = [{"w": f32(v)} for v in (1, 1, 4)]
    return both("client 2 answers an earlier round", sent(weights, spoil=spoil), weights[0])


def duplicate() -> Row:
    weights = [{"w": f32(v)} for v in (1, 1, 4)]
    return both("client 2 contributes twice", sent(weights, spoil=lambda r: [*r, r[2]]), weights[0])


def other_metrics() -> Row:
    def spoil(replies: list[Message]) -> list[Message]:
        next(iter(replies[2].content.metric_records.values()))["loss"] = 0.5
        return replies

    weights = [{"w": f32(v)} for v in (1, 1, 4)]
    return both("client 2 reports a metric more", sent(weights, spoil=spoil), weights[0])


def order_of_arrival() -> Row:
    """How many elements of the mean depend on the order in which the same replies arrive."""
    rng = np.random.default_rng(0)
    weights = [{"w": rng.normal(size=10_000).astype(np.float32)} for _ in range(CLIENTS)]
    replies = sent(weights, [17, 29, 31])
    made = []
    for strategy in (FlowerFedAvg, FedAvg):
        one = round_of(strategy(), replies, weights[0]).weights
        other = round_of(strategy(), replies[::-1], weights[0]).weights
        assert one is not None
        assert other is not None
        made.append(Outcome({"elements that differ": np.array((one["w"] != other["w"]).sum())}))
    return Row("10 000 float32, replies in two orders", *made)


CASES: tuple[Callable[[], Row], ...] = (
    int64_counter,
    legacy_int64_counter,
    legacy_float16,
    bfloat16,
    one_nan,
    one_infinity,
    zero_total,
    negative_weight,
    wrong_shape,
    wrong_dtype,
    missing_variable,
    stale,
    duplicate,
    other_metrics,
    order_of_arrival,
)


def rows() -> list[Row]:
    """All cases, run now."""
    made: list[Row] = run(CASES)
    return made


if __name__ == "__main__":
    show("Flower " + version("flwr"), rows())
