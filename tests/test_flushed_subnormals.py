"""Processes in which torch flushes subnormal numbers: sums are right, or they are refused."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import KERNELS

import fed_learn as fl

DENORMALS_OFF = """
import sys
import numpy as np
import torch
import fed_learn as fl

tiny = np.arange(1, 33, dtype=np.uint32).view(np.float32)
assert torch.set_flush_denormal(True)
try:
    result = fl.weighted_average([{"w": tiny}, {"w": tiny}], [1, 3], exact=True)["w"]
except fl.FedLearnError:
    result = tiny  # saying that it cannot keep its promise is keeping it
finally:
    torch.set_flush_denormal(False)
np.save(sys.argv[1], result)
"""


def test_exact_sums_are_not_silently_flushed_in_a_process_that_switched_denormals_off(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DENORMALS_OFF, str(tmp_path / "mean.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert np.load(tmp_path / "mean.npy").view(np.uint32).tolist() == list(range(1, 33))


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "native"])
def test_an_accumulator_goes_on_after_the_environment_was_refused(kernel: str) -> None:
    accumulator, other = fl.Accumulator(kernel=kernel), fl.Accumulator(kernel=kernel)
    accumulator.add({"w": np.ones(1)}, 1, "a")
    accumulator.add({"w": np.full(1, 3.0)}, 1, "b", borrow=True)
    other.add({"w": np.full(1, 5.0)}, 1, "c")
    calls: list[Callable[[], object]] = [
        lambda: accumulator.add({"w": np.full(1, 7.0)}, 1, "d"),
        accumulator.flush,
        accumulator.result,
        lambda: accumulator.merge(other),
    ]
    for call in calls:
        torch.set_flush_denormal(True)
        try:
            with pytest.raises(fl.FloatingPointEnvironmentError):
                call()
        finally:
            torch.set_flush_denormal(False)
    accumulator.merge(other)
    assert accumulator.result()["w"].tolist() == [3.0]


def test_threads_of_torch_that_flush_subnormals_are_noticed() -> None:
    code = """
import numpy as np, torch, fed_learn as fl
torch.set_num_threads(2)
torch.set_flush_denormal(True)
torch.ones(10_000_000).mul_(2.0)  # makes the threads
torch.set_flush_denormal(False)
x = np.full(4_000_000, 1e-40, np.float32)
try:
    mean = fl.weighted_average([{"w": x}, {"w": x}], kernel="torch")["w"]
except fl.FloatingPointEnvironmentError:
    print("noticed")
else:
    print("right" if (mean == x).all() else "wrong")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("noticed", "right")
