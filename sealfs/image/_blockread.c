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
    uint32_t epoch;
    EVP_CIPHER_CTX *ctx; /* holds the key, expanded once */
} Key;

typedef struct {
    PyObject_HEAD
    Key *keys;
    Py_ssize_t count;
    unsigned char aad[PREFIX_MAX + 8];
    int prefix_size;
    /* Hot, unlike a new object for each block; plaintext, so it is wiped in the end. */
    unsigned char block[BLOCK_SIZE];
} Opener;

static void forget_keys(Opener *self)
{
    for (Py_ssize_t i = 0; i < self->count; i++)
        EVP_CIPHER_CTX_free(self->keys[i].ctx); /* wipes the key */
    PyMem_Free(self->keys);
    self->keys = NULL;
    self->count = 0;
    OPENSSL_cleanse(self->block, BLOCK_SIZE);
}

static void opener_dealloc(Opener *self)
{
    PyTypeObject *type = Py_TYPE(self);
    forget_keys(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *opener_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Py_buffer prefix = {0};
    Opener *self = NULL;

    if (!PyArg_ParseTuple(args, "y*", &prefix))
        return NULL;
    if (prefix.len > PREFIX_MAX)
        PyErr_SetString(PyExc_ValueError, "Opener: sizes do not fit");
    else
        self = (Opener *)type->tp_alloc(type, 0);
    if (self != NULL) {
        memcpy(self->aad, prefix.buf, prefix.len);
        self->prefix_size = (int)prefix.len;
    }
    PyBuffer_Release(&prefix);
    return (PyObject *)self;
}

PyDoc_STRVAR(add_doc, "add(epoch, key)\n\nLearn the key of an epoch, 32 bytes.");

static PyObject *opener_add(PyObject *object, PyObject *args)
{
    Opener *self = (Opener *)object;
    unsigned long epoch;
    Py_buffer key = {0};
    EVP_CIPHER *cipher = NULL;
    EVP_CIPHER_CTX *ctx = NULL;

    if (!PyArg_ParseTuple(args, "ky*", &epoch, &key))
        return NULL;
    if (key.len != KEY_SIZE || epoch > UINT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "add: sizes do not fit");
        goto end;
    }
    Key *keys = PyMem_Realloc(self->keys, (self->count + 1) * sizeof(*keys));
    if (keys == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    self->keys = keys;
    cipher = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
    ctx = EVP_CIPHER_CTX_new();
    if (cipher == NULL || ctx == NULL ||
        EVP_DecryptInit_ex(ctx, cipher, NULL, key.buf, NULL) != 1) {
        EVP_CIPHER_CTX_free(ctx);
        PyErr_SetString(PyExc_RuntimeError, "add: libcrypto failed");
        goto end;
    }
    keys[self->count++] = (Key){(uint32_t)epoch, ctx};
end:
    EVP_CIPHER_free(cipher);
    PyBuffer_Release(&key);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(forget_doc, "forget()\n\nWipe all keys, and the block that was read last.");

static PyObject *opener_forget(PyObject *object, PyObject *unused)
{
    forget_keys((Opener *)object);
    Py_RETURN_NONE;
}

/* Returns the context of an entry's epoch, NULL where it is not known; the last used comes first. */
static EVP_CIPHER_CTX *find_key(Opener *self, const unsigned char *entry)
{
    uint32_t epoch = entry[0] | entry[1] << 8 | entry[2] << 16 | (uint32_t)entry[3] << 24;
    for (Py_ssize_t i = 0; i < self->count; i++) {
        if (self->keys[i].epoch == epoch) {
            Key found = self->keys[i];
            self->keys[i] = self->keys[0];
            self->keys[0] = found;
            return found.ctx;
        }
    }
    return NULL;
}

/* Returns 1, or 0 where the block does not authenticate. In place. */
static int open_block(Opener *self, EVP_CIPHER_CTX *ctx, const unsigned char *entry,
                      uint64_t block)
{
    int count;
    unsigned char *content = self->block;
    for (int i = 0; i < 8; i++)
        self->aad[self->prefix_size + i] = (unsigned char)(block >> 8 * i);
    return EVP_DecryptInit_ex(ctx, NULL, NULL, NULL, entry) == 1 &&
           EVP_DecryptUpdate(ctx, NULL, &count, self->aad, self->prefix_size + 8) == 1 &&
           EVP_DecryptUpdate(ctx, content, &count, content, BLOCK_SIZE) == 1 &&
           count == BLOCK_SIZE &&
           EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_GCM_SET_TAG, TAG_SIZE,
                               (void *)(entry + NONCE_SIZE)) == 1 &&
           EVP_DecryptFinal_ex(ctx, content + BLOCK_SIZE, &count) == 1 && count == 0;
}

PyDoc_STRVAR(send_doc,
"send(fd, offset, block, leaf, at, out_fd, header) -> content\n\n"
"Read the block at `offset` of fd if it is in the page cache, open it by the entry at `at` of its\n"
"leaf page, and write header and content to out_fd in one piece. Returns the content; None where\n"
"reading would wait (or failed); False where the block does not authenticate: then nothing was\n"
"sent. KeyError: the epoch that the entry names, if its key is not known. OSError: writing failed.");

static PyObject *opener_send(PyObject *object, PyObject *const *args, Py_ssize_t arg_count)
{
    Opener *self = (Opener *)object;
    Py_buffer leaf = {0}, header = {0};
    PyObject *result = NULL;

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
    const unsigned char *entry = (const unsigned char *)leaf.buf + at;
    EVP_CIPHER_CTX *ctx = find_key(self, entry);
    if (ctx == NULL) {
        PyObject *epoch = PyObject_CallMethod((PyObject *)&PyLong_Type, "from_bytes", "y#s", entry,
                                              (Py_ssize_t)4, "little");
        PyErr_SetObject(PyExc_KeyError, epoch);
        Py_XDECREF(epoch);
        goto end;
    }
    unsigned char *plain = self->block;
    struct iovec in = {plain, BLOCK_SIZE};
    if (preadv2(fd, &in, 1, (off_t)offset, RWF_NOWAIT) != BLOCK_SIZE) {
        result = Py_NewRef(Py_None);
        goto end;
    }
    if (!open_block(self, ctx, entry, block)) {
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
        result = PyBytes_FromStringAndSize((char *)plain, BLOCK_SIZE);
    }
end:
    PyBuffer_Release(&leaf);
    PyBuffer_Release(&header);
    return result;
}

static PyMethodDef opener_methods[] = {
    {"add", opener_add, METH_VARARGS, add_doc},
    {"forget", opener_forget, METH_NOARGS, forget_doc},
    {"send", (PyCFunction)(void (*)(void))opener_send, METH_FASTCALL, send_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot opener_slots[] = {
    {Py_tp_new, opener_new},
    {Py_tp_dealloc, opener_dealloc},
    {Py_tp_methods, opener_methods},
    {Py_tp_doc, "Opener(prefix): opens blocks of the epochs whose keys it has. One thread at a time."},
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
