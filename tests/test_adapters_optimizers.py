"""States of optimizers as weight dicts: read, averaged, loaded, and what there is to say before the first step."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fed_learn as fl
from fed_learn import adapters

KINDS = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"]


def bits(weights: Any) -> Any:
    return {n: (str(a.dtype), a.shape, np.ascontiguousarray(a).tobytes()) for n, a in weights.items()}


def trained(make: Any, *, seed: int = 0, steps: int = 1, named: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = make(model.named_parameters() if named else model.parameters())
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 12).reshape(4, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_goes_on_as_the_one_it_was_read_from(kind: str) -> None:
    make = getattr(torch.optim, kind)
    model, optimizer = trained(make, steps=3)
    other, fresh = trained(make, seed=1)
    fl.set_weights(other, fl.get_weights(model))
    tensors = [value for state in fresh.state.values() for value in state.values()]
    assert fl.set_weights(fresh, fl.get_weights(optimizer)) is fresh
    assert all(a is b for a, b in zip(tensors, (v for s in fresh.state.values() for v in s.values()), strict=True))
    for pair in ((model, optimizer), (other, fresh)):
        step(*pair)
    assert bits(fl.get_weights(other)) == bits(fl.get_weights(model))
    assert bits(fl.get_weights(fresh)) == bits(fl.get_weights(optimizer))


def test_parameters_are_called_as_the_optimizer_calls_them_and_states_by_their_roles() -> None:
    _, named = trained(torch.optim.Adam, named=True)
    assert {v.name: (v.role, v.trainable) for v in adapters.variables(named)} == {
        f"state.{parameter}.{part}": ("counter" if part == "step" else "statistic", False)
        for parameter in ("weight", "bias")
        for part in ("step", "exp_avg", "exp_avg_sq")
    }
    model, plain = trained(torch.optim.Adam)
    assert list(fl.get_weights(plain))[:3] == ["state.0.step", "state.0.exp_avg", "state.0.exp_avg_sq"]
    assert fl.get_weights(plain, only="exp_avg$")["state.1.exp_avg"].tolist() == (
        plain.state[model.bias]["exp_avg"].tolist()
    )


def test_two_groups_are_numbered_through() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))
    loss: Any = a.sum() + b.sum()
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    loss.backward()
    optimizer.step()
    assert {n: x.shape for n, x in fl.get_weights(optimizer).items()} == {
        "state.0.momentum_buffer": (1,),
        "state.1.momentum_buffer": (2,),
    }


def test_the_state_dict_of_an_optimizer_is_read_by_the_same_names_and_changed_in_place() -> None:
    _, optimizer = trained(torch.optim.Adam)
    state = copy.deepcopy(optimizer.state_dict())
    weights = fl.get_weights(state)
    assert bits(weights) == bits(fl.get_weights(optimizer))
    fl.set_weights(state, {name: array + array.dtype.type(1) for name, array in weights.items()})
    assert state["state"][0]["step"] == 2
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]


def test_numbers_of_python_stay_such() -> None:
    _, optimizer = trained(torch.optim.Adam)
    state: Any = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["step"] = 1
    weights = fl.get_weights(optimizer)
    assert (weights["state.0.step"].dtype.name, weights["state.0.step"].shape) == ("int32", ())
    fl.set_weights(optimizer, weights | {"state.0.step": np.array(7, np.int32)})
    assert (type(state["step"]), state["step"]) == (int, 7)


def test_averages_of_momenta_are_the_mean() -> None:
    (_, one), (_, two) = (trained(torch.optim.Adam, seed=seed) for seed in (0, 1))
    mean = fl.weighted_average([fl.get_weights(one), fl.get_weights(two)], [1, 1])
    fl.set_weights(one, mean)
    assert next(iter(one.state.values()))["exp_avg"].tolist() == mean["state.0.exp_avg"].tolist()


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_without_a_state_the_error_says_what_to_do(make: Any) -> None:
    _, optimizer = trained(make, steps=0)
    for use in (fl.get_weights, lambda one: fl.set_weights(one, {}), lambda one: fl.get_weights(one.state_dict())):
        with pytest.raises(fl.ModelError, match=r"has no state yet.*Make a step before, or send the model's weights"):
            use(optimizer)


def test_lists_in_a_state_are_refused_by_name_and_left_out_by_only() -> None:
    model = nn.Linear(3, 2)
    optimizer: Any = torch.optim.LBFGS(model.parameters())

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(fl.WeightsTypeError, match=r"'state\.0\.\w+' is a list, not a tensor; only= chooses the others"):
        fl.get_weights(optimizer)
    assert list(fl.get_weights(optimizer, only=r"state\.0\.(d|func_evals)$")) == ["state.0.func_evals", "state.0.d"]


def test_states_of_keras_optimizers_are_read_and_loaded_without_the_learning_rate() -> None:
    keras = pytest.importorskip("keras")
    pair = []
    for rate in (0.1, 0.2):
        keras.utils.clear_session()
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")], name="net")
        optimizer = keras.optimizers.Adam(rate)
        with pytest.raises(fl.ModelError, match=r"has no state yet; call its build\(model.trainable_variables\)"):
            fl.get_weights(optimizer)
        model.compile(optimizer, "mse")
        model.train_on_batch(np.ones((4, 3), np.float32), np.full((4, 2), rate, np.float32))
        pair.append(optimizer)
    one, two = pair
    weights = fl.get_weights(one)
    assert [name.split("/")[-1] for name in weights] == [
        "iteration",
        *(f"net_d_{part}_{kind}" for part in ("kernel", "bias") for kind in ("momentum", "velocity")),
    ]
    assert [v.role for v in adapters.variables(one)] == ["counter", *["statistic"] * 4]
    assert bits(fl.get_weights(two)) != bits(weights)
    fl.set_weights(two, weights)
    assert bits(fl.get_weights(two)) == bits(weights)
    assert float(two.learning_rate.numpy()) == pytest.approx(0.2)
