"""The weighted mean of a batch of contributions that hold tensors; see `fed_learn.aggregation.tensors`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fed_learn import kernels
from fed_learn.adapters.base import Resident
from fed_learn.aggregation.average import checked_batch, counting, far_apart, usual_scale, weighted_average
from fed_learn.aggregation.integers import large_integer_mean, too_large
from fed_learn.aggregation.tensor_outputs import Target, TensorOutputs, as_tensors
from fed_learn.aggregation.tensors import Tensors, check_device, label_of, opened, placeholders, refuse_non_finite
from fed_learn.contribution import Contribution
from fed_learn.environment import sum_in_order
from fed_learn.errors import EmptyAggregationError
from fed_learn.kernels.base import Kernel, Segment
from fed_learn.weights import WeightDict


def average_tensors(
    batch: list[Any],
    aggregation_weights: Sequence[float] | None,
    *,
    like: WeightDict | None,
    out: WeightDict | None,
    exact: bool,
    kernel: str | None,
) -> WeightDict:
    """`weighted_average` where some of the weight dicts hold tensors."""
    if not batch:
        raise EmptyAggregationError("no contributions to average")
    labels = [
        label_of(c.contributor) if isinstance(c, Contribution) else f"contributions[{i}]" for i, c in enumerate(batch)
    ]
    found = [
        opened(item.weights if isinstance(item, Contribution) else item, label)
        for item, label in zip(batch, labels, strict=True)
    ]
    device = found[0].device
    for one, label in zip(found, labels, strict=True):
        check_device(one, device, label)
    shape_of = None if like is None else placeholders(like, "like")
    chosen = kernels.resolve(kernel, device=device)
    inputs = [tensor for one in found for tensor in one.tensors.values()]
    place, framework = found[0].place, None if exact else found[0].resident(chosen.name)
    if device == "cpu":  # where all can go the way of arrays
        others = found[1:] if out is None else [*found[1:], opened(out, "out")]
        if any(one.resident(chosen.name) is None for one in others):
            framework = None
    if framework is not None and place is not None:
        views = [_with_weights(item, one.weights) for item, one in zip(batch, found, strict=True)]
        schema, checked, _ = checked_batch(views, aggregation_weights, shape_of)
        tensors = {label: one.tensors for label, one in zip(labels, found, strict=True)}
        checked = counting(checked, lambda who, _: refuse_non_finite(framework, tensors[who], who))
        rows = [(who, tensors[who], a) for who, _, a in checked]
        if not far_apart([a for _, _, a in rows]):
            outputs = TensorOutputs(schema, place, out, inputs)
            _average(chosen, framework, rows, outputs.arrays)
            return outputs.finish()
    views = [_with_weights(item, one.on_host()) for item, one in zip(batch, found, strict=True)]
    target = None if out is None else Target(out, device, inputs)
    mean = weighted_average(
        views,
        aggregation_weights,
        like=shape_of,
        out=None if target is None else target.arrays,
        exact=exact,
        kernel=kernel,
    )
    if target is not None:
        return target.finish()
    return mean if place is None else as_tensors(mean, place)


def _with_weights(item: Any, weights: Any) -> Any:
    return replace(item, weights=weights) if isinstance(item, Contribution) else weights


def _average(kernel: Kernel, framework: Resident, rows: list[tuple[str, Tensors, float]], results: Tensors) -> None:
    """What `weighted_average` does with arrays, on tensors where they are."""
    scalars = [a for _, _, a in rows]
    columns = {name: [held[name] for _, held, _ in rows] for name in results}
    small = -math.frexp(max(scalars))[1] - len(scalars).bit_length() - 1
    for name in _mean(kernel, columns, scalars, usual_scale(scalars), results):
        if np.dtype(framework.check(results[name], "", name)).kind in "iu":
            host = list(map(framework.view, columns[name]))
            if too_large(host):
                mean = np.array(framework.view(results[name]), order="C")
                large_integer_mean(kernels.resolve(device="cpu"), host, scalars, mean)
                framework.write(results[name], mean)
            continue
        for who, held, _ in rows:
            refuse_non_finite(framework, {name: held[name]}, who)
        # The inputs are finite, so sums overflowed: once more, so small that they cannot, and of copies, since the
        # inputs may have been something else when they were summed, and may be again.
        doubtful = framework.overflowed(results[name])
        copies = [tensor.clone() for tensor in columns[name]]
        for (who, _, _), tensor in zip(rows, copies, strict=True):
            refuse_non_finite(framework, {name: tensor}, who)
        again = results[name].clone()
        _mean(kernel, {name: copies}, scalars, small, {name: again})
        results[name][doubtful] = again[doubtful]


def _mean(
    kernel: Kernel, columns: Mapping[str, list[Any]], scalars: Sequence[float], scale: int, results: Tensors
) -> list[str]:
    """The mean with all aggregation weights multiplied by 2**scale; returns the variables that the kernel reports."""
    scaled = [math.ldexp(a, scale) for a in scalars]
    segments = [Segment(column, results[name]) for name, column in columns.items()]
    flags = kernel.weighted_mean(segments, np.array(scaled), sum_in_order(scaled))
    return [name for name, flag in zip(columns, flags, strict=True) if flag]
