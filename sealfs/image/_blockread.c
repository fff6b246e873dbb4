/* Read blocks from the page cache and open them where they are sent from (FORMAT.md 3.3).
 *
 * The hot path of a guest that reads at random: each call from Python that is saved is a part of
 * what the guest waits for. The interpreter is kept all the while: nothing here waits for a disk,
 * and giving it away costs more. reader.py and outbox.py do the same without this module.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define BLOCK_SIZE 4096
#define ENTRY_SIZE 32 /* epoch (4), counter (8), tag (16), flags (4); FORMAT.md 6.1 */
#define NONCE_SIZE 12
#define TAG_SIZE 16
#define KEY_SIZE 32
#define PREFIX_MAX 56
#define BLOCKS_MAX 32
#define HEADER_MAX 64
#define ANSWERS_MAX 8
#define ANSWER_SIZE (HEADER_MAX + BLOCKS_MAX * BLOCK_SIZE)

/* Answers that are kept back until there are several: who asks several things at once is then woken
 * once for all. */
typedef struct {
    PyObject_HEAD
    int fd;
    int count;
    size_t sizes[ANSWERS_MAX];
    unsigned char *answers; /* plaintext: kept out of dumps, wiped in the end */
    PyObject *failed;
} Outbox;

static PyTypeObject *outbox_type;

static void outbox_dealloc(Outbox *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->answers != NULL) {
        OPENSSL_cleanse(self->answers, ANSWERS_MAX * ANSWER_SIZE);
        munmap(self->answers, ANSWERS_MAX * ANSWER_SIZE);
    }
    Py_XDECREF(self->failed);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *outbox_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int fd;
    if (!PyArg_ParseTuple(args, "i", &fd))
        return NULL;
    Outbox *self = (Outbox *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->fd = fd;
    self->failed = PyList_New(0);
    void *answers = mmap(NULL, ANSWERS_MAX * ANSWER_SIZE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (self->failed == NULL || answers == MAP_FAILED) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    self->answers = answers;
    (void)madvise(answers, ANSWERS_MAX * ANSWER_SIZE, MADV_DONTDUMP);
    return (PyObject *)self;
}

/* Write all that was kept back; the interpreter is kept: nothing here waits. Returns 0, or -1. */
static int send_all(Outbox *self)
{
    int status = 0;
    for (int i = 0; i < self->count; i++) {
        ssize_t count;
        do
            count = write(self->fd, self->answers + (size_t)i * ANSWER_SIZE, self->sizes[i]);
        while (count < 0 && errno == EINTR);
        if (count == (ssize_t)self->sizes[i])
            continue;
        PyObject *code = PyLong_FromLong(count < 0 ? errno : EIO);
        if (code == NULL || PyList_Append(self->failed, code) < 0)
            status = -1;
        Py_XDECREF(code);
    }
    self->count = 0;
    return status;
}

/* Returns where an answer with this header goes, or NULL with an exception set. */
static unsigned char *next_answer(Outbox *self, const Py_buffer *header)
{
    if (header->len > HEADER_MAX) {
        PyErr_SetString(PyExc_ValueError, "Outbox: sizes do not fit");
        return NULL;
    }
    if (self->count == ANSWERS_MAX && send_all(self) < 0)
        return NULL;
    unsigned char *answer = self->answers + (size_t)self->count * ANSWER_SIZE;
    memcpy(answer, header->buf, (size_t)header->len);
    return answer + header->len;
}

PyDoc_STRVAR(put_doc,
"put(header, content)\n\n"
"Keep an answer back, of header and content, 128 KiB at most; the eighth sends those before it.");

static PyObject *outbox_put(PyObject *object, PyObject *args)
{
    Outbox *self = (Outbox *)object;
    Py_buffer header = {0}, content = {0};
    if (!PyArg_ParseTuple(args, "y*y*", &header, &content))
        return NULL;
    if (content.len > BLOCKS_MAX * BLOCK_SIZE)
        PyErr_SetString(PyExc_ValueError, "Outbox: sizes do not fit");
    else {
        unsigned char *at = next_answer(self, &header);
        if (at != NULL) {
            memcpy(at, content.buf, (size_t)content.len);
            self->sizes[self->count++] = (size_t)(header.len + content.len);
        }
    }
    PyBuffer_Release(&header);
    PyBuffer_Release(&content);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(flush_doc,
"flush() -> list\n\nSend what was kept back; returns the errno of those that were not taken.");

static PyObject *outbox_flush(PyObject *object, PyObject *unused)
{
    Outbox *self = (Outbox *)object;
    if (send_all(self) < 0)
        return NULL;
    if (PyList_GET_SIZE(self->failed) == 0)
        return Py_NewRef(self->failed); /* nobody changes it: mostly there is none */
    PyObject *fresh = PyList_New(0), *failed = self->failed;
    if (fresh == NULL)
        return NULL;
    self->failed = fresh;
    return failed;
}

static PyObject *outbox_count(PyObject *object, void *unused)
{
    return PyLong_FromLong(((Outbox *)object)->count);
}

static PyMethodDef outbox_methods[] = {
    {"put", outbox_put, METH_VARARGS, put_doc},
    {"flush", outbox_flush, METH_NOARGS, flush_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef outbox_values[] = {
    {"count", outbox_count, NULL, "Answers kept back.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot outbox_slots[] = {
    {Py_tp_new, outbox_new},
    {Py_tp_dealloc, outbox_dealloc},
    {Py_tp_methods, outbox_methods},
    {Py_tp_getset, outbox_values},
    {Py_tp_doc, "Outbox(fd): answers that are sent together. One thread at a time."},
    {0, NULL},
};

static PyType_Spec outbox_spec = {
    .name = "sealfs.image._blockread.Outbox",
    .basicsize = sizeof(Outbox),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = outbox_slots,
};

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
} Opener;

static void forget_keys(Opener *self)
{
    for (Py_ssize_t i = 0; i < self->count; i++)
        EVP_CIPHER_CTX_free(self->keys[i].ctx); /* wipes the key */
    PyMem_Free(self->keys);
    self->keys = NULL;
    self->count = 0;
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

PyDoc_STRVAR(forget_doc, "forget()\n\nWipe all keys.");

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
"send(fd, offset, block, count, leaf, at, outbox, header, keep) -> content\n\n"
"Read `count` present blocks at `offset` of fd, 32 at most, if they are in the page cache, open\n"
"them by the entries from `at` on of their leaf page, and put header and content into the outbox.\n"
"Returns the content where it is to be kept, else True; None where reading would wait (or failed);\n"
"False where one does not authenticate: then nothing is sent. KeyError: the epoch that an entry\n"
"names, if its key is not known.");

static PyObject *opener_send(PyObject *object, PyObject *const *args, Py_ssize_t arg_count)
{
    Opener *self = (Opener *)object;
    Py_buffer leaf = {0}, header = {0};
    PyObject *result = NULL;

    if (arg_count != 9 || !Py_IS_TYPE(args[6], outbox_type)) {
        PyErr_SetString(PyExc_TypeError, "send: nine arguments, the seventh an Outbox");
        return NULL;
    }
    Outbox *outbox = (Outbox *)args[6];
    int fd = (int)PyLong_AsLong(args[0]), keep = PyObject_IsTrue(args[8]);
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
    unsigned char *plain = next_answer(outbox, &header);
    if (plain == NULL)
        goto end;
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
    result = keep ? PyBytes_FromStringAndSize((char *)plain, (Py_ssize_t)size)
                  : Py_NewRef(Py_True);
    if (result != NULL)
        outbox->sizes[outbox->count++] = (size_t)header.len + size;
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
    PyObject *opener = PyType_FromSpec(&opener_spec), *outbox = PyType_FromSpec(&outbox_spec);
    if (self == NULL || opener == NULL || outbox == NULL ||
        PyModule_AddObjectRef(self, "Opener", opener) < 0 ||
        PyModule_AddObjectRef(self, "Outbox", outbox) < 0)
        Py_CLEAR(self);
    Py_XDECREF(opener);
    outbox_type = (PyTypeObject *)outbox; /* kept for as long as the process lives */
    return self;
}
