/* From the public functions to those of an instruction set, in the default floating-point environment. */
#include <fenv.h>

#include "fl_sets.h"

static const struct fl_functions *fl_table(int set)
{
    if (set == FL_BASELINE)
        return fl_functions_baseline;
#if FL_HAVE_AVX2
    if (set == FL_AVX2)
        return fl_functions_avx2;
#endif
    return NULL;
}

const char *fl_set_name(int set)
{
    if (set == FL_BASELINE) {
#if defined(__x86_64__)
        return "sse2";
#elif defined(__aarch64__)
        return "neon";
#else
        return "baseline";
#endif
    }
    return set == FL_AVX2 && FL_HAVE_AVX2 ? "avx2" : NULL;
}

int fl_set_usable(int set)
{
    if (set == FL_BASELINE)
        return 1;
#if FL_HAVE_AVX2
    /* Looks at CPUID and, by XGETBV, at whether the operating system saves the registers. */
    if (set == FL_AVX2) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") != 0;
    }
#endif
    return 0;
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
    if (fl_table(set) == NULL || !fl_set_usable(set))
        return FL_BAD_SET;
    for (size_t p = 0; p < n_pieces; p++)
        if (dtypes[p] < 0 || dtypes[p] >= FL_DTYPES)
            return FL_BAD_DTYPE;
    return FL_OK;
}

int fl_weighted_mean(int set, size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
                     const int32_t *dtypes, const double *a, double total)
{
    int status = n_inputs == 0 ? FL_NO_INPUT : fl_check(set, n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    const struct fl_functions *table = fl_table(set);
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += n_inputs + 1)
        table[dtypes[p]].weighted_mean((void *)pointers[0], pointers + 1, n_inputs, counts[p], a, total);
    fl_leave(&env);
    return FL_OK;
}

int fl_accumulate(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts,
                  const int32_t *dtypes, double a)
{
    int status = fl_check(set, n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    const struct fl_functions *table = fl_table(set);
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += 2)
        table[dtypes[p]].accumulate((double *)pointers[0], (const void *)pointers[1], counts[p], a);
    fl_leave(&env);
    return FL_OK;
}

int fl_divide(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
              double total)
{
    int status = fl_check(set, n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    const struct fl_functions *table = fl_table(set);
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += 2)
        table[dtypes[p]].divide((void *)pointers[0], (const double *)pointers[1], counts[p], total);
    fl_leave(&env);
    return FL_OK;
}
