/* AVX2 on x86-64: 32-byte vectors. */
#include "fl_sets.h"

#if FL_HAVE_AVX
#define FL_SET avx2
#define FL_SET_NAME "avx2"
#define FL_BYTES 32
#define FL_TARGET __attribute__((target("avx2")))

#include "fl_stamp.inc"
#else
typedef int fl_no_avx2; /* a translation unit must not be empty */
#endif
