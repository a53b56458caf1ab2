"""What is particular to models of torch: buffers, ties, wrappers, gradients, optimizers, and what has no values."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models_of_frameworks as models
import numpy as np
import pytest
import torch
from torch import nn

import fed_learn as fl
from fed_learn import adapters


def net(seed: int = 1) -> Any:
    return models.torch_net(seed)


def bits(weights: Any) -> Any:
    return {n: (str(a.dtype), a.shape, np.ascontiguousarray(a).tobytes()) for n, a in weights.items()}


def state(model: Any) -> Any:
    return bits(models.torch_read(model))


# Ties and buffers.


def test_tied_parameters_have_all_their_names_and_one_identity() -> None:
    found = {v.name: v for v in adapters.variables(net())}
    assert found["3.weight"].identity == found["4.weight"].identity != found["5.weight"].identity
    model = net(2)
    fl.set_weights(model, fl.get_weights(net()))
    assert model[3].weight is model[4].weight


def test_tied_parameters_with_two_values_are_refused_and_nothing_is_loaded() -> None:
    model, weights = net(2), fl.get_weights(net())
    before = state(model)
    weights["4.weight"][0, 0] += 1
    with pytest.raises(fl.TiedVariablesError) as caught:
        fl.set_weights(model, weights)
    assert caught.value.names == ("3.weight", "4.weight")
    assert state(model) == before
    # One of the names is enough.
    fl.set_weights(model, {"4.weight": weights["4.weight"]}, strict=False)
    assert model[3].weight[0, 0].item() == weights["4.weight"][0, 0]


def test_a_parameter_that_two_modules_share_through_views_is_tied_as_well() -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach())
    weights = fl.get_weights(model)
    weights["b.weight"][0, 0] += 1
    with pytest.raises(fl.TiedVariablesError):
        fl.set_weights(model, weights)


def test_buffers_that_are_not_persistent_are_left_out_and_stay() -> None:
    model = net(2)
    model.scratch.fill_(7)
    assert "scratch" not in fl.get_weights(model)
    fl.set_weights(model, fl.get_weights(net()))
    assert model.scratch.tolist() == [7, 7, 7]


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16]
DTYPES += [torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)], ids=str)
def test_buffers_of_every_dtype_make_the_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    values = torch.arange(int(np.prod(shape))).reshape(shape)
    source.register_buffer("b", (values % 3 + 1).to(dtype))
    target.register_buffer("b", torch.zeros(shape).to(dtype))
    weights = fl.get_weights(source)
    assert f"torch.{weights['b'].dtype.name}" == str(dtype)
    fl.set_weights(target, weights)
    held: Any = target.b
    assert held.dtype == dtype
    assert held.equal(source.b)


def test_what_cannot_be_averaged_is_refused_by_name_unless_only_leaves_it_out() -> None:
    for strange in (
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2).to(torch.float8_e4m3fn),
        torch.eye(2).to_sparse(),
        torch.zeros(2, device="meta"),
    ):
        model: Any = nn.Linear(2, 2)
        model.register_buffer("strange", strange)
        for use in (fl.get_weights, adapters.variables, lambda model: fl.set_weights(model, {})):
            with pytest.raises((fl.DtypeError, fl.WeightsTypeError), match="'strange'"):
                use(model)
        part = fl.get_weights(model, only="weight|bias")
        assert list(part) == ["weight", "bias"]
        part["bias"][:] = 3
        fl.set_weights(model, part, only="weight|bias")
        assert model.bias.tolist() == [3, 3]
        fl.set_weights(model, {"bias": np.full(2, 4, np.float32)}, strict=False)
        assert model.bias.tolist() == [4, 4]


# What has no values yet.


def test_a_module_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    for use in (fl.get_weights, lambda model: fl.set_weights(model, fl.get_weights(nn.Linear(2, 2)))):
        with pytest.raises(fl.WeightsTypeError, match="'weight' is a tensor on the meta device, which has no values"):
            use(model)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")  # torch says so of each
def test_a_lazy_module_is_refused_until_a_batch_was_run() -> None:
    model = nn.LazyLinear(2)
    with pytest.raises(fl.ModelError, match=r"'weight' is not initialized; run a batch"):
        fl.get_weights(model)
    model(torch.zeros(1, 3))
    assert fl.get_weights(model)["weight"].shape == (2, 3)


# Wrappers.


def wrapped() -> list[tuple[str, Callable[[Any], Any]]]:
    def compiled(model: Any) -> Any:
        return torch.compile(model, backend="eager")

    def inside(model: Any) -> Any:
        model[1] = torch.compile(model[1], backend="eager")
        return model

    return [
        ("compiled", compiled),
        ("compiled inside", inside),
        ("DataParallel", nn.DataParallel),
        ("both", lambda model: compiled(nn.DataParallel(model))),
        ("both, the other way", lambda model: nn.DataParallel(compiled(model))),
    ]


@pytest.mark.parametrize(("what", "wrap"), wrapped())
def test_wrappers_leave_no_trace_in_the_names(what: str, wrap: Callable[[Any], Any]) -> None:
    plain, model = net(1), wrap(net(2))
    assert list(fl.get_weights(model)) == models.NET.split()
    assert [(v.trainable, v.role) for v in adapters.variables(model)] == [
        (v.trainable, v.role) for v in adapters.variables(plain)
    ]
    assert fl.set_weights(model, fl.get_weights(plain)) is model
    assert bits(fl.get_weights(model)) == state(plain)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        plain, inner = net(1), net(2)
        model = nn.parallel.DistributedDataParallel(inner)
        assert list(fl.get_weights(model)) == models.NET.split()
        weights = fl.get_weights(plain)
        assert fl.set_weights(model, weights) is model
        assert state(inner) == bits(weights)
        # It trains on, as the plain one does.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(torch.from_numpy(models.noise(1, 4, 1, 3, 3))).square().mean().backward()
        optimizer.step()
        assert bits(fl.get_weights(model)) == state(models.torch_train(plain))
    finally:
        dist.destroy_process_group()


# A module's own state_dict.


class Scaled(nn.Linear):
    """Saves its bias under another name, as quantized layers do with theirs."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in (("weight", self.weight), ("offset", self.bias)):
            destination[prefix + name] = tensor if keep_vars else tensor.detach()


def renamed(model: Any) -> None:
    model[0] = Scaled(2, 2)


def hooked(model: Any) -> None:
    def hook(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        state[f"{prefix}offset"] = state.pop(f"{prefix}bias")

    model[0].register_state_dict_post_hook(hook)


def patched(model: Any) -> None:
    whole = model.state_dict

    def state_dict(**arguments: Any) -> Any:
        return {name.replace("0.bias", "0.offset"): tensor for name, tensor in whole(**arguments).items()}

    model.state_dict = state_dict


@pytest.mark.parametrize("change", [renamed, hooked, patched])
def test_a_state_dict_of_a_modules_own_is_what_is_read_and_loaded(change: Callable[[Any], None]) -> None:
    source, target = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    for model in (source, target):
        change(model)
    weights = fl.get_weights(source)
    assert set(weights) == {"0.weight", "0.offset", "1.weight", "1.bias"}
    assert list(weights) == [v.name for v in adapters.variables(source)]
    fl.set_weights(target, weights)
    assert bits(fl.get_weights(target, copy=False)) == bits(weights) == state(source)


@pytest.mark.parametrize("made", [torch.ones(2), nn.Parameter(torch.ones(2))], ids=["tensor", "parameter"])
def test_a_tensor_in_the_state_dict_that_is_not_the_modules_is_refused(made: torch.Tensor) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2))

    def hook(module: Any, state: Any, prefix: str, metadata: Any) -> None:
        state[f"{prefix}made"] = made

    model[0].register_state_dict_post_hook(hook)
    for use in (fl.get_weights, adapters.variables, lambda model: fl.set_weights(model, {})):
        with pytest.raises(fl.ModelError, match=r"'0\.made' of its state_dict is not one of its parameters or buffers"):
            use(model)


class Stateful(nn.Linear):  # as layers of Transformer Engine are
    state = 0

    def get_extra_state(self) -> Any:
        return torch.full((3,), self.state, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("what others have sent is not unpickled")


def test_extra_state_that_is_a_tensor_is_no_obstacle_to_what_is_chosen_beside_it() -> None:
    model, other = (nn.Sequential(Stateful(2, 2), nn.Linear(2, 1)) for _ in range(2))
    for own in (False, True):
        weights = fl.get_weights(model, only="weight|bias", copy=own)
        assert list(weights) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    fl.set_weights(other, weights, only="weight|bias")
    assert bits(fl.get_weights(other, only="weight|bias")) == bits(weights)


def test_extra_state_that_is_a_tensor_is_a_code_and_loaded_only_where_it_is_the_same() -> None:
    source, target = (nn.Sequential(Stateful(2, 2), nn.Linear(2, 1)) for _ in range(2))
    weights = fl.get_weights(source)
    assert weights["0._extra_state"].tolist() == [0, 0, 0]
    assert [v.name for v in adapters.variables(source) if v.role == "code"] == ["0._extra_state"]
    before = state(target)
    weights["0._extra_state"][1] = 7
    with pytest.raises(fl.NotSameError, match=r"'0\._extra_state' differs from the model's own.*only="):
        fl.set_weights(target, weights)
    assert state(target) == before
    weights["0._extra_state"][1] = 0
    fl.set_weights(target, weights)
    assert bits(fl.get_weights(target)) == bits(weights)


def test_extra_state_that_is_no_tensor_is_left_out() -> None:
    class Versioned(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"version": 3}

    model = nn.Sequential(Versioned(2, 2))
    assert "0._extra_state" in model.state_dict()
    assert list(fl.get_weights(model, only="weight|bias")) == ["0.weight", "0.bias"]  # which says nothing
    left = (
        r"keeps '0\._extra_state' \(a dict in its state_dict\), which cannot travel as numbers.* every client the same"
    )
    with pytest.warns(UserWarning, match=left) as caught:
        assert list(fl.get_weights(model)) == ["0.weight", "0.bias"]
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    assert list(fl.get_weights(model)) == ["0.weight", "0.bias"]  # once for each model
    for own in (True, False):
        with pytest.warns(UserWarning, match=r"0\._extra_state"):
            fl.get_weights(nn.Sequential(Versioned(2, 2)), copy=own)
    fl.set_weights(nn.Sequential(Versioned(2, 2)), fl.get_weights(model))


@pytest.mark.parametrize("nothing", [None, {}, b"", torch.float32], ids=str)
def test_extra_state_that_says_nothing_is_not_named(nothing: Any) -> None:
    class Empty(nn.Linear):
        def get_extra_state(self) -> Any:
            return nothing

    assert list(fl.get_weights(Empty(2, 2))) == ["weight", "bias"]


def test_what_is_no_plain_tensor_of_a_module_is_read_all_the_same() -> None:
    class Marked(torch.Tensor):
        pass

    model: Any = nn.Linear(2, 2)
    model.register_buffer("marked", torch.arange(3.0).as_subclass(Marked))
    for own in (True, False):
        weights = fl.get_weights(model, copy=own)
        assert type(weights["marked"]) is np.ndarray
        assert weights["marked"].tolist() == [0, 1, 2]
        assert weights["marked"].flags.writeable is own


# Gradients and optimizers.


def test_loading_touches_neither_objects_nor_gradients_nor_requires_grad() -> None:
    model = net(2)
    model(torch.from_numpy(models.noise(1, 4, 1, 3, 3))).square().mean().backward()
    before = [
        (id(p), p.data_ptr(), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]
    fl.set_weights(model, fl.get_weights(net()))
    for parameter, (identity, pointer, requires_grad, gradient) in zip(model.parameters(), before, strict=True):
        assert (id(parameter), parameter.data_ptr(), parameter.requires_grad) == (identity, pointer, requires_grad)
        assert parameter.is_leaf
        assert (parameter.grad is None) is (gradient is None)
        assert gradient is None or gradient.equal(parameter.grad)


def adam_step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.from_numpy(models.noise(1, 4, 1, 3, 3))).square().mean().backward()
    optimizer.step()


def test_an_optimizer_goes_on_with_its_state_after_loading() -> None:
    model = net(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        adam_step(model, optimizer)
    other = net()
    fl.set_weights(model, fl.get_weights(other))
    # The same with an optimizer that is made for the other model and given that state.
    expected = torch.optim.Adam(other.parameters(), lr=0.1)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh = net()
    for one, its in ((model, optimizer), (other, expected), (fresh, torch.optim.Adam(fresh.parameters(), lr=0.1))):
        adam_step(one, its)
    assert state(model) == state(other) != state(fresh)


def test_autograd_notices_that_what_it_saved_was_overwritten() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    loss = model(torch.ones(1, 2)).sum()
    fl.set_weights(model, {name: array + 1 for name, array in fl.get_weights(model).items()})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_made_in_inference_mode_is_loaded() -> None:
    with torch.inference_mode():
        model = net(2)
    weights = fl.get_weights(net())
    fl.set_weights(model, weights)
    assert bits(fl.get_weights(model)) == bits(weights)


# Memory.


def test_a_live_view_follows_the_model() -> None:
    model: Any = nn.Linear(2, 2)
    view = fl.get_weights(model, copy=False)["bias"]
    with torch.no_grad():
        model.bias.fill_(3)
    assert view.tolist() == [3, 3]
    assert view.__array_interface__["data"][0] == model.bias.data_ptr()


def test_channels_last_is_read_and_loaded() -> None:
    plain: Any = nn.Conv2d
    source, target = (plain(3, 4, 2).to(memory_format=torch.channels_last) for _ in range(2))
    fl.set_weights(target, fl.get_weights(source))
    assert target.weight.equal(source.weight)
    assert target.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_variable_whose_elements_share_memory_is_refused_before_anything_is_written() -> None:
    model: Any = nn.Linear(2, 2)
    model.register_buffer("wide", torch.zeros(1).expand(4))
    before = bits(fl.get_weights(model))
    with pytest.raises(fl.ModelError, match="'wide' is expanded"):
        fl.set_weights(model, {name: array + 1 for name, array in fl.get_weights(model).items()})
    assert bits(fl.get_weights(model)) == before


def test_a_state_dict_is_changed_in_place_and_keeps_what_is_no_tensor() -> None:
    model = net(2)
    held: Any = model.state_dict()
    held["extra"] = {"version": 3}
    fl.set_weights(held, fl.get_weights(net()))
    assert held["extra"] == {"version": 3}
    assert state(model) == state(net())


def test_tensors_are_loaded_as_arrays_are() -> None:
    model = net(2)
    tensors: Any = {
        name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in net().state_dict().items()
    }
    fl.set_weights(model, tensors)
    assert state(model) == state(net())
    assert all(p.is_leaf for p in model.parameters())
    before = state(model)
    zeros: Any = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for wrong in (torch.zeros(9), torch.zeros(3, dtype=torch.float64), torch.zeros(3, device="meta")):
        with pytest.raises((fl.ShapeError, fl.DtypeError, fl.WeightsTypeError), match=r"5\.bias"):
            fl.set_weights(model, zeros | {"5.bias": wrong})
    assert state(model) == before


# Parts of models.


class Adapted(nn.Module):
    """A linear layer with an adapter of low rank, as PEFT names them."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = nn.Linear(6, 6).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, 6, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return out


def test_adapters_of_low_rank_are_read_averaged_and_loaded_alone() -> None:
    models_ = [nn.Sequential(Adapted(), Adapted()) for _ in range(2)]
    parts = [fl.get_weights(model, only=r"lora_[AB]\.") for model in models_]
    assert list(parts[0]) == [f"{i}.lora_{c}.default.weight" for i in (0, 1) for c in "AB"]
    trained = [v.name for v in adapters.variables(models_[0]) if v.trainable]
    assert trained == list(parts[0])
    base = bits(fl.get_weights(models_[0], only="base_layer"))
    mean = fl.weighted_average(parts, [1, 2])
    fl.set_weights(models_[0], mean, only=r"lora_[AB]\.")
    assert bits(fl.get_weights(models_[0], only="lora_")) == bits(mean)
    assert bits(fl.get_weights(models_[0], only="base_layer")) == base
    with pytest.raises(fl.NamesError, match="misses"):
        fl.set_weights(models_[0], mean)


def test_a_pattern_that_drops_what_is_trained_beside_adapters_is_told() -> None:
    model = nn.Sequential(Adapted(), nn.Linear(6, 2))
    with pytest.warns(UserWarning, match=r"only='lora_' leaves out what this model trains .*: '1.weight', '1.bias'"):
        fl.get_weights(torch.nn.DataParallel(model), only="lora_")
    # All that is trained, nothing of it, a part of a model without frozen ones, or of a dict: nothing to tell.
    fl.get_weights(model, only="lora_|^1")
    fl.get_weights(model, only="base_layer")
    fl.get_weights(nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2)), only="^0")
    fl.get_weights(model.state_dict(), only="lora_")
    model[1].requires_grad_(False)
    fl.get_weights(model, only="lora_")


def test_parametrized_modules_are_read_by_what_they_store() -> None:
    source, target = (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)) for _ in range(2))
    weights = fl.get_weights(source)
    assert list(weights) == ["bias", "parametrizations.weight.original0", "parametrizations.weight.original1"]
    fl.set_weights(target, weights)
    assert target.weight.equal(source.weight)
