"""What is particular to models of Keras: paths, layers without variables, back ends, and snapshots."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import models_of_frameworks as models
import numpy as np
import pytest

import fed_learn as fl
from fed_learn import adapters

keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")
layers = keras.layers
Model: Any = keras.Model


def bits(weights: Any) -> Any:
    return {n: (str(a.dtype), a.shape, np.ascontiguousarray(a).tobytes()) for n, a in weights.items()}


def plus_one(weights: Any) -> Any:
    return {name: array + array.dtype.type(1) for name, array in weights.items()}


def dense(name: str | None = None, units: int = 2) -> Any:
    return keras.Sequential([keras.Input((2,)), layers.Dense(units, name=name)], name="net")


# Which variables.


def test_metrics_seeds_and_optimizers_are_left_out() -> None:
    model = models.keras_train(models.keras_model(1, "functional"))
    names = {variable.path for variable in model.variables} | {v.path for v in model.metrics_variables}
    assert len(model.optimizer.variables) > 10
    assert len(names) > len(model.weights)  # or there would be nothing to leave out
    assert list(fl.get_weights(model)) == [variable.path for variable in model.weights]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_in_mixed_precision_values_are_those_that_are_stored(policy: str) -> None:
    model = models.keras_model(1, "functional", policy)
    assert model.get_layer("first").compute_dtype == policy.removeprefix("mixed_")
    assert {str(array.dtype) for array in fl.get_weights(model).values()} == {"float32"}


def test_layers_and_lists_of_variables_are_read_as_models_are() -> None:
    model = models.keras_model(1, "functional")
    expected = bits(fl.get_weights(model))
    assert bits(fl.get_weights(model.weights)) == bits(fl.get_weights(tuple(model.weights))) == expected
    layer = model.get_layer("norm")
    assert list(fl.get_weights(layer)) == [f"norm/{n}" for n in ("gamma", "beta", "moving_mean", "moving_variance")]
    fl.set_weights(layer, plus_one(fl.get_weights(layer)))
    fl.set_weights(model.get_layer("last").weights, {"last/kernel": np.ones((4, 2), np.float32)}, strict=False)
    changed = {name for name, one in bits(fl.get_weights(model)).items() if one != expected[name]}
    assert changed == {name for name in expected if name.startswith("norm/")} | {"last/kernel"}


def test_variables_of_keras_are_loaded_as_arrays_are() -> None:
    source, target = models.keras_model(1, "functional"), models.keras_model(2, "functional")
    held: Any = {variable.path: variable for variable in source.weights}
    fl.set_weights(target, held)
    expected = bits(fl.get_weights(source))
    assert bits(fl.get_weights(target)) == expected
    models.keras_train(source)  # nothing is shared
    assert bits(fl.get_weights(target)) == expected


def test_frozen_layers_are_told_and_stay_frozen() -> None:
    model = models.keras_model(1, "sequential")
    model.trainable = False
    assert {v.trainable for v in adapters.variables(model)} == {False}
    # Frozen, statistics are still told from what could be trained.
    assert [v.role for v in adapters.variables(model)].count("statistic") == 2
    fl.set_weights(model, plus_one(fl.get_weights(model)))
    assert not model.trainable_weights


def test_a_layer_frozen_before_it_is_built_has_parameters_too() -> None:
    layer = layers.BatchNormalization(trainable=False)
    layer.build((None, 3))
    assert [(v.trainable, v.role) for v in adapters.variables(layer)] == [
        *[(False, "trained")] * 2,
        *[(False, "statistic")] * 2,
    ]


def test_adapters_of_low_rank_are_read_averaged_and_loaded_alone() -> None:
    pair = [dense("d", 4), dense("d", 4)]
    for model in pair:
        model.get_layer("d").enable_lora(2)
        for variable in model.weights:
            variable.assign(np.random.default_rng(id(model)).standard_normal(variable.shape))
    with pytest.warns(UserWarning, match=r"only='lora_' leaves out what this model trains as well: .net/d/bias"):
        fl.get_weights(pair[0], only="lora_")  # Keras goes on to train it
    for model in pair:
        model.get_layer("d").bias.trainable = False
    parts = [fl.get_weights(model, only="lora_") for model in pair]
    assert list(parts[0]) == ["net/d/lora_kernel_a", "net/d/lora_kernel_b"]
    assert [v.name for v in adapters.variables(pair[0]) if not v.trainable] == ["net/d/kernel", "net/d/bias"]
    base = bits(fl.get_weights(pair[0], only="/(kernel|bias)"))
    mean = fl.weighted_average(parts, [1, 2])
    fl.set_weights(pair[0], mean, only="lora_")
    assert bits(fl.get_weights(pair[0], only="lora_")) == bits(mean)
    assert bits(fl.get_weights(pair[0], only="/(kernel|bias)")) == base


def test_weights_of_a_shared_layer_come_once() -> None:
    shared = layers.Dense(2, name="shared")
    inputs = keras.Input((2,))
    model = keras.Model(inputs, shared(shared(inputs)))
    assert list(fl.get_weights(model)) == ["shared/kernel", "shared/bias"]


# What is refused.


class Unbuilt(Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="outer")
        self.used, self.unused = layers.Dense(2, name="used"), layers.Dense(2, name="unused")
        self.flip, self.function = layers.RandomFlip(), layers.Lambda(lambda x: x)

    def build(self, shape: Any) -> None:
        self.used.build(shape)

    def call(self, x: Any) -> Any:
        return self.used(x)


def test_a_model_that_is_not_built_is_refused_and_told_what_to_do() -> None:
    sequential = keras.Sequential([layers.Dense(2)], name="sequential")
    for model, name in ((sequential, "sequential"), (layers.Dense(2, name="dense"), "dense"), (Unbuilt(), "outer")):
        for use in (fl.get_weights, lambda model: fl.set_weights(model, {})):
            with pytest.raises(fl.ModelError, match=f"'{name}' is not built.*call the model on a batch.*build"):
                use(model)
    sequential.build((None, 3))
    assert len(fl.get_weights(sequential)) == 2


def test_a_layer_that_is_not_built_is_refused_unless_it_makes_no_variables() -> None:
    model = Unbuilt()
    model(np.ones((1, 3), np.float32))
    with pytest.raises(fl.ModelError, match="'unused' is not built"):
        fl.get_weights(model)
    model.unused.build((None, 3))
    assert not model.flip.built
    assert not model.function.built
    assert len(fl.get_weights(model)) == 4


def test_two_variables_of_one_path_are_refused() -> None:
    class Twice(Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="twice")
            self.a, self.b = layers.Dense(2, name="x"), layers.Dense(2, name="x")

        def call(self, x: Any) -> Any:
            return self.b(self.a(x))

    model = Twice()
    model(np.ones((1, 2), np.float32))
    with pytest.raises(fl.ModelError, match=r"path 'twice/x/kernel'; give the layers names"):
        fl.get_weights(model)


def test_names_that_differ_in_the_numbers_of_keras_alone_come_with_a_hint() -> None:
    keras.utils.clear_session()
    one, other = dense(), dense()
    with pytest.raises(fl.NamesError, match=r"'net/dense_1/kernel'.*name the layers.*clear_session") as caught:
        fl.set_weights(other, fl.get_weights(one))
    assert caught.value.missing == ("net/dense_1/kernel", "net/dense_1/bias")
    with pytest.raises(fl.NamesError) as caught:
        fl.set_weights(other, {})
    assert "name the layers" not in str(caught.value)


def test_what_may_be_missing_does_not_hide_the_hint() -> None:
    keras.utils.clear_session()
    one, other = dense(), dense()
    kernel = fl.get_weights(one, only="kernel")
    with pytest.raises(fl.NamesError, match=r"adds 'net/dense/kernel'\. .*name the layers") as caught:
        fl.set_weights(other, kernel, strict=False)
    assert (caught.value.missing, caught.value.extra) == ((), ("net/dense/kernel",))
    with pytest.raises(fl.NamesError) as caught:  # there are not two such layers
        fl.set_weights(other, kernel | {"net/dense_2/kernel": kernel["net/dense/kernel"]}, strict=False)
    assert "name the layers" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself
@pytest.mark.parametrize("again", ["load", "pickle", "clone"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_model_that_was_saved_has_other_names_which_the_hint_says(again: str, strict: bool, tmp_path: Path) -> None:
    x = keras.Input((3,))
    model = keras.Model(x, dense("d")(layers.Dense(2, name="e")(x)), name="outer")
    if again == "load":
        model.save(tmp_path / "m.keras")
        other = keras.models.load_model(tmp_path / "m.keras")
    else:
        other = pickle.loads(pickle.dumps(model)) if again == "pickle" else keras.models.clone_model(model)
    names = list(fl.get_weights(model))
    assert names[2:] == ["net/d/kernel", "net/d/bias"]
    assert list(fl.get_weights(other)) == [*names[:2], "d/kernel", "d/bias"]
    for into, weights in ((other, fl.get_weights(model)), (model, fl.get_weights(other))):
        with pytest.raises(fl.NamesError, match=r"name in front that Keras drops .* fl\.align"):
            fl.set_weights(into, weights, strict=strict)
    mapped = fl.align(model, other)(fl.get_weights(model))  # as it says
    assert bits(dict(zip(names, mapped.values(), strict=True))) == bits(fl.get_weights(model))
    fl.set_weights(other, mapped, strict=strict)
    with pytest.raises(fl.NamesError) as caught:
        fl.set_weights(other, {"net/other/kernel": mapped["d/kernel"]}, strict=strict)
    assert "in front" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself
def test_the_codes_of_a_quantized_layer_are_refused_unless_only_leaves_them_out() -> None:
    model = dense("d")
    model.get_layer("d").quantize("int8")
    with pytest.raises(fl.DtypeError, match=r"'net/d/kernel' has the codes of a layer quantized to int8"):
        fl.get_weights(model)
    assert list(fl.get_weights(model, only="bias")) == ["net/d/bias"]


# Snapshots, and optimizers.


@pytest.mark.parametrize("compiled", [False, True])
def test_a_snapshot_without_a_copy_outlives_training_in_a_graph(compiled: bool) -> None:
    model = models.keras_model(1, "functional")
    model.compile(keras.optimizers.SGD(0.5, momentum=0.5), "mse", jit_compile=compiled)
    model.fit(models.noise(1, 8, 5), models.noise(2, 8, 2), verbose=0)
    view = fl.get_weights(model, copy=False)
    before = bits(view)
    model.fit(models.noise(1, 8, 5), models.noise(2, 8, 2), epochs=3, verbose=0)
    model.get_layer("first").kernel.value.assign_add(np.ones((5, 6), np.float32))
    model.get_layer("last").kernel.value[0, 0].assign(7.0)
    model.get_layer("last").kernel.value.scatter_update(tf.IndexedSlices([[8.0, 8.0]], [1]))
    assert bits(view) == before != bits(fl.get_weights(model))


def test_an_optimizer_goes_on_with_its_state_after_loading() -> None:
    after = []
    for loaded, fresh in ((True, False), (False, False), (True, True)):
        keras.utils.clear_session()
        model = models.keras_model(2, "functional")
        model.get_layer("drop").rate = 0.0
        for _ in range(3):
            models.keras_train(model)
        weights = fl.get_weights(models.keras_model(1, "functional"))
        if fresh:
            model.compile(keras.optimizers.Adam(0.1), "mse")
        if loaded:
            assert fl.set_weights(model, weights) is model
        else:  # the same by Keras itself
            model.set_weights([weights[variable.path] for variable in model.weights])
        models.keras_train(model)
        after.append(bits(fl.get_weights(model)))
    assert after[0] == after[1] != after[2]


# Other back ends.

BACKEND = """
import json, sys
import numpy as np
import keras

def make(seed):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(4, name="a", dtype="mixed_bfloat16"), keras.layers.Dropout(0.1),
         keras.layers.BatchNormalization(name="n"), keras.layers.Dense(2, name="b", dtype="bfloat16")], name="net")
    model.compile(keras.optimizers.Adam(0.1), "mse")
    return model

def bits(weights):
    return {n: (str(a.dtype), np.array(a).tobytes()) for n, a in weights.items()}

def read(model):
    arrays = {v.path: keras.ops.convert_to_numpy(keras.ops.cast(v.value, "float32")) for v in model.weights}
    return {n: (str(fl.get_weights(model, only=f"^{n}$")[n].dtype), a.astype(d).tobytes())
            for (n, a), d in zip(arrays.items(), [fl.get_weights(model)[n].dtype for n in arrays])}

x, y = np.random.default_rng(0).standard_normal((2, 8, 5)).astype("float32")
y = y[:, :2]
make(0).fit(x, y, verbose=0)
before = {"torch", "tensorflow", "jax", "flax"} & set(sys.modules)  # Keras itself imports more than its back end
import fed_learn as fl
from fed_learn import adapters

model, other = make(1), make(2)
copy, view, again = fl.get_weights(model), fl.get_weights(model, copy=False), fl.get_weights(model, copy=False)
start = bits(copy)
report = {"backend": keras.config.backend(), "names": list(copy), "dtypes": [str(a.dtype) for a in copy.values()],
          "adapter": adapters.adapter_of(model).name, "values": start == read(model) == bits(view),
          "no copy": all(np.shares_memory(view[n], again[n]) for n in view),
          "read only": not any(a.flags.writeable for a in view.values()),
          "trainable": [v.trainable for v in adapters.variables(model)]}
model.fit(x, y, verbose=0)
trained = bits(fl.get_weights(model))
report["copy stays"] = bits(copy) == start != trained == read(model)
report["view is live"] = bits(view) != start
optimizer = [id(v) for v in model.optimizer.variables]
report["loads"] = fl.set_weights(other, copy) is other and bits(fl.get_weights(other)) == start
for array in copy.values():
    array[...] = 0
report["keeps nothing"] = bits(fl.get_weights(other)) == start
zeros = bits(copy)
other.fit(x, y, verbose=0)
report["writes nowhere"] = bits(copy) == zeros and [v.trainable for v in other.weights] == report["trainable"]
now = bits(fl.get_weights(other))
try:
    fl.set_weights(other, copy | {"net/b/bias": np.zeros(2, "float32")})
except fl.DtypeError:
    report["atomic"] = bits(fl.get_weights(other)) == now != zeros
odd = {n: np.flip(np.flip(a).copy()) for n, a in fl.get_weights(model).items()}
odd |= {n: a.astype(">f4") for n, a in odd.items() if a.dtype == "float32"}
report["strides and byte order"] = bits(fl.get_weights(fl.set_weights(other, odd))) == trained
held = [keras.Variable(np.ones(2), dtype="float64", name="w")]
held += [keras.Variable(3, dtype="int64", name="n", trainable=False)]
report["long dtypes"] = [str(a.dtype) for a in fl.get_weights(held).values()]
fl.set_weights(held, {n: a + a.dtype.type(1) for n, a in fl.get_weights(held).items()})
report["long values"] = [a.tolist() for a in fl.get_weights(held).values()]
report["added"] = sorted(({"torch", "tensorflow", "jax", "flax"} & set(sys.modules)) - before)
print(json.dumps(report))
"""


NORMALIZED = """
import keras, numpy as np
import fed_learn as fl

def made(values):
    inner = keras.Sequential([keras.Input((1,)), keras.layers.Normalization(name="norm")], name="inner")
    inner.layers[0].adapt(np.float32(values))
    return keras.Sequential([keras.Input((1,)), inner], name="net")

site, server = made([[8], [10], [12]]), made([[0], [1], [2]])
x = np.float32([[10], [12]])
expected = site.predict(x, verbose=0)
assert not np.array_equal(server.predict(x, verbose=0), expected)  # and predict is compiled now
fl.set_weights(server, fl.get_weights(site))
called = np.asarray(keras.ops.convert_to_numpy(server(x)))
assert np.array_equal(called, expected) and np.array_equal(server.predict(x, verbose=0), expected), (called, expected)
compiled = server.predict_function
fl.set_weights(server, fl.get_weights(site))  # the same values, for which nothing is compiled again
assert compiled is not None and server.predict_function is compiled
fixed = keras.Sequential([keras.Input((1,)), keras.layers.Normalization(mean=3.0, variance=4.0)], name="fixed")
assert fl.get_weights(fl.set_weights(fixed, {})) == {}
print(expected.ravel().tolist())
"""


@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax"])
def test_what_layers_derive_from_their_variables_is_derived_when_they_are_loaded(backend: str) -> None:
    pytest.importorskip(backend)
    environment = os.environ | {"KERAS_BACKEND": backend}
    command = [sys.executable, "-c", NORMALIZED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx([0.0, 1.5**0.5])


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_models_of_keras_keep_the_contract_on_other_back_ends(backend: str) -> None:
    pytest.importorskip(backend)
    done = subprocess.run(
        [sys.executable, "-c", BACKEND],
        capture_output=True,
        text=True,
        env=os.environ | {"KERAS_BACKEND": backend},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    norm = ("gamma", "beta", "moving_mean", "moving_variance")
    assert report == {
        "backend": backend,
        "adapter": "keras",
        "names": ["net/a/kernel", "net/a/bias", *(f"net/n/{n}" for n in norm), "net/b/kernel", "net/b/bias"],
        "dtypes": ["float32"] * 6 + ["bfloat16"] * 2,
        "trainable": [True] * 4 + [False] * 2 + [True] * 2,
        "view is live": backend == "torch",
        "added": [],
        "long dtypes": ["float64", "int64"] if backend == "torch" else ["float32", "int32"],
        "long values": [[2, 2], 4],
        **dict.fromkeys(
            (
                "values",
                "no copy",
                "read only",
                "copy stays",
                "loads",
                "keeps nothing",
                "writes nowhere",
                "atomic",
                "strides and byte order",
            ),
            True,
        ),
    }
