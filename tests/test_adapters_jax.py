"""What is particular to JAX: new trees, what is no variable, arrays without values, and the memory of arrays."""

from typing import Any, cast

import models_of_frameworks as models
import numpy as np
import pytest

import fed_learn as fl
from fed_learn import adapters

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
equinox = pytest.importorskip("equinox")
optax = pytest.importorskip("optax")
jnp = jax.numpy


def bits(weights: Any) -> Any:
    return {n: (str(a.dtype), a.shape, np.ascontiguousarray(a).tobytes()) for n, a in weights.items()}


def plus_one(weights: Any) -> Any:
    return {name: array + array.dtype.type(1) for name, array in weights.items()}


# New trees.


def test_what_is_no_variable_is_kept_as_it_is() -> None:
    key, raw = jax.random.key(3), object()
    tree = {
        "a": jnp.zeros(2),
        "f": np.tanh,
        "key": key,
        "n": 3,
        "none": None,
        "s": "text",
        "raw": raw,
        "t": (jnp.ones(1), np.ones(2)),
    }
    weights = fl.get_weights(tree)
    assert list(weights) == ["a", "t/0", "t/1"]
    new: Any = fl.set_weights(tree, plus_one(weights))
    assert new is not tree
    assert list(tree["a"]) == [0, 0]
    assert list(new["a"]) == [1, 1]
    assert new["key"] is key
    assert new["raw"] is raw
    assert (new["f"], new["n"], new["none"], new["s"]) == (np.tanh, 3, None, "text")
    assert [type(one) for one in new["t"]] == [type(one) for one in tree["t"]]
    assert jax.tree.structure(new) == jax.tree.structure(tree)


def test_what_is_not_loaded_is_shared_with_the_old_tree() -> None:
    tree = {"base": jnp.zeros(1000), "lora_a": jnp.zeros(2)}
    new = fl.set_weights(tree, {"lora_a": np.ones(2, np.float32)}, only="lora_")
    assert new["base"] is tree["base"]
    assert list(new["lora_a"]) == [1, 1]


def test_equinox_keeps_functions_and_static_fields() -> None:
    source, target = models.equinox_model(1), models.equinox_model(2)
    new = fl.set_weights(target, fl.get_weights(source))
    assert new.activation is target.activation
    assert new.depth == target.depth
    assert jax.tree.structure(new) == jax.tree.structure(target)
    x = models.noise(0, 5)
    assert np.array_equal(new(x), source(x))


def test_a_loaded_nnx_module_is_a_new_one_of_the_same_kind() -> None:
    source, target = models.nnx_model(1), models.nnx_model(2)
    before = bits(models.nnx_read(target))
    new = fl.set_weights(target, fl.get_weights(source))
    assert type(new) is type(target)
    assert new.what == "not a variable"
    # A layer used in two places is one layer, and a random stream goes on where it was.
    assert new.again is new.first
    assert new.drop.rngs.count.get_value() == target.drop.rngs.count.get_value()
    assert jax.random.key_data(new.drop.rngs.key.get_value()).tolist() == (
        jax.random.key_data(target.drop.rngs.key.get_value()).tolist()
    )
    for model in (new, source):
        model.eval()
    x = models.noise(0, 3, 5)
    assert np.array_equal(new(x), source(x))
    new.train()
    models.nnx_train(new)  # which does not reach the old one
    assert bits(models.nnx_read(target)) == before
    assert bits(fl.get_weights(new)) != bits(fl.get_weights(source))


def test_the_state_of_an_nnx_module_has_the_names_of_the_module() -> None:
    model, other = models.nnx_model(1), models.nnx_model(2)
    state = nnx.state(model)
    assert bits(fl.get_weights(state)) == bits(fl.get_weights(model))
    nnx.update(other, fl.set_weights(nnx.state(other), fl.get_weights(state)))  # a way to change a module in place
    assert bits(fl.get_weights(other)) == bits(fl.get_weights(model))


def test_metadata_of_linen_leaves_no_trace_in_the_names() -> None:
    import flax.linen as nn

    kernel = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    variables = nn.Dense(2, kernel_init=kernel).init(jax.random.key(0), np.ones((1, 3), np.float32))
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    weights = fl.get_weights(variables)
    assert list(weights) == ["params/bias", "params/kernel"]
    new = fl.set_weights(variables, plus_one(weights))
    assert new["params"]["kernel"].names == ("in", "out")
    assert new["params"]["kernel"].value.tolist() == [[2, 2]] * 3


def test_a_frozen_dict_stays_one() -> None:
    from flax.core import FrozenDict, freeze

    tree = freeze(models.linen_model(1))
    assert list(fl.get_weights(tree)) == models.LINEN.split()
    assert isinstance(fl.set_weights(tree, fl.get_weights(tree)), FrozenDict)


def test_adapters_of_low_rank_are_read_and_loaded_alone() -> None:
    model = nnx.LoRA(4, 2, 4, base_module=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    part = fl.get_weights(model, only="lora_")
    assert list(part) == ["lora_a", "lora_b"]
    new = fl.set_weights(model, plus_one(part), only="lora_")
    assert bits(fl.get_weights(new, only="lora_")) == bits(plus_one(part))
    assert bits(fl.get_weights(new, only="base_module")) == bits(fl.get_weights(model, only="base_module"))


# Names that do not depend on training.


def train_state() -> Any:
    import flax.linen as nn
    from flax.training import train_state

    net, kind = nn.Dense(2), cast(Any, train_state.TrainState)
    params = net.init(jax.random.key(0), np.ones((1, 3), np.float32))["params"]
    return kind.create(apply_fn=net.apply, params=params, tx=optax.adam(0.1))


def forms(weights: Any) -> Any:
    return {name: (array.dtype.name, array.shape) for name, array in weights.items()}


def test_a_train_state_has_the_same_names_before_and_after_its_first_step() -> None:
    from flax import serialization

    first = train_state()
    assert type(first.step) is int
    gradients = jax.tree.map(jnp.ones_like, first.params)
    later = jax.jit(lambda state, gradients: state.apply_gradients(grads=gradients))(first, gradients)
    assert isinstance(later.step, jax.Array)
    weights = fl.get_weights(later)
    assert forms(fl.get_weights(first)) == forms(weights)
    assert list(fl.get_weights(first)) == list(weights)
    assert weights["step"] == 1
    # Each loads what the other has, and keeps its own kind of number.
    assert (type(fl.set_weights(first, weights).step), fl.set_weights(first, weights).step) == (int, 1)
    assert isinstance(fl.set_weights(later, fl.get_weights(first)).step, jax.Array)
    assert fl.set_weights(later, fl.get_weights(first)).step == 0
    # So do what is restored from a file, and what was fetched to the host.
    restored = serialization.msgpack_restore(serialization.msgpack_serialize(serialization.to_state_dict(later)))
    for other in (restored, serialization.to_state_dict(jax.device_get(later)), jax.device_get(later)):
        assert bits(fl.get_weights(other)) == bits(weights)
    assert {v.name: v.role for v in adapters.variables(later)} == {
        name: {"p": "trained", "o": "statistic", "s": "counter"}[name[0]] if not name.endswith("count") else "counter"
        for name in weights
    }


def test_a_state_of_optax_is_read_and_loaded() -> None:
    optimizer = optax.chain(optax.clip(1.0), optax.adam(0.1))
    state = optimizer.init({"w": jnp.ones(2)})
    weights = fl.get_weights(state)
    assert list(weights) == ["1/0/count", "1/0/mu/w", "1/0/nu/w"]
    new = fl.set_weights(state, {name: array + array.dtype.type(2) for name, array in weights.items()})
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert (int(new[1][0].count), new[1][0].mu["w"].tolist()) == (2, [2, 2])


def test_the_settings_of_equinox_are_no_variables() -> None:
    model = equinox.nn.Sequential([equinox.nn.Linear(2, 2, key=jax.random.key(0)), equinox.nn.Dropout(0.5)])
    assert [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, float)] == [0.5]
    assert list(fl.get_weights(model)) == ["layers/0/weight", "layers/0/bias"]
    assert list(fl.get_weights({"model": model, "step": 0}))[-1] == "step"


def test_numbers_are_as_wide_as_jax_makes_them() -> None:
    tree = {"w": jnp.zeros(1), "n": 1, "x": 0.5, "b": True}
    assert {name: array.dtype.name for name, array in fl.get_weights(tree).items()} == {
        "b": "bool",
        "n": "int32",
        "w": "float32",
        "x": "float32",
    }
    assert {n: a.dtype for n, a in fl.get_weights(tree).items()} == {n: a.dtype for n, a in jax.jit(dict)(tree).items()}


def test_raw_random_keys_are_codes() -> None:
    tree = {"w": jnp.zeros(2), "dropout": jax.random.PRNGKey(0)}
    assert {v.name: v.role for v in adapters.variables(tree)} == {"dropout": "code", "w": None}
    seeds = [{"dropout": jax.random.PRNGKey(seed), "w": jnp.full(2, seed, jnp.float32)} for seed in (2, 4)]
    assert {v.name: v.role for v in fl.describe(seeds[0])} == {"dropout": "code", "w": None}
    for read in (lambda one: one, fl.get_weights):
        made: Any = fl.weighted_average(list(map(read, seeds)), policies={"dropout": "keep"}, like=read(seeds[0]))
        assert np.asarray(made["w"]).tolist() == [3, 3]
        with pytest.raises(fl.NotSameError, match=r"'dropout' is not the same .*a random key, as it seems"):
            fl.weighted_average(list(map(read, seeds)))


# What is refused.


def test_paths_that_look_alike_are_refused() -> None:
    with pytest.raises(fl.ModelError, match="two variables have the path 'a/b'"):
        fl.get_weights({"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})


def test_only_trees_with_an_array_of_jax_are_taken() -> None:
    torch = pytest.importorskip("torch")
    for thing in (
        jnp.zeros(2),
        [np.zeros(2)],
        {"w": np.zeros(2), "f": np.tanh},
        {"f": np.tanh},
        {1: jnp.zeros(1), "a": jnp.zeros(1)},
    ):
        with pytest.raises(fl.ModelError, match="no model that is known"):
            fl.get_weights(thing)
    assert adapters.adapter_of({"w": torch.zeros(2)}).name == "torch"
    assert adapters.adapter_of({"w": jnp.zeros(2)}).name == "jax"


def test_arrays_without_values_are_refused_by_name() -> None:
    donated = jnp.zeros(2)
    jax.jit(lambda x: x + 1, donate_argnums=0)(donated)
    assert donated.is_deleted()
    abstract = nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    for tree, match in (
        ({"a": jnp.zeros(1), "w": donated}, r"'w' has no values any more"),
        ({"a": jnp.zeros(1), "w": jax.new_ref(jnp.zeros(1))}, r"'w' is a Ref"),
        (jax.eval_shape(lambda: {"w": jnp.zeros(2)}), r"'w' has no values: it is what eval_shape"),
        (abstract, r"'bias' has no values: it is what eval_shape"),
    ):
        with pytest.raises(fl.WeightsTypeError, match=match):
            fl.get_weights(tree)
    with pytest.raises(fl.WeightsTypeError, match=r"'w' has no values inside of a function"):
        jax.jit(lambda w: fl.get_weights({"w": w}))(jnp.zeros(2))
    assert list(fl.get_weights({"a": jnp.zeros(1), "w": donated}, only="a")) == ["a"]


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn", "int4"])
def test_dtypes_that_cannot_be_averaged_are_refused_unless_only_leaves_them_out(dtype: str) -> None:
    tree = {"a": jnp.zeros(1), "w": jnp.zeros(2, dtype)}
    with pytest.raises(fl.DtypeError, match=f"'w' has dtype {dtype}"):
        fl.get_weights(tree)
    new = fl.set_weights(tree, {"a": np.ones(1, np.float32)}, only="a")
    assert new["w"] is tree["w"]


def test_float64_is_kept_also_where_jax_makes_none() -> None:
    with jax.enable_x64(True):
        tree = {"a": jnp.zeros(1, np.float32), "w": jnp.full(2, 1 / 3, np.float64)}
        weights = fl.get_weights(tree)
        assert weights["w"].dtype == np.float64
    new = fl.set_weights(tree, plus_one(weights))
    assert new["w"].tolist() == [1 / 3 + 1] * 2
    assert bits(fl.get_weights(new)) == bits(plus_one(weights))
    assert bits(fl.get_weights(tree)) == bits(weights)


# Memory and devices.


def test_a_view_without_a_copy_is_the_memory_of_the_array_and_outlives_donation() -> None:
    for dtype in ("float32", "bfloat16", "int32", "bool", "float16"):
        tree = {"w": jnp.ones((64, 64), dtype)}
        view = fl.get_weights(tree, copy=False)["w"]
        assert view.dtype == dtype
        assert view.__array_interface__["data"][0] == tree["w"].unsafe_buffer_pointer()
        before = view.tobytes()
        step = jax.jit(lambda w: (w + w).astype(w.dtype), donate_argnums=0)
        del tree
        again = {"w": jnp.ones((64, 64), dtype)}
        view = fl.get_weights(again, copy=False)["w"]
        step(again["w"]).block_until_ready()
        assert view.tobytes() == before


def test_a_loaded_tree_may_be_donated() -> None:
    weights = {"w": np.zeros((64, 64), np.float32)}
    tree = fl.set_weights({"w": jnp.ones((64, 64))}, weights)
    jax.jit(lambda t: jax.tree.map(lambda w: w + 1, t), donate_argnums=0)(tree)["w"].block_until_ready()
    assert tree["w"].is_deleted()
    assert not weights["w"].any()


def test_arrays_stay_where_they_are_and_as_committed_as_they_are() -> None:
    device = jax.devices()[0]
    tree = {"free": jnp.zeros(2), "held": jax.device_put(jnp.zeros(2), device)}
    assert (tree["free"].committed, tree["held"].committed) == (False, True)
    new = fl.set_weights(tree, fl.get_weights(tree))
    for name, array in tree.items():
        assert (new[name].sharding, new[name].committed) == (array.sharding, array.committed)


SHARDED = """
import jax, numpy as np, fed_learn as fl
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((2,), ("d",))
tree = {"w": jax.device_put(np.arange(8, dtype=np.float32), NamedSharding(mesh, PartitionSpec("d"))),
        "v": jax.device_put(np.ones(2, np.float32), jax.devices()[1])}
weights = fl.get_weights(tree)
assert weights["w"].tolist() == list(range(8))
new = fl.set_weights(tree, {name: array + 1 for name, array in weights.items()})
assert all(new[name].sharding == tree[name].sharding for name in tree)
print(len(new["w"].addressable_shards), new["w"].tolist()[-1], new["v"].device == jax.devices()[1])
"""


def test_arrays_spread_over_several_devices_stay_so() -> None:
    import os
    import subprocess
    import sys

    flags = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, check=True, env=flags)
    assert done.stdout.split() == ["2", "8.0", "True"]
