/* Element conversions: every dtype to float64 (exact) and a float64 mean to every dtype (one rounding).
 *
 * float16 and bfloat16 are rounded by way of float32, as the numpy kernel does. NaN and infinity stay what they are, so
 * that the caller can tell from a result that an input was not finite.
 */
#ifndef FL_CONVERT_H
#define FL_CONVERT_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float fl_float_of_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint32_t fl_bits_of_float(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static inline double fl_load_float16(uint16_t h)
{
    uint32_t magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) { /* infinity or NaN */
        double special = (double)fl_float_of_bits(0x7f800000u | (magnitude << 13));
        return (h & 0x8000u) ? -special : special;
    }
    /* Shifted into place the exponent is too small by 112; multiplying by 2^112 mends normals and subnormals. */
    float f = fl_float_of_bits(magnitude << 13) * 0x1p112f;
    return (h & 0x8000u) ? -(double)f : (double)f;
}

static inline uint16_t fl_store_float16(double mean)
{
    uint32_t bits = fl_bits_of_float((float)mean);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude < 0x38800000u) {
        /* Below 2^-14 a float16 is a multiple of 2^-24, which is half an ulp of 1: adding 0.5 rounds to it. */
        float f = fl_float_of_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (fl_bits_of_float(f) - 0x3f000000u));
    }
    if (magnitude >= 0x47800000u) /* 2^16 and more, infinity, NaN */
        return (uint16_t)(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
    /* Round half to even on the 13 bits that go, then rebias the exponent. */
    magnitude += 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((magnitude - 0x38000000u) >> 13));
}

static inline double fl_load_bfloat16(uint16_t b)
{
    return (double)fl_float_of_bits((uint32_t)b << 16);
}

static inline uint16_t fl_store_bfloat16(double mean)
{
    uint32_t bits = fl_bits_of_float((float)mean);
    if ((bits & 0x7fffffffu) > 0x7f800000u) /* NaN: rounding could carry into the sign */
        return (uint16_t)((bits >> 16) | 0x0040u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline double fl_load_bool(uint8_t b)
{
    return b != 0 ? 1.0 : 0.0;
}

#endif
