"""A database that is lost or cannot be used: calls fail at once, and the log has one line about it."""

from __future__ import annotations

import asyncio
import re

import pytest

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.job import Create
from jobstatus_grpc.stores.postgres.store import PostgresStore

OUTAGES = {
    "ALTER DATABASE {0} CONNECTION LIMIT 0": (
        "too many connections for",
        "raise max_connections",
        "ALTER DATABASE {0} CONNECTION LIMIT -1",
    ),
    "ALTER DATABASE {0} SET default_transaction_read_only = on": (
        "it accepts no writes",
        "name every host",
        "ALTER DATABASE {0} RESET default_transaction_read_only",
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


async def refused(store: PostgresStore, says: str) -> None:
    """Commit until that is refused for this reason."""
    while True:
        try:
            await store.commit([Create(id="a")])
        except StoreUnavailableError as error:
            if re.search(says, str(error)):
                return


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
        await store._database.recovered.wait()
        await store.commit([Create(id="b")])
        await store.close()

    asyncio.run(main())
    begun, over = caplog.messages
    assert re.search(f"the database on .* is unavailable, retrying: .*{says}.*; calls fail .*; {advice}", begun)
    assert over.endswith("has recovered")
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("REVOKE ALL ON jobstatus.jobs FROM jobstatus", "permission denied for table jobs; .*run jobstatus migrate"),
        ("ALTER SCHEMA jobstatus RENAME TO away", "does not exist; .*wait for pg_restore to end"),
    ],
)
def test_a_schema_that_cannot_be_used_is_one_line_and_no_internal_error(
    postgres, postgres_url, statement, says, caplog
):
    async def main() -> None:
        store = await PostgresStore.open(postgres_url)
        postgres.execute(statement, postgres_url.rpartition("/")[2])
        for _ in range(3):
            await refused(store, "the schema is being restored, or gone")
        await store.close()

    asyncio.run(main())
    (line,) = caplog.messages
    assert re.search(f"the schema jobstatus on .* is unavailable, retrying: .*{says}", line)
