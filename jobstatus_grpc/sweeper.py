"""Does what time asks for: marks silent jobs as stalled, forgets those whose retention is over, trims history.

Everything goes through the commit queue in small batches, with pauses as long as the batches took between them:
requests come first, however much is due at once.
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

log = logging.getLogger("jobstatus_grpc.sweeper")

Step: TypeAlias = Callable[[], Awaitable[bool]]

INTERVAL_SECONDS = 0.25
BATCH_COMMANDS = 100
TRIM_INTERVAL_SECONDS = 60.0
TRIM_ROWS = 500
LONGEST_PAUSE_SECONDS = 1.0
RETRY_SECONDS = 1.0
ABSENCE_SECONDS = 3.0
"""A turn that took so much longer than it should was an absence: the process was stopped, or its disk stood still."""


class Sweeper:
    """Runs for as long as a server does. For one event loop."""

    def __init__(
        self,
        *,
        store: JobStore,
        queue: CommitQueue,
        fail_stalled_after: timedelta | None = None,
        interval_seconds: float = INTERVAL_SECONDS,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the collaborators.

        Args:
            store: tells what is due.
            queue: commits it.
            fail_stalled_after: how long a job may stay stalled until it fails; None: for ever.
            interval_seconds: how often to look.
            seconds: the clock that tells how long a turn took.
        """
        self._store = store
        self._queue = queue
        self._fail_stalled_after = fail_stalled_after
        self._interval_seconds = interval_seconds
        self._seconds = seconds
        self._looked_at = seconds()

    async def run(self) -> None:
        """Sweep and trim until cancelled."""
        await asyncio.gather(
            self._repeat(self._sweep, self._interval_seconds), self._repeat(self._trim, TRIM_INTERVAL_SECONDS)
        )

    async def _repeat(self, step: Step, interval_seconds: float) -> None:
        """Take steps, one after another while there is more to do."""
        while True:
            began_at = self._seconds()
            try:
                has_more = await step()
            except RetryableError as error:
                log.debug("the store cannot be tended: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                log.exception("the store cannot be tended")
                await asyncio.sleep(RETRY_SECONDS)
            else:
                took_seconds = self._seconds() - began_at
                await asyncio.sleep(min(took_seconds, LONGEST_PAUSE_SECONDS) if has_more else interval_seconds)

    async def _sweep(self) -> bool:
        self._notice_absence()
        commands = await self._store.overdue(limit=BATCH_COMMANDS, fail_stalled_after=self._fail_stalled_after)
        if commands:
            await self._queue.submit(commands)
        return len(commands) == BATCH_COMMANDS

    async def _trim(self) -> bool:
        return await self._store.trim(limit=TRIM_ROWS)

    def _notice_absence(self) -> None:
        """Hold no silence against a worker that could not be heard."""
        now = self._seconds()
        if now - self._looked_at > ABSENCE_SECONDS + self._interval_seconds:
            log.warning(
                "the server stood still for %.1f s; the clocks of silent jobs start anew", now - self._looked_at
            )
            self._store.restart_stall_clocks()
        self._looked_at = now
