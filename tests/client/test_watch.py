"""Watches of a real server: from now to the end, over crashes and drains."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest

from jobstatus_grpc import (
    AsyncJobStatusClient,
    DeadlineExceededError,
    JobNotFoundError,
    JobState,
    JobStatusClient,
    UnavailableError,
)
from tests.client.scripted import ScriptedServer, a_job, a_stream, an_event
from tests.processes import ServerProcess


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


def test_wait_ends_with_its_timeout_where_nobody_is_there(connect, unused_address):
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


def test_closing_a_watch_ends_its_stream_and_whoever_waits_for_it(connect, background):
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
    """A job, and then nothing for ever."""
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
