/* Look into the state of an image where Python keeps it: dictionaries, nodes, numbers.
 *
 * For the C modules that do the usual case of a busy guest in one call. They hold the interpreter
 * all the while and keep no state of their own: there is none that could be outdated.
 */
#include <Python.h>

#include <stdint.h>
#include <string.h>

typedef struct {
    PyObject **place;
    const char *name;
} Name;

static PyObject *name_present, *name_slots;

/* Returns 0, or -1 with an exception set. */
static int intern_all(const Name *names, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        *names[i].place = PyUnicode_InternFromString(names[i].name);
        if (*names[i].place == NULL)
            return -1;
    }
    return 0;
}

static int intern_state_names(void)
{
    static const Name names[] = {{&name_present, "present"}, {&name_slots, "slots"}};
    return intern_all(names, sizeof(names) / sizeof(names[0]));
}

/* Returns what a dictionary has under a number, borrowed; NULL without an exception where nothing. */
static PyObject *at_number(PyObject *dict, unsigned long long number)
{
    PyObject *key = PyLong_FromUnsignedLongLong(number), *found = NULL;
    if (key != NULL)
        found = PyDict_GetItemWithError(dict, key);
    Py_XDECREF(key);
    return found;
}

/* Where a group's slot is: 1 and its number, 0 where the group has none, -1 with an exception.
 *
 * `nodes`: the node pages of level 1 by their index. */
static int find_slot(PyObject *nodes, unsigned long long fanout, unsigned long long group,
                     uint32_t *slot)
{
    Py_buffer present = {0}, slots = {0};
    size_t i = group % fanout;
    int status = -1;
    PyObject *node = Py_XNewRef(at_number(nodes, group / fanout));
    if (node == NULL)
        return PyErr_Occurred() ? -1 : 0;
    PyObject *flags = PyObject_GetAttr(node, name_present), *numbers = NULL;
    if (flags == NULL || PyObject_GetBuffer(flags, &present, PyBUF_SIMPLE) < 0)
        goto end;
    if (i >= (size_t)present.len || !((unsigned char *)present.buf)[i]) {
        status = 0;
        goto end;
    }
    numbers = PyObject_GetAttr(node, name_slots);
    if (numbers == NULL || PyObject_GetBuffer(numbers, &slots, PyBUF_SIMPLE) < 0)
        goto end;
    if ((i + 1) * sizeof(*slot) <= (size_t)slots.len) {
        memcpy(slot, (char *)slots.buf + i * sizeof(*slot), sizeof(*slot));
        status = 1;
    } else
        status = 0;
end:
    PyBuffer_Release(&slots);
    PyBuffer_Release(&present);
    Py_XDECREF(numbers);
    Py_XDECREF(flags);
    Py_DECREF(node);
    return status;
}
