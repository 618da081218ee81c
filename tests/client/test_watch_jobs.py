"""Watches of many jobs: the changes that they yield, the ends of streams that they survive."""

from __future__ import annotations

import asyncio
import gc
import time

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import (
    AsyncJobStatusClient,
    InvalidTokenError,
    JobChange,
    JobChangeType,
    JobFilter,
    JobState,
    JobStatusClient,
    TooManyWatchersError,
    UnavailableError,
)
from jobstatus_grpc.errors import JobStatusError
from tests.support.scripted_server import Answer, ScriptedServer, a_job, a_stream, fail, refuse, some_events
from tests.support.tcp_proxy import TcpProxy
from tests.support.timing import rerun_after_pause

FULL = TooManyWatchersError()
FULL.retry_after_seconds = 0.05
BEGINNING = some_events(("SNAPSHOT", a_job(1)), ("SYNCED", None), token="t1")
THE_REST = a_stream(some_events(("UPDATED", a_job(2)), ("SYNCED", None), token="t2"))
ENDS: dict[str, Answer] = {
    "UNAVAILABLE": a_stream(BEGINNING, then=fail(grpc.StatusCode.UNAVAILABLE)),
    "INTERNAL": a_stream(BEGINNING, then=fail(grpc.StatusCode.INTERNAL)),
    "UNKNOWN": a_stream(BEGINNING, then=fail(grpc.StatusCode.UNKNOWN)),
    "CANCELLED": a_stream(BEGINNING, then=fail(grpc.StatusCode.CANCELLED)),
    "RESOURCE_EXHAUSTED once opened": a_stream(BEGINNING, then=refuse(FULL)),
    "OK": a_stream(BEGINNING),
    "a message that is no message": a_stream(BEGINNING, b"\xff\xff"),
    "a job that makes no sense": a_stream(BEGINNING, some_events(("UPDATED", a_job(2, created=2**60)))),
}
RAISED = [
    code for code in grpc.StatusCode if code.name not in ("OK", "UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED")
]


def brief(change: JobChange) -> tuple[str, int]:
    return change.type.name, change.revision


@pytest.fixture
def family(client, new_id):
    """Return a function that creates jobs with one parent, and the filter of these jobs."""
    parent = new_id()
    return lambda: client.create(parent_id=parent), JobFilter(parent_id=parent)


def test_a_watch_yields_what_is_there_and_what_changes(client, family):
    create, parts = family
    job = create()
    with_a_job = client.watch_jobs(parts, min_update_interval_seconds=0)
    assert next(with_a_job) == JobChange(JobChangeType.SNAPSHOT, job.id, 1, job)
    assert next(with_a_job) == JobChange(JobChangeType.SYNCED)
    other = create()
    assert next(with_a_job).job == other
    updated = client.update(job.id, progress=50)
    assert next(with_a_job) == JobChange(JobChangeType.UPDATED, job.id, 2, updated)


def test_a_job_that_matches_no_longer_is_removed_and_so_is_one_that_is_deleted(client, family):
    create, parts = family
    job, other = create(), create()
    watch = client.watch_jobs(JobFilter(parent_id=parts.parent_id, done=False))
    assert [brief(next(watch)) for _ in range(3)] == [("SNAPSHOT", 1), ("SNAPSHOT", 1), ("SYNCED", 0)]
    done = client.update(job.id, state=JobState.SUCCEEDED)
    assert next(watch) == JobChange(JobChangeType.REMOVED, job.id, 2, done)
    all_parts = client.watch_jobs(parts)
    assert {next(all_parts).type.name for _ in range(3)} == {"SNAPSHOT", "SYNCED"}
    client.delete(job.id)
    assert next(all_parts) == JobChange(JobChangeType.REMOVED, job.id, 3)
    assert client.get(other.id) == other


def test_a_watch_goes_on_from_a_token(client, family):
    create, parts = family
    job = create()
    token = client.list(parts).resume_token
    updated = client.update(job.id, progress=1)
    watch = client.watch_jobs(parts, resume_token=token)
    assert [next(watch).job, next(watch).type] == [updated, JobChangeType.SYNCED]
    last = client.watch_jobs(parts, resume_token=watch.resume_token)
    assert next(last).type is JobChangeType.SYNCED


def test_a_watch_survives_a_crash(connect, sqlite_server, background):
    client = connect(sqlite_server.address)
    job = client.create()
    watch = client.watch_jobs()
    assert [next(watch).type.name for _ in range(2)] == ["SNAPSHOT", "SYNCED"]
    sqlite_server.kill()
    reading = background(lambda: next(change for change in watch if change.revision == 2))
    sqlite_server.start()
    done = client.update(job.id, state=JobState.SUCCEEDED)
    assert reading.result().job == done


def test_a_token_that_is_none_raises(client):
    with pytest.raises(InvalidTokenError):
        next(client.watch_jobs(resume_token="nonsense"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("end", ENDS)
def test_a_watch_goes_on_with_its_token_after(connect, end):
    with ScriptedServer(WatchJobs=[ENDS[end], THE_REST]) as server:
        watch = connect(server.address).watch_jobs()
        assert [brief(next(watch)) for _ in range(4)] == [("SNAPSHOT", 1), ("SYNCED", 0), ("UPDATED", 2), ("SYNCED", 0)]
        assert watch.resume_token == "t2"
        watch.close()
    assert [request.resume_token for request in server.requests["WatchJobs"][:2]] == ["", "t1"]


@pytest.mark.parametrize("code", RAISED, ids=lambda code: code.name)
def test_a_watch_raises_what_does_not_pass(connect, code):
    with ScriptedServer(WatchJobs=[fail(code)]) as server, pytest.raises(JobStatusError, match="as scripted"):
        next(connect(server.address).watch_jobs())
    assert len(server.requests["WatchJobs"]) == 1


def test_a_watch_leaves_a_server_that_says_nothing(connect):
    with ScriptedServer(WatchJobs=[]) as server:
        server.script("WatchJobs", a_stream(BEGINNING, then=server.silence), THE_REST)
        watch = connect(server.address).watch_jobs(heartbeat_interval_seconds=0.1)
        assert brief([next(watch) for _ in range(3)][-1]) == ("UPDATED", 2)
        assert server.ended.acquire(timeout=10)
        watch.close()


@rerun_after_pause(0.1)
def test_a_caller_that_is_slow_over_one_message_keeps_the_stream(connect):
    many = [("UPDATED", a_job(revision)) for revision in range(1, 8)]
    with ScriptedServer(WatchJobs=[]) as server:
        server.script("WatchJobs", a_stream(some_events(*many), BEGINNING, then=server.silence))
        watch = connect(server.address).watch_jobs(heartbeat_interval_seconds=0.1)
        for _ in many:
            next(watch)
            time.sleep(0.1)
        assert brief(next(watch)) == ("SYNCED", 0)
        assert len(server.requests["WatchJobs"]) == 1
        watch.close()


def test_a_watch_gives_up_after_its_limit(connect, unused_address):
    with pytest.raises(UnavailableError, match=r"nothing was heard from the server for 0\.3 s"):
        next(connect(unused_address).watch_jobs(give_up_seconds=0.3))


def test_a_watch_sends_its_settings(connect):
    with ScriptedServer(WatchJobs=[a_stream(BEGINNING)]) as server:
        client = connect(server.address)
        settings = {"heartbeat_interval_seconds": 2, "min_update_interval_seconds": 0, "resume_token": "t0"}
        for watch in (client.watch_jobs(), client.watch_jobs(JobFilter(names=["n"]), **settings)):
            next(watch)
            watch.close()
    plain, full = server.requests["WatchJobs"][:2]
    assert plain == pb.WatchJobsRequest()
    assert (full.filter.names, full.heartbeat_interval.seconds, full.resume_token) == (["n"], 2, "t0")
    assert full.HasField("min_update_interval")


def test_closing_the_client_ends_its_watches(connect, background):
    with ScriptedServer(WatchJobs=[]) as server:
        server.script("WatchJobs", a_stream(BEGINNING, then=server.silence))
        client = connect(server.address)
        watch = client.watch_jobs()
        reading = background(lambda: list(watch))
        server.await_request("WatchJobs")
        client.close()
        with pytest.raises(UnavailableError, match="closed"):
            reading.result()


def test_leaving_a_watch_ends_its_stream_at_once():
    async def main() -> None:
        async with AsyncJobStatusClient(server.address) as client:
            async for _ in client.watch_jobs():
                break
            gc.collect()
            assert await asyncio.to_thread(server.ended.acquire, timeout=10)

    with ScriptedServer(WatchJobs=[]) as server:
        server.script("WatchJobs", a_stream(BEGINNING, then=server.silence))
        asyncio.run(main())


def test_a_cancelled_anext_loses_nothing():
    async def main() -> None:
        async with AsyncJobStatusClient(server.address) as client:
            watch = client.watch_jobs(heartbeat_interval_seconds=0.1)
            seen = [brief(await anext(watch)), brief(await anext(watch))]
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(watch), 0.05)
            assert [*seen, brief(await anext(watch))] == [("SNAPSHOT", 1), ("SYNCED", 0), ("UPDATED", 2)]

    with ScriptedServer(WatchJobs=[]) as server:
        server.script("WatchJobs", a_stream(BEGINNING, then=server.silence), THE_REST)
        asyncio.run(main())


@pytest.mark.slow
def test_a_watch_behind_a_proxy_that_cuts_long_answers_gets_all_jobs(connect, memory_address, new_id):
    parent, found = new_id(), set[str]()
    with JobStatusClient(memory_address) as writer:
        jobs = {writer.create(parent_id=parent, reason="x" * 4000).id for _ in range(200)}
    with TcpProxy(memory_address, max_bytes=200_000) as proxy:
        for change in connect(proxy.address).watch_jobs(JobFilter(parent_id=parent)):
            if change.type is JobChangeType.RESET:
                found.clear()
            elif change.type is JobChangeType.SYNCED:
                break
            found.add(change.id)
    assert found - {""} == jobs
