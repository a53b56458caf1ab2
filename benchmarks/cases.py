"""What is benchmarked: models by their shapes, and the ways of averaging them."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

import fed_learn as fl

Weights = dict[str, npt.NDArray[np.float32]]
Side = Callable[[list[Weights], list[float]], object]


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ResNet-50's parameters and running statistics: 267 float32 tensors, 25.6 M elements."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv_bn(name: str, out: int, into: int, size: int) -> None:
        shapes[f"{name}.conv.weight"] = (out, into, size, size)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (out,)

    conv_bn("stem", 64, 3, 7)
    channels = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], 1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            conv_bn(f"{prefix}.1", width, channels, 1)
            conv_bn(f"{prefix}.2", width, width, 3)
            conv_bn(f"{prefix}.3", width * 4, width, 1)
            if block == 0:
                conv_bn(f"{prefix}.downsample", width * 4, channels, 1)
            channels = width * 4
    shapes["fc.weight"], shapes["fc.bias"] = (1000, 2048), (1000,)
    return shapes


def make_clients(shapes: dict[str, tuple[int, ...]], count: int, seed: int = 0) -> tuple[list[Weights], list[float]]:
    """Random weights for some clients, and their aggregation weights."""
    rng = np.random.default_rng(seed)
    clients: list[Weights] = [
        {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()} for _ in range(count)
    ]
    return clients, rng.integers(100, 1000, count).astype(float).tolist()


def native(clients: list[Weights], weights: list[float]) -> object:
    """Ours, compiled."""
    return fl.weighted_average(clients, weights, kernel="native")


def in_numpy(clients: list[Weights], weights: list[float]) -> object:
    """Ours, in numpy."""
    return fl.weighted_average(clients, weights, kernel="numpy")


def running_sum(clients: list[Weights], weights: list[float]) -> object:
    """What most loops do: float32 running sums of w·x, divided at the end."""
    total = sum(weights)
    result = {}
    for name in clients[0]:
        acc = clients[0][name] * np.float32(weights[0])
        for client, weight in zip(clients[1:], weights[1:], strict=True):
            acc += client[name] * np.float32(weight)
        result[name] = acc / np.float32(total)
    return result


def numpy_average(clients: list[Weights], weights: list[float]) -> object:
    """numpy.average over a stacked copy."""
    return {name: np.average(np.stack([c[name] for c in clients]), axis=0, weights=weights) for name in clients[0]}


def torch_foreach(clients: list[Weights], weights: list[float]) -> object:
    """Torch's fused list operations, float32 running sums."""
    import torch

    total = sum(weights)
    acc = [torch.zeros(array.shape) for array in clients[0].values()]
    for client, weight in zip(clients, weights, strict=True):
        torch._foreach_add_(acc, [torch.from_numpy(array) for array in client.values()], alpha=weight / total)
    return {name: tensor.numpy() for name, tensor in zip(clients[0], acc, strict=True)}


SIDES: dict[str, Side] = {
    "fed_learn native": native,
    "fed_learn numpy": in_numpy,
    "numpy running sum": running_sum,
    "numpy.average": numpy_average,
    "torch._foreach_add_": torch_foreach,
}


def read(clients: list[Weights], weights: list[float]) -> object:
    """The limit: reading the same bytes once, on one thread."""
    return sum(int(np.bitwise_xor.reduce(array.reshape(-1).view(np.uint32))) for c in clients for array in c.values())


def worst_error(result: object, clients: list[Weights], weights: list[float]) -> float:
    """Largest error of a float32 result in units of the last place of Σ|a·x|/Σa, against sums in longdouble."""
    assert isinstance(result, dict)
    worst = 0.0
    for name in clients[0]:
        # Every 16th element: a reference in longdouble takes longer than all that it judges.
        columns = [client[name].reshape(-1)[::16].astype(np.longdouble) for client in clients]
        exact = sum(np.longdouble(w) * x for w, x in zip(weights, columns, strict=True)) / np.longdouble(sum(weights))
        scale = sum(np.longdouble(w) * np.abs(x) for w, x in zip(weights, columns, strict=True)) / sum(weights)
        errors = np.abs(result[name].reshape(-1)[::16] - exact) / np.spacing(np.float32(scale))
        worst = max(worst, float(errors.max()))
    return worst
