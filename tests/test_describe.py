"""`fl.describe`: what it tells of models and weights, its table, and the policies that it hands on."""

import copy
import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest

import fed_learn as fl
from fed_learn.adapters import DescribedVariable
from fed_learn.adapters.base import Variable
from fed_learn.adapters.describe import described
from fed_learn.weights import FrozenWeights

pytestmark = pytest.mark.quick

WEIGHTS: dict[str, Any] = {
    "w": np.zeros((4, 2), np.float32),
    "bn.mean": np.zeros(2),
    "w.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8),
    "a": np.zeros((), np.int64),
}


def row(description: fl.Description, name: str) -> DescribedVariable:
    (found,) = (variable for variable in description if variable.name == name)
    return found


def test_every_variable_has_a_row_in_the_order_of_the_weights() -> None:
    for weights in (WEIGHTS, FrozenWeights(WEIGHTS)):
        description = fl.describe(weights)
        assert [variable.name for variable in description] == list(WEIGHTS)
        assert len(description) == 4
        assert row(description, "bn.mean") == DescribedVariable(
            "bn.mean", (2,), "float64", "statistic", "mean", None, 16, None, None
        )
    with pytest.raises(dataclasses.FrozenInstanceError):
        description.variables = ()  # type: ignore[misc]


def test_codes_have_to_be_the_same_and_a_policy_of_the_user_goes_first() -> None:
    assert {v.name: (v.role, v.policy) for v in fl.describe(WEIGHTS, policies={"bn": "local", "a$": "max"})} == {
        "w": ("code", "same"),
        "bn.mean": ("statistic", "local"),
        "w.quant_state.bitsandbytes__nf4": ("code", "same"),
        "a": ("counter", "max"),
    }


def test_its_policies_are_those_that_averages_take() -> None:
    name = "layer+[1].w"
    weights = {name: np.zeros(1), "layer+[1].wide": np.zeros(1)}
    policies = fl.describe(weights, policies={r"\.w$": "keep"}).policies
    assert policies == {r"^layer\+\[1\]\.w$": "keep"}
    others = [{n: np.full(1, value) for n in weights} for value in (1.0, 3.0)]
    mean = fl.weighted_average(others, policies=policies, like=weights)
    assert {n: array.tolist() for n, array in mean.items()} == {name: [0], "layer+[1].wide": [2]}
    assert fl.describe({"w": np.zeros(1)}).policies == {}


def test_only_chooses_and_what_fits_nothing_is_an_error() -> None:
    assert [v.name for v in fl.describe(WEIGHTS, only="bn", policies={"^a$": "sum"})] == ["bn.mean"]
    with pytest.raises(fl.NamesError, match="only='conv' fits none"):
        fl.describe(WEIGHTS, only="conv")
    with pytest.raises(ValueError, match=r"policies: 'batchnorm' fits none of the 4 variables \('w', 'bn.mean', .*\)"):
        fl.describe(WEIGHTS, policies={"batchnorm": "local"})
    with pytest.raises(ValueError, match="the policy 'lokal'"):
        fl.describe(WEIGHTS, policies={"bn": "lokal"})
    with pytest.raises(fl.ModelError, match="no model that is known"):
        fl.describe(3)


def test_the_table_and_its_summary() -> None:
    weights = {"w": np.zeros((400, 2), np.float32), "bn.mean": np.zeros(2)}
    assert fl.describe(weights, policies={"bn": "local"}).table(width=80).splitlines() == [
        "name     shape  dtype    role       policy  trained  bytes",
        "w        400x2  float32  ?          mean    ?        3.2 kB",
        "bn.mean  2      float64  statistic  local   ?        16 B",
        "",
        "2 variables, 3.2 kB, 802 numbers; mean: 1 variable, 3.2 kB; local: 1 variable,",
        "16 B",
    ]


def test_the_table_has_the_width_of_the_terminal_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "encoder.layers.attention.self.query_key_value.projection.weight"
    for width in (40, 80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = str(fl.describe({name: np.zeros(3)})).splitlines()
        assert max(map(len, lines)) <= max(width, 70)  # a name gets 24 columns at least
        names = max(lines[0].index("shape") - 2, 0)
        assert "".join(line[:names].strip() for line in lines[1 : lines.index("")]) == name


def long_model() -> dict[str, Any]:
    layers = {f"layers.{i}.conv1.weight": np.zeros((3, 1 if i == 0 else 3), np.float32) for i in range(70)}
    return {"embed": np.zeros(2), **layers, "head": np.zeros(1)}


def test_variables_that_differ_in_numbers_share_a_line_of_a_long_table_which_says_so() -> None:
    description = fl.describe(long_model())
    lines = description.table(100).splitlines()
    assert [line.split("  ")[0] for line in lines[:5]] == [
        "name",
        "embed",
        "layers.0.conv1.weight",
        "layers.*.conv1.weight",
        "head",
    ]
    assert lines[3].split() == ["layers.*.conv1.weight", "69", "3x3", "float32", "?", "mean", "?", "2.5", "kB"]
    assert lines[5] == "(n: so many variables, whose names have other numbers in the place of *)"
    assert len(description) == 72
    short = fl.describe(dict(list(long_model().items())[:50]))
    assert len([line for line in short.table(100).splitlines() if "conv1" in line]) == 49


def test_groups_that_look_alike_do_not_hide_one_another() -> None:
    weights = {f"l.{i}": np.zeros(1 + i % 2) for i in range(80)}
    lines = fl.describe(weights).table(100).splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["l.*", "40", "1"], ["l.*", "40", "2"]]


def test_what_cannot_be_averaged_is_told_once_for_all_with_which_it_is_so() -> None:
    problems = [
        fl.DtypeError(f"model: {name!r} has dtype qint8, which cannot be averaged", name=name, dtype="qint8")
        for name in ("a", "b")
    ]
    variables = [Variable(e.name or "", (), np.dtype(np.void), None, None, None, e.name, e) for e in problems]
    description = described(variables)
    assert next((v.dtype, v.policy, v.problem) for v in description) == ("qint8", None, str(problems[0]))
    text = " ".join(description.table(200).split())
    assert "'a' has dtype qint8, which cannot be averaged. So it is with 1 more: 'b'" in text
    assert "cannot be averaged: 2 variables" in description.summary
    assert description.policies == {}


@pytest.mark.not_quick
def test_a_model_of_torch_with_ties_masks_and_frozen_parts() -> None:
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.norm = torch.nn.BatchNorm1d(3)
            self.norm.weight.requires_grad_(False)
            self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
            self.register_buffer("position_ids", torch.arange(5))
            self.register_buffer("average", torch.zeros(3))
            self.register_buffer("rng_state", torch.get_rng_state())
            self.register_buffer("codes", torch.zeros(2).to(torch.float8_e4m3fn))

    description = fl.describe(Net())
    assert {v.name: (v.role, v.policy, v.trainable) for v in description} == {
        "embed.weight": ("trained", "mean", True),
        "head.weight": ("trained", "mean", True),
        "norm.weight": ("trained", "mean", False),
        "norm.bias": ("trained", "mean", True),
        "norm.running_mean": ("statistic", "mean", False),
        "norm.running_var": ("statistic", "mean", False),
        "norm.num_batches_tracked": ("counter", "mean", False),
        "mask": ("constant", "same", False),
        "position_ids": ("constant", "same", False),
        "average": ("statistic", "mean", False),
        "rng_state": ("code", "same", False),
        "codes": (None, None, False),
    }
    assert row(description, "head.weight").tied_to == "embed.weight"
    assert "head.weight (tied to embed.weight)" in description.table(120)
    assert row(description, "codes").problem == (
        "model: 'codes' has dtype torch.float8_e4m3fn, which cannot be averaged; only= chooses the others"
    )
    assert "1 more name of the same variables (tied)" in description.summary
    assert description.policies == dict.fromkeys(["^mask$", "^position_ids$", "^rng_state$"], "same")


@pytest.mark.not_quick
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*reduce_range:UserWarning")
def test_what_quantization_observes_is_averaged_before_and_after_the_first_batch() -> None:
    torch = pytest.importorskip("torch")
    ao = torch.ao.quantization
    torch.manual_seed(0)
    model = torch.nn.Sequential(ao.QuantStub(), torch.nn.Linear(3, 2)).train()
    model.qconfig = ao.get_default_qat_qconfig("fbgemm")
    model = ao.prepare_qat(model)
    start = fl.describe(model)
    assert {v.name.rpartition(".")[2] for v in start if v.role == "constant"} == {"eps"}
    assert {v.role for v in start if v.name.endswith(("zero_point", "_enabled", "_val", "scale"))} == {"statistic"}
    clients = []
    for shift in (-3, 3):
        client = copy.deepcopy(model)
        client(torch.randn(8, 3) + shift)
        assert fl.describe(client).policies == start.policies
        clients.append(fl.get_weights(client))
    points = [int(client["0.activation_post_process.zero_point"][0]) for client in clients]
    assert points[0] != points[1]
    mean = fl.weighted_average(clients, policies=start.policies)
    assert abs(int(mean["0.activation_post_process.zero_point"][0]) - sum(points) / 2) <= 0.5
    client.apply(ao.disable_observer)
    without = fl.get_weights(client)
    assert fl.weighted_average([without] * 2, policies=start.policies)["1.weight_fake_quant.observer_enabled"] == [0]


@pytest.mark.not_quick
def test_masks_of_pruning_are_constants() -> None:
    torch = pytest.importorskip("torch")
    prune = importlib.import_module("torch.nn.utils.prune")
    layer = prune.l1_unstructured(torch.nn.Linear(4, 4), "weight", amount=0.5)
    layer.register_buffer("mask", torch.ones(2))
    roles = {v.name: v.role for v in fl.describe(layer)}
    assert roles == {"bias": "trained", "weight_orig": "trained", "weight_mask": "constant", "mask": "constant"}


@pytest.mark.not_quick
def test_arrays_in_two_places_of_a_tree_are_tied_until_they_are_loaded() -> None:
    jnp = pytest.importorskip("jax.numpy")
    for table in (jnp.ones(2), np.ones(2, np.float32)):
        tree = {"embed": table, "head": table, "other": jnp.ones(2)}
        assert [v.tied_to for v in fl.describe(tree)] == [None, "embed", None]
        weights = fl.get_weights(tree, copy=False)
        assert weights["head"] is weights["embed"]
        untied = fl.set_weights(tree, {**weights, "head": np.zeros(2, np.float32)})
        assert [v.tied_to for v in fl.describe(untied)] == [None, None, None]


@pytest.mark.not_quick
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_model_is_shown_with_what_is_still_to_do() -> None:
    torch = pytest.importorskip("torch")
    description = fl.describe(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LazyLinear(2)))
    assert row(description, "0.weight").policy == "mean"
    assert "run a batch through the model first" in str(row(description, "1.weight").problem)


@pytest.mark.not_quick
def test_two_names_of_one_variable_need_one_policy() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(4, 2), "head": torch.nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    text = (
        "'embedding.weight' and 'head.weight' are one variable, and the first has the policy 'mean', the second 'local'"
    )
    with pytest.raises(ValueError, match=text):
        fl.describe(model, policies={"head": "local"})
    assert {row.policy for row in fl.describe(model, policies={"head|embedding": "local"})} == {"local"}


@pytest.mark.not_quick
def test_state_that_cannot_travel_is_told_beneath_the_table() -> None:
    torch = pytest.importorskip("torch")

    class Vocabulary(torch.nn.Linear):  # type: ignore[misc,name-defined]
        def get_extra_state(self) -> Any:
            return {"words": ["a", "b"]}

        def set_extra_state(self, state: Any) -> None:
            pass

    shown = fl.describe(torch.nn.Sequential(Vocabulary(2, 1)))
    assert shown.left == ("'0._extra_state' (a dict in its state_dict)",)
    assert "cannot travel as numbers: '0._extra_state' (a dict in its state_dict)." in shown.table(200)
