"""A database that is lost or takes no writes: calls fail at once, and the log has one line about it."""

from __future__ import annotations

import asyncio
import re

import pytest

from jobstatus_grpc import errors
from jobstatus_grpc.job import Create, Job
from jobstatus_grpc.stores.postgres.store import PostgresStore
from tests.support.stores import done, until_writable

OUTAGES = {
    "ALTER DATABASE {0} CONNECTION LIMIT 0": (
        "too many connections for",
        "raise max_connections",
        "ALTER DATABASE {0} CONNECTION LIMIT -1",
    ),
    "REVOKE CONNECT ON DATABASE {0} FROM jobstatus, PUBLIC": (
        "permission denied for database",
        "have its owner",
        "GRANT CONNECT ON DATABASE {0} TO jobstatus",
    ),
    "ALTER DATABASE {0} ALLOW_CONNECTIONS false": (
        "is not currently accepting connections",
        "check --store",
        "ALTER DATABASE {0} ALLOW_CONNECTIONS true",
    ),
    "ALTER DATABASE {0} RENAME TO {0}_away": (
        'database ".*" does not exist',
        "create it",
        "ALTER DATABASE {0}_away RENAME TO {0}",
    ),
}
"""What ends the use of a database: the error, the advice, and the statement that takes it back."""

_RAISE = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'could not extend it{1}' USING ERRCODE = '{0}'; END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON jobstatus.transitions EXECUTE FUNCTION refuse()
"""


def raises(sqlstate: str, text: str = "") -> tuple[str, str]:
    return _RAISE.format(sqlstate, text), "DROP FUNCTION refuse CASCADE"


REFUSALS = {
    "read-only": (
        "ALTER DATABASE {0} SET default_transaction_read_only = on",
        "ALTER DATABASE {0} RESET default_transaction_read_only",
        "it accepts no writes|in a read-only transaction",
        "name every host",
    ),
    "a full tablespace": (*raises("53100"), "could not extend it", "make room"),
    "a quota": (*raises("XX000", ": Disk quota exceeded"), "quota exceeded", "make room"),
    "no memory": (*raises("53200"), "could not extend it", "see the log of the database server"),
    "an I/O error": (*raises("58030"), "could not extend it", "see the log of the database server"),
    "a corrupt page": (*raises("XX001"), "could not extend it", "see the log of the database server"),
    "a limit": (*raises("54000"), "could not extend it", "see the log of the database server"),
    "no privilege": (
        "REVOKE INSERT ON jobstatus.transitions FROM jobstatus",
        "GRANT INSERT ON jobstatus.transitions TO jobstatus",
        "permission denied for table transitions",
        ".*run jobstatus migrate",
    ),
    "no table": (
        "ALTER TABLE jobstatus.labels RENAME TO away",
        "ALTER TABLE jobstatus.away RENAME TO labels",
        "does not exist",
        "wait for pg_restore to end",
    ),
    "no column": (
        "ALTER TABLE jobstatus.transitions RENAME COLUMN reason TO away",
        "ALTER TABLE jobstatus.transitions RENAME COLUMN away TO reason",
        "does not exist",
        "wait for pg_restore to end",
    ),
}
"""What makes writes fail while the database answers: how it begins and ends, the error, and the advice."""

FULL = {"a full tablespace", "a quota"}


async def refused(store: PostgresStore, says: str) -> errors.JobStatusError:
    """Commit until that is refused for this reason."""
    while True:
        try:
            await store.commit([Create(id="a", labels={"a": "b"})])
        except errors.RetryableError as error:
            if re.search(says, str(error)):
                return error
        await asyncio.sleep(0)


@pytest.mark.parametrize("begin", OUTAGES)
def test_a_lost_database_is_one_line_and_comes_back(postgres, postgres_url, begin, caplog):
    says, advice, end = OUTAGES[begin]
    name = postgres_url.rpartition("/")[2]
    sessions = f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'"

    async def main() -> None:
        store = await PostgresStore.open(postgres_url)
        for statement in ("ALTER DATABASE {0} CONNECTION LIMIT 0", sessions, begin):
            postgres.execute(statement.format(name))
        if "LIMIT" not in begin:
            postgres.execute(f"ALTER DATABASE {name}{'_away' * ('RENAME' in begin)} CONNECTION LIMIT -1")
        while store.writable:
            await refused(store, "the database is unavailable")
        await refused(store, says)
        postgres.execute(end.format(name))
        await until_writable(store)
        await store.commit([Create(id="b")])
        await store.close()

    asyncio.run(main())
    begun, over = caplog.messages
    assert re.search(f"the database on .* is unavailable, retrying: .*{says}.*; calls fail .*; {advice}", begun)
    assert over.endswith("has recovered")
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_database_that_takes_no_writes_refuses_them_in_one_line_answers_reads_and_comes_back(
    postgres, postgres_url, kind, caplog, record_fault
):
    begin, end, says, advice = REFUSALS[kind]
    name = postgres_url.rpartition("/")[2]
    database = "postgres" if kind == "read-only" else name
    sessions = f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'"

    async def main() -> None:
        store = await PostgresStore.open(postgres_url)
        (job,) = await done(store, Create(id="b"))
        postgres.execute(begin.format(name) if kind == "read-only" else begin, database)
        if kind == "read-only":
            postgres.execute(sessions)
        error = await refused(store, "the database takes no writes")
        assert isinstance(error, errors.StoreFullError if kind in FULL else errors.StoreUnavailableError)
        assert store.writable is False
        assert await store.get("default", "b") == job
        postgres.execute(end.format(name), database)
        await until_writable(store)
        await done(store, Create(id="c", labels={"a": "b"}))
        await store.close()

    asyncio.run(asyncio.wait_for(main(), 30))
    begun, over = caplog.messages
    assert re.search(
        f"the database on .* is unavailable, retrying: .*({says}).*; writes fail with STORE_.*; {advice}", begun
    )
    assert over.endswith("has recovered")
    assert not any(record.exc_info for record in caplog.records)
    record_fault(
        f"a database that takes no writes: {kind}",
        count=1,
        checked="the error, health, reads, the log, writes afterwards",
        result=f"writes are refused as {'STORE_FULL' if kind in FULL else 'STORE_UNAVAILABLE'}, reads go on",
    )


def test_when_others_use_up_the_connections_calls_on_open_sessions_succeed(
    postgres, postgres_url, caplog, record_fault
):
    name = postgres_url.rpartition("/")[2]

    async def main() -> None:
        store = await PostgresStore.open(postgres_url)
        await done(store, Create(id="a"))
        postgres.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 1")
        crowd = await asyncio.gather(*(store.get("default", "a") for _ in range(20)), return_exceptions=True)
        assert {type(result) for result in crowd} == {Job, errors.StoreUnavailableError}
        assert store.writable
        await store.close()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert caplog.messages == []
    record_fault(
        "others use up the connections of the database",
        count=1,
        checked="20 reads at once",
        result="calls on open sessions succeed, others are UNAVAILABLE",
    )


USES = {"its method": lambda session: session.fetchval("SELECT 1"), "the driver's": lambda session: session._protocol}


@pytest.mark.parametrize("use", USES)
def test_a_session_that_is_cut_between_two_statements_is_unavailable(postgres_url, use):
    async def cut_and_use(store: PostgresStore) -> None:
        async with store._database.connection() as connection:
            connection.terminate()  # as the probe does in an outage
            await USES[use](connection)  # the second is an AttributeError

    async def main() -> None:
        store = await PostgresStore.open(postgres_url)
        with pytest.raises(errors.StoreUnavailableError, match="the connection was lost"):
            await cut_and_use(store)
        await store.close()

    asyncio.run(main())
