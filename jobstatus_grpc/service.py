"""The use cases, one method per RPC: between the servicer, which has gRPC, and commit queue, store and watch hubs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple, NoReturn

from jobstatus_grpc.commit_queue import CommitQueue
from jobstatus_grpc.errors import InvalidTokenError, JobStatusError, NotFoundError, StreamAgeError
from jobstatus_grpc.job import (
    Cancel,
    Command,
    Create,
    Delete,
    Job,
    JobFilter,
    Outcome,
    Transition,
    Update,
)
from jobstatus_grpc.job.ids import derived_job_id, new_uuid7
from jobstatus_grpc.job.limits import MAX_WATCH_INTERVAL
from jobstatus_grpc.job_quota import JobQuota
from jobstatus_grpc.stores.interface import Clock, JobStore, Page, Position
from jobstatus_grpc.watch.filter_watch import FilterHub, FilterStream
from jobstatus_grpc.watch.job_watch import JobHub, JobWatcher
from jobstatus_grpc.watch.watcher import Hold, Send, TrySend

CANCELLED_AT_ONCE = 100
"""Descendants that a cascade reads at once and cancels in one commit: a request that arrives meanwhile waits for it."""


class HistoryPlace(NamedTuple):
    """An entry of a job's history."""

    revision: int
    transitioned_at: datetime


class JobService:
    """Creates, reads, lists, changes and watches jobs.

    Callers check the values of commands (job/validation.py). Every method raises errors of jobstatus_grpc.errors.

    A caller that may see only some jobs passes their filter as `only`, in commands as their field. Other jobs are
    JobNotFoundError then, exactly as an id that was never used.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        queue: CommitQueue,
        job_hub: JobHub,
        filter_hub: FilterHub,
        clock: Clock,
        quota: JobQuota | None = None,
    ) -> None:
        """`clock` gives the time that new ids contain; a job's instants come from the store's clock."""
        self._quota = quota
        self._store = store
        self._queue = queue
        self._job_hub = job_hub
        self._filter_hub = filter_hub
        self._clock = clock

    async def create(self, command: Create) -> Job:
        """Create a job and return it as stored. Without an id it gets one, derived from the request_id if any."""
        if not command.id:
            request = command.request
            if request is None:
                made = new_uuid7(self._clock())
            else:
                made = derived_job_id(command.tenant, request.value, command.only)
            command = dataclasses.replace(command, id=made)
        return await self._commit(command)

    async def get(self, tenant: str, job_id: str, *, only: JobFilter | None = None) -> Job:
        """Return a job as of the latest committed write."""
        return await self._store.get(tenant, job_id, only=only)

    async def update(self, command: Update) -> Job:
        """Update a job and return it as stored."""
        return await self._commit(command)

    async def batch_update(self, updates: Sequence[Update | JobStatusError]) -> Sequence[Outcome]:
        """Update many jobs in order, each by itself.

        Returns:
            One outcome per item, in order: the job as stored, or an error. An item that is an error is its own outcome.
        """
        commands = [item for item in updates if isinstance(item, Update)]
        committed = iter(await self._submit(commands) if commands else ())
        return [next(committed) if isinstance(item, Update) else item for item in updates]

    async def cancel(self, command: Cancel) -> Job:
        """Request that a job be cancelled, and return it as stored; with `cascade`, then cancel its descendants.

        Repeating the call cancels the descendants that a call which failed has left.
        """
        job = await self._commit(command)
        if command.cascade:
            await self._cancel_descendants(command)
        return job

    async def _cancel_descendants(self, command: Cancel) -> None:
        """Cancel all descendants that are not done, some in each commit. Those that are removed are skipped."""
        known = {command.id}  # parents may form a circle
        parents = deque(known)
        failures: list[JobStatusError] = []
        while parents:
            children = JobFilter(parent_id=parents.popleft())
            if command.only is not None:
                children &= command.only
            cursor: str | None = ""
            while cursor is not None:
                page = await self._store.page(command.tenant, children, limit=CANCELLED_AT_ONCE, cursor=cursor)
                jobs = [job for job in page.jobs if job.id not in known]
                known.update(job.id for job in jobs)
                parents.extend(job.id for job in jobs if job.children)
                cancels = [dataclasses.replace(command, id=job.id, request=None) for job in jobs if not job.done]
                outcomes = await self._submit(cancels) if cancels else ()
                failures += [outcome for outcome in outcomes if isinstance(outcome, JobStatusError)]
                failures += page.damaged
                cursor = page.next_cursor or None
        for failure in failures:
            if not isinstance(failure, NotFoundError):
                raise failure

    async def delete(self, command: Delete) -> None:
        """Delete a job that is done."""
        await self._commit(command)

    async def list(
        self, tenant: str, job_filter: JobFilter, *, limit: int, cursor: str = "", position: Position = ""
    ) -> tuple[Position, Page]:
        """Return a page of the jobs that match, and the feed's position before the first page was read.

        A caller that may see only some jobs passes a filter that no other job matches.

        Pass both, the page's next_cursor and the position, to get the next page.
        """
        # Every change that the hub has published is in the pages that are read from now on; a newer one may not be.
        position = position or self._filter_hub.position
        return position, await self._store.page(tenant, job_filter, limit=limit, cursor=cursor)

    async def transitions(
        self, tenant: str, job_id: str, *, after: HistoryPlace | None, limit: int, only: JobFilter | None = None
    ) -> Sequence[Transition]:
        """Return a job's history after an entry (None: from the beginning), oldest first, at most `limit` entries.

        Raises:
            InvalidTokenError: the history has another entry in its place: the store was set back to a backup.
        """
        if only is None:
            return await self._transitions(tenant, job_id, after, limit)
        job = await self.get(tenant, job_id, only=only)
        entries = await self._transitions(tenant, job_id, after, limit)
        return [entry for entry in entries if entry.revision <= job.revision]  # `only` may exclude the job since

    async def _transitions(
        self, tenant: str, job_id: str, after: HistoryPlace | None, limit: int
    ) -> Sequence[Transition]:
        if after is None:
            return await self._store.transitions(tenant, job_id, limit=limit)
        found = await self._store.transitions(tenant, job_id, after_revision=after.revision - 1, limit=limit + 1)
        if found and found[0].revision == after.revision:
            is_known = found[0].transitioned_at == after.transitioned_at
            found = found[1:]
        else:  # unless the oldest entries were trimmed, it is of a history that the store does not have
            oldest = await self._store.transitions(tenant, job_id, limit=1)
            is_known = bool(oldest) and oldest[0].revision > after.revision
        if not is_known:
            raise InvalidTokenError("the job's history is another one since; read it from the beginning")
        return found[:limit]

    @contextlib.asynccontextmanager
    async def watch(
        self,
        tenant: str,
        job_id: str,
        *,
        heartbeat_interval: timedelta,
        min_update_interval: timedelta,
        try_send: TrySend | None = None,
        only: JobFilter | None = None,
    ) -> AsyncIterator[JobWatcher]:
        """Watch a job during the block: call the watcher's `next` until it returns None.

        Args:
            try_send: sends an event's message without waking the task that waits in `next`; None: `next` returns all.
        """
        with self._job_hub.watcher(
            tenant,
            job_id,
            heartbeat_seconds=heartbeat_interval.total_seconds(),
            min_update_seconds=min_update_interval.total_seconds(),
            try_send=try_send,
            only=only,
        ) as watcher:
            # The watcher is registered before the job is read: a change in between arrives through the feed.
            watcher.start(await self.get(tenant, job_id, only=only))
            yield watcher

    async def wait(self, tenant: str, job_id: str, *, timeout_seconds: float, only: JobFilter | None = None) -> Job:
        """Return a job once it is done, or as it is after `timeout_seconds` or the maximum age of a watch."""
        longest = MAX_WATCH_INTERVAL
        async with self.watch(
            tenant, job_id, heartbeat_interval=longest, min_update_interval=longest, only=only
        ) as watcher:
            timer = asyncio.get_running_loop().call_later(timeout_seconds, watcher.end, StreamAgeError)
            try:
                with contextlib.suppress(StreamAgeError):
                    while await watcher.next() is not None:
                        pass
            finally:
                timer.cancel()
            return watcher.latest()

    async def watch_jobs(
        self,
        tenant: str,
        job_filter: JobFilter,
        *,
        after: Position | None,
        heartbeat_interval: timedelta,
        min_update_interval: timedelta,
        send: Send,
        hold: Hold,
        only: JobFilter | None = None,
    ) -> NoReturn:
        """Send the events of all jobs that match until the watch ends with an error.

        Args:
            job_filter: matches no job that `only` excludes.
            after: the feed's position from which to resume; None: begin with a snapshot.
            hold: see FilterStream.
        """
        with self._filter_hub.watcher(
            tenant,
            job_filter,
            heartbeat_seconds=heartbeat_interval.total_seconds(),
            min_update_seconds=min_update_interval.total_seconds(),
            only=only,
        ) as watcher:
            await FilterStream(self._store, self._filter_hub, watcher, send, hold=hold).run(after)

    async def _commit(self, command: Command) -> Job:
        (outcome,) = await self._submit((command,))
        if isinstance(outcome, JobStatusError):
            raise outcome
        return outcome

    async def _submit(self, commands: Sequence[Command]) -> Sequence[Outcome]:
        if self._quota is None:
            return await self._queue.submit(commands)
        return await self._quota.submit(commands, self._queue.submit)
