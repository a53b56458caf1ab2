"""Other ways to the mean of a batch, each a small function that makes a `Run`. `stream_peers` has those of streams.

A peer runs where the modules that it needs are installed; they are imported when it is prepared, not before. Inputs are
turned into the peer's own types beforehand, without being timed. Peers use as many threads as the kernels may, and
where `Inputs.reuse` says so and they can, memory for the result that they have.
"""

import functools
import importlib.util
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from fed_learn.benchmark import frameworks
from fed_learn.benchmark.inputs import Inputs
from fed_learn.benchmark.sides import Run, Side
from fed_learn.weights import Array

BATCH: dict[str, Side] = {}
"""Name → peer that averages a batch."""

FLOATS = ("float16", "bfloat16", "float32", "float64")
NUMPY_FLOATS = ("float16", "float32", "float64")
INTEGERS = ("int64", "int32", "int16", "uint8")
SLOW_TO_START = ("flwr", "nvflare", "numba")
"""Modules that take seconds to import, or to compile for a dtype."""

Prepare = Callable[[Inputs], Run]


def peer(
    registry: dict[str, Side], name: str, *needs: str, dtypes: tuple[str, ...] | None = None
) -> Callable[[Prepare], Prepare]:
    """Registers a peer.

    Args:
        registry: Where.
        name: Its name.
        needs: Modules that must be installed.
        dtypes: Names of the dtypes that it takes; None: all.
    """

    def register(prepare: Prepare) -> Prepare:
        registry[name] = Side(name, prepare, needs=needs, dtypes=dtypes)
        return prepare

    return register


def why_not(side: Side, dtype: np.dtype[Any], *, quick: bool = False) -> str | None:
    """Why a side does not take part, or None.

    Args:
        side: The side.
        dtype: Of the inputs.
        quick: Whether those that take long to start are left out.
    """
    missing = [module for module in side.needs if importlib.util.find_spec(module) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if side.dtypes is not None and dtype.name not in side.dtypes:
        return f"takes no {dtype.name}"
    slow = [module for module in side.needs if module in SLOW_TO_START]
    return f"left out of a quick run: {' and '.join(slow)} takes seconds to start" if quick and slow else None


@peer(BATCH, "numpy running sum")
def running_sum(inputs: Inputs) -> Run:
    """What NVFlare does to numpy arrays and most loops do: one running sum of w·x in the dtype of the arrays."""
    total = sum(inputs.aggregation_weights)

    def run() -> dict[str, Any]:
        result = {}
        for name in inputs.clients[0]:
            acc = inputs.clients[0][name] * inputs.aggregation_weights[0]
            for client, a in zip(inputs.clients[1:], inputs.aggregation_weights[1:], strict=True):
                acc = acc + client[name] * a
            result[name] = acc * (1 / total)
        return result

    return Run(run)


@peer(BATCH, "numpy in place", dtypes=NUMPY_FLOATS)
def running_sum_in_place(inputs: Inputs) -> Run:
    """The most that one gets out of numpy: `acc += x * share` without new memory, in the dtype of the arrays."""
    total = sum(inputs.aggregation_weights)
    memory = {name: np.empty_like(x) for name, x in inputs.clients[0].items()} if inputs.reuse else {}
    scratch = np.empty(max(x.size for x in inputs.clients[0].values()), inputs.dtype)

    def run() -> dict[str, Any]:
        result = {}
        for name, first in inputs.clients[0].items():
            acc = np.multiply(first, inputs.aggregation_weights[0] / total, out=memory.get(name))
            product = scratch[: first.size].reshape(first.shape)
            for client, a in zip(inputs.clients[1:], inputs.aggregation_weights[1:], strict=True):
                acc += np.multiply(client[name], a / total, out=product)
            result[name] = acc
        return result

    return Run(run)


@peer(BATCH, "numpy reduce")
def scaled_copies(inputs: Inputs) -> Run:
    """What Flower's older strategies do: a scaled copy of every model, then `reduce(np.add, …)`."""
    total = sum(inputs.aggregation_weights)

    def run() -> dict[str, Any]:
        scaled = [
            [array * a for array in client.values()]
            for client, a in zip(inputs.clients, inputs.aggregation_weights, strict=True)
        ]
        return {
            name: reduce(np.add, column) / total
            for name, column in zip(inputs.clients[0], zip(*scaled, strict=True), strict=True)
        }

    return Run(run)


@peer(BATCH, "numpy.average")
def numpy_average(inputs: Inputs) -> Run:
    """`numpy.average` over a stacked copy, the first thing that a search finds."""

    def run() -> dict[str, Any]:
        return {
            name: np.average(np.stack([c[name] for c in inputs.clients]), axis=0, weights=inputs.aggregation_weights)
            for name in inputs.clients[0]
        }

    return Run(run)


@peer(BATCH, "numpy tensordot", dtypes=NUMPY_FLOATS)
def numpy_tensordot(inputs: Inputs) -> Run:
    """A stacked copy times a vector of normalised weights, by BLAS; `np.dot` is what `np.tensordot` calls."""
    a = np.array(inputs.aggregation_weights)
    share = (a / a.sum()).astype(inputs.dtype)
    memory = {name: np.empty_like(x) for name, x in inputs.clients[0].items()} if inputs.reuse else {}

    def run() -> dict[str, Any]:
        result = {}
        for name in inputs.clients[0]:
            stacked = np.stack([client[name] for client in inputs.clients])
            if name in memory:
                np.dot(share, stacked.reshape(share.size, -1), out=memory[name].reshape(-1))
            result[name] = memory[name] if name in memory else np.tensordot(share, stacked, axes=1)
        return result

    return Run(run)


@peer(BATCH, "torch._foreach_add_", "torch", dtypes=FLOATS)
def torch_foreach(inputs: Inputs) -> Run:
    """Torch's operations on lists of tensors: sums of normalised terms in the dtype of the tensors."""
    torch = frameworks.torch()
    total = sum(inputs.aggregation_weights)
    models = [frameworks.tensors(client) for client in inputs.clients]
    memory = [torch.zeros_like(tensor) for tensor in models[0]] if inputs.reuse else None

    def run() -> list[Any]:
        shares = [a / total for a in inputs.aggregation_weights]
        if memory is None:
            acc = torch._foreach_mul(models[0], shares[0])
        else:
            acc = [torch.mul(x, shares[0], out=out) for x, out in zip(models[0], memory, strict=True)]
        for model, share in zip(models[1:], shares[1:], strict=True):
            torch._foreach_add_(acc, model, alpha=share)
        return list(acc)

    return Run(run, functools.partial(frameworks.weight_dict, inputs))


@peer(BATCH, "torch add_", "torch", dtypes=FLOATS)
def torch_add(inputs: Inputs) -> Run:
    """What NVFlare does to tensors: `add_(alpha=)` tensor by tensor, one division in place at the end."""
    torch = frameworks.torch()
    total = sum(inputs.aggregation_weights)
    models = [frameworks.tensors(client) for client in inputs.clients]
    memory = [torch.zeros_like(tensor) if inputs.reuse else None for tensor in models[0]]

    def run() -> list[Any]:
        acc = [torch.mul(x, inputs.aggregation_weights[0], out=out) for x, out in zip(models[0], memory, strict=True)]
        for model, a in zip(models[1:], inputs.aggregation_weights[1:], strict=True):
            for sums, x in zip(acc, model, strict=True):
                sums.add_(x, alpha=a)
        for sums in acc:
            sums.div_(total)
        return acc

    return Run(run, functools.partial(frameworks.weight_dict, inputs))


@peer(BATCH, "Flower aggregate", "flwr", dtypes=NUMPY_FLOATS + INTEGERS)
def flower_aggregate(inputs: Inputs) -> Run:
    """`flwr.server.strategy.aggregate.aggregate`, of Flower's older strategies."""
    aggregate = frameworks.flower("flwr.server.strategy.aggregate").aggregate
    counts = [int(a) for a in inputs.aggregation_weights]
    results = [(list(client.values()), n) for client, n in zip(inputs.clients, counts, strict=True)]
    return Run(lambda: aggregate(results), lambda arrays: dict(zip(inputs.clients[0], arrays, strict=True)))


@peer(BATCH, "Flower aggregate_arrayrecords", "flwr", dtypes=NUMPY_FLOATS)
def flower_arrayrecords(inputs: Inputs) -> Run:
    """Flower's Message API: its own function, on records that have their arrays ready.

    Reading them out of messages is left out; writing the result into a record is part of the function.
    """
    aggregate = frameworks.flower("flwr.serverapp.strategy.strategy_utils").aggregate_arrayrecords
    records = [
        SimpleNamespace(
            metric_records={"metrics": {"num-examples": a}},
            array_records={"arrays": {name: SimpleNamespace(numpy=lambda x=x: x) for name, x in client.items()}},
        )
        for client, a in zip(inputs.clients, inputs.aggregation_weights, strict=True)
    ]
    return Run(
        lambda: aggregate(records, "num-examples"),
        lambda record: {name: array.numpy() for name, array in record.items()},
    )


@peer(BATCH, "NVFlare helper", "nvflare", dtypes=NUMPY_FLOATS + INTEGERS)
def nvflare_helper(inputs: Inputs) -> Run:
    """NVFlare's `WeightedAggregationHelper` on numpy arrays."""
    return _nvflare_batch(inputs, inputs.clients)


@peer(BATCH, "NVFlare helper, torch", "nvflare", "torch", dtypes=FLOATS)
def nvflare_helper_torch(inputs: Inputs) -> Run:
    """NVFlare's `WeightedAggregationHelper` on tensors."""
    models = [dict(zip(client, frameworks.tensors(client), strict=True)) for client in inputs.clients]
    run = _nvflare_batch(inputs, models)
    return Run(run.call, lambda result: frameworks.weight_dict(inputs, list(result.values())))


@peer(BATCH, "numexpr", "numexpr", dtypes=("float32", "float64"))
def numexpr_sums(inputs: Inputs) -> Run:
    """Eight contributions per expression; the virtual machine works in tiles on several threads."""
    numexpr = frameworks.numexpr()
    shares = [inputs.dtype.type(a / sum(inputs.aggregation_weights)) for a in inputs.aggregation_weights]
    edges = [*range(0, len(shares), 8), len(shares)]
    memory = {name: np.empty_like(x) for name, x in inputs.clients[0].items()} if inputs.reuse else {}

    def run() -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name in inputs.clients[0]:
            for first, end in pairwise(edges):
                names: dict[str, Any] = {f"x{k}": inputs.clients[k][name] for k in range(first, end)}
                names |= {f"a{k}": shares[k] for k in range(first, end)}
                terms = [f"a{k}*x{k}" for k in range(first, end)]
                if first:
                    names["acc"] = result[name]
                    terms.insert(0, "acc")
                out = memory.get(name, result.get(name))
                result[name] = numexpr.evaluate("+".join(terms), names, {}, out=out)
        return result

    return Run(run)


@peer(BATCH, "numba", "numba", dtypes=("float32", "float64", *INTEGERS))
def numba_loop(inputs: Inputs) -> Run:
    """A compiled loop over tiles on several threads, with sums in float64: what one would write by hand."""
    frameworks.numba()
    mean = _compiled()
    a = np.array(inputs.aggregation_weights)
    columns = {name: tuple(c[name].reshape(-1) for c in inputs.clients) for name in inputs.clients[0]}
    memory = {name: np.empty_like(x) for name, x in inputs.clients[0].items()} if inputs.reuse else None

    def run() -> dict[str, Array]:
        result = memory or {name: np.empty_like(x) for name, x in inputs.clients[0].items()}
        for name, column in columns.items():
            mean(column, a, a.sum(), result[name].reshape(-1))
        return result

    return Run(run)


@functools.cache
def _compiled() -> Any:
    numba = frameworks.numba()

    @numba.njit(parallel=True)  # type: ignore[untyped-decorator]
    def mean(arrays: Any, a: Any, total: float, out: Any) -> None:
        tile = 4096
        for t in numba.prange((out.size + tile - 1) // tile):
            start = t * tile
            size = min(tile, out.size - start)
            acc = np.zeros(size)
            for k in range(len(arrays)):
                x = arrays[k]
                for i in range(size):
                    acc[i] += a[k] * x[start + i]
            for i in range(size):
                out[start + i] = acc[i] / total

    return mean


def _nvflare_batch(inputs: Inputs, models: list[Any]) -> Run:
    helper = frameworks.nvflare_helper()

    def run() -> Any:
        for k, (model, a) in enumerate(zip(models, inputs.aggregation_weights, strict=True)):
            helper.add(model, a, f"site-{k}", 0)
        return helper.get_result()

    return Run(run)
