"""Configuration files in the form of Clara Train 3.1, read and run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fed_learn as fl
from fed_learn.client.fed_privacy import LaplacianProtocol, PercentileProtocol, SVTProtocol
from fed_learn.components.config import read_config
from fed_learn.server.config import ServerConfig
from fed_learn.server.model_aggregator import ModelAggregator
from fed_learn.simulation.demo import build_demo

EXAMPLES = Path(__file__).parents[1] / "examples"
AS_CLARA_HAS_IT: dict[str, Any] = {
    "servers": [
        {
            "name": "digits",
            "service": {"target": "localhost:8002"},
            "min_num_clients": 2,
            "heart_beat_timeout": 600,
            "num_rounds": 4,
            "exclude_vars": "dummy",
            "validate_on_server": False,
            "num_rounds_per_valid": 1,
        }
    ],
    "aggregator": {"name": "ModelAggregator", "args": {"aggregation_weights": {"site-1": 1, "client2": 1.5}}},
    "pre_processors": [{"name": "ModelEncryptor", "args": {}}],
    "model_saver": {"name": "TFModelSaver", "args": {"exclude_vars": "dummy"}},
}
VALIDATION = "ServerValidationHandler"


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "fed-learn"), "simulate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_the_settings_of_a_server_of_clara_are_read() -> None:
    config = ServerConfig.of(AS_CLARA_HAS_IT)
    assert (config.num_rounds, config.min_num_clients, config.exclude_vars) == (4, 2, "dummy")
    assert (config.validate_on_server, config.num_rounds_per_valid) == (False, 1)
    assert config.unused == (
        "pre_processors",
        "model_saver",
        "servers[0].name",
        "servers[0].service",
        "servers[0].heart_beat_timeout",
    )
    aggregator = config.build_aggregator()
    assert isinstance(aggregator, ModelAggregator)
    assert (aggregator.exclude_vars, aggregator.aggregation_weights) == ("dummy", {"site-1": 1, "client2": 1.5})
    assert config.doubts(aggregator, ["w"], ["site-1", "site-2"]) == [
        "unknown keys 'pre_processors', 'model_saver', 'servers[0].name', 'servers[0].service', "
        "'servers[0].heart_beat_timeout' are ignored",
        "'aggregation_weights' of clients that are not in the job: client2",
    ]


def test_settings_at_the_top_are_the_same_settings() -> None:
    flat = {**AS_CLARA_HAS_IT["servers"][0], "aggregator": AS_CLARA_HAS_IT["aggregator"]}
    config = ServerConfig.of(flat)
    assert (config.num_rounds, config.min_num_clients, config.exclude_vars) == (4, 2, "dummy")
    assert config.unused == ("name", "service", "heart_beat_timeout")
    nothing = ServerConfig.of({})
    assert (nothing.handler_entries(), nothing.build_aggregator(), nothing.build_filters()) == (None, None, ())
    assert nothing.doubts(None, ["w"], ["site-1"]) == []


@pytest.mark.parametrize(
    ("settings", "entries"),
    [
        ({}, None),
        ({"handlers": []}, []),
        ({"validate_on_server": False}, [{"name": "ModelSelectionHandler"}]),
        (
            {"validate_on_server": True},
            [{"name": "ModelSelectionHandler"}, {"name": VALIDATION, "args": {"num_rounds_per_valid": 1}}],
        ),
        (
            {"num_rounds_per_valid": 5},
            [{"name": "ModelSelectionHandler"}, {"name": VALIDATION, "args": {"num_rounds_per_valid": 5}}],
        ),
        (
            {"validate_on_server": True, "num_rounds_per_valid": 3, "handlers": [{"name": "ProgressHandler"}]},
            [{"name": "ProgressHandler"}, {"name": VALIDATION, "args": {"num_rounds_per_valid": 3}}],
        ),
        (
            {"validate_on_server": True, "num_rounds_per_valid": 3, "handlers": [{"name": VALIDATION}]},
            [{"name": VALIDATION, "args": {"num_rounds_per_valid": 3}}],
        ),
        (
            {
                "num_rounds_per_valid": 3,
                "handlers": [{"path": f"fed_learn.handlers.{VALIDATION}", "args": {"num_rounds_per_valid": 2}}],
            },
            [{"path": f"fed_learn.handlers.{VALIDATION}", "args": {"num_rounds_per_valid": 2}}],
        ),
    ],
    ids=str,
)
def test_whether_and_when_the_server_validates(settings: dict[str, Any], entries: Any) -> None:
    before = json.dumps(settings)
    assert ServerConfig.of(settings).handler_entries() == entries
    assert json.dumps(settings) == before


def test_a_validation_that_a_file_only_asks_for_comes_before_what_stops_a_job_by_it() -> None:
    stopping = {"name": "EarlyStoppingHandler", "args": {"patience": 5}}
    settings = {"validate_on_server": True, "handlers": [{"name": "ModelSelectionHandler"}, stopping]}
    names = [entry["name"] for entry in ServerConfig.of(settings).handler_entries() or ()]
    assert names == ["ModelSelectionHandler", "ServerValidationHandler", "EarlyStoppingHandler"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rounds": 0}, "'num_rounds' must be a number of at least 1, not 0"),
        ({"num_rounds": True}, "'num_rounds' must be a number of at least 1, not True"),
        ({"servers": [{"min_num_clients": "2"}]}, "'min_num_clients' must be a number of at least 1, not '2'"),
        ({"servers": {}}, "'servers' must be a list"),
        ({"servers": [3]}, "'servers' must hold objects, not 3"),
        ({"client": []}, "'client' must be an object"),
        ({"handlers": {}}, "'handlers' must be a list"),
        ({"filters": "PercentileProtocol"}, "'filters' must be a list"),
        ({"exclude_vars": 3}, "'exclude_vars' must be a string"),
        (
            {"exclude_vars": "(", "aggregator": {"path": "fractions.Fraction"}},
            "'exclude_vars' '(' is no regular expression",
        ),
        ({"validate_on_server": "yes"}, "'validate_on_server' must be true or false"),
        ({"num_rounds": 3, "servers": [{"num_rounds": 3}]}, "'num_rounds' is there twice"),
        ({"validate_on_server": False, "handlers": [{"name": VALIDATION}]}, "'validate_on_server' false"),
        ({"aggregator": {"name": "Nope"}}, "no component is named 'Nope'; known are ModelAggregator"),
        ({"aggregator": {"path": "fractions.Fraction"}}, "is no aggregator"),
        ({"aggregator": {"name": "ModelAggregator", "args": {"exclude_vars": "("}}}, "is no regular expression"),
        ({"filters": [{"name": "Nope"}]}, "known are LaplacianProtocol, PercentileProtocol, SVTProtocol"),
        ({"filters": [{"path": "fractions.Fraction"}]}, "is no filter"),
        ({"client": {"privacy": {"name": "SVTProtocol", "args": {"gamma": -1}}}}, "gamma must be a positive"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused(settings: dict[str, Any], message: str) -> None:
    def build() -> None:
        config = ServerConfig.of(settings)
        config.handler_entries()
        config.build_aggregator()
        config.build_filters()

    with pytest.raises(fl.ConfigError, match=message.replace("(", r"\(")):
        build()


def test_filters_are_built_anew_for_each_client_and_seeded() -> None:
    svt = {"fraction": 0.1, "epsilon": 0.1, "noise_var": 0.1, "gamma": 1e-5, "tau": 1e-6}
    laplacian = {"fraction": 0.5, "epsilon": 2.0, "gamma": 1e-4, "tau": 5e-5}
    config = ServerConfig.of(
        {
            "filters": [
                {"name": "PercentileProtocol", "args": {"percentile": 75, "gamma": 50}},
                {"name": "LaplacianProtocol", "args": laplacian},
            ],
            "client": {"privacy": {"name": "SVTProtocol", "args": svt}, "local_epochs": 5},
        }
    )
    assert config.unused == ("client.local_epochs",)
    first, second = config.build_filters([7, 0]), config.build_filters([7, 1])
    assert [type(one) for one in first] == [PercentileProtocol, LaplacianProtocol, SVTProtocol]
    assert (first[0].percentile, first[0].gamma) == (75, 50)
    assert {name: getattr(first[1], name) for name in laplacian} == laplacian
    assert {name: getattr(first[2], name) for name in svt} == svt
    assert (first[1].seed, second[1].seed, config.build_filters()[1].seed) == ([7, 0, 1], [7, 1, 1], None)
    assert first[2].seed == [7, 0, 2], "the noise of one filter is not that of the next"
    assert config.doubts(None, [], []) == ["unknown key 'client.local_epochs' is ignored"]


def test_a_seed_that_all_clients_would_share_is_doubted() -> None:
    config = ServerConfig.of({"filters": [{"name": "LaplacianProtocol", "args": {"seed": 3}}]})
    assert [config.build_filters([7, client])[0].seed for client in range(2)] == [3, 3]
    (doubt,) = config.doubts(None, [], [])
    assert "every client draws the same noise" in doubt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"num_rounds": 1, "num_rounds": 9}', "'num_rounds' is there twice"),
        ('{"aggregator": {"args": {"exact": true, "exact": false}}}', "'exact' is there twice"),
        ("[" * 100_000, "recursion"),
        ('{"num_rounds": 1', "Expecting"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_does_not_say_what_it_means_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(fl.ConfigError, match=f"^{path}: .*{message}"):
        read_config(path)


def test_a_file_may_begin_with_the_mark_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('\ufeff{"num_rounds": 3}', encoding="utf-8")
    assert read_config(path) == {"num_rounds": 3}


@pytest.mark.parametrize(
    "code", ["import sys; sys.exit(3)", "class Own:\n    process = print\n    def __init__(self): raise SystemExit(3)"]
)
def test_code_that_ends_the_process_is_refused(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_ending.py").write_text(code, encoding="utf-8")
    with pytest.raises(fl.ConfigError, match=r"Own.*: SystemExit: 3"):
        ServerConfig.of({"aggregator": {"path": "own_ending.Own"}}).build_aggregator()
    sys.modules.pop("own_ending", None)


def test_variables_that_are_only_excluded_need_no_aggregator_of_ones_own() -> None:
    aggregator = ServerConfig.of({"exclude_vars": "bias"}).build_aggregator(exact=True)
    assert (type(aggregator), aggregator.exclude_vars, aggregator.exact) == (ModelAggregator, "bias", True)


def project(folder: Path, config: dict[str, Any]) -> Path:
    """A project as Clara lays it out: the configuration in `config`, the code in `custom`."""
    for name in ("config", "custom"):
        (folder / name).mkdir()
    code = (EXAMPLES / "clara" / "BYO_aggregator.py").read_text(encoding="utf-8")
    (folder / "custom" / "own_aggregator.py").write_text(code, encoding="utf-8")
    path = folder / "config" / "config_fed_server.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def test_code_in_the_folder_custom_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    entry = {"path": "own_aggregator.TrustRegionAggregator", "args": {"radius": 0.5}}
    config = ServerConfig.of(read_config(project(tmp_path, {"aggregator": entry, "exclude_vars": "w1|b2"})))
    aggregator = config.build_aggregator()
    monkeypatch.delitem(sys.modules, "own_aggregator")
    assert (type(aggregator).__name__, aggregator.radius) == ("TrustRegionAggregator", 0.5)
    assert config.doubts(aggregator, ["w1", "b1", "b2"], []) == [
        "TrustRegionAggregator takes no 'exclude_vars': w1, b2 are aggregated"
    ]
    assert config.doubts(aggregator, ["x"], []) == []


def test_a_job_of_a_configuration_of_clara_is_that_of_the_same_parts_in_code(tmp_path: Path) -> None:
    config = project(tmp_path, AS_CLARA_HAS_IT)
    done = run(
        "--config", config, "--clients", 2, "--seed", 3, "--local-epochs", 1, "--json", "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 2
    assert "unknown keys 'pre_processors', 'model_saver', 'servers[0].name'" in warnings[0]
    assert "not in the job: client2" in warnings[1]
    summary = json.loads(done.stdout)
    assert (summary["settings"]["kind"], len(summary["rounds"])) == ("diff", 4)
    assert summary["best"]["source"] == "received"  # the server does not validate

    aggregator = ModelAggregator("dummy", {"site-1": 1, "client2": 1.5})
    selection = fl.ModelSelectionHandler()
    arguments: dict[str, Any] = {"num_clients": 2, "num_rounds": 4, "seed": 3, "local_epochs": 1, "kind": fl.Kind.DIFF}
    result = build_demo(handlers=[selection], aggregator=aggregator, **arguments).run()
    safetensors = pytest.importorskip("safetensors.numpy")
    saved = safetensors.load_file(tmp_path / "out" / "global.safetensors")
    assert {name: array.tobytes() for name, array in saved.items()} == {
        name: array.tobytes() for name, array in result.weights.items()
    }


def test_the_example_of_a_project_of_clara_runs(tmp_path: Path) -> None:
    done = run("--config", EXAMPLES / "clara" / "config_fed_server.json", "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (warning,) = (line for line in done.stderr.splitlines() if line.startswith("WARNING"))
    assert "'model_saver'" in warning
    assert "'servers[0].compression'" in warning
    summary = json.loads(done.stdout)
    assert len(summary["rounds"]) == 15
    assert [line["error"] for line in summary["rounds"]] == [None] * 15
    assert summary["best"]["source"] == "aggregated"
    assert summary["best"]["test_accuracy"] > 0.9
    again = json.loads(
        run("--config", EXAMPLES / "clara" / "config_fed_server.json", "--json", "--out", tmp_path / "again").stdout
    )
    assert again["best"] == summary["best"]


def test_the_example_of_a_server_configuration_runs(tmp_path: Path) -> None:
    done = run("--config", EXAMPLES / "server_config.json", "--rounds", 6, "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    summary = json.loads(done.stdout)
    assert [line["error"] for line in summary["rounds"]] == [None] * 6
    assert summary["best"]["test_accuracy"] > 0.8


def test_an_aggregator_that_fails_loses_its_rounds_in_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import numpy as np\n"
        "from fed_learn.server.model_aggregator import Aggregator\n"
        "class Legacy(Aggregator):\n"
        "    def process(self, accumulator, fl_ctx):\n"
        "        return np.float(1)\n"
    )
    (tmp_path / "config.json").write_text('{"num_rounds": 2, "aggregator": {"path": "broken.Legacy"}}')
    done = run("--config", tmp_path / "config.json", "--json", "--out", tmp_path / "out")
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 2
    assert "round 1: aggregator Legacy: AttributeError: module 'numpy' has no attribute 'float'" in errors[0]
    assert errors[0].endswith("the global model stands")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "config", "message"),
    [
        (["--kind", "full"], {"aggregator": {"name": "ModelAggregator"}}, "an aggregator works on differences"),
        (["--exact"], {"aggregator": {"path": "own_aggregator.TrustRegionAggregator"}}, "exact and stream belong to"),
        ([], {"filters": [{"name": "Nope"}]}, "no component is named 'Nope'"),
        ([], {"num_rounds": 3, "servers": [{"num_rounds": 3}]}, "'num_rounds' is there twice"),
    ],
    ids=str,
)
def test_a_wrong_use_is_one_line(arguments: list[str], config: dict[str, Any], message: str, tmp_path: Path) -> None:
    done = run("--config", project(tmp_path, config), *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line


def test_exact_sums_are_those_of_the_configured_aggregator(tmp_path: Path) -> None:
    config = project(tmp_path, {"num_rounds": 1, "aggregator": {"name": "ModelAggregator"}})
    done = run("--config", config, "--exact", "--clients", 2, "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"][0]["error"] is None
    assert np.isfinite(json.loads(done.stdout)["final"]["test_accuracy"])
