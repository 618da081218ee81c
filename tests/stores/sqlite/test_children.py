"""The numbers of children in a SQLite file: the migration, damage, and how long they take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from jobstatus_grpc.job import Command, Create, Delete, JobState, Update
from jobstatus_grpc.stores.sqlite.database import SqliteFile
from jobstatus_grpc.stores.sqlite.store import SqliteStore
from tests.stores.sqlite.test_database import STEPS
from tests.support.sqlite import on_file, raw
from tests.support.stores import claim, done, end

FAMILY: list[Command] = [
    Create(id="p"),
    *(Create(id=f"{n}", parent_id="p") for n in range(3)),
    claim("0"),
    end("1", JobState.FAILED),
]
REPORT = Update(id="0", changes={"progress": 30.5})
NUMBERS = ({"pending": 1, "in_progress": 1, "failed": 1}, 43.5)


async def numbers(store: SqliteStore) -> tuple[dict[str, int], float | None]:
    job = await store.get("default", "p")
    return dict(job.children), job.children_progress


@contextmanager
def made(path: str, steps: list[str]) -> Iterator[None]:
    file = SqliteFile(path)
    with closing(file.connect_writer(steps)):
        yield
    file.unlock()


def test_jobs_of_an_older_version_are_counted(tmp_path):
    path = tmp_path / "jobs.db"
    with made(str(path), STEPS[:8]):
        pass
    rows = [("p", "", 1, None), ("0", "p", 2, 30.5), ("1", "p", 6, 10.0), ("2", "p", 1, None)]
    for key, (job_id, parent, state, progress) in enumerate(rows, start=1):
        values = f"{key}, 'default', '{job_id}', '{parent}', {state}, {'NULL' if progress is None else progress}, 1, 0"
        raw(
            path,
            f"INSERT INTO jobs (key, tenant, id, parent_id, state, progress, revision, updated_at) VALUES ({values})",
        )
    raw(path, "UPDATE store SET unchecked_key = 4")

    async def use(store):
        before = await numbers(store)
        await done(store, end("0"))
        return before, await numbers(store)

    ((before, after),) = on_file(path, use)
    assert before == NUMBERS
    assert after == ({"pending": 1, "succeeded": 1, "failed": 1}, 200 / 3)


DAMAGE = ["numbers = '{}'", "numbers = 'x'", "numbers = '[]'", "numbers = CAST(x'7BB1' AS TEXT)", "checksum = 7"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_numbers_are_counted_again(tmp_path, damage):
    path = tmp_path / "jobs.db"
    on_file(path, lambda store: done(store, *FAMILY, REPORT))
    raw(path, f"UPDATE children SET {damage}")

    async def use(store):
        before = await numbers(store)
        await done(store, end("0"))
        return before, await numbers(store)

    ended = ({"pending": 1, "succeeded": 1, "failed": 1}, 200 / 3)
    assert on_file(path, use, numbers) == [(NUMBERS, ended), ended]


def test_a_row_of_numbers_goes_with_the_last_child(tmp_path):
    path = tmp_path / "jobs.db"
    on_file(path, lambda store: done(store, Create(id="p"), Create(id="c", parent_id="p"), end("c"), Delete(id="c")))
    assert raw(path, "SELECT count(*) FROM children") == [(0,)]


def test_ten_thousand_children_report_at_once(tmp_path):
    ids = [f"{n}" for n in range(10_000)]

    async def use(store):
        await done(store, Create(id="p"))
        for start in range(0, len(ids), 500):
            await done(store, *(Create(id=each, parent_id="p") for each in ids[start : start + 500]))
        for start in range(0, len(ids), 100):
            await done(store, *(claim(each) for each in ids[start : start + 100]))
        return await numbers(store)

    assert on_file(tmp_path / "jobs.db", use, numbers) == [({"in_progress": 10_000}, 0.0)] * 2
