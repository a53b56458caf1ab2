"""Builds the C kernels into `fed_learn.kernels._native` (cffi, API mode, stable ABI).

The package works without them, on numpy, so a machine without a C compiler may install it. Where that must not
happen unnoticed, `FED_LEARN_REQUIRE_NATIVE=1` makes a failed build an error.
"""

import os
import sys

from cffi import FFI

REQUIRE_NATIVE = os.environ.get("FED_LEARN_REQUIRE_NATIVE", "0")
if REQUIRE_NATIVE not in ("0", "1"):
    raise SystemExit(f"FED_LEARN_REQUIRE_NATIVE must be 0 or 1, not {REQUIRE_NATIVE!r}")

ffibuilder = FFI()
ffibuilder.cdef(
    """
    enum fl_status { FL_OK, FL_BAD_DTYPE, FL_NO_INPUT, FL_BAD_SET, ... };
    enum fl_dtype {
        FL_FLOAT16, FL_BFLOAT16, FL_FLOAT32, FL_FLOAT64, FL_BOOL, FL_INT8, FL_INT16, FL_INT32, FL_INT64,
        FL_UINT8, FL_UINT16, FL_UINT32, FL_UINT64, ...
    };
    enum fl_set { FL_BASELINE, FL_AVX2, FL_SETS, ... };
    const char *fl_set_name(int set);
    int fl_set_usable(int set);
    int fl_weighted_mean(int set, size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
                         const int32_t *dtypes, const double *a, double total);
    int fl_accumulate(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts,
                      const int32_t *dtypes, double a);
    int fl_divide(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
                  double total);
    """
)
ffibuilder.set_source(
    "fed_learn.kernels._native",
    '#include "fl_kernels.h"',
    sources=["csrc/fl_baseline.c", "csrc/fl_avx2.c", "csrc/fl_dispatch.c"],
    depends=[f"csrc/fl_{name}" for name in ("kernels.h", "sets.h", "vector.h", "stamp.inc", "weighted_sum.inc")],
    include_dirs=["csrc"],
    # Contraction into fused multiply-adds would change bits from machine to machine.
    extra_compile_args=[] if sys.platform == "win32" else ["-std=c11", "-O3", "-ffp-contract=off", "-Wno-psabi"],
    libraries=[] if sys.platform == "win32" else ["m"],
    optional=REQUIRE_NATIVE == "0",
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
