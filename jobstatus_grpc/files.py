"""Files that are read again when they change: of the server's and the clients' certificates."""

from __future__ import annotations

import os
from collections.abc import Iterable


def signature_of(paths: Iterable[str | os.PathLike[str]]) -> tuple[object, ...]:
    """Return what changes with each file, also if a link on the way to it changes; None for one that is not there."""
    return tuple(_signature(path) for path in paths)


def _signature(path: str | os.PathLike[str]) -> object:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
