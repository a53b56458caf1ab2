"""Flower's records and weight dicts: viewed in place, whatever comes from outside."""

import io
import logging
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

import fed_learn as fl
from fed_learn.integrations.flower import to_record, to_weights
from fed_learn.integrations.flower.metrics import mean_metrics
from fed_learn.integrations.flower.records import RecordWriter
from fed_learn.weights import Schema

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ARRAYS: dict[str, Any] = {
    "float16": np.arange(6, dtype=np.float16).reshape(2, 3),
    "bfloat16": np.arange(6).astype(BFLOAT16).reshape(2, 3),
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "float64": np.arange(6, dtype=np.float64).reshape(2, 3),
    "int64": np.arange(6).reshape(2, 3),
    "uint8": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "bool": np.array([[True, False]]),
    "0-d": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "other byte order": np.arange(6, dtype=">f4"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_flower_is_viewed_in_its_bytes(name: str) -> None:
    array = ARRAYS[name]
    record = ArrayRecord({"x": Array(array)})
    view = to_weights(record)["x"]
    assert view.dtype == array.dtype
    assert view.shape == array.shape
    assert np.array_equal(view, array)
    assert np.shares_memory(view, np.frombuffer(record["x"].data, np.uint8)) or not view.size
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True


@pytest.mark.parametrize("name", ARRAYS)
def test_flower_reads_what_was_written(name: str) -> None:
    array = ARRAYS[name]
    record = to_record({"x": array})
    read = record["x"].numpy()
    assert np.array_equal(read.view(BFLOAT16) if array.dtype == BFLOAT16 else read, array)
    assert record["x"].shape == array.shape
    again = to_weights(record)["x"]
    assert again.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(again, array)


@pytest.mark.parametrize("name", ["float32", "int64", "0-d", "empty", "bfloat16"])
def test_the_bytes_are_those_that_flower_writes(name: str) -> None:
    assert to_record({"x": ARRAYS[name]})["x"] == Array(ARRAYS[name])


def test_a_record_is_written_where_its_arrays_lie() -> None:
    writer = RecordWriter(Schema.of({"w": np.zeros(1000, np.float32)}))
    address = writer.arrays["w"].ctypes.data
    writer.arrays["w"][:] = 3
    weights = writer.finish()
    assert weights["w"].ctypes.data == address
    assert to_record(weights) is weights.record
    assert weights.record["w"].numpy().tolist() == [3.0] * 1000


def test_weights_of_a_record_are_pickled_as_weights() -> None:
    weights = RecordWriter(Schema.of({"w": np.zeros(2)})).finish()
    assert type(pickle.loads(pickle.dumps(weights))) is fl.weights.FrozenWeights


def test_bfloat16_is_known_by_its_mark_or_by_the_global_model() -> None:
    array = ARRAYS["bfloat16"]
    marked = ArrayRecord({"x": Array(array)})
    assert marked["x"].numpy().dtype == np.dtype("V2")  # what Flower makes of it
    unmarked = ArrayRecord({"x": Array(marked["x"].numpy())})
    assert to_weights(unmarked)["x"].dtype == np.dtype("V2")
    assert np.array_equal(to_weights(unmarked, like={"x": array})["x"], array)


def test_bfloat16_in_other_byte_order_is_told_by_the_mark() -> None:
    array = ARRAYS["bfloat16"]
    swapped = ArrayRecord({"x": Array(array.astype(BFLOAT16.newbyteorder(">")))})
    assert swapped["x"].dtype == ">V2"  # the .npy file itself does not say
    assert np.array_equal(to_weights(swapped, like={"x": array})["x"], array)


def test_pairs_of_bytes_are_no_bfloat16() -> None:
    pairs = npy(np.zeros(2, [("a", "u1"), ("b", "u1")]))
    with pytest.raises(fl.DtypeError, match=r"'x' cannot be read: an array of dtype .*\|u1.*, which cannot"):
        to_weights({"x": Array("bfloat16", (2,), "numpy.ndarray", pairs)}, like={"x": np.zeros(2, BFLOAT16)})


def test_a_torch_model_in_bfloat16_goes_there_and_back() -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="BFloat16"):
        ArrayRecord(model.state_dict())
    other = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    fl.set_weights(other, to_weights(to_record(fl.get_weights(model))))
    assert torch.equal(other.weight, model.weight)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


class Bomb:
    """Notes that it was unpickled."""

    exploded = False

    def __setstate__(self, state: object) -> None:
        Bomb.exploded = True


def test_objects_are_refused_and_never_unpickled() -> None:
    bomb = Bomb()
    bomb.fuse = 1  # type: ignore[attr-defined]
    data = npy(np.array([bomb], object))
    with pytest.raises(fl.DtypeError, match="site-1: 'x' cannot be read: an array of Python objects") as caught:
        to_weights({"x": Array("object", (1,), "numpy.ndarray", data)}, contributor="site-1")
    assert (caught.value.contributor, caught.value.name) == ("site-1", "x")
    assert not Bomb.exploded
    np.load(io.BytesIO(data), allow_pickle=True)
    assert Bomb.exploded


GOOD = npy(np.array([1, 2, 3], np.float32))
MALFORMED = {
    "nothing": b"",
    "no .npy": b"PK\x03\x04" + GOOD,
    "version 9": GOOD[:6] + b"\x09\x00" + GOOD[8:],
    "cut in the header": GOOD[:20],
    "cut before the length": GOOD[:9],
    "cut before the version": GOOD[:6],
    "cut in the data": GOOD[:-1],
    "more data than told": GOOD + b"\0",
    "no dict in the header": GOOD.replace(b"'descr'", b"'other'"),
    "code in the header": GOOD.replace(b"(3,)", b"f()."),
    "negative sizes": GOOD.replace(b"(3,), }   ", b"(-1,-3), }"),
    "a size beyond memory": GOOD.replace(b"(3,), }           ", b"(3000000000000,), }"[:18]),
    "a size that is a bool": GOOD.replace(b"(3,), }   ", b"(True,), }")[:-8],
    "a header without end": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + GOOD,
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_array_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(fl.WeightsTypeError, match="site-1: 'x' cannot be read") as caught:
        to_weights({"x": Array("float32", (3,), "numpy.ndarray", data)}, contributor="site-1")
    assert (caught.value.contributor, caught.value.name) == ("site-1", "x")


def test_another_serialisation_is_refused() -> None:
    with pytest.raises(fl.WeightsTypeError, match="serialized as 'pickle'"):
        to_weights({"x": Array("float32", (3,), "pickle", GOOD)})


def test_an_array_that_is_not_aligned_is_copied() -> None:
    header = GOOD[: GOOD.index(b"\n") + 1]
    length = len(header) - 10 - 1
    moved = header[:8] + length.to_bytes(2, "little") + header[10:-2] + b"\n"  # a byte shorter than numpy would have it
    view = to_weights({"x": Array("float32", (3,), "numpy.ndarray", moved + GOOD[len(header) :])})["x"]
    assert view.flags.aligned
    assert view.tolist() == [1, 2, 3]


def test_too_many_metrics_and_too_long_names_of_a_reply_are_left_out_of_the_means(
    caplog: pytest.LogCaptureFixture,
) -> None:
    many = {f"m{i}": 2.0 for i in range(3000)}
    contents = [
        RecordDict({"m": MetricRecord({"n": 1, "loss": 1.0, "huge": 10**400, "x" * 2000: 1.0})}),
        RecordDict({"m": MetricRecord({"n": 1, "loss": 3.0, **many})}),
    ]
    with caplog.at_level(logging.WARNING, "flwr"):
        means = mean_metrics(contents, "n")
    assert means["loss"] == 2.0
    assert "huge" not in means
    assert len(means) == 1 + 998
    limits = "1000 are taken, with names of at most 1000 characters"
    assert [record.getMessage() for record in caplog.records] == [
        f"reply 1: 1 of its 4 metrics are left out: {limits}",
        "reply 1: metric 'huge' is 100000000000000000...0000000000000000000: it is left out of the mean metrics",
        f"reply 2: 2002 of its 3002 metrics are left out: {limits}",
    ]
