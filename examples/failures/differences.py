"""Where this library's drop-ins for Flower and NVFlare deliberately differ from the stack's own averaging.

    python examples/failures/differences.py --write docs/differences.md

Each line is run with both; beside what comes out stand the reason and the way back to what the stack does.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flower_failures as flower
import numpy as np
import nvflare_failures as nvflare
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from outcomes import Outcome, Row, run

from fed_learn.integrations.flower import FedAvg, LocalGrid, to_record, to_weights
from fed_learn.integrations.nvflare import WeightedAverageAggregator

f32 = flower.f32


@dataclass(frozen=True)
class Difference:
    """A line of the page.

    Attributes:
        run: Runs it with the stack and with ours.
        why: The reason.
        back: How to get what the stack does.
    """

    run: Callable[[], Row]
    why: str
    back: str


def flower_job(
    case: str, train: Callable[[Message, Context], Message], initial: dict[str, Any], rounds: int = 2
) -> Row:
    """Whole jobs of both strategies, with an app of three nodes in one process."""
    outcomes = []
    for strategy in (FlowerFedAvg(fraction_evaluate=0.0), FedAvg(fraction_evaluate=0.0)):
        try:
            with np.errstate(all="ignore"):
                result = strategy.start(LocalGrid(train, 3), to_record(initial), num_rounds=rounds)
        except Exception as error:  # noqa: BLE001 - that is what is asked for
            outcomes.append(Outcome(error=error))
            continue
        outcomes.append(Outcome(dict(to_weights(result.arrays))))
    return Row(case, *outcomes)


def replying(content: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    return lambda message, context: Message(content(message, context), reply_to=message)


def all_refused() -> Row:
    def content(message: Message, context: Context) -> RecordDict:
        arrays = to_record({"w": f32(np.nan)})
        return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})

    return flower_job("every client sends NaN in every round", replying(content), {"w": f32(0)})


def misnamed_weight() -> Row:
    def content(message: Message, context: Context) -> RecordDict:
        metrics = MetricRecord({"num_examples" if context.node_config["partition-id"] == 2 else "num-examples": 1})
        return RecordDict({"arrays": to_record({"w": f32(2)}), "metrics": metrics})

    return flower_job("one client names its examples otherwise", replying(content), {"w": f32(0)})


def part_of_the_model() -> Row:
    def content(message: Message, context: Context) -> RecordDict:
        return RecordDict({"arrays": to_record({"fc": f32(2)}), "metrics": MetricRecord({"num-examples": 1})})

    return flower_job("all send fc of a model of fc and bn", replying(content), {"fc": f32(0), "bn": f32(7)})


def other_names() -> Row:
    def content(message: Message, context: Context) -> RecordDict:
        return RecordDict({"arrays": to_record({"net.w": f32(2)}), "metrics": MetricRecord({"num-examples": 1})})

    return flower_job("clients call w of the initial record net.w", replying(content), {"w": f32(0)})


def begun_as_integers() -> Row:
    def content(message: Message, context: Context) -> RecordDict:
        return RecordDict({"arrays": to_record({"w": f32(0.5)}), "metrics": MetricRecord({"num-examples": 1})})

    return flower_job("fractions for a model of integers", replying(content), {"w": np.array([0])})


def wider_floats() -> Row:
    weights = [{"w": np.array([v, 0.1])} for v in (1.0, 2.0, 3.0)]
    return flower.both("float64 replies to a float32 model", flower.sent(weights), {"w": f32(0, 0)})


def integers_for_floats() -> Row:
    weights = [{"w": f32(1)}, {"w": f32(1)}, {"w": np.array([4])}]
    return flower.both("client 2 sends integers for a float32 variable", flower.sent(weights), weights[0])


def codes(client: int) -> dict[str, Any]:
    """A layer quantized to four bits by each client for itself, as bitsandbytes names it."""
    state = {"w.absmax": f32(1), "w.quant_state.bitsandbytes__nf4": np.array([123, 125], np.uint8)}
    return {"w": np.array([16 * client, 1], np.uint8), **state, "lora": f32(client)}


def other_codes() -> Row:
    weights = [codes(0), codes(0), codes(8)]
    return flower.both("client 2 sends other 4-bit codes", flower.sent(weights), codes(0))


def other_codes_in_nvflare() -> Row:
    models = nvflare.sent([codes(0), codes(0), codes(8)])
    return nvflare.both("site-3 sends other 4-bit codes", models, codes(0))


def parts_in_nvflare() -> Row:
    whole = {"a": f32(1), "b": f32(1)}
    return nvflare.both("site-3 leaves a variable out", nvflare.sent([whole, whole, {"a": f32(4)}]), whole)


def part_in_nvflare() -> Row:
    models = nvflare.sent([{"fc": f32(v)} for v in (1, 2, 3)])
    return nvflare.both("all send fc of a model of fc and bn", models, {"fc": f32(0), "bn": f32(7)})


def excluded_in_nvflare() -> Row:
    models, initial = nvflare.sent([{"fc": f32(v), "bn": f32(v)} for v in (1, 2, 3)]), {"fc": f32(0), "bn": f32(7)}
    return Row(
        'exclude_vars="bn"',
        nvflare.round_of(None, models, initial, exclude_vars="bn"),
        nvflare.round_of(WeightedAverageAggregator(exclude_vars="bn"), models, initial),
    )


def begun_as_integers_in_nvflare() -> Row:
    models = nvflare.sent([{"w": f32(0.5)}] * 3)
    return nvflare_job("fractions for a model of integers", models, {"w": np.array([0])})


def other_names_in_nvflare() -> Row:
    models = nvflare.sent([{"net.w": f32(2)}] * 3)
    return nvflare_job("clients call w of the global model net.w", models, {"w": f32(0)})


def all_refused_in_nvflare() -> Row:
    models = nvflare.sent([{"w": f32(np.nan)}] * 3)
    return nvflare_job("every client sends NaN in every round", models, {"w": f32(0)})


def no_steps_in_nvflare() -> Row:
    models = nvflare.sent([{"w": f32(2)}] * 3, [0, 0, 0])
    return nvflare_job("no steps anywhere", models, {"w": f32(0)})


def nvflare_job(case: str, models: list[FLModel], initial: dict[str, Any]) -> Row:
    """A job of one round, with the events that tell an aggregator of its beginning and its end."""
    aggregator, end, fl_ctx = WeightedAverageAggregator(), nvflare.Ends(), FLContext()
    fl_ctx.put(ReservedKey.ENGINE, nvflare.Engine([aggregator, end]), private=True, sticky=False)
    end.fire_event(EventType.START_RUN, fl_ctx)
    ours = nvflare.round_of(aggregator, models, initial)
    end.fire_event(EventType.END_WORKFLOW, fl_ctx)
    return Row(case, nvflare.round_of(None, models, initial), Outcome(note="ends the run") if end.ended else ours)


def wider_floats_in_nvflare() -> Row:
    models = nvflare.sent([{"w": np.array([v, 0.1])} for v in (1.0, 2.0, 3.0)])
    return nvflare.both("float64 models for a float32 model", models, {"w": f32(0, 0)})


def integers_for_floats_in_nvflare() -> Row:
    weights = [{"w": f32(1)}, {"w": f32(1)}, {"w": np.array([4])}]
    return nvflare.both("site-3 sends integers for a float32 variable", nvflare.sent(weights), weights[0])


def negative_steps() -> Row:
    return nvflare.bad_steps("−10 steps", -10)


def encrypted() -> Row:
    models = nvflare.sent([{"w": f32(v)} for v in (1, 1, 4)])
    models[2].meta["PROCESSED_ALGORITHM"] = "_he_"
    return nvflare.both("site-3 says that its weights are encrypted", models, {"w": f32(0)})


def nameless() -> Row:
    models = nvflare.sent([{"w": f32(v)} for v in (1, 1, 4)])
    del models[2].meta["client_name"]
    return nvflare.both("a model without its client's name", models, {"w": f32(0)})


def unsigned_differences() -> Row:
    models = nvflare.sent([{"n": np.array([k], np.uint8)} for k in (1, 1, 255)], params_type="DIFF")
    return nvflare.both(
        "differences in uint8: 1, 1 and −1", models, {"n": np.array([9], np.uint8)}, expected_data_kind="WEIGHT_DIFF"
    )


def metrics(case: str, *sent: dict[str, Any] | None) -> Row:
    """The mean metrics of a round."""
    models = nvflare.sent([{"w": f32(1)}] * len(sent))
    for model, one in zip(models, sent, strict=True):
        model.metrics = one
    row = nvflare.both(case, models, {"w": f32(1)})
    return Row(case, *(Outcome(note=shown_metrics(outcome.metrics)) for outcome in (row.stock, row.ours)))


def shown_metrics(found: dict[str, Any]) -> str:
    listed = ", ".join(f"{name} = {np.array2string(np.asarray(found[name]), precision=4)}" for name in sorted(found))
    return listed or "no metrics"


def nan_metric() -> Row:
    return metrics("metrics: site-2 measures a loss of NaN", {"loss": 0.5}, {"loss": np.nan}, {"loss": 1.0})


def array_metric() -> Row:
    recall = [{"loss": 0.5, "recall": np.array([v, 1.0])} for v in (0.0, 0.5, 1.0)]
    return metrics("metrics: arrays of two numbers", *recall)


def no_metrics() -> Row:
    return metrics("metrics: site-3 sends none", {"loss": 0.5}, {"loss": 1.0}, None)


STRICT = "a wrong number in the mean cannot be told afterwards"
NONE = "only by the stack's own averaging"
DTYPES = "the model is the authority: a mean does not change its dtypes"

CODES = "the mean of codes stands for no weights"

DIFFERENCES: dict[str, Sequence[Difference]] = {
    f"Flower {version('flwr')}": (
        Difference(flower.one_nan, STRICT, NONE),
        Difference(flower.one_infinity, f"{STRICT}; infinities that the global model has itself pass", NONE),
        Difference(flower.wrong_shape, "nothing is broadcast", NONE),
        Difference(flower.negative_weight, STRICT, NONE),
        Difference(flower.stale, "it was trained from another model", "clear `metadata.group_id` of the messages"),
        Difference(flower.duplicate, "one client counts once", NONE),
        Difference(
            flower.missing_variable,
            "a part that only some send has no clear mean",
            '`partial="average"`, over those who sent it',
        ),
        Difference(
            part_of_the_model,
            "the rest of the global model is kept, in `result.arrays`; clients are sent the part, as by Flower",
            "take the names that clients send out of `result.arrays`",
        ),
        Difference(
            other_names,
            "the global model is the authority: what has other names may be another model",
            "an empty initial record, `ArrayRecord()`: the clients tell",
        ),
        Difference(begun_as_integers, "the fractions would be lost", "initial arrays of floating-point numbers"),
        Difference(wider_floats, DTYPES, "initial arrays in float64"),
        Difference(flower.int64_counter, DTYPES, "initial arrays in float64"),
        Difference(flower.wrong_dtype, "one bad reply ends no run", '`on_bad_contribution="raise"`'),
        Difference(integers_for_floats, "an integer where a fraction is due has been cut off", NONE),
        Difference(other_codes, CODES, '`policies={"w": "keep"}`'),
        Difference(misnamed_weight, "the others' work is not lost", '`on_bad_contribution="raise"`'),
        Difference(flower.zero_total, "the round fails with a word, and a job of such rounds ends with an error", NONE),
        Difference(all_refused, "a job that ends with its initial model has failed", NONE),
        Difference(
            flower.other_metrics,
            "metrics are no reason to lose weights",
            "`train_metrics_aggr_fn=` Flower's `aggregate_metricrecords`",
        ),
        Difference(flower.order_of_arrival, "the same bits, whoever is first", NONE),
    ),
    f"NVFlare {version('nvflare')}": (
        Difference(nvflare.one_nan, STRICT, NONE),
        Difference(nvflare.one_infinity, f"{STRICT}; infinities that the global model has itself pass", NONE),
        Difference(nvflare.broadcast, "nothing is broadcast", NONE),
        Difference(nvflare.nan_steps, STRICT, "`weigh_by_local_iter=False`"),
        Difference(negative_steps, STRICT, "`weigh_by_local_iter=False`"),
        Difference(nvflare.zero_steps, "who did no step has nothing to add", "`weigh_by_local_iter=False`"),
        Difference(
            no_steps_in_nvflare,
            "the round fails with a word, and a job of such rounds ends with an error",
            "`weigh_by_local_iter=False`",
        ),
        Difference(parts_in_nvflare, "a part that only some send has no clear mean", '`partial="average"`'),
        Difference(part_in_nvflare, "the global model keeps its other variables, and clients receive them too", NONE),
        Difference(excluded_in_nvflare, "what is excluded is not to be lost", NONE),
        Difference(
            other_names_in_nvflare,
            "the global model is the authority: what has other names may be another model",
            "a global model with the clients' names",
        ),
        Difference(begun_as_integers_in_nvflare, "the fractions would be lost", "a global model in floating point"),
        Difference(wider_floats_in_nvflare, DTYPES, "a global model in float64"),
        Difference(nvflare.int64_counters, DTYPES, "a global model in float64"),
        Difference(integers_for_floats_in_nvflare, "an integer where a fraction is due has been cut off", NONE),
        Difference(other_codes_in_nvflare, CODES, '`policies={"w": "keep"}`'),
        Difference(nvflare.wrong_dtype, DTYPES, NONE),
        Difference(nvflare.duplicate, "one client counts once", NONE),
        Difference(nvflare.stale, "it was trained from another model", NONE),
        Difference(nvflare.wrong_kind, "a difference is no model", NONE),
        Difference(unsigned_differences, "their dtype cannot hold −1", "send full weights"),
        Difference(encrypted, "only plain weights can be checked", NONE),
        Difference(nameless, "it could count twice", NONE),
        Difference(nvflare.nothing, "there is no mean of nothing", NONE),
        Difference(all_refused_in_nvflare, "a job that ends with its initial model has failed", NONE),
        Difference(nan_metric, "a model is selected, or a job stopped, by the clients that could measure", NONE),
        Difference(array_metric, "a metric is one number; the log says once what is left out", "a metric for each"),
        Difference(no_metrics, "what the others measured is not lost", NONE),
        Difference(nvflare.order_of_arrival, "the same bits, whoever is first", NONE),
        Difference(nvflare.handler_raises, "no failure is invisible", '`on_handler_error="log"`'),
    ),
}


def document() -> str:
    """The page of the docs."""
    parts = [
        "# Where a drop-in differs from the stack, on purpose\n",
        "What a stack accepts and has one clear meaning is accepted here too, so that changing the import costs no\n"
        "training. These differences are left. Each line was run with both; `python examples/failures/differences.py\n"
        "--write docs/differences.md` wrote this page.\n",
    ]
    for stack, differences in DIFFERENCES.items():
        lines = [("case", stack, "fed_learn", "why", "the stack's behaviour"), ("---",) * 5]
        rows = run([difference.run for difference in differences])
        for row, difference in zip(rows, differences, strict=True):
            lines.append((row.case, str(row.stock), str(row.ours), difference.why, difference.back))
        parts += [f"## {stack}\n", "".join(f"| {' | '.join(line)} |\n" for line in lines)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page of the docs instead")
    file = parser.parse_args().write
    if file is None:
        print(document())
    else:
        file.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
