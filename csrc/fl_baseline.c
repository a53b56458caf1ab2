/* The baseline instruction set of the machine: 16-byte vectors, which are SSE2 on x86-64 and NEON on aarch64; elsewhere
 * the compiler makes scalar code of the same template. */
#if defined(FL_SCALAR) || !defined(__GNUC__)
#define FL_SET_NAME "scalar"
#elif defined(__x86_64__)
#define FL_SET_NAME "sse2"
#elif defined(__aarch64__)
#define FL_SET_NAME "neon"
#else
#define FL_SET_NAME "baseline"
#endif
#define FL_SET baseline
#define FL_BYTES 16
#define FL_TARGET

#include "fl_stamp.inc"
