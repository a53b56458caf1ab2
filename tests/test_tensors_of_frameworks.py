"""TensorFlow tensors, variables and JAX arrays straight into the averages: the same kind, the bits of arrays."""

import copy
import os
import pickle
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from tensor_kinds import KERNELS, KINDS, Kind, bits, jax, jnp, keras, models, of, on_jax, streamed, tf

import fed_learn as fl
from fed_learn.adapters.jax import JaxTensors
from fed_learn.adapters.tensorflow import TensorFlowTensors
from fed_learn.adapters.tensors import framework_of, hold_tensors, plain

TENSORFLOW, JAX = TensorFlowTensors(), JaxTensors()


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


# The same bits, the same kind.


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(2))
def test_tensors_have_the_bits_of_arrays_for_all_dtypes(kind: Kind, kernel: str | None, seed: int) -> None:
    arrays, weights = models(seed), [1.5, 300.0, 0.1 + seed]
    clients = [kind.of(one) for one in arrays]
    before = [bits(one) for one in clients]
    assert before == [ref.bits(one) for one in arrays]
    for exact in (False, True):
        expected = fl.weighted_average(arrays, weights, exact=exact, kernel="numpy")
        mean: Any = fl.weighted_average(clients, weights, exact=exact, kernel=kernel)
        assert list(mean) == list(arrays[0])
        assert {type(value) for value in mean.values()} == {kind.result}
        assert bits(mean) == ref.bits(expected)
        expected = streamed(arrays, weights, exact=exact, kernel="numpy").result()
        for borrow in (False, True):
            stream = streamed(clients, weights, exact=exact, kernel=kernel, borrow=borrow)
            result: Any = stream.result()
            assert {type(value) for value in result.values()} == {kind.result}
            assert bits(result) == ref.bits(expected)
    assert [bits(one) for one in clients] == before


def test_a_large_model_has_the_bits_of_arrays(kind: Kind) -> None:
    dtypes = (ref.BFLOAT16, np.dtype("float32"), np.dtype("float64"), np.dtype("int64"), np.dtype(bool))
    arrays = models(2, dtypes=dtypes, sizes=(100_003, 70_001))
    expected = fl.weighted_average(arrays, [1, 2, 3])
    mean: Any = fl.weighted_average([kind.of(one) for one in arrays], [1, 2, 3])
    assert {type(value) for value in mean.values()} == {kind.result}
    assert bits(mean) == ref.bits(expected)


def test_sums_that_overflow_and_large_integers_have_the_bits_of_arrays(kind: Kind) -> None:
    top = np.finfo(np.float64).max
    arrays = [
        {"w": np.array([top, 1.0, -top, top]), "n": np.array([2**62, 5]), "u": np.array([2**64 - 1], np.uint64)},
        {"w": np.array([top, 3.0, -top, 0.0]), "n": np.array([2**62 - 2, 6]), "u": np.array([2**64 - 3], np.uint64)},
    ]
    expected = fl.weighted_average(arrays, [1, 1e300], kernel="numpy")
    assert bits(fl.weighted_average([kind.of(one) for one in arrays], [1, 1e300])) == ref.bits(expected)
    stream = fl.Accumulator()
    with pytest.raises(fl.IntegerRangeError) as caught:
        stream.add(of(n=kind.make(arrays[0]["n"])), 1, "site-1")
    assert (caught.value.contributor, caught.value.name) == ("site-1", "n")


def test_a_64_bit_dtype_is_kept_although_jax_would_make_a_shorter_one() -> None:
    assert not jax.config.jax_enable_x64
    first = of(w=jnp.ones(2), steps=np.array([2**40, 2]), wide=np.array([1 / 3]))
    mean: Any = fl.weighted_average([first, first])
    assert {name: (type(v), v.dtype.name) for name, v in mean.items()} == {
        "w": (KINDS["jax.Array"].result, "float32"),
        "steps": (KINDS["jax.Array"].result, "int64"),
        "wide": (KINDS["jax.Array"].result, "float64"),
    }
    assert bits(mean) == bits(first)


def test_contributions_are_summed_in_the_order_of_their_names(kind: Kind) -> None:
    arrays = models(5, dtypes=ref.FLOATS)
    sent = [fl.Contribution(f"site-{i}", a, i + 1, round=3) for i, a in enumerate(arrays)]
    tensors = [fl.Contribution(f"site-{i}", kind.of(a), i + 1, round=3) for i, a in enumerate(arrays)]
    assert bits(fl.weighted_average(tensors[::-1], like=kind.of(arrays[0]))) == ref.bits(fl.weighted_average(sent))
    with pytest.raises(fl.DuplicateContributionError):
        fl.weighted_average([tensors[0], tensors[0]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_frameworks_mix_and_the_first_contribution_decides(kernel: str | None) -> None:
    array = np.array([0.1, 1, 7], np.float32)
    made: dict[str, tuple[Any, Any]] = {name: (one.make(array), one.result) for name, one in KINDS.items()}
    made |= {"torch": (torch.from_numpy(array.copy()), torch.Tensor), "numpy": (array, np.ndarray)}
    expected = ref.bits(fl.weighted_average([{"w": array}] * len(made), range(1, len(made) + 1), kernel="numpy"))
    for first, (tensor, result) in made.items():
        clients = [{"w": tensor}, *({"w": other} for name, (other, _) in made.items() if name != first)]
        mean: Any = fl.weighted_average(clients, range(1, len(made) + 1), like=clients[-1], kernel=kernel)
        stream = fl.Accumulator(like=clients[-1], kernel=kernel)
        for i, client in enumerate(clients):
            stream.add(client, i + 1, borrow=bool(i % 2))
        for got in (mean["w"], stream.result()["w"]):
            assert type(got) is result
            assert bits({"w": got}) == expected


def test_one_weight_dict_may_hold_several_frameworks_and_the_first_tensor_decides() -> None:
    one = of(a=np.ones(1, np.float32), b=jnp.float32([2]), c=tf.constant([3.0]), d=torch.tensor([4.0]))
    for kernel in KERNELS:
        mean: Any = fl.weighted_average([one, one], kernel=kernel)
        assert {type(value) for value in mean.values()} == {KINDS["jax.Array"].result}
        assert [float(value[0]) for value in mean.values()] == [1, 2, 3, 4]


# No copies.


def test_views_share_the_memory_of_tensors() -> None:
    for dtype in ref.DTYPES:
        array = np.ones(64, dtype)
        on_device = on_jax(array)
        assert JAX.view(on_device).ctypes.data == on_device.unsafe_buffer_pointer()
        tensor = tf.constant(array)
        assert TENSORFLOW.view(tensor).ctypes.data == tensor._numpy().ctypes.data
        variable = tf.Variable(tensor)
        assert TENSORFLOW.view(variable).ctypes.data == TENSORFLOW.view(variable).ctypes.data
        for view in (JAX.view(on_device), TENSORFLOW.view(tensor), TENSORFLOW.view(variable)):
            assert view.dtype == dtype
            assert not view.flags.writeable


def test_an_average_allocates_the_result_alone(kind: Kind) -> None:
    size = 1 << 21
    clients = [of(w=kind.make(np.full(size, i, np.float32))) for i in range(4)]
    fl.weighted_average(clients)
    tracemalloc.start()
    try:
        mean: Any = fl.weighted_average(clients)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert float(mean["w"][0]) == 1.5
    assert peak < 1.2 * 4 * size


def test_a_result_in_aligned_memory_stays_where_it_is_and_any_other_is_copied() -> None:
    memory = np.zeros(4096 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    for dtype in ref.DTYPES:
        for offset, shared in ((start, True), (start + 16, False)):
            array = memory[offset : offset + 1024].view(dtype)
            tensor, on_device = TENSORFLOW.tensor(array), JAX.tensor(array)
            assert (tensor.dtype.name, on_device.dtype.name) == (dtype.name, dtype.name)
            assert (TENSORFLOW.view(tensor).ctypes.data == array.ctypes.data) is shared
            assert (on_device.unsafe_buffer_pointer() == array.ctypes.data) is shared
            if dtype == np.float32:  # operations of TensorFlow end the process over memory that is not aligned
                assert float((tensor + 1)[0]) == 1


def test_the_tensors_of_a_large_result_are_not_copied_out_of_it() -> None:
    arrays = fl.weighted_average([{"a": np.ones(3, np.float32), "w": np.ones(1 << 20, np.float32)}])
    assert {array.ctypes.data % 64 for array in arrays.values()} == {0}


def test_a_result_is_not_changed_by_what_comes_after_it(kind: Kind) -> None:
    client = of(w=kind.make(np.ones(1 << 19, np.float32)))
    stream = streamed([client, client], [1, 1])
    first: Any = stream.result()
    stream.add(of(w=kind.make(np.full(1 << 19, 4, np.float32))), 1)
    second: Any = stream.result()
    assert (float(first["w"][7]), float(second["w"][7])) == (1, 2)
    if isinstance(first["w"], tf.Tensor):
        variable = tf.Variable(first["w"])
        variable.assign(first["w"])
        variable.assign_add(tf.ones(1 << 19))
        assert (float(first["w"][7]), float(variable[7])) == (1, 2)


def test_a_variable_that_changes_does_not_change_what_was_borrowed_of_it() -> None:
    variable = tf.Variable(tf.ones(100))
    stream = fl.Accumulator()
    stream.add(of(w=variable), 1, borrow=True)
    variable.assign_add(tf.ones(100))
    stream.add(of(w=variable), 1, borrow=True)
    variable.scatter_update(tf.IndexedSlices(tf.constant([9.0]), tf.constant([0])))
    stream.add(of(w=variable), 2, borrow=True)
    result: Any = stream.result()
    assert result["w"].numpy()[:2].tolist() == [(1 + 2 + 2 * 9) / 4, (1 + 2 + 2 * 2) / 4]


# Streams.


@pytest.mark.parametrize("exact", [False, True])
def test_streams_merge_travel_and_are_copied(kind: Kind, exact: bool) -> None:
    arrays = models(7, count=4, dtypes=(*ref.FLOATS, np.dtype("int16")))
    for kernel in KERNELS:
        left, right = fl.Accumulator(exact=exact, kernel=kernel), fl.Accumulator(exact=exact)
        plain_left, plain_right = fl.Accumulator(exact=exact), fl.Accumulator(exact=exact)
        for i, one in enumerate(arrays):
            (left, right)[i % 2].add(kind.of(one), i + 1, f"site-{i}", borrow=True)
            (plain_left, plain_right)[i % 2].add(one, i + 1, f"site-{i}")
        plain_left.merge(plain_right)
        left.merge(pickle.loads(pickle.dumps(right)))
        empty = fl.Accumulator(exact=exact, kernel=kernel)
        empty.merge(left)
        for stream in (left, copy.copy(left), copy.deepcopy(left), pickle.loads(pickle.dumps(left)), empty):
            result: Any = stream.result()
            assert {type(value) for value in result.values()} == {kind.result}
            assert bits(result) == ref.bits(plain_left.result())


# Models.


def test_keras_models_are_averaged_into_one_of_them() -> None:
    layers = keras.layers
    clients = [keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.BatchNormalization()]) for _ in range(2)]
    sent = [{v.path: v for v in model.weights} for model in clients]
    arrays: Any = [{name: np.array(v.numpy()) for name, v in zip(sent[0], one.values(), strict=True)} for one in sent]
    expected = fl.weighted_average(arrays, [1, 3])
    mean: Any = fl.weighted_average([dict(zip(sent[0], one.values(), strict=True)) for one in sent], [1, 3])
    for variable, value in zip(clients[0].weights, mean.values(), strict=True):
        variable.assign(value)
    assert bits(sent[0]) == ref.bits(expected)


def test_learners_and_clients_may_return_tensors(kind: Kind) -> None:
    class Learner(fl.Learner):
        def train(self, weights: Any, ctx: fl.FLContext) -> fl.TrainingResult:
            assert isinstance(weights["w"], np.ndarray)
            return fl.TrainingResult(of(w=kind.make(weights["w"] + np.float32(2))), 1)

        def validate(self, weights: Any, ctx: fl.FLContext) -> dict[str, float]:
            return {"accuracy": 1.0}

    class Client(fl.FederatedClient):
        def train_round(self, *args: Any, **kwargs: Any) -> fl.Contribution | None:
            sent = super().train_round(*args, **kwargs)
            assert sent is not None
            assert sent.weights is not None
            return fl.Contribution(self.name, kind.of(sent.weights), 1, round=sent.round, metrics=sent.metrics)

    server = fl.FederatedServer(of(w=kind.make(np.zeros(2, np.float32))), num_rounds=2)
    result = server.run([Client("site-1", Learner()), fl.FederatedClient("site-2", Learner())])
    assert result.weights["w"].tolist() == [4, 4]


def test_what_is_frozen_is_arrays_and_tensors_are_refused_by_name(kind: Kind) -> None:
    contribution = fl.Contribution("site-1", of(w=kind.make(np.ones(2, np.float32))), 1)
    with pytest.raises(fl.WeightsTypeError, match=r"site-1: 'w' is a .*not a numpy array; get_weights\(\)") as caught:
        contribution.frozen()
    assert (caught.value.contributor, caught.value.name) == ("site-1", "w")
    kept = fl.Contribution("site-1", {"w": np.ones(2)}, 1).frozen()
    assert kept.frozen().weights == kept.weights


# Types and modules.


def test_tensors_are_known_by_their_types(kind: Kind) -> None:
    tensor = kind.make(np.ones(2, np.float32))
    framework = framework_of(type(plain(tensor)))
    assert framework is not None
    assert framework.name == ("jax" if kind.name == "jax.Array" else "tensorflow")
    assert hold_tensors({"a": np.ones(1)}, {"b": tensor})
    assert framework_of(np.float32) is None


RUN = """
import copy, pickle, sys
import numpy as np
{imports}
import fed_learn as fl
{code}
"""


def run(imports: str, code: str, **environment: str) -> str:
    text = RUN.format(imports=imports, code=code)
    settings = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


ON_TWO_DEVICES = """
devices = jax.devices()
assert len(devices) == 2
sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), ("x",)), jax.sharding.PartitionSpec("x"))
everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
array = np.arange(8, dtype=np.float32)
def put(factor):
    with jax.default_device(devices[1]):
        movable = jnp.asarray(array * factor)
    there = {"committed": devices[1], "sharded": sharding, "replicated": everywhere}
    return {name: jax.device_put(array * factor, where) for name, where in there.items()} | {"movable": movable}
clients = [put(1), put(3), {name: array * 2 for name in put(1)}, {name: jnp.asarray(array * 2) for name in put(1)}]
stream = fl.Accumulator()
for client in clients:
    stream.add(client, 2)
exact = fl.Accumulator(exact=True)
for client in clients:
    exact.add(client, 1)
for mean in (fl.weighted_average(clients), stream.result(), exact.result(), copy.deepcopy(stream).result()):
    for name, value in mean.items():
        assert np.array_equal(np.asarray(value), array * 2), name
        assert value.sharding == clients[0][name].sharding, (name, value.sharding)
        assert value.committed == clients[0][name].committed, name
# The other way round: where the others lie does not matter.
assert fl.weighted_average(clients[::-1])["sharded"].sharding == clients[3]["sharded"].sharding
travelled = pickle.loads(pickle.dumps(stream)).result()
assert all(value.device == devices[0] for value in travelled.values())
# No copy on the host stays with a client's array.
assert all(value._npy_value is None for name, value in clients[0].items() if name in ("sharded", "replicated"))
print("done")
"""


def test_results_lie_on_the_devices_of_the_first_contribution_with_its_sharding() -> None:
    flags = "--xla_force_host_platform_device_count=2"
    assert run("import jax, jax.numpy as jnp", ON_TWO_DEVICES, XLA_FLAGS=flags) == "done\n"


ON_TWO_LOGICAL_DEVICES = """
cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
def put(device, value):
    with tf.device(device):
        return {"t": tf.identity(tf.constant([value])), "v": tf.Variable([value])}
clients = [put("CPU:1", 1.0), put("CPU:0", 3.0)]
stream = fl.Accumulator()
for client in clients:
    stream.add(client, 1)
for mean in (fl.weighted_average(clients), stream.result(), pickle.loads(pickle.dumps(stream)).result()):
    assert [(v.numpy().tolist(), v.device[-5:]) for v in mean.values()] == [([2.0], "CPU:1")] * 2
large = [{"w": tf.identity(tf.ones(1 << 20, tf.bfloat16))}]
with tf.device("CPU:1"):  # as a GPU would be, where there is one, what takes new tensors
    assert tf.constant(1.0).device[-5:] == "CPU:1"
    for several in (clients[::-1], large):
        assert {v.device[-5:] for v in fl.weighted_average(several).values()} == {"CPU:0"}
print("done")
"""


def test_results_of_tensorflow_lie_on_the_devices_of_the_first_contribution() -> None:
    assert run("import tensorflow as tf", ON_TWO_LOGICAL_DEVICES) == "done\n"


@pytest.mark.parametrize(
    ("imports", "make"),
    [
        ("import jax.numpy as jnp", "jnp.float32"),
        ("import tensorflow as tf", "tf.constant"),
        ("import torch", "torch.tensor"),
    ],
)
def test_an_average_imports_no_other_framework(imports: str, make: str) -> None:
    code = f"""
frameworks = {{"torch", "tensorflow", "jax", "keras"}}
before = frameworks & set(sys.modules)
mean = fl.weighted_average([{{"w": {make}([1.0])}}, {{"w": {make}([3.0])}}])
assert frameworks & set(sys.modules) == before, sys.modules.keys()
print(float(mean["w"][0]))
"""
    assert run(imports, code) == "2.0\n"


ON_ANOTHER_BACK_END = """
clients = [{"w": keras.Variable(np.float32([i, 5]), dtype="float32")} for i in (1, 3)]
mean = fl.weighted_average(clients)
print(type(mean["w"]).__name__, np.asarray(mean["w"]).tolist())
out = {"w": keras.Variable(np.zeros(2), dtype="float32")}
try:
    fl.weighted_average(clients, out=out)
    print(keras.ops.convert_to_numpy(out["w"]).tolist())
except fl.OutputError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("jax", "ArrayImpl [2.0, 5.0]\nout: 'w' is a JAX array, which cannot be changed; use what is returned\n"),
        ("torch", "Tensor [2.0, 5.0]\n[2.0, 5.0]\n"),
    ],
)
def test_keras_variables_are_averaged_on_every_back_end(backend: str, expected: str) -> None:
    assert run("import keras", ON_ANOTHER_BACK_END, KERAS_BACKEND=backend) == expected


@pytest.mark.parametrize("name", ["tf.Tensor", "jax.Array"])
def test_a_stream_can_go_on_in_a_process_that_has_not_imported_the_framework(name: str) -> None:
    stream = fl.Accumulator()
    stream.add(of(w=KINDS[name].make(np.array([1, 2], np.float32))), 1)
    code = f"print(repr(pickle.loads({pickle.dumps(stream)!r}).result()['w']))"
    expected = {"tf.Tensor": "<tf.Tensor: shape=(2,)", "jax.Array": "Array([1., 2.], dtype=float32)"}
    assert run("", code).startswith(expected[name])
