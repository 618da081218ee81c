"""Many watches of one job at once: none of them misses the end."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

WATCHES = 1000
NONE = duration_pb2.Duration()


def on(service, scenario):
    """Run a scenario with an asyncio stub, within half a minute."""

    async def run():
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(service.address, options=options) as channel:
            return await asyncio.wait_for(scenario(JobStatusServiceStub(channel)), 30)

    return asyncio.run(run())


async def jobs_of(stub, job_id, **fields):
    return [message.event.job async for message in stub.WatchJob(pb.WatchJobRequest(id=job_id, **fields))]


def end_of(job_id, update_of):
    return update_of(job_id, state="JOB_STATE_SUCCEEDED")


@pytest.mark.parametrize("position", ["before", "amid", "after"])
def test_1000_watches_opened_with_the_final_update_all_see_the_end(sqlite_service, update_of, new_id, position):
    job = sqlite_service.job_in("IN_PROGRESS", id=new_id())
    place = {"before": 0, "amid": WATCHES // 2, "after": WATCHES}[position]

    async def scenario(stub):
        calls = [jobs_of(stub, job.id) for _ in range(WATCHES)]
        calls.insert(place, stub.UpdateJob(end_of(job.id, update_of)))
        answers = await asyncio.gather(*calls)
        return answers[place].job, answers[:place] + answers[place + 1 :]

    end, watches = on(sqlite_service, scenario)
    assert [jobs[-1] for jobs in watches] == [end] * WATCHES
    assert {len(jobs) for jobs in watches} <= {1, 2}


def test_1000_watchers_of_a_burst_of_progress_all_get_the_end(sqlite_service, update_of, new_id):
    job = sqlite_service.job_in("IN_PROGRESS", id=new_id())

    async def scenario(stub):
        watches = [asyncio.ensure_future(jobs_of(stub, job.id)) for _ in range(WATCHES)]
        for progress in range(1, 51):
            await stub.UpdateJob(update_of(job.id, progress=progress))
        reply = await stub.UpdateJob(end_of(job.id, update_of))
        return reply.job, await asyncio.gather(*watches)

    end, watches = on(sqlite_service, scenario)
    for jobs in watches:
        assert jobs[-1] == end
        assert [job.revision for job in jobs] == sorted({job.revision for job in jobs})


def test_1000_watchers_of_1000_jobs_each_see_their_own_end(service, update_of, new_id):
    ids = [new_id() for _ in range(WATCHES)]

    async def scenario(stub):
        for start in range(0, WATCHES, 500):
            updates = [update_of(job_id, allow_missing=True) for job_id in ids[start : start + 500]]
            await stub.BatchUpdateJobs(pb.BatchUpdateJobsRequest(updates=updates))
        watches = [asyncio.ensure_future(jobs_of(stub, job_id)) for job_id in ids]
        for start in range(0, WATCHES, 500):
            updates = [
                update_of(job_id, reason=job_id, state="JOB_STATE_FAILED") for job_id in ids[start : start + 500]
            ]
            await stub.BatchUpdateJobs(pb.BatchUpdateJobsRequest(updates=updates))
        return await asyncio.gather(*watches)

    for job_id, jobs in zip(ids, on(service, scenario), strict=True):
        assert (jobs[-1].id, jobs[-1].reason, jobs[-1].done) == (job_id, job_id, True)


def test_watches_that_come_and_go_during_changes_show_the_newest_of_their_time(any_service, update_of, new_id):
    job = any_service.job_in("IN_PROGRESS", id=new_id())

    async def follow(stub):
        call = stub.WatchJob(pb.WatchJobRequest(id=job.id, min_update_interval=NONE))
        known = (await stub.GetJob(pb.GetJobRequest(id=job.id))).job.revision
        revisions = []
        async for message in call:
            revisions.append(message.event.job.revision)
            if len(revisions) >= 3 and revisions[-1] >= known:
                call.cancel()
                break
        return revisions

    async def scenario(stub):
        followers = []
        for number in range(100):
            followers.append(asyncio.ensure_future(follow(stub)))
            await stub.UpdateJob(update_of(job.id, labels={"n": str(number)}))
        await stub.UpdateJob(end_of(job.id, update_of))
        return await asyncio.gather(*followers)

    for revisions in on(any_service, scenario):
        assert revisions == sorted(set(revisions))
