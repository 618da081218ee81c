"""A clock that is wrong for a while and set back: what was recorded in that time is taken back, nothing is removed."""

from __future__ import annotations

from datetime import timedelta

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create, Delete, JobState, RequestId, Update
from jobstatus_grpc.stores.memory import MemoryStore
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.support.sqlite import open_at
from tests.support.stores import (
    RETENTION,
    TIMEOUT,
    claim,
    done,
    due,
    end,
    following,
    on_store,
    start,
    sweep,
    trim,
)

TEN_YEARS = timedelta(days=3650)
DAY = timedelta(days=1)


class WrongClockContract:
    """The facts for a store; `open` makes one."""

    @on_store
    async def test_changes_are_trimmed_after_24_hours(self, store, clock):
        await done(store, Create(id="a"), end("a"), Create(id="b"))
        before = await store.position()
        clock.now += TEN_YEARS
        await done(store, claim("b"))
        await trim(store)
        clock.now -= TEN_YEARS
        await done(store, Delete(id="a"))
        await trim(store)
        for _ in range(2):
            clock.advance(days=1, hours=1)
            await trim(store)
        with pytest.raises(errors.StoreChangedError):
            await store.changes(before)

    @on_store
    async def test_an_id_is_free_24_hours_after_its_removal(self, store, clock):
        await done(store, *(Create(id=job_id) for job_id in "abc"), *(end(job_id) for job_id in "abc"))
        await done(store, Delete(id="a"))
        clock.now += TEN_YEARS
        await done(store, Delete(id="b"))
        clock.now -= TEN_YEARS
        await done(store, Delete(id="c"))
        await trim(store, limit=1)
        with pytest.raises(errors.JobExpiredError):
            await store.get("default", "b")
        clock.now += DAY
        await done(store, *(Create(id=job_id) for job_id in "abc"))

    @on_store
    async def test_a_job_expires_when_its_retention_is_over(self, store, clock):
        await done(store, *(Create(id=job_id) for job_id in "abcd"), end("a"), claim("d"))
        clock.now += TEN_YEARS
        await done(store, end("b"), Update(id="d", changes={"reason": "r"}))
        clock.now -= TEN_YEARS
        (c, d) = await done(store, end("c"), end("d"))
        assert c.finished_at == clock.now
        taken_back = await sweep(store)
        assert {job.id for job in taken_back} == {"b", "d"}
        for job in taken_back:
            assert (job.finished_at, job.expires_at) == (clock.now, clock.now + RETENTION)
        assert d.revision + 1 == next(job.revision for job in taken_back if job.id == "d")
        assert await due(store) == []
        clock.advance(seconds=RETENTION.total_seconds() - 1)
        assert await due(store) == []
        clock.advance(seconds=1)
        assert {job.id for job in await sweep(store)} == set("abcd")
        with pytest.raises(errors.JobExpiredError):
            await store.get("default", "b")

    @on_store
    async def test_a_clock_that_is_ahead_for_less_than_a_day_removes_nothing(self, store, clock):
        request = Update(id="c", changes={"reason": "r"}, request=RequestId("r", "h"))
        *_, c = await done(store, *(Create(id=job_id) for job_id in "abc"), end("a"), end("b"), request)
        before = await store.position()
        await done(store, Delete(id="b"))
        assert await sweep(store) == []
        clock.now += TEN_YEARS
        for _ in range(2):
            assert await sweep(store) == []
            await trim(store)
            clock.advance(hours=11)
        clock.now -= TEN_YEARS
        await trim(store)
        assert [change.id for change in await following(store, before)] == ["b"]
        with pytest.raises(errors.JobExpiredError):
            await store.get("default", "b")
        assert (await store.get("default", "a")).done
        assert await done(store, request) == [c]

    @on_store
    async def test_a_step_forward_counts_after_24_hours(self, store, clock):
        await done(store, Create(id="a"), end("a"))
        assert await due(store) == []
        clock.now += RETENTION
        assert await due(store) == []
        clock.advance(hours=23.9)
        assert await due(store) == []
        clock.advance(hours=0.1)
        assert await due(store) == [("Expire", "a")]

    @on_store
    async def test_an_end_that_is_taken_back_is_a_change(self, store, clock):
        await done(store, Create(id="a"))
        clock.now += TEN_YEARS
        await done(store, end("a"))
        position = await store.position()
        clock.now -= TEN_YEARS
        jobs = await sweep(store)
        assert [change.job for change in await following(store, position)] == jobs != []

    @on_store
    async def test_a_large_crowd_is_taken_back_in_several_sweeps(self, store, clock):
        ids = [f"{n}" for n in range(25)]
        await done(store, *(Create(id=job_id) for job_id in ids))
        clock.now += TEN_YEARS
        await done(store, *(end(job_id) for job_id in ids))
        clock.now -= TEN_YEARS
        taken_back = set()
        while commands := await store.overdue(limit=10):
            taken_back |= {job.id for job in await done(store, *commands)}
        assert taken_back == set(ids)

    @on_store
    async def test_a_clock_that_is_set_back_a_little_changes_no_job(self, store, clock):
        await done(store, Create(id="a"), end("a"))
        clock.now -= timedelta(seconds=50)
        assert await due(store) == []

    @on_store
    async def test_stall_clocks_do_not_follow_the_time_of_day(self, store, clock):
        await start(store, "a")
        clock.now += TEN_YEARS
        assert await due(store) == []
        await done(store, Update(id="a"))
        clock.now -= TEN_YEARS
        assert await due(store) == []
        clock.advance(seconds=TIMEOUT.total_seconds())
        assert await due(store) == [("Stall", "a")]

    @pytest.mark.parametrize("step", [timedelta(hours=1), timedelta(seconds=45), -timedelta(seconds=45)])
    @on_store
    async def test_a_clock_that_is_set_makes_no_living_worker_silent(self, store, clock, step):
        await start(store, "a", "b")
        clock.advance(seconds=29)
        await done(store, Update(id="a"))
        assert await due(store) == []
        clock.advance(seconds=1)
        commands = await store.overdue(limit=10, fail_stalled_after=timedelta(seconds=10))
        clock.now += step
        assert [(job.id, job.state, job.stalled) for job in await done(store, *commands)] == [
            ("b", JobState.IN_PROGRESS, True)
        ]
        assert await due(store, timedelta(seconds=10)) == []


class TestMemoryStore(WrongClockContract):
    async def open(self, directory, clock):
        return MemoryStore(clock=clock, retention=RETENTION, seconds=clock.seconds)


class TestPostgresStore(WrongClockContract):
    @pytest.fixture(autouse=True)
    def _on(self, postgres_url):
        self._url = postgres_url

    async def open(self, directory, clock):
        return await PostgresStore.open(self._url, clock=clock, retention=RETENTION, seconds=clock.seconds)


class TestSqliteStore(WrongClockContract):
    async def open(self, directory, clock):
        return await open_at(directory / "jobs.db", clock)
