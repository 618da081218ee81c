"""The PostgreSQL store is as fast with many jobs as with few."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from jobstatus_grpc.job import JobFilter, Update
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.stores.postgres.test_pages import FILTERS
from tests.support.postgres_jobs import fill
from tests.support.stores import done
from tests.support.timing import MEASUREMENTS, ratio

FEW, MANY = 20_000, 200_000

Use = Callable[[PostgresStore, int], Awaitable[object]]


async def filled(url: str, count: int) -> PostgresStore:
    store = await PostgresStore.open(url)
    async with store._database.connection(seconds=120) as connection:
        await fill(connection, count)
        await connection.execute("VACUUM ANALYZE")
    return store


async def page(store: PostgresStore, number: int, *, job_filter: JobFilter) -> object:
    page = await store.page("default", job_filter, limit=50)
    assert len(page.jobs) == 50
    return page


async def get(store: PostgresStore, number: int) -> object:
    return await store.get("default", f"{number * FEW // MEASUREMENTS}")


async def update(store: PostgresStore, number: int) -> object:
    return await done(store, Update(id=f"{number * FEW // MEASUREMENTS + 3}", changes={"progress": 1.0}))


USES: dict[str, Use] = {
    "get": get,
    "update": update,
    **{name: partial(page, job_filter=job_filter) for name, (job_filter, _) in FILTERS.items()},
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_with_200_000_jobs_nothing_takes_twice_what_it_takes_with_20_000(postgres, postgres_url):
    database = postgres.create_database()

    async def main() -> dict[str, float]:
        few, many = await filled(postgres_url, FEW), await filled(postgres.url(database), MANY)
        ratios = {name: await ratio(few, many, use) for name, use in USES.items()}
        await few.close()
        await many.close()
        return ratios

    ratios = asyncio.run(main())
    postgres.drop_database(database)
    print(ratios)
    assert {name: ratio for name, ratio in ratios.items() if ratio > 2} == {}
