"""The PostgreSQL store's change feed: the changes that one snapshot sees and an earlier one did not.

A position is a snapshot. Each row of `changes` has its transaction's id, and PostgreSQL itself keeps track of which
transactions a snapshot sees. So a change whose transaction took long is not lost, none is delivered twice, and no
change has to wait for the slowest transaction.
https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-INFO-SNAPSHOT

A position names its history by the table of changes, which pg_restore creates anew, and by its newest change with the
time at which that was made. If the database was set back to an earlier state, later positions are refused.

Rows that were restored from a dump have the transaction ids of the cluster that wrote them. If these are ahead, the
feed begins anew: new changes would seem to be older than the restored ones, and be delivered to no reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import asyncpg

from jobstatus_grpc.errors import StoreChangedError, StoreUnavailableError
from jobstatus_grpc.job import Job
from jobstatus_grpc.stores.embedded import TOO_OLD
from jobstatus_grpc.stores.interface import MAX_BATCH_CHANGES, Change, ChangeBatch, Key, Position
from jobstatus_grpc.stores.postgres.database import Connection, Database
from jobstatus_grpc.stores.postgres.statements import JOB, columns_of
from jobstatus_grpc.stores.sql.rows import JobCache, Row, read_final

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
"""Poll interval in seconds: the longest delay of a change whose notification was lost."""

POSITION_TRIES = 10
"""How often the position is read, once per POLL_SECONDS, if so many commits are running that it would be too long."""

# The timeline is read from the current WAL file's name: after a promotion the control file still has the old one.
# pg_restore gives the tables new oids, and creates indexes last: without this one, the tables are not filled yet.
INCARNATION = """
    (SELECT system_identifier FROM pg_control_system()) || '.' || (
        SELECT oid FROM pg_database WHERE datname = current_database()
    ) || '.' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) || '.' || (
        SELECT to_regclass('jobstatus.changes')::oid WHERE to_regclass('jobstatus.tombstones_by_age') IS NOT NULL
    )
"""

MAX_SNAPSHOT_CHARACTERS = 120
"""The length of a snapshot in a position, which has at most two of them: see interface.MAX_POSITION_CHARACTERS."""

_HEAD = f"""
    SELECT {INCARNATION} AS incarnation, pg_current_snapshot()::text AS snapshot,
        greatest(newest.xid, store.forgotten_xid)::text AS newest,
        CASE WHEN newest.xid >= store.forgotten_xid THEN newest.changed_at ELSE 0 END AS changed_at
    FROM jobstatus.store LEFT JOIN (
        SELECT xid, changed_at FROM jobstatus.changes ORDER BY xid DESC LIMIT 1
    ) AS newest ON true
"""

_NEWEST_BEFORE = """
    SELECT xid::text, changed_at FROM jobstatus.changes WHERE xid < $1::text::xid8 ORDER BY xid DESC LIMIT 1
"""

# Of running transactions, those that will write no change: a commit locks the table of jobs before it has an id.
_FOREIGN = """
    WITH locks AS MATERIALIZED (SELECT * FROM pg_locks)
    SELECT running.xid FROM unnest($1::text[]) AS running (xid) JOIN locks AS own
        ON own.locktype = 'transactionid' AND own.mode = 'ExclusiveLock' AND own.granted
        AND own.transactionid = running.xid::xid8::xid
    WHERE NOT EXISTS (
        SELECT 1 FROM locks AS used
        WHERE used.virtualtransaction = own.virtualtransaction AND used.locktype = 'relation'
            AND used.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND used.relation IN ('jobstatus.jobs'::regclass, 'jobstatus.changes'::regclass)
            AND used.mode <> 'AccessShareLock'
    )
"""

MAX_EXAMINED_CHANGES = 20_000
"""The number of changes of which a statement finds the newest of each job, in about 20 ms and 4 MiB of its memory."""


# A snapshot did not see the transactions that began after it, nor those that were running: two ranges of the index.
# One range, from the oldest that was running, would hold more rows with every change while one transaction stays open.
# Of each job the change with the highest revision is returned, whose transaction may have an earlier id than others.
@cache
def _changes(max_rows: int) -> str:
    """Return the query for what the first `max_rows` rows after a place contain."""
    unseen = f"""
            c.xid >= $2::text::xid8 AND (c.xid > $2::text::xid8 OR c.number > $3::integer)
            AND ($4::text IS NULL OR pg_visible_in_snapshot(c.xid, $4::text::pg_snapshot))
        ORDER BY c.xid, c.number LIMIT {max_rows}
    """
    return f"""
        WITH unseen AS MATERIALIZED (
            (SELECT * FROM jobstatus.changes AS c WHERE c.xid >= pg_snapshot_xmax($1::text::pg_snapshot) AND {unseen})
            UNION ALL (
                SELECT * FROM jobstatus.changes AS c
                WHERE c.xid = ANY (ARRAY(SELECT pg_snapshot_xip($1::text::pg_snapshot))) AND {unseen}
            )
            ORDER BY xid, number LIMIT {max_rows}
        )
        SELECT s.*, last.*, r.* FROM (
            SELECT head.*, store.forgotten_xid >= pg_snapshot_xmin($1::text::pg_snapshot),
                store.forgotten_xid = $5::text::xid8 OR EXISTS (
                    SELECT 1 FROM jobstatus.changes WHERE xid = $5::text::xid8 AND changed_at = $6::bigint
                )
            FROM ({_HEAD}) AS head, jobstatus.store
        ) AS s LEFT JOIN (
            SELECT xid::text, number FROM unseen OFFSET {max_rows - 1} LIMIT 1
        ) AS last ON true, (
            SELECT array_agg(c.xid::text), array_agg(c.number), array_agg(c.tenant), array_agg(c.id),
                array_agg(c.revision), array_agg(c.removals), array_agg(c.changed_at), array_agg(c.final)
            FROM (
                SELECT unseen.*, newest.removals FROM unseen JOIN (
                    SELECT tenant, id, max(revision) AS revision, count(*) FILTER (WHERE removed) AS removals
                    FROM unseen GROUP BY tenant, id
                ) AS newest USING (tenant, id, revision)
                ORDER BY unseen.xid, number
            ) AS c
        ) AS r
    """


_LOCK_CHANGES = "LOCK TABLE jobstatus.changes IN ACCESS EXCLUSIVE MODE"

# Not the id of this transaction: a position with an older one that is still running would count as forgotten.
_BEGIN_ANEW = """
    TRUNCATE jobstatus.changes;
    UPDATE jobstatus.store SET forgotten_xid =
        (pg_snapshot_xmin(pg_current_snapshot())::text::bigint - 1)::text::xid8;
"""

# Without those that a later change has replaced, except where a removal must be the job's end.
_JOBS = f"""
    SELECT {JOB} FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[]) AS w (tenant, id, revision, removals)
    JOIN jobstatus.jobs AS j ON j.tenant = w.tenant AND j.id = w.id
    WHERE j.revision = w.revision OR w.removals > 0
"""

_SNAPSHOT = r"[0-9a-f]{1,16}:(?:[0-9a-f]{1,16}(?:,[0-9a-f]{1,16})*)?:[0-9a-f]{1,16}"

_POSITION = re.compile(
    rf"(\d+\.\d+\.[0-9A-F]{{8}}\.\d+)~({_SNAPSHOT})(?:~({_SNAPSHOT})~(\d{{1,20}})~(\d{{1,9}}))?", re.ASCII
)


class Snapshot(NamedTuple):
    """The changes that a reader has: those with a transaction id below `end`, without the running transactions."""

    end: int
    """The id of the newest change plus one. That change is durable, and so is the use of every id up to its own.

    After a crash PostgreSQL gives the ids of transactions that left nothing durable to new ones: a snapshot that counts
    such an id as seen would miss the changes of its second owner.
    """
    running: tuple[int, ...]
    """Ascending."""
    changed_at: int
    """When the newest change was made, in microseconds since 1970; 0: it is in the table no more."""

    @classmethod
    def read(cls, text: str) -> Snapshot:
        """Parse what `write` returns."""
        end, running, changed_at = text.split(":")
        last = int(end, 16)
        return cls(last, tuple(last - int(age, 16) for age in running.split(",") if age), int(changed_at, 16))

    def write(self) -> str:
        """Return the snapshot as text, with the ages of running transactions, which are short."""
        return f"{self.end:x}:{','.join(f'{self.end - xid:x}' for xid in self.running)}:{self.changed_at:x}"

    def to_postgres(self) -> str:
        """Return the text of a pg_snapshot."""
        oldest = self.running[0] if self.running else self.end
        return f"{oldest}:{self.end}:{','.join(map(str, self.running))}"

    @property
    def is_short(self) -> bool:
        """Whether it fits in a position."""
        return len(self.write()) <= MAX_SNAPSHOT_CHARACTERS


class Place(NamedTuple):
    """A parsed position: how far a reader has come.

    All changes that `snapshot` sees have been delivered. If there is a `next_snapshot`, the reader is in the middle of
    the changes that it sees and `snapshot` does not: those up to (`xid`, `number`) have been delivered.
    """

    incarnation: str
    """System identifier, database, timeline and table: positions of another history mean nothing here."""
    snapshot: Snapshot
    next_snapshot: Snapshot | None = None
    xid: str = "0"
    number: str = "0"

    @classmethod
    def read(cls, position: Position) -> Place:
        """Parse a position.

        Raises:
            StoreChangedError: it is malformed.
        """
        found = _POSITION.fullmatch(position)
        if found is None:
            raise StoreChangedError
        incarnation, snapshot, next_snapshot, xid, number = found.groups()
        if next_snapshot is None:
            return cls(incarnation, Snapshot.read(snapshot))
        return cls(incarnation, Snapshot.read(snapshot), Snapshot.read(next_snapshot), xid, number)

    def write(self) -> Position:
        """Return the position as text."""
        head = f"{self.incarnation}~{self.snapshot.write()}"
        if self.next_snapshot is None:
            return head
        return f"{head}~{self.next_snapshot.write()}~{self.xid}~{self.number}"


class _ChangeRow(NamedTuple):
    """The newest of a job's changes among those that were examined."""

    xid: str
    number: int
    tenant: str
    id: str
    revision: int
    removals: int
    """The number of the job's changes that are removals."""
    changed_at: int
    final: str | None

    @property
    def key(self) -> Key:
        return (self.tenant, self.id)


class _Found(NamedTuple):
    """What a statement found after a place."""

    head: Sequence[Any]
    """Snapshot, newest change and its time, see _HEAD."""
    rows: Sequence[_ChangeRow]
    """In the order of the feed."""
    next_place: tuple[str, int] | None
    """The last row that was examined, if there may be more after it."""


class PostgresFeed:
    """Reads the changes after a position, and waits for more. One reader at a time may wait. For one event loop.

    `notified` is set when there may be changes; the feed clears it.
    """

    def __init__(self, database: Database, *, notified: asyncio.Event, cache: JobCache) -> None:
        self._database = database
        self._notified = notified
        self._cache = cache
        self._position: Position | None = None
        self._foreign: set[int] = set()
        """Running transactions that are known to write no changes."""
        self.incarnation = ""
        """Of the server that was read last; empty before the first read."""

    async def position(self) -> Position:
        """See JobStore. Without changes it stays where the waiting reader is, though the snapshot grows older."""
        if self._position is not None:
            with contextlib.suppress(StoreChangedError):
                _, is_newest = await self._read(Place.read(self._position), None)
                if is_newest:
                    return self._position
        for _ in range(POSITION_TRIES):
            async with self._database.connection() as connection:
                incarnation, *head = _whole(await connection.fetchrow(_HEAD))
                if _is_ahead(*head):
                    await _begin_anew(connection)
                    continue
                snapshot = _durable(*head)
                short = await self._shorten(connection, snapshot)
            if short.end == snapshot.end:
                break
            await asyncio.sleep(POLL_SECONDS)  # the position would be before changes that are committed
        else:
            raise StoreUnavailableError("too many commits are running at once")
        self.incarnation = incarnation
        position = Place(incarnation, short).write()
        if self._position is None:
            self._position = position
        return position

    async def wait(self, after: Position) -> ChangeBatch:
        """Wait until there are changes after a position, and return them. See JobStore.changes."""
        place = Place.read(after)
        while True:
            self._notified.clear()  # before the read: a notification in between must not be lost
            batch, _ = await self._read(place, None)
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
        batch, _ = await self._read(Place.read(after), until)
        return batch

    async def _read(self, place: Place, until: Place | None) -> tuple[ChangeBatch, bool]:
        """Return the changes after `place` that `until` sees, or if that is None, the statement's own snapshot.

        And whether there are none: a batch is also empty if all its changes were superseded, or have to wait.
        """
        seen = place.next_snapshot or (until.snapshot if until else None)
        async with self._database.connection() as connection:
            found = await self._fetch(connection, place, seen, until, MAX_BATCH_CHANGES)
            batch = await self._batch(connection, place, seen, found)
            if Place.read(batch.position).next_snapshot is not None and len(batch.changes) < MAX_BATCH_CHANGES // 2:
                # Most are superseded by later ones, as where few jobs change often.
                found = await self._fetch(connection, place, seen, until, MAX_EXAMINED_CHANGES)
                batch = await self._batch(connection, place, seen, found)
        return batch, not found.rows

    async def _fetch(
        self, connection: Connection, place: Place, seen: Snapshot | None, until: Place | None, max_rows: int
    ) -> _Found:
        snapshot = place.snapshot
        newest = place.next_snapshot or snapshot  # a history that has the later one's changes has the earlier one's
        arguments = (
            snapshot.to_postgres(),
            place.xid,
            int(place.number),
            None if seen is None else seen.to_postgres(),
            str(newest.end - 1),
            newest.changed_at,
        )
        try:
            row = await connection.fetchrow(_changes(max_rows), *arguments)
        except (asyncpg.DataError, asyncpg.UndefinedFileError) as error:
            raise StoreChangedError from error
        except asyncpg.ObjectNotInPrerequisiteStateError as error:  # a standby has no WAL file to name
            raise StoreUnavailableError("the database is a standby") from error
        self.incarnation, *head, is_forgotten, is_known, xid, number = _whole(row)[:8]
        if self.incarnation != place.incarnation or (until is not None and until.incarnation != self.incarnation):
            raise StoreChangedError
        if is_forgotten:
            raise StoreChangedError(TOO_OLD)
        if not is_known or (seen is None and _is_ahead(*head)):
            raise StoreChangedError
        rows = [_ChangeRow(*values) for values in zip(*row[8:], strict=True)] if row[8] else []
        return _Found(head, rows, None if xid is None else (xid, number))

    async def _batch(self, connection: Connection, place: Place, seen: Snapshot | None, found: _Found) -> ChangeBatch:
        """Return at most MAX_BATCH_CHANGES of the changes that were found, and the position after them."""
        rows, next_place = found.rows, found.next_place
        if seen is None:
            seen = await self._shorten(connection, _durable(*found.head))
            rows = [row for row in rows if int(row.xid) < seen.end]
            if next_place is not None and int(next_place[0]) >= seen.end:
                next_place = None
        jobs = await self._jobs(connection, rows)
        changes: list[Change] = []
        superseded: list[Key] = []
        for row in rows:
            job = jobs.get(row.key)
            if row.removals > 1 or (row.removals and job is not None):
                # The id names a new job since, which is possible after a day only: the position is that old.
                raise StoreChangedError(TOO_OLD)
            if row.removals:
                changes.append(Change(*row.key, row.revision, None, read_final(row.final)))
            elif job is not None and job.revision == row.revision:
                changes.append(Change(*row.key, row.revision, job))
            else:
                superseded.append(row.key)
            if len(changes) == MAX_BATCH_CHANGES:
                next_place = (row.xid, row.number)
                break
        after = Place(self.incarnation, seen)
        if next_place is not None:
            after = place._replace(next_snapshot=seen, xid=next_place[0], number=str(next_place[1]))
        return ChangeBatch(after.write(), changes, superseded)

    async def _shorten(self, connection: Connection, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot that fits in a position: without foreign transactions, and if need be with an earlier end.

        Its end is not before that of an earlier snapshot: of the transactions below that end, no more are running now.
        """
        self._foreign.intersection_update(snapshot.running)
        running = [xid for xid in snapshot.running if xid not in self._foreign]
        short = snapshot._replace(running=tuple(running))
        if short.is_short:
            return short
        rows = await connection.fetch(_FOREIGN, list(map(str, running)))
        self._foreign.update(int(row[0]) for row in rows)
        running = [xid for xid in running if xid not in self._foreign]
        short = snapshot._replace(running=tuple(running))
        while not short.is_short:
            before = await connection.fetchrow(_NEWEST_BEFORE, str(short.running[-1]))
            end, changed_at = (int(before[0]) + 1, before[1]) if before else (1, 0)
            short = Snapshot(end, tuple(xid for xid in running if xid < end), changed_at)
        return short

    async def _jobs(self, connection: Connection, rows: Sequence[_ChangeRow]) -> dict[Key, Job]:
        """Return the jobs as the rows left them, and of removed jobs, those that have their ids now."""
        jobs: dict[Key, Job] = {}
        missing: list[Row] = []
        for row in rows:
            # A job that was created anew may have a lower revision than the removed one.
            cached = None if row.removals else self._cache.get_revision(row.key, row.revision, row.changed_at)
            if cached is None:
                missing.append((*row.key, row.revision, row.removals))
            else:
                jobs[row.key] = cached.job
        if missing:
            for columns in await connection.fetch(_JOBS, *columns_of(missing)):
                job = self._cache.read(columns).job
                jobs[job.tenant, job.id] = job
        return jobs


def _durable(snapshot: str, newest: str, changed_at: int) -> Snapshot:
    """Return a snapshot that sees the same changes as a pg_snapshot, given the newest of them."""
    end = int(newest) + 1
    running = (int(xid) for xid in snapshot.rpartition(":")[2].split(",") if xid)
    return Snapshot(end, tuple(xid for xid in running if xid < end), changed_at)


def _is_ahead(snapshot: str, newest: str, _: int) -> bool:
    """Return whether the newest change has an id that no transaction of this cluster has had."""
    return int(newest) >= int(snapshot.split(":")[1])


async def _begin_anew(connection: Connection) -> None:
    """Drop all changes, which no valid position is before."""
    async with connection.transaction():
        await connection.execute(_LOCK_CHANGES)
        _, *head = _whole(await connection.fetchrow(_HEAD))
        if _is_ahead(*head):  # no other process was faster
            await connection.execute(_BEGIN_ANEW)
            logger.warning(
                "the jobs were restored from another PostgreSQL cluster, whose transaction ids are ahead: the feed of "
                "changes begins anew, and so do watches"
            )


def _whole(row: Any) -> tuple[Any, ...]:
    """Return a row that begins with the incarnation.

    Raises:
        StoreUnavailableError: the schema is incomplete.
    """
    if row is None or row[0] is None:
        raise StoreUnavailableError("the database's schema jobstatus is incomplete, as while it is being restored")
    return tuple(row)
