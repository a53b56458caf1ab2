"""Torch tensors straight into the averages: the same kind comes out, with the bits of arrays.

Tensors that are not on the CPU are in `cuda/test_devices.py`.
"""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch

import fed_learn as fl
from fed_learn.adapters.torch_tensors import TorchTensors
from fed_learn.aggregation.round import Round

KERNELS = (None, *ref.KERNELS)
Tensors = dict[str, Any]
FRAMEWORK = TorchTensors()


def of(**variables: Any) -> Any:
    """A dict of tensors, which type checkers do not take for a weight dict."""
    return variables


def parameters(model: torch.nn.Module) -> Any:
    return dict(model.named_parameters())


def tensors_of(arrays: ref.WeightDict, device: str = "cpu") -> Tensors:
    return {name: FRAMEWORK.tensor(array.copy(), device) for name, array in arrays.items()}


def bits(weights: Any) -> Any:
    return ref.bits({n: FRAMEWORK.view(t) if isinstance(t, torch.Tensor) else t for n, t in weights.items()})


def models(seed: int, count: int = 3, dtypes: tuple[Any, ...] = ref.DTYPES) -> list[dict[str, ref.Array]]:
    """Every dtype in every odd size, and some shapes."""
    rng = np.random.default_rng(seed)
    shapes: list[Any] = [*ref.SIZES, (), (2, 0), (3, 5)]
    return [
        {f"counts.{dtype.name} {shape}": ref.values(rng, dtype, shape) for dtype in dtypes for shape in shapes}
        for _ in range(count)
    ]


# The same bits.


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(3))
def test_tensors_have_the_bits_of_arrays_for_all_dtypes_and_sizes(kernel: str | None, seed: int) -> None:
    arrays = models(seed)
    weights = [1.5, 300, 0.1][seed:] + [7.0] * seed
    expected = fl.weighted_average(arrays, weights, kernel="numpy")
    clients = [tensors_of(one) for one in arrays]
    before = [bits(one) for one in clients]
    mean: Any = fl.weighted_average(clients, weights, kernel=kernel)
    assert all(type(t) is torch.Tensor and t.is_contiguous() for t in mean.values())
    assert [str(t.dtype) for t in mean.values()] == [f"torch.{a.dtype.name}" for a in expected.values()]
    assert bits(mean) == bits(expected)
    stream = fl.Accumulator(kernel=kernel)
    for client, weight in zip(clients, weights, strict=True):
        stream.add(client, weight, borrow=bool(seed))
    assert bits(stream.result()) == bits(fl_stream(arrays, weights))
    assert [bits(one) for one in clients] == before


def fl_stream(arrays: list[dict[str, ref.Array]], weights: list[float]) -> ref.WeightDict:
    stream = fl.Accumulator(kernel="numpy")
    for one, weight in zip(arrays, weights, strict=True):
        stream.add(one, weight)
    return stream.result()


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_random_contributions_in_random_strides(kernel: str | None) -> None:
    rng = np.random.default_rng(4)
    for _ in range(40):
        count, shape = int(rng.integers(1, 30)), tuple(int(n) for n in rng.integers(1, 9, 3))
        dtype = ref.FLOATS[rng.integers(len(ref.FLOATS))]
        arrays = [ref.finite_patterns(rng, dtype, int(np.prod(shape))).reshape(shape) for _ in range(count)]
        weights = list(rng.uniform(0.1, 1000, count))
        strided = [FRAMEWORK.tensor(np.ascontiguousarray(a.transpose(2, 0, 1))).permute(1, 2, 0) for a in arrays]
        assert strided[0].shape == shape
        expected = fl.weighted_average([{"w": a} for a in arrays], weights, kernel="numpy")
        assert bits(fl.weighted_average([{"w": t} for t in strided], weights, kernel=kernel)) == bits(expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_that_overflow_and_large_integers_have_the_bits_of_arrays(kernel: str | None) -> None:
    top = np.finfo(np.float64).max
    arrays = [
        {"w": np.array([top, 1.0, -top, top]), "n": np.array([2**62, 5]), "u": np.array([2**64 - 1], np.uint64)},
        {"w": np.array([top, 3.0, -top, 0.0]), "n": np.array([2**62 - 2, 6]), "u": np.array([2**64 - 3], np.uint64)},
    ]
    expected = fl.weighted_average(arrays, [1, 1e300], kernel="numpy")
    assert bits(fl.weighted_average(list(map(tensors_of, arrays)), [1, 1e300], kernel=kernel)) == bits(expected)
    stream = fl.Accumulator(kernel=kernel)
    for name in ("n", "u"):
        with pytest.raises(fl.IntegerRangeError) as caught:
            stream.add({name: tensors_of(arrays[0])[name]}, 1, "site-1")
        assert (caught.value.contributor, caught.value.name) == ("site-1", name)
    stream.add(of(w=torch.tensor([top], dtype=torch.float64)), 2)
    stream.add(of(w=torch.tensor([top], dtype=torch.float64)), 2.0**100)
    with pytest.raises(fl.SumOverflowError, match="'w'"):
        stream.result()


# Kinds and devices.


def test_the_first_contribution_decides_the_kind_of_the_result() -> None:
    array, tensor = of(w=np.array([0, 1], np.float32)), of(w=torch.tensor([4.0, 1.0]))
    for kernel in KERNELS:
        for first, second in ((array, tensor), (tensor, array)):
            mean: Any = fl.weighted_average([first, second], [300, 100], like=second, kernel=kernel)
            stream = fl.Accumulator(like=second, kernel=kernel)
            stream.add(first, 300)
            stream.add(second, 100)
            for result in (mean, stream.result()):
                assert type(result["w"]) is type(first["w"])
            assert mean["w"].tolist() == [first["w"].tolist()[0] * 0.75 + second["w"].tolist()[0] * 0.25, 1.0]
    assert isinstance(fl.weighted_average([array], like=tensor)["w"], np.ndarray)


def test_contributions_of_tensors_are_summed_in_the_order_of_their_names() -> None:
    arrays = models(5, dtypes=ref.FLOATS)
    sent = [fl.Contribution(f"site-{i}", a, i + 1, round=3) for i, a in enumerate(arrays)]
    tensors = [fl.Contribution(c.contributor, tensors_of(c.weights or {}), c.aggregation_weight, round=3) for c in sent]
    for kernel in KERNELS:
        assert bits(fl.weighted_average(tensors[::-1], kernel=kernel)) == bits(fl.weighted_average(sent))
        with pytest.raises(fl.DuplicateContributionError):
            fl.weighted_average([tensors[0], tensors[0]], kernel=kernel)


# Bad tensors.


BAD: dict[str, tuple[Callable[[], torch.Tensor], type[fl.FedLearnError]]] = {
    "sparse": (lambda: torch.eye(2).to_sparse(), fl.WeightsTypeError),
    "meta": (lambda: torch.ones(2, 2, device="meta"), fl.WeightsTypeError),
    "negated": (lambda: torch.ones(2, 2, dtype=torch.complex64).conj().imag, fl.WeightsTypeError),
    "complex": (lambda: torch.ones(2, 2, dtype=torch.complex64), fl.DtypeError),
    "float8": (lambda: torch.ones(2, 2).to(torch.float8_e4m3fn), fl.DtypeError),
    "shape": (lambda: torch.ones(4), fl.ShapeError),
    "dtype": (lambda: torch.ones(2, 2, dtype=torch.float64), fl.DtypeError),
    "nan": (lambda: torch.tensor([[0, 1], [torch.nan, torch.inf]]), fl.NonFiniteError),
    "inf": (lambda: torch.tensor([[0, 1], [-torch.inf, 0]]), fl.NonFiniteError),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_tensor_is_refused_by_contributor_and_variable(kind: str, kernel: str | None) -> None:
    make, error = BAD[kind]
    good: Any = of(v=torch.zeros(3), w=torch.ones(2, 2))
    bad: Any = good | {"w": make()}
    with pytest.raises(error) as caught:
        fl.weighted_average([fl.Contribution("site-1", good, 1), fl.Contribution("site-2", bad, 1)], kernel=kernel)
    assert (caught.value.contributor, caught.value.name) == ("site-2", "w")
    stream = fl.Accumulator(kernel=kernel)
    stream.add(good, 1, "site-1")
    with pytest.raises(error) as streamed:
        stream.add(bad, 1, "site-2")
    assert str(streamed.value) == str(caught.value)
    assert stream.contributors == ("site-1",)
    assert bits(stream.result()) == bits(good)
    if error is fl.NonFiniteError:
        assert (caught.value.index, str(caught.value.value)) == ((1, 0), {"nan": "nan", "inf": "-inf"}[kind])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantized_tensors_are_kept_where_they_are_equal_and_refused_else() -> None:
    def sent(name: str, number: float, scale: float) -> fl.Contribution:
        quantized: Any = torch.quantize_per_tensor(torch.full((2,), number), scale, 0, torch.qint8)
        return fl.Contribution(name, {"w": quantized, "b": torch.tensor([number])}, 1)  # type: ignore[dict-item]

    found: Any = fl.weighted_average([sent("site-1", 1.0, 0.1), sent("site-2", 1.0, 0.1)])
    assert torch.equal(found["w"], torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    for other in (sent("site-2", 2.0, 0.1), sent("site-2", 1.0, 0.2)):
        with pytest.raises(fl.NotSameError, match=r"site-2: 'w' is not the same as that of site-1.*quantized numbers"):
            fl.weighted_average([sent("site-1", 1.0, 0.1), other])
    with pytest.raises(ValueError, match="'w' has the policy 'mean', but it is quantized numbers of torch"):
        fl.weighted_average([sent("site-1", 1.0, 0.1)], policies={"w": "mean"})


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_names_are_refused(kernel: str | None) -> None:
    with pytest.raises(fl.NamesError, match=r"contributions\[1\]"):
        fl.weighted_average([of(a=torch.ones(1)), of(b=torch.ones(1))], kernel=kernel)
    with pytest.raises(fl.EmptyAggregationError):
        fl.weighted_average([], like=of(a=torch.ones(1)), kernel=kernel)
    with pytest.raises(fl.EmptyAggregationError):
        fl.weighted_average([of(a=torch.ones(1))], [0], kernel=kernel)
    found: Any = fl.weighted_average([of(a=torch.ones(1)), of(a=torch.full((1,), 3.0))], [0, 2], kernel=kernel)
    assert found["a"].tolist() == [3.0]
    with pytest.raises(fl.NonFiniteError):
        fl.weighted_average([of(a=torch.full((1,), np.nan)), of(a=torch.ones(1))], [0, 2], kernel=kernel)


# Outputs, models and the rest of a stream.


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_out_is_written_in_place(kernel: str | None, dtype: torch.dtype) -> None:
    clients: Any = [of(w=torch.full((2, 3), i, dtype=dtype)) for i in (1, 3)]
    frame = torch.zeros(3, 4, dtype=dtype)
    stream = fl.Accumulator(kernel=kernel)
    for client in clients:
        stream.add(client, 1)
    for target in (torch.zeros(2, 3, dtype=dtype), frame[:2, 1:], np.zeros((2, 3), np.float32)):
        if isinstance(target, np.ndarray) and dtype != torch.float32:
            continue
        for write in (lambda out: fl.weighted_average(clients, out=out, kernel=kernel), stream.result):
            target[...] = 0
            out: Any = {"w": target}
            assert write(out) is out
            assert out["w"] is target
            assert target.tolist() == [[2, 2, 2]] * 2
    assert frame[2].tolist() == [0] * 4
    assert frame[:, 0].tolist() == [0] * 3


@pytest.mark.parametrize("kernel", KERNELS)
def test_out_that_overlaps_an_input_or_itself_is_refused(kernel: str | None) -> None:
    memory = torch.ones(6)
    client: Any = {"a": memory[:2], "b": memory[2:4]}
    for out in (
        client,
        of(a=torch.zeros(2), b=memory[3:5]),
        of(a=memory[4:6], b=memory[4:6]),
        of(a=memory[4:6], b=torch.zeros(1).expand(2)),
        of(a=torch.zeros(2), b=torch.zeros(3).as_strided((2,), (0,))),
    ):
        with pytest.raises(fl.OutputError):
            fl.weighted_average([client], out=out, kernel=kernel)
    free: Any = of(a=memory[4:6], b=torch.zeros(2))
    assert fl.weighted_average([client], out=free, kernel=kernel) is free


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_with_batch_norm_makes_the_round_trip(kernel: str | None) -> None:
    clients = [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(3)]
    for steps, model in enumerate(clients, start=2):
        for _ in range(steps):
            model(torch.randn(5, 3))
    states: Any = [copy.deepcopy(model.state_dict()) for model in clients]
    clients[0].load_state_dict(fl.weighted_average([m.state_dict() for m in clients], [1, 1, 2], kernel=kernel))
    counter = clients[0].state_dict()["1.num_batches_tracked"]
    assert (counter.item(), counter.dtype) == (3, torch.int64)  # (2 + 3 + 2 · 4) / 4, half to even
    arrays = [{name: t.numpy() for name, t in state.items()} for state in states]
    assert bits(clients[0].state_dict()) == bits(fl.weighted_average(arrays, [1, 1, 2]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_parameters_that_require_gradients_work_and_stay_as_they_are(kernel: str | None) -> None:
    clients = [torch.nn.Linear(3, 2) for _ in range(2)]
    clients[0](torch.ones(3)).sum().backward()
    before = [bits(parameters(m)) for m in clients]
    gradient = clients[0].weight.grad
    mean: Any = fl.weighted_average([parameters(m) for m in clients], kernel=kernel)
    assert not any(t.requires_grad for t in mean.values())
    assert [bits(parameters(m)) for m in clients] == before
    assert all(p.requires_grad for m in clients for p in m.parameters())
    assert clients[0].weight.grad is gradient
    target = torch.nn.Linear(3, 2)
    fl.weighted_average([m.state_dict() for m in clients], out=parameters(target), kernel=kernel)
    assert bits(target.state_dict()) == bits(mean)
    assert target.weight.requires_grad


def test_a_tensor_shares_its_memory_with_its_view_and_back() -> None:
    tensor = torch.ones(2, 3, dtype=torch.bfloat16).t()
    view = FRAMEWORK.view(tensor)
    view[0, 0] = 5
    back = FRAMEWORK.tensor(view)
    assert tensor[0, 0] == 5
    assert back.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("first", KERNELS)
@pytest.mark.parametrize("second", KERNELS)
def test_streams_of_tensors_merge_and_travel_whatever_their_kernels(first: str | None, second: str | None) -> None:
    arrays = models(7, count=4, dtypes=ref.FLOATS)
    left, right = fl.Accumulator(kernel=first), fl.Accumulator(kernel=second)
    plain = fl.Accumulator(), fl.Accumulator()
    for i, one in enumerate(arrays):
        (left, right)[i % 2].add(tensors_of(one), i + 1, f"site-{i}", borrow=True)
        plain[i % 2].add(one, i + 1, f"site-{i}")
    plain[0].merge(plain[1])
    left.merge(pickle.loads(pickle.dumps(right)))
    with fl.kernels.use(second or "auto"):
        left = pickle.loads(pickle.dumps(left))
    result = left.result()
    assert all(isinstance(t, torch.Tensor) for t in result.values())
    assert bits(result) == bits(plain[0].result())
    empty = fl.Accumulator(kernel=first)
    empty.merge(right)
    assert all(isinstance(t, torch.Tensor) for t in empty.result().values())


def test_a_stream_of_tensors_can_go_on_in_a_process_that_has_not_imported_torch() -> None:
    stream = fl.Accumulator(kernel="numpy")
    stream.add(of(w=torch.tensor([1.0, 2.0])), 1)
    code = f"import pickle; print(pickle.loads({pickle.dumps(stream)!r}).result())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'w': tensor([1., 2.])}"


def test_torch_models_stay_torch_models_where_they_hold_constants() -> None:
    known = of(bias=torch.tensor([1.0, -torch.inf]), mask=torch.full((2,), -torch.inf), w=torch.zeros(1))
    this = Round(model=known, own=False)
    for who, value in (("a", 2.0), ("b", 4.0)):
        weights = {**known, "bias": torch.tensor([value, -torch.inf]), "w": torch.full((1,), value)}
        this.receive(fl.Contribution(who, weights, 1))
    assert this.close() == []
    mean = this.combine().mean
    assert {name: isinstance(value, torch.Tensor) for name, value in mean.items()} == {"bias": True, "w": True}
    assert mean["bias"].tolist() == [3.0, -torch.inf]


def test_the_torch_kernel_is_there_once_torch_has_been_imported() -> None:
    code = """
import fed_learn as fl
assert "torch" not in fl.kernels.available()
try:
    fl.kernels.resolve("torch")
except fl.KernelUnavailableError as error:
    print(error)
import torch
assert fl.kernels.available()[-1] == "torch" and fl.kernels.resolve("torch").name == "torch"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "kernel 'torch' is not available: it is there once torch has been imported"


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")  # torch says so of each
def test_a_parameter_that_is_not_initialized_yet_is_refused_by_name() -> None:
    state = torch.nn.LazyLinear(3).state_dict()
    attempts: tuple[Callable[[], object], ...] = (
        lambda: fl.weighted_average([fl.Contribution("site-1", state, 1)]),
        lambda: fl.Accumulator().add(state, 1, "site-1"),
        lambda: fl.FederatedServer(state, num_rounds=1),
    )
    for who, attempt in zip(("site-1", "site-1", "global model"), attempts, strict=True):
        with pytest.raises(fl.WeightsTypeError, match=f"^{who}: 'weight' is not initialized yet: run one batch"):
            attempt()


def test_the_result_is_where_the_first_of_the_list_is_whatever_the_names_are() -> None:
    tensor: Any = {"w": torch.full((1,), 1.0)}
    array: Any = {"w": np.full(1, 3.0, np.float32)}
    for first, second, kind in ((tensor, array, torch.Tensor), (array, tensor, np.ndarray)):
        mean = fl.weighted_average([fl.Contribution("b", first, 1), fl.Contribution("a", second, 1)])
        assert type(mean["w"]) is kind
        assert mean["w"].tolist() == [2.0]
