"""The torch kernel: the same arithmetic on tensors, wherever they are. It is there once torch has been imported.

Here variables are put together by dtype and device, so that each operation takes many of them, and what was found wrong
is read back from a device once per call. The operations themselves are those of `unfused`, or of `fused` on CUDA
devices where Triton can compile. Exact sums, which are taken of arrays and tensors on the CPU, are here too.

That the bits are those of the other kernels is tested on the CPU; on other devices it is to be expected of IEEE
arithmetic, and claimed where the tests have run.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from itertools import compress
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch

import fed_learn.kernels.unfused as unfused
from fed_learn.environment import check_environment
from fed_learn.errors import FloatingPointEnvironmentError, KernelNameError, KernelUnavailableError, described
from fed_learn.kernels.base import Kernel, Segment
from fed_learn.kernels.digits import DIGIT_BITS, Digits, DigitsError, Float64Array, digit_range, halves
from fed_learn.kernels.memory import Table
from fed_learn.kernels.unfused import Flags
from fed_learn.weights import BFLOAT16, Array

EXACT_TILE = 1 << 20
"""Elements at a time of exact sums: bounds the memory of the intermediate tensors to a few times 8 MiB."""
PARALLEL = 1 << 15
"""Elements for which torch starts another thread."""

Tensor: TypeAlias = torch.Tensor
Rows: TypeAlias = list[Tensor]
Operation: TypeAlias = Callable[[Any, list[int]], Flags | Tensor | None]
"""Does something with the variables at some positions, of one dtype and device, by the functions of a module. Returns
what it found: nothing, `Flags`, or a flag for each variable."""

FUSED = ("0", "1", "auto")
"""What `FED_LEARN_FUSED` may say: no fused operations; an error where they cannot be; where they can be."""

logger = logging.getLogger(__name__)


class TorchKernel(Kernel):
    """`Kernel` in torch. Takes arrays, which it views as tensors, and tensors, which stay on their devices.

    Tensors that were made in inference mode are written to as any others.

    Raises:
        FloatingPointEnvironmentError: From every operation on the CPU, where the process does not compute as numbers
            are defined (`torch.set_flush_denormal`).
    """

    name = "torch"

    @torch.inference_mode()
    def weighted_mean(
        self,
        segments: Sequence[Segment],
        aggregation_weights: Float64Array,
        total: float,
        table: Table | None = None,
    ) -> list[bool]:
        columns, outputs = [], []
        for inputs, output in segments:
            columns.append(list(map(_tensor, inputs)))
            outputs.append(_tensor(output))
        return _by_groups(
            outputs,
            outputs,
            lambda how, some: how.mean(_at(columns, some), _at(outputs, some), aggregation_weights, total),
        )

    @torch.inference_mode()
    def accumulate(
        self,
        sums: Sequence[Float64Array],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
        *,
        start: bool = False,
    ) -> None:
        columns, targets = [list(map(_tensor, column)) for column in inputs], list(map(_tensor, sums))

        def add(how: Any, some: list[int]) -> None:
            how.accumulate(_at(targets, some), _at(columns, some), aggregation_weights, start=start)

        _by_groups([column[0] for column in columns], targets, add)

    @torch.inference_mode()
    def divide(self, sums: Sequence[Float64Array], total: float, outputs: Sequence[Array]) -> list[bool]:
        sources, targets = list(map(_tensor, sums)), list(map(_tensor, outputs))
        return _by_groups(targets, targets, lambda how, some: how.divide(_at(sources, some), total, _at(targets, some)))

    @torch.inference_mode()
    def deposit(
        self,
        digits: Digits,
        starts: Sequence[int],
        inputs: Sequence[Sequence[Array]],
        aggregation_weights: Float64Array,
    ) -> list[bool]:
        _check_environment()
        touched = [False] * len(digits.rows)
        rows = list(map(_tensor, digits.rows))
        for first, column in zip(starts, inputs, strict=True):
            for a, x in zip(aggregation_weights, map(_tensor, column), strict=True):
                for start in range(0, x.numel(), EXACT_TILE):
                    tile = x[start : start + EXACT_TILE]
                    here = slice(first + start, first + start + tile.numel())
                    for products in _exact_products(tile, a):
                        _deposit(products, [row[here] for row in rows], digits.units(), touched)
        return touched

    @torch.inference_mode()
    def exact_divide(self, digits: Digits, starts: Sequence[int], total: float, outputs: Sequence[Array]) -> None:
        _check_environment()
        rows = list(map(_tensor, digits.rows))
        for first, output in zip(starts, map(_tensor, outputs), strict=True):
            for start in range(0, output.numel(), EXACT_TILE):
                tile = output[start : start + EXACT_TILE]
                here = slice(first + start, first + start + tile.numel())
                unfused.write_quotients(_as_float64([row[here] for row in rows], digits.units()), total, tile)

    @torch.inference_mode()
    def exact_mean(self, segments: Sequence[Segment], aggregation_weights: Float64Array, total: float) -> None:
        _check_environment()
        for segment in segments:
            top, bottom = digit_range([segment.output.dtype], aggregation_weights)
            inputs, output = list(map(_tensor, segment.inputs)), _tensor(segment.output)
            units = Digits(top, [np.zeros(0, np.int64)] * (top - bottom + 1)).units()
            for start in range(0, output.numel(), EXACT_TILE):
                tile = output[start : start + EXACT_TILE]
                rows = list(torch.zeros((len(units), tile.numel()), dtype=torch.int64, device=tile.device))
                touched = [False] * len(rows)
                for a, x in zip(aggregation_weights, inputs, strict=True):
                    for products in _exact_products(x[start : start + EXACT_TILE], a):
                        _deposit(products, rows, units, touched)
                unfused.write_quotients(_as_float64(rows, units), total, tile)

    @torch.inference_mode()
    def add(self, bases: Sequence[Array], differences: Sequence[Array], outputs: Sequence[Array]) -> list[bool]:
        ones, others, targets = (list(map(_tensor, arrays)) for arrays in (bases, differences, outputs))
        return _by_groups(
            targets, targets, lambda how, some: how.add(_at(ones, some), _at(others, some), _at(targets, some))
        )

    @torch.inference_mode()
    def subtract(self, weights: Sequence[Array], bases: Sequence[Array], outputs: Sequence[Array]) -> list[bool]:
        ones, others, targets = (list(map(_tensor, arrays)) for arrays in (weights, bases, outputs))
        return _by_groups(
            targets, targets, lambda how, some: how.subtract(_at(ones, some), _at(others, some), _at(targets, some))
        )

    @torch.inference_mode()
    def not_finite(self, arrays: Sequence[Array]) -> list[bool]:
        tensors = list(map(_tensor, arrays))

        def look(how: Any, some: list[int]) -> Flags | None:
            return how.not_finite(_at(tensors, some)) if tensors[some[0]].is_floating_point() else None

        return _by_groups(tensors, tensors, look)

    @torch.inference_mode()
    def copy(self, arrays: Sequence[Array], copies: Sequence[Array]) -> list[bool]:
        sources, targets = list(map(_tensor, arrays)), list(map(_tensor, copies))

        return _by_groups(targets, targets, lambda how, some: how.copy(_at(sources, some), _at(targets, some)))


def arithmetic(device: torch.device) -> ModuleType:
    """The module whose operations are used on a device: `fused` where that can be, else `unfused`."""
    return unfused if device.type != "cuda" else _arithmetic(device)[0]


def not_fused(device: torch.device) -> str | None:
    """Why operations on a device are not fused, in a few words; None: they are.

    The first call for a device compiles a kernel, and compares it with plain operations.
    """
    return "it is no CUDA device" if device.type != "cuda" else _arithmetic(device)[1]


@functools.cache
def _arithmetic(device: torch.device) -> tuple[ModuleType, str | None]:
    """The module for a CUDA device, and why it is not the fused one."""
    asked = os.environ.get("FED_LEARN_FUSED") or "auto"
    if asked not in FUSED:
        valid = ", ".join(FUSED)
        raise KernelNameError(f"FED_LEARN_FUSED {asked!r} is unknown; valid are {valid}", valid=FUSED)
    if asked == "0":
        return unfused, "FED_LEARN_FUSED=0 says so"
    problem = _why_not_triton()
    if problem is None:
        try:
            import fed_learn.kernels.fused as fused
        except Exception as error:  # noqa: BLE001 - of Triton, which may be old, broken or made for another system
            problem = f"Triton cannot be imported: {described(error)}"
        else:
            problem = fused.problem(device)
            if problem is None:
                return fused, None
    if asked == "1":
        message = f"FED_LEARN_FUSED=1, and operations on {device} cannot be fused: {problem}"
        raise KernelUnavailableError(message, reason=problem)
    logger.warning("Operations on %s are not fused, and take several times as long as they could: %s", device, problem)
    return unfused, problem


def _why_not_triton() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if "triton" in sys.modules:
        return None
    if "tensorflow" in sys.modules:
        return "Triton cannot be imported once TensorFlow has been: the process would crash (import triton first)"
    return "Triton is not installed" if find_spec("triton") is None else None


def _at(values: Sequence[Any], positions: list[int]) -> list[Any]:
    return [values[i] for i in positions]


def _by_groups(dtypes: Sequence[Tensor], places: Sequence[Tensor], operation: Operation) -> list[bool]:
    """Does something with all variables, those of one dtype and device together, and reads what was found.

    Where a flag is about several variables, each half of them is done again, until it is known which of them it is: an
    operation that returns flags writes to nothing that it reads, so it can be repeated.

    Args:
        dtypes: A tensor of each variable's dtype.
        places: One on its device. An empty one is left as it is.
        operation: What to do.

    Returns:
        For each variable whether something was found.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, (like, beside) in enumerate(zip(dtypes, places, strict=True)):
        if beside.numel():
            groups.setdefault((like.dtype, beside.device), []).append(i)
    for positions in groups.values():
        positions.sort(key=lambda i: places[i].numel() % 16 > 0)  # as they lie in one piece of memory, if they do
    if not groups or any(device.type == "cpu" for _, device in groups):
        _check_environment()
    flagged = [False] * len(places)
    left = list(groups.values())
    while left:
        suspects, left = _suspects(left, places, operation), []
        for positions in suspects:
            if len(positions) == 1:
                flagged[positions[0]] = True
            else:
                half = len(positions) // 2
                left += [positions[:half], positions[half:]]
    return flagged


def _suspects(groups: Sequence[list[int]], places: Sequence[Tensor], operation: Operation) -> list[list[int]]:
    """Does something with the variables of each group; returns those that flags are about, which are read at once."""
    found: dict[torch.device, tuple[list[Tensor], list[list[int]]]] = {}
    for positions in groups:
        device = places[positions[0]].device
        flags = operation(arithmetic(device), positions)
        if flags is None:
            continue
        if isinstance(flags, Tensor):
            flags = Flags(flags, [(i,) for i in range(len(positions))])
        values, variables = found.setdefault(device, ([], []))
        values.append(flags.values.to(torch.int32))
        variables += [_at(positions, list(some)) for some in flags.variables]
    suspects: list[list[int]] = []
    for values, variables in found.values():
        suspects += compress(variables, torch.cat(values).tolist())
    return suspects


def _check_environment() -> None:
    """Checks how this thread computes, and torch's threads on the CPU, which keep the mode that they were made in."""
    check_environment()
    tiny = torch.full((PARALLEL * torch.get_num_threads(),), 2.0**-1040, dtype=torch.float64, device="cpu")
    if not bool(torch.mul(tiny, 1.0).all()):
        raise FloatingPointEnvironmentError(
            "threads of torch flush subnormal numbers to zero (torch.set_flush_denormal when they were made?), so "
            "torch would give other bits; the native kernel does not mind"
        )


class _Writeable:
    """The memory of a read-only array, shown as writeable: torch would warn of it otherwise."""

    def __init__(self, array: Array) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}
        self._array = array


def _tensor(array: Any) -> Tensor:
    """A flat contiguous view, or copy where that cannot be; in inference mode without a gradient."""
    if isinstance(array, Tensor):
        whole = array if array.is_contiguous() else array.contiguous()
        return whole if whole.dim() == 1 else whole.view(-1)
    flat = array.reshape(-1)
    if flat.dtype == BFLOAT16:
        return _tensor(flat.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(flat if flat.flags.writeable else np.asarray(_Writeable(flat)))


def _exact_products(x: Tensor, aggregation_weight: float) -> Iterable[Tensor]:
    """Tensors that sum to `aggregation_weight · x` exactly: products of halves."""
    wide = x.to(torch.float64)
    parts = [wide]
    # 24 bits times 26 fit; longer values need to be halved as well.
    if x.element_size() == 8 or (x.element_size() == 4 and not x.is_floating_point()):
        scaled = torch.mul(wide, 134217729.0)  # Veltkamp's splitting, see `digits.halves`
        high = scaled - (scaled - wide)
        parts = [high, wide - high]
    for half in map(float, halves(aggregation_weight)):
        if half:
            yield from (torch.mul(part, half) for part in parts)


def _deposit(products: Tensor, rows: Rows, units: Sequence[float], touched: list[bool]) -> None:
    """Adds products to digits, exactly. `touched` has True for each row that was changed.

    Raises:
        DigitsError: The digits do not reach as far as a product.
    """
    rest = products
    for b, (row, unit) in enumerate(zip(rows, units, strict=True)):
        if not bool(rest.any()):
            return
        shift = torch.tensor(1.5 * 2.0**52 * unit, dtype=torch.float64, device=rest.device)
        rounded = rest + shift
        counts = rounded.view(torch.int64) - shift.view(torch.int64)
        rest = rest - (rounded - shift)
        if bool(counts.any()):
            if b == 0 and max(int(counts.max()), -int(counts.min())) > 1 << DIGIT_BITS:
                raise DigitsError
            row.add_(counts)
            touched[b] = True
    if bool(rest.any()):
        raise DigitsError


def _as_float64(rows: Rows, units: Sequence[float]) -> Tensor:
    """The sums as float64; see `digits.carried` and `digits.as_float64`."""
    carry = torch.zeros_like(rows[0])
    total = torch.zeros(rows[0].shape, dtype=torch.float64, device=rows[0].device)
    for row, unit in zip(reversed(rows), reversed(units), strict=True):
        digit = row + carry
        carry = (digit + (1 << (DIGIT_BITS - 1))) >> DIGIT_BITS
        total.add_((digit - (carry << DIGIT_BITS)).to(torch.float64) * unit)
    return total.add_(carry.to(torch.float64) * (units[0] * 2.0**DIGIT_BITS))
