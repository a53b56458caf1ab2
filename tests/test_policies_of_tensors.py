"""Policies and codes where weights are tensors: of TensorFlow, JAX, Keras and torch, and real ones of bitsandbytes."""

from typing import Any

import numpy as np
import pytest
import tensor_kinds
import torch
from tensor_kinds import KINDS

import fed_learn as fl
from fed_learn.adapters.tensors import framework_of, plain

jax = tensor_kinds.jax
POLICIES = {"bn": "local", "top": "max", "seen": "sum", "fixed": "same", "own": "keep"}


def sent(k: float) -> dict[str, Any]:
    return {
        "w": np.array([k, 1], np.float32),
        "bn": np.array([k], np.float32),
        "top": np.array([k, -k], np.float32),
        "seen": np.array(10 * k, np.int64),
        "fixed": np.array([7], np.int32),
        "own": np.array([k], np.float32),
    }


EXPECTED = {"w": [2, 1], "top": [3, -1], "seen": 40, "fixed": [7], "own": [1]}


def shown(weights: Any) -> dict[str, Any]:
    return {name: np.asarray(plain(value)).tolist() for name, value in weights.items()}


@pytest.mark.parametrize("kind", [*KINDS.values(), "torch"], ids=lambda kind: getattr(kind, "name", kind))
def test_each_policy_gives_tensors_where_tensors_came(kind: Any) -> None:
    def of(k: float) -> Any:
        arrays = sent(k)
        return {n: torch.tensor(a) for n, a in arrays.items()} if kind == "torch" else kind.of(arrays)

    one, other = of(1.0), of(3.0)
    made: Any = fl.weighted_average([one, other], like=one, policies=POLICIES)
    assert shown(made) == EXPECTED
    owners = {framework_of(type(value)) for value in made.values()}
    assert owners == {framework_of(type(plain(one["w"])))}
    stream = fl.Accumulator(like=one, policies=POLICIES)
    stream.add(one, 1, "a")
    stream.add(other, 1, "b")
    assert shown(stream.result()) == EXPECTED
    assert shown(one) == shown(of(1.0))


def test_a_result_of_torch_shares_no_memory_with_what_came() -> None:
    one, other = ({n: torch.tensor(a) for n, a in sent(k).items()} for k in (1.0, 3.0))
    made: Any = fl.weighted_average([one, other], like=one, policies=POLICIES)  # type: ignore[arg-type]
    theirs = {tensor.data_ptr() for weights in (one, other) for tensor in weights.values()}
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in made.values())
    out = {name: torch.zeros_like(tensor) for name, tensor in made.items()}
    fl.weighted_average([one, other], like=one, policies=POLICIES, out=out)  # type: ignore[arg-type]
    assert shown(out) == EXPECTED


@pytest.mark.parametrize("typed", [False, True])
def test_random_keys_of_jax_are_kept_where_they_are_equal_and_refused_else(typed: bool) -> None:
    make = jax.random.key if typed else jax.random.PRNGKey
    one: Any = {"w": jax.numpy.ones(1), "k": make(0)}
    made: Any = fl.weighted_average([one, {**one, "k": make(0)}])
    data = jax.random.key_data(made["k"]) if typed else made["k"]
    assert np.asarray(data).tolist() == [0, 0]
    with pytest.raises(fl.NotSameError, match=r"contributions\[1\]: 'k' is not the same .*random key"):
        fl.weighted_average([one, {**one, "k": make(1)}])


def four_bits(seed: int, **settings: Any) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    torch.manual_seed(seed)
    weight += 0.1 * torch.randn(64, 64)
    return bitsandbytes.nn.Params4bit(weight, requires_grad=False, **settings).to("cpu")


@pytest.mark.parametrize("settings", [{"compress_statistics": False}, {"quant_type": "nf4"}, {"quant_type": "fp4"}])
def test_4_bit_weights_of_bitsandbytes_are_never_averaged_as_numbers(settings: dict[str, Any]) -> None:
    one, same, other = (four_bits(seed, **settings) for seed in (1, 1, 2))
    made: Any = fl.weighted_average([{"w": one, "b": torch.ones(1)}, {"w": same, "b": torch.zeros(1)}])
    assert torch.equal(made["w"], one)
    assert made["b"].tolist() == [0.5]
    advice = r"'w' is not the same as that of contributions\[0\].*4-bit codes of bitsandbytes.*only="
    with pytest.raises(fl.NotSameError, match=advice):
        fl.weighted_average([{"w": one}, {"w": other}])
    with pytest.raises(ValueError, match="'w' has the policy 'mean', but it is 4-bit codes"):
        fl.weighted_average([{"w": one}, {"w": other}], policies={"w": "mean"})


def test_4_bit_weights_of_the_same_codes_and_another_scale_differ() -> None:
    one, other = four_bits(1, compress_statistics=False), four_bits(1, compress_statistics=False)
    other.quant_state.absmax = other.quant_state.absmax * 2
    assert torch.equal(one, other)
    with pytest.raises(fl.NotSameError, match="'w' is not the same"):
        fl.weighted_average([{"w": one, "b": torch.ones(1)}, {"w": other, "b": torch.ones(1)}])


def test_8_bit_layers_of_bitsandbytes_are_codes_by_their_names() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layers = [bitsandbytes.nn.Linear8bitLt(16, 8, bias=True, has_fp16_weights=False) for _ in range(2)]
    states: list[Any] = []
    for number, layer in enumerate(layers):
        torch.manual_seed(number)
        layer.weight.data = torch.randn(8, 16)
        states.append(dict(layer.to("cpu").state_dict()))
    assert {"weight", "SCB"} <= set(states[0])
    with pytest.raises(fl.NotSameError, match="8-bit codes of bitsandbytes"):
        fl.weighted_average(states)
    made: Any = fl.weighted_average([states[0], {**states[0], "bias": states[0]["bias"] + 2}])
    assert torch.equal(made["weight"], states[0]["weight"])
    assert torch.allclose(made["bias"], states[0]["bias"] + 1)
