"""Files that are read again when they change, such as certificates."""

from __future__ import annotations

import errno
import os
import stat

MAX_FILE_BYTES = 16 * 1024 * 1024
"""Of a file of settings, keys or certificates: 50,000 tokens, 10,000 certificates. A larger one is the wrong file."""


def signature_of(path: str | os.PathLike[str]) -> object:
    """Return what changes with a file, also if a link on the way to it changes; None if it is not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_file(path: str | os.PathLike[str], *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the contents of a regular file, or of one that links lead to. Never waits for a writer.

    Raises:
        OSError: the file cannot be read, is larger than `max_bytes`, or is not a regular one, such as a FIFO.
        ValueError: the path has a NUL.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes} bytes", os.fspath(path))
    return data


def _open_at_once(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a FIFO waits until another program writes to it.
    return os.open(path, flags | os.O_NONBLOCK)
