"""The examples run as their users run them, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = {
    **os.environ,
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run(script: Path, folder: Path, *arguments: str) -> str:
    """What a script prints, run in a folder of its own."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("script", "saved"), [("torch_loop.py", "best.pt"), ("keras_loop.py", "best.weights.h5")])
def test_a_plain_loop_keeps_its_best_model(script: str, saved: str, tmp_path: Path) -> None:
    *rounds, best = run(EXAMPLES / script, tmp_path).splitlines()
    accuracies = [line.removeprefix(f"round {i}: accuracy ") for i, line in enumerate(rounds, start=1)]
    assert len(accuracies) == 10
    found = re.fullmatch(rf"{saved}: round (\d), accuracy (.*)", best)
    assert found is not None
    assert found[2] == accuracies[int(found[1]) - 1] == max(accuracies)
    assert float(found[2]) > 0.93
    assert (tmp_path / saved).stat().st_size > 1000


@pytest.mark.parametrize("script", ["torch_loop.py", "keras_loop.py"])
def test_a_plain_loop_is_shorter_than_forty_lines(script: str) -> None:
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) < 40


def test_a_qlora_job_learns_and_leaves_its_base_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    *lines, last = run(EXAMPLES / "qlora.py", tmp_path).splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    assert last.startswith("the base is the same, byte for byte; a client sends 69,632 of ")


def test_the_plain_mean_of_factors_is_further_off_than_the_best_factors(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    head, rule, *rows = run(EXAMPLES / "lora_heterogeneity.py", tmp_path, "--quick").splitlines()
    assert head.count("|") == rule.count("|") == 8
    cells = [[cell.strip(" %") for cell in row.strip("|").split("|")] for row in rows]
    assert [alpha for alpha, *_ in cells] == ["100", "0.1"]
    for _, *numbers in cells:
        same, own, best, *accuracies = map(float, numbers)
        assert 0 < best < same < own < 100
        assert min(accuracies) > 75


def test_the_same_handlers_decide_the_same_in_three_stacks(tmp_path: Path) -> None:
    # The script fails if they do not: rounds, scores, refusals, and the bits of models.
    printed = run(EXAMPLES / "same_handlers" / "run.py", tmp_path)
    table = printed[printed.index("what the handlers decided") :].splitlines()[1:]
    assert [line.split("  ")[0].strip() for line in table] == [*(f"round {n}" for n in range(1, 5)), "the end"]
    assert all(line.rstrip().endswith("fed_learn, Flower, NVFlare") for line in table)
    assert ["nan is not finite" in line for line in table] == [False, True, False, False, False]


def test_the_page_of_failures_is_what_the_stacks_do_now(tmp_path: Path) -> None:
    run(EXAMPLES / "failures" / "table.py", tmp_path, "--write", "failures.md")
    assert (tmp_path / "failures.md").read_text(encoding="utf-8") == (
        EXAMPLES.parent / "docs" / "failures.md"
    ).read_text(encoding="utf-8")


def test_fedavg_fedbn_and_fedper_are_compared_in_one_table(tmp_path: Path) -> None:
    printed = run(EXAMPLES / "personalization.py", tmp_path, "--seeds", "1", "--rounds", "2")
    head, *rows = [line.strip() for line in printed.splitlines()]
    assert re.split(r"  +", head) == ["test accuracy", "looks", "two digits", "Dirichlet"]
    found = {method: [float(cell) for cell in cells] for method, *cells in (re.split(r"  +", row) for row in rows)}
    assert list(found) == ["alone", "FedAvg", "FedAvg, tuned", "FedBN", "FedPer"]
    assert all(len(row) == 3 for row in found.values())
    assert found["alone"][1] > 0.8  # two digits are easily told apart
    assert found["FedPer"][1] > found["FedAvg"][1]
