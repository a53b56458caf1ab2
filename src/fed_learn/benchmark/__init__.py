"""The benchmark of averaging on this machine: against a bare read of the same memory, and against the peers installed.

Sides are first checked against a reference and then run in turn, so that whatever the machine does meanwhile happens
to all of them; ratios are taken within a turn. The command is `fed-learn bench`; `benchmarks/` runs the same cases
under pytest-benchmark.

- `inputs`: models by their shapes, and how their arrays lie in memory
- `cases`: what is measured
- `sides`, `peers`, `stream_peers`: who is measured: this package, and other ways to the same mean
- `frameworks`: what peers are made of
- `check`, `measure`: whether a side is right, how long it takes and how much memory
- `machine`, `plot`: where it was measured, and a picture of it
"""

from fed_learn.benchmark.cases import CASES, FULL, QUICK, Case, Sizes, select
from fed_learn.benchmark.measure import CaseResult, SideResult, measure

__all__ = ["CASES", "FULL", "QUICK", "Case", "CaseResult", "SideResult", "Sizes", "measure", "select"]
