"""Files that are read again when they change, such as certificates."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

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


class FollowedFiles(Generic[T]):
    """The newest good contents of files that belong together. Its user calls `check`, in one thread at a time."""

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str] | None],
        read: Callable[[T | None], T],
        refusals: tuple[type[Exception], ...],
    ) -> None:
        """Read the files, and raise what `read` raises.

        Args:
            paths: of the files; None counts for nothing.
            read: returns the contents. It gets those from before, None at first.
            refusals: what it raises for files that cannot be used.
        """
        self._paths = [path for path in paths if path is not None]
        self._read = read
        self._refusals = refusals
        self._seen = self._signature()
        self._problem: tuple[object, str] | None = None
        self._reported: tuple[object, str] | None = None
        self.current = read(None)

    def check(self) -> Exception | None:
        """Read the files again if they have changed; bad ones change nothing.

        Returns:
            Why they are bad, once, and at the second look that finds it: a certificate and its key that are written one
            after the other do not fit for a moment.
        """
        signature = self._signature()
        if signature == self._seen:
            return None
        try:
            current = self._read(self.current)
        except self._refusals as error:
            before, self._problem = self._problem, (signature, str(error))
            if self._problem != before or self._problem == self._reported:
                return None
            self._reported = self._problem
            return error
        if signature == self._signature():  # else they changed while they were read: the next check reads them
            self._seen, self._problem, self._reported, self.current = signature, None, None, current
        return None

    def _signature(self) -> list[object]:
        return [signature_of(path) for path in self._paths]
