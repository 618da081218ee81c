"""The JobStore in a PostgreSQL database: reads here; commits, the feed and maintenance in a module each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from jobstatus_grpc.errors import RetryableError, StoreUnavailableError
from jobstatus_grpc.job import (
    NO_CHILDREN,
    Children,
    Command,
    Job,
    JobFilter,
    JobState,
    Transition,
    has_heartbeats,
    require_job,
    visible,
    with_children,
    with_heartbeat,
)
from jobstatus_grpc.stores.interface import (
    DEFAULT_RETENTION,
    ChangeBatch,
    Clock,
    CommitResult,
    Key,
    Page,
    Position,
    StoreType,
    utc_now,
)
from jobstatus_grpc.stores.postgres.commits import Commits
from jobstatus_grpc.stores.postgres.connect import read_address
from jobstatus_grpc.stores.postgres.database import Connection, Database
from jobstatus_grpc.stores.postgres.feed import PostgresFeed
from jobstatus_grpc.stores.postgres.maintenance import Maintenance
from jobstatus_grpc.stores.postgres.notifier import Notifier
from jobstatus_grpc.stores.postgres.pages import read_page
from jobstatus_grpc.stores.postgres.schema import prepare
from jobstatus_grpc.stores.postgres.statements import JOB, JOBS, NOW, READ_CHILDREN, columns_of
from jobstatus_grpc.stores.sql.rows import (
    TRANSITION_COLUMNS,
    JobCache,
    read_tombstone,
    read_transition,
    to_instant,
)

COMMITS_AT_ONCE = 3
"""Commits that may run at once, each on a session of the pool; see docs/decisions/0009 for when a second begins."""

_GET = f"""
    SELECT {NOW}, t.revision, t.removed_at, h.heard_at, (
        SELECT array_agg(ARRAY[c.state, c.total]) FROM jobstatus.children AS c
        WHERE c.tenant = w.tenant AND c.parent_id = w.id
    ), {JOB}
    FROM (SELECT $1::text AS tenant, $2::text AS id) AS w
    LEFT JOIN jobstatus.jobs AS j ON j.tenant = w.tenant AND j.id = w.id
    LEFT JOIN jobstatus.tombstones AS t ON t.tenant = w.tenant AND t.id = w.id
    LEFT JOIN jobstatus.heard AS h ON h.tenant = w.tenant AND h.id = w.id
"""

_COUNT = "SELECT count(*) FROM (SELECT 1 FROM jobstatus.jobs WHERE tenant = $1 LIMIT $2) AS found"

_TRANSITIONS = f"""
    SELECT {", ".join(TRANSITION_COLUMNS)} FROM jobstatus.transitions
    WHERE tenant = $1 AND id = $2 AND revision > $3 ORDER BY revision LIMIT $4
"""


async def open_store(url: str, *, clock: Clock = utc_now, retention: timedelta = DEFAULT_RETENTION) -> PostgresStore:
    """Return the store in the database at `url`. Times come from the database's clock; `clock` is ignored.

    Raises:
        StoreUnreachableError: the database cannot be reached.
        CannotStartError: it cannot be used.
    """
    return await PostgresStore.open(url, retention=retention)


async def migrate(url: str) -> int:
    """Bring the schema in the database at `url` up to date, as `open_store` does, and return its version.

    Raises:
        CannotStartError: as `open_store`.
    """
    database = await Database.open(url)
    try:
        return await prepare(database)
    finally:
        await database.close()


STORE_TYPE = StoreType(
    open=open_store, name=lambda url: f"postgresql on {read_address(url).name}", migrate=migrate, is_shared=True
)


class PostgresStore:
    """A JobStore that other processes write too: every read and every commit asks the database."""

    commits_at_once = COMMITS_AT_ONCE

    def __init__(
        self, database: Database, *, clock: Clock | None, retention: timedelta, seconds: Callable[[], float]
    ) -> None:
        self._database = database
        self._clock = clock
        self._cache = JobCache()
        self._notifier = Notifier(database)
        self._feed = PostgresFeed(database, notified=self._notifier.notified, cache=self._cache)
        self._maintenance = Maintenance(database, clock=clock, seconds=seconds)
        self._commits = Commits(
            database,
            clock=clock,
            retention=retention,
            cache=self._cache,
            feed=self._feed,
            notifier=self._notifier,
            maintenance=self._maintenance,
        )
        database.try_write = self._commits.try_write
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
            url: in libpq's form: `postgresql://user@host1,host2/name?target_session_attrs=read-write&sslmode=…`.
            clock: the time; None: the database's.
            retention: how long a job is kept once it is done.
            seconds: a monotonic clock, which measures how long workers have been silent.
        """
        database = await Database.open(url)
        try:
            await prepare(database)
            store = cls(database, clock=clock, retention=retention, seconds=seconds)
            try:
                await store._maintenance.start()
            except RetryableError as error:
                raise database.start_error(error.__cause__ or error) from None
        except BaseException:
            await database.close()
            raise
        store._notifier.start()
        return store

    async def commit(self, commands: Sequence[Command]) -> CommitResult:
        """See JobStore."""
        self._check_open()
        if not commands:
            return CommitResult(())
        return await self._commits.commit(commands)

    async def get(self, tenant: str, job_id: str, *, only: JobFilter | None = None) -> Job:
        """See JobStore."""
        async with self._database.connection() as connection:
            now, revision, removed_at, heard_at, totals, *columns = await connection.fetchrow(_GET, tenant, job_id)
        if columns[0] is not None:
            heartbeat_at = self._maintenance.heartbeat_at((tenant, job_id), heard_at)
            job = require_job(visible(self._cache.read(columns).job, only), job_id)
            job = with_children(job, _sums(totals or ()))
            return with_heartbeat(job, to_instant(heartbeat_at) if heartbeat_at else None)
        if removed_at is None:
            return require_job(None, job_id)
        tombstone = read_tombstone((tenant, job_id), revision, removed_at, self._time(now))
        return require_job(visible(tombstone, only), job_id)

    async def jobs(self, keys: Collection[Key]) -> Mapping[Key, Job]:
        """See JobStore."""
        if not keys:
            return {}
        async with self._database.connection() as connection:
            rows = await connection.fetch(JOBS, *columns_of(list(keys)))
            jobs = await self._shown(connection, [self._cache.read(row).job for row in rows])
        return {(job.tenant, job.id): job for job in jobs}

    async def children(self, keys: Collection[Key]) -> Mapping[Key, Children]:
        """See JobStore."""
        if not keys:
            return {}
        async with self._database.connection() as connection:
            return await _read_children(connection, keys)

    async def transitions(
        self, tenant: str, job_id: str, *, after_revision: int = 0, limit: int = 1000
    ) -> list[Transition]:
        """See JobStore."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(_TRANSITIONS, tenant, job_id, after_revision, limit)
        if not rows:
            await self.get(tenant, job_id)  # raises if there is no such job
        return [read_transition(tuple(row)) for row in rows]

    async def page(self, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str = "") -> Page:
        """See JobStore."""
        async with self._database.connection() as connection:
            page = await read_page(connection, tenant, job_filter, limit=limit, cursor=cursor)
            jobs = await self._shown(connection, page.jobs)
        return replace(page, jobs=jobs)

    async def _shown(self, connection: Connection, jobs: Sequence[Job]) -> Sequence[Job]:
        """Return jobs as stored with their last heartbeats and the numbers of their children.

        Read after the jobs, these may be newer.
        """
        keys = [(job.tenant, job.id) for job in jobs if has_heartbeats(job)]
        heartbeats = await self._maintenance.heartbeats(connection, keys)
        at = {key: to_instant(heard_at) for key, heard_at in heartbeats.items()}
        children = await _read_children(connection, [(job.tenant, job.id) for job in jobs])
        return [
            with_children(with_heartbeat(job, at.get(key)), children.get(key, NO_CHILDREN))
            for job in jobs
            for key in [(job.tenant, job.id)]
        ]

    async def count(self, tenant: str, *, at_most: int) -> int:
        """See JobStore."""
        async with self._database.connection() as connection:
            return int(await connection.fetchval(_COUNT, tenant, at_most))

    def stalled_jobs(self) -> int:
        """See JobStore."""
        return self._maintenance.stalled_jobs()

    def damaged_rows(self) -> int:
        """See JobStore. PostgreSQL has checksums of its own."""
        return 0

    def jobs_by_state(self) -> Mapping[JobState, int]:
        """See JobStore. Commits of other processes are counted every few seconds."""
        return self._maintenance.jobs_by_state()

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
        return await self._maintenance.overdue(limit=limit, fail_after=fail_stalled_after)

    def restart_stall_clocks(self) -> None:
        """See JobStore."""
        self._maintenance.restart_stall_clocks()

    async def trim(self, *, limit: int) -> bool:
        """See JobStore."""
        self._check_open()
        return await self._maintenance.trim(limit=limit)

    @property
    def writable(self) -> bool:
        """See JobStore."""
        return self._database.writable

    async def closed(self) -> BaseException | None:
        """See JobStore. Always None: a database that is unavailable may recover, so nothing breaks this store."""
        await self._closed.wait()
        return None

    async def close(self) -> None:
        """See JobStore."""
        if not self._closing.is_set():
            self._closing.set()
            await self._commits.close()
            await self._notifier.close()
            await self._maintenance.close()
            await self._database.close()
            self._closed.set()
        await self._closed.wait()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise StoreUnavailableError("the store is closed")

    def _time(self, now: int) -> datetime:
        return to_instant(now) if self._clock is None else self._clock()


async def _read_children(connection: Connection, keys: Collection[Key]) -> dict[Key, Children]:
    """Return the numbers of the children of these jobs; nothing of a job without any."""
    if not keys:
        return {}
    children: dict[Key, Children] = {}
    for tenant, parent_id, state, total in await connection.fetch(READ_CHILDREN, *columns_of(list(keys))):
        if total:
            children[tenant, parent_id] = {**children.get((tenant, parent_id), {}), state: total}
    return children


def _sums(totals: Iterable[Sequence[int]]) -> Children:
    """Return the sums of pairs of a state and a number."""
    sums: Counter[int] = Counter()
    for state, total in totals:
        sums[state] += total
    return sums
