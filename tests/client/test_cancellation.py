"""Blocks that are cancelled more than once, as anyio does: they are left at once, and what they have to say is sent."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from typing import Any

import anyio
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import AsyncJobStatusClient, JobState, JobStatusClient
from tests.support.scripted_server import ScriptedServer, a_done_job, a_job, reply
from tests.support.timing import MAX_PAUSE_SECONDS

CREATED = reply(pb.CreateJobResponse(job=a_job(attempt=1)))
DONE = reply(pb.UpdateJobResponse(job=a_done_job()))


async def cancelled_after_begin(work: Any, count: int) -> None:
    """Run `count` tasks, and cancel their scope once all have begun: `await begun()` in `work`."""
    begun = 0
    all_begun = anyio.Event()

    async def begin() -> None:
        nonlocal begun
        begun += 1
        if begun == count:
            all_begun.set()
        await anyio.sleep(60)

    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(work, begin)
        await all_begun.wait()
        group.cancel_scope.cancel()


def states(address: str, ids: list[str]) -> list[JobState]:
    with JobStatusClient(address) as reader:
        return [reader.get(id).state for id in ids]


def test_the_jobs_of_a_cancelled_scope_are_aborted(memory_address):
    ids: list[str] = []

    async def main() -> None:
        async with AsyncJobStatusClient(memory_address) as client:

            async def work(begin: Any) -> None:
                async with client.track() as tracked:
                    ids.append(tracked.id)
                    await begin()

            await cancelled_after_begin(work, 6)

    asyncio.run(main())
    assert states(memory_address, ids) == [JobState.ABORTED] * 6


def test_the_updates_of_a_reporter_in_a_cancelled_scope_are_sent(memory_address):
    ids: list[str] = []

    async def main() -> None:
        async with AsyncJobStatusClient(memory_address) as client:
            ids.extend([(await client.create()).id for _ in range(20)])

            async def work(begin: Any) -> None:
                async with client.reporter(flush_interval_seconds=60) as reporter:
                    for id in ids:
                        reporter.update(id, state=JobState.FAILED)
                    await begin()

            await cancelled_after_begin(work, 1)

    asyncio.run(main())
    assert states(memory_address, ids) == [JobState.FAILED] * 20


@pytest.mark.parametrize("closes", [True, False])
def test_the_jobs_of_a_cancelled_scope_outlast_their_client_and_the_event_loop(memory_address, closes):
    ids: list[str] = []

    async def work(begin: Any) -> None:
        client = AsyncJobStatusClient(memory_address)
        try:
            async with client.track() as tracked:
                ids.append(tracked.id)
                await begin()
        finally:
            if closes:
                await client.close()

    asyncio.run(cancelled_after_begin(work, 3))
    assert states(memory_address, ids) == [JobState.ABORTED] * 3


def test_a_scope_that_is_cancelled_at_the_begin_of_a_block_aborts_its_job(memory_address):
    async def main() -> str:
        async with AsyncJobStatusClient(memory_address) as client:
            tracked = client.track()
            with anyio.CancelScope() as scope:
                scope.cancel()
                async with tracked:
                    raise AssertionError
            return tracked.id

    assert states(memory_address, [asyncio.run(main())]) == [JobState.ABORTED]


def test_a_cancelled_scope_is_left_at_once_and_what_is_given_up_is_logged(caplog):
    async def main(server: ScriptedServer) -> float:
        server.script("UpdateJob", server.silence)
        server.script("BatchUpdateJobs", server.silence)
        async with AsyncJobStatusClient(server.address) as client:

            async def work(begin: Any) -> None:
                async with (
                    client.track(finish_timeout_seconds=1),
                    client.reporter(finish_timeout_seconds=1) as reporter,
                ):
                    reporter.update("a", progress=1)
                    await begin()

            began = time.monotonic()
            await cancelled_after_begin(work, 1)
            return time.monotonic() - began

    with ScriptedServer(CreateJob=[CREATED], UpdateJob=[], BatchUpdateJobs=[]) as server:
        assert asyncio.run(main(server)) < 0.9 + MAX_PAUSE_SECONDS
    assert any("the outcome ABORTED could not be reported" in line for line in caplog.messages)
    assert any("1 update has no effect (job a)" in line for line in caplog.messages)


def test_a_client_that_is_closed_waits_for_blocks_that_were_left_and_for_no_other(memory_address):
    async def main() -> None:
        client = AsyncJobStatusClient(memory_address)
        async with client.track() as tracked, client.reporter():
            with anyio.CancelScope() as scope:
                scope.cancel()
                async with client.reporter() as reporter:
                    reporter.update(tracked.id, progress=7, attempt=1)
                    await anyio.sleep(60)
            await client.close()
            with JobStatusClient(memory_address) as reader:
                assert reader.get(tracked.id).progress == 7

    asyncio.run(main())


def test_an_outcome_that_a_closed_client_cannot_report_is_logged(connect, memory_address, caplog):
    caplog.set_level(logging.ERROR, "jobstatus_grpc.client")
    client = connect(memory_address)
    with client.track() as tracked:
        client.close()
    assert [tracked.id in line and "the outcome SUCCEEDED" in line for line in caplog.messages] == [True]


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_a_second_interrupt_ends_the_block_and_not_its_report(monkeypatch):
    def interrupt_and_answer(request: Any, context: Any) -> Any:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.5)
        return DONE(request, context)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ScriptedServer(CreateJob=[CREATED], UpdateJob=[interrupt_and_answer]) as server:
            with pytest.raises(KeyboardInterrupt), JobStatusClient(server.address) as client, client.track() as tracked:
                raise KeyboardInterrupt
            assert tracked.job is not None
            assert tracked.job.done
    finally:
        signal.signal(signal.SIGINT, before)
