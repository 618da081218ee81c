"""The sweeper: overdue commands in small batches, and none for time in which the server itself was down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.commit_queue import CommitQueue
from jobstatus_grpc.job import Create, Delete, JobState
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.sweeper import BATCH_COMMANDS, Sweeper
from tests.support.stores import RETENTION, StandingClock, done, end, start

S = JobState


class CountingStore(MemoryStore):
    """Records the size of each commit and the time of each trim; may refuse some commits."""

    def __init__(self, clock: StandingClock) -> None:
        super().__init__(clock=clock, retention=RETENTION, seconds=clock.seconds)
        self.clock = clock
        self.sizes: list[int] = []
        self.standstill_seconds = 0.0
        self.refusals = 0
        self.refused = asyncio.Event()
        self.trimmed = asyncio.Event()

    async def overdue(self, **limits):
        commands = await super().overdue(**limits)
        self.clock.advance(seconds=self.standstill_seconds)
        return commands

    async def commit(self, commands):
        if self.refusals:
            self.refusals -= 1
            self.refused.set()
            raise errors.StoreUnavailableError
        self.sizes.append(len(commands))
        return await super().commit(commands)

    async def trim(self, *, limit):
        has_more = await super().trim(limit=limit)
        self.trimmed.set()
        return has_more


@contextlib.asynccontextmanager
async def sweeping(store: MemoryStore, **settings) -> AsyncIterator[None]:
    sweeper = asyncio.create_task(
        Sweeper(store=store, queue=CommitQueue(store), interval_seconds=0.01, **settings).run()
    )
    try:
        yield
    finally:
        sweeper.cancel()
        await asyncio.gather(sweeper, return_exceptions=True)


async def until_changed(store: MemoryStore, count: int, position: str) -> list:
    """Wait until `count` jobs have changed since a position."""
    jobs: dict[str, Any] = {}
    while len(jobs) < count:
        batch = await asyncio.wait_for(store.changes(position), 20)
        position = batch.position
        jobs.update((change.id, change.job) for change in batch.changes)
    return list(jobs.values())


def run(test, **settings) -> None:
    async def main() -> None:
        clock = StandingClock()
        store = CountingStore(clock)
        await test(store, clock)
        await store.close()

    asyncio.run(main())


def test_a_silent_worker_s_job_stalls_and_fails_when_the_server_is_configured_so():
    async def test(store, clock):
        await start(store, "a")
        async with sweeping(store, fail_stalled_after=timedelta(seconds=5)):
            for seconds, state, stalled in ((30, S.IN_PROGRESS, True), (5, S.FAILED, False)):
                position = await store.position()
                clock.advance(seconds=seconds)
                (job,) = await until_changed(store, 1, position)
                assert (job.state, job.stalled) == (state, stalled)

    run(test)


def test_a_done_job_expires():
    async def test(store, clock):
        await done(store, Create(id="a"), end("a"))
        async with sweeping(store):
            position = await store.position()
            clock.advance(days=RETENTION.days)
            assert await until_changed(store, 1, position) == [None]

    run(test)


def test_many_jobs_that_are_due_at_once_are_taken_in_small_batches():
    async def test(store, clock):
        await start(store, *(f"{number}" for number in range(950)))
        store.sizes.clear()
        async with sweeping(store):
            position = await store.position()
            clock.advance(seconds=30)
            assert all(job.stalled for job in await until_changed(store, 950, position))
        assert max(store.sizes) == BATCH_COMMANDS

    run(test)


def test_what_the_store_refuses_is_tried_again(monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.sweeper.RETRY_SECONDS", 0.01)

    async def test(store, clock):
        await start(store, "a")
        store.refusals = 1
        async with sweeping(store):
            position = await store.position()
            clock.advance(seconds=30)
            await asyncio.wait_for(store.refused.wait(), 20)
            clock.advance(seconds=10)
            (job,) = await until_changed(store, 1, position)
            assert job.stalled

    run(test)


def test_a_server_that_stands_still_while_it_looks_takes_back_what_it_has_found():
    async def test(store, clock):
        await start(store, "a")
        clock.advance(seconds=30)
        store.standstill_seconds = 20
        async with sweeping(store, seconds=clock.seconds):
            await asyncio.sleep(0.05)
        assert store.sizes == [1, 1], "its Stall was committed"
        assert not (await store.get("default", "a")).stalled

    run(test)


def test_a_server_that_was_away_holds_no_silence_against_anybody(caplog):
    async def test(store, clock):
        await start(store, "a")
        clock.advance(seconds=29)
        async with sweeping(store, seconds=clock.seconds):
            await asyncio.sleep(0.05)
            clock.advance(seconds=60)
            await asyncio.sleep(0.05)
            assert not (await store.get("default", "a")).stalled
            position = await store.position()
            for _ in range(10):
                clock.advance(seconds=3)
                await asyncio.sleep(0.05)
            (job,) = await until_changed(store, 1, position)
            assert job.stalled

    run(test)
    assert "stood still for 60.0 s" in caplog.text


def test_history_is_trimmed():
    async def test(store, clock):
        await done(store, Create(id="a"), end("a"))
        before = await store.position()
        await done(store, Delete(id="a"))
        clock.advance(hours=24)
        async with sweeping(store):
            await asyncio.wait_for(store.trimmed.wait(), 20)
        with pytest.raises(errors.StoreChangedError):
            await store.changes(before)

    run(test)
