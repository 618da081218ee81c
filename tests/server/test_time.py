"""Stalled jobs, retention, and many jobs that are due at once, through the API."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job import Create, JobState
from tests.support.servers import serving
from tests.support.sqlite import open_at
from tests.support.stores import TIMEOUT, StandingClock, done
from tests.support.timing import MAX_PAUSE_SECONDS, rerun_after_pause

SECOND = Duration(seconds=1)


def event_where(service, job_id, is_wanted) -> pb.JobStatus:
    """Watch a job until it meets a condition."""
    stream = service.watch(job_id)
    try:
        return next(message.event.job for message in stream if is_wanted(message.event.job))
    finally:
        stream.cancel()


def test_a_job_whose_worker_died_says_so_and_its_next_update_clears_it(any_service, new_id):
    job = any_service.create(id=new_id(), state="JOB_STATE_IN_PROGRESS", heartbeat_timeout=SECOND)
    stalled = event_where(any_service, job.id, lambda job: job.stalled)
    assert (stalled.state, stalled.revision) == (pb.JOB_STATE_IN_PROGRESS, 2)
    updated = any_service.update(job.id)
    assert (updated.stalled, updated.revision) == (False, 3)


@rerun_after_pause(0.5)
def test_heartbeats_keep_a_job_from_stalling_and_change_nothing(any_service, new_id):
    job = any_service.create(id=new_id(), state="JOB_STATE_IN_PROGRESS", heartbeat_timeout=SECOND)
    ends_at = time.monotonic() + 2
    while time.monotonic() < ends_at:
        any_service.update(job.id)
    heard = any_service.get(job.id)
    assert heard.last_heartbeat_at.ToDatetime() > job.last_heartbeat_at.ToDatetime() + timedelta(seconds=1)
    heard.last_heartbeat_at.CopyFrom(job.last_heartbeat_at)
    assert heard == job


def test_a_heartbeat_is_in_the_snapshots_of_watches_and_in_lists(any_service, new_id):
    job = any_service.create(id=new_id(), state="JOB_STATE_IN_PROGRESS", heartbeat_timeout=Duration(seconds=60))
    earlier = any_service.watch(job.id)
    assert next(earlier).event.job == job
    any_service.update(job.id)
    heard = any_service.get(job.id)
    listed = any_service.stub.ListJobs(pb.ListJobsRequest(filter=pb.JobFilter(ids=[job.id])), timeout=20).jobs
    later = any_service.watch(job.id)
    snapshot = next(later).event.job
    earlier.cancel()
    later.cancel()
    assert heard.last_heartbeat_at.ToNanoseconds() > job.last_heartbeat_at.ToNanoseconds()
    assert [snapshot, *listed] == [heard, heard]


def test_a_job_that_stays_stalled_fails_if_the_server_is_configured_so(serve):
    service = serve("--fail-stalled-after", "1s")
    job = service.create(state="JOB_STATE_IN_PROGRESS", heartbeat_timeout=SECOND)
    failed = event_where(service, job.id, lambda job: job.done)
    assert (failed.state, failed.error.code) == (pb.JOB_STATE_FAILED, grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    assert failed.error.reason == "STALLED"
    history = service.stub.ListJobTransitions(pb.ListJobTransitionsRequest(id=job.id), timeout=20).transitions
    assert [entry.actor for entry in history][-1] == "server"


def test_a_done_job_expires_after_the_configured_retention(serve, refused):
    service = serve("--retention", "1s")
    job = service.job_in("SUCCEEDED")
    assert job.expires_at.ToDatetime() - job.finished_at.ToDatetime() == timedelta(seconds=1)
    deadline = time.monotonic() + 20
    while service.stub.ListJobs(pb.ListJobsRequest(), timeout=20).jobs:
        assert time.monotonic() < deadline
    assert refused(service.get, job.id).kind == ("NOT_FOUND", "JOB_EXPIRED")


async def until_stalled(store, count) -> None:
    position = await store.position()
    stalled: set[str] = set()
    while len(stalled) < count:
        batch = await store.changes(position)
        position = batch.position
        stalled.update(change.id for change in batch.changes if change.job is not None and change.job.stalled)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_20_000_jobs_that_are_due_at_once_do_not_hold_up_updates(tmp_path):
    clock, count = StandingClock(), 20_000

    async def main() -> list[float]:
        store = await open_at(tmp_path / "jobs.db", clock)
        ids = [f"{number}" for number in range(count)]
        for first in range(0, count, 1000):
            chunk = ids[first : first + 1000]
            await done(
                store,
                *(Create(id=name, heartbeat_timeout=TIMEOUT, state=JobState.IN_PROGRESS) for name in chunk),
            )
        await done(store, Create(id="mine"))
        seconds: list[float] = []
        async with serving(store) as stub:
            all_stalled = asyncio.create_task(until_stalled(store, count))
            clock.advance(seconds=30)
            while not all_stalled.done():
                clock.advance(seconds=1)  # stall clocks restart if this machine pauses
                began_at = time.perf_counter()
                job = pb.JobStatus(id="mine", progress=len(seconds) % 100, reason=f"{len(seconds)}")
                await stub.UpdateJob(pb.UpdateJobRequest(job=job), timeout=20)
                seconds.append(time.perf_counter() - began_at)
        await store.close()
        return sorted(seconds)

    latencies = asyncio.run(main())
    print(f"{len(latencies)} updates, median {latencies[len(latencies) // 2]:.4f} s, longest {latencies[-1]:.4f} s")
    assert len(latencies) > 100
    assert latencies[len(latencies) // 2] < 0.1
    assert latencies[-1] < 2 + MAX_PAUSE_SECONDS
