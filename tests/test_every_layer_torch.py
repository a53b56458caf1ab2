"""Each class of layers of torch, loaded: what it computes afterwards is what its source computes, as torch loads it."""

import copy
from typing import Any

import layers_of_torch as layers
import numpy as np
import pytest
import torch
from layers_of_torch import ao
from torch import nn

import fed_learn as fl

RECIPES = {
    **{f"nn.{name}": recipe for name, recipe in layers.OF_NN.items()},
    **{f"parametrized: {name}": recipe for name, recipe in layers.PARAMETRIZED.items()},
    **{f"quantization: {name}": recipe for name, recipe in layers.OF_QUANTIZATION.items()},
}
WITH_RECIPE = {nn: layers.OF_NN.keys() | layers.NO_LAYERS, ao: layers.OF_QUANTIZATION.keys() | layers.NO_QUANTIZERS}
OTHERS = [
    (module, name) for module in (nn, ao) for name in layers.classes_of(module) if name not in WITH_RECIPE[module]
]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return 0 < len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.filterwarnings("ignore:.*(deprecated|nested tensors is in prototype|reduce_range|with projections)")
@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_computes_what_its_source_does_once_it_is_loaded_and_what_torch_would_load(name: str) -> None:
    recipe = RECIPES[name]
    source = layers.trained(recipe, 1)
    target, torchs = layers.made(recipe, 2), layers.made(recipe, 2)
    torchs.load_state_dict(source.state_dict())
    objects = {path: id(parameter) for path, parameter in target.named_parameters()}
    shapes = {path: tensor.shape for path, tensor in target.state_dict().items()}

    fl.set_weights(target, fl.get_weights(source))
    assert {path: id(parameter) for path, parameter in target.named_parameters()} == objects
    assert (shapes != {path: tensor.shape for path, tensor in target.state_dict().items()}) is recipe.grows
    for training in (False, True):
        if training and isinstance(source, nn.SyncBatchNorm):  # which trains on GPUs alone
            continue
        outputs = [layers.called(layer.train(training), recipe.inputs()) for layer in (source, target, torchs)]
        assert same(outputs[0], outputs[1])
        assert same(outputs[2], outputs[1])
        fresh = layers.called(layers.made(recipe, 2).train(training), recipe.inputs())
        assert recipe.constant or not same(outputs[0], fresh)


@pytest.mark.parametrize(("module", "name"), OTHERS, ids=[name for _, name in OTHERS])
def test_a_class_without_a_recipe_has_nothing_to_load(module: Any, name: str) -> None:
    kind = getattr(module, name)
    assert not layers.may_have_variables(kind), f"write a recipe for {name} in tests/layers_of_torch.py"


def test_there_is_a_recipe_for_what_is_there_alone() -> None:
    assert layers.classes_of(nn).keys() >= WITH_RECIPE[nn]
    quantizers = {name.partition(" ")[0] for name in layers.OF_QUANTIZATION if name[0].isupper()}
    assert layers.classes_of(ao).keys() >= quantizers | layers.NO_QUANTIZERS


# What modules of users do as they are loaded.


class Derived(nn.Module):
    """Keeps the inverse of its matrix, which no state_dict has."""

    inverse: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(2, 2))
        self.register_buffer("inverse", torch.zeros(2, 2), persistent=False)
        self.derive()

    def derive(self, *_: Any) -> None:
        with torch.no_grad():
            if float(self.matrix[0, 0]) == 13:
                raise ValueError("13 is not inverted here")
            self.inverse = torch.linalg.inv(self.matrix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.inverse


class OfItsOwn(Derived):
    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.derive()


class Whole(Derived):
    def load_state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        found = super().load_state_dict(*arguments, **keywords)
        self.derive()
        return found


class Hooked(Derived):
    def __init__(self) -> None:
        super().__init__()
        registered: Any = self.register_load_state_dict_post_hook  # which has no types
        registered(lambda module, keys: module.derive())


class HookedBefore(Derived):
    """Derives from the values that are on their way."""

    def __init__(self) -> None:
        super().__init__()

        def hook(module: Any, state: Any, prefix: str, *_: Any) -> None:
            if float(state[f"{prefix}matrix"][0, 0]) == 13:
                raise ValueError("13 is not inverted here")
            module.inverse = torch.linalg.inv(state[f"{prefix}matrix"])

        registered: Any = self.register_load_state_dict_pre_hook  # which has no types
        registered(hook)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


INSIDE: dict[str, Any] = {
    "itself": lambda kind: kind(),
    "in others": lambda kind: nn.Sequential(nn.Linear(2, 2), nn.Sequential(kind())),
    "compiled": lambda kind: nn.Sequential(nn.Linear(2, 2), compiled(nn.Sequential(kind()))),
    "in parallel": lambda kind: nn.DataParallel(nn.Sequential(kind())),
}
KINDS = [(kind, where) for kind in (OfItsOwn, Hooked, HookedBefore) for where in INSIDE] + [(Whole, "itself")]


@pytest.mark.parametrize(("kind", "where"), KINDS, ids=[f"{kind.__name__} {where}" for kind, where in KINDS])
def test_what_modules_derive_as_torch_loads_them_is_derived(kind: Any, where: str) -> None:
    source, target = INSIDE[where](kind), INSIDE[where](kind)
    ways: list[dict[str, Any]] = [{}, {"strict": False}, {"only": "matrix"}]
    for way in ways:
        weights = fl.get_weights(source, only=way.get("only"))
        fl.set_weights(target, weights, **way)
        (matrix,) = (torch.from_numpy(value) for name, value in weights.items() if name.endswith("matrix"))
        (inverse,) = (part.inverse for part in target.modules() if isinstance(part, Derived))
        assert torch.equal(inverse, torch.linalg.inv(matrix))
        source = INSIDE[where](kind)


@pytest.mark.parametrize(("kind", "where"), KINDS, ids=[f"{kind.__name__} {where}" for kind, where in KINDS])
def test_a_module_that_refuses_its_weights_leaves_the_whole_model_as_it_was(kind: Any, where: str) -> None:
    model = INSIDE[where](kind)
    part = next(part for part in model.modules() if isinstance(part, Derived))
    before = fl.get_weights(model)
    live, inverse = fl.get_weights(model, copy=False), part.inverse.clone()
    bad = {name: np.full_like(value, 13) for name, value in before.items()}
    with pytest.raises(fl.ModelError, match="refuses its weights as it loads them: 13 is not inverted here"):
        fl.set_weights(model, bad)
    assert {name: value.tolist() for name, value in fl.get_weights(model).items()} == {
        name: value.tolist() for name, value in before.items()
    }
    assert {name: value.tolist() for name, value in live.items()} == {
        name: value.tolist() for name, value in before.items()
    }
    assert torch.equal(part.inverse, inverse)


def test_only_modules_in_whose_reach_something_is_loaded_do_more_than_copying() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), Hooked())
    with torch.no_grad():
        model[1].matrix.copy_(torch.eye(2))  # what it keeps is not of this one
    inverse = model[1].inverse.clone()
    weights = fl.get_weights(model, only="^0")
    fl.set_weights(model, weights, only="^0")
    assert torch.equal(model[1].inverse, inverse)
    fl.set_weights(model, fl.get_weights(model))
    assert torch.equal(model[1].inverse, torch.eye(2))


# Buffers that grow.


def observed() -> Any:
    return nn.Sequential(nn.Linear(4, 4), layers.per_channel())


def grown_weights() -> dict[str, Any]:
    model = observed().train()
    model(torch.randn(5, 4))
    return fl.get_weights(model)


@pytest.mark.parametrize("views", [False, True], ids=["", "views are held"])
def test_buffers_get_their_shape_as_they_are_loaded_and_share_no_memory_with_the_weights(views: bool) -> None:
    model, weights = observed(), grown_weights()
    held = fl.get_weights(model, copy=False) if views else {}
    kept = copy.deepcopy(weights)
    fl.set_weights(model, weights)
    for value in weights.values():
        value.fill(0)
    found = fl.get_weights(model)
    assert {name: value.tolist() for name, value in found.items()} == {n: v.tolist() for n, v in kept.items()}
    assert all(view.shape in ((0,), (1,)) for name, view in held.items() if name.endswith(("scale", "min_val")))


def test_tensors_are_loaded_into_buffers_that_grow_as_arrays_are() -> None:
    weights = grown_weights()
    tensors: Any = {name: torch.from_numpy(value) for name, value in weights.items()}
    model = fl.set_weights(observed(), tensors)
    assert all(np.array_equal(value, weights[name]) for name, value in fl.get_weights(model).items())


def test_a_variable_that_does_not_grow_is_refused_by_its_shape_and_nothing_is_loaded() -> None:
    model: Any = nn.Sequential(ao.QuantStub(), layers.quantized_linear(ao.get_default_qat_qconfig("fbgemm")))
    before = fl.get_weights(model)
    wrong = {name: value + 1 for name, value in before.items()}
    wrong["1.weight"] = np.ones((7, 4), np.float32)
    with pytest.raises(fl.ShapeError, match=r"weights: '1\.weight' has shape \(7, 4\), expected \(3, 4\)"):
        fl.set_weights(model, wrong)
    assert {n: v.tolist() for n, v in fl.get_weights(model).items()} == {n: v.tolist() for n, v in before.items()}


def test_an_optimizer_keeps_its_parameters_where_buffers_grow() -> None:
    model, weights = observed(), grown_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fl.set_weights(model, weights)
    model(torch.ones(5, 4)).sum().backward()
    optimizer.step()
    assert (fl.get_weights(model)["0.bias"] != weights["0.bias"]).any()


# Parametrizations.


def test_the_mean_of_orthogonal_weights_of_one_beginning_is_orthogonal_and_not_the_mean_of_the_weights() -> None:
    """What is averaged is what is stored: originals, and the base to which they are relative, which must be common."""
    clients: list[Any] = [layers.Orthogonal(), layers.Orthogonal()]
    fl.set_weights(clients[1], fl.get_weights(clients[0]))
    for seed, client in enumerate(clients):
        torch.manual_seed(seed)
        with torch.no_grad():
            client.parametrizations.weight.original.add_(torch.randn(3, 3))
    weights = [fl.get_weights(client) for client in clients]
    assert list(weights[0]) == ["bias", "parametrizations.weight.original", "parametrizations.weight.0.base"]
    mean: Any = fl.set_weights(layers.Orthogonal(), fl.weighted_average(weights, [1, 1]))
    assert torch.allclose(mean.weight @ mean.weight.T, torch.eye(3), atol=1e-5)
    assert not torch.allclose(mean.weight, (clients[0].weight + clients[1].weight) / 2, atol=1e-2)


def test_the_mean_of_a_normalized_weight_is_that_of_lengths_and_of_directions() -> None:
    recipe = layers.PARAMETRIZED["weight_norm"]
    one, two, mean = (layers.trained(recipe, seed) for seed in (1, 2, 3))
    fl.set_weights(mean, fl.weighted_average([fl.get_weights(one), fl.get_weights(two)], [1, 3]))
    lengths, directions = (
        (getattr(one.parametrizations.weight, part) + 3 * getattr(two.parametrizations.weight, part)) / 4
        for part in ("original0", "original1")
    )
    assert torch.allclose(mean.weight, lengths * directions / directions.norm(dim=1, keepdim=True))
