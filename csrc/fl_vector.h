/* Vectors of FL_BYTES bytes, by the vector extensions of GCC and Clang, and the conversions between every dtype and
 * float64 on them. Each instruction set's file defines FL_BYTES (16 or 32) and FL_TARGET and includes this once. Other
 * compilers get the same code on vectors of one lane, which are plain numbers.
 *
 * Every conversion to float64 is exact. Every store rounds a float64 mean once, float16 and bfloat16 by way of float32,
 * as the numpy kernel does. NaN and infinity stay what they are, so that the caller can tell from a result that an
 * input was not finite.
 */
#ifndef FL_VECTOR_H
#define FL_VECTOR_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef FL_SCALAR
#if defined(__GNUC__)
#define FL_SCALAR 0
#else
#define FL_SCALAR 1
#endif
#endif

#if FL_SCALAR
enum { FL_LANES = 1 };
#define FL_VECTOR(type, element, bytes) typedef element type
#define FL_INLINE static inline FL_TARGET
#else
enum { FL_LANES = FL_BYTES / 8 }; /* float64s in a vector */
#define FL_VECTOR(type, element, bytes) typedef element type __attribute__((vector_size(bytes)))
#define FL_INLINE static inline __attribute__((always_inline)) FL_TARGET
#endif

FL_VECTOR(fl_f64, double, FL_BYTES);
FL_VECTOR(fl_i64, int64_t, FL_BYTES);
FL_VECTOR(fl_u64, uint64_t, FL_BYTES);
FL_VECTOR(fl_f32, float, FL_BYTES / 2);
FL_VECTOR(fl_i32, int32_t, FL_BYTES / 2);
FL_VECTOR(fl_u32, uint32_t, FL_BYTES / 2);
FL_VECTOR(fl_i16, int16_t, FL_BYTES / 4);
FL_VECTOR(fl_u16, uint16_t, FL_BYTES / 4);
FL_VECTOR(fl_i8, int8_t, FL_BYTES / 8);
FL_VECTOR(fl_u8, uint8_t, FL_BYTES / 8);

/* The values of x as another type, lane by lane; and all lanes ones where a condition holds, else zeros. */
#if FL_SCALAR
#define FL_CONVERT(x, type) ((type)(x))
#define FL_MASK(condition, type) ((type)-(condition))
#else
#define FL_CONVERT(x, type) __builtin_convertvector(x, type)
#define FL_MASK(condition, type) ((type)(condition))
#endif

/* The bits of x as another type of the same size. */
#define FL_BITS(name, from, to)                                                                                \
    FL_INLINE to name(from x)                                                                                  \
    {                                                                                                          \
        to y;                                                                                                  \
        memcpy(&y, &x, sizeof y);                                                                              \
        return y;                                                                                              \
    }
FL_BITS(fl_f64_bits, fl_f64, fl_u64)
FL_BITS(fl_f64_of_bits, fl_u64, fl_f64)
FL_BITS(fl_f32_bits, fl_f32, fl_u32)
FL_BITS(fl_f32_of_bits, fl_u32, fl_f32)
#undef FL_BITS

/* Arrays are aligned to their elements, not to vectors: memcpy is the unaligned load and store. */
#define FL_MEMORY(vector, element)                                                                             \
    FL_INLINE vector vector##_read(const element *p)                                                           \
    {                                                                                                          \
        vector v;                                                                                              \
        memcpy(&v, p, sizeof v);                                                                               \
        return v;                                                                                              \
    }                                                                                                          \
    FL_INLINE void vector##_write(element *p, vector v)                                                        \
    {                                                                                                          \
        memcpy(p, &v, sizeof v);                                                                               \
    }
FL_MEMORY(fl_f64, double)
FL_MEMORY(fl_i64, int64_t)
FL_MEMORY(fl_u64, uint64_t)
FL_MEMORY(fl_f32, float)
FL_MEMORY(fl_i32, int32_t)
FL_MEMORY(fl_u32, uint32_t)
FL_MEMORY(fl_i16, int16_t)
FL_MEMORY(fl_u16, uint16_t)
FL_MEMORY(fl_i8, int8_t)
FL_MEMORY(fl_u8, uint8_t)
#undef FL_MEMORY

/* mask ? a : b, lane by lane. */
FL_INLINE fl_u32 fl_select_u32(fl_u32 mask, fl_u32 a, fl_u32 b)
{
    return (mask & a) | (~mask & b);
}

FL_INLINE fl_f64 fl_select_f64(fl_u64 mask, fl_f64 a, fl_f64 b)
{
    return fl_f64_of_bits((mask & fl_f64_bits(a)) | (~mask & fl_f64_bits(b)));
}

/* The mean of finite values is finite; only its rounding could leave the range. */
FL_INLINE fl_f64 fl_mean(fl_f64 sums, double total)
{
    fl_f64 mean = sums / total, largest = (fl_f64){0} + DBL_MAX;
    mean = fl_select_f64(FL_MASK(mean > largest, fl_u64), largest, mean);
    return fl_select_f64(FL_MASK(mean < -largest, fl_u64), -largest, mean);
}

/* Half to even: adding 2^52 to the magnitude leaves no room for a fraction. Larger values have none. */
FL_INLINE fl_f64 fl_rint(fl_f64 x)
{
    fl_u64 sign = fl_f64_bits(x) & 0x8000000000000000u;
    fl_f64 magnitude = fl_f64_of_bits(fl_f64_bits(x) ^ sign), shift = (fl_f64){0} + 0x1p52;
    fl_f64 rounded = fl_select_f64(FL_MASK(magnitude < shift, fl_u64), (magnitude + shift) - shift, magnitude);
    return fl_f64_of_bits(fl_f64_bits(rounded) | sign);
}

FL_INLINE fl_f64 fl_load_float64(const double *p)
{
    return fl_f64_read(p);
}
FL_INLINE void fl_store_float64(double *p, fl_f64 mean)
{
    fl_f64_write(p, mean);
}

FL_INLINE fl_f64 fl_load_float32(const float *p)
{
    return FL_CONVERT(fl_f32_read(p), fl_f64);
}
FL_INLINE void fl_store_float32(float *p, fl_f64 mean)
{
    fl_f32_write(p, FL_CONVERT(mean, fl_f32));
}

FL_INLINE fl_f64 fl_load_bfloat16(const uint16_t *p)
{
    return FL_CONVERT(fl_f32_of_bits(FL_CONVERT(fl_u16_read(p), fl_u32) << 16), fl_f64);
}
FL_INLINE void fl_store_bfloat16(uint16_t *p, fl_f64 mean)
{
    fl_u32 bits = fl_f32_bits(FL_CONVERT(mean, fl_f32));
    fl_u32 nan = FL_MASK((bits & 0x7fffffffu) > 0x7f800000u, fl_u32); /* rounding could carry into the sign */
    fl_u32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    fl_u16_write(p, FL_CONVERT(fl_select_u32(nan, bits | 0x00400000u, rounded) >> 16, fl_u16));
}

FL_INLINE fl_f64 fl_load_float16(const uint16_t *p)
{
    fl_u32 h = FL_CONVERT(fl_u16_read(p), fl_u32);
    fl_u32 magnitude = h & 0x7fffu, shifted = magnitude << 13;
    /* Shifted into place the exponent is too small by 112; multiplying by 2^112 mends normals and subnormals. */
    fl_u32 finite = fl_f32_bits(fl_f32_of_bits(shifted) * 0x1p112f);
    fl_u32 bits = fl_select_u32(FL_MASK(magnitude >= 0x7c00u, fl_u32), shifted | 0x7f800000u, finite);
    return FL_CONVERT(fl_f32_of_bits(bits | ((h & 0x8000u) << 16)), fl_f64);
}
FL_INLINE void fl_store_float16(uint16_t *p, fl_f64 mean)
{
    fl_u32 bits = fl_f32_bits(FL_CONVERT(mean, fl_f32));
    fl_u32 sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    /* Below 2^-14 a float16 is a multiple of 2^-24, which is half an ulp of 1: adding 0.5 rounds to it. */
    fl_u32 tiny = fl_f32_bits(fl_f32_of_bits(magnitude) + 0.5f) - 0x3f000000u;
    /* Else round half to even on the 13 bits that go, and rebias the exponent. */
    fl_u32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    fl_u32 nan = FL_MASK(magnitude > 0x7f800000u, fl_u32) & 0x0200u;
    fl_u32 half = fl_select_u32(FL_MASK(magnitude < 0x38800000u, fl_u32), tiny, normal);
    half = fl_select_u32(FL_MASK(magnitude >= 0x47800000u, fl_u32), nan | 0x7c00u, half);
    fl_u16_write(p, FL_CONVERT(half | sign, fl_u16));
}

FL_INLINE fl_f64 fl_load_bool(const uint8_t *p)
{
    return FL_CONVERT(FL_CONVERT(FL_MASK(fl_u8_read(p) != 0, fl_u8) & 1, fl_i32), fl_f64);
}
FL_INLINE void fl_store_bool(uint8_t *p, fl_f64 mean)
{
    fl_u64 set = FL_MASK(fl_rint(mean) != 0.0, fl_u64) & 1;
    fl_u8_write(p, FL_CONVERT(set, fl_u8));
}

/* Integers by way of an integer type that the machine converts to and from float64. */
#define FL_INTEGER(name, element, vector, wide)                                                                \
    FL_INLINE fl_f64 fl_load_##name(const element *p)                                                          \
    {                                                                                                          \
        return FL_CONVERT(FL_CONVERT(vector##_read(p), wide), fl_f64);                                         \
    }                                                                                                          \
    FL_INLINE void fl_store_##name(element *p, fl_f64 mean)                                                    \
    {                                                                                                          \
        vector##_write(p, FL_CONVERT(FL_CONVERT(fl_rint(mean), wide), vector));                                \
    }
FL_INTEGER(int8, int8_t, fl_i8, fl_i32)
FL_INTEGER(int16, int16_t, fl_i16, fl_i32)
FL_INTEGER(int32, int32_t, fl_i32, fl_i32)
FL_INTEGER(int64, int64_t, fl_i64, fl_i64)
FL_INTEGER(uint8, uint8_t, fl_u8, fl_i32)
FL_INTEGER(uint16, uint16_t, fl_u16, fl_i32)
FL_INTEGER(uint32, uint32_t, fl_u32, fl_i64)
FL_INTEGER(uint64, uint64_t, fl_u64, fl_u64)
#undef FL_INTEGER

#endif
