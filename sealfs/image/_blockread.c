/* Read blocks from the page cache and open them where they are sent from (FORMAT.md 3.3).
 *
 * The hot path of a guest that reads at random: each call from Python that is saved is a part of
 * what the guest waits for. The interpreter is kept all the while: nothing here waits for a disk,
 * and giving it away costs more. reader.py and outbox.py do the same without this module.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "_state.h"

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

/* Put `count` blocks at `offset` of fd, opened, into the outbox. */
enum sent { SENT, WOULD_WAIT, NOT_AUTHENTIC, KEY_UNKNOWN, FAILED };

static enum sent send_blocks(Opener *self, int fd, long long offset, uint64_t block,
                             Py_ssize_t count, const unsigned char *entries, Outbox *outbox,
                             const Py_buffer *header, const unsigned char **unknown,
                             unsigned char **content)
{
    size_t size = (size_t)count * BLOCK_SIZE;
    EVP_CIPHER_CTX *ctxs[BLOCKS_MAX];
    for (Py_ssize_t i = 0; i < count; i++) {
        ctxs[i] = find_key(self, entries + i * ENTRY_SIZE);
        if (ctxs[i] == NULL) {
            *unknown = entries + i * ENTRY_SIZE;
            return KEY_UNKNOWN;
        }
    }
    unsigned char *plain = next_answer(outbox, header);
    if (plain == NULL)
        return FAILED;
    struct iovec in = {plain, size};
    if (preadv2(fd, &in, 1, (off_t)offset, RWF_NOWAIT) != (ssize_t)size)
        return WOULD_WAIT;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (!open_block(self, ctxs[i], entries + i * ENTRY_SIZE, block + (uint64_t)i,
                        plain + i * BLOCK_SIZE)) {
            OPENSSL_cleanse(plain, size); /* nothing of it may be taken for plaintext */
            return NOT_AUTHENTIC;
        }
    }
    outbox->sizes[outbox->count++] = (size_t)header->len + size;
    *content = plain;
    return SENT;
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
    const unsigned char *unknown;
    unsigned char *content;
    PyObject *epoch;
    switch (send_blocks(self, fd, offset, block, count, (const unsigned char *)leaf.buf + at,
                        outbox, &header, &unknown, &content)) {
    case SENT:
        result = keep ? PyBytes_FromStringAndSize((char *)content, count * BLOCK_SIZE)
                      : Py_NewRef(Py_True);
        if (result == NULL)
            outbox->count--; /* who is told of an error has no answer */
        break;
    case WOULD_WAIT:
        result = Py_NewRef(Py_None);
        break;
    case NOT_AUTHENTIC:
        result = Py_NewRef(Py_False);
        break;
    case KEY_UNKNOWN:
        epoch = PyObject_CallMethod((PyObject *)&PyLong_Type, "from_bytes", "y#s", unknown,
                                    (Py_ssize_t)4, "little");
        PyErr_SetObject(PyExc_KeyError, epoch);
        Py_XDECREF(epoch);
        break;
    case FAILED:
        break;
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

/* Reads of one image that need nothing but what is in memory.
 *
 * As `Reader.send_blocks`, for the usual case only; False in every other, and nothing has happened.
 * It looks into the very dictionaries that Python works with, while it holds the interpreter: there
 * is no second state that could be outdated. */
typedef struct {
    PyObject_HEAD
    PyObject *image, *volume, *cache, *shared, *clean, *nodes, *leaves;
    Opener *opener;
    int fd;
    unsigned met, keep_every;
    long long missing; /* where the last range is that is not in the page cache; UNSURE */
    unsigned long long base, group_blocks, fanout, first_home, slot_size;
} Quick;

#define UNSURE -2 /* as in reader.py */

static PyObject *name_size, *name_inline, *name_dirty, *name_committing,
    *name_move_to_end, *name_put_clean, *name_hits;

static int quick_clear(Quick *self)
{
    Py_CLEAR(self->image);
    Py_CLEAR(self->volume);
    Py_CLEAR(self->cache);
    Py_CLEAR(self->shared);
    Py_CLEAR(self->clean);
    Py_CLEAR(self->nodes);
    Py_CLEAR(self->leaves);
    Py_CLEAR(self->opener);
    return 0;
}

static int quick_traverse(Quick *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->image);
    Py_VISIT(self->volume);
    Py_VISIT(self->cache);
    Py_VISIT(self->shared);
    Py_VISIT(self->clean);
    Py_VISIT(self->nodes);
    Py_VISIT(self->leaves);
    Py_VISIT(self->opener);
    return 0;
}

static void quick_dealloc(Quick *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    quick_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyTypeObject *opener_type;

static PyObject *quick_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"image", "volume", "cache", "shared", "clean", "nodes", "leaves",
                            "opener", "fd", "base", "group_blocks", "fanout", "first_home",
                            "slot_size", "keep_every", NULL};
    PyObject *image, *volume, *cache, *shared, *clean, *nodes, *leaves, *opener;
    int fd;
    unsigned keep_every;
    unsigned long long base, group_blocks, fanout, first_home, slot_size;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO!O!O!O!iKKKKKI", names, &image, &volume,
                                     &cache, &shared, &PyDict_Type, &clean, &PyDict_Type, &nodes,
                                     &PyDict_Type, &leaves, opener_type, &opener, &fd, &base,
                                     &group_blocks, &fanout, &first_home, &slot_size, &keep_every))
        return NULL;
    if (!group_blocks || !fanout || !keep_every) {
        PyErr_SetString(PyExc_ValueError, "Quick: sizes do not fit");
        return NULL;
    }
    Quick *self = (Quick *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->image = Py_NewRef(image);
    self->volume = Py_NewRef(volume);
    self->cache = Py_NewRef(cache);
    self->shared = Py_NewRef(shared);
    self->clean = Py_NewRef(clean);
    self->nodes = Py_NewRef(nodes);
    self->leaves = Py_NewRef(leaves);
    self->opener = (Opener *)Py_NewRef(opener);
    self->fd = fd;
    self->base = base;
    self->group_blocks = group_blocks;
    self->fanout = fanout;
    self->first_home = first_home;
    self->slot_size = slot_size;
    self->keep_every = keep_every;
    self->missing = UNSURE;
    return (PyObject *)self;
}

/* Whether a dictionary has one of some numbers: 1, 0, or -1 with an exception set. */
static int has_any(PyObject *blocks, unsigned long long first, unsigned long long count)
{
    if (!PyDict_Check(blocks)) {
        PyErr_SetString(PyExc_TypeError, "Quick: blocks that are no dictionary");
        return -1;
    }
    if (PyDict_GET_SIZE(blocks) == 0)
        return 0;
    int found = 0;
    for (unsigned long long i = 0; i < count && !found; i++) {
        PyObject *key = PyLong_FromUnsignedLongLong(first + i);
        found = key == NULL ? -1 : PyDict_Contains(blocks, key);
        Py_XDECREF(key);
    }
    return found;
}

static int has_any_of(PyObject *owner, PyObject *name, unsigned long long first,
                      unsigned long long count)
{
    PyObject *blocks = PyObject_GetAttr(owner, name);
    int found = blocks == NULL ? -1 : has_any(blocks, first, count);
    Py_XDECREF(blocks);
    return found;
}

/* Answer with a block of the plaintext cache: 1, 0 where it has none, -1 with an exception set. */
static int answer_clean(Quick *self, unsigned long long block, Outbox *outbox,
                        const Py_buffer *header)
{
    PyObject *key = PyLong_FromUnsignedLongLong(self->base + block), *found = NULL, *moved = NULL,
             *hits = NULL, *more = NULL, *one = NULL;
    int status = -1;
    if (key == NULL)
        return -1;
    found = Py_XNewRef(PyDict_GetItemWithError(self->clean, key));
    if (found == NULL) {
        status = PyErr_Occurred() ? -1 : 0;
        goto end;
    }
    if (!PyBytes_Check(found) || PyBytes_GET_SIZE(found) != BLOCK_SIZE) {
        status = 0;
        goto end;
    }
    moved = PyObject_CallMethodOneArg(self->clean, name_move_to_end, key);
    hits = PyObject_GetAttr(self->shared, name_hits);
    one = PyLong_FromLong(1);
    if (moved == NULL || hits == NULL || one == NULL)
        goto end;
    more = PyNumber_Add(hits, one);
    if (more == NULL || PyObject_SetAttr(self->shared, name_hits, more) < 0)
        goto end;
    unsigned char *at = next_answer(outbox, header);
    if (at == NULL)
        goto end;
    memcpy(at, PyBytes_AS_STRING(found), BLOCK_SIZE);
    outbox->sizes[outbox->count++] = (size_t)header->len + BLOCK_SIZE;
    status = 1;
end:
    Py_XDECREF(one);
    Py_XDECREF(more);
    Py_XDECREF(hits);
    Py_XDECREF(moved);
    Py_XDECREF(found);
    Py_DECREF(key);
    return status;
}

/* As `quick_answer`: 1, 0 or -1 with an exception set. */
static int answer(Quick *self, unsigned long long offset, unsigned long long size, Outbox *outbox,
                  const Py_buffer *header)
{
    self->missing = UNSURE;
    if (size == 0 || size > BLOCKS_MAX * BLOCK_SIZE || (offset | size) % BLOCK_SIZE)
        return 0;
    unsigned long long first = offset / BLOCK_SIZE, count = size / BLOCK_SIZE;
    PyObject *length = PyObject_GetAttr(self->image, name_size);
    if (length == NULL)
        return -1;
    unsigned long long disk_size = PyLong_AsUnsignedLongLong(length);
    Py_DECREF(length);
    if (PyErr_Occurred())
        return -1;
    if (offset > disk_size || size > disk_size - offset)
        return 0;
    int newer = has_any_of(self->cache, name_dirty, first, count);
    if (newer == 0)
        newer = has_any_of(self->cache, name_committing, first, count);
    if (newer)
        return newer < 0 ? -1 : 0;
    if (count == 1) {
        int status = answer_clean(self, first, outbox, header);
        if (status)
            return status;
    }
    unsigned long long group = first / self->group_blocks, index = first % self->group_blocks;
    if (index + count > self->group_blocks)
        return 0;
    PyObject *away = PyObject_GetAttr(self->volume, name_inline);
    if (away == NULL)
        return -1;
    int is_away = PyObject_IsTrue(away); /* some blocks are in the journal */
    Py_DECREF(away);
    if (is_away)
        return is_away < 0 ? -1 : 0;
    uint32_t slot;
    int status = find_slot(self->nodes, self->fanout, group, &slot);
    if (status <= 0)
        return status;
    PyObject *page = at_number(self->leaves, group);
    if (page == NULL)
        return PyErr_Occurred() ? -1 : 0;
    Py_buffer leaf = {0};
    if (PyObject_GetBuffer(page, &leaf, PyBUF_SIMPLE) < 0)
        return -1;
    unsigned char *content;
    const unsigned char *unknown, *entries = (unsigned char *)leaf.buf + index * ENTRY_SIZE;
    enum sent sent = WOULD_WAIT;
    if ((index + count) * ENTRY_SIZE <= (size_t)leaf.len) {
        unsigned long long at = self->first_home + slot * self->slot_size + index * BLOCK_SIZE;
        /* A hole among them names epoch 0, which nobody knows. */
        sent = send_blocks(self->opener, self->fd, (long long)at, first, (Py_ssize_t)count,
                           entries, outbox, header, &unknown, &content);
        if (sent == WOULD_WAIT)
            self->missing = (long long)at;
    }
    PyBuffer_Release(&leaf);
    if (sent != SENT)
        return sent == FAILED ? -1 : 0;
    if (count > 1 || ++self->met % self->keep_every)
        return 1;
    PyObject *kept = PyBytes_FromStringAndSize((char *)content, BLOCK_SIZE);
    PyObject *key = PyLong_FromUnsignedLongLong(first), *done = NULL;
    if (kept != NULL && key != NULL)
        done = PyObject_CallMethodObjArgs(self->cache, name_put_clean, key, kept, NULL);
    if (done == NULL)
        PyErr_Clear(); /* it is answered; only the next reader of it waits a little longer */
    Py_XDECREF(done);
    Py_XDECREF(key);
    Py_XDECREF(kept);
    return 1;
}

PyDoc_STRVAR(answer_doc,
"answer(offset, size, outbox, header) -> bool\n\n"
"Put header and the blocks of a range into the outbox, if all of them are in memory and at home;\n"
"else False, and nothing has happened.");

static PyObject *quick_answer(PyObject *object, PyObject *const *args, Py_ssize_t arg_count)
{
    Py_buffer header = {0};
    if (arg_count != 4 || !Py_IS_TYPE(args[2], outbox_type)) {
        PyErr_SetString(PyExc_TypeError, "answer: four arguments, the third an Outbox");
        return NULL;
    }
    unsigned long long offset = PyLong_AsUnsignedLongLong(args[0]);
    unsigned long long size = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[3], &header, PyBUF_SIMPLE) < 0)
        return NULL;
    int status = answer((Quick *)object, offset, size, (Outbox *)args[2], &header);
    PyBuffer_Release(&header);
    return status < 0 ? NULL : PyBool_FromLong(status);
}

static PyMethodDef quick_methods[] = {
    {"answer", (PyCFunction)(void (*)(void))quick_answer, METH_FASTCALL, answer_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef quick_members[] = {
    {"missing", T_LONGLONG, offsetof(Quick, missing), READONLY,
     "Where in the file the range lies that the last `answer` would have had to wait for; or UNSURE."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot quick_slots[] = {
    {Py_tp_members, quick_members},
    {Py_tp_new, quick_new},
    {Py_tp_dealloc, quick_dealloc},
    {Py_tp_traverse, quick_traverse},
    {Py_tp_clear, quick_clear},
    {Py_tp_methods, quick_methods},
    {Py_tp_doc, "Answers reads of one image from memory. One thread at a time."},
    {0, NULL},
};

static PyType_Spec quick_spec = {
    .name = "sealfs.image._blockread.Quick",
    .basicsize = sizeof(Quick),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = quick_slots,
};

static int intern_names(void)
{
    static const Name names[] = {
        {&name_size, "size"}, {&name_inline, "inline"}, {&name_dirty, "dirty"},
        {&name_committing, "committing"}, {&name_move_to_end, "move_to_end"},
        {&name_put_clean, "put_clean"}, {&name_hits, "hits"},
    };
    return intern_all(names, sizeof(names) / sizeof(names[0]));
}

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
    PyObject *quick = PyType_FromSpec(&quick_spec);
    if (self == NULL || opener == NULL || outbox == NULL || quick == NULL || intern_names() < 0 ||
        intern_state_names() < 0 ||
        PyModule_AddObjectRef(self, "Opener", opener) < 0 ||
        PyModule_AddObjectRef(self, "Outbox", outbox) < 0 ||
        PyModule_AddObjectRef(self, "Quick", quick) < 0)
        Py_CLEAR(self);
    Py_XDECREF(quick);
    opener_type = (PyTypeObject *)opener; /* kept for as long as the process lives */
    outbox_type = (PyTypeObject *)outbox;
    return self;
}
