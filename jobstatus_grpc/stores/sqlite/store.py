"""Keeps jobs in one file: the embedded store. Acknowledged writes survive a crash of the machine."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Concatenate, ParamSpec, TypeAlias, TypeVar

from jobstatus_grpc.errors import CannotStartError, DataLossError, StoreChangedError
from jobstatus_grpc.job import (
    Children,
    Command,
    Delete,
    Expire,
    Found,
    Job,
    JobFilter,
    JobState,
    Outcome,
    Stall,
    Tombstone,
    Transition,
    require_job,
    visible,
)
from jobstatus_grpc.stores.batch import Batch, apply_all
from jobstatus_grpc.stores.embedded import Feed, StallClocks
from jobstatus_grpc.stores.interface import (
    DEFAULT_RETENTION,
    STALLED,
    ChangeBatch,
    Clock,
    CommitResult,
    Key,
    Page,
    Position,
    RequestKey,
    StoreType,
    utc_now,
)
from jobstatus_grpc.stores.retention_clock import RetentionClock
from jobstatus_grpc.stores.sql.rows import CACHED_JOBS, JobCache, StoredJob
from jobstatus_grpc.stores.sqlite.backup import back_up, restore
from jobstatus_grpc.stores.sqlite.database import describe, path_of
from jobstatus_grpc.stores.sqlite.maintenance import Trimmer, read_expired, read_silent
from jobstatus_grpc.stores.sqlite.queries import (
    count_jobs,
    read_changes,
    read_children,
    read_found,
    read_newest_sequence,
    read_page,
    read_requests,
    read_transitions,
)
from jobstatus_grpc.stores.sqlite.readers import JobLoader, ReaderPool
from jobstatus_grpc.stores.sqlite.writer import (
    Health,
    RequestKnownError,
    WorkerThread,
    Writer,
    Written,
    resolve,
)

P = ParamSpec("P")

T = TypeVar("T")

Committed: TypeAlias = tuple[Batch, Written, dict[Key, DataLossError]]
"""A batch, its jobs as they are stored now, also those that it did not change, and the jobs whose commands were refused
because they are damaged."""

CACHED_CHANGES = 20_000
"""The number of changes that the feed keeps in memory; older ones are read from the file."""

NO_ID = ""
"""An id that no job has. It is read from the file in place of a cached job that the caller does not see, because an
unknown one is read there: the time does not tell the two apart."""

READERS = 2
"""The number of reading connections: one can run a long list while the other reads single jobs."""


class SqliteStore:
    """A JobStore on one file, for one process.

    Commits run in the thread that owns the writing connection, reads in others. Once a commit is durable, the event
    loop publishes it: first to the cache, from which most reads are answered, then to the feed.
    """

    commits_at_once = 1

    def __init__(
        self,
        writer: Writer,
        readers: Sequence[sqlite3.Connection],
        thread: WorkerThread,
        *,
        clock: Clock,
        retention: timedelta,
        seconds: Callable[[], float],
        probe_interval_seconds: float,
    ) -> None:
        """Use `open` instead: `writer` has to be made in its `thread`."""
        self._writer = writer
        self._thread = thread
        self._readers = ReaderPool(readers)
        self._clock = clock
        self._retention = retention
        self._feed = Feed(writer.epochs, sequence=writer.head.sequence, max_jobs=CACHED_CHANGES)
        self._feed.forgotten_sequence = writer.head.forgotten_sequence
        self._cache = JobCache(CACHED_JOBS)
        self._counts = Counter(writer.head.counts)
        self._stall_clocks = StallClocks(seconds)
        self._retention_clock = RetentionClock(seconds)
        self._has_all_clocks = False
        self._turn = asyncio.Lock()
        probe = partial(thread.submit, writer.probe)
        find_displacement = partial(thread.submit, writer.file.find_displacement)
        find_damage = partial(thread.submit, writer.find_damage)
        self._damaged: set[Key] = set()
        """The jobs that were found damaged by a command."""
        self._health = Health(
            writer.file.path,
            probe,
            find_displacement,
            find_damage,
            self._stall_clocks.restart,
            interval_seconds=probe_interval_seconds,
        )
        self._health.end.add_done_callback(lambda _: self._feed.end())
        self._loader = JobLoader(self._readers, self._cache, self._health, clock)
        self._trimmer = Trimmer(writer)
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
            path: the file, which is created if it does not exist.
            clock: returns the time.
            retention: how long a job is kept after its end.
            seconds: the monotonic clock that measures silence.
            probe_interval_seconds: the interval between probes after a failed write.
        """
        thread = WorkerThread("jobstatus-writer")
        try:
            writer, readers = await thread.call(_open_connections, path)
        except BaseException:
            await thread.stop()
            raise
        return cls(
            writer,
            readers,
            thread,
            clock=clock,
            retention=retention,
            seconds=seconds,
            probe_interval_seconds=probe_interval_seconds,
        )

    async def commit(self, commands: Sequence[Command]) -> CommitResult:
        """See JobStore. If the commands change nothing, nothing is written.

        After a failed write only jobs are removed, until a probe succeeds: on a full disk that makes room, and anything
        else would take the last of it.
        """
        if not self._health.is_failing:
            return await self._commit(commands)
        self._health.check_writes()
        removals = [command for command in commands if isinstance(command, (Delete, Expire))]
        if not removals:
            raise self._health.last_failure()
        refusals = [self._health.last_failure() for _ in commands]
        removed = iter((await self._commit(removals)).outcomes)
        return CommitResult(
            [
                next(removed) if isinstance(command, (Delete, Expire)) else refusal
                for command, refusal in zip(commands, refusals, strict=True)
            ]
        )

    async def _commit(self, commands: Sequence[Command]) -> CommitResult:
        await self._turn.acquire()
        waiter: asyncio.Future[CommitResult] | None = None
        try:
            self._health.check_writes()
            now = self._clock()
            stored, missing = self._cache.find((command.tenant, command.id) for command in commands)
            missing += _stand_ins(commands, stored)
            if missing:
                work = partial(self._load_and_write, commands, stored, missing, now)
            else:
                batch = self._apply(commands, stored, {}, {}, now)
                if batch.is_empty and not batch.is_unsure:
                    self._stall_clocks.note(commands, batch.outcomes, now)
                    return CommitResult(batch.outcomes)
                work = partial(self._write, commands, batch, stored, {}, {}, now)
            waiter = asyncio.get_running_loop().create_future()
            # _finish releases the turn: this call may be cancelled while the thread works.
            self._thread.submit(work, partial(self._finish, commands, now, waiter))
        finally:
            if waiter is None:
                self._turn.release()
        return await waiter

    def _load_and_write(
        self, commands: Sequence[Command], stored: dict[Key, StoredJob], missing: list[Key], now: datetime
    ) -> Committed:
        """Load the jobs that the cache lacks, apply the commands and write the result, in the writer's thread."""
        jobs, tombstones = read_found(self._writer.connection, missing, now)
        for job in jobs.values():
            if isinstance(job, DataLossError) and isinstance(job.__cause__, sqlite3.Error):
                raise job.__cause__  # before anything is written: the file is malformed
        damaged = {key: job for key, job in jobs.items() if isinstance(job, DataLossError)}
        stored |= {key: job for key, job in jobs.items() if isinstance(job, StoredJob)}
        batch = self._apply(commands, stored, tombstones, damaged, now)
        return self._write(commands, batch, stored, tombstones, damaged, now)

    def _write(
        self,
        commands: Sequence[Command],
        batch: Batch,
        stored: dict[Key, StoredJob],
        tombstones: Mapping[Key, Tombstone],
        damaged: dict[Key, DataLossError],
        now: datetime,
    ) -> Committed:
        """Write the batch in the writer's thread; if there are repeats in it, apply the commands again before."""
        if not batch.is_unsure:
            with suppress(RequestKnownError):
                return batch, self._written(batch, stored, now), damaged
        known = read_requests(self._writer.connection, commands, stored)
        batch = self._apply(commands, stored, tombstones, damaged, now, known)
        return batch, self._written(batch, stored, now), damaged

    def _written(self, batch: Batch, stored: dict[Key, StoredJob], now: datetime) -> Written:
        if batch.is_empty:
            return Written(stored, {})
        jobs, children = self._writer.write(batch, stored, sequence=self._feed.sequence, now=now)
        return Written(stored | jobs, children)

    def _apply(
        self,
        commands: Sequence[Command],
        stored: dict[Key, StoredJob],
        tombstones: Mapping[Key, Tombstone],
        damaged: Mapping[Key, DataLossError],
        now: datetime,
        known: Mapping[RequestKey, str] | None = None,
    ) -> Batch:
        found: dict[Key, Found] = {key: entry.job for key, entry in stored.items()}
        found.update(tombstones)
        return apply_all(
            commands,
            found,
            now=now,
            retention=self._retention,
            silence_of=self._stall_clocks.silence_of,
            known=known,
            damaged=damaged,
        )

    def _finish(
        self,
        commands: Sequence[Command],
        now: datetime,
        waiter: asyncio.Future[CommitResult],
        committed: Committed | None,
        error: BaseException | None,
    ) -> None:
        """Publish the written batch, and let the next commit start."""
        outcomes: list[Outcome] = []
        if committed is not None:
            batch, written, damaged = committed
            for key, damage in damaged.items():
                self._health.note_damage(damage)
                self._damaged.add(key)
            outcomes = batch.outcomes
            self._cache.write(written.jobs, batch.removed, written.children)
            self._counts.update(batch.counts)
            self._feed.publish(batch.changes)
            self._stall_clocks.note(commands, outcomes, now)
            batch.log()
        elif error is not None:
            error = self._health.failed(error, is_write=True)
        self._turn.release()
        resolve(waiter, CommitResult(outcomes), error)
        self._checkpoint_if_due()

    def _checkpoint_if_due(self) -> None:
        if self._writer.wants_checkpoint:
            self._thread.submit(self._writer.checkpoint, self._checkpointed)

    def _checkpointed(self, _: None, error: BaseException | None) -> None:
        if error is not None:
            self._health.failed(error, is_write=True)

    async def get(self, tenant: str, job_id: str, *, only: JobFilter | None = None) -> Job:
        """See JobStore."""
        self._health.check()
        key = (tenant, job_id)
        stored = self._cache.get(key)
        found = None if stored is None else visible(stored.shown, only)
        if found is None:
            found = visible(await self._loader.load(key if stored is None else (tenant, NO_ID)), only)
        return self._stall_clocks.shown(require_job(found, job_id))

    async def jobs(self, keys: Collection[Key]) -> Mapping[Key, Job]:
        """See JobStore."""
        self._health.check()
        stored, missing = self._cache.find(keys)
        jobs = {key: each.shown for key, each in stored.items()}
        loaded = await asyncio.gather(*map(self._loader.load, missing), return_exceptions=True)
        for key, found in zip(missing, loaded, strict=True):
            if isinstance(found, Job):
                jobs[key] = found
            elif isinstance(found, BaseException) and not isinstance(found, DataLossError):
                raise found
        return {key: self._stall_clocks.shown(job) for key, job in jobs.items()}

    async def children(self, keys: Collection[Key]) -> Mapping[Key, Children]:
        """See JobStore."""
        self._health.check()
        stored, missing = self._cache.find(keys)
        children = {key: each.children for key, each in stored.items() if each.children}
        return children | await self._read(read_children, missing) if missing else children

    async def transitions(
        self, tenant: str, job_id: str, *, after_revision: int = 0, limit: int = 1000
    ) -> list[Transition]:
        """See JobStore."""
        return await self._read(read_transitions, (tenant, job_id), self._clock(), after_revision, limit)

    async def page(self, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str = "") -> Page:
        """See JobStore."""
        page = await self._read(read_page, tenant, job_filter, limit=limit, cursor=cursor)
        for damage in page.damaged:
            self._health.note_damage(damage)
        return self._stall_clocks.shown_on(page)

    async def count(self, tenant: str, *, at_most: int) -> int:
        """See JobStore."""
        return await self._read(count_jobs, tenant, at_most)

    def stalled_jobs(self) -> int:
        """See JobStore."""
        return self._counts[STALLED]

    def jobs_by_state(self) -> Mapping[JobState, int]:
        """See JobStore. As of the latest commit."""
        return {state: self._counts[state] for state in JobState}

    def damaged_rows(self) -> int:
        """See JobStore."""
        return self._health.damaged_rows

    async def position(self) -> Position:
        """See JobStore."""
        await self._read(read_newest_sequence)  # which waits until the feed has it
        return self._feed.position()

    async def changes(self, after: Position, *, up_to: Position | None = None) -> ChangeBatch:
        """See JobStore. Recent changes are in memory, older ones are read from the file."""
        self._health.check()
        sequence = self._feed.sequence_of(after)
        end = None if up_to is None else max(self._feed.sequence_of(up_to), sequence)
        while True:
            if end is None:
                await self._feed.wait_beyond(sequence)
            batch = self._feed.since(sequence, end)
            if batch is not None:
                return batch
            # Not beyond the feed's sequence: a later change in the file is not published yet.
            last = self._feed.sequence if end is None else end
            try:
                rows = await self._read(read_changes, sequence, last)
            except DataLossError as error:
                raise StoreChangedError("the store's history of changes is damaged") from error
            for damage in rows.damaged:
                self._health.note_damage(damage)
            sequence = rows.sequence
            if rows.changes or end is not None:
                return ChangeBatch(self._feed.position(sequence), rows.changes, rows.superseded)

    async def overdue(self, *, limit: int, fail_stalled_after: timedelta | None = None) -> Sequence[Command]:
        """See JobStore. While writes fail, no job stalls, as the workers cannot report either; but jobs expire."""
        commands: list[Command] = []
        if self._health.writable:
            await self._start_clocks_of_stored_jobs()
            silent = self._stall_clocks.due(limit=limit, fail_after=fail_stalled_after)
            commands += [Stall(id=job_id, tenant=tenant, fail_after=fail_stalled_after) for tenant, job_id in silent]
        if len(commands) < limit and (self._health.writable or self._health.is_failing):
            at_most = limit - len(commands)
            now = self._clock()
            expired_at = self._retention_clock.at(now)
            expired = await self._read(read_expired, now, expired_at, at_most + len(self._damaged))
            removable = [key for key in expired if key not in self._damaged]
            commands += [Expire(id=job_id, tenant=tenant) for tenant, job_id in removable[:at_most]]
        return commands

    async def _start_clocks_of_stored_jobs(self) -> None:
        """Start the stall clocks of the jobs that were IN_PROGRESS when the file was opened."""
        after: int | None = None if self._has_all_clocks else 0
        while after is not None:
            jobs, after = await self._read(read_silent, after)
            self._stall_clocks.begin(jobs)
        self._has_all_clocks = True

    def restart_stall_clocks(self) -> None:
        """See JobStore."""
        self._stall_clocks.restart()

    async def trim(self, *, limit: int) -> bool:
        """See JobStore."""
        self._health.check_writes()
        try:
            now = self._clock()
            old_at = self._retention_clock.at(now)
            trimmed = await self._thread.call(self._trimmer.step, now, old_at, self._feed.sequence, limit)
        except sqlite3.Error as error:
            raise self._health.failed(error, is_write=True) from error
        self._feed.forgotten_sequence = max(self._feed.forgotten_sequence, trimmed.forgotten_sequence)
        self._checkpoint_if_due()
        return trimmed.has_more

    @property
    def writable(self) -> bool:
        """See JobStore."""
        return self._health.writable

    async def closed(self) -> BaseException | None:
        """See JobStore. A failed fsync breaks the store."""
        return await asyncio.shield(self._health.end)

    async def close(self) -> None:
        """See JobStore."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._release())
        await asyncio.shield(self._closing)

    async def _read(
        self, query: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a query, and wait until all commits that it may have seen are published.

        Readers see a commit as soon as it is in the file. Without the wait, the cache would answer the next call with
        an older job, and a position would be before what was read.
        """
        self._health.check()

        def work(connection: sqlite3.Connection) -> tuple[T, int]:
            return query(connection, *args, **kwargs), read_newest_sequence(connection)

        try:
            result, newest = await self._readers.call(work)
        except (DataLossError, sqlite3.Error) as error:
            raise self._health.failed(error, is_write=False) from error
        while self._feed.sequence < newest:
            await self._feed.wait_beyond(self._feed.sequence)
        return result

    async def _release(self) -> None:
        self._health.refuse("the store is closed")
        self._feed.end()
        if self._health.is_checking:
            self._writer.connection.interrupt()
        async with self._turn:  # after the running commit, and after the pending ones were refused
            pass
        closing: list[Callable[[], Awaitable[None]]]
        closing = [self._readers.close, partial(self._thread.call, self._writer.close)]
        # The last connection to close copies the write-ahead log into the file and deletes it. A reader cannot write,
        # so that the log stays as it is after an error of the disk.
        for close in reversed(closing) if self._health.is_broken else closing:
            await close()
        await self._thread.stop()
        self._writer.file.unlock()
        self._health.finish()


def _stand_ins(commands: Sequence[Command], stored: Mapping[Key, StoredJob]) -> list[Key]:
    """Return what to read in place of the cached jobs that a command's caller does not see."""
    limits = {(command.tenant, command.id): command.only for command in commands if command.only is not None}
    unseen = [key for key, only in limits.items() if key in stored and visible(stored[key].job, only) is None]
    return [(tenant, NO_ID) for tenant, _ in unseen]


def _open_connections(path: str) -> tuple[Writer, list[sqlite3.Connection]]:
    """Open all connections: later there may be no file descriptor left, or another file in the place."""
    writer = Writer.open(path)
    readers: list[sqlite3.Connection] = []
    try:
        for _ in range(READERS):
            readers.append(writer.file.connect_reader())
    except BaseException as error:
        for connection in [*readers, writer.connection]:
            connection.close()
        writer.file.unlock()
        if isinstance(error, sqlite3.Error):
            raise CannotStartError(f"cannot open the store {path}: {describe(error)}") from error
        raise
    return writer, readers


async def open_store(url: str, *, clock: Clock = utc_now, retention: timedelta = DEFAULT_RETENTION) -> SqliteStore:
    """Return the store in the file that `url` names, which is created if it does not exist.

    Raises:
        CannotStartError: the file cannot be used, or another process uses it.
    """
    return await SqliteStore.open(path_of(url), clock=clock, retention=retention)


STORE_TYPE = StoreType(open=open_store, name=lambda url: f"sqlite:///{path_of(url)}", back_up=back_up, restore=restore)
