"""Background maintenance of a store: stalls silent jobs, expires jobs at the end of their retention, trims history.

Stalls and expiries go through the commit queue in small batches. Between two batches there is a pause as long as the
first took, so that requests come first, however many jobs are due at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeAlias

from jobstatus_grpc.commit_queue import CommitQueue
from jobstatus_grpc.errors import RetryableError
from jobstatus_grpc.stores.interface import JobStore
from jobstatus_grpc.stores.outage_log import OutageLog

log = logging.getLogger("jobstatus_grpc.sweeper")

RunBatch: TypeAlias = Callable[[], Awaitable[bool]]
"""Does one batch of work and returns whether there is more to do now."""

INTERVAL_SECONDS = 0.25
"""Between two looks for overdue jobs."""

BATCH_COMMANDS = 100
"""Stalls and expiries in one commit, at most. A request that arrives during the commit waits for all of them."""

TRIM_INTERVAL_SECONDS = 60.0
"""Between two looks for history to trim, which is a day old by then."""

TRIM_ROWS = 500
"""Rows of history that one trim examines, at most."""

LONGEST_PAUSE_SECONDS = 1.0
"""Between two batches, at most, where there is more to do."""

RETRY_SECONDS = 1.0
"""The pause after a failed batch."""

ABSENCE_SECONDS = 3.0
"""A look for overdue jobs that comes later than this means that the process was suspended, or its disk blocked."""


class Sweeper:
    """Runs as a background task of a server. For one event loop."""

    def __init__(
        self,
        *,
        store: JobStore,
        queue: CommitQueue,
        fail_stalled_after: timedelta | None = None,
        interval_seconds: float = INTERVAL_SECONDS,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a sweeper; `run` starts it.

        Args:
            store: returns the overdue commands, and trims its history.
            queue: commits the commands.
            fail_stalled_after: how long a job may stay stalled before it fails; None: without limit.
            interval_seconds: between two looks for overdue jobs.
            seconds: a monotonic clock.
        """
        self._store = store
        self._queue = queue
        self._fail_stalled_after = fail_stalled_after
        self._interval_seconds = interval_seconds
        self._seconds = seconds
        self._looked_at = seconds()

    async def run(self) -> None:
        """Commit overdue commands and trim history, until cancelled."""
        await asyncio.gather(
            self._repeat(self._sweep, self._interval_seconds), self._repeat(self._trim, TRIM_INTERVAL_SECONDS)
        )

    async def _repeat(self, run_batch: RunBatch, interval_seconds: float) -> None:
        outage = OutageLog(log, "store maintenance")
        while True:
            began_at = self._seconds()
            try:
                has_more = await run_batch()
            except RetryableError as error:
                log.debug("store maintenance failed, retrying in %.0f s: %s", RETRY_SECONDS, error)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception as error:
                outage.failed(error)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                outage.recovered()
                took_seconds = self._seconds() - began_at
                await asyncio.sleep(min(took_seconds, LONGEST_PAUSE_SECONDS) if has_more else interval_seconds)

    async def _sweep(self) -> bool:
        self._check_for_absence()
        commands = await self._store.overdue(limit=BATCH_COMMANDS, fail_stalled_after=self._fail_stalled_after)
        self._check_for_absence()  # in between: the restart takes back what was found
        if commands:
            await self._queue.submit(commands)
        return len(commands) == BATCH_COMMANDS

    async def _trim(self) -> bool:
        return await self._store.trim(limit=TRIM_ROWS)

    def _check_for_absence(self) -> None:
        """Restart the stall clocks where this process was suspended, and could not receive reports."""
        now = self._seconds()
        absent_seconds = now - self._looked_at
        if absent_seconds > ABSENCE_SECONDS + self._interval_seconds:
            log.warning("the server stood still for %.1f s; the stall clocks of all jobs start anew", absent_seconds)
            self._store.restart_stall_clocks()
        self._looked_at = now
