"""Builds the C kernels into `fed_learn.kernels._native` (cffi, API mode, stable ABI).

The package works without them, on numpy, so a machine without a C compiler may install it. Where that must not
happen unnoticed, `FED_LEARN_REQUIRE_NATIVE=1` makes a failed build an error.
"""

import os
import sys
from glob import glob
from pathlib import Path

from cffi import FFI

REQUIRE_NATIVE = os.environ.get("FED_LEARN_REQUIRE_NATIVE", "0")
if REQUIRE_NATIVE not in ("0", "1"):
    raise SystemExit(f"FED_LEARN_REQUIRE_NATIVE must be 0 or 1, not {REQUIRE_NATIVE!r}")

ffibuilder = FFI()
# The header is the declaration: cffi reads it as it is, without the preprocessor's lines.
header = (Path(__file__).parent / "fl_kernels.h").read_text(encoding="utf-8")
ffibuilder.cdef("\n".join(line for line in header.splitlines() if not line.startswith("#")))
ffibuilder.set_source(
    "fed_learn.kernels._native",
    '#include "fl_kernels.h"',
    sources=sorted(glob("csrc/fl_*.c")),
    depends=sorted(glob("csrc/fl_*.[hi]*")),
    include_dirs=["csrc"],
    # Contraction into fused multiply-adds would change bits from machine to machine.
    extra_compile_args=[] if sys.platform == "win32" else ["-std=c11", "-O3", "-ffp-contract=off", "-Wno-psabi"],
    libraries=[] if sys.platform == "win32" else ["m"],
    optional=REQUIRE_NATIVE == "0",
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
