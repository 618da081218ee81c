"""Tracked jobs: against a real server, and against scripted servers that fail."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import (
    AsyncJobStatusClient,
    JobError,
    JobNotFoundError,
    JobState,
    JobStatusClient,
    StaleAttemptError,
    UnavailableError,
)
from tests.support.scripted_server import ScriptedServer, a_done_job, a_job, fail, reply
from tests.support.timing import MAX_PAUSE_SECONDS


def until(condition) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


def test_a_block_is_a_job_from_its_beginning_to_its_end(client):
    with client.track("backup", labels={"team": "a"}, parent_id="p") as tracked:
        job = client.get(tracked.id)
        assert (job.state, job.name, job.attempt, job.parent_id) == (JobState.IN_PROGRESS, "backup", 1, "p")
        assert (job.labels, job.heartbeat_timeout.total_seconds()) == ({"team": "a"}, 30)
        assert (tracked.job, tracked.attempt, tracked.cancelled, tracked.lost) == (job, 1, False, False)
        tracked.progress(42, "reading")
        tracked.result = {"files": 3}
    done = client.get(tracked.id)
    assert (done.state, done.progress, done.reason) == (JobState.SUCCEEDED, 100, "reading")
    assert done.result == {"files": 3}
    assert tracked.job == done


def test_progress_is_seen_while_the_block_runs(client):
    with client.track() as tracked:
        tracked.progress(42, "reading")
        until(lambda: client.get(tracked.id).progress == 42)


def test_a_block_that_raises_fails_its_job_and_raises_on(client):
    with pytest.raises(ValueError, match="no disk"), client.track() as tracked:  # noqa: PT012
        tracked.progress(42.5)
        raise ValueError("no disk")
    job = client.get(tracked.id)
    assert (job.state, job.progress) == (JobState.FAILED, 42.5)
    assert job.error == JobError(2, "no disk", "ValueError")


@pytest.mark.parametrize("text", ["\x1b[31mred\x00", "\ud800", "é" * 9000, ""])
def test_whatever_an_exception_says_its_job_fails(client, text):
    with pytest.raises(RuntimeError), client.track() as tracked:
        raise RuntimeError(text)
    assert client.get(tracked.id).state is JobState.FAILED


def test_an_interrupted_block_aborts_its_job(client):
    with pytest.raises(KeyboardInterrupt), client.track() as tracked:
        raise KeyboardInterrupt
    assert client.get(tracked.id).state is JobState.ABORTED


def test_a_block_may_say_its_outcome_itself(client):
    with client.track() as failed:
        failed.fail("no memory", reason="OUT_OF_MEMORY", code=8)
    with client.track() as aborted:
        aborted.abort("not needed")
    assert client.get(failed.id).error == JobError(8, "no memory", "OUT_OF_MEMORY")
    assert (client.get(aborted.id).state, client.get(aborted.id).reason) == (JobState.ABORTED, "not needed")


def test_a_worker_learns_of_a_cancel_with_its_heartbeats_and_ends_cancelled(client):
    with client.track(heartbeat_timeout_seconds=1) as tracked:
        client.cancel(tracked.id)
        until(lambda: tracked.cancelled)
    assert client.get(tracked.id).state is JobState.CANCELLED


def test_a_worker_learns_of_a_cancel_with_its_progress(client):
    with client.track() as tracked:
        client.cancel(tracked.id)
        tracked.progress(1)
        until(lambda: tracked.cancelled)
        tracked.abort()
    assert client.get(tracked.id).state is JobState.CANCELLED


def test_a_worker_that_was_asked_to_stop_may_still_succeed(client):
    with client.track(heartbeat_timeout_seconds=1) as tracked:
        client.cancel(tracked.id)
        until(lambda: tracked.cancelled)
        tracked.succeed()
    assert client.get(tracked.id).state is JobState.SUCCEEDED


def test_a_worker_that_never_asked_whether_to_stop_succeeds(client):
    with client.track() as tracked:
        client.cancel(tracked.id)
        tracked.progress(50)
        until(lambda: tracked.job.cancel_requested)
    assert client.get(tracked.id).state is JobState.SUCCEEDED


def test_a_worker_claims_a_job_that_is_there(client):
    job = client.create("queued", labels={"a": "b"})
    with client.track(id=job.id) as first:
        assert (first.attempt, first.job.state, first.job.labels) == (1, JobState.IN_PROGRESS, {"a": "b"})
        with client.track(id=job.id, heartbeat_timeout_seconds=None) as second:
            assert second.attempt == 2
    assert client.get(job.id).state is JobState.SUCCEEDED


def fail_in(client, job_id: str, **settings) -> None:
    with pytest.raises(OSError, match="no disk"), client.track(id=job_id, **settings):
        raise OSError("no disk")


def test_attempts_that_are_retried_end_retrying_and_the_last_one_failed(client):
    job = client.create()
    fail_in(client, job.id, retries=2)
    retrying = client.get(job.id)
    assert (retrying.state, retrying.attempt, retrying.error) == (
        JobState.RETRYING,
        1,
        JobError(2, "no disk", "OSError"),
    )
    fail_in(client, job.id, retries=2)
    assert client.get(job.id).state is JobState.RETRYING
    fail_in(client, job.id, retries=2)
    assert (client.get(job.id).state, client.get(job.id).attempt) == (JobState.FAILED, 3)
    states = [transition.to_state.word for transition in client.history(job.id).transitions]
    assert states == ["pending", "in_progress", "retrying", "in_progress", "retrying", "in_progress", "failed"]


def test_an_attempt_that_is_retried_may_succeed(client):
    job = client.create()
    fail_in(client, job.id, retries=2)
    with client.track(id=job.id, retries=2) as tracked:
        assert tracked.attempt == 2
    assert client.get(job.id).state is JobState.SUCCEEDED


@pytest.mark.parametrize("error", [ConnectionError("no net"), "no net"])
def test_a_block_may_say_that_it_will_be_retried(client, error):
    with client.track() as first:
        first.retry(error, reason="again in 5 s")
    job = client.get(first.id)
    assert (job.state, job.reason, job.error.message) == (JobState.RETRYING, "again in 5 s", "no net")
    with client.track(id=first.id) as second:
        second.progress(80)
    assert (client.get(first.id).state, client.get(first.id).attempt) == (JobState.SUCCEEDED, 2)


def test_a_block_that_will_be_retried_may_raise(client):
    with pytest.raises(OSError, match="no disk"), client.track() as tracked:  # noqa: PT012
        tracked.retry()
        raise OSError("no disk")
    job = client.get(tracked.id)
    assert (job.state, job.error) == (JobState.RETRYING, JobError(2, "no disk", "OSError"))


def test_after_a_cancel_no_attempt_follows(client):
    with client.track() as tracked:
        client.cancel(tracked.id)
        tracked.retry("no net")
    assert client.get(tracked.id).state is JobState.CANCELLED
    with pytest.raises(OSError, match="no disk"), client.track(retries=3) as tracked:  # noqa: PT012
        client.cancel(tracked.id)
        raise OSError("no disk")
    assert client.get(tracked.id).state is JobState.FAILED


def test_a_block_that_is_interrupted_is_not_retried(client):
    with pytest.raises(KeyboardInterrupt), client.track(retries=3) as tracked:
        raise KeyboardInterrupt
    assert client.get(tracked.id).state is JobState.ABORTED


def test_a_worker_that_lost_its_job_leaves_it_alone_and_says_so_once(client, caplog):
    caplog.set_level(logging.WARNING, "jobstatus_grpc.client")
    with client.track() as tracked:
        client.update(tracked.id, state=JobState.IN_PROGRESS, attempt=2)
        tracked.progress(10)
        until(lambda: tracked.lost)
        assert type(tracked.error) is StaleAttemptError
        tracked.progress(90)
    job = client.get(tracked.id)
    assert (job.state, job.attempt, job.progress) == (JobState.IN_PROGRESS, 2, None)
    assert len(caplog.records) == 1


def test_a_job_that_was_ended_by_another_is_lost(client):
    with client.track() as tracked:
        client.update(tracked.id, state=JobState.ABORTED)
        tracked.progress(10)
        until(lambda: tracked.lost)
    assert client.get(tracked.id).state is JobState.ABORTED


def test_a_job_that_was_cancelled_before_its_worker_came_is_lost_and_cancelled(client):
    job = client.create()
    client.cancel(job.id)
    with client.track(id=job.id) as tracked:
        assert (tracked.lost, tracked.cancelled) == (True, True)


def test_a_job_that_is_not_there_breaks_no_work(client, caplog):
    caplog.set_level(logging.WARNING, "jobstatus_grpc.client")
    with client.track(id="no-such-job") as tracked:
        assert tracked.lost
    assert len(caplog.records) == 1


def test_a_job_that_is_not_there_is_created_where_it_is_named(client, new_id):
    with client.track("nightly", id=new_id(), labels={"a": "b"}) as tracked:
        assert tracked.attempt == 1
    job = client.get(tracked.id)
    assert (job.name, job.labels, job.state) == ("nightly", {"a": "b"}, JobState.SUCCEEDED)


@pytest.mark.parametrize("result", [{"a": object()}, {"a": "x" * 70_000}])
def test_a_result_that_cannot_be_stored_does_not_hold_up_the_end(client, caplog, result):
    caplog.set_level(logging.WARNING, "jobstatus_grpc.client")
    with client.track() as tracked:
        tracked.result = result
    assert client.get(tracked.id).state is JobState.SUCCEEDED
    assert len(caplog.records) == 1


def test_work_begins_without_a_server_and_is_reported_once_it_is_there(connect, sqlite_server):
    sqlite_server.kill()
    client = connect(sqlite_server.address)
    with client.track("early") as tracked:
        assert (tracked.attempt, tracked.job, type(tracked.error)) == (0, None, UnavailableError)
        tracked.progress(42, "reading")
        sqlite_server.start()
        until(lambda: tracked.attempt == 1)
        until(lambda: client.get(tracked.id).progress == 42)
        assert tracked.error is None
    assert client.get(tracked.id).state is JobState.SUCCEEDED


def test_work_that_ended_without_a_server_is_reported_in_time(connect, sqlite_server, background):
    sqlite_server.kill()
    client = connect(sqlite_server.address)
    with client.track(finish_timeout_seconds=20) as tracked:
        tracked.progress(42)
        starting = background(sqlite_server.start)
    starting.result()
    assert client.get(tracked.id).state is JobState.SUCCEEDED


def test_work_is_reported_over_a_crash_of_the_server(connect, sqlite_server):
    client = connect(sqlite_server.address)
    with client.track(heartbeat_timeout_seconds=1) as tracked:
        sqlite_server.restart()
        tracked.progress(42)
        until(lambda: client.get(tracked.id).progress == 42)
    job = client.get(tracked.id)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)


def test_work_without_a_server_is_held_up_for_no_longer_than_allowed(connect, unused_address, caplog):
    caplog.set_level(logging.WARNING, "jobstatus_grpc.client")
    client = connect(unused_address)
    began = time.monotonic()
    with client.track(finish_timeout_seconds=0.3):
        pass
    assert time.monotonic() - began < 10
    assert ["cannot be reported" in record.getMessage() for record in caplog.records] == [True, False]
    assert "SUCCEEDED" in caplog.records[1].getMessage()


def test_a_strict_block_does_not_begin_without_its_job(connect, unused_address, client):
    with pytest.raises(UnavailableError), connect(unused_address, timeout_seconds=0.5).track(strict=True):
        raise AssertionError
    with pytest.raises(JobNotFoundError), client.track(id="no-such-job", strict=True):
        raise AssertionError


def test_a_strict_block_does_not_end_well_unless_its_end_was_reported(client):
    with pytest.raises(StaleAttemptError), client.track(strict=True) as tracked:
        client.update(tracked.id, state=JobState.IN_PROGRESS, attempt=2)
    with pytest.raises(ValueError, match="its own"), client.track(strict=True) as tracked:  # noqa: PT012
        client.update(tracked.id, state=JobState.IN_PROGRESS, attempt=2)
        raise ValueError("its own")


def test_a_block_in_time_leaves_no_thread_behind(client):
    before = set(threading.enumerate())
    with client.track():
        pass
    assert {thread.name for thread in set(threading.enumerate()) - before if "jobstatus" in thread.name} == set()


def test_a_client_that_was_closed_inside_the_block_does_not_hold_it_up(connect, memory_address):
    client = connect(memory_address)
    began = time.monotonic()
    with client.track(finish_timeout_seconds=15):
        client.close()
    assert time.monotonic() - began < 10


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
            assert time.monotonic() - began < 5 + MAX_PAUSE_SECONDS
        assert time.monotonic() - began < 10 + MAX_PAUSE_SECONDS


def test_progress_never_waits_for_the_server(connect):
    with ScriptedServer(CreateJob=[CREATED], UpdateJob=[]) as server:
        server.script("UpdateJob", server.silence)
        with connect(server.address).track(finish_timeout_seconds=0.2) as tracked:
            began = time.monotonic()
            for step in range(20_000):
                tracked.progress(step / 200, f"step {step}")
            assert time.monotonic() - began < 5 + MAX_PAUSE_SECONDS


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
