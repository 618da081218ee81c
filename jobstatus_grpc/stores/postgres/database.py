"""The pool of sessions to PostgreSQL, and whether the database can be written.

Commits, reads and the feed borrow their sessions here. The notifier and the maintenance leader keep one each of their
own, from `Database.connect`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg

from jobstatus_grpc.errors import (
    CannotStartError,
    JobStatusError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnreachableError,
)
from jobstatus_grpc.stores.outage_log import OutageLog
from jobstatus_grpc.stores.postgres.connect import CONNECT_SECONDS, TRANSIENT_ERRORS, Connector, read_address

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

Connection: TypeAlias = "asyncpg.Connection[Any] | PoolConnectionProxy[Any]"

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 8
"""Sessions in the pool: three commits, four that wait for locked jobs, and one left for reads and the feed."""

CALL_SECONDS = 2.5
"""Longest time to get and use a session, in seconds: in an outage callers have their error within 3 s."""

QUIET_SECONDS = 1.0
"""A timeout is an outage only if no statement has succeeded for this many seconds; else one statement is slow."""

PROBE_SECONDS = 0.5
"""Pause between two probes of an unavailable database, in seconds."""

START_SECONDS = 30.0
"""How long to wait at startup, in seconds, for a database that is starting or being promoted."""

_FULL_ERRORS = (asyncpg.DiskFullError, asyncpg.OutOfMemoryError)

# These end one transaction, and say nothing about the server.
_CONFLICT_ERRORS = (asyncpg.TransactionRollbackError, asyncpg.LockNotAvailableError)

_STARTING_ERRORS = (
    asyncpg.CannotConnectNowError,
    asyncpg.TargetServerAttributeNotMatched,
    asyncpg.ReadOnlySQLTransactionError,
)

# While pg_restore drops and creates the tables, and grants the rights last.
_SCHEMA_ERRORS = (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError, asyncpg.InsufficientPrivilegeError)

_SETTINGS_ERRORS = (ValueError, asyncpg.InvalidAuthorizationSpecificationError)
"""Those of the TRANSIENT_ERRORS that at start mean wrong settings."""

_LATE = "it does not answer in time"

_NEXT = "calls fail with STORE_UNAVAILABLE, watches stay open"


class Database:
    """A pool of sessions that fails fast while the database is unavailable, and recovers by itself.

    For one event loop.
    """

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self.connect = connector.connect
        """Opens a session outside the pool, which the caller keeps and closes."""
        # With a larger min_size, the pool itself connects while the database is away, and logs a traceback each time.
        self._pool: asyncpg.Pool[Any] = asyncpg.create_pool(
            min_size=0, max_size=MAX_CONNECTIONS, connect=self._connect, reset=_skip_reset
        )
        self._in_use: set[Any] = set()
        self._outage = ""  # why the database is unavailable; empty: it is available
        name = connector.address.name
        self._outage_log = OutageLog(logger, f"the database on {name}", level=logging.ERROR)
        self._schema_log = OutageLog(logger, f"the schema jobstatus on {name}", level=logging.ERROR)
        self._answered_at = float("-inf")
        self._is_closed = False
        self._probing: asyncio.Task[None] | None = None
        self.recovered = asyncio.Event()
        """Set at the end of an outage; the one reader, maintenance, clears it."""

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connect to the database at `url`, once it accepts writes.

        Raises:
            StoreUnreachableError: it cannot be reached.
            CannotStartError: it refuses the role, or does not exist.
        """
        database = cls(Connector(read_address(url)))
        try:
            await database._wait_for_start()
            await database._pool
        except (ValueError, asyncpg.PostgresError, *TRANSIENT_ERRORS) as error:
            raise database.start_error(error) from None
        return database

    def start_error(self, error: BaseException) -> CannotStartError:
        """Return what to raise for an error of the driver while the store is opened."""
        return cannot_start(f"cannot open the store on {self._connector.address.name}: {explain(error)}", error)

    @property
    def writable(self) -> bool:
        """Whether the database is available, as far as statements and probes have shown."""
        return not self._outage and not self._is_closed

    @contextlib.asynccontextmanager
    async def connection(self, *, seconds: float = CALL_SECONDS) -> AsyncIterator[Connection]:
        """Lend a session for the length of a block. After `seconds` it is cut, and the block fails.

        Raises:
            StoreUnavailableError, StoreFullError: the database is unavailable, or has no room. What the block did not
                commit is not written.
        """
        if self._is_closed:
            raise StoreUnavailableError("the store is closed")
        if self._outage:  # fail at once: the probe finds out when the database is back
            raise StoreUnavailableError(f"the database is unavailable: {self._outage}")
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + seconds
        is_open = False
        try:
            async with self._pool.acquire(timeout=CONNECT_SECONDS) as connection:
                is_open = True
                end = loop.call_at(ends_at, _cut, connection)
                self._in_use.add(connection)
                try:
                    yield connection
                finally:
                    self._in_use.discard(connection)
                    end.cancel()
            self._answered_at = loop.time()
        except JobStatusError:
            raise
        except Exception as error:
            is_late = loop.time() >= ends_at or isinstance(error, asyncio.TimeoutError)
            raised = self._translate(error, is_open=is_open, is_late=is_late)
            if raised is error:
                raise
            raise raised from error

    def _translate(self, error: Exception, *, is_open: bool, is_late: bool) -> Exception:
        """Return what to raise for an error with a session, or before one was open; start a probe for an outage."""
        if isinstance(error, _FULL_ERRORS):
            return StoreFullError()
        if is_open and isinstance(error, _SCHEMA_ERRORS):
            self._schema_log.failed(StoreUnavailableError(f"{describe(error)}; {_NEXT}; {_advice(error)}"))
            return StoreUnavailableError(f"the schema is being restored, or gone: {describe(error)}")
        is_refused = not is_open and isinstance(error, asyncpg.PostgresError)
        if not is_refused and not isinstance(error, TRANSIENT_ERRORS):
            return error  # a bug of ours, no outage
        reason = _LATE if is_late else describe(error)
        if not isinstance(error, _CONFLICT_ERRORS):
            if is_late and asyncio.get_running_loop().time() - self._answered_at > QUIET_SECONDS:
                self._outage = reason
            self._start_probe()
        return StoreUnavailableError(f"the database is unavailable: {reason}")

    def _start_probe(self) -> None:
        if not self._is_closed and (self._probing is None or self._probing.done()):
            self._probing = asyncio.ensure_future(self._probe())

    async def _probe(self) -> None:
        """Find out whether there is an outage, and wait for its end."""
        while True:
            try:
                await self._check_writable()
                break
            except (asyncpg.PostgresError, *TRANSIENT_ERRORS) as error:
                self._outage = describe(error)
                self._outage_log.failed(StoreUnavailableError(f"{self._outage}; {_NEXT}; {_advice(error)}"))
                for connection in list(self._in_use):
                    _cut(connection)
            await asyncio.sleep(PROBE_SECONDS)
        # The pool's other sessions may still lead to a server that is gone.
        await self._pool.expire_connections()
        self._outage = ""
        if self._outage_log.lasts:
            self.recovered.set()
        self._outage_log.recovered()

    async def _check_writable(self) -> None:
        connection = await self._connector.connect(command_timeout=CONNECT_SECONDS)
        try:
            if await connection.fetchval("SELECT current_setting('transaction_read_only')::boolean"):
                raise asyncpg.ReadOnlySQLTransactionError("it accepts no writes: a standby, in recovery, or read-only")
        finally:
            connection.terminate()

    async def _wait_for_start(self) -> None:
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + START_SECONDS
        is_logged = False
        while True:
            try:
                return await self._check_writable()
            except _STARTING_ERRORS as error:
                if loop.time() >= ends_at:
                    raise
                if not is_logged:
                    logger.warning(
                        "waiting for the database on %s to accept writes, at most %.0f s: %s",
                        self._connector.address.name,
                        START_SECONDS,
                        describe(error),
                    )
                    is_logged = True
            await asyncio.sleep(PROBE_SECONDS)

    async def close(self) -> None:
        """Close every session; blocks that still use one have CALL_SECONDS to end."""
        self._is_closed = True
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        try:
            await asyncio.wait_for(self._pool.close(), CALL_SECONDS)
        except (asyncio.TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            self._pool.terminate()

    async def _connect(self, *_: Any, **others: Any) -> asyncpg.Connection[Any]:
        # The pool passes a DSN and arguments of its own; the connector has the URL.
        return await self._connector.connect(**others)


async def _skip_reset(_: Connection) -> None:
    """Leave a returned session as it is: no block changes its settings, and a reset costs one more round trip."""


def _cut(connection: Connection) -> None:
    with contextlib.suppress(asyncpg.InterfaceError):  # it is closed already
        connection.terminate()


def describe(error: BaseException) -> str:
    """Return one line that names what went wrong; never the URL, which may hold a password."""
    if isinstance(error, asyncio.TimeoutError):
        return _LATE
    if isinstance(error, asyncpg.InternalClientError):  # of a session that was cut while it was in use
        return "the connection was lost"
    if isinstance(error, OSError) and error.errno is not None:
        # asyncio's own text has the address; name resolution has negative numbers.
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error).partition("\n")[0] or type(error).__name__


def explain(error: BaseException) -> str:
    """Return what went wrong and what to do, in one line."""
    return f"{describe(error)}; {_advice(error)}"


def cannot_start(message: str, error: BaseException) -> CannotStartError:
    """Return the error to raise at start, where `error` is the driver's."""
    may_pass = isinstance(error, TRANSIENT_ERRORS) and not isinstance(error, _SETTINGS_ERRORS)
    return StoreUnreachableError(message) if may_pass else CannotStartError(message)


def _advice(error: BaseException) -> str:
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return "create it, or name another in --store"
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return "check the user and the password in --store or its passfile, and the server's pg_hba.conf"
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return (
            "have its owner run jobstatus migrate, and grant this role USAGE on the schema jobstatus, and ALL on its "
            "tables and sequences"
        )
    if isinstance(error, _SCHEMA_ERRORS):
        return "wait for pg_restore to end, or restore a backup; jobstatus migrate would create an empty schema"
    if isinstance(error, asyncpg.TooManyConnectionsError):
        return "raise max_connections of the server, or the limit of the role or the database"
    if isinstance(error, _STARTING_ERRORS):
        return "name every host, with target_session_attrs=read-write, and check that one of them accepts writes"
    if isinstance(error, asyncpg.PostgresError) or not isinstance(error, (OSError, asyncio.TimeoutError)):
        return "check --store"
    return "see that it runs, and check --store"
