/* From the public functions to those of an instruction set, in the default floating-point environment. */
#include <fenv.h>

#include "fl_sets.h"

#if FL_HAVE_AVX2
#include <cpuid.h>

/* Not every compiler's __builtin_cpu_supports knows it. Beside AVX2 the system saves its registers. */
static int fl_cpu_has_f16c(void)
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
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
