"""A thousand watchers of different filters beside a thousand changing jobs: what they see is fresh."""

from __future__ import annotations

import asyncio
import itertools
import time
from datetime import timezone

import grpc
import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub

from tests.reader import SYNCED

COUNT = 1000
BATCH = 500
CHANGES = 2000
CALLERS = 4
NONE = duration_pb2.Duration()


def filter_of(number):
    """A filter that only one job matches, or beside it a few that are like it."""
    kinds = [
        pb.JobFilter(ids=[f"job-{number}"]),
        pb.JobFilter(labels={"n": str(number)}),
        pb.JobFilter(names=[f"name-{number}"]),
        pb.JobFilter(parent_id=f"parent-{number // 4}"),
    ]
    return kinds[number % 4]


def job_of(number, **fields):
    labels = {"n": str(number)}
    return pb.JobStatus(
        id=f"job-{number}", name=f"name-{number}", parent_id=f"parent-{number // 4}", labels=labels, **fields
    )


class Watcher:
    """Notes how old each job is when it comes, and the newest of each."""

    def __init__(self):
        self.is_synced = asyncio.Event()
        self.delays: list[float] = []
        self.revisions: dict[str, int] = {}

    async def follow(self, stub, number):
        request = pb.WatchJobsRequest(filter=filter_of(number), min_update_interval=NONE)
        async for message in stub.WatchJobs(request):
            for event in message.events:
                if event.type == SYNCED:
                    self.is_synced.set()
                else:
                    self.revisions[event.job.id] = event.job.revision
                    changed_at = event.job.updated_at.ToDatetime(tzinfo=timezone.utc).timestamp()
                    if self.is_synced.is_set():
                        self.delays.append(time.time() - changed_at)


async def change(stub, numbers, newest):
    for number in numbers:
        job = job_of(number % COUNT, reason=str(number))
        reply = await stub.UpdateJob(pb.UpdateJobRequest(job=job))
        newest[reply.job.id] = max(reply.job.revision, newest.get(reply.job.id, 0))


async def until_seen(watchers, newest):
    def is_behind(number):
        return watchers[number].revisions.get(f"job-{number}", 0) < newest[f"job-{number}"]

    while any(is_behind(number) for number in range(COUNT)):  # noqa: ASYNC110 - each watcher has its own stream
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_a_thousand_watchers_see_the_changes_of_a_thousand_jobs_soon(serve, tmp_path, store, capsys):
    service = serve(store="memory:" if store == "memory" else f"sqlite:///{tmp_path}/jobs.db")

    async def scenario(stub):
        for start in range(0, COUNT, BATCH):
            updates = [
                pb.UpdateJobRequest(job=job_of(number), allow_missing=True) for number in range(start, start + BATCH)
            ]
            await stub.BatchUpdateJobs(pb.BatchUpdateJobsRequest(updates=updates))
        watchers = [Watcher() for _ in range(COUNT)]
        following = [asyncio.ensure_future(watcher.follow(stub, n)) for n, watcher in enumerate(watchers)]
        await asyncio.gather(*(watcher.is_synced.wait() for watcher in watchers))
        newest = {f"job-{number}": 1 for number in range(COUNT)}
        numbers = iter(range(CHANGES))
        await asyncio.gather(*(change(stub, numbers, newest) for _ in range(CALLERS)))
        await until_seen(watchers, newest)
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        return sorted(itertools.chain.from_iterable(watcher.delays for watcher in watchers))

    async def run():
        async with grpc.aio.insecure_channel(service.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            return await asyncio.wait_for(scenario(JobStatusServiceStub(channel)), 50)

    delays = asyncio.run(run())
    p50, p95, p99 = (1000 * delays[int(len(delays) * share)] for share in (0.5, 0.95, 0.99))
    with capsys.disabled():
        print(f"\n{store}: {CHANGES} changes, {len(delays)} events; p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} ms")
    assert len(delays) > 100
    assert p95 < 2000
