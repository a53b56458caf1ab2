/* From the public functions to those of an instruction set, in the default floating-point environment. */
#include <fenv.h>
#include <math.h>

#include "fl_sets.h"

#if FL_HAVE_AVX2
#include <cpuid.h>

/* Not every compiler's __builtin_cpu_supports knows it. Beside AVX2 the system saves its registers. Asked once: under a
 * hypervisor the instruction takes as long as a small model's mean. */
static int fl_cpu_has_f16c(void)
{
    static _Atomic int known; /* 0 not yet, 1 no, 2 yes */
    if (known == 0) {
        unsigned eax, ebx, ecx, edx;
        known = 1 + (__get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0);
    }
    return known == 2;
}
#endif

const char *fl_set_name(int set)
{
    switch (set) {
    case FL_BASELINE:
#if defined(FL_SCALAR) || !defined(__GNUC__)
        return "scalar";
#elif defined(__x86_64__)
        return "sse2";
#elif defined(__aarch64__)
        return "neon";
#else
        return "baseline";
#endif
#if FL_HAVE_AVX2
    case FL_AVX2:
        return "avx2";
    case FL_AVX2_F16C:
        return "avx2+f16c";
#endif
    default:
        return NULL;
    }
}

int fl_set_usable(int set)
{
    if (set == FL_BASELINE)
        return 1;
#if FL_HAVE_AVX2
    /* Looks at CPUID and, by XGETBV, at whether the operating system saves the registers. */
    __builtin_cpu_init();
    if (set == FL_AVX2)
        return __builtin_cpu_supports("avx2") != 0;
    if (set == FL_AVX2_F16C)
        return __builtin_cpu_supports("avx2") != 0 && fl_cpu_has_f16c();
#endif
    return 0;
}

static const struct fl_functions *fl_functions(int set, int dtype)
{
#if FL_HAVE_AVX2
    if (set == FL_AVX2_F16C && dtype == FL_FLOAT16)
        return fl_functions_f16c + dtype;
    if (set != FL_BASELINE)
        return fl_functions_avx2 + dtype;
#endif
    (void)set;
    return fl_functions_baseline + dtype;
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
                     const int32_t *dtypes, const double *a, double total, uint8_t *not_finite)
{
    int status = n_inputs == 0 ? FL_NO_INPUT : fl_check(set, n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += n_inputs + 1)
        not_finite[p] = (uint8_t)fl_functions(set, dtypes[p])->weighted_mean(
            (void *)pointers[0], pointers + 1, n_inputs, counts[p], a, total);
    fl_leave(&env);
    return FL_OK;
}

int fl_accumulate(int set, size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
                  const int32_t *dtypes, const double *a, int start)
{
    int status = n_inputs == 0 ? FL_NO_INPUT : fl_check(set, n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += n_inputs + 1)
        fl_functions(set, dtypes[p])->accumulate((double *)pointers[0], pointers + 1, n_inputs, counts[p], a, start);
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
    for (size_t p = 0; p < n_pieces; p++, pointers += 2)
        not_finite[p] = (uint8_t)fl_functions(set, dtypes[p])->divide((void *)pointers[0], (const double *)pointers[1],
                                                                     counts[p], total);
    fl_leave(&env);
    return FL_OK;
}

static int fl_digits_init(struct fl_digits *digits, int top, size_t n_digits, uint8_t *touched)
{
    if (n_digits == 0 || n_digits > FL_DIGITS)
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
    for (size_t p = 0; p < n_pieces && status == FL_OK; p++, pointers += n_inputs + 1)
        status = fl_functions(set, dtypes[p])->exact_mean(&digits, (void *)pointers[0], pointers + 1, n_inputs, counts[p],
                                                         high, low, total);
    fl_leave(&env);
    return status;
}

int fl_find_not_finite(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts,
                       const int32_t *dtypes, uint8_t *not_finite)
{
    int status = fl_check(set, n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    int (*find)(int, const void *, size_t) = fl_find_not_finite_baseline;
#if FL_HAVE_AVX2
    if (set != FL_BASELINE)
        find = fl_find_not_finite_avx2;
#endif
    for (size_t p = 0; p < n_pieces; p++)
        not_finite[p] = (uint8_t)find(dtypes[p], (const void *)pointers[p], counts[p]);
    return FL_OK;
}

uint64_t fl_read(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *sizes)
{
    uint64_t (*read)(const void *, size_t) = fl_read_baseline, sum = 0;
#if FL_HAVE_AVX2
    if (set != FL_BASELINE && fl_set_usable(set))
        read = fl_read_avx2;
#endif
    (void)set;
    for (size_t p = 0; p < n_pieces; p++)
        sum += read((const void *)pointers[p], sizes[p]);
    return sum;
}
