"""`jobstatus` with one seeded bug: `python -m tests.verify.faulty_server BUG serve …`. The checker must see each.

A bug is a function that replaces a part of the server by plausible code with the fault in it.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import cli
from jobstatus_grpc.errors import JobStatusError
from jobstatus_grpc.job import JobState, Update, rules, validation
from jobstatus_grpc.server import responses
from jobstatus_grpc.server.servicer import JobStatusServicer
from jobstatus_grpc.server.transports import grpcio
from jobstatus_grpc.service import JobService
from jobstatus_grpc.stores.embedded import Feed
from jobstatus_grpc.stores.interface import ChangeBatch, Page
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.watch.job_watch import JobHub
from jobstatus_grpc.watch.publisher import Publisher

WEEK = timedelta(days=7)


def acknowledge_before_commit() -> None:
    commit = JobService._commit

    async def acknowledged(self: Any, command: Any) -> Any:
        if not isinstance(command, Update) or command.allow_missing:
            return await commit(self, command)
        job = await self._store.get(command.tenant, command.id)
        outcome = rules.apply(job, command, now=self._clock(), retention=WEEK).job
        asyncio.get_running_loop().call_later(0.05, lambda: tasks.append(asyncio.ensure_future(later(self, command))))
        return outcome

    async def later(self: Any, command: Any) -> None:
        await self._queue.submit((command,))

    tasks: list[Any] = []
    JobService._commit = acknowledged  # type: ignore[method-assign]


def read_before_register() -> None:
    async def watch(self: Any, data: bytes, caller: Any, context: Any) -> None:
        request = pb.WatchJobRequest.FromString(data)
        job = await self._service.get(caller.tenant, request.id)
        await asyncio.sleep(0.05)
        hub = self._service._job_hub
        with hub.watcher(caller.tenant, request.id, heartbeat_seconds=30.0, min_update_seconds=0.0) as watcher:
            watcher.start(job)
            while (message := await watcher.next()) is not None:
                await context.write(message)

    JobStatusServicer.WatchJob = watch  # type: ignore[method-assign]


def no_guard_on_final_states() -> None:
    everything = frozenset(JobState)
    rules.TRANSITIONS = dict.fromkeys(JobState, everything)  # type: ignore[attr-defined]


def nan_accepted() -> None:
    validation.check_progress = lambda value, field, violations: None


def slow_reader_dropped_silently() -> None:
    publish, numbers = JobHub.publish, itertools.count()

    def publish_most(self: JobHub, change: Any) -> None:
        if next(numbers) % 5:
            publish(self, change)

    JobHub.publish = publish_most  # type: ignore[method-assign]


def lock_across_a_write() -> None:
    write, lock = grpcio._Stream.write, asyncio.Lock()

    async def write_alone(self: Any, message: bytes) -> None:
        async with lock:
            await write(self, message)

    grpcio._Stream.write = write_alone  # type: ignore[method-assign]


def request_id_outside_the_transaction() -> None:
    commit, is_replay = JobService._commit, rules._is_replay

    async def commit_unless_known(self: Any, command: Any) -> Any:
        request = getattr(command, "request", None)
        if request is not None:
            try:
                job = await self._store.get(command.tenant, command.id)
            except JobStatusError:
                return await commit(self, command)
            if is_replay(job, request):
                return job
            await asyncio.sleep(0.001)
        return await commit(self, command)

    rules._is_replay = lambda job, request: False
    JobService._commit = commit_unless_known  # type: ignore[method-assign]


def stale_attempt_accepted() -> None:
    rules._check_attempt = lambda job, command: None


def feed_by_last_id() -> None:
    publish = Publisher._publish

    async def publish_last(self: Publisher, batch: ChangeBatch, *, after: Any) -> None:
        await publish(self, replace(batch, changes=batch.changes[-1:]), after=after)

    Publisher._publish = publish_last  # type: ignore[method-assign]


def stale_replica_read() -> None:
    get = JobService.get
    known: dict[str, tuple[float, Any]] = {}

    async def get_soon(self: JobService, tenant: str, job_id: str, *, only: Any = None) -> Any:
        at, job = known.get(job_id, (0.0, None))
        if time.monotonic() - at > 0.2:
            job = await get(self, tenant, job_id, only=only)
            known[job_id] = time.monotonic(), job
        return job

    JobService.get = get_soon  # type: ignore[method-assign]


def heartbeat_raises_a_revision() -> None:
    changed_fields = rules.changed_fields
    rules.changed_fields = lambda job, *others: (
        changed_fields(job, *others) or {"reports_progress": job.reports_progress}
    )


def ok_without_the_end() -> None:
    watch = JobStatusServicer.WatchJob

    async def watch_shortly(self: Any, data: bytes, caller: Any, context: Any) -> None:
        try:
            await asyncio.wait_for(watch(self, data, caller, context), 0.2)
        except asyncio.TimeoutError:
            return

    JobStatusServicer.WatchJob = watch_shortly  # type: ignore[method-assign]


def resume_that_skips_a_removal() -> None:
    with_token = responses.with_token

    def with_fewer_events(write: Any, watch: Any) -> Any:
        is_synced = not watch.resume_token

        async def write_most(data: bytes) -> None:
            nonlocal is_synced
            message = pb.WatchJobsResponse.FromString(data)
            events = [event for event in message.events if is_synced or event.type != pb.JOB_EVENT_TYPE_REMOVED]
            is_synced |= any(event.type == pb.JOB_EVENT_TYPE_SYNCED for event in events)
            del message.events[:]
            message.events.extend(events)
            await write(message.SerializeToString())

        return with_token(write_most, watch)

    responses.with_token = with_fewer_events


def deletion_that_swallows_the_end() -> None:
    publish, publish_batch = JobHub.publish, Publisher._publish

    async def publish_late(self: Publisher, batch: ChangeBatch, *, after: Any) -> None:
        await asyncio.sleep(0.02)  # as if the feed were polled: an end and a deletion arrive as one change
        await publish_batch(self, batch, after=after)

    Publisher._publish = publish_late  # type: ignore[method-assign]

    def publish_removal(self: JobHub, change: Any) -> None:
        topic = self._topics.get((change.tenant, change.id))
        if change.job is None and topic is not None:
            topic.newest = None
            topic.remove()
        else:
            publish(self, change)

    JobHub.publish = publish_removal  # type: ignore[method-assign]


def token_of_another_history_accepted() -> None:
    Feed.sequence_of = lambda self, position: int(position.rpartition("-")[2])  # type: ignore[method-assign]


def page_cursor_that_skips_on_insert() -> None:
    async def page(self: Any, tenant: str, job_filter: Any, *, limit: int, cursor: str = "") -> Page:
        newest_first = [self._jobs[key] for _, key in reversed(self._order._entries) if key[0] == tenant]
        matching = [job for job in newest_first if job_filter.matches(job)]
        start = int(cursor or 0)
        found = matching[start : start + limit]
        cursors = [str(start + number + 1) for number in range(len(found))]
        return Page(found, cursors, str(start + limit) if len(matching) > start + limit else "")

    MemoryStore.page = page  # type: ignore[method-assign]


BUGS: dict[str, Callable[[], None]] = {
    bug.__name__.replace("_", "-"): bug
    for bug in (
        acknowledge_before_commit,
        read_before_register,
        no_guard_on_final_states,
        nan_accepted,
        slow_reader_dropped_silently,
        lock_across_a_write,
        request_id_outside_the_transaction,
        stale_attempt_accepted,
        feed_by_last_id,
        stale_replica_read,
        heartbeat_raises_a_revision,
        ok_without_the_end,
        resume_that_skips_a_removal,
        deletion_that_swallows_the_end,
        token_of_another_history_accepted,
        page_cursor_that_skips_on_insert,
    )
}

if __name__ == "__main__":
    BUGS[sys.argv.pop(1)]()
    cli.main()
