/* Vectors of FL_BYTES bytes, by the vector extensions of GCC and Clang, and the conversions between every dtype and
 * float64 on them. Each instruction set's file defines FL_BYTES (16, 32 or 64), FL_TARGET and, where it has F16C and
 * FMA, FL_FMA, and includes this once. Other compilers get the same code on vectors of one lane, which are plain
 * numbers.
 *
 * Every conversion to float64 is exact. Every store rounds a float64 mean once, float16 and bfloat16 by way of float32,
 * as the numpy kernel does; with `stream` it writes past the caches. NaN and infinity stay what they are, so that a sum
 * tells that an input was not finite.
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

#define FL_IS_AVX2 (FL_BYTES == 32 && !FL_SCALAR)
#define FL_IS_AVX512 (FL_BYTES == 64 && !FL_SCALAR)
#ifndef FL_FMA
#define FL_FMA 0
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

#if FL_IS_AVX2 || FL_IS_AVX512
#include <immintrin.h>
#endif

FL_VECTOR(fl_f64, double, FL_BYTES);
FL_VECTOR(fl_u64, uint64_t, FL_BYTES);
FL_VECTOR(fl_f32, float, FL_BYTES / 2);
FL_VECTOR(fl_i32, int32_t, FL_BYTES / 2);
FL_VECTOR(fl_u32, uint32_t, FL_BYTES / 2);
FL_VECTOR(fl_i16, int16_t, FL_BYTES / 4);
FL_VECTOR(fl_u16, uint16_t, FL_BYTES / 4);
FL_VECTOR(fl_i8, int8_t, FL_BYTES / 8);
FL_VECTOR(fl_u8, uint8_t, FL_BYTES / 8);

/* Asks for `size` bytes of memory that will soon be read; they may lie beyond the end of an array. */
enum { FL_LINE = 64 };
#if FL_SCALAR
#define FL_PREFETCH(start, size) ((void)(start))
#else
#define FL_PREFETCH(start, size)                                                                                       \
    for (uintptr_t fl_line = (uintptr_t)(start); fl_line < (uintptr_t)(start) + (size); fl_line += FL_LINE)            \
    __builtin_prefetch((const void *)fl_line)
#endif

/* The values of x as another type, lane by lane; and all lanes ones where a condition holds, else zeros. */
#if FL_SCALAR
#define FL_CONVERT(x, type) ((type)(x))
#define FL_MASK(condition, type) ((type)(-(condition)))
#else
#define FL_CONVERT(x, type) __builtin_convertvector(x, type)
#define FL_MASK(condition, type) ((type)(condition))
#endif

/* The bits of x as another type of the same size. */
#define FL_BIT_CAST(name, from, to)                                                                                    \
    FL_INLINE to name(from x)                                                                                          \
    {                                                                                                                  \
        to y;                                                                                                          \
        memcpy(&y, &x, sizeof y);                                                                                      \
        return y;                                                                                                      \
    }
FL_BIT_CAST(fl_f64_bits, fl_f64, fl_u64)
FL_BIT_CAST(fl_f64_of_bits, fl_u64, fl_f64)
FL_BIT_CAST(fl_f32_bits, fl_f32, fl_u32)
FL_BIT_CAST(fl_f32_of_bits, fl_u32, fl_f32)
#undef FL_BIT_CAST

/* Arrays are aligned to their elements, not to vectors: memcpy is the unaligned load and store. */
#define FL_MEMORY(vector, element)                                                                                     \
    FL_INLINE vector vector##_read(const element *p)                                                                   \
    {                                                                                                                  \
        vector v;                                                                                                      \
        memcpy(&v, p, sizeof v);                                                                                       \
        return v;                                                                                                      \
    }                                                                                                                  \
    FL_INLINE void vector##_write(element *p, vector v)                                                                \
    {                                                                                                                  \
        memcpy(p, &v, sizeof v);                                                                                       \
    }
FL_MEMORY(fl_f64, double)
FL_MEMORY(fl_u64, uint64_t)
FL_MEMORY(fl_f32, float)
FL_MEMORY(fl_i32, int32_t)
FL_MEMORY(fl_u32, uint32_t)
FL_MEMORY(fl_i16, int16_t)
FL_MEMORY(fl_u16, uint16_t)
FL_MEMORY(fl_i8, int8_t)
FL_MEMORY(fl_u8, uint8_t)
#undef FL_MEMORY

/* Writes a vector past the caches, at an address that is a multiple of its size: what will not be read again soon. The
 * line is then not read before it is written. */
#if FL_SCALAR || !defined(__SSE2__)
#define FL_STREAM(p, v) memcpy(p, &(v), sizeof(v))
#else
#include <emmintrin.h>
FL_INLINE void fl_stream(void *p, const void *v, size_t size)
{
#if FL_IS_AVX512
    if (size == 64) {
        __m512i all;
        memcpy(&all, v, 64);
        _mm512_stream_si512((__m512i *)p, all);
        return;
    }
#endif
#if FL_IS_AVX512 || FL_IS_AVX2
    if (size == 32) {
        __m256i all;
        memcpy(&all, v, 32);
        _mm256_stream_si256((__m256i *)p, all);
        return;
    }
#endif
    if (size == 16) {
        __m128i all;
        memcpy(&all, v, 16);
        _mm_stream_si128((__m128i *)p, all);
    } else {
        memcpy(p, v, size);
    }
}
#define FL_STREAM(p, v) fl_stream(p, &(v), sizeof(v))
#endif

/* Makes a value in a register one that the compiler knows nothing of, so that it does not read it from memory once
 * more, where it may have changed. Without vectors elements are volatile instead. */
#if FL_SCALAR
#define FL_READ_ONCE(v) ((void)0)
#elif defined(__x86_64__)
#define FL_READ_ONCE(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define FL_READ_ONCE(v) __asm__("" : "+w"(v))
#else /* whatever registers there are, by way of the stack */
#define FL_READ_ONCE(v) __asm__("" : "+m"(v))
#endif

/* The conversions that change the width of a lane. GCC 12 makes several instructions of what the machine has one for.
 * Integers keep their low bits when they are narrowed, as in C. */
#define FL_CONVERSION(name, from, to, expression)                                                                      \
    FL_INLINE to name(from x)                                                                                          \
    {                                                                                                                  \
        return (to)(expression);                                                                                       \
    }
#if FL_IS_AVX2 || FL_IS_AVX512
/* The bytes of half a register or less in a whole one, and back. */
FL_INLINE __m128i fl_widen(const void *x, size_t size)
{
    uint64_t low = 0;
    memcpy(&low, x, size);
    return _mm_cvtsi64_si128((long long)low);
}
#define FL_NARROWING(name, from, to, expression)                                                                       \
    FL_INLINE to name(from x)                                                                                          \
    {                                                                                                                  \
        to y;                                                                                                          \
        __m128i low = (expression);                                                                                    \
        memcpy(&y, &low, sizeof y);                                                                                    \
        return y;                                                                                                      \
    }
#endif
#if FL_IS_AVX512
FL_CONVERSION(fl_f64_of_f32, fl_f32, fl_f64, _mm512_cvtps_pd((__m256)x))
FL_CONVERSION(fl_f32_of_f64, fl_f64, fl_f32, _mm512_cvtpd_ps((__m512d)x))
FL_CONVERSION(fl_f64_of_i32, fl_i32, fl_f64, _mm512_cvtepi32_pd((__m256i)x))
FL_CONVERSION(fl_i32_of_f64, fl_f64, fl_i32, _mm512_cvttpd_epi32((__m512d)x))
FL_CONVERSION(fl_u64_of_u32, fl_u32, fl_u64, _mm512_cvtepu32_epi64((__m256i)x))
FL_CONVERSION(fl_u32_of_u64, fl_u64, fl_u32, _mm512_cvtepi64_epi32((__m512i)x))
FL_CONVERSION(fl_u32_of_u16, fl_u16, fl_u32, _mm256_cvtepu16_epi32((__m128i)x))
FL_CONVERSION(fl_i32_of_i16, fl_i16, fl_i32, _mm256_cvtepi16_epi32((__m128i)x))
FL_CONVERSION(fl_i32_of_u8, fl_u8, fl_i32, _mm256_cvtepu8_epi32(fl_widen(&x, sizeof x)))
FL_CONVERSION(fl_i32_of_i8, fl_i8, fl_i32, _mm256_cvtepi8_epi32(fl_widen(&x, sizeof x)))
FL_NARROWING(fl_u16_of_u32, fl_u32, fl_u16, _mm256_cvtepi32_epi16((__m256i)x))
FL_NARROWING(fl_u8_of_i32, fl_i32, fl_u8, _mm256_cvtepi32_epi8((__m256i)x))
#elif FL_IS_AVX2
FL_CONVERSION(fl_f64_of_f32, fl_f32, fl_f64, _mm256_cvtps_pd((__m128)x))
FL_CONVERSION(fl_f32_of_f64, fl_f64, fl_f32, _mm256_cvtpd_ps((__m256d)x))
FL_CONVERSION(fl_f64_of_i32, fl_i32, fl_f64, _mm256_cvtepi32_pd((__m128i)x))
FL_CONVERSION(fl_i32_of_f64, fl_f64, fl_i32, _mm256_cvttpd_epi32((__m256d)x))
FL_CONVERSION(fl_u64_of_u32, fl_u32, fl_u64, _mm256_cvtepu32_epi64((__m128i)x))
FL_CONVERSION(fl_u32_of_u64, fl_u64, fl_u32,
              _mm256_castsi256_si128(_mm256_permutevar8x32_epi32((__m256i)x,
                                                                 _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6))))
FL_CONVERSION(fl_u32_of_u16, fl_u16, fl_u32, _mm_cvtepu16_epi32(fl_widen(&x, sizeof x)))
FL_CONVERSION(fl_i32_of_i16, fl_i16, fl_i32, _mm_cvtepi16_epi32(fl_widen(&x, sizeof x)))
FL_CONVERSION(fl_i32_of_u8, fl_u8, fl_i32, _mm_cvtepu8_epi32(fl_widen(&x, sizeof x)))
FL_CONVERSION(fl_i32_of_i8, fl_i8, fl_i32, _mm_cvtepi8_epi32(fl_widen(&x, sizeof x)))
FL_NARROWING(fl_u16_of_u32, fl_u32, fl_u16,
             _mm_shuffle_epi8((__m128i)x, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1)))
FL_NARROWING(fl_u8_of_i32, fl_i32, fl_u8,
             _mm_shuffle_epi8((__m128i)x, _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1)))
#else
FL_CONVERSION(fl_f64_of_f32, fl_f32, fl_f64, FL_CONVERT(x, fl_f64))
FL_CONVERSION(fl_f32_of_f64, fl_f64, fl_f32, FL_CONVERT(x, fl_f32))
FL_CONVERSION(fl_f64_of_i32, fl_i32, fl_f64, FL_CONVERT(x, fl_f64))
FL_CONVERSION(fl_i32_of_f64, fl_f64, fl_i32, FL_CONVERT(x, fl_i32))
FL_CONVERSION(fl_u64_of_u32, fl_u32, fl_u64, FL_CONVERT(x, fl_u64))
FL_CONVERSION(fl_u32_of_u64, fl_u64, fl_u32, FL_CONVERT(x, fl_u32))
FL_CONVERSION(fl_u32_of_u16, fl_u16, fl_u32, FL_CONVERT(x, fl_u32))
FL_CONVERSION(fl_i32_of_i16, fl_i16, fl_i32, FL_CONVERT(x, fl_i32))
FL_CONVERSION(fl_i32_of_u8, fl_u8, fl_i32, FL_CONVERT(x, fl_i32))
FL_CONVERSION(fl_i32_of_i8, fl_i8, fl_i32, FL_CONVERT(x, fl_i32))
FL_CONVERSION(fl_u16_of_u32, fl_u32, fl_u16, FL_CONVERT(x, fl_u16))
FL_CONVERSION(fl_u8_of_i32, fl_i32, fl_u8, FL_CONVERT(x, fl_u8))
#endif

#if FL_IS_AVX512
FL_CONVERSION(fl_f64_of_u64, fl_u64, fl_f64, _mm512_cvtepu64_pd((__m512i)x))
FL_CONVERSION(fl_f64_of_i64, fl_u64, fl_f64, _mm512_cvtepi64_pd((__m512i)x))
#else
/* 64-bit integers as float64, rounded once. Few machines have an instruction for it, so the halves are placed in the
 * fractions of 2^84 and 2^52; the last sum alone rounds. */
FL_INLINE fl_f64 fl_f64_of_u64(fl_u64 x)
{
    fl_f64 high = fl_f64_of_bits((x >> 32) | 0x4530000000000000u);
    fl_f64 low = fl_f64_of_bits((x & 0xffffffffu) | 0x4330000000000000u);
    return (high - (0x1p84 + 0x1p52)) + low;
}
FL_INLINE fl_f64 fl_f64_of_i64(fl_u64 x)
{
    fl_f64 high = fl_f64_of_bits((x >> 32) ^ 0x4530000080000000u);
    fl_f64 low = fl_f64_of_bits((x & 0xffffffffu) | 0x4330000000000000u);
    return (high - (0x1p84 + 0x1p63 + 0x1p52)) + low;
}
#endif
/* A signed 64-bit integer of magnitude up to 2^51. */
FL_INLINE fl_f64 fl_f64_of_small(fl_u64 x)
{
    return fl_f64_of_bits(x + 0x4338000000000000u) - 0x1.8p52;
}
/* A whole number of magnitude up to 2^51 as a 64-bit integer: the fraction of 1.5*2^52 plus it. */
FL_INLINE fl_u64 fl_u64_of_f64(fl_f64 x)
{
    return fl_f64_bits(x + 0x1.8p52) - 0x4338000000000000u;
}

/* acc + a * x where the product is exact, so that it is no matter whether it is rounded by itself. */
FL_INLINE fl_f64 fl_add_exact_product(double a, fl_f64 x, fl_f64 acc)
{
#if FL_FMA && FL_IS_AVX512
    return (fl_f64)_mm512_fmadd_pd(_mm512_set1_pd(a), (__m512d)x, (__m512d)acc);
#elif FL_FMA && FL_IS_AVX2
    return (fl_f64)_mm256_fmadd_pd(_mm256_set1_pd(a), (__m256d)x, (__m256d)acc);
#else
    return acc + a * x;
#endif
}

/* Whether any bit of a vector is set. */
FL_INLINE int fl_any(fl_u64 v)
{
#if FL_IS_AVX512
    return _mm512_test_epi64_mask((__m512i)v, (__m512i)v) != 0;
#elif FL_IS_AVX2
    return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
    uint64_t lanes[FL_LANES], any = 0;
    memcpy(lanes, &v, sizeof v);
    for (int i = 0; i < FL_LANES; i++)
        any |= lanes[i];
    return any != 0;
#endif
}

/* Not zero where x is NaN or infinite. */
FL_INLINE fl_u64 fl_not_finite(fl_f64 x)
{
    return fl_f64_bits(x - x);
}

/* mask ? a : b, lane by lane. */
FL_INLINE fl_u32 fl_select_u32(fl_u32 mask, fl_u32 a, fl_u32 b)
{
    return (mask & a) | (~mask & b);
}

FL_INLINE fl_f64 fl_select_f64(fl_u64 mask, fl_f64 a, fl_f64 b)
{
    return fl_f64_of_bits((mask & fl_f64_bits(a)) | (~mask & fl_f64_bits(b)));
}

/* Whether the reciprocal of a finite, positive x is exact. */
static inline int fl_is_power_of_two(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (bits & 0x000fffffffffffffu) == 0 && bits != 0 && 1.0 / x <= DBL_MAX;
}

/* The mean of finite values is finite; only its rounding to float64 could leave the range. */
FL_INLINE fl_f64 fl_within_range(fl_f64 mean)
{
    fl_f64 largest = (fl_f64){0} + DBL_MAX;
    mean = fl_select_f64(FL_MASK(mean > largest, fl_u64), largest, mean);
    return fl_select_f64(FL_MASK(mean < -largest, fl_u64), -largest, mean);
}

/* Of how many bits integers may be so that their mean in float64 is right to the unit: |x| * (n + 2) <= 2^52. */
static inline int fl_room(size_t n_inputs)
{
    int room = 52;
    while (room > 0 && (uint64_t)n_inputs + 2 > (uint64_t)1 << (52 - room))
        room--;
    return room;
}
/* Not zero where one of the integers at p has more bits. */
FL_INLINE fl_u64 fl_wide_int64(const int64_t *p, int room)
{
    return (fl_u64_read((const uint64_t *)p) + ((uint64_t)1 << room)) >> (room + 1);
}
FL_INLINE fl_u64 fl_wide_uint64(const uint64_t *p, int room)
{
    return fl_u64_read(p) >> room;
}

/* Ones where `mean`, up to 4 units in the last place off the quotient that it stands for, might not round to the same
 * float32: near the middle between two of them, and where they are subnormal and lie wider apart. */
FL_INLINE fl_u64 fl_doubtful(fl_f64 mean)
{
    fl_u64 bits = fl_f64_bits(mean);
    fl_u64 middle = FL_MASK(((bits - (0x10000000u - 8)) & 0x1ffffff0u) == 0, fl_u64);
    return middle | FL_MASK(fl_f64_of_bits(bits & 0x7fffffffffffffffu) < 0x1p-126, fl_u64);
}

/* Not zeros where a number rounds to an infinity or is none, `limit` being where infinity begins for a dtype. */
FL_INLINE fl_u64 fl_reaches(fl_f64 x, double limit)
{
    return ~FL_MASK(fl_f64_of_bits(fl_f64_bits(x) & 0x7fffffffffffffffu) < limit, fl_u64);
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
FL_INLINE void fl_store_float64(double *p, fl_f64 mean, int stream)
{
    if (stream)
        FL_STREAM(p, mean);
    else
        fl_f64_write(p, mean);
}

FL_INLINE fl_f64 fl_load_float32(const float *p)
{
    return fl_f64_of_f32(fl_f32_read(p));
}
FL_INLINE void fl_store_float32(float *p, fl_f64 mean, int stream)
{
    fl_f32 rounded = fl_f32_of_f64(mean);
    if (stream)
        FL_STREAM(p, rounded);
    else
        fl_f32_write(p, rounded);
}

/* A bfloat16 is the upper half of a float32. */
FL_INLINE fl_f64 fl_load_bfloat16(const uint16_t *p)
{
#if FL_IS_AVX512
    const __m256i odd = _mm256_setr_epi16(0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7);
    __m256i halves = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return (fl_f64)_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_maskz_permutexvar_epi16(0xaaaa, odd, halves)));
#elif FL_IS_AVX2
    const __m128i upper = _mm_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7);
    __m128i halves = _mm_loadl_epi64((const __m128i *)p);
    return (fl_f64)_mm256_cvtps_pd(_mm_castsi128_ps(_mm_shuffle_epi8(halves, upper)));
#else
    return fl_f64_of_f32(fl_f32_of_bits(fl_u32_of_u16(fl_u16_read(p)) << 16));
#endif
}
FL_INLINE void fl_store_half(uint16_t *p, fl_u16 halves, int stream)
{
    if (stream)
        FL_STREAM(p, halves);
    else
        fl_u16_write(p, halves);
}
FL_INLINE void fl_store_bfloat16(uint16_t *p, fl_f64 mean, int stream)
{
    fl_u32 bits = fl_f32_bits(fl_f32_of_f64(mean));
    fl_u32 nan = FL_MASK((bits & 0x7fffffffu) > 0x7f800000u, fl_u32); /* rounding could carry into the sign */
    fl_u32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    fl_store_half(p, fl_u16_of_u32(fl_select_u32(nan, bits | 0x00400000u, rounded) >> 16), stream);
}

#if FL_FMA && FL_IS_AVX512
FL_INLINE fl_f64 fl_load_float16(const uint16_t *p)
{
    return fl_f64_of_f32((fl_f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)));
}
FL_INLINE void fl_store_float16(uint16_t *p, fl_f64 mean, int stream)
{
    __m128i halves = _mm256_cvtps_ph((__m256)fl_f32_of_f64(mean), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    fl_store_half(p, (fl_u16)halves, stream);
}
#elif FL_FMA && FL_IS_AVX2
FL_INLINE fl_f64 fl_load_float16(const uint16_t *p)
{
    return fl_f64_of_f32((fl_f32)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)p)));
}
FL_INLINE void fl_store_float16(uint16_t *p, fl_f64 mean, int stream)
{
    __m128i halves = _mm_cvtps_ph((__m128)fl_f32_of_f64(mean), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    fl_u16 low;
    memcpy(&low, &halves, sizeof low);
    fl_store_half(p, low, stream);
}
#else
FL_INLINE fl_f64 fl_load_float16(const uint16_t *p)
{
    fl_u32 h = fl_u32_of_u16(fl_u16_read(p));
    fl_u32 magnitude = h & 0x7fffu, shifted = magnitude << 13;
    /* Shifted into place the exponent is too small by 112; multiplying by 2^112 mends normals and subnormals. */
    fl_u32 finite = fl_f32_bits(fl_f32_of_bits(shifted) * 0x1p112f);
    fl_u32 bits = fl_select_u32(FL_MASK(magnitude >= 0x7c00u, fl_u32), shifted | 0x7f800000u, finite);
    return fl_f64_of_f32(fl_f32_of_bits(bits | ((h & 0x8000u) << 16)));
}
FL_INLINE void fl_store_float16(uint16_t *p, fl_f64 mean, int stream)
{
    fl_u32 bits = fl_f32_bits(fl_f32_of_f64(mean));
    fl_u32 sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    /* Below 2^-14 a float16 is a multiple of 2^-24, which is half an ulp of 1: adding 0.5 rounds to it. */
    fl_u32 tiny = fl_f32_bits(fl_f32_of_bits(magnitude) + 0.5f) - 0x3f000000u;
    /* Else round half to even on the 13 bits that go, and rebias the exponent. */
    fl_u32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    fl_u32 nan = FL_MASK(magnitude > 0x7f800000u, fl_u32) & 0x0200u;
    fl_u32 half = fl_select_u32(FL_MASK(magnitude < 0x38800000u, fl_u32), tiny, normal);
    half = fl_select_u32(FL_MASK(magnitude >= 0x47800000u, fl_u32), nan | 0x7c00u, half);
    fl_store_half(p, fl_u16_of_u32(half | sign), stream);
}
#endif

FL_INLINE fl_f64 fl_load_bool(const uint8_t *p)
{
    return fl_f64_of_i32(fl_i32_of_u8(FL_MASK(fl_u8_read(p) != 0, fl_u8) & 1));
}
FL_INLINE void fl_store_bool(uint8_t *p, fl_f64 mean, int stream)
{
    (void)stream; /* of these there are few */
    fl_i32 set = fl_i32_of_f64(fl_rint(mean));
    fl_u8_write(p, fl_u8_of_i32(FL_MASK(set != 0, fl_i32) & 1));
}

/* Integers, by way of those that the machine converts. Their callers see to it that a 64-bit mean is at most 2^51. */
#define FL_INTEGER(name, element, load, store)                                                                         \
    FL_INLINE fl_f64 fl_load_##name(const element *p)                                                                  \
    {                                                                                                                  \
        return load;                                                                                                   \
    }                                                                                                                  \
    FL_INLINE void fl_store_##name(element *p, fl_f64 mean, int stream)                                                \
    {                                                                                                                  \
        (void)stream;                                                                                                  \
        fl_f64 whole = fl_rint(mean);                                                                                  \
        store;                                                                                                         \
    }
FL_INTEGER(int8, int8_t, fl_f64_of_i32(fl_i32_of_i8(fl_i8_read(p))),
           fl_u8_write((uint8_t *)p, fl_u8_of_i32(fl_i32_of_f64(whole))))
FL_INTEGER(uint8, uint8_t, fl_f64_of_i32(fl_i32_of_u8(fl_u8_read(p))),
           fl_u8_write(p, fl_u8_of_i32(fl_i32_of_f64(whole))))
FL_INTEGER(int16, int16_t, fl_f64_of_i32(fl_i32_of_i16(fl_i16_read(p))),
           fl_u16_write((uint16_t *)p, fl_u16_of_u32((fl_u32)fl_i32_of_f64(whole))))
FL_INTEGER(uint16, uint16_t, fl_f64_of_i32((fl_i32)fl_u32_of_u16(fl_u16_read(p))),
           fl_u16_write(p, fl_u16_of_u32((fl_u32)fl_i32_of_f64(whole))))
FL_INTEGER(int32, int32_t, fl_f64_of_i32(fl_i32_read(p)), fl_i32_write(p, fl_i32_of_f64(whole)))
FL_INTEGER(uint32, uint32_t, fl_f64_of_u64(fl_u64_of_u32(fl_u32_read(p))),
           fl_u32_write(p, fl_u32_of_u64(fl_u64_of_f64(whole))))
FL_INTEGER(int64, int64_t, fl_f64_of_i64(fl_u64_read((const uint64_t *)p)),
           fl_u64_write((uint64_t *)p, fl_u64_of_f64(whole)))
FL_INTEGER(uint64, uint64_t, fl_f64_of_u64(fl_u64_read(p)), fl_u64_write(p, fl_u64_of_f64(whole)))
#undef FL_INTEGER

#endif
