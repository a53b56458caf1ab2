"""Other ways to add contributions as they come in, each a small function that makes a `Run`: one pass over all of them.

What holds for `peers` holds here. The first pass makes the sums; nobody's is timed.
"""

from collections.abc import Callable
from typing import Any

from fed_learn.benchmark import frameworks
from fed_learn.benchmark.inputs import Inputs
from fed_learn.benchmark.peers import FLOATS, NUMPY_FLOATS, peer
from fed_learn.benchmark.sides import Run, Side

STREAM: dict[str, Side] = {}
"""Name → peer that adds contributions as they come in."""


@peer(STREAM, "numpy running sum")
def running_sum(inputs: Inputs) -> Run:
    """What NVFlare does to numpy arrays: a scaled copy, and a new sum, per contribution and array."""
    acc: dict[str, Any] = {}
    total = 0.0

    def run() -> None:
        nonlocal total
        for client, a in zip(inputs.clients, inputs.aggregation_weights, strict=True):
            for name, x in client.items():
                acc[name] = acc[name] + x * a if name in acc else x * a
            total += a

    return Run(run, lambda _: {name: sums * (1 / total) for name, sums in acc.items()})


@peer(STREAM, "torch add_", "torch", dtypes=FLOATS)
def torch_add(inputs: Inputs) -> Run:
    """`add_(alpha=)` per tensor into float32 sums."""

    def add(acc: list[Any], model: list[Any], a: float) -> None:
        for sums, x in zip(acc, model, strict=True):
            sums.add_(x, alpha=a)

    return _torch_stream(inputs, add)


@peer(STREAM, "torch._foreach_add_", "torch", dtypes=FLOATS)
def torch_foreach(inputs: Inputs) -> Run:
    """`_foreach_add_` of the whole model into float32 sums."""
    torch = frameworks.torch()
    return _torch_stream(inputs, lambda acc, model, a: torch._foreach_add_(acc, model, alpha=a))


@peer(STREAM, "NVFlare helper", "nvflare", dtypes=NUMPY_FLOATS)
def nvflare_helper(inputs: Inputs) -> Run:
    """NVFlare's `WeightedAggregationHelper.add` of numpy arrays."""
    return _nvflare_stream(inputs, inputs.clients)


@peer(STREAM, "NVFlare helper, torch", "nvflare", "torch", dtypes=FLOATS)
def nvflare_helper_torch(inputs: Inputs) -> Run:
    """NVFlare's `WeightedAggregationHelper.add` of tensors."""
    models = [dict(zip(client, frameworks.tensors(client), strict=True)) for client in inputs.clients]
    run = _nvflare_stream(inputs, models)
    return Run(run.call, lambda helper: frameworks.weight_dict(inputs, list(helper.get_result().values())))


def _torch_stream(inputs: Inputs, add: Callable[[list[Any], list[Any], float], object]) -> Run:
    torch = frameworks.torch()
    models = [frameworks.tensors(client) for client in inputs.clients]
    acc = [torch.zeros(tensor.shape, dtype=torch.float32) for tensor in models[0]]
    total = 0.0

    def run() -> None:
        nonlocal total
        for model, a in zip(models, inputs.aggregation_weights, strict=True):
            add(acc, model, a)
            total += a

    return Run(run, lambda _: frameworks.weight_dict(inputs, [sums / total for sums in acc]))


def _nvflare_stream(inputs: Inputs, models: list[Any]) -> Run:
    helper = frameworks.nvflare_helper()

    def run() -> Any:
        for k, (model, a) in enumerate(zip(models, inputs.aggregation_weights, strict=True)):
            helper.add(model, a, f"site-{k}", 0)
        return helper

    return Run(run, lambda done: dict(done.get_result()))
