"""Creates and migrates the PostgreSQL store's schema at startup, or in `jobstatus migrate`; refuses a newer one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import asyncpg

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.stores.postgres.connect import TRANSIENT_ERRORS
from jobstatus_grpc.stores.postgres.database import Database, cannot_start, explain
from jobstatus_grpc.stores.sql.migrations import migrations

if TYPE_CHECKING:
    from jobstatus_grpc.stores.postgres.database import Connection

SCHEMA_LOCK = 0x4A6F6253_0001
"""Key of the advisory lock that one process holds while it migrates."""

LOCK_SECONDS = 60.0
"""How long a process waits for another one's migration, in seconds, before it gives up."""

MIGRATION_SECONDS = 3600.0
"""Longest time for one step of a migration, in seconds: it may rewrite a large table."""

OLDEST_SERVER = (15, 0)

# Not to_regclass(): in a transaction it may miss a table that another one created while this one waited for the lock.
_HAS_VERSION = """
    SELECT EXISTS (
        SELECT 1 FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = 'jobstatus' AND c.relname = 'schema_version'
    )
"""


async def prepare(database: Database, steps: Sequence[str] | None = None) -> int:
    """Bring the schema up to date, and return its version. Several processes may call this at once.

    Args:
        database: connected as a role that owns the schema or may create it; any role if the schema is up to date.
        steps: SQL from each schema version to the next; None: schema.sql.

    Raises:
        StoreUnreachableError: the database was lost, or another process migrates it; the schema is as it was.
        CannotStartError: the schema is newer than this code, the role lacks a right, or the server is too old or has
            another encoding than UTF8. The schema is as it was.
    """
    steps = migrations(__package__) if steps is None else steps
    try:
        connection = await database.connect(command_timeout=MIGRATION_SECONDS)
        try:
            _check_server(connection)
            if await _version(connection) == len(steps):
                return len(steps)
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS:.0f}s'")
                await connection.execute("SELECT pg_advisory_xact_lock($1)", SCHEMA_LOCK)
                return await _migrate(connection, steps)
        finally:
            connection.terminate()
    except (asyncpg.PostgresError, *TRANSIENT_ERRORS) as error:
        raise cannot_start(f"cannot prepare the store's schema: {_explain(error)}", error) from None


def _check_server(connection: Connection) -> None:
    version = connection.get_server_version()
    if version < OLDEST_SERVER:
        raise CannotStartError(f"the store needs PostgreSQL {OLDEST_SERVER[0]} or newer, this is {version.major}")
    encoding = connection.get_settings().server_encoding
    if encoding != "UTF8":
        raise CannotStartError(f"the store needs a database whose encoding is UTF8, this one's is {encoding}")


async def _migrate(connection: Connection, steps: Sequence[str]) -> int:
    version = await _version(connection)
    if version > len(steps):
        raise CannotStartError(
            f"the store's schema is version {version}, newer than version {len(steps)}, the newest known here; "
            "run the release that wrote it, or a later one"
        )
    if not version:
        # A role that was given an empty schema may lack the right to create one.
        if not await connection.fetchval("SELECT 1 FROM pg_namespace WHERE nspname = 'jobstatus'"):
            await connection.execute("CREATE SCHEMA jobstatus")
        await connection.execute("CREATE TABLE jobstatus.schema_version (version integer NOT NULL)")
        await connection.execute("INSERT INTO jobstatus.schema_version VALUES (0)")
    for number, script in enumerate(steps[version:], start=version + 1):
        await connection.execute(script)
        await connection.execute("UPDATE jobstatus.schema_version SET version = $1", number)
    return len(steps)


async def _version(connection: Connection) -> int:
    if await connection.fetchval(_HAS_VERSION):
        return int(await connection.fetchval("SELECT version FROM jobstatus.schema_version"))
    return 0


def _explain(error: Exception) -> str:
    if isinstance(error, asyncpg.LockNotAvailableError):
        return f"another process has been migrating it for {LOCK_SECONDS:.0f} s; try again when that has ended"
    return explain(error)
