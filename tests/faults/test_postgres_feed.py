"""The change feed under slow writers that roll back, and across a crash: no change is lost or repeated."""

from __future__ import annotations

import asyncio
import random

import asyncpg
import pytest

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.support.load import background_tasks
from tests.support.stores import claim, done, following

pytestmark = pytest.mark.slow

ROWS, ROWS_IN_FULL = 10_000, 500_000
WRITERS = 8
ROWS_AT_ONCE = 50
_INSERT = """
    INSERT INTO jobstatus.changes (number, tenant, id, revision, removed, changed_at)
    SELECT n, 'default', $1 || n, 1, true, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
    FROM generate_series($2::integer, $3::integer) AS n
"""


async def write(url, number, rows, chance):
    """Write rows in slow transactions that often roll back; return the ids of the committed rows."""
    connection = await asyncpg.connect(url)
    written: list[str] = []
    while len(written) < rows:
        transaction = connection.transaction()
        await transaction.start()
        prefix = f"{number}-{len(written)}-{chance.random()}-"
        for first in (1, ROWS_AT_ONCE // 2 + 1):
            await connection.execute(_INSERT, prefix, first, first + ROWS_AT_ONCE // 2 - 1)
            await asyncio.sleep(chance.choice([0, 0, 0, 0.001, 0.01, 0.1]))
        if chance.random() < 0.1:
            await transaction.rollback()
            continue
        await transaction.commit()
        written += [f"{prefix}{n}" for n in range(1, ROWS_AT_ONCE + 1)]
    await connection.close()
    return written


async def read(store, position, seen):
    while True:
        batch = await store.changes(position)
        seen += [change.id for change in batch.changes]
        position = batch.position


@pytest.mark.timeout(600)
def test_writers_that_hold_roll_back_and_sleep_make_the_feed_miss_nothing_and_repeat_nothing(
    postgres_url, is_full, record_fault
):
    async def scenario():
        store = await PostgresStore.open(postgres_url)
        sleeper = await asyncpg.connect(postgres_url)
        sleep = sleeper.transaction()
        await sleep.start()
        await sleeper.execute(_INSERT, "sleeper-", 1, 1)
        seen: list[str] = []
        rows = (ROWS_IN_FULL if is_full else ROWS) // WRITERS
        async with background_tasks() as start:
            reading = start(read(store, await store.position(), seen))
            writers = [write(postgres_url, number, rows, random.Random(number)) for number in range(WRITERS)]
            written = [job_id for ids in await asyncio.gather(*writers) for job_id in ids]
            await sleep.commit()
            while len(seen) <= len(written) and not reading.done():
                await asyncio.wait([reading], timeout=0.5)
        assert len(seen) == len(set(seen)), "a change came twice"
        assert set(seen) == {*written, "sleeper-1"}
        await sleeper.close()
        await store.close()
        return len(seen)

    changes = asyncio.run(asyncio.wait_for(scenario(), 550))
    record_fault(
        "writers with held, rolled back and sleeping transactions",
        count=1,
        checked=f"{changes:,} changes of the feed",
        result="none missed, none repeated",
    )


def test_a_crash_that_takes_transaction_numbers_back_hides_no_change_from_earlier_readers(new_postgres, record_fault):
    # PostgreSQL reuses the numbers of transactions that left nothing durable.
    new_postgres.configure(wal_writer_delay="10s")
    new_postgres.restart()
    url = new_postgres.url(new_postgres.create_database())

    async def scenario():
        store = await PostgresStore.open(url)
        before = (await done(store, claim("job", allow_missing=True)))[0]
        idler = await asyncpg.connect(url)
        for _ in range(200):
            await idler.execute("BEGIN; SELECT pg_current_xact_id(); ROLLBACK")
        position = await store.position()
        await asyncio.to_thread(new_postgres.kill)
        await asyncio.to_thread(new_postgres.start)
        assert before.revision == 1
        changed = None
        while changed is None:
            try:
                changed = (await done(store, claim("job", 2)))[0]
            except (AssertionError, StoreUnavailableError):
                await asyncio.sleep(0.1)
        assert [change.job for change in await following(store, position)] == [changed]
        await store.close()

    asyncio.run(asyncio.wait_for(scenario(), 50))
    record_fault(
        "a crash after which PostgreSQL uses transaction numbers again",
        count=1,
        checked="the feed from a position before the crash",
        result="no change hidden",
    )
