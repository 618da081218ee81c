"""Log lines about what fails and is retried for as long as a store is away: few, and without tracebacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from jobstatus_grpc.errors import UnavailableError

LOG_INTERVAL_SECONDS = 60.0
"""Between two log lines about failures of one thing, at least, also where it recovers and fails again."""


class OutageLog:
    """Logs the failures and the recovery of one thing that is retried, at most once per LOG_INTERVAL_SECONDS."""

    def __init__(
        self,
        log: logging.Logger,
        subject: str,
        *,
        level: int = logging.WARNING,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """Each line begins with `subject`; one about an unavailable store has `level`; `seconds` is the clock."""
        self._log = log
        self._subject = subject
        self._level = level
        self._seconds = seconds
        self._quiet_until = float("-inf")
        self._is_logged = False
        self.lasts = False
        """Whether the last try failed."""

    def failed(self, error: Exception) -> None:
        """Log a failed try: an unavailable store in one line, anything else with its traceback."""
        self.lasts = True
        if self._seconds() < self._quiet_until:
            return
        self._quiet_until = self._seconds() + LOG_INTERVAL_SECONDS
        self._is_logged = True
        if isinstance(error, UnavailableError):
            self._log.log(self._level, "%s is unavailable, retrying: %s", self._subject, error)
        else:
            self._log.error("%s has failed, retrying", self._subject, exc_info=error)

    def recovered(self) -> None:
        """Log a try that succeeded, if the failure before it was logged."""
        self.lasts = False
        if self._is_logged:
            self._is_logged = False
            self._log.warning("%s has recovered", self._subject)
