"""Races that a client cannot force: changes between the steps of a WatchJobs, and stores that are replaced."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job import Create
from jobstatus_grpc.stores.embedded import Feed, new_epoch
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.watch import filter_watch
from tests.support.loop import run
from tests.support.paused_store import PausedStore
from tests.support.servers import serving
from tests.support.stores import StandingClock
from tests.support.watch_jobs import HEARTBEAT, REMOVED, RESET, Reader, events_of, listed

NONE = duration_pb2.Duration()
SECOND = duration_pb2.Duration(seconds=1)
OPEN = pb.JobFilter(labels={"is": "open"})


async def create(stub, job_id):
    job = pb.JobStatus(id=job_id, state=pb.JOB_STATE_IN_PROGRESS, labels={"is": "open"})
    await stub.CreateJob(pb.CreateJobRequest(job=job))


async def update(stub, job_id, **fields):
    await stub.UpdateJob(pb.UpdateJobRequest(job=pb.JobStatus(id=job_id, **fields)))


async def end(stub, job_id):
    await update(stub, job_id, state=pb.JOB_STATE_SUCCEEDED)
    await stub.DeleteJob(pb.DeleteJobRequest(id=job_id))


CHANGES = {
    "changes": lambda stub: update(stub, "job-2", progress=5),
    "stops matching": lambda stub: update(stub, "job-2", labels={"is": "closed"}),
    "is deleted": lambda stub: end(stub, "job-2"),
    "begins to match": lambda stub: update(stub, "other", labels={"is": "open"}),
    "is new": lambda stub: create(stub, "new"),
}


async def read_until(stream, reader, is_there):
    while not is_there():
        reader.take(await stream.read())


async def is_right(stub, stream, reader):
    """Read until the newest job arrives, and require that the reader's jobs equal the matching ones."""
    await read_until(stream, reader, lambda: reader.is_synced)
    await create(stub, "last")
    await read_until(stream, reader, lambda: "last" in reader.jobs and reader.is_synced)
    assert reader.revisions == await listed(stub, OPEN)


async def prepare(stub):
    await create(stub, "other")
    await update(stub, "other", labels={"is": "closed"})
    for number in range(5):
        await create(stub, f"job-{number}")


def watched(stub, reader):
    return stub.WatchJobs(reader.begin(filter=OPEN, min_update_interval=NONE), timeout=15)


async def resumed(stub, reader, *changes):
    """Read to SYNCED, disconnect during changes, and resume."""
    stream = watched(stub, reader)
    await read_until(stream, reader, lambda: reader.is_synced)
    stream.cancel()
    for change in changes:
        await change(stub)
    return watched(stub, reader)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [1, 3])
def test_what_changes_while_a_page_is_read_is_sent(number, moment, change):
    async def scenario():
        store = PausedStore()
        async with serving(store) as stub:
            await prepare(stub)
            stop = store.stop_at("page", number, moment)
            reader = Reader()
            opening = asyncio.ensure_future(is_right(stub, watched(stub, reader), reader))
            await stop.reached.wait()
            await CHANGES[change](stub)
            stop.go_on.set()
            await opening

    run(scenario)


@pytest.mark.parametrize("again", CHANGES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_changes_while_a_reader_resumes_is_sent(moment, change, again):
    async def scenario():
        store = PausedStore()
        async with serving(store) as stub:
            await prepare(stub)
            stop = store.stop_at("replay", 1, moment)
            reader = Reader()
            resuming = asyncio.ensure_future(is_right(stub, await resumed(stub, reader, CHANGES[change]), reader))
            await stop.reached.wait()
            with contextlib.suppress(grpc.aio.AioRpcError):  # a deleted job cannot change again
                await CHANGES[again](stub)
            stop.go_on.set()
            await resuming
            assert reader.resets == 0

    run(scenario)


@pytest.mark.parametrize("with_token", [False, True])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_while_the_hub_takes_over_is_sent(change, moment, with_token):
    async def scenario():
        store = PausedStore()
        async with serving(store) as stub:
            await prepare(stub)
            reader = Reader()
            stream = await resumed(stub, reader) if with_token else None
            page, replay = store.stop_at("page", 2), store.stop_at("replay", 1, moment)
            reading = asyncio.ensure_future(is_right(stub, stream or watched(stub, reader), reader))
            await page.reached.wait()
            await update(stub, "job-1", progress=5)
            page.go_on.set()
            await replay.reached.wait()
            await CHANGES[change](stub)
            replay.go_on.set()
            await reading

    run(scenario)


def test_a_job_that_left_the_filter_and_changes_again_before_the_hub_reads_it_is_removed():
    async def scenario():
        store = PausedStore()
        async with serving(store) as stub:
            await prepare(stub)
            reader = Reader()
            stop = store.stop_at("feed")
            second = lambda stub: update(stub, "job-2", progress=2)  # noqa: E731
            stream = await resumed(stub, reader, CHANGES["stops matching"], lambda _: stop.reached.wait(), second)
            await read_until(stream, reader, lambda: reader.is_synced)
            await asyncio.sleep(0.05)
            stop.go_on.set()
            await read_until(stream, reader, lambda: "job-2" not in reader.jobs)
            await is_right(stub, stream, reader)

    run(scenario)


def test_an_older_change_that_the_hub_publishes_after_a_resume_is_not_sent():
    async def scenario():
        store = PausedStore()
        async with serving(store) as stub:
            await prepare(stub)
            reader = Reader()
            stop, next_stop = store.stop_at("feed", 1, "after"), store.stop_at("feed", 2)
            first = lambda stub: update(stub, "job-1", progress=2)  # noqa: E731
            changes = [first, CHANGES["changes"], lambda _: stop.reached.wait(), CHANGES["stops matching"]]
            stream = await resumed(stub, reader, *changes)
            await read_until(stream, reader, lambda: reader.is_synced)
            assert "job-2" not in reader.jobs
            stop.go_on.set()
            await next_stop.reached.wait()
            await listed(stub, OPEN)
            next_stop.go_on.set()
            await is_right(stub, stream, reader)

    run(scenario)


@pytest.mark.parametrize(("max_batches", "resets"), [(1, 1), (3, 0)])
def test_a_resume_reads_a_bounded_number_of_batches_of_foreign_changes(max_batches, resets, monkeypatch):
    monkeypatch.setattr(filter_watch, "MAX_BATCHES", max_batches)

    async def scenario():
        store = MemoryStore()
        async with serving(store) as stub:
            reader = Reader()
            for _ in range(2):
                stream = stub.WatchJobs(reader.begin(filter=pb.JobFilter(names=["mine"])), timeout=15)
                await read_until(stream, reader, lambda: reader.is_synced)
                stream.cancel()
                await store.commit([Create(id=f"{number}", name="foreign") for number in range(3000)])
            assert (reader.resets, reader.jobs) == (resets, {})

    run(scenario)


def test_a_resumed_reader_gets_changes_of_the_jobs_that_it_holds_and_no_others():
    async def scenario():
        async with serving(PausedStore()) as stub:
            await prepare(stub)
            reader = Reader()
            stream = await resumed(stub, reader)
            await read_until(stream, reader, lambda: reader.is_synced)
            await listed(stub, OPEN)
            await update(stub, "other", progress=1)
            await CHANGES["stops matching"](stub)
            message = await stream.read()
            assert events_of(message) == [(REMOVED, "job-2")]
            reader.take(message)
            await is_right(stub, stream, reader)

    run(scenario)


@pytest.mark.parametrize("with_token", [False, True])
def test_a_reader_gets_heartbeats_while_the_store_is_slow(with_token):
    async def scenario():
        store = PausedStore()
        async with serving(store) as stub:
            await prepare(stub)
            reader = Reader()
            if with_token:
                (await resumed(stub, reader)).cancel()
            stop = store.stop_at("page", 2)
            stream = stub.WatchJobs(reader.begin(filter=OPEN, heartbeat_interval=SECOND), timeout=15)
            if not with_token:
                reader.take(await stream.read())
            for _ in range(2):
                message: Any = await stream.read()
                assert events_of(message) == [(HEARTBEAT, "")]
                assert message.resume_token == reader.token
            stop.go_on.set()
            await is_right(stub, stream, reader)

    run(scenario)


class ReplaceableStore(PausedStore):
    """Becomes another incarnation, with fewer jobs, when a test replaces it."""

    def replace(self):
        before, self._feed = self._feed, Feed([new_epoch(0)])
        for key in list(self._jobs)[:2]:
            del self._jobs[key]
            self._order.remove(key)
        before.end()


@pytest.mark.parametrize("moment", ["synced", "amid snapshots", "amid resumption"])
def test_a_stream_begins_again_by_itself_when_the_store_is_replaced(moment, caplog):
    async def scenario():
        store = ReplaceableStore()
        async with serving(store) as stub:
            await prepare(stub)
            reader = Reader()
            if moment == "amid resumption":
                stream = await resumed(stub, reader)
            else:
                stream = watched(stub, reader)
            if moment == "synced":
                await read_until(stream, reader, lambda: reader.is_synced)
            else:
                stop = store.stop_at("page", 2, "after")
                await stop.reached.wait()
                stop.go_on.set()
            store.replace()
            await read_until(stream, reader, lambda: reader.resets > 0)
            await is_right(stub, stream, reader)
            assert reader.resets <= 2

    run(scenario)


@pytest.mark.parametrize("is_covered", [True, False])
def test_a_token_leads_to_reset_exactly_where_history_does_not_cover_it(is_covered):
    async def scenario():
        clock = StandingClock()
        store = MemoryStore(clock=clock, seconds=clock.seconds)
        async with serving(store) as stub:
            await prepare(stub)
            reader = Reader()
            if is_covered:
                await end(stub, "job-0")
            stream = watched(stub, reader)
            await read_until(stream, reader, lambda: reader.is_synced)
            stream.cancel()
            if not is_covered:
                await end(stub, "job-0")
            clock.advance(hours=25)
            while await store.trim(limit=100):
                pass
            stream = watched(stub, reader)
            first = await stream.read()
            assert events_of(first)[0][0] == RESET if not is_covered else events_of(first)[0][0] not in (RESET, REMOVED)
            reader.take(first)
            await is_right(stub, stream, reader)
            assert reader.resets == (not is_covered)

    run(scenario)


def test_watches_go_on_while_a_commit_is_slow():
    async def scenario():
        store = PausedStore()
        async with serving(store) as stub:
            await create(stub, "a")
            await create(stub, "b")
            watch: Any = stub.WatchJob(pb.WatchJobRequest(id="a", heartbeat_interval=SECOND))
            assert (await watch.read()).event.job.id == "a"
            slow = store.stop_at("commit")
            committing = asyncio.ensure_future(update(stub, "b", reason="slow"))
            await slow.reached.wait()
            assert (await watch.read()).event.type == HEARTBEAT
            opened: Any = stub.WatchJobs(pb.WatchJobsRequest())
            assert {event.job.id for event in (await opened.read()).events} == {"a", "b"}
            slow.go_on.set()
            await committing

    run(scenario)
