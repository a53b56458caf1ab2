/* The C kernels of fed_learn: the arithmetic of weighted averaging on flat arrays.
 *
 * Every function is single-threaded, allocates nothing, touches no Python object and may be called from any
 * thread. The arithmetic is that of src/fed_learn/kernels/numpy.py, to the bit: float64 sums that start from the
 * first product, products and sums rounded separately (or fused where the product is exact, which is the same), one
 * division, one rounding to the output dtype.
 *
 * Work comes as pieces. A piece is a run of `counts[i]` elements of one variable of dtype `dtypes[i]`; its
 * addresses are consecutive entries of `pointers`, the output first.
 */
#ifndef FL_KERNELS_H
#define FL_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum fl_status { FL_OK, FL_BAD_DTYPE, FL_NO_INPUT, FL_BAD_SET, FL_BAD_RANGE };

enum fl_dtype {
    FL_FLOAT16,
    FL_BFLOAT16,
    FL_FLOAT32,
    FL_FLOAT64,
    FL_BOOL,
    FL_INT8,
    FL_INT16,
    FL_INT32,
    FL_INT64,
    FL_UINT8,
    FL_UINT16,
    FL_UINT32,
    FL_UINT64,
    FL_DTYPES
};

/* Instruction sets, from the one that every machine has to the widest. */
enum fl_set { FL_BASELINE, FL_AVX2, FL_AVX2_FMA, FL_AVX512, FL_SETS };

/* The name of an instruction set as this build has it ("sse2", "avx2", "neon", "scalar" ...), NULL if it has none. */
const char *fl_set_name(int set);
/* Whether the processor and the operating system can run it. */
int fl_set_usable(int set);

/* Elements of which sums stay in the cache between groups of inputs, and the size of a group: hardware follows no more
 * streams at once. */
enum { FL_TILE = 16384, FL_GROUP = 10 };

/* output = round(sum_k a[k] * input_k / total), a: the aggregation weights. With more than FL_GROUP inputs `scratch`
 * are FL_TILE numbers, else it is not used.
 * Pointers: output, input_0 ... input_{n_inputs-1}. Sets not_finite[i] to 1 where a sum of piece i is not finite, which
 * it is wherever an input is not; or, conservatively, where it could not hold 64-bit integers to the unit; else to 0.
 */
int fl_weighted_mean(int set, size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
                     const int32_t *dtypes, const double *a, double total, double *scratch, uint8_t *not_finite);

/* sums += sum_k a[k] * input_k, in order; with `start`, sums = ... whatever was in them.
 * Pointers: sums (float64), input_0 ... input_{n_inputs-1} (of the piece's dtype). */
int fl_accumulate(int set, size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
                  const int32_t *dtypes, const double *a, int start);

/* output = round(sums / total). Pointers: output (of the piece's dtype), sums (float64). not_finite: as above. */
int fl_divide(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
              double total, uint8_t *not_finite);

/* Sets not_finite[i] to 1 where piece i holds a NaN or an infinity, else to 0. Pointers: input. */
int fl_find_not_finite(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
                       uint8_t *not_finite);

/* output = input, byte by byte. Sets not_finite[i] to 1 where the copy of piece i holds a NaN or an infinity, else to
 * 0: unlike the input, nobody else can change the copy. Pointers: output, input. */
int fl_copy(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
            uint8_t *not_finite);

/* output = base + difference, or weights - base: in float64 and rounded to the dtype once; integers exactly. They take
 * floats and signed integers. Pointers: output, base, difference; output, weights, base. Sets out_of_range[i] to 1 where
 * an output of piece i is not finite or left the range of the integer, or where a 64-bit integer of an input is beyond
 * 2^62 in magnitude; else to 0. */
int fl_add(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
           uint8_t *out_of_range);
int fl_subtract(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
                uint8_t *out_of_range);

/* Exact sums are kept as digits: 64-bit integers that count multiples of 2^(44 * (top - b)) for digit b, from the
 * highest, b = 0, to the lowest. Row b holds that digit of all elements; `rows` are the addresses of the rows.
 * Aggregation weights come as sums of two numbers of at most 26 bits. A call fails with FL_BAD_RANGE, and has then
 * added a part, where the digits do not reach as far as its products. All values must be finite. */
enum { FL_EXACT_TILE = 1024 };

/* digits += sum_k (high[k] + low[k]) * input_k. Pointers: input_0 ... input_{n_inputs-1}, at element `offsets[i]` of
 * the rows. Sets touched[b] to 1 where digit b of anything may have changed. At most 2^15 inputs before digits are
 * carried. */
int fl_deposit(int set, size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
               const int32_t *dtypes, const size_t *offsets, int top, size_t n_digits, const uintptr_t *rows,
               const double *high, const double *low, uint8_t *touched);

/* output = round(digits / total). Pointers: output, at element `offsets[i]` of the rows. */
int fl_exact_divide(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes,
                    const size_t *offsets, int top, size_t n_digits, const uintptr_t *rows, double total);

/* output = round(sum_k (high[k] + low[k]) * input_k / total) for at most 2^15 inputs. Pointers: output, input_0 ...;
 * scratch: n_digits * FL_EXACT_TILE zeros, and zeros again in the end. */
int fl_exact_mean(int set, size_t n_pieces, size_t n_inputs, const uintptr_t *pointers, const size_t *counts,
                  const int32_t *dtypes, int top, size_t n_digits, int64_t *scratch, const double *high,
                  const double *low, double total);

/* Reads every byte once and returns the sum of the 64-bit words: the limit that benchmarks compare with. */
uint64_t fl_read(int set, size_t n_pieces, const uintptr_t *pointers, const size_t *sizes);

#endif
