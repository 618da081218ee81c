"""Keeps jobs in one file: the embedded store. Acknowledged writes survive a crash of the machine."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Concatenate, ParamSpec, TypeAlias, TypeVar

from jobstatus_grpc.job import Command, Found, Job, JobFilter, JobState, Outcome, Transition, require_job
from jobstatus_grpc.stores.batch import Batch, apply_all
from jobstatus_grpc.stores.embedded import Feed, StallClocks
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
from jobstatus_grpc.stores.sql.rows import CACHED_JOBS, JobCache, StoredJob
from jobstatus_grpc.stores.sqlite.database import path_of
from jobstatus_grpc.stores.sqlite.health import Condition
from jobstatus_grpc.stores.sqlite.loader import Lookup
from jobstatus_grpc.stores.sqlite.maintenance import Trimmer, Upkeep
from jobstatus_grpc.stores.sqlite.queries import read_changes, read_found, read_page, read_transitions
from jobstatus_grpc.stores.sqlite.threads import Readers, Worker, resolve
from jobstatus_grpc.stores.sqlite.writer import Writer

P = ParamSpec("P")

T = TypeVar("T")

Written: TypeAlias = tuple[Batch, dict[Key, StoredJob]]

CACHED_CHANGES = 20_000

READERS = 2


async def open_store(url: str, *, clock: Clock = utc_now, retention: timedelta = DEFAULT_RETENTION) -> SqliteStore:
    """Return the store in the file that `url` names, which is created if need be.

    Raises:
        CannotStartError: the file cannot be used, or another process uses it.
    """
    return await SqliteStore.open(path_of(url), clock=clock, retention=retention)


STORE_TYPE = StoreType(open=open_store)


class SqliteStore:
    """A JobStore on one file, for one process.

    Commits run in the thread that owns the writing connection, reads in others. What a commit wrote is published on
    the event loop once it is durable: to the cache that answers most reads, then to the feed.
    """

    commits_at_once = 1

    def __init__(
        self,
        writer: Writer,
        thread: Worker,
        *,
        clock: Clock,
        retention: timedelta,
        seconds: Callable[[], float],
        probe_interval_seconds: float,
    ) -> None:
        """Take over what `open` has opened."""
        self._writer = writer
        self._thread = thread
        self._readers = Readers(writer.file, count=READERS)
        self._clock = clock
        self._retention = retention
        self._feed = Feed(writer.head.incarnation, sequence=writer.head.sequence, max_jobs=CACHED_CHANGES)
        self._feed.forgotten_sequence = writer.head.forgotten_sequence
        self._cache = JobCache(CACHED_JOBS)
        self._counts = Counter(writer.head.counts)
        self._stall_clocks = StallClocks(seconds)
        self._turn = asyncio.Lock()
        probe = partial(thread.submit, writer.probe)
        self._condition = Condition(
            writer.file.path, probe, self._stall_clocks.restart, interval_seconds=probe_interval_seconds
        )
        self._condition.end.add_done_callback(lambda _: self._feed.end())
        self._lookup = Lookup(self._readers, self._cache, self._condition, clock)
        self._upkeep = Upkeep(
            read=self._read,
            thread=thread,
            trimmer=Trimmer(writer.connection),
            condition=self._condition,
            clock=clock,
            stall_clocks=self._stall_clocks,
            feed=self._feed,
        )
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        path: str,
        *,
        clock: Clock = utc_now,
        retention: timedelta = DEFAULT_RETENTION,
        seconds: Callable[[], float] = time.monotonic,
        probe_interval_seconds: float = 1.0,
    ) -> SqliteStore:
        """Return the store in the file at the absolute `path`; see `open_store`.

        Args:
            retention: how long a job is kept once it is done.
            seconds: the clock that silence is measured by; it never goes back.
            probe_interval_seconds: how often a store that refused a write is tried again.
        """
        thread = Worker("jobstatus-writer")
        try:
            writer = await thread.call(Writer.open, path)
        except BaseException:
            await thread.stop()
            raise
        return cls(
            writer,
            thread,
            clock=clock,
            retention=retention,
            seconds=seconds,
            probe_interval_seconds=probe_interval_seconds,
        )

    async def commit(self, commands: Sequence[Command]) -> CommitResult:
        """See JobStore. Where nothing changes, nothing is written."""
        await self._turn.acquire()
        waiter: asyncio.Future[CommitResult] | None = None
        try:
            self._condition.check()
            now = self._clock()
            stored, missing = self._cache.find((command.tenant, command.id) for command in commands)
            if missing:
                work = partial(self._load_and_write, commands, stored, missing, now)
            else:
                batch = self._apply(commands, stored, {}, now)
                if batch.is_empty:
                    self._stall_clocks.note(commands, batch.outcomes)
                    return CommitResult(batch.outcomes)
                work = partial(self._write, batch, stored, now)
            waiter = asyncio.get_running_loop().create_future()
            # The turn ends when the work does, not when this wait does: it may be cancelled.
            self._thread.submit(work, partial(self._finish, commands, waiter))
        finally:
            if waiter is None:
                self._turn.release()
        return await waiter

    async def get(self, tenant: str, job_id: str) -> Job:
        """See JobStore."""
        self._condition.check()
        key = (tenant, job_id)
        stored = self._cache.get(key)
        if stored is not None:
            return stored.job
        return require_job(await self._lookup.find(key), job_id)

    async def transitions(
        self, tenant: str, job_id: str, *, after_revision: int = 0, limit: int = 1000
    ) -> list[Transition]:
        """See JobStore."""
        return await self._read(read_transitions, (tenant, job_id), self._clock(), after_revision, limit)

    async def page(self, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str = "") -> Page:
        """See JobStore."""
        return await self._read(read_page, tenant, job_filter, limit=limit, cursor=cursor)

    def jobs_by_state(self) -> Mapping[JobState, int]:
        """See JobStore. As of the latest commit that was published."""
        return {state: self._counts[state] for state in JobState}

    async def position(self) -> Position:
        """See JobStore."""
        self._condition.check()
        return self._feed.position()

    async def changes(self, after: Position, *, up_to: Position | None = None) -> ChangeBatch:
        """See JobStore. Recent changes come from memory, others from the file."""
        self._condition.check()
        sequence = self._feed.sequence_of(after)
        end = None if up_to is None else max(self._feed.sequence_of(up_to), sequence)
        while True:
            if end is None:
                await self._feed.wait_beyond(sequence)
            batch = self._feed.since(sequence, end)
            if batch is not None:
                return batch
            # What is committed but not published yet is left for the next batch.
            sequence, changes = await self._read(read_changes, sequence, self._feed.sequence if end is None else end)
            if changes or sequence == end:
                return ChangeBatch(self._feed.position(sequence), changes)

    async def overdue(self, *, limit: int, fail_stalled_after: timedelta | None = None) -> Sequence[Command]:
        """See JobStore."""
        return await self._upkeep.overdue(limit=limit, fail_stalled_after=fail_stalled_after)

    def restart_stall_clocks(self) -> None:
        """See JobStore."""
        self._stall_clocks.restart()

    async def trim(self, *, limit: int) -> bool:
        """See JobStore."""
        return await self._upkeep.trim(limit=limit)

    @property
    def writable(self) -> bool:
        """See JobStore."""
        return self._condition.writable

    async def closed(self) -> BaseException | None:
        """See JobStore. A failed fsync or a corrupt file breaks the store."""
        return await asyncio.shield(self._condition.end)

    async def close(self) -> None:
        """See JobStore."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._release())
        await asyncio.shield(self._closing)

    def _load_and_write(
        self, commands: Sequence[Command], stored: dict[Key, StoredJob], missing: list[Key], now: datetime
    ) -> Written:
        """Judge and write commands on jobs that the cache lacks, in the writer's thread."""
        jobs, tombstones = read_found(self._writer.connection, missing, now)
        stored |= jobs
        return self._write(self._apply(commands, stored, tombstones, now), stored, now)

    def _write(self, batch: Batch, stored: dict[Key, StoredJob], now: datetime) -> Written:
        """Write what was judged, in the writer's thread."""
        if not batch.is_empty:
            stored |= self._writer.write(batch, stored, sequence=self._feed.sequence, now=now)
        return batch, stored

    def _apply(
        self, commands: Sequence[Command], stored: dict[Key, StoredJob], others: Mapping[Key, Found], now: datetime
    ) -> Batch:
        found: dict[Key, Found] = {key: entry.job for key, entry in stored.items()}
        found.update(others)
        return apply_all(commands, found, now=now, retention=self._retention, silent_for=self._stall_clocks.silent_for)

    def _finish(
        self,
        commands: Sequence[Command],
        waiter: asyncio.Future[CommitResult],
        written: Written | None,
        error: BaseException | None,
    ) -> None:
        """Publish what was written, and let the next commit begin."""
        outcomes: list[Outcome] = []
        if written is not None:
            batch, stored = written
            outcomes = batch.outcomes
            self._cache.write(stored, batch.removed)
            self._counts.update(batch.counts)
            self._feed.publish(batch.changes)
            self._stall_clocks.note(commands, outcomes)
            if not batch.is_empty:
                self._condition.wrote()
        elif error is not None:
            error = self._condition.judge(error, is_write=True)
        self._turn.release()
        resolve(waiter, CommitResult(outcomes), error)
        if self._writer.wants_checkpoint:
            self._thread.submit(self._writer.checkpoint, self._checkpointed)

    def _checkpointed(self, _: None, error: BaseException | None) -> None:
        if error is not None:
            self._condition.judge(error, is_write=True)

    async def _read(
        self, query: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        self._condition.check()
        try:
            return await self._readers.call(query, *args, **kwargs)
        except sqlite3.Error as error:
            raise self._condition.judge(error, is_write=False) from error

    async def _release(self) -> None:
        self._condition.refuse("the store is closed")
        self._feed.end()
        async with self._turn:  # the running commit, and those that waited to be refused
            pass
        closing: list[Callable[[], Awaitable[None]]]
        closing = [self._readers.close, partial(self._thread.call, self._writer.close)]
        # The last to close copies the write-ahead log into the file and deletes it: never after an error of the disk.
        for close in reversed(closing) if self._condition.is_broken else closing:
            await close()
        await self._thread.stop()
        self._condition.finish()
