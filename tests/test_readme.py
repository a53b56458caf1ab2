"""Every command and snippet of the README runs, and says what the README says."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fed_learn import EventType

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def execute(code: str, names: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
    return printed.getvalue()


INSTALL_AND_RUN, TRY, TEST, *OTHER_COMMANDS = blocks("sh")
AVERAGE, REFUSE, TORCH, KERAS, ALIGN, JOB, VALIDATE, WEIGHTS, FLOWER, NVFLARE, RECORD = blocks("python")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert TEST.strip() in commands
    assert "pytest" in TEST


def test_averaging_and_refusing_snippets_run() -> None:
    names: dict[str, Any] = {}
    execute(AVERAGE, names)
    assert execute(REFUSE, names) == "site-3: 'w' at index (1,): nan is not finite\n"
    assert "# site-3: 'w' at index (1,): nan is not finite" in REFUSE


def test_torch_snippet_averages_models() -> None:
    # The snippet changes the first client, so it is run with models whose values are kept aside.
    names: dict[str, Any] = {}
    *setup, average, load = TORCH.strip().splitlines()
    execute("\n".join(setup), names)
    before = [model.weight.detach().double().numpy() for model in names["clients"]]
    execute(f"{average}\n{load}", names)
    expected = (120 * before[0] + 80 * before[1] + 200 * before[2]) / 400
    loaded = names["clients"][0].state_dict()["weight"].numpy()
    assert loaded.dtype == np.float32
    assert np.abs(loaded - expected).max() < 1e-7


def test_keras_snippet_averages_models() -> None:
    # In a process of its own: TensorFlow stays loaded otherwise.
    code = KERAS + "\nprint([(a == b).all() for a, b in zip(clients[0].get_weights(), mean.values())])\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[np.True_, np.True_]", done.stderr


def test_align_snippet_averages_a_torch_and_a_keras_model_which_then_agree() -> None:
    *setup, load_one, load_other = ALIGN.strip().splitlines()
    check = """
import numpy as np
kernels = one[0].weight.detach().numpy().T.copy(), np.array(other.layers[0].kernel)
x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
outputs = lambda: (one(torch.from_numpy(x)).detach().numpy(), np.array(other(x)))
before = np.abs(np.subtract(*outputs())).max()
"""
    report = """
means = one[0].weight.detach().numpy().T, np.array(other.layers[0].kernel)
expected = (120 * kernels[0].astype(np.float64) + 80 * kernels[1]) / 200
loaded = [float(np.abs(mean - expected).max()) < 1e-7 for mean in means]
print(before > 0.01, np.abs(np.subtract(*outputs())).max() < 1e-6, loaded)
"""
    code = "\n".join(setup) + check + f"{load_one}\n{load_other}" + report
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True True [True, True]", done.stderr


def test_validating_snippet_scores_the_aggregated_model_on_the_servers_data() -> None:
    names: dict[str, Any] = {}
    printed = execute(VALIDATE, names)
    best, evaluator = names["best"], names["evaluator"]
    assert best.metric_name == "accuracy"
    assert best.metric >= 0.9
    assert f"after round {best.round + 1} {best.metric:.0%}" in printed
    # The score is that of the weights that were kept, on the validation data alone.
    weight, bias = (best.weights[name].astype(np.float64) for name in ("weight", "bias"))
    x, y = (tensor.double().numpy() for tensor in evaluator.data.tensors)
    assert best.metric == pytest.approx(((x @ weight.T + bias).argmax(axis=1) == y).mean())


def test_job_snippet_learns_the_mean() -> None:
    names: dict[str, Any] = {}
    assert "best after" in execute(JOB, names)
    # Means 1.5 and 3.5 of 4 and 8 numbers, by examples.
    assert names["result"].weights["mean"][0] == pytest.approx((4 * 1.5 + 8 * 3.5) / 12, abs=1e-6)


def test_snippet_of_policies_and_adapters_holds() -> None:
    names: dict[str, Any] = {}
    execute(WEIGHTS, names)
    assert np.linalg.matrix_rank(names["product"]["q.lora_B.weight"]) == 1


def test_flower_snippet_makes_a_strategy_that_runs_a_job() -> None:
    # In a process of its own: Flower stays loaded otherwise.
    check = """
import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from fed_learn.integrations.flower import LocalGrid, to_record, to_weights

def client(message, context):
    if message.metadata.message_type == "evaluate":
        metrics = MetricRecord({"num-examples": 1, "accuracy": float(to_weights(message.content["arrays"])["w"][0])})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)
    weights = {"w": to_weights(message.content["arrays"])["w"] + 0.25}
    metrics = MetricRecord({"num-examples": 10})
    return Message(RecordDict({"arrays": to_record(weights), "metrics": metrics}), reply_to=message)

result = strategy.start(LocalGrid(client, 3), to_record({"w": np.zeros(1, np.float32)}), num_rounds=2)
print(result.job.best.round, result.job.best.metric)
"""
    done = subprocess.run([sys.executable, "-c", FLOWER + check], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["2 0.5"], done.stderr


def test_nvflare_snippet_makes_a_job_with_our_components(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text("")
    code = NVFLARE + "\nrecipe.export('job')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (config,) = tmp_path.rglob("config_fed_server.json")
    text = config.read_text()
    for name in ("WeightedAverageAggregator", "HandlerBridge", "ModelSelectionHandler", "FinalValidation"):
        assert f".{name}" in text


def test_recording_handler_prints_the_events_of_the_design() -> None:
    lines = [line.split() for line in execute(RECORD, {}).splitlines()]
    server = [(event, *rest) for side, event, *rest in lines if side == "server:"]
    sites = ("site-1", "site-2")

    def each(event: EventType) -> list[tuple[str, ...]]:
        return [(str(event), site) for site in sites]

    one_round = [
        (EventType.START_ROUND,),
        *each(EventType.SEND_MODEL),
        *each(EventType.RECEIVE_CONTRIBUTION),
        (EventType.BEFORE_AGGREGATION,),
        (EventType.END_AGGREGATION,),
        (EventType.END_ROUND,),
    ]
    assert server == [
        (EventType.STARTUP,),
        *each(EventType.CLIENT_REGISTER),
        *one_round,
        *one_round,
        *each(EventType.SEND_MODEL),
        *each(EventType.RECEIVE_VALIDATION_RESULTS),
        *each(EventType.RECEIVE_VALIDATION_RESULTS),
        *each(EventType.RECEIVE_VALIDATION_RESULTS),
        *each(EventType.CLIENT_QUIT),
        (EventType.SHUTDOWN,),
    ]
    for site in sites:
        assert [event for side, event, *_ in lines if side == f"{site}:"] == [
            EventType.STARTUP,
            *[EventType.GET_MODEL, EventType.RECEIVE_MODEL] * 2,
            EventType.SUBMIT_LOCAL_BEST_MODEL,
            EventType.SEND_BEST_MODEL,
            *[EventType.RECEIVE_VALIDATION_MODEL, EventType.SEND_VALIDATION_RESULTS] * 3,
            EventType.SHUTDOWN,
        ]


def test_the_configuration_of_the_readme_works(tmp_path: Path) -> None:
    (config,) = blocks("json")
    assert json.loads(config)["num_rounds"] == 30
    (tmp_path / "config.json").write_text(config)
    command = [str(Path(sys.executable).parent / "fed-learn"), "simulate", "--config", "config.json", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["best"]["test_accuracy"] > 0.9


@pytest.mark.parametrize("block", [TRY, *OTHER_COMMANDS])
def test_commands_of_the_readme_run_one_after_the_other(block: str, tmp_path: Path) -> None:
    for line in block.splitlines():
        run_in(tmp_path, line)


def run_in(tmp_path: Path, line: str) -> None:
    program, *arguments = line.split()
    arguments = [str(ROOT / argument) if (ROOT / argument).is_file() else argument for argument in arguments]
    if program == "python":
        command = [sys.executable, *arguments]
    else:
        command = [str(Path(sys.executable).parent / program), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
