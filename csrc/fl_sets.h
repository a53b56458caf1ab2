/* What an instruction set's file offers to the dispatcher: one function per operation and dtype. */
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
#define FL_BASE 0x1p44

struct fl_digits {
    size_t n;
    int64_t *rows[FL_DIGITS]; /* the highest digit first */
    double units[FL_DIGITS];  /* what a digit counts */
    double shifts[FL_DIGITS]; /* 1.5*2^52 units */
    uint8_t *touched;         /* set to 1 for each digit that is changed */
};

/* The digits from the first to the last that was touched. */
static inline struct fl_digits fl_touched(const struct fl_digits *digits)
{
    struct fl_digits used = *digits;
    size_t first = 0;
    while (used.n > 1 && !digits->touched[used.n - 1])
        used.n--;
    while (first + 1 < used.n && !digits->touched[first])
        first++;
    used.n -= first;
    for (size_t b = 0; b < used.n; b++) {
        used.rows[b] = digits->rows[first + b];
        used.units[b] = digits->units[first + b];
        used.shifts[b] = digits->shifts[first + b];
    }
    return used;
}

/* Those that return an int say whether they met something that is not finite. `spare`: products with inputs of at most
 * so many significant bits are exact. `stream`: write past the caches. */
struct fl_functions {
    int (*weighted_mean)(void *output, const uintptr_t *inputs, size_t n_inputs, size_t count, const double *a,
                         double total, double *scratch, int spare, int stream);
    void (*accumulate)(double *sums, const uintptr_t *inputs, size_t n_inputs, size_t count, const double *a,
                       int start, int spare);
    int (*divide)(void *output, const double *sums, size_t count, double total);
    /* These return a status. */
    int (*exact_mean)(struct fl_digits *digits, void *output, const uintptr_t *inputs, size_t n_inputs, size_t count,
                      const double *high, const double *low, double total);
    int (*deposit)(const struct fl_digits *digits, const uintptr_t *inputs, size_t start, size_t n, size_t n_inputs,
                   const double *high, const double *low);
    void (*exact_divide)(const struct fl_digits *digits, void *output, size_t n, double total);
};

/* Indexed by enum fl_dtype. */
extern const struct fl_functions fl_functions_baseline[FL_DTYPES];
extern const struct fl_functions fl_functions_avx2[FL_DTYPES];
extern const struct fl_functions fl_functions_avx2_fma[FL_DTYPES];
extern const struct fl_functions fl_functions_avx512[FL_DTYPES];

typedef int fl_find_function(int dtype, void *output, const void *input, size_t count, int stream);
fl_find_function fl_find_not_finite_baseline, fl_find_not_finite_avx2, fl_find_not_finite_avx2_fma,
    fl_find_not_finite_avx512;
typedef uint64_t fl_read_function(const void *data, size_t size);
fl_read_function fl_read_baseline, fl_read_avx2, fl_read_avx2_fma, fl_read_avx512;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(FL_SCALAR)
#define FL_HAVE_AVX 1
#else
#define FL_HAVE_AVX 0
#endif

#endif
