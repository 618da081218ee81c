"""Readers of WatchJobs that lose their streams again and again under load, and resume with their last token."""

from __future__ import annotations

import asyncio
import contextlib
import random
from datetime import timedelta

import grpc
import pytest
from google.protobuf import duration_pb2
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.stores.sqlite.store import SqliteStore
from tests.support.load import background_tasks, connected
from tests.support.servers import ServerProcess, serving
from tests.support.stores import StandingClock
from tests.support.watch_jobs import Reader, Writer

CUTS, CUTS_IN_FULL = 20, 200
WRITERS = 4
MARK = "the-last"
FILTERS = {
    "all": pb.JobFilter(),
    "open": pb.JobFilter(done=False),
    "a label": pb.JobFilter(labels={"color": "red"}),
    "two states": pb.JobFilter(states=[pb.JOB_STATE_PENDING, pb.JOB_STATE_SUCCEEDED]),
    "a name": pb.JobFilter(names=["odd", "mark"]),
}


async def read_until(stream, reader, is_there):
    while not is_there():
        reader.take(await stream.read())


async def cut_again_and_again(address, reader, job_filter, chance, cuts):
    """Read, and cancel at a random moment: in a message, in a resumption, or while nothing changes."""
    for _ in range(cuts):
        async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stream = watched(channel, reader, job_filter, chance)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(read_until(stream, reader, lambda: False), chance.choice([0.01, 0.05, 0.2]))
            stream.cancel()


def watched(channel, reader, job_filter, chance):
    interval = duration_pb2.Duration(nanos=chance.choice([0, 100_000_000]))
    method = channel.unary_stream(
        "/jobstatus.v1.JobStatusService/WatchJobs",
        request_serializer=pb.WatchJobsRequest.SerializeToString,
        response_deserializer=pb.WatchJobsResponse.FromString,
    )
    return method(reader.begin(filter=job_filter, min_update_interval=interval), timeout=60)


async def listed(stub, job_filter):
    page = await stub.ListJobs(pb.ListJobsRequest(filter=job_filter, page_size=1000))
    return {job.id: job.revision for job in page.jobs}


@pytest.mark.timeout(300)
def test_a_reader_that_is_cut_off_under_load_misses_no_newest_state_and_sees_no_reset(tmp_path, is_full, record_fault):
    cuts = CUTS_IN_FULL if is_full else CUTS

    async def scenario(server):
        chance = random.Random(1)
        readers = {name: Reader() for name in FILTERS}
        async with connected(server.address) as (stub, _):
            async with background_tasks() as start:
                writers = [Writer(stub, number, seed=number) for number in range(WRITERS)]
                working = [start(writer.run()) for writer in writers]
                cutting = [
                    cut_again_and_again(server.address, readers[name], FILTERS[name], chance, cuts) for name in FILTERS
                ]
                await asyncio.gather(*cutting)
                assert not any(worker.done() for worker in working)
            mark = pb.JobStatus(id=MARK, name="mark", labels={"color": "red"})
            await stub.CreateJob(pb.CreateJobRequest(job=mark))
            for name, reader in readers.items():
                stream = stub.WatchJobs(reader.begin(filter=FILTERS[name], min_update_interval=duration_pb2.Duration()))
                # What changed before the mark comes before it, or with it in one message.
                await read_until(stream, reader, lambda reader=reader: reader.is_synced and MARK in reader.jobs)
                assert reader.revisions == await listed(stub, FILTERS[name]), name
                assert reader.resets == 0
                stream.cancel()

    with ServerProcess("--log-level", "warning", store=f"sqlite:///{tmp_path}/jobs.db") as server:
        asyncio.run(asyncio.wait_for(scenario(server), 240))
    record_fault(
        "a client of WatchJobs cut off at random under load",
        count=cuts * len(FILTERS),
        checked=f"the newest state of each job, with {len(FILTERS)} filters",
        result="none missed, no RESET",
    )


@pytest.mark.timeout(300)
def test_a_reader_that_was_away_sees_a_reset_exactly_where_history_does_not_cover_its_token(
    tmp_path, is_full, record_fault
):
    times = CUTS_IN_FULL if is_full else CUTS

    async def scenario():
        clock, chance = StandingClock(), random.Random(2)
        retention = timedelta(days=9999)
        store = await SqliteStore.open(
            str(tmp_path / "jobs.db"), clock=clock, retention=retention, seconds=clock.seconds
        )
        async with serving(store) as stub:
            writer = Writer(stub, 0, seed=3)
            reader = Reader()
            seen = set()
            for _ in range(times):
                before = reader.resets
                stream = stub.WatchJobs(reader.begin(filter=pb.JobFilter(done=False)), timeout=60)
                await read_until(stream, reader, lambda: reader.is_synced)
                stream.cancel()
                deleted = writer.deleted
                for _ in range(chance.randrange(15)):
                    await writer.step()
                is_old = chance.random() < 0.7
                # The store saves its position only now and then, and resumes from the saved one.
                for pause in (timedelta(minutes=2), timedelta(hours=25 if is_old else 1)):
                    clock.advance(seconds=pause.total_seconds())
                    while await store.trim(limit=100):
                        pass
                is_covered = not is_old or writer.deleted == deleted
                stream = stub.WatchJobs(reader.begin(filter=pb.JobFilter(done=False)), timeout=60)
                await read_until(stream, reader, lambda: reader.is_synced)
                assert reader.revisions == await listed(stub, pb.JobFilter(done=False))
                assert reader.resets - before == (not is_covered)
                seen.add(is_covered)
                stream.cancel()
            assert seen == {True, False}
        await store.close()

    asyncio.run(asyncio.wait_for(scenario(), 240))
    record_fault(
        "a client of WatchJobs that was away for an hour or a day",
        count=times,
        checked="the newest state of each job",
        result="a RESET exactly where a removal was trimmed",
    )
