"""The use cases: what can be done with jobs, without a word of gRPC."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import NoReturn

from jobstatus_grpc.commit_queue import CommitQueue
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job import Cancel, Command, Create, Delete, Job, JobFilter, Outcome, Transition, Update
from jobstatus_grpc.job.ids import derived_job_id, new_job_id
from jobstatus_grpc.stores.interface import Clock, JobStore, Page, Position
from jobstatus_grpc.watch.filter_stream import FilterStream, Send
from jobstatus_grpc.watch.filter_watch import FilterHub
from jobstatus_grpc.watch.job_watch import Watcher, WatchHub
from jobstatus_grpc.watch.watcher import TrySend


class JobService:
    """Creates, reads, lists, changes and watches jobs. Commands come checked; every method raises the error tree."""

    def __init__(
        self, *, store: JobStore, queue: CommitQueue, hub: WatchHub, filter_hub: FilterHub, clock: Clock
    ) -> None:
        """Take the collaborators; `clock` only puts the time into ids."""
        self._store = store
        self._queue = queue
        self._hub = hub
        self._filter_hub = filter_hub
        self._clock = clock

    async def create(self, command: Create) -> Job:
        """Create a job and return it; without an id it gets one."""
        if not command.id:
            request = command.request
            made = derived_job_id(command.tenant, request.value) if request else new_job_id(self._clock())
            command = dataclasses.replace(command, id=made)
        return await self._commit(command)

    async def get(self, tenant: str, job_id: str) -> Job:
        """Return a job as of the latest committed write."""
        return await self._store.get(tenant, job_id)

    async def update(self, command: Update) -> Job:
        """Report on a job and return it as stored."""
        return await self._commit(command)

    async def batch_update(self, updates: Sequence[Update | JobStatusError]) -> Sequence[Outcome]:
        """Report on many jobs in order, each on its own; what was refused before keeps its place."""
        commands = [item for item in updates if isinstance(item, Update)]
        committed = iter(await self._queue.submit(commands) if commands else ())
        return [next(committed) if isinstance(item, Update) else item for item in updates]

    async def cancel(self, command: Cancel) -> Job:
        """Ask for a job's end and return it as stored."""
        return await self._commit(command)

    async def delete(self, command: Delete) -> None:
        """Forget a done job."""
        await self._commit(command)

    async def list(
        self, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str = "", position: Position = ""
    ) -> tuple[Position, Page]:
        """Return a page of the jobs that match, and where the feed stood before the first page was read.

        For the next page give both back: the page's next_cursor and the position.
        """
        # What the hub has published is in every page read from now on; what is newer may not be.
        position = position or self._filter_hub.position
        return position, await self._store.page(tenant, job_filter, limit=limit, cursor=cursor)

    async def transitions(self, tenant: str, job_id: str, *, after_revision: int, limit: int) -> Sequence[Transition]:
        """Return who did what to a job, the oldest first."""
        return await self._store.transitions(tenant, job_id, after_revision=after_revision, limit=limit)

    @contextlib.asynccontextmanager
    async def watch(
        self,
        tenant: str,
        job_id: str,
        *,
        heartbeat_interval: timedelta,
        min_update_interval: timedelta,
        try_send: TrySend | None = None,
    ) -> AsyncIterator[Watcher]:
        """Follow a job for the length of a block; call the watcher's `next` until it returns None.

        It returns nothing that `try_send` has taken.
        """
        with self._hub.watcher(
            tenant,
            job_id,
            heartbeat_seconds=heartbeat_interval.total_seconds(),
            min_update_seconds=min_update_interval.total_seconds(),
            try_send=try_send,
        ) as watcher:
            # Registered before the job is read: what changes in between arrives through the feed.
            self._hub.offer(watcher, await self._store.get(tenant, job_id))
            yield watcher

    async def watch_jobs(
        self,
        tenant: str,
        job_filter: JobFilter,
        *,
        after: Position | None,
        heartbeat_interval: timedelta,
        min_update_interval: timedelta,
        send: Send,
    ) -> NoReturn:
        """Follow all jobs that match, and tell `send`; from the position `after`, or from what is there where None.

        Ends with an error only.
        """
        with self._filter_hub.watcher(
            tenant,
            job_filter,
            heartbeat_seconds=heartbeat_interval.total_seconds(),
            min_update_seconds=min_update_interval.total_seconds(),
        ) as watcher:
            await FilterStream(self._store, self._filter_hub, watcher, send).run(after)

    async def _commit(self, command: Command) -> Job:
        (outcome,) = await self._queue.submit((command,))
        if isinstance(outcome, JobStatusError):
            raise outcome
        return outcome
