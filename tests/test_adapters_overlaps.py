"""Models of torch whose memory is shared: between variables, and with the values that are loaded into them."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import models_of_frameworks as models
import numpy as np
import pytest
import torch
from torch import nn

import fed_learn as fl

Weights = dict[str, Any]


def pair(dtype: torch.dtype = torch.float32) -> Any:
    """Two variables that lie apart: 1 … 9, and 11 … 19."""
    model: Any = nn.ParameterDict()
    for name, start in (("a", 1), ("b", 11)):
        model[name] = nn.Parameter(torch.arange(start, start + 9).reshape(3, 3).to(dtype), requires_grad=False)
    return model


def values(weights: Weights) -> dict[str, Any]:
    return {name: np.asarray(array, np.float64).tolist() for name, array in weights.items()}


# Values that lie in the memory of the model.


def arrays(model: Any) -> Weights:
    return fl.get_weights(model, copy=False)


def tensors(model: Any) -> Weights:
    return dict(model.state_dict())


@pytest.mark.parametrize("read", [arrays, tensors])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        lambda w: {"a": w["b"], "b": w["a"]},
        lambda w: {"b": w["a"], "a": w["b"]},
        lambda w: {"a": w["a"].T, "b": w["b"].T},
        lambda w: {"a": w["b"].T, "b": w["a"].T},
        lambda w: {"a": w["a"], "b": w["a"]},
        lambda w: {"a": w["b"], "b": w["b"]},
        lambda w: {"a": w["a"], "b": w["b"]},
    ],
    ids=["swap", "swap, last first", "transpose", "swap transposed", "a twice", "b twice", "the same"],
)
def test_a_model_is_loaded_from_its_own_memory_as_from_copies(
    read: Callable[[Any], Weights], dtype: torch.dtype, change: Callable[[Weights], Weights]
) -> None:
    model = pair(dtype)
    expected = values(change(fl.get_weights(model)))
    fl.set_weights(model, change(read(model)))
    assert values(fl.get_weights(model)) == {name: expected[name] for name in ("a", "b")}


def test_an_array_that_is_reversed_or_shifted_in_the_memory_of_the_model_is_read_before_it_is_written_to() -> None:
    flat = torch.arange(8.0)
    model: Any = nn.ParameterDict({"a": nn.Parameter(flat[:4]), "b": nn.Parameter(flat[4:])})
    memory = flat.numpy()
    fl.set_weights(model, {"a": memory[2:6], "b": memory[::-1][:4]})
    assert flat.tolist() == [2, 3, 4, 5, 7, 6, 5, 4]
    torch_flat: Any = torch.arange(8.0)
    model = nn.ParameterDict({"a": nn.Parameter(torch_flat[:4]), "b": nn.Parameter(torch_flat[4:])})
    fl.set_weights(model, {"a": torch_flat[1:5], "b": torch_flat[::2]})
    assert torch_flat.tolist() == [1, 2, 3, 4, 0, 2, 4, 6]


def test_a_part_is_loaded_from_what_stays() -> None:
    model = pair()
    fl.set_weights(model, {"b": fl.get_weights(model, copy=False)["a"].T}, strict=False)
    assert model["b"].tolist() == [[1, 4, 7], [2, 5, 8], [3, 6, 9]]
    assert model["a"].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


# Variables that share memory with one another.


def transposed() -> Any:
    model: Any = nn.ModuleDict({"emb": nn.Embedding(5, 3), "out": nn.Linear(5, 3, bias=False)})
    model["out"].weight = nn.Parameter(model["emb"].weight.detach().T)
    return model


def slices() -> Any:
    flat = torch.zeros(10)
    return nn.ParameterDict({"a": nn.Parameter(flat[:6]), "b": nn.Parameter(flat[4:])})


def of_two_dtypes() -> Any:
    flat = torch.zeros(4)
    model: Any = nn.ParameterDict({"a": nn.Parameter(flat)})
    model.register_buffer("b", flat[2:].view(torch.int32))
    return model


@pytest.mark.parametrize(
    ("make", "names", "good", "bad"),
    [
        (
            transposed,
            ("emb.weight", "out.weight"),
            lambda: {"emb.weight": models.noise(1, 5, 3), "out.weight": models.noise(1, 5, 3).T},
            lambda: {"emb.weight": models.noise(1, 5, 3), "out.weight": models.noise(2, 3, 5)},
        ),
        (
            slices,
            ("a", "b"),
            lambda: {"a": np.arange(6, dtype=np.float32), "b": np.arange(4, 10, dtype=np.float32)},
            lambda: {"a": np.ones(6, np.float32), "b": np.full(6, 2, np.float32)},
        ),
        (
            of_two_dtypes,
            ("a", "b"),
            lambda: {"a": np.arange(4, dtype=np.float32), "b": np.array([2, 3], np.float32).view(np.int32)},
            lambda: {"a": np.arange(4, dtype=np.float32), "b": np.array([2, 3], np.int32)},
        ),
    ],
    ids=["transposed", "slices", "of two dtypes"],
)
@pytest.mark.parametrize("form", [lambda array: array, torch.from_numpy], ids=["arrays", "tensors"])
def test_variables_that_share_elements_are_loaded_with_values_that_agree_and_no_others(
    make: Callable[[], Any], names: tuple[str, str], good: Any, bad: Any, form: Any
) -> None:
    model = make()
    fl.set_weights(model, {name: form(array) for name, array in good().items()})
    assert values(fl.get_weights(model)) == values(good())
    for order in (names, names[::-1]):
        with pytest.raises(fl.TiedVariablesError, match="share memory in the model, and differ there") as caught:
            fl.set_weights(model, {name: form(bad()[name]) for name in order})
        assert set(caught.value.names) == set(names)
        assert values(fl.get_weights(model)) == values(good())
    # One of them is enough.
    fl.set_weights(model, {names[1]: form(bad()[names[1]])}, strict=False)
    assert values(fl.get_weights(model))[names[1]] == values(bad())[names[1]]


def test_variables_that_interleave_without_sharing_elements_are_loaded() -> None:
    flat = torch.zeros(8)
    model: Any = nn.ParameterDict({"even": nn.Parameter(flat[::2]), "odd": nn.Parameter(flat[1::2])})
    fl.set_weights(model, {"even": np.arange(4, dtype=np.float32), "odd": -np.arange(4, dtype=np.float32)})
    assert flat.tolist() == [0, 0, 1, -1, 2, -2, 3, -3]
    # Each from the other.
    fl.set_weights(model, dict(zip(("odd", "even"), fl.get_weights(model, copy=False).values(), strict=True)))
    assert flat.tolist() == [0, 0, -1, 1, -2, 2, -3, 3]


KERAS = """
import keras, numpy as np
import fed_learn as fl
assert keras.config.backend() == "torch"
model = [keras.Variable(np.float32([1, 2]), name="a"), keras.Variable(np.float32([3, 4]), name="b")]
one, other = fl.get_weights(model, copy=False)
views = fl.get_weights(model, copy=False)
fl.set_weights(model, {one: views[other], other: views[one]})
print([variable.numpy().tolist() for variable in model])
"""


def test_variables_of_keras_on_torch_change_places() -> None:
    pytest.importorskip("keras")
    environment = os.environ | {"KERAS_BACKEND": "torch"}
    done = subprocess.run([sys.executable, "-c", KERAS], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "[[3.0, 4.0], [1.0, 2.0]]\n", done.stderr
