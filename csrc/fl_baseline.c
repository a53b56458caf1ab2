/* The baseline instruction set of the machine: stamps the templates for every dtype and picks by dtype. */
#include "fl_kernels.h"

#include <float.h>
#include <fenv.h>

#include "fl_convert.h"

#ifdef __FAST_MATH__
#error "fed_learn promises the same bits everywhere: do not compile it with -ffast-math"
#endif
#if FLT_EVAL_METHOD != 0
#error "fed_learn needs float64 arithmetic without excess precision (on 32-bit x86: -msse2 -mfpmath=sse)"
#endif

enum { FL_TILE = 1024 }; /* elements: 8 KiB of sums, which stay in the first-level cache */

/* The mean of finite values is finite; only its rounding could leave the range. */
static inline double fl_mean(double sum, double total)
{
    double mean = sum / total;
    mean = mean > DBL_MAX ? DBL_MAX : mean;
    return mean < -DBL_MAX ? -DBL_MAX : mean;
}

#define FL_NAME(op) fl_##op##_float16
#define FL_TYPE uint16_t
#define FL_LOAD(x) fl_load_float16(x)
#define FL_STORE(m) fl_store_float16(m)
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_bfloat16
#define FL_TYPE uint16_t
#define FL_LOAD(x) fl_load_bfloat16(x)
#define FL_STORE(m) fl_store_bfloat16(m)
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_float32
#define FL_TYPE float
#define FL_LOAD(x) ((double)(x))
#define FL_STORE(m) ((float)(m))
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_float64
#define FL_TYPE double
#define FL_LOAD(x) (x)
#define FL_STORE(m) (m)
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_bool
#define FL_TYPE uint8_t
#define FL_LOAD(x) fl_load_bool(x)
#define FL_STORE(m) ((uint8_t)(rint(m) != 0.0))
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_int8
#define FL_TYPE int8_t
#define FL_LOAD(x) ((double)(x))
#define FL_STORE(m) ((int8_t)rint(m))
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_int16
#define FL_TYPE int16_t
#define FL_LOAD(x) ((double)(x))
#define FL_STORE(m) ((int16_t)rint(m))
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_int32
#define FL_TYPE int32_t
#define FL_LOAD(x) ((double)(x))
#define FL_STORE(m) ((int32_t)rint(m))
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_int64
#define FL_TYPE int64_t
#define FL_LOAD(x) ((double)(x))
#define FL_STORE(m) ((int64_t)rint(m))
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_uint8
#define FL_TYPE uint8_t
#define FL_LOAD(x) ((double)(x))
#define FL_STORE(m) ((uint8_t)rint(m))
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_uint16
#define FL_TYPE uint16_t
#define FL_LOAD(x) ((double)(x))
#define FL_STORE(m) ((uint16_t)rint(m))
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_uint32
#define FL_TYPE uint32_t
#define FL_LOAD(x) ((double)(x))
#define FL_STORE(m) ((uint32_t)rint(m))
#include "fl_weighted_sum.inc"

#define FL_NAME(op) fl_##op##_uint64
#define FL_TYPE uint64_t
#define FL_LOAD(x) ((double)(x))
#define FL_STORE(m) ((uint64_t)rint(m))
#include "fl_weighted_sum.inc"

#define FL_EACH_DTYPE(X)                                                                                     \
    X(FL_FLOAT16, uint16_t, float16)                                                                         \
    X(FL_BFLOAT16, uint16_t, bfloat16)                                                                       \
    X(FL_FLOAT32, float, float32)                                                                            \
    X(FL_FLOAT64, double, float64)                                                                           \
    X(FL_BOOL, uint8_t, bool)                                                                                \
    X(FL_INT8, int8_t, int8)                                                                                 \
    X(FL_INT16, int16_t, int16)                                                                              \
    X(FL_INT32, int32_t, int32)                                                                              \
    X(FL_INT64, int64_t, int64)                                                                              \
    X(FL_UINT8, uint8_t, uint8)                                                                              \
    X(FL_UINT16, uint16_t, uint16)                                                                           \
    X(FL_UINT32, uint32_t, uint32)                                                                           \
    X(FL_UINT64, uint64_t, uint64)

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

static int fl_check_dtypes(size_t n_pieces, const int32_t *dtypes)
{
    for (size_t p = 0; p < n_pieces; p++)
        if (dtypes[p] < 0 || dtypes[p] >= FL_DTYPES)
            return FL_BAD_DTYPE;
    return FL_OK;
}

int fl_weighted_mean(size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
                     const int32_t *dtypes, const double *weights, double total)
{
    int status = n_inputs == 0 ? FL_NO_INPUT : fl_check_dtypes(n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += n_inputs + 1)
        switch (dtypes[p]) {
#define X(code, type, name)                                                                                  \
    case code:                                                                                               \
        fl_weighted_mean_##name((type *)pointers[0], pointers + 1, n_inputs, counts[p], weights, total);     \
        break;
            FL_EACH_DTYPE(X)
#undef X
        }
    fl_leave(&env);
    return FL_OK;
}

int fl_accumulate(size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
                  double weight)
{
    int status = fl_check_dtypes(n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += 2)
        switch (dtypes[p]) {
#define X(code, type, name)                                                                                  \
    case code:                                                                                               \
        fl_accumulate_##name((double *)pointers[0], (const type *)pointers[1], counts[p], weight);           \
        break;
            FL_EACH_DTYPE(X)
#undef X
        }
    fl_leave(&env);
    return FL_OK;
}

int fl_divide(size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
              double total)
{
    int status = fl_check_dtypes(n_pieces, dtypes);
    if (status != FL_OK)
        return status;
    fenv_t env;
    fl_enter(&env);
    for (size_t p = 0; p < n_pieces; p++, pointers += 2)
        switch (dtypes[p]) {
#define X(code, type, name)                                                                                  \
    case code:                                                                                               \
        fl_divide_##name((type *)pointers[0], (const double *)pointers[1], counts[p], total);                \
        break;
            FL_EACH_DTYPE(X)
#undef X
        }
    fl_leave(&env);
    return FL_OK;
}
