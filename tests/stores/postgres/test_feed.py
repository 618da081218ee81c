"""Positions of the PostgreSQL feed: short under load from elsewhere, and refused once the database was set back."""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg
import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create, Update
from jobstatus_grpc.stores.interface import MAX_POSITION_CHARACTERS
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.support.stores import StandingClock, claim, done, following, trim

OPEN_TRANSACTIONS = 60

_CHANGE = """
    INSERT INTO jobstatus.changes (number, tenant, id, revision, removed, changed_at)
    VALUES (1, 'default', $1, 1, true, 1)
"""


# As if the one that waited for the job's lock had got its id first.
_SWAP_LAST = """
    UPDATE jobstatus.changes SET xid = CASE revision WHEN 3 THEN older ELSE newer END, number = 5 - revision
    FROM (SELECT min(xid) AS older, max(xid) AS newer FROM jobstatus.changes WHERE revision > 1) AS ids
    WHERE revision > 1
"""


async def update(store, job_id="a", times=1):
    for _ in range(times):
        revision = (await store.get("default", job_id)).revision
        await done(store, Update(id=job_id, changes={"reason": f"{revision}"}))


@contextlib.asynccontextmanager
async def open_transactions(url, begin, store):
    """Open many transactions, and create a job in `store` after each: their ids are apart."""
    sessions = [await asyncpg.connect(url) for _ in range(OPEN_TRANSACTIONS)]
    try:
        for number, session in enumerate(sessions):
            await session.execute("BEGIN")
            await begin(session, number)
            await done(store, Create(id=f"job-{number}"))
        yield sessions
    finally:
        for session in sessions:
            await session.close()


@pytest.mark.parametrize("is_other_database", [True, False])
def test_transactions_that_write_elsewhere_make_no_position_longer(postgres, postgres_url, is_other_database):
    name = postgres.create_database()
    other = postgres.url(name) if is_other_database else postgres_url

    async def begin(session, number):
        await session.execute("SELECT pg_current_xact_id()")

    async def scenario():
        store = await PostgresStore.open(postgres_url)
        await done(store, Create(id="a"))
        before = await store.position()
        async with open_transactions(other, begin, store):
            position = await store.position()
            assert len(position) <= len(before) + 10
            await done(store, Create(id="b"))
            batch = await store.changes(position)
            assert [change.id for change in batch.changes] == ["b"]
            assert len(batch.position) <= len(before) + 10
        assert await following(store, batch.position) == []
        await store.close()

    asyncio.run(scenario())
    postgres.drop_database(name)


def test_transactions_that_write_changes_make_no_position_too_long_and_no_change_is_lost(postgres_url):
    async def begin(session, number):
        await session.execute(_CHANGE, f"slow-{number}")

    async def scenario():
        store = await PostgresStore.open(postgres_url)
        position = await store.position()
        seen = []
        async with open_transactions(postgres_url, begin, store) as sessions:
            batch = await store.changes(position)
            assert len(batch.position) <= MAX_POSITION_CHARACTERS
            seen += [change.id for change in batch.changes]
            position = batch.position
            for session in sessions:
                await session.execute("COMMIT")
            seen += [change.id for change in await following(store, position)]
        numbers = range(OPEN_TRANSACTIONS)
        assert sorted(seen) == sorted(
            [f"slow-{number}" for number in numbers] + [f"job-{number}" for number in numbers]
        )
        await store.close()

    asyncio.run(scenario())


def test_the_newest_change_of_a_job_may_have_the_lower_transaction_id(postgres_url):
    async def scenario():
        store = await PostgresStore.open(postgres_url)
        position = await store.position()
        await done(store, Create(id="a"))
        await update(store, times=2)
        session = await asyncpg.connect(postgres_url)
        await session.execute(_SWAP_LAST)
        await session.close()
        changes = [(change.id, change.revision) for change in await following(store, position)]
        assert changes == [("a", 3)]
        await store.close()

    asyncio.run(scenario())


def test_positions_from_after_a_backup_are_refused_once_it_was_restored(postgres, postgres_url):
    database = postgres_url.rpartition("/")[2]

    async def scenario():
        store = await PostgresStore.open(postgres_url)
        await done(store, Create(id="a"), Create(id="b"))
        await update(store, times=3)
        backup = await asyncio.to_thread(postgres.back_up, database)
        await update(store, times=3)
        position = await store.position()
        waiting = asyncio.ensure_future(store.changes(position))
        await asyncio.to_thread(postgres.restore, database, backup)
        while True:
            with contextlib.suppress(errors.StoreUnavailableError):
                with pytest.raises(errors.StoreChangedError):
                    await waiting
                break
            waiting = asyncio.ensure_future(store.changes(position))
        while True:  # writes are refused until a probe finds that they work again
            with contextlib.suppress(errors.StoreUnavailableError):
                await update(store, times=6)
                break
            await asyncio.sleep(0.01)
        with pytest.raises(errors.StoreChangedError):
            await store.changes(position)
        position = await store.position()
        await update(store, "b")
        assert [change.id for change in await following(store, position)] == ["b"]
        await store.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_positions_from_after_a_copy_of_the_files_are_refused_once_it_was_copied_back(new_postgres):
    url = new_postgres.url(new_postgres.create_database())

    async def write(times):
        store = await PostgresStore.open(url)
        await store.commit([Create(id="a")])
        await update(store, times=times)
        position = await store.position()
        await store.close()
        return position

    async def read(position):
        store = await PostgresStore.open(url)
        try:
            return await store.changes(position)
        finally:
            await store.close()

    before = asyncio.run(write(3))
    new_postgres.stop()
    copy = new_postgres.copy_files()
    new_postgres.start()
    after = asyncio.run(write(3))
    new_postgres.stop()
    new_postgres.copy_files_back(copy)
    new_postgres.start()
    asyncio.run(write(20))
    with pytest.raises(errors.StoreChangedError):
        asyncio.run(read(after))
    assert [change.id for change in asyncio.run(read(before)).changes] == ["a"]


@pytest.fixture
def dump(postgres_shared, new_postgres):
    """A dump with the jobs `a` and `b`, of a cluster that has used more transaction ids than `new_postgres`."""
    cluster = postgres_shared(new_postgres.version)
    cluster.execute("DO $$ BEGIN FOR n IN 1..9999 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$")
    database = cluster.create_database()

    async def write():
        store = await PostgresStore.open(cluster.url(database))
        await done(store, Create(id="a"), Create(id="b"))
        await store.close()

    asyncio.run(write())
    yield cluster.back_up(database)
    cluster.drop_database(database)


def test_changes_after_a_restore_from_a_cluster_with_higher_ids_are_published(dump, new_postgres, caplog):
    database = new_postgres.create_database()
    new_postgres.restore(database, dump)

    async def scenario():
        elsewhere = await asyncpg.connect(new_postgres.url("postgres"))
        await elsewhere.execute("BEGIN; SELECT pg_current_xact_id()")
        stores = [await PostgresStore.open(new_postgres.url(database)) for _ in range(2)]
        first, second = await asyncio.gather(*(store.position() for store in stores))
        assert first == second
        await update(stores[0])
        for store in stores:
            assert [change.id for change in await following(store, first)] == ["a"]
            await store.close()
        await elsewhere.close()

    asyncio.run(scenario())
    assert [message[:46] for message in caplog.messages] == ["the jobs were restored from another PostgreSQL"]


def test_a_dump_with_higher_ids_may_be_restored_under_a_server(dump, new_postgres):
    database = new_postgres.create_database()

    async def scenario():
        store = await PostgresStore.open(new_postgres.url(database))
        await done(store, Create(id="c"))
        position = await store.position()
        await asyncio.to_thread(new_postgres.restore, database, dump)
        with pytest.raises(errors.StoreChangedError):
            await store.changes(position)
        position = await store.position()
        await update(store, "b")
        assert [change.id for change in await following(store, position)] == ["b"]
        await store.close()

    asyncio.run(scenario())


def test_a_position_is_valid_though_its_newest_change_is_old_and_was_replaced(postgres_url):
    async def scenario():
        clock = StandingClock()
        store = await PostgresStore.open(postgres_url, clock=clock)
        await done(store, Create(id="b"), Create(id="a"))
        clock.advance(hours=30)
        position = await store.position()
        await update(store)
        await trim(store)
        assert [change.id for change in await following(store, position)] == ["a"]
        await store.close()

    asyncio.run(scenario())


def test_the_position_is_behind_all_changes_also_if_a_whole_batch_was_replaced_since(postgres_url):
    async def scenario():
        store = await PostgresStore.open(postgres_url)
        before = await store.position()
        await done(store, *(Create(id=f"{number}") for number in range(1100)))
        await done(store, *(claim(f"{number}") for number in range(1100)))
        position = await store.position()
        assert position != before
        assert await following(store, position) == []
        await store.close()

    asyncio.run(scenario())


def test_while_the_schema_is_incomplete_the_store_is_unavailable(postgres, postgres_url):
    database = postgres_url.rpartition("/")[2]

    async def scenario():
        store = await PostgresStore.open(postgres_url)
        await done(store, Create(id="a"))
        position = await store.position()
        postgres.execute("DROP INDEX jobstatus.tombstones_by_age", database)
        for call in (store.position(), store.changes(position)):
            with pytest.raises(errors.StoreUnavailableError, match="incomplete"):
                await call
        postgres.execute("DROP TABLE jobstatus.jobs", database)
        with pytest.raises(errors.StoreUnavailableError, match="does not exist"):
            await store.get("default", "a")
        await store.close()

    asyncio.run(scenario())
