"""Nested dicts of numpy arrays, and that the names of a JAX state do not depend on what has become an array."""

import subprocess
import sys
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest

import fed_learn as fl
from fed_learn import adapters

pytestmark = pytest.mark.quick


def tree() -> Any:
    return {
        "params": {"dense": {"kernel": np.ones((2, 3), np.float32), "bias": np.zeros(3, np.float32)}},
        "step": 3,
        "extra": [np.float64(0.5), None, {}, (np.arange(2),)],
    }


NAMES = ["extra/0", "extra/3/0", "params/dense/bias", "params/dense/kernel", "step"]


def test_nested_dicts_have_the_paths_of_their_keys_in_order() -> None:
    weights = fl.get_weights(tree())
    assert list(weights) == NAMES
    assert {name: array.dtype.name for name, array in weights.items()} == dict(
        zip(NAMES, ("float64", "int64", "float32", "float32", "int32"), strict=True)
    )
    assert weights["step"] == 3
    assert all(array.flags.writeable for array in weights.values())
    assert not any(array.flags.writeable for array in fl.get_weights(tree(), copy=False).values())


def test_a_new_tree_of_the_same_kinds_is_returned_and_the_old_one_stays() -> None:
    old = tree()
    new: Any = fl.set_weights(old, {name: array + array.dtype.type(1) for name, array in fl.get_weights(old).items()})
    assert old["step"] == 3
    assert old["params"]["dense"]["bias"].tolist() == [0, 0, 0]
    assert (new["step"], type(new["step"])) == (4, int)
    assert (new["extra"][0], type(new["extra"][0])) == (1.5, np.float64)
    assert new["extra"][1:3] == [None, {}]
    assert [type(new["extra"]), type(new["extra"][3])] == [list, tuple]
    assert new["extra"][3][0].tolist() == [1, 2]
    assert list(new["params"]["dense"]) == ["kernel", "bias"]
    assert new["params"]["dense"]["kernel"].tolist() == [[2, 2, 2]] * 2


def test_what_is_not_loaded_is_shared_and_a_number_that_has_not_changed_keeps_its_digits() -> None:
    old = {"base": np.zeros(2), "rate": 0.1, "lora": np.zeros(1)}
    new: Any = fl.set_weights(old, fl.get_weights(old, only="rate|lora"), only="rate|lora")
    assert new["base"] is old["base"]
    assert new["rate"] == 0.1 != float(np.float32(0.1))
    assert new["lora"] is not old["lora"]


def test_named_tuples_and_ordered_dicts_are_trees_too() -> None:
    class State(NamedTuple):
        count: Any
        mu: Any

    state = State(np.array(2, np.int32), OrderedDict([("b", np.zeros(1)), ("a", np.ones(1))]))
    assert list(fl.get_weights(state)) == ["count", "mu/b", "mu/a"]
    new = fl.set_weights(state, {"count": np.array(5, np.int32), "mu/a": np.full(1, 7.0), "mu/b": np.zeros(1)})
    assert type(new) is State
    assert new.count == 5
    assert type(new.mu) is OrderedDict
    assert list(new.mu) == ["b", "a"]
    assert new.mu["a"].tolist() == [7]


def test_roles_are_told_by_what_flax_and_optax_call_things() -> None:
    state = {
        "params": {"w": np.ones(2)},
        "batch_stats": {"bn": {"mean": np.zeros(2)}},
        "opt_state": {"0": {"count": np.array(1, np.int32), "mu": {"w": np.zeros(2)}}},
        "step": 1,
        "other": np.zeros(1),
    }
    assert {v.name: (v.role, v.trainable) for v in adapters.variables(state)} == {
        "params/w": ("trained", True),
        "batch_stats/bn/mean": ("statistic", False),
        "opt_state/0/count": ("counter", False),
        "opt_state/0/mu/w": ("statistic", False),
        "step": ("counter", False),
        "other": (None, None),
    }


def test_what_cannot_be_a_tree_or_cannot_be_averaged_is_refused_by_name() -> None:
    for thing in ({"w": np.zeros(1), "f": len}, {"w": "text"}, {"n": 3}, [np.zeros(1)], {1: np.zeros(1), "a": 2}):
        with pytest.raises(fl.ModelError, match="no model that is known"):
            fl.get_weights(thing)
    with pytest.raises(fl.ModelError, match="two variables have the path 'a/b'"):
        fl.get_weights({"a/b": np.zeros(1), "a": {"b": np.zeros(1)}})
    with pytest.raises(fl.WeightsTypeError, match=f"'n' is {2**40}, which is no int32"):
        fl.get_weights({"w": np.zeros(1), "n": 2**40})
    with pytest.raises(
        fl.DtypeError, match="'c' has dtype complex64, which cannot be averaged; only= chooses the others"
    ):
        fl.get_weights({"w": np.zeros(1), "c": 1j})


def test_no_framework_is_imported_for_a_tree() -> None:
    code = (
        "import sys, numpy as np, fed_learn as fl; w = fl.get_weights({'a': {'b': np.ones(1)}, 'n': 1}); "
        "print(list(w), w['n'].dtype, 'jax' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "['a/b', 'n'] int32 False"
