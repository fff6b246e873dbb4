/* Requests and answers of /dev/fuse, with few hand-overs of the interpreter.
 *
 * To be woken, or to wait for the interpreter, costs more than serving a block. device.py does the
 * same without this module.
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

PyDoc_STRVAR(write_each_doc,
"write_each(fd, answers) -> list\n\n"
"Write each of a list of bytes objects. Returns the errno of those that were not taken.");

static PyObject *write_each(PyObject *self, PyObject *args)
{
    int fd;
    PyObject *answers, *failed = PyList_New(0);

    if (failed == NULL || !PyArg_ParseTuple(args, "iO!", &fd, &PyList_Type, &answers)) {
        Py_XDECREF(failed);
        return NULL;
    }
    /* The interpreter is kept: nothing here waits. */
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(answers); i++) {
        char *from;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(PyList_GET_ITEM(answers, i), &from, &size) < 0)
            goto error;
        ssize_t count;
        do
            count = write(fd, from, (size_t)size);
        while (count < 0 && errno == EINTR);
        if (count == size)
            continue;
        PyObject *code = PyLong_FromLong(count < 0 ? errno : EIO);
        if (code == NULL || PyList_Append(failed, code) < 0) {
            Py_XDECREF(code);
            goto error;
        }
        Py_DECREF(code);
    }
    return failed;
error:
    Py_DECREF(failed);
    return NULL;
}

static PyMethodDef methods[] = {
    {"write_each", write_each, METH_VARARGS, write_each_doc},
    {"spin_read", spin_read, METH_VARARGS, spin_read_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sealfs.mount._device",
    .m_doc = "Requests and answers of /dev/fuse.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__device(void)
{
    return PyModule_Create(&module);
}
