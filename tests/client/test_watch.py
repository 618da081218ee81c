"""Watches of one job: on a real server over crashes and drains, and on scripted servers that fail."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import (
    AsyncJobStatusClient,
    DeadlineExceededError,
    JobFilter,
    JobNotFoundError,
    JobState,
    JobStatusClient,
    TooManyRequestsError,
    TooManyWatchersError,
    UnavailableError,
)
from jobstatus_grpc.errors import JobStatusError, PermissionDeniedError, StreamAgeError
from tests.support.scripted_server import (
    Answer,
    ScriptedServer,
    a_done_job,
    a_job,
    a_stream,
    an_event,
    fail,
    refuse,
    some_events,
)
from tests.support.servers import ServerProcess
from tests.support.timing import rerun_after_pause


def test_a_watch_begins_with_now_and_ends_with_the_done_job(client):
    job = client.create()
    watch = client.watch(job.id, min_update_interval_seconds=0)
    assert next(watch) == job
    client.update(job.id, state=JobState.IN_PROGRESS, progress=10)
    assert next(watch).progress == 10
    client.update(job.id, state=JobState.SUCCEEDED)
    assert [job.state for job in watch] == [JobState.SUCCEEDED]
    assert list(watch) == []


def test_a_watch_of_a_done_job_yields_it_and_ends(client):
    job = client.create()
    done = client.update(job.id, state=JobState.ABORTED)
    assert list(client.watch(job.id)) == [done]


def test_a_watch_of_an_unknown_job_says_so_once(client):
    watch = client.watch("no-such-job")
    with pytest.raises(JobNotFoundError):
        next(watch)
    assert list(watch) == []


def test_a_watch_survives_a_crash_and_misses_nothing_that_counts(connect, sqlite_server, background):
    client = connect(sqlite_server.address)
    job = client.create(state=JobState.IN_PROGRESS)
    watch = client.watch(job.id)
    seen = [next(watch).revision]
    sqlite_server.kill()
    reading = background(lambda: [job.revision for job in watch])
    sqlite_server.start()
    client.update(job.id, progress=50)
    done = client.update(job.id, state=JobState.SUCCEEDED)
    seen += reading.result()
    assert seen[0] == 1
    assert seen[-1] == done.revision
    assert seen == sorted(set(seen))


def test_a_watch_survives_a_drain(connect, sqlite_server, background):
    client = connect(sqlite_server.address)
    job = client.create()
    watch = client.watch(job.id)
    next(watch)
    reading = background(lambda: [job.state for job in watch])
    assert sqlite_server.terminate() == 0
    sqlite_server.start()
    client.update(job.id, state=JobState.SUCCEEDED)
    assert reading.result() == [JobState.SUCCEEDED]


def test_a_watch_raises_where_its_job_is_gone_after_a_restart(connect, background):
    with ServerProcess() as server:
        client = connect(server.address)
        watch = client.watch(client.create().id)
        next(watch)
        reading = background(lambda: next(watch))
        server.restart()
        with pytest.raises(JobNotFoundError):
            reading.result()


def test_wait_returns_the_done_job(client, background):
    job = client.create()
    waiting = background(lambda: client.wait(job.id))
    done = client.update(job.id, state=JobState.FAILED, reason="broken")
    assert waiting.result() == done


def test_wait_survives_a_crash(connect, sqlite_server, background):
    client = connect(sqlite_server.address)
    job = client.create()
    waiting = background(lambda: client.wait(job.id, timeout=30))
    sqlite_server.restart()
    client.update(job.id, state=JobState.SUCCEEDED)
    assert waiting.result().state is JobState.SUCCEEDED


def test_wait_ends_with_its_timeout(client):
    job = client.create()
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError, match=job.id):
        client.wait(job.id, timeout=0.3)
    assert 0.25 < time.monotonic() - began < 5


def test_wait_ends_with_its_timeout_where_no_server_is(connect, unused_address):
    with pytest.raises(DeadlineExceededError):
        connect(unused_address).wait("a", timeout=0.3)


def test_wait_for_an_unknown_job_raises(client):
    with pytest.raises(JobNotFoundError):
        client.wait("no-such-job", timeout=5)


def test_closing_the_client_ends_its_watches(connect, background, memory_address):
    client = connect(memory_address)
    watch = client.watch(client.create().id)
    next(watch)
    reading = background(lambda: next(watch))
    client.close()
    with pytest.raises(UnavailableError, match="closed"):
        reading.result()
    assert list(watch) == []


def test_closing_a_watch_ends_its_stream_and_its_waiting_callers(connect, background):
    with a_quiet_server() as server:
        watch = connect(server.address).watch("a")
        next(watch)
        reading = background(lambda: list(watch))
        watch.close()
        assert reading.result() == []
        assert server.ended.acquire(timeout=10)


def test_closing_a_watch_ends_its_wait_for_the_next_stream(connect, background, unused_address, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: 10.0)
    watch = connect(unused_address).watch("a")
    reading = background(lambda: list(watch))
    time.sleep(0.1)
    watch.close()
    assert reading.result() == []


async def no_task_is_left() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    assert not tasks or not (await asyncio.wait(tasks, timeout=10))[1]


def a_quiet_server() -> ScriptedServer:
    """A server that sends a job, and then nothing."""
    server = ScriptedServer(WatchJob=[])
    server.script("WatchJob", a_stream(an_event(a_job()), then=server.silence))
    return server


async def leave_by_break(client: AsyncJobStatusClient) -> None:
    async for _ in client.watch("a"):
        break


async def leave_by_aclose(client: AsyncJobStatusClient) -> None:
    watch = client.watch("a")
    await anext(watch)
    await watch.aclose()
    assert [job async for job in watch] == []


async def leave_by_block(client: AsyncJobStatusClient) -> None:
    async with client.watch("a") as watch:
        await anext(watch)


async def leave_by_task(client: AsyncJobStatusClient) -> None:
    watch = client.watch("a")
    await anext(watch)
    reading = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_aclose, leave_by_block, leave_by_task])
def test_leaving_a_watch_ends_its_stream_at_once(leave):
    async def main() -> None:
        async with AsyncJobStatusClient(server.address) as client:
            await leave(client)
            gc.collect()
            assert await asyncio.to_thread(server.ended.acquire, timeout=10)
            await no_task_is_left()

    with a_quiet_server() as server:
        asyncio.run(main())


def stop_by_break(client: JobStatusClient) -> None:
    for _ in client.watch("a"):
        break


def stop_by_close(client: JobStatusClient) -> None:
    watch = client.watch("a")
    next(watch)
    watch.close()
    assert list(watch) == []


def stop_by_block(client: JobStatusClient) -> None:
    with client.watch("a") as watch:
        next(watch)


@pytest.mark.parametrize("stop", [stop_by_break, stop_by_close, stop_by_block])
def test_leaving_a_watch_ends_its_stream_at_once_also_without_asyncio(stop):
    with a_quiet_server() as server, JobStatusClient(server.address) as client:
        stop(client)
        assert server.ended.acquire(timeout=10)


def test_a_cancelled_anext_loses_nothing(memory_address):
    async def main() -> None:
        async with AsyncJobStatusClient(memory_address) as client:
            job = await client.create()
            watch = client.watch(job.id)
            await anext(watch)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(watch), 0.05)
            done = await client.update(job.id, state=JobState.SUCCEEDED)
            assert [job async for job in watch] == [done]

    asyncio.run(main())


def slowly(*messages: bytes, then: Answer) -> Answer:
    """A stream with pauses between its messages, which goes on as `then` does."""

    def answer(request, context):
        for message in messages:
            yield message
            time.sleep(0.3)
        then(request, context)

    return answer


async def poll(watch: Any, timeout_seconds: float, polls: int) -> list[Any]:
    """Read what `watch` yields in `polls` reads, each cancelled after `timeout_seconds`."""
    items = []
    for _ in range(polls):
        with contextlib.suppress(asyncio.TimeoutError):
            items.append(await asyncio.wait_for(anext(watch), timeout_seconds))
    return items


def test_a_watch_that_is_polled_stays_on_its_stream():
    async def main() -> None:
        async with AsyncJobStatusClient(server.address) as client:
            jobs = await poll(client.watch("a"), 0.05, polls=30)
            assert [job.revision for job in jobs] == [1, 2]

    with ScriptedServer(WatchJob=[]) as server:
        server.script("WatchJob", slowly(an_event(a_job(1)), an_event(a_job(2)), then=server.silence))
        asyncio.run(main())
    assert len(server.requests["WatchJob"]) == 1


def test_a_watch_of_many_jobs_that_is_polled_stays_on_its_stream():
    async def main() -> None:
        async with AsyncJobStatusClient(server.address) as client:
            changes = await poll(client.watch_jobs(), 0.05, polls=30)
            assert [change.revision for change in changes] == [1, 2]

    with ScriptedServer(WatchJobs=[]) as server:
        messages = [some_events(("SNAPSHOT", a_job(1))), some_events(("UPDATED", a_job(2)))]
        server.script("WatchJobs", slowly(*messages, then=server.silence))
        asyncio.run(main())
    assert len(server.requests["WatchJobs"]) == 1


def test_a_watch_that_is_polled_keeps_its_pauses(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)

    async def main() -> None:
        async with AsyncJobStatusClient(server.address) as client:
            assert await poll(client.watch("a"), 0.02, polls=40) == []

    with ScriptedServer(WatchJob=[fail(grpc.StatusCode.UNAVAILABLE)]) as server:
        asyncio.run(main())
    assert len(server.requests["WatchJob"]) < 10


class HandlerError(Exception):
    """What a signal handler raises."""


@contextlib.contextmanager
def signals(after_seconds: float) -> Iterator[None]:
    """Send this process one signal, in whose handler an error is raised."""

    def interrupt(*_: object) -> None:
        raise HandlerError

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(after_seconds, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_a_watch_goes_on_after_a_signal_handler_that_raises(memory_address):
    with JobStatusClient(memory_address) as client:
        job = client.create()
        watch, changes = client.watch(job.id), client.watch_jobs(JobFilter(ids=[job.id]))
        for items in (watch, changes):
            list(itertools.islice(items, 1 if items is watch else 2))
            with signals(after_seconds=0.2), pytest.raises(HandlerError):
                next(items)
        done = client.update(job.id, state=JobState.SUCCEEDED)
        assert next(watch) == done
        assert {next(changes).revision, next(changes).revision} >= {done.revision}


FULL, BUSY = TooManyWatchersError(), TooManyRequestsError()
FULL.retry_after_seconds = BUSY.retry_after_seconds = 0.05
CODES_OF_PROXIES = [
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
]
ENDS = {
    "UNAVAILABLE": a_stream(an_event(a_job(1)), then=fail(grpc.StatusCode.UNAVAILABLE)),
    "INTERNAL": a_stream(an_event(a_job(1)), then=fail(grpc.StatusCode.INTERNAL)),
    "UNKNOWN": a_stream(an_event(a_job(1)), then=fail(grpc.StatusCode.UNKNOWN)),
    "CANCELLED": a_stream(an_event(a_job(1)), then=fail(grpc.StatusCode.CANCELLED)),
    "RESOURCE_EXHAUSTED once opened": a_stream(an_event(a_job(1)), then=refuse(FULL)),
    "OK without a done job": a_stream(an_event(a_job(1))),
    "a message that is no message": a_stream(an_event(a_job(1)), b"\xff\xff"),
    "a job that makes no sense": a_stream(an_event(a_job(1)), an_event(a_job(2, created=2**60))),
    **{f"{code.name} of a proxy": a_stream(an_event(a_job(1)), then=fail(code)) for code in CODES_OF_PROXIES},
}
OPENINGS = {
    "UNAVAILABLE": fail(grpc.StatusCode.UNAVAILABLE),
    "INTERNAL": fail(grpc.StatusCode.INTERNAL),
    "UNKNOWN": fail(grpc.StatusCode.UNKNOWN),
    "CANCELLED": fail(grpc.StatusCode.CANCELLED),
    "OK without anything": a_stream(),
    "TOO_MANY_REQUESTS": refuse(BUSY),
}
RAISED = [
    code
    for code in grpc.StatusCode
    if code is not grpc.StatusCode.OK and code.name not in ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED")
]
EXHAUSTED = "RESOURCE_EXHAUSTED"
THE_END = a_stream(an_event(a_job(2)), an_event(a_done_job(3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("end", ENDS)
def test_a_watch_goes_on_after(connect, end):
    with ScriptedServer(WatchJob=[ENDS[end], THE_END]) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("end", ENDS)
def test_a_watch_that_is_left_after_a_cut_ends_its_stream_at_once(end):
    async def main() -> None:
        async with AsyncJobStatusClient(server.address) as client:
            async for job in client.watch("a"):
                if job.revision == 2:
                    break
            assert await asyncio.to_thread(server.ended.acquire, timeout=5)
            assert await asyncio.to_thread(server.ended.acquire, timeout=5)

    with ScriptedServer(WatchJob=[]) as server:
        quiet = a_stream(an_event(a_job(2)), then=server.silence)
        server.script("WatchJob", ENDS[end], quiet, ENDS[end], quiet)
        gc.disable()
        try:
            asyncio.run(main())
            with JobStatusClient(server.address) as client:
                for job in client.watch("a"):
                    if job.revision == 2:
                        break
                assert server.ended.acquire(timeout=5)
                assert server.ended.acquire(timeout=5)
        finally:
            gc.enable()


@pytest.mark.parametrize("code", CODES_OF_PROXIES, ids=lambda code: code.name)
def test_a_watch_raises_what_a_proxy_refuses_for_too_long(connect, monkeypatch, code):
    monkeypatch.setattr("jobstatus_grpc.client.retry.PROXY_REFUSAL_SECONDS", 0.2)
    with ScriptedServer(WatchJob=[a_stream(an_event(a_job(1)), then=fail(code)), fail(code)]) as server:
        watch = connect(server.address).watch("a")
        next(watch)
        with pytest.raises(JobStatusError, match="as scripted"):
            next(watch)
    assert len(server.requests["WatchJob"]) > 1


def test_a_watch_raises_a_refusal_of_the_service_also_once_opened(connect):
    denied = refuse(PermissionDeniedError())
    with ScriptedServer(WatchJob=[a_stream(an_event(a_job()), then=denied)]) as server:
        watch = connect(server.address).watch("a")
        next(watch)
        with pytest.raises(PermissionDeniedError):
            next(watch)


def test_wait_survives_the_deadline_of_a_proxy(connect):
    cut = a_stream(an_event(a_job(1)), then=fail(grpc.StatusCode.DEADLINE_EXCEEDED))
    with ScriptedServer(WatchJob=[cut, THE_END]) as server:
        assert connect(server.address).wait("a", timeout=10).revision == 3


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_watch_opens_in_the_end_after(connect, opening):
    with ScriptedServer(WatchJob=[OPENINGS[opening], THE_END]) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [2, 3]


@pytest.mark.parametrize("code", RAISED, ids=lambda code: code.name)
def test_a_watch_raises_what_does_not_pass(connect, code):
    with ScriptedServer(WatchJob=[fail(code)]) as server, pytest.raises(JobStatusError, match="as scripted"):
        next(connect(server.address).watch("a"))
    assert len(server.requests["WatchJob"]) == 1


@pytest.mark.parametrize(
    "code",
    [code for code in RAISED if code is not grpc.StatusCode.RESOURCE_EXHAUSTED and code not in CODES_OF_PROXIES],
    ids=lambda code: code.name,
)
def test_a_watch_raises_what_does_not_pass_also_once_opened(connect, code):
    with ScriptedServer(WatchJob=[a_stream(an_event(a_job()), then=fail(code))]) as server:
        watch = connect(server.address).watch("a")
        next(watch)
        with pytest.raises(JobStatusError, match="as scripted"):
            next(watch)


def test_a_watch_that_is_refused_a_place_at_its_opening_raises(connect):
    with ScriptedServer(WatchJob=[refuse(FULL)]) as server, pytest.raises(TooManyWatchersError):
        next(connect(server.address).watch("a"))


def test_a_watch_leaves_a_server_that_says_nothing(connect):
    with ScriptedServer(WatchJob=[]) as server:
        silent = a_stream(an_event(a_job(1)), then=server.silence)
        server.script("WatchJob", server.silent_stream, silent, THE_END)
        watch = connect(server.address).watch("a", heartbeat_interval_seconds=0.1)
        assert [job.revision for job in watch] == [1, 2, 3]
        for _ in range(3):
            assert server.ended.acquire(timeout=10)


@rerun_after_pause(0.1)
def test_heartbeats_keep_a_watch_on_its_stream(connect):
    beat = an_event(a_job(1), pb.JobEventType.JOB_EVENT_TYPE_HEARTBEAT)

    def slow(request, context):
        for message in [an_event(a_job(1)), beat, beat, beat, beat, beat, an_event(a_done_job(2))]:
            yield message
            time.sleep(0.1)

    with ScriptedServer(WatchJob=[slow]) as server:
        watch = connect(server.address).watch("a", heartbeat_interval_seconds=0.1)
        assert [job.revision for job in watch] == [1, 2]
    assert len(server.requests["WatchJob"]) == 1


def test_what_was_seen_last_is_not_seen_again(connect):
    first = a_stream(an_event(a_job(1)), an_event(a_job(2)), an_event(a_job(2)))
    again = a_stream(an_event(a_job(2), pb.JobEventType.JOB_EVENT_TYPE_SNAPSHOT))
    with ScriptedServer(WatchJob=[first, again, THE_END]) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [1, 2, 3]


def test_a_job_whose_store_was_put_back_is_shown_as_it_is_now(connect):
    with ScriptedServer(WatchJob=[a_stream(an_event(a_job(1)), an_event(a_job(7))), THE_END]) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [1, 7, 2, 3]


def test_a_job_that_was_made_anew_is_news(connect):
    with ScriptedServer(
        WatchJob=[a_stream(an_event(a_job(3))), a_stream(an_event(a_job(3, created=2))), THE_END]
    ) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [3, 3, 2, 3]


def test_events_of_other_kinds_are_passed_over(connect):
    others = [type for type in range(10) if type not in (1, 2, 5)]
    messages = [an_event(a_job(revision), type) for revision, type in enumerate(others, 1)]
    empty = pb.WatchJobResponse().SerializeToString()
    with ScriptedServer(WatchJob=[a_stream(empty, *messages, an_event(a_done_job(99)))]) as server:
        assert [job.revision for job in connect(server.address).watch("a")] == [99]


def test_a_done_job_ends_a_watch_whatever_the_server_does(connect, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.client.watch.END_SECONDS", 0.1)
    with ScriptedServer(WatchJob=[]) as server:
        server.script("WatchJob", a_stream(an_event(a_done_job()), then=server.silence))
        assert [job.state for job in connect(server.address).watch("a")] == [JobState.SUCCEEDED]
        assert server.ended.acquire(timeout=10)


def test_a_done_job_of_a_state_from_the_future_ends_a_watch(connect):
    with ScriptedServer(WatchJob=[a_stream(an_event(a_job(state=99, done=True)))]) as server:
        (job,) = connect(server.address).watch("a")
    assert job.done


def test_a_watch_sends_its_settings(connect):
    with ScriptedServer(WatchJob=[THE_END]) as server:
        client = connect(server.address)
        list(client.watch("a"))
        list(client.watch("a", heartbeat_interval_seconds=2, min_update_interval_seconds=0))
    first, second = server.requests["WatchJob"]
    assert not first.HasField("heartbeat_interval")
    assert not first.HasField("min_update_interval")
    assert (second.heartbeat_interval.seconds, second.HasField("min_update_interval")) == (2, True)


def test_a_watch_waits_as_long_as_the_server_asks(connect):
    aged = StreamAgeError()
    aged.retry_after_seconds = 0.4
    with ScriptedServer(WatchJob=[refuse(aged), THE_END]) as server:
        began = time.monotonic()
        list(connect(server.address).watch("a"))
    assert time.monotonic() - began >= 0.4


def test_a_watch_gives_up_after_its_limit(connect, unused_address):
    began = time.monotonic()
    with pytest.raises(UnavailableError, match=r"nothing was heard from the server for 0\.5 s"):
        next(connect(unused_address).watch("a", give_up_seconds=0.5))
    assert 0.5 <= time.monotonic() - began < 10


def test_a_watch_gives_up_on_a_host_that_does_not_answer(connect):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(UnavailableError, match="silent"):
            next(connect(address).watch("a", give_up_seconds=0.5))


@rerun_after_pause(1)
def test_a_watch_that_gets_messages_does_not_give_up(connect, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: low)
    cut = [a_stream(an_event(a_job(revision)), then=fail(grpc.StatusCode.UNAVAILABLE)) for revision in range(10, 19)]
    with ScriptedServer(WatchJob=[*cut, THE_END]) as server:
        assert len(list(connect(server.address).watch("a", give_up_seconds=3))) == 11


def test_a_row_of_failures_is_logged_once(connect, caplog, monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: low)
    caplog.set_level(logging.WARNING, "jobstatus_grpc.client")
    with ScriptedServer(WatchJob=[fail(grpc.StatusCode.UNAVAILABLE)] * 4 + [THE_END]) as server:
        list(connect(server.address).watch("a"))
    assert [record.getMessage().split("(")[0] for record in caplog.records] == [
        "the watch of job a was cut ",
        "the watch of job a is resumed",
    ]


def test_a_watch_cancelled_while_its_server_is_silent_is_cancelled():
    async def main() -> None:
        async with AsyncJobStatusClient(server.address) as client:
            reading = asyncio.ensure_future(anext(client.watch("a")))
            await asyncio.to_thread(server.await_request, "WatchJob")
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    with ScriptedServer(WatchJob=[]) as server:
        server.script("WatchJob", server.silent_stream)
        asyncio.run(main())
