"""The same cases under pytest-benchmark, to compare commits: `pytest benchmarks --benchmark-compare`."""

import pytest
from cases import SIDES, make_clients, resnet50_shapes, worst_error
from pytest_benchmark.fixture import BenchmarkFixture

CLIENTS, WEIGHTS = make_clients(resnet50_shapes(), 10)


@pytest.mark.parametrize("side", SIDES)
def test_resnet50_over_10_clients(benchmark: BenchmarkFixture, side: str) -> None:
    benchmark.group = "ResNet-50 × 10"
    result = benchmark(SIDES[side], CLIENTS, WEIGHTS)
    assert worst_error(result, CLIENTS, WEIGHTS) < 10
