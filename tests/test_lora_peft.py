"""Adapters of PEFT itself, averaged and loaded again: the model computes as with the dense mean of what they add."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fed_learn as fl

# PEFT and what it loads warn of their own matters.
pytestmark = pytest.mark.filterwarnings("default")


class Net(nn.Module):
    """An embedding, a convolution, one of 1×1, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.point = nn.Conv2d(6, 5, 1)
        self.q_proj = nn.Linear(12, 10)
        self.out = nn.Linear(10, 4)
        self.head = nn.Linear(5, 3)

    def forward(self, words: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.point(torch.relu(self.conv(images))).mean((2, 3))
        return self.out(torch.tanh(self.q_proj(self.embed(words)))), self.head(seen)


TARGETS = ["embed", "conv", "point", "q_proj", "out"]


def config_of(rank: int = 4, alpha: int = 8, **fields: Any) -> Any:
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, modules_to_save=["head"], **fields)


def base_model() -> Net:
    torch.manual_seed(0)
    return Net().double()


def client(seed: int, config: Any, model: Any = None) -> Any:
    """A PEFT model whose adapters hold something."""
    made = peft.get_peft_model(base_model() if model is None else model, copy.deepcopy(config))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))
    return made


def layers_of(model: Any) -> dict[str, Any]:
    kinds = peft.tuners.lora.LoraLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def dense_mean(clients: list[Any], weights: list[float], rank: Any = None) -> Any:
    """A plain model with the mean of all that clients add to it, computed from PEFT's own whole matrices."""
    made = base_model()
    for path in TARGETS:
        deltas = [layers_of(one)[f"base_model.model.{path}"].get_delta_weight("default") for one in clients]
        delta = sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
        if rank is not None:
            flat = delta.flatten(1)
            u, s, v = torch.linalg.svd(flat, full_matrices=False)
            kept = rank(path)
            delta = ((u[:, :kept] * s[:kept]) @ v[:kept]).reshape(delta.shape)
        made.get_submodule(path).weight.data += delta
    heads = [one.base_model.model.head.modules_to_save["default"] for one in clients]
    for name in ("weight", "bias"):
        mean = sum(w * getattr(head, name) for w, head in zip(weights, heads, strict=True)) / sum(weights)
        getattr(made.head, name).data = mean
    return made


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    images = torch.randn((5, 3, 8, 8), generator=random, dtype=torch.float64)
    return torch.randint(20, (5, 6), generator=random), images


def alike(one: Any, other: Any) -> None:
    with torch.no_grad():
        pairs = list(zip(one.eval()(*inputs()), other.eval()(*inputs()), strict=True))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def loaded(weights: Any, config: Any, model: Any = None) -> Any:
    made = client(99, config, model)
    result: Any = peft.set_peft_model_state_dict(made, dict(weights))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    return made


CONFIGS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "conv": 3}, "alpha_pattern": {"out": 3, "conv": 5}},
    "both": {"use_rslora": True, "rank_pattern": {"^out": 1}, "alpha_pattern": {"embed": 9}},
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("method", ["svd", "stack"])
def test_a_model_with_the_average_computes_as_with_the_dense_mean(fields: dict[str, Any], method: Any) -> None:
    config, weights = config_of(**fields), [1.0, 2.0, 5.0]
    clients = [client(seed, config) for seed in range(3)]
    made = fl.lora.average(list(map(peft.get_peft_model_state_dict, clients)), weights, config=config, method=method)
    assert isinstance(made.config, peft.LoraConfig)
    ranks = {path: layers_of(clients[0])[f"base_model.model.{path}"].r["default"] for path in TARGETS}
    times = 3 if method == "stack" else 1
    assert {path: made.report[f"base_model.model.{path}"].rank for path in TARGETS} == {
        path: rank * times for path, rank in ranks.items()
    }
    alike(loaded(made.weights, made.config), dense_mean(clients, weights, ranks.get if method == "svd" else None))


def test_clients_of_several_ranks_and_scalings_make_one_model() -> None:
    configs = [config_of(2, 4), config_of(5, 3, use_rslora=True), config_of(3, 9, rank_pattern={"out": 1})]
    clients = [client(seed, config) for seed, config in enumerate(configs)]
    dicts = list(map(peft.get_peft_model_state_dict, clients))
    made = fl.lora.average(dicts, [1, 2, 3], config=configs)
    alike(loaded(made.weights, made.config), dense_mean(clients, [1, 2, 3], lambda path: 5))
    whole = fl.lora.average(dicts, [1, 2, 3], config=configs, rank=12)
    alike(loaded(whole.weights, whole.config), dense_mean(clients, [1, 2, 3]))


@pytest.mark.parametrize("names", ["of the base model", "inside of PEFT's"])
def test_the_residual_in_the_base_is_exact(names: str) -> None:
    config, weights = config_of(), [1.0, 2.0, 5.0]
    clients = [client(seed, config) for seed in range(3)]
    dicts = list(map(peft.get_peft_model_state_dict, clients))
    base = base_model().state_dict() if names == "of the base model" else clients[0].state_dict()
    before = {name: tensor.clone() for name, tensor in base.items()}
    made = fl.lora.average(dicts, weights, config=config, method="residual", base=base)
    assert made.config is config
    assert made.base is not None
    assert list(made.base) == list(base)
    assert all(torch.equal(base[name], before[name]) for name in base)
    model = base_model()
    if names == "of the base model":
        model.load_state_dict(dict(made.base))
        model = loaded(made.weights, config, model)
    else:
        model = client(3, config)
        model.load_state_dict(dict(made.base))
        peft.set_peft_model_state_dict(model, dict(made.weights))
    alike(model, dense_mean(clients, weights))
    assert all(report.error > 0.1 for report in made.report.values())


def test_weights_stored_as_inputs_by_outputs_take_the_residual_too() -> None:
    from transformers.pytorch_utils import Conv1D

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.c_attn = Conv1D(6, 4)  # type: ignore[no-untyped-call]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.c_attn(x)
            return out

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)
    clients = [client(seed, config, Block()) for seed in range(2)]
    dicts, base = list(map(peft.get_peft_model_state_dict, clients)), Block().state_dict()
    made = fl.lora.average(dicts, config=config, method="residual", base=base)
    model = Block()
    model.load_state_dict(dict(made.base or {}))
    found = loaded(made.weights, config, model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = sum(one(x) for one in clients) / 2
        torch.testing.assert_close(found(x), expected)


def test_the_dict_of_the_whole_model_and_the_file_give_the_same_factors(tmp_path: Path) -> None:
    config = config_of()
    clients = [client(seed, config) for seed in range(2)]
    found: Any = fl.lora.average(list(map(peft.get_peft_model_state_dict, clients)), config=config).weights
    whole: Any = fl.lora.average([one.state_dict() for one in clients], config=config).weights
    inside = "base_model.model.q_proj.lora_A.default.weight"
    assert torch.equal(whole[inside], found["base_model.model.q_proj.lora_A.weight"])
    embed = "base_model.model.embed.lora_embedding_A"
    assert torch.equal(whole[f"{embed}.default"], found[embed])
    assert "base_model.model.q_proj.base_layer.weight" in whole
    files = []
    for i, one in enumerate(clients):
        one.save_pretrained(tmp_path / str(i))
        safetensors = pytest.importorskip("safetensors.numpy")
        files.append(safetensors.load_file(tmp_path / str(i) / "adapter_model.safetensors"))
    configs = [str(tmp_path / str(i)) for i in range(2)]
    made = fl.lora.average(files, config=configs)
    assert isinstance(made.config, dict)
    assert made.weights.keys() == found.keys()
    for name, array in made.weights.items():
        assert array.tobytes() == found[name].numpy().tobytes()


def test_magnitudes_of_dora_load_beside_the_factors() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "out"], use_dora=True)
    clients = [client(seed, config) for seed in range(2)]
    dicts = list(map(peft.get_peft_model_state_dict, clients))
    name = "base_model.model.q_proj.lora_magnitude_vector"
    made: Any = fl.lora.average(dicts, config=config)
    assert torch.equal(made.weights[name], (dicts[0][name] + dicts[1][name]) / 2)
    assert torch.equal(peft.get_peft_model_state_dict(loaded(made.weights, config))[name], made.weights[name])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_take_a_part_of_the_base_are_averaged_at_their_rank_or_once_they_are_plain(
    init: str, tmp_path: Path
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")

    def plain() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16))

    def merged(model: Any) -> torch.Tensor:
        whole: torch.Tensor = copy.deepcopy(model).merge_and_unload()[0].weight.detach()
        return whole

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init)  # type: ignore[arg-type]
    clients = []
    for seed in range(2):
        model = peft.get_peft_model(plain(), copy.deepcopy(config))
        model.save_pretrained(str(tmp_path / f"start-{seed}"))
        # Loaded beside a base from which a part was taken already, it shall not take another.
        settings = tmp_path / f"start-{seed}" / "adapter_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"init_lora_weights": True}))
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
        model.save_pretrained(
            str(tmp_path / f"plain-{seed}"), path_initial_model_for_weight_conversion=str(settings.parent)
        )
        clients.append(model)
    mean = (merged(clients[0]) + merged(clients[1])) / 2
    dicts = list(map(peft.get_peft_model_state_dict, clients))
    with pytest.raises(fl.ConfigError, match=rf"init_lora_weights='{init}'.*path_initial_model_for_weight_conversion"):
        fl.lora.average(dicts, config=config, method="stack")

    made: Any = fl.lora.average(dicts, config=config)
    model = peft.get_peft_model(plain(), made.config)
    peft.set_peft_model_state_dict(model, made.weights)
    taken = plain()[0].weight.detach() - model.base_model.model[0].base_layer.weight
    u, s, vt = torch.linalg.svd(mean - plain()[0].weight.detach() + taken)
    torch.testing.assert_close(merged(model), plain()[0].weight.detach() - taken + (u[:, :4] * s[:4]) @ vt[:4])

    folders = [tmp_path / f"plain-{seed}" for seed in range(2)]
    files = [safetensors.load_file(folder / "adapter_model.safetensors") for folder in folders]
    exact: Any = fl.lora.average(files, config=folders, method="stack")
    assert exact.config["r"] == 16
    model = peft.get_peft_model(plain(), peft.LoraConfig(**exact.config))
    peft.set_peft_model_state_dict(model, exact.weights)
    torch.testing.assert_close(merged(model), mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_come_back_as_tensors_of_their_dtype(dtype: Any) -> None:
    clients = [client(seed, config_of()) for seed in range(2)]
    dicts = [{n: t.to(dtype) for n, t in peft.get_peft_model_state_dict(one).items()} for one in clients]
    made: Any = fl.lora.average(dicts).weights
    assert all(type(value) is torch.Tensor for value in made.values())
    assert {value.dtype for value in made.values()} == {dtype}
    arrays = fl.lora.average([fl.get_weights(one) for one in dicts]).weights
    assert {n: t.float().numpy().tobytes() for n, t in made.items()} == {
        n: array.astype("float32").tobytes() for n, array in arrays.items()
    }
