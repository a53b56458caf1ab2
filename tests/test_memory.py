"""Where arrays lie in memory: found in one pass in C, which takes plain arrays only and leaves nothing behind."""

import gc
import pickle
import sys
import tracemalloc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference import DTYPES, KERNELS, Array

import fed_learn as fl
from fed_learn import weighted_average
from fed_learn.kernels import threads
from fed_learn.kernels.memory import Table, addresses
from fed_learn.weights import FrozenWeights, Schema

needs_native = pytest.mark.skipif("native" not in KERNELS, reason="the C extension was not built")


class Text(str):
    pass


class Named(np.ndarray[Any, np.dtype[Any]]):
    pass


def lies_at(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def renamed(weights: dict[str, Array], kind: Callable[[str], str]) -> dict[str, Array]:
    return {kind(name): array for name, array in weights.items()}


def misaligned(array: Array, by: int) -> Array:
    memory = np.zeros(array.nbytes + 16, np.uint8)
    start = -lies_at(memory) % 16 + by
    moved = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


def model(dtype: np.dtype[Any], value: float = 1.0) -> dict[str, Array]:
    return {
        "matrix": np.full((3, 4), value, dtype),
        "0-d": np.full((), value, dtype),
        "empty": np.full((2, 0), value, dtype),
        "vector": np.full(5, value, dtype),
    }


ODD: dict[str, Callable[[dict[str, Array]], Any]] = {
    "transposed": lambda w: w | {"matrix": np.asfortranarray(w["matrix"])},
    "with steps": lambda w: w | {"vector": np.repeat(w["vector"], 2)[::2]},
    "in foreign byte order": lambda w: w | {"vector": w["vector"].astype(w["vector"].dtype.newbyteorder())},
    "misaligned": lambda w: w | {"vector": misaligned(w["vector"], 1)},
    "of another class": lambda w: w | {"vector": w["vector"].view(Named)},
    "a scalar": lambda w: w | {"0-d": w["0-d"][()]},
    "in another order": lambda w: dict(reversed(w.items())),
    "names of another class": lambda w: renamed(w, Text),
}
"""Weights that are right, and not as a kernel takes them."""

WRONG: dict[str, Callable[[dict[str, Array]], Any]] = {
    "of another shape": lambda w: w | {"matrix": np.zeros((4, 3), w["matrix"].dtype)},
    "of another rank": lambda w: w | {"matrix": np.zeros(12, w["matrix"].dtype)},
    "of another dtype": lambda w: w | {"matrix": np.zeros((3, 4), np.int32)},
    "of a dtype that cannot be averaged": lambda w: w | {"matrix": np.zeros((3, 4), complex)},
    "objects": lambda w: w | {"matrix": np.zeros((3, 4), object)},
    "one fewer": lambda w: {name: w[name] for name in list(w)[:-1]},
    "one more": lambda w: w | {"more": w["vector"]},
    "another name": lambda w: renamed(w, str.upper),
    "lists": lambda w: w | {"vector": w["vector"].tolist()},
}


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_arrays_of_every_dtype_are_found_where_they_lie(dtype: np.dtype[Any]) -> None:
    rows = [model(dtype, k) for k in range(3)]
    rows[1]["vector"].flags.writeable = False
    table = Table(Schema.of(rows[0]), 3)
    assert table.gather(rows, 1)
    assert table.gather([rows[2]], 0)
    for v, name in enumerate(rows[0]):
        assert table.addresses[v].tolist() == [lies_at(rows[k][name]) for k in (2, 0, 1, 2)]
    assert table.counts.tolist() == [12, 1, 0, 5]
    assert table.sizes.tolist() == [count * dtype.itemsize for count in (12, 1, 0, 5)]
    assert table.nbytes == 4 * 18 * dtype.itemsize


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_names_and_dtypes_may_be_equal_without_being_the_same(dtype: np.dtype[Any]) -> None:
    weights = model(dtype)
    unpickled = pickle.loads(pickle.dumps(renamed(weights, lambda name: "".join(list(name)))))
    assert unpickled["vector"].dtype == dtype
    assert Table(Schema.of(weights), 1).gather([unpickled], 1)


@needs_native
@pytest.mark.parametrize("by", [4, 12])
def test_arrays_need_no_more_alignment_than_their_dtype(by: int) -> None:
    weights = {"w": misaligned(np.arange(5, dtype=np.float32), by)}
    assert Table(Schema.of(weights), 1).gather([weights], 1)
    assert weighted_average([weights, weights])["w"].tolist() == [0, 1, 2, 3, 4]


@needs_native
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("case", [*ODD, *WRONG])
def test_what_is_not_plain_is_not_taken_wherever_it_is(case: str, place: int) -> None:
    rows: list[Any] = [model(np.dtype(np.float32), k) for k in range(3)]
    schema = Schema.of(rows[0])
    rows[place] = (ODD | WRONG)[case](rows[place])
    assert not Table(schema, 3).gather(rows, 1)


@needs_native
@pytest.mark.parametrize("row", [None, [], 3, {}], ids=repr)
def test_what_is_no_weight_dict_is_not_taken(row: Any) -> None:
    weights = model(np.dtype(np.float32))
    assert not Table(Schema.of(weights), 2).gather([weights, row], 1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_odd_weights_are_averaged_like_plain_ones(dtype: np.dtype[Any], case: str, place: int, kernel: str) -> None:
    rows = [model(dtype, k) for k in range(3)]
    expected = weighted_average(rows, [1, 2, 3], kernel=kernel)
    rows[place] = ODD[case](rows[place])
    found = weighted_average(rows, [1, 2, 3], like=model(dtype), kernel=kernel)
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", [OrderedDict, FrozenWeights])
def test_dicts_of_other_classes_are_averaged_like_plain_ones(kind: Callable[[Any], Any], kernel: str) -> None:
    rows = [model(np.dtype(np.float32), k) for k in range(3)]
    expected = weighted_average(rows, kernel=kernel)
    found = weighted_average([rows[0], kind(rows[1]), kind(rows[2])], kernel=kernel)
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in expected.items()
    }


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("place", [1, 2])
def test_wrong_weights_are_refused_wherever_they_are(case: str, place: int) -> None:
    rows = [model(np.dtype(np.float32), k) for k in range(3)]
    rows[place] = WRONG[case](rows[place])
    with pytest.raises(fl.ContributionError) as caught:
        weighted_average(rows)
    assert caught.value.contributor == f"contributions[{place}]"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_are_where_arrays_lie(dtype: np.dtype[Any]) -> None:
    arrays = list(model(dtype).values())
    assert addresses(arrays).tolist() == list(map(lies_at, arrays))
    assert addresses([]).tolist() == []
    with pytest.raises(ValueError, match="not C-contiguous"):
        addresses([*arrays, np.zeros((3, 4), dtype).T])


@needs_native
@pytest.mark.parametrize("seed", range(200))
def test_overlaps_are_found_as_by_comparing_all_with_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, n_inputs = int(rng.integers(1, 6)), int(rng.integers(0, 4))
    table = Table(Schema.of({str(v): np.zeros(int(rng.integers(0, 4)), np.uint8) for v in range(n)}), n_inputs)
    table.addresses[...] = rng.integers(1, 40 * n, table.addresses.shape)
    rows, sizes = table.addresses.tolist(), table.sizes.tolist()
    spans = [[set(range(at, at + size)) for at in row] for row, size in zip(rows, sizes, strict=True)]
    outputs, inputs = [row[0] for row in spans], [span for row in spans for span in row[1:]]
    among = any(outputs[i] & outputs[j] for i in range(n) for j in range(i))
    assert table.may_overlap() == (among or any(one & other for one in outputs for other in inputs))


@needs_native
def test_what_a_thread_still_works_on_is_held_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, out = [model(np.dtype(np.float32), k) for k in range(3)], model(np.dtype(np.float32))
    alive = [weakref.ref(array) for weights in (*rows, out) for array in weights.values()]
    shares: list[object] = []

    def interrupted(function: object, given: list[object]) -> None:
        shares.extend(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(threads, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weighted_average(rows, out=out, kernel="native")
    rows.clear()
    out.clear()
    gc.collect()
    assert all(array() is not None for array in alive)
    shares.clear()
    gc.collect()
    assert all(array() is None for array in alive)


@needs_native
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_no_objects_are_made_that_set_off_the_garbage_collector(dtype: np.dtype[Any]) -> None:
    rows = [{f"layer{i}": np.ones((2, 3), dtype) for i in range(200)} for _ in range(50)]
    out = {name: np.ones((2, 3), dtype) for name in rows[0]}
    runs: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        runs.append(phase)

    weighted_average(rows, out=out, kernel="native")
    gc.collect()
    gc.callbacks.append(note)
    try:
        weighted_average(rows, out=out, kernel="native")
    finally:
        gc.callbacks.remove(note)
    assert len(runs) <= 2, "one run, of the 200 entries of a schema and the like; 10 000 arrays would set off 14"


@needs_native
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)], ids=str)
def test_thousands_of_calls_leave_nothing_behind(dtype: np.dtype[Any]) -> None:
    rows = [model(dtype, k) for k in range(3)]
    odd = [rows[0], ODD["transposed"](rows[1])]
    out, schema = model(dtype), Schema.of(rows[0])
    watched = [*rows[0].values(), *out.values(), *rows[0], schema, dtype, np.ndarray, "dtype"]

    def calls(count: int) -> None:
        for _ in range(count):
            weighted_average(rows, out=out, kernel="native")
            assert Table(schema, 3).gather(rows, 1)
            assert not Table(schema, 2).gather(odd, 1)
            with pytest.raises(ValueError, match="not C-contiguous"):
                addresses([odd[1]["matrix"]])

    calls(100)
    gc.collect()  # of what other tests have left
    before = [sys.getrefcount(one) for one in watched]
    tracemalloc.start()
    try:
        calls(100)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
        calls(1000)
        gc.collect()
        later, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    after = [sys.getrefcount(one) for one in watched]
    assert all(now <= then for now, then in zip(after, before, strict=True)), "what others leave goes in between"
    assert later - size < 10_000, "less than a byte for each of what was looked at"
