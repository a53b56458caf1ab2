"""Models of Keras 2, `tf_keras`: by the names of their weights. Each test is a process that has `tf_keras`.

`FED_LEARN_TF_KERAS` may name a folder with it: it asks for all of TensorFlow where it is installed with what it needs.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytest.importorskip("tensorflow")
FOLDER = os.environ.get("FED_LEARN_TF_KERAS")
pytestmark = pytest.mark.skipif(FOLDER is None and find_spec("tf_keras") is None, reason="tf_keras is not installed")

START = """
import numpy as np, tf_keras
import fed_learn as fl

def refused(call, text):
    try:
        call()
    except (fl.ModelError, TypeError) as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"not refused: {text}")

"""


def run(code: str) -> None:
    environment = dict(os.environ)
    if FOLDER is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", START + code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_all_weights_are_read_and_loaded_by_their_names() -> None:
    run("""
def made():
    tf_keras.backend.clear_session()
    parts = [tf_keras.layers.Dense(3), tf_keras.layers.BatchNormalization(), tf_keras.layers.Dense(2)]
    return tf_keras.Sequential([tf_keras.Input((4,)), *parts])

model, other = made(), made()
names = ["dense/kernel", "dense/bias", "batch_normalization/gamma", "batch_normalization/beta",
         "batch_normalization/moving_mean", "batch_normalization/moving_variance", "dense_1/kernel", "dense_1/bias"]
weights = fl.get_weights(model)
assert list(weights) == names
assert all(np.array_equal(a, b) for a, b in zip(weights.values(), model.get_weights()))
model.compile("sgd", "mse")
x = np.random.default_rng(0).standard_normal((8, 4))
model.fit(x, x[:, :2], verbose=0)
trained = fl.get_weights(model)
assert list(trained) == names and not np.array_equal(trained["dense/kernel"], weights["dense/kernel"])
mean = fl.weighted_average([weights, trained], [1, 3])
assert fl.set_weights(other, mean) is other
assert all(np.array_equal(a, b) for a, b in zip(mean.values(), other.get_weights()))
""")


def test_what_has_no_weights_yet_or_two_of_one_name_is_refused() -> None:
    run("""
class Late(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.head = tf_keras.layers.Dense(2)

    def call(self, x):
        return self.head(x)

late = Late()
refused(lambda: fl.get_weights(late), "layer 'late' is not built")
late(np.ones((1, 3), "float32"))
assert len(fl.get_weights(late)) == 2
parts = [tf_keras.Sequential([tf_keras.Input((2,)), tf_keras.layers.Dense(2, name="same")]) for _ in range(2)]
twice = tf_keras.Sequential([tf_keras.Input((2,)), *parts])
refused(lambda: fl.get_weights(twice), "two variables have the name 'same/kernel'")
""")


def test_the_evaluator_and_learner_of_keras_3_say_that_it_is_none_of_theirs() -> None:
    run("""
from fed_learn.integrations.keras import KerasEvaluator, KerasLearner

model = tf_keras.Sequential([tf_keras.Input((4,)), tf_keras.layers.Dense(2)])
model.compile("sgd", "mse")
data = np.ones((2, 4)), np.ones((2, 2))
refused(lambda: KerasLearner(model, data, data), "KerasLearner takes a model of Keras 3, not a tf_keras")
refused(lambda: KerasEvaluator(model, data, "loss"), "KerasEvaluator takes a model of Keras 3")
""")


def test_layers_derive_anew_what_they_keep_beside_loaded_weights() -> None:
    run("""
def made():
    layers = [tf_keras.layers.Normalization(name="n"), tf_keras.layers.Dense(2, name="d")]
    return tf_keras.Sequential([tf_keras.Input((3,)), *layers])

x = np.random.default_rng(0).standard_normal((8, 3)).astype("float32") * 5 + 2
model, other = made(), made()
model.layers[0].adapt(x)
other.compile("sgd", "mse")
before = other.predict(x, verbose=0)
compiled = other.predict_function
fl.set_weights(other, fl.get_weights(other))
assert other.predict_function is compiled
fl.set_weights(other, fl.get_weights(model))
assert np.array_equal(other(x), model(x)) and not np.array_equal(before, other(x))
assert np.array_equal(other.predict(x, verbose=0), model.predict(x, verbose=0))
""")


@pytest.mark.parametrize("lookup", ["StringLookup", "IntegerLookup", "TextVectorization"])
def test_a_vocabulary_is_named_by_a_warning_and_left_out(lookup: str) -> None:
    run(f"""
import warnings

words = {lookup!r} != "IntegerLookup"
found = tf_keras.layers.{lookup}(name="words")
found.adapt(np.array(["a", "b", "b"] if words else [3, 4, 4]))
layers = [found, tf_keras.layers.Embedding(5, 2, name="head")]
model = tf_keras.Sequential([tf_keras.Input((1,), dtype="string" if words else "int64"), *layers])
with warnings.catch_warnings(record=True, action="always") as caught:
    weights = fl.get_weights(model)
assert list(weights) == ["head/embeddings"]
(said,) = [str(w.message) for w in caught if w.category is UserWarning]
assert "the model keeps the vocabulary of " in said and "cannot travel as numbers" in said, said
fl.set_weights(model, weights)
""")


def test_a_frozen_layer_is_not_trainable_and_was_made_to_be_trained() -> None:
    run("""
frozen = tf_keras.layers.Dense(3, name="frozen", trainable=False)
layers = [frozen, tf_keras.layers.BatchNormalization(name="bn"), tf_keras.layers.Dense(2, name="head")]
model = tf_keras.Sequential([tf_keras.Input((4,)), *layers])
told = {v.name: (v.role, v.trainable) for v in fl.describe(model)}
assert told["frozen/kernel"] == ("trained", False), told
assert told["head/kernel"] == ("trained", True)
assert told["bn/moving_mean"] == ("statistic", False)
""")


def test_names_that_differ_in_numbers_come_with_a_remedy_that_works() -> None:
    run("""
def made():
    return tf_keras.Sequential([tf_keras.Input((4,)), tf_keras.layers.Dense(2)])

tf_keras.backend.clear_session()
one, other = made(), made()
for strict in (True, False):
    try:
        fl.set_weights(other, fl.get_weights(one), strict=strict)
    except fl.NamesError as error:
        assert str(error).count("differs in the numbers that Keras gives") == 1, error
        assert str(error).endswith("name the layers, or call tf_keras.backend.clear_session() before the model is made")
    else:
        raise AssertionError
tf_keras.backend.clear_session()
fl.set_weights(made(), fl.get_weights(one))
""")
