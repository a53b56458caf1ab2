"""Flower as it is deployed: SuperLink, SuperNodes and apps as processes, on examples/flower; and its simulation.

The runs are made once and shared by the tests.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower_network import environment, network

import fed_learn as fl

APP = Path(__file__).parents[1] / "examples" / "flower"
SIMULATION = Path(__file__).parent / "flower_apps" / "simulation.py"
RUNS: dict[str, dict[str, str | int]] = {
    "ours": {"framework": "torch", "strategy": "fed_learn", "num-server-rounds": 3},
    "Flower's": {"framework": "torch", "strategy": "flower", "num-server-rounds": 3},
    "Keras": {"framework": "keras", "strategy": "fed_learn", "num-server-rounds": 2},
    "Flower's, Keras": {"framework": "keras", "strategy": "flower", "num-server-rounds": 2},
}
AT_A_TIME = 2
"""Runs: Flower waits more than it works."""
E = fl.EventType
Run = Callable[[str], Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Gives the folder that a run wrote to."""
    home = tmp_path_factory.mktemp("flower")
    with network(home, 3) as processes, ThreadPoolExecutor(AT_A_TIME) as pool:

        def made(name: str) -> Path:
            output = home / name.replace("'", "").lower()
            printed = processes.run(APP, {**RUNS[name], "min-nodes": 3, "output": str(output)})
            logs = processes.logs()
            assert (output / "final.npz").exists(), printed + logs
            assert "Traceback" not in printed + logs
            return output

        runs = {name: pool.submit(made, name) for name in RUNS}
        yield lambda name: runs[name].result()


def weights(path: Path) -> dict[str, Any]:
    with np.load(path) as stored:
        return dict(stored)


def log(output: Path) -> Any:
    return json.loads((output / "log.json").read_text())


@pytest.mark.parametrize(("name", "stock"), [("ours", "Flower's"), ("Keras", "Flower's, Keras")])
def test_the_final_model_is_that_of_flowers_fedavg_to_the_rounding_of_float32(run: Run, name: str, stock: str) -> None:
    ours, theirs = weights(run(name) / "final.npz"), weights(run(stock) / "final.npz")
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype == np.float32
        np.testing.assert_allclose(array, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ours", "Keras"])
def test_all_nodes_take_part_in_all_rounds_by_their_partitions(run: Run, name: str) -> None:
    reports = log(run(name))["reports"]
    assert [report["round"] for report in reports] == list(range(int(RUNS[name]["num-server-rounds"])))
    for report in reports:
        assert report["accepted"] == ["partition-0", "partition-1", "partition-2"]
        assert report["rejected"] == report["quits"] == report["handler_failures"] == []


@pytest.mark.parametrize("name", ["ours", "Keras"])
def test_handlers_see_every_event(run: Run, name: str) -> None:
    events = [event for event, _ in log(run(name))["events"]]
    first = [E.START_ROUND, *[E.SEND_MODEL] * 3, *[E.CLIENT_REGISTER, E.RECEIVE_CONTRIBUTION] * 3]
    later = [E.START_ROUND, *[E.SEND_MODEL] * 3, *[E.RECEIVE_CONTRIBUTION] * 3]
    end = [E.BEFORE_AGGREGATION, E.END_AGGREGATION, E.END_ROUND]
    rounds = [*first, *end, *[*later, *end] * (int(RUNS[name]["num-server-rounds"]) - 1)]
    final = [*[E.SEND_MODEL] * 3, *[E.RECEIVE_VALIDATION_RESULTS] * 3, *[E.CLIENT_QUIT] * 3]
    assert events == [E.STARTUP, *rounds, *final, E.SHUTDOWN]


@pytest.mark.parametrize("name", ["ours", "Keras"])
def test_the_best_model_of_the_servers_validation_is_kept(run: Run, name: str) -> None:
    output = run(name)
    content = log(output)
    scores = [report["metrics"]["server_validation"] for report in content["reports"]]
    best = content["best"]
    assert best["metric"] == max(scores) > 0.5
    assert best["round"] == scores.index(max(scores))
    kept, final = weights(output / "best.npz"), weights(output / "final.npz")
    assert all(np.array_equal(kept[n], final[n]) for n in kept) == (best["round"] == len(scores) - 1)


@pytest.mark.parametrize("name", ["ours", "Keras"])
def test_the_nodes_score_what_they_receive_and_the_final_model(run: Run, name: str) -> None:
    content = log(run(name))
    received = [report["metrics"]["selection"] for report in content["reports"]]
    final = [metrics["initial_validation_metric"] for metrics in content["final"].values()]
    assert sorted(content["final"]) == ["partition-0", "partition-1", "partition-2"]
    assert received[0] < received[-1] < content["metrics"]["selection"]
    assert min(final) <= content["metrics"]["selection"] <= max(final)


def test_flowers_simulation_runs_it_too(tmp_path: Path) -> None:
    command = [sys.executable, str(SIMULATION), "--nodes", "6", "--stream"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["same bits"] is True  # exact sums: whatever the order of arrival
    assert printed["dtypes"] == ["float32", "int64"]
    first, second = printed["reports"]
    assert first["accepted"] == [f"partition-{k}" for k in range(6)]
    assert second["accepted"] == [f"partition-{k}" for k in (0, 1, 2, 5)]
    assert [(failure["contributor"], failure["cause"]) for failure in second["rejected"]] == [
        ("partition-4", "NonFiniteError")
    ]
    assert [failure["contributor"] for failure in second["quits"]] == ["partition-3"]
    assert "out of memory" in second["quits"][0]["message"]
    assert (printed["best round"], printed["final results"]) == (2, 5)  # node 4 is there, though refused
    assert done.stderr.count("Traceback") == 1  # of node 3: the final model is scored without an evaluation of the app
