/* Write many blocks of a file in one call, without the GIL.
 *
 * A commit writes thousands of blocks to places all over the file; taking the interpreter back
 * after each of them costs more than the write. storage.py does the same without this module.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>

#define BLOCK_SIZE 4096

PyDoc_STRVAR(write_blocks_doc,
"write_blocks(fd, offsets, content, hint_size) -> (index, errno)\n\n"
"Write block i of content at offsets[i] (native unsigned 64 bit each); neighbours that lie one\n"
"behind the other go in one write. What is at least hint_size bytes long is started on its way to\n"
"the device at once. Returns (-1, 0), or the index of the block that failed and its errno.");

static PyObject *write_blocks(PyObject *self, PyObject *args)
{
    int fd, error = 0;
    Py_buffer offsets = {0}, content = {0};
    Py_ssize_t hint_size, count, i = 0;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "iy*y*n", &fd, &offsets, &content, &hint_size))
        return NULL;
    count = offsets.len / (Py_ssize_t)sizeof(uint64_t);
    if (offsets.len % (Py_ssize_t)sizeof(uint64_t) || content.len != count * BLOCK_SIZE) {
        PyErr_SetString(PyExc_ValueError, "write_blocks: sizes do not fit");
        goto end;
    }
    Py_BEGIN_ALLOW_THREADS
    const uint64_t *at = offsets.buf;
    while (i < count && !error) {
        Py_ssize_t end = i + 1;
        while (end < count && at[end] == at[end - 1] + BLOCK_SIZE)
            end++;
        const char *from = (const char *)content.buf + i * BLOCK_SIZE;
        size_t size = (size_t)(end - i) * BLOCK_SIZE, done = 0;
        while (done < size) {
            ssize_t written = pwrite(fd, from + done, size - done, (off_t)(at[i] + done));
            if (written < 0 && errno == EINTR)
                continue;
            if (written <= 0) {
                error = written < 0 ? errno : EIO;
                break;
            }
            done += (size_t)written;
        }
        if (error)
            break;
        /* A hint: its failure is the next sync's to report. */
        if ((Py_ssize_t)size >= hint_size)
            (void)sync_file_range(fd, (off_t)at[i], (off_t)size, SYNC_FILE_RANGE_WRITE);
        i = end;
    }
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("ni", error ? i : (Py_ssize_t)-1, error);
end:
    PyBuffer_Release(&offsets);
    PyBuffer_Release(&content);
    return result;
}

static PyMethodDef methods[] = {
    {"write_blocks", write_blocks, METH_VARARGS, write_blocks_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sealfs.image._blockwrite",
    .m_doc = "Writes of many blocks in one call.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__blockwrite(void)
{
    return PyModule_Create(&module);
}
