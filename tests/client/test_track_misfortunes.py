"""Tracking against servers that do badly, and what only asyncio meets."""

from __future__ import annotations

import asyncio
import socket
import time

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import AsyncJobStatusClient, JobState, JobStatusClient
from tests.client.scripted import ScriptedServer, a_done_job, a_job, fail, reply
from tests.peace import STANDSTILL_SECONDS

CREATED = reply(pb.CreateJobResponse(job=a_job(attempt=1)))
DONE = reply(pb.UpdateJobResponse(job=a_done_job()))


def test_a_creation_whose_reply_was_lost_is_sent_again_as_it_was(connect):
    lost = fail(grpc.StatusCode.UNAVAILABLE)
    with ScriptedServer(CreateJob=[lost, CREATED], UpdateJob=[DONE]) as server, connect(server.address).track():
        pass
    first, second = server.requests["CreateJob"]
    assert first == second
    assert first.request_id


def test_an_end_whose_reply_was_lost_is_sent_again_as_it_was(connect):
    lost = fail(grpc.StatusCode.UNAVAILABLE)
    with ScriptedServer(CreateJob=[CREATED], UpdateJob=[lost, lost, DONE]) as server, connect(server.address).track():
        pass
    assert len(server.requests["UpdateJob"]) == 3
    assert len({request.request_id for request in server.requests["UpdateJob"]}) == 1


@pytest.mark.parametrize("code", ["UNKNOWN", "INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"])
def test_a_report_is_tried_again_after(connect, code):
    answers = [fail(grpc.StatusCode[code]), DONE]
    with ScriptedServer(CreateJob=[CREATED], UpdateJob=answers) as server, connect(server.address).track():
        pass
    assert len(server.requests["UpdateJob"]) == 2


def test_heartbeats_go_on_for_as_long_as_the_block(connect):
    alive = reply(pb.UpdateJobResponse(job=a_job(attempt=1)))

    def answer(request, context):
        return (DONE if request.update_mask.paths else alive)(request, context)

    with (
        ScriptedServer(CreateJob=[CREATED], UpdateJob=[answer]) as server,
        connect(server.address).track(heartbeat_timeout_seconds=0.3),
    ):
        server.await_request("UpdateJob", 5)
    *beats, end = server.requests["UpdateJob"]
    assert {(beat.attempt, len(beat.update_mask.paths)) for beat in beats} == {(1, 0)}
    assert list(end.update_mask.paths) == ["state"]


def test_a_server_that_says_nothing_does_not_hold_up_the_beginning(connect, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.client.track.START_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = connect(f"127.0.0.1:{mute.getsockname()[1]}")
        began = time.monotonic()
        with client.track(finish_timeout_seconds=0.2):
            assert time.monotonic() - began < 5 + STANDSTILL_SECONDS
        assert time.monotonic() - began < 10 + STANDSTILL_SECONDS


def test_progress_never_waits_for_the_server(connect):
    with ScriptedServer(CreateJob=[CREATED], UpdateJob=[]) as server:
        server.script("UpdateJob", server.silence)
        with connect(server.address).track(finish_timeout_seconds=0.2) as tracked:
            began = time.monotonic()
            for step in range(20_000):
                tracked.progress(step / 200, f"step {step}")
            assert time.monotonic() - began < 5 + STANDSTILL_SECONDS


def test_a_tracked_job_is_for_one_block():
    with ScriptedServer(CreateJob=[CREATED], UpdateJob=[DONE]) as server, JobStatusClient(server.address) as client:
        tracked = client.track()
        with tracked:
            pass
        with pytest.raises(RuntimeError), tracked:
            pass


def test_a_cancelled_worker_aborts_its_job_and_stays_cancelled(memory_address):
    async def main() -> None:
        async with AsyncJobStatusClient(memory_address) as client:
            begun = asyncio.Event()
            tracked = client.track()

            async def work() -> None:
                async with tracked:
                    begun.set()
                    await asyncio.sleep(60)

            working = asyncio.create_task(work())
            await begun.wait()
            working.cancel()
            with pytest.raises(asyncio.CancelledError):
                await working
            job = await client.get(tracked.id)
            assert job.state is JobState.ABORTED
            assert job.error is not None
            assert job.error.reason == "CancelledError"

    asyncio.run(main())


def test_a_worker_that_its_event_loop_ends_still_reports(memory_address):
    client = AsyncJobStatusClient(memory_address)
    tracked = client.track()

    async def main() -> None:
        begun = asyncio.Event()

        async def work() -> None:
            async with client, tracked:
                begun.set()
                await asyncio.sleep(60)

        main.task = asyncio.create_task(work())  # type: ignore[attr-defined]
        await begun.wait()

    asyncio.run(main())
    with JobStatusClient(memory_address) as reader:
        assert reader.get(tracked.id).state is JobState.ABORTED


def test_progress_may_come_from_another_thread(memory_address):
    async def main() -> None:
        async with AsyncJobStatusClient(memory_address) as client, client.track() as tracked:
            await asyncio.to_thread(tracked.progress, 42)
            async for job in client.watch(tracked.id):
                if job.progress == 42:
                    break

    asyncio.run(main())


def test_tracking_leaves_no_task_behind(memory_address):
    async def main() -> None:
        async with AsyncJobStatusClient(memory_address) as client:
            async with client.track() as tracked:
                tracked.progress(1)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            assert not tasks or not (await asyncio.wait(tasks, timeout=10))[1]

    asyncio.run(main())
