/* What the tests of the kernels stand on: checks, floating-point environments, memory that ends where an array ends,
 * random numbers. */
#ifndef HARNESS_H
#define HARNESS_H
#define _POSIX_C_SOURCE 200112L /* posix_memalign */

#include <fenv.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "fl_kernels.h"

#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* Where we are, for messages. */
static int set, environment;
static const char *function = "", *dtype_name = "";
static size_t n_elements, n_inputs_now;

#define CHECK(condition)                                                                                       \
    do {                                                                                                       \
        if (!(condition)) {                                                                                    \
            fprintf(stderr, "%s:%d: not so: %s\nin %s, %s, environment %d, %zu inputs, %s, %zu elements\n",    \
                    __FILE__, __LINE__, #condition, function, fl_set_name(set), environment, n_inputs_now,     \
                    dtype_name, n_elements);                                                                   \
            exit(1);                                                                                           \
        }                                                                                                      \
    } while (0)

/* ---- Floating-point environments ----
 * The default, the other roundings, and last one that takes subnormals for zeros. */

static const int ROUNDINGS[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO, FE_TONEAREST};
static uint64_t control_before;

static uint64_t control_word(void)
{
#if defined(__x86_64__)
    return _mm_getcsr() & ~0x3fu; /* without the exceptions that happened */
#elif defined(__aarch64__)
    uint64_t word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word));
    return word;
#else
    return 0;
#endif
}

static void flush_subnormals(void)
{
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() | 0x8040u); /* flush to zero, and denormals are zeros */
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(control_word() | 1u << 24));
#endif
}

static void enter_environment(void)
{
    environment = (environment + 1) % (int)LENGTH(ROUNDINGS);
    CHECK(fesetround(ROUNDINGS[environment]) == 0);
    if (environment + 1 == (int)LENGTH(ROUNDINGS))
        flush_subnormals();
    control_before = control_word();
}

static int leave_environment(int status)
{
    CHECK(fegetround() == ROUNDINGS[environment] && control_word() == control_before);
    fesetenv(FE_DFL_ENV);
    return status;
}

/* A call of a kernel, in the next environment. Everything it is compared with is computed outside. */
#define RUN(name, ...) (function = #name, enter_environment(), leave_environment(name(__VA_ARGS__)))

/* ---- Memory that ends where an array ends ---- */

enum { GARBAGE = 0xa5 };

static struct {
    unsigned char *memory;
    size_t before;
} rooms[1 << 17];
static size_t n_rooms;

/* Garbage for `count` items, freed by `free_rooms`. */
static void *room(size_t count, size_t item)
{
    static unsigned turn;
    size_t before = item * (turn % 4 == 0 ? 0 : turn % 8 * 2 + 1), size = count * item;
    void *memory;
    turn++;
    if (n_rooms == LENGTH(rooms) || posix_memalign(&memory, 64, before + size) != 0)
        abort();
    memset(memory, GARBAGE, before + size);
    rooms[n_rooms].memory = memory;
    rooms[n_rooms++].before = before;
    return (char *)memory + before;
}

static void *zeros(size_t count, size_t item)
{
    return memset(room(count, item), 0, count * item);
}

/* ... which also sees whether anything was written before a room. */
static void free_rooms(void)
{
    while (n_rooms > 0) {
        n_rooms--;
        for (size_t i = 0; i < rooms[n_rooms].before; i++)
            CHECK(rooms[n_rooms].memory[i] == GARBAGE);
        free(rooms[n_rooms].memory);
    }
}

/* ---- Random numbers ---- */

static uint64_t random_state = 1;

static uint64_t random_bits(void) /* SplitMix64 */
{
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

#endif
