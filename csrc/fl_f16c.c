/* AVX2 with the float16 conversions of F16C: float16 alone, everything else is AVX2's. */
#include "fl_sets.h"

#if FL_HAVE_AVX2
#define FL_F16C 1
#define FL_SET f16c
#define FL_BYTES 32
#define FL_TARGET __attribute__((target("avx2,f16c")))

#include "fl_stamp.inc"
#else
typedef int fl_no_f16c; /* a translation unit must not be empty */
#endif
