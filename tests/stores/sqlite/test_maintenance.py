"""Maintenance of SqliteStore beyond the contract: deleted rows, and stall clocks across processes."""

from __future__ import annotations

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create, Delete, Update
from tests.support.sqlite import on_file, raw
from tests.support.stores import TIMEOUT, StandingClock, claim, done, due, end, following, start, sweep, trim


def count(path, table: str) -> int:
    return raw(path, f"SELECT count(*) FROM {table}")[0][0]


def test_trimming_leaves_one_change_of_each_job_that_exists(tmp_path):
    clock, path = StandingClock(), tmp_path / "jobs.db"

    async def use(store):
        await done(store, Create(id="a"), Create(id="b"), Create(id="c"))
        await done(store, claim("a"), end("b"), end("c"))
        await done(store, Update(id="a", changes={"progress": 5.0}), Delete(id="c"))
        await trim(store)
        clock.advance(hours=25)
        await trim(store, limit=2)

    on_file(path, use, clock=clock)
    assert raw(path, "SELECT id, revision FROM changes ORDER BY id") == [("a", 3), ("b", 2)]
    assert count(path, "tombstones") == 0


def test_a_change_that_is_overtaken_later_goes_with_a_later_walk(tmp_path):
    clock, path = StandingClock(), tmp_path / "jobs.db"

    async def use(store):
        for _ in range(3):
            await done(store, Update(id="a", changes={"reason": f"{clock.now}"}, allow_missing=True))
            await trim(store)
            clock.advance(hours=25)
            await trim(store)

    on_file(path, use, clock=clock)
    assert count(path, "changes") == 1


def test_marks_do_not_pile_up(tmp_path):
    clock, path = StandingClock(), tmp_path / "jobs.db"

    async def use(store):
        for _ in range(100):
            await done(store, Update(id="a", changes={"reason": f"{clock.now}"}, allow_missing=True))
            clock.advance(hours=1)
            await trim(store)

    on_file(path, use, clock=clock)
    assert count(path, "marks") <= 26


def test_what_was_dropped_is_known_when_the_file_is_opened_again(tmp_path):
    clock = StandingClock()

    async def forget(store):
        await done(store, Create(id="a"), end("a"))
        before = await store.position()
        await done(store, Delete(id="a"))
        await trim(store)
        clock.advance(hours=25)
        await trim(store)
        return before, await store.position()

    async def resume(store):
        with pytest.raises(errors.StoreChangedError):
            await store.changes(before)
        await done(store, Create(id="b"))
        assert [change.id for change in await following(store, after)] == ["b"]

    ((before, after),) = on_file(tmp_path / "jobs.db", forget, clock=clock)
    on_file(tmp_path / "jobs.db", resume, clock=clock)


def test_clocks_start_anew_when_the_file_is_opened(tmp_path):
    clock = StandingClock()

    async def begin(store):
        await start(store, "a", "b", "c")
        await done(store, end("c"))
        clock.advance(seconds=29)
        assert await due(store) == []

    async def go_on(store):
        clock.advance(seconds=29)
        assert await due(store) == []
        await done(store, Update(id="b"))
        clock.advance(seconds=1)
        assert await due(store) == [("Stall", "a")]

    on_file(tmp_path / "jobs.db", begin, go_on, clock=clock)


def test_a_job_that_was_stalled_before_the_start_is_not_marked_again_and_still_fails_in_time(tmp_path):
    clock = StandingClock()

    async def stall(store):
        await start(store, "a")
        clock.advance(seconds=30)
        assert [job.stalled for job in await sweep(store, TIMEOUT)] == [True]

    async def fail(store):
        clock.advance(seconds=59)
        assert await due(store, TIMEOUT) == []
        clock.advance(seconds=1)
        assert [job.done for job in await sweep(store, TIMEOUT)] == [True]

    on_file(tmp_path / "jobs.db", stall, fail, clock=clock)


def test_many_jobs_in_progress_get_their_clocks(tmp_path):
    clock = StandingClock()
    ids = [f"{n}" for n in range(12_000)]

    async def begin(store):
        for first in range(0, len(ids), 1000):
            await start(store, *ids[first : first + 1000])

    async def find(store):
        assert await due(store) == []
        clock.advance(seconds=30)
        found = await store.overdue(limit=len(ids) + 1)
        assert {command.id for command in found} == set(ids)

    on_file(tmp_path / "jobs.db", begin, find, clock=clock)
