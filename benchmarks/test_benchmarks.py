"""The cases of `fed-learn bench` under pytest-benchmark, to compare commits.

    pytest benchmarks --benchmark-autosave
    pytest benchmarks --benchmark-compare

`-k resnet50` chooses cases, `--full` takes models of the usual size. A side is checked before it is timed.
"""

from collections.abc import Iterator
from functools import lru_cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fed_learn import kernels
from fed_learn.benchmark import CASES, FULL, QUICK, Case
from fed_learn.benchmark.check import OUR_BOUND, Expected, bound_of_peers, largest_error, reference
from fed_learn.benchmark.inputs import Inputs
from fed_learn.benchmark.sides import Side

SIDES = [
    pytest.param(case, side, id=f"{case.name}: {side.name}")
    for case in CASES.values()
    if case.why_not() is None
    for side in (*case.ours(), *case.others()[0], case.limit())
]


@lru_cache(maxsize=1)  # the tests of a case follow one another, and two cases may not fit into memory
def inputs_of(case: Case, full: bool) -> tuple[Inputs, dict[str, Expected]]:
    inputs = case.inputs(FULL if full else QUICK)
    return inputs, reference(inputs, exact="exact" in case.variant)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    kernels.set_num_threads(None)


@pytest.mark.filterwarnings("default")  # those of peers are theirs
@pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=False)
@pytest.mark.parametrize(("case", "side"), SIDES)
def test_averaging(benchmark: BenchmarkFixture, pytestconfig: pytest.Config, case: Case, side: Side) -> None:
    inputs, expected = inputs_of(case, pytestconfig.getoption("--full"))
    run = side.prepare(inputs)
    run.before()
    returned = run.call()
    if run.result is not None:
        error = largest_error(run.result(returned), expected)
        bound = OUR_BOUND if side.ours else bound_of_peers(case.clients, case.dtype)
        if not side.ours and not error <= bound:
            pytest.skip(f"{side.name} is off by {error:.3g} ulp")
        assert error <= bound
    del returned
    if case.streams:
        run.call()  # a peer that has given its result makes new sums
    benchmark.group = case.name
    benchmark.extra_info["bytes"] = inputs.nbytes
    benchmark(run.call)
