"""The database dies, and its synchronous standby takes over."""

from __future__ import annotations

import asyncio
import contextlib
import random

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.job import Job
from jobstatus_grpc.stores.postgres import commits
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.support.judged import judged_under_faults
from tests.support.load import background_tasks, connected_to, replicas, until_answered
from tests.support.postgres import PostgresCluster
from tests.support.service import read_refusal
from tests.support.stores import claim, settled
from tests.support.watch_jobs import Reader

pytestmark = pytest.mark.slow

FAILOVERS, FAILOVERS_IN_FULL = 1, 10
PATIENCE_SECONDS = 10.0
LAST = "the-last"


def url_of_both(primary, standby):
    where, _, database = primary.url(primary.create_database()).rpartition("/")
    return f"{where},127.0.0.1:{standby.port}/{database}?target_session_attrs=read-write"


async def watch_job(stub, job_id):
    """Watch until the stream ends, and return its error."""
    try:
        async for _ in stub.WatchJob(pb.WatchJobRequest(id=job_id), timeout=120):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), read_refusal(error).reason


async def read_on(stub, reader):
    """Follow all jobs until the last is among them, with the last token after each end of the stream."""
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for message in stub.WatchJobs(reader.begin(), wait_for_ready=True):
                reader.take(message)
                if reader.is_synced and LAST in reader.jobs:
                    return
        await asyncio.sleep(0.05)


async def fail_over(servers, primary, standby, chance):
    reader = Reader()

    async def promote():
        await asyncio.to_thread(primary.kill)
        await asyncio.sleep(chance.uniform(0, 0.5))
        await asyncio.to_thread(standby.promote)
        for stub in stubs:
            await until_answered(stub.CreateJob, pb.CreateJobRequest(job=pb.JobStatus(name="after")))

    async with connected_to(servers) as (stubs, _), background_tasks() as start:
        job = (await stubs[0].CreateJob(pb.CreateJobRequest(job=pb.JobStatus(id="watched")))).job
        watch = start(watch_job(stubs[1], job.id))
        reading = start(read_on(stubs[2], reader))
        judged = await judged_under_faults(
            [server.address for server in servers],
            promote,
            times=1,
            pause=lambda: chance.uniform(0.3, 1),
            seed=chance.randrange(1000),
            patience_seconds=PATIENCE_SECONDS,
        )
        assert await watch == (grpc.StatusCode.UNAVAILABLE, "STORE_CHANGED")
        await stubs[0].CreateJob(pb.CreateJobRequest(job=pb.JobStatus(id=LAST)))
        await asyncio.wait_for(reading, 20)
        assert reader.resets == 1
        listed = await stubs[0].ListJobs(pb.ListJobsRequest(page_size=1000))
        revisions = {job.id: job.revision for job in listed.jobs}
        while listed.next_page_token:
            request = pb.ListJobsRequest(page_size=1000, page_token=listed.next_page_token)
            listed = await stubs[0].ListJobs(request)
            revisions |= {job.id: job.revision for job in listed.jobs}
        assert reader.revisions == revisions
        return judged


@pytest.mark.timeout(900)
def test_a_failover_loses_nothing_acknowledged_and_watchers_of_many_see_a_reset(
    postgres, postgres_home, is_full, record_fault
):
    chance, acknowledged = random.Random(1), 0
    times = FAILOVERS_IN_FULL if is_full else FAILOVERS
    for _ in range(times):
        with PostgresCluster(postgres.version, postgres_home) as primary:
            standby = primary.standby()
            with replicas(url_of_both(primary, standby)) as servers:
                judged = asyncio.run(asyncio.wait_for(fail_over(servers, primary, standby, chance), 100))
                acknowledged += judged.acknowledged
    record_fault(
        "failover to a synchronous standby",
        count=times,
        checked=f"{acknowledged:,} acknowledged writes",
        result="none lost, no violation; watches of many jobs get RESET",
    )


_WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
_CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@pytest.mark.parametrize(("is_cut", "returns"), [(False, False), (True, False), (True, True)])
def test_a_write_is_acknowledged_only_once_the_standby_has_it(new_postgres, is_cut, returns, monkeypatch):
    standby = new_postgres.standby()
    if returns:  # which takes longer on a busy machine
        monkeypatch.setattr(commits, "CALL_SECONDS", 30.0)

    async def scenario():
        store = await PostgresStore.open(url_of_both(new_postgres, standby))
        await store.position()
        await asyncio.to_thread(standby.kill)
        writing = asyncio.ensure_future(settled(store.commit([claim("job", allow_missing=True)])))
        while not await asyncio.to_thread(new_postgres.execute, _WAITING):
            assert not writing.done(), writing
        if returns:
            await asyncio.to_thread(standby.start)
        if is_cut:
            await asyncio.to_thread(new_postgres.execute, _CUT)
        with contextlib.nullcontext() if returns else pytest.raises(StoreUnavailableError):
            assert isinstance((await writing)[0], Job)
        await store.close()

    asyncio.run(asyncio.wait_for(scenario(), 50))
