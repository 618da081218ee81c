"""The pool of sessions to PostgreSQL, and whether the database can be written.

Commits, reads and the feed borrow their sessions here. The notifier and the maintenance leader keep one each of their
own, from `Database.connect`.

The server never has more sessions than the pool: what takes too long is also cancelled there, and a COMMIT, which must
not be cancelled, keeps its session until it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg
from asyncpg.compat import timeout

from jobstatus_grpc.errors import (
    CannotStartError,
    JobStatusError,
    RetryableError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnreachableError,
)
from jobstatus_grpc.stores.outage_log import OutageLog
from jobstatus_grpc.stores.postgres.connect import CONNECT_SECONDS, TRANSIENT_ERRORS, Connector, read_address

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy
    from asyncpg.transaction import Transaction

Connection: TypeAlias = "asyncpg.Connection[Any] | PoolConnectionProxy[Any]"

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 8
"""Sessions in the pool: three commits, four that wait for locked jobs, and one left for reads and the feed."""

CALL_SECONDS = 2.5
"""Longest time to get and use a session, in seconds: in an outage callers have their error within 3 s."""

CANCEL_SECONDS = 0.3
"""How long the server may take to confirm that it has cancelled a statement, in seconds, before the session is cut."""

LINGER_SECONDS = 2.0
"""How long the place of a session that was cut stays taken, in seconds.

By then the server has ended what it did for it: see client_connection_check_interval in connect.py.
"""

QUIET_SECONDS = 1.0
"""A timeout is an outage only if no statement has succeeded for this many seconds; else one statement is slow."""

PROBE_SECONDS = 0.5
"""Pause between two probes of an unavailable database, in seconds."""

START_SECONDS = 30.0
"""How long to wait at startup, in seconds, for a database that is starting or being promoted."""

# These end one transaction, and say nothing about the server.
_CONFLICT_ERRORS = (asyncpg.TransactionRollbackError, asyncpg.LockNotAvailableError)

# These end a session or a statement, and say nothing about the next one.
_SESSION_ERRORS = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InvalidTransactionStateError,
    asyncpg.InvalidCachedStatementError,
)

_STARTING_ERRORS = (
    asyncpg.CannotConnectNowError,
    asyncpg.TargetServerAttributeNotMatched,
    asyncpg.ReadOnlySQLTransactionError,
)

# While pg_restore drops and creates the tables, and grants the rights last.
_SCHEMA_ERRORS = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.InvalidSchemaNameError,
    asyncpg.InsufficientPrivilegeError,
)

# Any other error of the server is trouble of its own: a full disk, a file that cannot be read, a limit, a trigger.
_BUGS = (asyncpg.SyntaxOrAccessError, asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)

_SETTINGS_ERRORS = (ValueError, asyncpg.InvalidAuthorizationSpecificationError)
"""Those of the TRANSIENT_ERRORS that at start mean wrong settings."""

_LATE = "it does not answer in time"

_LOST = "the connection was lost"

_READ_ONLY = "it accepts no writes: a standby, in recovery, or read-only"

_HANGING = "a COMMIT does not end: no synchronous standby confirms it, or the disk hangs"

_CALLS_FAIL = "calls fail with STORE_UNAVAILABLE, watches stay open"

_WRITES_FAIL = "writes fail with {reason}, reads and watches go on"

_LOOK = "SELECT pg_is_in_recovery(), current_setting('transaction_read_only')::boolean"

_ACTIVE = "SELECT pid FROM pg_stat_activity WHERE pid = ANY($1::integer[]) AND state = 'active'"


async def _write_nothing(_: Connection) -> None:
    pass


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
        # Beside the pool, which opens another session as soon as one is cut, while the server may still work for it.
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._in_use: set[Any] = set()
        self._cut: set[Any] = set()
        self._commits: dict[Any, asyncio.Future[None]] = {}
        self._hanging: dict[Any, asyncio.Task[None]] = {}
        """The sessions whose COMMIT has outlasted its block, with the tasks that wait for its end."""
        self.try_write: Callable[[Connection], Awaitable[None]] = _write_nothing
        """Writes in a session as a commit does, and takes it back; by this a probe learns whether writes succeed."""
        self._outage = ""  # why the database is unavailable; empty: it is available
        self._refusal: RetryableError | None = None  # why it takes no writes, though it answers
        self._is_pool_stale = False
        self._outage_log = OutageLog(logger, f"the database on {connector.address.name}", level=logging.ERROR)
        self._answered_at = float("-inf")
        self._is_closed = False
        self._probing: asyncio.Task[None] | None = None

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
        """Whether the database is available and takes writes, as far as statements and probes have shown."""
        return not self._outage and self._refusal is None and not self._hanging and not self._is_closed

    def check_writes(self) -> None:
        """Refuse a write at once while writes fail; the probe finds out when they succeed.

        Raises:
            StoreUnavailableError, StoreFullError: as `connection`.
        """
        if self._refusal is not None:
            raise type(self._refusal)(str(self._refusal))
        if self._hanging:
            raise StoreUnavailableError(_refused(_HANGING))

    @contextlib.asynccontextmanager
    async def connection(self, *, seconds: float = CALL_SECONDS) -> AsyncIterator[Connection]:
        """Lend a session for the length of a block. After `seconds` its statement is cancelled, and the block fails.

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
        is_open = is_lost = False
        try:
            async with timeout(min(seconds, CONNECT_SECONDS)):
                connection = await self._take()
            is_open = True
            # Where the server does not even answer to the cancellation.
            cut = loop.call_at(ends_at + CANCEL_SECONDS, self._end, connection)
            self._in_use.add(connection)
            try:
                async with timeout(max(0.0, ends_at - loop.time())):
                    yield connection
            finally:
                self._in_use.discard(connection)
                is_lost = _is_lost(connection)
                await self._release(connection)
                cut.cancel()
            self._answered_at = loop.time()
        except JobStatusError:
            raise
        except Exception as error:
            is_late = loop.time() >= ends_at or isinstance(error, asyncio.TimeoutError)
            raised = self._translate(error, is_open=is_open, is_lost=is_lost, is_late=is_late)
            if raised is error:
                raise
            raise raised from error

    async def _take(self) -> Any:
        await self._places.acquire()
        try:
            return await self._pool.acquire()
        except BaseException:
            self._places.release()
            raise

    async def _give_back(self, connection: Any) -> None:
        try:
            await self._pool.release(connection)
        finally:
            if connection in self._cut:
                self._cut.remove(connection)
                asyncio.get_running_loop().call_later(LINGER_SECONDS, self._places.release)
            else:
                self._places.release()

    def _end(self, connection: Any) -> None:
        """Cut a session that is in use."""
        if not _is_lost(connection):
            self._cut.add(connection)
            connection.terminate()

    async def commit(self, connection: Connection, transaction: Transaction) -> None:
        """Commit a transaction of the block that has borrowed the connection.

        A COMMIT is not cancelled with its block: while it waits for a synchronous standby, that would show others a
        transaction that the standby may not have. It keeps its session, and no other write begins until it ends.
        """
        committing = asyncio.ensure_future(transaction.commit())
        self._commits[connection] = committing
        await asyncio.shield(committing)

    async def _release(self, connection: Any) -> None:
        committing = self._commits.pop(connection, None)
        if committing is None or committing.done():
            await self._give_back(connection)
        else:
            self._hanging[connection] = asyncio.ensure_future(self._release_later(connection, committing))
            self._start_probe()

    async def _release_later(self, connection: Any, committing: asyncio.Future[None]) -> None:
        await asyncio.wait((committing,))
        if not committing.cancelled():
            committing.exception()  # its block has failed already
        del self._hanging[connection]
        with contextlib.suppress(Exception):  # then it is lost, and the pool opens another
            await self._give_back(connection)

    def _translate(self, error: Exception, *, is_open: bool, is_lost: bool, is_late: bool) -> Exception:
        """Return what to raise for an error with a session, or before one was open; start a probe for an outage."""
        if isinstance(error, _CONFLICT_ERRORS):
            return StoreUnavailableError(f"the database is unavailable: {describe(error)}")
        if is_open and not is_lost:
            if _is_bug(error):
                return error
            if _is_refusal(error):
                kind = self._refuse_writes(error)
                self._start_probe()
                return kind(f"the database cannot do this: {describe(error)}")
        elif not isinstance(error, (asyncio.TimeoutError, asyncpg.TooManyConnectionsError)):
            self._is_pool_stale = True
        # The driver makes any error of a session that is cut between two steps of its own, an AttributeError too.
        says_why = isinstance(error, asyncpg.PostgresError) or not is_lost
        reason = _LATE if is_late else describe(error) if says_why else _LOST
        if is_late and asyncio.get_running_loop().time() - self._answered_at > QUIET_SECONDS:
            self._outage = reason
        self._start_probe()
        return StoreUnavailableError(f"the database is unavailable: {reason}")

    def _refuse_writes(self, error: BaseException) -> type[RetryableError]:
        """Note that the database answers, but takes no writes because of this error; return what to raise for it."""
        kind: type[RetryableError] = StoreFullError if _is_full(error) else StoreUnavailableError
        self._is_pool_stale |= isinstance(error, asyncpg.ReadOnlySQLTransactionError)  # a session stays as it began
        self._refusal = kind(_refused(describe(error)))
        failing = _WRITES_FAIL.format(reason=kind.reason)
        self._outage_log.failed(StoreUnavailableError(f"{describe(error)}; {failing}; {_advice(error)}"))
        return kind

    def _start_probe(self) -> None:
        if not self._is_closed and (self._probing is None or self._probing.done()):
            self._probing = asyncio.ensure_future(self._probe())

    async def _probe(self) -> None:
        """Find out whether there is an outage, and wait for its end."""
        while True:
            try:
                refusal = await self._check()
            except (asyncpg.PostgresError, *TRANSIENT_ERRORS) as error:
                self._outage, self._refusal, self._is_pool_stale = describe(error), None, True
                self._outage_log.failed(StoreUnavailableError(f"{self._outage}; {_CALLS_FAIL}; {_advice(error)}"))
                for connection in [*self._in_use, *self._hanging]:
                    self._end(connection)
            else:
                if self._is_pool_stale:  # the pool's other sessions may still lead to a server that is gone
                    self._is_pool_stale = False
                    await self._pool.expire_connections()
                self._outage, self._refusal = "", None
                if refusal is None and self._hanging:
                    refusal = StoreUnavailableError(_HANGING)
                if refusal is None:
                    break
                self._refuse_writes(refusal)
            await asyncio.sleep(PROBE_SECONDS)
        self._outage_log.recovered()

    async def _check(self) -> Exception | None:
        """Raise unless the database answers and is a primary; return the error of a write, None if that succeeds."""
        try:
            connection = await self._connector.connect(command_timeout=CONNECT_SECONDS)
        except asyncpg.TooManyConnectionsError:
            if asyncio.get_running_loop().time() - self._answered_at > QUIET_SECONDS:
                raise
            return None  # the open sessions go on
        try:
            is_standby, is_read_only = await connection.fetchrow(_LOOK)
            if is_standby:
                raise _read_only()
            if is_read_only:
                return _read_only()
            await self._cut_answered(connection)
            try:
                await self.try_write(connection)
            except Exception as error:
                if _is_lost(connection):
                    raise
                return error
        finally:
            connection.terminate()
        return None

    async def _cut_answered(self, connection: Connection) -> None:
        """Cut sessions whose COMMIT the server has ended, but whose answer does not arrive."""
        pids = {session.get_server_pid(): session for session in self._hanging if not _is_lost(session)}
        if pids:
            active = {row[0] for row in await connection.fetch(_ACTIVE, list(pids))}
            for pid, session in pids.items():
                if pid not in active and session in self._hanging:
                    self._end(session)

    async def _wait_for_start(self) -> None:
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + START_SECONDS
        is_logged = False
        while True:
            try:
                if (refusal := await self._check()) is not None:
                    raise refusal
                return
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
        await asyncio.gather(*self._hanging.values(), return_exceptions=True)

    async def _connect(self, *_: Any, **others: Any) -> asyncpg.Connection[Any]:
        # The pool passes a DSN and arguments of its own; the connector has the URL.
        return await self._connector.connect(**others)


async def _skip_reset(_: Connection) -> None:
    """Leave a returned session as it is: no block changes its settings, and a reset costs one more round trip."""


def _is_lost(connection: Connection) -> bool:
    try:
        return bool(connection.is_closed())
    except asyncpg.InterfaceError:  # the pool has taken it back
        return True


def _is_bug(error: BaseException) -> bool:
    """Whether an error of an open session is neither an outage nor trouble of the server, but a mistake of ours."""
    if isinstance(error, asyncpg.PostgresError):
        return isinstance(error, _BUGS) and not isinstance(error, _SCHEMA_ERRORS)
    return not isinstance(error, TRANSIENT_ERRORS)


def _is_refusal(error: BaseException) -> bool:
    """Whether a server that answers has refused a statement, and would refuse it again."""
    if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        return True
    return isinstance(error, asyncpg.PostgresError) and not isinstance(error, _SESSION_ERRORS)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, asyncpg.DiskFullError) or "quota exceeded" in str(error)


def _read_only() -> Exception:
    error: Exception = asyncpg.ReadOnlySQLTransactionError(_READ_ONLY)
    return error


def _refused(reason: str) -> str:
    return f"the database takes no writes: {reason}"


def describe(error: BaseException) -> str:
    """Return one line that names what went wrong; never the URL, which may hold a password."""
    if isinstance(error, asyncio.TimeoutError):
        return _LATE
    if isinstance(error, asyncpg.InternalClientError):  # of a session that was cut while it was in use
        return _LOST
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
    if _is_full(error):
        return "make room for its tablespace and its WAL"
    if isinstance(error, StoreUnavailableError):
        return "see that a standby of synchronous_standby_names runs, and the state of the disk"
    is_trouble = isinstance(error, asyncpg.PostgresError) and not isinstance(error, TRANSIENT_ERRORS)
    if is_trouble or isinstance(error, asyncpg.InsufficientResourcesError):
        return "see the log of the database server"
    if isinstance(error, asyncpg.PostgresError) or not isinstance(error, (OSError, asyncio.TimeoutError)):
        return "check --store"
    return "see that it runs, and check --store"
