"""`fed-learn`, run as its user runs it: another process, real files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import fed_learn as fl
from fed_learn.cli import main


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "fed-learn"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120", **environment},
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The job of the README; its folder and what it printed."""
    out = tmp_path_factory.mktemp("job")
    done = run("simulate", "--rounds", "20", "--clients", "4", "--alpha", "0.5", "--seed", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out, done.stdout


def summary_of(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def test_simulate_reaches_95_percent_on_digits(job: tuple[Path, str]) -> None:
    summary = summary_of(job[0])
    assert summary["best"]["test_accuracy"] >= 0.95
    assert summary["final"]["test_accuracy"] >= 0.95
    assert 0 <= summary["best"]["round"] < 20
    assert len(summary["rounds"]) == 20


def test_simulate_prints_a_row_per_round_and_a_summary(job: tuple[Path, str]) -> None:
    lines = job[1].splitlines()
    assert lines[0].split() == ["round", "accepted", "rejected", "selection", "server", "aggregation", "kernel"]
    for number, line in enumerate(lines[1:21], start=1):
        cells = line.split()
        assert cells[:3] == [str(number), "4", "0"]
        assert cells[-1] in fl.kernels.available()
    summary = summary_of(job[0])
    assert f"test accuracy {summary['best']['test_accuracy']:.4f}" in job[1]
    assert f"Best model   aggregated in round {summary['best']['round'] + 1}, accuracy " in job[1]
    for site, row in summary["cross_site"].items():
        assert any(line.split()[:1] == [site] and f"{row['site-2']:.4f}" in line for line in lines)


def test_simulate_leaves_every_file(job: tuple[Path, str]) -> None:
    out = job[0]
    summary = summary_of(out)
    assert sorted([*summary["files"], "state"]) == sorted(path.name for path in out.iterdir())
    times = json.loads((out / "times.json").read_text())
    assert len(times["rounds"]) == 20
    assert all(0 < one["aggregation_seconds"] <= one["seconds"] <= times["seconds"] for one in times["rounds"])
    assert (out / "metrics.png").read_bytes().startswith(b"\x89PNG")
    models = {name: load_file(out / f"{name}.safetensors") for name in ("global", "best")}
    for model in models.values():
        assert model["hidden.weight"].shape == (64, 128)
        assert str(model["hidden.weight"].dtype) == "float32"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["type"] == "round"]
    assert [line["round"] for line in rounds] == list(range(20))
    assert all(line["accepted"] == ["site-1", "site-2", "site-3", "site-4"] for line in rounds)
    validations = [(line["model"], line["contributor"]) for line in lines if line["type"] == "validation"]
    sites = ["site-1", "site-2", "site-3", "site-4"]
    assert validations == [(model, site) for model in ("final", *sites, "global_best") for site in sites]


def test_the_cross_site_matrix_is_complete(job: tuple[Path, str]) -> None:
    sites = ["site-1", "site-2", "site-3", "site-4"]
    matrix = summary_of(job[0])["cross_site"]
    assert list(matrix) == [*sites, "global_best"]
    for row in matrix.values():
        assert list(row) == sites
        assert all(0 <= score <= 1 for score in row.values())


@pytest.mark.parametrize("variant", [[], ["--kernel", "numpy"], ["--threads", "1"], ["--threads", "3"]], ids=str)
def test_the_same_seed_gives_the_same_bytes(job: tuple[Path, str], variant: list[str], tmp_path: Path) -> None:
    again = ["--rounds", "20", "--clients", "4", "--alpha", "0.5", "--seed", "1", "--out", str(tmp_path)]
    assert run("simulate", *again, *variant).returncode == 0
    for name in ("best.safetensors", "global.safetensors", *([] if variant else ["metrics.jsonl", "summary.json"])):
        assert (tmp_path / name).read_bytes() == (job[0] / name).read_bytes()


def test_another_seed_gives_other_bytes(job: tuple[Path, str], tmp_path: Path) -> None:
    assert run("simulate", "--seed", "2", "--out", str(tmp_path)).returncode == 0
    assert (tmp_path / "best.safetensors").read_bytes() != (job[0] / "best.safetensors").read_bytes()


@pytest.mark.parametrize("options", [["--kind", "diff"], ["--exact"], ["--dataset", "breast-cancer"]], ids=str)
def test_json_is_all_that_is_printed(options: list[str], tmp_path: Path) -> None:
    done = run("simulate", "--rounds", "3", "--json", "--out", str(tmp_path), *options)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary.pop("seconds") == json.loads((tmp_path / "times.json").read_text())["seconds"]
    assert {**summary, "files": list(summary["files"])} == summary_of(tmp_path)
    assert summary["best"]["test_accuracy"] > 0.8
    assert len([line for line in done.stderr.splitlines() if line.split()[:1] in (["1"], ["2"], ["3"])]) == 3


@pytest.mark.parametrize("framework", ["torch", "tensorflow", "jax", "mixed"])
def test_every_framework_trains_and_says_nothing_of_its_own(framework: str, tmp_path: Path) -> None:
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    command = [str(Path(sys.executable).parent / "fed-learn"), "simulate", "--framework", framework, "--seed", "1"]
    clients = 2 if framework == "jax" else 6  # JAX compiles a step for each size of batch
    options = ["--rounds", "3", "--clients", str(clients), "--local-epochs", "2", "--out", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=quiet)
    assert (done.returncode, done.stderr) == (0, "")
    summary = summary_of(tmp_path)
    assert summary["settings"]["framework"] == framework
    assert summary["best"]["test_accuracy"] > 0.8
    sites = [f"site-{i}" for i in range(1, clients + 1)]
    kinds = ["torch", "tensorflow"] * 3 if framework == "mixed" else [framework] * clients
    assert summary["frameworks"] == dict(zip(sites, kinds, strict=True))
    assert all(len(norms) == 3 and min(norms) > 0 for norms in summary["update_norms"].values())
    names = [f"{site} ({kind})" if framework == "mixed" else site for site, kind in zip(sites, kinds, strict=True)]
    for name, site in zip(names, sites, strict=True):
        last = f"{summary['update_norms'][site][-1]:.4f}"
        assert any(line.strip().startswith(name) and last in line for line in done.stdout.splitlines())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[2]["metrics"]["update_norm/site-2"] == summary["update_norms"]["site-2"][2]
    assert (tmp_path / "metrics.png").stat().st_size > 20_000


def test_a_framework_that_is_missing_is_one_line_and_names_its_extra(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text("raise ImportError('it is not here')")
    done = run("simulate", "--framework", "jax", "--out", str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "fed-learn: jax cannot be imported (it is not here): pip install 'fed-learn[jax]'\n"
    assert not (tmp_path / "out").exists()


def test_a_configuration_file_sets_handlers_and_rounds(tmp_path: Path) -> None:
    (tmp_path / "my_handlers.py").write_text(
        "from fed_learn import Handler\n"
        "class Shouter(Handler):\n"
        "    def __init__(self, path):\n"
        "        self.path = path\n"
        "    def end_round(self, ctx):\n"
        "        with open(self.path, 'a') as file:\n"
        "            file.write('round!')\n"
    )
    selection = {"name": "ModelSelectionHandler", "args": {"validation_metric_name": "initial_loss", "mode": "min"}}
    shouter = {"path": "my_handlers.Shouter", "args": {"path": str(tmp_path / "shouts")}}
    config = {"num_rounds": 3, "min_num_clients": 2, "handlers": [selection, shouter], "wat": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("simulate", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == "WARNING: --config: unknown key 'wat' is ignored\n"
    summary = summary_of(tmp_path / "out")
    assert len(summary["rounds"]) == 3
    assert summary["best"]["metric_name"] == "initial_loss"
    assert summary["best"]["source"] == "received"
    assert (tmp_path / "shouts").read_text() == "round!" * 3
    more = run("simulate", "--config", str(tmp_path / "config.json"), "--rounds", "1", "--out", str(tmp_path / "more"))
    assert more.returncode == 0
    assert len(summary_of(tmp_path / "more")["rounds"]) == 1


PARTS = """
import fed_learn as fl
from fed_learn.server.model_aggregator import Aggregator, ModelAggregator


class Idle(Aggregator):
    def process(self, accumulator, fl_ctx):
        return True


class Failing(Aggregator):
    def process(self, accumulator, fl_ctx):
        raise RuntimeError("out of order")


class Refusing(ModelAggregator):
    def check(self, contribution):
        who = contribution.contributor
        raise fl.MetricError(f"{who}: not today", contributor=who, metric="day")


class Dropping(fl.Handler):
    def before_aggregation(self, ctx):
        ctx[fl.ContextKey.CONTRIBUTIONS] = ()
"""


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (
            {"aggregator": {"path": "in_vain.Idle"}},
            "AggregatorError 2 times, the first: aggregator Idle: put no variable into the global model, so no "
            "contribution is in it",
        ),
        (
            {"aggregator": {"path": "in_vain.Failing"}},
            "AggregatorError 2 times, the first: aggregator Failing: RuntimeError: out of order",
        ),
        (
            {"exclude_vars": "."},
            "AggregatorError 2 times, the first: aggregator ModelAggregator: exclude_vars '.' matches all variables of "
            "the global model",
        ),
        ({"aggregator": {"path": "in_vain.Refusing"}}, "MetricError 4 times, the first: site-1: not today"),
        (
            {"handlers": [{"path": "in_vain.Dropping"}]},
            "TooFewContributionsError 2 times, the first: round 1: 0 accepted contributions after a handler took "
            "out 2, 2 required; the global model stands",
        ),
    ],
    ids=["idle", "failing", "excluding", "refusing", "dropping"],
)
def test_a_job_in_which_nothing_is_aggregated_has_failed(config: dict[str, Any], cause: str, tmp_path: Path) -> None:
    (tmp_path / "in_vain.py").write_text(PARTS)
    (tmp_path / "config.json").write_text(json.dumps({"num_rounds": 2, **config}))
    options = ["--clients", "2", "--local-epochs", "1", "--out", str(tmp_path / "out"), "--json"]
    done = run("simulate", "--config", str(tmp_path / "config.json"), *options)
    assert (done.returncode, done.stdout) == (1, "")
    said = "nothing was aggregated in 2 rounds, so no client's work is in the model"
    assert done.stderr.splitlines()[-1] == f"fed-learn: {said}: {cause}"
    assert not (tmp_path / "out" / "summary.json").exists()


def test_patience_stops_early_and_says_so(tmp_path: Path) -> None:
    done = run("simulate", "--rounds", "60", "--patience", "3", "--seed", "1", "--out", str(tmp_path))
    assert done.returncode == 0
    summary = summary_of(tmp_path)
    assert len(summary["rounds"]) < 60
    assert "no better model" in summary["stop_reason"]
    assert "Stopped early: no better model" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["simulate", "--clients", "0"], 2, "--clients"),
        (["simulate", "--clients", "500"], 2, "too few for 500 clients"),
        (["simulate", "--dataset", "mnist"], 2, "breast-cancer"),
        (["simulate", "--framework", "mxnet"], 2, "tensorflow"),
        (["simulate", "--kernel", "cuda"], 2, "native"),
        (["simulate", "--config", "missing.json"], 2, "missing.json"),
        (["simulate", "--config"], 2, "--config"),
        (["simulate", "--bogus"], 2, "--bogus"),
        (["simulate", "extra"], 2, "extra"),
        (["info", "--bogus"], 2, "--bogus"),
        (["bench", "--case", "nope"], 2, "no case is called 'nope'; there are resnet50, "),
        (["bench", "--repetitions", "0"], 2, "--repetitions"),
        (["bench", "--threads", "0"], 2, "--threads"),
        (["bench", "--plot", "picture.jpg"], 2, ".png"),
        (["bench", "--out", "/nowhere/at/all.json"], 2, "/nowhere/at/all.json"),
        (["--bogus"], 2, "--bogus"),
        (["nonsense"], 2, "nonsense"),
        (["simulate", "--out", "/proc/nowhere"], 1, "/proc/nowhere"),
    ],
    ids=str,
)
def test_errors_are_one_line_and_set_the_exit_code(arguments: list[str], code: int, words: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert words in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("fed-learn: ")
    assert done.stdout == ""


@pytest.mark.parametrize("handlers", ['[{"name": "Nope"}]', '[{"name": "ProgressHandler", "args": {"x": 1}}]', "3"])
def test_a_bad_configuration_is_wrong_use_in_one_line(handlers: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"handlers": {handlers}}}')
    done = run("simulate", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_the_traceback() -> None:
    done = run("simulate", "--out", "/proc/nowhere", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


BAD_SETTINGS = [
    ("FED_LEARN_KERNEL", "foo", "FED_LEARN_KERNEL 'foo' is unknown; valid are auto, native, numpy, torch"),
    ("FED_LEARN_NUM_THREADS", "abc", "FED_LEARN_NUM_THREADS must be a number of at least 1, not 'abc'"),
]
every_bad_setting = pytest.mark.parametrize(("variable", "value", "problem"), BAD_SETTINGS)


@every_bad_setting
def test_a_bad_setting_in_the_environment_is_wrong_use_in_one_line(
    variable: str, value: str, problem: str, tmp_path: Path
) -> None:
    done = run("simulate", "--out", str(tmp_path / "out"), cwd=None, **{variable: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"fed-learn: Invalid value: {problem}\n"
    assert not (tmp_path / "out").exists()


@every_bad_setting
def test_info_shows_a_bad_setting_in_the_environment_and_succeeds(variable: str, value: str, problem: str) -> None:
    done = run("info", cwd=None, **{variable: value})
    assert (done.returncode, done.stderr) == (0, "")
    assert problem in " ".join(done.stdout.split())
    facts = json.loads(run("info", "--json", cwd=None, **{variable: value}).stdout)
    assert facts["problems"] == [problem]
    assert (facts["kernel"] is None, facts["threads"] is None) == (
        variable == "FED_LEARN_KERNEL",
        variable == "FED_LEARN_NUM_THREADS",
    )


def test_info_prints_a_setting_that_looks_like_markup_as_it_is() -> None:
    done = run("info", FED_LEARN_KERNEL="[/bold]foo[red]")
    assert (done.returncode, done.stderr) == (0, "")
    assert "FED_LEARN_KERNEL '[/bold]foo[red]' is unknown" in " ".join(done.stdout.split())


def test_info_asks_torch_for_devices_where_it_is_told_to() -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["devices"] is None
    facts = json.loads(run("info", "--devices", "--json").stdout)
    assert (facts["problems"], facts["kernels"]["torch"]["available"]) == ([], True)
    for device in facts["devices"]:  # where there are any
        assert device["device"].partition(":")[0] in ("cuda", "xpu", "mps")
        assert device["averaged"] in ("there, fused", "by way of copies on the host, since it has no float64") or (
            device["averaged"].startswith("there, not fused: ")
        )
    table = run("info", "--devices", CUDA_VISIBLE_DEVICES="").stdout
    assert "torch finds none but the CPU" in table or "device xpu" in table or "device mps" in table


def test_info_knows_of_no_problem_where_there_is_none() -> None:
    facts = json.loads(run("info", "--json", FED_LEARN_KERNEL="numpy", FED_LEARN_NUM_THREADS="3").stdout)
    assert (facts["kernel"], facts["threads"], facts["problems"]) == ("numpy", 3, [])


def test_a_second_job_in_the_same_folder_has_no_file_of_the_first_and_leaves_those_of_others(tmp_path: Path) -> None:
    out, config = tmp_path / "out", tmp_path / "config.json"
    small = ["simulate", "--rounds", "1", "--clients", "2", "--out", str(out)]
    assert run(*small).returncode == 0
    assert "best.safetensors" in summary_of(out)["files"]
    assert (out / "best.safetensors").exists()
    (out / "notes.txt").write_text("mine")
    config.write_text('{"handlers": []}')
    done = run(*small, "--config", str(config), "--overwrite")
    assert (done.returncode, done.stderr) == (0, "")
    assert "best.safetensors" not in done.stdout
    summary = summary_of(out)
    assert summary["best"] is None
    assert sorted(summary["files"]) == [
        "global.safetensors",
        "metrics.jsonl",
        "metrics.png",
        "summary.json",
        "times.json",
    ]
    assert sorted(path.name for path in out.iterdir()) == sorted([*summary["files"], "notes.txt", "state"])
    assert (out / "notes.txt").read_text() == "mine"


def test_info_tells_versions_kernels_and_frameworks() -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["version"] == fl.__version__
    assert facts["kernel"] == fl.kernels.current()
    available = {name for name, kernel in facts["kernels"].items() if kernel["available"]}
    assert available == set(fl.kernels.available()) - {"torch"}  # which the command does not import
    assert facts["kernels"]["torch"]["reason"] == "it is there once torch has been imported"
    import torch

    assert facts["frameworks"]["torch"] == torch.__version__
    assert facts["frameworks"]["flower"] is None or facts["frameworks"]["flower"][0].isdigit()
    printed = " ".join(run("info").stdout.split())
    assert printed.startswith(f"fed-learn {fl.__version__}, Python ")
    assert torch.__version__ in printed


def test_info_imports_no_framework() -> None:
    code = (
        "import sys; from fed_learn.cli.info import collect; collect(); "
        "print([m for m in ('torch', 'tensorflow', 'keras', 'jax') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


BENCH = ("bench", "--quick", "--case", "small", "--case", "clients-2", "--case", "streaming", "--case", "exact")


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """What a quick benchmark printed, its JSON, and its picture."""
    folder = tmp_path_factory.mktemp("bench")
    out, plot = folder / "bench.json", folder / "bench.png"
    done = run(*BENCH, "--repetitions", "2", "--out", str(out), "--plot", str(plot), COLUMNS="80")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout, json.loads(out.read_text()), plot


def test_bench_tells_the_machine_and_what_a_quick_run_leaves_out(benched: tuple[str, dict[str, Any], Path]) -> None:
    printed, found, _ = benched
    assert found["machine"]["versions"]["fed-learn"] == fl.__version__
    assert f"fed-learn {fl.__version__}, python " in printed
    assert found["settings"]["quick"] is True
    assert found["settings"]["repetitions"] == 2
    assert "A quick run: small models, 2 turns" in printed
    for module, peer in (("flwr", "Flower aggregate"), ("nvflare", "NVFlare helper")):
        reason = found["cases"][1]["missing"][peer]
        assert reason in (f"{module} not installed", f"left out of a quick run: {module} takes seconds to start")
        assert any(
            line.startswith("not measured: ") and peer in line and reason in line for line in printed.splitlines()
        )


def test_bench_prints_a_row_per_side_and_no_line_is_too_long(benched: tuple[str, dict[str, Any], Path]) -> None:
    printed, found, _ = benched
    lines = printed.splitlines()
    tables = lines[lines.index(f"clients-2  {found['cases'][0]['about']}") :]
    assert max(len(line) for line in tables if not line.startswith(("not measured: ", "Picture: "))) <= 100
    assert [case["name"] for case in found["cases"]] == ["clients-2", "small", "streaming", "exact"]
    for case in found["cases"]:
        start = next(i for i, line in enumerate(lines) if line == f"{case['name']}  {case['about']}")
        assert lines[start + 2].split() == [
            "side",
            "×",
            "limit",
            "×",
            "ours",
            "GB/s",
            "peak",
            "MB",
            "error,",
            "ulp",
            "dtype",
        ]
        table = lines[start + 3 : start + 3 + len(case["sides"])]
        for side in case["sides"]:
            (row,) = [line for line in table if line.startswith(side["name"] + "  ")]
            cells = row.removeprefix(side["name"]).split()
            assert len(cells) == 6
            assert cells[-1] == side["result_dtype"]
            assert float(cells[-2]) == pytest.approx(side["error_ulp"], abs=5e-4)
            assert float(cells[0]) == pytest.approx(side["times_limit"], rel=0.01, abs=0.006)
        assert lines[start + 3 + len(case["sides"])].startswith("bare read ")


def test_bench_ends_with_a_summary_row_per_case(benched: tuple[str, dict[str, Any], Path]) -> None:
    printed, found, _ = benched
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("case ") and "ours ÷ limit" in line)
    for case, line in zip(found["cases"], lines[start + 1 :], strict=False):
        assert line.split()[0] == case["name"]
        assert float(line.split()[1]) == pytest.approx(case["sides"][0]["times_limit"], abs=0.006)
        assert ("× as fast" in line) == any(not side["ours"] for side in case["sides"])


def test_bench_draws_its_results(benched: tuple[str, dict[str, Any], Path]) -> None:
    assert benched[2].read_bytes().startswith(b"\x89PNG")
    assert benched[2].stat().st_size > 20_000


def test_bench_prints_only_json_where_it_is_asked_for(tmp_path: Path) -> None:
    arguments = ("bench", "--quick", "--case", "small", "--no-peers", "--repetitions", "1", "--threads", "1", "--json")
    done = run(*arguments, "--out", str(tmp_path / "bench.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "bench.json").read_text()
    found = json.loads(done.stdout)
    assert found["settings"]["threads"] == 1
    (case,) = found["cases"]
    assert {side["name"] for side in case["sides"]} == {f"fed_learn {name}" for name in found["machine"]["kernels"]}
    assert case["missing"] == {}
    assert "fed_learn numpy" in done.stderr


def test_bench_lists_its_cases() -> None:
    lines = run("bench", "--list").stdout.splitlines()
    names = [case["name"] for case in json.loads(run("bench", "--list", "--json").stdout)]
    assert [line.split()[0] for line in lines[1:]] == names
    assert names[0] == "resnet50"
    assert len(names) > 20
    chosen = run("bench", "--list", "--case", "clients", "--case", "small").stdout.splitlines()[1:]
    assert [line.split()[0] for line in chosen] == ["clients-2", "clients-8", "clients-32", "clients-128", "small"]


def test_bench_fails_where_this_package_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def unweighted(clients: Any, aggregation_weights: Any, **options: Any) -> Any:
        return fl.weighted_average(clients)

    monkeypatch.setattr("fed_learn.benchmark.sides.weighted_average", unweighted)
    arguments = ["bench", "--quick", "--case", "small", "--no-peers", "--repetitions", "1"]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--out", str(tmp_path / "bench.json")])
    assert left.value.code == 1
    printed = capsys.readouterr()
    assert "small: fed_learn numpy is off by" in printed.err
    assert "WRONG" in printed.out
    assert all(side["wrong"] for side in json.loads((tmp_path / "bench.json").read_text())["cases"][0]["sides"])


def test_version_is_printed() -> None:
    assert run("--version").stdout == f"fed-learn {fl.__version__}\n"
