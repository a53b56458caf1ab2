/* What an instruction set's file offers to the dispatcher: one function per operation and dtype. */
#ifndef FL_SETS_H
#define FL_SETS_H

#include <stddef.h>
#include <stdint.h>

#include "fl_kernels.h"

#if defined(__FAST_MATH__)
#error "fed_learn promises the same bits everywhere: do not compile it with -ffast-math"
#endif

struct fl_functions {
    void (*weighted_mean)(void *output, const uintptr_t *inputs, size_t n_inputs, size_t count, const double *a,
                          double total);
    void (*accumulate)(double *sums, const void *input, size_t count, double a);
    void (*divide)(void *output, const double *sums, size_t count, double total);
};

/* Indexed by enum fl_dtype. */
extern const struct fl_functions fl_functions_baseline[FL_DTYPES];
extern const struct fl_functions fl_functions_avx2[FL_DTYPES];

#if defined(__x86_64__) && defined(__GNUC__) && !defined(FL_SCALAR)
#define FL_HAVE_AVX2 1
#else
#define FL_HAVE_AVX2 0
#endif

#endif
