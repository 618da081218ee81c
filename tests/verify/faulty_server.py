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
from jobstatus_grpc.job import JobState, Update, rules, validation
from jobstatus_grpc.server import responses
from jobstatus_grpc.server.servicer import JobStatusServicer
from jobstatus_grpc.server.transports import grpcio
from jobstatus_grpc.service import JobService
from jobstatus_grpc.stores import batch, memory
from jobstatus_grpc.stores.batch import Batch
from jobstatus_grpc.stores.embedded import Feed, StallClocks
from jobstatus_grpc.stores.interface import ChangeBatch, Page
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.watch import filter_watch, publisher
from jobstatus_grpc.watch.backlog import Backlog
from jobstatus_grpc.watch.filter_watch import FilterHub, FilterStream
from jobstatus_grpc.watch.job_watch import JobHub
from jobstatus_grpc.watch.numbers import Numbered
from jobstatus_grpc.watch.publisher import Publisher
from jobstatus_grpc.watch.watcher import TimedWatcher

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
    commit, accepted = JobService._commit, set[tuple[str, str]]()

    async def commit_unless_known(self: Any, command: Any) -> Any:
        if not isinstance(command, Update) or command.request is None:
            return await commit(self, command)
        request = (command.id, command.request.value)
        if request in accepted:
            return await self._store.get(command.tenant, command.id)
        await asyncio.sleep(0.001)
        job = await commit(self, command._replace(request=None))
        accepted.add(request)
        return job

    JobService._commit = commit_unless_known  # type: ignore[method-assign]


def request_id_remembers_16() -> None:
    write = MemoryStore._write

    def write_and_forget(self: MemoryStore, batch: Any, now: Any) -> None:
        write(self, batch, now)
        for tenant, job_id, _ in batch.requests:
            remembered = self._requests[tenant, job_id]
            while len(remembered) > 16:
                del remembered[next(iter(remembered))]

    MemoryStore._write = write_and_forget  # type: ignore[method-assign]


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
    publish = Publisher._publish

    async def publish_without_ends(self: Publisher, batch: ChangeBatch, *, after: Any) -> None:
        await asyncio.sleep(0.2)  # as if the feed were polled: an end and a deletion arrive as one change
        changes = [change._replace(final=None) for change in batch.changes]
        await publish(self, replace(batch, changes=changes), after=after)

    Publisher._publish = publish_without_ends  # type: ignore[method-assign]


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


def cancel_lost_at_the_next_update() -> None:
    changed_fields = rules.changed_fields

    def changes_of_an_older_copy(job: Any, *others: Any) -> Any:
        changes = changed_fields(job, *others)
        return {**changes, "cancel_requested": False} if changes and job.cancel_requested else changes

    rules.changed_fields = changes_of_an_older_copy  # type: ignore[assignment]


def heartbeat_that_does_not_count() -> None:
    note = StallClocks.note

    def note_changes(self: StallClocks, commands: Any, outcomes: Any, at: Any) -> None:
        pairs = zip(commands, outcomes, strict=True)
        kept = [pair for pair in pairs if not isinstance(pair[0], Update) or pair[0].changes]
        note(self, [command for command, _ in kept], [outcome for _, outcome in kept], at)

    StallClocks.note = note_changes  # type: ignore[method-assign]


def removal_from_a_filter_not_sent() -> None:
    concerned = FilterHub._concerned

    def concerned_by_its_keys(self: FilterHub, change: Any) -> Any:
        held, self.held = self.held, {}
        try:
            return concerned(self, change)
        finally:
            self.held = held

    FilterHub._concerned = concerned_by_its_keys  # type: ignore[method-assign]


def label_index_of_the_creation() -> None:
    page = MemoryStore.page
    first: dict[str, Any] = {}

    async def page_by_first_labels(self: Any, tenant: str, job_filter: Any, **place: Any) -> Page:
        found = await page(self, tenant, replace(job_filter, labels={}), **place)
        is_match = [first.setdefault(job.id, job.labels).items() >= job_filter.labels.items() for job in found.jobs]
        jobs = list(itertools.compress(found.jobs, is_match))
        return replace(found, jobs=jobs, cursors=list(itertools.compress(found.cursors, is_match)))

    MemoryStore.page = page_by_first_labels  # type: ignore[method-assign]


def history_with_one_entry_a_commit() -> None:
    apply_all = batch.apply_all

    def apply_all_in_short(*args: Any, **settings: Any) -> Any:
        done = apply_all(*args, **settings)
        done.transitions = list(dict(done.transitions).items())
        return done

    memory.apply_all = apply_all_in_short  # type: ignore[attr-defined]


def last_change_within_the_interval_dropped() -> None:
    TimedWatcher._on_throttle_timer = lambda self: None  # type: ignore[method-assign]


def token_that_passes_a_change_held_back() -> None:
    Backlog.before = property(lambda self: None)  # type: ignore[assignment]


def token_of_a_list_from_after_it() -> None:
    async def list_first(self: Any, tenant: str, job_filter: Any, *, position: Any = "", **place: Any) -> Any:
        page = await self._store.page(tenant, job_filter, **place)
        await asyncio.sleep(0.05)
        return position or self._filter_hub.position, page

    JobService.list = list_first  # type: ignore[method-assign]


def batch_in_reverse() -> None:
    batch_update = JobService.batch_update

    async def backwards(self: Any, updates: Any) -> Any:
        return [*reversed(await batch_update(self, updates[::-1]))]

    JobService.batch_update = backwards  # type: ignore[method-assign]


def resume_without_synced() -> None:
    resume = FilterStream._resume

    async def resume_in_silence(self: Any, after: Any) -> None:
        async def say_nothing(position: Any) -> None:
            self._is_synced = True

        self._send_synced = say_nothing
        try:
            await resume(self, after)
        finally:
            del self._send_synced

    FilterStream._resume = resume_in_silence  # type: ignore[method-assign]


def deletion_without_its_revision() -> None:
    delete = rules._delete
    rules._delete = lambda found, command: delete(found, replace(command, expected_revision=0))


def children_that_are_removed_still_counted() -> None:
    count = Batch._count_child
    Batch._count_child = lambda self, job, by: None if by < 0 and job.done else count(self, job, by)  # type: ignore[method-assign]


def numbers_of_children_not_sent() -> None:
    publisher.read_numbers = filter_watch.read_numbers = _without_parents  # type: ignore[attr-defined]


async def _without_parents(store: Any, changes: Any, **_: Any) -> Any:
    return Numbered(changes, ())


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
        request_id_remembers_16,
        stale_attempt_accepted,
        feed_by_last_id,
        stale_replica_read,
        heartbeat_raises_a_revision,
        ok_without_the_end,
        resume_that_skips_a_removal,
        deletion_that_swallows_the_end,
        token_of_another_history_accepted,
        page_cursor_that_skips_on_insert,
        cancel_lost_at_the_next_update,
        heartbeat_that_does_not_count,
        removal_from_a_filter_not_sent,
        label_index_of_the_creation,
        history_with_one_entry_a_commit,
        last_change_within_the_interval_dropped,
        token_that_passes_a_change_held_back,
        token_of_a_list_from_after_it,
        batch_in_reverse,
        deletion_without_its_revision,
        children_that_are_removed_still_counted,
        numbers_of_children_not_sent,
        resume_without_synced,
    )
}

if __name__ == "__main__":
    BUGS[sys.argv.pop(1)]()
    cli.main()
