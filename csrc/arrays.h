/* Where the arrays of weight dicts lie in memory: the part of the extension that looks at Python objects. */
#ifndef FL_ARRAYS_H
#define FL_ARRAYS_H

#include <stddef.h>
#include <stdint.h>

/* Objects come as their addresses, which are what id() says of them; the caller holds them. Nothing is held or changed
 * when a function returns, and no object is made per array. */

/* Of each variable of a schema the number of elements, their bytes, and the code of its dtype, -1 where it has none.
 * schema: a dict of name -> (shape, dtype), codes_of: a dict of dtype -> code. Returns the bytes of all. */
size_t fl_measure(uintptr_t schema, uintptr_t codes_of, size_t *counts, size_t *sizes, int32_t *codes);

/* The addresses of all arrays of weight dicts, if each is as a kernel takes it: of just the names of the schema in its
 * order, of its shapes and dtypes, of the very class `array_class`, C-contiguous and aligned, and `writeable` if asked for.
 * rows: a list of weight dicts. Address k of variable v goes to addresses[v * n_columns + k].
 * Returns 1; 0 where anything is different, and the addresses are undefined then. */
int fl_gather(uintptr_t schema, uintptr_t rows, uintptr_t array_class, int writeable, size_t n_columns,
              uintptr_t *addresses);

/* The addresses of a list of arrays. Returns 1; 0 where one is not C-contiguous. */
int fl_addresses(uintptr_t arrays, uintptr_t *addresses);

/* Whether outputs share memory with one another or with an input.
 * addresses: for each variable that of the output, then those of n_inputs inputs, all `sizes[v]` bytes long.
 * spans: room for 2 * n_variables addresses. */
int fl_overlap(size_t n_variables, size_t n_inputs, const uintptr_t *addresses, const size_t *sizes, uintptr_t *spans);

#endif
