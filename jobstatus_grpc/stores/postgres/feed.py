"""The PostgreSQL store's change feed: the changes that one snapshot sees and an earlier one did not.

A position is a snapshot. Each row of `changes` has its transaction's id, and PostgreSQL itself keeps track of which
transactions a snapshot sees. So a change whose transaction took long is not lost, none is delivered twice, and no
change has to wait for the slowest transaction.
https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import asyncpg

from jobstatus_grpc.errors import StoreChangedError, StoreUnavailableError
from jobstatus_grpc.job import Job
from jobstatus_grpc.stores.embedded import MAX_BATCH_CHANGES, TOO_OLD
from jobstatus_grpc.stores.interface import Change, ChangeBatch, Key, Position
from jobstatus_grpc.stores.postgres.database import Connection, Database
from jobstatus_grpc.stores.postgres.statements import JOB, columns_of
from jobstatus_grpc.stores.sql.rows import JobCache, read_final

POLL_SECONDS = 0.2
"""Poll interval in seconds: the longest delay of a change whose notification was lost."""

# The timeline is read from the current WAL file's name: after a promotion the control file still has the old one.
INCARNATION = """
    (SELECT system_identifier FROM pg_control_system()) || '.' || (
        SELECT oid FROM pg_database WHERE datname = current_database()
    ) || '.' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)
"""

_NEWEST = """
    greatest(
        (SELECT xid FROM jobstatus.changes ORDER BY xid DESC LIMIT 1), (SELECT forgotten_xid FROM jobstatus.store)
    )::text
"""

_HEAD = f"SELECT {INCARNATION} AS incarnation, pg_current_snapshot()::text AS snapshot, {_NEWEST} AS newest"

_UNSEEN = f"""
        c.xid >= $2::text::xid8 AND (c.xid > $2::text::xid8 OR c.number > $3::integer)
        AND ($4::text IS NULL OR pg_visible_in_snapshot(c.xid, $4::text::pg_snapshot))
    ORDER BY c.xid, c.number LIMIT {MAX_BATCH_CHANGES}
"""

# A snapshot did not see the transactions that began after it, nor those that were running: two ranges of the index.
# One range, from the oldest that was running, would hold more rows with every change while one transaction stays open.
_CHANGES = f"""
    SELECT s.*, r.* FROM (
        {_HEAD}, (SELECT forgotten_xid >= pg_snapshot_xmin($1::text::pg_snapshot) FROM jobstatus.store) AS forgotten
    ) AS s, (
        SELECT array_agg(c.xid::text), array_agg(c.number), array_agg(c.tenant), array_agg(c.id),
            array_agg(c.revision), array_agg(c.removed), array_agg(c.changed_at), array_agg(c.final)
        FROM (
            (SELECT * FROM jobstatus.changes AS c WHERE c.xid >= pg_snapshot_xmax($1::text::pg_snapshot) AND {_UNSEEN})
            UNION ALL (
                SELECT * FROM jobstatus.changes AS c
                WHERE c.xid = ANY (ARRAY(SELECT pg_snapshot_xip($1::text::pg_snapshot))) AND {_UNSEEN}
            )
            ORDER BY xid, number LIMIT {MAX_BATCH_CHANGES}
        ) AS c
    ) AS r
"""

_JOBS = f"""
    SELECT {JOB} FROM unnest($1::text[], $2::text[]) AS w (tenant, id)
    JOIN jobstatus.jobs AS j ON j.tenant = w.tenant AND j.id = w.id
"""

_SNAPSHOT = re.compile(r"\d{1,20}:\d{1,20}:(\d{1,20}(,\d{1,20})*)?", re.ASCII)

_POSITION = re.compile(r"(\d+\.\d+\.[0-9A-F]{8})~([\d:,]+)(?:~([\d:,]+)~(\d{1,20})~(\d{1,9}))?", re.ASCII)


class Place(NamedTuple):
    """A parsed position: how far a reader has come.

    All changes that `snapshot` sees have been delivered. If there is a `next_snapshot`, the reader is in the middle of
    the changes that it sees and `snapshot` does not: those up to (`xid`, `number`) have been delivered.
    """

    incarnation: str
    """System identifier, database and timeline: positions of another server mean nothing here."""
    snapshot: str
    next_snapshot: str | None = None
    xid: str = "0"
    number: str = "0"

    @classmethod
    def read(cls, position: Position) -> Place:
        """Parse a position.

        Raises:
            StoreChangedError: it is malformed.
        """
        found = _POSITION.fullmatch(position)
        snapshots = [] if found is None else [text for text in found.group(2, 3) if text is not None]
        if found is None or not all(_SNAPSHOT.fullmatch(text) for text in snapshots):
            raise StoreChangedError
        return cls(*(found.groups() if found[3] is not None else found.group(1, 2)))

    def write(self) -> Position:
        """Return the position as text."""
        head = f"{self.incarnation}~{self.snapshot}"
        return head if self.next_snapshot is None else "~".join((head, *map(str, self[2:])))


class _ChangeRow(NamedTuple):
    xid: str
    number: int
    tenant: str
    id: str
    revision: int
    removed: bool
    changed_at: int
    final: str | None


class PostgresFeed:
    """Reads the changes after a position, and waits for more. One reader at a time may wait. For one event loop.

    `notified` is set when there may be changes; the feed clears it.
    """

    def __init__(self, database: Database, *, notified: asyncio.Event, cache: JobCache) -> None:
        self._database = database
        self._notified = notified
        self._cache = cache
        self._position: Position | None = None
        self.incarnation = ""
        """Of the server that was read last; empty before the first read."""

    async def position(self) -> Position:
        """See JobStore. Without changes it stays where the waiting reader is, though the snapshot grows older."""
        if self._position is not None:
            with contextlib.suppress(StoreChangedError):
                batch = await self._read(Place.read(self._position), None)
                if not batch.changes:
                    return self._position
        async with self._database.connection() as connection:
            incarnation, snapshot, newest = await connection.fetchrow(_HEAD)
        self.incarnation = incarnation
        position = Place(incarnation, _durable(snapshot, newest)).write()
        if self._position is None:
            self._position = position
        return position

    async def wait(self, after: Position) -> ChangeBatch:
        """Wait until there are changes after a position, and return them. See JobStore.changes."""
        place = Place.read(after)
        while True:
            self._notified.clear()  # before the read: a notification in between must not be lost
            batch = await self._read(place, None)
            if batch.changes:
                self._position = batch.position
                return batch
            place = Place.read(batch.position)
            if place.next_snapshot is not None:
                continue  # a full batch of rows, each superseded by a later one: read on
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._notified.wait(), POLL_SECONDS)

    async def read(self, after: Position, up_to: Position) -> ChangeBatch:
        """Return the changes between two positions, without waiting. See JobStore.changes."""
        until = Place.read(up_to)
        return await self._read(Place.read(after), until)

    async def _read(self, place: Place, until: Place | None) -> ChangeBatch:
        """Return the changes after `place` that `until` sees, or if that is None, the statement's own snapshot."""
        seen = place.next_snapshot or (until.snapshot if until else None)
        async with self._database.connection() as connection:
            incarnation, snapshot, newest, is_forgotten, *columns = await self._fetch(connection, place, seen)
            self.incarnation = incarnation
            if incarnation != place.incarnation or (until is not None and until.incarnation != incarnation):
                raise StoreChangedError
            if is_forgotten:
                raise StoreChangedError(TOO_OLD)
            found = [_ChangeRow(*row) for row in zip(*columns, strict=True)] if columns[0] else []
            changes = await self._newest(connection, found)
        snapshot = _durable(snapshot, newest)
        if len(found) == MAX_BATCH_CHANGES:
            after = place._replace(next_snapshot=seen or snapshot, xid=found[-1].xid, number=str(found[-1].number))
        else:
            after = Place(incarnation, seen or snapshot)
        return ChangeBatch(after.write(), changes)

    async def _fetch(self, connection: Connection, place: Place, seen: str | None) -> Sequence[Any]:
        try:
            row: Any = await connection.fetchrow(_CHANGES, place.snapshot, place.xid, int(place.number), seen)
        except (asyncpg.DataError, asyncpg.UndefinedFileError) as error:
            raise StoreChangedError from error
        except asyncpg.ObjectNotInPrerequisiteStateError as error:  # a standby has no WAL file to name
            raise StoreUnavailableError("the database is a standby") from error
        return tuple(row)

    async def _newest(self, connection: Connection, rows: Sequence[_ChangeRow]) -> list[Change]:
        """Return the newest change of each job in `rows`; none where a change that follows `rows` supersedes it."""
        rows_of: dict[Key, list[_ChangeRow]] = {}
        for row in rows:
            key = (row.tenant, row.id)
            rows_of[key] = [*rows_of.pop(key, ()), row]  # a job takes its place in the order by its last row
        jobs = {key: job for key, changes in rows_of.items() if (job := self._cached_job(key, changes)) is not None}
        missing = [
            key for key, changes in rows_of.items() if key not in jobs and not all(row.removed for row in changes)
        ]
        if missing:
            for row in await connection.fetch(_JOBS, *columns_of(missing)):
                job = self._cache.read(row).job
                jobs[job.tenant, job.id] = job
        newest = (_newest_of(key, changes, jobs.get(key)) for key, changes in rows_of.items())
        return [change for change in newest if change is not None]

    def _cached_job(self, key: Key, changes: Sequence[_ChangeRow]) -> Job | None:
        """Return the job as the newest of its changes left it, if the cache has it."""
        if any(row.removed for row in changes):
            return None  # a job that was created anew may have a lower revision than the removed one
        newest = max(changes, key=lambda row: row.revision)
        cached = self._cache.get_revision(key, newest.revision, newest.changed_at)
        return None if cached is None else cached.job


def _newest_of(key: Key, changes: Sequence[_ChangeRow], job: Job | None) -> Change | None:
    """Return the one change to deliver for a job, which is stored as `job`; None if a later change supersedes it."""
    if job is not None and any(row.revision == job.revision and not row.removed for row in changes):
        return Change(*key, job.revision, job)
    removals = [row for row in changes if row.removed]
    return Change(*key, removals[-1].revision, None, read_final(removals[-1].final)) if removals else None


def _durable(snapshot: str, newest: str) -> str:
    """Return a snapshot that sees the same changes, but no transaction that a crash could undo.

    After a crash PostgreSQL gives the ids of transactions that left nothing durable to new ones. A position that
    counts such an id as seen would miss the changes of its second owner. The newest change is durable, and so is the
    use of every id up to its own: the snapshot returned ends there.
    """
    end = int(newest) + 1
    running = [xid for xid in snapshot.rpartition(":")[2].split(",") if xid and int(xid) < end]
    return f"{running[0] if running else end}:{end}:{','.join(running)}"
