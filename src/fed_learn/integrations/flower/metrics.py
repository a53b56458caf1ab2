"""The weighted mean of clients' metrics, as Flower reports them."""

import logging
import math
from collections import Counter
from collections.abc import Iterable

from flwr.app import MetricRecord, RecordDict

from fed_learn.aggregation.told import Told
from fed_learn.contribution import check_aggregation_weight
from fed_learn.errors import AggregationWeightError, brief
from fed_learn.integrations.flower.replies import PARTITION_ID, records_of
from fed_learn.limits import LONGEST_NAME, MOST_METRICS
from fed_learn.values import mean_of

logger = logging.getLogger("flwr")


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The mean of each metric over the clients that report it, weighted by their number under `weighted_by_key`.

    Takes the place of Flower's `aggregate_metricrecords`, which refuses a round in which clients report different
    metrics, and gives NaN where one of them does. A reply by a weight of 0 adds nothing. Left out, and logged, are a
    reply without a weight, or by one that is negative or not finite; a metric that is not finite; a list that is not
    as long as most are (of equally common lengths the shorter counts; a number is a list of one); and more metrics than
    `fed_learn.limits` takes of one reply.

    Example:
        >>> contents = [RecordDict({"m": MetricRecord({"n": n, "loss": x})}) for n, x in [(1, 2.0), (3, 6.0)]]
        >>> mean_metrics(contents, "n")["loss"]
        5.0
    """
    return mean_by_name(
        ((f"reply {k}", content) for k, content in enumerate(contents, 1)), weighted_by_key, Told(logger)
    )


def mean_by_name(contents: Iterable[tuple[str, RecordDict]], weighted_by_key: str, told: Told) -> MetricRecord:
    """`mean_metrics` of clients that have names, by which the log calls them.

    Args:
        contents: Clients' names, and what they sent.
        weighted_by_key: The metric that weighs the others.
        told: Says once for each client and metric that it is left out.
    """
    terms: dict[str, list[tuple[str, float, list[float]]]] = {}
    numbers: set[str] = set()
    for who, content in contents:
        entries = [entry for record in records_of(content, MetricRecord).values() for entry in record.items()]
        try:
            numbered = [value for key, value in entries if key == weighted_by_key and not isinstance(value, list)]
            weight = check_aggregation_weight(numbered[-1] if numbered else None)
        except AggregationWeightError as error:
            told.once(("metrics", who), f"{who}: its metrics are left out of the means: {weighted_by_key!r}: {error}")
            continue
        if not weight:
            continue
        taken = [(key, value) for key, value in entries[:MOST_METRICS] if len(key) <= LONGEST_NAME]
        if len(taken) < len(entries):
            left_out = f"{len(entries) - len(taken)} of its {len(entries)} metrics are left out"
            limits = f"{MOST_METRICS} are taken, with names of at most {LONGEST_NAME} characters"
            told.once(("metrics left out", who), f"{who}: {left_out}: {limits}")
        for key, value in taken:
            if key in (weighted_by_key, PARTITION_ID):
                continue
            listed = [_as_float(v) for v in value] if isinstance(value, list) else [_as_float(value)]
            if all(map(math.isfinite, listed)):
                numbers |= set() if isinstance(value, list) else {key}
                terms.setdefault(key, []).append((who, weight, listed))
            else:
                _tell(told, who, key, f"is {brief(value)}")
    means = MetricRecord()
    for key, found in terms.items():
        lengths = Counter([len(listed) for _, _, listed in found])
        usual = min(lengths, key=lambda length: (-lengths[length], length))
        for who, _, listed in found:
            if len(listed) != usual:
                _tell(told, who, key, f"has {len(listed)} numbers, where {lengths[usual]} others have {usual}")
        counted = [(weight, listed) for _, weight, listed in found if len(listed) == usual]
        weights = [weight for weight, _ in counted]
        mean = [mean_of(column, weights) for column in zip(*[listed for _, listed in counted], strict=True)]
        means[key] = mean[0] if usual == 1 and key in numbers else mean
    return means


def _tell(told: Told, who: str, key: str, why: str) -> None:
    told.once(("metric", who, key), f"{who}: metric {brief(key)} {why}: it is left out of the mean metrics")


def _as_float(value: float) -> float:
    """An int beyond the floats counts as infinite, as a float beyond them would."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
