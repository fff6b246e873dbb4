/* Read one block from the page cache, open it and send it on, in one call (FORMAT.md 3.3).
 *
 * The hot path of a guest that reads at random: each call from Python that is saved is a part of
 * what the guest waits for. The interpreter is kept all the while: nothing here waits for a disk,
 * and giving it away costs more. reader.py does the same without this module.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#define BLOCK_SIZE 4096
#define ENTRY_SIZE 32 /* epoch (4), counter (8), tag (16), flags (4); FORMAT.md 6.1 */
#define NONCE_SIZE 12
#define TAG_SIZE 16
#define KEY_SIZE 32
#define PREFIX_MAX 56

typedef struct {
    PyObject_HEAD
    EVP_CIPHER_CTX *ctx; /* holds the key, expanded once */
    unsigned char aad[PREFIX_MAX + 8];
    int prefix_size;
} Opener;

static void opener_dealloc(Opener *self)
{
    PyTypeObject *type = Py_TYPE(self);
    EVP_CIPHER_CTX_free(self->ctx); /* wipes the key */
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *opener_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Py_buffer key = {0}, prefix = {0};
    Opener *self = NULL;
    EVP_CIPHER *cipher = NULL;

    if (!PyArg_ParseTuple(args, "y*y*", &key, &prefix))
        return NULL;
    if (key.len != KEY_SIZE || prefix.len > PREFIX_MAX) {
        PyErr_SetString(PyExc_ValueError, "Opener: sizes do not fit");
        goto end;
    }
    self = (Opener *)type->tp_alloc(type, 0);
    if (self == NULL)
        goto end;
    memcpy(self->aad, prefix.buf, prefix.len);
    self->prefix_size = (int)prefix.len;
    cipher = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
    self->ctx = EVP_CIPHER_CTX_new();
    if (cipher == NULL || self->ctx == NULL ||
        EVP_DecryptInit_ex(self->ctx, cipher, NULL, key.buf, NULL) != 1) {
        PyErr_SetString(PyExc_RuntimeError, "Opener: libcrypto failed");
        Py_CLEAR(self);
    }
end:
    EVP_CIPHER_free(cipher);
    PyBuffer_Release(&key);
    PyBuffer_Release(&prefix);
    return (PyObject *)self;
}

/* Returns 1, or 0 where the block does not authenticate. In place. */
static int open_block(Opener *self, const unsigned char *entry, uint64_t block,
                      unsigned char *content)
{
    int count;
    for (int i = 0; i < 8; i++)
        self->aad[self->prefix_size + i] = (unsigned char)(block >> 8 * i);
    return EVP_DecryptInit_ex(self->ctx, NULL, NULL, NULL, entry) == 1 &&
           EVP_DecryptUpdate(self->ctx, NULL, &count, self->aad, self->prefix_size + 8) == 1 &&
           EVP_DecryptUpdate(self->ctx, content, &count, content, BLOCK_SIZE) == 1 &&
           count == BLOCK_SIZE &&
           EVP_CIPHER_CTX_ctrl(self->ctx, EVP_CTRL_GCM_SET_TAG, TAG_SIZE,
                               (void *)(entry + NONCE_SIZE)) == 1 &&
           EVP_DecryptFinal_ex(self->ctx, content + BLOCK_SIZE, &count) == 1 && count == 0;
}

PyDoc_STRVAR(send_doc,
"send(fd, offset, block, leaf, at, out_fd, header) -> content\n\n"
"Read the block at `offset` of fd if it is in the page cache, open it by the entry at `at` of its\n"
"leaf page, and write header and content to out_fd in one piece. Returns the content; None where\n"
"reading would wait (or failed); False where the block does not authenticate: then nothing was\n"
"sent. OSError: writing failed.");

static PyObject *opener_send(PyObject *object, PyObject *const *args, Py_ssize_t arg_count)
{
    Opener *self = (Opener *)object;
    Py_buffer leaf = {0}, header = {0};
    PyObject *content = NULL, *result = NULL;

    if (arg_count != 7) {
        PyErr_SetString(PyExc_TypeError, "send: seven arguments");
        return NULL;
    }
    int fd = (int)PyLong_AsLong(args[0]), out_fd = (int)PyLong_AsLong(args[5]);
    long long offset = PyLong_AsLongLong(args[1]);
    unsigned long long block = PyLong_AsUnsignedLongLong(args[2]);
    Py_ssize_t at = PyLong_AsSsize_t(args[4]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[3], &leaf, PyBUF_SIMPLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[6], &header, PyBUF_SIMPLE) < 0)
        goto end;
    if (at < 0 || at > leaf.len - ENTRY_SIZE) {
        PyErr_SetString(PyExc_ValueError, "send: sizes do not fit");
        goto end;
    }
    content = PyBytes_FromStringAndSize(NULL, BLOCK_SIZE);
    if (content == NULL)
        goto end;
    unsigned char *plain = (unsigned char *)PyBytes_AS_STRING(content);
    struct iovec in = {plain, BLOCK_SIZE};
    if (preadv2(fd, &in, 1, (off_t)offset, RWF_NOWAIT) != BLOCK_SIZE) {
        result = Py_NewRef(Py_None);
        goto end;
    }
    if (!open_block(self, (const unsigned char *)leaf.buf + at, block, plain)) {
        OPENSSL_cleanse(plain, BLOCK_SIZE); /* nothing of it may be taken for plaintext */
        result = Py_NewRef(Py_False);
        goto end;
    }
    struct iovec out[2] = {{header.buf, (size_t)header.len}, {plain, BLOCK_SIZE}};
    ssize_t written;
    do
        written = writev(out_fd, out, 2);
    while (written < 0 && errno == EINTR);
    if (written != header.len + BLOCK_SIZE) {
        if (written >= 0)
            errno = EIO;
        PyErr_SetFromErrno(PyExc_OSError);
    } else {
        result = Py_NewRef(content);
    }
end:
    Py_XDECREF(content);
    PyBuffer_Release(&leaf);
    PyBuffer_Release(&header);
    return result;
}

static PyMethodDef opener_methods[] = {
    {"send", (PyCFunction)(void (*)(void))opener_send, METH_FASTCALL, send_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot opener_slots[] = {
    {Py_tp_new, opener_new},
    {Py_tp_dealloc, opener_dealloc},
    {Py_tp_methods, opener_methods},
    {Py_tp_doc, "Opener(key, prefix): opens blocks of one epoch. For one thread at a time."},
    {0, NULL},
};

static PyType_Spec opener_spec = {
    .name = "sealfs.image._blockread.Opener",
    .basicsize = sizeof(Opener),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = opener_slots,
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sealfs.image._blockread",
    .m_doc = "Read a block that is in the page cache, open it, send it on.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__blockread(void)
{
    PyObject *self = PyModule_Create(&module);
    PyObject *type = self == NULL ? NULL : PyType_FromSpec(&opener_spec);
    if (type == NULL || PyModule_AddObjectRef(self, "Opener", type) < 0)
        Py_CLEAR(self);
    Py_XDECREF(type);
    return self;
}
