"""The connections to a PostgreSQL database, and what their errors mean. No error says more than the database did."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeAlias

import asyncpg

from jobstatus_grpc.errors import CannotStartError, JobStatusError, StoreFullError, StoreUnavailableError
from jobstatus_grpc.stores.postgres.connect import AWAY, CONNECT_SECONDS, Connector, read_address

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

Connection: TypeAlias = "asyncpg.Connection[Any] | PoolConnectionProxy[Any]"

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 8

CALL_SECONDS = 2.5
"""How long a connection may be lent, from when it is asked for: callers hear within 3 s that the database is away."""

QUIET_SECONDS = 1.0
"""A database that answered others within this time is slow rather than away."""

PROBE_SECONDS = 0.5

START_SECONDS = 30.0
"""So long a database may take to start, when this process does."""

_FULL = (asyncpg.DiskFullError, asyncpg.OutOfMemoryError)

_PASSING = (asyncpg.TransactionRollbackError, asyncpg.LockNotAvailableError)

_STARTING = (
    asyncpg.CannotConnectNowError,
    asyncpg.TargetServerAttributeNotMatched,
    asyncpg.ReadOnlySQLTransactionError,
)

_LATE = "it does not answer in time"


class Database:
    """A pool of connections, that knows whether the database can be written. For one event loop."""

    def __init__(self, connector: Connector) -> None:
        """Take what connects; see `open`."""
        self._connector = connector
        self.connect = connector.connect
        """Makes a connection beside the pool's, for whoever keeps one."""
        self._pool: asyncpg.Pool[Any] = asyncpg.create_pool(
            min_size=1, max_size=MAX_CONNECTIONS, connect=self._connect, reset=_keep
        )
        self._lent: set[Any] = set()
        self._away = ""
        self._answered_at = float("-inf")
        self._is_closed = False
        self._probing: asyncio.Task[None] | None = None
        self.returned = asyncio.Event()
        """Set when the database is back; whoever waits for that clears it."""

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connect to the database that `url` names, once it takes writes.

        Raises:
            CannotStartError: it cannot be reached, or does not let us in.
        """
        database = cls(Connector(read_address(url)))
        try:
            await database._wait_for_start()
            await database._pool
        except (ValueError, asyncpg.PostgresError, *AWAY) as error:
            where = database._connector.address.name
            raise CannotStartError(f"cannot open the store on {where}: {describe(error)}; {_advice(error)}") from None
        return database

    @property
    def writable(self) -> bool:
        """Whether the last statement went through, or a probe since."""
        return not self._away and not self._is_closed

    @contextlib.asynccontextmanager
    async def connection(self, *, seconds: float = CALL_SECONDS) -> AsyncIterator[Connection]:
        """Lend a connection for the length of a block, which ends after `seconds` in any case.

        Raises:
            StoreUnavailableError, StoreFullError: the database is away, or has no room; what the block had not
                committed is not written.
        """
        if self._is_closed:
            raise StoreUnavailableError("the store is closed")
        if self._away:  # nobody needs to wait to find out again
            raise StoreUnavailableError(f"the database cannot be used: {self._away}")
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + seconds
        try:
            async with self._pool.acquire(timeout=CONNECT_SECONDS) as connection:
                end = loop.call_at(ends_at, _cut, connection)
                self._lent.add(connection)
                try:
                    yield connection
                finally:
                    self._lent.discard(connection)
                    end.cancel()
            self._answered_at = loop.time()
        except JobStatusError:
            raise
        except Exception as error:
            judged = self.judge(error, is_late=loop.time() >= ends_at or isinstance(error, asyncio.TimeoutError))
            if judged is error:
                raise
            raise judged from error

    def judge(self, error: Exception, *, is_late: bool = False) -> Exception:
        """Note what `error` says, and return what the caller is told."""
        if isinstance(error, _FULL):
            return StoreFullError()
        if not isinstance(error, AWAY):
            return error  # a mistake of ours
        why = _LATE if is_late else describe(error)
        if not isinstance(error, _PASSING):
            if is_late and asyncio.get_running_loop().time() - self._answered_at > QUIET_SECONDS:
                self._away = why
            self._probe_soon()
        return StoreUnavailableError(f"the database cannot be used: {why}")

    async def close(self) -> None:
        """Close every connection; those in use are given a moment."""
        self._is_closed = True
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        try:
            await asyncio.wait_for(self._pool.close(), CALL_SECONDS)
        except (asyncio.TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            self._pool.terminate()

    async def _connect(self, *_: Any, **others: Any) -> asyncpg.Connection[Any]:
        return await self._connector.connect(**others)

    def _probe_soon(self) -> None:
        if not self._is_closed and (self._probing is None or self._probing.done()):
            self._probing = asyncio.ensure_future(self._probe())

    async def _probe(self) -> None:
        """Find out whether the database is away, and if so, wait until it takes writes again."""
        was_away = False
        while True:
            try:
                await self._try()
                break
            except (asyncpg.PostgresError, *AWAY) as error:
                self._away = describe(error)
                if not was_away:
                    logger.error("the database cannot be used: %s", self._away)
                was_away = True
                for connection in list(self._lent):
                    _cut(connection)
            await asyncio.sleep(PROBE_SECONDS)
        # Others of the pool may lead to a server that is gone.
        await self._pool.expire_connections()
        self._away = ""
        if was_away:
            self.returned.set()
            logger.warning("the database can be used again")

    async def _try(self) -> None:
        connection = await self._connector.connect(command_timeout=CONNECT_SECONDS)
        try:
            if await connection.fetchval("SELECT pg_is_in_recovery()"):
                raise asyncpg.ReadOnlySQLTransactionError("it is a standby, or recovers")
        finally:
            connection.terminate()

    async def _wait_for_start(self) -> None:
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + START_SECONDS
        is_told = False
        while True:
            try:
                return await self._try()
            except _STARTING as error:
                if loop.time() >= ends_at:
                    raise
                if not is_told:
                    logger.warning("waiting for the database: %s", describe(error))
                    is_told = True
            await asyncio.sleep(PROBE_SECONDS)


async def _keep(_: Connection) -> None:
    """Keep a session as it is: no block leaves anything in one, and to clear it would take another round."""


def _cut(connection: Connection) -> None:
    with contextlib.suppress(asyncpg.InterfaceError):  # it has been lost
        connection.terminate()


def describe(error: BaseException) -> str:
    """Return one line that names what went wrong, and never the URL, which may hold a password."""
    if isinstance(error, asyncio.TimeoutError):
        return _LATE
    return str(error).partition("\n")[0] or type(error).__name__


def _advice(error: Exception) -> str:
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return "create it, or name another in --store"
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return "check the user and the password in --store or its passfile, and the server's pg_hba.conf"
    if isinstance(error, _STARTING):
        return "name every host, with target_session_attrs=read-write, and see that one takes writes"
    if isinstance(error, asyncpg.PostgresError) or not isinstance(error, (OSError, asyncio.TimeoutError)):
        return "check --store"
    return "see that it runs, and check --store"
