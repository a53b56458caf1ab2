/* AVX-512 on x86-64: 64-byte vectors, and what AVX2 with F16C and FMA has. */
#include "fl_sets.h"

#if FL_HAVE_AVX
#define FL_FMA 1
#define FL_SET avx512
#define FL_SET_NAME "avx512"
#define FL_BYTES 64
#define FL_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,fma")))

#include "fl_stamp.inc"
#else
typedef int fl_no_avx512; /* a translation unit must not be empty */
#endif
