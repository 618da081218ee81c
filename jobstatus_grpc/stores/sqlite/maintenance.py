"""What the SQLite store does because time passes: it finds jobs that are due, and drops history that is old."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from jobstatus_grpc.job import Command, Expire, Stall
from jobstatus_grpc.stores.embedded import Feed, StallClocks
from jobstatus_grpc.stores.interface import FEED_RETENTION, TOMBSTONE_RETENTION, Clock, Key
from jobstatus_grpc.stores.sql.rows import from_instant, to_duration
from jobstatus_grpc.stores.sqlite.health import Condition
from jobstatus_grpc.stores.sqlite.threads import Worker

MAX_SILENT_ROWS = 5000

MARK_INTERVAL = timedelta(minutes=1)

WALK_INTERVAL = timedelta(hours=1)
"""A walk looks at every change of a job that exists, too: once an hour is cheap enough for millions."""

_SILENT = f"""
    SELECT key, tenant, id, heartbeat_timeout, stalled FROM jobs INDEXED BY jobs_by_silence
    WHERE state = 2 AND heartbeat_timeout IS NOT NULL AND key > ? ORDER BY key LIMIT {MAX_SILENT_ROWS}
"""

_EXPIRED = """
    SELECT tenant, id FROM jobs WHERE expires_at IS NOT NULL AND expires_at <= ? ORDER BY expires_at LIMIT ?
"""

_LAST_OF_CHUNK = """
    SELECT max(sequence), count(*) FROM (
        SELECT sequence FROM changes WHERE sequence > :after AND sequence <= :horizon ORDER BY sequence LIMIT :limit
    )
"""

# The newest change of a job that exists has that job's revision.
_OLD_CHANGES = """
    FROM changes AS c WHERE c.sequence > :after AND c.sequence <= :last AND NOT EXISTS (
        SELECT 1 FROM jobs AS j WHERE j.tenant = c.tenant AND j.id = c.id AND j.revision = c.revision
    )
"""

_OLD_TOMBSTONES = "SELECT tenant, id FROM tombstones WHERE removed_at <= ? ORDER BY removed_at LIMIT ?"


def read_silent(connection: sqlite3.Connection, after: int) -> tuple[list[tuple[Key, timedelta, bool]], int | None]:
    """Return some of the jobs whose silence counts, above the key `after`; and the last one's key, None at the end."""
    rows = connection.execute(_SILENT, (after,)).fetchall()
    jobs = [((tenant, job_id), to_duration(timeout), bool(stalled)) for _, tenant, job_id, timeout, stalled in rows]
    return jobs, rows[-1][0] if len(rows) == MAX_SILENT_ROWS else None


def read_expired(connection: sqlite3.Connection, now: datetime, limit: int) -> list[Key]:
    """Return the jobs whose time has come, at most `limit`."""
    return connection.execute(_EXPIRED, (from_instant(now), limit)).fetchall()


class Trimmed(NamedTuple):
    """What came of one step."""

    forgotten_sequence: int
    """The newest removal that was ever dropped."""
    has_more: bool


class Trimmer:
    """Walks through the changes, from the oldest to those of 24 hours ago, and then again; in the writer's thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Begin with the oldest."""
        self._connection = connection
        self._after = 0
        self._next_walk_at: datetime | None = None

    def step(self, now: datetime, sequence: int, limit: int) -> Trimmed:
        """Look at the next `limit` changes, and at as many tombstones; `sequence` is the number of the newest change.

        Raises:
            sqlite3.Error: nothing was dropped.
        """
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._mark(now, sequence)
            after = self._drop_changes(now, limit) if self._walks(now) else 0
            has_more = self._drop_tombstones(now, limit) or after > 0
            (forgotten,) = connection.execute("SELECT forgotten_sequence FROM store").fetchone()
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        if self._walks(now) and not after:
            self._next_walk_at = now + WALK_INTERVAL
        self._after = after
        return Trimmed(forgotten, has_more)

    def _walks(self, now: datetime) -> bool:
        return self._next_walk_at is None or now >= self._next_walk_at

    def _mark(self, now: datetime, sequence: int) -> None:
        """Note how far the changes have come; once in a while is enough."""
        at, since = from_instant(now), from_instant(now - MARK_INTERVAL)
        insert = """
            INSERT OR IGNORE INTO marks (marked_at, sequence)
            SELECT ?, ? WHERE NOT EXISTS (SELECT 1 FROM marks WHERE marked_at > ? OR sequence = ?)
        """
        self._connection.execute(insert, (at, sequence, since, sequence))

    def _drop_changes(self, now: datetime, limit: int) -> int:
        """Drop what is old of the next changes, and return where to go on; 0 at the end."""
        old_at = from_instant(now - FEED_RETENTION)
        newest_old = "SELECT max(marked_at), sequence FROM marks WHERE marked_at <= ?"
        marked_at, horizon = self._connection.execute(newest_old, (old_at,)).fetchone()
        if marked_at is None:
            return 0
        self._connection.execute("DELETE FROM marks WHERE marked_at < ?", (marked_at,))
        chunk = {"after": self._after, "horizon": horizon, "limit": limit}
        last, count = self._connection.execute(_LAST_OF_CHUNK, chunk).fetchone()
        if not count:
            return 0
        bounds = {"after": self._after, "last": last}
        # Who resumes from before a removal that is dropped would never learn of it.
        (removal,) = self._connection.execute(f"SELECT max(sequence) {_OLD_CHANGES} AND c.removed", bounds).fetchone()
        if removal is not None:
            forget = "UPDATE store SET forgotten_sequence = max(forgotten_sequence, ?)"
            self._connection.execute(forget, (removal,))
        self._connection.execute(f"DELETE FROM changes WHERE sequence IN (SELECT c.sequence {_OLD_CHANGES})", bounds)
        return last if count == limit else 0

    def _drop_tombstones(self, now: datetime, limit: int) -> bool:
        rows = self._connection.execute(_OLD_TOMBSTONES, (from_instant(now - TOMBSTONE_RETENTION), limit)).fetchall()
        self._connection.executemany("DELETE FROM tombstones WHERE tenant = ? AND id = ?", rows)
        return len(rows) == limit


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
