/* Have parts of files brought into the page cache without waiting for it: an io_uring of reads.
 *
 * What is read goes to a scratch buffer that nobody looks at; whoever asked reads again, and finds
 * it in memory. fetcher.py does the same with threads where there is no io_uring.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <liburing.h>
#include <stdlib.h>

#define SIZE_MAX_EACH (128 << 10)
#define DEPTH 256

typedef struct {
    PyObject_HEAD
    struct io_uring ring;
    int is_open;
    unsigned under_way;
    unsigned char *scratch; /* one for all: what it holds is ciphertext, and of no use */
} Ring;

static void ring_end(Ring *self)
{
    struct io_uring_cqe *cqe;
    if (self->is_open) {
        self->is_open = 0;
        /* Nothing may write to the scratch buffer once it is gone. */
        while (self->under_way && io_uring_wait_cqe(&self->ring, &cqe) == 0) {
            io_uring_cqe_seen(&self->ring, cqe);
            self->under_way--;
        }
        io_uring_queue_exit(&self->ring);
    }
    free(self->scratch);
    self->scratch = NULL;
}

static void ring_dealloc(Ring *self)
{
    PyTypeObject *type = Py_TYPE(self);
    ring_end(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if (!PyArg_ParseTuple(args, ""))
        return NULL;
    Ring *self = (Ring *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->scratch = malloc(SIZE_MAX_EACH);
    if (self->scratch == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    int error = -io_uring_queue_init(DEPTH, &self->ring, 0);
    if (error) {
        Py_DECREF(self);
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    self->is_open = 1;
    return (PyObject *)self;
}

PyDoc_STRVAR(read_doc,
"read(fd, offset, size, number) -> bool\n\n"
"Begin to read so many bytes of a file, 128 KiB at most; `number`, unsigned 64 bit, is what `done` says when they are\n"
"in memory, or reading failed. False: too many are under way. It waits for nothing.");

static PyObject *ring_read(PyObject *object, PyObject *args)
{
    Ring *self = (Ring *)object;
    int fd;
    unsigned int size;
    unsigned long long offset, number;
    if (!PyArg_ParseTuple(args, "iKIK", &fd, &offset, &size, &number))
        return NULL;
    if (size > SIZE_MAX_EACH) {
        PyErr_SetString(PyExc_ValueError, "read: too much");
        return NULL;
    }
    struct io_uring_sqe *sqe = NULL;
    if (self->is_open && self->under_way < DEPTH)
        sqe = io_uring_get_sqe(&self->ring);
    if (sqe == NULL)
        Py_RETURN_FALSE;
    io_uring_prep_read(sqe, fd, self->scratch, size, offset);
    sqe->user_data = number;
    self->under_way++;
    int count = io_uring_submit(&self->ring);
    if (count < 0 && count != -EAGAIN && count != -EBUSY && count != -EINTR) {
        errno = -count;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_TRUE; /* what was not taken yet goes with the next, or with `done` */
}

PyDoc_STRVAR(done_doc, "done() -> list\n\nThe numbers of the reads that have ended since.");

static PyObject *ring_done(PyObject *object, PyObject *unused)
{
    Ring *self = (Ring *)object;
    struct io_uring_cqe *cqes[64];
    PyObject *found = PyList_New(0);
    if (found == NULL || !self->is_open)
        return found;
    if (io_uring_sq_ready(&self->ring))
        (void)io_uring_submit(&self->ring);
    unsigned count = io_uring_peek_batch_cqe(&self->ring, cqes, 64);
    for (unsigned i = 0; i < count; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(cqes[i]->user_data);
        if (number == NULL || PyList_Append(found, number) < 0) {
            Py_XDECREF(number);
            Py_CLEAR(found);
            break;
        }
        Py_DECREF(number);
    }
    if (found != NULL) {
        io_uring_cq_advance(&self->ring, count);
        self->under_way -= count;
    }
    return found;
}

PyDoc_STRVAR(close_doc, "close()\n\nWait for what is under way, and let go of the ring.");

static PyObject *ring_close(PyObject *object, PyObject *unused)
{
    ring_end((Ring *)object);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(fileno_doc, "fileno() -> int\n\nReadable when `done` has something to say.");

static PyObject *ring_fileno(PyObject *object, PyObject *unused)
{
    return PyLong_FromLong(((Ring *)object)->ring.ring_fd);
}

static PyMethodDef ring_methods[] = {
    {"read", ring_read, METH_VARARGS, read_doc},
    {"done", ring_done, METH_NOARGS, done_doc},
    {"close", ring_close, METH_NOARGS, close_doc},
    {"fileno", ring_fileno, METH_NOARGS, fileno_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {Py_tp_doc, "Reads under way. OSError: the kernel gives no io_uring. One thread at a time."},
    {0, NULL},
};

static PyType_Spec ring_spec = {
    .name = "sealfs.mount._ring.Ring",
    .basicsize = sizeof(Ring),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = ring_slots,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sealfs.mount._ring",
    .m_doc = "Reads that bring parts of files into the page cache, over io_uring.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__ring(void)
{
    PyObject *self = PyModule_Create(&module);
    PyObject *type = self == NULL ? NULL : PyType_FromSpec(&ring_spec);
    if (type == NULL || PyModule_AddObjectRef(self, "Ring", type) < 0)
        Py_CLEAR(self);
    Py_XDECREF(type);
    return self;
}
