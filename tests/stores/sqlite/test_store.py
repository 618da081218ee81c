"""SqliteStore passes the contract, and keeps its jobs from one process to the next."""

from __future__ import annotations

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create, Delete, JobState, RequestId, Update, evolve
from tests.stores.contract import StoreContract
from tests.support.sqlite import on_file, open_at, raw
from tests.support.stores import TIMEOUT, StandingClock, claim, done, end, following, report, sweep


class TestSqliteStore(StoreContract):
    async def open(self, directory, clock):
        return await open_at(directory / "jobs.db", clock)


def test_what_was_acknowledged_is_there_when_the_file_is_opened_again(tmp_path):
    async def write(store):
        job = (await done(store, Create(id="a", labels={"k": "v"}), claim("a")))[-1]
        return job, await store.transitions("default", "a")

    async def read(store):
        return await store.get("default", "a"), await store.transitions("default", "a")

    written, found = on_file(tmp_path / "jobs.db", write, read)
    assert found == written


def test_after_a_restart_the_last_heartbeat_is_the_last_change(tmp_path):
    async def write(store):
        (changed,) = await done(store, Create(id="a", state=JobState.IN_PROGRESS, heartbeat_timeout=TIMEOUT))
        clock.advance(seconds=1)
        await done(store, Update(id="a"))
        return changed, await store.get("default", "a")

    async def read(store):
        return await store.get("default", "a")

    clock = StandingClock()
    (changed, heard), found = on_file(tmp_path / "jobs.db", write, read, clock=clock)
    assert (heard.last_heartbeat_at, found) == (clock.now, changed)


def test_after_a_restart_a_stalled_job_has_its_last_heartbeat(tmp_path):
    async def write(store):
        await done(store, Create(id="a", state=JobState.IN_PROGRESS, heartbeat_timeout=TIMEOUT))
        heard_at = clock.advance(seconds=1)
        await done(store, Update(id="a"))
        clock.advance(seconds=30)
        await sweep(store)
        return heard_at

    async def read(store):
        return await store.get("default", "a")

    clock = StandingClock()
    heard_at, found = on_file(tmp_path / "jobs.db", write, read, clock=clock)
    assert (found.stalled, found.last_heartbeat_at) == (True, heard_at)


def test_positions_outlive_the_process_and_miss_nothing(tmp_path):
    async def write(store):
        await done(store, Create(id="a"), Create(id="b"), Create(id="c"))
        position = await store.position()
        await done(store, claim("a"), end("b"))
        await done(store, end("a"), Create(id="d"))
        await store.commit([Update(id="d", changes={"progress": 1.0})])
        return position

    async def read(store):
        changes = await following(store, position)
        assert [(change.id, change.revision) for change in changes] == [("b", 2), ("a", 3), ("d", 2)]
        assert [change.job for change in changes] == [await store.get("default", name) for name in "bad"]

    (position,) = on_file(tmp_path / "jobs.db", write)
    on_file(tmp_path / "jobs.db", read)


def test_removals_have_the_job_as_it_ended_after_the_process(tmp_path):
    async def write(store):
        position = await store.position()
        _, ended, _ = await done(store, Create(id="a", labels={"k": "v"}), end("a", result={"n": 1.5}), Delete(id="a"))
        return position, ended

    async def read(store):
        return await following(store, position)

    ((position, ended),) = on_file(tmp_path / "jobs.db", write)
    ((change,),) = on_file(tmp_path / "jobs.db", read)
    assert (change.job, change.final) == (None, ended)


def test_old_changes_come_in_batches_whole(tmp_path):
    async def write(store):
        position = await store.position()
        await done(store, *(Create(id=f"{n}") for n in range(2100)))
        await done(store, *(claim(f"{n}") for n in range(0, 2100, 2)))
        return position

    async def read(store):
        return await following(store, position)

    (position,) = on_file(tmp_path / "jobs.db", write)
    (changes,) = on_file(tmp_path / "jobs.db", read)
    odd, even = [f"{n}" for n in range(1, 2100, 2)], [f"{n}" for n in range(0, 2100, 2)]
    assert [change.id for change in changes] == odd + even


def test_changes_of_few_jobs_come_in_few_batches(tmp_path):
    async def write(store):
        position = await store.position()
        for n in range(12):
            await done(store, *(report(f"{number}", n + 1) for number in range(500)))
        return position

    async def update_half(store):
        end_position = await store.position()
        await done(store, *(report(f"{n}", 50) for n in range(250)))
        return end_position

    path = tmp_path / "jobs.db"
    (position,), (up_to,) = on_file(path, write), on_file(path, update_half)
    (batch,) = on_file(path, lambda store: store.changes(position, up_to=up_to))
    assert ([change.id for change in batch.changes], batch.position) == ([f"{n}" for n in range(250, 500)], up_to)
    assert batch.superseded == {("default", f"{n}") for n in range(250)}


def test_a_batch_of_replaced_changes_is_full_and_the_next_ones_follow_it(tmp_path):
    async def write(store):
        position = await store.position()
        for n in range(3):
            await done(store, *(report(f"{number}", n + 1) for number in range(1500)))
        return position

    (position,) = on_file(tmp_path / "jobs.db", write)
    (batch,) = on_file(tmp_path / "jobs.db", lambda store: store.changes(position))
    assert [change.id for change in batch.changes] == [f"{n}" for n in range(1000)]
    (rest,) = on_file(tmp_path / "jobs.db", lambda store: following(store, batch.position))
    assert [change.id for change in rest] == [f"{n}" for n in range(1000, 1500)]


def test_a_reader_that_is_behind_what_memory_keeps_misses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.store.CACHED_CHANGES", 5)
    monkeypatch.setattr("jobstatus_grpc.stores.sqlite.store.CACHED_JOBS", 5)

    async def use(store):
        position = await store.position()
        await done(store, *(Create(id=f"{n}") for n in range(20)))
        await done(store, *(end(f"{n}") for n in range(0, 20, 4)))
        changes = await following(store, position)
        assert sorted((int(change.id), change.revision) for change in changes) == [
            (n, 1 if n % 4 else 2) for n in range(20)
        ]
        assert [change.job for change in changes] == [await store.get("default", change.id) for change in changes]

    on_file(tmp_path / "jobs.db", use)


@pytest.mark.parametrize("is_reopened", [True, False])
def test_a_batch_names_the_jobs_whose_newest_change_follows_it(tmp_path, is_reopened):
    async def write(store):
        start = await store.position()
        await done(store, Create(id="a"), Create(id="b"), Create(id="other", tenant="t"))
        middle = await store.position()
        await done(store, claim("a"))
        return start, middle, None if is_reopened else await store.changes(start, up_to=middle)

    ((start, middle, batch),) = on_file(tmp_path / "jobs.db", write)
    if batch is None:
        (batch,) = on_file(tmp_path / "jobs.db", lambda store: store.changes(start, up_to=middle))
    assert ([change.id for change in batch.changes], list(batch.superseded)) == (["b", "other"], [("default", "a")])


def test_a_position_from_before_the_forgotten_changes_is_refused(tmp_path):
    async def write(store):
        await done(store, Create(id="a"), Create(id="b"))
        return await store.position()

    path = tmp_path / "jobs.db"
    (position,) = on_file(path, write)
    raw(path, "DELETE FROM changes")
    raw(path, "UPDATE store SET forgotten_sequence = 7")

    async def read(store):
        assert await store.position() == position.replace("-2", "-7")
        with pytest.raises(errors.StoreChangedError):
            await store.changes(position)

    on_file(path, read)


def test_a_removed_job_is_read_where_its_version_had_fewer_columns(tmp_path):
    async def write(store):
        position = await store.position()
        _, ended, _ = await done(store, Create(id="a", heartbeat_timeout=TIMEOUT), end("a"), Delete(id="a"))
        return position, ended

    async def read(store):
        return await following(store, position)

    ((position, ended),) = on_file(tmp_path / "jobs.db", write)
    raw(tmp_path / "jobs.db", "UPDATE store SET unchecked_sequence = 100")
    raw(tmp_path / "jobs.db", "UPDATE changes SET checksum = NULL, final = json_remove(final, '$.heartbeat_timeout')")
    ((change,),) = on_file(tmp_path / "jobs.db", read)
    assert change.final == evolve(ended, {"heartbeat_timeout": None})


def test_the_requests_that_earlier_versions_kept_with_the_job_are_known(tmp_path):
    async def write(store):
        return await done(store, Create(id="a"), Update(id="a", changes={"reason": "1"}))

    async def repeat(store):
        repeated = Update(id="a", changes={"reason": "0"}, request=RequestId("r0", "h"))
        return await done(store, repeated, Update(id="a", changes={"reason": "2"}), repeated)

    on_file(tmp_path / "jobs.db", write)
    raw(tmp_path / "jobs.db", "UPDATE store SET unchecked_key = 1")
    raw(tmp_path / "jobs.db", """UPDATE jobs SET checksum = NULL, requests = '{"r0":"h",\n"r1":"h"}'""")
    assert [job.reason for job in on_file(tmp_path / "jobs.db", repeat)[0]] == ["1", "2", "2"]


def test_requests_are_known_when_the_file_is_opened_again(tmp_path):
    updates = [Update(id="a", changes={"reason": f"{n}"}, request=RequestId(f"r{n}", "h")) for n in range(30)]
    written, repeated = on_file(
        tmp_path / "jobs.db", lambda store: done(store, Create(id="a"), *updates), lambda store: done(store, *updates)
    )
    assert repeated == written[-1:] * 30


def test_a_new_job_does_not_know_the_requests_of_one_that_was_deleted_before_a_restart(tmp_path):
    update = Update(id="a", changes={"reason": "x"}, request=RequestId("r", "h"))

    async def remove(store):
        await done(store, Create(id="a"), update, end("a"), Delete(id="a"))

    async def create(store):
        return (await done(store, Create(id="b"), update._replace(id="b")))[-1]

    assert on_file(tmp_path / "jobs.db", remove, create)[-1].revision == 2
