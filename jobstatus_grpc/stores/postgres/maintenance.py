"""What time asks of the PostgreSQL store, done by one process at a time: whoever holds an advisory lock."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import asyncpg

from jobstatus_grpc.errors import RetryableError
from jobstatus_grpc.job import Command, Expire, JobState, Stall
from jobstatus_grpc.stores.embedded import AGAIN_SECONDS
from jobstatus_grpc.stores.interface import FEED_RETENTION, TOMBSTONE_RETENTION, Clock, Key
from jobstatus_grpc.stores.postgres.connect import AWAY, CONNECT_SECONDS
from jobstatus_grpc.stores.postgres.database import Connection, Database
from jobstatus_grpc.stores.postgres.statements import NOW, columns_of
from jobstatus_grpc.stores.sql.rows import from_instant

UPKEEP_LOCK = 0x4A6F6253_0002
"""The key of the advisory lock of the process that tends the store."""

COUNT_SECONDS = 5.0

TRIM_SECONDS = 30.0

_LEASE = "SET idle_session_timeout = '15s'"  # who is stopped, rather than gone, leads no more

_MICROSECOND = timedelta(microseconds=1)

_WRITE_HEARD = """
    INSERT INTO jobstatus.heard (tenant, id, heard_at) SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[])
    ON CONFLICT (tenant, id) DO UPDATE SET heard_at = greatest(heard.heard_at, excluded.heard_at)
"""

_SILENT = """
    SELECT tenant, id FROM (
        SELECT j.tenant, j.id, j.stalled, j.heartbeat_timeout,
            greatest(j.heard_at, coalesce(h.heard_at, 0), $1::bigint) AS heard_at
        FROM jobstatus.jobs AS j LEFT JOIN jobstatus.heard AS h ON h.tenant = j.tenant AND h.id = j.id
        WHERE j.state = 2 AND j.heartbeat_timeout IS NOT NULL AND (j.stalled = 0 OR $2::bigint IS NOT NULL)
    ) AS silent
    WHERE heard_at + heartbeat_timeout + CASE WHEN stalled = 1 THEN $2::bigint ELSE 0 END <= $3::bigint
    ORDER BY heard_at + heartbeat_timeout LIMIT $4
"""

_EXPIRED = "SELECT tenant, id FROM jobstatus.jobs WHERE expires_at <= $1::bigint ORDER BY expires_at LIMIT $2"

_OLD_CHANGES = """
    SELECT c.changed_at, c.xid::text, c.number, c.removed, EXISTS (
        SELECT 1 FROM jobstatus.jobs AS j WHERE j.tenant = c.tenant AND j.id = c.id AND j.revision = c.revision
    ) FROM jobstatus.changes AS c
    WHERE c.changed_at <= $1::bigint AND (c.changed_at, c.xid, c.number) > ($2::bigint, $3::text::xid8, $4::integer)
    ORDER BY c.changed_at, c.xid, c.number LIMIT $5
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

_DROP_HEARD = """
    DELETE FROM jobstatus.heard AS h WHERE NOT EXISTS (
        SELECT 1 FROM jobstatus.jobs AS j WHERE j.tenant = h.tenant AND j.id = h.id AND j.state = 2
    )
"""

_COUNTS = "SELECT state, sum(jobs)::bigint FROM jobstatus.counts GROUP BY state"

_SUM_COUNTS = """
    WITH taken AS (DELETE FROM jobstatus.counts RETURNING state, jobs)
    INSERT INTO jobstatus.counts (state, jobs) SELECT state, sum(jobs) FROM taken GROUP BY state
"""

_OLDEST = (0, "0", 0)


class Upkeep:
    """Finds what is due, while it leads; notes signs of life for whoever does. For one event loop."""

    def __init__(
        self, database: Database, *, clock: Clock | None, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the database, the clock (None: the database's), and the one that silence is measured by."""
        self._database = database
        self._clock = clock
        self._seconds = seconds
        self._heard: dict[Key, int] = {}
        self._handed_out: dict[Key, float] = {}
        self._session: asyncpg.Connection[Any] | None = None
        self._is_leader = False
        self._asking = asyncio.Lock()
        self._restarted_at: float | None = None
        self._since = 0
        self._after: tuple[Any, ...] = _OLDEST
        self.counts: Counter[JobState] = Counter()
        self._counted_at = float("-inf")

    def hear(self, keys: Sequence[Key], at: int) -> None:
        """Note that workers gave signs of life which changed nothing."""
        self._heard.update(dict.fromkeys(keys, at))

    def judged(self, keys: Sequence[Key]) -> None:
        """Note that what was due has been committed; what follows may be due at any time."""
        for key in keys:
            self._handed_out.pop(key, None)

    def heard_at(self, key: Key) -> int:
        """Return when a worker was last heard, as far as this process alone knows; never before the clocks started."""
        return max(self._heard.get(key, 0), self._since)

    def restart(self) -> None:
        """Count every silence from now on."""
        self._restarted_at = self._seconds()

    async def begin(self) -> None:
        """Lead if nobody does, and count the jobs."""
        await self._leads()
        await self._refresh()

    async def overdue(self, *, limit: int, fail_after: timedelta | None) -> Sequence[Command]:
        """See JobStore."""
        if self._database.returned.is_set():
            self._database.returned.clear()
            self.restart()
        await self._refresh()
        if not await self._leads():
            return ()
        async with self._database.connection() as connection:
            now = await self._now(connection)
            fail = None if fail_after is None else fail_after // _MICROSECOND
            self._since = now - round((self._seconds() - (self._restarted_at or 0.0)) * 1_000_000)
            silent = await connection.fetch(_SILENT, self._since, fail, now, limit + len(self._handed_out))
            commands: list[Command] = [
                Stall(id=job_id, tenant=tenant, fail_after=fail_after)
                for tenant, job_id in self._fresh([(row[0], row[1]) for row in silent], limit=limit)
            ]
            if len(commands) < limit:
                expired = await connection.fetch(_EXPIRED, now, limit - len(commands))
                commands.extend(Expire(id=job_id, tenant=tenant) for tenant, job_id in expired)
        return commands

    async def trim(self, *, limit: int) -> bool:
        """See JobStore."""
        if not await self._leads():
            return False
        async with self._database.connection(seconds=TRIM_SECONDS) as connection:
            now = await self._now(connection)
            old_at = now - FEED_RETENTION // _MICROSECOND
            rows = await connection.fetch(_OLD_CHANGES, old_at, *self._after, limit)
            async with connection.transaction():
                old = [(xid, number) for _, xid, number, _, is_newest in rows if not is_newest]
                removals = [xid for _, xid, _, is_removal, _ in rows if is_removal]
                if removals:
                    await connection.execute(_FORGET, removals)
                if old:
                    await connection.execute(_DROP_CHANGES, *columns_of(old))
                done = await connection.execute(_DROP_TOMBSTONES, now - TOMBSTONE_RETENTION // _MICROSECOND, limit)
            has_more = len(rows) == limit
            self._after = tuple(rows[-1])[:3] if has_more else _OLDEST
            if not has_more:
                await connection.execute(_DROP_HEARD)
                await connection.execute(_SUM_COUNTS)
        return has_more or done == f"DELETE {limit}"

    async def close(self) -> None:
        """Leave the lead to others."""
        session, self._session, self._is_leader = self._session, None, False
        if session is not None:
            with contextlib.suppress(asyncpg.PostgresError, *AWAY):
                await session.close()

    def jobs_by_state(self) -> Mapping[JobState, int]:
        """See JobStore."""
        return {state: self.counts[state] for state in JobState}

    async def _now(self, connection: Connection) -> int:
        if self._clock is not None:
            return from_instant(self._clock())
        return int(await connection.fetchval(f"SELECT {NOW}"))

    def _fresh(self, keys: Sequence[Key], *, limit: int) -> list[Key]:
        """Return at most `limit`, without what was handed out a moment ago, and is being judged."""
        now = self._seconds()
        self._handed_out = {key: until for key, until in self._handed_out.items() if until > now}
        fresh = [key for key in keys if key not in self._handed_out][:limit]
        self._handed_out.update(dict.fromkeys(fresh, now + AGAIN_SECONDS))
        return fresh

    async def _refresh(self) -> None:
        """Write down the signs of life, and read how many jobs there are, once in a while."""
        heard, self._heard = self._heard, {}
        try:
            async with self._database.connection() as connection:
                if heard:
                    rows = [(*key, at) for key, at in sorted(heard.items())]
                    await connection.execute(_WRITE_HEARD, *columns_of(rows))
                if self._seconds() - self._counted_at >= COUNT_SECONDS:
                    self._counted_at = self._seconds()
                    counts = await connection.fetch(_COUNTS)
                    self.counts = Counter({JobState(state): jobs for state, jobs in counts})
        except RetryableError:
            self._heard = heard | self._heard
            raise

    async def _leads(self) -> bool:
        """Tell whether this process tends the store; if nobody does, it begins to, and with it all clocks of silence.

        The lock is its session's: it is free again when this process, or its way to the database, is gone.
        """
        async with self._asking:
            try:
                if self._session is None:
                    self._session = await self._database.connect(command_timeout=CONNECT_SECONDS)
                    await self._session.execute(_LEASE)
                if self._is_leader:
                    await self._session.execute("SELECT 1")
                elif await self._session.fetchval("SELECT pg_try_advisory_lock($1)", UPKEEP_LOCK):
                    self._is_leader = True
                    self._handed_out.clear()
                    self._after = _OLDEST
                    self.restart()
            except (asyncpg.PostgresError, *AWAY):
                if self._session is not None:
                    self._session.terminate()
                self._session, self._is_leader = None, False
            return self._is_leader
