"""Whole jobs in NVFlare's simulator, a process for the server and one for each client: our parts beside its own.

The jobs run once, some at a time, and the tests look at what they left behind.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest

import fed_learn as fl

pytest.importorskip("nvflare")

from nvflare.app_common.filters.exclude_vars import ExcludeVars
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.client.config import ExchangeFormat
from nvflare.fuel.utils.constants import FrameworkType
from nvflare.job_config.base_fed_job import BaseFedJob
from nvflare.job_config.defs import FilterType
from nvflare.job_config.script_runner import ScriptRunner
from nvflare_parts import Chooser, Persistor, Raiser, Recorder, initial_weights, number_of, train

from fed_learn.integrations.nvflare import WeightedAverageAggregator, WeightedAverageDXOAggregator, add_handlers

TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "examples" / "nvflare"
SITES = ("site-1", "site-2", "site-3")
CLIENTS = len(SITES)
LONGEST = 240
"""Seconds after which a job is taken to hang."""


@dataclass(frozen=True)
class Done:
    """A job that has run: its folder, its exit code, and the server's log."""

    folder: Path
    code: int
    log: str

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.events if line["event"] == event]

    def model(self, number: int) -> dict[str, np.ndarray]:
        """The global model that a round ended with."""
        with np.load(self.folder / "models" / f"{number}.npz") as file:
            return dict(file)


def new_job(folder: Path, workflow: Any, *, options: str = "", tensors: bool = False) -> BaseFedJob:
    job = BaseFedJob(name="job", min_clients=CLIENTS, key_metric="")
    job.to_server(workflow, id="controller")
    job.to_server(Persistor(str(folder / "models"), tensors), id="persistor")
    runner = ScriptRunner(
        script=str(TESTS / "nvflare_client.py"),
        script_args=options,
        framework=FrameworkType.PYTORCH if tensors else FrameworkType.NUMPY,
        server_expected_format=ExchangeFormat.PYTORCH if tensors else ExchangeFormat.NUMPY,
    )
    job.to_clients(runner)
    return job


def fedavg(rounds: int, **arguments: Any) -> FedAvg:
    return FedAvg(num_clients=CLIENTS, num_rounds=rounds, persistor_id="persistor", **arguments)


def recorder(folder: Path) -> Recorder:
    return Recorder(str(folder / "events.jsonl"))


def full(folder: Path) -> BaseFedJob:
    """A NaN in round 1, a handler that raises and is only logged, one that chooses, and one that replaces the model."""
    job = new_job(folder, fedavg(3, aggregator=WeightedAverageAggregator()), options="--bad=site-3:1:nan")
    handlers = [
        fl.ModelSelectionHandler(),
        Chooser("site-2", 2, 0),
        Raiser(fl.EventType.START_ROUND, 1),
        recorder(folder),
    ]
    add_handlers(job, handlers, on_handler_error="log")
    return job


def diff(folder: Path) -> BaseFedJob:
    """ScatterAndGather with differences, streaming and exact; a wrong shape in round 1."""
    workflow = ScatterAndGather(
        min_clients=CLIENTS,
        num_rounds=2,
        wait_time_after_min_received=0,
        persistor_id="persistor",
        shareable_generator_id="generator",
        aggregator_id="aggregator",
    )
    job = new_job(folder, workflow, options="--diff --bad=site-1:1:shape")
    job.to_server(FullModelShareableGenerator(), id="generator")
    job.to_server(WeightedAverageDXOAggregator(stream=True, exact=True), id="aggregator")
    add_handlers(job, [recorder(folder)], score_final_model=False)
    return job


def tensors(folder: Path) -> BaseFedJob:
    """Tensors that NVFlare keeps on disk until they are asked for, a bfloat16 among them."""
    workflow = fedavg(1, aggregator=WeightedAverageAggregator(stream=True), enable_tensor_disk_offload=True)
    return new_job(folder, workflow, options="--tensors", tensors=True)


def local_excluded(folder: Path) -> BaseFedJob:
    """A variable that each client has for itself: a filter of NVFlare's takes it out of what comes."""
    workflow = fedavg(2, aggregator=WeightedAverageAggregator(policies={"half": "local"}))
    job = new_job(folder, workflow, options="--own=half")
    job.to_clients(ExcludeVars(["half"]), tasks=["train", "validate"], filter_type=FilterType.TASK_DATA)
    add_handlers(job, [fl.ModelSelectionHandler(), recorder(folder)])
    return job


def local_never_sent(folder: Path) -> BaseFedJob:
    """The same, and a filter takes it out of what leaves the client as well."""
    job = local_excluded(folder)
    job.to_clients(ExcludeVars(["half"]), tasks=["train"], filter_type=FilterType.TASK_RESULT)
    return job


def handler_raises(folder: Path) -> BaseFedJob:
    """Beside NVFlare's own averaging."""
    job = new_job(folder, fedavg(2))
    add_handlers(job, [recorder(folder), Raiser(fl.EventType.END_ROUND, 0)])
    return job


def bad_raises(folder: Path) -> BaseFedJob:
    aggregator = WeightedAverageAggregator(on_bad_contribution="raise")
    return new_job(folder, fedavg(3, aggregator=aggregator), options="--bad=site-2:0:nan")


def careless(folder: Path) -> BaseFedJob:
    """Scripts that never ask whether they should only validate."""
    job = new_job(folder, fedavg(1, aggregator=WeightedAverageAggregator()), options="--careless")
    add_handlers(job, [fl.ModelSelectionHandler(), recorder(folder)])
    return job


def in_vain(folder: Path) -> BaseFedJob:
    """Everybody sends NaN in each round."""
    job = new_job(folder, fedavg(2, aggregator=WeightedAverageAggregator()), options="--bad=*:nan")
    add_handlers(job, [recorder(folder)])
    return job


def in_vain_alone(folder: Path) -> BaseFedJob:
    """The same without handlers, so that only the aggregator can say so."""
    return new_job(folder, fedavg(2, aggregator=WeightedAverageAggregator()), options="--bad=*:nan")


def simulate(make: Callable[[Path], BaseFedJob], folder: Path) -> Done:
    folder.mkdir()
    make(folder).export_job(str(folder / "exported"))
    workspace = folder / "workspace"
    command = ["-m", "nvflare.cli", "simulator", str(folder / "exported" / "job"), "-w", str(workspace)]
    code, _ = run(*command, "-n", str(CLIENTS), "-t", str(CLIENTS))
    return Done(folder, code, (workspace / "server" / "log.txt").read_text(encoding="utf-8"))


def run_example(folder: Path, *options: str) -> Done:
    folder.mkdir()
    code, printed = run(str(EXAMPLE / "job.py"), "--workspace", str(folder), *options)
    return Done(folder, code, printed)


def run(*arguments: str) -> tuple[int, str]:
    """Runs Python to its end; if that does not come, ends all processes that it started, in whatever session.

    Returns:
        The exit code and what was printed.
    """
    process = psutil.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        for one in (*process.children(recursive=True), process):
            one.kill()
        printed, _ = process.communicate()
        printed += f"\nended after {LONGEST} s"
    return process.returncode, printed


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Done]]:
    folder = tmp_path_factory.mktemp("nvflare")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        # The server and the clients find the parts of the jobs there before NVFlare's copies of them are unpacked.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(TESTS)))))
        with ThreadPoolExecutor(3) as pool:
            runs: dict[str, Future[Done]] = {
                "example": pool.submit(run_example, folder / "example"),
                "stock": pool.submit(run_example, folder / "stock", "--stock"),
            }
            made = (full, diff, tensors, handler_raises, bad_raises, careless, in_vain, in_vain_alone)
            for make in (*made, local_excluded, local_never_sent):
                runs[make.__name__] = pool.submit(simulate, make, folder / make.__name__)
    return runs


def averaged(weights: dict[str, np.ndarray], number: int, sites: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What a round should make of a global model."""
    contributions = [
        fl.Contribution(site, train(weights, site, number), 3 * number_of(site) + 1, round=number) for site in sites
    ]
    return dict(fl.weighted_average(contributions, like=weights))


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert list(one) == list(other)
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        assert array.tobytes() == other[name].tobytes(), name


def test_a_job_gives_the_bits_that_averaging_by_hand_gives(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["full"].result()
    assert done.code == 0
    # Round 0: all three, but a handler sets the new model to ones. Round 1: without the NaN. Round 2: without site-2.
    ones = {name: np.ones_like(array) for name, array in initial_weights().items()}
    assert_same(done.model(0), ones)
    second = averaged(ones, 1, ("site-1", "site-2"))
    assert_same(done.model(1), second)
    assert_same(done.model(2), averaged(second, 2, ("site-1", "site-3")))
    assert done.model(2)["count"].dtype == np.int64
    assert done.model(2)["half"].dtype == np.float16


def test_handlers_see_the_events_of_a_job_in_order(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["full"].result()
    events = [line["event"] for line in done.events]
    assert events[0] == "_startup"
    assert events[1:4] == ["_clientRegister"] * 3
    assert events[-4:] == ["_clientQuit"] * 3 + ["_shutdown"]
    for event in ("_clientRegister", "_clientQuit"):
        assert sorted(line["contributor"] for line in done.of(event)) == list(SITES)
    for number in range(3):
        own = [line for line in done.events if line["round"] == number]
        order = [line["event"] for line in own if line["event"] not in ("_sendModel", "_receiveContribution")]
        assert order == ["_startRound", "_beforeAggregation", "_endAggregation", "_endRound"]
        names = [line["event"] for line in own]
        for site in SITES:
            mine = [line["event"] for line in own if line["contributor"] == site]
            assert mine == ["_sendModel", "_receiveContribution"]
        last = max(i for i, name in enumerate(names) if name == "_receiveContribution")
        assert names.index("_startRound") < names.index("_sendModel")
        assert last < names.index("_beforeAggregation")
    final = [line["event"] for line in done.events if line["round"] == 3][:-4]
    assert sorted(final) == ["_receiveValidationResults"] * 3 + ["_sendModel"] * 3


def test_the_model_of_an_event_is_the_one_that_it_is_about(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["full"].result()
    models = [initial_weights(), *(done.model(number) for number in range(3))]
    for line in done.events:
        if line["round"] is None or line["event"] in ("_clientQuit", "_shutdown"):
            continue
        new = line["event"] in ("_endAggregation", "_endRound")
        if line["event"] == "_endAggregation" and line["round"] == 0:
            expected = averaged(models[0], 0, SITES)  # before a handler replaced it in END_ROUND
        else:
            expected = models[line["round"] + new]
        assert np.array_equal(line["w"], expected["w"].astype(float).ravel()), line["event"]


def test_bridge_and_aggregator_agree_on_contributions_and_refusals(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["full"].result()
    for number, accepted in enumerate((SITES, ("site-1", "site-2"), ("site-1", "site-3"))):
        (end,) = [line for line in done.of("_endRound") if line["round"] == number]
        report = end["report"]
        assert report["round"] == number
        assert tuple(report["accepted"]) == accepted
        assert report["total_weight"] == sum(3 * number_of(site) + 1 for site in accepted)
        assert report["kernel"] == fl.kernels.current()
        assert report["aggregation_bytes"] == len(accepted) * (48 + 10 + 8)
        assert report["absent"] == report["quits"] == []
        assert report["error"] is None
    (refused,) = [line for line in done.events if line["refusal"] and line["event"] == "_receiveContribution"]
    assert (refused["round"], refused["contributor"], refused["contribution"]) == (1, "site-3", ["site-3", 10])
    assert refused["refusal"] == "NonFiniteError: site-3: 'w' at index (1, 2): nan is not finite"
    assert refused["refusal"].partition(": ")[2] in done.log
    (end,) = [line for line in done.of("_endRound") if line["round"] == 1]
    assert [(r["contributor"], r["cause"]) for r in end["report"]["rejected"]] == [("site-3", "NonFiniteError")]


def test_the_last_model_is_scored_and_wins(jobs: dict[str, Future[Done]]) -> None:
    # In round r the mean of k·(1+r) over the sites that count is 2(1+r), but for site-3 in 1 and site-2 in 2.
    done = jobs["full"].result()
    scores = [line["report"]["metrics"]["selection"] for line in done.of("_endRound")]
    assert scores == [2.0, 3.0, 6.0]
    results = done.of("_receiveValidationResults")
    assert {line["round"] for line in results} == {3}
    assert sorted(line["contributor"] for line in results) == list(SITES)
    assert done.events[-1]["best"] == [3, 8.0]


def test_the_number_of_rounds_is_known_in_each(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["full"].result()
    assert {line["num_rounds"] for line in done.events if line["round"] is not None} == {3}


def test_scripts_that_train_when_asked_to_validate_do_no_harm(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["careless"].result()
    assert done.code == 0
    assert_same(done.model(0), averaged(initial_weights(), 0, SITES))
    assert "Traceback" not in done.log
    assert " - ERROR - " not in done.log
    (told,) = [line for line in done.log.splitlines() if "not scored" in line]
    assert " - WARNING - " in told
    assert "the final model is not scored by site-1, site-2, site-3: sent weights" in told
    # With their metrics the final model would have won, though they may be of the models that they trained.
    assert done.of("_receiveValidationResults") == []
    assert done.events[-1]["best"] == [0, 2.0]
    for site in SITES:
        log = (done.folder / "workspace" / site / "log.txt").read_text(encoding="utf-8")
        assert "execute for task (validate)" in log
        assert "Traceback" not in log
        assert " - ERROR - " not in log


def test_a_training_in_vain_ends_the_job_and_says_why(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["in_vain"].result()
    assert done.code != 0
    why = "nothing was aggregated in 2 rounds, so no client's work is in the model: NonFiniteError 6 times"
    assert done.log.count(f"FATAL_SYSTEM_ERROR received: {why}") == 1
    assert done.events[-1]["event"] == "_shutdown"
    assert done.of("_receiveValidationResults") == []
    assert_same(done.model(1), initial_weights())


def test_a_training_in_vain_ends_the_job_without_handlers_too(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["in_vain_alone"].result()
    assert done.code != 0
    why = "nothing was aggregated in 2 rounds, so no client's work is in the model: NonFiniteError 6 times"
    assert done.log.count(f"FATAL_SYSTEM_ERROR received: {why}") == 1
    for site in SITES:
        assert f"{site}: 'w' at index (1, 2): nan is not finite" in done.log
    assert "round 2: 0 accepted contributions, 1 required; the global model stands" in done.log
    assert_same(done.model(1), initial_weights())


def test_a_handler_that_raises_is_logged_and_recorded(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["full"].result()
    failures = [line["report"]["handler_failures"] for line in done.of("_endRound")]
    assert failures[0] == failures[2] == []
    assert failures[1] == ["nvflare_parts.Raiser at _startRound of round 2: RuntimeError: on purpose, in round 1"]
    assert "handler failed: nvflare_parts.Raiser at _startRound" in done.log


def test_a_handler_that_raises_ends_the_job_by_default(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["handler_raises"].result()
    assert done.code != 0
    assert "Aborting current RUN due to FATAL_SYSTEM_ERROR received: HandlerBridge at _after_model_update" in done.log
    assert "on purpose, in round 0" in done.log
    assert {line["round"] for line in done.events} == {None, 0}
    assert done.events[-1]["event"] == "_shutdown"
    assert not (done.folder / "models" / "1.npz").exists()


def test_the_bridge_follows_nvflares_own_averaging(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["handler_raises"].result()
    (end,) = done.of("_endAggregation")
    assert end["contributions"] == list(SITES)
    assert end["report"]["rejected"] == []
    received = {line["contributor"]: line["contribution"] for line in done.of("_receiveContribution")}
    assert received == {site: [site, 3 * number_of(site) + 1] for site in SITES}
    expected = averaged(initial_weights(), 0, SITES)["w"].astype(float).ravel()
    assert np.allclose(end["w"], expected, rtol=1e-6, atol=1e-6)


def test_a_bad_contribution_ends_the_job_if_it_should(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["bad_raises"].result()
    assert done.code != 0
    assert "FATAL_SYSTEM_ERROR" in done.log
    assert "site-2: 'w' at index (1, 2): nan is not finite" in done.log
    assert not (done.folder / "models").exists()


def test_differences_by_shareables_stream_exactly(jobs: dict[str, Future[Done]]) -> None:
    done = jobs["diff"].result()
    assert done.code == 0
    weights = initial_weights()
    for number, sites in enumerate((SITES, ("site-2", "site-3"))):
        steps = [3 * number_of(site) + 1 for site in sites]
        trained = [train(weights, site, number) for site in sites]
        differences = [{name: new[name] - weights[name] for name in weights} for new in trained]
        mean = fl.weighted_average(differences, steps, exact=True)
        weights = {name: weights[name] + mean[name] for name in weights}
        assert_same(done.model(number), weights)
    (refused,) = [line for line in done.of("_receiveContribution") if line["refusal"]]
    assert refused["refusal"] == "ShapeError: site-1: 'half' has shape (1,), expected (5,)"
    assert [line["report"]["accepted"] for line in done.of("_endRound")] == [list(SITES), ["site-2", "site-3"]]


def test_tensors_on_disk_are_averaged_in_their_dtypes(jobs: dict[str, Future[Done]]) -> None:
    torch = pytest.importorskip("torch")
    done = jobs["tensors"].result()
    assert done.code == 0
    assert "falling back to in-memory" not in done.log
    model = torch.load(done.folder / "models" / "0.pt")
    step = (1 * 4 + 2 * 7 + 3 * 10) / 21  # what the sites add, by their steps
    assert {name: str(t.dtype).removeprefix("torch.") for name, t in model.items()} == {
        "w": "float32",
        "half": "float16",
        "brain": "bfloat16",
        "large": "float32",
        "count": "int64",
    }
    assert model["large"].shape == (1024, 600)
    assert bool((model["large"] == np.float32(step)).all())
    assert torch.equal(model["brain"], (torch.arange(6).reshape(2, 3) + step).to(torch.bfloat16))
    assert int(model["count"]) == round(1000 + step)


@pytest.mark.parametrize("job", ["local_excluded", "local_never_sent"])
def test_what_is_local_stays_at_each_client(jobs: dict[str, Future[Done]], job: str) -> None:
    done = jobs[job].result()
    assert done.code == 0  # else a script found the variable in what it received
    weights = initial_weights()
    for number in range(2):
        weights = {**averaged(weights, number, SITES), "half": initial_weights()["half"]}
        assert_same(done.model(number), weights)
    reports = [line["report"] for line in done.of("_endRound")]
    assert [report["accepted"] for report in reports] == [list(SITES)] * 2
    assert [report["aggregation_bytes"] for report in reports] == [CLIENTS * (48 + 8)] * 2
    results = done.of("_receiveValidationResults")
    assert sorted(line["contributor"] for line in results) == list(SITES)


def test_the_example_agrees_with_nvflares_averaging_and_keeps_the_best_model(jobs: dict[str, Future[Done]]) -> None:
    torch = pytest.importorskip("torch")
    ours, stock = jobs["example"].result(), jobs["stock"].result()
    assert (ours.code, stock.code) == (0, 0), ours.log + stock.log

    def saved(done: Done, name: str) -> Any:
        path = done.folder / name
        if not path.exists():
            (path,) = done.folder.rglob(name)
        return torch.load(path)["model"]

    one, other = saved(ours, "FL_global_model.pt"), saved(stock, "FL_global_model.pt")
    assert list(one) == list(other)
    for name, tensor in one.items():
        if tensor.is_floating_point():
            # Roundings of three rounds of training apart.
            assert torch.allclose(tensor, other[name], rtol=1e-4, atol=1e-5), name
        else:
            assert tensor.dtype == torch.int64
    lines = [json.loads(line) for line in (ours.folder / "report.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds = [line for line in lines if line["type"] == "round"]
    scores = [line["metrics"]["server_validation"] for line in rounds]
    assert [line["accepted"] for line in rounds] == [list(SITES)] * 3
    assert sorted(line["contributor"] for line in lines if line["type"] == "validation") == list(SITES)
    assert max(scores) > 0.9
    assert "best model: " in ours.log
    # The best is the one that scored best on the server, which is known from the outside of the job.
    spec = importlib.util.spec_from_file_location("nvflare_example_digits", EXAMPLE / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    network = digits.Network()
    network.load_state_dict({name: torch.as_tensor(t) for name, t in saved(ours, "best_FL_global_model.pt").items()})
    assert digits.accuracy(network, *digits.share(None)) == max(scores)
