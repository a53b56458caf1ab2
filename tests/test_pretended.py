"""The pretended device itself: values, places, what is refused, what is counted, and that nothing of it stays."""

import copy
import gc
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pretended import Pretended, pretended_device  # noqa: F401 - a fixture
from pretended_counts import Launch, Transfer

CUDA = "cuda:0"
ON_DEFAULT = "cuda:0 default"

cuda: Any = torch.cuda  # whose streams are others here than type checkers know


def there(*values: Any, dtype: Any = torch.float32, device: str = CUDA) -> Any:
    return torch.tensor(values, dtype=dtype, device=device)


def names(launches: Sequence[Launch | Transfer]) -> list[str]:
    return [launch.name for launch in launches]


def on(device: str) -> str:
    return re.escape(f"Expected all tensors to be on the same device, but found at least two devices, {device}")


# Places


@pytest.mark.parametrize("device", ["cuda:0", "cuda:3", "mps:0", "xpu:1"])
def test_a_tensor_says_that_it_lies_on_the_device(pretended: Pretended, device: str) -> None:
    x = there(1, 2, device=device)
    assert type(x) is torch.Tensor
    kind, index = device.split(":")
    assert x.device == torch.device(device)
    assert (x.is_cpu, x.is_cuda, x.is_mps, x.is_xpu) == (False, kind == "cuda", kind == "mps", kind == "xpu")
    assert x.get_device() == int(index)
    assert f"device='{device}'" in repr(x)
    host = x.cpu()
    assert (host.device, host.is_cpu, host.is_cuda, host.get_device()) == (torch.device("cpu"), True, False, -1)
    assert host.numpy().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda d: torch.zeros(2, device=d), [0, 0]),
        (lambda d: torch.full((2,), 3.0, device=torch.device(d)), [3, 3]),
        (lambda d: torch.arange(3, device=d), [0, 1, 2]),
        (lambda d: torch.tensor([1, 2], device=d), [1, 2]),
        (lambda d: torch.as_tensor(np.ones(2), device=d), [1, 1]),
        (lambda d: torch.asarray([1, 2], device=d), [1, 2]),
        (lambda d: torch.ones(2).to(d), [1, 1]),
        (lambda d: torch.ones(2).to(torch.zeros(1, device=d)), [1, 1]),
        (lambda d: torch.ones(2).type_as(torch.zeros(1, device=d)), [1, 1]),
        (lambda d: torch.ones(2).to(device=d, dtype=torch.int16), [1, 1]),
        (lambda d: torch.zeros_like(torch.ones(2), device=d), [0, 0]),
        (lambda d: torch.ones(2).new_full((2,), 7, device=d), [7, 7]),
        (lambda d: torch.ones(2, device=d).new_zeros(1), [0]),
        (lambda d: torch.zeros(1, device=d).new_tensor([4.0]), [4]),
        (lambda d: torch.ones_like(torch.empty(2, device=d)), [1, 1]),
        (lambda d: torch.linspace(torch.tensor(0.0), torch.tensor(2.0), 3, device=d), [0, 1, 2]),
        (lambda d: copy.deepcopy(torch.ones(2, device=d)), [1, 1]),
        (lambda d: torch.nn.Parameter(torch.ones(2, device=d)).data, [1, 1]),
    ],
)
@pytest.mark.parametrize("device", ["cuda:0", "mps:0"])
def test_tensors_are_made_there_and_sent_there(pretended: Pretended, make: Any, value: Any, device: str) -> None:
    if device == "mps:0" and value == [1, 1] and make(CUDA).dtype == torch.float64:
        with pytest.raises(TypeError, match="doesn't support float64"):
            make(device)
        return
    made = make(device)
    assert made.device == torch.device(device)
    assert made.cpu().tolist() == value
    assert made.new_zeros(1, device="cpu").device.type == torch.zeros_like(made, device="cpu").device.type == "cpu"


def test_results_views_and_changes_in_place_stay_there(pretended: Pretended) -> None:
    x = torch.arange(6.0, device=CUDA)
    results = (x + 1, x.to(torch.float64), x.view(2, 3).t(), x[2:], x > 2, x.detach(), x.clone(), x.sum(), *x.chunk(3))
    assert {str(result.device) for result in results} == {CUDA}
    view = x[1:3]
    view += 10
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert view.data_ptr() == x.data_ptr() + 4
    assert x.cpu().tolist() == [0, 11, 12, 3, 4, 5]
    assert x.to(CUDA) is x
    assert x.to(torch.float32) is x
    assert x.cpu().data_ptr() != x.data_ptr()
    assert torch.empty(2).device.type == "cpu"
    leaf = torch.tensor([1.0], requires_grad=True, device=CUDA)
    assert (leaf.requires_grad, leaf.is_leaf) == (True, True)


def test_values_are_those_of_the_cpu(pretended: Pretended) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(7, 5), torch.randn(5, 7)
    a, b = one.cuda(), other.cuda()
    computations: tuple[Callable[[Any, Any], Any], ...] = (
        lambda x, y: x @ y,
        lambda x, y: (x * 3 - y.t()).to(torch.float16),
        lambda x, y: torch.softmax(x, 1).sum(0),
        lambda x, y: torch.cat([x, y.t()]).std(),
        lambda x, y: torch.where(x > 0, x, y.t()),
        lambda x, y: torch.stack(torch._foreach_mul([x, y.t()], 2.0)),
        lambda x, y: x[x > 0],
    )
    for compute in computations:
        result = compute(a, b)
        assert result.device == torch.device(CUDA)
        assert torch.equal(result.cpu(), compute(one, other))


def test_modules_move_train_and_come_back(pretended: Pretended) -> None:
    model = torch.nn.Linear(3, 2)
    same = copy.deepcopy(model)
    model.to(CUDA)
    assert {str(p.device) for p in model.parameters()} == {CUDA}
    assert type(model.weight) is torch.nn.Parameter
    for net, device in ((model, CUDA), (same, "cpu")):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(torch.ones(4, 3, device=device)).square().sum().backward()
        optimizer.step()
    assert model.weight.grad is not None
    assert model.weight.grad.device == torch.device(CUDA)
    assert {str(tensor.device) for tensor in model.state_dict().values()} == {CUDA}
    assert torch.equal(model.weight.cpu(), same.weight)
    with torch.device(CUDA):
        assert torch.nn.Linear(2, 2).weight.device == torch.device(CUDA)


def test_the_current_device_and_the_default_device_are_followed(pretended: Pretended) -> None:
    assert torch.device(device="cuda:2").index == 2
    with cuda.stream(cuda.Stream("cuda:1")):
        assert cuda.current_device() == 1
        assert cuda.current_stream(CUDA) is cuda.default_stream(CUDA)
    assert cuda.current_device() == 0
    with cuda.device(1):
        assert torch.zeros(1, device="cuda").device == torch.device("cuda:1")
        assert cuda.current_device() == 1
    assert torch.zeros(1).cuda().device == torch.device(CUDA)
    torch.set_default_device("cuda:1")
    assert torch.zeros(1).device == torch.tensor([1.0]).device == torch.get_default_device() == torch.device("cuda:1")
    assert torch.zeros(1, device="cpu").device.type == torch.from_numpy(np.ones(1)).device.type == "cpu"


def test_an_address_that_is_used_again_is_not_mistaken(pretended: Pretended) -> None:
    for _ in range(3000):
        x = torch.zeros(16, device=CUDA)
        del x
        assert torch.zeros(16).is_cpu
    gc.collect()
    assert len(pretended._blocks) < 2000


# What is refused


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: y.add_(x),
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.mul(x, 2, out=y),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: torch._foreach_add([x], [y]),
        lambda x, y: y[0].add_(x[0]),
        lambda x, y: torch.equal(x, y),
        lambda x, y: y[x > 1],
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_tensors_of_two_devices_do_not_mix(pretended: Pretended, mix: Any, device: str) -> None:
    x, y = there(1, 2), there(3, 4, device=device)
    with pytest.raises(RuntimeError, match=on("cuda:[01]").replace(r"\[01\]", "[01]")):
        mix(x, y)
    assert y.tolist() == [3, 4]


def test_zero_dimensional_host_tensors_are_operands(pretended: Pretended) -> None:
    x, scalar = there(1, 2), torch.tensor(3.0)
    with pretended.counting() as counts:
        results = (
            x * scalar,
            scalar - x,
            x.clone().add_(scalar),
            torch.where(x > 1, x, scalar),
            x.clone().fill_(scalar),
        )
        scaled = torch._foreach_mul([x], scalar)
    assert [result.tolist() for result in results] == [[3, 6], [2, 1], [4, 5], [3, 2], [3, 3]]
    assert scaled[0].tolist() == [3, 6]
    assert counts.synchronisations == []
    assert counts.transfers == []
    assert counts.launches[0] == Launch("mul", 8, 8, ON_DEFAULT)
    with pytest.raises(RuntimeError, match=on("cuda:0 and cpu")):
        torch.stack([x[0], scalar])
    with pytest.raises(RuntimeError, match=on("cuda:0 and cpu")):
        torch.dot(x, torch.ones(2))
    with pytest.raises(RuntimeError, match=on("cuda:0 and cuda:1")):
        x + torch.tensor(1.0, device="cuda:1")


def test_host_code_cannot_read_it(pretended: Pretended) -> None:
    x = there(1, 2)
    for read in (lambda: x.numpy(), lambda: np.asarray(x), lambda: np.asarray(x, np.float64)):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            read()
    with pytest.raises(BufferError):
        np.from_dlpack(x)
    assert x.numpy(force=True).tolist() == [1, 2]
    with pytest.raises(RuntimeError, match="cannot pin"):
        x.pin_memory()


def test_mps_has_no_float64(pretended: Pretended) -> None:
    x = torch.ones(2, device="mps")
    assert x.device == torch.device("mps:0")
    uses: tuple[Callable[[], Any], ...] = (
        lambda: x.to(torch.float64),
        lambda: x.double(),
        lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
        lambda: torch.ones(2, dtype=torch.float64).to("mps"),
        lambda: torch.tensor(1.0, dtype=torch.float64, device="mps"),
    )
    for use in uses:
        with pytest.raises(TypeError, match="Cannot convert a MPS Tensor to float64 dtype as the MPS framework"):
            use()


# What is counted


def test_launches_have_their_bytes(pretended: Pretended) -> None:
    x, half = torch.zeros(10, device=CUDA), torch.zeros(10, dtype=torch.float16, device=CUDA)
    y = torch.zeros(10, device=CUDA)
    row = torch.zeros(3, 1, device=CUDA)
    column = torch.zeros(1, 4, device=CUDA)
    with pretended.counting() as counts:
        torch.empty(5, device=CUDA)
        x.view(2, 5).t()[0].detach()
        x + 1
        x + x
        row * column
        row.expand(3, 8) * 2
        x.add_(half)
        x.copy_(half)
        x.fill_(1)
        torch.mul(x, 2, out=y)
        row.t_().t_()
        torch.zeros(3, device=CUDA)
        torch.zeros_like(x)
        torch.empty(0, device=CUDA) + 1
        x.gt(1)
    assert counts.launches == [
        Launch("add", 40, 40, ON_DEFAULT),
        Launch("add", 40, 40, ON_DEFAULT),
        Launch("mul", 12 + 16, 48, ON_DEFAULT),
        Launch("mul", 12, 96, ON_DEFAULT),
        Launch("add_", 40 + 20, 40, ON_DEFAULT),
        Launch("copy_", 20, 40, ON_DEFAULT),
        Launch("fill_", 0, 40, ON_DEFAULT),
        Launch("mul", 40, 40, ON_DEFAULT),
        Launch("zeros", 0, 12, ON_DEFAULT),
        Launch("zeros_like", 0, 40, ON_DEFAULT),
        Launch("gt", 40, 10, ON_DEFAULT),
    ]
    assert counts.bytes_moved == 80 + 80 + 76 + 108 + 100 + 60 + 40 + 80 + 12 + 40 + 50
    assert counts.synchronisations == []


def test_composite_operations_count_by_their_parts(pretended: Pretended) -> None:
    x = torch.zeros(10, device=CUDA)
    with pretended.counting() as counts:
        torch.isfinite(x)
    assert [launch[:3] for launch in counts.launches] == [
        ("abs", 40, 40),
        ("ne", 40, 10),
        ("eq", 40, 10),
        ("mul", 20, 10),
    ]


def test_host_tensors_are_not_counted(pretended: Pretended) -> None:
    x = torch.arange(4)
    with pretended.counting() as counts:
        bool((x + 1).sum() > 0)
        x.to(torch.float64).tolist()
        x[x > 1].to("cpu").numpy()
    assert (counts.launches, counts.synchronisations, counts.transfers) == ([], [], [])


@pytest.mark.parametrize(("number", "launches"), [(1, 1), (100, 1), (101, 2), (250, 3)])
def test_foreach_launches_once_per_hundred(pretended: Pretended, number: int, launches: int) -> None:
    one = [torch.zeros(2, device=CUDA) for _ in range(number)]
    other = [torch.zeros(2, device=CUDA) for _ in range(number)]
    halves = [tensor.half() for tensor in other]
    turned = [torch.zeros(2, 2, device=CUDA).t() for _ in range(number)]
    square = [torch.zeros(2, 2, device=CUDA) for _ in range(number)]
    bent = [torch.zeros(4, device=CUDA)[::2] for _ in range(number)]
    with pretended.counting() as counts:
        torch._foreach_add_(one, other)
    assert len(counts.launches) == launches
    assert counts.bytes_moved == number * (16 + 8)
    with pretended.counting() as counts:
        torch._foreach_mul(one, 2.0)
    assert len(counts.launches) == launches
    assert counts.bytes_moved == number * 16
    with pretended.counting() as counts:
        torch._foreach_add_(one, halves)
        torch._foreach_add_(bent, 1)
        torch._foreach_add_(square, turned)
    assert len(counts.launches) == 3 * number
    with pretended.counting() as counts:
        torch._foreach_copy_(one, other)
    assert counts.launches[0].name == "_foreach_copy_"
    assert (len(counts.launches), counts.bytes_moved) == (launches, number * 16)


def test_foreach_copies_to_another_device_are_transfers_one_by_one(pretended: Pretended) -> None:
    there, here = [torch.zeros(2, device=CUDA) for _ in range(3)], [torch.ones(2) for _ in range(3)]
    with pretended.counting() as counts:
        torch._foreach_copy_(there, here)
    assert counts.transfers == [Transfer("copy_", CUDA, 8, ON_DEFAULT)] * 3
    assert counts.synchronisations == ["copy_"] * 3
    assert [tensor.tolist() for tensor in there] == [[1, 1]] * 3


@pytest.mark.parametrize(("number", "launches"), [(1, 1), (128, 1), (129, 2), (300, 3)])
def test_cat_launches_once_per_128_inputs_of_one_dtype(pretended: Pretended, number: int, launches: int) -> None:
    parts = [torch.full((3,), float(i), device=CUDA) for i in range(number)]
    wide = torch.empty(3 * number, dtype=torch.float64, device=CUDA)
    with pretended.counting() as counts:
        whole = torch.cat([*parts, torch.empty(0, device=CUDA)])
    assert whole.cpu().tolist() == [float(i) for i in range(number) for _ in range(3)]
    assert (names(counts.launches), counts.bytes_moved) == (["cat"] * launches, number * 24)
    with pretended.counting() as counts:
        torch.cat(parts, out=wide)
    assert (len(counts.launches), counts.bytes_moved) == (number, number * (12 + 24))
    with pretended.counting() as counts:
        torch.cat([*parts, wide])
    assert len(counts.launches) == number + 1


@pytest.mark.parametrize(
    ("use", "waits", "launches"),
    [
        (lambda x: x[0].item(), ["_local_scalar_dense"], []),
        (lambda x: bool(x[0]), ["_local_scalar_dense"], []),
        (lambda x: (float(x[0]), int(x[1])), ["_local_scalar_dense"] * 2, []),
        (lambda x: x.tolist(), ["_to_copy"], []),
        (lambda x: torch.equal(x, x), ["equal"], ["equal"]),
        (lambda x: x.nonzero(), ["nonzero"], ["nonzero"]),
        (lambda x: x[x > 1], ["index"], ["gt", "index"]),
        (lambda x: x.masked_select(x > 1), ["masked_select"], ["gt", "masked_select"]),
        (lambda x: x.unique(), ["_unique2"], ["_unique2"]),
        (lambda x: x.cpu(), ["_to_copy"], []),
        (lambda x: torch.empty(2).copy_(x), ["copy_"], []),
        (lambda x: x.copy_(torch.ones(2)), ["copy_"], []),
        (lambda x: x.copy_(torch.ones(2), non_blocking=True), [], []),
        (lambda x: torch.ones(2).to(CUDA), ["_to_copy"], []),
        (lambda x: torch.ones(2).to(CUDA, non_blocking=True), [], []),
        (lambda x: torch.ones(2).cuda(non_blocking=True), [], []),
        (lambda x: torch.tensor(2.0, device=CUDA), ["_to_copy"], []),
        (lambda x: x[torch.tensor([1, 0])], ["index"], ["index"]),
        (lambda x: torch.full((2,), 3.0, device=CUDA), [], ["full"]),
        (lambda x: x.fill_(3).mul_(2.0).clamp_(0, 1), [], ["fill_", "mul_", "clamp_"]),
        (lambda x: x.__setitem__(0, 5.0), [], ["fill_"]),
        (lambda x: x.__setitem__(x > 1, 5.0), [], ["gt", "index_put_"]),
        (lambda x: x.__setitem__(0, torch.tensor(5.0)), ["copy_"], []),
        (lambda x: x.double().to("cpu", torch.float32), ["_to_copy"], ["_to_copy", "_to_copy"]),
        (lambda x: x.expand(3, 2).t().cpu(), ["_to_copy"], ["_to_copy"]),
        (lambda x: torch.zeros(3, 2, device=CUDA).t().copy_(torch.ones(2, 3)), ["copy_"], ["zeros", "copy_"]),
        (lambda x: torch.empty(0).to(CUDA).cpu(), [], []),
        (lambda x: cuda.synchronize(), ["synchronize"], []),
    ],
)
def test_what_makes_the_host_wait(pretended: Pretended, use: Any, waits: list[str], launches: list[str]) -> None:
    x = there(1, 2)
    with pretended.counting() as counts:
        use(x)
    assert counts.synchronisations == waits
    assert names(counts.launches) == launches


def test_transfers_have_their_bytes(pretended: Pretended) -> None:
    x = torch.zeros(10)
    with pretended.counting() as counts:
        y = x.to(CUDA)
        y.cpu()
        y.to("cpu", torch.float16)
        x.to(CUDA, torch.float64, non_blocking=True)
        y[torch.tensor([True] + [False] * 9)]
        y.to("cuda:1")
    sizes = [("cuda:0", 40), ("cpu", 40), ("cpu", 20), ("cuda:0", 80), ("cuda:0", 8)]
    assert [(transfer.to, transfer.bytes) for transfer in counts.transfers] == sizes
    assert counts.launches[-1] == Launch("_to_copy", 40, 40, ON_DEFAULT)  # from device to device


def test_memory_is_pinned_where_it_is_asked_for(pretended: Pretended) -> None:
    x = torch.ones(2)
    pinned = x.pin_memory()
    assert (x.is_pinned(), pinned.is_pinned(), pinned.device.type, pinned.tolist()) == (False, True, "cpu", [1, 1])
    assert pinned.pin_memory() is pinned
    assert torch.empty(2, pin_memory=True).is_pinned()
    assert not pinned.to(CUDA).is_pinned()


def test_a_log_is_cleared_and_continued(pretended: Pretended) -> None:
    x = torch.zeros(2, device=CUDA)
    with pretended.counting() as counts:
        x + 1
    assert (names(pretended.log.launches), names(counts.launches)) == (["zeros"], ["add"])
    x * 2
    assert names(pretended.log.launches) == ["zeros", "mul"]
    pretended.log.clear()
    assert (pretended.log.launches, pretended.log.transfers, pretended.log.synchronisations) == ([], [], [])
    x * 2
    assert names(pretended.log.launches) == ["mul"]


# Streams


def test_a_launch_on_another_stream_that_did_not_wait_is_a_race(pretended: Pretended) -> None:
    x = torch.zeros(2, device=CUDA)
    side = cuda.Stream()
    with cuda.stream(side):
        assert cuda.current_stream() is side
        y = x + 1
    assert cuda.current_stream() is cuda.default_stream()
    assert pretended.races() == [Launch("add", 8, 8, side.name)]
    pretended.log.clear()
    y * 2
    assert names(pretended.races()) == ["mul"]
    y * 2
    assert len(pretended.races()) == 2  # reading it once orders nothing
    y.fill_(0)
    assert names(pretended.races()) == ["mul", "mul", "fill_"]
    y * 2  # which this stream has written last
    assert len(pretended.races()) == 3


@pytest.mark.parametrize("how", ["event", "wait_event", "wait_stream", "synchronize", "stream", "event host", "item"])
def test_what_waits_is_no_race(pretended: Pretended, how: str) -> None:
    x, event, side = torch.zeros(2, device=CUDA), cuda.Event(), cuda.Stream(CUDA)
    event.record()
    if how == "event":
        event.wait(side)
    elif how == "wait_event":
        side.wait_event(event)
    elif how == "wait_stream":
        side.wait_stream(cuda.current_stream(CUDA))
    elif how == "synchronize":
        cuda.synchronize(CUDA)
    elif how == "stream":
        cuda.current_stream().synchronize()
    elif how == "event host":
        event.synchronize()
    else:
        x[0].item()
    with cuda.stream(side):
        x += 1
    assert pretended.races() == []
    if how == "event":
        assert pretended.log.streams == [("record", event.name, ON_DEFAULT), ("wait", event.name, side.name)]


def test_an_event_recorded_before_the_write_or_on_another_stream_orders_nothing(pretended: Pretended) -> None:
    x = torch.zeros(2, device=CUDA)
    early, other, side = cuda.Event(), cuda.Event(), cuda.Stream()
    early.record()
    x += 1
    other.record(cuda.Stream())
    side.wait_event(early)
    side.wait_event(other)
    with cuda.stream(side):
        x[1:] * 2
    assert names(pretended.races()) == ["mul"]


def test_order_is_passed_on_from_stream_to_stream(pretended: Pretended) -> None:
    x = torch.zeros(2, device=CUDA)
    one, other = cuda.Stream(), cuda.Stream()
    one.wait_stream(cuda.current_stream())
    other.wait_stream(one)
    with cuda.stream(other):
        x + 1
    assert pretended.races() == []


def test_waiting_for_one_stream_says_nothing_of_another(pretended: Pretended) -> None:
    x, y, side = torch.zeros(2, device=CUDA), torch.zeros(2, device=CUDA), cuda.Stream()
    cuda.synchronize()
    with cuda.stream(side):
        x += 1
    y.cpu()
    assert pretended.races() == []
    cuda.synchronize("cuda:1")
    x.cpu()
    assert [(race.name, race.stream) for race in pretended.races()] == [("_to_copy", ON_DEFAULT)]


def test_copies_to_the_device_are_ordered_by_streams_too(pretended: Pretended) -> None:
    side = cuda.Stream()
    with cuda.stream(side):
        x = torch.ones(2).to(CUDA, non_blocking=True)
        y = torch.ones(2).to(CUDA)  # the host waits for this one, and so for the first
    x + y
    assert pretended.races() == []
    with cuda.stream(side):
        z = torch.ones(2).to(CUDA, non_blocking=True)
    z + 1
    assert names(pretended.races()) == ["add"]
    z.record_stream(side)
    assert pretended.log.streams[-1] == ("record_stream", hex(z.data_ptr()), side.name)


# Nothing stays


def test_nothing_is_left_after_the_block() -> None:
    before = {name: getattr(cuda, name) for name in dir(cuda)}
    record = torch.Tensor.record_stream
    default = torch.get_default_device()
    with Pretended() as active:
        x = torch.ones(2, device=CUDA)
        torch.set_default_device(CUDA)
        assert not cuda.is_available()
        assert torch.zeros(1).is_cuda
    assert torch.get_default_device() == default == torch.zeros(1).device
    assert torch.utils._device.CURRENT_DEVICE is None
    assert {name: getattr(cuda, name) for name in dir(cuda)} == before
    assert torch.Tensor.record_stream is record
    assert "record_stream" not in vars(torch.Tensor)
    assert x.is_cpu
    assert x.numpy().tolist() == [1, 1]
    counted = len(active.log.launches)
    assert (x + torch.ones(2)).tolist() == [2, 2]
    assert len(active.log.launches) == counted
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1, device=CUDA)


def test_an_error_in_the_block_leaves_nothing_either() -> None:
    def fail() -> None:
        with Pretended():
            torch.set_default_device(CUDA)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.zeros(1).is_cpu
