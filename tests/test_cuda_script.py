"""The script that is to prove on a GPU what is said of GPUs runs to its end, with or without one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fed_learn as fl

ROOT = Path(__file__).parents[1]
TRITON = os.environ.get("FED_LEARN_TRITON")
"""A folder with Triton for the script's process alone: where TensorFlow has been imported, Triton cannot be."""


@pytest.mark.skipif("native" not in fl.kernels.available(), reason="the native kernel was not built")
def test_the_script_finds_the_same_bits_few_launches_and_few_waits(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    environment = dict(os.environ)
    if TRITON is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), TRITON]))
    command = [sys.executable, "benchmarks/cuda.py", "--quick", "--json", str(result)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:], done.stderr
    facts = json.loads(result.read_text(encoding="utf-8"))
    place = facts["device"] or "no GPU: nothing of this has run on one"
    assert done.stdout.splitlines()[-1] == f"passed (quick, {place})", done.stdout
    assert (done.returncode, facts["passed"], facts["wrong"], facts["left_out"]) == (0, True, [], [])
    for tests in facts["tests"].values():
        assert (tests["failed"], tests["run"] > 0) == ([], True)

    places = {"unfused", "fused"} if facts["device"] else {"unfused, CPU", "unfused, pretended device"}
    if not facts["device"] and (TRITON is not None or find_spec("triton") is not None):
        places.add("fused, interpreted")
    assert set(facts["bits"]) == places
    for bits in facts["bits"].values():
        assert bits["differing"] == 0, bits["examples"]
        assert bits["compared"] > 3_000_000
        assert min(bits["refused"], bits["calls"]) > 100
    counted = facts["counts"]["unfused" if facts["device"] else "unfused, pretended device"]
    assert 0 < counted["launches"] <= 400
    assert 0 < counted["synchronisations"] <= 3
    assert counted["differing"] == 0
    assert ("times" in facts) == bool(facts["device"])
