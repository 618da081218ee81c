"""The file of --auth: read at the start, and again whenever it changes. Its sections belong to other modules."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from jobstatus_grpc.toml_file import FileError, Reader, read_toml

log = logging.getLogger("jobstatus_grpc.server")

CHECK_SECONDS = 0.5
"""Interval at which the file is looked at. A change is used at the second look that finds the same, because a file that
is being written may be whole and lack callers."""


CALLERS = {"tokens"}
"""The sections that admit callers. A file without any is an error: it is probably being written."""


class AuthFile:
    """The newest good contents of the file, for the time of `follow`."""

    def __init__(self, path: str, sections: Mapping[str, Reader]) -> None:
        """Read the file; each reader may block, and is called in a thread when the file has changed.

        Raises:
            CannotStartError: the file cannot be used.
        """
        self.path = path
        self._sections = sections
        self._seen = self._found = signature_of(path)
        self._listeners: list[Callable[[], None]] = []
        self.contents = self._read()
        """What each reader returned, by the name of its section; a section that is absent is absent here."""
        self.reloads = Counter({"success": 0, "failure": 0})
        """The changes of the file that were taken, and those that were refused."""

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` on the event loop whenever `contents` have changed; it must not raise."""
        self._listeners.append(listener)

    async def follow(self) -> None:
        """Look at the file again and again, for ever."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await self.check()

    async def check(self) -> None:
        """Read the file again if it has changed and is not being written; a bad one is logged, and changes nothing."""
        found = await asyncio.to_thread(signature_of, self.path)  # the file may be on a network
        is_settled, self._found = found == self._found, found
        if found == self._seen or not is_settled:
            return
        self._seen = found
        try:
            self.contents = await asyncio.to_thread(self._read)
        except Exception as error:
            self.reloads["failure"] += 1
            log.error(
                "the changed file of --auth is not used: %s. The contents from before stay in use; correct the file, a "
                "restart is not needed",
                error,
                exc_info=None if isinstance(error, FileError) else error,
            )
            return
        self.reloads["success"] += 1
        for listener in self._listeners:
            listener()
        log.info("the file of --auth has changed and is in use: %s", self.path)

    def _read(self) -> Mapping[str, Any]:
        contents = read_toml(self.path, self._sections)
        if not contents.keys() & CALLERS:
            raise FileError(f"{self.path} admits no caller; add a stanza [[tokens]]: jobstatus token new prints one")
        return contents


def signature_of(path: str) -> object:
    """Return what changes with a file, also if a link on the way to it changes; None if it cannot be read."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
