"""What durable state and a ledger cost a round, beside the round's aggregation, a plain file and a read of the bytes.

    pytest benchmarks/test_durable.py -s

Ten clients, models with the shapes of a ResNet-50, float32. What was written is read back and compared first. Times are
medians of turns in one process; bytes are those of the files.
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import fed_learn as fl
from fed_learn.benchmark.inputs import Inputs, make_inputs, resnet50
from fed_learn.durable import StateStore, digest
from fed_learn.weights import FrozenWeights

CLIENTS, TURNS = 10, 5


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(resnet50(), np.float32, CLIENTS)


def median(run: Callable[[], Any]) -> float:
    taken = []
    for _ in range(TURNS):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def flushed(path: Path, weights: dict[str, Any]) -> None:
    save_file(weights, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def bare_read(inputs: Inputs) -> int:
    return sum(int(array.view(np.uint32).max()) for weights in inputs.clients for array in weights.values())


def test_what_a_round_pays_for_its_state_and_its_ledger(inputs: Inputs, tmp_path: Path) -> None:
    models = [FrozenWeights(weights) for weights in inputs.clients]
    size = sum(array.nbytes for array in models[0].values())
    numbers = iter(range(10**6))
    with StateStore(tmp_path / "state") as store:

        def save(best: FrozenWeights | None = None) -> None:
            number = next(numbers)
            model = models[number % CLIENTS]
            store.save(number, {"model": model, "best": model if best is None else best})

        for _ in range(3):
            save()
        number, value = store.load()
        assert all((value["model"][name] == array).all() for name, array in models[number % CLIENTS].items())
        times = {
            "aggregation of ten clients": median(lambda: fl.weighted_average(inputs.clients)),
            "bare read of ten models": median(lambda: bare_read(inputs)),
            "digests of ten models (ledger)": median(lambda: [digest(weights) for weights in models]),
            "safetensors.save_file of a model": median(lambda: save_file(dict(models[0]), tmp_path / "plain")),
            "the same, flushed": median(lambda: flushed(tmp_path / "plain", dict(models[0]))),
            "state, with the model as the best one": median(save),
            "state, with the best one as it was": median(lambda: save(models[0])),
        }
        written = sum(path.stat().st_size for path in store.folder.iterdir())
    print(f"\na model has {size / 1e6:.1f} MB; the folder, two states, {written / 1e6:.1f} MB")
    for what, seconds in times.items():
        print(f"{what:<42}{seconds * 1e3:>9.1f} ms")
    plain = (tmp_path / "plain").stat().st_size
    assert written < 3.1 * plain, "two global models, one of them the best, and a little text"
    assert times["digests of ten models (ledger)"] < 5 * times["bare read of ten models"]
    assert times["state, with the model as the best one"] < 3 * times["the same, flushed"]
