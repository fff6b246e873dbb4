"""The one table from what sealfs raises to what a caller of a system call sees.

Knows the classes of `sealfs.errors` and nothing of where they come from. The lane and the
namespace both answer through it. README's table of errors is made from it (`tools/error-table`).
"""

from __future__ import annotations

import errno

from sealfs import errors

TABLE: tuple[tuple[type[errors.SealfsError], int], ...] = (
    (errors.IntegrityError, errno.EIO),
    (errors.FormatError, errno.EIO),
    (errors.StorageFailed, errno.EIO),
    (errors.KeyServiceError, errno.EACCES),
    (errors.Busy, errno.EBUSY),
    (errors.RolledBack, errno.ESTALE),
    (errors.ForeignImage, errno.ESTALE),
    (errors.NoSpace, errno.ENOSPC),
    (errors.ReadOnly, errno.EROFS),
    (errors.NotFound, errno.ENOENT),
    (errors.AlreadyExists, errno.EEXIST),
    (errors.UsageError, errno.EINVAL),
)
"""First match wins."""


def errno_of(exc: BaseException) -> int:
    """Return the errno for an exception; whatever is not in the table is EIO."""
    for kind, code in TABLE:
        if isinstance(exc, kind):
            return code
    if isinstance(exc, OSError) and exc.errno is not None:
        # A system call on the directory of sealed files: its errno says what the caller must know.
        return exc.errno
    return errno.EIO
