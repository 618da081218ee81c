"""The time by which stores remove what is old: a clock that was set forward by mistake must not remove everything."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from jobstatus_grpc.job.limits import CLOCK_TOLERANCE

logger = logging.getLogger(__name__)

HOLD = timedelta(hours=24)
"""How long a step forward is not believed: time for an operator to correct it. It only delays removals."""


class RetentionClock:
    """Follows the store's clock, except that a step forward counts only after HOLD, unless it was taken back before.

    In the meantime it goes on from the time before. A step back counts at once. The time that passes while no process
    looks, for example between two processes, is believed.
    """

    def __init__(self, seconds: Callable[[], float] = time.monotonic) -> None:
        """Measure with `seconds`, a monotonic clock."""
        self._seconds = seconds
        self._time: datetime | None = None
        self._looked_at = 0.0
        self._stepped_at: float | None = None

    def at(self, now: datetime) -> datetime:
        """Return the time by which to remove what is old; `now` is that of the store's clock."""
        seconds = self._seconds()
        expected = now if self._time is None else self._time + timedelta(seconds=seconds - self._looked_at)
        if now <= expected + CLOCK_TOLERANCE:
            self._stepped_at = None
        elif self._stepped_at is None:
            self._stepped_at = seconds
            logger.warning(
                "the clock was set forward by %s, to %s: for 24 hours, jobs expire and history is removed by the time "
                "before, in case this is a mistake; correct the clock if it is, else there is nothing to do",
                timedelta(seconds=round((now - expected).total_seconds())),
                now.isoformat(timespec="seconds"),
            )
        elif seconds - self._stepped_at >= HOLD.total_seconds():
            self._stepped_at = None
        self._time, self._looked_at = expected if self._stepped_at is not None else now, seconds
        return self._time
