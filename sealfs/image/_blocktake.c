/* Accept writes of whole blocks into the cache in one call (FORMAT.md 8.4): the usual case.
 *
 * The hot path of a guest that writes: it waits for each line of Python. Held to the dictionaries
 * and lists that Python works with, see _state.h. `SealedImage.try_write` does the same, and all
 * that is not usual.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include "_state.h"

#include <time.h>

#define BLOCK_SIZE 4096
#define BLOCKS_MAX 256 /* the longest write that the kernel sends: 1 MiB */
#define PARTS_MAX 8    /* bits of a slot in Space.parts */

typedef struct {
    PyObject_HEAD
    PyObject *image, *check, *cache, *shared, *clean, *free, *nodes, *leaves, *space, *reader;
    Py_buffer slab;
    unsigned long long base, group_blocks, fanout, part_blocks;
} Taker;

static PyObject *name_size, *name_dirty, *name_parts, *name_is_cutting, *name_punching,
    *name_leaving, *name_version, *name_oldest_dirty, *name_on_low, *one;

static int taker_clear(Taker *self)
{
    Py_CLEAR(self->image);
    Py_CLEAR(self->check);
    Py_CLEAR(self->cache);
    Py_CLEAR(self->shared);
    Py_CLEAR(self->clean);
    Py_CLEAR(self->free);
    Py_CLEAR(self->nodes);
    Py_CLEAR(self->leaves);
    Py_CLEAR(self->space);
    Py_CLEAR(self->reader);
    PyBuffer_Release(&self->slab);
    return 0;
}

static int taker_traverse(Taker *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->image);
    Py_VISIT(self->check);
    Py_VISIT(self->cache);
    Py_VISIT(self->shared);
    Py_VISIT(self->clean);
    Py_VISIT(self->free);
    Py_VISIT(self->nodes);
    Py_VISIT(self->leaves);
    Py_VISIT(self->space);
    Py_VISIT(self->reader);
    Py_VISIT(self->slab.obj);
    return 0;
}

static void taker_dealloc(Taker *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    taker_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *taker_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"image", "check", "cache", "shared", "clean", "free", "nodes",
                            "leaves", "space", "reader", "slab", "base", "group_blocks", "fanout",
                            "part_blocks", NULL};
    PyObject *image, *check, *cache, *shared, *clean, *free, *nodes, *leaves, *space, *reader;
    Py_buffer slab = {0};
    unsigned long long base, group_blocks, fanout, part_blocks;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO!O!O!O!OOw*KKKK", names, &image, &check,
                                     &cache, &shared, &PyODict_Type, &clean, &PyList_Type, &free,
                                     &PyDict_Type, &nodes, &PyDict_Type, &leaves, &space, &reader,
                                     &slab, &base, &group_blocks, &fanout, &part_blocks))
        return NULL;
    Taker *self = NULL;
    if (!group_blocks || !fanout || !part_blocks || slab.len % BLOCK_SIZE ||
        (group_blocks - 1) / part_blocks >= PARTS_MAX)
        PyErr_SetString(PyExc_ValueError, "Taker: sizes do not fit");
    else if (slab.obj != NULL && PyMemoryView_Check(slab.obj)) /* see BlockCache.memory */
        PyErr_SetString(PyExc_TypeError, "Taker: a slab that is a view");
    else
        self = (Taker *)type->tp_alloc(type, 0);
    if (self == NULL) {
        PyBuffer_Release(&slab);
        return NULL;
    }
    self->image = Py_NewRef(image);
    self->check = Py_NewRef(check);
    self->cache = Py_NewRef(cache);
    self->shared = Py_NewRef(shared);
    self->clean = Py_NewRef(clean);
    self->free = Py_NewRef(free);
    self->nodes = Py_NewRef(nodes);
    self->leaves = Py_NewRef(leaves);
    self->space = Py_NewRef(space);
    self->reader = Py_NewRef(reader);
    self->slab = slab;
    self->base = base;
    self->group_blocks = group_blocks;
    self->fanout = fanout;
    self->part_blocks = part_blocks;
    return (PyObject *)self;
}

/* Whether an attribute is true: 1, 0, or -1 with an exception set. */
static int is_true(PyObject *owner, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(owner, name);
    int status = value == NULL ? -1 : PyObject_IsTrue(value);
    Py_XDECREF(value);
    return status;
}

/* Whether blocks of a slot have their space: `Space.has`. 1, 0, or -1 with an exception set. */
static int has_space(Taker *self, uint32_t slot, unsigned long long index, unsigned long long count)
{
    Py_buffer parts = {0};
    PyObject *owner = PyObject_GetAttr(self->space, name_parts);
    if (owner == NULL || PyObject_GetBuffer(owner, &parts, PyBUF_SIMPLE) < 0) {
        Py_XDECREF(owner);
        return -1;
    }
    unsigned first = (unsigned)(index / self->part_blocks);
    unsigned last = (unsigned)((index + count - 1) / self->part_blocks);
    unsigned wanted = (2u << last) - (1u << first);
    int status = slot < (size_t)parts.len && !(wanted & ~((unsigned char *)parts.buf)[slot]);
    PyBuffer_Release(&parts);
    Py_DECREF(owner);
    return status;
}

/* Whether a write can be taken as it is: `SealedImage._accept_quickly`. 1, 0, or -1. */
static int may_take(Taker *self, unsigned long long offset, unsigned long long size)
{
    if (size == 0 || size > BLOCKS_MAX * BLOCK_SIZE || (offset | size) % BLOCK_SIZE)
        return 0;
    PyObject *checked = PyObject_CallNoArgs(self->check); /* it may change what is looked at next */
    if (checked == NULL)
        return -1;
    Py_DECREF(checked);
    PyObject *length = PyObject_GetAttr(self->image, name_size);
    if (length == NULL)
        return -1;
    unsigned long long disk_size = PyLong_AsUnsignedLongLong(length);
    Py_DECREF(length);
    if (PyErr_Occurred())
        return -1;
    if (offset > disk_size || size > disk_size - offset)
        return 0;
    int status = is_true(self->space, name_is_cutting);
    if (status == 0)
        status = is_true(self->space, name_punching);
    if (status == 0)
        status = is_true(self->space, name_leaving);
    if (status) /* space is being given back, perhaps of these groups */
        return status < 0 ? -1 : 0;
    unsigned long long first = offset / BLOCK_SIZE, count = size / BLOCK_SIZE;
    if ((unsigned long long)PyList_GET_SIZE(self->free) < count)
        return 0;
    while (count) {
        unsigned long long group = first / self->group_blocks, index = first % self->group_blocks;
        unsigned long long part = self->group_blocks - index;
        part = part < count ? part : count;
        uint32_t slot;
        status = find_slot(self->nodes, self->fanout, group, &slot);
        if (status > 0)
            status = has_space(self, slot, index, part);
        if (status <= 0)
            return status;
        if (at_number(self->leaves, group) == NULL)
            return PyErr_Occurred() ? -1 : 0;
        first += part;
        count -= part;
    }
    return 1;
}

/* Give one block the last of `frames`, of which there are `*left`; or have it keep its own, where
 * `content` is to be copied. What it had before goes to `old_frames`. 0, or -1 with an exception. */
static int put_block(Taker *self, PyObject *dirty, unsigned long long block,
                     const unsigned char *content, PyObject *frames, Py_ssize_t *left,
                     PyObject *old_frames)
{
    PyObject *key = PyLong_FromUnsignedLongLong(block), *clean_key = NULL, *frame, *old = NULL;
    int status = -1;
    if (key == NULL)
        return -1;
    if (PyDict_GET_SIZE(self->clean)) { /* first: what is outdated must not stay, if all else does */
        clean_key = PyLong_FromUnsignedLongLong(self->base + block);
        int has = clean_key == NULL ? -1 : PyDict_Contains(self->clean, clean_key);
        if (has < 0 || (has && PyODict_DelItem(self->clean, clean_key) < 0))
            goto end;
    }
    old = Py_XNewRef(PyDict_GetItemWithError(dirty, key));
    if (old == NULL && PyErr_Occurred())
        goto end;
    if (old != NULL && content != NULL)
        frame = old;
    else if (*left > 0)
        frame = PyList_GET_ITEM(frames, *left - 1);
    else {
        PyErr_SetString(PyExc_ValueError, "Taker: no frame is left");
        goto end;
    }
    Py_ssize_t number = PyLong_AsSsize_t(frame);
    if (number < 0 || number >= self->slab.len / BLOCK_SIZE) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "Taker: no such frame");
        goto end;
    }
    if (frame != old) {
        if (PyDict_SetItem(dirty, key, frame) < 0)
            goto end;
        --*left;
    }
    if (content != NULL)
        memcpy((unsigned char *)self->slab.buf + number * BLOCK_SIZE, content, BLOCK_SIZE);
    else if (old != NULL && PyList_Append(old_frames, old) < 0)
        goto end;
    status = 0;
end:
    Py_XDECREF(clean_key);
    Py_XDECREF(old);
    Py_DECREF(key);
    return status;
}

/* Make blocks dirty, of `content` or of what is in the free frames that come next already.
 *
 * Whatever fails, no frame is ever free and a block's: at worst one is nobody's. */
static int put(Taker *self, unsigned long long first, unsigned long long count,
               const unsigned char *content)
{
    PyObject *dirty = PyObject_GetAttr(self->cache, name_dirty), *frames = NULL, *old_frames = NULL;
    int status = -1;
    if (dirty == NULL)
        return -1;
    if (!PyDict_CheckExact(dirty)) {
        PyErr_SetString(PyExc_TypeError, "Taker: blocks that are no dictionary");
        goto end;
    }
    Py_ssize_t left = (Py_ssize_t)count; /* at most: a dirty block may keep its frame */
    if (content != NULL && count == 1) { /* often again and again */
        left -= at_number(dirty, first) != NULL;
        if (PyErr_Occurred())
            goto end;
    }
    Py_ssize_t rest = PyList_GET_SIZE(self->free) - left;
    if (content == NULL && (old_frames = PyList_New(0)) == NULL)
        goto end;
    if (rest < 0) {
        PyErr_SetString(PyExc_ValueError, "Taker: no frame is left");
        goto end;
    }
    if (left) {
        frames = PyList_GetSlice(self->free, rest, rest + left);
        if (frames == NULL || PyList_SetSlice(self->free, rest, rest + left, NULL) < 0)
            goto end;
    }
    status = 0;
    for (unsigned long long i = 0; i < count && status == 0; i++)
        status = put_block(self, dirty, first + i, content ? content + i * BLOCK_SIZE : NULL,
                           frames, &left, old_frames);
    if (left == 0 && (old_frames == NULL || PyList_GET_SIZE(old_frames) == 0))
        goto end;
    /* What was not used, and above it what the blocks had: theirs in the order in which they are
     * taken, so that neighbours are neighbours again. */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    Py_ssize_t end = PyList_GET_SIZE(self->free);
    if ((old_frames != NULL && PyList_Reverse(old_frames) < 0) ||
        PyList_SetSlice(frames, left, PyList_GET_SIZE(frames), old_frames) < 0 ||
        PyList_SetSlice(self->free, end, end, frames) < 0)
        status = -1;
    if (type != NULL)
        PyErr_Restore(type, value, trace);
end:
    Py_XDECREF(old_frames);
    Py_XDECREF(frames);
    Py_DECREF(dirty);
    return status;
}

/* Say that something is written: to readers under way, and to who commits what is old. */
static int note(Taker *self)
{
    int status = -1;
    PyObject *version = PyObject_GetAttr(self->reader, name_version), *next = NULL;
    PyObject *oldest = PyObject_GetAttr(self->image, name_oldest_dirty), *now = NULL;
    if (version == NULL || oldest == NULL || (next = PyNumber_Add(version, one)) == NULL ||
        PyObject_SetAttr(self->reader, name_version, next) < 0)
        goto end;
    if (oldest == Py_None) {
        struct timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        now = PyFloat_FromDouble((double)time.tv_sec + (double)time.tv_nsec / 1e9);
        if (now == NULL || PyObject_SetAttr(self->image, name_oldest_dirty, now) < 0)
            goto end;
    }
    status = 0;
end:
    Py_XDECREF(now);
    Py_XDECREF(oldest);
    Py_XDECREF(next);
    Py_XDECREF(version);
    return status;
}

/* As `BlockCache.look`. */
static int look(Taker *self)
{
    if (PyList_GET_SIZE(self->free) * 2 >= self->slab.len / BLOCK_SIZE)
        return 0;
    PyObject *said = PyObject_CallMethodNoArgs(self->shared, name_on_low);
    Py_XDECREF(said);
    return said == NULL ? -1 : 0;
}

static int take(Taker *self, unsigned long long offset, unsigned long long size,
                const unsigned char *content)
{
    int status = may_take(self, offset, size);
    if (status <= 0)
        return status;
    /* It is noted first: also what is put in part only must not be taken for what was there. */
    if (note(self) < 0 || put(self, offset / BLOCK_SIZE, size / BLOCK_SIZE, content) < 0 ||
        look(self) < 0)
        return -1;
    return 1;
}

PyDoc_STRVAR(take_doc,
"take(offset, content) -> bool\n\n"
"Accept a write as `SealedImage.try_write` does, if it is of whole blocks that are there and nothing\n"
"needs to be waited for; else False, and nothing has happened. Raises what that would; the write may\n"
"have been accepted then, all or a part of it.");

static PyObject *taker_take(PyObject *object, PyObject *const *args, Py_ssize_t arg_count)
{
    Py_buffer content = {0};
    if (arg_count != 2) {
        PyErr_SetString(PyExc_TypeError, "take: two arguments");
        return NULL;
    }
    unsigned long long offset = PyLong_AsUnsignedLongLong(args[0]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[1], &content, PyBUF_SIMPLE) < 0)
        return NULL;
    int status = take((Taker *)object, offset, (unsigned long long)content.len, content.buf);
    PyBuffer_Release(&content);
    return status < 0 ? NULL : PyBool_FromLong(status);
}

PyDoc_STRVAR(take_landed_doc,
"take_landed(offset, size) -> bool\n\n"
"As `take`, where the content is in the free frames that come next already, the last one first.");

static PyObject *taker_take_landed(PyObject *object, PyObject *const *args, Py_ssize_t arg_count)
{
    if (arg_count != 2) {
        PyErr_SetString(PyExc_TypeError, "take_landed: two arguments");
        return NULL;
    }
    unsigned long long offset = PyLong_AsUnsignedLongLong(args[0]);
    unsigned long long size = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred())
        return NULL;
    int status = take((Taker *)object, offset, size, NULL);
    return status < 0 ? NULL : PyBool_FromLong(status);
}

static PyMethodDef taker_methods[] = {
    {"take", (PyCFunction)(void (*)(void))taker_take, METH_FASTCALL, take_doc},
    {"take_landed", (PyCFunction)(void (*)(void))taker_take_landed, METH_FASTCALL, take_landed_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot taker_slots[] = {
    {Py_tp_new, taker_new},
    {Py_tp_dealloc, taker_dealloc},
    {Py_tp_traverse, taker_traverse},
    {Py_tp_clear, taker_clear},
    {Py_tp_methods, taker_methods},
    {Py_tp_doc, "Accepts writes of one image into memory. One thread at a time."},
    {0, NULL},
};

static PyType_Spec taker_spec = {
    .name = "sealfs.image._blocktake.Taker",
    .basicsize = sizeof(Taker),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = taker_slots,
};

static int intern_names(void)
{
    static const Name names[] = {
        {&name_size, "size"}, {&name_dirty, "dirty"}, {&name_parts, "parts"},
        {&name_is_cutting, "is_cutting"}, {&name_punching, "punching"},
        {&name_leaving, "leaving"}, {&name_version, "version"},
        {&name_oldest_dirty, "oldest_dirty"}, {&name_on_low, "on_low"},
    };
    one = PyLong_FromLong(1);
    return one == NULL ? -1 : intern_all(names, sizeof(names) / sizeof(names[0]));
}

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sealfs.image._blocktake",
    .m_doc = "Accept writes into the cache.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__blocktake(void)
{
    PyObject *self = PyModule_Create(&module), *taker = PyType_FromSpec(&taker_spec);
    if (self == NULL || taker == NULL || intern_names() < 0 || intern_state_names() < 0 ||
        PyModule_AddObjectRef(self, "Taker", taker) < 0)
        Py_CLEAR(self);
    Py_XDECREF(taker);
    return self;
}
