"""Three replicas on one database: updates on one reach watchers on the others, and of many racing calls one wins."""

from __future__ import annotations

import asyncio
import random
import statistics
import time

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import JobState
from jobstatus_grpc.client import JobChangeType
from tests.support.load import CUT_LISTENERS, Spread, Worker, background_tasks, connected_to, follow, replicas
from tests.support.service import read_refusal

pytestmark = pytest.mark.slow

UPDATES, UPDATES_IN_FULL = 2_000, 20_000
WATCHERS, WATCHERS_IN_FULL = 60, 300
WRITERS = 8
PINGS, PINGS_IN_FULL = 50, 500
CUTS, CUTS_IN_FULL = 3, 20
RACES, RACES_IN_FULL = 10, 200
RUNNERS = 16
REMOVALS = 20


async def report(worker, times):
    for _ in range(times):
        await worker.report()
    await worker.report(state=pb.JOB_STATE_SUCCEEDED)


@pytest.mark.timeout(600)
def test_watchers_on_three_replicas_see_the_end_of_jobs_that_are_written_through_all(postgres_url, is_full):
    updates, watchers = (UPDATES_IN_FULL, WATCHERS_IN_FULL) if is_full else (UPDATES, WATCHERS)

    async def scenario(servers):
        async with connected_to(servers) as (stubs, clients), background_tasks() as start:
            workers = [Worker(Spread(stubs), f"job-{number}") for number in range(WRITERS)]
            await asyncio.gather(*(worker.create() for worker in workers))
            watches = [
                start(follow(clients[number % len(clients)], workers[number % WRITERS].job_id))
                for number in range(watchers)
            ]
            began_at = time.perf_counter()
            await asyncio.gather(*(report(worker, updates // WRITERS - 1) for worker in workers))
            print(f"{updates / (time.perf_counter() - began_at):,.0f} updates a second")
            seen = await asyncio.gather(*watches)
            assert {(jobs[-1].state, jobs[-1].revision) for jobs in seen} == {
                (JobState.SUCCEEDED, updates // WRITERS + 1)
            }

    with replicas(postgres_url) as servers:
        asyncio.run(asyncio.wait_for(scenario(servers), 580))


@pytest.mark.parametrize("is_expiry", [False, True])
def test_watchers_on_another_replica_see_the_end_of_jobs_that_are_removed_at_once(postgres_url, is_expiry):
    async def follow_all(client, ids, synced):
        ended = set()
        async for change in client.watch_jobs():
            if change.type is JobChangeType.SYNCED:
                synced.set()
            if change.job is not None and change.job.done:
                ended.add(change.id)
            if change.type is JobChangeType.REMOVED:
                assert change.id in ended
                ids.discard(change.id)
            if not ids:
                return

    async def scenario(servers):
        async with connected_to(servers) as (_, (writer, reader, _)), background_tasks() as start:
            jobs = [await writer.create(state=JobState.IN_PROGRESS) for _ in range(REMOVALS)]
            watches = [start(follow(reader, job.id)) for job in jobs]
            synced = asyncio.Event()
            many = start(follow_all(reader, {job.id for job in jobs}, synced))
            await asyncio.wait_for(synced.wait(), 30)
            await asyncio.sleep(0.5)
            for job in jobs:
                await writer.update(job.id, state=JobState.SUCCEEDED)
                if not is_expiry:
                    await writer.delete(job.id)
            seen = await asyncio.wait_for(asyncio.gather(*watches), 30)
            assert {found[-1].state for found in seen} == {JobState.SUCCEEDED}
            await asyncio.wait_for(many, 30)

    with replicas(postgres_url, *(["--retention", "0s"] if is_expiry else [])) as servers:
        asyncio.run(asyncio.wait_for(scenario(servers), 90))


@pytest.mark.timeout(600)
def test_an_update_on_one_replica_reaches_a_watcher_on_another_at_once_or_by_polling(postgres, postgres_url, is_full):
    async def ping(writer, job_id, watch):
        began_at = time.perf_counter()
        reply = await writer.update(job_id, labels={"at": str(began_at)})
        while (await anext(watch)).revision < reply.revision:
            pass
        return (time.perf_counter() - began_at) * 1000

    async def scenario(servers):
        async with connected_to(servers) as (_, (writer, reader, bystander)), background_tasks() as start:
            job = await writer.create(state=JobState.IN_PROGRESS)
            other = await writer.create()
            others = [start(follow(bystander, other.id)) for _ in range(WATCHERS)]
            watch = reader.watch(job.id, min_update_interval_seconds=0)
            await anext(watch)
            times = [await ping(writer, job.id, watch) for _ in range(PINGS_IN_FULL if is_full else PINGS)]
            polled = []
            for _ in range(CUTS_IN_FULL if is_full else CUTS):
                await asyncio.to_thread(postgres.execute, CUT_LISTENERS)
                polled.append(await ping(writer, job.id, watch))
            await writer.cancel(other.id)
            await asyncio.gather(*others)
        percentiles = statistics.quantiles(times, n=100)
        print(f"update on one, watcher on another: p50 {percentiles[49]:.1f} ms, p99 {percentiles[98]:.1f} ms")
        print(f"without a notification: {', '.join(f'{time:.0f}' for time in polled)} ms")
        assert min(polled) < 400, "listening anew takes longer"
        assert percentiles[49] < (20 if is_full else 100)
        assert percentiles[98 if is_full else 94] < (150 if is_full else 1000)

    with replicas(postgres_url) as servers:
        asyncio.run(asyncio.wait_for(scenario(servers), 580))


async def raced(call, request):
    """Return None for the winning call, else the reason of its error."""
    try:
        await call(request, timeout=20)
    except grpc.aio.AioRpcError as error:
        return read_refusal(error).reason
    return None


def contests(job_id):
    """Yield a method, its losers' error, and the racing requests: to create a job, to change it, to claim it."""
    job = pb.JobStatus(id=job_id)
    names = [f"{job_id}-{number}" for number in range(RUNNERS)]
    yield (
        "CreateJob",
        "JOB_ALREADY_EXISTS",
        [pb.CreateJobRequest(job=job, request_id=f"create-{name}") for name in names],
    )
    changes = [pb.JobStatus(id=job_id, labels={"by": name}) for name in names]
    yield "UpdateJob", "REVISION_MISMATCH", [pb.UpdateJobRequest(job=job, expected_revision=1) for job in changes]
    claim = pb.JobStatus(id=job_id, state=pb.JOB_STATE_IN_PROGRESS)
    claims = [pb.UpdateJobRequest(job=claim, attempt=1, request_id=f"claim-{name}") for name in names]
    yield "UpdateJob", "STALE_ATTEMPT", claims


@pytest.mark.timeout(600)
def test_of_sixteen_racing_calls_through_three_replicas_exactly_one_wins(postgres_url, is_full, record_fault):
    races = RACES_IN_FULL if is_full else RACES

    async def race(stubs, method, requests, loss):
        calls = [raced(getattr(stubs[n % len(stubs)], method), request) for n, request in enumerate(requests)]
        results = await asyncio.gather(*calls)
        assert sorted(results, key=str) == sorted([None] + [loss] * (RUNNERS - 1), key=str)

    async def scenario(servers):
        chance = random.Random(1)
        async with connected_to(servers) as (stubs, _):
            for number in range(races):
                chance.shuffle(stubs)
                job_id = f"job-{number}"
                for method, loss, requests in contests(job_id):
                    await race(stubs, method, requests, loss)
                assert (await stubs[0].GetJob(pb.GetJobRequest(id=job_id))).job.revision == 3

    with replicas(postgres_url) as servers:
        asyncio.run(asyncio.wait_for(scenario(servers), 580))
    record_fault(
        f"none: {RUNNERS} calls race through three replicas to create, change and claim a job",
        count=3 * races,
        checked="the result of each call",
        result="one winner each",
    )
