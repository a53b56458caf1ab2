/* AVX2 on x86-64 with the float16 conversions of F16C, and with FMA: fused where a product is exact, and only there. */
#include "fl_sets.h"

#if FL_HAVE_AVX
#define FL_FMA 1
#define FL_SET avx2_fma
#define FL_SET_NAME "avx2+fma"
#define FL_BYTES 32
#define FL_TARGET __attribute__((target("avx2,f16c,fma")))

#include "fl_stamp.inc"
#else
typedef int fl_no_avx2_fma; /* a translation unit must not be empty */
#endif
