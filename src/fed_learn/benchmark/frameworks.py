"""The frameworks of peers: imported when a peer asks for them, and weight dicts as their tensors and back.

They use as many threads as the kernels may.
"""

import importlib
import os
from typing import Any

import numpy as np

from fed_learn import kernels
from fed_learn.benchmark.inputs import Inputs
from fed_learn.weights import BFLOAT16, Array


def torch() -> Any:
    """The module `torch`."""
    module = importlib.import_module("torch")
    module.set_num_threads(kernels.get_num_threads())
    return module


def numexpr() -> Any:
    """The module `numexpr`."""
    module = importlib.import_module("numexpr")
    module.set_num_threads(min(kernels.get_num_threads(), module.MAX_THREADS))
    return module


def numba() -> Any:
    """The module `numba`."""
    module = importlib.import_module("numba")
    module.set_num_threads(min(kernels.get_num_threads(), module.config.NUMBA_NUM_THREADS))
    return module


def flower(module: str) -> Any:
    """A module of Flower."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # a benchmark has nothing to report to anybody
    return importlib.import_module(module)


def nvflare_helper() -> Any:
    """A new `WeightedAggregationHelper` of NVFlare."""
    return importlib.import_module(
        "nvflare.app_common.aggregators.weighted_aggregation_helper"
    ).WeightedAggregationHelper()


def tensors(client: dict[str, Array]) -> list[Any]:
    """A weight dict as tensors of torch that share its memory."""
    module = torch()
    if next(iter(client.values())).dtype == BFLOAT16:  # which torch.from_numpy does not know
        return [module.from_numpy(array.view(np.int16)).view(module.bfloat16) for array in client.values()]
    return [module.from_numpy(array) for array in client.values()]


def weight_dict(inputs: Inputs, result: list[Any]) -> dict[str, Array]:
    """Tensors of torch, in the order of the inputs, as a weight dict that shares their memory."""
    module = torch()
    return {
        name: t.view(module.int16).numpy().view(BFLOAT16) if t.dtype == module.bfloat16 else t.numpy()
        for name, t in zip(inputs.clients[0], result, strict=True)
    }
