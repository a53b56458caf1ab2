/* Tests the functions of fl_kernels.h from C, where sanitizers, other compilers and emulated processors can see them.
 *
 * What they are compared with is in reference.h, element by element, from the contract and not from the kernels. A call
 * has a piece of every dtype, each of another size. Every array ends where its memory ends, and mostly starts at an odd
 * multiple of its element. Calls come in changing floating-point environments, which must neither matter nor change.
 *
 * Prints the name of each instruction set and a hash of all results, which are the same bits on every machine; at the
 * first that is wrong, says where, and exits with 1.
 */
#include "harness.h"
#include "reference.h"

#include <inttypes.h>

static const size_t SIZES[] = {0, 1, 2, 3, 5, 7, 9, 15, 16, 17, 31, 33, 63, 65, 4095, 4097, 8193};
static const size_t INPUTS[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 33};
static const size_t EXACT_INPUTS[] = {1, 3, 9, 17};
/* Of aggregation weights: products with float32, float16 and bfloat16 are exact up to 29, 42 and 45. */
static const int WEIGHT_BITS[] = {1, 10, 29, 30, 42, 43, 45, 46, 53};
enum { MANY = 1 << 20 }; /* elements of a call whose output is written past the caches */
static const char *const DTYPES[FL_DTYPES] = {"float16", "bfloat16", "float32", "float64", "bool", "int8", "int16",
                                              "int32", "int64", "uint8", "uint16", "uint32", "uint64"};

/* ---- Values ---- */

/* Styles: of usual size, zeros and others that are special, or any. With `exact`, float64 is within the domain of exact
 * sums. 64-bit integers are at most 2^51. */
enum { USUAL, SPECIAL, ANY, STYLES = 4 };

static uint64_t random_element(int dtype, unsigned style, int exact)
{
    uint64_t r = random_bits(), limit = (uint64_t)1 << (style == USUAL ? 38 : 51);
    if (dtype == FL_BOOL)
        return r & 1;
    if (dtype == FL_INT64)
        return r % 16 == 0 ? (r & 16 ? limit : 0 - limit) : (uint64_t)((int64_t)(r % (2 * limit) - limit) >> r % 32);
    if (dtype == FL_UINT64)
        return r % 16 == 0 ? limit : r % limit >> r % 32;
    if (dtype >= FLOATS) {
        uint64_t all = UINT64_MAX >> (64 - 8 * ITEMS[dtype]);
        return r % 16 == 0 ? (r & 16 ? all >> 1 : all) : (r >> 8) & all;
    }
    struct format f = FORMATS[dtype];
    uint64_t one = (uint64_t)1 << f.fraction_bits, most = (1u << f.exponent_bits) - 1, bias = most / 2;
    uint64_t sign = r >> 63, exponent = (r >> 52) % most, fraction = r & (one - 1);
    if (style == USUAL)
        exponent = bias - 4 + exponent % 8;
    else if (style == SPECIAL || random_bits() % 16 == 0) {
        exponent = (r >> 52) & 1 ? 0 : (r >> 53) & 1 ? 1 : most - 1;
        fraction = (r >> 54) & 1 ? 0 : (r >> 55) & 1 ? 1 : one - 1;
    }
    if (exact && dtype == FL_FLOAT64 && exponent == 0)
        fraction = 0;
    else if (exact && dtype == FL_FLOAT64)
        exponent = bias - 700 + exponent % 1400;
    return (sign << (f.exponent_bits + f.fraction_bits)) | (exponent << f.fraction_bits) | fraction;
}

/* ---- Calls, and what they should give ---- */

static struct call {
    size_t n_pieces, n_inputs;
    int32_t *dtypes;
    size_t *counts, *offsets; /* offsets: of the pieces, one after the other */
    uintptr_t *pointers;      /* per piece: output, inputs */
    double *a, *high, *low, total;
    double *sums[FL_DTYPES];
    uint8_t finite[FL_DTYPES];
    double reach[FL_DTYPES]; /* for 64-bit integers: how large, and how many; their sums hold units if less than 2^52 */
    uint64_t *expected[FL_DTYPES];
} call;

static uint64_t hashes[FL_SETS];

static void at(const struct call *c, size_t p)
{
    dtype_name = DTYPES[c->dtypes[p]];
    n_elements = c->counts[p];
}

/* A piece of each of the first dtypes, of bool with so many elements if not 0; aggregation weights around 2^scale. */
static const struct call *make_call(size_t turn, size_t n_pieces, size_t n_inputs, int scale, int exact, size_t bools)
{
    struct call *c = &call;
    int weight_bits = WEIGHT_BITS[random_bits() % LENGTH(WEIGHT_BITS)]; /* of 1: the total is often a power of two */
    c->n_pieces = n_pieces;
    c->n_inputs = n_inputs_now = n_inputs;
    c->dtypes = room(n_pieces, sizeof *c->dtypes);
    c->counts = room(n_pieces, sizeof *c->counts);
    c->offsets = room(n_pieces, sizeof *c->offsets);
    c->pointers = room(n_pieces * (1 + n_inputs), sizeof *c->pointers);
    c->a = room(n_inputs, sizeof *c->a);
    c->high = room(n_inputs, sizeof *c->high);
    c->low = room(n_inputs, sizeof *c->low);
    c->total = 0.0;
    for (size_t k = 0; k < n_inputs; k++) {
        c->a[k] = ldexp((double)(random_bits() >> (64 - weight_bits) | 1), scale - weight_bits);
        double scaled = c->a[k] * 0x1.0000002p27; /* Veltkamp's splitting: two numbers of at most 26 bits */
        c->high[k] = scaled - (scaled - c->a[k]);
        c->low[k] = c->a[k] - c->high[k];
        c->total += c->a[k];
    }
    for (size_t p = 0, offset = 0; p < n_pieces; offset += c->counts[p++]) {
        uintptr_t *pointers = c->pointers + p * (1 + n_inputs);
        int dtype = c->dtypes[p] = (int)p;
        c->counts[p] = dtype == FL_BOOL && bools ? bools : SIZES[(turn + p) % LENGTH(SIZES)];
        c->offsets[p] = offset;
        c->reach[p] = 0.0;
        int similar = random_bits() % 2; /* else the largest inputs alone make the sum */
        for (size_t k = 0; k < n_inputs; k++) {
            void *input = room(c->counts[p], ITEMS[dtype]);
            unsigned style = similar ? USUAL : random_bits() % STYLES;
            for (size_t i = 0; i < c->counts[p]; i++) {
                uint64_t bits = random_element(dtype, style, exact);
                set_element(dtype, input, i, bits);
                if (dtype == FL_INT64 || dtype == FL_UINT64)
                    c->reach[p] = fmax(c->reach[p], fabs(value(dtype, bits)) * (double)(n_inputs + 2));
            }
            if (!exact && dtype < FLOATS && c->counts[p] && random_bits() % (4 * n_inputs) == 0) { /* NaN or infinity */
                struct format f = FORMATS[dtype];
                uint64_t infinity = (((uint64_t)1 << f.exponent_bits) - 1) << f.fraction_bits;
                size_t i = random_bits() % c->counts[p];
                set_element(dtype, input, i, infinity | random_bits() % 2);
            }
            pointers[1 + k] = (uintptr_t)input;
        }
        c->sums[p] = room(c->counts[p], sizeof(double));
        c->expected[p] = room(c->counts[p], sizeof(uint64_t));
        c->finite[p] = 1;
        for (size_t i = 0; i < c->counts[p]; i++) {
            c->sums[p][i] = (exact ? summed_exactly : summed)(dtype, pointers + 1, n_inputs, c->a, i);
            c->expected[p][i] = rounded_mean(dtype, c->sums[p][i], c->total);
            c->finite[p] &= isfinite(c->sums[p][i]) != 0;
        }
    }
    return c;
}

/* The same call with fresh memory for outputs of `item` bytes, of the dtype if 0, from input `first` on. */
static uintptr_t *with_outputs(const struct call *c, size_t item, size_t first, size_t n_inputs)
{
    uintptr_t *pointers = room(c->n_pieces * (1 + n_inputs), sizeof *pointers);
    for (size_t p = 0; p < c->n_pieces; p++) {
        uintptr_t *own = pointers + p * (1 + n_inputs);
        own[0] = (uintptr_t)room(c->counts[p], item ? item : ITEMS[c->dtypes[p]]);
        memcpy(own + 1, c->pointers + p * (1 + c->n_inputs) + 1 + first, n_inputs * sizeof *own);
    }
    return pointers;
}

static void check_outputs(const struct call *c, const uintptr_t *pointers, size_t stride)
{
    for (size_t p = 0; p < c->n_pieces; p++) {
        at(c, p);
        for (size_t i = 0; i < c->counts[p]; i++) {
            uint64_t bits = one_nan(c->dtypes[p], element(c->dtypes[p], (const void *)pointers[p * stride], i));
            CHECK(bits == c->expected[p][i]);
            hashes[set] = (hashes[set] ^ bits) * 0x100000001b3u; /* FNV-1a, by elements */
        }
    }
}

/* `by_inputs`: where 64-bit integers are large, too; by a factor of 2 that may be said too early. */
static void check_flags(const struct call *c, const uint8_t *not_finite, int by_inputs)
{
    for (size_t p = 0; p < c->n_pieces; p++) {
        at(c, p);
        if (by_inputs && c->reach[p] > 0x1p51)
            CHECK(not_finite[p] == 1 || (not_finite[p] == 0 && c->reach[p] <= 0x1p52));
        else
            CHECK(not_finite[p] == !c->finite[p]);
    }
}

/* ---- Tests ---- */

static void test_weighted_mean(const struct call *c)
{
    uintptr_t *pointers = with_outputs(c, 0, 0, c->n_inputs);
    uint8_t *not_finite = room(c->n_pieces, 1);
    double *scratch = c->n_inputs > FL_GROUP ? room(FL_TILE, sizeof *scratch) : NULL;
    CHECK(RUN(fl_weighted_mean, set, c->n_pieces, c->n_inputs, pointers, c->counts, c->dtypes, c->a, c->total, scratch,
              not_finite) == FL_OK);
    check_outputs(c, pointers, 1 + c->n_inputs);
    check_flags(c, not_finite, 1);
}

/* Sums over a first part of the inputs, then over the rest, then divided. */
static void test_accumulate_and_divide(const struct call *c)
{
    size_t first = (c->n_inputs + 1) / 2, rest = c->n_inputs - first;
    uintptr_t *pointers = with_outputs(c, sizeof(double), 0, first);
    uintptr_t *more = with_outputs(c, sizeof(double), first, rest), *division = with_outputs(c, 0, 0, 1);
    uint8_t *not_finite = room(c->n_pieces, 1);
    CHECK(RUN(fl_accumulate, set, c->n_pieces, first, pointers, c->counts, c->dtypes, c->a, 1) == FL_OK);
    for (size_t p = 0; p < c->n_pieces; p++)
        division[2 * p + 1] = more[p * (1 + rest)] = pointers[p * (1 + first)];
    if (rest)
        CHECK(RUN(fl_accumulate, set, c->n_pieces, rest, more, c->counts, c->dtypes, c->a + first, 0) == FL_OK);
    for (size_t p = 0; p < c->n_pieces; p++)
        for (size_t i = 0; i < c->counts[p]; i++) {
            uint64_t sum = one_nan(FL_FLOAT64, element(FL_FLOAT64, (const void *)division[2 * p + 1], i));
            at(c, p);
            CHECK(sum == one_nan(FL_FLOAT64, element(FL_FLOAT64, c->sums[p], i)));
        }
    CHECK(RUN(fl_divide, set, c->n_pieces, division, c->counts, c->dtypes, c->total, not_finite) == FL_OK);
    check_outputs(c, division, 2);
    check_flags(c, not_finite, 0);
}

/* Of every input: whether it holds a NaN or an infinity, and the sum of its words. */
static void test_find_not_finite_and_read(const struct call *c)
{
    uintptr_t *pointers = room(c->n_pieces, sizeof *pointers);
    size_t *sizes = room(c->n_pieces, sizeof *sizes);
    uint8_t *not_finite = room(c->n_pieces, 1), *in_copy = room(c->n_pieces, 1);
    uintptr_t *copies = room(2 * c->n_pieces, sizeof *copies);
    for (size_t p = 0; p < c->n_pieces; p++)
        copies[2 * p] = (uintptr_t)room(c->counts[p], ITEMS[c->dtypes[p]]);
    for (size_t k = 0; k < c->n_inputs; k++) {
        uint64_t words = 0;
        for (size_t p = 0; p < c->n_pieces; p++) {
            pointers[p] = c->pointers[p * (1 + c->n_inputs) + 1 + k];
            sizes[p] = c->counts[p] * ITEMS[c->dtypes[p]];
            for (size_t i = 0; i < sizes[p]; i += 8) {
                uint64_t word = 0;
                memcpy(&word, (const char *)pointers[p] + i, sizes[p] - i < 8 ? sizes[p] - i : 8);
                words += word;
            }
        }
        CHECK(fl_read(set, c->n_pieces, pointers, sizes) == words);
        CHECK(RUN(fl_find_not_finite, set, c->n_pieces, pointers, c->counts, c->dtypes, not_finite) == FL_OK);
        for (size_t p = 0; p < c->n_pieces; p++) {
            int finite = 1;
            for (size_t i = 0; i < c->counts[p]; i++)
                finite &= isfinite(value(c->dtypes[p], element(c->dtypes[p], (const void *)pointers[p], i))) != 0;
            at(c, p);
            CHECK(not_finite[p] == !finite);
        }
        for (size_t p = 0; p < c->n_pieces; p++)
            copies[2 * p + 1] = pointers[p];
        CHECK(RUN(fl_copy, set, c->n_pieces, copies, c->counts, c->dtypes, in_copy) == FL_OK);
        for (size_t p = 0; p < c->n_pieces; p++) {
            at(c, p);
            CHECK(in_copy[p] == not_finite[p]);
            CHECK(memcmp((const void *)copies[2 * p], (const void *)pointers[p], sizes[p]) == 0);
        }
    }
}

/* base + difference and weights - base of some pieces; each has an output and two inputs. */
static void check_differences(size_t n, const uintptr_t *pointers, const size_t *counts, const int32_t *dtypes)
{
    uint8_t *out_of_range = room(n, 1);
    for (int minus = 0; minus < 2; minus++) {
        if (minus)
            CHECK(RUN(fl_subtract, set, n, pointers, counts, dtypes, out_of_range) == FL_OK);
        else
            CHECK(RUN(fl_add, set, n, pointers, counts, dtypes, out_of_range) == FL_OK);
        for (size_t p = 0; p < n; p++) {
            const void *output = (const void *)pointers[3 * p], *one = (const void *)pointers[3 * p + 1];
            const void *other = (const void *)pointers[3 * p + 2];
            int all_right = 1, dtype = dtypes[p];
            dtype_name = DTYPES[dtype];
            n_elements = counts[p];
            for (size_t i = 0; i < counts[p]; i++) {
                int right;
                uint64_t expected = combined(dtype, element(dtype, one, i), element(dtype, other, i), minus, &right);
                uint64_t bits = one_nan(dtype, element(dtype, output, i));
                CHECK(bits == expected);
                hashes[set] = (hashes[set] ^ bits) * 0x100000001b3u;
                all_right &= right;
            }
            CHECK(out_of_range[p] == !all_right);
        }
    }
}

static int has_differences(int dtype)
{
    return dtype < FLOATS || (dtype >= FL_INT8 && dtype <= FL_INT64);
}

/* Of the first and the last input. */
static void test_differences(const struct call *c)
{
    uintptr_t *pointers = room(3 * c->n_pieces, sizeof *pointers);
    size_t *counts = room(c->n_pieces, sizeof *counts), n = 0;
    int32_t *dtypes = room(c->n_pieces, sizeof *dtypes);
    for (size_t p = 0; p < c->n_pieces; p++) {
        const uintptr_t *inputs = c->pointers + p * (1 + c->n_inputs) + 1;
        if (!has_differences(c->dtypes[p]))
            continue;
        dtypes[n] = c->dtypes[p];
        counts[n] = c->counts[p];
        pointers[3 * n] = (uintptr_t)room(counts[n], ITEMS[dtypes[n]]);
        pointers[3 * n + 1] = inputs[0];
        pointers[3 * n++ + 2] = inputs[c->n_inputs - 1];
    }
    check_differences(n, pointers, counts, dtypes);
}

/* So many elements that outputs are written past the caches. */
static void test_many_differences(void)
{
    size_t counts[] = {MANY, 20001, 20001, 20001, 20001};
    int32_t dtypes[] = {FL_INT8, FL_FLOAT16, FL_BFLOAT16, FL_FLOAT32, FL_FLOAT64};
    uintptr_t pointers[3 * LENGTH(dtypes)];
    for (size_t at = 0; at < LENGTH(pointers); at++) {
        size_t p = at / 3;
        pointers[at] = (uintptr_t)room(counts[p], ITEMS[dtypes[p]]);
        for (size_t i = 0; i < counts[p] && at % 3; i++)
            set_element(dtypes[p], (void *)pointers[at], i, random_element(dtypes[p], USUAL, 0));
    }
    check_differences(LENGTH(dtypes), pointers, counts, dtypes);
}

/* Sums at and beside the middle between two numbers, and at the end of each dtype. */
static void test_differences_halfway(void)
{
    enum { COUNT = 4 * 65536 };
    size_t count = COUNT;
    for (int32_t dtype = 0; dtype < FLOATS; dtype++) {
        uintptr_t pointers[] = {(uintptr_t)room(COUNT, ITEMS[dtype]), (uintptr_t)room(COUNT, ITEMS[dtype]),
                                (uintptr_t)room(COUNT, ITEMS[dtype])};
        struct format f = FORMATS[dtype];
        uint64_t one = (uint64_t)1 << f.fraction_bits, largest = (((uint64_t)1 << f.exponent_bits) - 1) * one - 1;
        uint64_t sign = largest + 1 + one;
        for (size_t i = 0; i < COUNT; i++) {
            uint64_t r = random_bits(), x = i % 8 ? r % (largest + 1) : largest - r % 3;
            uint64_t below = (r >> 20) % (uint64_t)(f.fraction_bits + 3) * one, exponent = x & ~(one - 1);
            uint64_t y = (exponent > below ? exponent - below : 0) | ((r >> 30) % 3 ? (r >> 32) % 2 : (r >> 32) & (one - 1));
            set_element(dtype, (void *)pointers[1], i, x | (r >> 62 & 1 ? sign : 0));
            set_element(dtype, (void *)pointers[2], i, y | (r >> 63 ? sign : 0));
        }
        check_differences(1, pointers, &count, &dtype);
    }
}

/* 64-bit integers around 2^62 and 2^63. */
static void test_differences_of_large_integers(void)
{
    static const int64_t numbers[] = {0, 1, -1, INT64_MAX, INT64_MIN, (int64_t)1 << 62, -((int64_t)1 << 62),
                                      ((int64_t)1 << 62) + 1, ((int64_t)1 << 62) - 1, -((int64_t)1 << 62) - 1};
    int32_t dtype = FL_INT64;
    size_t count = 1;
    for (size_t x = 0; x < LENGTH(numbers); x++)
        for (size_t y = 0; y < LENGTH(numbers); y++) {
            int64_t output;
            uintptr_t pointers[] = {(uintptr_t)&output, (uintptr_t)(numbers + x), (uintptr_t)(numbers + y)};
            check_differences(1, pointers, &count, &dtype);
        }
}

static void test_exact_mean(const struct call *c)
{
    uintptr_t *pointers = with_outputs(c, 0, 0, c->n_inputs);
    int64_t *scratch = zeros((size_t)N_DIGITS * FL_EXACT_TILE, sizeof *scratch);
    CHECK(RUN(fl_exact_mean, set, c->n_pieces, c->n_inputs, pointers, c->counts, c->dtypes, TOP, N_DIGITS, scratch,
              c->high, c->low, c->total) == FL_OK);
    check_outputs(c, pointers, 1 + c->n_inputs);
    for (size_t i = 0; i < (size_t)N_DIGITS * FL_EXACT_TILE; i++)
        CHECK(scratch[i] == 0);
}

/* From the last input to the first, each in a call of its own, the result is that of any order. */
static void test_deposit_and_exact_divide(const struct call *c)
{
    size_t last = c->n_pieces - 1, length = c->offsets[last] + c->counts[last];
    uintptr_t *rows = room(N_DIGITS, sizeof *rows), *pointers = with_outputs(c, 0, 0, 0);
    uintptr_t *inputs = room(c->n_pieces, sizeof *inputs);
    uint8_t *touched = zeros(N_DIGITS, 1);
    for (size_t b = 0; b < N_DIGITS; b++)
        rows[b] = (uintptr_t)zeros(length, sizeof(int64_t));
    for (size_t k = c->n_inputs; k-- > 0;) {
        for (size_t p = 0; p < c->n_pieces; p++)
            inputs[p] = c->pointers[p * (1 + c->n_inputs) + 1 + k];
        CHECK(RUN(fl_deposit, set, c->n_pieces, 1, inputs, c->counts, c->dtypes, c->offsets, TOP, N_DIGITS, rows,
                  c->high + k, c->low + k, touched) == FL_OK);
    }
    for (size_t b = 0; b < N_DIGITS; b++)
        for (size_t i = 0; i < length; i++)
            CHECK(touched[b] == 1 || (touched[b] == 0 && ((const int64_t *)rows[b])[i] == 0));
    CHECK(RUN(fl_exact_divide, set, c->n_pieces, pointers, c->counts, c->dtypes, c->offsets, TOP, N_DIGITS, rows,
              c->total) == FL_OK);
    check_outputs(c, pointers, 1);
}

/* Means at and beside the middle between two float32, where the last place of float64 decides. */
static void test_means_halfway(void)
{
    enum { COUNT = 20001 };
    for (int32_t dtype = FL_FLOAT16; dtype <= FL_FLOAT32; dtype++) {
        double *sums = room(COUNT, sizeof *sums), total = 1.0 + (double)(random_bits() >> 11) * 0x1p-50; /* to 9 */
        uintptr_t pointers[] = {(uintptr_t)room(COUNT, ITEMS[dtype]), (uintptr_t)sums};
        size_t count = COUNT;
        uint8_t not_finite;
        for (size_t i = 0; i < COUNT; i++) {
            double places = (double)(random_bits() >> 41) + 0.5;
            double middle = i < COUNT / 2 ? 1.0 + places * 0x1p-23 : places * 0x1p-149; /* subnormal */
            sums[i] = middle * total * (1.0 + ((double)(random_bits() % 9) - 4.0) * 0x1p-53);
        }
        CHECK(RUN(fl_divide, set, 1, pointers, &count, &dtype, total, &not_finite) == FL_OK);
        for (size_t i = 0; i < COUNT; i++)
            CHECK(element(dtype, (const void *)pointers[0], i) == rounded_mean(dtype, sums[i], total));
    }
}

/* 64-bit integers that float64 does not hold are rounded once on their way into a sum. */
static void test_large_integers(void)
{
    enum { COUNT = 1001 };
    for (int32_t dtype = FL_INT64; dtype <= FL_UINT64; dtype += FL_UINT64 - FL_INT64) {
        uint64_t *input = room(COUNT, sizeof *input);
        double *sums = room(COUNT, sizeof *sums), a = 1.0;
        uintptr_t pointers[] = {(uintptr_t)sums, (uintptr_t)input};
        size_t count = COUNT;
        for (size_t i = 0; i < COUNT; i++)
            input[i] = random_bits() | (i % 3 == 0 ? UINT64_MAX << 11 : 0);
        CHECK(RUN(fl_accumulate, set, 1, 1, pointers, &count, &dtype, &a, 1) == FL_OK);
        for (size_t i = 0; i < COUNT; i++)
            CHECK(sums[i] == value(dtype, input[i]));
    }
}

/* What the digits do not reach, above or below, is noticed: in a vector, in a tail, in either sign. */
static void test_digits_that_do_not_reach(void)
{
    static const double far[] = {0x1p60, 0x1p200, 0x1p700, 0x1p-45, 0x1p-200, 0x1p-700, 0x1.00000001p-30};
    int32_t dtype = FL_FLOAT64;
    size_t offset = 0;
    double high = 1.0, low = 0.0;
    for (size_t f = 0; f < 2 * LENGTH(far); f++)
        for (size_t count = 1; count < 70; count += 17) {
            double *x = zeros(count, sizeof *x);
            int64_t *digits = zeros(count, sizeof *digits), *scratch = zeros(FL_EXACT_TILE, sizeof *scratch);
            uintptr_t row = (uintptr_t)digits, mean[] = {(uintptr_t)room(count, sizeof(double)), (uintptr_t)x};
            uint8_t *touched = zeros(1, 1);
            n_elements = count;
            x[random_bits() % count] = f % 2 ? -far[f / 2] : far[f / 2];
            CHECK(RUN(fl_deposit, set, 1, 1, mean + 1, &count, &dtype, &offset, 0, 1, &row, &high, &low, touched)
                  == FL_BAD_RANGE);
            CHECK(RUN(fl_exact_mean, set, 1, 1, mean, &count, &dtype, 0, 1, scratch, &high, &low, 1.0) == FL_BAD_RANGE);
        }
}

/* Arguments that are refused, with nothing written. */
static void test_refusals(const struct call *c)
{
    static const int bad_sets[] = {-1, FL_SETS, 99}, bad_dtypes[] = {-1, FL_DTYPES, INT32_MIN, INT32_MAX};
    static const struct {
        int top;
        size_t n_digits;
    } bad_digits[] = {{TOP, 0}, {TOP, 49}, {TOP, SIZE_MAX}, {23, N_DIGITS}, {INT32_MAX, N_DIGITS}, {INT32_MIN, 1},
                      {-24, 1}, {N_DIGITS - 25, N_DIGITS}};
    uintptr_t *pointers = with_outputs(c, 0, 0, c->n_inputs), *rows = room(N_DIGITS, sizeof *rows);
    uint8_t *flags = room(c->n_pieces, 1), *touched = zeros(N_DIGITS, 1);
    size_t n = c->n_pieces, n_inputs = c->n_inputs;
    int32_t *dtypes = room(n, sizeof *dtypes);
    int64_t *scratch = zeros((size_t)N_DIGITS * FL_EXACT_TILE, sizeof *scratch);
    for (size_t b = 0; b < N_DIGITS; b++)
        rows[b] = (uintptr_t)scratch;
#define REFUSED_EXACTLY(set, top, n_digits, status)                                                                    \
    CHECK(RUN(fl_deposit, set, n, n_inputs, pointers, c->counts, dtypes, c->offsets, top, n_digits, rows, c->high,     \
              c->low, touched) == status);                                                                             \
    CHECK(RUN(fl_exact_divide, set, n, pointers, c->counts, dtypes, c->offsets, top, n_digits, rows, 1.0) == status);  \
    CHECK(RUN(fl_exact_mean, set, n, n_inputs, pointers, c->counts, dtypes, top, n_digits, scratch, c->high, c->low,   \
              1.0) == status)
#define REFUSED(set, status)                                                                                           \
    CHECK(RUN(fl_weighted_mean, set, n, n_inputs, pointers, c->counts, dtypes, c->a, 1.0, NULL, flags) == status);     \
    CHECK(RUN(fl_accumulate, set, n, n_inputs, pointers, c->counts, dtypes, c->a, 1) == status);                       \
    CHECK(RUN(fl_divide, set, n, pointers, c->counts, dtypes, 1.0, flags) == status);                                  \
    CHECK(RUN(fl_find_not_finite, set, n, pointers, c->counts, dtypes, flags) == status);                              \
    CHECK(RUN(fl_copy, set, n, pointers, c->counts, dtypes, flags) == status);                                         \
    CHECK(RUN(fl_add, set, n, pointers, c->counts, dtypes, flags) == status);                                          \
    CHECK(RUN(fl_subtract, set, n, pointers, c->counts, dtypes, flags) == status);                                     \
    REFUSED_EXACTLY(set, TOP, N_DIGITS, status)
    memcpy(dtypes, c->dtypes, n * sizeof *dtypes);
    for (size_t i = 0; i < LENGTH(bad_sets); i++) {
        CHECK(!fl_set_usable(bad_sets[i]) && fl_set_name(bad_sets[i]) == NULL);
        REFUSED(bad_sets[i], FL_BAD_SET);
    }
    for (size_t i = 0; i < LENGTH(bad_digits); i++) {
        REFUSED_EXACTLY(set, bad_digits[i].top, bad_digits[i].n_digits, FL_BAD_RANGE);
    }
    for (size_t i = 0; i < LENGTH(bad_dtypes); i++) {
        dtypes[n - 1] = bad_dtypes[i];
        REFUSED(set, FL_BAD_DTYPE);
    }
    for (int32_t dtype = 0; dtype < FL_DTYPES; dtype++)
        if (!has_differences(dtype)) {
            CHECK(RUN(fl_add, set, 1, pointers, c->counts, &dtype, flags) == FL_BAD_DTYPE);
            CHECK(RUN(fl_subtract, set, 1, pointers, c->counts, &dtype, flags) == FL_BAD_DTYPE);
        }
    CHECK(RUN(fl_weighted_mean, set, n, 0, pointers, c->counts, c->dtypes, c->a, 1.0, NULL, flags) == FL_NO_INPUT);
    CHECK(RUN(fl_accumulate, set, n, 0, pointers, c->counts, c->dtypes, c->a, 1) == FL_NO_INPUT);
    for (size_t p = 0; p < n; p++) {
        CHECK(flags[p] == GARBAGE);
        for (size_t i = 0; i < c->counts[p] * ITEMS[c->dtypes[p]]; i++)
            CHECK(((const unsigned char *)pointers[p * (1 + n_inputs)])[i] == GARBAGE);
    }
}

static void for_every_set(void (*const *tests)(const struct call *), size_t n_tests, const struct call *c)
{
    for (set = 0; set < FL_SETS; set++)
        for (size_t t = 0; t < n_tests && fl_set_usable(set); t++)
            tests[t](c);
    free_rooms();
}

int main(void)
{
    static void (*const sums[])(const struct call *) = {test_weighted_mean, test_accumulate_and_divide,
                                                        test_find_not_finite_and_read, test_differences};
    static void (*const exact[])(const struct call *) = {test_exact_mean, test_deposit_and_exact_divide};
    static void (*const refusals[])(const struct call *) = {test_refusals};
    /* Totals that are subnormal, whose reciprocals are, and far from either. */
    static const int scales[] = {-1064, -1050, -1020, -1010, -790, -300, 300, 890, 1010, 1023};
    for (size_t turn = 0; turn < LENGTH(SIZES); turn++) {
        for (size_t n = 0; n < LENGTH(INPUTS); n++)
            for_every_set(sums, LENGTH(sums), make_call(turn, FL_DTYPES, INPUTS[n], 10, 0, 0));
        for (size_t n = 0; n < LENGTH(EXACT_INPUTS); n++)
            for_every_set(exact, LENGTH(exact), make_call(turn, FL_DTYPES, EXACT_INPUTS[n], 10, 1, 0));
        for (size_t s = 0; s < LENGTH(scales); s++)
            for_every_set(sums, LENGTH(sums), make_call(turn, FLOATS, 1 + s % 2, scales[s], 0, 0));
        if (turn + FLOATS >= LENGTH(SIZES)) /* floats of thousands of elements among them */
            for_every_set(sums, 1, make_call(turn, FL_DTYPES, turn == 14 ? 17 : 1 + turn % 2, 10, 0, MANY));
    }
    for_every_set(sums, LENGTH(sums), make_call(0, FL_DTYPES, 4096, 10, 0, 0));
    for_every_set(refusals, LENGTH(refusals), make_call(3, FL_DTYPES, 2, 10, 1, 0));
    for (set = 0; set < FL_SETS; set++)
        if (fl_set_usable(set)) {
            random_state = 1; /* the same numbers for all */
            test_means_halfway();
            test_large_integers();
            test_digits_that_do_not_reach();
            test_many_differences();
            test_differences_halfway();
            test_differences_of_large_integers();
            printf("%s %016" PRIx64 "\n", fl_set_name(set), hashes[set]);
        }
    free_rooms();
    return 0;
}
