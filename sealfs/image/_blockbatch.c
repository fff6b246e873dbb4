/* What a commit does for each of its blocks, thousands at a time, in one call each.
 *
 * blockbatch.py does the same without this module where it could not be built. The interpreter is
 * held throughout: a call takes microseconds, and what it looks into is changed by others.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#define BLOCK_SIZE 4096
#define ENTRY_SIZE 32 /* FORMAT.md 6.1 */
#define FLAGS_AT 28
#define GROUP_BLOCKS_MAX (BLOCK_SIZE / ENTRY_SIZE)
#define UNKNOWN 2

/* The blocks that were given, as a list or tuple, and how many blocks a group has. */
struct blocks {
    PyObject *given;
    Py_ssize_t count;
    uint64_t group_blocks;
};

static int take_blocks(struct blocks *blocks, PyObject *given, Py_ssize_t group_blocks)
{
    if (group_blocks < 1 || group_blocks > GROUP_BLOCKS_MAX) {
        PyErr_SetString(PyExc_ValueError, "sizes do not fit: blocks of a group");
        return 0;
    }
    blocks->given = PySequence_Fast(given, "blocks is no sequence");
    if (blocks->given == NULL)
        return 0;
    blocks->count = PySequence_Fast_GET_SIZE(blocks->given);
    blocks->group_blocks = (uint64_t)group_blocks;
    return 1;
}

/* Returns 1, and which block it is of which group; 0 with an exception set where it is none. */
static int block_at(const struct blocks *blocks, Py_ssize_t i, uint64_t *group, size_t *index)
{
    uint64_t block = PyLong_AsUnsignedLongLong(PySequence_Fast_GET_ITEM(blocks->given, i));
    if (block == (uint64_t)-1 && PyErr_Occurred())
        return 0;
    *group = block / blocks->group_blocks;
    *index = (size_t)(block % blocks->group_blocks);
    return 1;
}

/* Returns the leaf page of a group; NULL where it is not in memory, or with an exception set. It
 * stays where it is until Python code runs again. */
static unsigned char *leaf_of(PyObject *leaves, uint64_t group, PyObject **number)
{
    *number = PyLong_FromUnsignedLongLong(group);
    if (*number == NULL)
        return NULL;
    PyObject *leaf = PyDict_GetItemWithError(leaves, *number);
    if (leaf == NULL)
        return NULL;
    if (!PyByteArray_Check(leaf) || PyByteArray_GET_SIZE(leaf) != BLOCK_SIZE) {
        PyErr_SetString(PyExc_ValueError, "sizes do not fit: a leaf page");
        return NULL;
    }
    return (unsigned char *)PyByteArray_AS_STRING(leaf);
}

static int append_number(PyObject *list, uint64_t value)
{
    PyObject *number = PyLong_FromUnsignedLongLong(value);
    int is_added = number != NULL && PyList_Append(list, number) == 0;
    Py_XDECREF(number);
    return is_added;
}

PyDoc_STRVAR(spans_doc,
"spans(blocks, group_blocks) -> (groups, ends)\n\n"
"Cut blocks where the group changes: part k, up to but without blocks[ends[k]], is of groups[k].");

static PyObject *spans(PyObject *self, PyObject *args)
{
    PyObject *given, *groups = NULL, *ends = NULL, *result = NULL;
    struct blocks blocks = {0};
    Py_ssize_t group_blocks;
    uint64_t last = 0, group;
    size_t index;

    if (!PyArg_ParseTuple(args, "On", &given, &group_blocks) ||
        !take_blocks(&blocks, given, group_blocks))
        return NULL;
    groups = PyList_New(0);
    ends = PyList_New(0);
    if (groups == NULL || ends == NULL)
        goto end;
    for (Py_ssize_t i = 0; i < blocks.count; i++) {
        if (!block_at(&blocks, i, &group, &index))
            goto end;
        if (i && group == last)
            continue;
        if ((i && !append_number(ends, (uint64_t)i)) || !append_number(groups, group))
            goto end;
        last = group;
    }
    if (blocks.count && !append_number(ends, (uint64_t)blocks.count))
        goto end;
    result = PyTuple_Pack(2, groups, ends);
end:
    Py_DECREF(blocks.given);
    Py_XDECREF(groups);
    Py_XDECREF(ends);
    return result;
}

PyDoc_STRVAR(flags_of_doc,
"flags_of(leaves, blocks, group_blocks) -> flags\n\n"
"Return a byte for each block: 1 where it is there, 0 where it is a hole, 2 where its leaf page is\n"
"not in `leaves`, a dictionary of group to page.");

static PyObject *flags_of(PyObject *self, PyObject *args)
{
    PyObject *leaves, *given, *number, *flags = NULL;
    struct blocks blocks = {0};
    Py_ssize_t group_blocks;
    uint64_t last = 0, group;
    size_t index;
    unsigned char *leaf = NULL;

    if (!PyArg_ParseTuple(args, "O!On", &PyDict_Type, &leaves, &given, &group_blocks) ||
        !take_blocks(&blocks, given, group_blocks))
        return NULL;
    flags = PyBytes_FromStringAndSize(NULL, blocks.count);
    for (Py_ssize_t i = 0; flags != NULL && i < blocks.count; i++) {
        if (!block_at(&blocks, i, &group, &index)) {
            Py_CLEAR(flags);
            break;
        }
        if (i == 0 || group != last) {
            leaf = leaf_of(leaves, group, &number);
            Py_XDECREF(number);
            if (PyErr_Occurred()) {
                Py_CLEAR(flags);
                break;
            }
            last = group;
        }
        PyBytes_AS_STRING(flags)[i] =
            leaf == NULL ? UNKNOWN : leaf[index * ENTRY_SIZE + FLAGS_AT] != 0;
    }
    Py_DECREF(blocks.given);
    return flags;
}

PyDoc_STRVAR(set_entries_doc,
"set_entries(leaves, blocks, entries, group_blocks)\n\n"
"Set the entry of each block, ENTRY_SIZE bytes each, in its leaf page in `leaves`.\n"
"KeyError: the group whose leaf page is not there; then nothing is changed.");

static PyObject *set_entries(PyObject *self, PyObject *args)
{
    PyObject *leaves, *given, *number;
    Py_buffer entries = {0};
    struct blocks blocks = {0};
    Py_ssize_t group_blocks;
    uint64_t last = 0, group;
    size_t index;
    unsigned char *leaf = NULL, **to = NULL;
    int is_done = 0;

    if (!PyArg_ParseTuple(args, "O!Oy*n", &PyDict_Type, &leaves, &given, &entries, &group_blocks))
        return NULL;
    if (!take_blocks(&blocks, given, group_blocks))
        goto end;
    if (entries.len % ENTRY_SIZE || entries.len / ENTRY_SIZE != blocks.count) {
        PyErr_SetString(PyExc_ValueError, "set_entries: sizes do not fit");
        goto end;
    }
    to = PyMem_Calloc(blocks.count ? blocks.count : 1, sizeof(*to));
    if (to == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    for (Py_ssize_t i = 0; i < blocks.count; i++) {
        if (!block_at(&blocks, i, &group, &index))
            goto end;
        if (i == 0 || group != last) {
            leaf = leaf_of(leaves, group, &number);
            if (leaf == NULL && !PyErr_Occurred())
                PyErr_SetObject(PyExc_KeyError, number);
            Py_XDECREF(number);
            if (leaf == NULL)
                goto end;
            last = group;
        }
        to[i] = leaf + index * ENTRY_SIZE;
    }
    const unsigned char *from = entries.buf;
    for (Py_ssize_t i = 0; i < blocks.count; i++, from += ENTRY_SIZE)
        memcpy(to[i], from, ENTRY_SIZE);
    is_done = 1;
end:
    PyMem_Free(to);
    Py_XDECREF(blocks.given);
    PyBuffer_Release(&entries);
    if (!is_done)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(home_offsets_doc,
"home_offsets(blocks, group_blocks, starts) -> offsets\n\n"
"Return where each block lies, native unsigned 64 bit each; starts[k] is where the first block of\n"
"the group of part k (as of `spans`) does.");

static PyObject *home_offsets(PyObject *self, PyObject *args)
{
    PyObject *given, *starts_given, *starts = NULL, *offsets = NULL;
    struct blocks blocks = {0};
    Py_ssize_t group_blocks, part = 0;
    uint64_t last = 0, group, start = 0;
    size_t index;

    if (!PyArg_ParseTuple(args, "OnO", &given, &group_blocks, &starts_given) ||
        !take_blocks(&blocks, given, group_blocks))
        return NULL;
    starts = PySequence_Fast(starts_given, "starts is no sequence");
    if (starts == NULL)
        goto end;
    offsets = PyBytes_FromStringAndSize(NULL, blocks.count * (Py_ssize_t)sizeof(uint64_t));
    if (offsets == NULL)
        goto end;
    Py_ssize_t i = 0;
    for (; i < blocks.count; i++) {
        if (!block_at(&blocks, i, &group, &index))
            goto end;
        if (i == 0 || group != last) {
            if (part == PySequence_Fast_GET_SIZE(starts))
                break;
            start = PyLong_AsUnsignedLongLong(PySequence_Fast_GET_ITEM(starts, part++));
            if (start == (uint64_t)-1 && PyErr_Occurred())
                goto end;
            last = group;
        }
        uint64_t offset = start + index * BLOCK_SIZE;
        memcpy(PyBytes_AS_STRING(offsets) + i * sizeof(offset), &offset, sizeof(offset));
    }
    if (i < blocks.count || part != PySequence_Fast_GET_SIZE(starts))
        PyErr_SetString(PyExc_ValueError, "home_offsets: sizes do not fit: starts");
end:
    Py_XDECREF(blocks.given);
    Py_XDECREF(starts);
    if (PyErr_Occurred())
        Py_CLEAR(offsets);
    return offsets;
}

static PyMethodDef methods[] = {
    {"spans", spans, METH_VARARGS, spans_doc},
    {"flags_of", flags_of, METH_VARARGS, flags_of_doc},
    {"set_entries", set_entries, METH_VARARGS, set_entries_doc},
    {"home_offsets", home_offsets, METH_VARARGS, home_offsets_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sealfs.image._blockbatch",
    .m_doc = "What a commit does for each of its blocks.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__blockbatch(void)
{
    return PyModule_Create(&module);
}
