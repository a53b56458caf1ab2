"""Policies of variables in jobs: in our server, in Flower, in NVFlare, in configuration files and in the command."""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Array

import fed_learn as fl
from fed_learn.aggregation.round import Round
from fed_learn.aggregation.settings import AggregationSettings
from fed_learn.server.config import ServerConfig
from fed_learn.weights import WeightDict


def model() -> dict[str, Array]:
    return {
        "fc": np.zeros(2, np.float32),
        "bn": np.full(1, 5, np.float32),
        "codes": np.array([7, 9], np.uint8),
        "scale": np.full(1, 0.5, np.float32),
        "seen": np.array(0),
        "best": np.full(1, -1, np.float32),
    }


POLICIES = {"bn": "local", "codes": "same", "scale": "keep", "seen": "sum", "best": "max"}


class Site(fl.Learner):
    """Moves each variable by its number, and notes what it received; of some it sends what it likes."""

    def __init__(self, number: int, **sends: Any) -> None:
        self.number, self.sends = number, sends
        self.received: list[dict[str, Any]] = []

    def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult:
        self.received.append({name: array.tolist() for name, array in weights.items()})
        own = {"fc": weights["fc"] + self.number, "seen": np.array(self.number), "best": weights["best"] + self.number}
        return fl.TrainingResult({**weights, **own, **self.sends}, aggregation_weight=1)

    def validate(self, weights: WeightDict, ctx: fl.FLContext) -> Mapping[str, float]:
        assert "bn" not in weights
        return {"accuracy": float(weights["fc"][0])}


def run(*sites: Site, rounds: int = 2, **settings: Any) -> fl.JobResult:
    server = fl.FederatedServer(model(), num_rounds=rounds, policies=POLICIES, **settings)
    return server.run([fl.FederatedClient(f"site-{site.number}", site) for site in sites])


@pytest.mark.quick
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_job_moves_each_variable_by_its_policy(stream: bool, exact: bool) -> None:
    sites = Site(1), Site(3, scale=np.full(1, 99, np.float32))
    result = run(*sites, stream=stream, exact=exact)
    found = {name: array.tolist() for name, array in result.weights.items()}
    assert found == {"fc": [4, 4], "bn": [5], "codes": [7, 9], "scale": [0.5], "seen": 4, "best": [5]}
    assert list(found) == list(model())
    for site in sites:
        assert [list(received) for received in site.received] == [[n for n in model() if n != "bn"]] * 2
        assert [received["scale"] for received in site.received] == [[0.5]] * 2


@pytest.mark.quick
def test_it_is_told_once_that_the_global_model_has_no_trained_values_of_what_is_local(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run(Site(1), Site(3), rounds=3)
    said = [record.getMessage() for record in caplog.records if "local to each client" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("'bn': local to each client, by policy; the global model, and so its validation")


@pytest.mark.quick
def test_handlers_see_contributions_without_what_is_local_or_kept() -> None:
    class Look(fl.Handler):
        def before_aggregation(self, ctx: fl.FLContext) -> None:
            for contribution in ctx.get_prop(fl.ContextKey.CONTRIBUTIONS):
                seen.append(list(contribution.weights))

    seen: list[list[str]] = []
    run(Site(1), Site(3), handlers=[Look()], rounds=1)
    assert seen == [["fc", "seen", "best"]] * 2


@pytest.mark.quick
@pytest.mark.parametrize("stream", [False, True])
def test_who_changes_what_has_to_be_the_same_is_refused_by_name(stream: bool) -> None:
    sites = Site(1), Site(2), Site(3, codes=np.array([7, 8], np.uint8))
    settings: dict[str, Any] = {"on_bad_contribution": "reject", "min_contributions": 2, "stream": stream}
    result = run(*sites, rounds=1, **settings)
    assert result.weights["fc"].tolist() == [1.5, 1.5]
    assert result.weights["seen"] == 3
    (refused,) = result.reports[0].rejected
    assert (refused.contributor, refused.cause) == ("site-3", "NotSameError")
    assert "site-3: 'codes' is not the same as that of the global model" in str(refused.error)
    with pytest.raises(fl.NotSameError, match="its policy is 'same'"):
        run(Site(1), Site(3, codes=np.array([7, 8], np.uint8)), on_bad_contribution="raise")


@pytest.mark.quick
def test_codes_need_no_policy_and_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    four_bits: dict[str, Array] = {
        "w": np.zeros(1, np.float32),
        "base": np.array([1, 2], np.uint8),
        "base.absmax": np.ones(1, np.float32),
        "base.quant_state.bitsandbytes__nf4": np.array([3], np.uint8),
    }

    class Trainer(Site):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult:
            return fl.TrainingResult({**weights, "w": weights["w"] + self.number, **self.sends}, aggregation_weight=1)

        def validate(self, weights: WeightDict, ctx: fl.FLContext) -> Mapping[str, float]:
            return {"accuracy": 0.0}

    caplog.set_level(logging.INFO, "fed_learn")
    server = fl.FederatedServer(four_bits, num_rounds=2, on_bad_contribution="reject", min_contributions=2)
    good = [fl.FederatedClient(f"site-{k}", Trainer(k)) for k in (1, 2)]
    bad = fl.FederatedClient("site-9", Trainer(9, base=np.array([2, 1], np.uint8)))
    result = server.run([*good, bad])
    assert result.weights["w"].tolist() == [3.0]
    assert result.weights["base"].tolist() == [1, 2]
    assert [report.rejected[0].contributor for report in result.reports] == ["site-9"] * 2
    said = [record.getMessage() for record in caplog.records if "4-bit codes of bitsandbytes" in record.getMessage()]
    assert sum("kept as they are in the global model" in text for text in said) == 1


@pytest.mark.quick
def test_differences_of_what_is_the_same_are_zero_and_others_are_refused() -> None:
    base = {"fc": np.zeros(1, np.float32), "mask": np.array([0, -np.inf], np.float32)}
    settings = AggregationSettings(kind=fl.Kind.DIFF, policies={"mask": "same"})  # type: ignore[arg-type]
    this = Round(settings, number=0, model=fl.weights.FrozenWeights(base))
    good = {"fc": np.ones(1, np.float32), "mask": np.array([0, np.nan], np.float32)}
    this.receive(fl.Contribution("site-1", good, 1, kind=fl.Kind.DIFF, round=0))
    bad = {**good, "mask": np.array([1, np.nan], np.float32)}
    with pytest.raises(fl.NotSameError, match="site-2: 'mask'"):
        this.receive(fl.Contribution("site-2", bad, 1, kind=fl.Kind.DIFF, round=0))
    this.close()
    new = this.combine().applied_to(fl.weights.FrozenWeights(base))
    assert {name: array.tolist() for name, array in new.items()} == {"fc": [1.0], "mask": [0, -math.inf]}


@pytest.mark.quick
def test_without_a_global_model_what_most_send_is_the_same() -> None:
    this = Round(AggregationSettings(policies={"c": "same", "n": "sum"}), number=0)  # type: ignore[arg-type]
    for k, code in enumerate((7, 7, 8)):
        weights = {"w": np.full(1, float(k)), "c": np.array([code], np.uint8), "n": np.array(k)}
        this.receive(fl.Contribution(f"site-{k}", weights, 1, round=0))
    ((refused, _),) = this.close()
    assert refused.contributor == "site-2"
    new = this.combine().applied_to(fl.weights.FrozenWeights({}))
    assert {name: array.tolist() for name, array in new.items()} == {"w": [0.5], "c": [7], "n": 1}
    with pytest.raises(ValueError, match="nothing can be kept as it is in the global model, which is not known"):
        Round(AggregationSettings(policies={"c": "keep"}), number=0)  # type: ignore[arg-type]


@pytest.mark.quick
def test_with_parts_each_variable_goes_by_its_policy_over_those_who_sent_it() -> None:
    settings = AggregationSettings(partial="average", policies={"n": "sum", "m": "max"})  # type: ignore[arg-type]
    base = fl.weights.FrozenWeights({"a": np.zeros(1), "b": np.zeros(1), "n": np.array(1), "m": np.zeros(1)})
    this = Round(settings, number=0, model=base)
    for name, part in {
        "site-1": {"a": np.full(1, 1.0), "n": np.array(10)},
        "site-2": {"a": np.full(1, 3.0), "b": np.full(1, 5.0), "m": np.full(1, 4.0)},
        "site-3": {"b": np.full(1, 7.0), "n": np.array(20), "m": np.full(1, 2.0)},
    }.items():
        this.receive(fl.Contribution(name, part, 1, round=0))
    assert this.close() == []
    new = this.combine().applied_to(base)
    assert {name: array.tolist() for name, array in new.items()} == {"a": [2.0], "b": [6.0], "n": 30, "m": [4.0]}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("policies", "text"),
    [
        ({"conv": "mean"}, r"'conv' fits none of the 6 variables"),
        ({"": "keep"}, "policies leave no variable of the global model to be averaged"),
        ({"fc": "men"}, "'fc' has the policy 'men'"),
    ],
)
def test_a_server_refuses_policies_that_would_do_nothing_or_leave_nothing(policies: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fl.FederatedServer(model(), num_rounds=1, policies=policies)


@pytest.mark.quick
@pytest.mark.parametrize("stream", [False, True])
def test_differences_leave_out_codes_and_what_is_kept_needs_no_difference(stream: bool) -> None:
    class Trainer(Site):
        def train(self, weights: WeightDict, ctx: fl.FLContext) -> fl.TrainingResult:
            self.received.append({name: array.tolist() for name, array in weights.items()})
            own = {
                "fc": weights["fc"] + self.number,
                "seen": weights["seen"] + 1,
                "best": weights["best"] + self.number,
            }
            return fl.TrainingResult({**weights, **own}, aggregation_weight=1)

    server = fl.FederatedServer(model(), num_rounds=2, policies=POLICIES, kind=fl.Kind.DIFF, stream=stream)
    sites = Trainer(1), Trainer(3)
    result = server.run([fl.FederatedClient(f"site-{s.number}", s, kind=fl.Kind.DIFF) for s in sites])
    found = {name: array.tolist() for name, array in result.weights.items()}
    assert found == {"fc": [4, 4], "bn": [5], "codes": [7, 9], "scale": [0.5], "seen": 4, "best": [5]}
    with pytest.raises(fl.DtypeError, match="'codes' has dtype uint8, which cannot hold a difference"):
        fl.FederatedServer(model(), num_rounds=1, kind=fl.Kind.DIFF)


# Flower


def flower_client(received: list[dict[str, Any]], own: Callable[[int], dict[str, Array]]) -> Any:
    from flwr.app import Context, Message, MetricRecord, RecordDict

    from fed_learn.integrations.flower import to_record, to_weights

    def train(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"])
        arrays: Any = message.content["arrays"]
        weights = dict(to_weights(arrays))
        received.append({name: array.tolist() for name, array in weights.items()})
        metrics = MetricRecord({"num-examples": 1, "partition-id": k})
        sent = {**weights, "fc": weights["fc"] + k, **own(k)}
        return Message(RecordDict({"arrays": to_record(sent), "metrics": metrics}), reply_to=message)

    return train


@pytest.mark.parametrize("stream", [False, True])
def test_flowers_strategy_goes_by_policies_and_does_not_send_what_is_local(stream: bool) -> None:
    pytest.importorskip("flwr")
    from fed_learn.integrations.flower import FedAvg, LocalGrid, to_record, to_weights

    received: list[dict[str, Any]] = []

    def own(k: int) -> dict[str, Array]:
        return {"bn": np.full(1, np.nan, np.float32), "seen": np.array(k), "scale": np.full(1, k, np.float32)}

    strategy = FedAvg(fraction_evaluate=0.0, policies=POLICIES, stream=stream)
    result = strategy.start(LocalGrid(flower_client(received, own), 3), to_record(model()), num_rounds=2)
    found = {name: array.tolist() for name, array in to_weights(result.arrays).items()}
    assert found == {"fc": [2, 2], "bn": [5], "codes": [7, 9], "scale": [0.5], "seen": 3, "best": [-1]}
    assert {tuple(one) for one in received} == {tuple(name for name in model() if name != "bn")}


def test_flowers_older_strategy_refuses_local_and_takes_the_others() -> None:
    pytest.importorskip("flwr")
    from fed_learn.integrations.flower import LegacyFedAvg

    assert LegacyFedAvg(policies={"^1$": "keep"}).policies == {"^1$": "keep"}
    with pytest.raises(ValueError, match="parameters have no names here"):
        LegacyFedAvg(policies={"^1$": "local"})
    with pytest.raises(ValueError, match="'1' has the policy 'kept'"):
        LegacyFedAvg(policies={"1": "kept"})


# NVFlare


@pytest.mark.parametrize("stream", [False, True])
def test_nvflares_aggregators_go_by_policies(stream: bool) -> None:
    pytest.importorskip("nvflare")
    from nvflare.app_common.abstract.fl_model import FLModel

    from fed_learn.integrations.nvflare import WeightedAverageAggregator, WeightedAverageDXOAggregator

    aggregator = WeightedAverageAggregator(policies=POLICIES, stream=stream)
    aggregator._round, aggregator._global = 0, model()
    for k in (1, 3):
        params = {**model(), "fc": np.full(2, k, np.float32), "seen": np.array(k), "bn": np.full(1, k, np.float32)}
        meta = {"client_name": f"site-{k}", "NUM_STEPS_CURRENT_ROUND": 1}
        aggregator.accept_model(FLModel(params=params, meta=meta, current_round=0))
    made = {name: np.asarray(value).tolist() for name, value in aggregator.aggregate_model().params.items()}
    assert made == {"fc": [2, 2], "bn": [5], "codes": [7, 9], "scale": [0.5], "seen": 4, "best": [-1]}
    assert WeightedAverageDXOAggregator(policies=POLICIES).policies == POLICIES
    with pytest.raises(ValueError, match="'fc' has the policy 'men'"):
        WeightedAverageAggregator(policies={"fc": "men"})


# Configuration files and the command


@pytest.mark.quick
def test_a_configuration_file_has_policies_and_parts() -> None:
    config = ServerConfig.of({"policies": {"bn": "local"}, "servers": [{"partial": "average"}]})
    assert (dict(config.policies), config.partial) == ({"bn": "local"}, "average")
    with pytest.raises(fl.ConfigError, match="'policies': 'bn' has the policy 'lokal'"):
        ServerConfig.of({"policies": {"bn": "lokal"}})
    with pytest.raises(fl.ConfigError, match="'policies' must be an object"):
        ServerConfig.of({"policies": ["bn"]})
    with pytest.raises(fl.ConfigError, match="'partial' must be 'same' or 'average' or 'refuse', not 'some'"):
        ServerConfig.of({"partial": "some"})


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "fed-learn"), "simulate", "--rounds", "1", "--local-epochs", "1"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_the_command_takes_policies(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    config = tmp_path / "server.json"
    config.write_text(json.dumps({"policies": {"hidden.bias": "keep"}}))
    given = ("--config", str(config), "--policy", "output.bias=local")
    done = run_command("--out", str(tmp_path / "job"), "--json", *given)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["settings"]["policies"] == {"hidden.bias": "keep", "output.bias": "local"}
    assert summary["settings"]["partial"] == "same"
    assert summary["rounds"][0]["accepted"] == ["site-1", "site-2", "site-3", "site-4"]


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("bias", "'bias' is not REGEX=POLICY, as in bn=local"),
        ("bias=kept", "'bias' has the policy 'kept'; there are 'mean', 'same'"),
        ("conv=max", "policies: 'conv' fits none of the 4 variables"),
    ],
)
def test_the_command_refuses_wrong_policies_as_wrong_use(policy: str, text: str, tmp_path: Path) -> None:
    done = run_command("--out", str(tmp_path / "job"), "--policy", policy)
    assert (done.returncode, done.stdout) == (2, "")
    assert text in done.stderr
    assert not (tmp_path / "job").exists()
