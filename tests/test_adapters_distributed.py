"""Variables that are spread over devices or processes: replicas of TensorFlow, shards of torch."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fed_learn as fl
from fed_learn import adapters

# TensorFlow, with two devices, which must be set up before anything else is done.

REPLICAS = """
import json
import numpy as np
import tensorflow as tf
import keras
import fed_learn as fl

cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
kinds = ("MEAN", "SUM", "ONLY_FIRST_REPLICA", "NONE")
with strategy.scope():
    mirrored = tf.Variable([1.0, 2.0])
    synced = {
        kind: tf.Variable(
            [1.0, 2.0],
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=getattr(tf.VariableAggregation, kind),
        )
        for kind in kinds
    }
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])
    model.compile("sgd", "mse")

@tf.function
def train():
    def step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        for variable in synced.values():
            variable.assign_add(tf.ones(2) * tf.cast(replica + 1, tf.float32))
    strategy.run(step)

train()
model.fit(np.random.default_rng(0).normal(size=(8, 3)), np.ones((8, 2)), verbose=0)
report = {}

def read(variables, where):
    for kind, variable in variables.items():
        try:
            ours = [array.tolist() for array in fl.get_weights([variable]).values()]
            mean = fl.weighted_average([{"w": variable}, {"w": tf.zeros(2)}])["w"].numpy().tolist()
            report[f"{kind} {where}"] = [*ours, mean]
        except fl.WeightsTypeError as error:
            report[f"{kind} {where}"] = str(error).partition(":")[2].partition(":")[0]
    ours = fl.get_weights(model)
    report[f"model {where}"] = all(map(np.array_equal, ours.values(), model.get_weights()))

def write(variables, where, number):
    for kind, variable in variables.items():
        fl.set_weights([variable], {"0/Variable": np.float32([number, 9])})
        replicas = [one.numpy().tolist() for one in strategy.experimental_local_results(variable)]
        report[f"{kind} written {where}"] = [variable.numpy().tolist(), replicas]
    weights = {name: np.full_like(array, number) for name, array in fl.get_weights(model).items()}
    fl.set_weights(model, weights)
    replicas = [one.numpy() for v in model.weights for one in strategy.experimental_local_results(v.value)]
    report[f"model written {where}"] = all((one == number).all() for one in replicas)

all_kinds = {"mirrored": mirrored} | synced
readable = {kind: variable for kind, variable in all_kinds.items() if kind != "NONE"}
read(all_kinds, "outside")
with strategy.scope():
    read(all_kinds, "inside")
    write(readable, "inside", 4)
write(readable, "outside", 6)
print(json.dumps(report))
"""


def test_replicas_are_read_as_tensorflow_reads_them_and_all_of_them_written() -> None:
    for name in ("tensorflow", "keras"):
        pytest.importorskip(name)
    done = subprocess.run([sys.executable, "-c", REPLICAS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    sums: dict[str, list[float]] = {"mirrored": [1, 2], "MEAN": [2.5, 3.5], "SUM": [5, 7], "ONLY_FIRST_REPLICA": [2, 3]}
    for where in ("outside", "inside"):
        for kind, value in sums.items():
            assert report.pop(f"{kind} {where}") == [value, [one / 2 for one in value]], (kind, where)
        assert report.pop(f"NONE {where}") == " '0/Variable' is a SyncOnReadVariable that cannot be read"
        assert report.pop(f"model {where}") is True
        number = {"inside": 4, "outside": 6}[where]
        for kind in sums:
            each = [number / 2, 4.5] if kind == "SUM" else [number, 9]
            assert report.pop(f"{kind} written {where}") == [[number, 9], [each, each]], (kind, where)
        assert report.pop(f"model written {where}") is True
    assert report == {}


# torch


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """One process, in which tensors are sharded all the same."""
    torch = pytest.importorskip("torch")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_shards_are_refused_by_name_and_their_full_tensors_are_read(mesh: Any) -> None:
    import torch
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    whole = fl.get_weights(model)
    fully_shard(model, mesh=mesh)
    told = r"model: '0\.weight' is a DTensor, sharded over processes; full_tensor\(\) gathers it"
    uses: list[Any] = [
        fl.get_weights,
        lambda model: fl.get_weights(model, copy=False),
        adapters.variables,
        lambda model: fl.set_weights(model, {name: array + 1 for name, array in whole.items()}),
    ]
    for use in uses:
        with pytest.raises(fl.WeightsTypeError, match=told):
            use(model)
    sharded: Any = dict(model.state_dict())
    gathered: Any = {name: shard.full_tensor() for name, shard in sharded.items()}
    assert all(np.array_equal(array, whole[name]) for name, array in fl.get_weights(gathered).items())
    for kernel in ("native", "torch"):
        with pytest.raises(fl.WeightsTypeError, match=r"site-1: '0\.weight' is a DTensor, sharded") as caught:
            fl.weighted_average([fl.Contribution("site-1", sharded, 1)], kernel=kernel)
        assert (caught.value.contributor, caught.value.name) == ("site-1", "0.weight")
    plain = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    before = [parameter.clone() for parameter in plain.parameters()]
    with pytest.raises(fl.WeightsTypeError, match=r"weights: '0\.weight' is a DTensor, sharded"):
        fl.set_weights(plain, sharded)
    assert all(map(torch.equal, before, plain.parameters()))


def test_tensors_that_only_stand_for_others_are_refused_by_name() -> None:
    torch = pytest.importorskip("torch")
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(2)
    with pytest.raises(fl.WeightsTypeError, match="model: 'w' is a FakeTensor, which has no memory of its own"):
        fl.get_weights({"v": torch.ones(1), "w": fake})
