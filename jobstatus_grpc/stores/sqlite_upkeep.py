"""What the SQLite store does because time passes: it finds jobs that are due, and drops history that is old."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any

from jobstatus_grpc.commands import Expire, Stall
from jobstatus_grpc.job import Command
from jobstatus_grpc.stores.feed import Feed
from jobstatus_grpc.stores.interface import Clock
from jobstatus_grpc.stores.sqlite_condition import Condition
from jobstatus_grpc.stores.sqlite_time import Trimmer, read_expired, read_silent
from jobstatus_grpc.stores.stall_clocks import StallClocks
from jobstatus_grpc.stores.worker import Worker


class Upkeep:
    """For one event loop."""

    def __init__(
        self,
        *,
        read: Callable[..., Awaitable[Any]],
        thread: Worker,
        trimmer: Trimmer,
        condition: Condition,
        clock: Clock,
        stall_clocks: StallClocks,
        feed: Feed,
    ) -> None:
        """Take how to run a query on a reading connection, and the writer's thread with what trims there."""
        self._read = read
        self._thread = thread
        self._trimmer = trimmer
        self._condition = condition
        self._clock = clock
        self._stall_clocks = stall_clocks
        self._feed = feed
        self._has_begun = False

    async def overdue(self, *, limit: int, fail_stalled_after: timedelta | None) -> Sequence[Command]:
        """See JobStore. While the file cannot be written there is no use in judging anybody."""
        if not self._condition.writable:
            return ()
        await self._begin()
        silent = self._stall_clocks.due(limit=limit, fail_after=fail_stalled_after)
        commands: list[Command] = [
            Stall(id=job_id, tenant=tenant, fail_after=fail_stalled_after) for tenant, job_id in silent
        ]
        if len(commands) < limit:
            expired = await self._read(read_expired, self._clock(), limit - len(commands))
            commands.extend(Expire(id=job_id, tenant=tenant) for tenant, job_id in expired)
        return commands

    async def trim(self, *, limit: int) -> bool:
        """See JobStore."""
        self._condition.check()
        try:
            trimmed = await self._thread.call(self._trimmer.step, self._clock(), self._feed.sequence, limit)
        except sqlite3.Error as error:
            raise self._condition.judge(error, is_write=True) from error
        self._feed.forgotten_sequence = trimmed.forgotten_sequence
        return trimmed.has_more

    async def _begin(self) -> None:
        """Start the clocks of the jobs that were IN_PROGRESS when the file was opened."""
        after: int | None = None if self._has_begun else 0
        while after is not None:
            jobs, after = await self._read(read_silent, after)
            self._stall_clocks.begin(jobs)
        self._has_begun = True
