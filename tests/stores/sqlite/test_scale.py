"""The SQLite store is as fast with many jobs as with few."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from jobstatus_grpc.job import Create, JobFilter, JobState, Update
from jobstatus_grpc.stores.sqlite.store import SqliteStore
from tests.support.sqlite import open_at
from tests.support.stores import StandingClock, done, end
from tests.support.timing import MEASUREMENTS, ratio

S = JobState
FEW, MANY = 20_000, 150_000
BATCH = 2000
STARTED_AT = StandingClock().now
FILTERS = {
    "all": JobFilter(),
    "ids": JobFilter(ids={f"{n}" for n in range(0, FEW, FEW // 100)}),
    "a rare state": JobFilter(states={S.SUCCEEDED}),
    "a common state": JobFilter(states={S.PENDING}),
    "states": JobFilter(states={S.FAILED, S.ABORTED, S.RETRYING}),
    "done": JobFilter(done=True),
    "not done": JobFilter(done=False),
    "stalled": JobFilter(stalled=True),
    "not stalled": JobFilter(stalled=False),
    "a name": JobFilter(names={"8"}),
    "names": JobFilter(names={f"{n}" for n in range(100)}),
    "a label": JobFilter(labels={"team": "5"}),
    "a parent": JobFilter(parent_id="6"),
    "an old range": JobFilter(created_before=STARTED_AT + timedelta(seconds=5)),
}


async def build(path, count: int) -> None:
    """Make a file of jobs: one in ten is done, one in 200 stalled."""
    clock = StandingClock()
    store = await open_at(path, clock)
    for start in range(0, count, BATCH):
        numbers = range(start, start + BATCH)
        await store.commit([creation(n) for n in numbers])
        await done(store, *(end(f"{n}", S.FAILED if n % 100 else S.SUCCEEDED) for n in numbers[::10]))
        clock.advance(seconds=1)
    silent = [f"{n}" for n in range(1, count, 200)]
    timeout = {"state": S.IN_PROGRESS, "heartbeat_timeout": timedelta(seconds=1)}
    await done(store, *(Update(id=job_id, changes=timeout) for job_id in silent))
    clock.advance(seconds=1)
    await done(store, *await store.overdue(limit=count))
    await store.close()


def creation(number: int) -> Create:
    group = f"{number % 100}"
    fields: list[dict[str, Any]] = [{"name": group}, {"labels": {"team": group}}, {"parent_id": group}, {}]
    return Create(id=f"{number}", **fields[number % 4])


async def opening_seconds(path) -> float:
    """Seconds to open the file: the best of several, since this machine may pause."""
    seconds = []
    for _ in range(3):
        began_at = time.perf_counter()
        store = await open_at(path)
        seconds.append(time.perf_counter() - began_at)
        await store.close()
    return min(seconds)


def uses(spread: Mapping[SqliteStore, int]) -> dict[str, Callable[[SqliteStore, int], Awaitable[object]]]:
    """The operations that are measured. They use jobs `spread` apart, a multiple of 10, so that none is cached."""

    async def get(store: SqliteStore, number: int) -> object:
        return await store.get("default", f"{number * spread[store]}")

    async def update(store: SqliteStore, number: int) -> object:
        return await done(store, Update(id=f"{number * spread[store] + 2}", changes={"progress": 1.0}))

    async def updates(store: SqliteStore, number: int) -> object:
        ids = [f"{number * spread[store] + step}" for step in range(3, 50)]
        return await store.commit([Update(id=job_id, changes={"progress": 1.0}) for job_id in ids])

    async def page(store: SqliteStore, number: int, *, job_filter: JobFilter) -> object:
        page = await store.page("default", job_filter, limit=50)
        assert len(page.jobs) == 50
        return page

    pages = {name: partial(page, job_filter=job_filter) for name, job_filter in FILTERS.items()}
    return {"get": get, "update": update, "updates": updates, **pages}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_with_150_000_jobs_nothing_takes_twice_what_it_takes_with_20_000(tmp_path):
    async def main() -> tuple[dict[str, float], float]:
        await build(tmp_path / "few.db", FEW)
        await build(tmp_path / "many.db", MANY)
        opening = await opening_seconds(tmp_path / "many.db")
        few, many = await open_at(tmp_path / "few.db"), await open_at(tmp_path / "many.db")
        spread = {few: FEW // MEASUREMENTS // 10 * 10, many: MANY // MEASUREMENTS // 10 * 10}
        ratios = {name: await ratio(few, many, use) for name, use in uses(spread).items()}
        await few.close()
        await many.close()
        return ratios, opening

    ratios, opening = asyncio.run(main())
    assert {name: ratio for name, ratio in ratios.items() if ratio > 2} == {}
    assert opening < 1
