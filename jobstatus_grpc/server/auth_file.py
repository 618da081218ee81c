"""The file of --auth: read at the start, and again whenever it changes. Its sections belong to other modules."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jobstatus_grpc.auth.chain import SECTIONS
from jobstatus_grpc.files import signature_of
from jobstatus_grpc.toml_file import Document, FileError, Reader, Signatures

log = logging.getLogger("jobstatus_grpc.server")

CHECK_SECONDS = 0.5
"""Interval at which the file is looked at. A change is used at the second look that finds the same, because a file that
is being written may be whole and lack callers."""

MAX_LOOKS = 4
"""At a file that changes between all of them: then it is read as it is, because a revocation must not wait for ever."""


class AuthFile:
    """The newest good contents of the file, for the time of `follow`."""

    def __init__(self, path: str, sections: Mapping[str, Reader]) -> None:
        """Read the file; each reader may block, and is called in a thread when the file has changed.

        Raises:
            CannotStartError: the file cannot be used.
        """
        self.path = path
        self._sections = sections
        self._seen: Signatures = {}
        """Of the file and those that were read for it, before they were read last."""
        self._found: Signatures = {}
        self._looks = 0
        """At a change that is not read yet."""
        self._listeners: list[Callable[[], None]] = []
        self.contents = self._read(self._seen)
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
        """Read the file again if it has changed and is not being written; a bad one is logged, and changes nothing.

        One that changes at each look is read at every MAX_LOOKS-th.
        """
        found = await asyncio.to_thread(_signatures_of, tuple(self._seen))  # the files may be on a network
        is_settled, self._found = found == self._found, found
        self._looks = 0 if found == self._seen else self._looks + 1
        if not self._looks or not (is_settled or self._looks >= MAX_LOOKS):
            return
        self._looks = 0
        changed = ", ".join(path for path in found if found[path] != self._seen[path])
        self._seen = {}
        try:
            self.contents = await asyncio.to_thread(self._read, self._seen)
        except Exception as error:
            self.reloads["failure"] += 1
            log.error(
                "%s has changed, and cannot be used: %s. The contents from before stay in use; correct the file, a "
                "restart is not needed",
                changed,
                error,
                exc_info=None if isinstance(error, FileError) else error,
            )
            return
        self.reloads["success"] += 1
        for listener in self._listeners:
            listener()
        log.info("%s has changed and is in use for --auth", changed)

    def _read(self, seen: Signatures) -> Mapping[str, Any]:
        contents = Document(self.path, seen).read(self._sections)
        if not any(contents.get(name) for name in SECTIONS):
            raise FileError(f"{self.path} admits no caller; add a stanza [[tokens]]: jobstatus token new prints one")
        return contents


def _signatures_of(paths: Iterable[str]) -> Signatures:
    return {path: signature_of(path) for path in paths}
