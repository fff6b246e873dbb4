/* Requests of /dev/fuse: wait for them, and answer those reads that need nothing but memory.
 *
 * To be woken costs more than serving a block, so it asks again and again; and what the guest waits
 * for is counted in microseconds, of which each line of Python is a part. device.py does the same
 * without this module, and answers nothing by itself.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define OTHERS_MAX 8
#define LOOK_EVERY 8 /* reads between two looks at the others and at the clock */
#define ANSWERED_MAX 64 /* in a row: other tasks want to run too */

#define IDLE -1
#define OTHERS -2
#define BUSY -3
#define FAILED -4

/* <linux/fuse.h>: fuse_in_header and fuse_read_in, fuse_out_header */
#define OPCODE_READ 15
typedef struct {
    uint32_t length, opcode;
    uint64_t unique, node;
    uint32_t uid, gid, pid, rest;
    uint64_t handle, offset;
    uint32_t size, read_flags;
    uint64_t lock_owner;
    uint32_t flags, padding;
} ReadRequest;
typedef struct {
    uint32_t length;
    int32_t error;
    uint64_t unique;
} AnswerHeader;

typedef struct {
    PyObject_HEAD
    int fd;
    Py_buffer buffer; /* where requests go */
    struct pollfd others[OTHERS_MAX];
    nfds_t other_count;
    PyObject *handles, *outbox, *not_taken;
    unsigned long long requests, runs, answered;
    long long missing;
    unsigned in_a_row;
} Device;

#define UNSURE -2 /* as in image/reader.py */

static PyObject *name_quick, *name_answer, *name_flush, *name_missing;

static int device_clear(Device *self)
{
    PyBuffer_Release(&self->buffer);
    Py_CLEAR(self->handles);
    Py_CLEAR(self->outbox);
    Py_CLEAR(self->not_taken);
    return 0;
}

static int device_traverse(Device *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->buffer.obj);
    Py_VISIT(self->handles);
    Py_VISIT(self->outbox);
    Py_VISIT(self->not_taken);
    return 0;
}

static void device_dealloc(Device *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    device_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *device_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int fd;
    Py_buffer buffer = {0};
    PyObject *others, *handles, *outbox, *not_taken;
    if (!PyArg_ParseTuple(args, "iw*O!O!OO", &fd, &buffer, &PyTuple_Type, &others, &PyDict_Type,
                          &handles, &outbox, &not_taken))
        return NULL;
    Device *self = NULL;
    if (PyTuple_GET_SIZE(others) > OTHERS_MAX || buffer.len < (Py_ssize_t)sizeof(ReadRequest))
        PyErr_SetString(PyExc_ValueError, "Device: sizes do not fit");
    else
        self = (Device *)type->tp_alloc(type, 0);
    if (self == NULL) {
        PyBuffer_Release(&buffer);
        return NULL;
    }
    self->fd = fd;
    self->buffer = buffer;
    self->handles = Py_NewRef(handles);
    self->outbox = Py_NewRef(outbox);
    self->not_taken = Py_NewRef(not_taken);
    self->other_count = (nfds_t)PyTuple_GET_SIZE(others);
    for (nfds_t i = 0; i < self->other_count; i++) {
        self->others[i].fd = (int)PyLong_AsLong(PyTuple_GET_ITEM(others, (Py_ssize_t)i));
        self->others[i].events = POLLIN;
    }
    if (PyErr_Occurred())
        Py_CLEAR(self);
    return (PyObject *)self;
}

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Read as soon as there is something, for so long at most; the size, IDLE, OTHERS or FAILED. */
static ssize_t spin(Device *self, long long nanoseconds)
{
    ssize_t count;
    long long start_ns = now_ns();
    for (unsigned i = 0;; i++) {
        count = read(self->fd, self->buffer.buf, (size_t)self->buffer.len);
        if (count >= 0)
            return count;
        if (errno != EAGAIN)
            return FAILED;
        if (i % LOOK_EVERY == 0) {
            if (poll(self->others, self->other_count, 0) > 0)
                return OTHERS;
            if (now_ns() - start_ns > nanoseconds)
                return IDLE;
        }
    }
}

/* Send what was kept back, and have it said what was not taken: 0, or -1 with an exception set. */
static int flush(Device *self)
{
    int status = -1;
    PyObject *failed = PyObject_CallMethodNoArgs(self->outbox, name_flush), *said = NULL;
    if (failed != NULL && PyList_CheckExact(failed) && PyList_GET_SIZE(failed) == 0)
        status = 0;
    else if (failed != NULL) {
        said = PyObject_CallOneArg(self->not_taken, failed);
        status = said == NULL ? -1 : 0;
    }
    Py_XDECREF(said);
    Py_XDECREF(failed);
    return status;
}

/* Answer the request in the buffer: whether that was done. */
static int answer(Device *self, size_t count)
{
    ReadRequest asked;
    self->missing = UNSURE;
    if (count < sizeof(asked))
        return 0;
    memcpy(&asked, self->buffer.buf, sizeof(asked));
    if (asked.length != count || asked.opcode != OPCODE_READ || asked.offset > INT64_MAX)
        return 0;
    PyObject *number = PyLong_FromUnsignedLongLong(asked.handle), *handle = NULL;
    if (number != NULL)
        handle = PyDict_GetItemWithError(self->handles, number);
    Py_XDECREF(number);
    PyObject *quick = handle == NULL ? NULL : PyObject_GetAttr(handle, name_quick);
    if (quick == NULL || quick == Py_None) {
        Py_XDECREF(quick);
        PyErr_Clear(); /* here and below: who takes the long way meets it again, and says it */
        return 0;
    }
    AnswerHeader header = {(uint32_t)sizeof(header) + asked.size, 0, asked.unique};
    PyObject *words[5] = {
        Py_NewRef(quick), PyLong_FromUnsignedLongLong(asked.offset), PyLong_FromUnsignedLong(asked.size),
        Py_NewRef(self->outbox), PyBytes_FromStringAndSize((char *)&header, sizeof(header)),
    };
    PyObject *found = NULL;
    if (words[1] != NULL && words[2] != NULL && words[4] != NULL)
        found = PyObject_VectorcallMethod(name_answer, words, 5 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                          NULL);
    for (int i = 0; i < 5; i++)
        Py_XDECREF(words[i]);
    PyErr_Clear();
    int is_answered = found == Py_True;
    Py_XDECREF(found);
    PyObject *missing = is_answered ? NULL : PyObject_GetAttr(quick, name_missing);
    if (missing != NULL)
        self->missing = PyLong_AsLongLong(missing);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        self->missing = UNSURE;
    }
    Py_XDECREF(missing);
    Py_DECREF(quick);
    return is_answered;
}

PyDoc_STRVAR(next_doc,
"next(nanoseconds, is_lone) -> count\n\n"
"Answer requests for as long as that can be done here; then return the size of the next one, which\n"
"is in the buffer. IDLE: for so many nanoseconds there was none, OTHERS: one of the `others` became\n"
"readable, BUSY: so many were answered in a row that others want to run. Without nanoseconds it does\n"
"not wait, and gives the interpreter away while it reads: somebody else wants it.\n"
"`is_lone`: the guest waits for each answer, none is kept back. OSError: reading failed.");

static PyObject *device_next(PyObject *object, PyObject *const *args, Py_ssize_t arg_count)
{
    Device *self = (Device *)object;
    if (arg_count != 2) {
        PyErr_SetString(PyExc_TypeError, "next: two arguments");
        return NULL;
    }
    long long nanoseconds = PyLong_AsLongLong(args[0]);
    int is_lone = PyObject_IsTrue(args[1]);
    if (PyErr_Occurred())
        return NULL;
    for (unsigned answered = 0;;) {
        ssize_t count;
        if (nanoseconds > 0)
            count = read(self->fd, self->buffer.buf, (size_t)self->buffer.len);
        else {
            Py_BEGIN_ALLOW_THREADS
            count = read(self->fd, self->buffer.buf, (size_t)self->buffer.len);
            Py_END_ALLOW_THREADS
        }
        if (count < 0 && errno == EAGAIN) {
            self->runs += self->in_a_row > 0;
            self->in_a_row = 0;
            if (flush(self) < 0)
                return NULL;
            if (nanoseconds <= 0)
                return PyLong_FromLong(IDLE);
            Py_BEGIN_ALLOW_THREADS
            count = spin(self, nanoseconds);
            Py_END_ALLOW_THREADS
            if (count == IDLE || count == OTHERS)
                return PyLong_FromSsize_t(count);
        }
        if (count < 0)
            return PyErr_SetFromErrno(PyExc_OSError);
        self->requests++;
        self->in_a_row++;
        if (!answer(self, (size_t)count))
            return PyLong_FromSsize_t(count);
        self->answered++;
        if (is_lone && flush(self) < 0)
            return NULL;
        if (++answered >= ANSWERED_MAX)
            return PyLong_FromLong(BUSY);
    }
}

static PyMethodDef device_methods[] = {
    {"next", (PyCFunction)(void (*)(void))device_next, METH_FASTCALL, next_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef device_members[] = {
    {"requests", T_ULONGLONG, offsetof(Device, requests), READONLY, "Requests so far."},
    {"runs", T_ULONGLONG, offsetof(Device, runs), READONLY, "How often there was none after some."},
    {"missing", T_LONGLONG, offsetof(Device, missing), READONLY,
     "Where in the file what the request that `next` returned reads is not in memory; or UNSURE."},
    {"answered", T_ULONGLONG, offsetof(Device, answered), READONLY, "Those answered here."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot device_slots[] = {
    {Py_tp_new, device_new},
    {Py_tp_dealloc, device_dealloc},
    {Py_tp_traverse, device_traverse},
    {Py_tp_clear, device_clear},
    {Py_tp_methods, device_methods},
    {Py_tp_members, device_members},
    {Py_tp_doc,
     "Device(fd, buffer, others, handles, outbox, not_taken): requests of a descriptor that does not\n"
     "block. `handles`: by number, each with a `quick`, None or what answers its reads; `not_taken`:\n"
     "called with the errno of answers that were not. One thread at a time."},
    {0, NULL},
};

static PyType_Spec device_spec = {
    .name = "sealfs.mount._device.Device",
    .basicsize = sizeof(Device),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = device_slots,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sealfs.mount._device",
    .m_doc = "Requests of /dev/fuse.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__device(void)
{
    name_quick = PyUnicode_InternFromString("quick");
    name_answer = PyUnicode_InternFromString("answer");
    name_flush = PyUnicode_InternFromString("flush");
    name_missing = PyUnicode_InternFromString("missing");
    PyObject *self = PyModule_Create(&module), *type = PyType_FromSpec(&device_spec);
    if (self == NULL || type == NULL || PyErr_Occurred() ||
        PyModule_AddObjectRef(self, "Device", type) < 0)
        Py_CLEAR(self);
    Py_XDECREF(type);
    return self;
}
