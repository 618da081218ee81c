"""Watches that are opened and cancelled at every stage leave nothing behind."""

from __future__ import annotations

import asyncio
import random

import grpc
import psutil
import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from tests.support.servers import ServerProcess

WATCHES, WATCHES_IN_FULL = 4_000, 100_000
WARM_UP_WATCHES, WARM_UP_WATCHES_IN_FULL = 6_000, 20_000
"""Until the allocator has what it keeps."""
AT_ONCE = 40
JOBS = 20
MAX_BYTES_EACH = 30
MAX_NOISE_BYTES = 2 * 1024 * 1024
"""The memory of a process varies by this, which counts in a short run."""
NONE = duration_pb2.Duration()


async def open_and_cancel(stub, chance):
    """Open a watch of one job or of many, and cancel it: at once, while it opens, after its messages, or amid them."""
    job_id = f"job-{chance.randrange(JOBS)}"
    if chance.random() < 0.3:
        stream = stub.WatchJobs(pb.WatchJobsRequest(filter=pb.JobFilter(ids=[job_id]), min_update_interval=NONE))
    else:
        stream = stub.WatchJob(pb.WatchJobRequest(id=job_id, min_update_interval=NONE))
    stage = chance.randrange(5)
    if stage == 1:
        await asyncio.sleep(0)
    elif stage == 2:
        await asyncio.sleep(chance.uniform(0, 0.01))
    elif stage >= 3:
        await stream.read()
    if stage == 4:  # while the next message is sent
        await stub.UpdateJob(pb.UpdateJobRequest(job=pb.JobStatus(id=job_id, reason=str(chance.random()))))
    stream.cancel()


async def churn(address, watches, seed):
    """Open and cancel `watches` watches, a number of them at once."""
    numbers = iter(range(watches))

    async def some(stub, chance):
        for _ in numbers:
            try:
                await open_and_cancel(stub, chance)
            except grpc.aio.AioRpcError as error:  # HTTP/2 in Rust ends a connection after too many resets
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise

    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = JobStatusServiceStub(channel)
        await asyncio.gather(*(some(stub, random.Random(f"{seed} {number}")) for number in range(AT_ONCE)))


async def create_jobs(address):
    async with grpc.aio.insecure_channel(address) as channel:
        for number in range(JOBS):
            job = pb.JobStatus(id=f"job-{number}", state=pb.JOB_STATE_IN_PROGRESS)
            await JobStatusServiceStub(channel).CreateJob(pb.CreateJobRequest(job=job))


async def kept_by(server, watches, warm_up):
    """Return by how many bytes a server has grown."""
    await create_jobs(server.address)
    await churn(server.address, warm_up, 1)
    process = psutil.Process(server.pid)
    before = process.memory_info().rss
    await churn(server.address, watches, 2)
    return process.memory_info().rss - before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_watches_that_were_cancelled_keep_no_memory(transport, is_full, record_fault):
    watches, warm_up = (WATCHES_IN_FULL, WARM_UP_WATCHES_IN_FULL) if is_full else (WATCHES, WARM_UP_WATCHES)
    # No more would be admitted if the watches before had not freed their places.
    with ServerProcess("--transport", transport, "--max-watchers", str(4 * AT_ONCE)) as server:
        kept = asyncio.run(kept_by(server, watches, warm_up))
    result = f"{kept / watches:.0f} bytes kept of each"
    if is_full and transport == "grpcio":
        with ServerProcess(program=("-m", "tests.faults.bare_server")) as bare:
            of_grpcio = asyncio.run(kept_by(bare, watches, warm_up))
        result += f", {of_grpcio / watches:.0f} of them by bare grpc.aio handlers"
        kept -= of_grpcio
    assert kept <= MAX_BYTES_EACH * watches + (0 if is_full else MAX_NOISE_BYTES)
    record_fault(
        "watches opened and cancelled at every stage",
        count=watches,
        checked="the memory of the server",
        result=result,
    )
