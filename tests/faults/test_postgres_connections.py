"""The sessions of a process: never more than it says, also while they wait for another session or for a standby."""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg
import pytest

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.job import Create
from jobstatus_grpc.stores.postgres.database import MAX_CONNECTIONS
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.support.load import background_tasks
from tests.support.stores import done, until_writable

pytestmark = pytest.mark.slow

SECONDS, SECONDS_IN_FULL = 6, 60
READERS, WRITERS = 20, 5
OTHERS = 3
"""Sessions beside the pool: the notifier, the maintenance leader, and a probe."""

_COUNT = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'jobstatus'"


async def knock(store, call):
    while True:
        with contextlib.suppress(StoreUnavailableError):
            await (store.get("default", "a") if call == "get" else store.commit([Create(id="b")]))
        await asyncio.sleep(0.01)


async def most_sessions(store, counter, seconds):
    """Call the store as fast as it refuses; return the largest number of its sessions."""
    most = 0
    async with background_tasks() as start:
        for call in ["get"] * READERS + ["commit"] * WRITERS:
            start(knock(store, call))
        for _ in range(seconds * 20):
            await asyncio.sleep(0.05)
            most = max(most, await counter.fetchval(_COUNT))
    return most


@pytest.mark.timeout(120)
@pytest.mark.parametrize("table", ["jobs", "changes"])
def test_a_locked_table_costs_no_more_sessions_than_the_bound(postgres_url, is_full, record_fault, table):
    seconds = SECONDS_IN_FULL if is_full else SECONDS

    async def scenario():
        store = await PostgresStore.open(postgres_url)
        locker, counter = await asyncpg.connect(postgres_url), await asyncpg.connect(postgres_url)
        await locker.execute(f"BEGIN; LOCK TABLE jobstatus.{table} IN ACCESS EXCLUSIVE MODE")
        most = await most_sessions(store, counter, seconds)
        await locker.execute("COMMIT")
        await until_writable(store)
        await done(store, Create(id="c"))
        assert most <= MAX_CONNECTIONS + OTHERS
        for session in (store, locker, counter):
            await session.close()
        return most

    most = asyncio.run(asyncio.wait_for(scenario(), 110))
    record_fault(
        f"another session locks the table of {table} for {seconds} s",
        count=1,
        checked=f"{READERS + WRITERS} callers without a pause, at most {most} sessions",
        result=f"never more than {MAX_CONNECTIONS + OTHERS}",
    )


@pytest.mark.timeout(120)
def test_commits_that_wait_for_a_standby_cost_no_more_sessions_than_the_bound(new_postgres, is_full, record_fault):
    seconds = SECONDS_IN_FULL if is_full else SECONDS
    standby = new_postgres.standby()
    url = new_postgres.url(new_postgres.create_database())

    async def scenario():
        store = await PostgresStore.open(url)
        await done(store, Create(id="a"))
        counter = await asyncpg.connect(url)
        await asyncio.to_thread(standby.stop)
        most = await most_sessions(store, counter, seconds)
        assert store.writable is False
        assert (await store.get("default", "a")).revision == 1, "reads go on"
        await asyncio.to_thread(standby.start)
        await until_writable(store)
        await done(store, Create(id="c"))
        assert most <= MAX_CONNECTIONS + OTHERS
        await counter.close()
        await store.close()
        return most

    most = asyncio.run(asyncio.wait_for(scenario(), 110))
    record_fault(
        f"the synchronous standby is away for {seconds} s",
        count=1,
        checked=f"{READERS + WRITERS} callers without a pause, at most {most} sessions",
        result=f"never more than {MAX_CONNECTIONS + OTHERS}; reads go on",
    )
