"""The demo in torch, TensorFlow, JAX, and with both of the first in one job."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import bits
from threadpoolctl import threadpool_limits

import fed_learn as fl
from fed_learn.handlers.json_lines import JsonLinesHandler
from fed_learn.simulation import Demo, Framework, UpdateNormHandler, build_demo, load_split
from fed_learn.simulation.frameworks import networks
from fed_learn.simulation.network import Network
from fed_learn.simulation.plot import plot_job
from fed_learn.simulation.summary import summarize

ONE_FRAMEWORK = ["torch", "tensorflow", "jax"]
DATASETS = ["digits", "breast-cancer"]
SITES = ["site-1", "site-2", "site-3", "site-4"]


@pytest.fixture(scope="module", autouse=True)
def _frameworks_are_there() -> None:
    missing = [name for name in ONE_FRAMEWORK if importlib.util.find_spec(name) is None]
    assert not missing, "the tests need the extra `test`"


def small_demo(framework: str, **arguments: Any) -> Demo:
    settings = {"num_clients": 3, "num_rounds": 2, "seed": 1, "local_epochs": 1, **arguments}
    return build_demo(settings.pop("dataset", "digits"), framework=framework, **settings)


def network(framework: str, dataset: str = "digits", seed: int = 3) -> Network:
    return networks(framework, dataset, load_split(dataset, 2, 0.5, 3), seed)[0]


# The networks


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_initial_model_is_the_same_in_every_framework(dataset: str) -> None:
    test = load_split(dataset, 2, 0.5, 3).test
    scores = []
    for framework in ONE_FRAMEWORK:
        one = network(framework, dataset)
        scores.append(one.score(one.init(), test))
        assert bits(one.init()) == bits(network(framework, dataset).init())
        assert bits(one.init()) != bits(network(framework, dataset, seed=4).init())
        assert {array.dtype for array in one.init().values()} == {np.dtype(np.float32)}
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)
    assert scores[2] == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_round_of_training_comes_out_nearly_alike_in_every_framework(dataset: str) -> None:
    split = load_split(dataset, 2, 0.5, 3)
    ctx = fl.FLContext({fl.ContextKey.ROUND: 4})
    scores = []
    for framework in ONE_FRAMEWORK:
        one = network(framework, dataset)
        learner = one.learner(split.train[0], split.selection[0], local_epochs=1, seed=5)
        result = learner.train(one.init(), ctx)
        assert result is not None
        assert result.aggregation_weight == len(split.train[0])
        assert list(result.weights) == list(one.init())
        unchanged = [name for name, array in one.init().items() if np.array_equal(array, result.weights[name])]
        assert unchanged == []
        scores.append({**learner.validate(result.weights, ctx), **result.metrics, "steps": float(result.n_iter or 0)})
    # torch's running variance is the unbiased one, which shows in small batches.
    assert scores[1] == pytest.approx(scores[0], abs=0.05)
    assert scores[2] == pytest.approx(scores[1], abs=0.002)


# Jobs


@pytest.mark.parametrize("framework", [*ONE_FRAMEWORK, "mixed"])
@pytest.mark.parametrize("kind", list(fl.Kind))
def test_the_same_seed_gives_the_same_bytes_for_any_number_of_workers(framework: str, kind: fl.Kind) -> None:
    first = small_demo(framework, kind=kind).run()
    for max_workers in (1, 3):
        demo = small_demo(framework, kind=kind)
        with threadpool_limits(1, user_api="blas"), demo.networks[0].one_thread():
            again = demo.server.run(demo.clients[::-1], max_workers=max_workers)
        assert bits(again.weights) == bits(first.weights)
        assert again.cross_site == first.cross_site
    assert bits(small_demo(framework, kind=kind, seed=2).run().weights) != bits(first.weights)


@pytest.mark.parametrize("framework", [*ONE_FRAMEWORK, "mixed"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_framework_learns_the_data(framework: str, dataset: str) -> None:
    rounds = 4 if dataset == "digits" else 6
    demo = build_demo(dataset, framework=framework, num_rounds=rounds, seed=1)
    result = demo.run()
    assert demo.test(result.weights)["accuracy"] >= (0.95 if dataset == "digits" else 0.9)
    assert result.best is not None
    assert result.quits == ()
    assert set(result.cross_site) == {*SITES, "global_best"}
    assert all(set(row) == set(SITES) for row in result.cross_site.values())


def test_clients_of_both_frameworks_take_turns_and_each_moves_the_global_model_in_every_round() -> None:
    demo = build_demo(framework="mixed", num_rounds=4, seed=1, reporters=[UpdateNormHandler()])
    assert demo.frameworks == dict(zip(SITES, ["torch", "tensorflow"] * 2, strict=True))
    assert not any("num_batches_tracked" in name for name in demo.server.weights)
    assert "conv1.weight" in demo.server.weights
    summary = summarize(demo, demo.run())
    assert summary["frameworks"] == demo.frameworks
    assert list(summary["update_norms"]) == SITES
    for norms in summary["update_norms"].values():
        assert len(norms) == 4
        assert all(norm > 0.01 for norm in norms)


def test_a_mixed_job_is_as_good_as_one_of_torch_alone() -> None:
    accuracies: dict[str, list[float]] = {"torch": [], "mixed": []}
    for seed in (0, 1):
        for framework, found in accuracies.items():
            demo = build_demo(framework=framework, num_rounds=4, seed=seed)
            found.append(demo.test(demo.run().weights)["accuracy"])
    assert np.mean(accuracies["mixed"]) == pytest.approx(np.mean(accuracies["torch"]), abs=0.02)


def test_in_a_mixed_job_every_client_scores_every_model_as_torch_would() -> None:
    demo = build_demo(framework="mixed", num_rounds=1, seed=1)
    result = demo.run()
    assert result.best is not None
    for client, selection in zip(demo.clients, demo.split.selection, strict=True):
        expected = demo.networks[0].score(result.best.weights, selection)["accuracy"]
        assert result.cross_site["global_best"][client.name] == pytest.approx(expected)


def test_the_plot_shows_both_kinds(tmp_path: Path) -> None:
    demo = small_demo("mixed", reporters=[UpdateNormHandler(), JsonLinesHandler(tmp_path / "metrics.jsonl")])
    result = demo.run()
    summary = summarize(demo, result)
    summary["settings"] = {"dataset": "digits", "framework": "mixed", "clients": 3, "alpha": 0.5, "seed": 1}
    plot_job(tmp_path / "plot.png", result, summary)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.png").stat().st_size > 20_000
    assert "update_norm/site-2" in (tmp_path / "metrics.jsonl").read_text()


def test_a_job_leaves_the_number_of_torchs_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        small_demo("torch", num_rounds=1).run()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# What is not there


def test_an_unknown_framework_is_refused() -> None:
    with pytest.raises(ValueError, match="numpy, torch, tensorflow, jax, mixed, not 'mxnet'"):
        build_demo(framework="mxnet")


@pytest.mark.parametrize(("framework", "module"), [("torch", "torch"), ("tensorflow", "keras"), ("jax", "jax")])
def test_a_framework_that_is_missing_names_its_extra(framework: str, module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('it is not here')")
    chosen = [framework, *(["mixed"] if framework != "jax" else [])]
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from fed_learn.simulation import build_demo
for framework in {chosen!r}:
    try:
        build_demo(framework=framework)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = f"{framework} cannot be imported (it is not here): pip install 'fed-learn[{framework}]'"
    assert done.stdout.splitlines() == [said] * len(chosen)


def test_the_demo_in_numpy_loads_no_framework() -> None:
    code = (
        "import sys; from fed_learn.simulation import build_demo; build_demo(num_rounds=1).run(); "
        "print([m for m in ('torch', 'tensorflow', 'keras', 'jax') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"
    assert Framework("numpy") == "numpy"


# How far clients move the global model


def norms_of(contributions: list[fl.Contribution], weights: Any, **arguments: Any) -> dict[str, float]:
    ctx = fl.FLContext({fl.ContextKey.CONTRIBUTIONS: tuple(contributions)}, model=fl.ModelData(weights))
    UpdateNormHandler(**arguments).before_aggregation(ctx)
    return dict(ctx.get_prop(fl.ContextKey.METRICS, {}))


GLOBAL: dict[str, Any] = {
    "w": np.array([1, 2], np.float32),
    "b": np.array([0], np.float16),
    "norm.running_mean": np.array([0], np.float32),
    "steps": np.array([3]),
}
MOVED: dict[str, Any] = {
    "w": np.array([4, 2], np.float32),
    "b": np.array([4], np.float16),
    "norm.running_mean": np.array([100], np.float32),
    "steps": np.array([9]),
}


def test_the_norm_is_that_of_the_difference_over_floating_variables_that_are_trained() -> None:
    full = fl.Contribution("a", MOVED, 1)
    difference = fl.Contribution("b", {name: MOVED[name] - GLOBAL[name] for name in GLOBAL}, 1, kind=fl.Kind.DIFF)
    still = fl.Contribution("c", GLOBAL, 1)
    expected = {"update_norm/a": 5.0, "update_norm/b": 5.0, "update_norm/c": 0.0}
    assert norms_of([full, difference, still], GLOBAL) == expected
    assert norms_of([full], GLOBAL, without="^b$|running")["update_norm/a"] == 3.0


def test_a_contribution_whose_weights_are_gone_has_no_norm() -> None:
    assert norms_of([fl.Contribution("a", None, 1)], GLOBAL) == {}
    with pytest.raises(Exception, match="unterminated"):
        UpdateNormHandler("[")


def test_a_summary_without_the_handler_has_no_norms() -> None:
    demo = small_demo("numpy", num_rounds=1)
    summary = summarize(demo, demo.run())
    assert summary["update_norms"] == {}
    assert set(summary["frameworks"].values()) == {"numpy"}


# The example


def test_the_example_runs() -> None:
    example = Path(__file__).parents[1] / "examples" / "mixed_frameworks.py"
    done = subprocess.run(
        [sys.executable, str(example), "--seeds", "1", "--rounds", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2].split()[0] == "mean"
