/* Requests of /dev/fuse: wait for them, and answer reads and writes that need nothing but memory.
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
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define OTHERS_MAX 8
#define LOOK_EVERY 8 /* reads between two looks at the others and at the clock */
#define ANSWERED_MAX 64 /* in a row: other tasks want to run too */

#define IDLE -1
#define OTHERS -2
#define BUSY -3
#define FAILED -4

#define BLOCK_SIZE 4096
#define LANDING_BLOCKS 256 /* the longest write: 1 MiB */
#define LANDING_PARTS 64   /* pieces of memory at most: more cost more than a copy */
#define LONG_WRITE (64 << 10)

/* <linux/fuse.h>: fuse_in_header and fuse_read_in or fuse_write_in, fuse_out_header */
#define OPCODE_READ 15
#define OPCODE_WRITE 16
#define WRITE_CACHE 1
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
    uint32_t length, opcode;
    uint64_t unique, node;
    uint32_t uid, gid, pid, rest;
    uint64_t handle, offset;
    uint32_t size, write_flags;
    uint64_t lock_owner;
    uint32_t flags, padding;
} WriteRequest; /* and what is to be written */
typedef struct {
    uint32_t length;
    int32_t error;
    uint64_t unique;
} AnswerHeader;
typedef struct {
    AnswerHeader header;
    uint32_t size, padding;
} WrittenAnswer;

typedef struct {
    PyObject_HEAD
    int fd;
    Py_buffer buffer; /* where requests go */
    struct pollfd others[OTHERS_MAX];
    nfds_t other_count;
    PyObject *handles, *outbox, *not_taken, *shared;
    unsigned long long requests, runs, answered, taken;
    long long missing;
    unsigned in_a_row;
    Py_buffer slab; /* of the cache, once there is one */
    int wants_landing; /* the last request was a long write: so will be the next */
    struct iovec places[LANDING_PARTS + 2]; /* where a request goes */
    int place_count;
} Device;

#define UNSURE -2 /* as in image/reader.py */

static PyObject *name_quick, *name_answer, *name_flush, *name_missing, *name_taker, *name_take,
    *name_take_landed, *name_put, *name_disk, *name_buffered_handles, *name_memory, *name_free,
    *nothing;

static int device_clear(Device *self)
{
    PyBuffer_Release(&self->buffer);
    PyBuffer_Release(&self->slab);
    Py_CLEAR(self->handles);
    Py_CLEAR(self->outbox);
    Py_CLEAR(self->not_taken);
    Py_CLEAR(self->shared);
    return 0;
}

static int device_traverse(Device *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->buffer.obj);
    Py_VISIT(self->handles);
    Py_VISIT(self->outbox);
    Py_VISIT(self->not_taken);
    Py_VISIT(self->shared);
    Py_VISIT(self->slab.obj);
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
    PyObject *others, *handles, *outbox, *not_taken, *shared;
    if (!PyArg_ParseTuple(args, "iw*O!O!OOO", &fd, &buffer, &PyTuple_Type, &others, &PyDict_Type,
                          &handles, &outbox, &not_taken, &shared))
        return NULL;
    Device *self = NULL;
    if (PyTuple_GET_SIZE(others) > OTHERS_MAX || buffer.len < (Py_ssize_t)sizeof(WriteRequest))
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
    self->shared = Py_NewRef(shared);
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
        count = readv(self->fd, self->places, self->place_count);
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

/* Choose where the next request goes: the buffer, or what it is to write into the free frames that
 * come next. Nobody else takes those while the owner's thread is in `next`. */
static void prepare(Device *self)
{
    char *buffer = self->buffer.buf;
    self->places[0] = (struct iovec){buffer, (size_t)self->buffer.len};
    self->place_count = 1;
    size_t whole = sizeof(WriteRequest) + LANDING_BLOCKS * BLOCK_SIZE;
    if (!self->wants_landing || (size_t)self->buffer.len < whole)
        return;
    if (self->slab.buf == NULL) {
        PyObject *memory = PyObject_GetAttr(self->shared, name_memory);
        if (memory == NULL || PyMemoryView_Check(memory) || /* see BlockCache.memory */
            PyObject_GetBuffer(memory, &self->slab, PyBUF_WRITABLE) < 0) {
            self->slab = (Py_buffer){0}; /* who fails may leave something in it */
            PyErr_Clear();
        }
        Py_XDECREF(memory);
    }
    PyObject *free = self->slab.buf == NULL ? NULL : PyObject_GetAttr(self->shared, name_free);
    if (free == NULL || !PyList_CheckExact(free) || PyList_GET_SIZE(free) < LANDING_BLOCKS)
        goto end;
    Py_ssize_t last = PyList_GET_SIZE(free) - 1, frame_count = self->slab.len / BLOCK_SIZE;
    struct iovec *place = self->places;
    for (Py_ssize_t i = 0; i < LANDING_BLOCKS; i++) {
        Py_ssize_t frame = PyLong_AsSsize_t(PyList_GET_ITEM(free, last - i));
        if (frame < 0 || frame >= frame_count)
            goto end;
        char *at = (char *)self->slab.buf + frame * BLOCK_SIZE;
        if (i && at == (char *)place->iov_base + place->iov_len) {
            place->iov_len += BLOCK_SIZE;
            continue;
        }
        if (++place > self->places + LANDING_PARTS)
            goto end;
        *place = (struct iovec){at, BLOCK_SIZE};
    }
    *++place = (struct iovec){buffer + whole, (size_t)self->buffer.len - whole};
    self->places[0].iov_len = sizeof(WriteRequest);
    self->place_count = (int)(place - self->places) + 1;
end:
    PyErr_Clear();
    Py_XDECREF(free);
}

/* Bring into the buffer what of a request went elsewhere. */
static void gather(Device *self, size_t count)
{
    char *to = (char *)self->buffer.buf + sizeof(WriteRequest);
    size_t left = count < sizeof(WriteRequest) ? 0 : count - sizeof(WriteRequest);
    for (int i = 1; left && i < self->place_count - 1; i++) {
        size_t size = self->places[i].iov_len < left ? self->places[i].iov_len : left;
        memcpy(to, self->places[i].iov_base, size);
        to += size;
        left -= size;
    }
}

/* Returns a handle by its number, borrowed; NULL where there is none. */
static PyObject *find_handle(Device *self, uint64_t number)
{
    PyObject *key = PyLong_FromUnsignedLongLong(number), *handle = NULL;
    if (key != NULL)
        handle = PyDict_GetItemWithError(self->handles, key);
    Py_XDECREF(key);
    return handle;
}

/* Whether the kernel may have pages of what a handle writes past them: a task's to look after. */
static int is_beside_readers(PyObject *handle, const WriteRequest *asked)
{
    if (!(asked->flags & O_DIRECT) || asked->write_flags & WRITE_CACHE)
        return 0;
    PyObject *disk = PyObject_GetAttr(handle, name_disk), *count = NULL;
    if (disk != NULL)
        count = PyObject_GetAttr(disk, name_buffered_handles);
    int status = count == NULL ? -1 : PyObject_IsTrue(count);
    Py_XDECREF(count);
    Py_XDECREF(disk);
    return status;
}

/* Accept the write in the buffer, or in the frames: whether that was done. */
static int take(Device *self, size_t count)
{
    WriteRequest asked;
    PyObject *taker = NULL, *handle, *taken = NULL, *put = NULL;
    int is_taken = 0;
    if (count < sizeof(asked))
        return 0;
    memcpy(&asked, self->buffer.buf, sizeof(asked));
    self->wants_landing = count >= sizeof(asked) + LONG_WRITE;
    if (asked.length != count || count != sizeof(asked) + asked.size || asked.offset > INT64_MAX ||
        asked.flags & O_DSYNC)
        return 0;
    handle = Py_XNewRef(find_handle(self, asked.handle));
    if (handle != NULL)
        taker = PyObject_GetAttr(handle, name_taker);
    if (taker == NULL || taker == Py_None || is_beside_readers(handle, &asked))
        goto end;
    char *content = (char *)self->buffer.buf + sizeof(asked);
    int is_landed = self->place_count > 1;
    PyObject *words[3] = {
        Py_NewRef(taker), PyLong_FromUnsignedLongLong(asked.offset),
        is_landed ? PyLong_FromUnsignedLong(asked.size)
                  : PyMemoryView_FromMemory(content, (Py_ssize_t)asked.size, PyBUF_READ),
    };
    if (words[1] != NULL && words[2] != NULL)
        taken = PyObject_VectorcallMethod(is_landed ? name_take_landed : name_take, words,
                                          3 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    for (int i = 0; i < 3; i++)
        Py_XDECREF(words[i]);
    if (taken == Py_True) {
        WrittenAnswer answer = {{(uint32_t)sizeof(answer), 0, asked.unique}, asked.size, 0};
        PyObject *header = PyBytes_FromStringAndSize((char *)&answer, sizeof(answer));
        if (header != NULL)
            put = PyObject_CallMethodObjArgs(self->outbox, name_put, header, nothing, NULL);
        Py_XDECREF(header);
        is_taken = put != NULL; /* else it is accepted again, and answered by who does it */
    }
end:
    PyErr_Clear(); /* who takes the long way meets it again, and says it */
    Py_XDECREF(put);
    Py_XDECREF(taken);
    Py_XDECREF(taker);
    Py_XDECREF(handle);
    return is_taken;
}

/* Answer the read in the buffer: whether that was done. */
static int answer(Device *self, size_t count)
{
    ReadRequest asked;
    if (count < sizeof(asked))
        return 0;
    memcpy(&asked, self->buffer.buf, sizeof(asked));
    if (asked.length != count || asked.offset > INT64_MAX)
        return 0;
    PyObject *handle = find_handle(self, asked.handle);
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

/* Do what the request in the buffer asks for: whether that was done. */
static int serve(Device *self, size_t count)
{
    uint32_t opcode = 0;
    if (count >= offsetof(ReadRequest, unique))
        memcpy(&opcode, (char *)self->buffer.buf + offsetof(ReadRequest, opcode), sizeof(opcode));
    int is_write = opcode == OPCODE_WRITE;
    if (!is_write)
        self->wants_landing = 0;
    self->missing = UNSURE;
    if (is_write && take(self, count)) {
        self->taken++;
        return 1;
    }
    if (opcode == OPCODE_READ && answer(self, count)) {
        self->answered++;
        return 1;
    }
    gather(self, count);
    return 0;
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
        prepare(self);
        if (nanoseconds > 0)
            count = readv(self->fd, self->places, self->place_count);
        else {
            Py_BEGIN_ALLOW_THREADS
            count = readv(self->fd, self->places, self->place_count);
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
        if (!serve(self, (size_t)count))
            return PyLong_FromSsize_t(count);
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
    {"answered", T_ULONGLONG, offsetof(Device, answered), READONLY, "Reads answered here."},
    {"taken", T_ULONGLONG, offsetof(Device, taken), READONLY, "Writes accepted here."},
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
     "Device(fd, buffer, others, handles, outbox, not_taken, shared): requests of a descriptor that\n"
     "does not block. `handles`: by number, each with a `quick` and a `taker`, None or what answers\n"
     "its reads and accepts its writes, and with its `disk`; `not_taken`: called with the errno of\n"
     "answers that were not; `shared`: the cache, of whose `memory` the next `free` frames may be\n"
     "written. One thread at a time."},
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
    name_taker = PyUnicode_InternFromString("taker");
    name_take = PyUnicode_InternFromString("take");
    name_take_landed = PyUnicode_InternFromString("take_landed");
    name_put = PyUnicode_InternFromString("put");
    name_disk = PyUnicode_InternFromString("disk");
    name_buffered_handles = PyUnicode_InternFromString("buffered_handles");
    name_memory = PyUnicode_InternFromString("memory");
    name_free = PyUnicode_InternFromString("free");
    nothing = PyBytes_FromStringAndSize(NULL, 0);
    PyObject *self = PyModule_Create(&module), *type = PyType_FromSpec(&device_spec);
    if (self == NULL || type == NULL || PyErr_Occurred() ||
        PyModule_AddObjectRef(self, "Device", type) < 0)
        Py_CLEAR(self);
    Py_XDECREF(type);
    return self;
}
