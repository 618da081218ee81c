"""Races that a client cannot force: changes between a watch's steps, and stores that fail."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import StoreChangedError, StoreUnavailableError
from jobstatus_grpc.stores.memory import MemoryStore
from tests.support.loop import run
from tests.support.servers import serving

SNAPSHOT, UPDATED = pb.JOB_EVENT_TYPE_SNAPSHOT, pb.JOB_EVENT_TYPE_UPDATED


async def running_job(stub, job_id="a"):
    request = pb.CreateJobRequest(job=pb.JobStatus(id=job_id, state=pb.JOB_STATE_IN_PROGRESS))
    return (await stub.CreateJob(request)).job


async def update(stub, job_id="a", **fields):
    return (await stub.UpdateJob(pb.UpdateJobRequest(job=pb.JobStatus(id=job_id, **fields)))).job


async def read_to_the_end(stream, note=lambda: None):
    """Return the events of a stream; `note` is called with each."""
    events = []
    async for message in stream:
        events.append(message.event)
        note()
    return events


async def end_of(events):
    """The last job of a stream that ended with OK, or "call again" after a retryable error."""
    try:
        return (await events)[-1].job
    except grpc.aio.AioRpcError as error:
        return "call again" if error.code() is grpc.StatusCode.UNAVAILABLE else error


class SlowToRead(MemoryStore):
    """Returns a job some time after it has read it."""

    def __init__(self):
        super().__init__()
        self.go_on = asyncio.Event()
        self.has_read = asyncio.Event()

    async def get(self, tenant, job_id, *, only=None):
        job = await super().get(tenant, job_id)
        self.has_read.set()
        await self.go_on.wait()
        return job


@pytest.mark.parametrize("state", [pb.JOB_STATE_IN_PROGRESS, pb.JOB_STATE_FAILED])
def test_what_changes_while_a_watch_reads_its_job_is_not_missed(state):
    async def scenario():
        store = SlowToRead()
        async with serving(store) as stub:
            await running_job(stub)
            stream = stub.WatchJob(pb.WatchJobRequest(id="a"))
            events = asyncio.ensure_future(read_to_the_end(stream))
            await store.has_read.wait()
            job = await update(stub, state=state, labels={"a": "b"})
            store.go_on.set()
            if state == pb.JOB_STATE_IN_PROGRESS:
                job = await update(stub, state=pb.JOB_STATE_SUCCEEDED)
            seen = await events
            assert seen[0].type == SNAPSHOT
            assert seen[-1].job == job
            assert [event.job.revision for event in seen] == sorted({event.job.revision for event in seen})

    run(scenario)


class InterruptedFeed(MemoryStore):
    """Its feed raises `error` once for each change."""

    def __init__(self, error):
        super().__init__()
        self._error = error
        self._failed_at = ""

    async def changes(self, after, *, up_to=None):
        batch = await super().changes(after, up_to=up_to)
        if after != self._failed_at:
            self._failed_at = after
            raise self._error("a failure of this test")
        return batch


@pytest.mark.parametrize("error", [StoreUnavailableError, ZeroDivisionError])
def test_a_watch_outlives_an_interruption_of_the_feed_or_ends_with_a_retry_delay(caplog, error):
    async def scenario():
        async with serving(InterruptedFeed(error)) as stub:
            await running_job(stub)
            stream = stub.WatchJob(pb.WatchJobRequest(id="a", min_update_interval=duration_pb2.Duration()), timeout=5)
            events = asyncio.ensure_future(read_to_the_end(stream))
            for number in range(3):
                await update(stub, labels={"n": str(number)})
            job = await update(stub, state=pb.JOB_STATE_SUCCEEDED)
            assert await end_of(events) in (job, "call again")

    run(scenario)
    assert caplog.records


class ReplacedStore(MemoryStore):
    """Becomes another incarnation when a test replaces it."""

    def __init__(self):
        super().__init__()
        self.replaced = asyncio.Event()

    async def changes(self, after, *, up_to=None):
        changes = asyncio.ensure_future(super().changes(after, up_to=up_to))
        replaced = asyncio.ensure_future(self.replaced.wait())
        try:
            await asyncio.wait((changes, replaced), return_when=asyncio.FIRST_COMPLETED)
            if self.replaced.is_set():
                self.replaced.clear()
                raise StoreChangedError
            return await changes
        finally:
            changes.cancel()
            replaced.cancel()


def test_watches_end_when_the_store_is_replaced_and_go_on_when_called_again(refusal, caplog):
    async def scenario():
        store = ReplacedStore()
        async with serving(store) as stub:
            await running_job(stub)
            streams = [stub.WatchJob(pb.WatchJobRequest(id="a")) for _ in range(10)]
            for stream in streams:
                await stream.read()
            store.replaced.set()
            for stream in streams:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stream.read()
                error = refusal(caught.value)
                assert error.kind == ("UNAVAILABLE", "STORE_CHANGED")
                assert error.retry_seconds > 0
            again = asyncio.ensure_future(read_to_the_end(stub.WatchJob(pb.WatchJobRequest(id="a"))))
            job = await update(stub, state=pb.JOB_STATE_SUCCEEDED)
            assert (await again)[-1].job == job

    run(scenario)


class SlowlyReplacedStore(ReplacedStore):
    """Fails to return its position once it is replaced, and is slow after that."""

    def __init__(self):
        super().__init__()
        self.failures = 0
        self.is_asked = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def position(self):
        self.is_asked.set()
        await self.go_on.wait()
        if self.failures:
            self.failures -= 1
            raise StoreUnavailableError("a failure of this test")
        return await super().position()


async def end_seen(stub):
    """Follow the job to its end, and call again after a retryable error, as a client does."""
    while True:
        try:
            return (await read_to_the_end(stub.WatchJob(pb.WatchJobRequest(id="a"), timeout=5)))[-1].job
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise


@pytest.mark.parametrize("failures", [0, 2])
def test_no_end_is_missed_while_the_server_finds_its_place_in_another_store(caplog, failures):
    async def scenario():
        store = SlowlyReplacedStore()
        async with serving(store) as stub:
            await running_job(stub)
            old = asyncio.ensure_future(end_seen(stub))
            store.is_asked.clear()
            store.go_on.clear()
            store.failures = failures
            store.replaced.set()
            await store.is_asked.wait()
            opened = asyncio.Event()
            new = asyncio.ensure_future(
                read_to_the_end(stub.WatchJob(pb.WatchJobRequest(id="a"), timeout=5), opened.set)
            )
            await opened.wait()
            job = await update(stub, state=pb.JOB_STATE_SUCCEEDED)
            store.go_on.set()
            assert await old == job
            assert await end_of(new) in (job, "call again")

    run(scenario)


class ClosedStore(MemoryStore):
    """Is unavailable while `is_gone`."""

    is_gone = False

    async def get(self, tenant, job_id, *, only=None):
        if self.is_gone:
            raise StoreUnavailableError
        return await super().get(tenant, job_id)

    async def commit(self, commands):
        if self.is_gone:
            raise StoreUnavailableError
        return await super().commit(commands)

    @property
    def writable(self):
        return not self.is_gone


def test_a_store_that_cannot_be_reached_is_unavailable_to_every_call(refusal):
    async def scenario():
        store = ClosedStore()
        async with serving(store) as stub:
            await running_job(stub)
            stream = stub.WatchJob(pb.WatchJobRequest(id="a"))
            await stream.read()
            store.is_gone = True
            calls: list[Any] = [
                stub.CreateJob(pb.CreateJobRequest()),
                stub.GetJob(pb.GetJobRequest(id="a")),
                stub.UpdateJob(pb.UpdateJobRequest(job=pb.JobStatus(id="a", reason="x"))),
                stub.BatchUpdateJobs(
                    pb.BatchUpdateJobsRequest(updates=[pb.UpdateJobRequest(job=pb.JobStatus(id="a"))])
                ),
                stub.CancelJob(pb.CancelJobRequest(id="a")),
                read_to_the_end(stub.WatchJob(pb.WatchJobRequest(id="a"))),
            ]
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                error = refusal(caught.value)
                assert error.kind == ("UNAVAILABLE", "STORE_UNAVAILABLE")
                assert error.retry_seconds > 0
            store.is_gone = False
            job = await update(stub, state=pb.JOB_STATE_SUCCEEDED)
            message: Any = await stream.read()
            assert message.event.job == job

    run(scenario)
