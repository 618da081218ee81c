"""Readers that are slow or never read, beside a thousand others: these get each change, and updates stay fast."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.client.endpoint import Endpoint
from jobstatus_grpc.verify import checker
from jobstatus_grpc.verify.recorder import Recorder
from tests.support.load import background_tasks
from tests.support.servers import ServerProcess

JOBS = 10
READERS, SLOW, DEAF, SECONDS = 100, 20, 20, 3
READERS_IN_FULL, SLOW_IN_FULL, DEAF_IN_FULL, SECONDS_IN_FULL = 1000, 200, 20, 60
PATIENCE_SECONDS = 2.0
REASON = "x" * 4000
"""Large, so that messages that are not read soon fill the buffers."""


async def read_slowly(stub, job_id):
    """Read a message a second, and return the last."""
    async for message in stub.WatchJob(watch_of(job_id)):
        last = message.event.job
        if not last.done:
            await asyncio.sleep(1)
    return last


def watch_of(job_id):
    return pb.WatchJobRequest(id=job_id, min_update_interval=duration_pb2.Duration())


async def load(address, readers, slow, deaf, seconds):
    """Update jobs that are watched; return the recorder, the times of updates, and what slow readers read last."""
    endpoints = [Endpoint(address)] * (JOBS + 2)
    took: list[float] = []
    async with Recorder(endpoints, timeout_seconds=20) as recorder, contextlib.AsyncExitStack() as stack:
        start = await stack.enter_async_context(background_tasks())
        for number in range(JOBS):
            job = pb.JobStatus(id=f"job-{number}", state=pb.JOB_STATE_IN_PROGRESS)
            await recorder.call("CreateJob", pb.CreateJobRequest(job=job))
        stub = recorder._stubs[JOBS]
        reading = [start(read_slowly(stub, f"job-{number % JOBS}")) for number in range(slow)]
        for number in range(deaf):
            request = watch_of(f"job-{number % JOBS}")
            await stack.enter_async_context(recorder.stalled("WatchJob", request, server=JOBS + 1))
        streams = [
            await stack.enter_async_context(
                recorder.watch("WatchJob", watch_of(f"job-{number % JOBS}"), server=number % JOBS)
            )
            for number in range(readers)
        ]
        ends_at = time.monotonic() + seconds
        while (left := ends_at - time.monotonic()) > 0:
            for number in range(JOBS):
                job = pb.JobStatus(id=f"job-{number}", reason=f"{len(took)} {REASON}")
                entry = await recorder.call("UpdateJob", pb.UpdateJobRequest(job=job))
                took.append(entry.ended_at - entry.started_at)
            await asyncio.sleep(min(0.5, left))
        for number in range(JOBS):
            job = pb.JobStatus(id=f"job-{number}", state=pb.JOB_STATE_SUCCEEDED)
            assert (await recorder.call("UpdateJob", pb.UpdateJobRequest(job=job))).code == "OK"
        for stream in streams:
            await asyncio.wait_for(stream.ended.wait(), 20)
        last = await asyncio.wait_for(asyncio.gather(*reading), 60)
    return recorder, took, last


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_readers_get_each_change_beside_slow_and_deaf_ones(transport, tmp_path, is_full, record_fault):
    counts = (
        (READERS_IN_FULL, SLOW_IN_FULL, DEAF_IN_FULL, SECONDS_IN_FULL) if is_full else (READERS, SLOW, DEAF, SECONDS)
    )
    with ServerProcess("--transport", transport, store=f"sqlite:///{tmp_path}/jobs.db") as server:
        recorder, took, last = asyncio.run(load(server.address, *counts))
    assert checker.check(recorder.entries, patience_seconds=PATIENCE_SECONDS) == []
    assert all(job.done for job in last)
    assert max(took) < PATIENCE_SECONDS
    readers, slow, deaf, _ = counts
    streams = [entry for entry in recorder.entries if entry.method == "WatchJob"]
    assert {(entry.code, entry.responses[-1][1].event.job.done) for entry in streams} == {("OK", True)}
    record_fault(
        f"{slow} readers of a message a second and {deaf} that never read, beside {readers:,} others",
        count=len(took),
        checked=f"{sum(len(entry.responses) for entry in streams):,} messages to the {readers:,}",
        result="no violation, and each slow reader got the end",
    )
