/* Arrays are looked at by the buffer protocol, which the stable ABI has since Python 3.11. */
#if !defined(_MSC_VER)
#include <pyconfig.h> /* says whether there is a GIL; with MSVC it chooses the library by the limited API */
#endif
#if !defined(Py_LIMITED_API) && !defined(Py_GIL_DISABLED)
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>
#include <stdlib.h>

#include "arrays.h"
#include "fl_kernels.h"

static const size_t FL_ITEMSIZES[FL_DTYPES] = {
    [FL_FLOAT16] = 2, [FL_BFLOAT16] = 2, [FL_FLOAT32] = 4, [FL_FLOAT64] = 8, [FL_BOOL] = 1,
    [FL_INT8] = 1,    [FL_INT16] = 2,    [FL_INT32] = 4,   [FL_INT64] = 8,   [FL_UINT8] = 1,
    [FL_UINT16] = 2,  [FL_UINT32] = 4,   [FL_UINT64] = 8,
};

/* Writes where an array lies; returns whether it has this shape and dtype and lies as a kernel takes it. Its dtype is
 * asked for by itself: numpy would compose a format anew for each buffer, and has none for bfloat16. */
static int fl_take(PyObject *array, PyObject *dtype_name, PyObject *shape, PyObject *dtype, int flags,
                   uintptr_t *address)
{
    Py_buffer view;
    PyObject *found = PyObject_GetAttr(array, dtype_name);
    if (found == NULL)
        return 0;
    int same = found == dtype || PyObject_RichCompareBool(found, dtype, Py_EQ) == 1; /* unpickled dtypes are copies */
    Py_DECREF(found);
    if (!same || PyObject_GetBuffer(array, &view, flags) != 0)
        return 0;
    *address = (uintptr_t)view.buf;
    same = view.ndim == PyTuple_Size(shape) && *address % (uintptr_t)view.itemsize == 0;
    for (int i = 0; i < view.ndim && same; i++)
        same = view.shape[i] == PyLong_AsSsize_t(PyTuple_GetItem(shape, i));
    PyBuffer_Release(&view);
    return same;
}

static int fl_same_name(PyObject *one, PyObject *other)
{
    return one == other ||
           (PyUnicode_CheckExact(one) && PyUnicode_CheckExact(other) && PyUnicode_Compare(one, other) == 0);
}

static int fl_gather_row(PyObject *schema, PyObject *row, PyObject *dtype_name, PyTypeObject *array_class, int flags,
                         size_t n_columns, uintptr_t *addresses)
{
    PyObject *name, *expected, *own_name, *array;
    Py_ssize_t at = 0, own_at = 0;
    if (!PyDict_Check(row) || PyDict_Size(row) != PyDict_Size(schema))
        return 0;
    for (; PyDict_Next(schema, &at, &name, &expected); addresses += n_columns) {
        PyObject *shape = PyTuple_GetItem(expected, 0), *dtype = PyTuple_GetItem(expected, 1);
        if (!PyDict_Next(row, &own_at, &own_name, &array) || !fl_same_name(own_name, name) ||
            Py_TYPE(array) != array_class || !fl_take(array, dtype_name, shape, dtype, flags, addresses))
            return 0;
    }
    return 1;
}

size_t fl_measure(uintptr_t schema, uintptr_t codes_of, size_t *counts, size_t *sizes, int32_t *codes)
{
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *name, *expected;
    Py_ssize_t at = 0;
    size_t total = 0;
    for (size_t v = 0; PyDict_Next((PyObject *)schema, &at, &name, &expected); v++) {
        PyObject *shape = PyTuple_GetItem(expected, 0), *dtype = PyTuple_GetItem(expected, 1);
        PyObject *code = PyDict_GetItemWithError((PyObject *)codes_of, dtype);
        codes[v] = code == NULL ? -1 : (int32_t)PyLong_AsLong(code);
        counts[v] = 1;
        for (Py_ssize_t i = 0; i < PyTuple_Size(shape); i++)
            counts[v] *= PyLong_AsSize_t(PyTuple_GetItem(shape, i));
        sizes[v] = counts[v] * (code == NULL ? 0 : FL_ITEMSIZES[codes[v]]);
        total += sizes[v];
    }
    PyErr_Clear();
    PyGILState_Release(state);
    return total;
}

int fl_gather(uintptr_t schema, uintptr_t rows, uintptr_t array_class, int writeable, size_t n_columns,
              uintptr_t *addresses)
{
    int flags = writeable ? PyBUF_ND | PyBUF_WRITABLE : PyBUF_ND;
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *dtype_name = PyUnicode_InternFromString("dtype");
    Py_ssize_t n = PyList_Size((PyObject *)rows);
    int same = dtype_name != NULL;
    for (Py_ssize_t k = 0; k < n && same; k++)
        same = fl_gather_row((PyObject *)schema, PyList_GetItem((PyObject *)rows, k), dtype_name,
                             (PyTypeObject *)array_class, flags, n_columns, addresses + k);
    Py_XDECREF(dtype_name);
    PyErr_Clear();
    PyGILState_Release(state);
    return same;
}

int fl_addresses(uintptr_t arrays, uintptr_t *addresses)
{
    PyGILState_STATE state = PyGILState_Ensure();
    Py_ssize_t n = PyList_Size((PyObject *)arrays);
    int contiguous = 1;
    for (Py_ssize_t i = 0; i < n && contiguous; i++) {
        Py_buffer view;
        contiguous = PyObject_GetBuffer(PyList_GetItem((PyObject *)arrays, i), &view, PyBUF_ND) == 0;
        if (contiguous) {
            addresses[i] = (uintptr_t)view.buf;
            PyBuffer_Release(&view);
        }
    }
    PyErr_Clear();
    PyGILState_Release(state);
    return contiguous;
}

static int fl_compare_starts(const void *one, const void *other)
{
    uintptr_t a = *(const uintptr_t *)one, b = *(const uintptr_t *)other;
    return (a > b) - (a < b);
}

int fl_overlap(size_t n_variables, size_t n_inputs, const uintptr_t *addresses, const size_t *sizes, uintptr_t *spans)
{
    size_t n = 0, n_columns = n_inputs + 1;
    for (size_t v = 0; v < n_variables; v++)
        if (sizes[v] > 0) {
            spans[2 * n] = addresses[v * n_columns];
            spans[2 * n + 1] = spans[2 * n] + sizes[v];
            n++;
        }
    qsort(spans, n, 2 * sizeof *spans, fl_compare_starts);
    for (size_t i = 1; i < n; i++)
        if (spans[2 * i - 1] > spans[2 * i])
            return 1;
    /* Of one contribution after the other, whose arrays often lie together: then the gap between outputs that the last
     * input was found in is the right one again. `at` outputs begin before the input ends. */
    size_t at = 0;
    for (size_t k = 1; k < n_columns; k++)
        for (size_t v = 0; v < n_variables; v++) {
            uintptr_t start = addresses[v * n_columns + k], stop = start + sizes[v];
            if (start == stop)
                continue;
            if ((at > 0 && spans[2 * at - 2] >= stop) || (at < n && spans[2 * at] < stop)) {
                size_t end = n;
                for (at = 0; at < end;) {
                    size_t middle = (at + end) / 2;
                    if (spans[2 * middle] < stop)
                        at = middle + 1;
                    else
                        end = middle;
                }
            }
            if (at > 0 && spans[2 * at - 1] > start)
                return 1;
        }
    return 0;
}
