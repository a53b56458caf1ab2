/* The means of fed_learn, one element after the other, from the contract: what tests compare the kernels with. */
#ifndef REFERENCE_H
#define REFERENCE_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "fl_kernels.h"

enum { FLOATS = FL_FLOAT64 + 1 };
static const size_t ITEMS[FL_DTYPES] = {2, 2, 4, 8, 1, 1, 2, 4, 8, 1, 2, 4, 8}; /* bytes of an element */

/* The digits of exact sums: from well above the largest product of the tests to well below the last bit of one. */
enum { DIGIT = 44, TOP = 17, N_DIGITS = 40, LOWEST = TOP - N_DIGITS + 1 };

/* The bits of an element, alike on machines of either byte order. */
static uint64_t element(int dtype, const void *array, size_t i)
{
    switch (ITEMS[dtype]) {
    case 1: return ((const uint8_t *)array)[i];
    case 2: return ((const uint16_t *)array)[i];
    case 4: { uint32_t bits; memcpy(&bits, (const char *)array + 4 * i, 4); return bits; }
    default: { uint64_t bits; memcpy(&bits, (const char *)array + 8 * i, 8); return bits; }
    }
}

static void set_element(int dtype, void *array, size_t i, uint64_t bits)
{
    uint16_t bits16 = (uint16_t)bits;
    uint32_t bits32 = (uint32_t)bits;
    switch (ITEMS[dtype]) {
    case 1: ((uint8_t *)array)[i] = (uint8_t)bits; break;
    case 2: memcpy((char *)array + 2 * i, &bits16, 2); break;
    case 4: memcpy((char *)array + 4 * i, &bits32, 4); break;
    default: memcpy((char *)array + 8 * i, &bits, 8);
    }
}

struct format {
    int exponent_bits, fraction_bits;
};
static const struct format FORMATS[FLOATS] = {{5, 10}, {8, 7}, {8, 23}, {11, 52}};

/* What such bits say. */
static double value(int dtype, uint64_t bits)
{
    float single;
    double x;
    switch (dtype) {
    case FL_FLOAT16: case FL_BFLOAT16: {
        struct format f = FORMATS[dtype];
        int most = (1 << f.exponent_bits) - 1, bias = most >> 1;
        int exponent = (int)(bits >> f.fraction_bits) & most, fraction = (int)(bits & ((1u << f.fraction_bits) - 1));
        if (exponent == most)
            x = fraction ? NAN : INFINITY;
        else if (exponent == 0)
            x = ldexp(fraction, 1 - bias - f.fraction_bits);
        else
            x = ldexp(fraction + (1 << f.fraction_bits), exponent - bias - f.fraction_bits);
        return bits >> 15 ? -x : x;
    }
    case FL_FLOAT32: { uint32_t bits32 = (uint32_t)bits; memcpy(&single, &bits32, 4); return single; }
    case FL_FLOAT64: memcpy(&x, &bits, 8); return x;
    case FL_BOOL: return bits != 0;
    case FL_INT8: return (int8_t)bits;
    case FL_INT16: return (int16_t)bits;
    case FL_INT32: return (int32_t)bits;
    case FL_INT64: return (double)(int64_t)bits;
    default: return (double)bits;
    }
}

/* The bits of a float, with one NaN for all. */
static uint64_t one_nan(int dtype, uint64_t bits)
{
    return dtype < FLOATS && isnan(value(dtype, bits)) ? UINT64_MAX : bits;
}

/* To float16 or bfloat16: half to even, of units in the last place. */
static uint64_t narrowed(int dtype, double x)
{
    struct format f = FORMATS[dtype];
    int bias = (1 << (f.exponent_bits - 1)) - 1, exponent;
    uint64_t infinity = (uint64_t)(2 * bias + 1) << f.fraction_bits, sign = signbit(x) ? 0x8000 : 0;
    if (isnan(x))
        return infinity + 1;
    if (isinf(x) || x == 0)
        return (x == 0 ? 0 : infinity) | sign;
    frexp(x, &exponent); /* fraction from 0.5 to 1 */
    exponent = exponent - 1 < 1 - bias ? 1 - bias : exponent - 1;
    double units = nearbyint(ldexp(fabs(x), f.fraction_bits - exponent));
    /* The leading one of a normal number, and what rounding carries, both add one to the exponent. */
    uint64_t bits = ((uint64_t)(exponent + bias - 1) << f.fraction_bits) + (uint64_t)units;
    return (bits < infinity ? bits : infinity) | sign;
}

/* The bits of round(sum / total): the mean of finite values is finite, so float64 keeps within its range. */
static uint64_t rounded_mean(int dtype, double sum, double total)
{
    double mean = sum / total;
    if (fabs(mean) > DBL_MAX)
        mean = copysign(DBL_MAX, mean);
    float single = dtype < FL_FLOAT64 ? (float)mean : 0;
    uint64_t bits = 0;
    switch (dtype) {
    case FL_FLOAT16: case FL_BFLOAT16: return one_nan(dtype, narrowed(dtype, single));
    case FL_FLOAT32: { uint32_t bits32; memcpy(&bits32, &single, 4); return one_nan(dtype, bits32); }
    case FL_FLOAT64: memcpy(&bits, &mean, 8); return one_nan(dtype, bits);
    case FL_BOOL: return nearbyint(mean) != 0;
    default: return (uint64_t)(int64_t)nearbyint(mean) & (UINT64_MAX >> (64 - 8 * ITEMS[dtype]));
    }
}

/* The bits of one + other or, with `minus`, one - other, rounded at once. Says whether it is finite and,
 * of integers, fits and comes of none beyond 2^62. */
static uint64_t combined(int dtype, uint64_t one, uint64_t other, int minus, int *right)
{
    uint64_t bits = 0;
    if (dtype < FLOATS) {
        double x = value(dtype, one), y = value(dtype, other), sum = minus ? x - y : x + y;
        float single = (float)sum;
        uint32_t bits32;
        memcpy(&bits32, &single, 4);
        memcpy(&bits, &sum, 8);
        bits = dtype < FL_FLOAT32 ? narrowed(dtype, sum) : dtype == FL_FLOAT32 ? bits32 : bits;
        *right = isfinite(value(dtype, bits)) != 0;
        return one_nan(dtype, bits);
    }
    unsigned unused = (unsigned)(64 - 8 * ITEMS[dtype]);
    __int128 x = (int64_t)(one << unused) >> unused, y = (int64_t)(other << unused) >> unused;
    __int128 sum = minus ? x - y : x + y, most = (__int128)1 << 62, limit = (__int128)1 << (8 * ITEMS[dtype] - 1);
    *right = -limit <= sum && sum < limit && -most <= x && x <= most && -most <= y && y <= most;
    return (uint64_t)sum & (UINT64_MAX >> unused);
}

/* The sum of products in order, each product and each sum rounded. */
static double summed(int dtype, const uintptr_t *inputs, size_t n_inputs, const double *a, size_t i)
{
    double sum = a[0] * value(dtype, element(dtype, (const void *)inputs[0], i));
    for (size_t k = 1; k < n_inputs; k++) {
        double product = a[k] * value(dtype, element(dtype, (const void *)inputs[k], i));
        sum += product;
    }
    return sum;
}

/* Adds units * 2^exponent to digits, from the lowest. */
static void deposit(int64_t *digits, __int128 units, int exponent)
{
    int b = (exponent - DIGIT * LOWEST) / DIGIT;
    units *= (__int128)1 << (exponent - DIGIT * LOWEST) % DIGIT;
    for (; units != 0 && units != -1; b++, units >>= DIGIT)
        digits[b] += (int64_t)(units & (((int64_t)1 << DIGIT) - 1));
    digits[b] += (int64_t)units;
}

/* The sum of exact products, an integer of many digits, which are added up from the lowest. */
static double summed_exactly(int dtype, const uintptr_t *inputs, size_t n_inputs, const double *a, size_t i)
{
    int64_t digits[N_DIGITS + 2] = {0}, carry = 0, base = (int64_t)1 << DIGIT;
    double sum = 0.0;
    for (size_t k = 0; k < n_inputs; k++) {
        int of_a, of_x;
        int64_t whole_a = (int64_t)ldexp(frexp(a[k], &of_a), 53);
        int64_t whole_x = (int64_t)ldexp(frexp(value(dtype, element(dtype, (const void *)inputs[k], i)), &of_x), 53);
        deposit(digits, (__int128)whole_x * (whole_a >> 27), of_a + of_x - 106 + 27);
        deposit(digits, (__int128)whole_x * (whole_a & 0x7ffffff), of_a + of_x - 106);
    }
    for (int b = 0; b < N_DIGITS + 2; b++) {
        int64_t digit = digits[b] + carry;
        carry = (digit + base / 2) >> DIGIT;
        sum += ldexp((double)(digit - carry * base), DIGIT * (LOWEST + b));
    }
    return sum;
}

#endif
