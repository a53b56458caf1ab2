"""The examples run as their users run them, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}


def run(script: Path, folder: Path) -> str:
    """What a script prints, run in a folder of its own."""
    done = subprocess.run([sys.executable, script], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("script", "saved"), [("torch_loop.py", "best.pt"), ("keras_loop.py", "best.weights.h5")])
def test_a_plain_loop_keeps_its_best_model(script: str, saved: str, tmp_path: Path) -> None:
    *rounds, best = run(EXAMPLES / script, tmp_path).splitlines()
    accuracies = [line.removeprefix(f"round {i}: accuracy ") for i, line in enumerate(rounds)]
    assert len(accuracies) == 10
    found = re.fullmatch(rf"{saved}: round (\d), accuracy (.*)", best)
    assert found is not None
    assert found[2] == accuracies[int(found[1])] == max(accuracies)
    assert float(found[2]) > 0.93
    assert (tmp_path / saved).stat().st_size > 1000


@pytest.mark.parametrize("script", ["torch_loop.py", "keras_loop.py"])
def test_a_plain_loop_is_shorter_than_forty_lines(script: str) -> None:
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) < 40
