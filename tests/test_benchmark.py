"""The benchmark measures what it says: right sides only, the memory layouts it names, and ratios taken within turns."""

import importlib.util
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fed_learn import kernels
from fed_learn.benchmark import (
    CASES,
    FULL,
    QUICK,
    Case,
    CaseResult,
    SideResult,
    Sizes,
    machine,
    measure,
    select,
    sides,
)
from fed_learn.benchmark import peers as peers_module
from fed_learn.benchmark.check import OUR_BOUND, bound_of_peers, largest_error, reference
from fed_learn.benchmark.inputs import LAYOUTS, Inputs, make_inputs, resnet50
from fed_learn.benchmark.memory import Peak
from fed_learn.benchmark.peers import BATCH
from fed_learn.benchmark.plot import plot_results
from fed_learn.benchmark.sides import Run, Side
from fed_learn.benchmark.stream_peers import STREAM

measuring = importlib.import_module("fed_learn.benchmark.measure")
TINY = Sizes(resnet_width=1, flat=2006, blocks=1, width=8, total=4096, small=5)
# The sums of these leave the integers that it keeps them in, or its counts do.
OVERFLOWS = {(f"integers-{dtype}", "Flower aggregate") for dtype in ("int32", "int16", "uint8")}
COMBINATIONS = [
    pytest.param(case, side, id=f"{case.name}: {side.name}")
    for case in CASES.values()
    if case.why_not() is None
    for side in (*case.ours(), *case.others()[0])
    if (case.name, side.name) not in OVERFLOWS
]


@pytest.fixture(autouse=True)
def _default_threads() -> Iterator[None]:
    yield
    kernels.set_num_threads(None)


def error_of(side: Side, inputs: Inputs, *, exact: bool = False) -> float:
    run = side.prepare(inputs)
    run.before()
    returned = run.call()
    assert run.result is not None
    return largest_error(run.result(returned), reference(inputs, exact=exact))


# Sides


@pytest.mark.filterwarnings("default")  # those of peers are theirs
@pytest.mark.parametrize(("case", "side"), COMBINATIONS)
def test_every_side_of_every_case_is_right(case: Case, side: Side) -> None:
    inputs = case.inputs(TINY)
    copies = [{name: array.copy() for name, array in client.items()} for client in inputs.clients]
    run = side.prepare(inputs)
    if run.result is None:
        assert side.name.startswith(("bare read", "add_difference"))
        return
    bound = OUR_BOUND if side.ours else bound_of_peers(case.clients, case.dtype)
    expected = reference(inputs, exact="exact" in case.variant)
    for _ in range(3):  # again, in memory that has been used
        run.before()
        assert largest_error(run.result(run.call()), expected) <= bound
    for client, copy in zip(inputs.clients, copies, strict=True):
        for name, array in client.items():
            assert array.tobytes() == copy[name].tobytes()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", sorted(case for case, _ in OVERFLOWS))
def test_sums_that_overflow_are_found_wrong_or_raise(name: str) -> None:
    pytest.importorskip("flwr")
    case = CASES[name]
    result = measure(case, TINY, 1, others=[BATCH["Flower aggregate"]])
    found = [side for side in result.sides if side.name == "Flower aggregate"]
    assert [side.wrong for side in found] == [True] or "raised" in result.missing["Flower aggregate"]


@pytest.mark.parametrize(
    "name", ["numpy in place", "numpy tensordot", "torch add_", "torch._foreach_add_", "numexpr", "numba"]
)
def test_a_peer_writes_to_the_memory_that_it_has_and_to_no_other(name: str) -> None:
    for reuse in (True, False):
        run = BATCH[name].prepare(replace_reuse(CASES["resnet50"].inputs(TINY), reuse))
        assert run.result is not None
        first, second = run.result(run.call()), run.result(run.call())  # both alive, so new memory lies elsewhere
        same = [addresses_of(first[variable]) == addresses_of(second[variable]) for variable in first]
        assert set(same) == {reuse}


def replace_reuse(inputs: Inputs, reuse: bool) -> Inputs:
    return Inputs(inputs.clients, inputs.aggregation_weights, reuse)


def addresses_of(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("name", sorted(STREAM))
def test_a_peer_of_streams_goes_on_with_its_sums(name: str) -> None:
    side = STREAM[name]
    if peers_module.why_not(side, np.dtype("float32")) is not None:
        pytest.skip("not installed")
    inputs = CASES["streaming"].inputs(TINY)
    run = side.prepare(inputs)
    for _ in range(3):
        run.call()
    assert run.result is not None
    assert largest_error(run.result(run.call()), reference(inputs)) <= bound_of_peers(40, inputs.dtype)


def test_what_is_borrowed_is_added_at_the_end_of_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Lender:
        def __init__(self, **options: Any) -> None:
            pass

        def add(self, weights: Any, aggregation_weight: float, *, borrow: bool = False) -> None:
            calls.append(borrow)

        def flush(self) -> None:
            calls.append("flush")

        def result(self) -> None:
            pass

    monkeypatch.setattr(sides, "Accumulator", Lender)
    assert sides.can_borrow()
    inputs = make_inputs({"w": (3,)}, "float32", 3)
    run = sides.stream("numpy", borrow=True).prepare(inputs)
    run.call()
    run.call()
    assert calls == [True, True, True, "flush"] * 2
    calls.clear()
    sides.stream("numpy").prepare(inputs).call()
    assert calls == [False] * 3


def test_a_side_on_some_threads_has_started_them_before_it_runs() -> None:
    before = {thread.name for thread in threading.enumerate()}
    run = sides.on_threads(sides.average("numpy"), 3).prepare(make_inputs({"w": (3,)}, "float32", 2))
    run.before()
    assert kernels.get_num_threads() == 3
    started = {thread.name for thread in threading.enumerate()} - before
    assert len([name for name in started if name.startswith("fed_learn-kernel")]) == 2


# Checks


def constant(result: Mapping[str, Any]) -> Side:
    return Side("peer", lambda inputs: Run(lambda: result))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "uint8"])
def test_a_mean_without_weights_is_found_wrong(dtype: str) -> None:
    inputs = make_inputs({"w": (50, 40)}, np.dtype(dtype) if dtype != "bfloat16" else CASES["bfloat16"].dtype, 10)
    mean = np.mean([client["w"].astype(np.float64) for client in inputs.clients], axis=0)
    assert error_of(constant({"w": mean.astype(inputs.dtype)}), inputs) > bound_of_peers(10, inputs.dtype)
    right = np.average([c["w"].astype(np.float64) for c in inputs.clients], axis=0, weights=inputs.aggregation_weights)
    assert error_of(constant({"w": right}), inputs) < 1e-3


def test_a_single_wrong_value_a_shape_and_a_name_are_found_wrong() -> None:
    inputs = make_inputs({"w": (300,), "b": ()}, "float32", 3)
    right = sides.average("numpy").prepare(inputs).call()
    assert error_of(constant(right), inputs) <= OUR_BOUND

    def error_with(**changed: Any) -> float:
        return error_of(constant({**right, **changed}), inputs)

    off = right["w"].copy()
    off[299] = np.nextafter(off[299], np.float32(np.inf))
    assert 0.5 <= error_with(w=off) <= 1.5
    not_a_number = right["w"].copy()
    not_a_number[7] = np.nan
    for wrong in (not_a_number, right["w"][:-1], np.append(right["w"], np.float32(1))):
        assert error_with(w=wrong) == np.inf
    assert error_with(c=right["b"]) == np.inf
    assert error_of(constant({"w": right["w"]}), inputs) == np.inf


def test_the_references_agree_and_hold_first_and_last_elements() -> None:
    inputs = make_inputs({"w": (1 << 17,), "b": (3,)}, "float32", 4)
    by_fractions, in_longdouble = reference(inputs, exact=True), reference(inputs)
    for name, size in (("w", 1 << 17), ("b", 3)):
        exact, quick = by_fractions[name], in_longdouble[name]
        for expected in (exact, quick):
            assert expected.elements[0] == 0
            assert expected.elements[-3:].tolist() == [size - 3, size - 2, size - 1]
        common, here, there = np.intersect1d(exact.elements, quick.elements, return_indices=True)
        assert len(common) >= 3
        assert (abs(exact.mean[here] - quick.mean[there]) <= 1e-6 * quick.ulp[there]).all()
        assert (exact.ulp[here] == quick.ulp[there]).all()
    assert len(by_fractions["w"].elements) < len(in_longdouble["w"].elements)


def test_an_ulp_is_that_of_the_terms() -> None:
    inputs = Inputs([{"w": np.array(values, np.float32)} for values in ([1.5, 3, 0], [-1.5, 3, 0])], [1.0, 1.0])
    assert reference(inputs)["w"].ulp.astype(float).tolist() == [2.0**-23, 2.0**-22, 2.0**-149]


# Cases and inputs


def test_names_choose_cases() -> None:
    assert select([]) == list(CASES.values())
    assert [case.name for case in select(["threads", "small"])] == ["small", "threads"]
    assert [case.name for case in select(["flat-*"])] == [
        "flat-fresh",
        "flat-used-heap",
        "flat-64k",
        "flat-off4",
        "flat-off20",
    ]
    assert [case.name for case in select(["integers"])] == [
        f"integers-{d}" for d in ("int64", "int32", "int16", "uint8")
    ]
    assert [case.name for case in select(["resnet50"])] == ["resnet50"]
    for unknown in ("resnet", "*x*y*z", ""):
        with pytest.raises(ValueError, match="no case is called") as error:
            select(["small", unknown])
        assert all(name in str(error.value) for name in CASES)


def test_names_of_sides_are_unique_within_a_case_and_the_base_is_one_of_ours() -> None:
    for case in CASES.values():
        ours, (others, missing) = case.ours(), case.others()
        names = [side.name for side in (*ours, *others)]
        assert len(set(names)) == len(names)
        assert case.base(ours) in [side.name for side in ours]
        assert set(case.peers) == {side.name for side in others} | set(missing) or case.variant == "threads"


def test_sizes_are_those_that_they_are_said_to_be() -> None:
    def megabytes(name: str, sizes: Sizes) -> float:
        case = CASES[name]
        elements = sum(int(np.prod(shape)) for shape in case.shapes(sizes).values())
        return elements * case.dtype.itemsize * case.clients / 1e6

    assert len(resnet50()) == 267
    assert megabytes("resnet50", FULL) == pytest.approx(1024, abs=1)
    for name in ("resnet50", "flat", "float32-same-count", "clients-2", "clients-8", "clients-32", "clients-128"):
        assert 900 < megabytes(name, FULL) < 1800
        assert 120 < megabytes(name, QUICK) < 180


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_do_not_depend_on_the_layout(layout: str) -> None:
    shapes = {"a": (33, 7), "b": (5,), "c": (1000,)}
    plain, laid_out = make_inputs(shapes, "float32", 3), make_inputs(shapes, "float32", 3, layout=layout)
    assert laid_out.aggregation_weights == plain.aggregation_weights
    for one, other in zip(plain.clients, laid_out.clients, strict=True):
        assert {name: a.tolist() for name, a in one.items()} == {name: a.tolist() for name, a in other.items()}
    arrays = [array for client in laid_out.clients for array in client.values()]
    spans = sorted((addresses_of(array), addresses_of(array) + array.nbytes) for array in arrays)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert (laid_out.size, laid_out.nbytes) == (3 * 1236, 3 * 1236 * 4)
    assert make_inputs(shapes, "float32", 3, seed=1).clients[0]["a"][0, 0] != plain.clients[0]["a"][0, 0]


@pytest.mark.parametrize(("layout", "past"), [("off4", 4), ("off20", 20), ("used-heap", 16)])
def test_arrays_lie_as_far_past_a_line_as_they_are_said_to(layout: str, past: int) -> None:
    inputs = make_inputs({"a": (33, 7), "b": (5,), "c": (1000,)}, "float32", 3, layout=layout)
    assert {addresses_of(array) % 64 for client in inputs.clients for array in client.values()} == {past}


def test_arrays_of_a_variable_lie_at_distances_of_64_kib() -> None:
    inputs = make_inputs({"a": (33, 7), "b": (20_000,)}, "float32", 4, layout="64k")
    for name in ("a", "b"):
        addresses = [addresses_of(client[name]) for client in inputs.clients]
        distances = np.diff(addresses)
        assert (distances > 0).all()
        assert set((distances % (1 << 16)).tolist()) == {0}


# Who takes part


def test_peers_that_cannot_take_part_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch", "flwr"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    found, missing = CASES["bfloat16"].others()
    assert [side.name for side in found] == ["numpy running sum", "torch._foreach_add_", "torch add_"]
    assert missing == {
        "numpy in place": "takes no bfloat16",
        "Flower aggregate": "takes no bfloat16",
        "NVFlare helper": "nvflare not installed",
        "NVFlare helper, torch": "nvflare not installed",
    }
    found, missing = CASES["float16"].others("quick")
    assert "Flower aggregate" not in [side.name for side in found]
    assert missing["Flower aggregate"] == "left out of a quick run: flwr takes seconds to start"
    assert "Flower aggregate" in [side.name for side in CASES["float16"].others()[0]]
    assert CASES["resnet50"].others("none") == ([], {})


def test_a_peer_that_raises_is_named_and_ours_raises() -> None:
    def broken(inputs: Inputs) -> Run:
        raise OverflowError("too much")

    case = CASES["small"]
    result = measure(case, TINY, 1, others=[Side("broken", broken)], missing={"absent": "not installed"})
    assert result.missing == {"absent": "not installed", "broken": "raised OverflowError: too much"}
    assert [side.name for side in result.sides] == [side.name for side in case.ours()]
    with pytest.raises(OverflowError, match="too much"):
        measure(case, TINY, 1, ours=[Side("broken", broken, ours=True)], others=[])


def test_a_peer_that_fails_in_a_later_turn_is_named_and_ours_raises() -> None:
    turn = 0

    def tell(text: str) -> None:
        nonlocal turn
        turn = int(text.split()[1]) if text.startswith("turn") else 0

    def prepare(inputs: Inputs) -> Run:
        ours = sides.average("numpy").prepare(inputs)

        def run() -> Any:
            if turn == 2:
                raise MemoryError("no more")
            return ours.call()

        return Run(run)

    case = CASES["small"]
    result = measure(case, TINY, 3, others=[Side("weak", prepare)], progress=tell)
    assert result.missing == {"weak": "raised MemoryError: no more"}
    assert "weak" not in [side.name for side in result.sides]
    assert len(result.subject.samples) == 3
    turn = 0
    with pytest.raises(MemoryError):
        measure(case, TINY, 3, ours=[Side("weak", prepare, ours=True)], others=[], progress=tell)


# Measuring


def test_a_measured_case_has_samples_of_every_turn_and_says_who_is_wrong() -> None:
    def wrong(inputs: Inputs) -> Run:
        return Run(lambda: {name: np.zeros(array.shape, np.float64) for name, array in inputs.clients[0].items()})

    case = CASES["clients-2"]
    others = [Side("zeros", wrong), BATCH["numpy.average"]]
    result = measure(case, TINY, 4, others=others, missing={})
    assert [side.name for side in result.sides] == [*(side.name for side in case.ours()), "zeros", "numpy.average"]
    assert [side.name for side in result.sides if side.wrong] == ["zeros"]
    assert (result.tensors, result.elements, result.nbytes) == (1, 4096, 4096 * 4)
    assert result.factor == 1.5
    assert result.side("numpy.average").dtype == "float64"
    assert result.subject.dtype == "float32"
    assert list(result.limit.samples) == [0, 1, 2, 3]
    assert sorted(result.subject.samples) == [0, 1, 2, 3]
    best = result.best_peer()
    assert best is not None
    assert best.name == "numpy.average"
    assert (result.subject.error or 1) <= result.subject.bound == OUR_BOUND
    assert result.side("zeros").bound == bound_of_peers(2, case.dtype)


def test_sides_take_turns_in_changing_order() -> None:
    told: list[str] = []
    others = [BATCH["numpy running sum"], BATCH["numpy in place"]]
    ours = [sides.average("numpy")]
    measure(CASES["small"], TINY, 4, ours=ours, others=others, progress=told.append)
    turns: list[list[str]] = [[] for _ in range(4)]
    for text in told:
        if text.startswith("turn"):
            turns[int(text.split()[1]) - 1].append(text.split(": ")[1])
    assert all(sorted(turn) == sorted(turns[0]) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 4
    assert len({turn[0] for turn in turns}) > 1


def test_a_slow_peer_rests_until_its_time_has_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def side(name: str, seconds: float, **options: Any) -> Side:
        def prepare(inputs: Inputs) -> Run:
            ours = sides.average("numpy").prepare(inputs)

            def run() -> Any:
                nonlocal now
                now += seconds
                return ours.call()

            return Run(run)

        return Side(name, prepare, **options)

    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(measuring, "_wait_for_threads", lambda: None)
    monkeypatch.setattr(sides, "limit", lambda: side("limit", 1.0))
    others = [side("as fast as it may be", measuring.SLOW), side("slow", 2.5 * measuring.SLOW)]
    result = measure(CASES["small"], TINY, 7, ours=[side("ours", 1.0, ours=True)], others=others)
    assert sorted(result.side("as fast as it may be").samples) == list(range(7))
    assert sorted(result.side("slow").samples) == [0, 3, 5]
    assert set(result.side("slow").samples.values()) == {2.5 * measuring.SLOW}
    assert sorted(result.limit.samples) == sorted(result.subject.samples) == list(range(7))


def test_no_timed_pass_of_a_stream_makes_the_sums() -> None:
    makes: list[str] = []
    doing = ""

    def tell(text: str) -> None:
        nonlocal doing
        doing = text

    def prepare(inputs: Inputs) -> Run:
        sums: dict[str, Any] = {}

        def run() -> None:
            if not sums:
                makes.append(doing)
            for client, a in zip(inputs.clients, inputs.aggregation_weights, strict=True):
                for name, array in client.items():
                    sums[name] = sums.get(name, 0) + array.astype(np.float64) * a

        def result(_: None) -> dict[str, Any]:
            total = sum(inputs.aggregation_weights)
            mean = {name: value / total for name, value in sums.items()}
            sums.clear()
            return mean

        return Run(run, result)

    result = measure(CASES["streaming"], TINY, 3, others=[Side("forgetful", prepare)], progress=tell)
    assert not result.side("forgetful").wrong
    assert makes
    assert set(makes) == {"checking forgetful"}
    assert (result.factor, result.nbytes) == (1.0, CASES["streaming"].inputs(TINY).nbytes // 10)


def test_the_limit_has_all_threads_although_sides_change_their_number() -> None:
    kernels.set_num_threads(2)
    result = measure(CASES["threads"], TINY, 1)
    assert result.limit.name.endswith(", 2 threads")
    assert [side.name for side in result.sides if not side.ours] == [result.limit.name.replace("2 threads", "1 thread")]
    assert kernels.get_num_threads() == 2


def test_before_a_sample_all_threads_have_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(busy: int) -> SimpleNamespace:
        """A clock that stands still outside of `sleep`, in a process that is busy for some of them."""
        now = SimpleNamespace(wall=0.0, cpu=0.0, sleeps=0)

        def sleep(seconds: float) -> None:
            now.cpu += seconds if now.sleeps < busy else 0.0
            now.wall += seconds
            now.sleeps += 1

        return SimpleNamespace(now=now, sleep=sleep, perf_counter=lambda: now.wall, process_time=lambda: now.cpu)

    for busy, sleeps in ((0, 1), (5, 6)):
        monkeypatch.setattr(measuring, "time", fake := clock(busy))
        measuring._wait_for_threads()
        assert fake.now.sleeps == sleeps
    monkeypatch.setattr(measuring, "time", fake := clock(10**9))
    measuring._wait_for_threads()
    assert fake.now.wall == pytest.approx(measuring.LONGEST_WAIT, abs=2 * measuring.GLANCE)


def test_the_peak_of_memory_is_what_was_allocated() -> None:
    peak = Peak()
    block = np.ones(1 << 23)
    del block
    beyond = peak.beyond()
    if beyond is None:
        pytest.skip("the system does not tell")
    assert beyond == pytest.approx(1 << 26, abs=1 << 20)


# Results


def side_result(name: str, *samples: float, ours: bool = False, error: float | None = 0.5, **more: Any) -> SideResult:
    bound = OUR_BOUND if ours else 31.0
    return SideResult(name, ours, error, bound, "float32", samples=dict(enumerate(samples)), **more)


@pytest.fixture
def result() -> CaseResult:
    return CaseResult(
        case=CASES["resnet50"],
        tensors=267,
        elements=1000,
        nbytes=4000,
        limit=side_result("bare read", 1.0, 2.0, 4.0, error=None),
        factor=1.1,
        sides=[
            side_result("fed_learn native", 2.2, 2.2, 4.4, ours=True, peak=123),
            side_result("slow", 22.0, 44.0, 22.0),
            side_result("quick but wrong", 0.1, 0.1, 0.1, error=float("inf")),
            SideResult("seldom", False, 3.0, 31.0, "float64", samples={1: 6.6}),
        ],
        base="fed_learn native",
        repetitions=3,
        missing={"absent": "not installed"},
    )


def test_ratios_are_medians_over_common_turns(result: CaseResult) -> None:
    ours, slow, wrong, seldom = result.sides
    assert result.to_limit(ours) == pytest.approx(1.0)  # of 2.0, 1.0 and 1.0
    assert result.to_limit(slow) == pytest.approx(20.0)  # of 20, 20 and 5
    assert result.to_base(slow) == pytest.approx(10.0)  # of 10, 20 and 5
    assert result.to_limit(seldom) == pytest.approx(3.0)
    assert result.to_base(seldom) == pytest.approx(3.0)
    assert slow.seconds == 22.0
    assert [side.wrong for side in result.sides] == [False, False, True, False]
    assert result.subject is ours
    assert result.best_peer() is seldom
    assert wrong.ratio_to(ours) < 1


def test_a_result_is_json_of_plain_values(result: CaseResult) -> None:
    found = json.loads(json.dumps(measuring.as_json(result), allow_nan=False))
    assert (found["name"], found["clients"], found["dtype"], found["unit"]) == ("resnet50", 10, "float32", "batch")
    assert (found["base"], found["missing"]) == ("fed_learn native", {"absent": "not installed"})
    assert found["limit"] == {"name": "bare read", "factor": 1.1, "calls_per_sample": 1, "samples": [1.0, 2.0, 4.0]}
    ours, slow, wrong, seldom = found["sides"]
    assert ours["times_limit"] == pytest.approx(1.0)
    assert slow["times_base"] == pytest.approx(10.0)
    assert slow["seconds"] == 22.0
    assert slow["gigabytes_per_second"] == pytest.approx(4000 / 22 / 1e9)
    assert slow["picoseconds_per_element"] == pytest.approx(22 / 1000 * 1e12)
    assert (ours["peak_bytes"], slow["peak_bytes"]) == (123, None)
    assert (ours["error_ulp"], ours["bound_ulp"], ours["wrong"]) == (0.5, 0.51, False)
    assert (wrong["error_ulp"], wrong["wrong"]) == (None, True)
    assert (seldom["turns"], seldom["samples"], seldom["result_dtype"]) == ([1], [6.6], "float64")


def test_facts_of_the_machine_are_json() -> None:
    facts = json.loads(json.dumps(machine.facts(), allow_nan=False))
    assert facts["threads"] == kernels.get_num_threads()
    assert facts["kernels"] == list(kernels.available())
    assert facts["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize("cases", [1, 2, 7])
def test_a_picture_has_a_panel_per_case(
    result: CaseResult, cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, path: Path) -> None:
        drawn.append(figure)
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", keep)
    names = list(CASES)[:cases]
    plot_results(tmp_path / "a.png", [replace_case(result, name) for name in names], machine.facts())
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in drawn[0].axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == names
    for axes in panels:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == ["fed_learn native", "quick but wrong", "seldom", "slow"]
        assert [text.get_text() for text in axes.texts] == ["1.00", "0.05  wrong", "3.00", "20.0"]
        low, high = axes.get_xlim()
        assert low < 0.05 < 20 < high
        assert axes.get_xscale() == "log"


def replace_case(result: CaseResult, name: str) -> CaseResult:
    return CaseResult(**{**vars(result), "case": replace(CASES[name])})


def test_nothing_measured_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_results(tmp_path / "a.png", [], machine.facts())
