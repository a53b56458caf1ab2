"""The weighted mean of clients' metrics, as Flower reports them."""

import logging
import math

from flwr.app import MetricRecord, RecordDict

from fed_learn.contribution import check_aggregation_weight
from fed_learn.errors import AggregationWeightError
from fed_learn.integrations.flower.replies import PARTITION_ID, metrics_of, records_of
from fed_learn.limits import LONGEST_NAME, MOST_METRICS
from fed_learn.values import mean_of

logger = logging.getLogger("flwr")


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The mean of each metric over the clients that report it, weighted by their number under `weighted_by_key`.

    Takes the place of Flower's `aggregate_metricrecords`, which refuses a round in which clients report different
    metrics. A reply by a weight of 0 adds nothing; one without a weight, or by a negative one, is left out, and so are
    lists of different lengths, and more metrics than `fed_learn.limits` takes of one reply; all logged.

    Example:
        >>> contents = [RecordDict({"m": MetricRecord({"n": n, "loss": x})}) for n, x in [(1, 2.0), (3, 6.0)]]
        >>> mean_metrics(contents, "n")["loss"]
        5.0
    """
    values: dict[str, list[tuple[float, list[float]]]] = {}
    scalars: set[str] = set()
    for content in contents:
        try:
            weight = check_aggregation_weight(metrics_of(content).get(weighted_by_key))
        except AggregationWeightError as error:
            logger.warning("the metrics of a reply are left out: %r: %s", weighted_by_key, error)
            continue
        if not weight:
            continue
        entries = [entry for record in records_of(content, MetricRecord).values() for entry in record.items()]
        taken = [(key, value) for key, value in entries[:MOST_METRICS] if len(key) <= LONGEST_NAME]
        if len(taken) < len(entries):
            logger.warning("%d of a reply's %d metrics are too many: left out", len(entries) - len(taken), len(entries))
        for key, value in taken:
            if key not in (weighted_by_key, PARTITION_ID):
                listed = [_as_float(v) for v in value] if isinstance(value, list) else [_as_float(value)]
                scalars |= set() if isinstance(value, list) else {key}
                values.setdefault(key, []).append((weight, listed))
    means = MetricRecord()
    for key, terms in values.items():
        if len({len(listed) for _, listed in terms}) > 1:
            logger.warning("metric %r is left out: clients report lists of different lengths", key)
            continue
        weights = [weight for weight, _ in terms]
        mean = [mean_of(column, weights) for column in zip(*(listed for _, listed in terms), strict=True)]
        means[key] = mean[0] if key in scalars else mean
    return means


def _as_float(value: float) -> float:
    """An int beyond the floats counts as infinite, as a float beyond them would."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
