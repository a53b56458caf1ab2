"""The average of ten adapters of rank 16, beside PEFT's own and a dense decomposition, of a layer of 4096×4096.

    OMP_NUM_THREADS=2 pytest benchmarks/test_lora.py --full

Sides are checked before they are timed, against the dense decomposition, which is taken once: it takes a minute. Ours
is timed before and after each of the others, and the median of its times counts. Without `--full` the layer is of
512×512, where the others are nearer, and nothing is held to a time. The threads of numpy's BLAS wait for one another in
a loop: where other processes want the processors, give all sides one thread, or what takes milliseconds takes seconds.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fed_learn as fl

CLIENTS, RANK = 10, 16


def timed(made: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = made()
    return time.perf_counter() - start, result


def adapters_of(size: int) -> list[dict[str, Any]]:
    """Adapters that have something in common, as clients of one task have, in float32."""
    random = np.random.default_rng(0)
    common = random.normal(size=(RANK, size)), random.normal(size=(size, RANK))
    return [
        {
            f"base_model.model.q.lora_{half}.weight": (one + 0.5 * random.normal(size=one.shape)).astype(np.float32)
            for half, one in zip("AB", common, strict=True)
        }
        for _ in range(CLIENTS)
    ]


def peft_model(adapters: list[dict[str, Any]], size: int) -> Any:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q"])
    model = peft.get_peft_model(torch.nn.ModuleDict({"q": torch.nn.Linear(size, size, bias=False)}), config, "0")
    for i, adapter in enumerate(adapters):
        if i:
            model.add_adapter(str(i), config)
        tensors = {name: torch.tensor(array) for name, array in adapter.items()}
        peft.set_peft_model_state_dict(model, tensors, str(i))
    return model


@pytest.mark.filterwarnings("default")
def test_averaging_adapters(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    full = request.config.getoption("--full")
    size = 4096 if full else 512
    adapters = adapters_of(size)
    a, b = (f"base_model.model.q.lora_{half}.weight" for half in "AB")
    model = peft_model(adapters, size)

    def ours() -> Any:
        return fl.lora.average(adapters).weights

    def peft() -> Any:
        names = [str(i) for i in range(CLIENTS)]
        model.add_weighted_adapter(names, [1 / CLIENTS] * CLIENTS, "mean", combination_type="svd", svd_rank=RANK)
        layer = model.base_model.model["q"]
        return {a: layer.lora_A["mean"].weight.detach().numpy(), b: layer.lora_B["mean"].weight.detach().numpy()}

    def dense() -> Any:
        mean = sum(one[b].astype(np.float64) @ one[a].astype(np.float64) for one in adapters) / CLIENTS
        u, s, vt = np.linalg.svd(mean)
        return {a: np.sqrt(s[:RANK, None]) * vt[:RANK], b: u[:, :RANK] * np.sqrt(s[:RANK])}

    ours()
    taken: list[float] = []
    others: dict[str, float] = {}
    products: dict[str, Any] = {}
    for name, side in (("PEFT's svd", peft), ("dense numpy", dense)):
        taken += [timed(ours)[0] for _ in range(5)]
        others[name], made = timed(side)
        products[name] = np.asarray(made[b], np.float64) @ np.asarray(made[a], np.float64)
    more = [timed(ours) for _ in range(5)]
    found = more[-1][1][b].astype(np.float64) @ more[-1][1][a].astype(np.float64)
    median = statistics.median(taken + [seconds for seconds, _ in more])
    best = products["dense numpy"]
    errors = {name: np.linalg.norm(product - best) / np.linalg.norm(best) for name, product in products.items()}
    assert np.linalg.norm(found - best) / np.linalg.norm(best) < 1e-6
    assert errors["PEFT's svd"] < 1e-4
    with capsys.disabled():
        print(f"\n{CLIENTS} adapters of rank {RANK}, {size}×{size}: ours {median * 1e3:.1f} ms")
        for name, seconds in others.items():
            print(f"{name}: {seconds:.2f} s, {seconds / median:.0f} × ours; relative to dense {errors[name]:.1e}")
        print(f"ours relative to dense: {np.linalg.norm(found - best) / np.linalg.norm(best):.1e}")
    assert not full or all(seconds > 100 * median for seconds in others.values())
