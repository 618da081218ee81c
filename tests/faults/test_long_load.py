"""A long time under load: no call fails, every watch reaches the end, and memory does not grow."""

from __future__ import annotations

import asyncio
import random
import time

import psutil
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from tests.support.load import background_tasks, connected, follow
from tests.support.servers import ServerProcess

SECONDS, SECONDS_IN_FULL = 6, 300
JOBS, WATCHERS_OF_EACH, COMERS = 50, 4, 20
MAX_GROWTH_BYTES = 16 * 1024 * 1024


async def report(stub, job_id, until):
    """Report as fast as answers come, then the end; return the number of reports."""
    sent = 0
    while time.monotonic() < until:
        sent += 1
        job = pb.JobStatus(id=job_id, progress=100 * (1 - 0.999**sent), reason=f"step {sent}")
        await stub.UpdateJob(pb.UpdateJobRequest(job=job, attempt=1), timeout=30)
    end = pb.JobStatus(id=job_id, state=pb.JOB_STATE_SUCCEEDED)
    reply = await stub.UpdateJob(pb.UpdateJobRequest(job=end, attempt=1), timeout=30)
    assert reply.job.revision == sent + 2
    return sent


async def come_and_go(stub, chance, until):
    """Open watches, and cancel them after a message or two."""
    while time.monotonic() < until:
        call = stub.WatchJob(pb.WatchJobRequest(id=f"job-{chance.randrange(JOBS)}"))
        for _ in range(chance.randrange(1, 3)):
            await call.read()
        call.cancel()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_load_no_call_fails_and_memory_does_not_grow(tmp_path, is_full, transport, record_fault):
    flags = ("--transport", transport, "--log-level", "warning")
    with ServerProcess(*flags, store=f"sqlite:///{tmp_path}/jobs.db") as server:
        seconds = SECONDS_IN_FULL if is_full else SECONDS
        sent, grown = asyncio.run(_load(server, seconds))
    record_fault(
        f"none: {JOBS} workers that never pause, for {seconds} s",
        count=1,
        checked=f"{sent:,} updates, {JOBS * WATCHERS_OF_EACH} watches to the end",
        result=f"no call failed, the memory of the server grew by {grown / 1e6:.1f} MB",
    )


async def _load(server, seconds):
    process = psutil.Process(server.pid)
    async with connected(server.address) as (stub, client), background_tasks() as start:
        for number in range(JOBS):
            job = pb.JobStatus(id=f"job-{number}", state=pb.JOB_STATE_IN_PROGRESS)
            await stub.CreateJob(pb.CreateJobRequest(job=job), timeout=30)
        began = time.monotonic()
        watches = [start(follow(client, f"job-{number}")) for number in range(JOBS) for _ in range(WATCHERS_OF_EACH)]
        workers = [start(report(stub, f"job-{number}", began + seconds)) for number in range(JOBS)]
        comers = [start(come_and_go(stub, random.Random(seed), began + seconds)) for seed in range(COMERS)]
        await asyncio.sleep(seconds / 3)
        before = process.memory_info().rss
        sent = await asyncio.gather(*workers)
        grown = process.memory_info().rss - before
        await asyncio.gather(*comers)
        for jobs in await asyncio.gather(*watches):
            assert jobs[-1].done
    print(f"{sum(sent) / seconds:.0f} updates a second, memory grew by {grown / 1e6:.1f} MB from {before / 1e6:.0f} MB")
    assert grown < MAX_GROWTH_BYTES
    return sum(sent), grown
