/* Read blocks from the page cache, open them and send them on, in one call (FORMAT.md 3.3).
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
#define BLOCKS_MAX 32

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
    unsigned char blocks[BLOCKS_MAX * BLOCK_SIZE];
} Opener;

static void forget_keys(Opener *self)
{
    for (Py_ssize_t i = 0; i < self->count; i++)
        EVP_CIPHER_CTX_free(self->keys[i].ctx); /* wipes the key */
    PyMem_Free(self->keys);
    self->keys = NULL;
    self->count = 0;
    OPENSSL_cleanse(self->blocks, sizeof(self->blocks));
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

PyDoc_STRVAR(forget_doc, "forget()\n\nWipe all keys, and what was read last.");

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
                      uint64_t block, unsigned char *content)
{
    int count;
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
"send(fd, offset, block, count, leaf, at, out_fd, header) -> content\n\n"
"Read `count` present blocks at `offset` of fd, 32 at most, if they are in the page cache, open\n"
"them by the entries from `at` on of their leaf page, and write header and content to out_fd in one\n"
"piece. Returns the content of one block, True for several; None where reading would wait (or\n"
"failed); False where one does not authenticate: then nothing was sent. KeyError: the epoch that the entry names, if its key is not known. OSError: writing failed.");

static PyObject *opener_send(PyObject *object, PyObject *const *args, Py_ssize_t arg_count)
{
    Opener *self = (Opener *)object;
    Py_buffer leaf = {0}, header = {0};
    PyObject *result = NULL;

    if (arg_count != 8) {
        PyErr_SetString(PyExc_TypeError, "send: eight arguments");
        return NULL;
    }
    int fd = (int)PyLong_AsLong(args[0]), out_fd = (int)PyLong_AsLong(args[6]);
    long long offset = PyLong_AsLongLong(args[1]);
    unsigned long long block = PyLong_AsUnsignedLongLong(args[2]);
    Py_ssize_t count = PyLong_AsSsize_t(args[3]), at = PyLong_AsSsize_t(args[5]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[4], &leaf, PyBUF_SIMPLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[7], &header, PyBUF_SIMPLE) < 0)
        goto end;
    if (count < 1 || count > BLOCKS_MAX || at < 0 || at > leaf.len - count * ENTRY_SIZE) {
        PyErr_SetString(PyExc_ValueError, "send: sizes do not fit");
        goto end;
    }
    const unsigned char *entry = (const unsigned char *)leaf.buf + at;
    size_t size = (size_t)count * BLOCK_SIZE;
    EVP_CIPHER_CTX *ctxs[BLOCKS_MAX];
    for (Py_ssize_t i = 0; i < count; i++, entry += ENTRY_SIZE) {
        ctxs[i] = find_key(self, entry);
        if (ctxs[i] != NULL)
            continue;
        PyObject *epoch = PyObject_CallMethod((PyObject *)&PyLong_Type, "from_bytes", "y#s", entry,
                                              (Py_ssize_t)4, "little");
        PyErr_SetObject(PyExc_KeyError, epoch);
        Py_XDECREF(epoch);
        goto end;
    }
    unsigned char *plain = self->blocks;
    struct iovec in = {plain, size};
    if (preadv2(fd, &in, 1, (off_t)offset, RWF_NOWAIT) != (ssize_t)size) {
        result = Py_NewRef(Py_None);
        goto end;
    }
    entry = (const unsigned char *)leaf.buf + at;
    for (Py_ssize_t i = 0; i < count; i++, entry += ENTRY_SIZE) {
        if (!open_block(self, ctxs[i], entry, block + (uint64_t)i, plain + i * BLOCK_SIZE)) {
            OPENSSL_cleanse(plain, size); /* nothing of it may be taken for plaintext */
            result = Py_NewRef(Py_False);
            goto end;
        }
    }
    struct iovec out[2] = {{header.buf, (size_t)header.len}, {plain, size}};
    ssize_t written;
    do
        written = writev(out_fd, out, 2);
    while (written < 0 && errno == EINTR);
    if (written != header.len + (ssize_t)size) {
        if (written >= 0)
            errno = EIO;
        PyErr_SetFromErrno(PyExc_OSError);
    } else {
        result = count > 1 ? Py_NewRef(Py_True)
                           : PyBytes_FromStringAndSize((char *)plain, BLOCK_SIZE);
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
