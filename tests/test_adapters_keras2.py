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
