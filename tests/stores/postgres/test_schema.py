"""The schema of the PostgreSQL store: created once, migrated version by version, and the rights that this needs."""

from __future__ import annotations

import asyncio

import pytest

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.job import Create
from jobstatus_grpc.stores.postgres import schema
from jobstatus_grpc.stores.postgres.database import Database
from jobstatus_grpc.stores.postgres.schema import prepare
from jobstatus_grpc.stores.postgres.store import PostgresStore
from jobstatus_grpc.stores.sql.migrations import migrations
from tests.support.stores import done

STEPS = migrations("jobstatus_grpc.stores.postgres")
NEWEST = len(STEPS)
ADD = "ALTER TABLE jobstatus.jobs ADD COLUMN later{0} integer; INSERT INTO jobstatus.counts VALUES (9, {0})"
ADDED = "SELECT jobs FROM jobstatus.counts WHERE state = 9"


def prepared(url: str, steps: list[str] | None = None) -> int:
    """Prepare the schema as one process does, and return its version."""

    async def main() -> int:
        database = await Database.open(url)
        try:
            return await prepare(database, steps)
        finally:
            await database.close()

    return asyncio.run(main())


def name_of(url: str) -> str:
    return url.rpartition("/")[2]


def test_stores_that_open_an_empty_database_at_once_make_one_schema(postgres, postgres_url):
    async def main() -> None:
        stores = await asyncio.gather(*(PostgresStore.open(postgres_url) for _ in range(4)))
        await done(stores[0], Create(id="a"))
        assert [(await store.get("default", "a")).id for store in stores] == ["a"] * 4
        await asyncio.gather(*(store.close() for store in stores))

    asyncio.run(main())
    assert postgres.execute("SELECT version FROM jobstatus.schema_version", name_of(postgres_url)) == [[f"{NEWEST}"]]


def test_migrations_run_one_after_another_and_each_once(postgres, postgres_url):
    assert prepared(postgres_url) == NEWEST
    later = [*STEPS, ADD.format(1), ADD.format(2)]
    assert prepared(postgres_url, later[:-1]) == NEWEST + 1
    assert [prepared(postgres_url, later) for _ in range(2)] == [NEWEST + 2] * 2
    assert postgres.execute(ADDED, name_of(postgres_url)) == [["1"], ["2"]]


def test_a_migration_that_fails_leaves_the_schema_as_it_was(postgres, postgres_url):
    prepared(postgres_url)
    with pytest.raises(CannotStartError, match='cannot prepare the store\'s schema: relation "nowhere" does not exist'):
        prepared(postgres_url, [*STEPS, ADD.format(1), "SELECT * FROM nowhere"])
    assert postgres.execute(ADDED, name_of(postgres_url)) == []
    assert prepared(postgres_url) == NEWEST


def test_jobs_of_version_3_have_their_last_heartbeat(postgres, postgres_url):
    prepared(postgres_url, STEPS[:3])
    postgres.execute(
        "INSERT INTO jobstatus.jobs (tenant, id, name, parent_id, reason, state, attempt, revision, reports_progress, "
        "cancel_requested, stalled, created_at, updated_at, started_at, heard_at, heartbeat_timeout) "
        "SELECT 'default', id, '', '', '', 2, 1, 1, 0, 0, 0, 5, 5, 5, 7, timeout FROM (VALUES ('a', 1), ('b', NULL)) "
        "AS v (id, timeout)",
        name_of(postgres_url),
    )
    prepared(postgres_url)
    rows = postgres.execute("SELECT id, last_heartbeat_at FROM jobstatus.jobs ORDER BY id", name_of(postgres_url))
    assert [row[0] for row in rows] == ["a", "b"]
    assert (rows[0][1], rows[1][1] or None) == ("7", None)


def test_a_newer_schema_is_refused_and_left_alone(postgres, postgres_url):
    newest = prepared(postgres_url, [*STEPS, ADD.format(1)])
    with pytest.raises(CannotStartError, match=f"version {newest}, newer than .*; run the release that wrote it"):
        asyncio.run(PostgresStore.open(postgres_url))
    assert postgres.execute("SELECT version FROM jobstatus.schema_version", name_of(postgres_url)) == [[f"{newest}"]]


def test_a_wait_for_another_migration_that_takes_too_long_is_an_error(postgres_url, monkeypatch):
    monkeypatch.setattr(schema, "LOCK_SECONDS", 1.0)

    async def main() -> None:
        database = await Database.open(postgres_url)
        async with database.connection() as other:
            await other.execute("SELECT pg_advisory_lock($1)", schema.SCHEMA_LOCK)
            with pytest.raises(CannotStartError, match="another process has been migrating it for 1 s; try again"):
                await prepare(database)
        await database.close()

    asyncio.run(main())


@pytest.fixture
def guest_url(postgres, postgres_url):
    """The URL of the database for a role that has no right but to connect."""
    guest = f"guest_of_{name_of(postgres_url)}"
    postgres.execute(f"CREATE ROLE {guest} LOGIN PASSWORD 'word'")
    yield postgres_url.replace("jobstatus@", f"{guest}:word@")
    postgres.execute(f"DROP OWNED BY {guest}", name_of(postgres_url))
    postgres.execute(f"DROP ROLE {guest}")


def guest_of(url: str) -> str:
    return url.partition("://")[2].partition(":")[0]


def test_a_role_that_may_not_make_a_schema_gets_an_error_that_names_the_role_needed(guest_url):
    with pytest.raises(CannotStartError, match=r"permission denied for database .*; have its owner run jobstatus mig"):
        prepared(guest_url)


def test_a_role_that_was_given_an_empty_schema_fills_it(postgres, guest_url):
    postgres.execute(f"CREATE SCHEMA jobstatus AUTHORIZATION {guest_of(guest_url)}", name_of(guest_url))
    assert prepared(guest_url) == NEWEST


def test_a_role_that_may_use_a_prepared_schema_needs_nothing_else(postgres, postgres_url, guest_url):
    prepared(postgres_url)
    guest = guest_of(guest_url)
    for grant in ("USAGE ON SCHEMA", "ALL ON ALL TABLES IN SCHEMA", "ALL ON ALL SEQUENCES IN SCHEMA"):
        postgres.execute(f"GRANT {grant} jobstatus TO {guest}", name_of(guest_url))

    async def main() -> None:
        store = await PostgresStore.open(guest_url)
        start = await store.position()
        await done(store, Create(id="a", labels={"k": "v"}))
        assert [change.id for change in (await store.changes(start)).changes] == ["a"]
        await store.overdue(limit=1)
        await store.trim(limit=10)
        await store.close()

    asyncio.run(main())


def test_a_database_of_another_encoding_is_refused(postgres):
    postgres.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0 OWNER jobstatus")
    with pytest.raises(CannotStartError, match="encoding is UTF8, this one's is LATIN1"):
        prepared(postgres.url("latin"))
    postgres.drop_database("latin")


def test_a_server_that_is_too_old_is_refused(postgres_url, monkeypatch):
    monkeypatch.setattr(schema, "OLDEST_SERVER", (99, 0))
    with pytest.raises(CannotStartError, match="needs PostgreSQL 99 or newer, this is 1"):
        prepared(postgres_url)
