"""Makes connections to PostgreSQL: to one of several hosts, each given its own time."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg

from jobstatus_grpc.stores.postgres_address import Address

CONNECT_SECONDS = 2.0
"""For all hosts together."""

_SESSION = """
    -- A process that is stopped, or whose machine is gone, must not hold the rows of jobs for ever.
    SET idle_in_transaction_session_timeout = '5s';
    SET lock_timeout = '30s';
    SET tcp_keepalives_idle = 5; SET tcp_keepalives_interval = 2; SET tcp_keepalives_count = 3;
"""
_NAME = {"application_name": "jobstatus"}

AWAY = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InternalClientError,
    asyncpg.TargetServerAttributeNotMatched,
)
"""What passes: the server is starting, stopping, away, in the middle of a failover, or too busy."""


class Connector:
    """Connects to whichever of the hosts takes us, first to the one that last did. For one event loop."""

    def __init__(self, address: Address) -> None:
        """Take where to connect."""
        self.address = address
        self._first = 0

    async def connect(self, *, seconds: float = CONNECT_SECONDS, **settings: Any) -> asyncpg.Connection[Any]:
        """Return a new connection.

        Args:
            seconds: how long it may take.
            settings: as asyncpg.connect has them.

        Raises:
            OSError, asyncio.TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: no host takes us; of the last.
        """
        hosts = self.address.hosts
        if len(hosts) < 2:
            return await self._connect(timeout=seconds, **settings)
        # The driver tries several hosts too, but one that does not answer would leave no time for the next.
        for turn in range(len(hosts)):
            number = (self._first + turn) % len(hosts)
            host, port = hosts[number]
            try:
                connection = await self._connect(host=host, port=port, timeout=seconds / len(hosts), **settings)
            except AWAY as error:
                failure = error
            else:
                self._first = number
                return connection
        raise failure

    async def _connect(self, *, timeout: float, **settings: Any) -> asyncpg.Connection[Any]:
        connection = await asyncpg.connect(self.address.url, timeout=timeout, server_settings=_NAME, **settings)
        try:
            await connection.execute(_SESSION, timeout=timeout)
        except BaseException:
            connection.terminate()
            raise
        return connection
