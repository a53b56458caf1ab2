/* What the file of an instruction set offers to the dispatcher: one table of functions. */
#ifndef FL_SETS_H
#define FL_SETS_H

#include <stddef.h>
#include <stdint.h>

#include "fl_kernels.h"

#if defined(__FAST_MATH__)
#error "fed_learn promises the same bits everywhere: do not compile it with -ffast-math"
#endif

/* Digits of exact sums, see fl_exact.inc. */
enum { FL_DIGIT = 44, FL_DIGITS = 48 }; /* bits of a digit; most digits */

struct fl_digits {
    size_t n;
    int64_t *rows[FL_DIGITS]; /* the highest digit first */
    double units[FL_DIGITS];  /* what a digit counts: powers of two */
    double shifts[FL_DIGITS]; /* 1.5*2^52 units */
    uint8_t *touched;         /* set to 1 for each digit that is changed */
};

/* The operations on one dtype. Those that return an int say whether they met something that is not finite, those of
 * exact sums return a status. `spare`: products with inputs of at most so many significant bits are exact. `stream`:
 * write past the caches. An operation that does not take the dtype is NULL. */
struct fl_functions {
    int (*weighted_mean)(void *output, const uintptr_t *inputs, size_t n_inputs, size_t count, const double *a,
                         double total, double *scratch, int spare, int stream);
    void (*accumulate)(double *sums, const uintptr_t *inputs, size_t n_inputs, size_t count, const double *a, int start,
                       int spare);
    int (*divide)(void *output, const double *sums, size_t count, double total);
    int (*exact_mean)(struct fl_digits *digits, void *output, const uintptr_t *inputs, size_t n_inputs, size_t count,
                      const double *high, const double *low, double total);
    int (*deposit)(const struct fl_digits *digits, const uintptr_t *inputs, size_t start, size_t n, size_t n_inputs,
                   const double *high, const double *low);
    void (*exact_divide)(const struct fl_digits *digits, void *output, size_t n, double total);
    int (*add)(void *output, const void *base, const void *difference, size_t count, int stream);
    int (*subtract)(void *output, const void *weights, const void *base, size_t count, int stream);
};

struct fl_set_table {
    const char *name;
    struct fl_functions functions[FL_DTYPES]; /* by enum fl_dtype */
    int (*find_not_finite)(int dtype, void *output, const void *input, size_t count, int stream);
    uint64_t (*read)(const void *data, size_t size);
};

/* One per file. Those of FL_HAVE_AVX are there on x86-64 alone. */
extern const struct fl_set_table fl_set_baseline, fl_set_avx2, fl_set_avx2_fma, fl_set_avx512;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(FL_SCALAR)
#define FL_HAVE_AVX 1
#else
#define FL_HAVE_AVX 0
#endif

#endif
