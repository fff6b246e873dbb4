/* Seal and open runs of blocks with AES-256-GCM in one call, without the GIL (FORMAT.md 3.3), and
 * compute the MACs of many pages in one (FORMAT.md 6).
 *
 * cipher.py decides what is sealed under which key and nonce, and does the same without this module
 * where it could not be built; nothing here knows of files, epochs' keys or errors in words.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <stdint.h>
#include <string.h>

#define BLOCK_SIZE 4096
#define ENTRY_SIZE 32 /* epoch (4), counter (8), tag (16), flags (4); FORMAT.md 6.1 */
#define NONCE_SIZE 12
#define TAG_SIZE 16
#define KEY_SIZE 32
#define PREFIX_MAX 56
#define PRESENT 1
#define FEW_BLOCKS 4

#define MAC_SIZE 32

static EVP_CIPHER *aes_256_gcm;
static EVP_MAC *hmac;

static void put_le(unsigned char *at, uint64_t value, int size)
{
    for (int i = 0; i < size; i++)
        at[i] = (unsigned char)(value >> 8 * i);
}

/* Returns 1, or 0 where libcrypto failed. */
static int seal_block(EVP_CIPHER_CTX *ctx, const unsigned char *nonce, const unsigned char *aad,
                      int aad_size, const unsigned char *frame, unsigned char *out,
                      unsigned char *tag)
{
    int count;
    return EVP_EncryptInit_ex(ctx, NULL, NULL, NULL, nonce) == 1 &&
           EVP_EncryptUpdate(ctx, NULL, &count, aad, aad_size) == 1 &&
           EVP_EncryptUpdate(ctx, out, &count, frame, BLOCK_SIZE) == 1 && count == BLOCK_SIZE &&
           EVP_EncryptFinal_ex(ctx, out + BLOCK_SIZE, &count) == 1 && count == 0 &&
           EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_GCM_GET_TAG, TAG_SIZE, tag) == 1;
}

/* Returns 1, or 0 where the block does not authenticate. In place. */
static int open_block(EVP_CIPHER_CTX *ctx, const unsigned char *nonce, const unsigned char *aad,
                      int aad_size, const unsigned char *tag, unsigned char *block)
{
    int count;
    return EVP_DecryptInit_ex(ctx, NULL, NULL, NULL, nonce) == 1 &&
           EVP_DecryptUpdate(ctx, NULL, &count, aad, aad_size) == 1 &&
           EVP_DecryptUpdate(ctx, block, &count, block, BLOCK_SIZE) == 1 && count == BLOCK_SIZE &&
           EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_GCM_SET_TAG, TAG_SIZE, (void *)tag) == 1 &&
           EVP_DecryptFinal_ex(ctx, block + BLOCK_SIZE, &count) == 1 && count == 0;
}

PyDoc_STRVAR(seal_run_doc,
"seal_run(key, prefix, epoch, counter, blocks, slab, frames, out) -> entries\n\n"
"Seal frame frames[i] of the slab, BLOCK_SIZE bytes each, as blocks[i] into out, one after the\n"
"other, with the nonces (epoch, counter + i). Returns the entries, ENTRY_SIZE bytes each, joined.");

static PyObject *seal_run(PyObject *self, PyObject *args)
{
    Py_buffer key = {0}, prefix = {0}, slab = {0}, out = {0};
    PyObject *blocks_given, *frames_given, *blocks = NULL, *frames = NULL, *entries = NULL;
    unsigned long epoch;
    unsigned long long counter;
    uint64_t *indexes = NULL;
    const unsigned char **from = NULL;
    Py_ssize_t count = 0, frame_count = 0;
    EVP_CIPHER_CTX *ctx = NULL;
    int is_sealed = 1;

    if (!PyArg_ParseTuple(args, "y*y*kKOy*Ow*", &key, &prefix, &epoch, &counter, &blocks_given,
                          &slab, &frames_given, &out))
        return NULL;
    blocks = PySequence_Fast(blocks_given, "blocks is no sequence");
    frames = PySequence_Fast(frames_given, "frames is no sequence");
    if (blocks == NULL || frames == NULL)
        goto end;
    frame_count = slab.len / BLOCK_SIZE;
    count = PySequence_Fast_GET_SIZE(blocks);
    if (key.len != KEY_SIZE || prefix.len > PREFIX_MAX || epoch > UINT32_MAX ||
        PySequence_Fast_GET_SIZE(frames) != count || out.len < count * BLOCK_SIZE) {
        PyErr_SetString(PyExc_ValueError, "seal_run: sizes do not fit");
        goto end;
    }
    indexes = PyMem_Calloc(count ? count : 1, sizeof(*indexes));
    from = PyMem_Calloc(count ? count : 1, sizeof(*from));
    entries = PyBytes_FromStringAndSize(NULL, count * ENTRY_SIZE);
    ctx = EVP_CIPHER_CTX_new();
    if (indexes == NULL || from == NULL || entries == NULL || ctx == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        indexes[i] = PyLong_AsUnsignedLongLong(PySequence_Fast_GET_ITEM(blocks, i));
        Py_ssize_t frame = PyLong_AsSsize_t(PySequence_Fast_GET_ITEM(frames, i));
        if (PyErr_Occurred())
            goto end;
        if (frame < 0 || frame >= frame_count) {
            PyErr_SetString(PyExc_ValueError, "seal_run: sizes do not fit: no such frame");
            goto end;
        }
        from[i] = (const unsigned char *)slab.buf + frame * BLOCK_SIZE;
    }
    Py_BEGIN_ALLOW_THREADS
    unsigned char *entry = (unsigned char *)PyBytes_AS_STRING(entries);
    unsigned char aad[PREFIX_MAX + 8];
    memcpy(aad, prefix.buf, prefix.len);
    is_sealed = EVP_EncryptInit_ex(ctx, aes_256_gcm, NULL, key.buf, NULL) == 1;
    for (Py_ssize_t i = 0; is_sealed && i < count; i++, entry += ENTRY_SIZE) {
        put_le(entry, epoch, 4);
        put_le(entry + 4, counter + i, 8);
        put_le(entry + 28, PRESENT, 4);
        put_le(aad + prefix.len, indexes[i], 8);
        is_sealed = seal_block(ctx, entry, aad, (int)prefix.len + 8, from[i],
                               (unsigned char *)out.buf + i * BLOCK_SIZE, entry + NONCE_SIZE);
    }
    Py_END_ALLOW_THREADS
    if (!is_sealed)
        PyErr_SetString(PyExc_RuntimeError, "seal_run: libcrypto failed");
end:
    EVP_CIPHER_CTX_free(ctx);
    PyMem_Free(indexes);
    PyMem_Free(from);
    Py_XDECREF(blocks);
    Py_XDECREF(frames);
    PyBuffer_Release(&slab);
    PyBuffer_Release(&key);
    PyBuffer_Release(&prefix);
    PyBuffer_Release(&out);
    if (PyErr_Occurred())
        Py_CLEAR(entries);
    return entries;
}

PyDoc_STRVAR(open_run_doc,
"open_run(keys, prefix, first, entries, run) -> index\n\n"
"Open, in place, a run of present blocks of which the first is block `first`; keys maps epoch to\n"
"key. Returns -1, or the index of a block that does not authenticate: then the run is zeros.\n"
"KeyError: the epoch that keys lacks.");

static PyObject *open_run(PyObject *self, PyObject *args)
{
    PyObject *keys;
    Py_buffer prefix = {0}, entries = {0}, run = {0}, *held = NULL;
    unsigned long long first;
    const unsigned char **key_of = NULL;
    Py_ssize_t count = 0, held_count = 0, failed = -1;
    EVP_CIPHER_CTX *ctx = NULL;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "O!y*Ky*w*", &PyDict_Type, &keys, &prefix, &first, &entries, &run))
        return NULL;
    count = entries.len / ENTRY_SIZE;
    if (prefix.len > PREFIX_MAX || entries.len % ENTRY_SIZE || run.len != count * BLOCK_SIZE) {
        PyErr_SetString(PyExc_ValueError, "open_run: sizes do not fit");
        goto end;
    }
    key_of = PyMem_Calloc(count ? count : 1, sizeof(*key_of));
    held = PyMem_Calloc(count ? count : 1, sizeof(*held));
    ctx = EVP_CIPHER_CTX_new();
    if (key_of == NULL || held == NULL || ctx == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    /* The keys are looked up, and held, while nobody can change the dictionary. */
    const unsigned char *entry = entries.buf;
    for (Py_ssize_t i = 0; i < count; i++, entry += ENTRY_SIZE) {
        if (i && memcmp(entry, entry - ENTRY_SIZE, 4) == 0) {
            key_of[i] = key_of[i - 1];
            continue;
        }
        unsigned long epoch = entry[0] | entry[1] << 8 | entry[2] << 16 |
                              (unsigned long)entry[3] << 24;
        PyObject *number = PyLong_FromUnsignedLong(epoch);
        if (number == NULL)
            goto end;
        PyObject *key = PyDict_GetItemWithError(keys, number);
        if (key == NULL) {
            if (!PyErr_Occurred())
                PyErr_SetObject(PyExc_KeyError, number);
            Py_DECREF(number);
            goto end;
        }
        Py_DECREF(number);
        if (PyObject_GetBuffer(key, &held[held_count], PyBUF_SIMPLE) < 0)
            goto end;
        held_count++;
        if (held[held_count - 1].len != KEY_SIZE) {
            PyErr_SetString(PyExc_ValueError, "open_run: a key is not of a key's size");
            goto end;
        }
        key_of[i] = held[held_count - 1].buf;
    }
    /* Giving the interpreter away and taking it back costs more than a few blocks do. */
    PyThreadState *others = count > FEW_BLOCKS ? PyEval_SaveThread() : NULL;
    unsigned char aad[PREFIX_MAX + 8];
    memcpy(aad, prefix.buf, prefix.len);
    entry = entries.buf;
    for (Py_ssize_t i = 0; i < count; i++, entry += ENTRY_SIZE) {
        put_le(aad + prefix.len, first + i, 8);
        if (((i == 0 || key_of[i] != key_of[i - 1]) &&
             EVP_DecryptInit_ex(ctx, aes_256_gcm, NULL, key_of[i], NULL) != 1) ||
            !open_block(ctx, entry, aad, (int)prefix.len + 8, entry + NONCE_SIZE,
                        (unsigned char *)run.buf + i * BLOCK_SIZE)) {
            /* Nothing of it may be taken for plaintext. */
            OPENSSL_cleanse(run.buf, run.len);
            failed = i;
            break;
        }
    }
    if (others != NULL)
        PyEval_RestoreThread(others);
    result = PyLong_FromSsize_t(failed);
end:
    for (Py_ssize_t i = 0; i < held_count; i++)
        PyBuffer_Release(&held[i]);
    EVP_CIPHER_CTX_free(ctx);
    PyMem_Free(key_of);
    PyMem_Free(held);
    PyBuffer_Release(&prefix);
    PyBuffer_Release(&entries);
    PyBuffer_Release(&run);
    return result;
}

/* Returns 1, or 0 where libcrypto failed. The key is the one that ctx was given before. */
static int mac_page(EVP_MAC_CTX *ctx, const unsigned char *head, size_t head_size,
                    const Py_buffer *page, unsigned char *mac)
{
    size_t size;
    return EVP_MAC_init(ctx, NULL, 0, NULL) == 1 && EVP_MAC_update(ctx, head, head_size) == 1 &&
           EVP_MAC_update(ctx, page->buf, (size_t)page->len) == 1 &&
           EVP_MAC_final(ctx, mac, &size, MAC_SIZE) == 1 && size == MAC_SIZE;
}

PyDoc_STRVAR(mac_run_doc,
"mac_run(key, prefix, indexes, pages, size) -> macs\n\n"
"Return the first `size` bytes each, joined, of the HMAC-SHA-256 under key of prefix, indexes[i]\n"
"(64 bit, little-endian) and pages[i]. The pages must not change meanwhile.");

static PyObject *mac_run(PyObject *self, PyObject *args)
{
    Py_buffer key = {0}, prefix = {0}, *held = NULL;
    PyObject *indexes_given, *pages_given, *indexes = NULL, *pages = NULL, *macs = NULL;
    Py_ssize_t size, count = 0, held_count = 0;
    uint64_t *index_of = NULL;
    EVP_MAC_CTX *ctx = NULL;
    int is_made = 1;

    if (!PyArg_ParseTuple(args, "y*y*OOn", &key, &prefix, &indexes_given, &pages_given, &size))
        return NULL;
    indexes = PySequence_Fast(indexes_given, "indexes is no sequence");
    pages = PySequence_Fast(pages_given, "pages is no sequence");
    if (indexes == NULL || pages == NULL)
        goto end;
    count = PySequence_Fast_GET_SIZE(pages);
    if (key.len != KEY_SIZE || prefix.len > PREFIX_MAX || size < 1 || size > MAC_SIZE ||
        PySequence_Fast_GET_SIZE(indexes) != count) {
        PyErr_SetString(PyExc_ValueError, "mac_run: sizes do not fit");
        goto end;
    }
    index_of = PyMem_Calloc(count ? count : 1, sizeof(*index_of));
    held = PyMem_Calloc(count ? count : 1, sizeof(*held));
    macs = PyBytes_FromStringAndSize(NULL, count * size);
    ctx = EVP_MAC_CTX_new(hmac);
    if (index_of == NULL || held == NULL || macs == NULL || ctx == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        index_of[i] = PyLong_AsUnsignedLongLong(PySequence_Fast_GET_ITEM(indexes, i));
        if (PyErr_Occurred() ||
            PyObject_GetBuffer(PySequence_Fast_GET_ITEM(pages, i), &held[i], PyBUF_SIMPLE) < 0)
            goto end;
        held_count++;
    }
    PyThreadState *others = count > FEW_BLOCKS ? PyEval_SaveThread() : NULL;
    OSSL_PARAM digest[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, "SHA256", 0),
        OSSL_PARAM_construct_end(),
    };
    unsigned char head[PREFIX_MAX + 8], mac[MAC_SIZE];
    memcpy(head, prefix.buf, prefix.len);
    is_made = EVP_MAC_init(ctx, key.buf, KEY_SIZE, digest) == 1;
    for (Py_ssize_t i = 0; is_made && i < count; i++) {
        put_le(head + prefix.len, index_of[i], 8);
        is_made = mac_page(ctx, head, (size_t)prefix.len + 8, &held[i], mac);
        if (is_made)
            memcpy(PyBytes_AS_STRING(macs) + i * size, mac, size);
    }
    if (others != NULL)
        PyEval_RestoreThread(others);
    if (!is_made)
        PyErr_SetString(PyExc_RuntimeError, "mac_run: libcrypto failed");
end:
    for (Py_ssize_t i = 0; i < held_count; i++)
        PyBuffer_Release(&held[i]);
    EVP_MAC_CTX_free(ctx);
    PyMem_Free(index_of);
    PyMem_Free(held);
    Py_XDECREF(indexes);
    Py_XDECREF(pages);
    PyBuffer_Release(&key);
    PyBuffer_Release(&prefix);
    if (PyErr_Occurred())
        Py_CLEAR(macs);
    return macs;
}

static PyMethodDef methods[] = {
    {"mac_run", mac_run, METH_VARARGS, mac_run_doc},
    {"seal_run", seal_run, METH_VARARGS, seal_run_doc},
    {"open_run", open_run, METH_VARARGS, open_run_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sealfs.image._blockseal",
    .m_doc = "AES-256-GCM and HMAC-SHA-256 of runs of blocks, over the system's libcrypto.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__blockseal(void)
{
    aes_256_gcm = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
    if (aes_256_gcm == NULL) {
        PyErr_SetString(PyExc_ImportError, "libcrypto has no AES-256-GCM");
        return NULL;
    }
    hmac = EVP_MAC_fetch(NULL, "HMAC", NULL);
    if (hmac == NULL) {
        PyErr_SetString(PyExc_ImportError, "libcrypto has no HMAC");
        return NULL;
    }
    return PyModule_Create(&module);
}
