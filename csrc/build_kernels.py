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
# The headers are the declarations: cffi reads them as they are, without the preprocessor's lines.
for header in ("fl_kernels.h", "arrays.h"):
    lines = (Path(__file__).parent / header).read_text(encoding="utf-8").splitlines()
    ffibuilder.cdef("\n".join(line for line in lines if not line.startswith("#")))
ffibuilder.set_source(
    "fed_learn.kernels._native",
    '#include "fl_kernels.h"\n#include "arrays.h"',
    sources=["csrc/arrays.c", *sorted(glob("csrc/fl_*.c"))],
    depends=["csrc/arrays.h", *sorted(glob("csrc/fl_*.[hi]*"))],
    include_dirs=["csrc"],
    # Contraction into fused multiply-adds would change bits from machine to machine.
    extra_compile_args=[] if sys.platform == "win32" else ["-std=c11", "-O3", "-ffp-contract=off", "-Wno-psabi"],
    libraries=[] if sys.platform == "win32" else ["m"],
    optional=REQUIRE_NATIVE == "0",
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
