/* What an instruction set's file offers to the dispatcher: one function per operation and dtype. */
#ifndef FL_SETS_H
#define FL_SETS_H

#include <stddef.h>
#include <stdint.h>

#include "fl_kernels.h"

#if defined(__FAST_MATH__)
#error "fed_learn promises the same bits everywhere: do not compile it with -ffast-math"
#endif

/* Each returns whether it met something that is not finite, where it says so. */
struct fl_functions {
    int (*weighted_mean)(void *output, const uintptr_t *inputs, size_t n_inputs, size_t count, const double *a,
                         double total);
    void (*accumulate)(double *sums, const uintptr_t *inputs, size_t n_inputs, size_t count, const double *a,
                       int start);
    int (*divide)(void *output, const double *sums, size_t count, double total);
};

/* Indexed by enum fl_dtype. The f16c table has float16 alone: for the others it would be that of avx2. */
extern const struct fl_functions fl_functions_baseline[FL_DTYPES];
extern const struct fl_functions fl_functions_avx2[FL_DTYPES];
extern const struct fl_functions fl_functions_f16c[FL_DTYPES];

int fl_find_not_finite_baseline(int dtype, const void *input, size_t count);
int fl_find_not_finite_avx2(int dtype, const void *input, size_t count);
uint64_t fl_read_baseline(const void *data, size_t size);
uint64_t fl_read_avx2(const void *data, size_t size);

#if defined(__x86_64__) && defined(__GNUC__) && !defined(FL_SCALAR)
#define FL_HAVE_AVX2 1
#else
#define FL_HAVE_AVX2 0
#endif

#endif
