"""Files that are read again when they change, such as certificates."""

from __future__ import annotations

import os


def signature_of(path: str | os.PathLike[str]) -> object:
    """Return what changes with a file, also if a link on the way to it changes; None if it is not there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
