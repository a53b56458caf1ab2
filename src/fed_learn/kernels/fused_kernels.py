"""What the fused operations of the torch kernel do on a CUDA device: Triton's language, compiled at first use.

A program works on one block of one variable, and finds which in a table, so that a launch does not grow with the number
of variables. How a call is put together and launched is left to `fused.py`, which says what the arguments hold.
"""

import numpy as np
import triton
import triton.language as tl

_LARGEST = tl.constexpr(float(np.finfo(np.float64).max))


@triton.jit
def _block_of_program(table, blocks, block: tl.constexpr):
    program = tl.program_id(0)
    variable = tl.load(table + program).to(tl.int64)
    first = tl.load(table + blocks + program).to(tl.int64) * block
    count = tl.load(table + blocks + blocks + program)
    return variable, first, count


@triton.jit
def _pointer(addresses, i, type: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(addresses + i).to(tl.pointer_type(type))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, at, count, full: tl.constexpr):
    # A mask of unknown length would make the loads of full blocks narrow.
    return tl.load(pointer + at) if full else tl.load(pointer + at, mask=at < count, other=0)


@triton.jit
def _store(pointer, at, count, values, full: tl.constexpr):
    if full:
        tl.store(pointer + at, values)
    else:
        tl.store(pointer + at, values, mask=at < count)


@triton.jit
def _flag(flag, marks):
    # All that store here store the same, and hardly ever does one: cheaper than a reduction, which would wait.
    tl.store(tl.broadcast_to(flag, marks.shape), 1, mask=marks)


@triton.jit
def _as_float64(x, kind: tl.constexpr):
    if kind == tl.bfloat16:
        wide = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
    elif kind == tl.int1:
        wide = (x != 0).to(tl.float64)
    else:
        wide = x.to(tl.float64)
    return wide


@triton.jit
def _rounded(wide, loaded: tl.constexpr, kind: tl.constexpr):
    if kind == tl.float64:
        values = wide
    elif kind == tl.float32:
        values = wide.to(tl.float32)
    elif kind == tl.float16:
        values = wide.to(tl.float32).to(tl.float16)
    elif kind == tl.bfloat16:
        narrow = wide.to(tl.float32)
        bits = narrow.to(tl.uint32, bitcast=True)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        values = tl.where(narrow == narrow, nearest_even, 0x7FC0).to(tl.uint16)
    else:
        below = tl.floor(wide)
        rest = wide - below  # exact, but between -0.5 and 0, where it is large enough
        odd = tl.floor(below * 0.5) * 2.0 != below
        whole = tl.where((rest > 0.5) | ((rest == 0.5) & odd), below + 1.0, below)
        values = (whole != 0.0).to(loaded) if kind == tl.int1 else whole.to(loaded)
    return values


@triton.jit
def _mean_of_block(
    weights,
    addresses,
    flag,
    total,
    largest,
    first,
    count,
    contributions,
    full: tl.constexpr,
    loaded: tl.constexpr,
    kind: tl.constexpr,
    reads: tl.constexpr,
    divides: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.arange(0, block)
    limited: tl.constexpr = divides and not reads and (kind == tl.int64 or kind == tl.uint64)
    start = 0
    if reads:
        acc = _load(_pointer(addresses, 0, tl.float64, aligned) + first, at, count, full)
    else:
        x = _load(_pointer(addresses, 2, loaded, aligned) + first, at, count, full)
        acc = tl.load(weights).to(tl.float64, bitcast=True) * _as_float64(x, kind)
        start = 1
    marks = at < 0
    if limited:
        marks = marks | _beyond(x, largest, kind)
    if not (reads and divides):
        for k in tl.range(start, contributions, loop_unroll_factor=4):
            x = _load(_pointer(addresses, 2 + k, loaded, aligned) + first, at, count, full)
            acc += tl.load(weights + k).to(tl.float64, bitcast=True) * _as_float64(x, kind)
            if limited:
                marks = marks | _beyond(x, largest, kind)
    if divides:
        _flag(flag, marks | ((tl.abs(acc) <= _LARGEST) == 0))
        mean = acc / total
        # Not by minimum and maximum, which would lose a NaN.
        bound = tl.full((block,), _LARGEST, tl.float64)
        mean = tl.where(mean > bound, bound, mean)
        mean = tl.where(mean < -bound, -bound, mean)
        out = _pointer(addresses, 1, loaded, aligned) + first
        _store(out, at, count, _rounded(mean, loaded, kind), full)
    else:
        _store(_pointer(addresses, 0, tl.float64, aligned) + first, at, count, acc, full)


@triton.jit
def _beyond(x, largest, kind: tl.constexpr):
    return x > largest.to(tl.uint64) if kind == tl.uint64 else (x > largest) | (x < -largest)


@triton.jit(do_not_specialize=["call", "table", "flags", "blocks", "contributions"])
def mean_kernel(
    call,
    table,
    flags,
    blocks,
    contributions,
    loaded: tl.constexpr,
    kind: tl.constexpr,
    reads: tl.constexpr,
    divides: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """Sums products, onto sums that are there if it `reads`, and `divides` or leaves the sums as they are.

    If it does both, it adds nothing: the sums that it reads are complete.
    """
    variable, first, count = _block_of_program(table, blocks, block)
    total = tl.load(call).to(tl.float64, bitcast=True)
    largest = tl.load(call + 1)
    weights = call + 2
    addresses = weights + contributions + variable * (contributions + 2)
    flag = flags + variable
    if count == block:
        _mean_of_block(
            weights, addresses, flag, total, largest, first, count, contributions,
            True, loaded, kind, reads, divides, aligned, block,
        )  # fmt: skip
    else:
        _mean_of_block(
            weights, addresses, flag, total, largest, first, count, contributions,
            False, loaded, kind, reads, divides, aligned, block,
        )  # fmt: skip


@triton.jit
def _combination_of_block(
    addresses,
    flag,
    first,
    count,
    full: tl.constexpr,
    loaded: tl.constexpr,
    kind: tl.constexpr,
    subtracts: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.arange(0, block)
    x = _load(_pointer(addresses, 0, loaded, aligned) + first, at, count, full)
    y = _load(_pointer(addresses, 1, loaded, aligned) + first, at, count, full)
    out = _pointer(addresses, 2, loaded, aligned) + first
    if kind == tl.float16 or kind == tl.bfloat16 or kind == tl.float32 or kind == tl.float64:
        # The compiler may add in float32, or in float16. That gives the same bits: float64 has more than twice the bits
        # of float32, and float32 those of float16, so that of a sum of two the second rounding alone counts.
        one = _as_float64(x, kind)
        other = _as_float64(y, kind)
        wide = one - other if subtracts else one + other
        values = _rounded(wide, loaded, kind)
        marks = (tl.abs(_as_float64(values, kind)) <= _LARGEST) == 0
    else:
        one = x.to(tl.int64)
        other = y.to(tl.int64)
        wide = one - other if subtracts else one + other
        values = wide.to(loaded)
        marks = values.to(tl.int64) != wide
        if kind == tl.int64:
            # The sum of two that are not beyond 2**62 wraps around at 2**63 alone.
            half: tl.constexpr = 2**62
            marks = (x > half) | (x < -half) | (y > half) | (y < -half) | ((wide == -half - half) & (x > 0))
    _flag(flag, marks)
    _store(out, at, count, values, full)


@triton.jit(do_not_specialize=["call", "table", "flags", "blocks"])
def combination_kernel(
    call,
    table,
    flags,
    blocks,
    loaded: tl.constexpr,
    kind: tl.constexpr,
    subtracts: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """Adds or subtracts, in float64 or int64."""
    variable, first, count = _block_of_program(table, blocks, block)
    addresses = call + variable * 3
    flag = flags + variable
    if count == block:
        _combination_of_block(addresses, flag, first, count, True, loaded, kind, subtracts, aligned, block)
    else:
        _combination_of_block(addresses, flag, first, count, False, loaded, kind, subtracts, aligned, block)


@triton.jit
def _scan_of_block(
    addresses,
    flag,
    first,
    count,
    full: tl.constexpr,
    word: tl.constexpr,
    exponent: tl.constexpr,
    copies: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.arange(0, block)
    # As integers, because a conversion could change the bits of a NaN.
    bits = _load(_pointer(addresses, 0, word, aligned) + first, at, count, full)
    if exponent != 0:
        _flag(flag, (bits & exponent) == exponent)
    if copies:
        _store(_pointer(addresses, 1, word, aligned) + first, at, count, bits, full)


@triton.jit(do_not_specialize=["call", "table", "flags", "blocks"])
def scan_kernel(
    call,
    table,
    flags,
    blocks,
    word: tl.constexpr,
    exponent: tl.constexpr,
    copies: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    """Looks for values that are not finite; integers, with an `exponent` of 0, all are. `copies` what it has seen."""
    variable, first, count = _block_of_program(table, blocks, block)
    addresses = call + variable * 2
    flag = flags + variable
    if count == block:
        _scan_of_block(addresses, flag, first, count, True, word, exponent, copies, aligned, block)
    else:
        _scan_of_block(addresses, flag, first, count, False, word, exponent, copies, aligned, block)
