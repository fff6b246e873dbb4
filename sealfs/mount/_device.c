/* Wait for a request of /dev/fuse by asking again and again, without the interpreter.
 *
 * To be woken costs more than serving a block. device.py does the same without this module.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#define OTHERS_MAX 8
#define LOOK_EVERY 8 /* reads between two looks at the others and at the clock */

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

PyDoc_STRVAR(spin_read_doc,
"spin_read(fd, buffer, others, nanoseconds) -> count\n\n"
"Read from a descriptor that does not block, as soon as there is something, for so long at most.\n"
"Returns the bytes read; -1 when the time is up, -2 when one of the tuple `others` is readable.\n"
"OSError: reading failed.");

static PyObject *spin_read(PyObject *self, PyObject *args)
{
    int fd, error = 0;
    Py_buffer buffer = {0};
    PyObject *others;
    long long limit;
    ssize_t count = -1;
    struct pollfd polled[OTHERS_MAX];
    nfds_t other_count;

    if (!PyArg_ParseTuple(args, "iw*O!L", &fd, &buffer, &PyTuple_Type, &others, &limit))
        return NULL;
    other_count = (nfds_t)PyTuple_GET_SIZE(others);
    if (other_count > OTHERS_MAX) {
        PyErr_SetString(PyExc_ValueError, "spin_read: too many others");
        goto end;
    }
    for (nfds_t i = 0; i < other_count; i++) {
        polled[i].fd = (int)PyLong_AsLong(PyTuple_GET_ITEM(others, (Py_ssize_t)i));
        polled[i].events = POLLIN;
    }
    if (PyErr_Occurred())
        goto end;
    Py_BEGIN_ALLOW_THREADS
    long long end_ns = now_ns() + limit;
    for (unsigned i = 0;; i++) {
        count = read(fd, buffer.buf, (size_t)buffer.len);
        if (count >= 0)
            break;
        if (errno != EAGAIN) {
            error = errno;
            break;
        }
        if (i % LOOK_EVERY == 0) {
            if (poll(polled, other_count, 0) > 0) {
                count = -2;
                break;
            }
            if (now_ns() > end_ns)
                break;
        }
    }
    Py_END_ALLOW_THREADS
    if (error) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
    }
end:
    PyBuffer_Release(&buffer);
    return PyErr_Occurred() ? NULL : PyLong_FromSsize_t(count);
}

static PyMethodDef methods[] = {
    {"spin_read", spin_read, METH_VARARGS, spin_read_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sealfs.mount._device",
    .m_doc = "Requests of /dev/fuse.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__device(void)
{
    return PyModule_Create(&module);
}
