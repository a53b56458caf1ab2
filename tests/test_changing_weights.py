"""Weights that somebody changes while they are averaged: what is averaged is finite, and who changed is named."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from reference import KERNELS, Array, WeightDict

import fed_learn as fl
from fed_learn import kernels
from fed_learn.aggregation import Accumulator, weighted_average
from fed_learn.aggregation.arrays import is_frozen
from fed_learn.kernels.base import Kernel
from fed_learn.weights import FrozenWeights

SIZE = 20_000
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


@contextmanager
def flipping(buffer: Array) -> Iterator[None]:
    """Another thread writes NaN and zeros to both ends of a buffer in turn, all the time."""
    over = threading.Event()

    def flip() -> None:
        while not over.is_set():
            buffer[-1] = buffer[0] = np.nan
            buffer[-1] = buffer[0] = 0

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def changing(kernel: Kernel, method: str, before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Changes weights just before a kernel looks at them, and just after, as another thread might."""
    kind: Any = type(kernel)
    original = getattr(kind, method)

    def changed(self: Any, *args: Any, **options: Any) -> Any:
        before()
        try:
            return original(self, *args, **options)
        finally:
            after()

    setattr(kind, method, changed)
    try:
        yield
    finally:
        setattr(kind, method, original)


def setting(buffer: Array, *values: float) -> Callable[[], None]:
    """Sets a buffer's first element to the next of some values at each call, and to the last ever after."""
    left = list(values)

    def step() -> None:
        buffer[0] = left.pop(0) if len(left) > 1 else left[0]

    return step


@every_kernel
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
def test_a_batch_with_a_buffer_that_flips_is_finite_or_refused_by_name(kernel: str, exact: bool) -> None:
    good, buffer = np.ones(SIZE, np.float32), np.zeros(SIZE, np.float32)
    with flipping(buffer):
        for _ in range(8):
            refused: list[fl.NonFiniteError] = []
            mean: WeightDict = {"w": good / 2}
            try:
                mean = weighted_average([{"w": good}, {"w": buffer}], [1, 1], exact=exact, kernel=kernel)
            except fl.NonFiniteError as error:
                refused.append(error)
            assert [(error.contributor, error.name) for error in refused] in ([], [("contributions[1]", "w")])
            assert set(mean["w"].tolist()) == {0.5}


@every_kernel
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
def test_a_stream_takes_a_buffer_that_flips_whole_or_refuses_it_by_name(kernel: str, exact: bool) -> None:
    good, buffer = np.ones(SIZE, np.float32), np.zeros(SIZE, np.float32)
    with flipping(buffer):
        for _ in range(8):
            accumulator = Accumulator(exact=exact, kernel=kernel)
            accumulator.add({"w": good}, 1, "good")
            refused: list[fl.NonFiniteError] = []
            try:
                accumulator.add({"w": buffer}, 1, "bad")
            except fl.NonFiniteError as error:
                refused.append(error)
            assert [(error.contributor, error.name) for error in refused] in ([], [("bad", "w")])
            assert set(accumulator.result()["w"].tolist()) == {1.0 if len(accumulator) == 1 else 0.5}


@every_kernel
def test_a_batch_that_was_not_finite_when_it_was_summed_and_is_again_has_the_mean_of_what_it_is(kernel: str) -> None:
    buffer = np.zeros(3)
    with changing(kernels.resolve(kernel), "weighted_mean", setting(buffer, np.nan, 4.0), setting(buffer, 4.0)):
        mean = weighted_average([{"w": np.ones(3)}, {"w": buffer}], [1, 1], kernel=kernel)
    assert mean["w"].tolist() == [2.5, 0.5, 0.5]


@every_kernel
def test_an_exact_batch_that_changes_after_it_was_looked_at_has_the_mean_of_what_it_is_then(kernel: str) -> None:
    buffer = np.zeros(3)
    with changing(kernels.resolve(kernel), "exact_mean", setting(buffer, np.nan, 4.0), setting(buffer, 4.0)):
        mean = weighted_average([{"w": np.ones(3)}, {"w": buffer}], [1, 1], exact=True, kernel=kernel)
    assert mean["w"].tolist() == [2.5, 0.5, 0.5]


@every_kernel
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_an_exact_batch_that_stays_changed_is_refused_by_name(kernel: str, value: float) -> None:
    buffer = np.zeros(3)
    expected = fl.NonFiniteError if not np.isfinite(value) else fl.ExactDomainError
    with (
        changing(kernels.resolve(kernel), "exact_mean", setting(buffer, value), setting(buffer, value)),
        pytest.raises(expected) as caught,
    ):
        weighted_average([{"w": np.ones(3)}, {"w": buffer}], [1, 1], exact=True, kernel=kernel)
    assert (caught.value.contributor, caught.value.name) == ("contributions[1]", "w")


@every_kernel
@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, bool])
def test_what_becomes_of_weights_after_they_were_added_does_not_matter(kernel: str, exact: bool, dtype: type) -> None:
    accumulator = Accumulator(exact=exact, kernel=kernel)
    for k in range(5):
        buffer: Array = np.full((2, SIZE // 2), k % 2, dtype)
        accumulator.add({"w": buffer.T if k == 3 else buffer.T.copy()}, 1)
        buffer[:] = 1
    assert set(accumulator.result()["w"].ravel().tolist()) == {
        dtype(round(0.4) if np.dtype(dtype).kind in "bi" else 0.4)
    }


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
def test_tensors_that_change_after_they_were_added_do_not_matter(exact: bool) -> None:
    for kernel in KERNELS:
        accumulator = Accumulator(exact=exact, kernel=kernel)
        for k in range(5):
            tensor = torch.full((7,), float(k))
            state: Any = {"w": tensor}
            accumulator.add(state, 1)
            tensor.fill_(torch.nan)
        assert accumulator.result()["w"].tolist() == [2.0] * 7


@every_kernel
@pytest.mark.parametrize("first", [{"w": np.array([np.nan])}, {"w": np.array([[np.nan]])}, {"v": np.array([np.nan])}])
def test_a_refused_first_contribution_leaves_no_memory_for_the_next_to_fit_into(kernel: str, first: Any) -> None:
    accumulator = Accumulator(kernel=kernel)
    with pytest.raises(fl.NonFiniteError):
        accumulator.add(first, 1)
    accumulator.add({"w": np.array([1.0, 2.0])}, 1)
    assert accumulator.result()["w"].tolist() == [1.0, 2.0]


def test_borrowed_weights_that_have_changed_are_told_apart_from_an_overflow() -> None:
    accumulator, buffer = Accumulator(), np.zeros(1)
    accumulator.add({"w": buffer}, 1, "site-1", borrow=True)
    buffer[0] = np.nan
    with pytest.raises(fl.SumOverflowError, match=r"'w': .* borrowed weights have changed"):
        accumulator.result()


@every_kernel
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_borrowed_weights_that_leave_the_domain_of_exact_sums_are_told(kernel: str, value: float) -> None:
    accumulator, buffer = Accumulator(exact=True, kernel=kernel), np.ones(3)
    accumulator.add({"w": buffer}, 1, "site-1", borrow=True)
    buffer[1] = value
    with pytest.raises(fl.ExactDomainError, match="borrowed weights have changed"):
        accumulator.result()
    with pytest.raises(fl.BrokenAccumulatorError):
        accumulator.result()


def read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("array", "frozen"),
    [
        (np.zeros(2), False),
        (np.zeros(2)[:1], False),
        (read_only(np.zeros(2)[:1]), False),  # whoever holds the whole can change it
        (read_only(np.zeros(2)), True),
        (read_only(np.zeros(2))[:1], True),
        (FrozenWeights({"w": np.zeros(2)})["w"], True),
        (np.frombuffer(b"12345678"), True),
        (np.frombuffer(memoryview(b"12345678")), True),
        (np.frombuffer(bytearray(8)), False),
        (np.frombuffer(memoryview(bytearray(8)).toreadonly()), False),
        (torch.zeros(2).numpy(), False),
        (np.broadcast_to(np.zeros(()), (3,)), False),
    ],
)
def test_only_what_nobody_can_change_is_frozen(array: Array, frozen: bool) -> None:
    assert is_frozen(array) is frozen


@every_kernel
def test_frozen_weights_are_not_copied(kernel: str) -> None:
    accumulator = Accumulator(kernel=kernel)
    copied: list[Sequence[Array]] = []
    with changing(kernels.resolve(kernel), "copy", lambda: copied.append(()), lambda: None):
        accumulator.add(FrozenWeights({"w": np.ones(3)}), 1)
        accumulator.add({"w": np.frombuffer(np.ones(3).tobytes())}, 1)
        assert copied == []
        accumulator.add({"w": np.ones(3)}, 1)
    assert len(copied) == 1
    assert accumulator.result()["w"].tolist() == [1.0] * 3


@every_kernel
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8, bool])
@pytest.mark.parametrize("size", [0, 1, 7, 65, (1 << 20) + 3])
def test_a_copy_has_the_same_bytes_and_says_whether_they_are_finite(kernel: str, dtype: type, size: int) -> None:
    rng = np.random.default_rng(size)
    # At an odd multiple of the element, where no vector begins.
    source: Array = np.zeros(size + 1, dtype)[1:]
    target: Array = np.zeros(size + 1, dtype)[1:]
    source[...] = rng.integers(0, 2, size)
    assert kernels.resolve(kernel).copy([source], [target]) == [False]
    assert target.tobytes() == source.tobytes()
    if np.dtype(dtype).kind == "f" and size:
        for place in {0, size // 2, size - 1}:
            source[place] = np.nan
            assert kernels.resolve(kernel).copy([source], [target]) == [True]
            assert target.tobytes() == source.tobytes()
            source[place] = 0
