/* The baseline instruction set of the machine: 16-byte vectors, which are SSE2 on x86-64 and NEON on aarch64; elsewhere
 * the compiler makes scalar code of the same template. */
#define FL_SET baseline
#define FL_BYTES 16
#define FL_TARGET

#include "fl_stamp.inc"
