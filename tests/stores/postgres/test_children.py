"""The numbers of children in PostgreSQL: no lock of the parent, sums by the leader, all processes, the migration."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from jobstatus_grpc.job import Create, JobState, Update
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.stores.postgres.test_schema import STEPS, name_of, prepared
from tests.support.stores import claim, done, end

LOCK_WAIT_SECONDS = 10.0


async def in_turn(turn: asyncio.Semaphore, store: PostgresStore, commands: list[Update]) -> None:
    """Commit as the commit queue does: a few at once."""
    async with turn:
        await done(store, *commands)


async def children_of(store: PostgresStore, job_id: str = "p") -> tuple[dict[str, int], float | None]:
    job = await store.get("default", job_id)
    return dict(job.children), job.children_progress


def test_children_change_while_another_session_has_locked_their_parent(postgres_url):
    async def main() -> tuple[dict[str, int], float | None]:
        store = await PostgresStore.open(postgres_url)
        await done(store, Create(id="p"), *(Create(id=f"{n}", parent_id="p") for n in range(20)))
        other = await asyncpg.connect(postgres_url)
        async with other.transaction():
            await other.execute("SELECT * FROM jobstatus.jobs WHERE id = 'p' FOR UPDATE")
            await other.execute("LOCK TABLE jobstatus.store")
            updates = [[claim(f"{n}"), Update(id=f"{n}", changes={"progress": 50.0}), end(f"{n}")] for n in range(20)]
            await asyncio.wait_for(asyncio.gather(*(done(store, *each) for each in updates)), LOCK_WAIT_SECONDS)
        await other.close()
        numbers = await children_of(store)
        await store.close()
        return numbers

    assert asyncio.run(main()) == ({"succeeded": 20}, 100.0)


def test_children_change_while_another_transaction_has_changed_children_of_the_same_parent(postgres_url):
    async def main() -> tuple[dict[str, int], float | None]:
        store = await PostgresStore.open(postgres_url)
        await done(store, Create(id="p"), Create(id="a", parent_id="p"), Create(id="b", parent_id="p"))
        other = await asyncpg.connect(postgres_url)
        async with other.transaction():
            await other.execute("UPDATE jobstatus.jobs SET state = 2 WHERE id = 'a'")
            await other.execute("INSERT INTO jobstatus.children VALUES ('default', 'p', 1, -1), ('default', 'p', 2, 1)")
            await asyncio.wait_for(done(store, claim("b"), end("b")), LOCK_WAIT_SECONDS)
            await store.overdue(limit=1)  # the leader sums what is committed
            during = await children_of(store)
        await other.close()
        assert during == ({"pending": 1, "succeeded": 1}, 50.0)
        numbers = await children_of(store)
        await store.close()
        return numbers

    assert asyncio.run(main()) == ({"in_progress": 1, "succeeded": 1}, 50.0)


def test_the_leader_replaces_changes_by_sums(postgres, postgres_url):
    async def main() -> list[tuple[dict[str, int], float | None]]:
        store, other = [await PostgresStore.open(postgres_url) for _ in range(2)]
        await done(store, Create(id="p"), *(Create(id=f"{n}", parent_id="p") for n in range(3)))
        for n in range(3):
            await done(other, claim(f"{n}"), Update(id=f"{n}", changes={"progress": 40.0}))
        before = [await children_of(each) for each in (store, other)]
        await store.overdue(limit=1)
        assert [await children_of(each) for each in (store, other)] == before
        for each in (other, store):
            await each.close()
        return before

    assert asyncio.run(main()) == [({"in_progress": 3}, 40.0)] * 2
    rows = postgres.execute("SELECT state, total, is_new FROM jobstatus.children ORDER BY 1", name_of(postgres_url))
    assert rows == [["0", "120000000", "f"], ["2", "3", "f"]]


def test_jobs_of_version_6_are_counted(postgres, postgres_url):
    prepared(postgres_url, STEPS[:6])
    postgres.execute(
        "INSERT INTO jobstatus.jobs (tenant, id, name, parent_id, reason, state, progress, attempt, revision, "
        "reports_progress, cancel_requested, stalled, created_at, updated_at) "
        "SELECT 'default', id, '', parent, '', state, progress, 1, 1, 0, 0, 0, 5, 5 FROM (VALUES ('p', '', 1, NULL), "
        "('a', 'p', 2, 30.5), ('b', 'p', 2, NULL), ('c', 'p', 6, 10)) AS v (id, parent, state, progress)",
        name_of(postgres_url),
    )

    async def main() -> list[tuple[dict[str, int], float | None]]:
        store = await PostgresStore.open(postgres_url)
        numbers = [await children_of(store)]
        await done(store, end("a"), end("b"))
        numbers.append(await children_of(store))
        await store.close()
        return numbers

    assert asyncio.run(main()) == [({"in_progress": 2, "failed": 1}, 43.5), ({"succeeded": 2, "failed": 1}, 100.0)]


@pytest.mark.slow
def test_ten_thousand_children_of_one_parent_report_at_once(postgres_url):
    async def main() -> None:
        stores = [await PostgresStore.open(f"{postgres_url}?synchronous_commit=off") for _ in range(2)]
        await done(stores[0], Create(id="p"))
        ids = [f"{n}" for n in range(10_000)]
        parts = [ids[start : start + 100] for start in range(0, len(ids), 100)]
        for part in parts:
            await done(stores[0], *(Create(id=each, parent_id="p", state=JobState.IN_PROGRESS) for each in part))
        for progress in (10.0, 20.0):
            batches = [[Update(id=each, changes={"progress": progress}) for each in part] for part in parts]
            turns = [asyncio.Semaphore(store.commits_at_once) for store in stores]
            await asyncio.gather(*(in_turn(turns[n % 2], stores[n % 2], batch) for n, batch in enumerate(batches)))
        for store in stores:
            assert await children_of(store) == ({"in_progress": 10_000}, 20.0)
            await store.close()

    asyncio.run(main())
