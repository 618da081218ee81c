"""One asyncio client in several event loops: one after another, and at once."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import AsyncJobStatusClient, JobState, UnavailableError
from tests.support.scripted_server import ScriptedServer, a_job, fail, reply


def test_a_client_serves_one_event_loop_after_another(memory_address):
    async def use() -> None:
        job = await client.create(state=JobState.IN_PROGRESS)
        async with client.watch(job.id) as watch:
            await anext(watch)
        async with client.track("in any loop", strict=True), client.reporter() as reporter:
            reporter.update(job.id, state=JobState.SUCCEEDED, attempt=1)
        assert (await client.wait(job.id, timeout=10)).state is JobState.SUCCEEDED

    client = AsyncJobStatusClient(memory_address)
    for _ in range(3):
        asyncio.run(use())
    asyncio.run(client.close())


def test_a_watch_goes_on_in_another_event_loop(memory_address):
    async def begin() -> tuple[Any, str]:
        job = await client.create()
        watch = client.watch(job.id)
        await anext(watch)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(watch), 0.1)
        return watch, job.id

    async def end(watch: Any, job_id: str) -> None:
        await client.update(job_id, state=JobState.SUCCEEDED)
        assert [job.state async for job in watch] == [JobState.SUCCEEDED]
        await client.close()

    client = AsyncJobStatusClient(memory_address)
    asyncio.run(end(*asyncio.run(begin())))


def test_a_call_is_retried_in_each_event_loop():
    async def use() -> None:
        assert (await client.get("a")).id == "a"

    got, cut = reply(pb.GetJobResponse(job=a_job())), fail(grpc.StatusCode.UNAVAILABLE)
    with ScriptedServer(GetJob=[cut, got, cut, got]) as server:
        client = AsyncJobStatusClient(server.address)
        asyncio.run(use())
        asyncio.run(use())
        asyncio.run(client.close())


def test_a_client_that_is_closed_in_one_event_loop_is_closed_in_another(memory_address):
    async def main() -> None:
        client = AsyncJobStatusClient(memory_address)
        job = await client.create()
        watch = client.watch(job.id)
        await anext(watch)
        reading = asyncio.ensure_future(anext(watch))
        assert await asyncio.to_thread(asyncio.run, client.get(job.id)) == job
        await asyncio.to_thread(asyncio.run, client.close())
        with pytest.raises(UnavailableError, match="closed"):
            await asyncio.wait_for(reading, 10)
        with pytest.raises(UnavailableError, match="closed"):
            await client.get(job.id)

    asyncio.run(main())
