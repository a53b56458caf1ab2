"""Clara Train's messages: the bytes of protobuf without protobuf, arrays in and out, and what is refused."""

import io
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fed_learn as fl
from fed_learn.numproto import model_to_weights, ndarray_to_proto, proto_to_ndarray, weights_to_model
from fed_learn.protos.federated_pb2 import ModelData, NDArray
from fed_learn.weights import Schema

SCHEMA = Schema.of({"w": np.zeros(2, np.float32), "n": np.zeros((), np.int64), "flag": np.zeros(1, bool)})


def model_of(**arrays: Any) -> ModelData:
    full: dict[str, Any] = {"w": [1.0, 2.0], "n": 3.0, "flag": [1.0]} | arrays
    return ModelData({name: ndarray_to_proto(array) for name, array in full.items()})


@pytest.fixture(scope="module")
def real_message() -> Any:
    """`ModelData` as protobuf itself makes it of the two messages' definitions."""
    pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory  # type: ignore[import-untyped]

    file = pb2.FileDescriptorProto(name="federated.proto", package="clara", syntax="proto3")
    array = file.message_type.add(name="NDArray")
    array.field.add(name="ndarray", number=1, type=pb2.FieldDescriptorProto.TYPE_BYTES, label=1)
    model = file.message_type.add(name="ModelData")
    entry = model.nested_type.add(name="ParamsEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=pb2.FieldDescriptorProto.TYPE_STRING, label=1)
    of_message = pb2.FieldDescriptorProto.TYPE_MESSAGE
    entry.field.add(name="value", number=2, type=of_message, label=1, type_name=".clara.NDArray")
    model.field.add(name="params", number=1, type=of_message, label=3, type_name=".clara.ModelData.ParamsEntry")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("clara.ModelData"))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"w": b""},
        {"": b"x"},
        {"w": b"x" * 127, "größe": b"y" * 128, "z": b"z" * 20_000},
        {f"layer{i}/kernel:0": bytes(i) for i in range(300)},
    ],
    ids=["no variable", "an empty one", "no name", "lengths of one to three bytes", "many"],
)
def test_messages_have_the_bytes_of_protobuf(params: dict[str, bytes], real_message: Any) -> None:
    ours, theirs = ModelData(), real_message()
    for name, content in params.items():
        ours.params[name].CopyFrom(NDArray(ndarray=content))
        theirs.params[name].ndarray = content
    assert ours.ByteSize() == theirs.ByteSize() == len(ours.SerializeToString())
    parsed = real_message()
    parsed.ParseFromString(ours.SerializeToString())
    assert parsed == theirs
    assert {name: message.ByteSize() for name, message in ours.params.items()} == {
        name: theirs.params[name].ByteSize() for name in params
    }


def test_an_array_is_sent_as_the_bytes_of_a_npy_file(real_message: Any) -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    theirs = real_message()
    theirs.ParseFromString(weights_to_model({"w": array}).SerializeToString())
    back = proto_to_ndarray(NDArray(ndarray=theirs.params["w"].ndarray))
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f2", "f8", "i8", "u1", "?"])
def test_an_array_comes_back_from_its_bytes(dtype: str, shape: tuple[int, ...], order: Any) -> None:
    array = np.asarray(np.arange(np.prod(shape)).reshape(shape), dtype=dtype, order=order)
    for message in (ndarray_to_proto(array), NDArray(ndarray=ndarray_to_proto(array).ndarray)):
        back = proto_to_ndarray(message)
        assert (back.dtype, back.shape, back.flags.writeable) == (array.dtype, shape, True)
        assert np.array_equal(back, array)


def test_arrays_of_messages_belong_to_nobody_else() -> None:
    mine = np.zeros(2)
    message = ndarray_to_proto(mine)
    mine[:] = 7
    proto_to_ndarray(message)[:] = 8
    assert proto_to_ndarray(message).tolist() == [0, 0]
    other = NDArray()
    other.CopyFrom(message)
    message.CopyFrom(ndarray_to_proto([5.0]))
    assert proto_to_ndarray(other).tolist() == [0, 0]


def test_a_model_is_passed_without_a_copy() -> None:
    weights: dict[str, Any] = {"w": np.zeros(2, np.float32), "n": np.zeros((), np.int64), "flag": np.zeros(1, bool)}
    back = model_to_weights(weights_to_model(weights), SCHEMA, "aggregator")
    assert all(back[name] is array for name, array in weights.items())


def test_an_array_in_the_place_of_a_message_gives_a_copy() -> None:
    array = np.zeros(2)
    proto_to_ndarray(array)[:] = 1
    assert array.tolist() == [0, 0]


def test_a_name_is_added_when_it_is_looked_up_and_not_when_it_is_asked_for() -> None:
    model = ModelData()
    assert "w" not in model.params
    model.params["w"].CopyFrom(ndarray_to_proto([1.0]))
    copy = ModelData()
    copy.CopyFrom(model)
    del model.params["w"]
    assert (list(model.params), list(copy.params)) == ([], ["w"])
    assert proto_to_ndarray(pickle.loads(pickle.dumps(copy)).params["w"]).tolist() == [1.0]


def test_bfloat16_passes_but_has_no_bytes() -> None:
    message = ndarray_to_proto(np.ones(2, ml_dtypes.bfloat16))
    assert proto_to_ndarray(message).dtype == ml_dtypes.bfloat16
    with pytest.raises(fl.DtypeError, match="bfloat16"):
        message.SerializeToString()


def test_messages_take_only_what_they_can_send() -> None:
    with pytest.raises(TypeError, match="ndarray must be bytes, not an ndarray"):
        NDArray(ndarray=np.ones(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="CopyFrom needs an NDArray, not an ndarray"):
        ModelData().params["w"].CopyFrom(np.ones(2))  # type: ignore[arg-type]
    with pytest.raises(fl.DtypeError, match="Python objects"):
        ndarray_to_proto(np.array([object()]))
    with pytest.raises(fl.WeightsTypeError, match="a float is no NDArray"):
        proto_to_ndarray(1.0)  # type: ignore[arg-type]


def header_of(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


GOOD = ndarray_to_proto(np.arange(4.0)).ndarray
BAD_BYTES = {
    "nothing": b"",
    "other bytes": b"secret" * 20,
    "an array that is cut off": GOOD[:-1],
    "a header that is cut off": GOOD[:40],
    "a shape of 8 TB": header_of((10**12,)),
    "a shape beyond any memory": header_of((2**62, 2**62)),
    "a negative shape": header_of((-1,)) + bytes(16),
    "more numbers than there are": GOOD.replace(b"(4,)", b"(9,)"),
    "an object": GOOD.replace(b"'<f8'", b"'|O' "),
    "another version": b"\x93NUMPY\x09" + GOOD[7:],
    "a header that Python cannot read": GOOD.replace(b"(4,)", b"(4,("),
    "a header that is too deep": b"\x93NUMPY\x01\x00" + (9001).to_bytes(2, "little") + b"-" * 9000 + b"1",
    "a dtype that is an expression": GOOD.replace(b"'<f8'", b"'<,8'"),
    "a dtype that is empty": GOOD.replace(b"'<f8'", b"()   "),
}


@pytest.mark.parametrize("content", BAD_BYTES.values(), ids=BAD_BYTES)
def test_bytes_that_are_no_array_are_refused(content: bytes) -> None:
    with pytest.raises(fl.WeightsTypeError, match=rf"^{len(content)} bytes that are no array"):
        proto_to_ndarray(NDArray(ndarray=content))
    model = model_of()
    model.params["w"].CopyFrom(NDArray(ndarray=content))
    with pytest.raises(fl.WeightsTypeError, match=r"^aggregator: 'w' holds .* bytes that are no array"):
        model_to_weights(model, SCHEMA, "aggregator")


def test_float64_is_rounded_to_the_dtypes_of_the_model() -> None:
    weights = model_to_weights(model_of(w=[0.1, 1e-50], n=2.5), SCHEMA, "aggregator")
    assert {name: a.dtype for name, a in weights.items()} == {name: dtype for name, (_, dtype) in SCHEMA.items()}
    assert weights["w"].tolist() == [np.float32(0.1), 0.0]
    assert (int(weights["n"]), weights["flag"].tolist()) == (2, [True])
    assert int(model_to_weights(model_of(n=3.5), SCHEMA, "aggregator")["n"]) == 4


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "NaN": ({"w": [0, np.nan]}, fl.NonFiniteError, r"'w' at index \(1,\): nan"),
    "too large for float32": ({"w": [1e39, 0]}, fl.NonFiniteError, "'w' at index"),
    "too large for int64": ({"n": 1e19}, fl.IntegerRangeError, "'n' leaves the range of int64"),
    "NaN where a counter is": ({"n": np.nan}, fl.NonFiniteError, "'n'"),
    "2 where a flag is": ({"flag": [2.0]}, fl.IntegerRangeError, "'flag' leaves the range of bool"),
    "another shape": ({"w": [1.0, 2.0, 3.0]}, fl.ShapeError, r"'w' has shape \(3,\), expected \(2,\)"),
    "one that would broadcast": ({"w": 1.0}, fl.ShapeError, r"'w' has shape \(\), expected \(2,\)"),
    "another name": ({"x": 1.0}, fl.NamesError, "adds 'x'"),
    "complex numbers": ({"w": [1j, 2]}, fl.DtypeError, "'w' has dtype complex128"),
    "text": ({"w": ["1", "2"]}, fl.DtypeError, "'w' has dtype"),
}


@pytest.mark.parametrize(("arrays", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_does_not_fit_is_refused_by_name(
    arrays: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^aggregator: .*{message}"):
        model_to_weights(model_of(**arrays), SCHEMA, "aggregator")


@pytest.mark.parametrize("model", [None, {"w": 1}, np.ones(2)], ids=str)
def test_what_is_no_model_is_refused(model: object) -> None:
    with pytest.raises(fl.WeightsTypeError, match=rf"the model is an? {type(model).__name__}, not a ModelData"):
        model_to_weights(model, SCHEMA, "aggregator")
    missing = model_of()
    del missing.params["n"]
    with pytest.raises(fl.NamesError, match="aggregator: has other variables than expected: misses 'n'"):
        model_to_weights(missing, SCHEMA, "aggregator")


def test_a_weight_dict_will_do_for_a_message() -> None:
    model = fl.ModelData({"w": np.ones(2), "n": np.ones(()), "flag": np.ones(1)})
    assert model_to_weights(model, SCHEMA, "aggregator")["w"].dtype == np.float32
