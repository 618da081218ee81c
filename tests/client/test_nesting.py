"""Jobs that are tracked inside another one's block are its children."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import Any

import pytest

from jobstatus_grpc import AsyncJobStatusClient, JobStatusClient
from tests.support.servers import ServerProcess


@pytest.fixture
def sync_client(service):
    with JobStatusClient(service.address) as client:
        yield client


def test_a_job_tracked_in_a_block_is_a_child_of_the_block_s_job(sync_client):
    with sync_client.track("outer") as outer:
        with sync_client.track("inner") as inner, sync_client.track("innermost") as innermost:
            assert sync_client.get(innermost.id).parent_id == inner.id
        assert sync_client.get(inner.id).parent_id == outer.id
        with sync_client.track("second") as second:
            assert sync_client.get(second.id).parent_id == outer.id
    with sync_client.track("after") as after:
        assert sync_client.get(after.id).parent_id == ""


@pytest.mark.parametrize("parent_id", ["", "other"])
def test_a_parent_that_is_given_counts(sync_client, parent_id):
    with sync_client.track("outer"), sync_client.track("inner", parent_id=parent_id) as inner:
        assert sync_client.get(inner.id).parent_id == parent_id


def test_a_block_that_raises_is_left(sync_client):
    with pytest.raises(ValueError, match="no disk"), sync_client.track("outer"):
        raise ValueError("no disk")
    with sync_client.track("after") as after:
        assert sync_client.get(after.id).parent_id == ""


def test_a_job_whose_block_has_ended_is_no_parent_in_whichever_order_blocks_end(sync_client):
    with sync_client.track("outer") as outer:
        for _ in zip(sync_client.track_iter([1, 2], "longer"), sync_client.track_iter([1], "shorter"), strict=False):
            pass
        with sync_client.track("later") as later:
            assert sync_client.get(later.id).parent_id == outer.id


def test_a_job_whose_block_ends_in_another_context_is_no_parent_afterwards(service):
    async def main():
        async with AsyncJobStatusClient(service.address) as client:
            items: Any = client.track_iter([1, 2], "left")
            async for _ in items:
                break
            await asyncio.create_task(items.aclose())
            async with client.track("later") as later:
                return (await client.get(later.id)).parent_id

    assert asyncio.run(main()) == ""


def test_another_thread_is_outside_of_the_block_unless_it_runs_in_its_context(sync_client):
    parents = []

    def work():
        with sync_client.track("inner") as inner:
            parents.append(sync_client.get(inner.id).parent_id)

    with sync_client.track("outer") as outer:
        context = contextvars.copy_context()
        for thread in (threading.Thread(target=work), threading.Thread(target=context.run, args=[work])):
            thread.start()
            thread.join()
    assert parents == ["", outer.id]


def test_tasks_of_a_block_are_inside_of_it_and_others_are_not(service):
    async def work(client):
        async with client.track("inner") as inner:
            return (await client.get(inner.id)).parent_id

    async def main():
        async with AsyncJobStatusClient(service.address) as client:
            outside = asyncio.Event()

            async def wait_and_work():
                await outside.wait()
                return await work(client)

            other = asyncio.create_task(wait_and_work())
            async with client.track("outer") as outer:
                outside.set()
                inside: list[str] = await asyncio.gather(work(client), work(client))
                assert inside == [outer.id] * 2
                assert await other == ""

    asyncio.run(main())


def test_a_job_of_another_server_is_no_parent(sync_client):
    with (
        ServerProcess() as server,
        JobStatusClient(server.address) as other,
        sync_client.track("outer"),
        other.track("inner") as inner,
    ):
        assert other.get(inner.id).parent_id == ""
