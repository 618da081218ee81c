"""Closed clients leave no thread, no task, no channel, and no process that does not exit."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from jobstatus_grpc import AsyncJobStatusClient, JobState, JobStatusClient

PRELUDE = """
import asyncio, sys, threading
from jobstatus_grpc import AsyncJobStatusClient, JobStatusClient, UnavailableError
def read(watch):
    try:
        next(watch)
    except UnavailableError:
        pass
address = sys.argv[1]
client = JobStatusClient(address)
job = client.create()
"""
# Each leaves something open; its process must exit all the same.
SCRIPTS = {
    "a watch": "watch = client.watch(job.id); next(watch)",
    "a watch in a daemon thread": """
watch = client.watch(job.id); next(watch)
threading.Thread(target=read, args=[watch], daemon=True).start()
""",
    "a watch that finds no server": """
watch = JobStatusClient("127.0.0.1:1").watch("a")
threading.Thread(target=read, args=[watch], daemon=True).start()
""",
    "a tracked job": "tracked = client.track(); tracked.__enter__(); tracked.progress(1)",
    "a watch of many jobs": "watch = client.watch_jobs(); next(watch)",
    "a reporter": "reporter = client.reporter(); reporter.__enter__(); reporter.update(job.id, progress=1)",
    "an asyncio reporter": """
async def main():
    global reporter
    reporter = AsyncJobStatusClient(address).reporter()
    await reporter.__aenter__()
    reporter.update(job.id, progress=1)
    await reporter.flush()
asyncio.run(main())
""",
    "an asyncio watch": """
async def main():
    global watch
    watch = AsyncJobStatusClient(address).watch(job.id)
    await anext(watch)
asyncio.run(main())
""",
    "an asyncio watch in a task": """
async def main():
    global task, seen
    seen = asyncio.Event()
    async def work():
        async for _ in AsyncJobStatusClient(address).watch(job.id):
            seen.set()
    task = asyncio.create_task(work())
    await seen.wait()
asyncio.run(main())
""",
    "an asyncio client that was never used": "client = AsyncJobStatusClient(address)",
}


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("jobstatus")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_process_ends_quietly_though_it_left_open(script, memory_address):
    command = [sys.executable, "-W", "error", "-c", PRELUDE + SCRIPTS[script], memory_address]
    ended = subprocess.run(command, timeout=30, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_watches_leave_no_thread_behind(memory_address):
    with JobStatusClient(memory_address) as client:
        job = client.create()
        watches = [client.watch(job.id) for _ in range(5)]
        for watch in watches:
            next(watch)
        assert threads_of_ours() == ["jobstatus-watchdog"]
        client.update(job.id, state=JobState.SUCCEEDED)
        for watch in watches:
            list(watch)
        deadline = time.monotonic() + 10
        while threads_of_ours() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threads_of_ours() == []


def test_reporters_leave_no_thread_behind(memory_address):
    with JobStatusClient(memory_address) as client, client.reporter() as reporter:
        reporter.update("no-such-job")
        assert "jobstatus-reporter" in threads_of_ours()
    assert "jobstatus-reporter" not in threads_of_ours()


def test_closed_clients_can_be_forgotten(memory_address):
    async def use_aio() -> weakref.ref:
        async with AsyncJobStatusClient(memory_address) as client:
            job = await client.create()
            async for _ in client.watch(job.id):
                break
            async for _ in client.watch_jobs():
                break
            async with client.track(), client.reporter() as reporter:
                reporter.update(job.id, progress=1)
            return weakref.ref(client._connection)

    def use_sync() -> weakref.ref:
        with JobStatusClient(memory_address) as client:
            job = client.create()
            next(client.watch(job.id))
            next(client.watch_jobs())
            with client.track(), client.reporter() as reporter:
                reporter.update(job.id, progress=1)
            return weakref.ref(client._connection)

    left = [asyncio.run(use_aio()), use_sync()]
    gc.collect()
    assert [reference() for reference in left] == [None, None]


@pytest.mark.parametrize("method", ["watch", "watch_jobs"])
def test_a_watch_that_is_dropped_can_be_forgotten(memory_address, method):
    with JobStatusClient(memory_address) as client:
        job = client.create()
        watch = client.watch_jobs() if method == "watch_jobs" else client.watch(job.id)
        next(watch)
        left = weakref.ref(watch)
        del watch
        gc.collect()
        assert left() is None
