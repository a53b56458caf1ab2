"""Every kernel and instruction set gives the bits that were committed in `tests/vectors/kernels.json`."""

import json
from contextlib import ExitStack
from pathlib import Path

import make_vectors
import numpy as np
import pytest
import torch  # noqa: F401 - there is a kernel of its own once torch has been imported
from make_vectors import OPERATIONS, Vectors, digests

import fed_learn as fl

VECTORS: Vectors = json.loads((Path(__file__).parent / "vectors" / "kernels.json").read_text(encoding="utf-8"))
SETS = fl.kernels.instruction_sets() if "native" in fl.kernels.available() else ()
VARIANTS = [*((name, None) for name in fl.kernels.available()), *(("native", name) for name in SETS[1:])]
"""Kernels and instruction sets; None: the one that is used unless another is asked for."""


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("kernel", "instruction_set"), VARIANTS)
def test_the_bits_are_those_of_the_vectors(kernel: str, instruction_set: str | None, operation: str) -> None:
    with ExitStack() as stack:
        stack.enter_context(fl.kernels.use(kernel))
        if instruction_set is not None:
            stack.enter_context(fl.kernels.use_instruction_set(instruction_set))
        for dtype in OPERATIONS[operation][1]:
            assert dict(digests(operation, dtype)) == VECTORS[operation][dtype.name], dtype


def test_the_vectors_are_of_every_operation_and_dtype() -> None:
    assert {name: set(by_dtype) for name, by_dtype in VECTORS.items()} == {
        name: {dtype.name for dtype in dtypes} for name, (_, dtypes, _) in OPERATIONS.items()
    }


def test_a_single_bit_changes_the_digest() -> None:
    array = np.arange(5, dtype=np.float32)
    before = make_vectors.digest_of(array)
    array.view(np.uint32)[4] ^= 1
    assert make_vectors.digest_of(array) != before
