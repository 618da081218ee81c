"""PostgresStore passes the contract."""

from __future__ import annotations

import asyncio

import pytest

from jobstatus_grpc.job import Create, RequestId, Update
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.stores.contract import StoreContract
from tests.support.stores import RETENTION, done


class TestPostgresStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _on(self, postgres):
        self._postgres = postgres
        self._databases: dict[object, str] = {}
        yield
        for database in self._databases.values():
            postgres.drop_database(database)

    async def open(self, directory, clock):
        if directory not in self._databases:
            self._databases[directory] = self._postgres.create_database()
        url = self._postgres.url(self._databases[directory])
        return await PostgresStore.open(url, clock=clock, retention=RETENTION, seconds=clock.seconds)


def test_the_requests_that_earlier_versions_kept_with_the_job_are_known(postgres, postgres_url):
    async def repeat():
        store = await PostgresStore.open(postgres_url)
        await done(store, Create(id="a", reason="1"))
        kept = """UPDATE jobstatus.jobs SET requests = '{"r0":"h"}', revision = 2"""
        postgres.execute(kept, postgres_url.rpartition("/")[2])
        jobs = await done(store, Update(id="a", changes={"reason": "0"}, request=RequestId("r0", "h")))
        await store.close()
        return jobs

    assert [job.reason for job in asyncio.run(repeat())] == ["1"]


def test_a_request_that_one_process_has_accepted_is_known_to_another(postgres_url):
    async def repeat():
        one, two = [await PostgresStore.open(postgres_url) for _ in range(2)]
        updates = [Update(id="a", changes={"reason": f"{n}"}, request=RequestId(f"r{n}", "h")) for n in range(30)]
        await done(one, Create(id="a"), *updates)
        at_once = await asyncio.gather(*(done(store, update) for update in updates for store in (one, two)))
        await one.close()
        await two.close()
        return {job.revision for (job,) in at_once}

    assert asyncio.run(repeat()) == {31}
