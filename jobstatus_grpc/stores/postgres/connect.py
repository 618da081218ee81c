"""Makes connections to PostgreSQL: to one of several hosts, each given its own time."""

from __future__ import annotations

import asyncio
import os
import re
import stat
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncpg

from jobstatus_grpc.errors import CannotStartError

DEFAULT_PORT = 5432

_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%-]+)(?::(?P<port>[0-9]{1,5}))?")

_PARAMETER = re.compile(r"[a-z_.]{1,63}")

_ENCODE = (
    "write postgresql://USER@HOST:PORT/DATABASE?sslmode=…, and in the user and the password %40 for @, %2F for /, %3A "
    "for :, %3F for ?, %23 for # and %25 for %"
)


class Address(NamedTuple):
    """A URL that the driver can read."""

    url: str
    hosts: tuple[tuple[str, int], ...]
    """With their ports, where the URL names any after `//`; else the driver finds them in its parameters and PGHOST."""

    @property
    def name(self) -> str:
        """What people may read of it."""
        return ", ".join(f"{host}:{port}" for host, port in self.hosts) or "the host that PGHOST names"


def read_address(url: str) -> Address:
    """Return the address in `url`.

    Raises:
        CannotStartError: it is none. The message holds nothing of it but parameters' names and a password file's.
    """
    _, slashes, rest = url.partition("://")
    authority, path, query = _parts(rest)
    user, _, hosts = authority.rpartition("@")
    is_odd = not slashes or "@" in user or "@" in path + query or "#" in rest or not url.isprintable()
    if is_odd or not _is_readable(url):
        raise CannotStartError(f"the store's URL cannot be understood; {_ENCODE}")
    for name, value in _parameters(query):
        if name == "passfile":
            _check_password_file(value)
    return Address(url, tuple(_host(text) for text in hosts.split(",")) if hosts else ())


def _is_readable(url: str) -> bool:
    try:
        urlsplit(url)
    except ValueError:  # the driver's error would repeat it
        return False
    return True


def _parts(rest: str) -> tuple[str, str, str]:
    place, _, query = rest.partition("?")
    authority, _, path = place.partition("/")
    return authority, path, query


def _host(text: str) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    port = int(found["port"] or os.environ.get("PGPORT", "") or DEFAULT_PORT) if found else 0
    if found is None or not 0 < port < 65536:
        raise CannotStartError(f"a host of the store's URL cannot be understood; {_ENCODE}")
    return unquote(found["host"]).strip("[]"), port


def _parameters(query: str) -> list[tuple[str, str]]:
    try:
        parameters = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        parameters = [("", "")]
    if not all(_PARAMETER.fullmatch(name) for name, _ in parameters):
        raise CannotStartError(f"a parameter of the store's URL cannot be understood; {_ENCODE}")
    return parameters


def _check_password_file(path: str) -> None:
    """The driver would go on without it, and not say why nobody lets it in."""
    try:
        mode = os.stat(path).st_mode
        with open(path, "rb"):
            pass
    except OSError as error:
        raise CannotStartError(f"cannot read the password file {path}: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise CannotStartError(f"the password file {path} can be read by others; chmod 600 it")


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
