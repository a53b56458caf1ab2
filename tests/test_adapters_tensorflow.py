"""What is particular to modules and lists of variables of TensorFlow."""

from typing import Any

import models_of_frameworks as models
import numpy as np
import pytest

import fed_learn as fl
from fed_learn import adapters
from fed_learn.weights import SUPPORTED_DTYPES

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")


def bits(weights: Any) -> Any:
    return {n: (str(a.dtype), a.shape, np.ascontiguousarray(a).tobytes()) for n, a in weights.items()}


def test_tied_variables_of_a_module_with_two_values_are_refused_and_nothing_is_loaded() -> None:
    model, weights = models.tensorflow_module(2), fl.get_weights(models.tensorflow_module(1))
    found = {v.name: v.identity for v in adapters.variables(model)}
    assert found["tied"] == found["layers/0/w"]
    before = bits(fl.get_weights(model))
    weights["tied"][0, 0] += 1
    with pytest.raises(fl.TiedVariablesError, match=r"'tied' and 'layers/0/w' are one variable"):
        fl.set_weights(model, weights)
    assert bits(fl.get_weights(model)) == before


def test_a_module_that_holds_a_layer_of_keras_is_refused() -> None:
    for held in (keras.layers.Dense(2), keras.Variable(1.0)):
        module = tf.Module()
        module.w, module.parts = tf.Variable(1.0), [held]
        with pytest.raises(fl.ModelError, match=r"'parts/0' is a .* of Keras.*make the whole a keras\.Model"):
            fl.get_weights(module)


def test_attributes_whose_paths_look_alike_are_refused() -> None:
    module = tf.Module()
    module.a = {"b/c": tf.Variable(1.0), "b": {"c": tf.Variable(2.0)}}
    with pytest.raises(fl.ModelError, match="two variables have the path 'a/b/c'"):
        fl.get_weights(module)


@pytest.mark.parametrize("dtype", sorted(SUPPORTED_DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)], ids=str)
@pytest.mark.parametrize("kind", ["tensorflow", "keras"])
def test_variables_of_every_dtype_make_the_round_trip(dtype: Any, shape: tuple[int, ...], kind: str) -> None:
    values = (np.arange(int(np.prod(shape))).reshape(shape) % 3 + 1).astype(dtype)
    variable = {"tensorflow": tf.Variable, "keras": lambda value: keras.Variable(value, dtype=dtype.name, name="v")}[
        kind
    ]
    source, target = [variable(values)], [variable(np.zeros(shape, dtype))]
    weights = fl.get_weights(source)
    for (array,) in (weights.values(), fl.get_weights(source, copy=False).values()):
        assert type(array) is np.ndarray
        assert (array.dtype, array.shape, array.tobytes()) == (dtype, shape, values.tobytes())
    fl.set_weights(target, dict(zip(fl.get_weights(target), weights.values(), strict=True)))
    assert np.array_equal(target[0].numpy(), values)
    assert target[0].dtype == source[0].dtype


def test_dtypes_that_cannot_be_averaged_are_refused_unless_only_leaves_them_out() -> None:
    for value, name in (("text", "string"), (1j, "complex128"), (tf.cast(1.0, "float8_e4m3fn"), "float8_e4m3fn")):
        variables = [tf.Variable(1.0, name="w"), tf.Variable(value, name="v")]
        with pytest.raises(fl.DtypeError, match=f"'1/v' has dtype {name}"):
            fl.get_weights(variables)
        assert list(fl.get_weights(variables, only="w")) == ["0/w"]


def test_a_variable_that_may_change_its_shape_is_read_as_it_is() -> None:
    variable = tf.Variable(np.zeros((2, 3), np.float32), shape=tf.TensorShape(None))
    assert [v.shape for v in adapters.variables([variable])] == [(2, 3)]
    with pytest.raises(fl.ShapeError):
        fl.set_weights([variable], {"0/Variable": np.zeros((3, 3), np.float32)})
    variable.assign(np.zeros((4, 3), np.float32))
    assert fl.get_weights([variable])["0/Variable"].shape == (4, 3)


@pytest.mark.parametrize("kind", ["model", "list", "module"])
def test_what_has_no_values_inside_of_a_tf_function_is_refused(kind: str) -> None:
    model = {
        "model": lambda: models.keras_model(1, "sequential"),
        "list": lambda: models.tensorflow_list(1),
        "module": lambda: models.tensorflow_module(1),
    }[kind]()
    weights = fl.get_weights(model)
    before, zeros = bits(weights), {name: np.zeros_like(array) for name, array in weights.items()}
    uses: list[Any] = [fl.get_weights, lambda model: fl.get_weights(model, copy=False), adapters.variables]

    @tf.function  # type: ignore[untyped-decorator, unused-ignore]
    def graph(x: Any) -> Any:
        for use in (*uses, lambda model: fl.set_weights(model, zeros)):
            with pytest.raises(fl.WeightsTypeError, match=r"model: '.*' has no values inside of a tf\.function"):
                use(model)
        return x

    assert graph(tf.ones(1)).numpy() == [1]
    assert bits(fl.get_weights(model)) == before


def test_single_tensors_of_every_dtype_are_loaded_whole_or_not_at_all() -> None:
    for dtype in sorted(SUPPORTED_DTYPES, key=str):
        first, last = tf.Variable([1.0, 1.0], name="a"), tf.Variable(np.ones((), dtype), name="b")
        new = {"0/a": tf.zeros(2), "1/b": tf.constant(np.zeros((), dtype))}
        fl.set_weights([first, last], new)
        assert (first.numpy().tolist(), last.numpy()) == ([0, 0], 0)


def test_variables_change_places_when_each_is_loaded_with_the_other() -> None:
    one, other = tf.Variable([1.0, 2.0], name="v"), tf.Variable([3.0, 4.0], name="v")
    fl.set_weights([one, other], {"0/v": other, "1/v": one})
    assert (one.numpy().tolist(), other.numpy().tolist()) == ([3, 4], [1, 2])
    views = fl.get_weights([one, other], copy=False)
    fl.set_weights([one, other], {"0/v": views["1/v"], "1/v": views["0/v"]})
    assert (one.numpy().tolist(), other.numpy().tolist()) == ([1, 2], [3, 4])


def test_frozen_variables_are_told() -> None:
    frozen = tf.Variable(1.0, trainable=False)
    assert [(v.trainable, v.role) for v in adapters.variables([frozen, tf.Variable(1.0)])] == [
        (False, None),
        (True, "trained"),
    ]
