"""Periodic work on the PostgreSQL store: stalled and expired jobs, trimming, and the number of jobs by state.

The sweeper calls it. One process at a time, the leader, finds and trims: the one whose session holds an advisory lock.
Every process writes its workers' heartbeats and reads the counts.

All processes take the times of heartbeats from the database's clock, so that they agree; but that clock may be set. The
leader compares it with its own monotonic clock before and after it looks for silent jobs: where it was set, the stall
clocks start anew. The commit of a Stall measures nothing: it only checks that the worker has not reported since.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeAlias

import asyncpg

from jobstatus_grpc.errors import RetryableError
from jobstatus_grpc.job import Command, Expire, JobState, Stall
from jobstatus_grpc.job.limits import CLOCK_TOLERANCE
from jobstatus_grpc.stores.embedded import AGAIN_SECONDS
from jobstatus_grpc.stores.interface import (
    FEED_RETENTION,
    REQUEST_RETENTION,
    STALLED,
    TOMBSTONE_RETENTION,
    Clock,
    Key,
)
from jobstatus_grpc.stores.postgres.connect import CONNECT_SECONDS, TRANSIENT_ERRORS
from jobstatus_grpc.stores.postgres.database import Connection, Database, describe
from jobstatus_grpc.stores.postgres.statements import NOW, columns_of
from jobstatus_grpc.stores.retention_clock import RetentionClock
from jobstatus_grpc.stores.sql.rows import from_instant, to_instant

logger = logging.getLogger(__name__)

Signs: TypeAlias = tuple[int | None, int | None]
"""When a worker's last update that changed its job came, and its last heartbeat, in microseconds since 1970."""

MAINTENANCE_LOCK = 0x4A6F6253_0002
"""Key of the advisory lock that the leader's session holds."""

COUNT_SECONDS = 5.0
"""How often each process reads the number of jobs by state, in seconds; in between it counts its own commits only."""

TRIM_SECONDS = 30.0
"""Longest time for one round of trimming, in seconds: it deletes many rows, and no caller waits for it."""

SUMMED_ROWS = 5000
"""New rows about children that the leader replaces with sums in each look for overdue jobs, four times a second."""

CLOCK_STEP_SECONDS = 1.0
"""A change of the difference between the database's clock and ours, in seconds, that means that one was set.

Less is taken for time. It is no more than the shortest heartbeat_timeout.
"""

# A suspended leader loses its session, and with it the lock.
_LEASE = "SET idle_session_timeout = '15s'"

_MICROSECOND = timedelta(microseconds=1)

TOLERANCE = CLOCK_TOLERANCE // _MICROSECOND
"""CLOCK_TOLERANCE in microseconds."""

# A time far behind the stored one is right: the stored one is from when the clock was wrong.
_WRITE_HEARTBEATS = f"""
    INSERT INTO jobstatus.heard (tenant, id, heard_at) SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[])
    ON CONFLICT (tenant, id) DO UPDATE SET heard_at = CASE
        WHEN heard.heard_at > excluded.heard_at + {TOLERANCE} THEN excluded.heard_at
        ELSE greatest(heard.heard_at, excluded.heard_at)
    END
"""

_READ_HEARTBEATS = """
    SELECT h.tenant, h.id, h.heard_at FROM unnest($1::text[], $2::text[]) AS w (tenant, id)
    JOIN jobstatus.heard AS h ON h.tenant = w.tenant AND h.id = w.id
"""

_SILENT = f"""
    SELECT tenant, id, last_heartbeat_at, heartbeat_at, $3::bigint - heard_at FROM (
        SELECT j.tenant, j.id, j.stalled, j.heartbeat_timeout, j.last_heartbeat_at, h.heard_at AS heartbeat_at,
        greatest(
            CASE WHEN j.last_heartbeat_at <= $3::bigint + {TOLERANCE} THEN j.last_heartbeat_at END,
            CASE WHEN h.heard_at <= $3::bigint + {TOLERANCE} THEN h.heard_at END,
            $1::bigint
        ) AS heard_at
        FROM jobstatus.jobs AS j LEFT JOIN jobstatus.heard AS h ON h.tenant = j.tenant AND h.id = j.id
        WHERE j.state = 2 AND j.heartbeat_timeout IS NOT NULL AND (j.stalled = 0 OR $2::bigint IS NOT NULL)
    ) AS silent
    WHERE heard_at + heartbeat_timeout + CASE WHEN stalled = 1 THEN $2::bigint ELSE 0 END <= $3::bigint
    ORDER BY heard_at + heartbeat_timeout LIMIT $4
"""

_EXPIRED = "SELECT tenant, id FROM jobstatus.jobs WHERE expires_at <= $1::bigint ORDER BY expires_at LIMIT $2"

# The latest to expire: after a time in which the clock was wrong, the jobs that ended in it are among these.
_ENDED_IN_FUTURE = """
    SELECT tenant, id FROM (
        SELECT tenant, id, finished_at FROM jobstatus.jobs WHERE expires_at > $1::bigint
        ORDER BY expires_at DESC LIMIT $2
    ) AS latest WHERE finished_at > $1::bigint
"""

# Of what was recorded while the clock was wrong. The newest change keeps its time, by which positions know it.
_TAKE_BACK = (
    """
        UPDATE jobstatus.changes SET changed_at = $1::bigint WHERE (xid, number) IN (
            SELECT xid, number FROM jobstatus.changes
            WHERE changed_at > $2::bigint AND xid < (SELECT max(xid) FROM jobstatus.changes) LIMIT $3
        )
    """,
    """
        UPDATE jobstatus.tombstones SET removed_at = $1::bigint WHERE (tenant, id) IN (
            SELECT tenant, id FROM jobstatus.tombstones WHERE removed_at > $2::bigint LIMIT $3
        )
    """,
    """
        UPDATE jobstatus.requests SET remembered_at = $1::bigint WHERE (request, job_key) IN (
            SELECT request, job_key FROM jobstatus.requests WHERE remembered_at > $2::bigint LIMIT $3
        )
    """,
)

_OLD_CHANGES = """
    SELECT c.changed_at, c.xid::text, c.number, c.removed, EXISTS (
        SELECT 1 FROM jobstatus.jobs AS j WHERE j.tenant = c.tenant AND j.id = c.id AND j.revision = c.revision
    ) FROM jobstatus.changes AS c
    WHERE c.changed_at <= $1::bigint AND (c.changed_at, c.xid, c.number) > ($2::bigint, $3::text::xid8, $4::integer)
    ORDER BY c.changed_at, c.xid, c.number LIMIT $5
"""

# The newest change as of 24 hours ago: if nothing changed for long, positions of the last hours name it.
_LAST_OLD_CHANGE = """
    SELECT max(xid)::text FROM (
        SELECT xid FROM jobstatus.changes WHERE changed_at <= $1::bigint ORDER BY changed_at DESC, xid DESC LIMIT 100
    ) AS latest
"""

_DROP_CHANGES = """
    DELETE FROM jobstatus.changes AS c USING unnest($1::text[], $2::integer[]) AS n (xid, number)
    WHERE c.xid = n.xid::xid8 AND c.number = n.number
"""

_FORGET = """
    UPDATE jobstatus.store SET forgotten_xid = greatest(
        forgotten_xid, (SELECT max(xid::xid8) FROM unnest($1::text[]) AS n (xid))
    )
"""

_DROP_TOMBSTONES = """
    DELETE FROM jobstatus.tombstones WHERE (tenant, id) IN (
        SELECT tenant, id FROM jobstatus.tombstones WHERE removed_at <= $1::bigint ORDER BY removed_at LIMIT $2
    )
"""

_DROP_REQUESTS = """
    DELETE FROM jobstatus.requests WHERE (request, job_key) IN (
        SELECT request, job_key FROM jobstatus.requests
        WHERE remembered_at <= $1::bigint ORDER BY remembered_at LIMIT $2
    )
"""

_DROP_HEARTBEATS = """
    DELETE FROM jobstatus.heard AS h WHERE NOT EXISTS (
        SELECT 1 FROM jobstatus.jobs AS j WHERE j.tenant = h.tenant AND j.id = h.id AND j.state = 2
    )
"""

_COUNTS = "SELECT state, sum(jobs)::bigint FROM jobstatus.counts GROUP BY state"

_SUM_COUNTS = """
    WITH taken AS (DELETE FROM jobstatus.counts RETURNING state, jobs)
    INSERT INTO jobstatus.counts (state, jobs) SELECT state, sum(jobs) FROM taken GROUP BY state
"""

# Rows that are inserted meanwhile stay; of two processes that do this at once, one gets each row.
_SUM_CHILDREN = """
    WITH parents AS (
        SELECT DISTINCT tenant, parent_id FROM (
            SELECT tenant, parent_id FROM jobstatus.children WHERE is_new ORDER BY tenant, parent_id LIMIT $1
        ) AS new
    ), taken AS (
        DELETE FROM jobstatus.children AS c USING parents AS p
        WHERE c.tenant = p.tenant AND c.parent_id = p.parent_id RETURNING c.tenant, c.parent_id, c.state, c.total
    )
    INSERT INTO jobstatus.children (tenant, parent_id, state, total, is_new)
    SELECT tenant, parent_id, state, sum(total), false FROM taken
    GROUP BY tenant, parent_id, state HAVING sum(total) <> 0
"""

_OLDEST = (0, "0", 0)


class _Found(NamedTuple):
    """A job whose worker was found silent."""

    signs: Signs
    duration: timedelta
    again_at: float
    """When it is returned again, unless its Stall was committed before."""


class _Time(NamedTuple):
    now: int
    """By the database's clock, in microseconds since 1970."""
    was_set: bool
    """Since the time before."""


class Maintenance:
    """Finds what is due and trims, while this process is the leader. For one event loop.

    `clock` is the time (None: the database's); `seconds` is a monotonic clock, which measures how long a worker has
    been silent.
    """

    def __init__(
        self, database: Database, *, clock: Clock | None, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._clock = clock
        self._seconds = seconds
        self._retention_clock = RetentionClock(seconds)
        self._heartbeats: dict[Key, int] = {}
        self._found: dict[Key, _Found] = {}
        self._session: asyncpg.Connection[Any] | None = None
        self._is_leader = False
        self._session_lock = asyncio.Lock()
        self._restarted_at: float | None = None
        self._clock_offset: tuple[float, float] | None = None
        """The least and the most by which the database's clock was ahead of ours, in seconds."""
        self._trimmed_to: tuple[Any, ...] = _OLDEST
        self.counts: Counter[int] = Counter()
        """The number of jobs by state at the last read, plus this process's commits since."""
        self._counted_at = float("-inf")

    async def start(self) -> None:
        """Become the leader if there is none, and read the number of jobs."""
        await self._try_to_lead()
        await self._exchange()
        async with self._database.connection() as connection:
            await self._check_clock(connection)

    def record_heartbeats(self, keys: Sequence[Key], at: int) -> None:
        """Note updates that changed nothing, at a time in microseconds since 1970; the next `overdue` writes them."""
        self._heartbeats.update(dict.fromkeys(keys, at))

    async def heartbeats(self, connection: Connection, keys: Sequence[Key]) -> dict[Key, int]:
        """Return when the jobs had their last heartbeats, in microseconds since 1970; without those that had none."""
        if not keys:
            return {}
        rows = await connection.fetch(_READ_HEARTBEATS, *columns_of(keys))
        written = {(tenant, job_id): heard_at for tenant, job_id, heard_at in rows}
        heartbeats = {key: self.heartbeat_at(key, written.get(key)) for key in keys}
        return {key: at for key, at in heartbeats.items() if at}

    def heartbeat_at(self, key: Key, written: int | None) -> int:
        """Return when the job had its last heartbeat: `written` in the table (None: none), or here and not written yet.

        In microseconds since 1970; 0: it had none.
        """
        return max(self._heartbeats.get(key, 0), written or 0)

    def silence(self, key: Key, signs: Signs) -> timedelta:
        """Return how long a worker had been silent when `overdue` returned its job; 0 if it has reported since."""
        found = self._found.get(key)
        return found.duration if found is not None and found.signs == signs else timedelta(0)

    def stalls_committed(self, keys: Sequence[Key]) -> None:
        """Let `overdue` return these jobs again: their last Stall was committed."""
        for key in keys:
            self._found.pop(key, None)

    def restart_stall_clocks(self) -> None:
        """See JobStore."""
        self._restarted_at = self._seconds()
        self._found.clear()

    def stalled_jobs(self) -> int:
        """See JobStore."""
        return self.counts[STALLED]

    def jobs_by_state(self) -> Mapping[JobState, int]:
        """See JobStore."""
        return {state: self.counts[state] for state in JobState}

    async def overdue(self, *, limit: int, fail_after: timedelta | None) -> Sequence[Command]:
        """See JobStore. Returns nothing while writes fail, as the workers cannot report either."""
        if not self._database.writable:
            self.restart_stall_clocks()
            return ()
        try:
            return await self._find_overdue(limit=limit, fail_after=fail_after)
        except RetryableError:  # nor could they now
            self.restart_stall_clocks()
            raise

    async def _find_overdue(self, *, limit: int, fail_after: timedelta | None) -> Sequence[Command]:
        await self._exchange()
        if not await self._try_to_lead():
            return ()
        async with self._database.connection(seconds=TRIM_SECONDS) as connection:
            await connection.execute(_SUM_CHILDREN, SUMMED_ROWS)
        async with self._database.connection() as connection:
            now, _ = await self._check_clock(connection)
            fail = None if fail_after is None else fail_after // _MICROSECOND
            silent_since = now - round((self._seconds() - (self._restarted_at or 0.0)) * 1_000_000)
            silent = await connection.fetch(_SILENT, silent_since, fail, now, limit + len(self._found))
            if silent and (await self._check_clock(connection)).was_set:
                silent = []  # heartbeats may have later times than `now`
            commands: list[Command] = [
                Stall(id=job_id, tenant=tenant, fail_after=fail_after)
                for tenant, job_id in self._find_silent(silent, limit=limit)
            ]
            if len(commands) < limit:
                expired = await connection.fetch(_EXPIRED, self._old_from(now), limit - len(commands))
                commands.extend(Expire(id=job_id, tenant=tenant) for tenant, job_id in expired)
            if len(commands) < limit:
                ended = await connection.fetch(_ENDED_IN_FUTURE, now + TOLERANCE, limit - len(commands))
                commands.extend(Expire(id=job_id, tenant=tenant) for tenant, job_id in ended)
        return commands

    async def _check_clock(self, connection: Connection) -> _Time:
        """Return the time. If the clock was set, restart the stall clocks: earlier times mean nothing then."""
        began_at = self._seconds()
        now = await self._now(connection)
        before, self._clock_offset = self._clock_offset, (now / 1e6 - self._seconds(), now / 1e6 - began_at)
        low, high = self._clock_offset
        set_by = 0.0 if before is None else max(low - before[1], 0.0) + min(high - before[0], 0.0)
        if abs(set_by) < CLOCK_STEP_SECONDS:
            return _Time(now, False)
        logger.warning("the database's clock was set by %+.1f s; the stall clocks of all jobs start anew", set_by)
        self.restart_stall_clocks()
        return _Time(now, True)

    async def trim(self, *, limit: int) -> bool:
        """See JobStore."""
        if not await self._try_to_lead():
            return False
        async with self._database.connection(seconds=TRIM_SECONDS) as connection:
            now = await self._now(connection)
            old_from = self._old_from(now)
            old_at = old_from - FEED_RETENTION // _MICROSECOND
            rows = await connection.fetch(_OLD_CHANGES, old_at, *self._trimmed_to, limit)
            async with connection.transaction():
                taken_back = [
                    await connection.execute(statement, now, now + TOLERANCE, limit) for statement in _TAKE_BACK
                ]
                last_old = await connection.fetchval(_LAST_OLD_CHANGE, old_at)
                old = [
                    (xid, number)
                    for _, xid, number, is_removal, is_newest in rows
                    if not is_newest and (is_removal or xid != last_old)
                ]
                removals = [xid for _, xid, _, is_removal, _ in rows if is_removal]
                if removals:
                    await connection.execute(_FORGET, removals)
                if old:
                    await connection.execute(_DROP_CHANGES, *columns_of(old))
                dropped = [
                    await connection.execute(statement, old_from - retention // _MICROSECOND, limit)
                    for statement, retention in (
                        (_DROP_TOMBSTONES, TOMBSTONE_RETENTION),
                        (_DROP_REQUESTS, REQUEST_RETENTION),
                    )
                ]
            has_more = len(rows) == limit
            self._trimmed_to = tuple(rows[-1])[:3] if has_more else _OLDEST
            if not has_more:
                await connection.execute(_DROP_HEARTBEATS)
                await connection.execute(_SUM_COUNTS)
        return has_more or f"DELETE {limit}" in dropped or f"UPDATE {limit}" in taken_back

    async def close(self) -> None:
        """Write the last heartbeats, and end the leader's session, so that another process can lead at once."""
        if self._heartbeats and self._database.writable:
            with contextlib.suppress(RetryableError):
                await self._write_heartbeats()
        session, self._session, self._is_leader = self._session, None, False
        if session is not None:
            with contextlib.suppress(asyncpg.PostgresError, *TRANSIENT_ERRORS):
                await session.close()

    def _old_from(self, now: int) -> int:
        """Return the time from which to count back to what is old, in microseconds since 1970."""
        return from_instant(self._retention_clock.at(to_instant(now)))

    async def _now(self, connection: Connection) -> int:
        if self._clock is not None:
            return from_instant(self._clock())
        return int(await connection.fetchval(f"SELECT {NOW}"))

    def _find_silent(self, rows: Sequence[Any], *, limit: int) -> list[Key]:
        """Return at most `limit` of the silent jobs, without those found before whose Stall is not committed yet."""
        now = self._seconds()
        self._found = {key: found for key, found in self._found.items() if found.again_at > now}
        fresh = {
            (tenant, job_id): _Found((changed_at, heartbeat_at), silent_for * _MICROSECOND, now + AGAIN_SECONDS)
            for tenant, job_id, changed_at, heartbeat_at, silent_for in rows
            if (tenant, job_id) not in self._found
        }
        found = dict(list(fresh.items())[:limit])
        self._found.update(found)
        return list(found)

    async def _exchange(self) -> None:
        """Write this process's heartbeats, and every COUNT_SECONDS read the number of jobs by state."""
        if self._heartbeats:
            await self._write_heartbeats()
        if self._seconds() - self._counted_at >= COUNT_SECONDS:
            self._counted_at = self._seconds()
            async with self._database.connection() as connection:
                counts = await connection.fetch(_COUNTS)
                self.counts = Counter(dict(counts))

    async def _write_heartbeats(self) -> None:
        heartbeats, self._heartbeats = self._heartbeats, {}
        try:
            async with self._database.connection() as connection:
                rows = [(*key, at) for key, at in sorted(heartbeats.items())]
                await connection.execute(_WRITE_HEARTBEATS, *columns_of(rows))
        except RetryableError:
            self._heartbeats = heartbeats | self._heartbeats
            raise

    async def _try_to_lead(self) -> bool:
        """Become the leader if there is none, and return whether this process is it.

        The lock is free when the leader's session has ended: with its process, its connection, or by _LEASE. A new
        leader starts the stall clocks anew, because heartbeats that its predecessor received may never be written.
        """
        async with self._session_lock:
            try:
                if self._session is None:
                    self._session = await self._database.connect(command_timeout=CONNECT_SECONDS)
                    await self._session.execute(_LEASE)
                if self._is_leader:
                    await self._session.execute("SELECT 1")  # the session, and with it the lock, still exists
                elif await self._session.fetchval("SELECT pg_try_advisory_lock($1)", MAINTENANCE_LOCK):
                    self._is_leader = True
                    self._trimmed_to = _OLDEST
                    self.restart_stall_clocks()
            except Exception as error:  # the driver makes any error of a session that is lost
                logger.debug("the maintenance session was lost: %s", describe(error))
                if self._session is not None:
                    self._session.terminate()
                self._session, self._is_leader = None, False
            return self._is_leader
