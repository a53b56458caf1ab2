"""Tensors on devices: what stays there and what does not, on a GPU where there is one, else on a pretended device."""

import copy
import logging
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from interpreted import fused_on_devices, no_triton, unfused_on_devices
from models_of_frameworks import resnet50_shapes
from pretended import Pretended

import fed_learn as fl
import fed_learn.kernels.torch as torch_kernel
from fed_learn.adapters.torch_tensors import TorchTensors
from fed_learn.aggregation.tensors import opened
from fed_learn.kernels import unfused
from fed_learn.kernels.torch import arithmetic

REAL = torch.cuda.is_available()
FRAMEWORK = TorchTensors()
Weights = dict[str, Any]


@pytest.fixture
def pretended() -> Iterator[Pretended]:
    """A pretended device, also where there is a real one: it counts, and it has as many as are asked for."""
    with unfused_on_devices(), Pretended() as device:
        yield device


NO_TRITON = no_triton()
WAYS = [
    "pretended",
    pytest.param("pretended, fused", marks=pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))),
    pytest.param("real", marks=pytest.mark.skipif(not REAL, reason="there is no CUDA device")),
    pytest.param("real, unfused", marks=pytest.mark.skipif(not REAL, reason="there is no CUDA device")),
]


@pytest.fixture(params=WAYS)
def cuda(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device that is not the CPU."""
    ways = {"pretended, fused": fused_on_devices, "pretended": unfused_on_devices, "real, unfused": unfused_on_devices}
    with ExitStack() as stack:
        if request.param != "real":
            stack.enter_context(ways[request.param]())
        if request.param.startswith("pretended"):
            stack.enter_context(Pretended())
        if request.param == "real" and NO_TRITON is None:
            assert torch_kernel.not_fused(torch.device("cuda:0")) is None
        yield "cuda:0"


def on(device: str, weights: ref.WeightDict) -> Any:
    return {name: FRAMEWORK.tensor(np.array(array), device) for name, array in weights.items()}


def bits(weights: Any) -> Any:
    return ref.bits({n: FRAMEWORK.view(t) if isinstance(t, torch.Tensor) else t for n, t in weights.items()})


def models(count: int = 3, seed: int = 0) -> list[dict[str, ref.Array]]:
    """Every dtype in some sizes."""
    rng = np.random.default_rng(seed)
    shapes: list[Any] = [1, 3, 1025, (), (2, 0), (3, 5)]
    return [
        {f"{dtype.name} {shape}": ref.values(rng, dtype, shape) for dtype in ref.DTYPES for shape in shapes}
        for _ in range(count)
    ]


def devices_of(weights: Any) -> list[str]:
    return [str(tensor.device) for tensor in weights.values()]


# The bits of arrays, and where they lie.


@pytest.mark.parametrize("exact", [False, True])
def test_means_on_a_device_have_the_bits_of_arrays_and_stay_there(cuda: str, exact: bool) -> None:
    arrays = models()
    clients = [on(cuda, one) for one in arrays]
    before = [bits(one) for one in clients]
    expected = bits(fl.weighted_average(arrays, [3, 2, 1.5], exact=exact, kernel="numpy"))
    mean: Any = fl.weighted_average(clients, [3, 2, 1.5], exact=exact, like=arrays[0])
    out: Any = {name: torch.zeros_like(tensor) for name, tensor in clients[0].items()}
    assert fl.weighted_average(clients, [3, 2, 1.5], exact=exact, out=out) is out
    both: Any = (mean, out)
    for found in both:
        assert bits(found) == expected
        assert set(devices_of(found)) == {"cuda:0"}
        assert all(tensor.is_contiguous() for tensor in found.values())
    assert [bits(one) for one in clients] == before


@pytest.mark.parametrize("exact", [False, True])
def test_streams_on_a_device_have_the_bits_of_arrays_and_stay_there(cuda: str, exact: bool) -> None:
    arrays = models()
    clients = [on(cuda, one) for one in arrays]
    expected = fl.Accumulator(exact=exact, kernel="numpy")
    for one, weight in zip(arrays, (3, 2, 1), strict=True):
        expected.add(one, weight)
    stream, other = fl.Accumulator(exact=exact, like=clients[0]), fl.Accumulator(exact=exact)
    stream.add(clients[0], 3)
    other.add(clients[1], 2)
    stream.merge(other)
    stream = copy.copy(pickle.loads(pickle.dumps(stream)))
    stream.add(clients[2], 1, borrow=True)
    merged = fl.Accumulator(exact=exact)
    merged.merge(stream)
    out: Any = {name: torch.zeros_like(tensor) for name, tensor in clients[0].items()}
    assert stream.result(out) is out
    for found in (stream.result(), merged.result(), out):
        assert bits(found) == bits(expected.result())
        assert set(devices_of(found)) == {"cuda:0"}


def test_what_was_added_can_be_changed_at_once(cuda: str) -> None:
    stream, sent = fl.Accumulator(), on(cuda, {"w": np.array([1, 2], np.float32)})
    stream.add(sent, 1)
    sent["w"].zero_()
    stream.add(sent, 1)
    assert stream.result()["w"].tolist() == [0.5, 1.0]


def test_strides_of_all_kinds_have_the_bits_of_arrays(cuda: str) -> None:
    rng = np.random.default_rng(4)
    for memory in (torch.contiguous_format, torch.channels_last):
        arrays = [ref.values(rng, np.dtype(np.float32), (5, 3, 4, 7)) for _ in range(3)]
        sent: list[Any] = [torch.from_numpy(array).to(cuda).contiguous(memory_format=memory) for array in arrays]
        wide: list[Any] = [torch.stack([x, x], dim=-1)[..., 0] for x in sent]
        expected = fl.weighted_average([{"w": array} for array in arrays], [1, 2, 3.5], kernel="numpy")
        for column in (sent, wide):
            mean: Any = fl.weighted_average([{"w": x} for x in column], [1, 2, 3.5])
            assert bits(mean) == bits(expected)
            into: Any = {"w": torch.zeros(2, 5, 3, 4, 7, device=cuda).transpose(0, 1)[:, 1]}
            fl.weighted_average([{"w": x} for x in column], [1, 2, 3.5], out=into)
            assert bits(into) == bits(expected)


def test_variables_that_interleave_in_memory_have_the_bits_of_arrays(cuda: str) -> None:
    rows = [torch.arange(18.0).to(cuda) * k for k in (1, 2)]
    sent: list[Any] = [{"a": row[0:12:2], "b": row[6:18:2]} for row in rows]
    mean: Any = fl.weighted_average(sent)
    assert mean["a"].tolist() == [1.5 * i for i in range(0, 12, 2)]
    assert mean["b"].tolist() == [1.5 * i for i in range(6, 18, 2)]


def test_models_of_several_tiles_have_the_bits_of_arrays(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfused, "TILE", 1000)
    rng = np.random.default_rng(5)
    for dtype in ref.DTYPES:
        sizes = (1, 998, 1, 1000, 1001, 0, 2500, 3)
        arrays = [{f"{i}": ref.values(rng, dtype, size) for i, size in enumerate(sizes)} for _ in range(4)]
        expected = fl.weighted_average(arrays, [1, 2, 3.5, 0.1], kernel="numpy")
        clients = [on(cuda, one) for one in arrays]
        assert bits(fl.weighted_average(clients, [1, 2, 3.5, 0.1])) == bits(expected)
        stream, streamed = fl.Accumulator(), fl.Accumulator(kernel="numpy")
        for client, one, weight in zip(clients, arrays, [1, 2, 3.5, 0.1], strict=True):
            stream.add(client, weight)
            streamed.add(one, weight)
        assert bits(stream.result()) == bits(streamed.result())


def test_sums_that_overflow_and_large_integers_have_the_bits_of_arrays(cuda: str) -> None:
    top = np.finfo(np.float64).max
    arrays = [
        {"w": np.array([top, 1.0, -top, top]), "n": np.array([2**62, 5]), "u": np.array([2**64 - 1], np.uint64)},
        {"w": np.array([top, 3.0, -top, 0.0]), "n": np.array([2**62 - 2, 6]), "u": np.array([2**64 - 3], np.uint64)},
    ]
    for weights in ([1, 1e300], [2, 3], [1, 1e-300]):
        expected = fl.weighted_average(arrays, weights, kernel="numpy")
        assert bits(fl.weighted_average([on(cuda, one) for one in arrays], weights)) == bits(expected)
    stream = fl.Accumulator()
    for name in ("n", "u"):
        with pytest.raises(fl.IntegerRangeError) as caught:
            stream.add({name: on(cuda, arrays[0])[name]}, 1, "site-1")
        assert (caught.value.contributor, caught.value.name) == ("site-1", name)
    stream.add(on(cuda, {"a": np.ones(1), "w": np.array([top])}), 2)
    stream.add(on(cuda, {"a": np.ones(1), "w": np.array([top])}), 2.0**100)
    with pytest.raises(fl.SumOverflowError, match="'w'"):
        stream.result()


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite_are_refused_by_name_and_index(cuda: str, value: float) -> None:
    good: dict[str, ref.Array] = {"a": np.zeros((2, 3)), "b": np.zeros((2, 3), np.float32), "n": np.ones(2, np.int64)}
    bad = {name: array.copy() for name, array in good.items()}
    bad["b"][1, 2] = value
    sent = [fl.Contribution(f"site-{i}", on(cuda, one), 1) for i, one in enumerate((good, bad))]
    stream, idle = fl.Accumulator(), fl.Contribution("site-1", on(cuda, bad), 0)
    stream.add(sent[0])
    for call in (
        lambda: fl.weighted_average(sent),
        lambda: stream.add(sent[1]),
        lambda: fl.weighted_average([sent[0], idle]),
        lambda: stream.add(idle),
    ):
        with pytest.raises(fl.NonFiniteError) as caught:
            call()
        assert (caught.value.contributor, caught.value.name, caught.value.index) == ("site-1", "b", (1, 2))
    assert bits(stream.result()) == bits(good)


# Several devices.


PLACES = ("cuda:0", "cuda:1", "cpu", "cuda:0")


def spread(weights: ref.WeightDict) -> Any:
    """A model over two devices, and some of it on the CPU."""
    made = zip(weights.items(), PLACES * len(weights), strict=False)
    return {name: FRAMEWORK.tensor(np.array(array), place) for (name, array), place in made}


@pytest.mark.parametrize("exact", [False, True])
def test_a_model_over_two_devices_and_the_cpu_is_averaged_where_it_lies(pretended: Pretended, exact: bool) -> None:
    arrays = models()
    clients = [spread(one) for one in arrays]
    expected = bits(fl.weighted_average(arrays, [3, 2, 1], exact=exact, kernel="numpy"))
    out: Any = {name: torch.zeros_like(tensor) for name, tensor in clients[0].items()}
    stream, other = fl.Accumulator(exact=exact), fl.Accumulator(exact=exact)
    stream.add(clients[0], 3)
    other.add(clients[1], 2, borrow=True)
    stream.merge(other)
    stream = pickle.loads(pickle.dumps(stream))
    stream.add(clients[2], 1)
    results = [
        fl.weighted_average(clients, [3, 2, 1], exact=exact),
        fl.weighted_average(clients, [3, 2, 1], exact=exact, out=out),
        stream.result(),
    ]
    for found in results:
        assert bits(found) == expected
        assert devices_of(found) == devices_of(clients[0])
    assert results[1] is out


def test_the_state_of_an_optimizer_is_averaged_though_its_steps_are_on_the_cpu(cuda: str) -> None:
    def state(seed: int) -> Any:
        torch.manual_seed(seed)
        moments = {f"{k}.{name}": torch.rand(3, 2).to(cuda) for k in range(2) for name in ("exp_avg", "exp_avg_sq")}
        return moments | {f"{k}.step": torch.tensor(float(seed)) for k in range(2)}

    mean: Any = fl.weighted_average([state(2), state(4)])
    assert devices_of(mean) == ["cuda:0"] * 4 + ["cpu"] * 2
    assert mean["0.step"].item() == 3.0
    assert torch.equal(mean["1.exp_avg"].cpu(), ((state(2)["1.exp_avg"] + state(4)["1.exp_avg"]) / 2).cpu())


def test_arrays_beside_tensors_on_a_device_are_averaged_on_the_cpu(cuda: str) -> None:
    one, two = (
        {"t": on(cuda, {"t": np.array([i], np.float32)})["t"], "a": np.array([i, 2], np.float32)} for i in (1, 3)
    )
    stream = fl.Accumulator()
    stream.add(one, 1)
    stream.add(two, 1)
    for mean in (fl.weighted_average([one, two]), stream.result()):
        assert (mean["a"].tolist(), mean["t"].tolist()) == ([2.0, 2.0], [2.0])
        assert devices_of(mean) == ["cuda:0", "cpu"]


def test_a_variable_on_another_device_is_refused_by_name(pretended: Pretended) -> None:
    near, far = on("cuda:0", {"a": np.ones(2), "b": np.ones(2)}), on("cuda:1", {"a": np.ones(2), "b": np.ones(2)})
    mixed = near | {"b": far["b"]}
    for other, device in ((mixed, "cuda:1"), (near | {"b": torch.ones(2, dtype=torch.float64)}, "cpu")):
        sent = [fl.Contribution("site-1", near, 1), fl.Contribution("site-2", other, 1)]
        message = f"site-2: 'b' is on {device}, and what comes before on cuda:0; .*device= of weighted_average"
        with pytest.raises(fl.WeightsTypeError, match=message) as caught:
            fl.weighted_average(sent)
        assert (caught.value.contributor, caught.value.name) == ("site-2", "b")
        stream, second = fl.Accumulator(), fl.Accumulator()
        stream.add(sent[0])
        with pytest.raises(fl.WeightsTypeError, match=message):
            stream.add(sent[1])
        assert stream.contributors == ("site-1",)
        second.add(sent[1])
        with pytest.raises(fl.MergeError, match=device):
            stream.merge(second)
        with pytest.raises(fl.OutputError, match=f"'b' is on {device}, the result on cuda:0"):
            fl.weighted_average([near], out=other)


def test_contributions_are_moved_to_the_device_that_is_named(pretended: Pretended) -> None:
    arrays = models()
    sent = [arrays[0], on("cuda:1", arrays[1]), spread(arrays[2])]
    expected = bits(fl.weighted_average(arrays, [3, 2, 1], kernel="numpy"))
    for device in ("cuda:0", "cuda:1", "cuda", torch.device("cuda:0")):
        stream = fl.Accumulator(device=device)
        for one, weight in zip(sent, (3, 2, 1), strict=True):
            stream.add(one, weight)
        for mean in (fl.weighted_average(sent, [3, 2, 1], device=device), stream.result()):
            assert bits(mean) == expected
            assert set(devices_of(mean)) == {"cuda:0" if device == "cuda" else str(device)}
    for name in ("cpu", "cpu:0", torch.device("cpu")):
        host: Any = fl.weighted_average(sent, [3, 2, 1], device=name)
        assert bits(host) == expected
    assert all(isinstance(array, np.ndarray) for array in host.values())  # as the first contribution has them
    tensors: Any = fl.weighted_average(sent[::-1], [1, 2, 3], device="cpu")
    assert bits(tensors) == bits(fl.weighted_average(arrays[::-1], [1, 2, 3], kernel="numpy"))
    assert set(devices_of(tensors)) == {"cpu"}


def test_a_device_that_is_not_there_is_an_error_that_names_it() -> None:
    for device in ("cuda:99", "nowhere", "meta", "hpu", 1.5, True):
        for call in (
            lambda device=device: fl.weighted_average([fl.Contribution("a", {"w": np.ones(1)}, 1)], device=device),
            lambda device=device: fl.Accumulator(device=device),
        ):
            with pytest.raises(ValueError, match=f"device '{device}' cannot be used: "):
                call()


@pytest.mark.parametrize("kernel", ["native", "numpy"])
def test_a_kernel_that_cannot_reach_the_device_is_an_error_that_says_what_is_valid(cuda: str, kernel: str) -> None:
    if kernel not in fl.kernels.available():
        pytest.skip("the native kernel was not built")
    weights = on(cuda, {"w": np.ones(2)})
    for exact in (False, True):
        with pytest.raises(fl.KernelUnavailableError, match="on cuda:0; valid are auto, torch"):
            fl.weighted_average([weights], kernel=kernel, exact=exact)
        with fl.kernels.use(kernel):
            stream = fl.Accumulator(exact=exact)
        with pytest.raises(fl.KernelUnavailableError, match="valid are auto, torch"):
            stream.add(weights, 1)


# What is nearly the usual case.


@pytest.mark.parametrize("exact", [False, True])
def test_the_order_of_names_and_equal_dtypes_of_another_make_do(cuda: str, exact: bool) -> None:
    first = on(cuda, {"a": np.ones(2, np.float32), "n": np.array([4])})
    stream = fl.Accumulator(exact=exact)
    stream.add(first, 1)
    second = on(cuda, {"n": np.array([8]), "a": np.full(2, 3, np.float32)})
    for one in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        one.add(second, 1)
        assert {name: t.tolist() for name, t in one.result().items()} == {"a": [2.0, 2.0], "n": [6]}
    likes = pickle.loads(pickle.dumps({"n": np.zeros(1, np.int64), "a": np.zeros(2, np.float32)}))
    for like in (likes, {"a": np.zeros(2, ">f4"), "n": np.zeros(1, np.longlong)}):
        mean = fl.weighted_average([first, second], like=like, exact=exact)
        assert list(mean) == list(like)
        assert (mean["a"].tolist(), mean["n"].tolist()) == ([2.0, 2.0], [6])


def test_strided_tensors_are_copied_to_the_host(cuda: str) -> None:
    x: Any = torch.arange(6.0).to(cuda).view(3, 2)[:, 1]
    for sent in ([{"w": x}] * 2, [{"w": x[:1].expand(3)}] * 2):
        expected = bits({"w": np.array(sent[0]["w"].tolist(), np.float32)})
        for settings in ({"exact": True}, {"device": "cpu"}, {"aggregation_weights": [1, 1e-300]}):
            assert bits(fl.weighted_average(sent, **settings)) == expected


def test_numpy_scalars_are_moved_as_well(cuda: str) -> None:
    sent: list[Any] = [{"a": np.float32(i), "b": np.ones(1)} for i in (1, 3)]
    mean = fl.weighted_average(sent, device=cuda)
    assert (mean["a"].item(), set(devices_of(mean))) == (2.0, {"cuda:0"})


def test_out_on_a_device_is_refused_for_what_is_wrong_with_it(cuda: str) -> None:
    sent = [on(cuda, {"b": np.ones(1)})]
    cases: list[tuple[Any, type[Exception], str]] = [
        (on(cuda, {"b": np.ones(1), "c": np.ones(1)}), fl.NamesError, "out: .*'c'"),
        ([1], fl.WeightsTypeError, "out: weights are a list"),
        ("x", fl.WeightsTypeError, "out: weights are a str"),
        ({"b": None}, fl.WeightsTypeError, "out: 'b' is"),
    ]
    for exact in (False, True):
        for out, error, message in cases:
            with pytest.raises(error, match=message):
                fl.weighted_average(sent, out=out, exact=exact)


def test_an_accumulator_with_a_device_takes_no_sums_from_elsewhere(cuda: str) -> None:
    stream, other = fl.Accumulator(device=cuda), fl.Accumulator()
    other.add({"w": np.ones(1)}, 1)
    with pytest.raises(fl.MergeError, match="other holds the sums of 'w' on cpu, and this accumulator on cuda:0"):
        stream.merge(other)


def test_the_first_variable_with_integers_that_are_too_large_is_named(cuda: str) -> None:
    large = on(cuda, {"b": np.array([2**60])}) | {"a": np.array([2**61])}
    with pytest.raises(fl.IntegerRangeError) as caught:
        fl.Accumulator().add(large, 1, "site-1")
    assert caught.value.name == "b"


# Devices without float64.


def test_out_on_a_device_without_float64_shares_no_memory_with_inputs(pretended: Pretended) -> None:
    x, y = (on("mps:0", {"w": np.array(values, np.float32)})["w"] for values in ([3, 4], [1, 2]))
    with pytest.raises(fl.OutputError, match="overlaps an input in memory"):
        fl.weighted_average([{"b": x}, {"b": y}], out={"b": x.detach()})
    z = torch.zeros(4).to("mps:0")
    overlapping: Any = {"b": z[:2], "c": z[1:3]}
    with pytest.raises(fl.OutputError, match="'b' and 'c' overlap in memory"):
        fl.weighted_average([{"b": x, "c": y}], out=overlapping)
    apart: Any = {"b": z[:2], "c": z[2:]}
    fl.weighted_average([{"b": x, "c": y}], out=apart)
    assert z.tolist() == [3.0, 4.0, 1.0, 2.0]


@pytest.mark.parametrize("exact", [False, True])
def test_a_device_without_float64_is_averaged_by_way_of_the_host(pretended: Pretended, exact: bool) -> None:
    arrays = [{name: a for name, a in one.items() if a.dtype != np.float64} for one in models()]
    clients = [on("mps:0", one) for one in arrays]
    expected = bits(fl.weighted_average(arrays, [3, 2, 1], exact=exact, kernel="numpy"))
    out: Any = {name: torch.zeros_like(tensor) for name, tensor in clients[0].items()}
    stream = fl.Accumulator(exact=exact)
    for client, weight in zip(clients, (3, 2, 1), strict=True):
        stream.add(client, weight)
    for kernel in (None, *fl.kernels.available()):
        mean = fl.weighted_average(clients, [3, 2, 1], exact=exact, kernel=kernel)
        assert bits(mean) == expected
        assert set(devices_of(mean)) == {"mps:0"}
    fl.weighted_average(clients, [3, 2, 1], exact=exact, out=out)
    assert bits(out) == bits(stream.result()) == expected
    assert set(devices_of(stream.result())) == {"mps:0"}
    with pytest.raises(ValueError, match="no float64"):
        fl.weighted_average(arrays, device="mps")


def test_a_device_of_intel_without_float64_is_averaged_by_way_of_the_host(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    for has_float64 in (False, True):
        place = f"xpu:{int(has_float64)}"
        properties = SimpleNamespace(has_fp64=has_float64)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device, found=properties: found)
        assert opened(on(place, {"w": np.ones(2)}), "x").devices == ({"w": place} if has_float64 else {})


# Modes of torch.


def test_what_was_made_in_inference_mode_is_used_and_written_as_any_other(cuda: str) -> None:
    arrays = models()
    expected = bits(fl.weighted_average(arrays, kernel="numpy"))
    stream = fl.Accumulator()
    with torch.inference_mode():
        clients = [on(cuda, one) for one in arrays]
        out: Any = {name: torch.zeros_like(tensor) for name, tensor in clients[0].items()}
        inside = fl.weighted_average(clients)
        stream.add(clients[0], 1)
    stream.add(clients[1], 1)
    with torch.inference_mode():
        stream.add(clients[2], 1, borrow=True)
    fl.weighted_average(clients, out=out)
    result = stream.result()
    for found in (inside, out, result, stream.result(out)):
        assert bits(found) == expected
    results: Any = (inside, result, fl.weighted_average(clients))
    for one in results:
        for tensor in one.values():  # results belong to whoever asked, in whatever mode
            assert not tensor.is_inference()


def test_large_values_are_written_to_tensors_made_in_inference_mode(cuda: str) -> None:
    top = np.finfo(np.float64).max
    arrays = [
        {"w": np.array([top, 1.0]), "n": np.array([2**62, 5])},
        {"w": np.array([top, 3.0]), "n": np.array([2**62, 6])},
    ]
    with torch.inference_mode():
        clients = [on(cuda, one) for one in arrays]
        out: Any = {name: torch.zeros_like(tensor) for name, tensor in clients[0].items()}
    fl.weighted_average(clients, out=out)
    assert bits(out) == bits(fl.weighted_average(arrays, kernel="numpy"))


@pytest.mark.parametrize("default", ["meta", "cuda:0"])
def test_the_default_device_of_torch_changes_nothing(pretended: Pretended, default: str) -> None:
    arrays = models()
    clients = [on("cuda:0", one) for one in arrays]
    host = [on("cpu", one) for one in arrays]
    expected = bits(fl.weighted_average(arrays, [3, 2, 1], kernel="numpy"))
    torch.set_default_device(default)
    try:
        stream = fl.Accumulator()
        for client, weight in zip(clients, (3, 2, 1), strict=True):
            stream.add(client, weight)
        found = [fl.weighted_average(clients, [3, 2, 1]), stream.result()]
        found += [fl.weighted_average(some, [3, 2, 1], kernel="torch") for some in (arrays, host)]
        found += [fl.weighted_average(some, [3, 2, 1], exact=True, kernel="torch") for some in (clients, host)]
    finally:
        torch.set_default_device(None)
    assert [bits(one) for one in found[:4]] == [expected] * 4
    assert bits(found[4]) == bits(found[5]) == bits(fl.weighted_average(arrays, [3, 2, 1], exact=True))
    assert [set(devices_of(one)) for one in (*found[:2], found[3])] == [{"cuda:0"}, {"cuda:0"}, {"cpu"}]


def test_flushed_subnormals_matter_on_the_cpu_alone(cuda: str) -> None:
    clients = [on(cuda, {"w": np.array([1, i], np.float32)}) for i in (2, 4)]
    stream = fl.Accumulator()
    assert torch.set_flush_denormal(True)
    try:
        mean = fl.weighted_average(clients)
        stream.add(clients[0], 1)
        stream.add(clients[1], 1, borrow=True)
        streamed = stream.result()
        with pytest.raises(fl.FloatingPointEnvironmentError):
            fl.weighted_average([{"w": np.array([1], np.float32)}], kernel="torch")
    finally:
        torch.set_flush_denormal(False)
    assert mean["w"].tolist() == streamed["w"].tolist() == [1.0, 3.0]


# Models.


def test_weights_of_any_byte_order_are_loaded_into_a_model_on_a_device(cuda: str) -> None:
    model = torch.nn.Linear(3, 2).to(cuda)
    values = {"weight": np.arange(6, dtype=">f4").reshape(2, 3), "bias": np.array([7, 8], ">f4")}
    fl.set_weights(model, values)
    assert bits(fl.get_weights(model)) == ref.bits({name: a.astype("<f4") for name, a in values.items()})


def test_weights_of_a_model_on_a_device_stay_there(cuda: str) -> None:
    model, other = torch.nn.Linear(3, 2).to(cuda), torch.nn.Linear(3, 2).to(cuda)
    live, own = fl.get_weights(model, copy=False), fl.get_weights(model)
    for weights in (live, own):
        assert set(devices_of(weights)) == {"cuda:0"}
    before = own["bias"].tolist()
    with torch.no_grad():
        model.bias.zero_()
    assert (live["bias"].tolist(), own["bias"].tolist()) == ([0.0, 0.0], before)
    mean: Any = fl.weighted_average([fl.get_weights(model), fl.get_weights(other)], [1, 3])
    fl.set_weights(model, mean)
    assert bits(fl.get_weights(model)) == bits(mean)


def test_what_gradients_need_is_not_overwritten_unnoticed(cuda: str) -> None:
    for place in (cuda, "cpu"):
        x, w = (torch.full((3,), value, device=place) for value in (2.0, 3.0))
        loss = (x.requires_grad_() * w).sum()
        fl.weighted_average([on(place, {"w": np.ones(3, np.float32)})], out={"w": w})  # type: ignore[dict-item]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # type: ignore[no-untyped-call]


# Streams of a device, and pickles.


def test_an_accumulator_may_be_used_from_several_streams(pretended: Pretended) -> None:
    first, second = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    clients = [on("cuda:0", one) for one in models(4)]
    torch.cuda.synchronize()
    stream, other = fl.Accumulator(), fl.Accumulator()
    with pretended.counting():
        with torch.cuda.stream(first):
            stream.add(clients[0], 1, borrow=True)
            stream.add(clients[1], 1)
        with torch.cuda.stream(second):
            stream.add(clients[2], 1, borrow=True)
            other.add(clients[3], 1)
        with torch.cuda.stream(first):
            stream.merge(other)
        with torch.cuda.stream(second):
            found = stream.result()
        assert pretended.races() == []
        torch.cuda.synchronize()
    assert bits(found) == bits(fl.weighted_average(models(4), kernel="numpy"))


def test_sums_that_were_pickled_on_a_device_go_on_where_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    arrays = models()
    pickled = []
    with unfused_on_devices(), Pretended():  # also where there is a GPU, on which fused ones would be tried
        for exact in (False, True):
            stream = fl.Accumulator(exact=exact)
            stream.add(on("cuda:0", arrays[0]), 1, "site-1")
            pickled.append(pickle.dumps(stream, protocol=5))
        empty = pickle.dumps(fl.Accumulator(device="cuda:0"))
    if REAL:
        pytest.skip("there is a device")
    for exact, data in zip((False, True), pickled, strict=True):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            stream = pickle.loads(data)
        assert "were on cuda:0, and stay on the host here" in caplog.text
        stream.add(arrays[1], 1, "site-2")
        expected = bits(fl.weighted_average(arrays[:2], exact=exact, kernel="numpy"))
        assert bits(stream.result()) == expected
        assert set(devices_of(stream.result())) == {"cpu"}
    stream = pickle.loads(empty)
    stream.add(arrays[0], 1)
    assert bits(stream.result()) == bits(arrays[0])


# Fused or not.


def test_triton_is_there_where_it_was_asked_for() -> None:
    assert NO_TRITON is None or os.environ.get("FED_LEARN_REQUIRE_TRITON") != "1", NO_TRITON


def choice(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> tuple[Any, str | None]:
    """What is chosen for a device where torch finds CUDA, with these modules imported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("triton", "tensorflow", "fed_learn.kernels.fused"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    chosen: tuple[Any, str | None] = torch_kernel._arithmetic.__wrapped__(torch.device("cuda:0"))
    return chosen


def test_operations_are_not_fused_where_that_cannot_be_and_it_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_kernel, "find_spec", lambda name: None)
    assert choice(monkeypatch) == (unfused, "Triton is not installed")
    assert "on cuda:0 are not fused, and take several times as long as they could: Triton is not" in caplog.text
    module, why = choice(monkeypatch, tensorflow=SimpleNamespace())
    assert (module, str(why).partition(":")[0]) == (unfused, "Triton cannot be imported once TensorFlow has been")
    module, why = choice(monkeypatch, triton=None)  # as a package that cannot be imported
    assert module is unfused
    assert str(why).startswith("Triton cannot be imported: ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_kernel.not_fused(torch.device("cpu")) == "it is no CUDA device"
    assert torch_kernel._arithmetic.__wrapped__(torch.device("cuda:0"))[1] == "torch finds no CUDA device"


def test_the_environment_says_whether_operations_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_kernel, "find_spec", lambda name: None)
    monkeypatch.setenv("FED_LEARN_FUSED", "0")
    assert choice(monkeypatch) == (unfused, "FED_LEARN_FUSED=0 says so")
    monkeypatch.setenv("FED_LEARN_FUSED", "1")
    with pytest.raises(fl.KernelUnavailableError, match="on cuda:0 cannot be fused: Triton is not installed"):
        choice(monkeypatch)
    monkeypatch.setenv("FED_LEARN_FUSED", "yes")
    with pytest.raises(fl.KernelNameError, match="FED_LEARN_FUSED 'yes' is unknown; valid are 0, 1, auto"):
        choice(monkeypatch)


# What it costs.


def resnet50(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    arrays = {
        name: rng.standard_normal(shape, np.float32) if dtype == np.float32 else np.array(seed, dtype)
        for name, (shape, dtype) in resnet50_shapes().items()
    }
    return on("cuda:0", arrays)


def test_a_mean_of_large_models_takes_few_operations_and_waits_once(pretended: Pretended) -> None:
    clients = [resnet50(k) for k in range(10)]
    elements = sum(tensor.numel() for tensor in clients[0].values())
    assert arithmetic(torch.device("cuda:0")) is unfused
    with pretended.counting() as log:
        mean = fl.weighted_average(clients, range(1, 11))
        assert len(log.launches) <= 400
        assert len(log.synchronisations) == 1
        # 10 × (8 to put it together, 12 for a product, 24 for a sum) without the first sum, and the division.
        assert log.bytes_moved / elements < 450
    expected = fl.weighted_average([{n: FRAMEWORK.view(t) for n, t in c.items()} for c in clients], range(1, 11))
    assert bits(mean) == bits(expected)


def test_one_value_among_many_variables_is_found_with_few_waits(pretended: Pretended) -> None:
    sent = on("cuda:0", {f"{i}": np.full(1, np.inf if i == 1234 else 1.0) for i in range(2000)})
    fine = on("cuda:0", {f"{i}": np.ones(1) for i in range(2000)})
    with pretended.counting() as log:
        with pytest.raises(fl.NonFiniteError, match="'1234'"):
            fl.weighted_average([sent, fine])
        assert len(log.synchronisations) < 40


def test_what_goes_to_the_host_goes_in_one_transfer_per_contribution(pretended: Pretended) -> None:
    clients = [resnet50(k) for k in range(3)]
    with pretended.counting() as log:
        fl.weighted_average(clients, exact=True)
        assert len([t for t in log.transfers if t.to == "cpu"]) == len(clients)
    stream = fl.Accumulator(exact=True)
    with pretended.counting() as log:
        for client in clients:
            stream.add(client, 1)
        assert len([t for t in log.transfers if t.to == "cpu"]) == len(clients)


def test_a_stream_waits_twice_for_each_contribution(pretended: Pretended) -> None:
    clients = [resnet50(k) for k in range(3)]
    stream = fl.Accumulator()
    with pretended.counting() as log:
        for client in clients:
            stream.add(client, 1)
        assert len(log.synchronisations) == 2 * len(clients)  # whether all is finite, and the largest counters
        assert len(log.launches) <= 100 * len(clients)


# Variables that are not averaged


def test_policies_give_tensors_on_the_device(cuda: str) -> None:
    def sent(k: float) -> Weights:
        on: Any = {"dtype": torch.float32, "device": cuda}
        return {
            "w": torch.tensor([k, 1], **on),
            "bn": torch.tensor([k], **on),
            "top": torch.tensor([k, -k], **on),
            "seen": torch.tensor(int(10 * k), device=cuda),
            "fixed": torch.tensor([7, 9], dtype=torch.uint8, device=cuda),
            "own": torch.tensor([k], **on),
        }

    policies = {"bn": "local", "top": "max", "seen": "sum", "fixed": "same", "own": "keep"}
    expected = {"w": [2, 1], "top": [3, -1], "seen": 40, "fixed": [7, 9], "own": [1]}
    made: Weights = dict(fl.weighted_average([sent(1), sent(3)], like=sent(1), policies=policies))
    stream = fl.Accumulator(like=sent(1), policies=policies)
    for k in (1, 3):
        stream.add(sent(k), 1, f"site-{k}")
    results: list[Weights] = [made, dict(stream.result())]
    for found in results:
        assert {name: value.cpu().tolist() for name, value in found.items()} == expected
        assert {str(value.device) for value in found.values()} == {cuda}
    with pytest.raises(fl.NotSameError, match=r"contributions\[1\]: 'fixed'"):
        fl.weighted_average([sent(1), {**sent(1), "fixed": sent(1)["fixed"] + 1}], policies={"fixed": "same"})


def test_a_mask_of_minus_infinity_stays_on_the_device(cuda: str) -> None:
    mask = torch.tensor([0.0, -torch.inf], device=cuda)
    sent: Any = [{"w": torch.tensor([k], device=cuda), "mask": mask.clone()} for k in (1.0, 3.0)]
    made: Weights = dict(fl.weighted_average(sent))
    assert {name: value.cpu().tolist() for name, value in made.items()} == {"w": [2.0], "mask": [0.0, -torch.inf]}
    assert {str(value.device) for value in made.values()} == {cuda}
