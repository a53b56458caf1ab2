"""Arrays in bytes of the `.npy` format: what numpy and others write is read to the bit, and nothing else is."""

import io
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fed_learn as fl
from fed_learn.npy import MAGIC, viewed

pytestmark = pytest.mark.quick

CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
BITS = bytes(range(1, 25)) * 16


def written(array: Any, version: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0)], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3), (1,) * 30], ids=str)
@pytest.mark.parametrize("code", CODES)
def test_what_numpy_writes_is_read_in_place(code: str, shape: tuple[int, ...], version: tuple[int, int]) -> None:
    for dtype in (np.dtype(code), np.dtype(code).newbyteorder(">")):
        for order in ("C", "F"):
            numbers = np.frombuffer(b"\1" * 384 if code == "b1" else BITS, dtype)
            array = np.asarray(numbers[: np.prod(shape, dtype=int)].reshape(shape), order=order)
            data = written(array, version)
            found = viewed(data)
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, shape, array.tobytes())
            assert found.flags.f_contiguous == array.flags.f_contiguous
            assert np.shares_memory(found, np.frombuffer(data, np.uint8)) or not found.size


def test_bfloat16_is_read_as_the_pairs_of_bytes_that_numpy_makes_of_it() -> None:
    array = np.arange(3).astype(ml_dtypes.bfloat16)
    found = viewed(written(array.view("V2"), (1, 0)))
    assert (found.dtype, found.view(ml_dtypes.bfloat16).tolist()) == (np.dtype("V2"), [0, 1, 2])


def file_of(header: str, data: bytes = bytes(8)) -> bytes:
    return MAGIC + b"\1\0" + len(header).to_bytes(2, "little") + header.encode("latin-1") + data


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}",
        "{'descr':'<f4','fortran_order':False,'shape':(2,)}\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1), }" + " " * 300 + "\n",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (1,2),}  \n\n",
        "{'descr': '=f4', 'fortran_order': False, 'shape': (1, 2, ), }",
        "{'descr': 'f4' , 'fortran_order': False , 'shape': ( 2, ) , }",
    ],
)
def test_what_other_writers_leave_out_or_add_is_read_as_numpy_reads_it(header: str) -> None:
    data = file_of(header)
    expected = np.load(io.BytesIO(data))
    assert (viewed(data).dtype, viewed(data).shape) == (expected.dtype, expected.shape)


REFUSED = {
    "another order of keys": "{'fortran_order': False, 'descr': '<f4', 'shape': (2,)}",
    "double quotes": '{"descr": "<f4", "fortran_order": False, "shape": (2,)}',
    "a number of Python 2": "{'descr': '<f4', 'fortran_order': False, 'shape': (2L,), }",
    "text of Python 2": "{'descr': u'<f4', 'fortran_order': False, 'shape': (2,), }",
    "a dtype by its long name": "{'descr': 'float32', 'fortran_order': False, 'shape': (2,)}",
    "a tab": "{'descr': '<f4',\t'fortran_order': False, 'shape': (2,)}",
    "digits in groups": "{'descr': '<f4', 'fortran_order': False, 'shape': (0_2,)}",
    "a comment": "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}  # by me",
    "a sum": "{'descr': '<f4', 'fortran_order': False, 'shape': (1+1,)}",
    "a list": "{'descr': '<f4', 'fortran_order': False, 'shape': [2]}",
    "a number alone": "{'descr': '<f4', 'fortran_order': False, 'shape': (2)}",
    "a negative size": "{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}",
    "a size of nineteen digits": f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**18},)}}",
    "sixty-six dimensions": f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'1, ' * 66})}}",
    "an empty array beyond any memory": f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {10**17}, {10**17})}}",
    "text": "{'descr': '<U1', 'fortran_order': False, 'shape': (2,)}",
    "dates": "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1,)}",
    "bytes": "{'descr': '|S4', 'fortran_order': False, 'shape': (2,)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
    "fields": "{'descr': [('a', '<f4'), ('b', '<f4')], 'fortran_order': False, 'shape': (1,)}",
    "fields of objects": "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}",
}
OF_DTYPES = {"a dtype by its long name", "text", "dates", "bytes", "objects", "fields", "fields of objects"}


@pytest.mark.parametrize("what", REFUSED)
def test_any_other_header_is_refused(what: str) -> None:
    error = fl.DtypeError if what in OF_DTYPES else fl.WeightsTypeError
    with pytest.raises(error) as caught:
        viewed(file_of(REFUSED[what], b"" if "empty" in what else bytes(8)))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    assert ("unpickled" in str(caught.value)) == ("objects" in what)


@pytest.mark.parametrize("data", [bytes(4), bytes(9), b""], ids=len)
def test_more_or_less_data_than_the_header_says_is_refused(data: bytes) -> None:
    message = rf"^{len(data)} bytes of data for shape \(2,\) of float32$"
    with pytest.raises(fl.WeightsTypeError, match=message):
        viewed(file_of("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", data))


@pytest.mark.parametrize("version", [b"\3\0", b"\1\1", b"\0\0", b"\1", b""], ids=repr)
def test_another_version_is_refused(version: bytes) -> None:
    with pytest.raises(fl.WeightsTypeError, match=r"^no .npy file of version 1 or 2$"):
        viewed(MAGIC + version)
