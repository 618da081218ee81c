"""The SQLite store's maintenance: the queries for jobs that are due, and the removal of old history."""

from __future__ import annotations

import sqlite3
from datetime import datetime, timedelta
from typing import NamedTuple

from jobstatus_grpc.job.limits import CLOCK_TOLERANCE
from jobstatus_grpc.stores.interface import FEED_RETENTION, REQUEST_RETENTION, TOMBSTONE_RETENTION, Key
from jobstatus_grpc.stores.sql.rows import from_instant, to_duration
from jobstatus_grpc.stores.sqlite.writer import Writer

MAX_SILENT_ROWS = 5000
"""The number of jobs that one query of `read_silent` returns, so that it does not block other reads for long."""

MARK_INTERVAL = timedelta(minutes=1)
"""How often the newest change's number is recorded with the time: the age of changes is known to this precision."""

WALK_INTERVAL = timedelta(hours=1)
"""How often all changes are examined. A walk reads one row for each job that exists: millions once an hour is cheap."""

_SILENT = f"""
    SELECT key, tenant, id, heartbeat_timeout, stalled FROM jobs INDEXED BY jobs_by_silence
    WHERE state = 2 AND heartbeat_timeout IS NOT NULL AND key > ? ORDER BY key LIMIT {MAX_SILENT_ROWS}
"""

_EXPIRED = """
    SELECT tenant, id FROM jobs WHERE expires_at IS NOT NULL AND expires_at <= ? ORDER BY expires_at LIMIT ?
"""

# The latest to expire: after a time in which the clock was wrong, the jobs that ended in it are among these.
_ENDED_IN_FUTURE = """
    SELECT tenant, id FROM (
        SELECT tenant, id, finished_at FROM jobs WHERE expires_at IS NOT NULL AND expires_at > ?
        ORDER BY expires_at DESC LIMIT ?
    ) WHERE finished_at > ?
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

# Of removals while the clock was wrong: their ids would not be free until then.
_TAKE_TOMBSTONES_BACK = """
    UPDATE tombstones SET removed_at = :now WHERE (tenant, id) IN (
        SELECT tenant, id FROM tombstones WHERE removed_at > :now LIMIT :limit
    )
"""

_OLD_TOMBSTONES = "SELECT tenant, id FROM tombstones WHERE removed_at <= ? ORDER BY removed_at LIMIT ?"


# Both numbers increase with time. A request of the mark's own sequence may be newer than the mark.
_DROP_REQUESTS = """
    DELETE FROM requests WHERE number IN (
        SELECT number FROM (SELECT number, sequence FROM requests ORDER BY number LIMIT ?) WHERE sequence < ?
    )
"""


def read_silent(connection: sqlite3.Connection, after: int) -> tuple[list[tuple[Key, timedelta, bool]], int | None]:
    """Return jobs IN_PROGRESS with a heartbeat_timeout as key, timeout and whether they are stalled.

    Args:
        connection: a reading connection.
        after: the row key to continue after.

    Returns:
        The jobs, and the row key of the last one; None if there are no more.
    """
    rows = connection.execute(_SILENT, (after,)).fetchall()
    jobs = [((tenant, job_id), to_duration(timeout), bool(stalled)) for _, tenant, job_id, timeout, stalled in rows]
    return jobs, rows[-1][0] if len(rows) == MAX_SILENT_ROWS else None


def read_expired(connection: sqlite3.Connection, now: datetime, due_at: datetime, limit: int) -> list[Key]:
    """Return at most `limit` jobs that have expired by `due_at`, or whose end is after `now`."""
    keys = connection.execute(_EXPIRED, (from_instant(due_at), limit)).fetchall()
    latest = from_instant(now + CLOCK_TOLERANCE)
    return keys + connection.execute(_ENDED_IN_FUTURE, (latest, limit - len(keys), latest)).fetchall()


class Trimmed(NamedTuple):
    """The result of one step."""

    forgotten_sequence: int
    """The number of the newest removal that was ever dropped from the feed."""
    has_more: bool


class Trimmer:
    """Walks through the changes from the oldest to those of 24 hours ago, once per WALK_INTERVAL.

    For the writer's thread.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._connection = writer.connection
        self._after = 0
        self._next_walk_at: datetime | None = None

    def step(self, now: datetime, old_at: datetime, sequence: int, limit: int) -> Trimmed:
        """Examine the next `limit` changes and as many tombstones and requests, and drop the old ones.

        Args:
            now: the store's time.
            old_at: the time from which to count back to what is old: `now`, or before it if `now` is not believed yet.
            sequence: the number of the newest change.
            limit: the maximum number of rows to examine in each table.

        Raises:
            sqlite3.Error: nothing was dropped.
        """
        with self._writer.transaction() as connection:
            self._mark(now, old_at, sequence)
            after = self._drop_changes(old_at, limit) if self._is_walking(now) else 0
            has_more = self._drop_tombstones(now, old_at, limit) or after > 0
            has_more = self._drop_requests(old_at, limit) or has_more
            (forgotten,) = connection.execute("SELECT forgotten_sequence FROM store").fetchone()
        if self._is_walking(now) and not after:
            self._next_walk_at = now + WALK_INTERVAL
        self._after = after
        return Trimmed(forgotten, has_more)

    def _is_walking(self, now: datetime) -> bool:
        next_walk_at = self._next_walk_at
        # Later than one interval from now: the clock was set back.
        return next_walk_at is None or not now < next_walk_at <= now + WALK_INTERVAL

    def _mark(self, now: datetime, old_at: datetime, sequence: int) -> None:
        """Record the number of the newest change with the time, once per MARK_INTERVAL.

        Marks in the future, of a clock that was wrong, are replaced by this one: what they mark is not newer.
        """
        at, since = from_instant(now), from_instant(now - MARK_INTERVAL)
        self._connection.execute("DELETE FROM marks WHERE marked_at > ?", (at,))
        oldest = self._mark_before(old_at - REQUEST_RETENTION)
        if oldest is not None:
            self._connection.execute("DELETE FROM marks WHERE marked_at < ?", (oldest[0],))
        insert = """
            INSERT OR IGNORE INTO marks (marked_at, sequence)
            SELECT ?, ? WHERE NOT EXISTS (SELECT 1 FROM marks WHERE marked_at > ? OR sequence = ?)
        """
        self._connection.execute(insert, (at, sequence, since, sequence))

    def _mark_before(self, at: datetime) -> tuple[int, int] | None:
        """Return the newest mark until then: its time and the sequence."""
        query = "SELECT marked_at, sequence FROM marks WHERE marked_at <= ? ORDER BY marked_at DESC LIMIT 1"
        mark: tuple[int, int] | None = self._connection.execute(query, (from_instant(at),)).fetchone()
        return mark

    def _drop_changes(self, old_at: datetime, limit: int) -> int:
        """Drop the old ones of the next changes, and return the sequence to continue after; 0 at the end."""
        mark = self._mark_before(old_at - FEED_RETENTION)
        if mark is None:
            return 0
        chunk = {"after": self._after, "horizon": mark[1], "limit": limit}
        last, count = self._connection.execute(_LAST_OF_CHUNK, chunk).fetchone()
        if not count:
            return 0
        bounds = {"after": self._after, "last": last}
        # A reader that resumes before a dropped removal would miss it: the feed refuses such positions.
        (removal,) = self._connection.execute(f"SELECT max(sequence) {_OLD_CHANGES} AND c.removed", bounds).fetchone()
        if removal is not None:
            forget = "UPDATE store SET forgotten_sequence = max(forgotten_sequence, ?)"
            self._connection.execute(forget, (removal,))
        self._connection.execute(f"DELETE FROM changes WHERE sequence IN (SELECT c.sequence {_OLD_CHANGES})", bounds)
        return last if count == limit else 0

    def _drop_requests(self, old_at: datetime, limit: int) -> bool:
        mark = self._mark_before(old_at - REQUEST_RETENTION)
        return mark is not None and self._connection.execute(_DROP_REQUESTS, (limit, mark[1])).rowcount == limit

    def _drop_tombstones(self, now: datetime, old_at: datetime, limit: int) -> bool:
        at = from_instant(now)
        taken_back = self._connection.execute(_TAKE_TOMBSTONES_BACK, {"now": at, "limit": limit}).rowcount
        rows = self._connection.execute(_OLD_TOMBSTONES, (from_instant(old_at - TOMBSTONE_RETENTION), limit)).fetchall()
        self._connection.executemany("DELETE FROM tombstones WHERE tenant = ? AND id = ?", rows)
        return limit in (len(rows), taken_back)
