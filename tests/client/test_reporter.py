"""Reporters of many jobs on real servers: order, outages, the end of the block."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import AsyncJobStatusClient, DeadlineExceededError, Job, JobState, JobStatusClient
from tests.support.scripted_server import ScriptedServer, a_job, fail
from tests.support.timing import MAX_PAUSE_SECONDS

AWAY = fail(grpc.StatusCode.UNAVAILABLE)


def accept(request, context):
    """Answer each update with a job."""
    results = [pb.BatchUpdateJobsResult(job=a_job(id=update.job.id)) for update in request.updates]
    return pb.BatchUpdateJobsResponse(results=results).SerializeToString()


def test_updates_of_many_jobs_take_effect_in_their_order(client):
    jobs = [client.create().id for _ in range(200)]
    with client.reporter() as reporter:
        for job_id in jobs:
            reporter.update(job_id, state=JobState.IN_PROGRESS, attempt=1)
            reporter.update(job_id, progress=50, attempt=1)
            reporter.update(job_id, state=JobState.SUCCEEDED, result={"n": 1}, attempt=1)
        reporter.flush()
        assert {client.get(job_id).state for job_id in jobs[:3] + jobs[-3:]} == {JobState.SUCCEEDED}
    assert [client.get(job_id).attempt for job_id in jobs[::20]] == [1] * 10


def test_leaving_the_block_sends_what_is_left_also_where_it_raises(client):
    def work(reporter: Any) -> None:
        reporter.update(job.id, state=JobState.FAILED)
        raise KeyError

    job = client.create()
    with pytest.raises(KeyError), client.reporter(flush_interval_seconds=60) as reporter:
        work(reporter)
    assert client.get(job.id).state is JobState.FAILED


def test_a_refusal_is_reported_and_the_rest_goes_on(client):
    job, refused = client.create(), []
    with client.reporter(on_error=lambda update, error: refused.append((update.id, error.reason))) as reporter:
        reporter.update("no-such-job", progress=1)
        reporter.update(job.id, progress=1)
    assert refused == [("no-such-job", "JOB_NOT_FOUND")]
    assert client.get(job.id).progress == 1


def test_workers_learn_of_cancels(client):
    jobs: list[Job] = []
    job = client.create(state=JobState.IN_PROGRESS)
    client.cancel(job.id)
    with client.reporter(on_job=jobs.append) as reporter:
        reporter.update(job.id, progress=1)
    assert [(answered.id, answered.cancel_requested) for answered in jobs] == [(job.id, True)]


def test_an_outage_loses_nothing(connect, sqlite_server):
    client = connect(sqlite_server.address)
    jobs = [client.create().id for _ in range(50)]
    with client.reporter() as reporter:
        sqlite_server.kill()
        for percent in range(100):
            for job_id in jobs:
                reporter.update(job_id, progress=percent)
        sqlite_server.start()
    assert {client.get(job_id).progress for job_id in jobs} == {99}


def test_one_call_is_under_way_at_a_time(connect):
    running, most = [], []

    def slow(request, context):
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return accept(request, context)

    with ScriptedServer(BatchUpdateJobs=[slow]) as server:
        with connect(server.address).reporter(flush_interval_seconds=0.001) as reporter:
            for number in range(2000):
                reporter.update(f"job-{number}", progress=1)
        assert max(most) == 1
        assert sum(len(request.updates) for request in server.requests["BatchUpdateJobs"]) == 2000


def test_a_batch_whose_reply_was_lost_is_sent_again_as_it_was(connect):
    with ScriptedServer(BatchUpdateJobs=[AWAY, AWAY, accept]) as server:
        with connect(server.address).reporter() as reporter:
            reporter.update("a", progress=1)
        first, second, third = server.requests["BatchUpdateJobs"]
    assert first == second == third
    assert first.updates[0].request_id


@pytest.mark.parametrize("code", ["UNKNOWN", "INTERNAL", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"])
def test_behind_a_proxy_that_refuses_large_bodies_all_updates_arrive(connect, code):
    def answer(request, context):
        if request.ByteSize() > 64 * 1024:
            context.abort(grpc.StatusCode[code], "Received http2 header with status: 413")
        return accept(request, context)

    refused, jobs = [], []
    with ScriptedServer(BatchUpdateJobs=[answer]) as server:
        callbacks = {
            "on_error": lambda update, error: refused.append(update.id),
            "on_job": lambda job: jobs.append(job.id),
        }
        with connect(server.address).reporter(**callbacks) as reporter:
            for number in range(500):
                reporter.update(str(number), state=JobState.FAILED, result={"text": "x" * 5000})
            reporter.update("large", result={"text": "x" * 65_000}, reason="x" * 4000)
    assert refused == ["large"]
    assert jobs == [str(number) for number in range(500)]
    assert max(request.ByteSize() for request in server.requests["BatchUpdateJobs"]) < 1024 * 1024


def test_update_never_waits_for_the_server(connect):
    with ScriptedServer(BatchUpdateJobs=[]) as server:
        server.script("BatchUpdateJobs", server.silence)
        refused = []
        with connect(server.address).reporter(
            on_error=lambda *refusal: refused.append(refusal), finish_timeout_seconds=0.2, max_pending=100
        ) as reporter:
            began = time.monotonic()
            for number in range(5000):
                reporter.update(f"job-{number}", state=JobState.FAILED)
            assert time.monotonic() - began < 5 + MAX_PAUSE_SECONDS
        assert time.monotonic() - began < 10 + MAX_PAUSE_SECONDS
        assert len(refused) == 5000


def test_a_flush_that_takes_too_long_says_how_much_is_left(connect, unused_address):
    with connect(unused_address).reporter(finish_timeout_seconds=0.1) as reporter:
        reporter.update("a", progress=1)
        reporter.update("b", progress=1)
        with pytest.raises(DeadlineExceededError, match=r"after 0\.1 s 2 updates are not answered"):
            reporter.flush(0.1)


def test_a_reporter_is_for_one_block(connect, unused_address):
    reporter = connect(unused_address).reporter()
    with pytest.raises(RuntimeError, match="enter it first"):
        reporter.flush()
    with reporter:
        pass
    with pytest.raises(RuntimeError, match="one block"), reporter:
        pass


def test_closing_the_client_ends_its_reporters(connect, unused_address):
    refused = []
    client = connect(unused_address)
    with client.reporter(on_error=lambda update, error: refused.append(update.id)) as reporter:
        reporter.update("a", progress=1)
        client.close()
        began = time.monotonic()
    assert refused == ["a"]
    assert time.monotonic() - began < 5 + MAX_PAUSE_SECONDS


def test_threads_may_share_a_reporter(memory_address):
    with JobStatusClient(memory_address) as client, client.reporter() as reporter:
        jobs = [client.create().id for _ in range(8)]

        def work(job_id: str) -> None:
            for percent in range(101):
                reporter.update(job_id, progress=percent)

        threads = [threading.Thread(target=work, args=[job_id]) for job_id in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reporter.flush()
        assert {client.get(job_id).progress for job_id in jobs} == {100}


def test_a_cancelled_worker_still_sends_what_it_gave(memory_address):
    async def main() -> None:
        async with AsyncJobStatusClient(memory_address) as client:
            job = await client.create()
            begun = asyncio.Event()

            async def work() -> None:
                async with client.reporter(flush_interval_seconds=60) as reporter:
                    reporter.update(job.id, state=JobState.ABORTED)
                    begun.set()
                    await asyncio.sleep(60)

            working = asyncio.create_task(work())
            await begun.wait()
            working.cancel()
            with pytest.raises(asyncio.CancelledError):
                await working
            assert (await client.get(job.id)).state is JobState.ABORTED
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNIMPLEMENTED", "UNAUTHENTICATED"])
def test_updates_that_a_proxy_refuses_for_a_moment_are_sent_again(connect, code):
    refused: list[Any] = []
    refusal = fail(grpc.StatusCode[code])
    with ScriptedServer(BatchUpdateJobs=[accept, refusal, refusal, accept]) as server:
        with connect(server.address).reporter(on_error=lambda *refusal: refused.append(refusal)) as reporter:
            reporter.update("a", progress=1)
            reporter.flush()
            reporter.update("a", progress=2)
            reporter.flush()
        assert len(server.requests["BatchUpdateJobs"]) == 4
    assert refused == []
