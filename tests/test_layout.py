"""Layout maps of whole models: the same outputs on real images, the same bits on the way back, and what base does."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import paired_models as pm
import pytest
import torch
from keras import layers
from torch import nn

from fed_learn.adapters.layout import LayoutMap, align
from fed_learn.aggregation.differences import add_difference, difference
from fed_learn.errors import DtypeError, ModelError, NamesError, ShapeError, TiedVariablesError, WeightsTypeError

MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "ConvNet": (pm.torch_conv_net, pm.keras_conv_net),
    "ConvNet, subclassed": (pm.torch_conv_net, pm.KerasConvNet),
    "residual block": (pm.torch_residual, pm.keras_residual),
    "transformer": (pm.torch_transformer, pm.keras_transformer),
    "transformer, norm first": (lambda: pm.torch_transformer(True), lambda: pm.keras_transformer(True)),
    "LSTM": (pm.torch_recurrent, pm.keras_recurrent),
    "LSTM, both ways": (lambda: pm.torch_recurrent(both=True), lambda: pm.keras_recurrent(both=True)),
    "GRU": (lambda: pm.torch_recurrent("GRU"), lambda: pm.keras_recurrent("GRU")),
    "GRU, both ways": (lambda: pm.torch_recurrent("GRU", 1, True), lambda: pm.keras_recurrent("GRU", 1, True)),
    "RNN": (lambda: pm.torch_recurrent("RNN"), lambda: pm.keras_recurrent("RNN")),
}
ONE_TO_ONE = [name for name in MODELS if not name.startswith(("LSTM", "RNN"))]
"""The others have two biases in torch, and one that is their sum in Keras."""


def pair(name: str) -> tuple[Any, Any]:
    """The two models, the one of torch with random weights, the one of Keras built."""
    source, target = (make() for make in MODELS[name])
    target(data(name)[1][:1])
    return pm.stirred(source), target


def data(name: str) -> tuple[Any, Any]:
    images = pm.digits()
    if "Net" in name or "residual" in name:
        return images[:, None], images[..., None]
    return images, images


@pytest.mark.parametrize("name", MODELS)
def test_torch_to_keras_to_torch_gives_the_same_outputs_on_real_images(name: str) -> None:
    source, target = pair(name)
    m = align(source, target)
    expected = pm.outputs(source, data(name)[0])
    assert expected.std(axis=0).min() > 1e-4
    pm.load(target, m(pm.torch_weights(source)))
    np.testing.assert_allclose(pm.outputs(target, data(name)[1]), expected, atol=1e-5, rtol=1e-5)
    third = pm.stirred(MODELS[name][0](), seed=5)
    pm.load(third, m.inverse(pm.keras_weights(target), pm.torch_weights(third)))
    np.testing.assert_allclose(pm.outputs(third, data(name)[0]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_keras_to_torch_to_keras_gives_the_same_bits(name: str) -> None:
    source, target = pair(name)
    m = align(target, source)
    pm.load(target, m.inverse(pm.torch_weights(source)))
    weights = pm.keras_weights(target)
    assert pm.bits(m.inverse(m(weights))) == pm.bits(weights)
    back = m.inverse(m(weights, pm.torch_weights(source)))
    assert list(back) == list(weights)
    if name in ONE_TO_ONE:
        assert pm.bits(back) == pm.bits(weights)
    for path, array in back.items():  # a bias that is a sum comes back with the rounding of a difference
        np.testing.assert_allclose(array, weights[path], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_gives_the_same_bits_where_the_map_is_one_to_one_or_the_base_is_the_origin(name: str) -> None:
    source, target = pair(name)
    m = align(source, target)
    before = pm.torch_weights(source)
    assert pm.bits(m.inverse(m(before), before)) == pm.bits(before)
    without = m.inverse(m(before))
    kept = {name: array for name, array in before.items() if name not in m.left_out}
    assert (pm.bits(without) == pm.bits(kept)) == (name in ONE_TO_ONE)


@pytest.mark.parametrize("name", MODELS)
def test_each_framework_maps_to_itself(name: str) -> None:
    for make, inputs in zip(MODELS[name], data(name), strict=True):
        source, target = make(), make()
        for model in (source, target):
            pm.outputs(model, inputs[:1])
        if not isinstance(source, keras.Layer):
            pm.stirred(source)
        m = align(source, target)
        weights = pm.weights_of(source)
        assert (m.left_out, m.from_base) == ((), ())
        mapped = m(weights)
        assert [array.tobytes() for array in mapped.values()] == [array.tobytes() for array in weights.values()]
        pm.load(target, mapped)
        assert np.array_equal(pm.outputs(target, inputs), pm.outputs(source, inputs))


# What base does.


def test_variables_of_one_side_come_from_base_or_are_left_out() -> None:
    source, target = pair("ConvNet")
    m = align(source, target)
    weights = pm.torch_weights(source)
    counters = ("norm1.num_batches_tracked", "norm2.num_batches_tracked", "norm3.num_batches_tracked")
    assert (m.left_out, m.from_base, m.inverse.left_out, m.inverse.from_base) == (counters, (), (), counters)
    contributed = {name: array for name, array in weights.items() if name not in counters}
    assert pm.bits(m(contributed)) == pm.bits(m(weights))
    assert pm.bits(m.inverse(m(weights))) == pm.bits(contributed)
    base = {name: np.full_like(weights[name], 41) for name in counters}
    back = m.inverse(m(weights), base | {"more": np.zeros(3)})
    assert list(back) == list(weights)
    assert [int(back[name]) for name in counters] == [41] * 3
    assert back[counters[0]].dtype == np.int64
    with pytest.raises(NamesError, match=r"base: misses 'norm1.num_batches_tracked'") as caught:
        m.inverse(m(weights), contributed)
    assert caught.value.missing == counters
    with pytest.raises(DtypeError, match=r"base: 'norm1.num_batches_tracked' has dtype float32, expected int64"):
        m.inverse(m(weights), {name: array.astype(np.float32) for name, array in base.items()})


def test_the_two_biases_of_a_torch_lstm_become_their_sum_and_back() -> None:
    source = nn.LSTM(2, 1, batch_first=True)
    target = pm.sequential((3, 2), layers.LSTM(1))
    m = align(source, target)
    weights = pm.torch_weights(source)
    weights["bias_ih_l0"][:] = [1, 2, 3, 4]
    weights["bias_hh_l0"][:] = [0.5, 0, -3, 1]
    mapped = m(weights)
    (bias,) = (name for name in mapped if name.endswith("bias"))
    assert mapped[bias].tolist() == [1.5, 2, 0, 5]
    plain = m.inverse(mapped)
    assert (plain["bias_ih_l0"].tolist(), plain["bias_hh_l0"].tolist()) == ([1.5, 2, 0, 5], [0, 0, 0, 0])
    trained = mapped | {bias: np.array([1.5, 3, 0, 5], np.float32)}
    back = m.inverse(trained, weights)
    assert (back["bias_ih_l0"].tolist(), back["bias_hh_l0"].tolist()) == ([1, 3, 3, 4], [0.5, 0, -3, 1])
    with pytest.raises(NamesError, match="base: misses 'bias_hh_l0'"):
        m.inverse(trained, {name: array for name, array in weights.items() if name != "bias_hh_l0"})


@pytest.mark.parametrize("name", MODELS)
def test_differences_go_through_a_map_as_weights_do(name: str) -> None:
    source, target = pair(name)
    m = align(source, target)
    start, end = pm.torch_weights(source), pm.torch_weights(pm.stirred(source, seed=9))
    moved = m(difference(end, start))
    direct = difference(m(end), m(start))
    for variable, array in moved.items():
        np.testing.assert_allclose(array, direct[variable], atol=1e-6)
    local = {variable: array for variable, array in start.items() if variable not in m.left_out}
    trained = add_difference(local, m.inverse(moved))
    for variable, array in m(trained).items():
        np.testing.assert_allclose(array, m(end)[variable], atol=1e-6)
    zero = {variable: np.zeros_like(array) for variable, array in start.items()}
    assert pm.bits({n: a for n, a in m.inverse(moved, zero).items() if n in local}) == pm.bits(m.inverse(moved))


# What goes in and comes out.


def test_the_result_is_new_contiguous_arrays_in_the_order_of_the_target_and_inputs_are_not_changed() -> None:
    source, target = pair("ConvNet")
    m = align(source, target)
    weights = pm.torch_weights(source)
    before = pm.bits(weights)
    mapped = m(weights, base=weights)
    assert type(mapped) is dict
    assert list(mapped) == [variable.path for variable in target.weights]
    for array in mapped.values():
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert not any(np.shares_memory(array, other) for other in weights.values())
        array[...] = 0
    assert pm.bits(weights) == before


def test_arrays_of_any_strides_and_byte_order_and_tensors_are_taken() -> None:
    source, target = pair("ConvNet")
    m = align(source, target)
    weights = pm.torch_weights(source)
    strided = {n: a.copy(order="F").astype(a.dtype.newbyteorder(">")) for n, a in weights.items()}
    tensors: Any = source.state_dict()
    assert pm.bits(m(strided)) == pm.bits(m(tensors)) == pm.bits(m(weights))


def test_weights_that_are_not_those_of_the_source_are_refused_by_name() -> None:
    source, target = pair("ConvNet")
    m = align(source, target)
    weights = pm.torch_weights(source)
    cases: list[tuple[Any, type[Exception], str]] = [
        ({"hidden.bias": np.zeros(16)}, DtypeError, "weights: 'hidden.bias' has dtype float64, expected float32"),
        ({"hidden.bias": np.zeros(1, np.float32)}, ShapeError, "weights: 'hidden.bias' has shape (1,)"),
        ({"more": np.zeros(1)}, NamesError, "weights: has other variables than expected: adds 'more'"),
        ({"hidden.bias": [0.0] * 16}, WeightsTypeError, "weights: 'hidden.bias' is a builtins.list"),
        ({"norm1.num_batches_tracked": np.zeros((), np.float32)}, DtypeError, "'norm1.num_batches_tracked'"),
    ]
    for changed, error, message in cases:
        with pytest.raises(error) as caught:
            m(weights | changed)
        assert message in str(caught.value)
    with pytest.raises(NamesError, match=r"misses 'hidden.bias'"):
        m({name: array for name, array in weights.items() if name != "hidden.bias"})
    with pytest.raises(WeightsTypeError):
        m(list(weights))  # type: ignore[arg-type]
    with pytest.raises(NamesError):
        m.inverse(weights)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_are_moved_to_the_bit(dtype: str) -> None:
    source = nn.Sequential(nn.Linear(3, 2), nn.LSTM(2, 2)).to(getattr(torch, dtype))
    target = nn.Sequential(nn.Linear(3, 2), nn.LSTM(2, 2)).to(getattr(torch, dtype))
    keras_model = keras.Sequential(
        [keras.Input((4, 3)), layers.Dense(2, dtype=dtype), layers.LSTM(2, dtype=dtype, recurrent_initializer="zeros")]
    )
    tensors: Any = source.state_dict()
    m, back = align(source, keras_model), align(keras_model, target)
    mapped = m(tensors)
    assert {array.dtype.name for array in mapped.values()} == {dtype}
    assert next(iter(mapped.values())).T.tolist() == tensors["0.weight"].tolist()
    returned = back(mapped, tensors)
    assert all(returned[name].tolist() == tensor.tolist() for name, tensor in tensors.items())


def test_shared_and_tied_torch_variables_have_all_their_names() -> None:
    shared = nn.Linear(3, 3)
    source = nn.ModuleDict({"a": shared, "b": nn.Linear(3, 2), "again": shared})
    target = pm.sequential((3,), layers.Dense(3), layers.Dense(2))
    m = align(source, target)
    weights = pm.torch_weights(source)
    assert m.layers == (("a", target.layers[0].path), ("b", target.layers[1].path))
    back = m.inverse(m(weights))
    assert list(back) == list(weights)
    assert pm.bits(back) == pm.bits(weights)
    assert not np.shares_memory(back["a.weight"], back["again.weight"])
    with pytest.raises(TiedVariablesError, match=r"'a.weight' and 'again.weight' are one variable"):
        m(weights | {"again.weight": weights["again.weight"] + 1})


def test_a_head_that_is_tied_to_its_embedding_counts_once() -> None:
    def tied() -> Any:
        model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
        model[1].weight = model[0].weight
        return model

    m = align(tied(), nn.Embedding(7, 3))
    weights = pm.torch_weights(tied())
    assert m.layers == (("0", ""),)
    assert list(m(weights)) == ["weight"]
    assert list(m.inverse(m(weights))) == ["0.weight", "1.weight"]


def test_a_map_can_be_read_and_pickled() -> None:
    source, target = pair("residual block")
    m = align(source, target)
    copy = pickle.loads(pickle.dumps(m))
    weights = pm.torch_weights(source)
    assert isinstance(copy, LayoutMap)
    assert pm.bits(copy.inverse(copy(weights))) == pm.bits(m.inverse(m(weights)))
    assert repr(m) == "<LayoutMap of 9 layers, 30 variables to 26>"
    assert "shortcut → conv_s\n" in str(m)
    assert "only in the source: norm0.num_batches_tracked" in str(m)
    assert m.source == {name: (array.shape, array.dtype) for name, array in weights.items()}
    assert m.target == {v.path: (tuple(v.shape), np.dtype("float32")) for v in target.weights}
    assert m.inverse.inverse is m
    assert m.inverse.layers[-1] == (m.layers[-1][1], m.layers[-1][0])


def test_models_that_are_none_or_not_built_are_refused() -> None:
    built = pm.sequential((3,), layers.Dense(2))
    for model in (object(), {"w": np.zeros(1)}, None):
        with pytest.raises(ModelError, match="is neither a torch module nor a Keras model"):
            align(built, model)
    with pytest.raises(ModelError, match="is not built"):
        align(keras.Sequential([layers.Dense(2)]), built)
    with pytest.raises(ModelError, match="'weight' is not initialized"):
        align(nn.LazyLinear(3), built)


@pytest.mark.parametrize(
    ("framework", "other", "make"),
    [
        ("torch", "keras", "torch.nn.Linear(3, 2)"),
        ("keras", "torch", "keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])"),
    ],
)
def test_a_map_of_one_framework_does_not_load_the_other(framework: str, other: str, make: str) -> None:
    code = (
        f"import sys, {framework}; from fed_learn.adapters.layout import align;"
        f"print(len(align({make}, {make}).layers), {other!r} in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "1 False"


def test_a_keras_model_on_the_torch_back_end_is_a_keras_model() -> None:
    code = (
        "import keras, torch; from fed_learn.adapters.layout import align;"
        "target = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]);"
        "m = align(torch.nn.Linear(3, 2), target);"
        "print(isinstance(target, torch.nn.Module), [(name, shape) for name, (shape, _) in m.target.items()])"
    )
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()
    assert printed == "True [('sequential/dense/kernel', (3, 2)), ('sequential/dense/bias', (2,))]"
