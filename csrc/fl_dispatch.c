/* From the public functions to those of an instruction set, in the default floating-point environment. */
#include <fenv.h>
#include <math.h>
#include <string.h>

#include "fl_sets.h"

#if FL_HAVE_AVX
#include <cpuid.h>
#endif

/* What the processor has. __builtin_cpu_supports asks by XGETBV whether the operating system saves the registers, but
 * not every compiler's knows F16C, which uses the registers of AVX2. */
static int fl_has_baseline(void)
{
    return 1;
}
#if FL_HAVE_AVX
static int fl_has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") != 0;
}
static int fl_has_avx2_fma(void)
{
    unsigned eax, ebx, ecx, edx;
    return fl_has_avx2() && __builtin_cpu_supports("fma") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
           (ecx & bit_F16C) != 0;
}
static int fl_has_avx512(void)
{
    return fl_has_avx2_fma() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

/* The instruction sets of this build. */
static const struct {
    int (*usable)(void);
    const struct fl_set_table *table;
} fl_rows[FL_SETS] = {
    [FL_BASELINE] = {fl_has_baseline, &fl_set_baseline},
#if FL_HAVE_AVX
    [FL_AVX2] = {fl_has_avx2, &fl_set_avx2},
    [FL_AVX2_FMA] = {fl_has_avx2_fma, &fl_set_avx2_fma},
    [FL_AVX512] = {fl_has_avx512, &fl_set_avx512},
#endif
};

static int fl_is_built(int set)
{
    return set >= 0 && set < FL_SETS && fl_rows[set].table;
}

const char *fl_set_name(int set)
{
    return fl_is_built(set) ? fl_rows[set].table->name : NULL;
}

int fl_set_usable(int set)
{
    /* Asked once: under a hypervisor the instruction takes as long as a small model's mean. */
    static _Atomic int known[FL_SETS]; /* 0 not yet, 1 no, 2 yes */
    if (!fl_is_built(set))
        return 0;
    if (known[set] == 0)
        known[set] = 1 + fl_rows[set].usable();
    return known[set] == 2;
}

/* Of a set and a dtype that were checked. */
static const struct fl_functions *fl_functions(int set, int dtype)
{
    return &fl_rows[set].table->functions[dtype];
}

/* Products of float64 numbers `a` with inputs of at most so many significant bits are exact; 0 where none are for sure.
 * Inputs are numbers from 2^-149 to 2^128 in magnitude, so that such products neither underflow nor overflow. */
static int fl_spare(size_t n, const double *a)
{
    int most = 0;
    for (size_t k = 0; k < n; k++) {
        uint64_t bits;
        memcpy(&bits, a + k, sizeof bits);
        int exponent = (int)(bits >> 52 & 0x7ff) - 1023, used = 53;
        if (exponent < -800 || exponent > 890)
            return 0;
        for (bits |= (uint64_t)1 << 52; (bits & 1) == 0; bits >>= 1)
            used--;
        most = used > most ? used : most;
    }
    return 53 - most;
}

/* A process may have switched denormals off or changed the rounding: compute in the default environment, and put
 * back what was there. */
static void fl_enter(fenv_t *env)
{
    fegetenv(env);
    fesetenv(FE_DFL_ENV);
}

static void fl_leave(const fenv_t *env)
{
    fesetenv(env);
}

/* Whether the output of a call is not worth a place in the caches: from so many elements on. */
enum { FL_STREAMED = 1 << 20 };

static int fl_is_large(size_t n_pieces, const size_t *counts)
{
    size_t written = 0;
    for (size_t p = 0; p < n_pieces; p++)
        written += counts[p];
    return written >= FL_STREAMED;
}

/* Stores past the caches are not ordered with those of other threads until there is a fence. */
#if FL_HAVE_AVX
#define FL_FENCE() __builtin_ia32_sfence()
#else
#define FL_FENCE() ((void)0)
#endif

static int fl_check(int set, size_t n_pieces, const int32_t *dtypes)
{
    if (!fl_set_usable(set))
        return FL_BAD_SET;
    for (size_t p = 0; p < n_pieces; p++)
        if (dtypes[p] < 0 || dtypes[p] >= FL_DTYPES)
            return FL_BAD_DTYPE;
    return FL_OK;
}

int fl_weighted_mean(int set, size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
                     const int32_t *dtypes, const double *a, double total, double *scratch, uint8_t *not_finite)
{
    int status = n_inputs == 0 ? FL_NO_INPUT : fl_check(set, n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    int spare = fl_spare(n_inputs, a), stream = fl_is_large(n_pieces, counts);
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += n_inputs + 1) {
        const struct fl_functions *of = fl_functions(set, dtypes[p]);
        not_finite[p] = (uint8_t)of->weighted_mean((void *)pointers[0], pointers + 1, n_inputs, counts[p], a, total,
                                                   scratch, spare, stream);
    }
    FL_FENCE();
    fl_leave(&env);
    return FL_OK;
}

int fl_accumulate(int set, size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
                  const int32_t *dtypes, const double *a, int start)
{
    int status = n_inputs == 0 ? FL_NO_INPUT : fl_check(set, n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    int spare = fl_spare(n_inputs, a);
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += n_inputs + 1) {
        const struct fl_functions *of = fl_functions(set, dtypes[p]);
        of->accumulate((double *)pointers[0], pointers + 1, n_inputs, counts[p], a, start, spare);
    }
    fl_leave(&env);
    return FL_OK;
}

int fl_divide(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
              double total, uint8_t *not_finite)
{
    int status = fl_check(set, n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += 2) {
        const struct fl_functions *of = fl_functions(set, dtypes[p]);
        not_finite[p] = (uint8_t)of->divide((void *)pointers[0], (const double *)pointers[1], counts[p], total);
    }
    fl_leave(&env);
    return FL_OK;
}

/* Only floats and signed integers have differences. */
static int fl_check_differences(int set, size_t n_pieces, const int32_t *dtypes)
{
    int status = fl_check(set, n_pieces, dtypes);
    for (size_t p = 0; p < n_pieces && status == FL_OK; p++)
        if (!fl_functions(set, dtypes[p])->add)
            status = FL_BAD_DTYPE;
    return status;
}

static int fl_differences(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts,
                          const int32_t *dtypes, uint8_t *out_of_range, int subtract)
{
    int status = fl_check_differences(set, n_pieces, dtypes), stream = fl_is_large(n_pieces, counts);
    if (status != FL_OK)
        return status;
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += 3) {
        const struct fl_functions *of = fl_functions(set, dtypes[p]);
        const void *one = (const void *)pointers[1], *other = (const void *)pointers[2];
        void *output = (void *)pointers[0];
        out_of_range[p] = (uint8_t)(subtract ? of->subtract(output, one, other, counts[p], stream)
                                             : of->add(output, one, other, counts[p], stream));
    }
    FL_FENCE();
    fl_leave(&env);
    return FL_OK;
}

int fl_add(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
           uint8_t *out_of_range)
{
    return fl_differences(set, n_pieces, pointers, counts, dtypes, out_of_range, 0);
}

int fl_subtract(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
                uint8_t *out_of_range)
{
    return fl_differences(set, n_pieces, pointers, counts, dtypes, out_of_range, 1);
}

static int fl_digits_init(struct fl_digits *digits, int top, size_t n_digits, uint8_t *touched)
{
    if (n_digits == 0 || n_digits > FL_DIGITS)
        return FL_BAD_RANGE;
    /* Units and shifts are normal numbers: finite, and exact even where subnormals are switched off. */
    if (top > 22 || top < (int)n_digits - 24)
        return FL_BAD_RANGE;
    digits->n = n_digits;
    digits->touched = touched;
    for (size_t b = 0; b < n_digits; b++) {
        digits->units[b] = ldexp(1.0, FL_DIGIT * (top - (int)b));
        digits->shifts[b] = 0x1.8p52 * digits->units[b];
    }
    return FL_OK;
}

static void fl_digits_at(struct fl_digits *digits, const uintptr_t *rows, size_t offset)
{
    for (size_t b = 0; b < digits->n; b++)
        digits->rows[b] = (int64_t *)rows[b] + offset;
}

int fl_deposit(int set, size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
               const int32_t *dtypes, const size_t *offsets, int top, size_t n_digits, const uintptr_t *rows,
               const double *high, const double *low, uint8_t *touched)
{
    struct fl_digits digits;
    int status = fl_check(set, n_pieces, dtypes);
    status = status == FL_OK ? fl_digits_init(&digits, top, n_digits, touched) : status;
    if (status != FL_OK)
        return status;
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces && status == FL_OK; p++, pointers += n_inputs) {
        fl_digits_at(&digits, rows, offsets[p]);
        status = fl_functions(set, dtypes[p])->deposit(&digits, pointers, 0, counts[p], n_inputs, high, low);
    }
    fl_leave(&env);
    return status;
}

int fl_exact_divide(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
                    const size_t *offsets, int top, size_t n_digits, const uintptr_t *rows, double total)
{
    struct fl_digits digits;
    int status = fl_check(set, n_pieces, dtypes);
    status = status == FL_OK ? fl_digits_init(&digits, top, n_digits, NULL) : status;
    if (status != FL_OK)
        return status;
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++) {
        fl_digits_at(&digits, rows, offsets[p]);
        fl_functions(set, dtypes[p])->exact_divide(&digits, (void *)pointers[p], counts[p], total);
    }
    fl_leave(&env);
    return FL_OK;
}

int fl_exact_mean(int set, size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
                  const int32_t *dtypes, int top, size_t n_digits, int64_t *scratch, const double *high,
                  const double *low, double total)
{
    struct fl_digits digits;
    uint8_t touched[FL_DIGITS] = {0};
    int status = fl_check(set, n_pieces, dtypes);
    status = status == FL_OK ? fl_digits_init(&digits, top, n_digits, touched) : status;
    if (status != FL_OK)
        return status;
    for (size_t b = 0; b < n_digits; b++)
        digits.rows[b] = scratch + b * FL_EXACT_TILE;
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces && status == FL_OK; p++, pointers += n_inputs + 1) {
        const struct fl_functions *of = fl_functions(set, dtypes[p]);
        status = of->exact_mean(&digits, (void *)pointers[0], pointers + 1, n_inputs, counts[p], high, low, total);
    }
    fl_leave(&env);
    return status;
}

int fl_find_not_finite(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
                       uint8_t *not_finite)
{
    int status = fl_check(set, n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    const struct fl_set_table *table = fl_rows[set].table;
    for (size_t p = 0; p < n_pieces; p++)
        not_finite[p] = (uint8_t)table->find_not_finite(dtypes[p], NULL, (const void *)pointers[p], counts[p], 0);
    return FL_OK;
}

int fl_copy(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
            uint8_t *not_finite)
{
    int status = fl_check(set, n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    const struct fl_set_table *table = fl_rows[set].table;
    int stream = fl_is_large(n_pieces, counts);
    for (size_t p = 0; p < n_pieces; p++, pointers += 2)
        not_finite[p] = (uint8_t)table->find_not_finite(dtypes[p], (void *)pointers[0], (const void *)pointers[1],
                                                        counts[p], stream);
    FL_FENCE();
    return FL_OK;
}

uint64_t fl_read(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *sizes)
{
    const struct fl_set_table *table = fl_rows[fl_set_usable(set) ? set : FL_BASELINE].table;
    uint64_t sum = 0;
    for (size_t p = 0; p < n_pieces; p++)
        sum += table->read((const void *)pointers[p], sizes[p]);
    return sum;
}
