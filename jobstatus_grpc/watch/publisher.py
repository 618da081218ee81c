"""Tells of an outage in few lines, however often what is out is tried: that it began, that it lasts, that it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from jobstatus_grpc.errors import UnavailableError

AGAIN_SECONDS = 60.0
"""Failures are told of once in so long at most, also where they come and go."""


class OutageLog:
    """Writes to a log what becomes of one thing that is tried again and again."""

    def __init__(self, log: logging.Logger, what: str, *, seconds: Callable[[], float] = time.monotonic) -> None:
        """Take where to write, how lines begin, and the clock."""
        self._log = log
        self._what = what
        self._seconds = seconds
        self._quiet_until = float("-inf")
        self._is_told = False
        self.lasts = False
        """Whether the last try failed."""

    def note(self, error: Exception) -> None:
        """Take what a try failed with."""
        self.lasts = True
        if self._seconds() < self._quiet_until:
            return
        self._quiet_until = self._seconds() + AGAIN_SECONDS
        self._is_told = True
        if isinstance(error, UnavailableError):
            self._log.warning("%s is interrupted: %s", self._what, error)
        else:
            self._log.error("%s is interrupted", self._what, exc_info=error)

    def end(self) -> None:
        """Take that a try went well."""
        self.lasts = False
        if self._is_told:
            self._is_told = False
            self._log.warning("%s goes on", self._what)
