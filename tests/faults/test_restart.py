"""A server that restarts, or is suspended: our clients see nothing but a pause."""

from __future__ import annotations

import asyncio
import signal

import pytest

from jobstatus_grpc import AsyncJobStatusClient, JobState
from tests.support.load import background_tasks, follow
from tests.support.servers import ServerProcess

RESTARTS = 3
CROWD = 300


@pytest.mark.slow
def test_no_call_of_our_client_fails_and_no_watch_ends_while_the_server_is_replaced_again_and_again(
    tmp_path, record_fault
):
    server = ServerProcess("--log-level", "warning", store=f"sqlite:///{tmp_path}/jobs.db")

    async def report(client, job, is_over):
        number = 0
        while not is_over.is_set():
            number += 1
            reply = await client.update(job.id, attempt=1, labels={"n": str(number)}, timeout_seconds=20)
            assert reply.revision == job.revision + number, "a report has one effect"
        return await client.update(job.id, attempt=1, state=JobState.SUCCEEDED)

    async def scenario():
        is_over = asyncio.Event()
        async with AsyncJobStatusClient(server.address) as client, background_tasks() as start:
            jobs = [await client.create(id=f"job-{number}", state=JobState.IN_PROGRESS) for number in range(8)]
            watches = [start(follow(client, job.id)) for job in jobs for _ in range(3)]
            workers = [start(report(client, job, is_over)) for job in jobs]
            for _ in range(RESTARTS):
                await asyncio.sleep(0.3)
                assert await asyncio.to_thread(server.terminate) == 0
                await asyncio.to_thread(server.start)
            is_over.set()
            ends = {job.id: job for job in await asyncio.gather(*workers)}
            for seen in await asyncio.gather(*watches):
                assert seen[-1] == ends[seen[-1].id]
            return sum(job.revision for job in ends.values())

    with server:
        updates = asyncio.run(asyncio.wait_for(scenario(), 50))
    record_fault(
        "SIGTERM and a new start, under workers of our client",
        count=RESTARTS,
        checked=f"{updates:,} updates, 24 watches to the end",
        result="each took effect once, no call failed, no watch ended early",
    )


@pytest.mark.parametrize("grace", ["10s", "0s"])
def test_a_crowd_of_calls_under_way_when_the_server_goes_all_take_effect_once(tmp_path, grace, record_fault):
    async def scenario(server):
        async with AsyncJobStatusClient(server.address) as client, background_tasks() as start:
            jobs = [await client.create(state=JobState.IN_PROGRESS) for _ in range(CROWD)]
            calls = [start(client.update(job.id, attempt=1, reason="x", timeout_seconds=20)) for job in jobs]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            assert await asyncio.to_thread(server.terminate) == 0
            await asyncio.to_thread(server.start)
            assert {reply.revision for reply in await asyncio.gather(*calls)} == {2}

    flags = ["--log-level", "warning", "--drain-grace", grace]
    with ServerProcess(*flags, store=f"sqlite:///{tmp_path}/jobs.db") as server:
        asyncio.run(asyncio.wait_for(scenario(server), 50))
    record_fault(
        f"SIGTERM and a new start, with calls under way, --drain-grace {grace}",
        count=1,
        checked=f"{CROWD} updates at once",
        result="each took effect once",
    )


@pytest.mark.slow
def test_a_watch_notices_a_server_that_stands_still_and_goes_on_with_it():
    async def scenario(server):
        async with AsyncJobStatusClient(server.address) as client:
            job = await client.create(state=JobState.IN_PROGRESS)
            watch = client.watch(job.id, heartbeat_interval_seconds=1)
            assert (await anext(watch)).revision == 1
            server.signal(signal.SIGSTOP)
            standing = asyncio.ensure_future(anext(watch))
            await asyncio.wait([standing], timeout=4)
            assert not standing.done()
            server.signal(signal.SIGCONT)
            ended = await client.update(job.id, state=JobState.FAILED, timeout_seconds=20)
            assert await standing == ended

    with ServerProcess() as server:
        asyncio.run(asyncio.wait_for(scenario(server), 30))
