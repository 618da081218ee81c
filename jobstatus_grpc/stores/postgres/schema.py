"""The PostgreSQL store's schema: made and migrated by whoever comes first, refused where it is newer than this code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import asyncpg

from jobstatus_grpc.errors import CannotStartError, StoreUnavailableError
from jobstatus_grpc.stores.postgres.database import Database, describe
from jobstatus_grpc.stores.sql.migrations import migrations

if TYPE_CHECKING:
    from jobstatus_grpc.stores.postgres.database import Connection

SCHEMA_LOCK = 0x4A6F6253_0001
"""The key of the advisory lock under which one process migrates."""

LOCK_SECONDS = 60.0

MIGRATION_SECONDS = 3600.0

OLDEST_SERVER = (15, 0)

# Not to_regclass: within a transaction it may not see what another has made while we waited for the lock.
_HAS_VERSION = """
    SELECT EXISTS (
        SELECT 1 FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = 'jobstatus' AND c.relname = 'schema_version'
    )
"""


async def prepare(database: Database, steps: Sequence[str] | None = None) -> int:
    """Bring the schema up to date, and return its version; several processes may do so at once.

    Args:
        database: open as a role that owns the schema, or may create it, unless it is up to date.
        steps: SQL from each schema version to the next; None: the project's.

    Raises:
        CannotStartError: it is newer than this code, the role may not, or the server is of no use.
    """
    steps = migrations(__package__) if steps is None else steps
    try:
        async with database.connection(seconds=MIGRATION_SECONDS) as connection:
            _check_server(connection)
            if await _version(connection) == len(steps):
                return len(steps)
            async with connection.transaction():
                await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS:.0f}s'")
                await connection.execute("SELECT pg_advisory_xact_lock($1)", SCHEMA_LOCK)
                return await _migrate(connection, steps)
    except (asyncpg.PostgresError, StoreUnavailableError) as error:
        cause = error.__cause__ if isinstance(error, StoreUnavailableError) else error
        raise CannotStartError(f"cannot prepare the store's schema: {_explain(cause or error)}") from None


def _explain(error: BaseException) -> str:
    if isinstance(error, asyncpg.LockNotAvailableError):
        return f"another process has been at it for {LOCK_SECONDS:.0f} s; try again when it is done"
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return f"{describe(error)}; have its owner run jobstatus migrate, and grant this role the schema jobstatus"
    return describe(error)


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
        # Where the schema was made for us, we need not be allowed to make one.
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
