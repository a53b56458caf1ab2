"""Who is measured: what a side is, the limit, and this package's own ways of averaging."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from threading import Barrier
from typing import Any

import numpy as np

from fed_learn import kernels
from fed_learn.aggregation import Accumulator, weighted_average
from fed_learn.aggregation.differences import add_difference
from fed_learn.benchmark.inputs import Inputs
from fed_learn.kernels import threads

LONGEST_START = 10.0
"""Seconds in which the threads of a kernel must have started."""


def _same(value: Any) -> Any:
    return value


def _nothing() -> None:
    pass


@dataclass(frozen=True, eq=False)
class Run:
    """A side with its inputs, ready to be timed.

    Attributes:
        call: What is timed: one batch, or one pass over the contributions of a stream.
        result: Makes a weight dict of what `call` returned; not timed. None: there is no result to check.
        before: Called before each sample; not timed.
    """

    call: Callable[[], Any]
    result: Callable[[Any], Mapping[str, Any]] | None = _same
    before: Callable[[], None] = _nothing


@dataclass(frozen=True, eq=False)
class Side:
    """Someone who averages.

    Attributes:
        name: As it is printed.
        prepare: Makes the run, and everything that is in place before the work begins: views in the types of a
            framework, memory for the result where `Inputs.reuse` says so.
        ours: Whether it is this package.
        needs: Modules that must be installed.
        dtypes: Names of the dtypes that it takes; None: all.
    """

    name: str
    prepare: Callable[[Inputs], Run]
    ours: bool = False
    needs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] | None = None


def limit() -> Side:
    """The bare read of the inputs: by the native kernel's threads, else by numpy on one."""
    if "native" not in kernels.available():
        return Side("bare read (numpy, 1 thread)", _numpy_read)
    return Side("bare read", _native_read)


def _native_read(inputs: Inputs) -> Run:
    from fed_learn.kernels import native  # cannot be imported where the extension was not built

    arrays = inputs.arrays
    return Run(lambda: native.read(arrays), None)


def _numpy_read(inputs: Inputs) -> Run:
    """Reads words of eight bytes; a tail of less than that is left out."""
    words = [array.view(np.uint8)[: array.nbytes // 8 * 8].view(np.uint64) for array in inputs.arrays]
    return Run(lambda: [np.bitwise_xor.reduce(array) for array in words], None)


def average(kernel: str, *, exact: bool = False) -> Side:
    """`weighted_average` on a kernel."""

    def prepare(inputs: Inputs) -> Run:
        out = {name: np.empty_like(a) for name, a in inputs.clients[0].items()} if inputs.reuse else None
        return Run(
            lambda: weighted_average(inputs.clients, inputs.aggregation_weights, out=out, exact=exact, kernel=kernel)
        )

    return Side(f"fed_learn {kernel}{', exact' if exact else ''}", prepare, ours=True)


def move(kernel: str) -> Side:
    """`add_difference` on a kernel: what moves a model by a mean difference, here the first model by the second.

    It gives no mean, so there is nothing that could be compared with those of other sides.
    """

    def prepare(inputs: Inputs) -> Run:
        base, diff = inputs.clients[:2]
        out = {name: np.empty_like(array) for name, array in base.items()} if inputs.reuse else None

        def run() -> Mapping[str, Any]:
            with kernels.use(kernel):
                return add_difference(base, diff, out=out)

        return Run(run, None)

    return Side(f"add_difference {kernel}", prepare, ours=True)


def stream(kernel: str, *, exact: bool = False, borrow: bool = False) -> Side:
    """`Accumulator.add` on a kernel; the first pass makes the sums, so it is the caller's to leave it untimed.

    What is borrowed has been added at the end of a pass, none of it is left to the next one or to the result.
    """
    options: dict[str, Any] = {"borrow": True} if borrow else {}

    def prepare(inputs: Inputs) -> Run:
        accumulator = Accumulator(kernel=kernel, exact=exact)
        finish = getattr(accumulator, "flush", _nothing) if borrow else _nothing

        def run() -> Accumulator:
            for client, a in zip(inputs.clients, inputs.aggregation_weights, strict=True):
                accumulator.add(client, a, **options)
            finish()
            return accumulator

        return Run(run, Accumulator.result)

    kind = ", exact" if exact else ", borrow" if borrow else ""
    return Side(f"fed_learn {kernel}{kind}", prepare, ours=True)


def _wait(barrier: Barrier) -> None:
    barrier.wait(LONGEST_START)


def can_borrow() -> bool:
    """Whether `Accumulator.add` has an argument `borrow`."""
    return "borrow" in inspect.signature(Accumulator.add).parameters


def on_threads(side: Side, number: int) -> Side:
    """The side on a number of kernel threads, which are started before the clock is."""

    def start() -> None:
        kernels.set_num_threads(number)
        # Whoever gets through the barrier got there with all others, so that many threads there are.
        threads.run(_wait, [Barrier(number)] * number)

    def prepare(inputs: Inputs) -> Run:
        return replace(side.prepare(inputs), before=start)

    return replace(side, name=f"{side.name}, {number} thread{'s' if number > 1 else ''}", prepare=prepare)


def numbers_of_threads() -> tuple[int, ...]:
    """1, 2, 4 … and all that kernels may use."""
    most = kernels.get_num_threads()
    return tuple(sorted({1, most, *(1 << i for i in range(most.bit_length()) if 1 << i <= most)}))
