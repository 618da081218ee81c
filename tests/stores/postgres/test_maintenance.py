"""Of all processes that share a PostgreSQL database, one does maintenance; if it ends or is suspended, another does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from jobstatus_grpc.job import Create, JobState, Update
from jobstatus_grpc.stores.postgres.maintenance import MAINTENANCE_LOCK
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.support.stores import RETENTION, StandingClock, done, last_heartbeats

TIMEOUT = timedelta(seconds=30)
HOLDERS = (
    "SELECT a.pid FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid "
    f"WHERE a.datname = '{{}}' AND l.locktype = 'advisory' "
    f"AND (l.classid::bigint << 32) + l.objid::bigint = {MAINTENANCE_LOCK}"
)


@contextlib.asynccontextmanager
async def two_stores(url: str, clock: StandingClock) -> AsyncIterator[tuple[PostgresStore, PostgresStore]]:
    stores = [await PostgresStore.open(url, clock=clock, retention=RETENTION, seconds=clock.seconds) for _ in range(2)]
    try:
        yield stores[0], stores[1]
    finally:
        for store in stores:
            await store.close()


async def due(store: PostgresStore, *, limit: int = 10) -> list[str]:
    return [command.id for command in await store.overdue(limit=limit)]


async def silent_job(store: PostgresStore, clock: StandingClock, job_id: str = "a") -> None:
    await done(store, Create(id=job_id, state=JobState.IN_PROGRESS, heartbeat_timeout=TIMEOUT))
    await due(store)
    clock.advance(seconds=31)


def end_holder(postgres, url: str) -> None:
    postgres.execute(f"SELECT pg_terminate_backend(pid, 10000) FROM ({HOLDERS.format(url.rpartition('/')[2])}) AS h")


def test_one_store_at_a_time_returns_what_is_due(postgres_url):
    async def main() -> None:
        clock = StandingClock()
        async with two_stores(postgres_url, clock) as (first, second):
            await silent_job(first, clock)
            assert (await due(second), await due(first)) == ([], ["a"])

    asyncio.run(main())


def test_a_store_that_closes_writes_its_last_heartbeats(postgres_url):
    async def main() -> None:
        clock = StandingClock()
        async with two_stores(postgres_url, clock) as (first, second):
            await done(first, Create(id="a", state=JobState.IN_PROGRESS, heartbeat_timeout=TIMEOUT))
            heard_at = clock.advance(seconds=1)
            await done(second, Update(id="a"))
            await second.close()
            assert await last_heartbeats(first) == {heard_at}

    asyncio.run(main())


def test_every_store_knows_the_last_heartbeat(postgres_url):
    async def main() -> None:
        clock = StandingClock()
        async with two_stores(postgres_url, clock) as (first, second):
            await done(first, Create(id="a", state=JobState.IN_PROGRESS, heartbeat_timeout=TIMEOUT))
            heard_at = clock.advance(seconds=1)
            await done(second, Update(id="a"))
            assert (await last_heartbeats(first), await last_heartbeats(second)) != ({heard_at}, {heard_at})
            await due(second)
            assert (await last_heartbeats(first), await last_heartbeats(second)) == ({heard_at}, {heard_at})

    asyncio.run(main())


def test_what_was_over_the_limit_is_due_in_the_next_round(postgres_url):
    async def main() -> None:
        clock = StandingClock()
        async with two_stores(postgres_url, clock) as (store, _):
            await silent_job(store, clock, "a")
            await silent_job(store, clock, "b")  # by then "a" was returned once, and not committed
            assert [await due(store, limit=1), await due(store, limit=1)] == [["a"], ["b"]]

    asyncio.run(main())


@pytest.mark.parametrize("end", ["closed", "cut off"])
def test_another_takes_over_and_its_clocks_start_anew(postgres, postgres_url, end):
    async def main() -> None:
        clock = StandingClock()
        async with two_stores(postgres_url, clock) as (first, second):
            await silent_job(first, clock)
            if end == "closed":
                await first.close()
            else:
                end_holder(postgres, postgres_url)
            assert await due(second) == []
            clock.advance(seconds=30)
            assert await due(second) == ["a"]
            if end == "cut off":
                assert await due(first) == []

    asyncio.run(main())


def test_one_that_is_cut_off_and_meets_no_other_goes_on(postgres, postgres_url):
    async def main() -> None:
        clock = StandingClock()
        async with two_stores(postgres_url, clock) as (first, _):
            end_holder(postgres, postgres_url)
            assert await due(first) == []  # finds out
            await silent_job(first, clock)
            assert await due(first) == ["a"]

    asyncio.run(main())


def test_sessions_that_stand_still_are_ended_by_the_server(postgres, postgres_url):
    """Even while its process is suspended, a session holds no job and no lead for longer than this."""

    async def main() -> None:
        store = await PostgresStore.open(postgres_url)
        async with store._database.connection() as connection:
            assert await connection.fetchval("SHOW idle_in_transaction_session_timeout") == "5s"
            assert await connection.fetchval("SHOW lock_timeout") == "30s"
            assert await connection.fetchval("SHOW tcp_keepalives_idle") == "5"
        session = store._maintenance._session
        assert session is not None
        assert await session.fetchval("SHOW idle_session_timeout") == "15s"
        await store.close()

    asyncio.run(main())
