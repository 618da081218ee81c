"""Keeps jobs in a PostgreSQL database, which any number of server processes share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.job import (
    Command,
    Create,
    Job,
    JobFilter,
    JobState,
    Stall,
    Transition,
    Update,
    require_job,
)
from jobstatus_grpc.stores.interface import (
    DEFAULT_RETENTION,
    ChangeBatch,
    Clock,
    CommitResult,
    Page,
    Position,
    StoreType,
    utc_now,
)
from jobstatus_grpc.stores.postgres.commits import Commits
from jobstatus_grpc.stores.postgres.database import Database
from jobstatus_grpc.stores.postgres.feed import PostgresFeed
from jobstatus_grpc.stores.postgres.maintenance import Upkeep
from jobstatus_grpc.stores.postgres.notifier import Doorbell
from jobstatus_grpc.stores.postgres.pages import read_page
from jobstatus_grpc.stores.postgres.schema import prepare
from jobstatus_grpc.stores.postgres.statements import JOB, NOW
from jobstatus_grpc.stores.postgres.transaction import Written
from jobstatus_grpc.stores.sql.rows import (
    TRANSITION_COLUMNS,
    JobCache,
    from_instant,
    read_tombstone,
    read_transition,
    to_instant,
)

COMMITS_AT_ONCE = 3

_GET = f"""
    SELECT {NOW}, t.revision, t.removed_at, {JOB}
    FROM (SELECT $1::text AS tenant, $2::text AS id) AS w
    LEFT JOIN jobstatus.jobs AS j ON j.tenant = w.tenant AND j.id = w.id
    LEFT JOIN jobstatus.tombstones AS t ON t.tenant = w.tenant AND t.id = w.id
"""

_TRANSITIONS = f"""
    SELECT {", ".join(TRANSITION_COLUMNS)} FROM jobstatus.transitions
    WHERE tenant = $1 AND id = $2 AND revision > $3 ORDER BY revision LIMIT $4
"""


async def open_store(url: str, *, clock: Clock = utc_now, retention: timedelta = DEFAULT_RETENTION) -> PostgresStore:
    """Return the store in the database that `url` names; its clock is the one that counts, not `clock`.

    Raises:
        CannotStartError: the database cannot be reached or used.
    """
    return await PostgresStore.open(url, retention=retention)


async def migrate(url: str) -> int:
    """Bring the schema in the database up to date, and return its version; as `open_store` does.

    Raises:
        CannotStartError: as `open_store`.
    """
    database = await Database.open(url)
    try:
        return await prepare(database)
    finally:
        await database.close()


STORE_TYPE = StoreType(open=open_store, migrate=migrate, is_shared=True)


class PostgresStore:
    """A JobStore that other processes write too. Nothing is kept here but what is on its way."""

    commits_at_once = COMMITS_AT_ONCE

    def __init__(
        self, database: Database, *, clock: Clock | None, retention: timedelta, seconds: Callable[[], float]
    ) -> None:
        """Take over what `open` has opened."""
        self._database = database
        self._clock = clock
        self._doorbell = Doorbell(database)
        self._known = JobCache()
        self._feed = PostgresFeed(database, self._doorbell.heard, self._known)
        self._upkeep = Upkeep(database, clock=clock, seconds=seconds)
        self._commits = Commits(
            database,
            clock=clock,
            retention=retention,
            heard=self._upkeep.heard_at,
            known=self._known,
            incarnation=lambda: self._feed.incarnation,
            written=self._on_written,
        )
        self._closing = asyncio.Event()
        self._closed = asyncio.Event()

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        clock: Clock | None = None,
        retention: timedelta = DEFAULT_RETENTION,
        seconds: Callable[[], float] = time.monotonic,
    ) -> PostgresStore:
        """Return the store, with its schema up to date; see `open_store`.

        Args:
            url: as libpq knows it: `postgresql://user@host1,host2/name?target_session_attrs=read-write&sslmode=…`.
            clock: tells the time; None: the database's does.
            retention: how long a job is kept once it is done.
            seconds: the clock that silence is measured by; it never goes back.
        """
        database = await Database.open(url)
        try:
            await prepare(database)
            store = cls(database, clock=clock, retention=retention, seconds=seconds)
            await store._upkeep.begin()
        except BaseException:
            await database.close()
            raise
        store._doorbell.start()
        return store

    async def commit(self, commands: Sequence[Command]) -> CommitResult:
        """See JobStore."""
        self._check_open()
        if not commands:
            return CommitResult(())
        return await self._commits.commit(commands)

    async def get(self, tenant: str, job_id: str) -> Job:
        """See JobStore."""
        async with self._database.connection() as connection:
            now, revision, removed_at, *columns = await connection.fetchrow(_GET, tenant, job_id)
        if columns[0] is not None:
            return self._known.read(columns).job
        if removed_at is None:
            return require_job(None, job_id)
        return require_job(read_tombstone((tenant, job_id), revision, removed_at, self._time(now)), job_id)

    async def transitions(
        self, tenant: str, job_id: str, *, after_revision: int = 0, limit: int = 1000
    ) -> list[Transition]:
        """See JobStore."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(_TRANSITIONS, tenant, job_id, after_revision, limit)
        if not rows:
            await self.get(tenant, job_id)
        return [read_transition(tuple(row)) for row in rows]

    async def page(self, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str = "") -> Page:
        """See JobStore."""
        async with self._database.connection() as connection:
            return await read_page(connection, tenant, job_filter, limit=limit, cursor=cursor)

    def jobs_by_state(self) -> Mapping[JobState, int]:
        """See JobStore. Summed up every few seconds."""
        return self._upkeep.jobs_by_state()

    async def position(self) -> Position:
        """See JobStore."""
        self._check_open()
        return await self._feed.position()

    async def changes(self, after: Position, *, up_to: Position | None = None) -> ChangeBatch:
        """See JobStore. One reader at a time may wait."""
        self._check_open()
        if up_to is not None:
            return await self._feed.read(after, up_to)
        waiting = asyncio.ensure_future(self._feed.wait(after))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait((waiting, closing), return_when=asyncio.FIRST_COMPLETED)
            self._check_open()
            return await waiting
        finally:
            waiting.cancel()
            closing.cancel()
            await asyncio.gather(waiting, closing, return_exceptions=True)

    async def overdue(self, *, limit: int, fail_stalled_after: timedelta | None = None) -> Sequence[Command]:
        """See JobStore."""
        self._check_open()
        return await self._upkeep.overdue(limit=limit, fail_after=fail_stalled_after)

    def restart_stall_clocks(self) -> None:
        """See JobStore."""
        self._upkeep.restart()

    async def trim(self, *, limit: int) -> bool:
        """See JobStore."""
        self._check_open()
        return await self._upkeep.trim(limit=limit)

    @property
    def writable(self) -> bool:
        """See JobStore."""
        return self._database.writable

    async def closed(self) -> BaseException | None:
        """See JobStore. A database that is away may come back: nothing breaks this store."""
        await self._closed.wait()
        return None

    async def close(self) -> None:
        """See JobStore."""
        if not self._closing.is_set():
            self._closing.set()
            await self._commits.close()
            await self._doorbell.close()
            await self._upkeep.close()
            await self._database.close()
            self._closed.set()
        await self._closed.wait()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoreUnavailableError("the store is closed")

    def _time(self, now: int) -> datetime:
        return to_instant(now) if self._clock is None else self._clock()

    def _on_written(self, commands: Sequence[Command], written: Written) -> None:
        """Note what a transaction did, once it is durable."""
        batch = written.batch
        for stored in written.stored:
            self._known.put((stored.job.tenant, stored.job.id), stored)
        self._upkeep.counts.update(batch.counts)
        alive = [
            key
            for command, outcome in zip(commands, batch.outcomes, strict=True)
            if isinstance(command, (Update, Create))
            and isinstance(outcome, Job)
            and outcome.heartbeat_timeout is not None
            and outcome.state is JobState.IN_PROGRESS
            and (key := (command.tenant, command.id)) not in batch.jobs
        ]
        if alive:
            self._upkeep.hear(alive, from_instant(written.now))
        self._upkeep.judged([(command.tenant, command.id) for command in commands if isinstance(command, Stall)])
        if batch.changes:
            self._doorbell.ring()
